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
from typing import Any

from .task import Task, TaskCancelledError
from .wire import Message, Wire

__all__ = ["Runtime", "Server", "private_wire", "serve"]

Reply = tuple[Message, list[bytes]]


class Runtime:
    """What a worker can be asked to do.

    A request of type ``THIS`` is answered by the method ``do_this``, which returns the entries of
    the response, and what is attached to it.
    """

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

    def run(self) -> None:
        """Answer until the other end is gone."""
        try:
            while True:
                message = self._waiting.popleft() if self._waiting else self._wire.receive()
                assert message is not None
                self._answer(*message)
        except (EOFError, OSError):
            return

    def _answer(self, request: Message, attached: list[bytes]) -> None:
        number, kind = request.get("task"), str(request.get("requestType"))
        if kind == "CANCEL":
            # Of what has ended meanwhile.
            return
        if number in self._cancelled:
            self._cancelled.discard(number)
            self._respond(number, "CANCELATION", {}, [])
            return
        self._running = number
        try:
            answer = getattr(self._runtime, f"do_{kind.lower()}", None)
            if answer is None:
                raise ValueError(f"requestType {kind!r} is not known here")
            reply = ("COMPLETION", *answer(request, attached, self))
        except TaskCancelledError:
            reply = ("CANCELATION", {}, [])
        except BaseException as error:
            reply = ("FAILURE", *self._runtime.failure(error))
        self._running = None
        self._cancelled.discard(number)
        self._respond(number, *reply)

    def _respond(self, number: Any, kind: str, content: Message, attached: list[bytes]) -> None:
        self._wire.send(dict(content, task=number, responseType=kind), *attached)

    def task(self) -> Task:
        """Return the task that runs, for the function that does it."""
        number = self._running

        def report(said: Message) -> None:
            self._respond(number, "UPDATE", said, [])

        def ask() -> bool:
            self._look()
            return number in self._cancelled

        return Task(report, ask)

    def ask_back(self, kind: str, content: Message) -> Message:
        """Ask the caller for something that the running task needs, and return the answer."""
        self._respond(self._running, kind, content, [])
        while True:
            received = self._wire.receive()
            assert received is not None
            if received[0].get("requestType") == kind:
                return received[0]
            self._put_off(*received)

    def _look(self) -> None:
        """Take in what has come while a task runs."""
        if threading.current_thread() is not threading.main_thread():
            # Only one thread may read; what it takes in is seen by all.
            return
        while True:
            received = self._wire.receive(0)
            if received is None:
                return
            self._put_off(*received)

    def _put_off(self, request: Message, attached: list[bytes]) -> None:
        if request.get("requestType") != "CANCEL":
            self._waiting.append((request, attached))
            return
        number = request.get("task")
        if number == self._running or any(r.get("task") == number for r, _ in self._waiting):
            self._cancelled.add(number)


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
    if hasattr(os, "register_at_fork"):
        # What a block forks must not answer, nor keep the pipes open when this process dies.
        os.register_at_fork(after_in_child=wire.abandon)
    sys.argv[1:] = []
    if end_with_parent:
        wire.send_launch()
        # Ctrl-C in a terminal goes to all processes; the parent decides what becomes of workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watch = threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True)
        watch.start()
    Server(wire, runtime).run()


def _end_with_parent(parent: int) -> None:
    # A block may run for hours after its parent was killed.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
