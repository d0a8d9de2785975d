"""Computing cells and committing them; the same on every kind of worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.batch.target import Target
from cellimg_dask.batch.together import Together
from cellimg_dask.blocks.errors import CellError
from cellimg_dask.loading.loader import CellLoader

__all__ = ["Committer", "Outcome", "Work"]

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
                    data = self.together.coarse.compute_owned(box)
            except CellError:
                pass
            else:
                for index, cell in self.together.cut(box, data, list(left)):
                    yield self._store(index, left.pop(index), cell)
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
                    data = self.loader.compute_owned(index)
                break
            except CellError as error:
                if attempt == self.retries:
                    return Outcome(index, error, 0)
        return self._store(index, key, data)

    def _store(self, index: int, key: str, data: NDArray[Any]) -> Outcome:
        # Another computation's marker must not vouch for these data.
        self.manifest.withdraw(index)
        self.stored.write(index, np.asarray(data))
        objects = self.stored.checksums(index)
        self.manifest.commit(index, key, objects)
        return Outcome(index, None, sum(entry[0] for entry in objects.values() if entry))
