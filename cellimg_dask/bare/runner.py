"""What a worker does in an environment that has Python and NumPy, and nothing of the package."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .block import Block, Outline
from .functions import Functions, Held, wants_task
from .places import Layout, Segments, array_at
from .segments import Segment
from .serve import Reply, Runtime, Server, serve
from .task import Task
from .trees import decode, encode, from_attached
from .wire import Message

__all__ = ["Runner", "main"]


class Runner(Runtime):
    """Calls functions that were described to it, with arrays in shared memory."""

    def __init__(self) -> None:
        self._functions = Functions()
        self._known: dict[int, tuple[Held, bool]] = {}
        self._segments = Segments()

    def do_init(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Run ``init``."""
        self._functions = Functions(from_attached(request["init"], attached))
        return {}, []

    def do_define(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Learn a function, which has a number from now on."""
        held = self._functions.hold(from_attached(request["spec"], attached))
        self._known[request["function"]] = held, wants_task(held.function)
        return {}, []

    def do_forget(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Forget functions."""
        for number in request["functions"]:
            self._known.pop(number, None)
        self._functions.clean_up()
        return {}, []

    def do_execute(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Call a function; arrays of the result are put into the segment, behind the others."""
        held, with_task = self._known[request["function"]]
        segment = self._segments.get(request["segment"])

        def fetch(place: Any) -> np.ndarray[Any, Any]:
            return array_at(segment, place, self._segments.only_read)

        args = decode(request["args"], fetch)
        kwargs = decode(request["kwargs"], fetch)
        if "block" in request:
            data = fetch(request["data"])
            # Whatever was there before.
            data[...] = np.zeros((), data.dtype)
            args = [Block(Outline(request["block"]), data, tuple(args), kwargs)]
            kwargs = {}
        if with_task:
            kwargs.setdefault("task", server.task(Task))
        result = held.function(*args, **kwargs)
        return {"outputs": self._given_out(result, segment, request["end"], server)}, []

    def failure(self, error: BaseException) -> Reply:
        """Return also what the error is made of, where that is plain; see `Runtime.failure`."""
        content, attached = super().failure(error)
        if all(part is None or type(part) in (bool, int, str) for part in error.args):
            content["args"] = list(error.args)
        return content, attached

    def _given_out(self, result: Any, segment: Segment, end: int, server: Server) -> Any:
        layout = Layout(end)
        arrays: list[np.ndarray[Any, Any]] = []

        def place(array: np.ndarray[Any, Any]) -> Any:
            arrays.append(array)
            return layout.add(array.shape, array.dtype)

        if not isinstance(result, (np.ndarray, np.generic)) and hasattr(result, "__array__"):
            # Of another library that knows NumPy.
            result = np.asarray(result)
        tree = encode(result, place)
        if layout.end > segment.nbytes:
            # The caller owns all segments, so that none is left over when a worker dies.
            answer = server.ask_back("ROOM", {"nbytes": layout.end})
            segment = self._segments.get(answer["segment"])
        for array, where in zip(arrays, layout.places):
            array_at(segment, where)[...] = array
        return tree


def main() -> None:
    """Serve the process that started this one."""
    if tuple(map(int, np.__version__.split(".")[:2])) < (1, 20):
        sys.exit("NumPy is too old")
    serve(Runner())
