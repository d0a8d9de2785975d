"""Computing cells and committing them; the same on every kind of worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.batch.lock import Permit
from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.batch.parquet import TableTarget
from cellimg_dask.batch.target import Target
from cellimg_dask.blocks.content import NoContentError, digest
from cellimg_dask.blocks.errors import CellError, ReadError, describe
from cellimg_dask.loading.content import ContentKeys
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.running import tries_again
from cellimg_dask.loading.together import Together

__all__ = ["Committer", "Computed", "Keys", "Outcome", "TableKeys", "Work", "with_keys"]

Work = Sequence[tuple[int, str]]
"""Cells with their content keys, to be computed in one call where that is possible."""

Computed = tuple[int, str, NDArray[Any]]
"""A cell with its content key and its voxels."""


class Keys(Protocol):
    """Makes the keys of cells."""

    def key(self, index: int) -> str:
        """Return the key of a cell."""
        ...

    def of(self, loader: CellLoader) -> Keys:
        """Return the keys of an image upstream."""
        ...


@dataclass(frozen=True, slots=True)
class TableKeys:
    """Keys of tables that are made of the cells of an image."""

    values: ContentKeys
    """Those of the cells."""
    content: str
    """What else the tables depend on."""

    def key(self, index: int) -> str:
        """Return the key of a table."""
        return digest([self.values.key(index), self.content])

    def of(self, loader: CellLoader) -> Keys:
        """Return the keys of an image upstream."""
        return self.values.of(loader)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell."""

    index: int
    """The cell."""
    error: CellError | None
    """Why it could not be computed."""
    nbytes: int
    """Stored bytes."""


@dataclass(frozen=True)
class Committer:
    """Computes cells, stores them, and marks them as done. It travels to other processes."""

    loader: CellLoader
    """Of the image."""
    together: Together | None
    """Computes several cells in one call."""
    stored: Target | TableTarget
    """Where cells are stored."""
    manifest: Manifest
    """Where they are marked."""
    permit: Permit
    """What they are stored with."""
    retries: int
    """How often a cell that fails is tried again."""

    def commit(self, work: Work) -> Iterator[Outcome]:
        """Compute and store some cells; errors of the disk, unlike those of cells, are raised."""
        for cells, failed in self.compute(work):
            yield from failed
            yield from self.store(cells)

    def compute(
        self, work: Work, *, lasting: bool = False
    ) -> Iterator[tuple[list[Computed], list[Outcome]]]:
        """Yield cells that were computed by one call, and what became of those that failed.

        If a call for several cells fails they are computed one by one: the error is then that of
        a cell, and the others are not affected.

        With ``lasting`` voxels stay as they are while more is computed; without, the function may
        give the same memory again.
        """
        left = dict(work)
        if self.together is not None and len(left) > 1:
            box = self.together.box_of(next(iter(left)))
            try:
                with self.loader.crew().working():
                    data = _computed(self.together.coarse, box, lasting)
            except CellError:
                pass
            else:
                cut = self.together.cut(box, data, list(left))
                yield [(index, left.pop(index), cell) for index, cell in cut], []
        for index, key in left.items():
            cell = self._alone(index, lasting)
            yield ([], [cell]) if isinstance(cell, Outcome) else ([(index, key, cell)], [])

    def read_ahead(self, work: Work) -> None:
        """Decode the chunks that computing some cells will read; nothing that fails is told."""
        indices = [index for index, _ in work]
        if self.together is not None and len(indices) > 1:
            loader, indices = self.together.coarse, [self.together.box_of(indices[0])]
        else:
            loader = self.loader
        # It will be told when the cell is computed.
        with suppress(Exception):
            for index in indices:
                loader.read_ahead(index)

    def done_before(self, index: int, key: str) -> Outcome | None:
        """Return the outcome of a cell that is committed already, else None."""
        if self.manifest.state(index, key, self.stored, checksums=False) != "done":
            return None
        sizes = self.stored.sizes(index).values()
        return Outcome(index, None, sum(size or 0 for size in sizes))

    def store(self, cells: Sequence[Computed]) -> list[Outcome]:
        """Store cells at the same time, and mark each when it is on the disk."""
        begun: list[Callable[[], Outcome]] = []
        with self.permit.writing():
            try:
                for cell in cells:
                    begun.append(self._begin(*cell))
            finally:
                # Whatever happened: nothing may be written any more without the permit.
                outcomes = _all_of(begun)
        return outcomes

    def _alone(self, index: int, lasting: bool) -> NDArray[Any] | Outcome:
        """Return a cell, or why it could not be computed."""
        attempt = 0
        while True:
            try:
                with self.loader.crew().working():
                    return _computed(self.loader, index, lasting)
            except CellError as error:
                if attempt == self.retries:
                    return Outcome(index, error, 0)
                attempt += 1

    def _begin(self, index: int, key: str, data: NDArray[Any]) -> Callable[[], Outcome]:
        # A worker that was given up may have gone on.
        before = self.done_before(index, key)
        if before is not None:
            return lambda: before
        # Another computation's marker must not vouch for these data.
        self.manifest.withdraw(index)
        on_disk = self.stored.begin(index, np.asarray(data))

        def finish() -> Outcome:
            on_disk()
            objects = self.stored.checksums(index)
            self.manifest.commit(index, key, objects)
            return Outcome(index, None, sum(entry[0] for entry in objects.values() if entry))

        return finish


def _computed(loader: CellLoader, index: int, lasting: bool) -> NDArray[Any]:
    token = tries_again.set(True)
    try:
        return loader.compute_owned(index) if lasting else loader.compute_in_passing(index)
    finally:
        tries_again.reset(token)


def _all_of(steps: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
    """Take all steps; the first error is raised after the last step."""
    outcomes: list[Outcome] = []
    errors: list[Exception] = []
    for step in steps:
        try:
            outcomes.append(step())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return outcomes


def with_keys(loader: CellLoader, keys: Keys, indices: Sequence[int]) -> tuple[Work, list[Outcome]]:
    """Return cells with their keys, and what became of those of which none can be made.

    Raises
    ------
    NoContentError
        If an input or the function can not be compared: that is so for every cell.
    """
    work: list[tuple[int, str]] = []
    failed: list[Outcome] = []
    for index in indices:
        try:
            work.append((index, keys.key(index)))
        except NoContentError:
            raise
        except CellError as error:
            failed.append(Outcome(index, error, 0))
        except Exception as error:
            position = loader.grid.position(index)
            text = f"what the cell reads could not be looked at: {describe(error)}"
            unread = ReadError(loader.function.name, position, loader.grid.roi(position), text)
            unread.__cause__ = error
            failed.append(Outcome(index, unread, 0))
    return work, failed
