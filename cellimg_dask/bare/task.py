"""What a function that runs in a worker can say of how far it is, and ask."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

__all__ = ["Task", "TaskCancelledError"]


class TaskCancelledError(CancelledError):
    """Nobody wants the result of the running task any more."""


class Task:
    """The task that runs: a block, or a script.

    Functions that have a parameter named ``task`` are given it.

    Parameters
    ----------
    report : callable
        Takes what `update` says, as a dict.
    ask : callable
        Returns whether the task was cancelled.
    """

    def __init__(self, report: Callable[[dict[str, Any]], None], ask: Callable[[], bool]) -> None:
        self._report = report
        self._ask = ask
        self.outputs: dict[str, Any] = {}
        """What a script leaves here is its result."""

    def update(
        self,
        message: str | None = None,
        current: float | None = None,
        maximum: float | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        """Tell the caller how far the task is.

        Parameters
        ----------
        message : str, optional
            For people.
        current, maximum : number, optional
            So much is done, of so much.
        info : dict, optional
            Anything else, of JSON's types.
        """
        said = {
            "message": None if message is None else str(message),
            "current": _number(current),
            "maximum": _number(maximum),
            "info": info,
        }
        self._report({name: value for name, value in said.items() if value is not None})

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the result any more."""
        return self._ask()

    @property
    def cancel_requested(self) -> bool:
        """The same, as Appose's scripts call it."""
        return self._ask()

    def raise_if_cancelled(self) -> None:
        """End the task if nobody wants the result any more.

        Raises
        ------
        TaskCancelledError
            Then; it is not an error of the block.
        """
        if self._ask():
            raise TaskCancelledError


def _number(value: Any) -> Any:
    # NumPy's numbers are none of JSON's.
    item = getattr(value, "item", None)
    return value if item is None else item()
