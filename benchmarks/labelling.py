"""Connected components: cases of one process each."""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks.harness import MIB, memory_now, memory_peak, typical_seconds

TILE = 128


@functools.cache
def tile() -> np.ndarray:
    """Return a block of smooth noise above a threshold, that fits to itself on all sides."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).random((TILE,) * 3, dtype=np.float32)
    smooth = gaussian_filter(noise, 2, mode="wrap")
    return smooth > np.quantile(smooth, 0.7)


def mask_of(size: int) -> np.ndarray:
    count = -(-size // TILE)
    return np.tile(tile(), (count,) * 3)[:size, :size, :size].copy()


def components(method: str, size: int, cell: int) -> dict[str, Any]:
    """Label an array: seconds, and peak memory beyond the mask and the result."""
    compute = METHODS[method]
    compute(mask_of(16), 8)
    ci.get_cache().clear()
    mask = mask_of(size)
    gc.collect()
    before = memory_now()
    began = perf_counter()
    labels, objects, facts = compute(mask, cell)
    seconds = perf_counter() - began
    if objects is None:
        objects = int(np.unique(labels).size - 1)
    beyond = memory_peak() - before - labels.nbytes
    return {"seconds": seconds, "peak_mib": max(0, beyond) / MIB, "objects": objects, **facts}


def _scipy(mask: np.ndarray, cell: int) -> tuple[np.ndarray, int, dict[str, float]]:
    from scipy.ndimage import label

    labels, count = label(mask)
    return labels, count, {}


def _cc3d(mask: np.ndarray, cell: int) -> tuple[np.ndarray, int, dict[str, float]]:
    import cc3d

    labels, count = cc3d.connected_components(mask, connectivity=6, return_N=True)
    return labels, count, {}


def _cells(mask: np.ndarray, cell: int) -> tuple[np.ndarray, int, dict[str, float]]:
    image = ci.label(mask, cell_shape=cell)
    labels = image[...]
    return labels, image.num_objects(), {}


def _cells_past(mask: np.ndarray, cell: int) -> tuple[np.ndarray, int, dict[str, float]]:
    # A cache that holds the labels of the blocks, 4 bytes a voxel, and not also the result's 8.
    image = ci.label(mask, cell_shape=cell, cache=ci.CellCache(8 * mask.size))
    labels = image[...]
    return labels, image.num_objects(), {}


def _dask_image(mask: np.ndarray, cell: int) -> tuple[np.ndarray, None, dict[str, float]]:
    import dask.array as da
    from dask_image.ndmeasure import label

    began = perf_counter()
    chunks = da.from_array(mask, chunks=cell)
    lazy, _ = label(chunks)
    graph = lazy.__dask_graph__()
    tasks = len(dict(graph)) / chunks.npartitions
    build = perf_counter() - began
    return lazy.compute(scheduler="threads"), None, {"tasks": tasks, "build": build}


METHODS: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, int | None, dict[str, float]]]] = {
    "scipy": _scipy,
    "cc3d": _cc3d,
    "cells": _cells,
    "cells_past": _cells_past,
    "dask_image": _dask_image,
}


def label_graph(size: int, cell: int) -> dict[str, float]:
    """Build the graph of a labelled image as a cluster would run it, and count its tasks."""
    from cellimg_dask.queues.tasks import graph_of

    image = ci.label(np.broadcast_to(np.zeros((), bool), (size,) * 3), cell_shape=cell)
    build = typical_seconds(image.to_dask, 5)
    tasks = len(dict(graph_of(image.loader, elsewhere=True)))
    return {"tasks_per_cell": tasks / image.grid.num_cells, "build_ms": 1000 * build}


def _fill(block: ci.Block) -> None:
    place = tuple(
        slice(low % TILE, low % TILE + n) for low, n in zip(block.min, block.shape, strict=True)
    )
    block.data[...] = tile()[place]


def label_into_zarr(size: int, cell: int, cache_mib: int) -> dict[str, float]:
    """Label an image that is nowhere in memory, into a store."""
    ci.set_cache(cache_mib * MIB)
    tile()
    with tempfile.TemporaryDirectory(prefix="cellimg-benchmark-") as folder:
        warm = ci.label(mask_of(16), cell_shape=8)
        ci.run(warm, f"{folder}/warm.zarr", progress=False)
        gc.collect()
        before = memory_now()
        mask = ci.fill_cells(_fill, ci.CellGrid((size,) * 3, (cell,) * 3), dtype=bool)
        began = perf_counter()
        report = ci.run(ci.label(mask), f"{folder}/labels.zarr", progress=False)
        seconds = perf_counter() - began
    assert not report.failed, report.failed
    return {"seconds": seconds, "peak_mib": (memory_peak() - before) / MIB}
