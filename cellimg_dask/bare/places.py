"""Where the arrays of a task lie in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

from .segments import Segment, place_of
from .trees import dtype_from, dtype_name

__all__ = ["Layout", "Segments", "array_at", "place_elsewhere"]

_ALIGNMENT = 64
_WORTH_SAYING = 1 << 15


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


def place_elsewhere(array: np.ndarray[Any, Any]) -> Any:
    """Return the place of an array that lies in shared memory already, for `array_at`.

    None if it does not, or if copying it takes less than saying where it is.
    """
    if array.nbytes < _WORTH_SAYING:
        return None
    found = place_of(array)
    if found is None:
        return None
    name, offset = found
    return [offset, array.shape, dtype_name(array.dtype), 0, name, array.strides]


def array_at(
    segment: Segment, place: Any, others: Callable[[str], Segment] | None = None
) -> np.ndarray[Any, Any]:
    """Return the array that lies at a place, as a view of the segment, or of another one.

    ``others`` gives a segment by its name.
    """
    offset, shape, dtype, writable, *elsewhere = place
    strides = None
    if elsewhere:
        assert others is not None
        segment, strides = others(elsewhere[0]), tuple(elsewhere[1])
    array = segment.array(tuple(shape), dtype_from(dtype), offset, "C", strides)
    if not writable:
        array.flags.writeable = False
    return array


class Segments:
    """Segments of the caller's that this worker has attached."""

    def __init__(self) -> None:
        self._attached: dict[str, Segment] = {}
        self._only_read: dict[str, Segment] = {}

    def __len__(self) -> int:
        return len(self._attached) + len(self._only_read)

    def get(self, name: str) -> Segment:
        """Return the segment with this name."""
        return _attach(self._attached, name, readonly=False)

    def only_read(self, name: str) -> Segment:
        """Return the segment with this name, whose arrays cannot be written to."""
        return _attach(self._only_read, name, readonly=True)


def _attach(known: dict[str, Segment], name: str, *, readonly: bool) -> Segment:
    segment = known.get(name)
    if segment is None:
        # Slots have grown: let go of those that were removed.
        for other in [name for name, segment in known.items() if segment.is_removed]:
            known.pop(other).close()
        segment = known[name] = Segment.attach(name, readonly)
    return segment
