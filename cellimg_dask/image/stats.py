"""What all images of the process have computed and hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import SupportsIndex, overload

from cellimg_dask.image.describe import size_text
from cellimg_dask.image.graph import name_of
from cellimg_dask.image.source import unsaved_bytes
from cellimg_dask.image.tables import as_columns, as_html_table
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.node import living_images
from cellimg_dask.state.cache import get_cache
from cellimg_dask.state.history import History

__all__ = ["ImageStats", "StatsTable", "stats"]

_HEAD = {
    "function": "function",
    "shape": "shape",
    "cells": "cells",
    "cached": "cached",
    "dirty": "dirty",
    "hits": "hits",
    "misses": "misses",
    "joins": "joins",
    "loads": "loads",
    "load_seconds": "seconds",
    "bytes": "bytes",
    "evictions": "evictions",
    "errors": "errors",
}
"""Columns, and what stands above them."""
_RIGHT = range(2, len(_HEAD))
_MOST_ROWS = 50


@dataclass(frozen=True, slots=True)
class ImageStats:
    """Counters of one image, its snapshots included; see also `CacheStats`."""

    function: str
    """Name of the function, with its parameters."""
    shape: tuple[int, ...]
    """Extent along each axis, in voxels."""
    cells: int
    """Cells that it has."""
    cached: int
    """Cells of its present edition that are in memory."""
    dirty: int
    """Cells that were forgotten for a change and have not been computed since."""
    hits: int
    """Cells found in memory."""
    misses: int
    """Cells that had to be loaded."""
    joins: int
    """Requests that waited for a load that was already running."""
    loads: int
    """Loads that succeeded."""
    load_seconds: float
    """Seconds spent in loads, summed over threads."""
    bytes: int
    """Bytes held now, those of other parameters and of snapshots included."""
    evictions: int
    """Cells dropped for want of room."""
    errors: int
    """Loads that raised."""


class StatsTable(Sequence[ImageStats]):
    """A row per image, those that hold most bytes first.

    Shown as text, and in notebooks as a table.
    """

    def __init__(
        self,
        rows: Iterable[ImageStats],
        cache_bytes: int,
        cache_max_bytes: int,
        unsaved_bytes: int,
    ) -> None:
        self._rows = tuple(sorted(rows, key=lambda row: (-row.bytes, -row.loads, row.function)))
        self.cache_bytes = cache_bytes
        """Bytes in the shared cache: cells of images, chunks of stores, and what is not saved."""
        self.cache_max_bytes = cache_max_bytes
        """Bound on the bytes in the shared cache."""
        self.unsaved_bytes = unsaved_bytes
        """Bytes of changed cells of all sources that are not in their stores yet."""

    @property
    def total(self) -> ImageStats:
        """The sum of all rows."""
        counts = [
            item.name for item in fields(ImageStats) if item.name not in ("function", "shape")
        ]
        sums = {name: sum(getattr(row, name) for row in self._rows) for name in counts}
        return ImageStats(f"{len(self):,} image{'' if len(self) == 1 else 's'}", (), **sums)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> ImageStats: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ImageStats, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> ImageStats | tuple[ImageStats, ...]:
        return self._rows[index]

    def __repr__(self) -> str:
        rows = [list(_HEAD.values()), *self._shown(), self._total_texts()]
        return "\n".join([*as_columns(rows, _RIGHT), self._cache_text()])

    def _repr_html_(self) -> str:
        table = as_html_table(list(_HEAD.values()), self._shown(), self._total_texts(), _RIGHT)
        return f"{table}<p>{self._cache_text()}</p>"

    def _shown(self) -> list[list[str]]:
        """Return the first rows as text, with a last one that says how many there are besides."""
        shown = [_texts(row) for row in self._rows[:_MOST_ROWS]]
        left_out = len(self) - len(shown)
        if left_out:
            shown.append([f"… {left_out:,} more …", *[""] * (len(_HEAD) - 1)])
        return shown

    def _total_texts(self) -> list[str]:
        texts = _texts(self.total)
        texts[1] = ""
        return texts

    def _cache_text(self) -> str:
        text = f"shared cache: {size_text(self.cache_bytes)} of {size_text(self.cache_max_bytes)}"
        if self.unsaved_bytes:
            text += f"; sources have {size_text(self.unsaved_bytes)} that are not saved"
        return text


def stats() -> StatsTable:
    """Return the counters of all images that there are in this process.

    Those that only other images hold are among them. An image and its snapshots share their
    counters and have one row.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> image = ci.map_cells(np.negative, np.zeros((40, 40)), cell_shape=20)
    >>> image[:5, :5].shape
    (5, 5)
    >>> [row] = [row for row in ci.stats() if row.shape == (40, 40)]
    >>> row.function, row.cells, row.loads, row.bytes
    ('negative', 4, 1, 3200)
    """
    cache = get_cache()
    rows = [_row(loader) for loader in _loaders()]
    return StatsTable(rows, cache.bytes, cache.max_bytes, unsaved_bytes())


def _loaders() -> list[CellLoader]:
    """Return a loader of each image, the present one if there is."""
    images = living_images.all()
    # What changes comes before snapshots: their counters are the same.
    images.sort(key=lambda node: node.is_snapshot)
    chosen: dict[History, CellLoader] = {}
    seen: set[CellLoader] = set()
    # Without recursion: a chain may be deeper than Python's stack.
    stack: list[CellLoader] = [node.now for node in images]
    for loader in stack:
        chosen.setdefault(loader.history, loader)
    while stack:
        loader = stack.pop()
        if loader not in seen:
            seen.add(loader)
            chosen.setdefault(loader.history, loader)
            stack.extend(loader.upstream())
    return list(chosen.values())


def _row(loader: CellLoader) -> ImageStats:
    counted = loader.shelf.stats()
    return ImageStats(
        function=name_of(loader.function.name, loader.params),
        shape=loader.grid.shape,
        cells=loader.grid.num_cells,
        cached=len(loader.held()),
        dirty=loader.num_outdated(),
        hits=counted.hits,
        misses=counted.misses,
        joins=counted.joins,
        loads=counted.loads,
        load_seconds=counted.load_seconds,
        bytes=counted.bytes,
        evictions=counted.evictions,
        errors=counted.errors,
    )


def _texts(row: ImageStats) -> list[str]:
    texts = []
    for name in _HEAD:
        value = getattr(row, name)
        if name == "bytes":
            texts.append(size_text(value))
        elif name == "load_seconds":
            texts.append(f"{value:.3f}")
        else:
            texts.append(f"{value:,}" if isinstance(value, int) else str(value))
    return texts
