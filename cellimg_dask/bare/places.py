"""Where the arrays of a task lie in shared memory."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np

from .segments import Segment
from .trees import dtype_from, dtype_name

__all__ = ["Layout", "Segments", "array_at"]

_ALIGNMENT = 64


class Layout:
    """Puts arrays one after the other.

    Parameters
    ----------
    end : int
        Where the first may lie, in bytes from the begin of the segment.
    """

    def __init__(self, end: int = 0) -> None:
        self.end = -(-end // _ALIGNMENT) * _ALIGNMENT
        """Where the next one lies, and so many bytes are needed."""
        self.places: list[Any] = []
        """Of each array, for `array_at`, in JSON's types."""

    def add(self, shape: Iterable[int], dtype: np.dtype[Any], *, writable: bool = True) -> Any:
        """Find a place for an array in C order, and return it."""
        extents = [int(extent) for extent in shape]
        place = [self.end, extents, dtype_name(dtype), int(writable)]
        self.end += -(-prod(extents) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.places.append(place)
        return place


def array_at(segment: Segment, place: Any) -> np.ndarray[Any, Any]:
    """Return the array that lies at a place, as a view of the segment."""
    offset, shape, dtype, writable = place
    array = segment.array(tuple(shape), dtype_from(dtype), offset)
    if not writable:
        array.flags.writeable = False
    return array


class Segments:
    """Segments of the caller's that this worker has attached."""

    def __init__(self) -> None:
        self._attached: dict[str, Segment] = {}

    def __len__(self) -> int:
        return len(self._attached)

    def get(self, name: str) -> Segment:
        """Return the segment with this name."""
        segment = self._attached.get(name)
        if segment is None:
            # Slots have grown: let go of those that were removed.
            for known, other in list(self._attached.items()):
                if other.is_removed:
                    self._attached.pop(known).close()
            segment = self._attached[name] = Segment.attach(name)
        return segment
