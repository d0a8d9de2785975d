"""A worker for programs in any language: they write requests, lines of JSON, and read answers.

It speaks the protocol of Appose, and calls functions by their names besides; see docs/worker.md.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .answers import Answer
from .block import Block, Outline
from .describe import describe
from .functions import Functions, InitError, wants_task
from .naming import is_file_name, split_name
from .scripts import Scripts, ScriptTask
from .segments import Segment
from .serve import Interrupted, Reply, Runtime, Server, serve
from .values import Attached, array_type
from .wire import Message

__all__ = ["LinesRunner", "main", "work"]

_HERE = str(Path(__file__).parent)
_APPOSE_INIT = "APPOSE_INIT_SCRIPT"
_INTERRUPTED = 130


class LinesRunner(Runtime):
    """Runs scripts and functions for a program that may know neither Python nor this package.

    Parameters
    ----------
    init : str, optional
        Code that runs first.
    once : bool
        Whether to end with the first task.
    """

    rest_s = 1.0
    outlives_caller = True

    def __init__(self, init: str | None = None, once: bool = False) -> None:
        self._init: Any = init
        self._once = once
        self._functions = Functions()
        self._failed_init: InitError | None = None
        self._scripts = Scripts()
        self._known: dict[int, tuple[Callable[..., Any], bool]] = {}
        self._attached = Attached()
        self._answer: Answer | None = None
        self._kept: list[Segment] = []
        self.completed = False
        """Whether the last task did what it was to do."""

    # ------------------------------------------------------------------ requests

    def do_init(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Run ``init``: code, or the description of a function."""
        self._prepare(request.get("init"))
        return {}, []

    def do_describe(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Say what the signature of a function says."""
        function, _ = self._function(_asked(request, "function"))
        return {"outputs": describe(function)}, []

    def do_execute(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        """Run a script or call a function."""
        task = server.task(ScriptTask)
        # It may have been cancelled before it begins.
        task.raise_if_cancelled()
        if self._failed_init is not None:
            raise InitError(str(self._failed_init)) from self._failed_init.__cause__
        targets = _checked(request, "outputs", dict)
        scripted = request.get("script") is not None
        if scripted == (request.get("function") is not None):
            raise ValueError("a task has either a script or a function")
        self._kept.clear()
        server.tell("LAUNCH", {})
        if scripted:
            self._run_script(request, task)
        else:
            self._call(request, task)
        self._answer = Answer(self._attached, self._scripts.keep if scripted else None)
        return {"outputs": self._answer.encode(task.outputs, targets)}, []

    def _run_script(self, request: Message, task: ScriptTask) -> None:
        text = request["script"]
        if not isinstance(text, str):
            raise TypeError(f"a script is a string, got {type(text).__name__}")
        inputs = self._decode(_checked(request, "inputs", dict), scripted=True)
        self._scripts.run(text, {**self._functions.namespace, **inputs}, task)

    def _call(self, request: Message, task: ScriptTask) -> None:
        function, with_task = self._function(_asked(request, "function"))
        args = self._decode(_checked(request, "args", list))
        inputs = self._decode(_checked(request, "inputs", dict))
        block = None
        if request.get("block") is not None:
            block = self._block(_checked(request, "block", dict), args, inputs)
            args, inputs = [block], {}
        if with_task:
            inputs.setdefault("task", task)
        result = function(*args, **inputs)
        task.check()
        if block is not None:
            result = block.data
        if isinstance(result, dict):
            task.outputs.update(result)
        elif result is not None:
            task.outputs["result"] = result

    def _function(self, said: Any) -> tuple[Callable[..., Any], bool]:
        """Return the function that is named or described, and whether it wants the task."""
        function = self._functions.load(self._spec(said))
        known = self._known.get(id(function))
        if known is None:
            known = self._known[id(function)] = function, wants_task(function)
        return known

    def _spec(self, said: Any) -> Any:
        if isinstance(said, str):
            place, name = split_name(said)
            if is_file_name(place):
                return {"file": str(Path(place).expanduser().absolute()), "name": name}
            return {"name": said, "folders": [str(Path.cwd())]}
        if not isinstance(said, dict):
            raise TypeError(
                f'a function is a name such as "module:function" or a description, got {said!r}'
            )
        return _copied(self._decode(said))

    def _decode(self, tree: Any, scripted: bool = False) -> Any:
        return self._attached.decode(tree, self._scripts.exports, scripted)

    def _block(self, said: Message, inputs: list[Any], params: dict[str, Any]) -> Block:
        """Return a block with the array that a program gives for it, or a new one."""
        given = _asked(said, "data")
        if isinstance(given, dict) and given.get("shm") is None and "shape" in given:
            data = np.zeros(*array_type(given))
        else:
            data = self._decode(given)
        if not isinstance(data, np.ndarray):
            raise TypeError(f"the data of a block is an ndarray or a shared array, got {given!r}")
        data[...] = np.zeros((), data.dtype)
        start = said.get("start") or [0] * data.ndim
        stop = [low + extent for low, extent in zip(start, data.shape)]
        read = said.get("read_start") or start, said.get("read_stop") or stop
        crop = [(low - first, high - first) for low, high, first in zip(start, stop, read[0])]
        outline = {
            "index": said.get("index", 0),
            "position": said.get("position") or [0] * data.ndim,
            "start": start,
            "stop": stop,
            "read_start": read[0],
            "read_stop": read[1],
            "crop": crop,
        }
        for name in ("start", "read_start", "read_stop", "position"):
            if len(outline[name]) != data.ndim:
                raise ValueError(
                    f"{name} of a block has a number for each of the {data.ndim} axes of its data, "
                    f"got {outline[name]}"
                )
        return Block(Outline(outline), data, tuple(inputs), params)

    # ------------------------------------------------------------------ around them

    def begin(self) -> None:
        """Run what comes before the first request."""
        path = os.environ.pop(_APPOSE_INIT, None)
        if path is not None and Path(path).is_file():
            # Written by Appose for this process, which removes it.
            text = Path(path).read_text(encoding="utf-8")
            Path(path).unlink()
            self._init = text if self._init is None else f"{self._init}\n{text}"
        try:
            self._prepare(self._init)
        except InitError as error:
            # No request to answer yet; each task is told too.
            _without_own_calls(error)
            traceback.print_exception(type(error), error, error.__traceback__)

    def _prepare(self, init: Any) -> None:
        self._failed_init = None
        self._known.clear()
        self._functions = Functions()
        try:
            if isinstance(init, str):
                # A name of a function cannot be told from code.
                self._functions = Functions({"code": init})
            elif init is not None:
                self._functions = Functions(self._spec(init))
        except InitError as error:
            self._failed_init = error
            raise

    def rest(self) -> None:
        """Let go of the caller's memory that it has removed."""
        gc.collect()
        self._attached.sweep()

    def answered(self, request: Message, kind: str) -> bool:
        """Leave what was made for an answer to the caller."""
        answer, self._answer = self._answer, None
        if answer is not None:
            if kind == "COMPLETION":
                self._kept = answer.hand_over()
            else:
                answer.discard()
        if request.get("requestType") != "EXECUTE":
            return True
        self.completed = kind == "COMPLETION"
        return not self._once

    def failure(self, error: BaseException) -> Reply:
        """Return what a response says of an error: without the worker's own calls."""
        _without_own_calls(error)
        return super().failure(error)

    def close(self) -> None:
        """Remove what was made for an answer that nobody got."""
        if self._answer is not None:
            self._answer.discard()


def _without_own_calls(error: BaseException | None) -> None:
    """Take this package's calls off the begin of the tracebacks of an error and its causes."""
    while error is not None:
        place = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename.startswith(_HERE):
            place = place.tb_next
        error.__traceback__ = place
        error = error.__cause__ or error.__context__


def _asked(request: Message, name: str) -> Any:
    if request.get(name) is None:
        raise ValueError(f"{name} is missing in {sorted(request)}")
    return request[name]


def _checked(request: Message, name: str, kind: type) -> Any:
    """Return an entry of a request, which may be missing."""
    value = request.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a JSON {_JSON[kind]}, got {type(value).__name__}")
    return value


_JSON: dict[type, str] = {dict: "object", list: "array"}


def _copied(value: Any) -> Any:
    """Return a description whose arrays do not change when the caller's do."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.copy() if isinstance(value, np.ndarray) else value


# ---------------------------------------------------------------------- the program


def work(*, init: str | None = None, once: bool = False) -> int:
    """Answer requests from standard input until it ends, and return the exit status.

    Parameters
    ----------
    init : str, optional
        Code that runs first; all scripts and functions see the names that it binds.
    once : bool
        Whether to end with the first task. The status is 1 then, unless that was completed.
    """

    def end(number: int, frame: Any) -> None:
        raise Interrupted

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    runner = LinesRunner(init, once)
    try:
        serve(runner, end_with_parent=False)
    except Interrupted:
        return _INTERRUPTED
    finally:
        runner.close()
    return int(once and not runner.completed)


def main() -> None:
    """Work as JSON on the command line says, if any, behind this package's folder."""
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    sys.exit(work(**options))
