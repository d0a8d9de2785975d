"""Callables of the library's that call functions of the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

__all__ = ["FunctionWrapper", "Wrapper", "bound_function", "function_name"]


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
