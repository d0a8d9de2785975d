"""What a worker process of this environment does: whole blocks, as they are pickled."""

from __future__ import annotations

import pickle
from typing import Any

from cellimg_dask.bare.places import Segments, array_at
from cellimg_dask.bare.serve import Reply, Runtime, Server, serve
from cellimg_dask.bare.task import Task
from cellimg_dask.bare.wire import Message
from cellimg_dask.blocks.errors import CellimgError, InitError, describe
from cellimg_dask.blocks.tasks import doing
from cellimg_dask.blocks.worker import BlockJob, Worker
from cellimg_dask.queues.here import adopt

__all__ = ["PickledRunner", "main"]


class PickledRunner(Runtime):
    """Computes cells of images that it was told of, with arrays in shared memory."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._jobs: dict[int, BlockJob] = {}
        self._segments = Segments()

    def do_init(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Run ``init``."""
        (init,) = attached
        try:
            prepare = pickle.loads(init)
        except Exception as error:
            raise InitError(
                f"init could not be read in the worker process: {describe(error)}"
            ) from error
        self._worker = Worker(prepare)
        adopt(init, self._worker)
        return {}, []

    def do_define(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Learn what the blocks of an image have in common."""
        self._jobs[request["function"]] = pickle.loads(attached[0])
        return {}, []

    def do_forget(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Forget images that are gone."""
        for number in request["functions"]:
            self._jobs.pop(number, None)
        return {}, []

    def do_execute(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Compute a cell from the inputs in a segment into the output there.

        Inputs of Python objects are attached, and a result of such is, pickled.
        """
        assert self._worker is not None
        job = self._jobs[request["function"]]
        segment = self._segments.get(request["segment"])
        arrays = [array_at(segment, place, self._segments.only_read) for place in request["arrays"]]
        out = None if job.dtype.hasobject else arrays.pop()
        given: dict[int, Any] = pickle.loads(attached[0]) if attached else {}
        shared = iter(arrays)
        inputs = tuple(
            given[number] if number in given else next(shared)
            for number in range(len(arrays) + len(given))
        )
        for array in given.values():
            array.flags.writeable = False
        plan = job.planner.plan(request["index"])
        with doing(server.task(Task)):
            result = self._worker.apply(job, plan, inputs, out)
        if out is None:
            return {}, [_packed(result, job.function.name)]
        if result is not out:
            out[...] = result
        return {}, []

    def failure(self, error: BaseException) -> Reply:
        """Return an error as text and, if it can be, pickled."""
        import cloudpickle

        content, _ = super().failure(error)
        if not isinstance(error, CellimgError):
            error = CellimgError(describe(error))
        try:
            return content, [cloudpickle.dumps(error)]
        except Exception:
            return content, [pickle.dumps(CellimgError(describe(error)))]


def _packed(value: Any, name: str) -> bytes:
    import cloudpickle

    try:
        packed: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise CellimgError(
            f"what {name} returned cannot be sent from a process: {describe(error)}"
        ) from error
    return packed


def main() -> None:
    """Serve the process that started this one."""
    serve(PickledRunner())
