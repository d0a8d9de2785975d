"""What another Python needs to know to have a function of this one."""

from __future__ import annotations

import functools
import math
import sys
from types import FunctionType, MethodType
from typing import Any

import numpy as np

from cellimg_dask.blocks.functions import BlockCode
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.blocks.worker import Init
from cellimg_dask.blocks.wrappers import ModelFunction, function_name
from cellimg_dask.queues.places import folder_of, is_of_the_library, public_name
from cellimg_dask.queues.source_text import ADVICE, source_of

__all__ = ["ship", "ship_init"]


def ship(function: Any) -> dict[str, Any] | None:
    """Return the description of a function for `cellimg_dask.bare.functions.Functions`.

    None for functions of this library, which run in this process.

    Parameters
    ----------
    function : callable
        What goes by name: `NamedFunction`, what is imported from packages, and functions of
        modules of the user's. What goes as text: `BlockCode`; functions that were defined in a
        script, a notebook or another function, and lambdas, with the globals and variables that
        they use. `functools.partial` of these.

    Raises
    ------
    TypeError
        If it cannot be sent; the message says what is in the way, and what to do instead.
    """
    if isinstance(function, BlockCode):
        return {"code": function.code, "init": function.init}
    if isinstance(function, NamedFunction):
        if function.file is not None:
            return {"file": function.place, "name": function.attribute}
        return _by_name(function.place, function.attribute)
    if isinstance(function, functools.partial):
        return _partial(function)
    if isinstance(function, ModelFunction):
        model, inner = ship(function.load_model), ship(function.function)
        if model is None or inner is None:
            raise TypeError(f"{function.__name__} and what makes its model must be your own")
        return {"model": model, "function": inner}
    if is_of_the_library(function):
        return None
    name = function_name(function)
    if isinstance(function, MethodType) and not isinstance(function.__self__, type):
        raise TypeError(
            f"{name} is a method of {_of(function.__self__)}, which exists in this process only; "
            f"{ADVICE}"
        )
    public = public_name(function)
    if public is not None:
        return _by_name(*public)
    if not isinstance(function, FunctionType):
        raise TypeError(f"{_of(function)} cannot be sent to another Python; {ADVICE}")
    module = sys.modules.get(function.__module__)
    if function.__module__.startswith("cellimg_file.") and "<" not in function.__qualname__:
        # Of a file that was run here; it is run there.
        path = getattr(module, "__file__", None)
        if path is not None:
            return {"file": path, "name": function.__qualname__}
    return source_of(function, name)


def ship_init(init: Init) -> dict[str, Any] | None:
    """Return the description of a queue's ``init``; None where there is none.

    Raises
    ------
    TypeError
        If it cannot be sent.
    """
    if init is None:
        return None
    if isinstance(init, str):
        return {"code": init}
    spec = ship(init)
    if spec is None:
        raise TypeError(f"init is {function_name(init)}, which another Python need not have")
    return spec


def _by_name(module: str, attribute: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": f"{module}:{attribute}"}
    folder = folder_of(module)
    if folder is not None:
        spec["folders"] = [folder]
    return spec


def _partial(function: functools.partial[Any]) -> dict[str, Any] | None:
    plain = {k: v for k, v in function.keywords.items() if _is_plain(v)}
    others = {k: v for k, v in function.keywords.items() if k not in plain}
    args = function.args
    if others or not all(map(_is_plain, args)):
        # Tuples, slices and such: messages have none.
        if ship(function.func) is None:
            return None
        rest = functools.partial(function.func, *args, **others)
        inner: dict[str, Any] | None = source_of(rest, function_name(function))
        args = ()
    else:
        inner = ship(function.func)
    if inner is None or not (plain or args):
        return inner
    return {"partial": inner, "args": list(args), "kwargs": plain}


def _is_plain(value: Any) -> bool:
    """Whether a value travels in a message as it is."""
    kind = type(value)
    if kind is float:
        return math.isfinite(value)
    if kind is list:
        return all(map(_is_plain, value))
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, np.ndarray):
        return kind is np.ndarray and not value.dtype.hasobject
    return value is None or kind in (bool, int, str)


def _of(thing: Any) -> str:
    kind = type(thing)
    return f"an object of {kind.__module__}.{kind.__qualname__}"
