"""What becomes of a queue in another process: blocks run there, on a prepared worker."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import InitError
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob, Init, Worker
from cellimg_dask.loading.crew import Crew, get_crew

__all__ = ["Arrived", "Entry", "adopt", "open_runners"]


class Arrived:
    """A queue that arrived in another process: it runs blocks here, after ``init``.

    Parameters
    ----------
    token : str
        Names the queue; a process runs the ``init`` of each once.
    init : str or callable or None
        Run before the first block.

    Notes
    -----
    Thread-safe. That ``init`` failed is remembered: it is raised for every block.
    """

    copies = False
    cells = None

    def __init__(self, token: str, init: Init) -> None:
        self.token = token
        self._init = init

    @property
    def blocks(self) -> Arrived:
        """Itself: blocks run here."""
        return self

    @property
    def crew(self) -> Crew:
        """The threads of this process."""
        return get_crew()

    def apply(
        self,
        job: BlockJob,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Run a block function here; see `BlockFunction.apply`."""
        return self.worker().apply(job, plan, inputs, out)

    def worker(self, *, again: bool = False) -> Worker:
        """Return the worker that this process is; `InitError` if its ``init`` failed.

        With ``again`` an ``init`` that failed is tried once more.
        """
        with _lock:
            entry = _entries.get(self.token)
            if entry is None or (again and entry.failed):
                entry = _entries[self.token] = Entry()
        return entry.worker(self._init)

    def __reduce__(self) -> tuple[Callable[..., Arrived], tuple[str, bytes]]:
        import cloudpickle

        return _arrive, (self.token, cloudpickle.dumps(self._init))


def _arrive(token: str, init: bytes) -> Arrived:
    import pickle

    with _lock:
        if init in _adopted:
            _entries.setdefault(token, _adopted[init])
    try:
        return Arrived(token, pickle.loads(init))
    except Exception as error:
        # Not raised here, where nobody could tell what it has to do with.
        return Arrived(token, _Unreadable(f"{type(error).__name__}: {error}"))


class _Unreadable:
    """Stands for an ``init`` that this process cannot unpickle."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self) -> None:
        raise ImportError(f"init could not be read in this process: {self.reason}")


class LocalRunner(Protocol):
    """Runs blocks with the help of threads or processes of this process."""

    def close(self, wait_s: float | None) -> bool:
        """End the workers."""
        ...

    def abandon(self) -> None:
        """Let go of the workers, which are another process's: this one was forked from it."""
        ...


def adopt(init: bytes, worker: Worker) -> None:
    """Have this worker run the blocks of queues that arrive here with the same pickled ``init``."""
    entry = _adopted[init] = Entry()
    entry.prepared = worker


class Entry:
    """Makes this process a worker, once; that ``init`` failed is remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.prepared: Worker | None = None
        self._error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether ``init`` failed."""
        return self._error is not None

    def worker(self, init: Init) -> Worker:
        """Return the worker; `InitError` if its ``init`` failed, now or before."""
        if self.prepared is None:
            with self._lock:
                if self._error is not None:
                    raise InitError(self._error)
                if self.prepared is None:
                    try:
                        self.prepared = Worker(init)
                    except InitError as error:
                        self._error = str(error)
                        raise
        return self.prepared


_entries: dict[str, Entry] = {}
_adopted: dict[bytes, Entry] = {}
_lock = threading.Lock()

open_runners: weakref.WeakSet[LocalRunner] = weakref.WeakSet()
"""What ends before Python does, and is let go of where the process is forked."""


def _at_exit() -> None:
    for runner in list(open_runners):
        runner.close(0)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for runner in list(open_runners):
        runner.abandon()
    open_runners.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
