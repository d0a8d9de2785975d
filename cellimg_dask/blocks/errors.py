"""What goes wrong while cells are computed.

Bad arguments are refused with the builtin that NumPy would raise (`TypeError`, `ValueError`,
`IndexError`). The classes here are for failures of a running computation; each is a
`CellimgError` and also a builtin. All of them survive pickling, with their cause, or what it says
where the cause itself does not.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

from cellimg_dask.geometry import Roi

__all__ = [
    "BlockError",
    "BlockTimeoutError",
    "CellimgError",
    "CycleError",
    "EnvError",
    "InitError",
    "NoWorkersError",
    "ParameterError",
    "QueueClosedError",
    "ReadError",
    "RemoteError",
    "ResultError",
    "SaveError",
    "SourceChangedError",
    "WorkerDiedError",
    "describe",
]


class CellimgError(Exception):
    """Base of the errors of a running computation."""

    def _fields(self) -> tuple[Any, ...]:
        return self.args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, (type(self), self._fields(), *_packed(self.__cause__))


class CellError(CellimgError):
    """An error that belongs to one cell of one image."""

    def __init__(self, function: str, position: tuple[int, ...], roi: Roi, detail: str) -> None:
        region = ", ".join(f"{low}:{high}" for low, high in zip(roi.start, roi.stop, strict=True))
        super().__init__(f"{function} at cell {position} [{region}]: {detail}")
        self.function = function
        """Name of the block function."""
        self.position = position
        """Position of the cell in its grid."""
        self.roi = roi
        """The cell's box in the image."""
        self.detail = detail
        """What went wrong."""

    def _fields(self) -> tuple[Any, ...]:
        return self.function, self.position, self.roi, self.detail

    def again(self) -> CellError:
        """Return an equal error of its own, so that each waiting thread raises another object."""
        error = type(self)(*self._fields())
        error.__cause__ = self.__cause__
        return error


def describe(error: BaseException) -> str:
    """Return type and message of an exception, also of one that cannot say what it is."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__} (its message cannot be shown)"


def _packed(cause: BaseException | None) -> tuple[bytes | None, str]:
    """Return a cause as bytes, and as text for where these cannot be read."""
    if cause is None:
        return None, ""
    import cloudpickle

    text = describe(cause)
    try:
        # An exception's class may live in a notebook, which plain pickle does not send.
        return cloudpickle.dumps(cause), text
    except Exception:
        return b"", text


def _rebuild(
    cls: type[CellimgError], fields: tuple[Any, ...], cause: bytes | None, text: str
) -> CellimgError:
    error = cls(*fields)
    if cause is not None:
        try:
            error.__cause__ = pickle.loads(cause)
        except Exception:
            # Many exceptions cannot be made anew from their arguments. The text can.
            error.__cause__ = CellimgError(text)
    return error


class BlockError(CellError, RuntimeError):
    """A block function raised; its exception is the ``__cause__``."""


class ResultError(BlockError, ValueError):
    """A block function returned something of the wrong shape, dtype or kind."""


class ReadError(CellError, OSError):
    """Reading an input of a cell failed; the store's exception is the ``__cause__``."""


class CycleError(CellError, RuntimeError):
    """A cell was asked for, directly or through others, while it was being computed."""


class RemoteError(CellimgError, RuntimeError):
    """What a function raised in another environment, of a class that is not known here.

    The text says the class, and a note has the traceback.
    """


class InitError(CellimgError, RuntimeError):
    """The ``init`` of a block function or of a queue failed; no block ran after it."""


class BlockTimeoutError(BlockError, TimeoutError):
    """A block took longer than its queue allows; its worker process was killed."""


class EnvError(CellimgError, RuntimeError):
    """Another Python environment cannot be used or made; the message says what would help."""


class WorkerDiedError(BlockError):
    """The worker process died while it computed the cell; other cells are not affected."""

    def __init__(
        self,
        function: str,
        position: tuple[int, ...],
        roi: Roi,
        detail: str,
        exit_code: int | None = None,
        stderr: str = "",
    ) -> None:
        super().__init__(function, position, roi, detail)
        self.exit_code = exit_code
        """Exit status of the process, negative for a signal; None if it is not known."""
        self.stderr = stderr
        """The last lines that the process printed or wrote to standard error."""

    def _fields(self) -> tuple[Any, ...]:
        return (*super()._fields(), self.exit_code, self.stderr)


class NoWorkersError(CellimgError, TimeoutError):
    """Workers did nothing, or were not there, for too long, or the scheduler cannot be reached."""


class SourceChangedError(CellimgError, RuntimeError):
    """What a snapshot saw is no longer there: its store was changed and holds one version only."""


class SaveError(CellimgError, OSError):
    """Changed cells could not be written to their store; they are kept in memory."""


class QueueClosedError(CellimgError, RuntimeError):
    """The queue was closed before the block was computed."""


class ParameterError(CellimgError, ValueError):
    """Parameters do not fit the block function that they are for; nothing has run.

    The message names the function and every parameter that is wrong: what was expected, and what
    came.
    """

    def __init__(self, function: str, mistakes: Mapping[str, str]) -> None:
        lines = [f"  {name}: {text}" for name, text in mistakes.items()]
        super().__init__("\n".join([f"parameters of {function}:", *lines]))
        self.function = function
        """Name of the block function."""
        self.mistakes = dict(mistakes)
        """What is wrong, by the name of the parameter, such as ``sigma`` or ``sigma[1]``."""

    def _fields(self) -> tuple[Any, ...]:
        return self.function, self.mistakes
