"""A run on the workers of a dask cluster: they compute, store and mark cells themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4

from dask.task_spec import DataNode, Task, TaskRef
from distributed import wait
from distributed.scheduler import KilledWorker

from cellimg_dask.batch.work import Committer, Outcome, Work
from cellimg_dask.blocks.errors import NoWorkersError, WorkerDiedError
from cellimg_dask.loading.content import ContentKeys
from cellimg_dask.queues.cluster import ClusterCells
from cellimg_dask.queues.tasks import dask_name, fit_cache

__all__ = ["compute_on_cluster"]

_TASK_S = 100e-3
_LARGEST_TASK = 1000
_LOOK_EVERY_S = 1.0


def compute_on_cluster(
    cells: ClusterCells,
    committer: Committer,
    groups: Sequence[Sequence[int]],
    keys: ContentKeys,
    timeout_s: float,
    record: Callable[[Outcome], None],
) -> None:
    """Have cells computed and committed by workers; ``record`` hears of each.

    Tasks hold as many cells as take about a tenth of a second. Cells that were under way on a
    worker that died are tried again one by one, with nothing beside them, so that the one at
    fault is found and its neighbours are not blamed.

    Raises
    ------
    NoWorkersError
        If there was no worker, or no cell was done, for ``timeout_s``.
    """
    crowd = _Crowd(cells, committer, keys, timeout_s)
    try:
        suspects = crowd.go(deque(groups), record, alone=False)
        crowd.go(deque([index] for index in suspects), record, alone=True)
    finally:
        crowd.release()


class _Crowd:
    """The tasks of a run."""

    def __init__(
        self, cells: ClusterCells, committer: Committer, keys: ContentKeys, timeout_s: float
    ) -> None:
        self._cells = cells
        self._committer = committer
        self._keys = keys
        self._timeout_s = timeout_s
        self._prefix = f"{dask_name(committer.loader)}-run-{uuid4().hex[:8]}"
        self._under_way: dict[Any, list[Work]] = {}
        self._seconds: float | None = None
        (self._definition,) = self._get({self._prefix: DataNode(self._prefix, committer)})

    def go(
        self,
        todo: deque[Sequence[int]],
        record: Callable[[Outcome], None],
        *,
        alone: bool,
    ) -> list[int]:
        """Do cells; return those that were under way when a worker died, or blame them."""
        suspects: list[int] = []
        since = monotonic()
        while todo or self._under_way:
            most = 1 if alone else 2 * self._num_threads()
            while todo and len(self._under_way) < most:
                size = 1 if alone else self._size(len(todo))
                self._submit([todo.popleft() for _ in range(min(size, len(todo)))])
            finished = self._wait(since)
            if finished:
                since = monotonic()
            for future in finished:
                works = self._under_way.pop(future)
                try:
                    if future.status == "error":
                        lost = self._lost(future.exception(), works, record)
                        if alone:
                            for index in lost:
                                record(self._guilty(index, future.exception()))
                        else:
                            suspects += lost
                        continue
                    outcomes, seconds = self._cells.client.gather(future)
                finally:
                    future.release()
                self._seconds = seconds / len(works)
                for outcome in outcomes:
                    record(outcome)
        return suspects

    def _size(self, left: int) -> int:
        """Return how many groups of cells a task should have."""
        if self._seconds is None:
            return 1
        fair = left // (2 * self._num_threads())
        return max(1, min(round(_TASK_S / max(self._seconds, 1e-6)), _LARGEST_TASK, fair))

    def _submit(self, groups: list[Sequence[int]]) -> None:
        key = f"{self._prefix}-{uuid4().hex}"
        works: list[Work] = [[(index, self._keys.key(index)) for index in g] for g in groups]
        (future,) = self._get({key: Task(key, _commit, TaskRef(self._prefix), works)})
        self._under_way[future] = works

    def _get(self, tasks: dict[Any, Any]) -> list[Any]:
        futures: list[Any] = self._cells.client.get(
            tasks, list(tasks), sync=False, resources=self._cells.resources or None
        )
        return futures

    def _num_threads(self) -> int:
        return max(1, sum(map(int, self._cells.client.nthreads().values())))

    def _wait(self, since: float) -> list[Any]:
        """Return what is finished, perhaps nothing yet; raise if nothing has been for too long."""
        try:
            # The client need not be anybody's default.
            with self._cells.client.as_current():
                done = wait(list(self._under_way), _LOOK_EVERY_S, "FIRST_COMPLETED")
            return list(done.done)
        except TimeoutError:
            pass
        if monotonic() - since > self._timeout_s:
            workers = self._cells.num_workers
            raise NoWorkersError(
                f"no cell was done for {self._timeout_s:g} s, with {workers} workers; what is "
                f"committed stays, and the next run goes on from there"
            )
        return []

    def _lost(
        self, error: BaseException, works: list[Work], record: Callable[[Outcome], None]
    ) -> list[int]:
        """Return the cells of a task that were not committed before its worker died."""
        if not isinstance(error, KilledWorker):
            raise error
        lost = []
        for index, key in [cell for work in works for cell in work]:
            outcome = self._committer.done_before(index, key)
            if outcome is None:
                lost.append(index)
            else:
                record(outcome)
        return lost

    def _guilty(self, index: int, error: BaseException) -> Outcome:
        loader = self._committer.loader
        position = loader.grid.position(index)
        died = WorkerDiedError(
            loader.function.name,
            position,
            loader.grid.roi(position),
            "every worker process that computed this cell alone died; other cells are not affected",
        )
        died.__cause__ = error
        return Outcome(index, died, 0)

    def release(self) -> None:
        """Let go of everything; tasks that have not begun are cancelled."""
        for future in self._under_way:
            future.release()
        self._under_way.clear()
        self._definition.release()


def _commit(committer: Committer, works: list[Work]) -> tuple[list[Outcome], float]:
    """Compute and commit cells on a worker; return what became of them, and the seconds."""
    fit_cache()
    began = perf_counter()
    outcomes: list[Outcome] = []
    for work in works:
        # Some may have been committed by a worker that died before it could say so.
        before = {index: committer.done_before(index, key) for index, key in work}
        outcomes += [outcome for outcome in before.values() if outcome is not None]
        outcomes += committer.commit([cell for cell in work if before[cell[0]] is None])
    return outcomes, perf_counter() - began
