"""The cell cache: once-only loads under one bound in bytes.

A `CellCache` owns the budget; each image (or chunked store) has a `Shelf` in it. Eviction is
GreedyDual-Size (Cao and Irani, 1997): an entry's priority is ``L + seconds / bytes``, where
``L`` is the priority of the last entry evicted. What is evicted but still referenced somewhere
is found again through a weak reference, so nobody ever holds two arrays of one cell.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellError, SourceChangedError
from cellimg_dask.blocks.functions import current_worker
from cellimg_dask.geometry import as_int
from cellimg_dask.state.disk import DiskCells
from cellimg_dask.state.flights import CircularWaitError, Flight, inside
from cellimg_dask.state.sizes import num_bytes

__all__ = ["CacheStats", "CellCache", "OutdatedError", "Shelf", "get_cache", "own", "set_cache"]


class OutdatedError(Exception):
    """Cells of an edition were asked for, of which some have changed since."""


@dataclass(slots=True)
class CacheStats:
    """Counters of one image or of a whole cache."""

    hits: int = 0
    """Cells found in memory."""
    misses: int = 0
    """Cells that had to be loaded."""
    joins: int = 0
    """Requests that waited for a load that was already running."""
    loads: int = 0
    """Loads that succeeded."""
    load_seconds: float = 0.0
    """Seconds spent in loads, summed over threads."""
    evictions: int = 0
    """Cells dropped for want of room."""
    bytes: int = 0
    """Bytes held now."""
    errors: int = 0
    """Loads that raised."""

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(
            *(getattr(self, item.name) + getattr(other, item.name) for item in fields(self))
        )


class _Entry:
    __slots__ = ("index", "nbytes", "priority", "rate", "seconds", "shelf", "used", "value")

    def __init__(self, shelf: Shelf, index: int, value: NDArray[Any], seconds: float) -> None:
        self.shelf: Shelf | None = shelf  # None once the entry has left the cache
        self.index = index
        self.value = value
        self.nbytes = num_bytes(value) if value.dtype.hasobject else value.nbytes
        self.seconds = seconds
        self.rate = shelf.rate_of(seconds, self.nbytes)
        self.priority = 0.0
        self.used = 0


class _Living(weakref.ref["NDArray[Any]"]):
    """A weak reference to an evicted array that knows what it cost."""

    __slots__ = ("index", "seconds")
    index: int
    seconds: float


class CellCache:
    """A byte budget shared by any number of images.

    Parameters
    ----------
    max_bytes : int
        Bound on the bytes held, at least 0; 0 keeps nothing, loads are still once-only.
    timer : callable, optional
        Clock in seconds by which loads are priced.
    disk : DiskCells, optional
        Where computed cells outlive the process.

    Raises
    ------
    TypeError, ValueError
        If ``max_bytes`` is not an integer of at least 0.

    Notes
    -----
    Thread-safe. One lock guards all bookkeeping and is never held while something is loaded.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        timer: Callable[[], float] = time.perf_counter,
        disk: DiskCells | None = None,
    ) -> None:
        self.disk = disk
        """Where computed cells outlive the process; None: nowhere."""
        self._max_bytes = as_int(max_bytes, "max_bytes", minimum=0)
        self._timer = timer
        self._lock = threading.Lock()
        self._bytes = 0
        self._floor = 0.0
        self._heap: list[tuple[float, int, _Entry]] = []
        self._uses = 0
        self._shelves: set[Shelf] = set()
        self._departed: list[Shelf] = []
        self._past = CacheStats()
        _caches.add(self)

    @property
    def max_bytes(self) -> int:
        """Bound on the bytes held."""
        return self._max_bytes

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def resize(self, max_bytes: int) -> None:
        """Change the bound; what no longer fits is evicted at once."""
        bound = as_int(max_bytes, "max_bytes", minimum=0)
        with self._lock:
            self._max_bytes = bound
            self._make_room(0)

    def reserve(self, nbytes: int) -> None:
        """Count so many bytes more, or less, that somebody holds who cannot let go of them now."""
        with self._lock:
            self._bytes += nbytes
            self._make_room(0)

    def shelf(self, owner: object, *, alike: bool = False, beside: Shelf | None = None) -> Shelf:
        """Return a new, empty shelf; it leaves the cache when ``owner`` is collected.

        ``alike`` says that its cells cost much the same for their size, as the chunks of a store
        do. Then the first one's price is everybody's: among themselves they leave by last use,
        and noise in the measured times does not decide. ``beside`` is another shelf of the same
        image, in this cache; they share their counters.
        """
        shelf = Shelf(self, alike=alike, beside=beside)
        with self._lock:
            self._shelves.add(shelf)
        weakref.finalize(owner, self._depart, shelf).atexit = False
        return shelf

    def stats(self) -> CacheStats:
        """Return the sum over all images, also those that are gone."""
        with self._lock:
            self._bury()
            accounts = {shelf._account for shelf in self._shelves}
            total = sum((account.stats for account in accounts), self._past + CacheStats())
            total.bytes = self._bytes
            return total

    def clear(self) -> None:
        """Forget every cell; loads under way are not published."""
        with self._lock:
            shelves = list(self._shelves)
        for shelf in shelves:
            shelf.invalidate(None)

    def _depart(self, shelf: Shelf) -> None:
        # Called by the collector, perhaps inside a section that this very thread has locked:
        # so it never waits; whoever next needs room finishes the work.
        shelf.gone = True
        self._departed.append(shelf)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def __reduce__(self) -> tuple[Callable[..., CellCache], tuple[int, ...]]:
        # The bound travels, the cells do not; what shares a budget here shares one there.
        if _shared and self is _shared[0]:
            return get_cache, ()
        return CellCache, (self._max_bytes,)

    def __repr__(self) -> str:
        return f"CellCache(max_bytes={self._max_bytes}, bytes={self._bytes})"

    # What follows expects the lock to be held.

    def _admit(self, entry: _Entry) -> None:
        if entry.nbytes <= self._max_bytes:
            self._make_room(entry.nbytes)
        if entry.nbytes > self._max_bytes - self._bytes:
            assert entry.shelf is not None
            entry.shelf._remember(entry)
            entry.shelf = None
            return
        self._bytes += entry.nbytes
        self._use(entry)
        self._push(entry)
        assert entry.shelf is not None
        entry.shelf._entries[entry.index] = entry

    def _push(self, entry: _Entry) -> None:
        # Among equals the one unused for longest goes first; no two have the same number.
        heapq.heappush(self._heap, (entry.priority, entry.used, entry))

    def _use(self, entry: _Entry) -> None:
        # Only noted here; the heap learns of it when the entry comes up for eviction.
        self._uses += 1
        entry.used = self._uses
        entry.priority = self._floor + entry.rate

    def _bury(self) -> None:
        while self._departed:
            shelf = self._departed.pop()
            for entry in list(shelf._entries.values()):
                self._drop(entry)
            self._shelves.discard(shelf)
            account = shelf._account
            account.shelves.discard(shelf)
            if not account.shelves:
                self._past = self._past + account.stats
            self._compact()

    def _make_room(self, nbytes: int) -> None:
        if self._departed:
            self._bury()
        while self._heap and self._bytes + nbytes > self._max_bytes:
            priority, used, entry = heapq.heappop(self._heap)
            if entry.shelf is None:
                continue
            if entry.used > used:
                self._push(entry)
                continue
            self._floor = priority
            shelf = entry.shelf
            shelf._stats.evictions += 1
            shelf._remember(entry)
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        assert entry.shelf is not None
        del entry.shelf._entries[entry.index]
        entry.shelf = None
        self._bytes -= entry.nbytes

    def _compact(self) -> None:
        if len(self._heap) > 64 and len(self._heap) > 2 * sum(
            len(shelf._entries) for shelf in self._shelves
        ):
            self._heap = [item for item in self._heap if item[2].shelf is not None]
            heapq.heapify(self._heap)


class _Account:
    """What is counted for the shelves of one image."""

    __slots__ = ("shelves", "stats")

    def __init__(self) -> None:
        self.stats: CacheStats = CacheStats()
        self.shelves: set[Shelf] = set()


class Shelf:
    """The cells of one image in a cache.

    Notes
    -----
    Thread-safe; shares the lock of its cache.
    """

    def __init__(
        self, cache: CellCache, *, alike: bool = False, beside: Shelf | None = None
    ) -> None:
        self.cache = cache
        """The cache that holds the budget."""
        self.edition = 0
        """Number of the last change that cells were forgotten for."""
        self._alike = alike
        self._account: _Account = _Account() if beside is None else beside._account
        self._account.shelves.add(self)
        self._rate: float | None = None
        self.gone = False
        """Whether the owner was collected: nothing is kept any more."""
        self._entries: dict[int, _Entry] = {}
        self._flights: dict[int, Flight] = {}
        self._living: dict[int, _Living] = {}
        self._outdated: set[int] = set()
        self._stats = self._account.stats

    def rate_of(self, seconds: float, nbytes: int) -> float:
        """Return the price of a cell in seconds per byte."""
        rate = seconds / max(nbytes, 1)
        if not self._alike:
            return rate
        if self._rate is None:
            self._rate = rate
        return self._rate

    def peek(self, index: int) -> NDArray[Any] | None:
        """Return a cell that is held, else None; nothing is computed, counted or moved."""
        entry = self._entries.get(index)
        if entry is not None:
            return entry.value
        living = self._living.get(index)
        return None if living is None else living()

    def is_loading(self, index: int) -> bool:
        """Whether a thread loads a cell at the moment."""
        return index in self._flights

    def num_loading(self) -> int:
        """Return how many cells are loaded at the moment."""
        return len(self._flights)

    def get_many(
        self, indices: Iterable[int], edition: int | None = None
    ) -> list[NDArray[Any] | None]:
        """Return the held ones of several cells, None for the others; counts hits only.

        `OutdatedError` if cells were forgotten for a change after ``edition``.
        """
        cache = self.cache
        entries = self._entries
        values: list[NDArray[Any] | None] = []
        with cache._lock:
            if edition is not None and self.edition > edition:
                raise OutdatedError
            hits = 0
            for index in indices:
                entry = entries.get(index)
                if entry is None:
                    values.append(None)
                else:
                    cache._use(entry)
                    values.append(entry.value)
                    hits += 1
            self._stats.hits += hits
        return values

    def get(
        self,
        index: int,
        load: Callable[[int], NDArray[Any]],
        seconds: float | None = None,
        edition: int | None = None,
    ) -> NDArray[Any]:
        """Return a cell, loading it if need be; concurrent callers share one load.

        Parameters
        ----------
        index : int
            The cell.
        load : callable
            Makes the cell's array; the array must be the cache's own from then on.
        seconds : float, optional
            What the cell cost, where that is not the time that ``load`` takes.
        edition : int, optional
            Number of the change after which the cell is wanted, and ``load`` makes it.

        Returns
        -------
        ndarray
            Read-only; the same object for everybody as long as anybody holds it.

        Raises
        ------
        Exception
            What ``load`` raised, for everybody who waited; nothing is kept, the next call
            tries again.
        CircularWaitError
            If the cell needs itself.
        OutdatedError
            If cells were forgotten for a change after ``edition``.
        """
        cache = self.cache
        while True:
            mine: Flight | None = None
            try:
                with cache._lock:
                    if edition is not None and self.edition > edition:
                        raise OutdatedError
                    entry = self._entries.get(index)
                    if entry is not None:
                        self._stats.hits += 1
                        cache._use(entry)
                        return entry.value
                    flight = self._flights.get(index)
                    if flight is None:
                        found = self._find_living(index)
                        if found is not None:
                            self._stats.hits += 1
                            return found
                        flight = mine = Flight(self, index)
                        self._flights[index] = mine
                        self._stats.misses += 1
                    else:
                        done = flight.prepare_join()
                if mine is not None:
                    return self._load(mine, load, seconds)
            finally:
                if mine is not None and not mine.landed:
                    self._abandon(mine)
            if current_worker() is not None:
                # Who computes it may wait for the very worker that this thread is.
                return self._load_alone(index, load)
            flight.join(done)
            if flight.error is None and flight.value is None:
                continue  # Abandoned: the thread was interrupted.
            if isinstance(flight.error, SourceChangedError):
                continue  # It read what is gone; that need not be what this caller reads.
            with cache._lock:
                self._stats.joins += 1
            if flight.error is not None:
                if isinstance(flight.error, CellError):
                    raise flight.error.again() from flight.error.__cause__
                raise flight.error
            assert flight.value is not None
            return flight.value

    def _load_alone(self, index: int, load: Callable[[int], NDArray[Any]]) -> NDArray[Any]:
        """Load a cell that another thread loads as well; for this caller only."""
        flight = Flight(self, index)
        if flight.begun_by_itself():
            raise CircularWaitError
        began = self.cache._timer()
        try:
            with inside(flight):
                value = own(load(index))
        except Exception:
            self.record(0.0, failed=True)
            raise
        finally:
            flight.landed = True
        self.record(self.cache._timer() - began)
        return value

    def _load(
        self, flight: Flight, load: Callable[[int], NDArray[Any]], seconds: float | None
    ) -> NDArray[Any]:
        cache = self.cache
        try:
            began = cache._timer()
            with inside(flight):
                value = load(flight.index)
            value = own(value)
            if seconds is None:
                seconds = cache._timer() - began
        except Exception as error:
            with cache._lock:
                flight.error = error
                self._stats.errors += 1
                self._forget_flight(flight)
            flight.land()
            raise
        with cache._lock:
            flight.value = value
            self._stats.loads += 1
            self._stats.load_seconds += seconds
            self._forget_flight(flight)
            if not (flight.stale or self.gone):
                self._outdated.discard(flight.index)
                cache._admit(_Entry(self, flight.index, value, seconds))
        flight.land()
        return value

    def _abandon(self, flight: Flight) -> None:
        """Give up a flight whose thread was interrupted, at whatever point; who waits retries."""
        with self.cache._lock:
            self._forget_flight(flight)
        flight.land()

    def record(self, seconds: float, *, failed: bool = False) -> None:
        """Count a load that went past the cache, straight into somebody's array."""
        with self.cache._lock:
            self._stats.misses += 1
            if failed:
                self._stats.errors += 1
            else:
                self._stats.loads += 1
                self._stats.load_seconds += seconds

    def invalidate(
        self,
        indices: Collection[int] | None,
        edition: int | None = None,
        into: Shelf | None = None,
        unless: Collection[int] = (),
    ) -> None:
        """Forget cells, all of them for None; safe at any time.

        A load of such a cell that is under way still answers those who already wait for it,
        and is never published. ``indices`` is iterated or asked for membership, whichever is
        less work.

        Parameters
        ----------
        indices : collection of int or None
            The cells.
        edition : int, optional
            Number of the change. From now on no load of an earlier edition begins here.
        into : Shelf, optional
            A shelf of the same cache, on which the cells that are held are put instead, but not
            those in ``unless``.
        """
        cache = self.cache
        if edition is not None:
            with cache._lock:
                self.edition = max(self.edition, edition)
        tables: tuple[dict[int, Any], ...] = (self._entries, self._flights, self._living)
        # Asking ``indices`` may be the user's code (an index map), so no lock is held meanwhile.
        # What begins between the locks reads what is new already.
        if indices is not None and len(indices) < sum(map(len, tables)):
            known = list(indices)
        else:
            with cache._lock:
                known = [index for table in tables for index in table]
            if indices is not None:
                known = [index for index in known if index in indices]
        moved = set() if into is None else {index for index in known if index not in unless}
        with cache._lock:
            if edition is not None:
                self._outdated.update(index for index in known if index in self._entries)
            for index in known:
                self._forget(index, into if index in moved else None)
            cache._compact()

    def held(self) -> list[int]:
        """Return the cells that are held, in no order."""
        with self.cache._lock:
            return list(self._entries)

    def num_outdated(self) -> int:
        """Return how many cells were forgotten for a change and have not been loaded since."""
        return len(self._outdated)

    def stats(self) -> CacheStats:
        """Return a copy of the counters, of all shelves of the image."""
        with self.cache._lock:
            copy = self._stats + CacheStats()
            copy.bytes = sum(
                entry.nbytes for shelf in self._account.shelves for entry in shelf._entries.values()
            )
            return copy

    # What follows expects the lock to be held.

    def _forget(self, index: int, into: Shelf | None) -> None:
        entry = self._entries.get(index)
        if entry is not None and into is not None and not into.gone and index not in into._entries:
            del self._entries[index]
            entry.shelf = into
            into._entries[index] = entry
        elif entry is not None:
            self.cache._drop(entry)
        flight = self._flights.pop(index, None)
        if flight is not None:
            flight.stale = True
        self._living.pop(index, None)

    def _forget_flight(self, flight: Flight) -> None:
        if self._flights.get(flight.index) is flight:
            del self._flights[flight.index]

    def _remember(self, entry: _Entry) -> None:
        living = _Living(entry.value, _forgetter(self._living))
        living.index = entry.index
        living.seconds = entry.seconds
        self._living[entry.index] = living

    def _find_living(self, index: int) -> NDArray[Any] | None:
        living = self._living.get(index)
        value = None if living is None else living()
        if living is not None and value is not None:
            del self._living[index]
            self.cache._admit(_Entry(self, index, value, living.seconds))
        return value


def own(value: NDArray[Any]) -> NDArray[Any]:
    """Return ``value`` read-only and owning its memory, so that its bytes are what it costs."""
    if not value.flags.owndata:
        value = value.copy()
    value.flags.writeable = False
    return value


def _forgetter(living: dict[int, _Living]) -> Callable[[weakref.ref[Any]], None]:
    # Runs whenever an array dies, perhaps in a thread that holds the lock: so it takes none.
    def forget(dead: weakref.ref[Any]) -> None:
        assert isinstance(dead, _Living)
        if living.get(dead.index) is dead:
            living.pop(dead.index, None)

    return forget


def get_cache() -> CellCache:
    """Return the cache that all images share unless they are given another.

    Its bound is a quarter of this machine's (or container's) memory until `set_cache`.
    """
    with _shared_lock:
        if not _shared:
            _shared.append(CellCache(memory_bytes() // 4))
        return _shared[0]


def set_cache(
    max_bytes: int,
    disk: str | os.PathLike[str] | None = None,
    max_disk_bytes: int = 16 << 30,
) -> CellCache:
    """Set the bound of the shared cache, in bytes; what no longer fits is evicted at once.

    Parameters
    ----------
    max_bytes : int
        Bound on the bytes in memory.
    disk : path, optional
        A folder in which computed cells outlive the process: a later one, or another at the same
        time, finds them as long as function, parameters and inputs are the same. Default: none.
    max_disk_bytes : int
        Bound on the bytes in that folder.

    Raises
    ------
    TypeError, ValueError
        If a bound is not an integer of at least 0.
    PermissionError
        If others can write to the folder.
    """
    cells = None if disk is None else DiskCells(disk, max_disk_bytes)
    cache = get_cache()
    cache.resize(max_bytes)
    cache.disk = cells
    return cache


_shared: list[CellCache] = []
_shared_lock = threading.Lock()
_caches: weakref.WeakSet[CellCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Another thread may have held a lock when this process was forked, and its loads will never
    # land here: start empty.
    global _shared_lock
    _shared_lock = threading.Lock()
    for cache in _caches:
        cache._lock = threading.Lock()
        for shelf in cache._shelves:
            shelf._entries.clear()
            shelf._flights.clear()
            shelf._living.clear()
        cache._heap.clear()
        cache._bytes = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def memory_bytes() -> int:
    """Return the memory of this machine or container, or 8 GiB where it cannot be known."""
    known = [8 << 30]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            known.append(int(text))
    return min(known)
