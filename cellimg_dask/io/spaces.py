"""Where voxels lie, from what files say of it, which is not always right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from cellimg_dask.geometry import Space

__all__ = ["shrunk_to", "tolerant_space"]


def tolerant_space(
    ndim: int,
    axes: Sequence[str] | None,
    units: Sequence[str | None],
    scale: Sequence[float],
    translation: Sequence[float],
    what: str,
) -> Space:
    """Return a space of what a file says; what cannot be is left out with a warning."""

    def left_out(text: str) -> None:
        warnings.warn(f"{what}: {text}", stacklevel=4)

    if axes is not None and (len(axes) != ndim or len(set(axes)) != ndim or not all(axes)):
        left_out(f"axes {tuple(axes)} are not {ndim} different names and are left out")
        axes, units = None, ()
    if len(units) != ndim:
        units = (None,) * ndim
    good = [n if math.isfinite(n) and n > 0 else 1.0 for n in scale]
    if list(scale) != good:
        left_out(f"scale {tuple(scale)} is not positive everywhere; 1 is taken there")
    shift = [n if math.isfinite(n) else 0.0 for n in translation]
    if list(translation) != shift:
        left_out(f"translation {tuple(translation)} is not finite everywhere; 0 is taken there")
    return Space.of(ndim, axes, tuple(units), tuple(good), tuple(shift))


def shrunk_to(space: Space, shape: Sequence[int], smaller: Sequence[int]) -> Space:
    """Return the space of a smaller version of an image, of which only the shape is known.

    Factors are whole numbers where rounding a shape up or down explains them.
    """
    scale, shift = [], []
    for axis, (size, less) in enumerate(zip(shape, smaller, strict=True)):
        ratio: Any = size / less if less and size else 1.0
        for whole in (round(ratio), math.floor(ratio), math.ceil(ratio)):
            if whole > 0 and less in (size // whole, -(-size // whole)):
                ratio = whole
                break
        step = space.scale[axis]
        scale.append(step * ratio)
        shift.append(space.translation[axis] + step * (ratio - 1) / 2)
    return Space.of(space.ndim, space.axes, space.units, tuple(scale), tuple(shift))
