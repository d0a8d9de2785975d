"""A filter over a whole image, from a store or from memory into a store or into memory."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.bare import bare_loop
from benchmarks.harness import CORES, HALO, MIB, memory_now, memory_peak

CACHE_MIB = 1024
"""Bound on decoded chunks, for every method that keeps some."""


def filter(method: str, source: str, target: str, cell: int, size: int, **where: str) -> Any:
    """Filter an image once: seconds, peak memory beyond what is in memory anyhow, and a digest.

    ``source`` and ``target`` are "numpy" or "zarr"; ``where`` holds the folders ``inputs``, of
    the stores, and ``outputs``.
    """
    ci.set_cache(CACHE_MIB * MIB)
    place = Path(where["outputs"], f"{method}-{source}-{target}")
    place.mkdir(parents=True)
    with METHODS[method]() as compute:
        compute(Job("small", source, target, 16, 32, Path(where["inputs"]), place))
        ci.get_cache().clear()
        job = Job("whole", source, target, cell, size, Path(where["inputs"]), place)
        gc.collect()
        # What others have written meanwhile is not to be waited for here.
        os.sync()
        before = memory_now()
        cpu, began = process_time(), perf_counter()
        out = compute(job)
        seconds, cpu = perf_counter() - began, process_time() - cpu
        peak = memory_peak()
    digest = hashlib.blake2b()
    for z in range(0, size, cell):
        part = out[z : z + cell]
        digest.update(np.ascontiguousarray(part if target == "numpy" else part.read().result()))
    shutil.rmtree(place)
    in_memory = out.nbytes if target == "numpy" else 0
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "peak_mib": max(0, peak - before - in_memory) / MIB,
        "digest": digest.hexdigest(),
    }


class Job:
    """What is to be filtered, and where the result goes."""

    def __init__(
        self, name: str, source: str, target: str, cell: int, size: int, stores: Path, place: Path
    ) -> None:
        self.shape = (size,) * 3
        self.cell = cell
        self.target = target
        self.path = stores / name
        self.place = place / f"{name}.zarr"
        self.data = inputs.smooth(self.shape) if source == "numpy" else None

    def zarr_source(self) -> Any:
        """Return the array in memory, or the store as zarr opens it."""
        import zarr

        return zarr.open_array(self.path, mode="r") if self.data is None else self.data

    def tensorstore_source(self) -> Any:
        """Return the array in memory, or the store as tensorstore opens it."""
        if self.data is not None:
            return self.data
        return _opened(self.path, CACHE_MIB * MIB)

    def created(self) -> Any:
        """Return an empty zarr array."""
        import zarr
        from zarr.codecs import ZstdCodec

        return zarr.create_array(
            self.place,
            shape=self.shape,
            dtype=np.float32,
            chunks=(self.cell,) * 3,
            compressors=ZstdCodec(level=1),
        )

    def written(self) -> Any:
        """Return the result as tensorstore opens it; what is written is not kept in memory."""
        return _opened(self.place, None)


def _opened(path: Path, max_bytes: int | None) -> Any:
    """Open a store, with a cache of decoded chunks if so many bytes are given."""
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": max_bytes or 0}})
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, context=context).result()


class _Regions:
    """A tensorstore whose regions are arrays."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getitem__(self, box: Any) -> np.ndarray:
        return self._stored[box].read().result()


def _bare(job: Job) -> Any:
    source = job.tensorstore_source()
    if job.target == "numpy":
        return bare_loop(
            source, inputs.gaussian, job.cell, HALO, np.empty(job.shape, np.float32), CORES
        )
    job.created()
    out = job.written()
    regions = source if job.data is not None else _Regions(source)
    return bare_loop(regions, inputs.gaussian, job.cell, HALO, out, CORES)


def _image(job: Job) -> ci.CellImg:
    return ci.map_cells(
        inputs.gaussian,
        job.zarr_source(),
        halo=HALO,
        dtype=np.float32,
        cell_shape=job.cell,
        cache=None,
    )


def _cells(job: Job, **options: Any) -> Any:
    img = _image(job)
    if job.target == "numpy":
        return img.read_into(np.empty(job.shape, np.float32), **options)
    report = ci.run(img, job.place, level=1, progress=False, **options)
    assert report.computed == img.grid.num_cells
    return job.written()


def _virtual_chunked(job: Job) -> Any:
    import tensorstore

    job.created()
    source, out = job.tensorstore_source(), job.written()

    def read(domain: Any, chunk: Any, parameters: Any) -> None:
        low, high = domain.inclusive_min, domain.exclusive_max
        padded = tuple(
            slice(max(a - HALO, 0), min(b + HALO, extent))
            for a, b, extent in zip(low, high, job.shape, strict=True)
        )
        crop = tuple(
            slice(a - part.start, b - part.start)
            for a, b, part in zip(low, high, padded, strict=True)
        )
        block = source[padded] if job.data is not None else source[padded].read().result()
        chunk[...] = inputs.gaussian(block)[crop]

    virtual = tensorstore.virtual_chunked(
        read,
        dtype=tensorstore.float32,
        shape=job.shape,
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=(job.cell,) * 3),
        # Threads of its own: the callback waits for those that decode.
        context=tensorstore.Context({"data_copy_concurrency": {"limit": CORES}}),
    )
    out.write(virtual).result()
    return out


def _map_overlap(job: Job) -> Any:
    from benchmarks import peers

    source = job.zarr_source()
    lazy = peers.from_zarr(source) if job.data is None else peers.chunked(source, job.cell)
    filtered = peers.overlapped(lazy, inputs.gaussian, HALO)
    if job.target == "numpy":
        return peers.computed(filtered)
    peers.computed(filtered.to_zarr(job.created(), compute=False))
    return job.written()


@contextmanager
def _on_cluster() -> Iterator[Callable[[Job], Any]]:
    from benchmarks.clusters import processes_as_cluster

    with processes_as_cluster() as client, ci.BlockQueue(CORES, backend=client) as queue:
        yield lambda job: _cells(job, queue=queue)


def _here(compute: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    @contextmanager
    def method() -> Iterator[Callable[[Job], Any]]:
        yield lambda job: compute(job, **options)

    return method


METHODS: dict[str, Callable[[], Any]] = {
    "bare": _here(_bare),
    "cells": _here(_cells),
    "together": _here(_cells, cells_per_call="auto"),
    "virtual_chunked": _here(_virtual_chunked),
    "map_overlap": _here(_map_overlap),
    "cluster": _on_cluster,
}
