"""Writing a large compressible array: what is on the disk is compared with it afterwards."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.harness import CORES, MIB, memory_now, memory_peak

LEVEL = 1
"""Of zstd, everywhere."""
SHAPE = {"quick": (64, 32, 64), "full": (1024, 512, 512)}
CHUNK = {"quick": 16, "full": 64}


def write(method: str, form: str, scale: str, folder: str) -> dict[str, Any]:
    """Write a float32 array once: seconds, and peak memory beyond the array.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    form : {"chunks", "shards"}
        Whether a cell is one chunk, or a shard of eight.
    scale : {"quick", "full"}
        Some kilobytes or 1 GiB.
    folder : str
        Where a folder is made for this run, and removed again.
    """
    place = Path(folder, f"{method}-{form}")
    times = {"chunks": None, "shards": 2}[form]
    METHODS[method](Job(inputs.smooth((32, 32, 32)), place / "small", 16, times))
    job = Job(inputs.smooth(SHAPE[scale]), place, CHUNK[scale], times)
    gc.collect()
    # What others have written meanwhile is not to be waited for here.
    os.sync()
    before = memory_now()
    cpu, began = process_time(), perf_counter()
    written = METHODS[method](job)
    seconds, cpu = perf_counter() - began, process_time() - cpu
    peak = memory_peak()
    if written is not None:
        job.check(written)
    shutil.rmtree(place)
    return {"seconds": seconds, "cpu_s": cpu, "peak_mib": max(0, peak - before) / MIB}


class Job:
    """What is to be written, and where."""

    def __init__(self, data: np.ndarray, place: Path, chunk: int, times: int | None) -> None:
        self.data = data
        self.place = place
        self.chunk = chunk
        self.shard = None if times is None else times * chunk
        self.cell = self.shard or chunk
        """Edge of what is written at once."""
        place.mkdir(parents=True, exist_ok=True)
        self.target = place / "out.zarr"

    def created(self) -> Any:
        """Return an empty zarr array."""
        import zarr
        from zarr.codecs import ZstdCodec

        return zarr.create_array(
            self.target,
            shape=self.data.shape,
            dtype=self.data.dtype,
            chunks=(self.chunk,) * 3,
            shards=None if self.shard is None else (self.shard,) * 3,
            compressors=ZstdCodec(level=LEVEL),
        )

    def check(self, target: Path) -> None:
        """Compare what was written with the data."""
        import tensorstore

        stored = tensorstore.open(_spec(target)).result()
        for z in range(0, len(self.data), self.cell):
            part = stored[z : z + self.cell].read().result()
            assert np.array_equal(part, self.data[z : z + self.cell]), f"{target} is wrong at {z}"


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}


def _codec(job: Job) -> None:
    _encode(job, lambda number, content: None)


def _files(job: Job) -> None:
    def keep(number: int, content: bytes) -> None:
        (job.place / str(number)).write_bytes(content)

    _encode(job, keep)


def _encode(job: Job, keep: Callable[[int, bytes], object]) -> None:
    """Compress each chunk, two at a time; no more than a copy is between data and codec."""
    from numcodecs import Zstd

    codec, edge = Zstd(level=LEVEL), job.chunk

    def one(numbered: tuple[int, tuple[int, ...]]) -> None:
        number, corner = numbered
        box = tuple(slice(start, start + edge) for start in corner)
        keep(number, codec.encode(np.ascontiguousarray(job.data[box])))

    corners = product(*(range(0, extent, edge) for extent in job.data.shape))
    with ThreadPoolExecutor(CORES) as pool:
        for _ in pool.map(one, enumerate(corners)):
            pass


def same(block: np.ndarray) -> np.ndarray:
    return block


def _run(job: Job) -> Path:
    img = ci.map_cells(same, job.data, dtype=job.data.dtype, cell_shape=job.cell)
    report = ci.run(img, job.target, chunks=job.chunk, level=LEVEL, progress=False)
    assert report.computed == img.grid.num_cells
    return job.target


def _tensorstore(job: Job) -> Path:
    import tensorstore

    job.created()
    out = tensorstore.open(_spec(job.target)).result()

    def one(corner: tuple[int, ...]) -> None:
        box = tuple(slice(start, start + job.cell) for start in corner)
        out[box].write(job.data[box]).result()

    corners = product(*(range(0, extent, job.cell) for extent in job.data.shape))
    with ThreadPoolExecutor(CORES) as pool:
        for _ in pool.map(one, corners):
            pass
    return job.target


def _to_zarr(job: Job) -> Path:
    from benchmarks import peers

    peers.computed(peers.chunked(job.data, job.cell).to_zarr(job.created(), compute=False))
    return job.target


def _store(job: Job) -> Path:
    import dask.array as da

    from benchmarks import peers

    lazy = peers.chunked(job.data, job.cell)
    # Each task writes whole objects, so there is nothing to lock.
    peers.computed(da.store(lazy, job.created(), lock=False, compute=False))
    return job.target


METHODS: dict[str, Callable[[Job], Path | None]] = {
    "codec": _codec,
    "files": _files,
    "run": _run,
    "tensorstore": _tensorstore,
    "to_zarr": _to_zarr,
    "store": _store,
}
