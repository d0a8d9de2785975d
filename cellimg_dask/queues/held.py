"""Results that stay on the workers of a cluster because the client holds their futures."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

__all__ = ["Held"]


class Held:
    """Futures of cells, released in the order of last use when they exceed a number of bytes.

    Thread-safe. Whoever takes a future out gets a handle of its own, so that releasing the one
    that is held here does not cancel what somebody else waits for.

    Parameters
    ----------
    max_bytes : int
        Bound on the bytes of the results.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        """Bound on the bytes of the results."""
        self.bytes = 0
        """Bytes of the results that are held."""
        self._lock = threading.Lock()
        self._futures: OrderedDict[tuple[int, int], tuple[Any, int]] = OrderedDict()
        self._cells: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def key(self, image: int, index: int) -> Any:
        """Return the key of a cell that is held, else None."""
        with self._lock:
            entry = self._futures.get((image, index))
            return None if entry is None else entry[0].key

    def take(self, image: int, index: int) -> Any:
        """Return a new handle of a cell that is held, else None."""
        with self._lock:
            entry = self._futures.get((image, index))
            if entry is None:
                return None
            self._futures.move_to_end((image, index))
            future = entry[0]
            return type(future)(future.key, client=future.client)

    def keep(self, image: int, index: int, future: Any, nbytes: int) -> None:
        """Hold a future, which belongs to this table from now on."""
        released = [future]
        with self._lock:
            if nbytes <= self.max_bytes and (image, index) not in self._futures:
                self._futures[image, index] = future, nbytes
                self._cells.setdefault(image, set()).add(index)
                self.bytes += nbytes
                released = []
            while self.bytes > self.max_bytes:
                oldest = next(iter(self._futures))
                released.append(self._drop(*oldest))
        for old in released:
            old.release()

    def forget(self, image: int, indices: Collection[int] | None = None) -> None:
        """Release cells of an image, all of them for None."""
        with self._lock:
            known = self._cells.get(image, set())
            if indices is None:
                gone = list(known)
            elif len(indices) < len(known):
                gone = [index for index in indices if index in known]
            else:
                gone = [index for index in known if index in indices]
            released = [self._drop(image, index) for index in gone]
        for future in released:
            future.release()

    def clear(self) -> None:
        """Release everything."""
        for image in list(self._cells):
            self.forget(image)

    def _drop(self, image: int, index: int) -> Any:
        future, nbytes = self._futures.pop((image, index))
        cells = self._cells[image]
        cells.remove(index)
        if not cells:
            del self._cells[image]
        self.bytes -= nbytes
        return future
