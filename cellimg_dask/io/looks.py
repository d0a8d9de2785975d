"""How an image looks: values that are shown black and white, colours, opacity."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from cellimg_dask.io.colors import COLORS

__all__ = ["checked_color", "checked_contrast", "checked_part"]


def checked_contrast(value: Any) -> tuple[float, float] | None:
    """Return two values that are shown black and white, or None."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"contrast must be two numbers, (low, high), got {value!r}")
    low, high = value
    for number in (low, high):
        if not isinstance(number, (Real, np.number)) or isinstance(number, bool):
            raise TypeError(f"contrast must be two numbers, (low, high), got {value!r}")
    try:
        # Large integers may be the same only as floats, or too large for one.
        low, high = float(low), float(high)
    except OverflowError:
        low = high = math.inf
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise ValueError(f"contrast must be two different, finite numbers, got {value!r}")
    return low, high


def checked_color(value: Any) -> str | None:
    """Return a colour as a name or ``#rrggbb``, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        # A shader with another name would show nothing.
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", value) and value.lower() not in COLORS:
            raise ValueError(f'color must be a name that CSS knows or "#rrggbb", got {value!r}')
        return value.lower()
    if not isinstance(value, Iterable):
        raise TypeError(f'color must be a name, "#rrggbb" or three numbers, got {value!r}')
    parts = [checked_part(part, "color") for part in value]
    if len(parts) != 3:
        raise ValueError(f"color must be three numbers, (red, green, blue), got {value!r}")
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def checked_part(value: Any, what: str) -> float:
    """Return a number from 0 to 1."""
    if not isinstance(value, (Real, np.number)) or isinstance(value, bool):
        raise TypeError(f"{what} must be a number from 0 to 1, got {value!r}")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{what} must be a number from 0 to 1, got {value}")
    return number
