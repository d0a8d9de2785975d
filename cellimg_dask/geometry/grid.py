"""A regular grid of cells over an image; everything here is arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import SupportsIndex

from cellimg_dask.geometry.integers import as_int, as_ints
from cellimg_dask.geometry.roi import Roi

__all__ = ["Cell", "CellGrid", "CellRange", "even_cell_shape"]


@dataclass(frozen=True, slots=True)
class Cell:
    """An element of a grid; it holds no data."""

    index: int
    """Flat index in C order."""
    position: tuple[int, ...]
    """Index along each axis of the grid."""
    roi: Roi
    """The cell's box in the image, truncated at the high edge."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The cell's true extent in voxels."""
        return self.roi.shape


@dataclass(frozen=True, slots=True)
class CellGrid:
    """A grid of equal cells over an image, truncated at the high edge only.

    Parameters
    ----------
    shape : ints
        Image shape in voxels; an axis may be 0, then the grid has no cells.
    cell_shape : int or ints
        Nominal cell shape in voxels, each at least 1; one integer stands for all axes.

    Raises
    ------
    ValueError
        If a size is negative, a cell size is 0, or the lengths differ.
    TypeError
        If a size is not an integer.

    Examples
    --------
    >>> grid = CellGrid((5, 7), (2, 4))
    >>> grid.grid_shape, grid.num_cells
    ((3, 2), 6)
    >>> grid.cell(5)
    Cell(index=5, position=(2, 1), roi=Roi(start=(4, 4), stop=(5, 7)))
    >>> [cell.index for cell in grid.cells_in(Roi((1, 0), (3, 4)))]
    [0, 2]
    """

    shape: tuple[int, ...]
    """Image shape in voxels."""
    cell_shape: tuple[int, ...]
    """Nominal shape of a cell; cells at the high edge are smaller."""
    grid_shape: tuple[int, ...] = field(init=False, repr=False)
    """Number of cells along each axis."""
    num_cells: int = field(init=False, repr=False)
    """Number of cells."""
    strides: tuple[int, ...] = field(init=False, repr=False)
    """What one step along each axis adds to the flat index."""

    def __init__(
        self, shape: Iterable[SupportsIndex], cell_shape: SupportsIndex | Iterable[SupportsIndex]
    ) -> None:
        extents = as_ints(shape, "shape", minimum=0)
        cells = as_ints(cell_shape, "cell_shape", ndim=len(extents), minimum=1)
        grid_shape = tuple(-(-n // c) for n, c in zip(extents, cells, strict=True))
        strides = tuple(prod(grid_shape[axis + 1 :]) for axis in range(len(grid_shape)))
        object.__setattr__(self, "shape", extents)
        object.__setattr__(self, "cell_shape", cells)
        object.__setattr__(self, "grid_shape", grid_shape)
        object.__setattr__(self, "num_cells", prod(grid_shape))
        object.__setattr__(self, "strides", strides)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Cell sizes along each axis, as dask writes chunks; made anew on each call."""
        return tuple(
            (c,) * (n // c) + ((n % c,) if n % c else ()) or (0,)
            for n, c in zip(self.shape, self.cell_shape, strict=True)
        )

    def cell(self, where: SupportsIndex | Iterable[SupportsIndex]) -> Cell:
        """Return a cell by flat index or by position.

        Raises
        ------
        IndexError
            If there is no such cell; negative numbers are not accepted.
        """
        several = isinstance(where, Iterable) and getattr(where, "ndim", 1) != 0
        index = self.index(where) if several else self._check_index(where)  # type: ignore[arg-type]
        position = self.position(index)
        return Cell(index, position, self.roi(position))

    def index(self, position: Iterable[SupportsIndex]) -> int:
        """Return the flat index of a position, as ``numpy.ravel_multi_index`` in C order.

        Raises
        ------
        IndexError
            If the position lies outside the grid.
        """
        place = as_ints(position, "position")
        if len(place) != self.ndim:
            raise IndexError(f"position {place} has {len(place)} axes, the grid has {self.ndim}")
        for axis, (p, n) in enumerate(zip(place, self.grid_shape, strict=True)):
            if not 0 <= p < n:
                raise IndexError(
                    f"position[{axis}] = {p} lies outside the grid; allowed is 0..{n - 1}"
                    if n
                    else f"the grid has no cells: its shape {self.shape} is empty on axis {axis}"
                )
        return sum(p * stride for p, stride in zip(place, self.strides, strict=True))

    def position(self, index: SupportsIndex) -> tuple[int, ...]:
        """Return the position of a flat index, as ``numpy.unravel_index`` in C order.

        Raises
        ------
        IndexError
            If there is no such cell.
        """
        rest = self._check_index(index)
        position = []
        for stride in self.strides:
            step, rest = divmod(rest, stride)
            position.append(step)
        return tuple(position)

    def roi(self, position: tuple[int, ...]) -> Roi:
        """Return the box of the cell at ``position``, truncated at the high edge."""
        start = tuple(p * c for p, c in zip(position, self.cell_shape, strict=True))
        stop = tuple(
            min(low + c, n) for low, c, n in zip(start, self.cell_shape, self.shape, strict=True)
        )
        return Roi(start, stop)

    def cells_in(self, roi: Roi) -> CellRange:
        """Return the cells that share a voxel with ``roi``; parts outside the image are cut.

        Raises
        ------
        ValueError
            If ``roi`` has another number of axes.
        """
        inside = roi.clip(self.shape)
        if inside.size == 0:
            return CellRange(self, tuple(range(0) for _ in self.shape))
        return CellRange(
            self,
            tuple(
                range(low // c, -(-high // c))
                for low, high, c in zip(inside.start, inside.stop, self.cell_shape, strict=True)
            ),
        )

    def axis_positions(self, axis: int, low: int, high: int) -> range:
        """Return the positions of the cells that meet ``low .. high``, which lies in the axis."""
        size = self.cell_shape[axis]
        return range(low // size, -(-high // size)) if low < high else range(0)

    def axis_parts(
        self, axis: int, low: int, high: int
    ) -> tuple[Sequence[int], Sequence[slice], Sequence[slice]]:
        """Cut ``low .. high``, which lies in the axis, into its parts in the cells.

        Returns
        -------
        positions, within_cell, within_interval : sequences
            One item per cell: its position, and the part's slices in the cell and the interval.
        """
        if low >= high:
            return (), (), ()
        size = self.cell_shape[axis]
        first, last = low // size, (high - 1) // size
        begin, end = low - first * size, high - last * size
        if first == last:
            return (first,), (slice(begin, end),), (slice(0, high - low),)
        inner = last - first - 1
        edge = size - begin
        stop = edge + inner * size
        return (
            range(first, last + 1),
            [slice(begin, size), *[slice(0, size)] * inner, slice(0, end)],
            [
                slice(0, edge),
                *[slice(at, at + size) for at in range(edge, stop, size)],
                slice(stop, stop + end),
            ],
        )

    def _check_index(self, index: SupportsIndex) -> int:
        number = as_int(index, "cell index")
        if not 0 <= number < self.num_cells:
            raise IndexError(
                f"cell index {number} lies outside the grid; allowed is 0..{self.num_cells - 1}"
                if self.num_cells
                else f"the grid has no cells: its shape {self.shape} is empty"
            )
        return number


@dataclass(frozen=True, slots=True)
class CellRange:
    """A box of cells: its length and membership are arithmetic, iterating makes the cells."""

    grid: CellGrid
    """The grid that the cells belong to."""
    ranges: tuple[range, ...]
    """Positions along each axis."""

    def __len__(self) -> int:
        return prod(map(len, self.ranges))

    def __iter__(self) -> Iterator[Cell]:
        for position, index in zip(product(*self.ranges), self.indices(), strict=True):
            yield Cell(index, position, self.grid.roi(position))

    def __contains__(self, cell: object) -> bool:
        return (
            isinstance(cell, Cell)
            and len(cell.position) == len(self.ranges)
            and all(p in r for p, r in zip(cell.position, self.ranges, strict=True))
        )

    def indices(self) -> Iterator[int]:
        """Flat indices of the cells, in C order."""
        axes = [
            [p * stride for p in steps]
            for steps, stride in zip(self.ranges, self.grid.strides, strict=True)
        ]
        return map(sum, product(*axes))


def even_cell_shape(ndim: int, voxels_log2: int = 20) -> tuple[int, ...]:
    """Return a cell shape alike along all axes, of about ``2**voxels_log2`` voxels.

    >>> even_cell_shape(3)
    (102, 102, 102)
    """
    return (max(1, round(2 ** (voxels_log2 / max(ndim, 1)))),) * ndim
