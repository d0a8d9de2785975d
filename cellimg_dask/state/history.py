"""When which cells changed.

Changes of all images and sources are numbered by one clock. A change is prepared under its next
number, and takes place for everybody at once when the clock moves on.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["Clock", "History", "clock"]

_REMEMBERED = 64


class Clock:
    """Counts the changes that have taken place."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0
        """Of the last change."""


clock = Clock()


class History:
    """The last few changes of one image.

    Written by one thread at a time, read by any.
    """

    __slots__ = ("__weakref__", "_changes", "_lost", "last")

    def __init__(self) -> None:
        self.last = 0
        """Number of the last change."""
        self._changes: tuple[tuple[int, Collection[int]], ...] = ()
        self._lost = 0

    def add(self, number: int, cells: Collection[int]) -> None:
        """Note that cells change."""
        if len(self._changes) == _REMEMBERED:
            self._lost = self._changes[0][0]
        self._changes = (*self._changes[1 - _REMEMBERED :], (number, cells))
        self.last = number

    def changed(self, index: int, since: int) -> bool:
        """Whether a cell changed after the change ``since``, or that is no longer known."""
        changes = self._changes
        return self._lost > since or any(
            index in cells for number, cells in reversed(changes) if number > since
        )

    def cells_since(self, since: int) -> list[Collection[int] | None]:
        """Return the cells of each change after ``since``; None for all of them."""
        changes = self._changes
        if self._lost > since:
            return [None]
        return [cells for number, cells in changes if number > since]

    def changes_since(self, since: int) -> list[tuple[int, Collection[int]]] | None:
        """Return number and cells of each change after ``since``; None if some are forgotten."""
        changes = self._changes
        if self._lost > since:
            return None
        return [change for change in changes if change[0] > since]
