"""Integers as users give them, normalised once at the boundary."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

__all__ = ["as_int", "as_ints"]


def as_int(value: SupportsIndex, what: str, *, minimum: int | None = None) -> int:
    """Return ``value`` as a plain ``int``; floats and booleans are refused.

    Raises
    ------
    TypeError
        If ``value`` is not an integer.
    ValueError
        If ``value`` is below ``minimum``.
    """
    if isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, got the boolean {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{what} must be an integer, got {value!r} of type {type(value).__name__}"
        ) from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def as_ints(
    values: SupportsIndex | Iterable[SupportsIndex],
    what: str,
    *,
    ndim: int | None = None,
    minimum: int | None = None,
) -> tuple[int, ...]:
    """Return per-axis integers; a single integer stands for all ``ndim`` axes.

    Raises
    ------
    TypeError
        If something in ``values`` is not an integer.
    ValueError
        If there are not ``ndim`` values, or one is below ``minimum``.
    """
    if type(values) is tuple and (ndim is None or len(values) == ndim):
        # Mostly they are plain already; this is on the way of every read.
        for value in values:
            if type(value) is not int or (minimum is not None and value < minimum):
                break
        else:
            return values
    # A 0-d array says that it is iterable and is not; it is one integer.
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) != 0
    if several and not isinstance(values, (str, bytes)):
        numbers = tuple(
            as_int(value, f"{what}[{axis}]", minimum=minimum)
            for axis, value in enumerate(values)  # type: ignore[arg-type]
        )
        if ndim is not None and len(numbers) != ndim:
            raise ValueError(
                f"{what} must have one value for each of {ndim} axes, got {len(numbers)}: {numbers}"
            )
        return numbers
    if ndim is None:
        raise TypeError(f"{what} must be a sequence of integers, got {values!r}")
    return (as_int(values, what, minimum=minimum),) * ndim  # type: ignore[arg-type]
