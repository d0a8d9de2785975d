"""Other Pythons: those of this machine, and environments that tests make with pip."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

OLD_NUMPY = {(3, 9): "1.20.3", (3, 10): "1.21.6", (3, 11): "1.23.5", (3, 12): "1.26.4"}
"""The oldest NumPy of which there are wheels, by Python."""


@cache
def installed() -> dict[tuple[int, int], str]:
    """Return one CPython of each version from 3.9 on, as found on PATH and where pyenv has them."""
    found: dict[tuple[int, int], str] = {}
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python3.{minor}") for minor in range(9, 20)]
    candidates += map(str, sorted(folder.glob("3.*/bin/python")))
    for candidate in filter(None, candidates):
        code = "import sys; print(*sys.version_info[:2], sys.implementation.name)"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        words = done.stdout.split()
        if done.returncode == 0 and words[2:] == ["cpython"] and words[0] == "3":
            version = (3, int(words[1]))
            if version >= (3, 9):
                found.setdefault(version, candidate)
    found[sys.version_info[:2]] = sys.executable
    return found


def oldest() -> tuple[str, str]:
    """Return the oldest Python, and a NumPy of another major version that it can have."""
    versions = installed()
    version = min(versions)
    return versions[version], OLD_NUMPY.get(version, "2.1.3")


class NoEnvironmentError(RuntimeError):
    """An environment could not be made; the message says why."""


def make_environment(folder: Path, python: str, requirements: Sequence[str]) -> str:
    """Return the Python of an environment that has some packages, made once.

    Parameters
    ----------
    folder : Path
        Where such environments are kept. Several processes may ask at once.
    python : str
        The Python that it is made from.
    requirements : sequence of str
        What pip installs, such as ``"numpy==1.26.4"``.

    Raises
    ------
    NoEnvironmentError
        If that fails, for instance where pip reaches no index.
    """
    words = json.dumps([os.path.realpath(python), *requirements])
    place = folder / hashlib.sha256(words.encode()).hexdigest()[:16]
    made = place / "made"
    # Not tried again in this run; all its processes have the same number.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    failed = folder / f"{place.name}.failed.{run}"
    with locked(folder / f"{place.name}.lock"):
        if failed.exists():
            raise NoEnvironmentError(failed.read_text())
        if not (made.exists() and _python_in(place).exists()):
            shutil.rmtree(place, ignore_errors=True)
            try:
                _build(place, python, requirements)
            except NoEnvironmentError as error:
                failed.write_text(str(error))
                raise
            made.touch()
    return str(_python_in(place))


def _build(place: Path, python: str, requirements: Sequence[str]) -> None:
    install = [
        *("install", "--quiet", "--no-input", "--no-compile", "--disable-pip-version-check"),
        *("--only-binary", ":all:", "--retries", "1", "--timeout", "20", *requirements),
    ]
    inside = str(_python_in(place))
    try:
        # With the pip of this Python, in a third of the time.
        _run([python, "-m", "venv", "--without-pip", str(place)])
        _run([sys.executable, "-m", "pip", "--python", inside, *install])
    except NoEnvironmentError:
        _run([python, "-m", "venv", "--clear", str(place)])
        _run([inside, "-m", "pip", *install])


def _python_in(place: Path) -> Path:
    return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _run(command: list[str]) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=clean)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoEnvironmentError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise NoEnvironmentError(f"{' '.join(command)}: {' '.join(last)}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if os.name != "nt":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
