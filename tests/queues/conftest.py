"""Queues of each backend, and what is needed to watch and to hold blocks in any process."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import dask
import pytest
import support
from support import PATIENCE_S

import cellimg_dask as ci


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two processes with a thread each."""
    distributed = pytest.importorskip("distributed")
    calmly = {
        # A worker that dies once more while it is started again is not given up.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        # A crash is known as one after two tries and not after four.
        "distributed.scheduler.allowed-failures": 1,
    }
    with (
        dask.config.set(calmly),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module", params=["threads", "processes", "distributed"])
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend; of the module's scope, so that a cluster is there before a test."""
    if request.param == "distributed":
        request.getfixturevalue("client")
    return request.param


@pytest.fixture
def make_queue(backend: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make queues that are closed after the test."""
    made: list[ci.BlockQueue] = []

    def make(num_workers: int = 2, init: Any = None, **options: Any) -> ci.BlockQueue:
        where = request.getfixturevalue("client") if backend == "distributed" else backend
        queue = ci.BlockQueue(num_workers, init, where, **options)
        made.append(queue)
        return queue

    yield make
    for queue in made:
        queue.close(PATIENCE_S)


@pytest.fixture
def begin() -> Callable[..., Future[Any]]:
    """Call something on a thread of its own."""
    return support.begin


@pytest.fixture
def in_time() -> Callable[..., Any]:
    """Call something that fails the test where it would hang."""
    return support.in_time


class Log:
    """A file to which any process appends lines: words, process id, thread id."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        name = str(path)

        def add(*words: Any) -> None:
            line = " ".join(map(str, (*words, os.getpid(), threading.get_native_id()))) + "\n"
            # One write of a short line to a file opened for appending is atomic.
            descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
            os.write(descriptor, line.encode())
            os.close(descriptor)

        def fill(block: ci.Block) -> None:
            add(block.index)
            block.data[...] = block.index

        self.add = add
        """Append a line; can be sent to any process."""
        self.fill = fill
        """Append the number of a cell, and fill the cell with it; can be sent to any process."""
        self.code = (
            "import os, threading\n"
            "def add(*words):\n"
            "    line = ' '.join(map(str, (*words, os.getpid(), threading.get_native_id())))\n"
            f"    descriptor = os.open({name!r}, os.O_WRONLY | os.O_APPEND)\n"
            "    os.write(descriptor, (line + '\\n').encode())\n"
            "    os.close(descriptor)\n"
        )
        """The same as code, which defines ``add``."""

    def lines(self) -> list[list[str]]:
        """Return the words of all lines."""
        return [line.split() for line in self._path.read_text().splitlines()]

    def first_words(self) -> list[str]:
        """Return what was added, without saying by whom."""
        return [words[0] for words in self.lines()]

    def by_worker(self) -> dict[tuple[int, int], list[str]]:
        """Return what each thread of each process added, in order."""
        found: dict[tuple[int, int], list[str]] = {}
        for word, *_, process, thread in self.lines():
            found.setdefault((int(process), int(thread)), []).append(word)
        return found

    def by_process(self) -> dict[int, list[str]]:
        """Return what each process added, in order."""
        found: dict[int, list[str]] = {}
        for word, *_, process, _ in self.lines():
            found.setdefault(int(process), []).append(word)
        return found


@pytest.fixture
def make_log(tmp_path: Path) -> Callable[[str], Log]:
    """Make a log of a name."""
    return lambda name: Log(tmp_path / name)


@pytest.fixture
def log(make_log: Callable[[str], Log]) -> Log:
    """A log."""
    return make_log("log")


class Gate:
    """Blocks of any process wait here until they are let through."""

    def __init__(self, folder: Path) -> None:
        arrivals, door = str(folder / "arrivals"), str(folder / "door")
        os.mkfifo(arrivals)
        os.mkfifo(door)
        # Open for both, so that nobody waits for the other end.
        self._arrivals = os.open(arrivals, os.O_RDWR)
        self._door = os.open(door, os.O_RDWR)
        self._closed = False

        def hold() -> None:
            # Also a block that comes when the gate is gone, and the test over, goes on.
            try:
                descriptor = os.open(arrivals, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return
            os.write(descriptor, b".")
            os.close(descriptor)
            descriptor = os.open(door, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            os.read(descriptor, 1)
            os.close(descriptor)

        def fill(block: ci.Block) -> None:
            hold()
            block.data[...] = block.index

        self.hold = hold
        """Arrive and wait; can be sent to any process."""
        self.fill = fill
        """Arrive and wait, and fill a cell with its number; can be sent to any process."""

    def wait_for(self, count: int) -> None:
        """Wait until so many more have arrived."""
        for _ in range(count):
            ready, _, _ = select.select([self._arrivals], [], [], PATIENCE_S)
            assert ready, "nobody came"
            os.read(self._arrivals, 1)

    def open(self, count: int = 1000) -> None:
        """Let so many through, those who come later included."""
        os.write(self._door, b"." * count)

    def close(self) -> None:
        """Let everybody through and remove the gate."""
        if not self._closed:
            self._closed = True
            self.open()
            os.close(self._arrivals)
            os.close(self._door)


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    """A gate."""
    return make_gate()


@pytest.fixture
def make_gate(make_queue: Any, tmp_path: Path) -> Iterator[Callable[[], Gate]]:
    """Make gates; they open before the queues are closed."""
    made: list[Gate] = []

    def make() -> Gate:
        folder = tmp_path / f"gate{len(made)}"
        folder.mkdir()
        made.append(Gate(folder))
        return made[-1]

    yield make
    for gate in made:
        gate.close()
