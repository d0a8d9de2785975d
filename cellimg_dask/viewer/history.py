"""Strokes: edits of a source that can be taken back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Roi
from cellimg_dask.image.source import Source
from cellimg_dask.viewer.strokes import tight_box

__all__ = ["History", "Stroke"]

_MOST_STROKES = 100
_MOST_BYTES = 128 << 20


@dataclass
class Stroke:
    """What a stroke has changed: boxes, which of their voxels, and what these were before."""

    name: str | None = None
    """While it is being drawn."""
    parts: list[tuple[Roi, NDArray[np.bool_], NDArray[Any]]] = field(default_factory=list)
    last: NDArray[np.float64] | None = None
    """Where it ends so far."""

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""
        return sum(mask.nbytes + values.nbytes for _, mask, values in self.parts)


class History:
    """The strokes on a source.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.lock = threading.RLock()
        """Held while a stroke is drawn, so that they follow one another."""
        self._strokes: deque[Stroke] = deque()
        self._undone: list[Stroke] = []

    def draw(
        self, stroke: Stroke, masks: Iterable[tuple[Roi, NDArray[np.bool_]]], value: Any
    ) -> int:
        """Give voxels a value, as one edit; return how many have changed."""
        number = 0
        with self.lock, self.source.edit() as array:
            for roi, touched in masks:
                mask = touched & (array[roi.slices] != value)
                # No more than what is changed, so that no more is computed anew.
                bounds = tight_box(mask)
                if bounds is None:
                    continue
                mask = mask[tuple(slice(*each) for each in bounds)]
                corner = zip(roi.start, bounds, strict=True)
                start = tuple(at + low for at, (low, _) in corner)
                box = Roi(start, tuple(map(sum, zip(start, mask.shape, strict=True))))
                data = array[box.slices]
                stroke.parts.append((box, mask, data[mask]))
                data[mask] = value
                array[box.slices] = data
                number += int(mask.sum())
        return number

    def begun(self, name: str) -> Stroke:
        """Return the stroke that is being drawn, or a new one."""
        with self.lock:
            if not self._strokes or self._strokes[-1].name != name:
                self.add(Stroke(name))
            return self._strokes[-1]

    def end(self, stroke: Stroke) -> None:
        """Note that a stroke is drawn no further."""
        with self.lock:
            stroke.name = None
            if not stroke.parts and self._strokes and self._strokes[-1] is stroke:
                self._strokes.pop()

    def add(self, stroke: Stroke) -> None:
        """Remember a stroke; what was taken back before cannot be drawn again any more."""
        with self.lock:
            self._undone.clear()
            if stroke.parts or stroke.name is not None:
                self._strokes.append(stroke)
            room = _MOST_BYTES - sum(each.nbytes for each in self._strokes)
            while len(self._strokes) > _MOST_STROKES or (room < 0 and len(self._strokes) > 1):
                room += self._strokes.popleft().nbytes

    def undo(self) -> bool:
        """Take the last stroke back; False if there is none."""
        with self.lock:
            if not self._strokes:
                return False
            self._undone.append(self._swap(self._strokes.pop()))
        return True

    def redo(self) -> bool:
        """Draw the stroke again that was taken back last; False if there is none."""
        with self.lock:
            if not self._undone:
                return False
            self._strokes.append(self._swap(self._undone.pop()))
        return True

    def _swap(self, stroke: Stroke) -> Stroke:
        """Put back what a stroke has replaced; return the stroke that undoes this."""
        opposite = Stroke()
        with self.source.edit() as array:
            for box, mask, values in reversed(stroke.parts):
                data = array[box.slices]
                opposite.parts.append((box, mask, data[mask]))
                data[mask] = values
                array[box.slices] = data
        return opposite
