"""Chains of images that are longer than Python's stack is deep.

A cell is computed by a few nested calls for each image of its chain. Past a certain length the
cells of some images on the way, the pillars, are loaded first, lowest image first, and held
until the cell is done; so no call nests deeper than the distance between two pillars.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.state.dirty import Region, bounds_read, cells_meeting, hull

if TYPE_CHECKING:
    from cellimg_dask.loading.loader import CellLoader

__all__ = ["supported"]

# About fifteen calls for each image; Python allows a thousand, and the caller has used some.
_PILLAR_DISTANCE = 20


class _Mine(threading.local):
    supported = False


_mine = _Mine()


class supported:  # noqa: N801 - a context manager, used like a function
    """Hold the pillars of a cell while it is computed; nothing for chains of usual length."""

    __slots__ = ("_held", "_loader", "_plan")

    def __init__(self, loader: CellLoader, plan: CellPlan) -> None:
        self._loader = loader
        self._plan = plan
        self._held: list[NDArray[Any]] | None = None

    def __enter__(self) -> None:
        if self._loader.depth > _PILLAR_DISTANCE and not _mine.supported:
            _mine.supported = True
            self._held = []
            try:
                self._load_pillars(self._held)
            except BaseException:
                _mine.supported = False
                raise

    def __exit__(self, *exc: object) -> None:
        if self._held is not None:
            _mine.supported = False
            self._held = None

    def _load_pillars(self, held: list[NDArray[Any]]) -> None:
        chain = self._loader.ancestry()
        cell = tuple(((a, b),) for a, b in zip(self._plan.start, self._plan.stop, strict=True))
        needed: dict[CellLoader, list[Region]] = {self._loader: [cell]}
        # From the last image up: what each reads of those above it, as bounding boxes.
        for loader in reversed(chain):
            needed[loader] = [hull(needed[loader])]
            cells = cells_meeting(loader.grid, needed[loader][0])
            for number, reader in enumerate(loader.readers):
                above: CellLoader | None = getattr(reader, "loader", None)
                if above is not None:
                    bounds = bounds_read(loader.planner, number, cells) or tuple(
                        (0, extent) for extent in reader.shape
                    )
                    needed.setdefault(above, []).append(tuple((pair,) for pair in bounds))
        for loader in chain[:-1]:
            if loader.depth % _PILLAR_DISTANCE == 0:
                cells = cells_meeting(loader.grid, needed[loader][0])
                loader.crew().run(cells, _Holder(loader, held), len(cells))


class _Holder:
    """Loads cells of one image and holds them."""

    def __init__(self, loader: CellLoader, held: list[NDArray[Any]]) -> None:
        self._loader = loader
        self._held = held

    def __call__(self, index: int) -> None:
        self._held.append(self._loader.load(index))
