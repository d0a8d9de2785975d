"""Queues on this machine beside dask's schedulers: tiny blocks, large blocks, Python's own work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.harness import CORES, MIB, typical_seconds
from benchmarks.whole import overhead_per_cell, tiny_cells, tiny_map_blocks

Whole = Callable[[np.ndarray, Callable[..., np.ndarray]], np.ndarray]
"""Computes a whole image, one block per item of its first axis."""


def throughput(method: str, rows: int, columns: int, times: int) -> dict[str, Any]:
    """Compute many tiny blocks."""
    with TINY[method]() as whole:
        return overhead_per_cell(whole, rows, columns, times)


@contextmanager
def _without_queue() -> Iterator[Any]:
    yield tiny_cells


@contextmanager
def _queued(backend: Any) -> Iterator[Any]:
    with ci.BlockQueue(CORES, backend=backend) as queue:
        yield lambda image, edge: tiny_cells(image, edge, queue=queue)


@contextmanager
def _queued_on_cluster() -> Iterator[Any]:
    with _local_cluster() as client, _queued(client) as whole:
        yield whole


@contextmanager
def _mapped(**where: Any) -> Iterator[Any]:
    yield lambda image, edge: tiny_map_blocks(image, edge, **where)


@contextmanager
def _mapped_in_processes() -> Iterator[Any]:
    with _process_pool() as pool, _mapped(scheduler="processes", pool=pool) as whole:
        yield whole


@contextmanager
def _mapped_on_cluster() -> Iterator[Any]:
    with _local_cluster() as client, _mapped(scheduler=client) as whole:
        yield whole


@contextmanager
def _process_pool() -> Iterator[Executor]:
    # Forked processes would know the image already; and one pool for all that is measured, as a
    # queue has its workers.
    with ProcessPoolExecutor(CORES, get_context("spawn")) as pool:
        list(pool.map(inputs.copy, [np.zeros(1)] * CORES))
        yield pool


@contextmanager
def _local_cluster() -> Iterator[Any]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=CORES, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


TINY: dict[str, Callable[[], Any]] = {
    "none": _without_queue,
    "threads": partial(_queued, "threads"),
    "processes": partial(_queued, "processes"),
    "distributed": _queued_on_cluster,
    "dask threads": _mapped,
    "dask processes": _mapped_in_processes,
    "dask distributed": _mapped_on_cluster,
}


def large_blocks(method: str, mib: int, count: int, times: int) -> dict[str, Any]:
    """Copy large blocks in worker processes, from a NumPy array into a NumPy array."""
    side = 1024
    shape = (count, mib * MIB // side**2, side, side)
    image = np.empty(shape, np.uint8)
    image[...] = np.random.default_rng(7).integers(0, 255, shape[1:], np.uint8)
    image += np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    with BLOCKS[method]() as whole:
        seconds = _seconds(lambda: whole(image, inputs.copy), image, times)
    return {"ms": 1e3 * seconds / count}


def python_work(method: str, works_ms: Sequence[float], total_ms: float) -> dict[str, Any]:
    """Compute blocks whose function does Python's own work of about so many milliseconds.

    The efficiency is 1 if two workers take half as long as the function alone.
    """
    result: dict[str, Any] = {}
    with BLOCKS[method]() as whole:
        for work_ms in works_ms:
            rounds = _rounds_of(work_ms)
            work = partial(inputs.busy, rounds=rounds)
            count = max(2 * CORES, round(total_ms / work_ms))
            image = np.random.default_rng(7).integers(0, 255, (count, 16, 16), np.uint8)
            few = image[: max(2, count // 4)]
            alone_before = _seconds_alone(few, work)
            expected = image + np.uint8(inputs.busy_sum(rounds))
            seconds = _seconds(lambda: whole(image, work), expected, 1)  # noqa: B023
            alone = (alone_before + _seconds_alone(few, work)) / 2
            result |= {
                f"{work_ms} ms: efficiency": alone * count / (CORES * seconds),
                f"{work_ms} ms: overhead_us": 1e6 * (CORES * seconds / count - alone),
                f"{work_ms} ms: alone_ms": 1e3 * alone,
            }
    return result


def _rounds_of(work_ms: float) -> int:
    trial = 20_000
    return round(trial * work_ms / 1e3 / typical_seconds(lambda: inputs.busy_sum(trial), 20))


def _seconds_alone(image: np.ndarray, work: Callable[..., Any]) -> float:
    began = perf_counter()
    for block in image:
        work(block)
    return (perf_counter() - began) / len(image)


def _seconds(compute: Callable[[], np.ndarray], expected: np.ndarray, times: int) -> float:
    """Return what a computation typically takes after the first time, which must be right too."""
    seconds = []
    for _ in range(times + 1):
        began = perf_counter()
        result = compute()
        seconds.append(perf_counter() - began)
        assert np.array_equal(result, expected)
        del result
    return median(seconds[1:])


@contextmanager
def _cells(backend: str) -> Iterator[Whole]:
    with ci.BlockQueue(CORES, backend=backend) as queue:

        def whole(image: np.ndarray, work: Callable[..., np.ndarray]) -> np.ndarray:
            cell = (1, *image.shape[1:])
            return np.asarray(
                ci.map_cells(
                    work, image, dtype=image.dtype, cell_shape=cell, cache=None, queue=queue
                )
            )

        yield whole


@contextmanager
def _map_blocks(**where: Any) -> Iterator[Whole]:
    from benchmarks import peers

    def whole(image: np.ndarray, work: Callable[..., np.ndarray]) -> np.ndarray:
        lazy = peers.chunked(image, (1, *image.shape[1:]))
        return peers.computed(peers.blocked(lazy, work), **where)

    yield whole


@contextmanager
def _map_blocks_in_processes() -> Iterator[Whole]:
    # One block at a time: by default six of them would go to one process.
    with (
        _process_pool() as pool,
        _map_blocks(scheduler="processes", pool=pool, chunksize=1) as whole,
    ):
        yield whole


@contextmanager
def _executor() -> Iterator[Whole]:
    with _process_pool() as pool:

        def whole(image: np.ndarray, work: Callable[..., np.ndarray]) -> np.ndarray:
            out = np.empty_like(image)
            # A few ahead, so that results do not pile up.
            running = {}
            for number in range(len(image) + 2 * CORES):
                if number < len(image):
                    running[number] = pool.submit(work, image[number : number + 1])
                if number >= 2 * CORES:
                    out[number - 2 * CORES] = running.pop(number - 2 * CORES).result()[0]
            return out

        yield whole


@contextmanager
def _two_copies() -> Iterator[Whole]:
    """Copy each block in and out of a place that each of two threads keeps; nothing is called."""
    own = threading.local()

    def whole(image: np.ndarray, work: Callable[..., np.ndarray]) -> np.ndarray:
        out = np.empty_like(image)

        def one(number: int) -> None:
            if not hasattr(own, "place"):
                own.place = np.empty_like(image[0])
            np.copyto(own.place, image[number])
            np.copyto(out[number], own.place)

        list(pool.map(one, range(len(image))))
        return out

    with ThreadPoolExecutor(CORES) as pool:
        yield whole


@contextmanager
def _halves() -> Iterator[Whole]:
    """Give each of two processes half of all blocks, in one call."""
    with _process_pool() as pool:

        def whole(image: np.ndarray, work: Callable[..., np.ndarray]) -> np.ndarray:
            parts = np.array_split(image, CORES)
            return np.concatenate(list(pool.map(partial(_each, work), parts)))

        yield whole


def _each(work: Callable[..., np.ndarray], blocks: np.ndarray) -> np.ndarray:
    return np.stack([work(block) for block in blocks])


BLOCKS: dict[str, Callable[[], Any]] = {
    "threads": partial(_cells, "threads"),
    "processes": partial(_cells, "processes"),
    "dask threads": _map_blocks,
    "dask processes": _map_blocks_in_processes,
    "executor": _executor,
    "two copies": _two_copies,
    "halves": _halves,
}
