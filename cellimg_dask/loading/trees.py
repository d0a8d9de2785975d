"""Values that are made from values: computed so that all threads have something to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from cellimg_dask.blocks.functions import BlockFunction, ValueFunction
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.geometry import CellGrid, tiles
from cellimg_dask.loading.crew import Crew
from cellimg_dask.loading.readers import Reader
from cellimg_dask.loading.running import Queue

__all__ = ["load_values"]


class ValueLoader(Protocol):
    """What has to be known of the loader of an image."""

    function: BlockFunction
    readers: tuple[Reader, ...]
    queue: Queue | None

    @property
    def grid(self) -> CellGrid:
        """Grid of the image."""
        ...

    def ancestry(self) -> Sequence[Any]:
        """Return all loaders that this one rests on, and itself, each after its own upstream."""
        ...

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


def load_values(loader: ValueLoader, index: int) -> NDArray[Any]:
    """Return a cell of an image of values, after all values that it is made from.

    Reading the cell would compute them as well, but node by node: where a node is begun while all
    threads are busy, none helps with it later.
    """
    if loader.queue is None or loader.queue.cells is None:
        # What is on the way up is kept, however small the cache is.
        held: dict[tuple[ValueLoader, int], NDArray[Any]] = {}

        def load(node: tuple[ValueLoader, int]) -> None:
            image, number = node
            held[node] = image.load(number)
            for child in _children(image, number):
                held.pop(child, None)

        loader.crew().run(_missing((loader, index)), load, loader.ancestry()[0].grid.num_cells)
    return loader.load(index)


def _missing(node: tuple[ValueLoader, int]) -> Iterator[tuple[ValueLoader, int]]:
    """Yield the values that have to be computed for one, each after what it is made from."""
    loader, index = node
    if loader.peek(index) is None:
        for child in _children(loader, index):
            yield from _missing(child)
        yield node


def _children(loader: ValueLoader, index: int) -> Iterator[tuple[ValueLoader, int]]:
    """Yield the values of other images that a value is made from."""
    images = [
        (number, reader)
        for number, reader in enumerate(loader.readers)
        if isinstance(getattr(getattr(reader, "loader", None), "function", None), ValueFunction)
    ]
    if not images:
        return
    plan = loader.plan(index)
    for number, reader in images:
        for box in plan.boxes(number):
            _, parts = tiles(reader.grid, [b.start for b in box], [b.stop for b in box])
            for tile, _, _ in parts:
                yield reader.loader, tile
