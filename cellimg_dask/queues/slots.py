"""Places in shared memory through which blocks travel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.places import Layout, array_at, place_elsewhere
from cellimg_dask.bare.segments import Segment

__all__ = ["Room", "Slot"]


class Slot:
    """One segment, which grows when a block needs more room.

    Belongs to one borrower at a time.
    """

    def __init__(self) -> None:
        self._segment: Segment | None = None

    def with_room(self, nbytes: int) -> Segment:
        """Return a segment of at least ``nbytes`` bytes; what was in the one before is lost.

        Raises
        ------
        MemoryError
            If there is not so much shared memory.
        """
        # Closing the queue may remove the segment at any moment.
        segment = self._segment
        if segment is None or segment.nbytes < nbytes:
            self.remove()
            segment = self._segment = _with_spare_room(nbytes)
        return segment

    def remove(self) -> None:
        """Remove the segment."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.unlink()
            segment.close()


def _with_spare_room(nbytes: int) -> Segment:
    try:
        # A little more, since cells at the border and their halos differ in size.
        return Segment.create(None, nbytes + nbytes // 8)
    except MemoryError:
        return Segment.create(None, nbytes)


class Room:
    """What one request has in a slot: first where everything goes, then everything there."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._segment: Segment | None = None
        self.begin()

    def begin(self) -> None:
        """Begin anew, with nothing in it."""
        self._layout = Layout()
        self._arrays: list[tuple[Any, NDArray[Any]]] = []

    @property
    def end(self) -> int:
        """So many bytes are taken."""
        return self._layout.end

    def put(self, array: NDArray[Any], *, writable: bool = False) -> Any:
        """Return the place of an array, which is copied there unless it is shared already."""
        place = None if writable else place_elsewhere(array)
        if place is None:
            place = self._layout.add(array.shape, array.dtype, writable=writable)
            self._arrays.append((place, array))
        return place

    def keep(self, shape: Iterable[int], dtype: np.dtype[Any]) -> Any:
        """Return a place for an array that the worker writes."""
        return self._layout.add(shape, dtype)

    def fill(self, more: int) -> str:
        """Copy all arrays to their places, with so many bytes more behind; return the segment.

        Raises
        ------
        MemoryError
            If there is not so much shared memory.
        """
        segment = self._segment = self._slot.with_room(self._layout.end + more)
        for place, array in self._arrays:
            array_at(segment, [*place[:3], 1])[...] = array
        return segment.name

    def grow(self, nbytes: int) -> str:
        """Have another segment, of so many bytes; the worker keeps what it has of the other."""
        self._segment = self._slot.with_room(nbytes)
        return self._segment.name

    def array_at(self, place: Any) -> NDArray[Any]:
        """Return what lies at a place, as a view."""
        # Kept here and not asked of the slot, whose segment a queue that closes removes.
        assert self._segment is not None
        return array_at(self._segment, place)
