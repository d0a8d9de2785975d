"""How much memory values take that are no plain arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

import numpy as np

__all__ = ["num_bytes"]


def num_bytes(value: Any) -> int:
    """Return about how many bytes a value holds: arrays, containers, and objects made of them.

    What it holds twice is counted once.
    """
    seen: set[int] = set()
    stack = [value]
    total = 0
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (type, ModuleType, FunctionType)):
            continue
        total += sys.getsizeof(item, 64)
        if isinstance(item, np.ndarray):
            if item.dtype.hasobject and item.dtype.names is None:
                stack.extend(item.flat)
            elif item.base is not None:
                # A view keeps all of it, but others may hold it as well.
                total += item.nbytes
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        elif isinstance(getattr(type(item), "nbytes", None), property):
            # It says it itself.
            total += int(item.nbytes)
        elif callable(getattr(type(item), "memory_usage", None)):
            # A data frame of pandas, which says it itself.
            total += int(np.sum(item.memory_usage(deep=True)))
        else:
            stack.extend(_attributes(item))
    return total


def _attributes(item: Any) -> list[Any]:
    """Return what an object holds, past whatever its class does when it is asked."""
    found: list[Any] = []
    for cls in type(item).__mro__:
        members = vars(cls)
        if isinstance(members.get("__dict__"), GetSetDescriptorType):
            found.extend(members["__dict__"].__get__(item).values())
        for member in members.values():
            if isinstance(member, MemberDescriptorType):
                with suppress(AttributeError):
                    found.append(member.__get__(item))
    return found
