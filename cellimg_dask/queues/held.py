"""Results that stay on the workers of a cluster because the client holds their futures."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Held", "Taken", "handle", "is_dead", "release"]


class Taken(NamedTuple):
    """A result that was held, and cells that are in it."""

    future: Any
    """A handle for whoever took it."""
    places: Mapping[int, Any]
    """Where in the result each cell is, as was said when it was kept; None: it is the result."""


@dataclass(eq=False)
class _Result:
    """A result that is held: a cell, or several of one image."""

    image: int
    future: Any
    nbytes: int
    places: dict[int, Any]


class Held:
    """Futures of cells, released in the order of last use when they exceed a number of bytes.

    The result of a future is one cell or several of an image, which come and go together; a cell
    that is forgotten alone is no longer found.

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
        self._results: OrderedDict[_Result, None] = OrderedDict()
        self._cells: dict[int, dict[int, _Result]] = {}
        self._generations: Counter[int] = Counter()
        self._gone: deque[int] = deque()

    def __len__(self) -> int:
        return sum(map(len, self._cells.values()))

    def generation(self, image: int) -> int:
        """Return how often cells of an image were forgotten, for `keep`."""
        with self._lock:
            return self._generations[image]

    def take(
        self, image: int, indices: Collection[int], generation: int
    ) -> tuple[list[Taken], list[Any]]:
        """Return the results in which cells are, and what is of no use any more.

        The latter failed or was cancelled since, for instance because its worker was lost and
        it could not be computed again. It is no longer held, and is the caller's to release.
        If cells of the image were forgotten since ``generation``, nothing is found.
        """
        dead: list[Any] = []
        with self._lock:
            if self._generations[image] != generation:
                return [], dead
            cells = self._cells.get(image, {})
            found: dict[_Result, dict[int, Any]] = {}
            for index in indices:
                result = cells.get(index)
                if result is not None:
                    found.setdefault(result, {})[index] = result.places[index]
            taken = []
            for result, places in found.items():
                if is_dead(result.future):
                    dead.append(self._drop(result))
                else:
                    self._results.move_to_end(result)
                    taken.append(Taken(handle(result.future), places))
        return taken, dead

    def keep(
        self, image: int, future: Any, places: Mapping[int, Any], nbytes: int, generation: int
    ) -> None:
        """Hold a future, which belongs to this table from now on.

        It is released at once if cells of the image were forgotten since ``generation``: it may
        have been computed from what has changed. Cells that are held already are found in the
        new result from now on.

        Parameters
        ----------
        image : int
            Number of the image.
        future : distributed.Future
            Its result has the cells.
        places : mapping of int to object
            Where in the result each cell is; for `take`.
        nbytes : int
            Of the result.
        generation : int
            Of the image, when the computation was asked for.
        """
        with self._lock:
            released = self._bury()
            if self._closed or nbytes > self.max_bytes or self._generations[image] != generation:
                released.append(future)
            else:
                released += self._remove(image, places)
                result = _Result(image, future, nbytes, dict(places))
                self._results[result] = None
                self._cells.setdefault(image, {}).update(dict.fromkeys(places, result))
                self.bytes += nbytes
            while self.bytes > self.max_bytes:
                released.append(self._drop(next(iter(self._results))))
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
            released = self._remove(image, known)
        release(released)

    def lose(self, image: int, indices: Iterable[int]) -> None:
        """Hold cells no more: they are not outdated, but not in their results either."""
        with self._lock:
            released = self._remove(image, indices)
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
            released = [self._drop(result) for result in list(self._results)]
        release(released)

    # What follows expects the lock to be held.

    def _bury(self) -> list[Any]:
        released = []
        while self._gone:
            image = self._gone.popleft()
            released += self._remove(image, list(self._cells.get(image, ())))
            del self._generations[image]
        return released

    def _remove(self, image: int, indices: Iterable[int]) -> list[Any]:
        """Remove cells; return the futures that have none left."""
        released = []
        cells = self._cells.get(image, {})
        for index in indices:
            result = cells.get(index)
            if result is None:
                continue
            if len(result.places) == 1:
                released.append(self._drop(result))
            else:
                del cells[index], result.places[index]
        return released

    def _drop(self, result: _Result) -> Any:
        del self._results[result]
        cells = self._cells[result.image]
        for index in result.places:
            del cells[index]
        if not cells:
            del self._cells[result.image]
        self.bytes -= result.nbytes
        return result.future


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
