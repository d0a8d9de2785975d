"""Chains of images that are longer than Python's stack is deep.

A cell is computed by a few nested calls for each image of its chain. Past a certain length the
cells of some images on the way, the pillars, are loaded first, lowest image first, and held
until the cell is done; so no call nests deeper than the distance between two pillars. Only cells
that would be loaded anyhow are: nothing is rounded up, and what is held needs nothing above it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.geometry import tiles

if TYPE_CHECKING:
    from cellimg_dask.loading.loader import CellLoader

__all__ = ["supported"]

# About fifteen calls for each image; Python allows a thousand, and the caller has used some.
_PILLAR_DISTANCE = 20


class _Mine(threading.local):
    def __init__(self) -> None:
        self.chains: list[set[CellLoader]] = []


_mine = _Mine()


class supported:  # noqa: N801 - a context manager, used like a function
    """Hold the pillars of a cell while it is computed; nothing for chains of usual length."""

    __slots__ = ("_held", "_loader", "_plan")

    def __init__(self, loader: CellLoader, plan: CellPlan) -> None:
        self._loader = loader
        self._plan = plan
        self._held: list[NDArray[Any]] | None = None

    def __enter__(self) -> None:
        loader = self._loader
        if loader.depth <= _PILLAR_DISTANCE or any(loader in chain for chain in _mine.chains):
            return
        chain = loader.ancestry()
        _mine.chains.append(set(chain))
        self._held = []
        try:
            self._load_pillars(chain, self._held)
        except BaseException:
            _mine.chains.pop()
            raise

    def __exit__(self, *exc: object) -> None:
        if self._held is not None:
            _mine.chains.pop()
            self._held = None

    def _load_pillars(self, chain: list[CellLoader], held: list[NDArray[Any]]) -> None:
        needed: dict[CellLoader, set[int]] = {loader: set() for loader in chain}
        _add_reads(self._loader, self._plan, needed)
        # From the last image up: which cells are missing, and what each of them reads.
        for loader in reversed(chain[:-1]):
            missing = set()
            for index in needed[loader]:
                value = loader.shelf.peek(index)
                if value is None:
                    missing.add(index)
                    _add_reads(loader, loader.plan(index), needed)
                else:
                    held.append(value)
            needed[loader] = missing
        for loader in chain[:-1]:
            if loader.depth % _PILLAR_DISTANCE == 0:
                load = _Load(loader, held)
                loader.crew().run(sorted(needed[loader]), load, len(needed[loader]))


class _Load:
    """Loads cells of one image and holds them."""

    def __init__(self, loader: CellLoader, held: list[NDArray[Any]]) -> None:
        self._loader = loader
        self._held = held

    def __call__(self, index: int) -> None:
        self._held.append(self._loader.load(index))


def _add_reads(loader: CellLoader, plan: CellPlan, needed: dict[CellLoader, set[int]]) -> None:
    """Add the cells of other images that a cell reads."""
    for number, reader in enumerate(loader.readers):
        above: CellLoader | None = getattr(reader, "loader", None)
        if above is not None:
            for box in plan.boxes(number):
                _, parts = tiles(above.grid, [b.start for b in box], [b.stop for b in box])
                needed[above].update(index for index, _, _ in parts)
