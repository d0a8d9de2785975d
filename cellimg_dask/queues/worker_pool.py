"""Worker processes and the shared memory through which they are given blocks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TypeAlias

from cellimg_dask.bare.wire import Message
from cellimg_dask.blocks.errors import (
    BlockTimeoutError,
    CellimgError,
    InitError,
    QueueClosedError,
    WorkerDiedError,
)
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.loading.crew import usable_cores
from cellimg_dask.loading.priorities import INTERACTIVE, priority
from cellimg_dask.loading.running import tries_again, wanted
from cellimg_dask.queues.pool import Pool
from cellimg_dask.queues.rules import Rules
from cellimg_dask.queues.service import (
    DiedError,
    LateError,
    Program,
    Service,
    StillbornError,
)
from cellimg_dask.queues.slots import Slot

__all__ = ["Errand", "Parcel", "WorkerPool"]

Parcel: TypeAlias = tuple[Message, tuple[bytes, ...]]
"""A request, and what goes with it."""


@dataclass(slots=True)
class Errand:
    """Something for a worker to do for a block."""

    name: str
    """Of the function, for messages."""
    plan: CellPlan
    """Of the block."""
    taught: object
    """What the worker has to know."""
    teach: Callable[[], Parcel]
    """Makes the request that tells it, without its number."""
    request: Callable[[], Parcel]
    """Puts everything into shared memory, each time anew, and makes the request."""
    answer: Callable[[Message], Message] | None = None
    """Answers what the worker asks back."""


class WorkerPool:
    """Processes that live as long as their queue is open.

    Parameters
    ----------
    num_workers : int
        Number of processes.
    program : Program
        What they are.
    rules : Rules
        What they may do.

    Raises
    ------
    InitError
        If ``init`` raises in any of them.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, num_workers: int, program: Program, rules: Rules) -> None:
        self.rules = rules
        self._lessons = _Lessons()
        self._num_workers = num_workers
        self._program = program
        self._begin()
        try:
            self._start()
        except BaseException:
            self.close(0)
            raise

    def _begin(self) -> None:
        # Twice as many, so that the next blocks are read and copied while all workers compute; as
        # many again for what somebody waits for, which does not wait for slots of the others.
        count = self._num_workers
        self._all_slots = [Slot() for _ in range(4 * count)]
        self._slots = Pool(self._all_slots[: 2 * count])
        self._urgent_slots = Pool(self._all_slots[2 * count :])
        num_threads = max(1, usable_cores() // count)
        self._services = [Service(self._program, num_threads) for _ in range(count)]
        self._pool = Pool(self._services)

    def _start(self) -> None:
        with ThreadPoolExecutor(len(self._services)) as starters:
            try:
                for started in as_completed(
                    [starters.submit(service.ensure) for service in self._services]
                ):
                    started.result()
            except BaseException:
                # The others may still be in their ``init``, perhaps for ever.
                for service in self._services:
                    service.stop()
                raise

    def slot(self) -> AbstractContextManager[Slot]:
        """Lend a place in shared memory.

        Raises
        ------
        QueueClosedError
            On entering, if the pool is closed, also while waiting.
        """
        return _Lent(self._urgent_slots if priority.get() <= INTERACTIVE else self._slots)

    def do(self, errand: Errand) -> tuple[Message, list[bytes]]:
        """Have an errand done by a worker, and return its response.

        Raises
        ------
        WorkerDiedError
            If the process died of it, and so did those that tried again.
        BlockTimeoutError
            If it took too long.
        QueueClosedError
            If the pool is closed.
        InitError
            If ``init`` raises in a process that was started anew.
        TaskCancelledError
            If the block ended because nobody wants its cell any more.
        Exception
            What the function raises, as `Program.error` gives it.
        """
        number = self._lessons.number(errand.taught)
        deaths = 0
        while True:
            with self._pool.lend() as service:
                try:
                    return self._have_done(service, errand, number)
                except LateError:
                    raise BlockTimeoutError(
                        errand.name,
                        errand.plan.position,
                        errand.plan.roi,
                        f"took more than {self.rules.block_timeout_s:g} s, and its worker process "
                        f"was killed; the next block gets a new one",
                    ) from None
                except (DiedError, InitError) as error:
                    if self._pool.closed:
                        raise QueueClosedError("the queue was closed during this block") from None
                    if isinstance(error, InitError) and not isinstance(error, StillbornError):
                        raise
                    deaths += 1
                    if deaths <= self.rules.crash_retries and not tries_again.get():
                        continue
                    if isinstance(error, InitError):
                        raise InitError(str(error)) from None
                    raise _died(errand, error, deaths) from None

    def _have_done(
        self, service: Service, errand: Errand, number: int
    ) -> tuple[Message, list[bytes]]:
        service.ensure()
        self._teach(service, errand, number)
        request, attached = errand.request()
        return service.ask(
            {"requestType": "EXECUTE", "function": number, **request},
            *attached,
            timeout_s=self.rules.block_timeout_s,
            wanted=wanted.get(),
            on_update=self.rules.teller(errand.name, errand.plan.position),
            on_question=errand.answer,
        )

    def _teach(self, service: Service, errand: Errand, number: int) -> None:
        """Tell a worker what it does not know yet, and to forget what nobody has any more."""
        if number in service.taught:
            return
        gone = service.taught - self._lessons.living()
        if gone:
            service.ask({"requestType": "FORGET", "functions": sorted(gone)})
            service.taught -= gone
        request, attached = self._lessons.parcel(number, errand.teach)
        try:
            service.ask({"requestType": "DEFINE", "function": number, **request}, *attached)
        except CellimgError as error:
            raise CellimgError(
                f"{errand.name} could not be read in the worker process: {error}; "
                f"{self._program.advice}"
            ) from error
        service.taught.add(number)

    def close(self, wait_s: float | None) -> None:
        """Turn away who waits, and end the processes; those that still compute are killed."""
        if not self._pool.close(wait_s):
            for service in self._services:
                service.stop()
            self._pool.close(None)
        # All at once, and then wait for each.
        for service in self._services:
            service.hang_up()
        for service in self._services:
            service.end()
        self._slots.close()
        self._urgent_slots.close()
        for slot in self._all_slots:
            slot.remove()

    def abandon(self) -> None:
        """Let go of the processes, which are another one's, from which this one was forked."""
        for service in self._services:
            service.abandon()

    def begin_anew(self) -> None:
        """Have processes of this process' own, after it was forked; they start when needed."""
        self.abandon()
        self._lessons = _Lessons()
        self._begin()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._pool.closed

    @property
    def num_waiting(self) -> int:
        """How many blocks wait for a worker."""
        return sum(pool.num_waiting for pool in (self._slots, self._urgent_slots, self._pool))

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [service.pid for service in self._services if service.pid]


class _Lent:
    """A slot that is lent for a while."""

    __slots__ = ("_loan", "_slot")

    def __init__(self, slots: Pool[Slot]) -> None:
        self._loan = slots.lend()

    def __enter__(self) -> Slot:
        self._slot = self._loan.__enter__()
        return self._slot

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            # Interrupted: a worker that is about to be killed may still write there.
            self._slot.remove()
        self._loan.__exit__(kind, error, trace)


class _Lessons:
    """Gives a number to what workers are taught, and makes the request for it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._parcels: dict[int, Parcel] = {}
        self._next = count()

    def number(self, taught: object) -> int:
        """Return the number of something."""
        with self._lock:
            number = self._numbers.get(taught)
            if number is None:
                number = self._numbers[taught] = next(self._next)
                weakref.finalize(taught, self._parcels.pop, number, None).atexit = False
            return number

    def parcel(self, number: int, teach: Callable[[], Parcel]) -> Parcel:
        """Return the request that teaches it."""
        found = self._parcels.get(number)
        if found is None:
            found = self._parcels[number] = teach()
        return found

    def living(self) -> set[int]:
        """Return the numbers of what somebody still has."""
        with self._lock:
            return set(self._numbers.values())


def _died(errand: Errand, error: DiedError, deaths: int) -> WorkerDiedError:
    times = "" if deaths == 1 else f", the last of {deaths} that tried,"
    said = f"; it wrote:\n{error.stderr}" if error.stderr else ""
    return WorkerDiedError(
        errand.name,
        errand.plan.position,
        errand.plan.roi,
        f"the worker process{times} died ({error}) while it computed this cell; other cells are "
        f"not affected, and the next block gets a new worker{said}",
        error.exit_code,
        error.stderr,
    )
