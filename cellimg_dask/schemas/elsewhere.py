"""Asking the Python of another environment what the signature of a function says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cellimg_dask import bare

__all__ = ["Environment", "described_in"]

_PROGRAM = """
import sys
if sys.version_info < (3, 9):
    sys.exit("Python %d.%d is too old: 3.9 or newer is needed" % sys.version_info[:2])
# As for workers: modules in the working directory do not stand before those of the environment.
sys.path[:] = [path for path in sys.path if path]
try:
    import numpy
except ImportError as error:
    sys.exit("NumPy is needed there, and there is none: %s" % error)
import types
package = types.ModuleType("cellimg_worker")
package.__path__ = [sys.argv[1]]
sys.modules["cellimg_worker"] = package
from cellimg_worker.describe import answer
answer(sys.argv[2])
"""
_KINDS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        ImportError,
        FileNotFoundError,
        AttributeError,
        SyntaxError,
        TypeError,
        ValueError,
    )
}


class Environment(Protocol):
    """Another Python."""

    def command(self) -> Sequence[str]:
        """Return the words that start it."""
        ...

    def variables(self) -> Mapping[str, str]:
        """Return the environment variables for its processes."""
        ...


def described_in(env: Environment, function: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Return what the signature of a function says, as a Python of that environment sees it.

    Parameters
    ----------
    env : Environment
        With Python 3.9 or newer and NumPy.
    function : mapping
        As `cellimg_dask.bare.functions` describes functions.
    timeout_s : float
        How long importing may take.

    Raises
    ------
    ImportError, FileNotFoundError, AttributeError, SyntaxError, TypeError, ValueError
        As the other Python says.
    TimeoutError
        If it takes longer.
    RuntimeError
        If that Python dies, or cannot run this at all.
    """
    command = [*env.command(), "-c", _PROGRAM, bare.__path__[0], json.dumps(function)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            env=dict(env.variables()),
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"{command[0]} did not describe the function within {timeout_s} s; does importing it "
            f"wait for something?"
        ) from None
    try:
        content = json.loads(done.stdout)
    except ValueError:
        tail = "\n".join(done.stderr.splitlines()[-10:])
        raise RuntimeError(
            f"{command[0]} ended with exit code {done.returncode} and did not describe the "
            f"function:\n{tail}"
        ) from None
    failed = content.get("failed")
    if failed is None:
        described: dict[str, Any] = content["described"]
        return described
    kind = next((_KINDS[name] for name in failed["kinds"] if name in _KINDS), RuntimeError)
    error = kind(f"{failed['message']} (in {command[0]})")
    error.add_note(f"In {command[0]}:\n{failed['traceback']}")
    raise error
