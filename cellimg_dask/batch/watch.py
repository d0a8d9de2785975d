"""Waiting for the computation of a run on this machine, for as long as something comes about."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from time import monotonic

from cellimg_dask.blocks.errors import NoWorkersError
from cellimg_dask.geometry import CellGrid
from cellimg_dask.state.flights import current_flight, inside

__all__ = ["Watch"]

_SHORT_S = 0.25
# How long Ctrl-C waits for the cells that are under way.
_LAST_CELLS_S = 5.0
_NAMED = 5


class Watch:
    """Ends a run in which no cell is done for too long.

    A thread cannot be ended from outside: one that is stuck in a block is left alone, and what
    it may still do is not wanted any more.

    Parameters
    ----------
    grid : CellGrid
        Cells of the image.
    timeout_s : float
        How long the run goes on without a cell being done.
    """

    def __init__(self, grid: CellGrid, timeout_s: float) -> None:
        self._grid = grid
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._under_way: dict[int, None] = {}
        self._stopping = False
        self._over = False
        self._progress_at = monotonic()

    @contextmanager
    def under_way(self, cells: Sequence[int]) -> Iterator[None]:
        """Name these cells if nothing comes about any more; not begun once the run is to end."""
        with self._lock:
            if self._stopping:
                raise _OverError
            self._under_way.update(dict.fromkeys(cells))
        try:
            yield
        finally:
            with self._lock:
                for cell in cells:
                    self._under_way.pop(cell, None)

    def done(self, report: Callable[[], object]) -> None:
        """Report a cell, one at a time, and not after the end."""
        with self._lock:
            if self._over:
                raise _OverError
            self._progress_at = monotonic()
            report()

    def wait_for(self, compute: Callable[[], object]) -> None:
        """Call ``compute`` on a thread of its own and wait until it has ended.

        Raises
        ------
        NoWorkersError
            If no cell was done for too long.
        """
        ended = threading.Event()
        errors: list[BaseException] = []
        flight = current_flight()

        def work() -> None:
            try:
                with inside(flight):
                    compute()
            except BaseException as error:
                errors.append(error)
            finally:
                ended.set()

        # A daemon: what never ends does not keep Python from ending.
        context = copy_context()
        worker = threading.Thread(target=context.run, args=(work,), name="cellimg-run", daemon=True)
        try:
            self._progress_at = monotonic()
            worker.start()
            # In short waits: a signal that comes just before one is not heard until it is over.
            while not ended.wait(min(_SHORT_S, self._timeout_s)):
                if monotonic() >= self._progress_at + self._timeout_s:
                    raise self._stuck()
        except KeyboardInterrupt:
            self._stopping = True
            ended.wait(_LAST_CELLS_S)
            raise
        finally:
            with self._lock:
                self._stopping = self._over = True
        if errors:
            # Not kept: the error's traceback holds this frame.
            raise errors.pop()

    def _stuck(self) -> NoWorkersError:
        with self._lock:
            cells = [self._grid.position(cell) for cell in sorted(self._under_way)]
        named = ", ".join(map(str, cells[:_NAMED]))
        more = f" and {len(cells) - _NAMED:,} more" if len(cells) > _NAMED else ""
        return NoWorkersError(
            f"no cell was done for {self._timeout_s:g} s; under way are {named}{more}: give a "
            f"longer timeout_s if cells take so long; what is committed stays, and the next run "
            f"goes on from there"
        )


class _OverError(Exception):
    """The run has ended; nobody hears of it."""
