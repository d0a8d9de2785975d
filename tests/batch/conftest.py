"""What is needed to count computations in any process, and to run out of disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cellimg_dask as ci
from cellimg_dask.batch.manifest import Manifest


class Calls:
    """A file to which any process appends the numbers of the cells that it computes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self.name = str(path)
        """The file."""
        name = self.name

        def add(index: int) -> None:
            # One write of a short line to a file opened for appending is atomic.
            descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
            os.write(descriptor, f"{index}\n".encode())
            os.close(descriptor)

        def count(index: int) -> int:
            return Path(name).read_text().split().count(str(index))

        self.add = add
        """Note a cell; can be sent to any process."""
        self.count = count
        """Return how often a cell was noted; can be sent to any process."""

    def so_far(self) -> list[int]:
        """Return the cells computed, in order."""
        return [int(line) for line in self._path.read_text().splitlines()]

    def take(self) -> list[int]:
        """Return the cells computed since the last time, sorted."""
        found = sorted(self.so_far())
        self._path.write_text("")
        return found


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    """Cells that were computed."""
    return Calls(tmp_path / "calls")


@pytest.fixture
def target(tmp_path: Path) -> str:
    """Where a run may write."""
    return str(tmp_path / "out.zarr")


@pytest.fixture
def twice(calls: Calls) -> Callable[..., ci.CellImg]:
    """Make images that double their input and count their cells."""
    add = calls.add

    def f(block: ci.Block) -> None:
        add(block.index)
        block.data[...] = block.params["by"] * block.inputs[0][block.halo]

    def make(array: Any, cells: Any = (4, 4), by: int = 2, **options: Any) -> ci.CellImg:
        grid = ci.CellGrid(array.shape, cells)
        options = {"dtype": array.dtype, "params": {"by": by}} | options
        return ci.fill_cells(options.pop("f", f), grid, array, **options)

    return make


@pytest.fixture
def go() -> Callable[..., ci.RunReport]:
    """Run without a bar, and check that the report adds up."""

    def go(img: ci.CellImg, target: Any, **options: Any) -> ci.RunReport:
        options = {"timeout_s": 60} | options
        report = ci.run(img, target, progress=False, **options)
        assert report.computed + report.skipped + len(report.failed) == img.grid.num_cells
        assert report.ok == (not report.failed)
        return report

    return go


@pytest.fixture
def stored() -> Callable[[Any], np.ndarray]:
    """Read a target as anybody does."""
    return lambda target: np.asarray(zarr.open_array(str(target), mode="r")[...])


@pytest.fixture
def marked() -> Callable[[str], set[int]]:
    """Return the cells of a target that have a marker."""
    return lambda target: set(Manifest(target).marked())


class Disk:
    """A small disk of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, *options: str) -> None:
        """Change size or mode."""
        subprocess.run(
            ["mount", "-o", ",".join(["remount", *options]), str(self.path)],
            check=True,
            capture_output=True,
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 256 KiB, where this may be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip("no disk can be mounted here")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two processes, which gives up on a task after one death."""
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("distributed")
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        # A worker that takes long to come back, on a busy machine, is not given up.
        "distributed.deploy.lost-worker-timeout": "1 hour",
    }
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
    ):
        yield cluster


@pytest.fixture
def in_this_process() -> Callable[[int], AbstractContextManager[Any]]:
    """Start a cluster of so many threads of this process; give it, a client and a queue."""
    distributed = pytest.importorskip("distributed")

    @contextmanager
    def start(num_workers: int) -> Iterator[Any]:
        with (
            distributed.LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                processes=False,
                dashboard_address=":0",
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
            ci.BlockQueue(num_workers, backend=client) as queue,
        ):
            yield cluster, client, queue

    return start
