"""Lending workers to whoever is next, by priority."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from time import monotonic
from typing import Generic, TypeVar

from cellimg_dask.blocks.errors import QueueClosedError
from cellimg_dask.loading.priorities import priority

__all__ = ["Pool"]

W = TypeVar("W")

# Whoever waits for all workers looks himself so often: who brings the last one back may be
# interrupted before he says so.
_LOOK_S = 1.0


class Pool(Generic[W]):
    """Workers that are lent to one borrower at a time.

    Thread-safe. Among those that wait the lowest priority number goes first, then who came first.
    """

    def __init__(self, workers: Sequence[W]) -> None:
        self._lock = threading.Lock()
        self._all_back = threading.Condition(self._lock)
        self._idle = list(workers)
        self._size = len(self._idle)
        self._closed = False
        self._order = count()
        self._waiting: list[tuple[int, int, _Ticket[W]]] = []

    @property
    def closed(self) -> bool:
        """Whether nothing is lent any more."""
        return self._closed

    @property
    def num_waiting(self) -> int:
        """How many wait for a worker."""
        with self._lock:
            return sum(not ticket.void and ticket.worker is None for _, _, ticket in self._waiting)

    @contextmanager
    def lend(self) -> Iterator[W]:
        """Lend a worker, when one is there.

        Raises
        ------
        QueueClosedError
            If the pool is closed, also while waiting.
        """
        ticket: _Ticket[W] = _Ticket()
        try:
            with self._lock:
                if self._closed:
                    raise _closed()
                if self._idle:
                    ticket.worker = self._idle[-1]
                    self._idle.pop()
                else:
                    heapq.heappush(self._waiting, (priority.get(), next(self._order), ticket))
            if ticket.worker is None:
                ticket.called.acquire()
            if ticket.worker is None:
                raise _closed()
            yield ticket.worker
        finally:
            # Also where a thread is interrupted between any two of these steps, or in the last.
            interrupt = None
            while not ticket.void or ticket.worker is not None:
                try:
                    with self._lock:
                        self._take_back(ticket)
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def close(self, wait_s: float | None = None) -> bool:
        """Turn away who waits, and wait until all workers are back; False if that took too long."""
        with self._lock:
            self._closed = True
            while self._waiting:
                _, _, ticket = self._waiting.pop()
                if ticket.worker is None:
                    ticket.called.release()
            until = None if wait_s is None else monotonic() + wait_s
            while len(self._idle) < self._size:
                left = _LOOK_S if until is None else min(until - monotonic(), _LOOK_S)
                if left <= 0:
                    return False
                self._all_back.wait(left)
        return True

    def _take_back(self, ticket: _Ticket[W]) -> None:
        """Pass a ticket's worker on; if interrupted anywhere, done when called again."""
        ticket.void = True
        worker = ticket.worker
        while worker is not None and self._waiting:
            following = self._waiting[0][2]
            if following.void or following.worker is not None:
                heapq.heappop(self._waiting)
                continue
            # Python looks for interrupts after calls, and there is none between these.
            following.worker = worker
            ticket.worker = worker = None
            following.called.release()
        if worker is not None:
            ticket.worker = None
            self._idle.append(worker)
        if self._closed:
            self._all_back.notify_all()


class _Ticket(Generic[W]):
    """One who waits."""

    __slots__ = ("called", "void", "worker")

    def __init__(self) -> None:
        # A lock and not an event, which could be interrupted half set.
        self.called = threading.Lock()
        """Held until there is a worker, or never will be."""
        self.called.acquire()
        self.worker: W | None = None
        self.void = False
        """Whether nobody waits with it any more."""


def _closed() -> QueueClosedError:
    return QueueClosedError("the queue was closed; make a new BlockQueue and define the image anew")
