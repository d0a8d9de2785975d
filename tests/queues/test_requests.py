"""Requests and prefetches on every kind of queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi

import cellimg_dask as ci

Make = Callable[..., ci.BlockQueue]

PATIENCE_S = 60
"""What takes longer hangs."""

LOCAL = pytest.mark.parametrize("backend", ["threads", "processes"], indirect=True)
THREADS = pytest.mark.parametrize("backend", ["threads"], indirect=True)
CLUSTER = pytest.mark.parametrize("backend", ["distributed"], indirect=True)


def numbers(queue: ci.BlockQueue | None, count: int = 4, function: Any = None) -> ci.CellImg:
    """An image of ``count`` cells with a voxel each, numbered, or what ``function`` fills in."""

    def number(block: ci.Block) -> None:
        block.data[...] = block.index

    grid = ci.CellGrid((count,), 1)
    return ci.fill_cells(function or number, grid, dtype=int, queue=queue)


def test_a_region_is_what_scipy_gives(make_queue: Make, rng: np.random.Generator) -> None:
    image = rng.random((30, 41))
    lazy = ci.map_cells(
        lambda a: ndi.median_filter(a, 3),
        image,
        halo=1,
        dtype=float,
        cell_shape=(7, 11),
        queue=make_queue(),
    )
    expected = ndi.median_filter(image, 3)
    for cache in ("bypass", "use", "use"):
        request = lazy.request(np.s_[5:, 20], cache=cache)
        np.testing.assert_array_equal(request.result(PATIENCE_S), expected[5:, 20])
        assert request.progress == (0, 0, 5)
        request = lazy.request(np.s_[3:12], cache=cache)
        np.testing.assert_array_equal(request.result(PATIENCE_S), expected[3:12])
    assert request.state == "done"
    out = np.zeros((2, 41))
    np.testing.assert_array_equal(lazy.request(np.s_[8:10]).write_into(out), expected[8:10])


def test_many_requests_compute_each_cell_once(make_queue: Make, log: Any) -> None:
    add = log.add

    def fill(block: ci.Block) -> None:
        add(block.index)
        block.data[...] = block.index

    image = numbers(make_queue(), 12, fill)
    requests = [image.request(np.s_[start : start + 6]) for start in range(7)]
    requests.append(image.prefetch())
    for start, request in enumerate(requests[:-1]):
        np.testing.assert_array_equal(request.result(PATIENCE_S), range(start, start + 6))
    assert requests[-1].result(PATIENCE_S) is None
    assert sorted(map(int, log.first_words())) == list(range(12))


def test_the_error_is_what_the_function_raised(make_queue: Make) -> None:
    def fill(block: ci.Block) -> None:
        if block.index == 2:
            raise LookupError("no model")
        block.data[...] = block.index

    image = numbers(make_queue(), 4, fill)
    for begin in (image.request, image.prefetch):
        request = begin()
        with pytest.raises(LookupError, match="no model") as caught:
            request.result(PATIENCE_S)
        (note,) = caught.value.__notes__
        assert "fill" in note
        assert "(2,) [2:3]" in note
        assert type(request.error) is ci.BlockError
        assert request.error.position == (2,)
    np.testing.assert_array_equal(image.request(np.s_[:2]).result(PATIENCE_S), [0, 1])


@pytest.mark.parametrize("backend", ["processes", "distributed"], indirect=True)
def test_a_worker_that_dies_is_told_as_such(make_queue: Make, until: Any) -> None:
    def die(block: ci.Block) -> None:
        import os

        os._exit(3)

    queue = make_queue()
    request = numbers(queue, 1, die).request()
    with pytest.raises(ci.WorkerDiedError):
        request.result(PATIENCE_S)
    assert type(request.error) is ci.WorkerDiedError
    np.testing.assert_array_equal(numbers(queue).request().result(PATIENCE_S), range(4))
    until(lambda: queue.num_workers == 2)


def test_a_closed_queue_is_an_error(make_queue: Make) -> None:
    queue = make_queue()
    image = numbers(queue)
    np.testing.assert_array_equal(image[:2], [0, 1])
    queue.close()
    np.testing.assert_array_equal(image.request(np.s_[:2]).result(PATIENCE_S), [0, 1])
    with pytest.raises(ci.QueueClosedError):
        image.request().result(PATIENCE_S)


@LOCAL
def test_closing_a_queue_ends_its_requests(make_queue: Make, gate: Any, begin: Any) -> None:
    hold = gate.hold
    queue = make_queue(1)
    request = numbers(queue, 50, lambda block: hold()).request()
    gate.wait_for(1)
    closing = begin(queue.close, PATIENCE_S)
    # Turned away while the first one still runs; on threads it is waited for.
    if queue.backend == "threads":
        gate.open(1)
    else:
        gate.open()
    closing.result(PATIENCE_S)
    with pytest.raises(ci.QueueClosedError):
        request.result(PATIENCE_S)


@LOCAL
def test_a_cancelled_request_gives_workers_to_the_next(
    make_queue: Make, gate: Any, log: Any, until: Any
) -> None:
    hold, add = gate.hold, log.add

    def fill(block: ci.Block) -> None:
        add(block.index)
        hold()

    image = numbers(make_queue(1), 60, fill)
    first = image.request()
    gate.wait_for(1)
    # On processes another block waits for the worker already.
    ahead = 2 if image.loader.crew().num_threads == 2 else 1
    until(lambda: first.progress.running == ahead)
    second = image.request(np.s_[40:42])
    assert first.cancel() == (60 - ahead, ahead, 0)
    with pytest.raises(CancelledError):
        first.result()
    gate.open()
    second.result(PATIENCE_S)
    until(lambda: not image.loader.crew()._hands)
    assert sorted(map(int, log.first_words())) == [*range(ahead), 40, 41]


@THREADS
@pytest.mark.parametrize("num_workers", [1, 2])
def test_requests_inside_blocks_of_the_same_queue_end(
    make_queue: Make, num_workers: int, in_time: Any
) -> None:
    queue = make_queue(num_workers)
    lower = numbers(queue, 8)

    def read(block: ci.Block) -> None:
        requests = [lower.request(np.s_[start:], cache=c) for start in (4, 0) for c in CACHES]
        block.data[...] = sum(request.result().sum() for request in requests)

    upper = numbers(queue, 3, read)
    np.testing.assert_array_equal(in_time(lambda: upper[...]), [100] * 3)
    upper.invalidate()
    lower.invalidate()
    np.testing.assert_array_equal(upper.request().result(PATIENCE_S), [100] * 3)


CACHES = ("use", "bypass")


@THREADS
def test_a_cell_that_needs_itself_through_a_request_is_an_error(
    make_queue: Make, in_time: Any
) -> None:
    images: list[ci.CellImg] = []
    queue = make_queue(1)
    lower = numbers(queue, 2, lambda block: images[0].request().result())
    images.append(ci.map_cells(np.negative, lower, dtype=int, cell_shape=1, queue=queue))
    for read in (lambda: images[0][...], lambda: images[0].request().result()):
        with pytest.raises(ci.CycleError):
            in_time(read)


# ---------------------------------------------------------------------------- on a cluster


@pytest.fixture
def cells_known(request: pytest.FixtureRequest) -> Callable[[], set[Any]]:
    client = request.getfixturevalue("client")

    def known(dask_scheduler: Any) -> list[Any]:
        return [key for key in dask_scheduler.tasks if isinstance(key, tuple)]

    return lambda: set(client.run_on_scheduler(known))


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cellimg-request"]


@CLUSTER
def test_a_cancelled_request_is_cancelled_on_the_cluster(
    make_queue: Make, gate: Any, log: Any, until: Any, cells_known: Any
) -> None:
    hold, add = gate.hold, log.add

    def fill(block: ci.Block) -> None:
        add(block.index)
        hold()
        block.data[...] = block.index

    image = numbers(make_queue(), 20, fill)
    request = image.request()
    other = image.request(np.s_[18:])
    gate.wait_for(2)
    until(lambda: len(cells_known()) == 20)
    assert request.progress == (20, 0, 0)
    assert request.state == "running"
    assert request.cancel() == (20, 0, 0)
    with pytest.raises(CancelledError):
        request.result()
    until(lambda: {key[1] for key in cells_known()} == {18, 19})
    gate.open()
    np.testing.assert_array_equal(other.result(PATIENCE_S), [18, 19])
    # Those that were under way, and one that each worker had been given.
    assert len(log.lines()) <= 2 + 2 + 2
    until(lambda: not fetching())


@CLUSTER
def test_requests_may_be_made_in_callbacks_of_requests_of_a_cluster(make_queue: Make) -> None:
    image, other, here = numbers(make_queue(), 6), numbers(make_queue(), 5), numbers(None, 4)
    results: list[Any] = []
    told = threading.Event()

    def callback(_: ci.Request) -> None:
        results.append(image[3:])
        results.append(other.request().result(PATIENCE_S))
        results.append(ci.map_cells(np.negative, other, dtype=int)[...])
        results.append(here.request().result(PATIENCE_S))
        told.set()

    image.request(np.s_[:2]).add_done_callback(callback)
    assert told.wait(PATIENCE_S)
    for result, expected in zip(
        results, ([3, 4, 5], range(5), [0, -1, -2, -3, -4], range(4)), strict=True
    ):
        np.testing.assert_array_equal(result, expected)


@CLUSTER
def test_a_block_here_may_wait_for_a_request_of_a_cluster(make_queue: Make, in_time: Any) -> None:
    there = numbers(make_queue(), 6)

    def read(block: ci.Block) -> None:
        block.data[...] = there.request().result().sum()

    np.testing.assert_array_equal(in_time(lambda: numbers(None, 2, read)[...]), [15, 15])
