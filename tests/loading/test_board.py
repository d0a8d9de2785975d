"""Who makes way for whom: threads that work off the board, and those that read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support import begin, until

import cellimg_dask as ci
from cellimg_dask.loading.crew import Crew
from cellimg_dask.loading.priorities import BACKGROUND, INTERACTIVE, priority

PATIENCE_S = 30


@pytest.fixture
def make_crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Crew]]:
    crews: list[Crew] = []

    def make(num_threads: int, **options: Any) -> Crew:
        crews.append(Crew(num_threads, **options))
        monkeypatch.setattr("cellimg_dask.loading.loader.get_crew", lambda: crews[-1])
        return crews[-1]

    yield make
    for crew in crews:
        crew.close()
        assert not crew._busy
        assert not crew._hands


class Gate:
    """Cells wait here until they are let through."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.door = threading.Semaphore(0)

    def hold(self, *_: Any) -> None:
        self.arrived.release()
        assert self.door.acquire(timeout=PATIENCE_S)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=PATIENCE_S), "nobody came"


@pytest.fixture
def make_gate() -> Iterator[Callable[[], Gate]]:
    gates: list[Gate] = []

    def make() -> Gate:
        gates.append(Gate())
        return gates[-1]

    yield make
    for gate in gates:
        gate.door.release(1000)


def numbers(count: int, before: Callable[[int], object] = lambda _: None) -> ci.CellImg:
    def fill(block: ci.Block) -> None:
        before(block.index)
        block.data[...] = block.index

    return ci.fill_cells(fill, ci.CellGrid((count,), (1,)), dtype=int)


def test_a_prefetch_makes_way_for_a_read_between_two_cells(make_crew, make_gate):
    crew, ahead, reading = make_crew(1), make_gate(), make_gate()
    begun: list[int] = []

    def before(index: int) -> None:
        begun.append(index)
        ahead.hold()

    prefetch = numbers(5, before).prefetch()
    ahead.wait_for(1)
    reader = begin(lambda: numbers(2, reading.hold)[...])
    reading.wait_for(1)
    ahead.door.release(1000)
    until(lambda: not crew._hands)
    assert begun == [0]
    assert prefetch.progress == (4, 0, 1)
    reading.door.release(1000)
    np.testing.assert_array_equal(reader.result(PATIENCE_S), [0, 1])
    assert prefetch.wait(PATIENCE_S)
    assert begun == [0, 1, 2, 3, 4]


def test_a_read_gets_its_helpers_in_the_middle_of_a_prefetch(make_crew, make_gate):
    make_crew(3)
    ahead = make_gate()
    prefetch = numbers(50, ahead.hold).prefetch()
    ahead.wait_for(3)
    together = threading.Barrier(3)  # Broken unless so many read at once.
    reader = begin(lambda: numbers(3, lambda _: together.wait(PATIENCE_S))[...])
    until(lambda: together.n_waiting == 1)
    # Two of the threads come to the end of a cell.
    ahead.door.release(2)
    np.testing.assert_array_equal(reader.result(PATIENCE_S), [0, 1, 2])
    ahead.door.release(1000)
    assert prefetch.wait(PATIENCE_S)


def test_a_request_that_somebody_waits_for_goes_on_beside_reads(make_crew, make_gate):
    crew, reading = make_crew(2), make_gate()
    reader = begin(lambda: numbers(2, reading.hold)[...])
    reading.wait_for(2)
    background: list[int] = []
    prefetch = numbers(3, background.append).prefetch()
    less_urgent = numbers(3, background.append).request(priority=INTERACTIVE + 1)
    np.testing.assert_array_equal(numbers(9).request().result(PATIENCE_S), range(9))
    until(lambda: not crew._hands)
    assert background == []
    reading.door.release(1000)
    reader.result(PATIENCE_S)
    assert prefetch.wait(PATIENCE_S)
    assert less_urgent.wait(PATIENCE_S)


def test_a_prefetch_goes_on_beside_what_is_no_more_urgent(make_crew, make_gate):
    """Such as a batch, which may take days."""
    make_crew(2)
    reading = make_gate()

    def read() -> Any:
        priority.set(BACKGROUND)
        return numbers(2, reading.hold)[...]

    reader = begin(read)
    reading.wait_for(2)
    assert numbers(9).prefetch().wait(PATIENCE_S)
    reading.door.release(1000)
    reader.result(PATIENCE_S)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_requests_keep_no_more_threads_busy_than_there_are(make_crew, num_threads):
    """Also with the helpers of the cells that they compute."""
    make_crew(num_threads, spare_tiny=False)
    lock = threading.Lock()
    working = most = 0

    def leaf(_: int) -> None:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        sum(range(3000))
        with lock:
            working -= 1

    leaves = numbers(400, leaf)
    branches = ci.map_cells(np.negative, leaves, dtype=int, cell_shape=10)
    requests = [branches.request(np.s_[start : start + 200]) for start in (0, 100, 200)]
    for request in requests:
        request.result(PATIENCE_S)
    assert 1 <= most <= num_threads
    assert leaves.stats().loads == 400


def test_where_all_threads_work_off_the_board_their_cells_get_no_helpers(make_crew):
    crew = make_crew(2)
    together = threading.Barrier(2)
    busy: list[int] = []

    def leaf(index: int) -> None:
        if index % 10 == 0:
            together.wait(PATIENCE_S)
            busy.append(len(crew._busy))
            together.wait(PATIENCE_S)

    branches = ci.map_cells(np.negative, numbers(20, leaf), dtype=int, cell_shape=10)
    branches.request().result(PATIENCE_S)
    assert busy == [0, 0]


def test_one_cell_gets_the_help_of_idle_threads(make_crew):
    make_crew(3)
    together = threading.Barrier(3)
    branch = ci.map_cells(
        np.negative, numbers(3, lambda _: together.wait(PATIENCE_S)), dtype=int, cell_shape=3
    )
    np.testing.assert_array_equal(branch.request().result(PATIENCE_S), [0, -1, -2])


@pytest.mark.parametrize("num_threads", [2, 8])
def test_all_threads_work_off_the_board(make_crew, num_threads):
    make_crew(num_threads)
    together = threading.Barrier(num_threads)
    request = numbers(3 * num_threads, lambda _: together.wait(PATIENCE_S)).request()
    np.testing.assert_array_equal(request.result(PATIENCE_S), range(3 * num_threads))


def test_a_prefetch_of_very_many_cells_begins_at_once(make_crew, make_gate):
    make_crew(2)
    gate = make_gate()
    grid = ci.CellGrid((300, 300, 300), 1)
    request = ci.fill_cells(gate.hold, grid, dtype="u1").prefetch()
    gate.wait_for(2)
    assert request.progress == (300**3 - 2, 2, 0)
    assert len(request._job.pending) < 10_000
    assert request.cancel() == (300**3 - 2, 2, 0)


def test_one_cell_calls_one_thread(make_crew):
    crew = make_crew(4)
    numbers(1).request().result(PATIENCE_S)
    assert len(crew._threads) == 1


def test_tiny_cells_are_left_to_one_thread(make_crew, monkeypatch):
    crew = make_crew(2)
    monkeypatch.setattr("cellimg_dask.loading.crew._TINY_S", 1e9)  # Everything is tiny.
    looks_on = threading.Event()
    by: dict[int, int] = {}
    wait = threading.Event.wait

    def wait_and_tell(self: threading.Event, timeout: float | None = None) -> bool:
        if self is crew._backlog_done:
            looks_on.set()
        return wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait_and_tell)

    def before(index: int) -> None:
        if index == 2000:
            assert wait(looks_on, PATIENCE_S)
        by[threading.get_ident()] = by.get(threading.get_ident(), 0) + 1

    numbers(4000, before).request().result(PATIENCE_S)
    # Only a look during which the other one was stopped altogether makes the second join.
    assert sum(by.values()) == 4000
    assert max(by.values()) > 2000
