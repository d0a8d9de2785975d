"""dask's own ways, with the arguments that suit them best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np

from benchmarks.harness import CORES


def chunked(source: Any, chunks: Any) -> da.Array:
    """Return an array in memory, or an object that is sliced, as a dask array."""
    meta = np.empty((0,) * len(source.shape), source.dtype)
    return da.from_array(source, chunks=chunks, name=False, meta=meta)


def from_zarr(source: Any) -> da.Array:
    return da.from_zarr(source)


def overlapped(lazy: da.Array, f: Callable[..., Any], depth: Any) -> da.Array:
    meta = np.empty((0,) * lazy.ndim, lazy.dtype)
    return da.map_overlap(f, lazy, depth=depth, boundary="none", dtype=lazy.dtype, meta=meta)


def blocked(lazy: da.Array, f: Callable[..., Any]) -> da.Array:
    meta = np.empty((0,) * lazy.ndim, lazy.dtype)
    return lazy.map_blocks(f, dtype=lazy.dtype, meta=meta)


def computed(lazy: da.Array, **where: Any) -> np.ndarray:
    """Compute on two threads, or with other arguments of `dask.compute`."""
    return np.asarray(lazy.compute(**(where or {"scheduler": "threads", "num_workers": CORES})))
