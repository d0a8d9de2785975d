"""Results that stay on the workers of a cluster because the client holds their futures."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["Held", "handle", "is_dead", "release"]


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
        self._closed = False
        self._lock = threading.Lock()
        self._futures: OrderedDict[tuple[int, int], tuple[Any, int]] = OrderedDict()
        self._cells: dict[int, set[int]] = {}
        self._generations: Counter[int] = Counter()
        self._gone: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._futures)

    def generation(self, image: int) -> int:
        """Return how often cells of an image were forgotten, for `keep`."""
        with self._lock:
            return self._generations[image]

    def take(self, image: int, indices: Collection[int]) -> tuple[dict[int, Any], list[Any]]:
        """Return handles of the cells that are held, and what is of no use any more.

        The latter failed or was cancelled since, for instance because its worker was lost and
        it could not be computed again. It is no longer held, and is the caller's to release.
        """
        found: dict[int, Any] = {}
        dead: list[Any] = []
        with self._lock:
            for index in indices:
                entry = self._futures.get((image, index))
                if entry is None:
                    continue
                if is_dead(entry[0]):
                    dead.append(self._drop(image, index))
                else:
                    self._futures.move_to_end((image, index))
                    found[index] = handle(entry[0])
        return found, dead

    def keep(self, image: int, index: int, future: Any, nbytes: int, generation: int) -> None:
        """Hold a future, which belongs to this table from now on.

        It is released at once if cells of the image were forgotten since ``generation``: it may
        have been computed from what has changed.
        """
        with self._lock:
            released = self._bury()
            if (
                self._closed
                or nbytes > self.max_bytes
                or self._generations[image] != generation
                or (image, index) in self._futures
            ):
                released.append(future)
            else:
                self._futures[image, index] = future, nbytes
                self._cells.setdefault(image, set()).add(index)
                self.bytes += nbytes
            while self.bytes > self.max_bytes:
                oldest = next(iter(self._futures))
                released.append(self._drop(*oldest))
        release(released)

    def forget(self, image: int, indices: Collection[int] | None = None) -> None:
        """Release cells of an image, all of them for None, and keep none that is under way."""
        with self._lock:
            self._generations[image] += 1
            known = set(self._cells.get(image, ()))
        # Asking ``indices`` may be the user's code (an index map), so no lock is held meanwhile.
        # What is kept between the locks is new already.
        if indices is not None:
            if len(indices) < len(known):
                known.intersection_update(indices)
            else:
                known = {index for index in known if index in indices}
        with self._lock:
            released = self._drop_all(image, known)
        release(released)

    def abandon(self, image: int) -> None:
        """Release all cells of an image that is gone; never waits."""
        # Called by the collector, perhaps inside a section that this very thread has locked.
        self._gone.append(image)
        if self._lock.acquire(blocking=False):
            try:
                released = self._bury()
            finally:
                self._lock.release()
            release(released)

    def close(self) -> None:
        """Release everything, and hold nothing from now on."""
        with self._lock:
            self._closed = True
            released = [self._drop(*cell) for cell in list(self._futures)]
        release(released)

    # What follows expects the lock to be held.

    def _bury(self) -> list[Any]:
        released = []
        while self._gone:
            image = self._gone.popleft()
            released += self._drop_all(image, list(self._cells.get(image, ())))
            del self._generations[image]
        return released

    def _drop_all(self, image: int, indices: Iterable[int]) -> list[Any]:
        return [self._drop(image, index) for index in indices if (image, index) in self._futures]

    def _drop(self, image: int, index: int) -> Any:
        future, nbytes = self._futures.pop((image, index))
        cells = self._cells[image]
        cells.remove(index)
        if not cells:
            del self._cells[image]
        self.bytes -= nbytes
        return future


def handle(future: Any) -> Any:
    """Return another handle of a future: its key is wanted until all of them are released."""
    return type(future)(future.key, client=future.client)


def is_dead(future: Any) -> bool:
    """Whether a future failed or was cancelled."""
    return future.status in ("error", "cancelled")


def release(futures: Iterable[Any]) -> None:
    """Release handles."""
    for future in futures:
        future.release()
