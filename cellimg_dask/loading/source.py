"""Reading one edition of a source: data that change by having cells replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import count
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.shared_array import SharedArray
from cellimg_dask.blocks.errors import CellimgError, SourceChangedError
from cellimg_dask.blocks.plan import Box
from cellimg_dask.geometry import CellGrid, tiles
from cellimg_dask.loading.readers import SharedReader, TiledReader, make_reader, pinned, portable
from cellimg_dask.loading.stored import StoredCells, Version
from cellimg_dask.state.cache import get_cache
from cellimg_dask.state.pages import Pages

__all__ = ["MemoryReader", "SourceReader", "StoredReader"]


_process = uuid4().hex
_numbers = count()


def next_token() -> str:
    """Return a name that is returned but once, anywhere."""
    # A forked process goes on with the numbers of its parent.
    return f"source-{_process}-{os.getpid()}-{next(_numbers)}"


class SourceReader(Protocol):
    """Reads one edition of a source."""

    grid: CellGrid
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    token: str
    """A name that no other edition has."""

    def read(self, box: Box) -> NDArray[Any]:
        """Return the box, perhaps as a view that must not be written to."""
        ...

    def tile(self, index: int) -> NDArray[Any]:
        """Return a cell, perhaps as a view that must not be written to."""
        ...

    def replaced(self, cells: Mapping[int, Any]) -> SourceReader:
        """Return the edition that has other cells, arrays or versions, in place of some."""
        ...


class MemoryReader(TiledReader):
    """Reads an array in memory in which some cells were replaced.

    Parameters
    ----------
    grid : CellGrid
        The cells.
    base : ndarray
        The array; never written to.
    pages : Pages
        The cells that were replaced.
    """

    grid: CellGrid

    def __init__(self, grid: CellGrid, base: NDArray[Any], pages: Pages) -> None:
        super().__init__(grid, base.dtype, self._tile)
        self.token = next_token()
        self._base = base
        self._pages = pages

    def _tile(self, index: int) -> NDArray[Any]:
        cell: NDArray[Any] | None = self._pages.get(index)
        return self._base[_box(self.grid, index)] if cell is None else cell

    def replaced(self, cells: Mapping[int, NDArray[Any]]) -> MemoryReader:
        """Return the edition that has other cells in place of some."""
        if len(cells) < self.grid.num_cells:
            return MemoryReader(self.grid, self._base, self._pages.replaced(cells))
        # All of them: nothing of the old array is needed any more.
        base = np.empty_like(self._base)
        for index, cell in cells.items():
            base[_box(self.grid, index)] = cell
        base.flags.writeable = False
        return MemoryReader(self.grid, base, Pages())

    def read(self, box: Box) -> NDArray[Any]:
        """Return the box: a view where nothing in it was replaced, else put together."""
        pages = self._pages
        if pages:
            count, parts = tiles(self.grid, [b.start for b in box], [b.stop for b in box])
            if count > len(pages) or any(index in pages for index, _, _ in parts):
                return super().read(box)
        view: NDArray[Any] = self._base[_view(box)]
        return view

    def __reduce__(self) -> tuple[Any, ...]:
        whole = np.empty(self.shape, self.dtype)
        self._join((0,) * len(self.shape), self.shape, whole)
        return make_reader, (whole, get_cache())


class StoredReader(TiledReader):
    """Reads a store in which some cells are, or are going to be, replaced.

    Parameters
    ----------
    cells : StoredCells
        The store, which all editions share.
    pages : Pages
        The `Version` of each cell that is not what the store held at first.
    """

    grid: CellGrid

    def __init__(self, cells: StoredCells, pages: Pages) -> None:
        super().__init__(cells.grid, cells.dtype, self._tile)
        self.token = next_token()
        self.cells = cells
        self._pages = pages

    def _tile(self, index: int) -> NDArray[Any]:
        return self.cells.load(index, self._pages.get(index))

    @property
    def num_unsaved(self) -> int:
        """How many cells of this edition are in memory only."""
        return sum(version.data is not None for version in self._pages.values())

    def replaced(self, cells: Mapping[int, Version]) -> StoredReader:
        """Return the edition that has other versions of some cells."""
        return StoredReader(self.cells, self._pages.replaced(cells))

    def __reduce__(self) -> tuple[Any, ...]:
        # Where this arrives the store itself is read, and refused if it has changed since.
        if any(version.data is not None for version in self._pages.values()):
            raise CellimgError(
                "an image of a source cannot be sent elsewhere before the source is saved; call "
                "source.persist()"
            )
        return _arrived, (portable(self.cells.array), time.time_ns())


def _arrived(array: Any, when: int) -> Any:
    if isinstance(array, SharedArray):
        return _SharedEdition(array, when)
    return pinned(make_reader(array, get_cache()), when)


class _SharedEdition(SharedReader):
    """Reads a shared array as it was at a time; refuses what was assigned to it later."""

    def __init__(self, shared: SharedArray, when: int) -> None:
        super().__init__(shared)
        self._when = when

    def read(self, box: Box) -> NDArray[Any]:
        """Return a copy of the box, which nobody can change any more."""
        block = super().read(box).copy()
        # Asked after reading: what was written before that shows.
        if self.shared.last_change_ns > self._when:
            raise SourceChangedError(
                f"the shared array {self.shared.name!r} was written to after the snapshot was "
                f"taken, and holds what is there now only: make a new snapshot"
            )
        return block

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.shared, self._when)


def _box(grid: CellGrid, index: int) -> tuple[Any, ...]:
    return _view(grid.roi(grid.position(index)).slices)


def _view(box: Box) -> tuple[Any, ...]:
    # With the ellipsis a view also where there are no axes.
    return (*box, ...)
