"""Worker processes on this machine, which blocks reach by shared memory."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import (
    CellimgError,
    InitError,
    QueueClosedError,
    WorkerDiedError,
)
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob, Init
from cellimg_dask.loading.crew import Crew
from cellimg_dask.queues.channel import Channel
from cellimg_dask.queues.pool import Pool
from cellimg_dask.queues.slots import Slots

__all__ = ["ProcessBlocks"]

# Modules are found where this process finds them.
PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from cellimg_dask.queues.process_worker import main; main()"
)


class ProcessBlocks:
    """Runs blocks in processes that live as long as the queue is open.

    Parameters
    ----------
    num_workers : int
        Number of processes.
    init : str or callable or None
        Run in each of them first.

    Raises
    ------
    InitError
        If ``init`` raises in any of them, or cannot be sent there.
    """

    copies = True

    def __init__(self, num_workers: int, init: Init) -> None:
        import cloudpickle

        try:
            packed = cloudpickle.dumps(init)
        except Exception as error:
            raise InitError(f"init cannot be sent to a process: {error}") from error
        self._jobs = _Jobs()
        self._slots = Slots()
        self._workers = [_WorkerProcess(packed, self._jobs) for _ in range(num_workers)]
        self._pool = Pool(self._workers)
        # Twice as many, so that the next blocks are read and copied while all workers compute.
        self.crew = Crew(2 * num_workers, spare_tiny=False)
        try:
            with ThreadPoolExecutor(num_workers) as starters:
                for started in [starters.submit(worker.ensure) for worker in self._workers]:
                    started.result()
        except BaseException:
            self.close(0)
            raise

    def apply(
        self,
        job: BlockJob,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Run a block function on a worker; see `BlockFunction.apply`."""
        number = self._jobs.number(job)
        with self._slots.lend() as slot:
            wanted = [(array.shape, array.dtype) for array in inputs]
            layout, (*places, result) = slot.lay_out([*wanted, (plan.shape, job.dtype)])
            for place, array in zip(places, inputs, strict=True):
                place[...] = array
            with self._pool.lend() as worker:
                worker.ensure()
                try:
                    worker.teach(job, number)
                    worker.ask("block", number, plan.index, slot.number, layout)
                except _DiedError as error:
                    if self._pool.closed:
                        raise QueueClosedError("the queue was closed during this block") from None
                    raise WorkerDiedError(
                        job.function.name,
                        plan.position,
                        plan.roi,
                        f"the worker process died ({error}) while it computed this cell; other "
                        f"cells are not affected, and the next block gets a new worker",
                    ) from None
            if out is None:
                return result.copy()
            out[...] = result
            return out

    def close(self, wait_s: float | None) -> bool:
        """Turn away who waits, and end the processes; those that still compute are killed."""
        if not self._pool.close(wait_s):
            for worker in self._workers:
                worker.kill()
            self._pool.close(None)
        for worker in self._workers:
            worker.end()
        self._slots.remove()
        self.crew.close()
        return True

    @property
    def num_waiting(self) -> int:
        """How many blocks wait for a worker."""
        return self._pool.num_waiting

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.pid for worker in self._workers if worker.pid]


class _DiedError(Exception):
    """A worker process ended; the text says how."""


class _Jobs:
    """Gives a number to what the blocks of an image have in common, and packs it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: weakref.WeakKeyDictionary[BlockJob, int] = weakref.WeakKeyDictionary()
        self._packed: dict[int, bytes] = {}
        self._next = count()

    def number(self, job: BlockJob) -> int:
        """Return the number of a job."""
        with self._lock:
            number = self._numbers.get(job)
            if number is None:
                number = self._numbers[job] = next(self._next)
                weakref.finalize(job, self._packed.pop, number, None).atexit = False
            return number

    def packed(self, job: BlockJob, number: int) -> bytes:
        """Return a job as bytes."""
        import cloudpickle

        found = self._packed.get(number)
        if found is None:
            try:
                found = cloudpickle.dumps(job)
            except Exception as error:
                raise CellimgError(
                    f"{job.function.name} cannot be sent to a process: {type(error).__name__}: "
                    f"{error}; define it at the top of a module, or use BlockCode"
                ) from error
            self._packed[number] = found
        return found

    def living(self) -> set[int]:
        """Return the numbers of the jobs whose images are there."""
        with self._lock:
            return set(self._numbers.values())


class _WorkerProcess:
    """A process that does one thing at a time; started when it is first needed.

    Belongs to one borrower at a time, but for `kill`.
    """

    def __init__(self, init: bytes, jobs: _Jobs) -> None:
        self._init = init
        self._jobs = jobs
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._taught: set[int] = set()

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def ensure(self) -> None:
        """Start the process, if there is none, and run ``init`` there."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.end()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._channel = Channel(self._process.stdout, self._process.stdin)  # type: ignore[arg-type]
        try:
            self.ask("start", self._init)
        except _DiedError as error:
            raise InitError(f"the worker process died ({error}) before init had ended") from None
        except BaseException:
            self.kill()
            self.end()
            raise

    def teach(self, job: BlockJob, number: int) -> None:
        """Send what the blocks of an image have in common, once; forget images that are gone."""
        if number in self._taught:
            return
        gone = self._taught - self._jobs.living()
        if gone:
            self.ask("forget", sorted(gone))
            self._taught -= gone
        self.ask("job", number, self._jobs.packed(job, number))
        self._taught.add(number)

    def ask(self, *message: Any) -> Any:
        """Send a message, wait, and return what came of it or raise its error."""
        assert self._channel is not None
        try:
            self._channel.send(*message)
            kind, *content = self._channel.receive()
        except (EOFError, OSError):
            raise _DiedError(self._how_it_ended()) from None
        except BaseException:
            # Interrupted: whatever the process still sends would be taken for another reply.
            self.kill()
            raise
        if kind == "error":
            error = pickle.loads(content[0])
            error.add_note(f"In the worker process:\n{content[1]}")
            raise error
        return content[0]

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            return "it closed its pipe"
        finally:
            self.end()
        if code < 0:
            return signal.Signals(-code).name
        return f"exit status {code}"

    def kill(self) -> None:
        """Kill the process; from any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> None:
        """Close the pipes, upon which the process ends, and wait for it."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        self._taught = set()
        if channel is not None:
            channel.close()
        if process is not None:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
