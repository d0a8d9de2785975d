"""Sharing a list of work among idle threads, without ever waiting for a free one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter, thread_time
from typing import Any, TypeVar

from cellimg_dask.geometry import as_int
from cellimg_dask.state.flights import current_flight, inside

__all__ = ["Crew", "get_crew"]

T = TypeVar("T")

# A helper looks at its first items: below both limits they are tiny.
_TRIAL_ITEMS = 16
_TINY_CPU_S = 80e-6
_TINY_WALL_S = 1e-3


class Crew:
    """A few threads that help whoever has many cells to compute.

    The caller always works too and helpers only join in, so nothing is ever queued behind a
    thread that waits: chains of any depth end with any number of threads, one included.

    Parameters
    ----------
    num_threads : int, optional
        How many threads compute at the same time, callers counted; default: the usable cores.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is None:
            num_threads = usable_cores()
        self.num_threads = as_int(num_threads, "num_threads", minimum=1)
        """How many threads compute at the same time."""
        self._lock = threading.Lock()
        self._busy = 0
        self._mine = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count this thread as busy, so that nested work does not hire beyond the cores."""
        if getattr(self._mine, "busy", False):
            yield
            return
        with self._lock:
            self._busy += 1
        self._mine.busy = True
        try:
            yield
        finally:
            self._mine.busy = False
            with self._lock:
                self._busy -= 1

    def run(self, items: Iterable[T], work: Callable[[T], object], count: int) -> None:
        """Call ``work`` once for each of ``count`` items, in parallel where threads are idle.

        Returns when all are done. If one raises, no further item is begun and the first
        exception is raised here, after the running ones have ended.
        """
        if count <= 1 or self.num_threads == 1:
            for item in items:
                work(item)
            return
        with self.working():
            job = _Job(items, work)
            helpers = []
            for _ in range(self._hire(count - 1)):
                try:
                    helpers.append(self._submit(job))
                except RuntimeError:
                    # The interpreter is shutting down and starts no more threads.
                    self._dismiss()
            try:
                job.drain()
            finally:
                job.stop()
                for helper in helpers:
                    if helper.cancel():
                        self._dismiss()
                    else:
                        helper.exception()
        if job.error is not None:
            raise job.error

    def spawn(self, work: Callable[[], object]) -> Future[Any]:
        """Run ``work`` on a thread of the crew, now or when one is free.

        Inside a computation it runs at once, here: whoever waited there for a free thread might
        wait for one that waits for this computation.
        """
        if current_flight() is not None:
            done: Future[Any] = Future()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            return done

        def task() -> object:
            with self.working():
                return work()

        return self._executor().submit(task)

    def close(self) -> None:
        """End the threads; a later call starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _hire(self, wanted: int) -> int:
        with self._lock:
            hired = max(0, min(wanted, self.num_threads - self._busy))
            self._busy += hired
            return hired

    def _dismiss(self) -> None:
        with self._lock:
            self._busy -= 1

    def _submit(self, job: _Job) -> Future[None]:
        flight = current_flight()

        def help_out() -> None:
            self._mine.busy = True
            try:
                with inside(flight):
                    job.help()
            finally:
                self._mine.busy = False
                self._dismiss()

        return self._executor().submit(help_out)

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.num_threads, "cellimg")
            return self._pool


class _Job:
    """Items that several threads take one by one; the first error stops all."""

    def __init__(self, items: Iterable[Any], work: Callable[[Any], object]) -> None:
        self._items = iter(items)
        self._work = work
        self._lock = threading.Lock()
        self._stopped = False
        self.error: BaseException | None = None

    def drain(self) -> None:
        """Take items until nothing is left."""
        while self._take_one():
            pass

    def help(self) -> None:
        """As `drain`, but leave tiny items to the caller.

        Where an item is little more than interpreted code, a second thread only fights for the
        interpreter lock and makes both slower.
        """
        cpu, wall = thread_time(), perf_counter()
        for _ in range(_TRIAL_ITEMS):
            if not self._take_one():
                return
        if (
            thread_time() - cpu > _TRIAL_ITEMS * _TINY_CPU_S
            or perf_counter() - wall > _TRIAL_ITEMS * _TINY_WALL_S
        ):
            self.drain()

    def _take_one(self) -> bool:
        with self._lock:
            if self._stopped:
                return False
            try:
                item = next(self._items)
            except StopIteration:
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

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def _fail(self, error: BaseException) -> None:
        self._stopped = True
        if self.error is None:
            self.error = error


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_crews: list[Crew] = []
_crews_lock = threading.Lock()


def get_crew() -> Crew:
    """Return the crew of this process; its threads start when first needed."""
    with _crews_lock:
        if not _crews:
            _crews.append(Crew())
        return _crews[0]


def _after_fork_in_child() -> None:
    # Threads do not survive a fork, and the lock may have been held.
    global _crews_lock
    _crews_lock = threading.Lock()
    _crews.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
