"""Callables of the library's that call functions of the user's."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import BuiltinFunctionType
from typing import Any, NoReturn, Self

import numpy as np

from cellimg_dask.bare.functions import wants_task
from cellimg_dask.blocks.tasks import current_task

__all__ = [
    "FunctionWrapper",
    "ModelFunction",
    "Shipped",
    "Wrapper",
    "bound_function",
    "call",
    "function_name",
]

_asking: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the user's; one that has a parameter ``task`` is given the task."""
    if _asks_for_task(function) and "task" not in kwargs:
        kwargs["task"] = current_task()
    return function(*args, **kwargs)


def _asks_for_task(function: Callable[..., Any]) -> bool:
    if isinstance(function, (Wrapper, BuiltinFunctionType, np.ufunc)):
        return False
    try:
        asks = _asking.get(function)
        if asks is None:
            asks = _asking[function] = wants_task(function)
    except TypeError:
        # Neither hashable nor weakly referenced.
        asks = wants_task(function)
    return asks


def function_name(function: object) -> str:
    """Return a readable name of a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    return str(name) if name else type(function).__name__


class Wrapper:
    """Something that calls functions of the user's in a way of its own."""

    def bound(self, bind: Callable[[Any], Any]) -> Self:
        """Return the same with ``bind(f)`` in place of each function ``f`` of the user's."""
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionWrapper(Wrapper):
    """Something that calls one function of the user's, and goes by its name."""

    function: Callable[..., Any]
    """The user's."""

    @property
    def __name__(self) -> str:
        return function_name(self.function)

    def bound(self, bind: Callable[[Any], Any]) -> Self:
        """Return the same with another function; see `Wrapper.bound`."""
        return replace(self, function=bound_function(self.function, bind))


def bound_function(function: Any, bind: Callable[[Any], Any]) -> Any:
    """Bind a function, or those that a wrapper calls."""
    return function.bound(bind) if isinstance(function, Wrapper) else bind(function)


@dataclass(frozen=True, eq=False)
class ModelFunction:
    """A function of the user's whose first argument is made by another one, once per process."""

    load_model: Callable[[], Any]
    """Makes it."""
    function: Callable[..., Any]
    """Is given it."""

    @property
    def __name__(self) -> str:
        return function_name(self.function)


@dataclass(frozen=True, eq=False)
class Shipped:
    """A function of the user's that runs in another environment, and nowhere else."""

    user: Any
    """The function, in the process that defined the image; else None."""
    spec: dict[str, Any]
    """Its description, which may be sent anywhere."""
    __name__: str
    """How messages call it."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to run here."""
        raise RuntimeError(f"{self.__name__} runs in the environment of its queue only")

    def __reduce__(self) -> tuple[Callable[..., Shipped], tuple[Any, ...]]:
        # Where the image arrives, the function may not be importable at all.
        return Shipped, (None, self.spec, self.__name__)
