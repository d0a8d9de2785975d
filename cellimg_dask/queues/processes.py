"""Blocks in worker processes of this environment, which they reach by shared memory."""

from __future__ import annotations

import pickle
from typing import Any

import cloudpickle
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellimgError, ReadError, describe
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob, Init
from cellimg_dask.loading.crew import Crew
from cellimg_dask.queues.here import Entry, open_runners
from cellimg_dask.queues.pickled_program import PickledProgram
from cellimg_dask.queues.rules import Rules
from cellimg_dask.queues.slots import Room, Slot
from cellimg_dask.queues.worker_pool import Errand, Parcel, WorkerPool

__all__ = ["ProcessBlocks"]


class ProcessBlocks:
    """Runs whole blocks in processes that live as long as the queue is open.

    Parameters
    ----------
    num_workers : int
        Number of processes.
    init : str or callable or None
        Run in each of them first.
    rules : Rules
        What they may do.

    Raises
    ------
    InitError
        If ``init`` raises in any of them, or cannot be sent there.
    """

    copies = True

    def __init__(self, num_workers: int, init: Init, rules: Rules) -> None:
        self._init = init
        self._workers = WorkerPool(num_workers, PickledProgram(init), rules)
        self._here: Entry | None = None
        self.crew = Crew(2 * num_workers, spare_tiny=False)
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
            result = self._here.worker(self._init).apply(job, plan, inputs, out)
            return result if result is out else result.astype(job.dtype, copy=True)
        with self._workers.slot() as slot:
            result = self._apply_in(slot, job, plan, inputs)
            if out is None:
                return result.copy()
            out[...] = result
            return out

    def _apply_in(
        self, slot: Slot, job: BlockJob, plan: CellPlan, inputs: tuple[NDArray[Any], ...]
    ) -> NDArray[Any]:
        """Have a worker compute a cell; return it as a view of the slot.

        Python objects have no place in shared memory, and travel with the messages.
        """
        given = {n: array for n, array in enumerate(inputs) if array.dtype.hasobject}
        others = [array for array in inputs if not array.dtype.hasobject]
        attached = (_packed_inputs(job, plan, given),) if given else ()
        room = Room(slot)
        result_at: Any = None

        def request() -> Parcel:
            nonlocal result_at
            room.begin()
            places = [room.put(array) for array in others]
            if not job.dtype.hasobject:
                result_at = room.keep(plan.shape, job.dtype)
                places.append(result_at)
            name = room.fill(0)
            return {"segment": name, "arrays": places, "index": plan.index}, attached

        errand = Errand(job.function.name, plan, job, lambda: _lesson(job), request)
        _, objects = self._workers.do(errand)
        result: NDArray[Any] = pickle.loads(objects[0]) if objects else room.array_at(result_at)
        return result

    def close(self, wait_s: float | None) -> bool:
        """Turn away who waits, and end the processes; those that still compute are killed."""
        if self._here is None:
            self._workers.close(wait_s)
        self.crew.close()
        open_runners.discard(self)
        return True

    def abandon(self) -> None:
        """Run blocks in this process, which was forked: the workers are the other one's."""
        self._here = Entry()
        self._workers.abandon()

    @property
    def num_waiting(self) -> int:
        """How many blocks wait for a worker."""
        return 0 if self._here is not None else self._workers.num_waiting

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return self._workers.pids


def _lesson(job: BlockJob) -> Parcel:
    try:
        return {}, (cloudpickle.dumps(job),)
    except Exception as error:
        raise CellimgError(
            f"{job.function.name} cannot be sent to a process: {type(error).__name__}: "
            f"{error}; define it at the top of a module, or use BlockCode"
        ) from error


def _packed_inputs(job: BlockJob, plan: CellPlan, given: dict[int, NDArray[Any]]) -> bytes:
    try:
        packed: bytes = cloudpickle.dumps(given)
    except Exception as error:
        raise ReadError(
            job.function.name,
            plan.position,
            plan.roi,
            f"the objects of input {', '.join(map(str, given))} cannot be sent to a process: "
            f"{describe(error)}; use a queue of threads",
        ) from error
    return packed
