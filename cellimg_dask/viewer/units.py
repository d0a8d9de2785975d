"""Units and coordinates as neuroglancer has them, and voxels of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Space

__all__ = ["factor_of", "voxels_at"]

_PREFIXES = {
    "yotta": 24, "zetta": 21, "exa": 18, "peta": 15, "tera": 12, "giga": 9, "mega": 6, "kilo": 3,
    "hecto": 2, "deca": 1, "": 0, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9,
    "pico": -12, "femto": -15, "atto": -18, "zepto": -21, "yocto": -24,
}  # fmt: skip
_FACTORS: dict[str, tuple[float, str]] = {
    "angstrom": (1e-10, "m"),
    "foot": (0.3048, "m"),
    "inch": (0.0254, "m"),
    "mile": (1609.34, "m"),
    "yard": (0.9144, "m"),
    "minute": (60.0, "s"),
    "hour": (3600.0, "s"),
    "day": (86400.0, "s"),
    **{f"{prefix}meter": (float(f"1e{power}"), "m") for prefix, power in _PREFIXES.items()},
    **{f"{prefix}second": (float(f"1e{power}"), "s") for prefix, power in _PREFIXES.items()},
}


def factor_of(unit: str | None) -> tuple[float, str]:
    """Return how many metres or seconds a unit has; 1 of nothing for any other unit."""
    return _FACTORS.get(unit or "", (1.0, ""))


def voxels_at(
    space: Space, names: Sequence[str], scales: Sequence[float], coordinates: NDArray[Any]
) -> NDArray[np.float64]:
    """Return which voxels of an image places in the viewer are, as an array (n, ndim).

    Parameters
    ----------
    space : Space
        Of the image.
    names, scales
        Of the viewer's dimensions.
    coordinates : array (n, dimensions)
        Places in the viewer. An axis that the viewer does not have is at its first voxel.
    """
    named = space.named
    steps = zip(named.axes or (), named.units, named.scale, named.translation, strict=True)
    voxels = np.zeros((len(coordinates), space.ndim))
    for axis, (name, unit, scale, shift) in enumerate(steps):
        if name in names:
            at = list(names).index(name)
            length = coordinates[:, at] * float(scales[at]) / factor_of(unit)[0]
            voxels[:, axis] = (length - shift) / scale
    return voxels
