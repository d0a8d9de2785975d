"""Cells that can change and live in a store, and how they get there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import SaveError, SourceChangedError, describe
from cellimg_dask.geometry import CellGrid
from cellimg_dask.loading.crew import get_crew
from cellimg_dask.loading.readers import native, quick_source
from cellimg_dask.state.cache import CellCache

__all__ = ["Saver", "StoredCells", "Version"]


class Version:
    """What a cell became by one change."""

    __slots__ = ("data", "nbytes")

    def __init__(self, data: NDArray[Any]) -> None:
        self.data: NDArray[Any] | None = data
        """The cell, read-only, as long as the store does not have it."""
        self.nbytes = data.nbytes
        """Bytes of the cell."""


# Stands for a cell whose content in the store is unknown, because it is being written, or was.
_UNKNOWN = Version(np.empty(0))


class StoredCells:
    """The cells of a store, each in one version at a time.

    Parameters
    ----------
    array : array-like
        The store: ``shape``, ``dtype``, reading and writing of boxes.
    grid : CellGrid
        Its cells; a stored chunk belongs to one of them.
    cache : CellCache
        Keeps what was read or written.

    Notes
    -----
    Thread-safe, as long as one thread at a time saves a cell.
    """

    def __init__(self, array: Any, grid: CellGrid, cache: CellCache) -> None:
        self.array = array
        """The store."""
        self.grid = grid
        """Its cells."""
        self.dtype = native(array.dtype)
        """Of the voxels."""
        self.shelf = cache.shelf(self, alike=True)
        """What of the store is in memory."""
        self._source = quick_source(array)
        # The version of each cell that the store holds, None for what it held at first.
        self._there: dict[int, Version | None] = {}

    def load(self, index: int, version: Version | None) -> NDArray[Any]:
        """Return a cell, read-only, in a version; None for what the store held at first.

        Raises
        ------
        SourceChangedError
            If the store holds another version by now.
        """
        if version is not None:
            data = version.data
            if data is not None:
                return data
        self._check(index, version)
        try:
            cell = self.shelf.get(index, self._read)
        except Exception:
            self._check(index, version)
            raise
        # What was read meanwhile may be half of another.
        self._check(index, version)
        return cell

    def save(self, index: int, version: Version) -> None:
        """Write a version of a cell to the store, and keep it in the cache only."""
        data = version.data
        assert data is not None
        self._there[index] = _UNKNOWN
        self.shelf.invalidate([index])
        self.array[self.grid.roi(self.grid.position(index)).slices or ...] = data
        self._there[index] = version
        self.shelf.get(index, lambda _: data, 0.0)
        version.data = None

    def _check(self, index: int, version: Version | None) -> None:
        if self._there.get(index) is not version:
            position = self.grid.position(index)
            raise SourceChangedError(
                f"cell {position} of the source has changed since, and its store holds but one "
                f"version: read again from the image, or make a new snapshot"
            )

    def _read(self, index: int) -> NDArray[Any]:
        box = self.grid.roi(self.grid.position(index)).slices
        cell = np.asarray(self._source[box or ...])
        return cell.astype(self.dtype, copy=not cell.flags.owndata)


class Saver:
    """Brings the cells of a store there, and bounds the bytes of those that are not there yet.

    Parameters
    ----------
    cells : StoredCells
        The store.
    max_bytes : int
        Bound on the bytes of cells that are not saved; a single change may exceed it.

    Notes
    -----
    Thread-safe. Nothing waits for a thread: whoever needs room or wants something saved writes
    himself. In the background cells are written early, so that there mostly is room.
    """

    def __init__(self, cells: StoredCells, max_bytes: int) -> None:
        self.cells = cells
        """The store."""
        self.max_bytes = max_bytes
        """Bound on the bytes of cells that are not saved."""
        self.bytes = 0
        """Bytes of cells that are not saved."""
        self._state = threading.Condition()
        # Those changed longest ago come first.
        self._unsaved: OrderedDict[int, Version] = OrderedDict()
        self._saving: set[int] = set()
        self._in_background = False

    def __len__(self) -> int:
        """Return how many cells are not saved."""
        return len(self._unsaved)

    def make_room(self, nbytes: int) -> None:
        """Save cells until others of so many bytes may come.

        Raises
        ------
        SaveError
            If a cell cannot be written; it stays, as all others do.
        """
        while (found := self._next(self.max_bytes - nbytes)) is not None:
            self._save(*found)

    def add(self, versions: Mapping[int, Version]) -> None:
        """Have versions of cells saved some time; those before them need not be any more.

        To do so twice is the same as once.
        """
        with self._state:
            before = self.bytes
            for index, version in versions.items():
                old = self._unsaved.pop(index, None)
                self.bytes += version.nbytes - (0 if old is None else old.nbytes)
                self._unsaved[index] = version
            self.cells.shelf.cache.reserve(self.bytes - before)

    def write_early(self) -> None:
        """Begin to save in the background if little room is left."""
        with self._state:
            begin = 2 * self.bytes > self.max_bytes and not self._in_background
            self._in_background |= begin
        if begin:
            thread = threading.Thread(target=self._write_back, name="cellimg-save", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # Python ends, and all is saved then.
                self._in_background = False

    def save(self, indices: Iterable[int] | None = None) -> None:
        """Save cells, all of them for None; returns when they are in the store.

        Raises
        ------
        SaveError
            If a cell cannot be written; it stays, as do all that come after it.
        """
        with self._state:
            wanted = list(self._unsaved if indices is None else indices)
        get_crew().run(wanted, self._save_if_unsaved, len(wanted))

    def _next(self, max_bytes: int) -> tuple[int, Version] | None:
        """Return the next cell to save, once there is one; None if there is room."""
        with self._state:
            while self._unsaved and self.bytes > max_bytes:
                for index, version in self._unsaved.items():
                    if index not in self._saving:
                        self._saving.add(index)
                        return index, version
                self._state.wait()
        return None

    def _save_if_unsaved(self, index: int) -> None:
        with self._state:
            while index in self._saving:
                self._state.wait()
            version = self._unsaved.get(index)
            if version is None:
                return
            self._saving.add(index)
        self._save(index, version)

    def _save(self, index: int, version: Version) -> None:
        """Write a cell that this thread has marked as being saved."""
        try:
            self.cells.save(index, version)
        except Exception as error:
            position = self.cells.grid.position(index)
            raise SaveError(
                f"cell {position} could not be written to the store: {describe(error)}. It is "
                f"kept in memory, with all others that are not saved; when the cause is removed, "
                f"persist() saves them"
            ) from error
        else:
            with self._state:
                if self._unsaved.get(index) is version:
                    del self._unsaved[index]
                    self.bytes -= version.nbytes
                    self.cells.shelf.cache.reserve(-version.nbytes)
        finally:
            with self._state:
                self._saving.discard(index)
                self._state.notify_all()

    def _write_back(self) -> None:
        try:
            while (found := self._next(self.max_bytes // 2)) is not None:
                self._save(*found)
        except SaveError:
            # Whoever needs room, or wants all saved, tries again and is told.
            pass
        finally:
            with self._state:
                self._in_background = False
