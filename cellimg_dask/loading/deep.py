"""Chains of images that are longer than Python's stack is deep.

A cell is computed by a few nested calls for each image of its chain. Past a certain length the
cells of some images on the way, the pillars, are loaded first, lowest image first, and held
until the inputs of the cell are read; so no call nests deeper than the distance between two
pillars. Only cells that would be loaded anyhow are: nothing is rounded up, and what is held needs
nothing above it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Protocol

from numpy.typing import NDArray

from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.geometry import CellGrid, tiles
from cellimg_dask.loading.crew import Crew
from cellimg_dask.loading.readers import Reader

__all__ = ["PILLAR_DISTANCE", "supported"]

# About fifteen calls for each image; Python allows a thousand, and the caller has used some.
PILLAR_DISTANCE = 10
"""Number of images between two pillars."""


class ChainLoader(Protocol):
    """What has to be known of the loader of an image in a chain."""

    depth: int
    readers: tuple[Reader, ...]

    @property
    def grid(self) -> CellGrid:
        """Grid of the image."""
        ...

    def crew(self) -> Crew:
        """Return the threads that read regions."""
        ...

    def ancestry(self) -> Sequence[ChainLoader]:
        """Return all loaders that this one rests on, and itself."""
        ...

    def plan(self, index: int) -> CellPlan:
        """Return the plan of a cell."""
        ...

    def load(self, index: int) -> NDArray[Any]:
        """Return a cell."""
        ...

    def peek(self, index: int) -> NDArray[Any] | None:
        """Return a cell if it is in memory."""
        ...


class _Mine(threading.local):
    def __init__(self) -> None:
        self.chains: list[set[ChainLoader]] = []


_mine = _Mine()


class supported:  # noqa: N801 - a context manager, used like a function
    """Hold the pillars of a cell while its inputs are read; for chains above that distance."""

    __slots__ = ("_held", "_loader", "_opened", "_plan")

    def __init__(self, loader: ChainLoader, plan: CellPlan) -> None:
        self._loader = loader
        self._plan = plan
        self._opened = False
        self._held: list[NDArray[Any]] = []

    def __enter__(self) -> None:
        loader = self._loader
        if any(loader in chain for chain in _mine.chains):
            # On the way already. A pillar looks whether the next one still stands: it may have
            # been forgotten because of a change.
            if loader.depth % PILLAR_DISTANCE == 0:
                self._load_pillars(only_next=True)
            return
        _mine.chains.append(set(loader.ancestry()))
        self._opened = True
        try:
            self._load_pillars(only_next=False)
        except BaseException:
            _mine.chains.pop()
            raise

    def __exit__(self, *exc: object) -> None:
        self._held = []
        if self._opened:
            _mine.chains.pop()

    def _load_pillars(self, *, only_next: bool) -> None:
        needed: dict[ChainLoader, set[int]] = {}
        # From the last image up, by depth: an image comes after all that read from it.
        waiting: list[tuple[int, int, ChainLoader]] = []
        _add_reads(self._loader, self._plan, needed, waiting)
        pillars = []
        while waiting:
            _, _, loader = heappop(waiting)
            is_pillar = loader.depth % PILLAR_DISTANCE == 0
            missing = []
            for index in sorted(needed[loader]):
                value = loader.peek(index)
                if value is not None:
                    self._held.append(value)
                    continue
                missing.append(index)
                if not (only_next and is_pillar):
                    _add_reads(loader, loader.plan(index), needed, waiting)
            if is_pillar:
                pillars.append((loader, missing))
        for loader, missing in reversed(pillars):
            loader.crew().run(missing, _Load(loader, self._held), len(missing))


class _Load:
    """Loads cells of one image and holds them."""

    def __init__(self, loader: ChainLoader, held: list[NDArray[Any]]) -> None:
        self._loader = loader
        self._held = held

    def __call__(self, index: int) -> None:
        self._held.append(self._loader.load(index))


def _add_reads(
    loader: ChainLoader,
    plan: CellPlan,
    needed: dict[ChainLoader, set[int]],
    waiting: list[tuple[int, int, ChainLoader]],
) -> None:
    """Add the cells of other images that a cell reads."""
    for number, reader in enumerate(loader.readers):
        above: ChainLoader | None = getattr(reader, "loader", None)
        if above is None:
            continue
        if above not in needed:
            needed[above] = set()
            heappush(waiting, (-above.depth, len(needed), above))
        for box in plan.boxes(number):
            _, parts = tiles(above.grid, [b.start for b in box], [b.stop for b in box])
            needed[above].update(index for index, _, _ in parts)
