"""Places in shared memory through which blocks travel."""

from __future__ import annotations

from cellimg_dask.bare.segments import Segment

__all__ = ["Slot"]


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
            # A little more, since cells at the border and their halos differ in size.
            segment = self._segment = Segment.create(None, nbytes + nbytes // 8)
        return segment

    def remove(self) -> None:
        """Remove the segment."""
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.unlink()
            segment.close()
