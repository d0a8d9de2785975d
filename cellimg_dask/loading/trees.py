"""Values that are made from values: computed so that all threads have something to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from cellimg_dask.blocks.functions import BlockFunction, ValueFunction
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.geometry import tiles
from cellimg_dask.loading.crew import Crew
from cellimg_dask.loading.readers import Reader
from cellimg_dask.loading.running import Queue

__all__ = ["load_values"]


class ValueLoader(Protocol):
    """What has to be known of the loader of an image."""

    function: BlockFunction
    readers: tuple[Reader, ...]
    queue: Queue | None

    def crew(self) -> Crew:
        """Return the threads that read regions."""
        ...

    def load(self, index: int) -> NDArray[Any]:
        """Return the whole cell ``index``."""
        ...

    def peek(self, index: int) -> NDArray[Any] | None:
        """Return a cell if it is in memory, else None; computes nothing."""
        ...

    def plan(self, index: int) -> CellPlan:
        """Return the plan of a cell."""
        ...

    def is_loading(self, index: int) -> bool:
        """Whether some thread computes a cell at the moment."""
        ...


Node: TypeAlias = tuple[ValueLoader, int]
"""An image of values, and one of its cells."""


def load_values(loader: ValueLoader, index: int) -> NDArray[Any]:
    """Return a cell of an image of values, after all values that it is made from.

    Reading the cell would compute them as well, but node by node: where a node is begun while all
    threads are busy, none would help with it later.
    """
    there = loader.peek(index)
    if there is not None:
        return there
    if loader.queue is None or loader.queue.cells is None:
        walk = _Walk()
        crew = loader.crew()
        crew.run(walk.ready((loader, index), None), walk.load, crew.num_threads)
        there = walk.held.get((loader, index))
        if there is not None:
            return there
    return loader.load(index)


class _Walk:
    """Computes a value after all that it is made from, in several threads.

    Nobody waits: a value is computed by whoever computed the last of those that it is made from.
    What others compute at the moment is left to them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Node, _Open] = {}
        self.held: dict[Node, NDArray[Any]] = {}
        """Values on the way up, which are kept so, however small the cache is."""

    def ready(self, node: Node, parent: Node | None) -> Iterator[Node]:
        """Yield the values that can be computed at once, for one that is not there."""
        mine = _Open(parent, list(_children(*node)))
        with self._lock:
            self._open[node] = mine
        for child in mine.children:
            image, number = child
            there = image.peek(number)
            if there is not None:
                self.held[child] = there
            elif not image.is_loading(number) and child not in self._open:
                with self._lock:
                    mine.missing += 1
                yield from self.ready(child, node)
        if self._arrived(node):
            yield node

    def load(self, node: Node) -> None:
        """Compute a value, and what can be computed thereupon."""
        following: Node | None = node
        while following is not None:
            image, number = following
            value = image.load(number)
            with self._lock:
                self.held[following] = value
                done = self._open.pop(following)
                for child in done.children:
                    self.held.pop(child, None)
            following = done.parent
            if following is not None and not self._arrived(following):
                return

    def _arrived(self, node: Node) -> bool:
        with self._lock:
            self._open[node].missing -= 1
            return self._open[node].missing == 0


@dataclass
class _Open:
    """What is known of a value that is to be computed."""

    parent: Node | None
    """What is made from it."""
    children: list[Node]
    """What it is made from."""
    missing: int = 1
    """How many of these are still to come, and one until all have been looked at."""


def _children(loader: ValueLoader, index: int) -> Iterator[Node]:
    images = [
        (number, reader)
        for number, reader in enumerate(loader.readers)
        if isinstance(getattr(getattr(reader, "loader", None), "function", None), ValueFunction)
    ]
    if not images:
        return
    plan = loader.plan(index)
    for number, reader in images:
        above: Any = reader
        for box in plan.boxes(number):
            _, parts = tiles(above.grid, [b.start for b in box], [b.stop for b in box])
            for tile, _, _ in parts:
                yield above.loader, tile
