"""Worker processes on this machine, which blocks reach by shared memory."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from typing import Any

import cloudpickle
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import (
    CellimgError,
    InitError,
    QueueClosedError,
    ReadError,
    WorkerDiedError,
    describe,
)
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob, Init
from cellimg_dask.loading.crew import Crew
from cellimg_dask.loading.priorities import INTERACTIVE, priority
from cellimg_dask.queues.channel import Channel
from cellimg_dask.queues.here import Entry, open_runners
from cellimg_dask.queues.pool import Pool
from cellimg_dask.queues.slots import Slot

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
        try:
            packed = cloudpickle.dumps(init)
        except Exception as error:
            raise InitError(f"init cannot be sent to a process: {error}") from error
        self._jobs = _Jobs()
        # Twice as many, so that the next blocks are read and copied while all workers compute; as
        # many again for what somebody waits for, which does not wait for slots of the others.
        self._all_slots = [Slot(number) for number in range(4 * num_workers)]
        self._slots = Pool(self._all_slots[: 2 * num_workers])
        self._urgent_slots = Pool(self._all_slots[2 * num_workers :])
        self._workers = [_WorkerProcess(packed, self._jobs) for _ in range(num_workers)]
        self._pool = Pool(self._workers)
        self._init = init
        self._here: Entry | None = None
        self.crew = Crew(2 * num_workers, spare_tiny=False)
        try:
            self._start()
        except BaseException:
            self.close(0)
            raise
        open_runners.add(self)

    def _start(self) -> None:
        with ThreadPoolExecutor(len(self._workers)) as starters:
            try:
                for started in as_completed(
                    [starters.submit(worker.ensure) for worker in self._workers]
                ):
                    started.result()
            except BaseException:
                # The others may still be in their ``init``, perhaps for ever.
                for worker in self._workers:
                    worker.stop()
                raise

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
        number = self._jobs.number(job)
        slots = self._urgent_slots if priority.get() <= INTERACTIVE else self._slots
        with slots.lend() as slot:
            try:
                result = self._apply_in(slot, job, number, plan, inputs)
                if out is None:
                    return result.copy()
                out[...] = result
                return out
            except Exception:
                raise
            except BaseException:
                # Interrupted: a worker that is about to be killed may still write there.
                slot.remove()
                raise

    def _apply_in(
        self,
        slot: Slot,
        job: BlockJob,
        number: int,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
    ) -> NDArray[Any]:
        """Have a worker compute a cell; return it as a view of the slot.

        Python objects have no place in shared memory, and travel with the messages.
        """
        given = {n: array for n, array in enumerate(inputs) if array.dtype.hasobject}
        others = [array for array in inputs if not array.dtype.hasobject]
        wanted = [(array.shape, array.dtype) for array in others]
        if not job.dtype.hasobject:
            wanted.append((plan.shape, job.dtype))
        layout, places = slot.lay_out(wanted)
        for place, array in zip(places, others, strict=False):
            place[...] = array
        objects = _packed_inputs(job, plan, given) if given else None
        with self._pool.lend() as worker:
            try:
                worker.ensure()
                worker.teach(job, number)
                reply = worker.ask("block", number, plan.index, slot.number, layout, objects)
            except (_DiedError, InitError) as error:
                if self._pool.closed:
                    raise QueueClosedError("the queue was closed during this block") from None
                if isinstance(error, InitError):
                    raise
                raise WorkerDiedError(
                    job.function.name,
                    plan.position,
                    plan.roi,
                    f"the worker process died ({error}) while it computed this cell; other "
                    f"cells are not affected, and the next block gets a new worker",
                ) from None
        result: NDArray[Any] = places[-1] if reply is None else pickle.loads(reply)
        return result

    def close(self, wait_s: float | None) -> bool:
        """Turn away who waits, and end the processes; those that still compute are killed."""
        if self._here is None:
            if not self._pool.close(wait_s):
                for worker in self._workers:
                    worker.stop()
                self._pool.close(None)
            # All at once, and then wait for each.
            for worker in self._workers:
                worker.hang_up()
            for worker in self._workers:
                worker.end()
            self._slots.close()
            self._urgent_slots.close()
            for slot in self._all_slots:
                slot.remove()
        self.crew.close()
        open_runners.discard(self)
        return True

    def abandon(self) -> None:
        """Run blocks in this process, which was forked: the workers are the other one's."""
        self._here = Entry()
        for worker in self._workers:
            worker.abandon()

    @property
    def num_waiting(self) -> int:
        """How many blocks wait for a worker."""
        if self._here is not None:
            return 0
        return sum(pool.num_waiting for pool in (self._slots, self._urgent_slots, self._pool))

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

    Belongs to one borrower at a time, but for `kill` and `stop`.
    """

    def __init__(self, init: bytes, jobs: _Jobs) -> None:
        self._init = init
        self._jobs = jobs
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._taught: set[int] = set()
        self._in_step = False
        """Whether every message was answered."""
        self._stopped = False

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def ensure(self) -> None:
        """Start the process, if there is none, and run ``init`` there."""
        if self._process is not None:
            if self._in_step and self._process.poll() is None:
                return
            # Whoever had it was interrupted, or it died.
            self.kill()
            self.end()
        self._process = subprocess.Popen(
            # Only text is looked at by Python itself.
            [*_python(), "-c", PROGRAM, *(path for path in sys.path if isinstance(path, str))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        if self._stopped:
            self.kill()
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
        packed = self._jobs.packed(job, number)
        try:
            self.ask("job", number, packed)
        except CellimgError as error:
            raise CellimgError(
                f"{job.function.name} could not be read in the worker process: {error}; define it "
                f"in a module that can be imported there, or use BlockCode"
            ) from error
        self._taught.add(number)

    def ask(self, *message: Any) -> Any:
        """Send a message, wait, and return what came of it or raise its error."""
        assert self._channel is not None
        # What a process sends after this was interrupted must not be taken for another reply.
        self._in_step = False
        try:
            self._channel.send(*message)
            kind, *content = self._channel.receive()
        except (EOFError, OSError):
            raise _DiedError(self._how_it_ended()) from None
        except BaseException:
            self.kill()
            raise
        self._in_step = True
        if kind == "error":
            raise _unpacked(*content)
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
        if code >= 0:
            return f"exit status {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def kill(self) -> None:
        """Kill the process; from any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """Kill the process and each that follows it; from any thread."""
        self._stopped = True
        self.kill()

    def abandon(self) -> None:
        """Let go of the process, which is not this one's child."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if process is not None:
            process.returncode = 0
        if channel is not None:
            channel.abandon()
            channel.close()

    def hang_up(self) -> None:
        """Close the pipes, upon which the process ends."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def end(self) -> None:
        """Close the pipes and wait until the process has ended."""
        self.hang_up()
        process, self._process = self._process, None
        self._taught = set()
        if process is not None:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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


def _python() -> list[str]:
    """Return the command that starts Python as this process was started."""
    optimize = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
    return [sys.executable, *optimize, *(f"-W{option}" for option in sys.warnoptions)]


def _unpacked(packed: bytes, text: str) -> BaseException:
    """Return an error that came from a worker process."""
    error: BaseException
    try:
        error = pickle.loads(packed)
    except (Exception, SystemExit):
        # Its class is known there only, or cannot be made anew.
        return CellimgError(f"in the worker process:\n{text}")
    error.add_note(f"In the worker process:\n{text}")
    return error
