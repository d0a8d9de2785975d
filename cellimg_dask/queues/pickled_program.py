"""Worker processes that are the same Python, with this package."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping

import cloudpickle

from cellimg_dask.bare.wire import Message
from cellimg_dask.blocks.errors import CellimgError, InitError
from cellimg_dask.blocks.worker import Init

__all__ = ["PickledProgram"]

# Modules are found where this process finds them.
_PICKLED = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from cellimg_dask.queues.process_worker import main; main()"
)


class PickledProgram:
    """The same Python, with this package: functions and blocks travel pickled.

    Raises
    ------
    InitError
        If ``init`` cannot be pickled.
    """

    advice = "define it in a module that can be imported there, or use BlockCode"

    def __init__(self, init: Init) -> None:
        try:
            self._init: bytes = cloudpickle.dumps(init)
        except Exception as error:
            raise InitError(f"init cannot be sent to a process: {error}") from error

    def command(self) -> list[str]:
        """Return what starts Python as this process was started; see `Program`."""
        optimize = ["-" + "O" * sys.flags.optimize] if sys.flags.optimize else []
        warnings = [f"-W{option}" for option in sys.warnoptions]
        # Only text is looked at by Python itself.
        paths = [path for path in sys.path if isinstance(path, str)]
        return [sys.executable, *optimize, *warnings, "-c", _PICKLED, *paths]

    def variables(self) -> Mapping[str, str] | None:
        """Return None: those of this process; see `Program`."""
        return None

    def explain(self) -> None:
        """Do nothing: it is the Python that runs here; see `Program`."""

    def greeting(self) -> tuple[Message, tuple[bytes, ...]]:
        """Return the first request; see `Program`."""
        return {"requestType": "INIT"}, (self._init,)

    def error(self, response: Message, attached: list[bytes], asked: str) -> BaseException:
        """Return an error as it was raised; see `Program`."""
        text = response["error"]
        try:
            error: BaseException = pickle.loads(attached[0])
        except (Exception, SystemExit):
            # Its class is known there only, or cannot be made anew.
            return CellimgError(f"in the worker process:\n{text}")
        error.add_note(f"In the worker process:\n{text}")
        return error
