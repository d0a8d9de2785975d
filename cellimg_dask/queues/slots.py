"""Places in shared memory through which blocks travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.state.segments import create_segment, remove_segment

__all__ = ["Layout", "Slot"]

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays of a block lie in a segment."""

    name: str
    """Name of the segment."""
    parts: tuple[tuple[int, tuple[int, ...], np.dtype[Any]], ...]
    """Offset in bytes, shape and dtype of each array, in C order."""

    def arrays(self, buffer: Any) -> list[NDArray[Any]]:
        """Return the arrays as views of the segment's memory."""
        return [np.ndarray(shape, dtype, buffer, offset) for offset, shape, dtype in self.parts]


class Slot:
    """One segment, which grows when a block needs more room.

    Belongs to one borrower at a time.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        """Names the slot, whatever segment it has."""
        self._segment: SharedMemory | None = None

    def lay_out(
        self, arrays: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]
    ) -> tuple[Layout, list[NDArray[Any]]]:
        """Make room for arrays of these shapes and dtypes; return where they are, and views.

        Raises
        ------
        MemoryError
            If there is not so much shared memory.
        """
        parts, end = [], 0
        for shape, dtype in arrays:
            parts.append((end, shape, dtype))
            end += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        # Closing the queue may remove the segment at any moment.
        segment = self._segment
        if segment is None or segment.size < end:
            self.remove()
            # A little more, since cells at the border and their halos differ in size.
            segment = self._segment = create_segment(end + end // 8)
        layout = Layout(segment.name, tuple(parts))
        return layout, layout.arrays(segment.buf)

    def remove(self) -> None:
        """Remove the segment."""
        segment, self._segment = self._segment, None
        if segment is not None:
            remove_segment(segment)
