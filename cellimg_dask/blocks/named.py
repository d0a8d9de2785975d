"""Functions by their names: ``"module:function"`` or ``"path/to/file.py:function"``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cellimg_dask.bare.functions import bind
from cellimg_dask.bare.naming import (
    attribute_of,
    import_file,
    import_module,
    is_file_name,
    split_name,
)

__all__ = ["NamedFunction", "as_function", "importable"]


T = TypeVar("T")


class NamedFunction:
    """A function by its name, imported where and when it is first called.

    It need not exist in this process: blocks that run in another environment find it there. It is
    pickled as its name. Wherever a function is expected, the name alone serves as well.

    Parameters
    ----------
    name : str
        ``"module:function"`` or ``"path/to/file.py:function"``, or of a class
        ``"module:Class.function"``. A relative path begins in the working directory. A file is
        run once in each process, under a name of its own; what it imports may stand beside it.

    Raises
    ------
    ValueError
        If the name is of another form.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> negative = NamedFunction("numpy:negative")
    >>> negative([1, 2])
    array([-1, -2])
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a function is named by a string, got {type(name).__name__}")
        place, attribute = split_name(name)
        if is_file_name(place):
            path = Path(place).expanduser().resolve()
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}, which {name!r} names")
            place = str(path)
        self._fill(place, attribute)

    def _fill(self, place: str, attribute: str) -> None:
        self.place = place
        """The module, or the file with its whole path."""
        self.attribute = attribute
        """What the function is called there."""
        self._function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """Module or file, and the function."""
        return f"{self.place}:{self.attribute}"

    @property
    def file(self) -> Path | None:
        """The file, None where it is a module."""
        return Path(self.place) if is_file_name(self.place) else None

    @property
    def __name__(self) -> str:
        return self.attribute.rpartition(".")[2]

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself, imported here.

        Raises
        ------
        ImportError, FileNotFoundError, SyntaxError
            If the module or file is not here, or fails.
        AttributeError, TypeError
            If it has no such function.
        """
        if self._function is None:
            self._function = self._import()
        return self._function

    def _import(self) -> Callable[..., Any]:
        if self.file is None:
            module, place = import_module(self.place), f"module {self.place!r}"
        else:
            import cloudpickle

            module, place = import_file(self.place), self.place
            # Other processes cannot import it under this name, and get its objects by value.
            cloudpickle.register_pickle_by_value(module)
        function: Callable[..., Any] = attribute_of(module, self.attribute, place)
        return function

    def files(self) -> dict[str, Path]:
        """Return its file, and what stands beside it that it imports, or that these import."""
        if self.file is None:
            return {}
        folder = self.file.parent
        found = {self.file.name: self.file}
        todo = [self.file]
        while todo:
            for module in _modules_imported(todo.pop()):
                top = folder / module.partition(".")[0]
                inside = sorted(top.rglob("*.py")) if top.is_dir() else []
                for path in (top.with_suffix(".py"), *inside):
                    place = path.relative_to(folder).as_posix()
                    if path.is_file() and place not in found:
                        found[place] = path
                        todo.append(path)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in this process."""
        return self.function(*args, **kwargs)

    def __bind_names__(self, names: Mapping[str, Any]) -> _BoundFunction:
        return _BoundFunction(self, names)

    @property
    def __signature__(self) -> inspect.Signature:
        found = importable(self)
        if found is not None:
            try:
                return inspect.signature(found)
            except (TypeError, ValueError):
                pass
        written = None if self.file is None else _written_signature(self.file, self.attribute)
        if written is None:
            # As of any callable that does not say.
            raise AttributeError(f"what {self.name} is called with cannot be known here")
        return written

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedFunction) and self.name == other.name

    def __hash__(self) -> int:
        return hash((NamedFunction, self.name))

    def __reduce__(self) -> tuple[Callable[..., NamedFunction], tuple[str, str]]:
        return _named, (self.place, self.attribute)

    def __repr__(self) -> str:
        return f"NamedFunction({self.name!r})"

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "NamedFunction", self.name


class _BoundFunction:
    """A named function that sees names which a worker's ``init`` bound."""

    def __init__(self, named: NamedFunction, names: Mapping[str, Any]) -> None:
        self._named, self._names = named, names
        self._function: Callable[..., Any] | None = None
        self.__name__ = named.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not before: what is wrong with it belongs to the block that calls it.
        if self._function is None:
            self._function = bind(self._named.function, self._names)
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return self._named.__signature__


def as_function(f: T | str) -> T | NamedFunction:
    """Return what was given, or the function that a string names.

    Raises
    ------
    ValueError, FileNotFoundError
        As `NamedFunction`.
    """
    return NamedFunction(f) if isinstance(f, str) else f


def importable(f: Any) -> Any:
    """Return the function itself for one that is named, None where it cannot be imported here."""
    if not isinstance(f, NamedFunction):
        return f
    try:
        return f.function
    except Exception:
        # Whatever its module does here, it may do well where it runs.
        return None


def _named(place: str, attribute: str) -> NamedFunction:
    """Make one anew; its file may come later, or never where it is not called."""
    named = object.__new__(NamedFunction)
    named._fill(place, attribute)
    return named


def _modules_imported(file: Path) -> list[str]:
    """Return the modules that a file imports by their full names."""
    found: list[str] = []
    # What does not compile here may do so elsewhere.
    with suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.append(node.module)
    return found


def _written_signature(file: Path, attribute: str) -> inspect.Signature | None:
    """Return how a function of a file is called, as it is written there."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    *classes, name = attribute.split(".")
    for wanted in classes:
        found = [n for n in body if isinstance(n, ast.ClassDef) and n.name == wanted]
        body = found[-1].body if found else []
    functions = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not functions or functions[-1].decorator_list:
        return None
    given, kinds = functions[-1].args, inspect.Parameter
    by_place = [*given.posonlyargs, *given.args]
    num_needed = len(by_place) - len(given.defaults)
    parameters = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_ONLY
            if number < len(given.posonlyargs)
            else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if number < num_needed else ...,
        )
        for number, argument in enumerate(by_place)
    ]
    if given.vararg is not None:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...)
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg is not None:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)
