"""What a server has to do, has done, and what went wrong: as an image of cells, and as numbers."""

from __future__ import annotations

import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from cellimg_dask.geometry import CellGrid, Space
from cellimg_dask.image.describe import size_text
from cellimg_dask.io.ome import image_attributes
from cellimg_dask.server.chunks import ServedArray, position_of
from cellimg_dask.server.documents import array_v3, chunk_shape, group_v3
from cellimg_dask.server.layers import Layer
from cellimg_dask.state.cache import get_cache

__all__ = ["CACHED", "COMPUTING", "FAILED", "UNKNOWN", "WAITING", "Work"]

UNKNOWN, CACHED, COMPUTING, FAILED, WAITING = range(5)
"""What becomes of a cell, as the overlay of work shows it."""

_CELLS_AT_ONCE = 4096
_MOST_FAILED = 1 << 16
_SHOWN_ERRORS = 20


class Work:
    """What a server has to do, and what went wrong.

    Notes
    -----
    Written by the thread of the event loop.
    """

    def __init__(self) -> None:
        self.num_chunks = 0
        """Chunks that were sent."""
        self.num_bytes = 0
        """Of these chunks."""
        self.num_cancelled = 0
        """Requests whose reader went before the cell was there."""
        self.num_refused = 0
        """Requests that were too many."""
        self.num_errors = 0
        """Requests of cells that failed."""
        self._asked: Counter[tuple[ServedArray, int]] = Counter()
        self._failed: weakref.WeakKeyDictionary[ServedArray, dict[int, bytes | None]] = (
            weakref.WeakKeyDictionary()
        )
        # The edition for which it is known that these are still failures.
        self._counted: weakref.WeakKeyDictionary[ServedArray, Any] = weakref.WeakKeyDictionary()
        self._errors: deque[dict[str, Any]] = deque(maxlen=_SHOWN_ERRORS)

    def begin(self, array: ServedArray, index: int) -> None:
        """Note that somebody waits for a cell."""
        self._asked[array, index] += 1

    def end(self, array: ServedArray, index: int) -> None:
        """Note that somebody does so no more."""
        self._asked[array, index] -= 1
        if not self._asked[array, index]:
            del self._asked[array, index]

    def succeeded(self, array: ServedArray, index: int) -> None:
        """Note that a cell is there."""
        failed = self._failed.get(array)
        if failed:
            failed.pop(index, None)

    def failed(self, name: str, array: ServedArray, index: int, text: str) -> None:
        """Note why a cell is not there."""
        self.num_errors += 1
        failed = self._failed.setdefault(array, {})
        if len(failed) >= _MOST_FAILED:
            del failed[next(iter(failed))]
        failed[index] = array.tag(array.image.loader, index)
        position = array.grid.position(index)
        self._errors.appendleft(
            {"time": time.time(), "layer": name, "position": position, "text": text}
        )

    def last_error(self) -> str:
        """Return what went wrong last, as the end of a sentence; nothing if nothing did."""
        if not self._errors:
            return ""
        error = self._errors[0]
        return f"; what failed last is of layer {error['layer']!r}: {error['text']}"

    # ------------------------------------------------------------------ as an image

    @staticmethod
    def documents(
        name: str, spaces: Sequence[Space], arrays: Sequence[ServedArray]
    ) -> dict[str, Any]:
        """Return the documents of the overlay: a voxel per cell, uint8, an array per level."""
        described = {}
        for level, (array, space) in enumerate(zip(arrays, spaces, strict=True)):
            described[str(level)] = array_v3(
                _overlay(array), np.dtype(np.uint8), 0, None, space.shrunk(array.shape)
            )
        coarse = spaces[0].shrunk(arrays[0].shape)
        # Its levels are no smaller copies of one another, so there is only one scale.
        attributes = image_attributes([coarse], ["0"], f"work on {name}", is_labels=True)
        documents = {f"{level}/zarr.json": document for level, document in described.items()}
        return {"zarr.json": group_v3(attributes, described), **documents}

    def chunk(self, array: ServedArray, parts: Sequence[str]) -> memoryview | None:
        """Return a chunk of the overlay; None where nothing is known of its cells."""
        overlay = _overlay(array)
        number = position_of(parts, overlay.grid_shape)
        if number is None or not overlay.num_cells:
            return None
        roi = overlay.roi(overlay.position(number))
        loader = array.image.loader
        peek, is_loading = loader.peek, loader.is_loading
        failed = self._failed.get(array, {})
        axes = [
            [place * stride for place in range(low, high)]
            for low, high, stride in zip(roi.start, roi.stop, array.grid.strides, strict=True)
        ]
        states = []
        for index in map(sum, product(*axes)):
            if peek(index) is not None:
                state = CACHED
            elif is_loading(index):
                state = COMPUTING
            elif index in failed and failed[index] == array.tag(loader, index):
                state = FAILED
            else:
                state = WAITING if (array, index) in self._asked else UNKNOWN
            states.append(state)
        if not any(states):
            return None
        found = np.zeros(chunk_shape(overlay), np.uint8)
        found[tuple(map(slice, roi.shape))] = np.reshape(states, roi.shape)
        return found.reshape(-1).data

    # ------------------------------------------------------------------ as numbers

    def status(
        self, layers: Sequence[tuple[str, Layer, Sequence[ServedArray]]], num_open: int
    ) -> dict[str, Any]:
        """Return what the page of the status shows."""
        cache = get_cache()
        return {
            "time": time.monotonic(),
            "requests": {
                "open": num_open,
                "chunks": self.num_chunks,
                "bytes": self.num_bytes,
                "cancelled": self.num_cancelled,
                "refused": self.num_refused,
                "errors": self.num_errors,
            },
            "cache": {
                "bytes": cache.bytes,
                "max_bytes": cache.max_bytes,
                "text": f"{size_text(cache.bytes)} of {size_text(cache.max_bytes)}",
            },
            "layers": [
                {
                    "name": name,
                    "kind": layer.kind,
                    "dtype": str(layer.dtype),
                    "levels": [self._of_level(array) for array in arrays],
                }
                for name, layer, arrays in layers
            ],
            "errors": list(self._errors),
        }

    def _of_level(self, array: ServedArray) -> Mapping[str, Any]:
        loader = array.image.loader
        counted = loader.shelf.stats()
        return {
            "shape": array.grid.shape,
            "cell_shape": array.grid.cell_shape,
            "cells": array.grid.num_cells,
            "cached": len(loader.held()),
            "computing": loader.num_loading(),
            "waiting": sum(
                1
                for each, index in list(self._asked)
                if each is array and not loader.is_loading(index)
            ),
            "failed": self._num_failed(array),
            "only_reads": array.only_reads,
            "hits": counted.hits,
            "misses": counted.misses,
            "joins": counted.joins,
            "loads": counted.loads,
            "load_seconds": counted.load_seconds,
            "bytes": counted.bytes,
            "evictions": counted.evictions,
            "errors": counted.errors,
        }

    def _num_failed(self, array: ServedArray) -> int:
        """Return how many cells have failed, and have not changed since."""
        failed, loader = self._failed.get(array, {}), array.image.loader
        if failed and self._counted.get(array) != (loader.edition, loader.signature):
            for index, tag in list(failed.items()):
                if tag != array.tag(loader, index):
                    del failed[index]
            self._counted[array] = loader.edition, loader.signature
        return len(failed)


def _overlay(array: ServedArray) -> CellGrid:
    """Return the grid of the overlay: its voxels are cells."""
    ndim = array.grid.ndim
    edge = int(_CELLS_AT_ONCE ** (1 / ndim) + 1e-9) if ndim else 1
    return CellGrid(array.grid.grid_shape, (max(1, edge),) * ndim)
