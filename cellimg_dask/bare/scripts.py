"""Scripts that other programs send, and what they leave behind."""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import linecache
from collections.abc import Callable
from types import CodeType
from typing import Any

from .answers import plain
from .task import Task, TaskCancelledError

__all__ = ["GivenUpError", "ScriptTask", "Scripts"]


class GivenUpError(Exception):
    """A script has called ``task.fail``."""


class ScriptTask(Task):
    """The task that a script, or a function that was called by another program, sees."""

    def __init__(self, report: Callable[[dict[str, Any]], None], ask: Callable[[], bool]) -> None:
        super().__init__(lambda said: report(plain(said)), ask)
        self.exports: dict[str, Any] = {}
        """What is left for later scripts."""
        self._gives_up: Exception | None = None

    def export(self, **names: Any) -> None:
        """Leave values for later scripts of this process, which see them as globals."""
        self.exports.update(names)

    def cancel(self) -> None:
        """Say that the task has ended early as it was asked to; the script ends by itself."""
        self._gives_up = TaskCancelledError()

    def fail(self, error: str | None = None) -> None:
        """Say that the task has failed; the script ends by itself."""
        self._gives_up = GivenUpError("the script failed" if error is None else str(error))

    def check(self) -> None:
        """Raise what `cancel` or `fail` said."""
        if self._gives_up is not None:
            raise self._gives_up


class Scripts:
    """Runs scripts.

    Attributes
    ----------
    exports : dict
        What earlier ones have left.
    """

    def __init__(self) -> None:
        self.exports: dict[str, Any] = {}
        self._numbers = itertools.count()

    def run(self, text: str, names: dict[str, Any], task: ScriptTask) -> None:
        """Run a script; its result is in the task's outputs.

        Parameters
        ----------
        text : str
            Statements. The value of the last one, if it is an expression, is the output
            ``result``, or, if it is a dict, all outputs that it has.
        names : dict
            What it sees as globals, besides what others have left.
        task : ScriptTask
            It sees as ``task``.
        """
        statements, last = _compiled(text)
        space = {"__name__": "__worker__", **self.exports, "task": task, **names}
        task.exports = self.exports
        exec(statements, space)
        result = None if last is None else eval(last, space)
        task.check()
        if isinstance(result, dict):
            task.outputs.update(result)
        elif result is not None:
            task.outputs["result"] = result

    def keep(self, value: Any) -> str:
        """Leave a value for later scripts, and return its name."""
        name = f"kept_{next(self._numbers)}"
        self.exports[name] = value
        return name


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> tuple[CodeType, CodeType | None]:
    """Return the statements of a script, and the expression at its end."""
    filename = f"<script {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
    # Tracebacks show the lines.
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    tree: Any = compile(text, filename, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        end = ast.Expression(tree.body[-1].value)
        del tree.body[-1]
        last = compile(end, filename, "eval", dont_inherit=True)
    return compile(tree, filename, "exec", dont_inherit=True), last
