"""How much memory a run takes, before it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from cellimg_dask.blocks.errors import CellError
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.readers import ChunkedReader

__all__ = ["Projection", "Room", "project"]

_FUNCTION_FACTOR = 2.0


@dataclass(frozen=True)
class Projection:
    """Bytes that a run is expected to take at most, beyond the inputs that are in memory."""

    block: int
    """A block's inputs with their halo and its result, of the largest cell."""
    worker: int
    """A thread: its block, and as much again for what the function needs."""
    num_workers: int
    """How many compute at the same time."""
    cache: int
    """Bound of the caches that the run uses, of cells upstream and chunks."""

    @property
    def total(self) -> int:
        """Bytes of all together."""
        return self.num_workers * self.worker + self.cache

    def __str__(self) -> str:
        mib = 1 << 20
        return (
            f"{self.total / mib:,.0f} MiB: {self.num_workers} threads × {self.worker / mib:,.1f} "
            f"MiB (a block of {self.block / mib:,.1f} MiB, and its function) + "
            f"{self.cache / mib:,.0f} MiB of cache"
        )


@dataclass(frozen=True)
class Room:
    """A process in which blocks run, and what it may take."""

    num_threads: int
    """How many compute at the same time."""
    max_bytes: int
    """Bytes that it may take."""
    max_cache: int | None = None
    """Bound that its cache is given on the way, if any."""
    name: str = "the run"
    """How messages call it."""

    def has_room(self, loader: CellLoader) -> bool:
        """Whether an image can be computed here."""
        return self.projected(loader).total <= self.max_bytes

    def check(self, loader: CellLoader) -> None:
        """Refuse an image that takes more.

        Raises
        ------
        MemoryError
            With the numbers.
        """
        if not self.has_room(loader):
            raise MemoryError(
                f"{self.name} would take about {self.projected(loader)}, and "
                f"{self.max_bytes / (1 << 20):,.0f} MiB are allowed: use smaller cells, fewer "
                f"workers, or a smaller cache (set_cache), or give max_memory"
            )

    def projected(self, loader: CellLoader) -> Projection:
        """Return what computing an image takes here."""
        projected = project(loader, self.num_threads)
        if self.max_cache is None:
            return projected
        return replace(projected, cache=min(projected.cache, self.max_cache))


def project(
    loader: CellLoader, num_workers: int, *, factor: float = _FUNCTION_FACTOR
) -> Projection:
    """Return the memory that a run over an image takes.

    ``factor`` is what a block and its function take together, in blocks: how much a function
    needs nobody can know, SciPy's filters take about one copy.
    """
    grid = loader.grid
    if grid.num_cells == 0:
        return Projection(0, 0, num_workers, 0)
    # A cell in the middle has its full halo; the first one has the full extent of a cell.
    largest = 0
    for index in {0, grid.index(tuple(n // 2 for n in grid.grid_shape))}:
        try:
            plan = loader.plan(index)
        except CellError:
            # It will be reported, and takes no memory.
            continue
        read = sum(
            prod(window.length for window in windows) * reader.dtype.itemsize
            for windows, reader in zip(plan.windows, loader.readers, strict=True)
        )
        largest = max(largest, read + prod(plan.shape) * loader.dtype.itemsize)
    return Projection(largest, round(factor * largest), num_workers, _cached(loader))


def _cached(loader: CellLoader) -> int:
    """Return the most bytes of chunks and of cells upstream that caches can hold."""
    held: dict[int, list[int]] = {}
    for image in loader.ancestry():
        sources = [r for r in image.readers if isinstance(r, ChunkedReader)]
        shelves = [(r.shelf, r.shape, r.dtype.itemsize) for r in sources]
        if image is not loader:
            shelves.append((image.shelf, image.grid.shape, image.dtype.itemsize))
        for shelf, shape, itemsize in shelves:
            entry = held.setdefault(id(shelf.cache), [shelf.cache.max_bytes, 0])
            entry[1] += prod(shape) * itemsize
    return sum(min(bound, size) for bound, size in held.values())
