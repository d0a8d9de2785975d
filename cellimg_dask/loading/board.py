"""The board: which cells are wanted, by whom, how urgently, and who works on them.

A `Job` wants the cells of a region. The threads of a crew take the next cell of the most urgent
job; whoever else wants that cell gets it as well. A cell that is wanted again, more urgently, is
taken when that job's turn comes, which is earlier.
"""

from __future__ import annotations

import heapq
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import Context, copy_context
from itertools import chain, count, islice
from time import monotonic, perf_counter
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellError
from cellimg_dask.blocks.functions import current_worker
from cellimg_dask.geometry import Roi, tiles
from cellimg_dask.loading.crew import Crew, is_crew_thread
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.priorities import priority
from cellimg_dask.loading.running import given_up, wanted
from cellimg_dask.state.flights import Flight, current_flight, inside

__all__ = ["CellCounts", "Job", "JobState", "begin", "begin_with", "must_help"]

JobState: TypeAlias = Literal["pending", "running", "done", "failed", "cancelled"]

# Up to so many cells are looked for in the cache when a job begins, under one lock.
_GATHER_AT_ONCE = 4096
# So many cells of a large job are put up at a time.
_PORTION = 256
# A cell that ends as if nobody wanted it, though somebody does, is not tried for ever.
_MOST_TRIES = 10

_Part: TypeAlias = tuple[int, tuple[slice, ...], tuple[slice, ...]]
_Place: TypeAlias = tuple[tuple[slice, ...], tuple[slice, ...]]
_Cell: TypeAlias = tuple[CellLoader, int]
_Callback: TypeAlias = Callable[[], object]


class CellCounts(NamedTuple):
    """How many cells of a request are in which state."""

    pending: int
    """Nobody has begun."""
    running: int
    """Are being computed."""
    done: int
    """Are in the result."""

    @property
    def fraction(self) -> float:
        """The part that is done, 0 to 1."""
        total = sum(self)
        return self.done / total if total else 1.0


class Job:
    """Somebody's wish for the cells of a region.

    Made by `begin`. What is written here is guarded by the lock of the board.
    """

    __slots__ = (
        "__weakref__",
        "board",
        "bypass",
        "callbacks",
        "context",
        "counts",
        "delivering",
        "end",
        "error",
        "event",
        "flight",
        "given_up",
        "is_prefetch",
        "loader",
        "num_done",
        "number",
        "out",
        "pending",
        "queue",
        "rest",
        "running",
        "total",
        "unlisted",
        "urgency",
    )

    def __init__(
        self,
        board: Board,
        loader: CellLoader,
        total: int,
        out: NDArray[Any] | None,
        *,
        bypass: bool,
        urgency: int,
    ) -> None:
        self.board = board
        self.loader = loader
        self.total = total
        """Number of cells."""
        self.out = out
        """Where the cells are put; None where only the cache wants them."""
        self.is_prefetch = out is None
        self.bypass = bypass
        """Whether its cells go past the cache, and are nobody else's."""
        self.urgency = urgency
        """Its priority."""
        self.number = 0
        """Its place among those of the same priority."""
        self.pending: dict[int, _Place] = {}
        """Cells that are put up and that nobody has begun."""
        self.queue: deque[int] = deque()
        """Cells in their order; not all of them are still pending."""
        self.rest: Iterator[_Part] = iter(())
        """Cells that are not put up yet."""
        self.unlisted = 0
        """How many these are."""
        self.running: dict[int, _Place] = {}
        """Cells that somebody computes."""
        self.delivering = 0
        """How many cells are being put into the result."""
        self.num_done = 0
        self.end: JobState | None = None
        """How it ended."""
        self.counts: CellCounts | None = None
        """How far it was when it ended."""
        self.error: BaseException | None = None
        """Why it failed."""
        self.event: threading.Event | None = None
        self.callbacks: list[_Callback] = []
        self.context: Context | None = None
        """What its cells are computed under."""
        self.flight: Flight | None = None
        """The computation that it is a part of."""
        self.given_up: Future[None] | None = None
        """Tells a `CellRunner` that nobody wants the cells any more."""

    def state(self) -> JobState:
        """Return what has become of it; pending is what nothing is there of or was begun."""
        with self.board.lock:
            if self.end is not None:
                return self.end
            begun = self.running or self.delivering or self.num_done or self.given_up is not None
            return "running" if begun else "pending"

    def progress(self) -> CellCounts:
        """Return how many cells are in which state; after the end, in which they were then."""
        with self.board.lock:
            return self.counts or self._count()

    def _count(self) -> CellCounts:
        running = len(self.running) + self.delivering
        return CellCounts(self.total - self.num_done - running, running, self.num_done)

    def cancel(self) -> CellCounts:
        """Drop the cells that nobody has begun; return what was left to do, and what is done."""
        with self.board.lock:
            if self.end is not None:
                return CellCounts(0, 0, self.num_done)
            counts = self._count()
            callbacks = self.board.end(self, "cancelled")
        _call(callbacks)
        return counts

    def when_over(self, callback: _Callback) -> None:
        """Call something when the job is over; at once if it is. It must not raise."""
        with self.board.lock:
            if self.end is None:
                self.callbacks.append(callback)
                return
        callback()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job is over; False if that took longer than ``timeout`` seconds.

        Inside a computation, and on a thread of a crew, the cells are computed here: no thread
        may ever be free.
        """
        if self.end is not None:
            return True
        deadline = None if timeout is None else monotonic() + timeout
        if self.given_up is None and must_help() and not self.board.work_off(self, deadline):
            return False
        with self.board.lock:
            if self.end is not None:
                return True
            if self.event is None:
                self.event = threading.Event()
            event = self.event
        return event.wait(None if deadline is None else max(0.0, deadline - monotonic()))


class _Run:
    """A cell that is being computed, for all that want it."""

    __slots__ = ("bypass", "context", "flight", "index", "jobs", "loader")

    def __init__(self, job: Job, index: int) -> None:
        assert job.context is not None
        self.loader = job.loader
        self.index = index
        self.bypass = job.bypass
        # A copy: one context cannot be entered by two threads.
        self.context = job.context.copy()
        """What it is computed under: what its most urgent job is."""
        self.flight = job.flight
        """The computation that it is a part of."""
        self.jobs = [job]
        """Who wants it."""

    def attempt(self, flight: Flight | None) -> tuple[NDArray[Any] | None, BaseException | None]:
        """Compute it as a part of a flight; return it, or the error."""
        queue = self.loader.queue
        if queue is None or queue.blocks is None:
            return self.context.run(_attempt, self.loader, self.index, self.bypass, flight)
        self.context.run(wanted.set, self.is_wanted)
        try:
            for _ in range(_MOST_TRIES):
                value, error = self.context.run(
                    _attempt, self.loader, self.index, self.bypass, flight
                )
                # It ended because nobody wanted it, and then somebody did.
                if not (isinstance(error, CancelledError) and self.is_wanted()):
                    break
            return value, error
        finally:
            self.context.run(wanted.set, None)

    def is_wanted(self) -> bool:
        """Whether any of the jobs that want it is not over."""
        return any(job.end is None for job in tuple(self.jobs))


class Board:
    """What is wanted of the threads of one crew.

    Notes
    -----
    Thread-safe. The lock is never held while anything is computed, copied or called.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._begin()
        _boards.add(self)

    def _begin(self) -> None:
        self.lock = threading.Lock()
        """Guards the jobs of this board as well."""
        self._jobs: dict[int, Job] = {}
        # Jobs by urgency; those that have nothing pending leave when they come up.
        self._heap: list[tuple[int, int]] = []
        self._wanted: dict[_Cell, list[Job]] = {}
        self._runs: dict[_Cell, _Run] = {}

    # ------------------------------------------------------------------ jobs

    def post(self, job: Job, missing: Sequence[_Part], rest: Iterator[_Part]) -> None:
        """Put up the cells of a job."""
        with self.lock:
            self._enter(job)
            job.rest = rest
            job.unlisted = job.total - job.num_done - len(missing)
            self._list(job, missing)
            heapq.heappush(self._heap, (job.urgency, job.number))

    def enter(self, job: Job) -> None:
        """Know a job whose cells are computed elsewhere."""
        with self.lock:
            self._enter(job)

    def _enter(self, job: Job) -> None:
        job.number = next(self._numbers)
        self._jobs[job.number] = job

    def end(self, job: Job, how: JobState, error: BaseException | None = None) -> list[_Callback]:
        """End a job; return what to call without the lock, which must be held."""
        job.counts = job._count()
        job.end = how
        job.error = error
        if how != "done":
            job.out = None
        self._jobs.pop(job.number, None)
        for index in job.pending:
            self._want_no_more(job, index)
        job.pending, job.queue, job.running = {}, deque(), {}
        job.rest, job.unlisted = iter(()), 0
        job.context = job.flight = None
        if job.given_up is not None:
            job.given_up.set_result(None)
        callbacks, job.callbacks = job.callbacks, []
        if job.event is not None:
            callbacks.insert(0, job.event.set)
        return callbacks

    def abandon(self) -> None:
        """Cancel all jobs; what has begun goes on."""
        with self.lock:
            callbacks = [self.end(job, "cancelled") for job in list(self._jobs.values())]
        _call(chain.from_iterable(callbacks))

    def forget_after_fork(self) -> None:
        """Be empty: who would compute did not survive the fork."""
        jobs = list(self._jobs.values())
        self._begin()
        for job in jobs:
            # Others may wait for these.
            job.event = job.given_up = None
            job.callbacks = []
            self.end(job, "cancelled")

    # ------------------------------------------------------------------ the crew's side

    def waiting(self, at_most: int) -> tuple[int, int]:
        """Return the priority of the next cell, and how many there are, up to ``at_most``."""
        with self.lock:
            while self._heap:
                job = self._jobs.get(self._heap[0][1])
                if job is not None and (job.pending or job.unlisted):
                    break
                heapq.heappop(self._heap)
            else:
                return 0, 0
            found = 0
            for job in self._jobs.values():
                found += len(job.pending) + job.unlisted
                if found >= at_most:
                    break
            return self._heap[0][0], min(found, at_most)

    def do_one(self) -> bool:
        """Compute the next cell; False if there is none."""
        with self.lock:
            run = self._next()
        if run is None:
            return False
        over = self._finish(run, *run.attempt(run.flight))
        # Who is told may look at once whether somebody still holds the result.
        del run
        _call(over)
        return True

    def _next(self) -> _Run | None:
        while self._heap:
            job = self._jobs.get(self._heap[0][1])
            run = None if job is None else self._next_of(job)
            if run is not None:
                return run
            heapq.heappop(self._heap)
        return None

    def _next_of(self, job: Job) -> _Run | None:
        while True:
            while job.queue:
                index = job.queue.popleft()
                if index in job.pending:
                    return self._start(job, index)
            if not job.unlisted:
                return None
            portion = list(islice(job.rest, _PORTION))
            job.unlisted -= len(portion)
            self._list(job, portion)

    # ------------------------------------------------------------------ who waits

    def work_off(self, job: Job, deadline: float | None) -> bool:
        """Compute what is left of a job on this thread; False if there is no time left."""
        flight = current_flight()
        while True:
            with self.lock:
                if job.end is not None:
                    return True
                if deadline is not None and monotonic() >= deadline:
                    return False
                run, joins = self._next_of(job), False
                if run is None:
                    if not job.running:
                        # Somebody puts the last cells into the result.
                        return True
                    # Whoever computes it may wait for this thread: the load finds that out.
                    run, joins = _Run(job, next(iter(job.running))), True
            value, error = run.attempt(flight)
            if error is not None and not isinstance(error, Exception):
                # This thread was interrupted; others go on with it.
                if not joins:
                    self._put_back(run)
                    job.loader.crew().call_hands()
                raise error
            _call(self._finish(run, value, error))

    # ------------------------------------------------------------------ cells

    def _finish(
        self, run: _Run, value: NDArray[Any] | None, error: BaseException | None
    ) -> list[_Callback]:
        """Hand out a cell; return what to call now."""
        with self.lock:
            cell = run.loader, run.index
            if self._runs.get(cell) is run:
                del self._runs[cell]
        return self._hand_out(run.jobs, run.index, value, error)

    def _hand_out(
        self,
        jobs: Sequence[Job],
        index: int,
        value: NDArray[Any] | None,
        error: BaseException | None,
    ) -> list[_Callback]:
        """Put a cell into the results of jobs, or fail them; return what to call now."""
        callbacks: list[_Callback] = []
        if value is not None:
            for job, target in self._claim(jobs, index):
                try:
                    out = job.out
                    if out is not None:
                        source, place = target
                        out[place] = value[source]
                except BaseException as failure:
                    callbacks += self._fail([job], failure)
                else:
                    callbacks += self._delivered(job)
        elif error is not None:
            callbacks += self._fail([job for job, _ in self._claim(jobs, index)], error)
        return callbacks

    def _claim(self, jobs: Sequence[Job], index: int) -> list[tuple[Job, _Place]]:
        """Take a cell off those that run; who does so puts it into the result."""
        claimed = []
        with self.lock:
            for job in jobs:
                place = job.running.pop(index, None)
                if place is not None:
                    job.delivering += 1
                    claimed.append((job, place))
        return claimed

    def _delivered(self, job: Job) -> list[_Callback]:
        with self.lock:
            if job.end is None:
                job.delivering -= 1
                job.num_done += 1
                if job.num_done == job.total:
                    return self.end(job, "done")
        return []

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> list[_Callback]:
        callbacks: list[_Callback] = []
        with self.lock:
            for number, job in enumerate(jobs):
                if job.end is None:
                    # Each one raises another object.
                    mine = error.again() if number and isinstance(error, CellError) else error
                    callbacks += self.end(job, "failed", mine)
        return callbacks

    def fail(self, job: Job, error: BaseException) -> None:
        """End a job whose cells are computed elsewhere."""
        _call(self._fail([job], error))

    def deliver(self, job: Job, index: int, place: _Place, value: NDArray[Any]) -> bool:
        """Put a cell that was computed elsewhere into a job's result; False if it is over."""
        with self.lock:
            if job.end is not None:
                return False
            job.running[index] = place
        _call(self._hand_out([job], index, value, None))
        return True

    # What follows expects the lock to be held.

    def _list(self, job: Job, parts: Sequence[_Part]) -> None:
        """Put up cells; those that run already will come."""
        for index, source, target in parts:
            place = source, target
            if not job.bypass:
                run = self._runs.get((job.loader, index))
                if run is not None:
                    run.jobs.append(job)
                    job.running[index] = place
                    continue
                self._wanted.setdefault((job.loader, index), []).append(job)
            job.pending[index] = place
            job.queue.append(index)

    def _start(self, job: Job, index: int) -> _Run:
        """Begin a cell for all that want it."""
        run = _Run(job, index)
        if not job.bypass:
            cell = job.loader, index
            run.jobs += [each for each in self._wanted.pop(cell) if each is not job]
            self._runs[cell] = run
        for each in run.jobs:
            each.running[index] = each.pending.pop(index)
        return run

    def _put_back(self, run: _Run) -> None:
        """Put up a cell again that was begun."""
        with self.lock:
            if self._runs.get((run.loader, run.index)) is run:
                del self._runs[run.loader, run.index]
            for job in run.jobs:
                place = job.running.pop(run.index, None)
                if place is not None:
                    self._list(job, [(run.index, *place)])
                    heapq.heappush(self._heap, (job.urgency, job.number))

    def _want_no_more(self, job: Job, index: int) -> None:
        cell = job.loader, index
        jobs = self._wanted.get(cell)
        if job.bypass or jobs is None:
            return
        jobs.remove(job)
        if not jobs:
            del self._wanted[cell]


def begin(
    loader: CellLoader, roi: Roi, urgency: int, *, keep: bool = True, bypass: bool = False
) -> Job:
    """Begin to compute the cells of a region, which lies in the image, in the background.

    Parameters
    ----------
    loader : CellLoader
        Of the image.
    roi : Roi
        The region.
    urgency : int
        Its priority; lower numbers go first.
    keep : bool
        Whether the region is wanted, in an array that is made at once; else only the cache is.
    bypass : bool
        Whether the cells are computed past the cache.
    """
    crew = loader.crew()
    board = _board_of(crew)
    out = np.empty(roi.shape, loader.dtype) if keep else None
    total, parts = tiles(loader.grid, roi.start, roi.stop)
    job = Job(board, loader, total, out, bypass=bypass, urgency=urgency)
    elsewhere = loader._cells is not None
    missing: list[_Part] = []
    if not bypass:
        while listed := list(islice(parts, _GATHER_AT_ONCE)):
            found = len(missing)
            held = loader.gather([part[0] for part in listed])
            for value, part in zip(held, listed, strict=True):
                if value is None:
                    missing.append(part)
                elif out is not None:
                    out[part[2]] = value[part[1]]
            job.num_done += len(listed) - (len(missing) - found)
            if not elsewhere:
                break
    if job.num_done == total:
        job.end = "done"
        return job
    context = job.context = copy_context()
    context.run(priority.set, urgency)
    job.flight = current_flight()
    if not elsewhere:
        parts_first = loader.parts_to_prepare()
        if parts_first is not None:
            whole = Roi.of_shape(parts_first.grid.shape)
            job.when_over(begin(parts_first, whole, urgency, keep=False).cancel)
        board.post(job, missing, parts)
        crew.call_hands()
        return job
    missing += parts
    job.given_up = Future()
    context.run(given_up.set, job.given_up)
    kept = not bypass and (out is None or 2 * out.nbytes <= loader.shelf.cache.max_bytes)
    fetch = _Fetch(job, {index: (source, target) for index, source, target in missing}, kept)
    board.enter(job)
    try:
        threading.Thread(target=fetch, name="cellimg-request", daemon=True).start()
    except RuntimeError:
        # The interpreter is shutting down and starts no more threads.
        fetch()
    return job


def begin_with(loader: CellLoader, roi: Roi, out: NDArray[Any] | None) -> Job:
    """Return a job that is over, because ``out`` is there already."""
    total, _ = tiles(loader.grid, roi.start, roi.stop)
    job = Job(_board_of(loader.crew()), loader, total, out, bypass=False, urgency=0)
    job.num_done = total
    job.end = "done"
    return job


class _Fetch:
    """Has the cells of a job computed by a `CellRunner`; on a thread of its own, as that waits."""

    def __init__(self, job: Job, places: dict[int, _Place], keep: bool) -> None:
        assert job.context is not None
        self._job = job
        self._places = places
        self._context = job.context
        self._flight = job.flight
        self._keep = keep

    def __call__(self) -> None:
        job = self._job
        cells = job.loader._fetch(list(self._places), keep=self._keep)
        try:
            while True:
                # Callbacks run outside of that context.
                cell, error = self._context.run(_step, cells, self._flight)
                if error is not None:
                    job.board.fail(job, error)
                if cell is None:
                    return
                index, value = cell
                if not job.board.deliver(job, index, self._places.pop(index), value):
                    return
        finally:
            self._context.run(cells.close)


def _step(
    cells: Iterator[tuple[int, NDArray[Any]]], flight: Flight | None
) -> tuple[tuple[int, NDArray[Any]] | None, BaseException | None]:
    # Apart, so that the error's traceback does not hold the job.
    try:
        with inside(flight):
            return next(cells, None), None
    except BaseException as error:
        return None, error


def _attempt(
    loader: CellLoader, index: int, bypass: bool, flight: Flight | None
) -> tuple[NDArray[Any] | None, BaseException | None]:
    """Compute a cell as a part of a flight; return it, or the error."""
    # Apart, so that the error's traceback does not hold the job.
    try:
        with inside(flight):
            return (_past_cache(loader, index) if bypass else loader.load(index)), None
    except BaseException as error:
        return None, error


def _past_cache(loader: CellLoader, index: int) -> NDArray[Any]:
    flight = Flight(loader.shelf, index)
    if flight.begun_by_itself():
        raise loader._cycle(index)
    began = perf_counter()
    try:
        with inside(flight):
            value = loader.compute_owned(index)
    except Exception:
        loader.shelf.record(0.0, failed=True)
        raise
    finally:
        flight.landed = True
    loader.shelf.record(perf_counter() - began)
    return value


def must_help() -> bool:
    """Whether this thread must not wait for another one to be free."""
    return current_flight() is not None or current_worker() is not None or is_crew_thread()


def _call(callbacks: Iterable[_Callback]) -> None:
    for callback in callbacks:
        callback()


_boards: weakref.WeakSet[Board] = weakref.WeakSet()
_making = threading.Lock()


def _board_of(crew: Crew) -> Board:
    board = crew.backlog
    if board is None:
        with _making:
            if crew.backlog is None:
                crew.backlog = Board()
            board = crew.backlog
    assert isinstance(board, Board)
    return board


def _after_fork_in_child() -> None:
    global _making
    _making = threading.Lock()
    for board in list(_boards):
        board.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
