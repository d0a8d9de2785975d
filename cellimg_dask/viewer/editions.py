"""How often layers have changed, and which of these changes a page has shown."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cellimg_dask.image.cellimg import CellImg

__all__ = ["Editions"]


class Editions:
    """Counts the changes of layers.

    Parameters
    ----------
    changed : method
        Called with the name of a layer and its edition when it has changed; held weakly.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, changed: Callable[[str, int], object]) -> None:
        self.seen = threading.Condition()
        """Notified when a page has shown something."""
        self._changed = weakref.WeakMethod(changed)
        self._numbers: dict[str, int] = {}
        self._shown: dict[str, int] = {}
        # Callbacks of images are held weakly by them.
        self._watches: dict[str, list[Callable[[Any], object]]] = {}

    def watch(self, name: str, images: Iterable[CellImg]) -> None:
        """Begin to count the changes of a layer's levels."""

        def noticed(_: Any) -> None:
            self.renew(name)

        with self.seen:
            # A page may know a layer that had this name before.
            self._numbers[name] = self._shown.get(name, -1) + 1
            self._watches[name] = [image.on_dirty(noticed) for image in images]

    def renew(self, name: str) -> None:
        """Count a change of a layer."""
        with self.seen:
            if name not in self._numbers:
                return
            self._numbers[name] += 1
            number = self._numbers[name]
        changed = self._changed()
        if changed is not None:
            changed(name, number)

    def forget(self, name: str) -> None:
        """Count no more for a layer."""
        with self.seen:
            self._numbers.pop(name, None)
            self._watches.pop(name, None)

    def numbers(self) -> dict[str, int]:
        """Return the editions of all layers."""
        with self.seen:
            return dict(self._numbers)

    def note_shown(self, editions: Mapping[str, int]) -> None:
        """Note what a page has shown."""
        with self.seen:
            for name, edition in editions.items():
                self._shown[str(name)] = max(self._shown.get(name, -1), int(edition))
            self.seen.notify_all()

    def are_shown(self) -> bool:
        """Whether a page has shown the last edition of each layer."""
        return all(self._shown.get(name, -1) >= number for name, number in self._numbers.items())

    def close(self) -> None:
        """Count no more."""
        with self.seen:
            self._numbers.clear()
            self._watches.clear()
            self.seen.notify_all()
