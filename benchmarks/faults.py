"""Batch runs on a cluster whose workers, or client and scheduler, are killed all the time."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import zarr

import cellimg_dask as ci
from benchmarks.harness import ROOT
from cellimg_dask.batch.manifest import Manifest

WORKERS = 3
TIMEOUT_S = 20
"""Of a run without progress."""
MOST_RUNS = 12
BLOCK = 8
"""Voxels of a block."""


def with_faults(fault: str, every_s: float, count: int, block_s: float) -> dict[str, Any]:
    """Compute blocks while there is a fault every few seconds; resume until all are done."""
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(folder, count, block_s)
        ends: list[str] = []
        began = perf_counter()
        while len(ends) < MOST_RUNS:
            with _cluster() as client:
                # Also several runs on the same workers, as long as there are any.
                while len(ends) < MOST_RUNS:
                    run_began = perf_counter()
                    with _faults(client, job, fault, every_s):
                        end = _run(client, job)
                    ends.append(f"{end} after {perf_counter() - run_began:.1f} s")
                    if end == "done" or not client.nthreads():
                        break
            if end == "done":
                break
        return {"seconds": perf_counter() - began, "ends": ends} | job.counts()


def killed_client(times: int, count: int, block_s: float) -> dict[str, Any]:
    """Kill the process that is client, scheduler and nannies; resume at once, until all is done."""
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(folder, count, block_s)
        ends: list[str] = []
        groups = []
        began = perf_counter()
        for number in range(times + 1):
            run_began = perf_counter()
            program = f"from benchmarks.faults import whole_run; whole_run({job.as_json()!r})"
            process = subprocess.Popen(
                [sys.executable, "-c", program], cwd=ROOT, start_new_session=True
            )
            groups.append(process.pid)
            enough = (number + 1) * count // (times + 1)
            while process.poll() is None:
                if number < times and len(job.begun()) >= enough:
                    process.kill()
                    process.wait()
                    job.num_faults += 1
                    ends.append(f"killed after {perf_counter() - run_began:.1f} s")
                    break
                sleep(0.01)
            else:
                end = "done" if process.returncode == 0 else f"status {process.returncode}"
                ends.append(f"{end} after {perf_counter() - run_began:.1f} s")
        seconds = perf_counter() - began
        for group in groups:
            # Workers end by themselves when they miss their scheduler, but later.
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        return {"seconds": seconds, "ends": ends} | job.counts()


def whole_run(text: str) -> None:
    """Make a cluster and run; what the process does that is killed."""
    with _cluster() as client:
        end = _run(client, _Job(**json.loads(text)))
    sys.exit(0 if end == "done" else end)


class _Job:
    """An image, its target, and a file with a line for each block that was begun."""

    def __init__(self, folder: str, count: int, block_s: float) -> None:
        self._arguments = {"folder": folder, "count": count, "block_s": block_s}
        self.count = count
        self.target = f"{folder}/out.zarr"
        self.num_faults = 0
        self._log = Path(folder, "log")
        self._log.touch()
        self.fault = Path(folder, "fault")
        """The next block takes this file and does what it says."""
        params = {
            "log": str(self._log),
            "markers": f"{self.target}.run/done",
            "fault": str(self.fault),
            "block_s": block_s,
        }
        grid = ci.CellGrid((count, BLOCK), (1, BLOCK))
        self.image = ci.fill_cells(_block, grid, dtype=np.int32, params=params)

    def as_json(self) -> str:
        return json.dumps(self._arguments)

    def begun(self) -> list[str]:
        return self._log.read_text().splitlines()

    def counts(self) -> dict[str, Any]:
        """Return what can be said of all runs together."""
        begun = [line.split() for line in self.begun()]
        expected = np.repeat(np.arange(1, self.count + 1)[:, None], BLOCK, axis=1)
        return {
            "faults": self.num_faults,
            "begun": len(begun),
            "committed": len(set(Manifest(self.target).marked())),
            "after commit": sum(committed == "True" for _, committed in begun),
            "right": bool(np.array_equal(zarr.open_array(self.target, mode="r")[...], expected)),
            "left behind": sum(
                path.name.endswith((".part", ".partial", ".__lock"))
                for place in (self.target, f"{self.target}.run")
                for path in Path(place).rglob("*")
            ),
        }


def _block(block: ci.Block) -> None:
    params = block.params
    marker = Path(params["markers"], f"{block.index // 1000:06d}", f"{block.index}.json")
    with Path(params["log"]).open("a") as log:
        log.write(f"{block.index} {marker.exists()}\n")
    sleep(params["block_s"] / 2)
    _fail_if_due(params["fault"])
    sleep(params["block_s"] / 2)
    block.data[...] = block.index + 1


def _fail_if_due(path: str) -> None:
    mine = Path(f"{path}-{os.getpid()}")
    try:
        Path(path).rename(mine)
    except FileNotFoundError:
        return
    if mine.read_text() == "sys.exit":
        sys.exit(0)
    ctypes.string_at(0)


@contextmanager
def _cluster() -> Iterator[Any]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs=60,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _run(client: Any, job: _Job) -> str:
    try:
        with ci.BlockQueue(1, backend=client, timeout_s=TIMEOUT_S) as queue:
            report = ci.run(job.image, job.target, queue=queue, timeout_s=TIMEOUT_S, progress=False)
    except ci.CellimgError as error:
        return type(error).__name__
    return "done" if report.ok else f"{len(report.failed)} failed"


@contextmanager
def _faults(client: Any, job: _Job, fault: str, every_s: float) -> Iterator[None]:
    ended = threading.Event()

    def go() -> None:
        while not ended.wait(every_s):
            # A worker may be gone just now.
            with suppress(OSError, ValueError, KeyError):
                FAULTS[fault](client, job)
                job.num_faults += 1

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        job.fault.unlink(missing_ok=True)


def _kill(client: Any, job: _Job) -> None:
    nanny = random.choice(list(client.cluster.workers.values()))
    if nanny.pid:
        os.kill(nanny.pid, signal.SIGKILL)


def _in_a_block(text: str) -> Callable[[Any, _Job], None]:
    def fail(client: Any, job: _Job) -> None:
        whole = job.fault.with_suffix(".new")
        whole.write_text(text)
        whole.rename(job.fault)

    return fail


def _retire(client: Any, job: _Job) -> None:
    workers = list(client.nthreads())
    if workers:
        client.retire_workers([random.choice(workers)])


def _exit_loop(client: Any, job: _Job) -> None:
    def leave(dask_worker: Any) -> None:
        dask_worker.loop.asyncio_loop.call_later(0.05, sys.exit)

    workers = list(client.nthreads())
    if workers:
        client.run(leave, workers=[random.choice(workers)])


FAULTS: dict[str, Callable[[Any, _Job], None]] = {
    "SIGKILL": _kill,
    "sys.exit in a block": _in_a_block("sys.exit"),
    "sys.exit in the worker": _exit_loop,
    "segfault in a block": _in_a_block("segfault"),
    "retirement": _retire,
}
