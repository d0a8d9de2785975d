"""Many trivial cells on a cluster: what the client sends, keeps and waits for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks import inputs
from benchmarks.harness import CORES, MIB, memory_now, memory_peak
from cellimg_dask.queues import cluster as library

EDGE = 16
COLUMNS = 50


def on_cluster(forms: Sequence[str], count: int) -> dict[str, Any]:
    """Compute ``count`` cells in one form after the other.

    Forms are "keys" (a task with a key each), "batches", "kept" (in batches, and the client keeps
    the cells in its own cache), and "map" (`Client.map`). The scheduler is a process of its own,
    so that memory and time of this process are the client's.
    """
    with processes_as_cluster() as client:
        return {form: _in_form(client, form, count) for form in forms}


def _in_form(client: Any, form: str, count: int) -> dict[str, Any]:
    if form == "map":
        return _measure(client, lambda rows: _map(client, rows), count)
    # So that no time that was measured decides.
    library._WORTH_A_KEY_S = 0.0 if form == "keys" else inf
    with ci.BlockQueue(CORES, backend=client) as queue, _counted(client, queue) as counts:

        def compute(rows: int) -> tuple[np.ndarray, Any, float]:
            counts.update(submit_s=0.0, keys=0)
            out, held = _read(queue, rows, kept=form == "kept")
            return out, held, counts["submit_s"]

        result = _measure(client, compute, count)
        if form == "keys":
            assert counts["keys"] >= count
        else:
            assert counts["keys"] < count
        if form == "kept":
            return result
        return result | _copies_of_params(client, queue, min(count, 1000))


@contextmanager
def processes_as_cluster() -> Iterator[Any]:
    """Give the client of a cluster: a process with a thread for each core, and the scheduler's."""
    from distributed import Client
    from distributed.deploy.subprocess import SubprocessCluster

    # Without nannies: nothing is to be restarted.
    processes = SubprocessCluster(
        n_workers=CORES,
        threads_per_worker=1,
        dashboard_address=":0",
        worker_class="distributed.Worker",
    )
    with processes as cluster, Client(cluster) as client:
        client.wait_for_workers(CORES)
        yield client


@contextmanager
def _counted(client: Any, queue: ci.BlockQueue) -> Iterator[dict[str, float]]:
    """Count the seconds of submitting cells, and the keys that are asked for."""
    counts = {"submit_s": 0.0, "keys": 0}
    request, get = queue.cells._request, client.get

    def timed(*arguments: Any) -> Any:
        began = perf_counter()
        try:
            return request(*arguments)
        finally:
            counts["submit_s"] += perf_counter() - began

    def counted(tasks: Any, keys: Any, **options: Any) -> Any:
        counts["keys"] += len(keys)
        return get(tasks, keys, **options)

    queue.cells._request, client.get = timed, counted
    try:
        yield counts
    finally:
        del client.get


def _measure(
    client: Any, compute: Callable[[int], tuple[np.ndarray, Any, float]], count: int
) -> dict[str, Any]:
    rows = count // COLUMNS
    assert np.array_equal(compute(2)[0], _expected(2))
    gc.collect()
    scheduler, sent = _settled(client), client.scheduler_comm.byte_count
    memory, cpu, began = memory_now(), process_time(), perf_counter()
    out, held, submit_s = compute(rows)
    seconds, cpu = perf_counter() - began, process_time() - cpu
    sent = client.scheduler_comm.byte_count - sent
    gc.collect()
    left, peak = memory_now() - memory - out.nbytes, memory_peak() - memory - out.nbytes
    after = client.run_on_scheduler(_scheduler_so_far)
    assert np.array_equal(out, _expected(rows))
    del held
    return {
        "seconds": seconds,
        "per_s": count / seconds,
        "submit_s": submit_s,
        "client_us": 1e6 * cpu / count,
        "scheduler_us": 1e6 * (after["cpu_s"] - scheduler["cpu_s"]) / count,
        "sent_kb": sent / 1000,
        "sent_each": sent / count,
        "to_workers_each": (after["sent"] - scheduler["sent"]) / count,
        "left_mib": left / MIB,
        "left_each": left / count,
        # The kernel counts a little late.
        "peak_mib": max(peak, left) / MIB,
    }


def _settled(client: Any) -> dict[str, float]:
    """Return what the scheduler has used and sent, once it sends no more: it frees keys late."""
    found = client.run_on_scheduler(_scheduler_so_far)
    for _ in range(100):
        before = found["sent"]
        sleep(0.1)
        found = client.run_on_scheduler(_scheduler_so_far)
        if found["sent"] == before:
            break
    return found


def _scheduler_so_far(dask_scheduler: Any) -> dict[str, float]:
    streams = dask_scheduler.stream_comms.values()
    return {"cpu_s": process_time(), "sent": sum(stream.byte_count for stream in streams)}


def _read(
    queue: ci.BlockQueue, rows: int, *, kept: bool, params: Any = None
) -> tuple[np.ndarray, Any]:
    img = ci.fill_cells(
        inputs.fill_with_index,
        ci.CellGrid((rows * EDGE, COLUMNS * EDGE), EDGE),
        dtype=np.uint8,
        params=params,
        cache="shared" if kept else None,
        queue=queue,
    )
    return np.asarray(img), img


def _map(client: Any, rows: int) -> tuple[np.ndarray, Any, float]:
    began = perf_counter()
    futures = client.map(_block_of_index, range(rows * COLUMNS), pure=False)
    submit_s = perf_counter() - began
    out = np.empty((rows * EDGE, COLUMNS * EDGE), np.uint8)
    blocks = out.reshape(rows, EDGE, COLUMNS, EDGE).swapaxes(1, 2)
    for index, block in enumerate(client.gather(futures, direct=True)):
        blocks[divmod(index, COLUMNS)] = block
    return out, futures, submit_s


def _block_of_index(index: int) -> np.ndarray:
    return np.full((EDGE, EDGE), index % 251, np.uint8)


def _expected(rows: int) -> np.ndarray:
    values = np.arange(rows * COLUMNS) % 251
    return np.kron(values.reshape(rows, COLUMNS).astype(np.uint8), np.ones((EDGE,) * 2, np.uint8))


def _copies_of_params(client: Any, queue: ci.BlockQueue, count: int) -> dict[str, float]:
    """Return how often a parameter of 1 MiB travels with so many cells."""
    rows = count // COLUMNS
    table = np.random.default_rng(7).integers(0, 255, MIB, np.uint8)
    sent, images = [], []
    for params in ({}, {"table": table}):
        scheduler, own = _settled(client)["sent"], client.scheduler_comm.byte_count
        out, img = _read(queue, rows, kept=False, params=params)
        assert np.array_equal(out, _expected(rows))
        # Held, so that nothing of one is released while the other is counted.
        images.append(img)
        after = _settled(client)["sent"]
        sent.append((client.scheduler_comm.byte_count - own, after - scheduler))
    (own, scheduler), (own_with, scheduler_with) = sent
    return {
        "params_sent": (own_with - own) / table.nbytes,
        "params_to_workers": (scheduler_with - scheduler) / table.nbytes,
    }
