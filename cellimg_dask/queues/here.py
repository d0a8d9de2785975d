"""What becomes of a queue in another process: blocks run there, on a prepared worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import InitError
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob, Init, Worker
from cellimg_dask.loading.crew import Crew, get_crew

__all__ = ["Arrived"]


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
                entry = _entries[self.token] = _Entry()
        return entry.worker(self._init)

    def __reduce__(self) -> tuple[Callable[..., Arrived], tuple[str, bytes]]:
        import cloudpickle

        return _arrive, (self.token, cloudpickle.dumps(self._init))


def _arrive(token: str, init: bytes) -> Arrived:
    import pickle

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


class _Entry:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._error: str | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def worker(self, init: Init) -> Worker:
        if self._worker is None:
            with self._lock:
                if self._error is not None:
                    raise InitError(self._error)
                if self._worker is None:
                    try:
                        self._worker = Worker(init)
                    except InitError as error:
                        self._error = str(error)
                        raise
        return self._worker


_entries: dict[str, _Entry] = {}
_lock = threading.Lock()
