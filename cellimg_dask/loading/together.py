"""Neighbouring cells in one call of a function, so that what their halos share is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.functions import ArrayFunction
from cellimg_dask.blocks.plan import Planner
from cellimg_dask.geometry import CellGrid, as_ints, tiles
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.memory import Room
from cellimg_dask.state.cache import CellCache

__all__ = ["Together", "cells_together"]

# So that threads end at about the same time.
_CALLS_PER_THREAD = 8


class Together:
    """Computes several cells of an image in one call.

    For a local function from arrays to an array the result is the same: a call on the box of all
    the cells, with one halo around it, cut into cells afterwards.

    Parameters
    ----------
    loader : CellLoader
        Of the image.
    per_call : tuple of int
        How many cells along each axis.
    """

    def __init__(self, loader: CellLoader, per_call: tuple[int, ...]) -> None:
        self.fine = loader
        """Computes single cells."""
        grid = loader.grid
        self.per_call = per_call
        """Cells of a call along each axis."""
        sizes = tuple(cell * n for cell, n in zip(grid.cell_shape, per_call, strict=True))
        self.coarse = CellLoader(
            loader.function,
            Planner(CellGrid(grid.shape, sizes), loader.planner.inputs),
            loader.readers,
            loader.dtype,
            loader.params,
            CellCache(0),
            loader.queue,
            loader.job.version,
        )
        """Computes the boxes of several cells."""

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Return cells by the calls that compute them, in the order of the first of each.

        Where less than half of a box is wanted its cells come one by one.
        """
        found: dict[int, list[int]] = {}
        for index in indices:
            found.setdefault(self.box_of(index), []).append(index)
        groups: list[list[int]] = []
        for box, cells in found.items():
            if 2 * len(cells) >= self._num_cells(box):
                groups.append(cells)
            else:
                groups += [[cell] for cell in cells]
        return groups

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, (self.fine, self.per_call)

    def _num_cells(self, box: int) -> int:
        roi = self.coarse.grid.cell(box).roi
        count, _ = tiles(self.fine.grid, roi.start, roi.stop)
        return count

    def box_of(self, index: int) -> int:
        """Return the index of the box in which a cell lies."""
        position = self.fine.grid.position(index)
        box = tuple(p // n for p, n in zip(position, self.per_call, strict=True))
        return self.coarse.grid.index(box)

    def cut(
        self, box: int, data: NDArray[Any], wanted: Sequence[int]
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Cut the result of a call into cells."""
        roi = self.coarse.grid.cell(box).roi
        _, parts = tiles(self.fine.grid, roi.start, roi.stop)
        places = {index: target for index, _, target in parts}
        for index in wanted:
            yield index, data[places[index]]


def cells_together(loader: CellLoader, value: Any, rooms: Sequence[Room]) -> Together | None:
    """Return what computes several cells in one call; None where each has its own.

    Parameters
    ----------
    loader : CellLoader
        Of the image.
    value : int, ints, "auto" or None
        How many cells along each axis; ``"auto"``: more along the axes on which the halo is
        widest for the cell, as far as there is room and all threads have enough to do.
    rooms : sequence of Room
        Where blocks run.

    Raises
    ------
    ValueError
        If the function is not one from arrays to an array, or an input has an ``index_map``.
    """
    if value is None:
        return None
    grid = loader.grid
    reason = _refusal(loader)
    if value == "auto":
        per_call = (1,) * grid.ndim if reason else _grown(loader, rooms)
    else:
        per_call = as_ints(value, "cells_per_call", ndim=grid.ndim, minimum=1)
        if reason and prod(per_call) > 1:
            raise ValueError(f"cells_per_call: {reason}")
    return None if prod(per_call) == 1 else Together(loader, per_call)


def _refusal(loader: CellLoader) -> str | None:
    if not isinstance(loader.function, ArrayFunction):
        return "a function that fills blocks is called for each cell"
    if any(item.index_map is not None for item in loader.planner.inputs):
        return "an index_map gives the region of one cell"
    return None


def _grown(loader: CellLoader, rooms: Sequence[Room]) -> tuple[int, ...]:
    grid = loader.grid
    per_call = [1] * grid.ndim
    widths = [0.0] * grid.ndim
    for item in loader.planner.inputs:
        for axis, link in enumerate(item.links or ()):
            if link.axis is not None:
                width = (item.halo.before[axis] + item.halo.after[axis]) / link.factor
                widths[link.axis] = max(widths[link.axis], width)
    while True:
        # Along which axis does a doubling save most?
        gains = {
            axis: widths[axis] / (grid.cell_shape[axis] * per_call[axis])
            for axis in range(grid.ndim)
            if widths[axis] and per_call[axis] < grid.grid_shape[axis]
        }
        for axis in sorted(gains, key=lambda axis: -gains[axis]):
            tried = list(per_call)
            tried[axis] *= 2
            if _fits(loader, tuple(tried), rooms):
                per_call = tried
                break
        else:
            return tuple(per_call)


def _fits(loader: CellLoader, per_call: tuple[int, ...], rooms: Sequence[Room]) -> bool:
    together = Together(loader, per_call)
    threads = sum(room.num_threads for room in rooms)
    enough = together.coarse.grid.num_cells >= _CALLS_PER_THREAD * threads
    return enough and all(room.has_room(together.coarse) for room in set(rooms))
