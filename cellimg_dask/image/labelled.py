"""xarray: images with names for their axes and coordinates along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cellimg_dask.geometry import Space
from cellimg_dask.loading.file_array import is_xarray

if TYPE_CHECKING:
    import xarray

__all__ = ["even_steps", "space_of_labelled", "to_xarray", "without_labels"]

# Coordinates are written as decimal numbers in files: their steps differ in the last digits.
_TOLERANCE = 1e-3


def space_of_labelled(array: Any) -> Space:
    """Return where the voxels of an `xarray.DataArray` lie.

    Dimensions give the names. A dimension with evenly rising coordinates gives scale and
    translation, and its attribute ``units`` the unit; others are counted in voxels.

    Raises
    ------
    ValueError
        If a dimension has no name, or several have the same.
    """
    names = [str(name) for name in array.dims]
    units: list[str | None] = []
    scale, translation = [], []
    for name in array.dims:
        places = array.coords.get(name)
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
    if not np.isfinite(points).all():
        return 1.0, 0.0
    if points.size == 1:
        return 1.0, float(points[0])
    step = float(points[-1] - points[0]) / (points.size - 1)
    even = points[0] + step * np.arange(points.size)
    if not step > 0 or not np.all(np.abs(points - even) <= _TOLERANCE * step):
        return 1.0, 0.0
    return step, float(points[0])


def without_labels(array: Any) -> Any:
    """Return the dask array in an array of xarray; others as they are: they read regions."""
    return array.data if is_xarray(array) and array.chunks is not None else array


def to_xarray(array: Any, space: Space, name: str | None) -> xarray.DataArray:
    """Return an array with the dimensions and coordinates that a space gives.

    Parameters
    ----------
    array : array-like
        Not read.
    space : Space
        Where its voxels lie.
    name : str or None
        Of the result.

    Raises
    ------
    ImportError
        If xarray is not installed.
    """
    try:
        import xarray
    except ImportError:
        raise ImportError(
            "to_xarray needs xarray: pip install 'cellimg-dask[formats]'", name="xarray"
        ) from None
    named = space.named
    names = named.axes or ()
    coords = {}
    for axis, (unit, step, first) in enumerate(
        zip(named.units, named.scale, named.translation, strict=True)
    ):
        if (step, first, unit) != (1.0, 0.0, None):
            places = first + step * np.arange(array.shape[axis])
            coords[names[axis]] = (names[axis], places, {} if unit is None else {"units": unit})
    return xarray.DataArray(array, coords, names, name)
