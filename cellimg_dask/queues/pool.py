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
from cellimg_dask.loading.running import priority

__all__ = ["Pool"]

W = TypeVar("W")


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
            return sum(not ticket.void for _, _, ticket in self._waiting)

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
                ticket.called.wait()
            if ticket.worker is None:
                raise _closed()
            yield ticket.worker
        finally:
            # Also where a thread is interrupted between any two of these steps.
            with self._lock:
                ticket.void = True
                if ticket.worker is not None:
                    self._take_back(ticket.worker)

    def close(self, wait_s: float | None = None) -> bool:
        """Turn away who waits, and wait until all workers are back; False if that took too long."""
        with self._lock:
            self._closed = True
            for _, _, ticket in self._waiting:
                ticket.called.set()
            self._waiting.clear()
            until = None if wait_s is None else monotonic() + wait_s
            while len(self._idle) < self._size:
                left = None if until is None else until - monotonic()
                if left is not None and left <= 0:
                    return False
                self._all_back.wait(left)
        return True

    def _take_back(self, worker: W) -> None:
        while self._waiting:
            _, _, ticket = heapq.heappop(self._waiting)
            if not ticket.void:
                ticket.worker = worker
                ticket.called.set()
                return
        if worker not in self._idle:
            self._idle.append(worker)
        self._all_back.notify_all()


class _Ticket(Generic[W]):
    """One who waits."""

    __slots__ = ("called", "void", "worker")

    def __init__(self) -> None:
        self.called = threading.Event()
        self.worker: W | None = None
        self.void = False
        """Whether nobody waits with it any more."""


def _closed() -> QueueClosedError:
    return QueueClosedError("the queue was closed; make a new BlockQueue and define the image anew")
