"""Worker threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.functions import current_worker
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.tasks import doing
from cellimg_dask.blocks.worker import BlockJob, Init, Worker
from cellimg_dask.loading.crew import Crew
from cellimg_dask.queues.here import Entry, open_runners
from cellimg_dask.queues.pool import Pool
from cellimg_dask.queues.rules import Rules
from cellimg_dask.state.flights import current_flight, inside

__all__ = ["ThreadBlocks"]


class ThreadBlocks:
    """Runs blocks on threads, each of which is one worker for as long as the queue is open.

    Parameters
    ----------
    num_workers : int
        Number of threads.
    init : str or callable or None
        Run on each of them first.
    rules : Rules
        Who hears of them.

    Raises
    ------
    InitError
        If ``init`` raises on any of them.
    """

    copies = False

    def __init__(self, num_workers: int, init: Init, rules: Rules) -> None:
        self._init = init
        self._rules = rules
        self._threads = [_WorkerThread(number) for number in range(num_workers)]
        self._pool = Pool(self._threads)
        self.crew = Crew(num_workers)
        self._borrowed = threading.local()
        self._here: Entry | None = None
        try:
            calls = [thread.begin(lambda: Worker(init)) for thread in self._threads]
            self._workers = dict(zip(self._threads, (call.result() for call in calls), strict=True))
        except Exception:
            self.close(None)
            raise
        except BaseException:
            # Interrupted, perhaps because ``init`` does not end.
            for thread in self._threads:
                thread.end(join=False)
            raise
        open_runners.add(self)

    def apply(
        self,
        job: BlockJob,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Run a block function on a worker; see `BlockFunction.apply`."""
        if self._here is not None:
            return self._here.worker(self._init).apply(job, plan, inputs, out)
        here = current_worker()
        if here is not None:
            # A block that reads an image. This thread is a worker, or somebody who waits for it
            # is: to wait for one here might be to wait for oneself.
            return self._nested(here).apply(job, plan, inputs, out)
        with ExitStack() as until_done:
            thread = until_done.enter_context(self._pool.lend())
            worker, flight = self._workers[thread], current_flight()
            task = self._rules.task(job.function.name, plan.position)

            def work() -> Any:
                # A part of the same computation, so that a block that needs itself is found.
                with inside(flight), doing(task):
                    return worker.apply(job, plan, inputs, out)

            call = thread.begin(work)
            result: NDArray[Any]
            try:
                result = call.result()
            except KeyboardInterrupt:
                # The block goes on, and its worker is not free before it ends.
                thread.begin(until_done.pop_all().close)
                raise
            return result

    def _nested(self, here: object) -> Worker:
        if here in self._workers.values():
            assert isinstance(here, Worker)
            return here
        # Another queue's worker becomes one of this queue as well.
        worker = getattr(self._borrowed, "worker", None)
        if worker is None:
            worker = self._borrowed.worker = Worker(self._init)
        return worker

    def close(self, wait_s: float | None) -> bool:
        """Turn away who waits and end the threads; False if a block still runs after ``wait_s``."""
        if self._here is None:
            ended = self._pool.close(wait_s)
            for thread in self._threads:
                thread.end(join=ended)
            if not ended:
                self.crew.close(join=False)
                return False
        self.crew.close()
        open_runners.discard(self)
        return True

    def abandon(self) -> None:
        """Run blocks on whatever thread there is: the workers did not survive a fork."""
        self._here = Entry()

    @property
    def num_waiting(self) -> int:
        """How many blocks wait for a worker."""
        return 0 if self._here is not None else self._pool.num_waiting


class _WorkerThread:
    """A thread that does one thing at a time."""

    def __init__(self, number: int) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        # A daemon: a block that never ends does not keep Python from ending.
        self._thread = threading.Thread(
            target=_serve, args=(self._calls,), name=f"cellimg-worker-{number}", daemon=True
        )
        self._thread.start()

    def begin(self, work: Callable[[], Any]) -> _Call:
        call = _Call(work)
        self._calls.put(call)
        return call

    def end(self, *, join: bool = True) -> None:
        self._calls.put(None)
        if join:
            self._thread.join()


class _Call:
    """Something to do on another thread, and what came of it."""

    __slots__ = ("_done", "_error", "_result", "_work")

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        assert self._work is not None
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._work = None
            self._done.release()

    def result(self) -> Any:
        # A lock and not an event, which takes three times as long.
        with self._done:
            pass
        # Not kept: the error's traceback holds this and the arrays of the block.
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while True:
        call = calls.get()
        if call is None:
            return
        call.run()
        # A thread that waits holds nothing of what it did.
        del call
