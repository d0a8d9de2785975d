"""Worker processes that are the Python of another environment."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cellimg_dask import bare
from cellimg_dask.bare.trees import with_attached
from cellimg_dask.bare.wire import Message
from cellimg_dask.blocks.errors import CellimgError, InitError, RemoteError
from cellimg_dask.queues.environments import Env

__all__ = ["EnvProgram", "bare_options"]

# The folder is a package by a name of its own: the environment may have another version of this
# one. Modules in the working directory must not stand before those of the environment, nor Python's
# own.
_BARE = (
    "import sys; sys.version_info >= (3, 9) or sys.exit('Python is too old'); "
    "sys.path[:] = [path for path in sys.path if path]; "
    "import types; package = types.ModuleType('cellimg_worker'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['cellimg_worker'] = package; "
    "from cellimg_worker.{} import main; main()"
)


def bare_options(module: str) -> list[str]:
    """Return what makes any Python with NumPy run ``main`` of a module of `bare`."""
    return ["-c", _BARE.format(module), str(Path(bare.__file__).parent)]


class EnvProgram:
    """The Python of another environment, which has no more than NumPy.

    Parameters
    ----------
    env : Env
        The environment.
    init : dict or None
        Description of what runs in it first.
    """

    advice = (
        "install what it needs in that environment, write it for the Python there, or name a "
        "function that is there"
    )

    def __init__(self, env: Env, init: Mapping[str, Any] | None) -> None:
        self.env = env
        self._init = init

    def command(self) -> list[str]:
        """Return what starts the environment's Python; see `Program`."""
        # Workers refuse what cannot be used, and only then it is worth another start to say why.
        return [*self.env.command(checked=False), *bare_options("runner")]

    def variables(self) -> Mapping[str, str] | None:
        """Return the environment's own, and of this process' those that do no harm there."""
        return self.env.variables()

    def explain(self) -> None:
        """Raise what is wrong with the environment, if anything is; see `Program`."""
        self.env.facts()

    def greeting(self) -> tuple[Message, tuple[bytes, ...]]:
        """Return the first request; see `Program`."""
        init, attached = with_attached(self._init)
        return {"requestType": "INIT", "init": init}, attached

    def error(self, response: Message, attached: list[bytes], asked: str) -> BaseException:
        """Return an error of the same kind, where that is a builtin one; see `Program`."""
        kind, message, text = response["kind"], response["message"], response["error"]
        error: BaseException
        known: Any = getattr(builtins, kind, None)
        if asked == "INIT" or kind == "InitError":
            error = InitError(message)
        elif asked == "DEFINE":
            error = CellimgError(f"{kind}: {message}")
        elif isinstance(known, type) and issubclass(known, Exception):
            error = _made_anew(known, response) or RemoteError(f"{kind}: {message}")
        else:
            error = RemoteError(f"{kind}: {message}")
        error.add_note(f"In {self.env!r}:\n{text}")
        return error


def _made_anew(kind: Any, response: Message) -> Exception | None:
    """Return a builtin error that says what it said there; None if that cannot be."""
    message = response["message"]
    # A KeyError shows what is missing in quotes.
    for args in (response.get("args", [message]), [message]):
        with suppress(Exception):
            error: Exception = kind(*args)
            if str(error) == message or args == [message]:
                return error
    return None
