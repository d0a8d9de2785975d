"""What a fresh process measures: ``python -m benchmarks.cases CASE ARGUMENTS``.

Each case warms up on a small image, then measures once, and prints one line of JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import dask
import dask.array as da
import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.bare import bare_loop
from benchmarks.harness import CORES, MIB, memory_now, memory_peak, use_two_cores


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
        "digest": hashlib.blake2b(np.ascontiguousarray(out)).hexdigest(),
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
    return bare_loop(source, f, cell, inputs.HALO, np.empty(source.shape, source.dtype))


def _cells(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    # Past the cell cache; the chunks of a store are still decoded once, within the shared bound.
    img = ci.map_cells(f, source, halo=inputs.HALO, dtype=source.dtype, cell_shape=cell, cache=None)
    return np.asarray(img)


def _cells_kept(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    img = ci.map_cells(f, source, halo=inputs.HALO, dtype=source.dtype, cell_shape=cell)
    return np.asarray(img)


def _map_overlap(source: Any, f: Callable[..., Any], cell: int) -> np.ndarray:
    if isinstance(source, np.ndarray):
        lazy = da.from_array(source, chunks=cell, name=False)
    else:
        lazy = da.from_zarr(source)
    result = _overlapped(lazy, f, inputs.HALO)
    return result.compute(scheduler="threads", num_workers=CORES)


def _overlapped(lazy: da.Array, f: Callable[..., Any], depth: Any) -> da.Array:
    meta = np.empty((0,) * lazy.ndim, lazy.dtype)
    return da.map_overlap(f, lazy, depth=depth, boundary="none", dtype=lazy.dtype, meta=meta)


METHODS = {
    "bare": _bare,
    "cells": _cells,
    "cells_kept": _cells_kept,
    "map_overlap": _map_overlap,
}


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
        "plane_ms": 1e3 * _typical(lambda: img[z], times),
        "numpy_ms": 1e3 * _typical(lambda: image[z].copy(), times),
        "load_us": 1e6 * _typical(lambda: _load_all(img, indices), times) / len(indices),
    }
    assert np.array_equal(img[z], image[z])
    assert img.stats().loads == len(indices)
    store, reads = _tensorstore_pool(image, cell)
    if store is not None:
        assert np.array_equal(store[z].read().result(), image[z])
        loaded = len(reads)
        result["tensorstore_ms"] = 1e3 * _typical(lambda: store[z].read().result(), times)
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
    img = ci.fill_cells(_fill_with_index, grid, dtype=np.uint8)
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
        "load_us": 1e6 * _typical(lambda: _load_all(img, some), times) / len(some),
        "load_any_us": 1e6 * _typical(lambda: _load_all(img, every), 3) / len(every),
        "region_us": 1e6 * _typical(lambda: img[region], times),
    }
    assert img.stats().loads == grid.num_cells
    return result


def _fill_with_index(block: ci.Block) -> None:
    block.data[...] = block.index % 251


def _load_all(img: ci.CellImg, indices: list[int]) -> None:
    load = img.load
    for index in indices:
        load(index)


def overhead(method: str, rows: int, columns: int, times: int) -> dict[str, Any]:
    """Compute many tiny cells with two threads, and call the function alone on their inputs."""
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

    whole = OVERHEAD[method]
    small = image[: 4 * edge, : 4 * edge]
    assert np.array_equal(whole(small, edge), small + 1)
    seconds = []
    for _ in range(times):
        began = perf_counter()
        result = whole(image, edge)
        seconds.append(perf_counter() - began)
        assert np.array_equal(result, image + 1)
        del result
    function = _typical(alone, times)
    return {
        "overhead_us": 1e6 * (median(seconds) - function) / len(views),
        "function_us": 1e6 * function / len(views),
    }


def _tiny_cells(image: np.ndarray, edge: int, halo: Any = 0, cache: Any = None) -> np.ndarray:
    return np.asarray(
        ci.map_cells(
            inputs.plus_one,
            image,
            halo=halo,
            dtype=image.dtype,
            cell_shape=(edge, edge, 1),
            cache=cache,
        )
    )


def _tiny_map_blocks(image: np.ndarray, edge: int) -> np.ndarray:
    lazy = da.from_array(image, chunks=(edge, edge, 1), name=False)
    lazy = lazy.map_blocks(inputs.plus_one, dtype=image.dtype, meta=np.empty((0,) * 3, image.dtype))
    return lazy.compute(scheduler="threads", num_workers=CORES)


def _tiny_map_overlap(image: np.ndarray, edge: int) -> np.ndarray:
    lazy = da.from_array(image, chunks=(edge, edge, 1), name=False)
    lazy = _overlapped(lazy, inputs.plus_one, (1, 1, 0))
    return lazy.compute(scheduler="threads", num_workers=CORES)


OVERHEAD: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "cells": _tiny_cells,
    "cells_kept": lambda image, edge: _tiny_cells(image, edge, cache="shared"),
    "cells_halo": lambda image, edge: _tiny_cells(image, edge, halo=(1, 1, 0)),
    "map_blocks": _tiny_map_blocks,
    "map_overlap": _tiny_map_overlap,
}


def first_read(method: str, cells_per_axis: int, cell: int) -> dict[str, Any]:
    """Define a lazy image, print it, and read one cell in its middle."""
    _first_read(method, 3, cell)
    return _first_read(method, cells_per_axis, cell)


def _first_read(method: str, cells_per_axis: int, cell: int) -> dict[str, Any]:
    source = inputs.Coordinates((cells_per_axis * cell,) * 3)
    middle = cells_per_axis // 2
    region = (slice(middle * cell, (middle + 1) * cell),) * 3
    times = [perf_counter()]
    if method == "map_overlap":
        lazy: Any = da.from_array(source, chunks=cell, name=False, meta=np.empty((0,) * 3, "u1"))
        lazy = _overlapped(lazy, inputs.copy, inputs.HALO)
    else:
        lazy = ci.map_cells(inputs.copy, source, halo=inputs.HALO, dtype=np.uint8, cell_shape=cell)
        if method == "cells_dask":
            lazy = lazy.to_dask()
    times.append(perf_counter())
    repr(lazy)
    times.append(perf_counter())
    if method == "map_overlap":
        block = lazy.blocks[(middle,) * 3].compute(scheduler="threads", num_workers=CORES)
    else:
        block = np.asarray(lazy[region])
    times.append(perf_counter())
    assert np.array_equal(block, source[region])
    construct, text, read = (1e3 * step for step in np.diff(times).tolist())
    return {"construct_ms": construct, "repr_ms": text, "read_ms": read}


def graph(method: str, grid_shape: list[int], times: int) -> dict[str, Any]:
    """Build the dask array; count its tasks and the bytes that a scheduler is sent."""
    edge = 16
    source = inputs.Coordinates(tuple(n * edge for n in grid_shape))

    def fresh() -> Any:
        if method == "map_overlap":
            chunked = da.from_array(
                source, chunks=edge, name=False, meta=np.empty((0,) * 3, np.uint8)
            )
            return lambda: _overlapped(chunked, inputs.counted, 2)
        img = ci.map_cells(inputs.counted, source, halo=2, dtype=np.uint8, cell_shape=edge)
        return img.to_dask

    fresh()()
    seconds = []
    for _ in range(times):
        build = fresh()
        began = perf_counter()
        lazy = build()
        seconds.append(perf_counter() - began)
    region = lazy[tuple(slice((n // 2 - 2) * edge, (n // 2 + 2) * edge) for n in grid_shape)]
    result = {
        "build_ms": 1e3 * median(seconds),
        "region_tasks": _tasks(region) / region.npartitions,
        "graph_bytes": _pickled(lazy.dask),
        "region_bytes": _sent(region),
        "whole_bytes": _sent(lazy) if lazy.npartitions <= 100_000 or times > 1 else None,
        "whole_tasks": _tasks(lazy) / lazy.npartitions if lazy.npartitions <= 1000 else None,
        "calls": len(inputs.calls),
    }
    block = lazy[(slice(0, edge),) * 3].compute(scheduler="sync")
    assert np.array_equal(block, source[(slice(0, edge),) * 3])
    return result


def _tasks(lazy: da.Array) -> int:
    """Return how many tasks of the optimised graph call something; a second name is none."""
    from dask.base import collections_to_expr
    from dask.task_spec import Alias

    tasks = collections_to_expr([lazy]).optimize().__dask_graph__()
    return sum(not isinstance(task, Alias) for task in tasks.values())


def _sent(lazy: da.Array) -> int:
    """Return the bytes of what ``Client.persist`` sends to the scheduler for an array."""
    from dask.base import collections_to_expr

    return _pickled(collections_to_expr([lazy]).optimize())


def _pickled(value: Any) -> int:
    from distributed.protocol import serialize, to_serialize
    from distributed.utils import nbytes

    header, frames = serialize(to_serialize(value), on_error="raise")
    return sum(map(nbytes, [header, *frames]))


def _typical(action: Callable[[], object], times: int) -> float:
    """Return the median seconds of an action, after a first time that does not count."""
    action()
    seconds = []
    for _ in range(times):
        began = perf_counter()
        action()
        seconds.append(perf_counter() - began)
    return median(seconds)


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "run": run,
    "write_inputs": write_inputs,
    "warm_plane": warm_plane,
    "warm_many": warm_many,
    "overhead": overhead,
    "first_read": first_read,
    "graph": graph,
}

if __name__ == "__main__":
    use_two_cores()
    dask.config.set({"array.query-planning": False})
    print(json.dumps(CASES[sys.argv[1]](**json.loads(sys.argv[2]))))
