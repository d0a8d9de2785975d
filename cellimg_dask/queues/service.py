"""A worker process, as the process that started it sees it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from math import inf
from time import monotonic
from typing import Protocol

from cellimg_dask.bare.task import TaskCancelledError
from cellimg_dask.bare.wire import Message, Wire
from cellimg_dask.blocks.errors import InitError

__all__ = ["DiedError", "LateError", "Program", "Service", "StillbornError"]

# So often somebody who waits for a worker looks whether the result is still wanted.
_LOOK_S = 0.2
_TAIL_BYTES = 4096
_TAIL_LINES = 20
# A task says nothing after these.
_LAST = ("COMPLETION", "FAILURE", "CANCELATION")


class DiedError(Exception):
    """A worker process ended; the text says how."""

    def __init__(self, how: str, exit_code: int | None = None, stderr: str = "") -> None:
        super().__init__(how)
        self.exit_code = exit_code
        """As `subprocess.Popen.returncode`: negative for a signal; None if it is not known."""
        self.stderr = stderr
        """The last lines that it wrote to standard error, or printed."""


class StillbornError(InitError):
    """A worker process ended before ``init`` had; perhaps somebody else's doing."""


class LateError(Exception):
    """A worker did not answer in time, and was killed."""


_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Program(Protocol):
    """What a worker process is: how it is started, prepared and understood."""

    advice: str
    """What to do if a function cannot be read there."""

    def command(self) -> list[str]:
        """Return the words that start it."""
        ...

    def variables(self) -> Mapping[str, str] | None:
        """Return its environment variables; None: those of this process."""
        ...

    def explain(self) -> None:
        """Raise why it cannot be started, if that is known to be so."""
        ...

    def greeting(self) -> tuple[Message, tuple[bytes, ...]]:
        """Return the request that runs ``init``, and what is attached."""
        ...

    def error(self, response: Message, attached: list[bytes], asked: str) -> BaseException:
        """Return the error of a response to a request of type ``asked``."""
        ...


class Service:
    """A process that does one thing at a time; started when it is first needed.

    Belongs to one borrower at a time, but for `kill` and `stop`.

    Parameters
    ----------
    program : Program
        What it is.
    num_threads : int
        How many threads BLAS and OpenMP take in it, unless environment variables say so already:
        as many in each process as there are cores would be in each other's way.
    """

    def __init__(self, program: Program, num_threads: int) -> None:
        self._program = program
        self._num_threads = num_threads
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: Wire | None = None
        self._stderr = _Stderr()
        self._numbers = count()
        self._in_step = False
        """Whether every request was answered."""
        self._stopped = False
        self.taught: set[int] = set()
        """Numbers of the functions that it knows."""

    @property
    def pid(self) -> int | None:
        """Its process id while it is alive."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def ensure(self) -> None:
        """Start the process, if there is none, and run ``init`` there.

        Raises
        ------
        InitError
            If that fails; a `StillbornError` if the process died meanwhile.
        """
        if self._process is not None:
            if self._in_step and self._process.poll() is None:
                return
            # Whoever had it was interrupted, or it died.
            self.kill()
            self.end()
        greeting, attached = self._program.greeting()
        try:
            try:
                self._start()
            except (DiedError, OSError):
                self._program.explain()
                raise
            self.ask(greeting, *attached)
        except DiedError as error:
            said = f"; it wrote:\n{error.stderr}" if error.stderr else ""
            raise StillbornError(
                f"the worker process died ({error}) before init had ended{said}"
            ) from None
        except BaseException:
            self.kill()
            self.end()
            raise

    def _start(self) -> None:
        variables = dict(self._program.variables() or os.environ)
        if not any(name in variables for name in _THREADS):
            variables |= dict.fromkeys(_THREADS, str(self._num_threads))
        with self._stderr.writer() as errors:
            self._process = subprocess.Popen(
                self._program.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                env=variables,
            )
        if self._stopped:
            self.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # The files would close what the wire has.
        source, sink = os.dup(self._process.stdout.fileno()), os.dup(self._process.stdin.fileno())
        self._process.stdin.close()
        self._process.stdout.close()
        self._wire = Wire(source, sink)
        try:
            # Start-up files of an environment may print.
            self._wire.wait_for_launch()
        except (EOFError, OSError):
            raise self._how_it_ended() from None

    def ask(
        self,
        request: Message,
        *attached: bytes,
        timeout_s: float | None = None,
        wanted: Callable[[], bool] | None = None,
        on_update: Callable[[Message], None] | None = None,
        on_question: Callable[[Message], Message] | None = None,
    ) -> tuple[Message, list[bytes]]:
        """Send a request, wait, and return the response, or raise its error.

        Parameters
        ----------
        request : dict
            With a ``requestType``.
        *attached : bytes
            Go with it.
        timeout_s : float, optional
            After that the process is killed.
        wanted : callable, optional
            Whether somebody still wants the result; if not, the task is told so, once.
        on_update : callable, optional
            Takes what the task says of how far it is.
        on_question : callable, optional
            Answers what the task asks back.

        Raises
        ------
        DiedError
            If the process ended.
        LateError
            If it was killed after ``timeout_s``.
        TaskCancelledError
            If the task ended because it was told that nobody wants it.
        """
        assert self._wire is not None
        number = next(self._numbers)
        # What a process sends after this was interrupted must not be taken for another reply.
        self._in_step = False
        patience = _Patience(timeout_s, wanted)
        answering = False
        try:
            self._wire.send({**request, "task": number}, *attached)
            while True:
                received = self._receive(patience.wait_s())
                if patience.is_over() and not _is_last(received):
                    self.kill()
                    raise LateError
                if patience.wants_no_more():
                    self._wire.send({"requestType": "CANCEL", "task": number})
                if received is None:
                    continue
                response, parts = received
                kind = response["responseType"]
                if response["task"] not in (number, None):
                    # Said by a thread that a block before this one has left running.
                    continue
                if kind == "UPDATE":
                    if on_update is not None:
                        on_update(response)
                elif kind in _LAST:
                    break
                else:
                    assert on_question is not None
                    answering = True
                    answer = on_question(response)
                    answering = False
                    self._wire.send({**answer, "requestType": kind, "task": number})
        except (EOFError, OSError):
            if answering:
                # Of this process, and not that the other one has ended.
                self.kill()
                raise
            raise self._how_it_ended() from None
        except BaseException:
            self.kill()
            raise
        self._in_step = True
        if kind == "CANCELATION":
            raise TaskCancelledError("nobody wants this cell any more")
        if kind == "FAILURE":
            raise self._program.error(response, parts, request["requestType"])
        return response, parts

    def _receive(self, wait_s: float | None) -> tuple[Message, list[bytes]] | None:
        assert self._wire is not None
        try:
            return self._wire.receive(wait_s)
        except ValueError:
            # It ended in the middle of a line.
            raise EOFError from None

    def _how_it_ended(self) -> DiedError:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            return DiedError("it closed its pipe")
        finally:
            self.end()
        return DiedError(_ending(code), code, self._stderr.tail())

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
        wire, self._wire = self._wire, None
        if process is not None:
            process.returncode = 0
        if wire is not None:
            wire.abandon()
            wire.close()
        _, wake = self._stderr.abandon()
        if wake >= 0:
            os.close(wake)

    def hang_up(self) -> None:
        """Close the pipes, upon which the process ends."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def end(self) -> None:
        """Close the pipes and wait until the process has ended."""
        self.hang_up()
        process, self._process = self._process, None
        self.taught = set()
        if process is not None:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stderr.close()


class _Patience:
    """How long to wait for a response, and whether it is still wanted.

    Parameters
    ----------
    timeout_s : float or None
        How long a response may take.
    wanted : callable or None
        Whether somebody wants it.
    """

    def __init__(self, timeout_s: float | None, wanted: Callable[[], bool] | None) -> None:
        self._end = inf if timeout_s is None else monotonic() + timeout_s
        self._wanted = wanted
        self._next_look = inf if wanted is None else monotonic() + _LOOK_S

    def wait_s(self) -> float | None:
        """Return how long to wait for the next message; None: as long as it takes."""
        until = min(self._end, self._next_look)
        return None if until == inf else max(0.0, until - monotonic())

    def is_over(self) -> bool:
        """Whether it took too long."""
        return self._end != inf and monotonic() >= self._end

    def wants_no_more(self) -> bool:
        """Whether nobody wants the response any more; says so once."""
        if self._wanted is None or monotonic() < self._next_look:
            return False
        if self._wanted():
            self._next_look = monotonic() + _LOOK_S
            return False
        self._wanted = None
        self._next_look = inf
        return True


def _is_last(received: tuple[Message, list[bytes]] | None) -> bool:
    """Whether a task has ended, perhaps while others of its messages were dealt with."""
    return received is not None and received[0]["responseType"] in _LAST


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class _Stderr:
    """Passes on what a worker process writes to standard error, and remembers the last of it."""

    def __init__(self) -> None:
        self._reader: threading.Thread | None = None
        self._wake = -1
        self._last = b""

    @contextmanager
    def writer(self) -> Iterator[int | None]:
        """Give what the process is to write to, while it is started; reading begins with it."""
        if not hasattr(select, "poll"):
            yield None
            return
        source, sink = os.pipe()
        try:
            # Others may hold the far end when the process has ended: then there is no end there.
            awakened, self._wake = os.pipe()
            self._last = b""
            self._reader = threading.Thread(
                target=self._pass_on, args=(source, awakened), name="cellimg-stderr", daemon=True
            )
            self._reader.start()
            yield sink
        finally:
            os.close(sink)

    def _pass_on(self, source: int, awakened: int) -> None:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(awakened, select.POLLIN)
        os.set_blocking(source, False)
        with suppress(OSError):
            over = False
            while not over:
                over = any(descriptor == awakened for descriptor, _ in poll.poll())
                with suppress(BlockingIOError):
                    while data := os.read(source, 1 << 16):
                        self._take(data)
                    over = True
        os.close(source)
        os.close(awakened)

    def _take(self, data: bytes) -> None:
        self._last = (self._last + data)[-_TAIL_BYTES:]
        # Not through Python's file, which has a lock. It may be closed.
        with suppress(OSError):
            left = memoryview(data)
            while left:
                left = left[os.write(2, left) :]

    def tail(self) -> str:
        """Return the last lines."""
        lines = self._last.decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(lines)

    def close(self) -> None:
        """Take what is still to be read, and end."""
        reader, wake = self.abandon()
        if reader is not None:
            # Not only closed: a process that was forked from this one may have it, too.
            with suppress(OSError):
                os.write(wake, b".")
            os.close(wake)
            reader.join()

    def abandon(self) -> tuple[threading.Thread | None, int]:
        """Forget the reader, which does not survive a fork."""
        reader, self._reader = self._reader, None
        wake, self._wake = self._wake, -1
        return reader, wake
