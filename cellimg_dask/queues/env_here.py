"""What becomes of a queue with another Python in another process: it has workers there too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import InitError, QueueClosedError
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob
from cellimg_dask.loading.crew import Crew, get_crew, usable_cores
from cellimg_dask.queues.env_blocks import EnvBlocks
from cellimg_dask.queues.environments import Env
from cellimg_dask.queues.rules import Rules

__all__ = ["ArrivedEnv", "leave", "use"]


class ArrivedEnv:
    """A queue that arrived in another process: it runs blocks there, in the environment.

    Parameters
    ----------
    token : str
        Names the queue; a process starts the workers of each once.
    init : dict or None
        Description of what runs in each of them first.
    env : Env
        The environment.
    rules : Rules
        What they may do.

    Notes
    -----
    Thread-safe. Pickled as it is. That ``init`` failed is remembered: it is raised for every block.
    """

    copies = True
    cells = None

    def __init__(self, token: str, init: Mapping[str, Any] | None, env: Env, rules: Rules) -> None:
        self.token = token
        self._init = init
        self._env = env
        self.rules = rules

    @property
    def blocks(self) -> ArrivedEnv:
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
        """Compute a cell; see `BlockFunction.apply`."""
        return self.worker().apply(job, plan, inputs, out)

    def worker(self, *, again: bool = False) -> EnvBlocks:
        """Return the workers of this process.

        With ``again`` an ``init`` that failed is tried once more.

        Raises
        ------
        InitError
            If their ``init`` failed.
        QueueClosedError
            If they ended, because the queue was closed.
        """
        with _lock:
            if self.token in _left:
                # By a block that still runs.
                raise QueueClosedError("the queue was closed; make a new BlockQueue")
            entry = _entries.setdefault(self.token, _Entry())
        return entry.blocks(self._make, again)

    def _make(self) -> EnvBlocks:
        return EnvBlocks(_num_threads(), self._init, self._env, self.rules)


def _num_threads() -> int:
    """Return how many blocks at a time there can be."""
    try:
        from distributed import get_worker

        return max(1, int(get_worker().state.nthreads))
    except (ImportError, ValueError):
        return usable_cores()


class _Entry:
    """The workers of a queue in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: EnvBlocks | None = None
        self._error: str | None = None
        self._closed = False
        self.users = 0
        """How many workers of a cluster are in this process."""

    def blocks(self, make: Callable[[], EnvBlocks], again: bool) -> EnvBlocks:
        if self._made is None:
            with self._lock:
                if self._closed:
                    raise QueueClosedError("the queue was closed; make a new BlockQueue")
                if self._error is not None and not again:
                    raise InitError(self._error)
                if self._made is None:
                    try:
                        self._made = make()
                    except InitError as error:
                        self._error = str(error)
                        raise
        return self._made

    def close(self) -> None:
        with self._lock:
            self._closed = True
            made, self._made = self._made, None
        if made is not None:
            made.close(0)


_entries: dict[str, _Entry] = {}
_left: set[str] = set()
"""Queues whose workers ended here with the last who might need them."""
_lock = threading.Lock()


def use(token: str) -> None:
    """Note one more who may need the workers of a queue in this process."""
    with _lock:
        _left.discard(token)
        _entries.setdefault(token, _Entry()).users += 1


def leave(token: str) -> None:
    """Note one less; the workers end with the last."""
    with _lock:
        entry = _entries.get(token)
        if entry is None:
            return
        entry.users -= 1
        if entry.users > 0:
            return
        del _entries[token]
        _left.add(token)
    entry.close()
