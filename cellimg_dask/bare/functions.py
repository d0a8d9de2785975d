"""From the description of a function, which any program can write, to the function.

A description is a dictionary of JSON's types; values may also be arrays:

- ``{"name": "module:function", "folders": [...]}``: imported; the folders are searched last.
- ``{"file": "/absolute/file.py", "name": "function"}``: the file is run, and again once it changed.
- ``{"source": text, "name": "function", "folders": [...]}``: what the text defines under this
  name. ``_import_file(path)`` in it gives the module of a file.
- ``{"code": text, "init": text or null}``: statements on ``block``; see `BlockCode`.
- ``{"partial": function, "args": [...], "kwargs": {...}}``: with arguments given already.
- ``{"model": function, "function": function}``: the second is given, as its first argument, what
  the first returns, which is called once.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np

from . import compiled
from .naming import attribute_of, file_state, here, import_file, import_module, search_in

__all__ = ["Functions", "Held", "InitError", "bind", "names_bound_by", "wants_task"]

_MUCH_LITTER = 1 << 20


class InitError(RuntimeError):
    """What has to run before the first block failed."""


class Functions:
    """The functions of one worker, with what ``init`` left there.

    Parameters
    ----------
    init : mapping, optional
        ``{"code": text}`` or the description of a function, run at once. The names that code
        binds are seen by all functions; of a function those that it declares ``global``, and
        those in the mapping that it returns, if any.

    Raises
    ------
    InitError
        If ``init`` raises.

    Notes
    -----
    For one thread.
    """

    def __init__(self, init: Mapping[str, Any] | None = None) -> None:
        self.namespace: dict[str, Any] = {}
        """Names bound by ``init``."""
        self._known: WeakValueDictionary[Any, Held] = WeakValueDictionary()
        self._kept: dict[int, Held] = {}
        self._models: dict[Any, _Model] = {}
        self._sources: WeakValueDictionary[str, _Source] = WeakValueDictionary()
        self._litter = 0
        """Bytes of texts that nobody has any more."""
        self._spaces: dict[tuple[str, str | None], dict[str, Any]] = {}
        try:
            self._run(init)
        except (Exception, SystemExit) as error:
            text = (init or {}).get("code")
            raise InitError(
                f"init of the queue failed with {type(error).__name__}: {error}; no block runs on "
                f"this worker" + (f":\n{text}" if text else "")
            ) from error

    def load(self, spec: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the function that is described, the same one for the same description, for ever.

        See `hold` for what it raises.
        """
        held = self.hold(spec)
        self._kept[id(held)] = held
        return held.function

    def hold(self, spec: Mapping[str, Any]) -> Held:
        """Return the function that is described, to be forgotten with what is returned.

        Raises
        ------
        ImportError
            If its module is not in this Python, or raises.
        FileNotFoundError
            If there is no such file.
        AttributeError
            If the module has no such name.
        SyntaxError
            If code or a file does not compile.
        TypeError, ValueError
            If what is named cannot be called, or the description is not one.
        """
        key = _key(spec)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._load(spec)
        return known

    def clean_up(self) -> None:
        """Have the memory of functions back that nobody holds any more."""
        if self._litter > _MUCH_LITTER:
            # Functions and what they use have each other.
            gc.collect()
            self._litter = 0

    def _load(self, spec: Mapping[str, Any]) -> Held:
        if "file" in spec:
            path, name = _text(spec, "file"), _text(spec, "name")
            return Held(self._bound(attribute_of(import_file(path), name, path)))
        if "source" in spec:
            name = _text(spec, "name")
            source = self._source(_text(spec, "source"), spec.get("folders") or ())
            return Held(attribute_of(source.module, name, "the source"), source)
        if "code" in spec:
            return Held(_Code(self, _text(spec, "code"), spec.get("init")))
        if "partial" in spec:
            inner = self.hold(spec["partial"])
            args, kwargs = spec.get("args", ()), spec.get("kwargs", {})
            return Held(functools.partial(inner.function, *args, **kwargs), inner)
        if "model" in spec:
            key = _key(spec["model"])
            if key not in self._models:
                self._models[key] = _Model(self.load(spec["model"]))
            inner = self.hold(spec["function"])
            return Held(_WithModel(self._models[key], inner.function), inner)
        if "name" in spec:
            place, colon, name = _text(spec, "name").rpartition(":")
            if not (place and colon and name):
                raise ValueError(f'expected "module:function", got {spec["name"]!r}')
            module = import_module(place, spec.get("folders") or ())
            return Held(self._bound(attribute_of(module, name, f"module {place!r}")))
        raise ValueError(
            f"a function is described by name, file, source, code, partial or model, got "
            f"{sorted(map(str, spec))}"
        )

    def _bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        bound: Callable[..., Any] = bind(function, self.namespace)
        return bound

    def _source(self, text: str, folders: Iterable[str]) -> _Source:
        search_in(folders)
        source = self._sources.get(text)
        if source is None:
            code = _compiled(text, "source")
            # Numbers tell those of several workers in one process apart.
            module = ModuleType(f"cellimg_source_{next(_numbers)}")
            module.__dict__.update(self.namespace, _import_file=import_file)
            source = _Source(module)
            # Before it runs: dataclasses look their module up.
            sys.modules[module.__name__] = module
            gone = finalize(source, self._forget, module.__name__, code.co_filename, len(text))
            gone.atexit = False
            try:
                exec(code, module.__dict__)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"the function imports {error.name!r}, which is not in {here()}",
                    name=error.name,
                ) from error
            self._sources[text] = source
        return source

    def _forget(self, module: str, filename: str, size: int) -> None:
        sys.modules.pop(module, None)
        linecache.cache.pop(filename, None)
        self._litter += size

    def _run(self, init: Mapping[str, Any] | None) -> None:
        if init is not None:
            code = _text(init, "code") if "code" in init else self.load(init)
            self.namespace = names_bound_by(code)

    def space(self, code: str, init: str | None) -> dict[str, Any]:
        """Return the namespace of a code, the same for all blocks; its ``init`` has run in it."""
        space = self._spaces.get((code, init))
        if space is None:
            space = {"__name__": "__block_code__", **self.namespace}
            try:
                exec(_compiled(init or "", "BlockCode init"), space)
            except (Exception, SystemExit) as error:
                raise InitError(
                    f"init of BlockCode failed with {type(error).__name__}: {error}; "
                    f"no block ran:\n{init}"
                ) from error
            self._spaces[code, init] = space
        return space


class Held:
    """A function that is known as long as somebody has this.

    Parameters
    ----------
    function : callable
        The function.
    *others : object
        What it needs.
    """

    def __init__(self, function: Callable[..., Any], *others: object) -> None:
        self.function = function
        self._others = others


class _Source:
    """The module of a text."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module


class _Code:
    """Statements, run for each block with ``block`` and ``task`` bound."""

    def __init__(self, functions: Functions, code: str, init: str | None) -> None:
        self._functions = functions
        self._text, self._init = code, init
        self._code = _compiled(code, "BlockCode")
        _compiled(init or "", "BlockCode init")

    def __call__(self, block: Any, task: Any = None) -> None:
        space = self._functions.space(self._text, self._init)
        names = ("block", "task")
        before: dict[str, Any] = {name: space[name] for name in names if name in space}
        space["block"] = block
        if task is not None:
            space["task"] = task
        try:
            exec(self._code, space)
        finally:
            # Neither the block nor its memory is kept.
            for name in names:
                space.pop(name, None)
            space.update(before)


class _Model:
    """What a function returns, which is called when it is first needed."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make: Callable[..., Any] | None = make
        self._value: Any = None

    def get(self) -> Any:
        if self._make is not None:
            try:
                self._value = self._make()
            except (Exception, SystemExit) as error:
                raise InitError(
                    f"load_model failed with {type(error).__name__}: {error}; no block ran"
                ) from error
            self._make = None
        return self._value


class _WithModel:
    """Gives a function a model as its first argument."""

    def __init__(self, model: _Model, function: Callable[..., Any]) -> None:
        self._model = model
        self._function = function
        self.__signature__ = _without_first(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model.get(), *args, **kwargs)


def names_bound_by(init: str | Callable[[], Any]) -> dict[str, Any]:
    """Run what prepares a worker, and return the names that are the worker's then.

    Those that code binds; of a function those that it declares ``global``, and those in the
    mapping that it returns, if any.
    """
    if isinstance(init, str):
        space: dict[str, Any] = {"__name__": "__worker__"}
        exec(_compiled(init, "BlockQueue init"), space)
        return {name: value for name, value in space.items() if not name.startswith("__")}
    result = init()
    names: dict[str, Any] = {}
    if isinstance(init, FunctionType):
        names = {
            name: init.__globals__[name]
            for name in compiled.globals_stored(init.__code__)
            if name in init.__globals__
        }
    if isinstance(result, Mapping):
        names.update(result)
    return names


def wants_task(function: Any) -> bool:
    """Whether a function has a parameter called ``task`` that nobody has given it yet.

    Such a function is given the running task by this name: ``task.update(…)``,
    ``task.cancelled``, ``task.raise_if_cancelled()``.
    """
    if isinstance(function, functools.partial) and "task" in function.keywords:
        return False
    try:
        found = inspect.signature(function).parameters.get("task")
    except (TypeError, ValueError):
        return False
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def bind(function: Any, names: Mapping[str, Any]) -> Any:
    """Return a function with names among its globals, if it uses any of them.

    The function itself and its module stay as they are. What has a method ``__bind_names__`` does
    it by itself.
    """
    if isinstance(function, functools.partial):
        inner = bind(function.func, names)
        if inner is function.func:
            return function
        return functools.partial(inner, *function.args, **function.keywords)
    by_itself = getattr(type(function), "__bind_names__", None)
    if by_itself is not None:
        return by_itself(function, names)
    if not isinstance(function, FunctionType):
        return function
    if not compiled.names(function.__code__) & names.keys():
        return function
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copy, function)


def _without_first(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        whole = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    parameters = list(whole.parameters.values())
    if parameters and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        del parameters[0]
    return whole.replace(parameters=parameters)


_numbers = itertools.count()


def _compiled(text: str, what: str) -> CodeType:
    filename = f"<{what} {hashlib.sha256(text.encode()).hexdigest()[:8]}>"
    code = compile(text, filename, "exec", dont_inherit=True)
    # Tracebacks show the lines.
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    return code


def _text(spec: Mapping[str, Any], name: str) -> str:
    text = spec.get(name)
    if not isinstance(text, str):
        raise TypeError(f"{name!r} of a function must be text, got {type(text).__name__}")
    return text


def _key(value: Any) -> Any:
    """Return what is equal for equal descriptions, and can be looked up."""
    if isinstance(value, Mapping):
        # A file may be changed while a worker lives.
        path = value.get("file")
        state = file_state(path) if isinstance(path, str) else None
        return "map", state, tuple(sorted((str(name), _key(part)) for name, part in value.items()))
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        mark = hashlib.sha256(array.tobytes()).hexdigest()
        return type(value).__name__, repr(array.dtype), np.shape(value), mark
    return type(value).__name__, repr(value)
