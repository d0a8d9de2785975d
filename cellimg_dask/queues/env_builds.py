"""Environments that Appose makes, once on a machine."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellimg_dask.blocks.errors import EnvError, describe

__all__ = ["Built", "folder_of_builds", "make"]

_DONE = "cellimg.json"
_EXTRA = 'pip install "cellimg-dask[env]"'


@dataclass(frozen=True)
class Built:
    """How to use an environment that is there."""

    command: tuple[str, ...]
    """What starts its Python."""
    paths: tuple[str, ...] = ()
    """Folders of programs, to come first."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables for its processes."""


def folder_of_builds() -> Path:
    """Return the folder in which Appose keeps environments."""
    given = os.environ.get("APPOSE_ENVS_DIR")
    return Path(given) if given else Path.home() / ".local" / "share" / "appose"


def make(
    folder: Path,
    spec: Mapping[str, Any],
    *,
    title: str,
    variables: Mapping[str, str],
    download: bool,
    quiet: bool,
) -> Built:
    """Return an environment, made if it is not there.

    Parameters
    ----------
    folder : Path
        Where it is or comes to be.
    spec : mapping
        What it is made from: the fields of an `Env`.
    title : str
        How messages call it.
    variables : mapping of str to str
        For the tool that makes it.
    download : bool
        Whether Appose may download that tool.
    quiet : bool
        Whether nothing is shown.

    Raises
    ------
    EnvError
        If it cannot be made.

    Notes
    -----
    Threads and processes that want it at the same time wait for one of them. What was left behind
    half made is made anew.
    """
    built = _known(folder)
    if built is not None:
        return built
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _Report(title, quiet) as report, _alone(folder.with_suffix(".lock"), report):
        built = _known(folder)
        if built is None:
            appose = _appose(title)
            _hand_over_tool(spec["kind"], title, download=download)
            # Whoever made it did not get to the end.
            shutil.rmtree(folder, ignore_errors=True)
            built = _build(appose, folder, spec, title, variables, report)
            _write(folder / _DONE, built)
    return built


def _known(folder: Path) -> Built | None:
    try:
        found = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        return Built(tuple(found["command"]), tuple(found["paths"]), dict(found["variables"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, built: Built) -> None:
    text = json.dumps(
        {"command": built.command, "paths": built.paths, "variables": built.variables}
    )
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _appose(title: str) -> Any:
    try:
        return importlib.import_module("appose")
    except ImportError as error:
        raise EnvError(f"{title} is made with Appose, which is not installed: {_EXTRA}") from error


def _build(
    appose: Any,
    folder: Path,
    spec: Mapping[str, Any],
    title: str,
    variables: Mapping[str, str],
    report: _Report,
) -> Built:
    kind = spec["kind"]
    if kind == "uv":
        builder = appose.uv().python(_wanted_python(spec["python"]))
        # As a file: from a list Appose would add itself, which is not needed there.
        builder.content("\n".join(spec["pip"]) + "\n").scheme("requirements.txt")
    elif kind == "conda":
        builder = appose.mamba().content(spec["content"] or _conda_file(spec))
        builder.scheme("environment.yml")
    elif spec["content"]:
        builder = appose.pixi().content(spec["content"]).scheme(spec["scheme"])
    else:
        builder = appose.pixi().conda(*spec["packages"]).channels(*spec["channels"])
        # It refuses lists without itself.
        builder.pypi("appose", *spec["pip"])
    builder.base(folder).env(**variables)
    builder.subscribe_output(report.line).subscribe_error(report.line)
    builder.subscribe_progress(report.step)
    try:
        made = builder.build()
    except Exception as error:
        cause = error.__cause__
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        text = describe(cause or error)
        # Appose says what the tool said on standard error, if it was that.
        if report.last and report.last[-1] not in text:
            text = "\n".join([text, *report.last])
        raise EnvError(f"{title} could not be made: {text}") from error
    paths = tuple(map(str, made.bin_paths()))
    names = ("python.exe", "python") if os.name == "nt" else ("python",)
    python = next((Path(p, n) for p in paths for n in names if Path(p, n).exists()), None)
    launch = tuple(map(str, made.launch_args()))
    if not launch and python is None:
        raise EnvError(f"{title} was made without a Python, in {folder}")
    own = {"VIRTUAL_ENV": str(folder)} if kind == "uv" else {}
    # What starts it makes it active, and finds its Python then.
    return Built((*launch, "python") if launch else (str(python),), paths, own)


def _wanted_python(version: str) -> str:
    """Return what tells uv the Python: this very one, if it is of the version."""
    here = "{}.{}".format(*sys.version_info)
    return sys.executable if version == here and sys.executable else version


def _conda_file(spec: Mapping[str, Any]) -> str:
    # Strings of JSON are strings of YAML.
    lines = ["channels:", *(f"  - {json.dumps(channel)}" for channel in spec["channels"])]
    lines += ["dependencies:", *(f"  - {json.dumps(package)}" for package in spec["packages"])]
    if spec["pip"]:
        lines += ['  - "pip"', "  - pip:", *(f"      - {json.dumps(p)}" for p in spec["pip"])]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------ tools


_TOOLS = {
    "uv": ("uv", "appose.tool.uv", "Uv"),
    "conda": ("micromamba", "appose.tool.mamba", "Mamba"),
    "pixi": ("pixi", "appose.tool.pixi", "Pixi"),
}


def _hand_over_tool(kind: str, title: str, *, download: bool) -> None:
    """Put the tool where Appose looks for it; else Appose would download one."""
    name, module, tool = _TOOLS[kind]
    wanted = getattr(importlib.import_module(module), tool)()
    # Where it runs.
    Path(wanted.rootdir).mkdir(parents=True, exist_ok=True)
    place = Path(wanted.command)
    if place.exists():
        return
    found = _tool(name)
    if found is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        try:
            new.symlink_to(found)
        except OSError:
            shutil.copy2(found, new)
        # Also where there is a link to what is gone.
        new.replace(place)
    elif not download:
        get = f"{_EXTRA}, which has it" if kind == "uv" else f"install {name}"
        raise EnvError(
            f"{title} is made with {name}, which is not on PATH: {get}, or let it be downloaded: "
            f"Env.{kind}(…, download=True)"
        )


def _tool(name: str) -> str | None:
    found = shutil.which(name)
    if found is None and name == "uv":
        # The package of PyPI has the program in the folder of this Python, which need not be on
        # PATH.
        with suppress(Exception):
            found = str(importlib.import_module("uv").find_uv_bin())
    if found is None and name == "micromamba":
        given = os.environ.get("MAMBA_EXE", "")
        found = given if "micromamba" in Path(given).name and Path(given).is_file() else None
    return found


# ------------------------------------------------------------------------------ progress, lock


class _Report:
    """Shows on standard error what is being done; a context manager.

    Nothing is shown where nothing is to be made.
    """

    def __init__(self, title: str, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._bar: Any = None
        self.last: deque[str] = deque(maxlen=20)
        """The latest lines."""

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def line(self, text: str) -> None:
        """Show what the tool says."""
        text = text.strip()
        if text:
            self.last.append(text)
            self._show(text)

    def step(self, what: str, current: int, maximum: int) -> None:
        """Show how far it is with something."""
        self._show(f"{what} {current / maximum:.0%}" if maximum > 0 else what)

    def _show(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr, leave=False)
        self._bar.set_description_str(f"{self._title}: {text}"[:200])


@contextmanager
def _alone(path: Path, report: _Report) -> Iterator[None]:
    """Hold a lock file, which the system lets go of when the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor, wait=False):
            report.line("another process is making it")
            _lock(descriptor, wait=True)
        yield
    finally:
        # The file stays: to remove it would let two others lock different files.
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            locking: Any = msvcrt
            while True:
                try:
                    locking.locking(descriptor, locking.LK_LOCK if wait else locking.LK_NBLCK, 1)
                    return True
                except OSError:
                    if not wait:
                        return False
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
