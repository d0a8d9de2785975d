"""Requests and edits: cases of one process each."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci
from benchmarks.harness import memory_now, typical_seconds

CELL = 16
TIMES = 200


def warm_requests(cells: int) -> dict[str, float]:
    """Request one and 64 cells of an image, all of whose cells are cached."""
    edge = round(cells**0.5)
    ci.set_cache(1 << 30)
    image = ci.map_cells(
        np.negative, np.zeros((edge * CELL, edge * CELL), "u1"), cell_shape=CELL, dtype="u1"
    )
    for index in range(image.grid.num_cells):
        image.load(index)
    middle = (edge // 2 - 4) * CELL
    one = np.s_[middle : middle + CELL, middle : middle + CELL]
    many = np.s_[middle : middle + 8 * CELL, middle : middle + 8 * CELL]
    return {
        f"{name}_us": 1e6 * typical_seconds(action, TIMES)
        for name, action in (
            ("one", lambda: image.request(one).result()),
            ("many", lambda: image.request(many).result()),
            ("one_read", lambda: image[one]),
            ("many_read", lambda: image[many]),
        )
    }


class Timed:
    """A block function that sums up the seconds that it takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, block: Any) -> Any:
        began = perf_counter()
        result = self.function(block)
        self.seconds += perf_counter() - began
        return result


def one_voxel(cells: int) -> dict[str, float]:
    """Write one voxel and read it through two stages with halos, whose cells are all cached."""
    edge = round(cells**0.5)
    ci.set_cache(1 << 30)
    data = np.zeros((edge * CELL, edge * CELL), "f4")
    source = ci.Source(data, cell_shape=CELL)
    stages = [Timed(lambda block: ndi.uniform_filter(block, 3)) for _ in range(2)]
    first = ci.map_cells(stages[0], source, halo=1, dtype="f4")
    second = ci.map_cells(stages[1], first, halo=1, dtype="f4")
    for index in range(second.grid.num_cells):
        second.load(index)
    voxel = (edge // 2 * CELL + CELL // 2,) * 2
    count = 0

    def edit() -> None:
        nonlocal count
        count += 1
        source[voxel] = count

    def edit_and_see() -> None:
        edit()
        second[voxel]

    alone = typical_seconds(edit, TIMES)
    for stage in stages:
        stage.seconds = 0.0
    seen = typical_seconds(edit_and_see, TIMES)
    spent = sum(stage.seconds for stage in stages) / (TIMES + 1)
    return {"edit_us": 1e6 * alone, "seen_us": 1e6 * seen, "computing_us": 1e6 * spent}


def dependents(count: int, form: str) -> dict[str, float]:
    """Write one voxel of a source that so many images read, directly or one through another."""
    source = ci.Source(np.zeros((256, 256), "f4"), cell_shape=CELL)
    above: Any = source
    images = []
    for _ in range(count):
        # A halo would reach the whole image in a chain as long as this.
        image = ci.map_cells(np.negative, above, halo=int(form == "beside"), dtype="f4")
        images.append(image)
        if form == "chain":
            above = image
    times = max(5, 400 // count)
    return {"edit_us": 1e6 * typical_seconds(lambda: source.__setitem__((99, 99), 1), times)}


def readers_and_editors(seconds: float) -> dict[str, float]:
    """Read from 8 threads what 2 threads change; every region has to be of one edition.

    Each edit writes the whole frame of one source anew, so that what is read tells which edit it
    belongs to, and any mixture shows.
    """
    shape = (96, 96)
    ci.set_cache(1 << 20)
    sources = [ci.Source(np.zeros(shape), cell_shape=24) for _ in range(2)]
    first = ci.map_cells(
        ndi.uniform_filter, sources[0], halo=2, dtype=float, cell_shape=16, params={"size": 3}
    )
    both = ci.map_cells(np.subtract, first, sources[1], dtype=float, cell_shape=20)
    stop = threading.Event()
    counts = {"edits": 0, "reads": 0, "stale": 0, "errors": 0}
    # How often each source was edited, counted when the edit is over, and before it begins.
    done, begun = [0, 0], [0, 0]
    lock = threading.Lock()

    def edit(which: int) -> None:
        rng = np.random.default_rng(which)
        while not stop.is_set():
            with sources[which].edit() as array:
                begun[which] += 1
                array[...] = begun[which]
                # Some cells twice, and in another order.
                low = rng.integers(0, 80, 2)
                array[low[0] : low[0] + 9, low[1] : low[1] + 9] = begun[which]
            done[which] = begun[which]

    def read(number: int) -> None:
        rng = np.random.default_rng(100 + number)
        mine = stale = errors = 0
        while not stop.is_set():
            low = rng.integers(0, 60, 2)
            high = low + rng.integers(1, 36, 2)
            earliest = list(done)
            try:
                region = both[low[0] : high[0], low[1] : high[1]]
            except Exception:
                errors += 1
                continue
            latest = list(begun)
            value = region.flat[0]
            possible = earliest[0] - latest[1] - 1e-6 <= value <= latest[0] - earliest[1] + 1e-6
            if not possible or np.ptp(region) > 1e-6:
                stale += 1
            mine += 1
        with lock:
            counts["reads"] += mine
            counts["stale"] += stale
            counts["errors"] += errors

    threads = [threading.Thread(target=edit, args=(n,)) for n in range(2)]
    threads += [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    began = monotonic()
    stop.wait(min(1.0, seconds / 5))
    before = memory_now()
    grown = {}
    for part in (1, 2, 3, 4):
        stop.wait(max(0.0, began + seconds * part / 4 - monotonic()))
        grown[f"grown_{part}"] = float(memory_now() - before)
    stop.set()
    for thread in threads:
        thread.join()
    counts["edits"] = sum(done)
    return {**counts, **grown}


def write_back(method: str, voxels: int) -> dict[str, float]:
    """Write an array cell by cell into zarr, with room for two cells."""
    cell = voxels // 40
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, cell).astype("f4")
    with tempfile.TemporaryDirectory(prefix="cellimg-benchmark-") as folder:
        where = str(Path(folder, "a.zarr"))
        before = memory_now()
        most = 0
        began = perf_counter()
        if method == "zarr":
            array = zarr.create_array(where, shape=(voxels,), chunks=(cell,), dtype="f4")
            for low in range(0, voxels, cell):
                array[low : low + cell] = values
        else:
            cache = ci.CellCache(2 * cell * 4)
            with ci.Source.empty((voxels,), "f4", (cell,), store=where, cache=cache) as source:
                for low in range(0, voxels, cell):
                    source[low : low + cell] = values
                    most = max(most, memory_now())
        seconds = perf_counter() - began
    return {"seconds": seconds, "grown": float(max(0, most - before))}
