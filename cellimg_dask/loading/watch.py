"""Telling whoever watches an image what has changed of it."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

from cellimg_dask.geometry import Roi
from cellimg_dask.state.cells import Cells, boxes_of

__all__ = ["Change", "Watchers", "deliver", "post"]

_logger = logging.getLogger("cellimg_dask")


@dataclass(frozen=True, eq=False)
class Change:
    """What one change of an input made of one image.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> source = ci.Source(np.zeros(6), cell_shape=2)
    >>> seen = []
    >>> watch = source.on_dirty(lambda change: seen.append(list(change.cells)))
    >>> with source.edit() as a:
    ...     a[1:3] = 1
    >>> seen
    [[0, 1]]
    """

    number: int
    """Of the change; changes of all images are numbered together."""
    cells: Cells
    """Flat indices of the cells that are computed anew when they are read, and of no others.
    Behind an ``index_map`` they are found by asking it for every cell of the grid, as soon as one
    iterates; to ask whether one cell is among them is cheap."""

    @cached_property
    def regions(self) -> list[Roi]:
        """Boxes without overlap that make up just these cells."""
        return list(boxes_of(self.cells))


class Watchers:
    """The callbacks of one image, held weakly.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._callbacks: tuple[weakref.ref[Any], ...] = ()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def add(self, callback: Callable[[Change], object]) -> None:
        """Add a callback, which is dropped when nobody else holds it any more."""
        # Made anew each time it is looked up, a bound method is alive as long as its object.
        kind = weakref.WeakMethod if isinstance(callback, MethodType) else weakref.ref
        try:
            reference = kind(callback)
        except TypeError:
            raise TypeError(
                f"the callback, a {type(callback).__name__}, cannot be held weakly; give a "
                f"function or a method"
            ) from None
        with self._lock:
            living = [known for known in self._callbacks if known() is not None]
            self._callbacks = (*living, reference)

    def call(self, change: Change) -> None:
        """Call all with a change; one that raises is logged."""
        for reference in self._callbacks:
            callback = reference()
            if callback is None:
                continue
            try:
                callback(change)
            except Exception:
                _logger.exception("%r, called because an image has changed, raised", callback)
            # What is logged may hold this frame.
            del callback


class _Post:
    """Changes that have taken place and that watchers have not been told yet."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Watchers, Change]] = deque()
        self.lock = threading.Lock()


_post = _Post()


def post(watchers: Watchers, change: Change) -> None:
    """Have watchers told of a change with the next `deliver`; in the order of the changes."""
    _post.waiting.append((watchers, change))


def deliver() -> None:
    """Tell watchers what was posted.

    One thread tells everybody at a time, in the order of the changes. If another one is at it,
    or this one further up, because a callback has changed something, that one goes on with
    what is new and this call returns at once: so nobody ever waits for callbacks of others.
    """
    while _post.waiting and _post.lock.acquire(blocking=False):
        try:
            while _post.waiting:
                watchers, change = _post.waiting.popleft()
                watchers.call(change)
        finally:
            _post.lock.release()


def _after_fork_in_child() -> None:
    global _post
    _post = _Post()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
