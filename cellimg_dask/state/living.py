"""What there is of a kind in this process, as long as somebody holds it."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Generic, TypeVar

__all__ = ["Living"]

T = TypeVar("T")


class Living(Generic[T]):
    """All that were added and are still held elsewhere.

    To be made once, for the life of the process.

    Notes
    -----
    Thread-safe; a forked process goes on with what it inherits.
    """

    def __init__(self) -> None:
        self._members: weakref.WeakSet[T] = weakref.WeakSet()
        # The collector may run anywhere, and what it runs may add something.
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def add(self, member: T) -> None:
        """Add something, which is held weakly."""
        with self._lock:
            self._members.add(member)

    def all(self) -> list[T]:
        """Return all, in no order."""
        with self._lock:
            return list(self._members)

    def _renew(self) -> None:
        # Another thread may have been at it when this process was forked.
        self._lock = threading.RLock()
        self._members = weakref.WeakSet(self._members)
