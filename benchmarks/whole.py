"""Whole runs: an image computed once, and the overhead per cell of many tiny ones."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.bare import bare_loop
from benchmarks.harness import HALO, MIB, memory_now, memory_peak, typical_seconds


def run(method: str, function: str, cell: int, size: int, **where: Any) -> dict[str, Any]:
    """Compute a whole image once: seconds, and peak memory beyond the input and the output.

    ``where`` may hold ``zarr`` (folder of the stores, else the input is a NumPy array) and
    ``cache_mib`` (bound of the shared cache).
    """
    compute = METHODS[method]
    f = inputs.FUNCTIONS[function]
    if where.get("cache_mib") is not None:
        ci.set_cache(where["cache_mib"] * MIB)
    compute(_source("small", 32, where.get("zarr")), f, 16)
    ci.get_cache().clear()
    source = _source("whole", size, where.get("zarr"))
    gc.collect()
    before = memory_now()
    began = perf_counter()
    out = compute(source, f, cell)
    seconds = perf_counter() - began
    return {
        "seconds": seconds,
        "peak_mib": max(0, memory_peak() - before - out.nbytes) / MIB,
        "digest": hashlib.blake2b(np.ascontiguousarray(out).data).hexdigest(),
    }


def write_inputs(zarr: str, size: int, chunk: int) -> dict[str, Any]:
    """Write the stores that `run` reads."""
    inputs.write_smooth_zarr(Path(zarr, "small"), 32, 16)
    return {"ratio": inputs.write_smooth_zarr(Path(zarr, "whole"), size, chunk)}


def _source(name: str, size: int, folder: str | None) -> Any:
    if folder is None:
        return inputs.noise(size)
    import zarr

    return zarr.open_array(Path(folder, name), mode="r")


def _bare(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    return bare_loop(source, f, cell, HALO, np.empty(source.shape, source.dtype))


def _cells(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    # Past the cell cache; the chunks of a store are still decoded once, within the shared bound.
    img = ci.map_cells(f, source, halo=HALO, dtype=source.dtype, cell_shape=cell, cache=None)
    return np.asarray(img)


def _cells_kept(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    img = ci.map_cells(f, source, halo=HALO, dtype=source.dtype, cell_shape=cell)
    return np.asarray(img)


def _map_overlap(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    from benchmarks import peers

    if isinstance(source, np.ndarray):
        lazy = peers.chunked(source, cell)
    else:
        lazy = peers.from_zarr(source)
    return peers.computed(peers.overlapped(lazy, f, HALO))


METHODS = {
    "bare": _bare,
    "cells": _cells,
    "cells_kept": _cells_kept,
    "map_overlap": _map_overlap,
}


def overhead(method: str, rows: int, columns: int, times: int) -> dict[str, Any]:
    """Compute many tiny cells with two threads, and call the function alone on their inputs."""
    return overhead_per_cell(OVERHEAD[method], rows, columns, times)


def overhead_per_cell(
    whole: Callable[[np.ndarray, int], np.ndarray], rows: int, columns: int, times: int
) -> dict[str, Any]:
    """Measure what ``whole(image, edge)`` takes beyond the function, `inputs.plus_one`."""
    edge = 16
    image = np.random.default_rng(7).integers(0, 255, (rows * edge, columns * edge, 1), np.uint8)
    views = [
        image[y : y + edge, x : x + edge]
        for y in range(0, image.shape[0], edge)
        for x in range(0, image.shape[1], edge)
    ]

    def alone() -> None:
        for view in views:
            inputs.plus_one(view)

    small = image[: 4 * edge, : 4 * edge]
    assert np.array_equal(whole(small, edge), small + 1)
    seconds = []
    for _ in range(times):
        began = perf_counter()
        result = whole(image, edge)
        seconds.append(perf_counter() - began)
        assert np.array_equal(result, image + 1)
        del result
    function = typical_seconds(alone, times)
    return {
        "overhead_us": 1e6 * (median(seconds) - function) / len(views),
        "function_us": 1e6 * function / len(views),
        "per_s": len(views) / median(seconds),
    }


def tiny_cells(
    image: np.ndarray, edge: int, halo: Any = 0, cache: Any = None, queue: Any = None
) -> np.ndarray:
    return np.asarray(
        ci.map_cells(
            inputs.plus_one,
            image,
            halo=halo,
            dtype=image.dtype,
            cell_shape=(edge, edge, 1),
            cache=cache,
            queue=queue,
        )
    )


def tiny_map_blocks(image: np.ndarray, edge: int, **where: Any) -> np.ndarray:
    from benchmarks import peers

    lazy = peers.chunked(image, (edge, edge, 1))
    return peers.computed(peers.blocked(lazy, inputs.plus_one), **where)


def _tiny_map_overlap(image: np.ndarray, edge: int) -> np.ndarray:
    from benchmarks import peers

    lazy = peers.chunked(image, (edge, edge, 1))
    return peers.computed(peers.overlapped(lazy, inputs.plus_one, (1, 1, 0)))


OVERHEAD: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "cells": tiny_cells,
    "cells_kept": lambda image, edge: tiny_cells(image, edge, cache="shared"),
    "cells_halo": lambda image, edge: tiny_cells(image, edge, halo=(1, 1, 0)),
    "map_blocks": tiny_map_blocks,
    "map_overlap": _tiny_map_overlap,
}
