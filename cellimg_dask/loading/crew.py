"""Sharing a list of work among idle threads, without ever waiting for a free one."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from time import perf_counter, thread_time
from typing import Any, Protocol, TypeVar

from cellimg_dask.blocks.functions import current_worker
from cellimg_dask.geometry import as_int
from cellimg_dask.loading.priorities import priority
from cellimg_dask.state.flights import current_flight, inside

__all__ = ["Backlog", "Crew", "get_crew", "is_crew_thread"]

T = TypeVar("T")

# Items are tiny where their caller alone does one in less time than this. Two threads would only
# fight for the interpreter lock.
_TINY_S = 80e-6
# A helper looks on for so long before it joins in, then longer and longer.
_FIRST_LOOK_S = 0.5e-3
_LONGEST_LOOK_S = 20e-3
# So often a helper asks itself whether its items have become tiny.
_ITEMS_BETWEEN_DOUBTS = 32
# What takes longer without using the processor waits for something.
_WAITING_S = 250e-6


class Backlog(Protocol):
    """Pieces of work that a crew's threads do when they have nothing better to do."""

    def waiting(self, at_most: int) -> tuple[int, int]:
        """Return the priority of the next piece, and how many there are, up to ``at_most``."""
        ...

    def do_one(self) -> bool:
        """Do the next piece; False if there is none. Raises nothing."""
        ...

    def abandon(self) -> None:
        """Drop what nobody has begun, because Python ends."""
        ...


class Crew:
    """A few threads that help whoever has many cells to compute.

    The caller always works too and helpers only join in, so nothing is ever queued behind a
    thread that waits: chains of any depth end with any number of threads, one included.

    Threads that are free work off a backlog. Whoever calls `run` goes first: a thread looks after
    each piece of the backlog whether as many work as should, and leaves the backlog if so; one
    goes on at least, unless who works is more urgent.

    Parameters
    ----------
    num_threads : int, optional
        How many threads compute at the same time, callers counted; default: the usable cores.
    spare_tiny : bool
        Whether helpers leave tiny items to the caller, because two threads that run little but
        interpreted code are slower than one. Not where items mostly wait for something.

    Notes
    -----
    Thread-safe. The threads do not keep Python from ending: what they have begun is finished,
    the rest of their list is not.
    """

    def __init__(self, num_threads: int | None = None, *, spare_tiny: bool = True) -> None:
        if num_threads is None:
            num_threads = usable_cores()
        self.num_threads = as_int(num_threads, "num_threads", minimum=1)
        """How many threads compute at the same time."""
        self.spare_tiny = spare_tiny
        """Whether helpers leave tiny items to the caller."""
        self._mine = _Mine()
        self._begin()
        _crews.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        # Who works. Weak, so that somebody who is interrupted at whatever point is not counted
        # for ever.
        self._busy: weakref.WeakSet[_Worker] = weakref.WeakSet()
        self._hands: weakref.WeakSet[_Hand] = weakref.WeakSet()
        self._jobs: weakref.WeakSet[_Job] = weakref.WeakSet()
        self.backlog: Backlog | None = None
        """What threads do that are free."""
        self._leader: _Hand | None = None
        self._by_leader = 0
        self._backlog_done = threading.Event()
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count this thread as busy, so that nested work does not hire beyond the cores."""
        if self._mine.busy:
            yield
            return
        worker = _Worker()
        with self._lock:
            self._busy.add(worker)
        try:
            self._mine.busy = True
            yield
        finally:
            self._mine.busy = False
            self._dismiss(worker)

    def run(self, items: Iterable[T], work: Callable[[T], object], count: int) -> None:
        """Call ``work`` once for each of ``count`` items, in parallel where threads are idle.

        Returns when all are done. If one raises, no further item is begun and the first
        exception is raised here, after the running ones have ended.

        Inside a block that a queue's worker runs, all are done here: a thread that helped might
        wait for a worker, and that one for this block.
        """
        if count <= 1 or current_worker() is not None:
            for item in items:
                work(item)
            return
        if self.num_threads == 1:
            with self.working():
                for item in items:
                    work(item)
            return
        with self.working():
            job = _Job(items, work)
            helpers: list[_Helper] = []
            try:
                helpers = self._hire(job, count - 1)
                for helper in helpers:
                    self._start(helper)
                job.drain()
            finally:
                job.stop()
                for helper in helpers:
                    helper.leave()
        if job.error is not None:
            raise job.error

    def call_hands(self) -> None:
        """Have free threads work off the backlog."""
        while True:
            with self._lock:
                if self.backlog is None:
                    return
                urgency, pieces = self.backlog.waiting(self.num_threads)
                if not pieces or len(self._hands) >= self._room(urgency):
                    return
                # Those that are about to take a piece, or to look.
                if pieces <= sum(not hand.works for hand in self._hands):
                    return
                hand = _Hand(self)
                self._hands.add(hand)
            if not self._start(hand):
                hand()

    def close(self, *, join: bool = True) -> None:
        """End the threads after what they are doing; a later call starts new ones."""
        while True:
            with self._lock:
                threads, self._threads = self._threads, []
                tasks, self._tasks = self._tasks, SimpleQueue()
            tasks.put(None)
            if not join or not threads:
                return
            for thread in threads:
                # A thread that drops the last reference to a queue closes it.
                if thread is not threading.current_thread():
                    thread.join()
            # What they were doing may have started others.

    def _hire(self, job: _Job, wanted: int) -> list[_Helper]:
        with self._lock:
            self._jobs.add(job)
            idle = self.num_threads - len(self._busy)
            if self._mine.for_backlog:
                # Hands make way for others, but not for each other's helpers.
                idle -= len(self._hands)
            helpers = [_Helper(self, job) for _ in range(min(wanted, idle))]
            self._busy.update(helpers)
        return helpers

    def _dismiss(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
        if self.backlog is not None:
            self.call_hands()

    def _room(self, urgency: int) -> int:
        """Return how many threads may work off the backlog; the lock must be held."""
        free = self.num_threads - len(self._busy)
        if free >= 1:
            return free
        return int(all(worker.priority >= urgency for worker in self._busy))

    def _keeps(self, hand: _Hand) -> bool:
        """Whether a hand goes on; if not, it is one no more."""
        with self._lock:
            # It leaves under the same lock: whoever calls hands later does not count on it.
            if self.backlog is None or hand not in self._hands:
                return False
            urgency, pieces = self.backlog.waiting(1)
            if pieces and len(self._hands) <= self._room(urgency):
                self._backlog_done.clear()
                if self._leader is None:
                    self._leader = hand
                return True
            if not pieces:
                self._backlog_done.set()
            self._discharge(hand)
            return False

    def _discharge(self, hand: _Hand) -> None:
        self._hands.discard(hand)
        if self._leader is hand:
            self._leader = None

    def _start(self, task: Callable[[], object]) -> bool:
        """Have a thread call ``task`` when one is free; False where no thread can be had."""
        with self._lock:
            if len(self._threads) < self.num_threads:
                name = f"cellimg-{len(self._threads)}"
                thread = threading.Thread(
                    target=_serve, args=(self._tasks,), name=name, daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    # The interpreter is shutting down and starts no more threads.
                    if not self._threads:
                        return False
                else:
                    self._threads.append(thread)
            self._tasks.put(task)
        return True

    def _abandon(self) -> None:
        """Let the threads end after the items that they have begun, because Python ends."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.stop(CancelledError("Python ends"))
        if self.backlog is not None:
            self.backlog.abandon()
        self.close()


class _Mine(threading.local):
    """What a crew knows of a thread."""

    busy = False
    for_backlog = False


class _ThisThread(threading.local):
    serves = False


_this_thread = _ThisThread()


def is_crew_thread() -> bool:
    """Whether this is a thread of some crew, which should not wait for work of a backlog."""
    return _this_thread.serves


def _serve(tasks: SimpleQueue[Callable[[], object] | None]) -> None:
    _this_thread.serves = True
    while True:
        task = tasks.get()
        if task is None:
            # For the next one. How many there are is not known for sure: who started them may
            # have been interrupted.
            tasks.put(None)
            return
        task()
        # A thread that waits holds nothing of what it did.
        del task


class _Job:
    """Items that several threads take one by one; the first error stops all."""

    def __init__(self, items: Iterable[Any], work: Callable[[Any], object]) -> None:
        self._items = iter(items)
        self._work = work
        self._lock = threading.Lock()
        self._stopped = False
        self.ended = threading.Event()
        """Set when there is nothing left to begin."""
        self.by_caller = 0
        """How many items the caller itself has done."""
        self.error: BaseException | None = None

    def drain(self) -> None:
        """Take items until nothing is left; for the caller."""
        while self.take_one():
            self.by_caller += 1

    def take_one(self) -> bool:
        """Do one item; False if there is none, or the job has ended."""
        with self._lock:
            if self._stopped:
                return False
            try:
                item = next(self._items)
            except StopIteration:
                self._end()
                return False
            except BaseException as error:
                self._fail(error)
                return False
        try:
            self._work(item)
        except BaseException as error:
            with self._lock:
                self._fail(error)
            return False
        return True

    def stop(self, error: BaseException | None = None) -> None:
        """Begin no further item; with ``error``, because of it."""
        with self._lock:
            if error is not None and not self._stopped:
                self._fail(error)
            self._end()

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self._end()

    def _end(self) -> None:
        self._stopped = True
        self.ended.set()


class _Worker:
    """Somebody who works."""

    def __init__(self) -> None:
        self.priority = priority.get()
        """How urgent it is."""


class _Helper(_Worker):
    """A thread's part in a job: it looks on, joins in where that helps, and leaves."""

    def __init__(self, crew: Crew, job: _Job) -> None:
        super().__init__()
        self._crew = crew
        self._for_backlog = crew._mine.for_backlog
        self._job = job
        self._flight = current_flight()
        self._context = copy_context()
        self._lock = threading.Lock()
        self._came = False
        self._left = threading.Event()

    def __call__(self) -> None:
        with self._lock:
            if self._left.is_set():
                return
            self._came = True
        mine = self._crew._mine
        mine.busy, mine.for_backlog = True, self._for_backlog
        try:
            with inside(self._flight):
                self._context.run(self._help)
        finally:
            mine.busy = mine.for_backlog = False
            self._end()

    def leave(self) -> None:
        """Wait until the thread has left the job; not at all if it never came."""
        with self._lock:
            if not self._came and not self._left.is_set():
                self._end()
        self._left.wait()

    def _end(self) -> None:
        self._crew._dismiss(self)
        # Who waited may look at once whether somebody still holds what the job was about, and
        # the thread, or the list of its tasks, still holds this.
        del self._job, self._context, self._flight
        self._left.set()

    def _help(self) -> None:
        if not self._crew.spare_tiny:
            while self._job.take_one():
                pass
            return
        look = _FIRST_LOOK_S
        while not self._job.ended.is_set():
            if self._needed(look):
                look = _FIRST_LOOK_S
                self._work()
            else:
                look = min(2 * look, _LONGEST_LOOK_S)

    def _needed(self, look_s: float) -> bool:
        """Look on for a while: whether the caller's items are worth a second thread."""
        before, began = self._job.by_caller, perf_counter()
        if self._job.ended.wait(look_s):
            return False
        done = self._job.by_caller - before
        return done * _TINY_S <= perf_counter() - began

    def _work(self) -> None:
        """Take items until nothing is left, or they turn out to be tiny."""
        tiny = False
        while not tiny:
            doubt = _Doubt()
            for _ in range(_ITEMS_BETWEEN_DOUBTS):
                if not self._job.take_one():
                    return
            tiny = doubt.proves_true()


class _Hand:
    """A thread's part in the backlog; all but one leave tiny pieces to that one."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.works = False
        """Whether it is about a piece."""

    def __call__(self) -> None:
        crew = self._crew
        mine = crew._mine
        before = mine.busy, mine.for_backlog
        mine.busy = mine.for_backlog = True
        try:
            look = _FIRST_LOOK_S
            while crew._keeps(self):
                if crew._leader is self or not crew.spare_tiny:
                    if self._do_one():
                        crew._by_leader += 1
                elif self._needed(look):
                    look = _FIRST_LOOK_S
                    self._work()
                else:
                    look = min(2 * look, _LONGEST_LOOK_S)
        finally:
            mine.busy, mine.for_backlog = before
            with crew._lock:
                crew._discharge(self)

    def _do_one(self) -> bool:
        backlog = self._crew.backlog
        self.works = True
        try:
            return backlog is not None and backlog.do_one()
        finally:
            self.works = False

    def _needed(self, look_s: float) -> bool:
        """Look on for a while: whether the leader's pieces are worth a second thread."""
        before, began = self._crew._by_leader, perf_counter()
        if self._crew._backlog_done.wait(look_s):
            return False
        done = self._crew._by_leader - before
        return done * _TINY_S <= perf_counter() - began

    def _work(self) -> None:
        """Do pieces until it has to leave, or they turn out to be tiny."""
        tiny = False
        while not tiny:
            doubt = _Doubt()
            for _ in range(_ITEMS_BETWEEN_DOUBTS):
                if not self._do_one() or not self._crew._keeps(self):
                    return
            tiny = doubt.proves_true()


class _Doubt:
    """Whether the items since then, as many as there are between doubts, were tiny."""

    def __init__(self) -> None:
        self._cpu, self._wall = thread_time(), perf_counter()

    def proves_true(self) -> bool:
        """Whether they took next to no time."""
        # An item that waits, for a disk perhaps, takes no processor time but is not tiny.
        return (
            thread_time() - self._cpu < _ITEMS_BETWEEN_DOUBTS * _TINY_S
            and perf_counter() - self._wall < _ITEMS_BETWEEN_DOUBTS * _WAITING_S
        )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_crews: weakref.WeakSet[Crew] = weakref.WeakSet()
_shared: list[Crew] = []
_shared_lock = threading.Lock()


def get_crew() -> Crew:
    """Return the crew of this process; its threads start when first needed."""
    with _shared_lock:
        if not _shared:
            _shared.append(Crew())
        return _shared[0]


def _at_exit() -> None:
    for crew in list(_crews):
        crew._abandon()


def _after_fork_in_child() -> None:
    # Threads do not survive a fork, and the locks may have been held.
    global _shared_lock
    _shared_lock = threading.Lock()
    for crew in list(_crews):
        crew._begin()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
