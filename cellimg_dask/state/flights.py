"""Computations under way, who waits for whom, and the detection of cycles.

A flight is begun only by the thread that runs it, so a thread that waits for one waits for
something that is running, whatever the number of threads. What is left to go wrong is a cell
that needs itself, directly or through others: `Flight.join` finds that before it would wait.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from numpy.typing import NDArray

__all__ = ["CircularWaitError", "Flight", "Turn", "current_flight", "inside"]


class CircularWaitError(Exception):
    """Waiting would never end, because the awaited flight waits for this thread."""


class _Current(threading.local):
    flight: Flight | None = None


_current = _Current()
# Guards `Flight._waiting` of all flights; taken only when a thread is about to wait.
_joins = threading.Lock()


def _after_fork_in_child() -> None:
    global _joins
    _joins = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Flight:
    """One computation of one cell.

    Thread-safety: ``stale`` and the outcome are written under the lock of the cache that owns
    the flight; ``land`` is called once.
    """

    __slots__ = (
        "_done",
        "_waiting",
        "error",
        "index",
        "landed",
        "owner",
        "parent",
        "stale",
        "value",
    )

    def __init__(self, owner: object, index: int) -> None:
        self.owner = owner
        """What the index belongs to."""
        self.index = index
        """The cell."""
        self.parent = current_flight()
        """The flight whose computation began this one, if any."""
        self.stale = False
        """Whether the cell was invalidated since: the value must not be published."""
        self.value: NDArray[Any] | None = None
        self.error: BaseException | None = None
        self.landed = False
        """Whether it is over; with neither value nor error it was interrupted."""
        # Made by the first thread that waits; most flights are never waited for.
        self._done: threading.Event | None = None
        self._waiting: list[Flight] = []

    def begun_by_itself(self) -> bool:
        """Whether the same cell is being computed further up in this very computation."""
        above = self.parent
        while above is not None:
            if above.index == self.index and above.owner is self.owner:
                return True
            above = above.parent
        return False

    def prepare_join(self) -> threading.Event:
        """Return the event to wait for; the owner's lock must be held."""
        if self._done is None:
            self._done = threading.Event()
        return self._done

    def join(self, done: threading.Event) -> None:
        """Wait until the flight has landed; no lock may be held.

        Raises
        ------
        CircularWaitError
            If the flight, directly or through others, waits for the caller's own flight.
        """
        mine = current_flight()
        if mine is None:
            done.wait()
            return
        with _joins:
            if self._is_waited_for_by_way_of(mine):
                raise CircularWaitError
            self._waiting.append(mine)
        try:
            done.wait()
        finally:
            with _joins:
                self._waiting.remove(mine)

    def land(self) -> None:
        """Wake whoever waits; the owner must have forgotten the flight before."""
        self.landed = True
        if self._done is not None:
            self._done.set()

    def _is_waited_for_by_way_of(self, mine: Flight) -> bool:
        # Walk up from `mine` over everything that cannot end before it has.
        seen: set[int] = set()
        open_ends = [mine]
        while open_ends:
            flight = open_ends.pop()
            if flight is self:
                return True
            if id(flight) in seen:
                continue
            seen.add(id(flight))
            if flight.parent is not None:
                open_ends.append(flight.parent)
            open_ends.extend(flight._waiting)
        return False


def current_flight() -> Flight | None:
    """Return the innermost flight that this thread computes."""
    flight = _current.flight
    # Whoever was interrupted on leaving one left it here, but landed it.
    while flight is not None and flight.landed:
        flight = flight.parent
    return flight


class inside:  # noqa: N801 - a context manager, used like a function
    """Run as a part of ``flight``: flights begun meanwhile have it as their parent."""

    # Not contextlib's: that costs more than all the rest of a small cell's bookkeeping.
    __slots__ = ("_before", "_flight")

    def __init__(self, flight: Flight | None) -> None:
        self._flight = flight

    def __enter__(self) -> None:
        self._before = _current.flight
        _current.flight = self._flight

    def __exit__(self, *exc: object) -> None:
        _current.flight = self._before


class Turn:
    """Lets one thread in at a time, and finds out who would wait for ever.

    Whoever has it is a flight: what is computed meanwhile belongs to it, so a block that would
    have to wait for somebody who waits for this very block is told instead.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Flight | None = None

    def take(self) -> inside:
        """Wait for the turn; what is returned is entered by who has it, until `leave`.

        Raises
        ------
        CircularWaitError
            If the turn is the caller's already, or of somebody who waits for the caller.
        """
        mine = Flight(self, 0)
        if mine.begun_by_itself():
            raise CircularWaitError
        while True:
            with self._lock:
                holder = self._holder
                if holder is None:
                    self._holder = mine
                    return inside(mine)
                done = holder.prepare_join()
            holder.join(done)

    def leave(self) -> None:
        """Let the next one in."""
        with self._lock:
            holder, self._holder = self._holder, None
        if holder is not None:
            holder.land()
