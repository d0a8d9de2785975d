"""`transpose`: an image with its axes in another order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import CellGrid, Roi, as_ints
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import fill_cells
from cellimg_dask.image.input import Input
from cellimg_dask.ops.pyramid import as_image

__all__ = ["transpose"]


def transpose(img: Any, axes: str | Iterable[str] | Iterable[SupportsIndex]) -> CellImg:
    """Return an image with its axes in another order, lazily; its cells are turned as well.

    Parameters
    ----------
    img : array-like or Input
        What `map_cells` takes: a lazy image, `Source`, NumPy, zarr, dask array, what `open_image`
        gives.
    axes : names or ints
        All axes in their new order, by name (``"czyx"``) or number, as `numpy.transpose` takes
        them.

    Returns
    -------
    CellImg
        With the same voxels, named axes, units, scale and translation. It keeps no cells of its
        own: they are turned as they are read.

    Raises
    ------
    TypeError, ValueError
        If these are not the axes of the image.

    Examples
    --------
    >>> import numpy as np, cellimg_dask as ci
    >>> stack = ci.Source(np.zeros((30, 2, 64, 48)), space=ci.Space.of(4, "zcyx"))
    >>> turned = transpose(stack, "czyx")
    >>> turned.shape, turned.axes
    ((2, 30, 64, 48), ('c', 'z', 'y', 'x'))
    """
    image = as_image(img)
    order = _order(axes, image)
    if order == tuple(range(image.ndim)):
        return image
    turned = fill_cells(
        _turn,
        CellGrid(_taken(image.shape, order), _taken(image.cell_shape, order)),
        Input(image, halo=0, index_map=_Turned(order)),
        dtype=image.dtype,
        params={"axes": order},
        cache=None,
    )
    return turned.with_space(image.space.taking(order))


@dataclass(frozen=True)
class _Turned:
    """From a region of the turned image to that of the image."""

    axes: tuple[int, ...]
    is_nested = True

    def __call__(self, roi: Roi) -> Roi:
        back = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return Roi(_taken(roi.start, back), _taken(roi.stop, back))


def _turn(block: Block) -> None:
    block.data[...] = block.inputs[0].transpose(block.params["axes"])


def _taken(values: tuple[int, ...], order: Iterable[int]) -> tuple[int, ...]:
    return tuple(values[axis] for axis in order)


def _order(axes: Any, image: CellImg) -> tuple[int, ...]:
    """Return the numbers of all axes in their new order."""
    given = list(axes) if isinstance(axes, Iterable) else [axes]
    names = image.space.axes
    if any(isinstance(axis, str) for axis in given):
        if names is None:
            raise ValueError(
                f"axes are called {given!r}, and those of this image have no names; give numbers, "
                f"or name them first: image.with_space(axes=…), or of an array Input(array, "
                f"space=…)"
            )
        if sorted(map(str, given)) != sorted(names):
            raise ValueError(f"axes must be those of the image, {', '.join(names)}, got {given!r}")
        return tuple(names.index(name) for name in given)
    order = tuple(
        axis + image.ndim if axis < 0 else axis for axis in as_ints(given, "axes", ndim=image.ndim)
    )
    if sorted(order) != list(range(image.ndim)):
        raise ValueError(f"axes must be all of 0 to {image.ndim - 1} once, got {given!r}")
    return order
