"""The program of a worker process: it takes blocks from its standard input until that ends.

Replies are ``("result", value)`` or ``("error", pickled exception, its traceback)``.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from io import FileIO, TextIOWrapper
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellimgError, InitError, describe
from cellimg_dask.blocks.worker import BlockJob, Worker
from cellimg_dask.queues.channel import Channel
from cellimg_dask.queues.here import adopt
from cellimg_dask.queues.slots import Layout
from cellimg_dask.state.segments import attach_segment, detach_segment, is_removed

__all__ = ["main"]


def main() -> None:
    """Serve the process that started this one."""
    channel = _private_channel()
    if hasattr(os, "register_at_fork"):
        # What a block forks must not answer, nor keep the pipes open when this process dies.
        os.register_at_fork(after_in_child=channel.abandon)
    sys.argv[1:] = []
    # Ctrl-C in a terminal goes to all processes; the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    server = _Server()
    try:
        while True:
            kind, *content = channel.receive()
            reply: tuple[object, ...]
            try:
                reply = ("result", getattr(server, f"do_{kind}")(*content))
            except BaseException as error:
                reply = ("error", *_pack(error))
            channel.send(*reply)
    except (EOFError, OSError):
        # The parent closed the pipe, or is gone.
        return


def _private_channel() -> Channel:
    """Take the pipes off descriptors 0 and 1, so that no print disturbs the messages."""
    # Standard error may have been closed by whoever started the parent.
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing == 2:
        os.set_inheritable(2, True)
        nothing = os.dup(2)
    source, sink = os.dup(0), os.dup(1)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        # What was printed before a crash is seen.
        sys.stdout.reconfigure(line_buffering=True)
    return Channel(FileIO(source, "rb"), FileIO(sink, "wb"))


def _end_with_parent(parent: int) -> None:
    # A block may run for hours after its parent was killed.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _pack(error: BaseException) -> tuple[bytes, str]:
    import cloudpickle

    text = "".join(traceback.format_exception(error))
    if not isinstance(error, CellimgError):
        error = CellimgError(describe(error))
    try:
        return cloudpickle.dumps(error), text
    except Exception:
        return pickle.dumps(CellimgError(describe(error))), text


def _pack_value(value: NDArray[Any], name: str) -> bytes:
    import cloudpickle

    try:
        packed: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise CellimgError(
            f"what {name} returned cannot be sent from a process: {describe(error)}"
        ) from error
    return packed


class _Server:
    """What can be asked of a worker."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._jobs: dict[int, BlockJob] = {}
        self._segments: dict[int, SharedMemory] = {}

    def do_start(self, init: bytes) -> None:
        """Run ``init``."""
        try:
            prepare = pickle.loads(init)
        except Exception as error:
            raise InitError(
                f"init could not be read in the worker process: {describe(error)}"
            ) from error
        self._worker = Worker(prepare)
        adopt(init, self._worker)

    def do_job(self, number: int, content: bytes) -> None:
        """Learn what the blocks of an image have in common."""
        self._jobs[number] = pickle.loads(content)

    def do_forget(self, numbers: list[int]) -> None:
        """Forget images that are gone."""
        for number in numbers:
            self._jobs.pop(number, None)

    def do_block(
        self, number: int, index: int, slot: int, layout: Layout, objects: bytes | None
    ) -> bytes | None:
        """Compute a cell from the inputs in a slot into the output there.

        Inputs of Python objects are given, and a result of such is returned, pickled.
        """
        assert self._worker is not None
        job = self._jobs[number]
        arrays = layout.arrays(self._segment(slot, layout.name).buf)
        out = None if job.dtype.hasobject else arrays.pop()
        given: dict[int, NDArray[Any]] = {} if objects is None else pickle.loads(objects)
        shared = iter(arrays)
        inputs = tuple(
            given[number] if number in given else next(shared)
            for number in range(len(arrays) + len(given))
        )
        for array in inputs:
            array.flags.writeable = False
        plan = job.planner.plan(index)
        result = self._worker.apply(job, plan, inputs, out)
        if out is None:
            return _pack_value(result, job.function.name)
        if result is not out:
            out[...] = result
        return None

    def _segment(self, slot: int, name: str) -> SharedMemory:
        known = self._segments.get(slot)
        if known is not None and known.name.lstrip("/") == name.lstrip("/"):
            return known
        # Slots have grown: let go of what was removed, also of those that are rarely used.
        for number, segment in list(self._segments.items()):
            if number == slot or is_removed(segment):
                detach_segment(self._segments.pop(number))
        segment = self._segments[slot] = attach_segment(name)
        return segment


if __name__ == "__main__":
    main()
