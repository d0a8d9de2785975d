"""xarray: images with names for their axes and coordinates along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cellimg_dask.geometry import Space

if TYPE_CHECKING:
    import xarray

    from cellimg_dask.image.cellimg import CellImg

__all__ = ["even_steps", "space_of_labelled", "to_xarray"]

# Coordinates are written as decimal numbers in files: their steps differ in the last digits.
_TOLERANCE = 1e-3


def space_of_labelled(array: Any) -> Space:
    """Return where the voxels of an `xarray.DataArray` lie.

    Dimensions give the names. A dimension with evenly rising coordinates gives scale and
    translation, and its attribute ``units`` the unit; others are counted in voxels.

    Raises
    ------
    ValueError
        If the array has no name or one name for several dimensions.
    """
    names = [str(name) for name in array.dims]
    units: list[str | None] = []
    scale, translation = [], []
    for name in array.dims:
        places = array.coords[name] if name in array.coords else None
        step, first, unit = 1.0, 0.0, None
        if places is not None:
            said = places.attrs.get("units")
            unit = said if isinstance(said, str) and said else None
            step, first = even_steps(np.asarray(places.values))
        units.append(unit)
        scale.append(step)
        translation.append(first)
    return Space.of(array.ndim, names, units, scale, translation)


def even_steps(places: Any) -> tuple[float, float]:
    """Return step and begin of coordinates, those of voxels where they do not rise evenly."""
    if places.dtype.kind not in "iuf" or places.ndim != 1 or not places.size:
        return 1.0, 0.0
    points = places.astype(float)
    if points.size == 1:
        return 1.0, float(points[0])
    step = float(points[-1] - points[0]) / (points.size - 1)
    even = points[0] + step * np.arange(points.size)
    if not step > 0 or not np.all(np.abs(points - even) <= _TOLERANCE * step):
        return 1.0, 0.0
    return step, float(points[0])


def to_xarray(image: CellImg, name: str | None) -> xarray.DataArray:
    """Return an image as an array of xarray; see `CellImg.to_xarray`."""
    try:
        import xarray
    except ImportError:
        raise ImportError(
            "to_xarray needs xarray: pip install 'cellimg-dask[formats]'", name="xarray"
        ) from None
    space = image.space.named
    names = space.axes or ()
    coords = {}
    for axis, unit in enumerate(space.units):
        step, first = space.scale[axis], space.translation[axis]
        if (step, first, unit) != (1.0, 0.0, None):
            places = first + step * np.arange(image.shape[axis])
            coords[names[axis]] = (names[axis], places, {} if unit is None else {"units": unit})
    return xarray.DataArray(image.to_dask(), coords, names, name)
