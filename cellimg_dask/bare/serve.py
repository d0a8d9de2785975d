"""The program of a worker: it does what the lines on its standard input say, until they end.

Requests have a ``requestType`` and the ``task`` that they are about, responses a ``responseType``
and the same ``task``. The types are those of the Appose protocol, and some that it lacks. One
task runs at a time, on the main thread; what comes meanwhile waits, but for a ``CANCEL``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from io import TextIOWrapper
from typing import Any, TypeVar

from .task import Task, TaskCancelledError
from .wire import Message, Wire

__all__ = ["Interrupted", "Reply", "Runtime", "Server", "private_wire", "serve"]

Reply = tuple[Message, list[bytes]]

SomeTask = TypeVar("SomeTask", bound=Task)


class Interrupted(KeyboardInterrupt):
    """Somebody wants this process to end, now."""


class Runtime:
    """What a worker can be asked to do.

    A request of type ``THIS`` is answered by the method ``do_this``, which returns the entries of
    the response, and what is attached to it.
    """

    rest_s: float | None = None
    """After so much time without a request `rest` is called; None: it is not."""

    outlives_caller = False
    """Whether a task goes on when no more requests can come."""

    def begin(self) -> None:
        """Do what comes before the first request."""

    def rest(self) -> None:
        """Do what there is time for."""

    def answered(self, request: Message, kind: str) -> bool:
        """Take note that a response of this type was sent, and return whether to go on."""
        return True

    def failure(self, error: BaseException) -> Reply:
        """Return what a response says of an error."""
        try:
            message = str(error)
        except Exception:
            message = "(its message cannot be shown)"
        content = {
            "error": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
            "kind": type(error).__name__,
            "message": message,
        }
        return content, []


class Server:
    """Answers requests, one after the other.

    Parameters
    ----------
    wire : Wire
        To whoever asks.
    runtime : Runtime
        Does what is asked.
    """

    def __init__(self, wire: Wire, runtime: Runtime) -> None:
        self._wire = wire
        self._runtime = runtime
        self._waiting: deque[tuple[Message, list[bytes]]] = deque()
        self._cancelled: set[Any] = set()
        self._running: Any = None
        self._no_more = False
        self._reading = threading.Lock()
        """Whoever has it receives, and what has come is as it says."""

    def run(self) -> None:
        """Answer until the other end is gone."""
        try:
            self._runtime.begin()
            while self._answer(*self._next()):
                pass
        except (EOFError, OSError):
            return

    def _next(self) -> tuple[Message, list[bytes]]:
        with self._reading:
            if self._waiting:
                return self._waiting.popleft()
            if self._no_more:
                raise EOFError
            received = self._receive(self._runtime.rest_s)
            if received is None:
                self._runtime.rest()
                received = self._receive()
            assert received is not None
            return received

    def _receive(self, wait_s: float | None = None) -> tuple[Message, list[bytes]] | None:
        """Wait for a request; what is none is answered."""
        while True:
            try:
                received = self._wire.receive(wait_s)
                if received is not None and isinstance(received[0].get("task"), (list, dict)):
                    raise ValueError("a task is named by a string or a number")
                return received
            except (TypeError, ValueError) as error:
                self._respond(None, "FAILURE", *self._runtime.failure(error))

    def _answer(self, request: Message, attached: list[bytes]) -> bool:
        number, kind = request.get("task"), str(request.get("requestType"))
        if kind == "CANCEL":
            # Of what has ended meanwhile.
            return True
        self._running = number
        try:
            if number in self._cancelled:
                raise TaskCancelledError
            answer = getattr(self._runtime, f"do_{kind.lower()}", None)
            if answer is None:
                raise ValueError(f"expected {self._known()} as requestType, got {_named(request)}")
            reply = ("COMPLETION", *answer(request, attached, self))
        except Interrupted:
            raise
        except TaskCancelledError:
            reply = ("CANCELATION", {}, [])
        except BaseException as error:
            reply = ("FAILURE", *self._runtime.failure(error))
        self._running = None
        self._cancelled.discard(number)
        try:
            self._respond(number, *reply)
        except (RecursionError, TypeError, ValueError) as error:
            # JSON has no such thing; nothing of it was sent.
            reply = ("FAILURE", *self._runtime.failure(error))
            self._respond(number, *reply)
        return self._runtime.answered(request, reply[0])

    def _known(self) -> str:
        names = [name[3:].upper() for name in dir(self._runtime) if name.startswith("do_")]
        return " or ".join([*names, "CANCEL"])

    def _respond(self, number: Any, kind: str, content: Message, attached: list[bytes]) -> None:
        self._wire.send({"task": number, "responseType": kind, **content}, *attached)

    def tell(self, kind: str, content: Message) -> None:
        """Send a response of the running task that is not its last."""
        self._respond(self._running, kind, content, [])

    def task(self, sort: type[SomeTask]) -> SomeTask:
        """Return the task that runs, for the function that does it."""
        number = self._running

        def report(said: Message) -> None:
            self._respond(number, "UPDATE", said, [])

        def ask() -> bool:
            self._look()
            return number in self._cancelled or (self._no_more and not self._wire.is_heard())

        return sort(report, ask)

    def ask_back(self, kind: str, content: Message) -> Message:
        """Ask the caller for something that the running task needs, and return the answer."""
        self.tell(kind, content)
        with self._reading:
            while True:
                received = self._receive()
                assert received is not None
                if received[0].get("requestType") == kind:
                    return received[0]
                self._put_off(*received)

    def _look(self) -> None:
        """Take in what has come while a task runs."""
        if self._no_more or not self._reading.acquire(blocking=False):
            # What another thread takes in is seen by all.
            return
        try:
            while (received := self._receive(0)) is not None:
                self._put_off(*received)
        except EOFError:
            self._no_more = True
            if not self._runtime.outlives_caller:
                raise
        finally:
            self._reading.release()

    def _put_off(self, request: Message, attached: list[bytes]) -> None:
        if request.get("requestType") != "CANCEL":
            self._waiting.append((request, attached))
            return
        number = request.get("task")
        if number == self._running or any(r.get("task") == number for r, _ in self._waiting):
            self._cancelled.add(number)

    def abandon(self) -> None:
        """Have no more to do with the other end, in a process that was forked."""
        self._reading = threading.Lock()
        self._wire.abandon()


def _named(request: Message) -> str:
    kind = request.get("requestType")
    return "none" if kind is None else repr(kind)


def private_wire() -> Wire:
    """Take the messages off descriptors 0 and 1, so that nothing that is printed disturbs them."""
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
    return Wire(source, sink)


def serve(runtime: Runtime, *, end_with_parent: bool = True) -> None:
    """Be a worker: answer what comes on standard input, until that ends.

    Parameters
    ----------
    runtime : Runtime
        Does what is asked.
    end_with_parent : bool
        Whether to end with the process that started this one, even in the middle of a task.
    """
    wire = private_wire()
    server = Server(wire, runtime)
    if hasattr(os, "register_at_fork"):
        # What a block forks must not answer, nor keep the pipes open when this process dies.
        os.register_at_fork(after_in_child=server.abandon)
    sys.argv[1:] = []
    if end_with_parent:
        wire.send_launch()
        # Ctrl-C in a terminal goes to all processes; the parent decides what becomes of workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watch = threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True)
        watch.start()
    server.run()


def _end_with_parent(parent: int) -> None:
    # A block may run for hours after its parent was killed.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
