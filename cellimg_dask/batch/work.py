"""Computing cells and committing them; the same on every kind of worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.batch.lock import Permit
from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.batch.target import Target
from cellimg_dask.blocks.content import NoContentError
from cellimg_dask.blocks.errors import CellError, ReadError, describe
from cellimg_dask.loading.content import ContentKeys
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.together import Together

__all__ = ["Committer", "Outcome", "Work", "with_keys"]

Work = Sequence[tuple[int, str]]
"""Cells with their content keys, to be computed in one call where that is possible."""


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
    stored: Target
    """Where cells are stored."""
    manifest: Manifest
    """Where they are marked."""
    permit: Permit
    """What they are stored with."""
    retries: int
    """How often a cell that fails is tried again."""

    def commit(self, work: Work) -> Iterator[Outcome]:
        """Do some cells; errors of the disk, unlike those of cells, are raised.

        If a call for several cells fails they are computed one by one: the error is then that of
        a cell, and the others are not affected.
        """
        left = dict(work)
        if self.together is not None and len(left) > 1:
            box = self.together.box_of(next(iter(left)))
            try:
                with self.loader.crew().working():
                    data = self.together.coarse.compute_in_passing(box)
            except CellError:
                pass
            else:
                cut = self.together.cut(box, data, list(left))
                yield from self._store([(index, left.pop(index), cell) for index, cell in cut])
        for index, key in left.items():
            yield self._alone(index, key)

    def done_before(self, index: int, key: str) -> Outcome | None:
        """Return the outcome of a cell that is committed already, else None."""
        if self.manifest.state(index, key, self.stored, checksums=False) != "done":
            return None
        sizes = self.stored.sizes(index).values()
        return Outcome(index, None, sum(size or 0 for size in sizes))

    def _alone(self, index: int, key: str) -> Outcome:
        for attempt in range(self.retries + 1):
            try:
                with self.loader.crew().working():
                    data = self.loader.compute_in_passing(index)
                break
            except CellError as error:
                if attempt == self.retries:
                    return Outcome(index, error, 0)
        (outcome,) = self._store([(index, key, data)])
        return outcome

    def _store(self, cells: Sequence[tuple[int, str, NDArray[Any]]]) -> list[Outcome]:
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


def with_keys(
    loader: CellLoader, keys: ContentKeys, indices: Sequence[int]
) -> tuple[Work, list[Outcome]]:
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
