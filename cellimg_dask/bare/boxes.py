"""Reading an array piece by piece, whatever kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

__all__ = ["boxes", "copy_boxes"]

_SLAB_BYTES = 16 << 20


def boxes(array: Any) -> Iterator[tuple[slice, ...]]:
    """Yield boxes that together are an array: its chunks, or slabs of some megabytes."""
    shape = tuple(int(n) for n in array.shape)
    if 0 in shape:
        return
    edges = _chunk_edges(array, shape)
    if edges is None:
        itemsize = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype)).itemsize
        edges, left = [], max(1, _SLAB_BYTES // max(itemsize, 1))
        # As long as the last axes fit whole.
        for extent in reversed(shape):
            step = max(1, min(extent, left))
            edges.insert(0, [*range(0, extent, step), extent])
            left //= extent
    yield from product(*[[slice(a, b) for a, b in zip(e, e[1:])] for e in edges])


def _chunk_edges(array: Any, shape: tuple[int, ...]) -> list[list[int]] | None:
    for known in ("shards", "chunks"):
        chunks = getattr(array, known, None)
        if not isinstance(chunks, (tuple, list)) or len(chunks) != len(shape):
            continue
        if all(isinstance(n, (int, np.integer)) and n > 0 for n in chunks):
            return [[*range(0, extent, int(n)), extent] for n, extent in zip(chunks, shape)]
        if all(isinstance(sizes, (tuple, list)) for sizes in chunks):
            edges = [[0, *np.cumsum(sizes).tolist()] for sizes in chunks]
            if tuple(edge[-1] for edge in edges) == shape:
                return edges
    return None


def copy_boxes(target: np.ndarray[Any, Any], array: Any) -> None:
    """Copy anything that has ``shape``, ``dtype`` and ``__getitem__``."""
    if isinstance(array, np.ndarray):
        target[...] = array
        return
    for box in boxes(array):
        target[box or ...] = np.asarray(array[box or ...])
