"""Where the voxels of any array lie."""

from __future__ import annotations

from typing import Any

from cellimg_dask.geometry import Space
from cellimg_dask.loading.file_array import is_xarray

__all__ = ["Placed", "checked_space", "space_of"]


class Placed:
    """What everything says of itself whose voxels lie somewhere."""

    @property
    def space(self) -> Space:
        """Where the voxels lie."""
        raise NotImplementedError

    @property
    def axes(self) -> tuple[str, ...] | None:
        """Names of the axes; None where nobody has said them."""
        return self.space.axes

    @property
    def units(self) -> tuple[str | None, ...]:
        """Unit of each axis, such as ``"micrometer"``; None where unknown."""
        return self.space.units

    @property
    def scale(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along each axis, in its unit."""
        return self.space.scale

    @property
    def translation(self) -> tuple[float, ...]:
        """Where the centre of the first voxel lies, in the unit of each axis."""
        return self.space.translation


def space_of(array: Any) -> Space:
    """Return where the voxels of an array lie; a plain space where it does not say.

    Images, sources and stored images say it, xarray arrays by their dimensions and evenly spaced
    coordinates; shared arrays and those of zarr format 3 name their axes.
    """
    found = getattr(array, "space", None)
    if isinstance(found, Space):
        return found
    ndim = len(array.shape)
    if is_xarray(array):
        from cellimg_dask.image.labelled import space_of_labelled

        return space_of_labelled(array)
    # zarr 3 keeps them in its metadata.
    stored = getattr(getattr(array, "metadata", None), "dimension_names", None)
    axes = getattr(array, "axes", stored)
    if isinstance(axes, tuple) and _are_names(axes, ndim):
        return Space.of(ndim, axes)
    return Space.of(ndim)


def _are_names(axes: tuple[Any, ...], ndim: int) -> bool:
    return len(axes) == len(set(axes)) == ndim and all(
        isinstance(name, str) and name for name in axes
    )


def checked_space(space: Any, array: Any) -> Space:
    """Return a space that was given for an array, or where there is none, what the array says.

    Raises
    ------
    TypeError, ValueError
        If it is no space, or does not fit.
    """
    if space is None:
        return space_of(array)
    if not isinstance(space, Space):
        raise TypeError(f"space must be a Space, got {type(space).__name__}; see Space.of")
    if space.ndim != len(array.shape):
        raise ValueError(f"a space of {space.ndim} axes for an array of shape {array.shape}")
    return space
