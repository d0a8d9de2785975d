"""Other Python environments, in which the blocks of a queue may run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cellimg_dask.queues.env_builds import Built, folder_of_builds, make
from cellimg_dask.queues.env_facts import Facts, check, known_facts

__all__ = ["Env"]

_OF_PYTHON = frozenset(
    (
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONFAULTHANDLER",
        "PYTHONHASHSEED",
        "PYTHONIOENCODING",
        "PYTHONUNBUFFERED",
        "PYTHONUTF8",
    )
)
"""What may be set for any Python; others say where this one looks for modules and such."""
_THREADS = re.compile(r"(OMP|MKL|OPENBLAS|GOTO|BLIS|NUMEXPR|NUMBA|VECLIB)_(NUM|MAX\w*)_THREADS")
_OF_ENVIRONMENTS = re.compile(r"_?(CONDA|MAMBA|PIXI)_.*|VIRTUAL_ENV.*|__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Env:
    """A Python environment, which `BlockQueue` starts its workers in: ``BlockQueue(2, env=env)``.

    It needs Python 3.9 or later with NumPy 1.20 or later, and nothing of this library. Made by
    `Env.current`, `Env.venv`, `Env.uv`, `Env.conda`, `Env.pixi`. Those of the last three are made
    on first use, once on each machine, and kept in the folder of environments of Appose
    (``$APPOSE_ENVS_DIR``, by default ``~/.local/share/appose``); this needs the extra
    ``cellimg-dask[env]``.

    Notes
    -----
    Equal, and hashed, by what it is described by, and pickled as that; on another machine it is
    found or made again. Processes get the environment variables of this one without those that
    belong to its own Python: paths, active environments and numbers of threads.

    Examples
    --------
    >>> Env.current().command() == [sys.executable]
    True
    """

    kind: str
    """``"current"``, ``"venv"``, ``"uv"``, ``"conda"`` or ``"pixi"``."""
    executable: str = ""
    """Of a venv: its Python."""
    python: str = ""
    """For uv: the version wanted."""
    packages: tuple[str, ...] = ()
    """Of conda."""
    pip: tuple[str, ...] = ()
    """Of PyPI."""
    channels: tuple[str, ...] = ()
    """Of conda."""
    content: str = ""
    """Of the file that describes it."""
    scheme: str = ""
    """What kind of file that is."""
    added: tuple[tuple[str, str], ...] = ()
    """Environment variables for its processes."""
    download: bool = field(default=False, compare=False)
    """Whether Appose may download the tool that makes it."""
    quiet: bool = field(default=False, compare=False)
    """Whether nothing is shown while it is made."""

    # ------------------------------------------------------------------ constructors

    @classmethod
    def current(cls, *, variables: Mapping[str, str] | None = None) -> Env:
        """Return the environment of this process, with its environment variables.

        Parameters
        ----------
        variables : mapping of str to str, optional
            Environment variables in addition.
        """
        return cls("current", added=_variables(variables))

    @classmethod
    def venv(cls, path: str | Path, *, variables: Mapping[str, str] | None = None) -> Env:
        """Return an environment that exists: of ``venv``, virtualenv, uv or conda.

        Parameters
        ----------
        path : path
            Its folder, or its Python, for instance ``".venv"`` or ``"/usr/bin/python3.9"``.
        variables : mapping of str to str, optional
            Environment variables for its processes.

        Raises
        ------
        FileNotFoundError
            If there is no such folder or file.
        ValueError
            If there is no Python in it.
        """
        # Not resolved: the Python of a venv is a link to another one, and is told by its place.
        place = Path(os.path.normpath(Path(path).expanduser().absolute()))
        if place.is_dir():
            inside = [place / name for name in _PYTHONS]
            found = next((python for python in inside if python.is_file()), None)
            if found is None:
                raise ValueError(
                    f"{place} is no Python environment: it has no {_PYTHONS[0]}; make one with "
                    f"python -m venv {place}"
                )
            place = found
        elif not place.is_file():
            raise FileNotFoundError(
                f"there is no environment {place}; make one with python -m venv {place}"
            )
        elif not os.access(place, os.X_OK):
            raise ValueError(f"{place} is neither the folder of an environment nor a Python")
        return cls("venv", executable=str(place), added=_variables(variables))

    @classmethod
    def uv(
        cls,
        python: str | None = None,
        pip: Iterable[str] = (),
        *,
        variables: Mapping[str, str] | None = None,
        download: bool = False,
        quiet: bool = False,
    ) -> Env:
        """Return an environment with packages of PyPI, which ``uv`` makes on first use.

        Parameters
        ----------
        python : str, optional
            Its version, such as ``"3.10"``; default: that of this process. ``uv`` looks for it on
            this machine, and else downloads it.
        pip : sequence of str
            Packages as ``pip install`` takes them, such as ``"torch==2.5"``; NumPy is added.
        variables : mapping of str to str, optional
            Environment variables for its processes, and for ``uv``.
        download : bool
            Whether Appose may download ``uv`` where there is none.
        quiet : bool
            Whether nothing is shown while it is made.
        """
        version = "{}.{}".format(*sys.version_info) if python is None else python
        return cls(
            "uv",
            python=_text(version, "python"),
            pip=_with(_texts(pip, "pip"), "numpy"),
            added=_variables(variables),
            download=download,
            quiet=quiet,
        )

    @classmethod
    def conda(
        cls,
        file: str | Path | None = None,
        *,
        packages: Iterable[str] = (),
        pip: Iterable[str] = (),
        channels: Iterable[str] = ("conda-forge",),
        variables: Mapping[str, str] | None = None,
        download: bool = False,
        quiet: bool = False,
    ) -> Env:
        """Return an environment with packages of conda, which ``micromamba`` makes on first use.

        Parameters
        ----------
        file : path, optional
            An ``environment.yml``, in place of packages and channels.
        packages : sequence of str
            Of conda, such as ``"python=3.10"``; Python and NumPy are added.
        pip : sequence of str
            Of PyPI, in addition.
        channels : sequence of str
            Where the packages are from.
        variables, download, quiet
            As for `Env.uv`.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        """
        if file is not None:
            content = _read(file, packages, pip)
            return cls(
                "conda",
                content=content,
                scheme="environment.yml",
                added=_variables(variables),
                download=download,
                quiet=quiet,
            )
        return cls(
            "conda",
            packages=_with(_texts(packages, "packages"), "python", "numpy"),
            pip=_texts(pip, "pip"),
            channels=_texts(channels, "channels"),
            added=_variables(variables),
            download=download,
            quiet=quiet,
        )

    @classmethod
    def pixi(
        cls,
        file: str | Path | None = None,
        *,
        packages: Iterable[str] = (),
        pip: Iterable[str] = (),
        channels: Iterable[str] = ("conda-forge",),
        variables: Mapping[str, str] | None = None,
        download: bool = False,
        quiet: bool = False,
    ) -> Env:
        """Return an environment with packages of conda and PyPI, made by ``pixi`` on first use.

        Parameters
        ----------
        file : path, optional
            A ``pixi.toml``, ``pyproject.toml`` or ``environment.yml``, in place of packages and
            channels.
        packages, pip, channels, variables, download, quiet
            As for `Env.conda`.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        """
        if file is not None:
            name = Path(file).name
            scheme = name if name == "pyproject.toml" else "pixi.toml"
            return cls(
                "pixi",
                content=_read(file, packages, pip),
                scheme="environment.yml" if name.endswith((".yml", ".yaml")) else scheme,
                added=_variables(variables),
                download=download,
                quiet=quiet,
            )
        return cls(
            "pixi",
            packages=_with(_texts(packages, "packages"), "python", "numpy"),
            pip=_texts(pip, "pip"),
            channels=_texts(channels, "channels"),
            added=_variables(variables),
            download=download,
            quiet=quiet,
        )

    # ------------------------------------------------------------------ use

    def command(self, *, checked: bool = True) -> list[str]:
        """Return the words that start its Python; what does not exist yet is made.

        Parameters
        ----------
        checked : bool
            Whether to look first, by starting it, if it is one that can be used.

        Raises
        ------
        EnvError
            If it cannot be made, or is no Python 3.9 or later with NumPy.
        """
        if checked:
            self.facts()
        return list(self._built().command)

    def variables(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return all environment variables for its processes, ``extra`` ones included."""
        variables = dict(os.environ)
        if self.kind != "current":
            built = self._built()
            variables = _cleaned(variables)
            paths = [*built.paths, *filter(None, [variables.get("PATH")])]
            variables["PATH"] = os.pathsep.join(paths)
            variables["PYTHONNOUSERSITE"] = "1"
            variables |= built.variables
        return variables | dict(self.added) | dict(extra or {})

    def facts(self) -> Facts:
        """Return what its Python is; looked up once in this process.

        Raises
        ------
        EnvError
            As `command`.
        """
        known = known_facts.get(self)
        if known is None:
            known = check(str(self), self._built().command, self.variables())
            known_facts[self] = known
        return known

    @property
    def token(self) -> str:
        """What results depend on.

        Of an environment that is made: what it is made from. Of one that exists: its Python, and
        names and versions of what is installed there.
        """
        spec: list[Any] = [self._spec()]
        if self.kind in ("current", "venv"):
            facts = self.facts()
            spec += [facts.executable, facts.version, facts.installed]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:32]

    def _spec(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.compare}

    def _built(self) -> Built:
        if self.kind == "current":
            return Built((sys.executable,))
        if self.kind == "venv":
            return _existing(Path(self.executable))
        # Its processes' variables do not change what is installed.
        spec = {name: value for name, value in self._spec().items() if name != "added"}
        mark = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
        folder = folder_of_builds() / f"cellimg-{self.kind}-{mark}"
        return make(
            folder,
            spec,
            title=str(self),
            variables=dict(self.added),
            download=self.download,
            quiet=self.quiet,
        )

    def __repr__(self) -> str:
        if self.kind == "current":
            given = []
        elif self.kind == "venv":
            given = [repr(self.executable)]
        else:
            shown = {"file": self.scheme, "python": self.python, "packages": list(self.packages)}
            shown |= {"pip": list(self.pip), "channels": list(self.channels)}
            given = [f"{name}={value!r}" for name, value in shown.items() if value]
        if self.added:
            given.append(f"variables={dict(self.added)!r}")
        return f"Env.{self.kind}({', '.join(given)})"


_PYTHONS = (
    ("Scripts/python.exe", "python.exe") if os.name == "nt" else ("bin/python", "bin/python3")
)


def _existing(executable: Path) -> Built:
    folder = executable.parent
    prefix = folder.parent if folder.name in ("bin", "Scripts") else folder
    variables = {}
    if (prefix / "pyvenv.cfg").is_file():
        variables["VIRTUAL_ENV"] = str(prefix)
    elif (prefix / "conda-meta").is_dir():
        variables["CONDA_PREFIX"] = str(prefix)
    return Built((str(executable),), (str(folder),), variables)


def _cleaned(variables: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables without those of this process's own Python."""
    homes = [variables[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if variables.get(name)]
    left = [
        place
        for place in variables.get("PATH", "").split(os.pathsep)
        if place and not any(Path(place).is_relative_to(home) for home in homes)
    ]
    kept = {
        name: value
        for name, value in variables.items()
        if not (name.startswith("PYTHON") and name not in _OF_PYTHON)
        and not _THREADS.fullmatch(name)
        and not _OF_ENVIRONMENTS.fullmatch(name)
    }
    return kept | {"PATH": os.pathsep.join(left)}


def _with(given: tuple[str, ...], *needed: str) -> tuple[str, ...]:
    """Return packages, and those that are needed where they are not named."""
    named = {_name_of(package) for package in given}
    return (*given, *(package for package in needed if package not in named))


def _name_of(package: str) -> str:
    # Of conda it may come after a channel.
    found = re.match(r"\s*(?:[\w.-]+::)?([\w.-]+)", package)
    return re.sub(r"[-_.]+", "-", found.group(1)).lower() if found else ""


def _read(file: str | Path, packages: Iterable[str], pip: Iterable[str]) -> str:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()}")
    if tuple(packages) or tuple(pip):
        raise TypeError("give a file, or packages and pip, not both; the file names them all")
    return path.read_text(encoding="utf-8")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f'{what} must be a string, such as "3.10", got {value!r}')
    return value.strip()


def _texts(values: Any, what: str) -> tuple[str, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f'{what} must be a list of strings, such as ["scipy"], got {values!r}')
    return tuple(_text(value, f"an item of {what}") for value in values)


def _variables(given: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise TypeError(f"variables must map names to strings, got {type(given).__name__}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"variables must map names to strings, got {name!r}: {value!r}")
    return tuple(sorted(given.items()))
