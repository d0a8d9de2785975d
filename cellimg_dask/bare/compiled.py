"""What compiled code names, also that of functions which are defined in it."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

__all__ = ["codes", "globals_read", "globals_stored", "instructions", "names"]


@lru_cache(maxsize=4096)
def instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """Return the instructions of a function's code, without those that are defined in it."""
    # Functions are described for each image that they belong to.
    return tuple(dis.get_instructions(code))


def codes(code: CodeType) -> Iterator[CodeType]:
    """Return the code of a function and of all that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def names(code: CodeType) -> set[str]:
    """Return what code calls anything: variables, attributes, modules, also by ``from``."""
    return {name for part in codes(code) for name in part.co_names}


def globals_read(code: CodeType) -> set[str]:
    """Return the global names that code reads."""
    return _arguments(code, "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def globals_stored(code: CodeType) -> set[str]:
    """Return the names that a function assigns as ``global``."""
    return _arguments(code, "STORE_GLOBAL")


def _arguments(code: CodeType, *steps: str) -> set[str]:
    return {
        step.argval for part in codes(code) for step in instructions(part) if step.opname in steps
    }
