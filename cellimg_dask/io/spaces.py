"""Where voxels lie, from what files say of it, which is not always right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellimg_dask.geometry import Space

__all__ = ["attributes_space", "first_of", "numbers", "shrunk_to", "texts", "tolerant_space"]


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


def numbers(value: Any, count: int) -> list[float] | None:
    """Return ``count`` numbers of a file as floats, None where that is not what there is."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value):
        return None
    return [float(n) for n in value]


def texts(value: Any, count: int) -> tuple[str, ...] | None:
    """Return ``count`` texts of a file; one is taken for all; None where there are no such."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        value = [value] * count
    if not isinstance(value, (list, tuple)) or len(value) != count:
        return None
    found = tuple(
        each.decode(errors="replace") if isinstance(each, bytes) else each for each in value
    )
    return found if all(isinstance(each, str) for each in found) else None


def first_of(attributes: Mapping[str, Any], *keys: str) -> Any:
    """Return the first attribute that is there; None where there is none."""
    for key in keys:
        if key in attributes:
            return attributes[key]
    return None


def attributes_space(
    ndim: int, axes: Sequence[str] | None, attributes: Mapping[str, Any], what: str
) -> Space:
    """Return the space that attributes of an array say, as segmentation data sets use them.

    ``resolution`` or ``voxel_size``, ``offset``, ``units`` and ``axis_names``, each with a value
    per axis, in NumPy order.
    """
    scale = numbers(first_of(attributes, "resolution", "voxel_size"), ndim)
    shift = numbers(attributes.get("offset"), ndim)
    units = texts(attributes.get("units"), ndim) if scale is not None else None
    if axes is None:
        axes = texts(attributes.get("axis_names"), ndim) if ndim > 1 else None
    return tolerant_space(
        ndim,
        axes,
        tuple(unit or None for unit in units or ()),
        scale or [1.0] * ndim,
        shift if scale is not None and shift is not None else [0.0] * ndim,
        what,
    )
