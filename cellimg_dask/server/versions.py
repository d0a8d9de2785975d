"""Which version of a cell there is, so that readers can keep what has not changed."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection

from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.loading.loader import CellLoader, Signature
from cellimg_dask.loading.watch import Change
from cellimg_dask.state.cells import CellTest, CellUnion

__all__ = ["CellVersions"]

_LISTED = 1 << 16
"""Changes of so many cells are kept cell by cell."""
_MOST_LISTED = 1 << 20
"""Cells that are kept one by one."""
_MOST_LARGE = 64
_MOST_SIGNATURES = 256


class CellVersions:
    """Names the versions of an image's cells.

    The name of a cell's version changes with every change that reaches the cell, and with no
    other, apart from those that lie so long ago that they are no longer told apart. Parameters
    that come back bring their names back.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, image: CellImg) -> None:
        self._node = image.node
        # No other process, and no other image, has the same names.
        self._own = secrets.token_hex(6)
        self._lock = threading.Lock()
        self._seen = 0
        self._floor = 0
        self._last: dict[int, int] = {}
        self._large: tuple[tuple[int, Collection[int]], ...] = ()
        self._signatures: dict[Signature, int] = {}
        self._num_signatures = 0
        # The history of an image remembers a few changes only.
        self._node.watchers.add(self._note)

    def of(self, loader: CellLoader, index: int) -> str | None:
        """Return the name of a cell's version in an edition; None while that cannot be said."""
        if loader.history.last > self._seen:
            self._catch_up(loader)
        number = max(self._floor, self._last.get(index, 0))
        for changed, cells in reversed(self._large):
            if changed <= number:
                break
            if index in cells:
                number = changed
                break
        if number > loader.edition:
            # A change is just taking place.
            return None
        return f"{self._own}-{self._number_of(loader.signature)}-{number}"

    def _note(self, change: Change) -> None:
        self._catch_up(self._node.now)

    def _catch_up(self, loader: CellLoader) -> None:
        with self._lock:
            changes = loader.history.changes_since(self._seen)
            if changes is None:
                self._floor = self._seen = loader.history.last
                self._last, self._large = {}, ()
                return
            for number, cells in changes:
                if _is_large(cells):
                    self._large = (*self._large, (number, cells))
                else:
                    self._last.update(dict.fromkeys(cells, number))
                self._seen = number
            if len(self._large) > _MOST_LARGE:
                self._floor = max(self._floor, self._large[-_MOST_LARGE - 1][0])
                self._large = self._large[-_MOST_LARGE:]
            if len(self._last) > _MOST_LISTED:
                self._floor, self._last = max(self._floor, *self._last.values()), {}

    def _number_of(self, signature: Signature) -> int:
        number = self._signatures.get(signature)
        if number is None:
            with self._lock:
                number = self._signatures.get(signature)
                if number is None:
                    number = self._num_signatures
                    self._num_signatures += 1
                    if len(self._signatures) >= _MOST_SIGNATURES:
                        del self._signatures[next(iter(self._signatures))]
                    self._signatures[signature] = number
        return number


def _is_large(cells: Collection[int]) -> bool:
    last = cells.parts[-1] if isinstance(cells, CellUnion) else cells
    # Where only membership is known, every cell would have to be asked.
    return isinstance(last, CellTest) or len(cells) > _LISTED
