"""Reading: cells that are cached, and the first read of a lazy image."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.harness import HALO, typical_seconds


def warm_plane(size: int, cell: int, dtype: str, times: int) -> dict[str, Any]:
    """Read a plane that lies in cached cells again and again."""
    shape = (cell, size, size)
    image = np.random.default_rng(7).integers(0, 255, shape).astype(dtype)
    z = cell // 3
    img = ci.map_cells(np.copy, image, dtype=image.dtype, cell_shape=cell)
    img.prefetch().result()
    indices = list(range(img.grid.num_cells))
    result = {
        "cells": len(indices),
        "plane_ms": 1e3 * typical_seconds(lambda: img[z], times),
        "numpy_ms": 1e3 * typical_seconds(lambda: image[z].copy(), times),
        "load_us": 1e6 * typical_seconds(lambda: _load_all(img, indices), times) / len(indices),
    }
    assert np.array_equal(img[z], image[z])
    assert img.stats().loads == len(indices)
    store, reads = _tensorstore_pool(image, cell)
    if store is not None:
        assert np.array_equal(store[z].read().result(), image[z])
        loaded = len(reads)
        result["tensorstore_ms"] = 1e3 * typical_seconds(lambda: store[z].read().result(), times)
        assert len(reads) == loaded, "the pool of tensorstore did not hold the plane"
    return result


def _tensorstore_pool(image: np.ndarray, cell: int) -> tuple[Any, list[Any]]:
    try:
        import tensorstore as ts
    except ImportError:
        return None, []
    reads: list[Any] = []

    def read(domain: Any, array: np.ndarray, parameters: Any) -> None:
        reads.append(domain)
        array[...] = image[domain.index_exp]

    store = ts.virtual_chunked(
        read,
        dtype=image.dtype,
        shape=image.shape,
        chunk_layout=ts.ChunkLayout(read_chunk_shape=(cell,) * 3),
        context=ts.Context({"cache_pool": {"total_bytes_limit": 4 * image.nbytes}}),
    )
    return store, reads


def warm_many(cells_per_axis: int, times: int) -> dict[str, Any]:
    """Read cells, and a region of 64 cells, while few or many tiny cells are cached."""
    edge = 4
    grid = ci.CellGrid((edge * cells_per_axis,) * 3, edge)
    img = ci.fill_cells(inputs.fill_with_index, grid, dtype=np.uint8)
    img.prefetch().result()
    held = img.stats()
    assert (held.loads, held.evictions) == (grid.num_cells, 0)
    rng = np.random.default_rng(7)
    # As many different cells, whatever the size of the cache: the processor's own caches would
    # otherwise be what is compared.
    some = rng.choice(grid.num_cells, min(512, grid.num_cells), replace=False).tolist()
    every = rng.permutation(grid.num_cells).tolist()
    low = edge * (cells_per_axis // 2 - min(4, cells_per_axis // 2))
    region = ci.Roi((low, low, low), (low + 1, low + 8 * edge, low + 8 * edge)).clip(grid.shape)
    result = {
        "load_us": 1e6 * typical_seconds(lambda: _load_all(img, some), times) / len(some),
        "load_any_us": 1e6 * typical_seconds(lambda: _load_all(img, every), 3) / len(every),
        "region_us": 1e6 * typical_seconds(lambda: img[region], times),
    }
    assert img.stats().loads == grid.num_cells
    return result


def _load_all(img: ci.CellImg, indices: list[int]) -> None:
    load = img.load
    for index in indices:
        load(index)


def first_read(method: str, cells_per_axis: int, cell: int) -> dict[str, Any]:
    """Define a lazy image, print it, and read one cell in its middle."""
    _first_read(method, 3, cell)
    return _first_read(method, cells_per_axis, cell)


def _first_read(method: str, cells_per_axis: int, cell: int) -> dict[str, Any]:
    source = inputs.Coordinates((cells_per_axis * cell,) * 3)
    middle = cells_per_axis // 2
    region = (slice(middle * cell, (middle + 1) * cell),) * 3
    define = _map_overlap if method == "map_overlap" else _map_cells
    times = [perf_counter()]
    lazy = define(source, cell)
    if method == "cells_dask":
        lazy = lazy.to_dask()
    times.append(perf_counter())
    repr(lazy)
    times.append(perf_counter())
    # map_overlap is asked for the block itself, which spares it a slicing of the whole graph.
    lazy = lazy.blocks[(middle,) * 3] if method == "map_overlap" else lazy[region]
    block = np.asarray(lazy)
    times.append(perf_counter())
    assert np.array_equal(block, source[region])
    construct, text, read = (1e3 * step for step in np.diff(times).tolist())
    return {"construct_ms": construct, "repr_ms": text, "read_ms": read}


def _map_cells(source: Any, cell: int) -> Any:
    return ci.map_cells(inputs.copy, source, halo=HALO, dtype=np.uint8, cell_shape=cell)


def _map_overlap(source: Any, cell: int) -> Any:
    from benchmarks import peers

    return peers.overlapped(peers.chunked(source, cell), inputs.copy, HALO)
