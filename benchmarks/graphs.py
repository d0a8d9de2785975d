"""The dask graph: what it costs to build, how many tasks it has, what is sent."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import dask.array as da
import numpy as np
from dask.base import collections_to_expr
from dask.task_spec import Alias
from distributed.protocol import serialize, to_serialize
from distributed.utils import nbytes

import cellimg_dask as ci
from benchmarks import inputs, peers
from benchmarks.harness import MIB


def graph(method: str, grid_shape: list[int], times: int) -> dict[str, Any]:
    """Build the dask array; count its tasks and the bytes that a scheduler is sent."""
    edge = 16
    source = inputs.Coordinates(tuple(n * edge for n in grid_shape))

    def fresh() -> Callable[[], da.Array]:
        if method == "map_overlap":
            chunked = peers.chunked(source, edge)
            return lambda: peers.overlapped(chunked, inputs.counted, 2)
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
        "whole_bytes": _sent(lazy),
        "whole_tasks": _tasks(lazy) / lazy.npartitions if lazy.npartitions <= 1000 else None,
        "calls": len(inputs.calls),
    }
    block = lazy[(slice(0, edge),) * 3].compute(scheduler="sync")
    assert np.array_equal(block, source[(slice(0, edge),) * 3])
    return result


def graph_of_array(size: int) -> dict[str, Any]:
    """Build the dask array of an image that reads memory: keys then depend on all the data."""
    ci.map_cells(inputs.copy, inputs.noise(32), dtype=np.float32, cell_shape=16).to_dask()
    image = inputs.noise(size)
    began = perf_counter()
    ci.map_cells(inputs.copy, image, dtype=np.float32, cell_shape=64).to_dask()
    ended = perf_counter()
    da.from_array(image, chunks=64)
    return {
        "mib": image.nbytes / MIB,
        "build_ms": 1e3 * (ended - began),
        "from_array_ms": 1e3 * (perf_counter() - ended),
    }


def _tasks(lazy: da.Array) -> int:
    """Return how many tasks of the optimised graph call something; a second name is none."""
    tasks = collections_to_expr([lazy]).optimize().__dask_graph__()
    return sum(not isinstance(task, Alias) for task in tasks.values())


def _sent(lazy: da.Array) -> int:
    """Return the bytes of what ``Client.persist`` sends to the scheduler for an array."""
    return _pickled(collections_to_expr([lazy]).optimize())


def _pickled(value: Any) -> int:
    header, frames = serialize(to_serialize(value), on_error="raise")
    return sum(map(nbytes, [header, *frames]))
