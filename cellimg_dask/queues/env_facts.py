"""What the Python of an environment is, found by asking it."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellimg_dask.blocks.errors import EnvError

__all__ = ["Facts", "check", "known_facts"]

_PYTHON = (3, 9)
_NUMPY = (1, 20)
_PATIENCE_S = 120.0
_MARK = "cellimg environment: "
# For any Python, so that it can say that it is too old.
_PROGRAM = r"""
import sys
sys.path[:] = [place for place in sys.path if place]
import json, os
facts = {"version": list(sys.version_info[:3]), "executable": sys.executable}
try:
    import numpy
    facts["numpy"] = str(numpy.__version__)
except ImportError as error:
    facts["numpy_error"] = str(error)
found = set()
for place in sys.path:
    if os.path.isdir(place):
        for name in os.listdir(place):
            if name.endswith((".dist-info", ".egg-info", ".egg-link")):
                found.add(name.rpartition(".")[0])
facts["installed"] = sorted(found)
sys.stdout.write("\ncellimg environment: " + json.dumps(facts) + "\n")
"""

known_facts: dict[Any, Facts] = {}
"""Of the environments that this process has used."""


@dataclass(frozen=True)
class Facts:
    """What an environment's Python is."""

    executable: str
    version: tuple[int, ...]
    numpy: str
    """Version."""
    installed: tuple[str, ...]
    """Names and versions of distributions."""


def check(title: str, command: Sequence[str], variables: Mapping[str, str]) -> Facts:
    """Ask a Python what it is.

    Parameters
    ----------
    title : str
        How messages call the environment.
    command : sequence of str
        What starts its Python.
    variables : mapping of str to str
        All environment variables for it.

    Raises
    ------
    EnvError
        If it does not start, or is too old, or has no NumPy or one that is too old.
    """
    words = shlex.join(command)
    try:
        done = subprocess.run(
            [*command, "-c", _PROGRAM],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            env=dict(variables),
        )
    except OSError as error:
        raise EnvError(f"{title} does not start: {words}: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise EnvError(f"{title} says nothing for {_PATIENCE_S:g} s: {words}") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        said = done.stderr.strip()[-2000:]
        raise EnvError(
            f"{title} is no Python that works: {words} ended with exit code {done.returncode}"
            + (f":\n{said}" if said else "")
        )
    found = json.loads(lines[-1][len(_MARK) :])
    version = tuple(found["version"])
    shown = ".".join(map(str, version))
    if version[:2] < _PYTHON:
        raise EnvError(
            f"{title} has Python {shown}, at {found['executable']}; blocks need Python "
            f"{'.'.join(map(str, _PYTHON))} or later"
        )
    install = f"{shlex.quote(found['executable'])} -m pip install 'numpy>={_NUMPY[0]}.{_NUMPY[1]}'"
    if "numpy" not in found:
        raise EnvError(
            f"{title}, Python {shown}, has no NumPy, which blocks need ({found['numpy_error']}): "
            f"{install}"
        )
    major, minor = (int("".join(filter(str.isdigit, n))) for n in found["numpy"].split(".")[:2])
    if (major, minor) < _NUMPY:
        raise EnvError(f"{title} has NumPy {found['numpy']}, which is too old: {install}")
    return Facts(found["executable"], version, found["numpy"], tuple(found["installed"]))
