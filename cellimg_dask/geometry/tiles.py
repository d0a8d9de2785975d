"""Cutting a box into its parts in the cells of a grid; arithmetic, never a scan."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from math import prod
from typing import Protocol

from cellimg_dask.geometry.grid import CellGrid

__all__ = ["IrregularGrid", "TileGrid", "tiles"]


class TileGrid(Protocol):
    """A grid that can say which of its cells meet an interval of an axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Image shape in voxels."""
        ...

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Number of cells along each axis."""
        ...

    @property
    def strides(self) -> tuple[int, ...]:
        """What one step along each axis adds to the flat index."""
        ...

    def axis_positions(self, axis: int, low: int, high: int) -> range:
        """Return the positions of the cells that meet ``low .. high``."""
        ...

    def axis_parts(
        self, axis: int, low: int, high: int
    ) -> tuple[Sequence[int], Sequence[slice], Sequence[slice]]:
        """Return positions, slices within the cells and slices within ``low .. high``."""
        ...


class IrregularGrid:
    """A grid whose cells differ in size along an axis, as dask's chunks may.

    Parameters
    ----------
    chunks : sequence of sequences of int
        Sizes along each axis.
    """

    def __init__(self, chunks: Sequence[Sequence[int]]) -> None:
        self.chunks = tuple(tuple(int(size) for size in sizes) for sizes in chunks)
        self._bounds = [[0, *accumulate(sizes)] for sizes in self.chunks]
        self.shape = tuple(bounds[-1] for bounds in self._bounds)
        self.grid_shape = tuple(len(sizes) for sizes in self.chunks)
        self.strides = tuple(
            prod(self.grid_shape[axis + 1 :]) for axis in range(len(self.grid_shape))
        )

    def axis_positions(self, axis: int, low: int, high: int) -> range:
        """Return the positions of the cells that meet ``low .. high``, which lies in the axis."""
        bounds = self._bounds[axis]
        return (
            range(bisect_right(bounds, low) - 1, bisect_left(bounds, high))
            if low < high
            else range(0)
        )

    def axis_parts(
        self, axis: int, low: int, high: int
    ) -> tuple[Sequence[int], Sequence[slice], Sequence[slice]]:
        """Cut ``low .. high``, which lies in the axis; see `CellGrid.axis_parts`."""
        bounds = self._bounds[axis]
        positions, sources, targets = [], [], []
        position = bisect_right(bounds, low) - 1
        while low < high and bounds[position] < high:
            start, stop = max(low, bounds[position]), min(high, bounds[position + 1])
            if start < stop:
                positions.append(position)
                sources.append(slice(start - bounds[position], stop - bounds[position]))
                targets.append(slice(start - low, stop - low))
            position += 1
        return positions, sources, targets

    def position(self, index: int) -> tuple[int, ...]:
        """Return the position of a flat index."""
        position = []
        for stride in self.strides:
            step, index = divmod(index, stride)
            position.append(step)
        return tuple(position)

    def slices(self, position: Sequence[int]) -> tuple[slice, ...]:
        """Return the box of the cell at ``position``."""
        return tuple(
            slice(bounds[p], bounds[p + 1])
            for bounds, p in zip(self._bounds, position, strict=True)
        )


def tiles(
    grid: TileGrid | CellGrid, low: Sequence[int], high: Sequence[int]
) -> tuple[int, Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]]:
    """Cut the box ``low .. high``, which lies in the image, into its parts in the cells.

    Returns
    -------
    count : int
        Number of parts.
    parts : iterator of (index, within_cell, within_box)
        Flat index of the cell, and the part's slices in the cell's array and in the box's.
    """
    offsets: list[Sequence[int]] = []
    sources: list[Sequence[slice]] = []
    targets: list[Sequence[slice]] = []
    for axis, (start, stop) in enumerate(zip(low, high, strict=True)):
        positions, source, target = grid.axis_parts(axis, start, stop)
        stride = grid.strides[axis]
        offsets.append([position * stride for position in positions])
        sources.append(source)
        targets.append(target)
    count = prod(map(len, offsets))
    return count, zip(_sums(offsets), product(*sources), product(*targets), strict=True)


def _sums(offsets: Sequence[Sequence[int]]) -> Iterable[int]:
    """Return the sum of each combination of one offset per axis, in C order."""
    # All axes but the last are summed up beforehand; the cells themselves are never listed.
    heads = [0]
    for offset in offsets[:-1]:
        heads = [head + step for head in heads for step in offset]
    last = offsets[-1] if offsets else [0]
    return (head + step for head in heads for step in last)
