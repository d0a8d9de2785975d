"""What shared memory holds, without opening it as an array."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .header import MAGIC, READY_AT, Header
from .owners import is_alive
from .segments import Segment

__all__ = ["SharedInfo", "header_of", "look"]


class SharedInfo(NamedTuple):
    """What is known of a shared array without opening it."""

    name: str
    """Its name."""
    shape: tuple[int, ...] | None
    """Its shape; None where its header is damaged, as for dtype and owner."""
    dtype: np.dtype[Any] | None
    """Its dtype."""
    axes: tuple[str, ...] | None
    """Names of its axes, where it has any."""
    nbytes: int
    """Bytes of shared memory that it takes."""
    owner: int | None
    """Number of the process that removes it."""
    is_alive: bool | None
    """Whether that process lives; None where it cannot be seen from here."""
    is_ready: bool
    """Whether its values are there; not so while `put` copies them."""
    problem: str
    """What is wrong with it, if anything."""


def header_of(segment: Segment) -> Header:
    """Return the header of shared memory; `ValueError` if it is no shared array."""
    return Header.unpack(segment.array((segment.nbytes,), np.uint8), segment.name)


def look(name: str) -> SharedInfo | None:
    """Return what is known of a name; None if it is no shared array, or not to be seen."""
    try:
        segment = Segment.attach(name, readonly=True)
    except (OSError, ValueError):
        return None
    try:
        start = segment.array((min(segment.nbytes, len(MAGIC)),), np.uint8)
        if start.tobytes() != MAGIC:
            return None
        try:
            header = header_of(segment)
        except ValueError as error:
            return SharedInfo(name, None, None, None, segment.nbytes, None, None, False, str(error))
        return SharedInfo(
            name,
            header.shape,
            header.dtype,
            header.axes,
            segment.nbytes,
            header.owner,
            is_alive(header.owner, header.start, header.namespace),
            bool(segment.array((), "<u4", READY_AT)),
            "",
        )
    finally:
        segment.close()
