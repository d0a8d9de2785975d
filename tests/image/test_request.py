"""Requests: regions in the background, shared cell by cell, with any number of threads."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import begin, in_time, until

import cellimg_dask as ci
from cellimg_dask.loading.board import Board
from cellimg_dask.loading.crew import Crew

PATIENCE_S = 30
"""What takes longer hangs."""


@pytest.fixture
def make_crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Crew]]:
    """Give images without a queue a crew of a number of threads."""
    crews: list[Crew] = []

    def make(num_threads: int) -> Crew:
        crew = Crew(num_threads)
        crews.append(crew)
        monkeypatch.setattr("cellimg_dask.loading.loader.get_crew", lambda: crew)
        return crew

    yield make
    for crew in crews:
        crew.close()
        assert not crew._busy, "somebody is still counted as busy"
        assert not crew._hands, "somebody is still counted as a hand"
        board = crew.backlog
        if board is not None:
            assert isinstance(board, Board)
            assert (board._jobs, board._wanted, board._runs) == ({}, {}, {})


@pytest.fixture
def one(make_crew: Callable[[int], Crew]) -> Crew:
    return make_crew(1)


@pytest.fixture
def two(make_crew: Callable[[int], Crew]) -> Crew:
    return make_crew(2)


@pytest.fixture(params=[1, 2, 8])
def crew(request: pytest.FixtureRequest, make_crew: Callable[[int], Crew]) -> Crew:
    return make_crew(request.param)


class Gate:
    """Cells wait here until they are let through."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._door = threading.Semaphore(0)

    def hold(self) -> None:
        self._arrived.release()
        assert self._door.acquire(timeout=PATIENCE_S)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._arrived.acquire(timeout=PATIENCE_S), "nobody came"

    def open(self, count: int = 1000) -> None:
        self._door.release(count)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def numbers(count: int, fill: Callable[[ci.Block], None] | None = None, **options: Any) -> Any:
    """An image whose cells are single voxels that hold their index."""

    def whole(block: ci.Block) -> None:
        if fill is not None:
            fill(block)
        block.data[...] = block.index

    return ci.fill_cells(whole, ci.CellGrid((count,), (1,)), dtype=int, **options)


# ---------------------------------------------------------------------------- results

DTYPES = ["u1", "i8", ">i4", "?", "f4", ">f8", "c16", "M8[s]"]


@given(data=st.data())
def test_a_request_gives_what_numpy_gives(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(0, 3), "ndim")
    shape = tuple(data.draw(st.integers(0, 7)) for _ in range(ndim))
    cells = tuple(data.draw(st.integers(1, 4)) for _ in range(ndim))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    image = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    options = {} if data.draw(st.booleans(), "cached") else {"cache": None}
    lazy = ci.map_cells(np.copy, image, dtype=dtype, cell_shape=cells, **options)
    key: list[int | slice] = []
    for extent in shape:
        if extent and data.draw(st.booleans()):
            key.append(data.draw(st.integers(-extent, extent - 1)))
        else:
            low = data.draw(st.integers(0, extent))
            key.append(slice(low, data.draw(st.integers(low, extent))))
    cache = data.draw(st.sampled_from(["use", "bypass"]), "cache")
    for _ in range(2):
        request = lazy.request(tuple(key), cache=cache)
        result = request.result(PATIENCE_S)
        np.testing.assert_array_equal(result, image[tuple(key)])
        assert (result.shape, result.dtype) == (lazy[tuple(key)].shape, lazy.dtype)
        assert request.state == "done"
        assert request.progress.fraction == 1


def test_a_request_takes_what_an_index_takes() -> None:
    image = np.arange(30).reshape(5, 6)
    lazy = ci.map_cells(np.negative, image, cell_shape=2)
    for key in (..., np.s_[1:3], 2, (-1, 4), np.s_[..., 3], ci.Roi((1, 2), (4, 4)), np.s_[2:2]):
        expected = lazy[key]
        result = lazy.request(key).result(PATIENCE_S)
        np.testing.assert_array_equal(result, expected)
        assert type(result) is type(expected)
    with pytest.raises(IndexError, match="allowed is 0:5"):
        lazy.request(ci.Roi((0, 0), (6, 6)))
    with pytest.raises(IndexError, match="too many indices"):
        lazy.request((0, 0, 0))
    with pytest.raises(ValueError, match="steps of 1"):
        lazy.request(np.s_[::2])


@pytest.mark.parametrize("bad", [1.5, "0", None, True])
def test_a_priority_is_an_integer(bad: Any) -> None:
    with pytest.raises(TypeError, match="priority must be an integer"):
        numbers(2).request(priority=bad)


@pytest.mark.parametrize("bad", ["none", None, True, "USE"])
def test_a_cache_is_used_or_bypassed(bad: Any) -> None:
    with pytest.raises(ValueError, match='"use" or "bypass"'):
        numbers(2).request(cache=bad)


def test_the_result_is_the_requests_own_array(crew: Crew) -> None:
    lazy = numbers(4)
    request = lazy.request()
    result = request.result(PATIENCE_S)
    assert request.result() is result
    result[...] = -1
    np.testing.assert_array_equal(lazy[...], range(4))
    np.testing.assert_array_equal(lazy.request().result(), range(4))


def test_what_is_cached_is_there_at_once(one: Crew) -> None:
    lazy = numbers(70)
    expected = lazy[...]
    request = lazy.request()
    assert (request.state, request.progress) == ("done", (0, 0, 70))
    np.testing.assert_array_equal(request.result(timeout=0), expected)
    assert one._threads == [], "nobody was needed"
    assert lazy.stats().hits == 70


def test_an_empty_region_is_there_at_once(one: Crew) -> None:
    request = numbers(4).request(np.s_[2:2])
    assert (request.state, request.progress, request.progress.fraction) == ("done", (0, 0, 0), 1)
    assert request.result(timeout=0).shape == (0,)


def test_an_image_without_axes(crew: Crew) -> None:
    lazy = ci.map_cells(np.negative, np.array(3), cell_shape=())
    assert lazy.request().result(PATIENCE_S) == -3
    assert lazy.request().state == "done"


@pytest.mark.parametrize("cache", ["use", "bypass"])
def test_large_requests_are_put_up_in_portions(
    crew: Crew, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellimg_dask.loading.board._GATHER_AT_ONCE", 50)
    monkeypatch.setattr("cellimg_dask.loading.board._PORTION", 7)
    lazy = numbers(203)
    lazy[10:40], lazy[100:130]
    request = lazy.request(cache=cache)
    other = lazy.request(np.s_[20:180])
    assert sum(request.progress) == 203
    np.testing.assert_array_equal(request.result(PATIENCE_S), range(203))
    np.testing.assert_array_equal(other.result(PATIENCE_S), range(20, 180))
    assert request.progress == (0, 0, 203)
    if cache == "use":
        assert lazy.stats().loads == 203


# ---------------------------------------------------------------------------- once only


@pytest.mark.parametrize("count", [8])
def test_cells_of_overlapping_requests_are_computed_once(crew: Crew, count: int) -> None:
    calls: list[int] = []
    lazy = numbers(60, lambda block: calls.append(block.index))
    together = threading.Barrier(count)
    results: dict[int, Any] = {}

    def ask(number: int) -> None:
        together.wait(PATIENCE_S)
        results[number] = lazy.request(np.s_[5 * number : 5 * number + 25]).result(PATIENCE_S)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for number in range(count):
        np.testing.assert_array_equal(results[number], range(5 * number, 5 * number + 25))
    assert sorted(calls) == list(range(60))


def test_pending_cells_are_shared_without_a_cache(one: Crew, gate: Gate) -> None:
    """Not because the second finds them in the cache."""
    calls: list[int] = []

    def fill(block: ci.Block) -> None:
        calls.append(block.index)
        if block.index == 0:
            gate.hold()

    lazy = numbers(5, fill, cache=None)
    first = lazy.request()
    gate.wait_for(1)
    second = lazy.request()
    assert (first.progress, second.progress) == ((4, 1, 0), (4, 1, 0))
    gate.open()
    for request in (first, second):
        np.testing.assert_array_equal(request.result(PATIENCE_S), range(5))
    assert calls == [0, 1, 2, 3, 4]


def test_past_the_cache_nothing_is_looked_up_or_kept(crew: Crew) -> None:
    calls: list[int] = []
    lazy = numbers(4, lambda block: calls.append(block.index))
    kept = lazy.load(1)
    requests = [lazy.request(cache="bypass") for _ in range(2)]
    for request in requests:
        np.testing.assert_array_equal(request.result(PATIENCE_S), range(4))
    assert sorted(calls) == sorted([1, *range(4), *range(4)])
    assert [lazy.peek(index) is None for index in range(4)] == [True, False, True, True]
    assert lazy.peek(1) is kept
    assert (lazy.stats().loads, lazy.stats().bytes) == (9, kept.nbytes)


def test_a_read_and_a_request_share_what_runs(two: Crew, gate: Gate) -> None:
    calls: list[int] = []

    def fill(block: ci.Block) -> None:
        calls.append(block.index)
        gate.hold()

    lazy = numbers(1, fill)
    request = lazy.request()
    gate.wait_for(1)
    reader = begin(lambda: lazy[...])
    gate.open()
    np.testing.assert_array_equal(reader.result(PATIENCE_S), [0])
    np.testing.assert_array_equal(request.result(PATIENCE_S), [0])
    assert calls == [0]


def test_what_runs_since_before_a_change_is_not_given_to_who_asks_after(
    two: Crew, gate: Gate
) -> None:
    values = [1, 2]

    def fill(block: ci.Block) -> None:
        value = values.pop(0)
        if value == 1:
            gate.hold()
        block.data[...] = value

    lazy = ci.fill_cells(fill, ci.CellGrid((1,), (1,)), dtype=int)
    before = lazy.request()
    gate.wait_for(1)
    lazy.invalidate()
    after = lazy.request()
    np.testing.assert_array_equal(after.result(PATIENCE_S), [2])
    gate.open()
    np.testing.assert_array_equal(before.result(PATIENCE_S), [1])
    np.testing.assert_array_equal(lazy[...], [2])


# ---------------------------------------------------------------------------- what goes first


def test_lower_numbers_and_older_requests_go_first(one: Crew, gate: Gate) -> None:
    order: list[int] = []

    def fill(block: ci.Block) -> None:
        if block.index == 0:
            gate.hold()
        order.append(block.index)

    lazy = numbers(20, fill)
    requests = [lazy.request(np.s_[:1])]
    gate.wait_for(1)
    for start, number in ((1, 5), (3, 0), (5, 5), (7, -2), (9, 0), (11, 1000)):
        requests.append(lazy.request(np.s_[start : start + 2], priority=number))
    gate.open()
    for request in requests:
        request.result(PATIENCE_S)
    assert order == [0, 7, 8, 3, 4, 9, 10, 1, 2, 5, 6, 11, 12]


def test_a_cell_that_is_wanted_more_urgently_is_raised(one: Crew, gate: Gate) -> None:
    order: list[int] = []

    def fill(block: ci.Block) -> None:
        if block.index == 0:
            gate.hold()
        order.append(block.index)

    lazy = numbers(10, fill)
    prefetch = lazy.prefetch()
    gate.wait_for(1)
    urgent = lazy.request(np.s_[7:9], priority=3)
    most_urgent = lazy.request(np.s_[8:10])
    gate.open()
    for request in (most_urgent, urgent, prefetch):
        assert request.wait(PATIENCE_S)
        assert request.state == "done"
    assert order == [0, 8, 9, 7, 1, 2, 3, 4, 5, 6]


def test_who_no_longer_wants_a_cell_does_not_raise_it(one: Crew, gate: Gate) -> None:
    order: list[int] = []

    def fill(block: ci.Block) -> None:
        if block.index == 0:
            gate.hold()
        order.append(block.index)

    lazy = numbers(5, fill)
    prefetch = lazy.prefetch()
    gate.wait_for(1)
    assert lazy.request(np.s_[3:]).cancel() == (2, 0, 0)
    gate.open()
    assert prefetch.wait(PATIENCE_S)
    assert order == [0, 1, 2, 3, 4]


def test_a_read_goes_before_a_prefetch_of_the_same_cells(one: Crew, gate: Gate) -> None:
    order: list[int] = []

    def fill(block: ci.Block) -> None:
        order.append(block.index)
        if block.index == 0:
            gate.hold()

    lazy = numbers(10, fill)
    prefetch = lazy.prefetch()
    gate.wait_for(1)
    # On this thread, while the only one of the crew is busy.
    np.testing.assert_array_equal(in_time(lambda: lazy[7:9]), [7, 8])
    gate.open()
    assert prefetch.wait(PATIENCE_S)
    assert order == [0, 7, 8, 1, 2, 3, 4, 5, 6, 9]


def test_a_prefetch_fills_the_cache_and_keeps_no_result(crew: Crew) -> None:
    lazy = numbers(6)
    prefetch = lazy.prefetch(np.s_[2:5])
    assert prefetch.result(PATIENCE_S) is None
    assert prefetch.progress == (0, 0, 3)
    assert sorted(lazy.loader.shelf.held()) == [2, 3, 4]
    assert lazy.prefetch().result(PATIENCE_S) is None
    assert lazy.stats().loads == 6
    assert lazy.prefetch().state == "done"
    with pytest.raises(ValueError, match="prefetch keeps no result"):
        prefetch.write_into(np.zeros(3, int))


# ---------------------------------------------------------------------------- cancelling


def test_a_cancelled_request_computes_no_more_than_what_runs(two: Crew, gate: Gate) -> None:
    calls: list[int] = []
    lock = threading.Lock()

    def fill(block: ci.Block) -> None:
        with lock:
            calls.append(block.index)
        if block.index >= 20:
            gate.hold()

    lazy = numbers(200, fill)
    first = lazy.request()
    gate.wait_for(2)
    second = lazy.request(np.s_[100:150])
    counts = first.cancel()
    assert counts == first.progress == (178, 2, 20)
    assert counts.fraction == 0.1
    assert first.state == "cancelled"
    assert first.wait(0)
    assert sorted(calls) == list(range(22))
    gate.open()
    np.testing.assert_array_equal(second.result(PATIENCE_S), range(100, 150))
    assert sorted(calls) == [*range(22), *range(100, 150)]
    # What was running ends by itself and is kept.
    until(lambda: lazy.peek(20) is not None and lazy.peek(21) is not None)
    assert lazy.peek(22) is None


@pytest.mark.parametrize("cached", [0, 3])
def test_cancelling_tells_how_far_it_was(one: Crew, gate: Gate, cached: int) -> None:
    lazy = numbers(10, lambda block: gate.hold() if block.index >= cached else None)
    if cached:
        lazy[:cached]
    other = numbers(1, lambda block: gate.hold()).request()
    gate.wait_for(1)
    request = lazy.request()
    assert request.state == ("running" if cached else "pending")
    assert request.progress == (10 - cached, 0, cached)
    gate.open(1)
    gate.wait_for(1)
    assert request.state == "running"
    assert request.progress == (9 - cached, 1, cached)
    assert request.cancel() == (9 - cached, 1, cached)
    assert request.cancel() == (0, 0, cached)
    assert request.progress == (9 - cached, 1, cached), "as it ended"
    gate.open()
    assert other.wait(PATIENCE_S)
    for ask in (request.result, request.exception):
        with pytest.raises(CancelledError):
            ask()


def test_cancelling_what_is_over_changes_nothing(crew: Crew) -> None:
    request = numbers(5).request()
    result = request.result(PATIENCE_S)
    assert request.cancel() == (0, 0, 5)
    assert request.state == "done"
    assert request.result() is result


def test_cancelling_wakes_who_waits(one: Crew, gate: Gate) -> None:
    request = numbers(3, lambda block: gate.hold()).request()
    gate.wait_for(1)
    waiters = [begin(request.wait), begin(request.result)]
    until(lambda: request._job.event is not None)
    request.cancel()
    assert waiters[0].result(PATIENCE_S) is True
    with pytest.raises(CancelledError):
        waiters[1].result(PATIENCE_S)


def test_a_cell_that_runs_for_a_cancelled_request_serves_the_next(one: Crew, gate: Gate) -> None:
    calls: list[int] = []

    def fill(block: ci.Block) -> None:
        calls.append(block.index)
        gate.hold()

    lazy = numbers(1, fill)
    first = lazy.request()
    gate.wait_for(1)
    first.cancel()
    second = lazy.request()
    assert second.progress == (0, 1, 0)
    gate.open()
    np.testing.assert_array_equal(second.result(PATIENCE_S), [0])
    assert calls == [0]


# ---------------------------------------------------------------------------- errors


class TroubleError(Exception):
    pass


def test_the_error_is_what_the_function_raised(crew: Crew) -> None:
    error = TroubleError("no", 7)

    def trouble(a: NDArray[Any]) -> NDArray[Any]:
        if a[0, 0] == 14:
            raise error
        return a

    lazy = ci.map_cells(trouble, np.arange(24).reshape(4, 6), dtype=int, cell_shape=(2, 2))
    request = lazy.request()
    for _ in range(3):
        with pytest.raises(TroubleError) as caught:
            request.result(PATIENCE_S)
        assert caught.value is error
    depth = 0
    names = []
    step = caught.value.__traceback__
    while step is not None:
        depth += 1
        names.append(step.tb_frame.f_code.co_name)
        step = step.tb_next
    assert "trouble" in names
    assert names.count("result") == 1, "raised again, it does not grow"
    (note,) = error.__notes__
    assert "trouble" in note
    assert "(1, 1)" in note
    assert "[2:4, 2:4]" in note
    assert request.exception() is error
    assert type(request.error) is ci.BlockError
    assert request.error.__cause__ is error
    assert request.error.position == (1, 1)
    assert request.state == "failed"


def test_a_request_after_an_error_tries_again(crew: Crew) -> None:
    broken = [True]

    def fill(block: ci.Block) -> None:
        if block.index == 2 and broken:
            raise TroubleError

    lazy = numbers(4, fill)
    for _ in range(2):
        with pytest.raises(TroubleError):
            lazy.request().result(PATIENCE_S)
    broken.clear()
    np.testing.assert_array_equal(lazy.request().result(PATIENCE_S), range(4))


def test_an_error_ends_all_requests_of_the_cell_and_no_others(one: Crew, gate: Gate) -> None:
    calls: list[int] = []

    def fill(block: ci.Block) -> None:
        calls.append(block.index)
        if block.index == 1:
            gate.hold()
            raise TroubleError("cell 1")

    lazy = numbers(10, fill)
    first = lazy.request(np.s_[:5])
    gate.wait_for(1)
    sharing = lazy.request(np.s_[1:8])
    other = lazy.request(np.s_[3:5])
    gate.open()
    for request in (first, sharing):
        with pytest.raises(TroubleError, match="cell 1"):
            request.result(PATIENCE_S)
        assert isinstance(request.error, ci.BlockError)
    assert first.error is not sharing.error
    assert len(first.error.__cause__.__notes__) == 1
    np.testing.assert_array_equal(other.result(PATIENCE_S), [3, 4])
    # Nobody wants the others any more.
    assert calls == [0, 1, 3, 4]
    assert first.progress == (3, 1, 1)


def test_errors_of_the_library_are_raised_as_they_are(crew: Crew) -> None:
    def wrong_shape(a: NDArray[Any]) -> NDArray[Any]:
        return np.zeros(7)

    class Broken:
        shape, dtype = (4,), np.dtype(float)

        def __getitem__(self, key: Any) -> Any:
            raise FileNotFoundError("store")

    cases = [
        (ci.map_cells(wrong_shape, np.zeros(4), dtype=float, cell_shape=2), ci.ResultError),
        (ci.map_cells(np.negative, Broken(), dtype=float, cell_shape=2), ci.ReadError),
    ]
    for lazy, kind in cases:
        request = lazy.request()
        with pytest.raises(kind) as caught:
            request.result(PATIENCE_S)
        assert caught.value is request.error is request.exception()
        assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit("bye")])
def test_exit_in_a_block_is_contained(crew: Crew, error: SystemExit) -> None:
    def leave(block: ci.Block) -> None:
        raise error

    request = numbers(2, leave).request()
    with pytest.raises(ci.BlockError) as caught:
        request.result(PATIENCE_S)
    assert caught.value.__cause__ is error


def test_an_error_that_takes_no_note_is_raised_all_the_same(crew: Crew) -> None:
    @dataclasses.dataclass(frozen=True)
    class FrozenError(Exception):
        code: int

    def fill(block: ci.Block) -> None:
        raise FrozenError(5)

    request = numbers(1, fill).request()
    with pytest.raises(FrozenError):
        request.result(PATIENCE_S)


def test_an_error_upstream_names_the_cell_upstream(crew: Crew) -> None:
    def fill(block: ci.Block) -> None:
        if block.index == 3:
            raise TroubleError

    lower = numbers(6, fill)
    upper = ci.map_cells(np.negative, lower, dtype=int, cell_shape=2)
    with pytest.raises(TroubleError) as caught:
        upper.request().result(PATIENCE_S)
    assert "(3,)" in caught.value.__notes__[0]


# ---------------------------------------------------------------------------- waiting


def test_waiting_takes_no_longer_than_was_said(one: Crew, gate: Gate) -> None:
    request = numbers(2, lambda block: gate.hold()).request()
    gate.wait_for(1)
    for timeout in (0, 0.01):
        assert request.wait(timeout) is False
        with pytest.raises(TimeoutError, match=f"not over after {timeout} s"):
            request.result(timeout)
        with pytest.raises(TimeoutError):
            request.exception(timeout)
    assert request.state == "running"
    gate.open()
    assert request.wait(PATIENCE_S) is True
    assert request.wait() is True
    assert request.exception() is None


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals")
def test_an_interrupted_wait_leaves_the_request_alive(one: Crew, gate: Gate) -> None:
    request = numbers(3, lambda block: gate.hold()).request()
    gate.wait_for(1)
    pressed = begin(
        lambda: (
            until(lambda: request._job.event is not None),
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT),
        )
    )
    with pytest.raises(KeyboardInterrupt):
        request.wait(PATIENCE_S)
    pressed.result(PATIENCE_S)
    assert request.state == "running"
    gate.open()
    np.testing.assert_array_equal(request.result(PATIENCE_S), range(3))


def test_an_interrupted_wait_inside_a_block_leaves_the_cell_to_others(one: Crew) -> None:
    interrupts = [KeyboardInterrupt()]

    def fill(block: ci.Block) -> None:
        if interrupts:
            raise interrupts.pop()

    lower = numbers(2, fill)
    requests: list[ci.Request] = []

    def ask(block: ci.Block) -> None:
        requests.append(lower.request())
        # The only thread of the crew is this one.
        requests[0].result()

    upper = numbers(1, ask)
    with pytest.raises(KeyboardInterrupt):
        upper.request().result(PATIENCE_S)
    np.testing.assert_array_equal(requests[0].result(PATIENCE_S), range(2))


# ---------------------------------------------------------------------------- callbacks


def test_a_callback_is_called_once(one: Crew, gate: Gate) -> None:
    lazy = numbers(2, lambda block: gate.hold())
    request = lazy.request()
    called: list[ci.Request] = []
    told = threading.Event()
    request.add_done_callback(called.append)
    request.add_done_callback(lambda _: told.set())
    gate.open()
    assert told.wait(PATIENCE_S)
    assert called == [request]
    request.add_done_callback(called.append)
    assert called == [request, request], "at once where it is over"
    warm = lazy.request()
    warm.add_done_callback(called.append)
    assert called[2:] == [warm]


@pytest.mark.parametrize("how", ["done", "failed", "cancelled"])
def test_a_callback_sees_how_it_ended(one: Crew, gate: Gate, how: str) -> None:
    def fill(block: ci.Block) -> None:
        gate.hold()
        if how == "failed":
            raise TroubleError

    request = numbers(1, fill).request()
    gate.wait_for(1)
    seen: list[Any] = []
    told = threading.Event()

    def callback(request: ci.Request) -> None:
        seen.append((request.state, request.wait(0)))
        told.set()

    request.add_done_callback(callback)
    if how == "cancelled":
        request.cancel()
        assert seen, "by who cancels"
        request.cancel()
    gate.open()
    assert told.wait(PATIENCE_S)
    assert seen == [(how, True)]


def test_a_callback_that_raises_is_logged(
    one: Crew, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    request = numbers(1, lambda block: gate.hold()).request()
    told = threading.Event()

    def fail(_: ci.Request) -> None:
        raise TroubleError("in a callback")

    def leave(_: ci.Request) -> None:
        raise SystemExit

    request.add_done_callback(fail)
    request.add_done_callback(leave)
    request.add_done_callback(lambda _: told.set())
    with caplog.at_level(logging.ERROR, "cellimg_dask"):
        gate.open()
        assert told.wait(PATIENCE_S)
        request.add_done_callback(fail)
    assert [record.name for record in caplog.records] == ["cellimg_dask"] * 3
    assert "in a callback" in caplog.text
    np.testing.assert_array_equal(numbers(3).request().result(PATIENCE_S), range(3))


def test_requests_inside_callbacks_end(crew: Crew) -> None:
    """Also where the callback has the only thread that could compute."""
    lower, upper = numbers(5), numbers(7, lambda block: None)
    results: Future[Any] = Future()

    def callback(_: ci.Request) -> None:
        nested = upper.request()
        nested.add_done_callback(lambda _: results.set_result(lower.request(np.s_[3:]).result()))
        nested.result()

    request = lower.request(np.s_[:2])
    request.add_done_callback(callback)
    np.testing.assert_array_equal(results.result(PATIENCE_S), [3, 4])


def test_two_callbacks_that_wait_for_each_others_crews_end(
    make_crew: Callable[[int], Crew],
) -> None:
    with ci.BlockQueue(1) as queue:
        make_crew(1)
        here, there = numbers(4), numbers(4, queue=queue)
        both = threading.Barrier(2)
        done: list[Future[Any]] = [Future(), Future()]

        def ask(number: int, image: ci.CellImg) -> Callable[[ci.Request], None]:
            def callback(_: ci.Request) -> None:
                both.wait(PATIENCE_S)
                done[number].set_result(image.request().result())

            return callback

        gate = Gate()
        for number, (image, other) in enumerate(((here, there), (there, here))):
            first = numbers(1, lambda block: gate.hold(), queue=image.loader.queue).request()
            first.add_done_callback(ask(number, other))
        gate.wait_for(2)
        gate.open()
        for future in done:
            np.testing.assert_array_equal(future.result(PATIENCE_S), range(4))


def test_a_request_in_the_callback_of_a_cancelled_request(one: Crew, gate: Gate) -> None:
    lazy = numbers(4, lambda block: gate.hold())
    request = lazy.request()
    gate.wait_for(1)
    again: list[ci.Request] = []
    request.add_done_callback(lambda _: again.append(lazy.request(np.s_[1:3])))
    request.cancel()
    gate.open()
    np.testing.assert_array_equal(again[0].result(PATIENCE_S), [1, 2])


# ---------------------------------------------------------------------------- inside blocks


@pytest.mark.parametrize("cache", ["use", "bypass"])
@pytest.mark.parametrize("read", ["read", "request"])
def test_requests_inside_blocks_end(crew: Crew, cache: Any, read: str) -> None:
    lowest = numbers(12)
    middle = numbers(
        12, lambda block: lowest.request(np.s_[max(0, block.index - 3) :], cache=cache).result()
    )

    def highest(block: ci.Block) -> None:
        requests = [middle.request(np.s_[start:], cache=cache) for start in (0, 4, 8)]
        for request in reversed(requests):
            request.result()

    top = numbers(3, highest)
    result = in_time(lambda: top[...] if read == "read" else top.request().result())
    np.testing.assert_array_equal(result, range(3))
    if cache == "use":
        assert middle.stats().loads == lowest.stats().loads == 12


def test_a_block_may_wait_for_a_request_that_was_made_outside(crew: Crew, gate: Gate) -> None:
    lower = numbers(10)
    occupied = numbers(crew.num_threads, lambda block: gate.hold()).request(priority=-1)
    gate.wait_for(crew.num_threads if crew.num_threads > 1 else 1)
    request = lower.request()
    upper = numbers(1, lambda block: request.result())
    # All threads of the crew are taken: who waits does it himself.
    np.testing.assert_array_equal(in_time(lambda: upper[...]), [0])
    assert request.state == "done"
    gate.open()
    assert occupied.wait(PATIENCE_S)


CYCLES = {
    "result": lambda lazy, block: lazy.request(block.roi).result(),
    "whole": lambda lazy, block: lazy.request().result(),
    "wait": lambda lazy, block: raise_error(lazy.request()),
    "bypass": lambda lazy, block: lazy.request(block.roi, cache="bypass").result(),
    "prefetch": lambda lazy, block: lazy.prefetch(block.roi).result(),
}


def raise_error(request: ci.Request) -> None:
    assert request.wait()
    assert request.error is not None
    raise request.error


async def awaited(request: ci.Request) -> Any:
    return await request


@pytest.mark.parametrize("how", CYCLES.values(), ids=CYCLES.keys())
@pytest.mark.parametrize("from_outside", ["read", "load", "request", "prefetch", "bypass"])
def test_a_cell_that_needs_itself_through_a_request_is_an_error(
    crew: Crew, how: Callable[..., Any], from_outside: str
) -> None:
    images: list[ci.CellImg] = []
    lower = numbers(4, lambda block: how(images[1], block))
    upper = ci.map_cells(np.negative, lower, dtype=int, cell_shape=2)
    images += [lower, upper]
    reads = {
        "read": lambda: upper[...],
        "load": lambda: upper.load(0),
        "request": lambda: raise_error(upper.request()),
        "prefetch": lambda: raise_error(upper.prefetch()),
        "bypass": lambda: raise_error(upper.request(cache="bypass")),
    }
    with pytest.raises(ci.CycleError, match="needs itself"):
        in_time(reads[from_outside])
    # Whatever else went on ends as well.
    board = crew.backlog
    assert isinstance(board, Board)
    until(lambda: not board._jobs)


def test_a_cell_that_waits_for_a_request_in_its_own_way_is_an_error_if_it_needs_itself(
    two: Crew,
) -> None:
    """The computation that made the request is known, whoever computes for it."""
    images: list[ci.CellImg] = []

    def fill(block: ci.Block) -> None:
        over = threading.Event()
        request = images[0].request(block.roi)
        request.add_done_callback(lambda _: over.set())
        assert over.wait(PATIENCE_S)
        assert request.error is not None
        raise request.error

    lower = numbers(1, fill)
    images.append(ci.map_cells(np.negative, lower, dtype=int, cell_shape=1))
    with pytest.raises(ci.CycleError):
        in_time(lambda: lower[...])


@pytest.mark.parametrize("cache", ["use", "bypass"])
def test_a_request_can_be_awaited_inside_a_block(crew: Crew, cache: Any) -> None:
    lower = numbers(5)
    upper = numbers(3, lambda block: asyncio.run(awaited(lower.request(cache=cache))))
    np.testing.assert_array_equal(in_time(lambda: upper.request().result()), range(3))


def test_cells_are_computed_under_the_callers_context(crew: Crew) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    seen: list[str] = []
    lazy = numbers(4, lambda block: seen.append(name.get()))
    name.set("caller")
    request = lazy.request()
    name.set("somebody else")
    request.result(PATIENCE_S)
    assert seen == ["caller"] * 4


# ---------------------------------------------------------------------------- asyncio


def test_a_request_can_be_awaited(crew: Crew) -> None:
    lazy = numbers(6)

    async def main() -> None:
        request = lazy.request()
        np.testing.assert_array_equal(await request, range(6))
        np.testing.assert_array_equal(await request, range(6))
        several = await asyncio.gather(*(lazy.request(np.s_[:n]) for n in (2, 4)))
        for result, n in zip(several, (2, 4), strict=True):
            np.testing.assert_array_equal(result, range(n))
        cold = numbers(3).request()
        np.testing.assert_array_equal(await asyncio.wait_for(cold, PATIENCE_S), range(3))

    asyncio.run(main())


def test_awaiting_gives_the_error(crew: Crew) -> None:
    def fill(block: ci.Block) -> None:
        raise TroubleError

    async def main() -> None:
        with pytest.raises(TroubleError):
            await numbers(3, fill).request()

    asyncio.run(main())


def test_cancelling_who_awaits_cancels_the_request(one: Crew, gate: Gate) -> None:
    async def main() -> None:
        request = numbers(3, lambda block: gate.hold()).request()
        task = asyncio.ensure_future(awaited(request))
        await asyncio.get_running_loop().run_in_executor(None, gate.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert request.state == "cancelled"

    asyncio.run(main())


def test_a_cancelled_request_wakes_who_awaits(one: Crew, gate: Gate) -> None:
    async def main() -> None:
        request = numbers(3, lambda block: gate.hold()).request()
        task = asyncio.ensure_future(awaited(request))
        await asyncio.get_running_loop().run_in_executor(None, gate.wait_for, 1)
        request.cancel()
        with pytest.raises(CancelledError):
            await task

    asyncio.run(main())


def test_a_request_may_outlive_the_loop_that_awaited_it(one: Crew, gate: Gate) -> None:
    request = numbers(2, lambda block: gate.hold()).request()
    stolen = awaited(request)

    async def main() -> None:
        # Begun, and never ended.
        stolen.send(None)

    asyncio.run(main())
    gate.open()
    np.testing.assert_array_equal(request.result(PATIENCE_S), range(2))
    stolen.close()


# ---------------------------------------------------------------------------- write_into


@pytest.mark.parametrize("dtype", ["i8", "f8", "c16", ">i8"])
def test_a_request_is_written_into_an_array(crew: Crew, dtype: str) -> None:
    image = np.arange(30).reshape(5, 6)
    lazy = ci.map_cells(np.negative, image, cell_shape=2)
    out = np.zeros((4, 6), dtype)
    assert lazy.request(np.s_[1:]).write_into(out) is out
    np.testing.assert_array_equal(out, -image[1:])
    assert lazy.request(np.s_[1:3, 2]).write_into(out, np.s_[2:4, 0]) is out
    np.testing.assert_array_equal(out[2:4, 0], -image[1:3, 2])
    np.testing.assert_array_equal(out[:2], -image[1:3])
    line = np.zeros(6, dtype)
    lazy.request(2).write_into(line[::-1])
    np.testing.assert_array_equal(line[::-1], -image[2])
    point = np.zeros((), dtype)
    lazy.request((2, 3)).write_into(point)
    assert point == -image[2, 3]
    lazy.request((2, 3)).write_into(out, (0, 0))
    assert out[0, 0] == -image[2, 3]


def test_a_request_is_written_into_a_store(crew: Crew, tmp_path: Path) -> None:
    image = np.arange(30).reshape(5, 6)
    lazy = ci.map_cells(np.negative, image, cell_shape=2)
    out = zarr.create_array(tmp_path / "a.zarr", shape=(9, 8), chunks=(4, 4), dtype="f8")
    assert lazy.request(np.s_[1:3]).write_into(out, np.s_[3:5, 1:7]) is out
    np.testing.assert_array_equal(out[3:5, 1:7], -image[1:3])
    assert np.count_nonzero(out[...]) == 12
    lazy.request(np.s_[4]).write_into(out, np.s_[8, 2:])
    np.testing.assert_array_equal(out[8, 2:], -image[4])
    with pytest.raises(ValueError, match="read-only"):
        lazy.request(np.s_[1:3]).write_into(
            zarr.open_array(tmp_path / "a.zarr", mode="r"), np.s_[3:5, 1:7]
        )


def test_what_does_not_fit_is_refused_before_waiting(one: Crew, gate: Gate) -> None:
    lazy = numbers(4, lambda block: gate.hold())
    request = lazy.request()
    gate.wait_for(1)
    fixed = np.zeros(4, int)
    fixed.flags.writeable = False
    for out, region, kind, message in (
        (np.zeros(5, int), ..., ValueError, r"out has shape \(5,\), expected \(4,\)"),
        (np.zeros(9, int), np.s_[1:4], ValueError, r"region of out has shape \(3,\), expected"),
        (np.zeros((4, 1), int), ..., ValueError, "expected"),
        (np.zeros(4, "i4"), ..., ValueError, "dtype int32, which cannot hold int64"),
        (np.zeros(4, "u8"), ..., ValueError, "dtype uint64, which cannot hold int64"),
        (fixed, ..., ValueError, "read-only; give a writable array"),
        ([0] * 4, ..., TypeError, "got list, which has no shape and no dtype"),
        (None, ..., TypeError, "got NoneType"),
        (np.zeros(4, int), np.s_[:9], IndexError, "9"),
    ):
        with pytest.raises(kind, match=message):
            request.write_into(out, region)
    assert request.state == "running"
    gate.open()
    out = np.zeros(4, int)
    request.write_into(out)
    np.testing.assert_array_equal(out, range(4))


@pytest.mark.parametrize("cache", ["use", "bypass"])
def test_writing_over_what_the_image_reads_is_right(crew: Crew, cache: Any) -> None:
    memory = np.arange(40)
    lazy = ci.map_cells(
        lambda a: np.convolve(a, [1, 1, 1], "same"), memory, halo=1, dtype=int, cell_shape=4
    )
    expected = np.convolve(memory, [1, 1, 1], "same")
    lazy.request(cache=cache).write_into(memory)
    np.testing.assert_array_equal(memory, expected)


# ---------------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("how", ["cold", "warm", "prefetch", "cancelled", "failed", "waited"])
def test_a_dropped_request_leaves_nothing(one: Crew, gate: Gate, how: str) -> None:
    def fill(block: ci.Block) -> None:
        if how == "failed" and block.index == 2:
            raise TroubleError
        if how == "cancelled":
            gate.hold()

    lazy = numbers(4, fill)
    if how == "warm":
        lazy[...]
    request = lazy.prefetch() if how == "prefetch" else lazy.request()
    array = request._job.out
    result = None if array is None else weakref.ref(array)
    del array
    job = weakref.ref(request._job)
    if how == "cancelled":
        gate.wait_for(1)
        request.cancel()
        gate.open()
    else:
        assert request.wait(PATIENCE_S)
    if how == "waited":
        request.result()
    gc.disable()
    try:
        if how == "cancelled":
            board = one.backlog
            assert isinstance(board, Board)
            until(lambda: not one._hands)
        del request
        if how != "failed":
            assert job() is None
        assert result is None or result() is None
    finally:
        gc.enable()
    gc.collect()
    assert job() is None


def test_who_is_told_finds_nobody_else_who_holds_the_result(one: Crew, gate: Gate) -> None:
    requests = [numbers(1, lambda block: gate.hold()).request()]
    job = weakref.ref(requests[0]._job)
    held: list[Any] = []

    class Told(threading.Event):
        def set(self) -> None:
            requests.clear()
            held.append(job())
            super().set()

    told = requests[0]._job.event = Told()
    gate.open()
    assert told.wait(PATIENCE_S)
    assert held == [None]


def test_a_request_goes_on_when_its_handle_is_dropped(one: Crew, gate: Gate) -> None:
    lazy = numbers(3, lambda block: gate.hold())
    lazy.request()
    gate.open()
    until(lambda: all(lazy.peek(index) is not None for index in range(3)))


def test_leaving_python_finishes_what_has_begun_and_no_more() -> None:
    program = """
import atexit
import threading
import numpy as np
import cellimg_dask as ci

begun = threading.Event()
let_go = threading.Event()

def f(block):
    print("cell", flush=True)
    begun.set()
    let_go.wait(30)
    return block

img = ci.map_cells(f, np.zeros(100_000, "u1"), dtype="u1", cell_shape=1)
request = img.request()
request.add_done_callback(lambda request: print(request.state, flush=True))
begun.wait(30)
atexit.register(let_go.set)  # Called before what was registered earlier.
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.split()
    assert lines.count("cancelled") == 1
    assert 1 <= lines.count("cell") < 100


def test_a_request_can_be_made_while_the_interpreter_shuts_down() -> None:
    program = """
import threading
import numpy as np
import cellimg_dask as ci

img = ci.map_cells(np.negative, np.arange(100), cell_shape=5)
main = threading.main_thread()

def read():
    main.join()
    print(img.request().result().sum(), flush=True)

threading.Thread(target=read).start()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout.strip(), result.stderr) == (str(-sum(range(100))), "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_in_a_forked_child_the_board_is_empty(two: Crew, gate: Gate) -> None:
    lazy = numbers(6, lambda block: gate.hold() if block.index < 2 else None)
    request = lazy.request()
    gate.wait_for(2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # Ends a child that hangs.
        code = 1
        try:
            assert request.state == "cancelled"
            assert request.wait()
            np.testing.assert_array_equal(lazy.request(np.s_[2:]).result(), range(2, 6))
            assert lazy.stats().errors == 0
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    np.testing.assert_array_equal(request.result(PATIENCE_S), range(6))


def test_it_says_what_it_is(one: Crew, gate: Gate) -> None:
    request = numbers(3, lambda block: gate.hold()).request()
    gate.wait_for(1)
    assert repr(request) == "<Request running, 0 of 3 cells>"
    gate.open()
    request.wait()
    assert repr(request) == "<Request done, 3 of 3 cells>"
    assert request.roi == ci.Roi((0,), (3,))
