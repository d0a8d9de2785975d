"""Where the voxels of any array lie."""

from __future__ import annotations

from typing import Any

from cellimg_dask.geometry import Space

__all__ = ["Placed", "space_of"]


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

    Images, sources and stored images say it, shared arrays their axes, xarray arrays their
    dimensions and evenly spaced coordinates.
    """
    found = getattr(array, "space", None)
    if isinstance(found, Space):
        return found
    ndim = len(array.shape)
    if type(array).__module__.partition(".")[0] == "xarray":
        from cellimg_dask.image.labelled import space_of_labelled

        return space_of_labelled(array)
    axes = getattr(array, "axes", None)
    named = isinstance(axes, tuple) and len(axes) == ndim and len(set(axes)) == ndim
    if named and all(isinstance(name, str) and name for name in axes):
        return Space.of(ndim, axes)
    return Space.of(ndim)
