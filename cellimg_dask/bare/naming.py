"""Functions that are called ``module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import os
import sys
import threading
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "attribute_of",
    "file_state",
    "here",
    "import_file",
    "import_module",
    "is_file_name",
    "search_in",
    "split_name",
]


def is_file_name(place: str) -> bool:
    """Whether what stands before the colon is a file and not a module."""
    return place.endswith((".py", ".pyw"))


def split_name(name: str) -> tuple[str, str]:
    """Return module or file, and the function's name in it, which may have dots.

    Parameters
    ----------
    name : str
        ``"module:function"``, ``"path/to/file.py:function"``, ``"module:Class.function"``.

    Raises
    ------
    ValueError
        If it is not of this form; the message says what may have been meant.
    """
    place, attribute, problem = _parts(name)
    if problem:
        guess = name.strip().removesuffix("()").replace("::", ":")
        if ":" not in guess and not is_file_name(guess):
            guess = ":".join(guess.rpartition(".")[::2])
        before, _, after = guess.rpartition(":")
        if not is_file_name(before) and not _is_dotted(before):
            guess = f"{before}.py:{after}"
        hint = "" if _parts(guess)[2] else f"; did you mean {guess!r}?"
        raise ValueError(
            f'{name!r} {problem}; expected "module:function" or "path/to/file.py:function"{hint}'
        )
    return place, attribute


def _parts(name: str) -> tuple[str, str, str]:
    """Return what stands before and after the colon, and what is wrong with them."""
    place, colon, attribute = name.rpartition(":")
    if not colon or "/" in attribute or "\\" in attribute:
        # A drive of Windows has a colon too.
        return name, "", "has no colon before the name of a function"
    if not place or place == ".py":
        return place, attribute, "names no module and no file"
    if not _is_dotted(attribute):
        return place, attribute, f"has {attribute!r} where the name of a function is expected"
    if not is_file_name(place) and not _is_dotted(place):
        return place, attribute, f"has {place!r}, no module and no file ending in .py"
    return place, attribute, ""


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def here() -> str:
    """Return which Python this is, for messages."""
    version = ".".join(map(str, sys.version_info[:3]))
    return f"Python {version} at {sys.executable}"


def import_module(name: str, folders: Iterable[str] = ()) -> ModuleType:
    """Import a module; folders are searched after this Python's own paths, from now on.

    Raises
    ------
    ImportError
        If there is no such module in this Python, or it fails. The message says which Python it
        is.
    """
    search_in(folders)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            top = missing.partition(".")[0]
            what = (
                f"install the package that has it there, or name a file: 'path/to/{top}.py:…'"
                if missing == top
                else f"module {top!r} is there, at {_file_of(sys.modules.get(top))}"
            )
            raise ModuleNotFoundError(
                f"No module named {missing!r} in {here()}; {what}", name=missing
            ) from error
        raise ModuleNotFoundError(
            f"module {name!r} imports {missing!r}, which is not in {here()}", name=missing
        ) from error
    except (Exception, SystemExit) as error:
        raise ImportError(f"importing {name!r} failed with {_told(error)}", name=name) from error


_files: dict[str, tuple[tuple[int, int], ModuleType]] = {}
_lock = threading.RLock()


def import_file(path: str, *, again: bool = False) -> ModuleType:
    """Run a file, once per process unless it was changed since, and return its module.

    Its folder is searched for what it imports, after this Python's own paths.

    Parameters
    ----------
    path : str
        Absolute.
    again : bool
        Whether it is run in any case.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    SyntaxError
        If it does not compile.
    ImportError
        If it raises.
    """
    with _lock:
        state = file_state(path)
        known = _files.get(path)
        if again or known is None or known[0] != state:
            known = _files[path] = (state, _run_file(path))
        return known[1]


def file_state(path: str) -> tuple[int, int]:
    """Return size and time of change of a file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(_no_file(path))
    facts = Path(path).stat()
    return facts.st_size, facts.st_mtime_ns


class _Compiler(SourceFileLoader):
    """Reads the text of a file whenever it runs.

    Python takes compiled code for that of a file by its size and the second of its change, and so
    might run what was there before an edit.
    """

    def path_stats(self, path: str) -> Any:
        """Refuse, so that compiled code is neither looked for nor kept."""
        raise OSError(f"{path} is compiled each time")


def _run_file(path: str) -> ModuleType:
    # A name of its own: the file may be called as a module of Python's, signal.py for instance. Of
    # a package that is nowhere, so that nobody pickles its functions as something to import.
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    name = f"cellimg_file.{Path(path).stem}_{mark}"
    spec = spec_from_file_location(name, path, loader=_Compiler(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    search_in([str(Path(path).parent)])
    # Before it runs: dataclasses look their module up.
    sys.modules[name] = module
    # The same for files beside it.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, SyntaxError) or not isinstance(error, (Exception, SystemExit)):
            raise
        relative = getattr(error, "name", None) == "cellimg_file"
        if isinstance(error, ModuleNotFoundError) and not relative:
            raise ModuleNotFoundError(
                f"{path} imports {error.name!r}, which is not in {here()}", name=error.name
            ) from error
        hint = (
            "; a module of a package is named by its package: 'package.module:function'"
            if relative
            else ""
        )
        raise ImportError(f"running {path} failed with {_told(error)}{hint}") from error
    finally:
        sys.dont_write_bytecode = before
    return module


def attribute_of(module: ModuleType, attribute: str, place: str) -> Any:
    """Return a callable of a module.

    Parameters
    ----------
    attribute : str
        Its name; with dots for functions of a class.
    place : str
        Module or file, as it was named.

    Raises
    ------
    AttributeError
        If there is none; the message has similar names.
    TypeError
        If it cannot be called.
    """
    found: Any = module
    for part in attribute.split("."):
        before = found
        try:
            found = getattr(found, part)
        except AttributeError:
            known = [name for name in dir(before) if not name.startswith("__")]
            near = difflib.get_close_matches(part, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            file = getattr(module, "__file__", None)
            if file is not None and not is_file_name(place):
                hint += f" (it is {file}, in {here()})"
            raise AttributeError(f"{place} has no function {attribute!r}{hint}") from None
    if not callable(found):
        raise TypeError(
            f"{place} has no function {attribute!r}: that is "
            f"{_article(type(found).__name__)}, which cannot be called"
        )
    return found


def search_in(folders: Iterable[str]) -> None:
    """Search folders for modules, from now on, after this Python's own paths."""
    for folder in folders:
        if folder not in sys.path:
            # At the end, so that what is installed goes first, whatever the files are called.
            sys.path.append(folder)
            importlib.invalidate_caches()


def _no_file(path: str) -> str:
    missing = Path(path)
    while missing != missing.parent and not missing.parent.is_dir():
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        names = []
    near = difflib.get_close_matches(missing.name, names, n=3)
    hint = f"; {missing.parent} has {' and '.join(map(repr, near))}" if near else ""
    return f"there is no file {path}{hint}"


def _file_of(module: ModuleType | None) -> str:
    return str(getattr(module, "__file__", None) or "a module without a file")


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}, in {here()}"
