"""A run on the workers of a dask cluster: they compute, store and mark cells themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cache
from time import monotonic, perf_counter, sleep, time
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import psutil
from dask.task_spec import DataNode, Task, TaskRef
from distributed import get_worker, wait
from distributed.scheduler import KilledWorker

from cellimg_dask.batch.shares import Shares
from cellimg_dask.batch.work import Committer, Keys, Outcome, Work, with_keys
from cellimg_dask.blocks.errors import NoWorkersError, WorkerDiedError
from cellimg_dask.queues.cluster import ClusterCells
from cellimg_dask.queues.tasks import dask_name, fit_cache

__all__ = ["compute_on_cluster"]

# What a killed worker has committed is not lost with its task.
_TASK_S = 300e-3
_LARGEST_TASK = 1000
_LOOK_EVERY_S = 1.0
_ANYBODY = ""
_YOUNG_S, _SETTLED_S = 60.0, 1.0

T = TypeVar("T")


def compute_on_cluster(
    cells: ClusterCells,
    committer: Committer,
    groups: Sequence[Sequence[int]],
    keys: Keys,
    timeout_s: float,
    record: Callable[[Outcome], None],
) -> None:
    """Have cells computed and committed by workers; ``record`` hears of each.

    Tasks hold as many cells as take about a third of a second, and a worker gets neighbours, so
    that it decodes few chunks that another one decodes too. Cells that were under way on a
    worker that died are tried again one by one, with nothing beside them, so that the one at
    fault is found and its neighbours are not blamed.

    Raises
    ------
    NoWorkersError
        If there was no worker, or no cell was done, for ``timeout_s``, or the scheduler is lost.
    """
    crowd = _Crowd(cells, committer, keys, timeout_s, record)
    try:
        suspects = crowd.go(groups, alone=False)
        crowd.go([[index] for index in suspects], alone=True)
    finally:
        crowd.release()


class _Crowd:
    """The tasks of a run."""

    def __init__(
        self,
        cells: ClusterCells,
        committer: Committer,
        keys: Keys,
        timeout_s: float,
        record: Callable[[Outcome], None],
    ) -> None:
        self._cells = cells
        self._committer = committer
        self._keys = keys
        self._timeout_s = timeout_s
        self._record_outcome = record
        self._prefix = f"{dask_name(committer.loader)}-run-{uuid4().hex[:8]}"
        self._definition_prefix = f"{self._prefix}-definition-"
        self._under_way: dict[Any, tuple[str, list[Work]]] = {}
        """Tasks, with the workers they were meant for."""
        self._seconds: float | None = None
        self._progress_at = monotonic()
        self._asked_at = -_LOOK_EVERY_S
        self._threads: dict[str, int] = {}
        """Of each worker."""
        self._deaths: dict[int, int] = {}
        """How many workers died with a cell that was computed alone."""
        self._definition = self._define()

    def go(self, groups: Sequence[Sequence[int]], *, alone: bool) -> list[int]:
        """Do cells; return those that were under way when a worker died, or blame them."""
        suspects: list[int] = []
        todo = Shares(groups)
        while todo or self._under_way:
            if not alone:
                self._hand_out(todo)
            elif not self._under_way:
                self._submit(todo.take(_ANYBODY, 1), _ANYBODY)
            for future in self._wait():
                if future.status == "finished":
                    self._take(future)
                elif future.status == "error":
                    error = future.exception()
                    _, works = self._under_way.pop(future)
                    future.release()
                    if not isinstance(error, KilledWorker):
                        raise error
                    if str(error.task).startswith(self._definition_prefix):
                        # What every task needs, and no cell: it is sent anew.
                        if error.task == self._definition.key:
                            self._definition = self._define()
                        todo.put_back([index for index, _ in work] for work in works)
                        continue
                    lost = self._lost(works)
                    if not alone:
                        suspects += lost
                    elif any(self._is_guilty(index, error) for index in lost):
                        self._record(self._guilty(lost[0], error))
                    else:
                        todo.put_back([index] for index in lost)
                elif future.status == "cancelled":
                    self._scheduler_lost(None)
                # Else it was lost with its worker since it ended, and is done again.
        return suspects

    def _hand_out(self, todo: Shares[Sequence[int]]) -> None:
        """Give each worker so much that it has the next task when it is done with one."""
        threads = self._threads_of_workers()
        todo.keep(threads)
        busy = Counter(worker for worker, _ in self._under_way.values())
        while todo:
            hungry = [worker for worker, number in threads.items() if busy[worker] < 2 * number]
            if not hungry:
                return
            for worker in hungry:
                busy[worker] += 1
                self._submit(todo.take(worker, self._size(len(todo))), worker)

    def _take(self, future: Any) -> None:
        """Record what came of a task; nothing if its worker has died meanwhile."""
        result = self._ask(lambda: future.result(timeout=_LOOK_EVERY_S))
        if result is None:
            # It is done again, by a worker that finds the cells committed.
            return
        outcomes, seconds = result
        _, works = self._under_way.pop(future)
        future.release()
        self._seconds = seconds / len(works)
        for outcome in outcomes:
            self._record(outcome)

    def _record(self, outcome: Outcome) -> None:
        self._progress_at = monotonic()
        self._record_outcome(outcome)

    def _size(self, left: int) -> int:
        """Return how many groups of cells a task should have."""
        if self._seconds is None:
            return 1
        fair = left // (2 * sum(self._threads_of_workers().values()))
        return max(1, min(round(_TASK_S / max(self._seconds, 1e-6)), _LARGEST_TASK, fair))

    def _define(self) -> Any:
        """Send what every task needs, under a new key."""
        key = f"{self._definition_prefix}{uuid4().hex[:8]}"
        return self._get(key, DataNode(key, self._committer), _ANYBODY)

    def _submit(self, groups: list[Sequence[int]], worker: str) -> None:
        works = [work for work in map(self._with_keys, groups) if work]
        if works:
            key = f"{self._prefix}-{uuid4().hex}"
            future = self._get(
                key, Task(key, _commit, TaskRef(self._definition.key), works), worker
            )
            self._under_way[future] = worker, works

    def _with_keys(self, group: Sequence[int]) -> Work:
        work, failed = with_keys(self._committer.loader, self._keys, group)
        for outcome in failed:
            self._record(outcome)
        return work

    def _get(self, key: str, task: Any, worker: str) -> Any:
        client = self._cells.client
        where: dict[str, Any] = {"resources": self._cells.resources or None}
        if worker != _ANYBODY:
            # Where its neighbours are read, unless that one is lost.
            where |= {"workers": [worker], "allow_other_workers": True}
        futures = self._ask(lambda: client.get({key: task}, [key], sync=False, **where))
        assert futures is not None
        return futures[0]

    def _threads_of_workers(self) -> dict[str, int]:
        """Return how many tasks each worker can do at the same time."""
        if monotonic() - self._asked_at > _LOOK_EVERY_S:
            self._asked_at = monotonic()
            client = self._cells.client
            found = self._ask(
                lambda: client.sync(client.scheduler.ncores, callback_timeout=_LOOK_EVERY_S)
            )
            # A scheduler may say nothing for a while; in the end it is want of progress.
            if found is not None:
                self._threads = {worker: int(number) for worker, number in found.items()}
        if self._cells.resources or not self._threads:
            # The scheduler knows who has them, or who comes.
            return {_ANYBODY: max(1, sum(self._threads.values()))}
        return self._threads

    def _wait(self) -> list[Any]:
        """Return what has ended, perhaps nothing yet; raise if nothing has been for too long."""
        if monotonic() - self._progress_at > self._timeout_s:
            self._threads_of_workers()
            raise NoWorkersError(
                f"no cell was done for {self._timeout_s:g} s, with {len(self._threads)} workers; "
                f"start workers, or give a longer timeout_s if cells take so long, and run again: "
                f"what is committed stays, and the run goes on from there"
            )
        if not self._under_way:
            return []
        # The client need not be anybody's default.
        with self._cells.client.as_current():
            waited = self._ask(
                lambda: wait(list(self._under_way), _LOOK_EVERY_S, "FIRST_COMPLETED")
            )
        return [] if waited is None else list(waited.done)

    def _ask(self, call: Callable[[], T]) -> T | None:
        """Call the client; None if that took too long; raise if the scheduler is lost."""
        client = self._cells.client
        if client.status != "running":
            self._scheduler_lost(None)
        try:
            return call()
        except TimeoutError:
            return None
        except (CancelledError, OSError) as error:
            self._scheduler_lost(error)
        except Exception as error:
            if client.status == "running":
                raise
            self._scheduler_lost(error)

    def _scheduler_lost(self, error: BaseException | None) -> NoReturn:
        raise NoWorkersError(
            "the connection to the scheduler is lost, or somebody else cancelled the run's tasks: "
            "connect to a cluster and run again; what is committed stays, and the run goes on from "
            "there"
        ) from error

    def _lost(self, works: list[Work]) -> list[int]:
        """Return the cells of a task that were not committed before its worker died."""
        lost = []
        for index, key in [cell for work in works for cell in work]:
            outcome = self._committer.done_before(index, key)
            if outcome is None:
                lost.append(index)
            else:
                self._record(outcome)
        return lost

    def _is_guilty(self, index: int, error: KilledWorker) -> bool:
        """Whether workers died with a cell more often than it is to be tried again."""
        # Less may be somebody else's doing, where the scheduler allows no failures.
        self._deaths[index] = self._deaths.get(index, 0) + error.allowed_failures + 1
        return self._deaths[index] > self._committer.retries

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


@cache
def _settle() -> None:
    """Wait until a worker that has just begun is known to its nanny.

    A nanny whose process dies before it has said that it runs does not start another one, and a
    cell that kills is computed first by workers that take the place of those that it killed.
    """
    age_s = time() - psutil.Process().create_time()
    if get_worker().nanny is not None and age_s < _YOUNG_S:
        sleep(_SETTLED_S)


def _commit(committer: Committer, works: list[Work]) -> tuple[list[Outcome], float]:
    """Compute and commit cells on a worker; return what became of them, and the seconds."""
    fit_cache()
    _settle()
    began = perf_counter()
    outcomes: list[Outcome] = []
    under_way: Future[list[Outcome]] | None = None
    # Blocks run here, one at a time, and the one before is stored meanwhile.
    # What the next one reads is decoded, too.
    with ThreadPoolExecutor(1) as storing, ThreadPoolExecutor(1) as reading:
        for work, following in zip(works, [*works[1:], []], strict=True):
            reading.submit(committer.read_ahead, following)
            # A client that was killed has no use for them, and the next run would do them again.
            with committer.permit.writing():
                pass
            # Some may have been committed by a worker that died before it could say so.
            before = {index: committer.done_before(index, key) for index, key in work}
            outcomes += [outcome for outcome in before.values() if outcome is not None]
            left = [cell for cell in work if before[cell[0]] is None]
            for cells, failed in committer.compute(left, lasting=True):
                outcomes += failed
                if under_way is not None:
                    outcomes += under_way.result()
                under_way = storing.submit(committer.store, cells)
        if under_way is not None:
            outcomes += under_way.result()
    return outcomes, perf_counter() - began
