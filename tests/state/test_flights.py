"""Who waits for whom: circles are found before anybody waits, and nothing else is called one."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cellimg_dask.state.cache import CellCache, Shelf
from cellimg_dask.state.flights import CircularWaitError, Flight, current_flight, inside

PATIENCE_S = 30


class Owner:
    """What a shelf belongs to."""


@pytest.fixture
def owner() -> Owner:
    return Owner()


def new_shelf(owner: Owner) -> Shelf:
    return CellCache(1 << 20).shelf(owner)


def ring(shelf: Shelf, pool: ThreadPoolExecutor, size: int) -> list[BaseException | None]:
    """Let ``size`` threads each load one cell that needs the next one, all begun at once."""
    all_began = threading.Barrier(size)

    def load(index: int) -> np.ndarray:
        all_began.wait(PATIENCE_S)
        return shelf.get((index + 1) % size, load)

    futures = [pool.submit(shelf.get, index, load) for index in range(size)]
    return [future.exception(PATIENCE_S) for future in futures]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_threads_that_need_each_other_in_a_ring_all_get_an_error(owner, pool, size):
    shelf = new_shelf(owner)
    errors = ring(shelf, pool, size)
    assert {type(error) for error in errors} == {CircularWaitError}
    assert shelf.held() == []
    assert shelf.get(0, lambda _: np.zeros(1)).size == 1, "the next request tries again"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_ring_in_one_thread_is_an_error(owner, size):
    shelf = new_shelf(owner)

    def load(index: int) -> np.ndarray:
        return shelf.get((index + 1) % size, load)

    with pytest.raises(CircularWaitError):
        shelf.get(0, load)
    assert current_flight() is None


def test_a_ring_across_shelves_and_caches_is_an_error(owner, pool):
    first, second = new_shelf(owner), new_shelf(owner)
    both = threading.Barrier(2)

    def one(index: int) -> np.ndarray:
        both.wait(PATIENCE_S)
        return second.get(0, two)

    def two(index: int) -> np.ndarray:
        both.wait(PATIENCE_S)
        return first.get(0, one)

    futures = [pool.submit(first.get, 0, one), pool.submit(second.get, 0, two)]
    errors = [future.exception(PATIENCE_S) for future in futures]
    assert {type(error) for error in errors} == {CircularWaitError}


def test_the_same_index_of_two_shelves_is_no_ring(owner):
    first, second = new_shelf(owner), new_shelf(owner)
    value = first.get(0, lambda index: second.get(index, lambda _: np.ones(1)) + 1)
    assert value[0] == 2


def test_a_helper_that_waits_for_what_waits_for_the_whole_is_an_error(owner, pool):
    """A thread that helps computing a cell counts as a part of that cell."""
    shelf = new_shelf(owner)
    other_waits = threading.Event()
    outer_began = threading.Event()
    outcome: list[BaseException] = []

    def outer(index: int) -> np.ndarray:
        flight = current_flight()
        outer_began.set()
        assert other_waits.wait(PATIENCE_S)

        def help_out() -> None:
            with inside(flight):
                try:
                    shelf.get(1, needs_outer)
                except CircularWaitError as error:
                    outcome.append(error)

        pool.submit(help_out).result(PATIENCE_S)
        return np.zeros(1)

    def needs_outer(index: int) -> np.ndarray:
        other_waits.set()
        return shelf.get(0, outer)

    first = pool.submit(shelf.get, 0, outer)
    assert outer_began.wait(PATIENCE_S)
    second = pool.submit(shelf.get, 1, needs_outer)
    # Whichever comes to wait second finds the ring, and the other then ends.
    ends = [first.exception(PATIENCE_S), second.exception(PATIENCE_S), *outcome]
    found = [end for end in ends if end is not None]
    assert found
    assert {type(end) for end in found} == {CircularWaitError}


@pytest.mark.parametrize("seed", range(5))
def test_no_ring_is_seen_where_there_is_none(owner, pool, seed):
    """Random graphs without rings, asked for by many threads: one load per cell, no errors."""
    random_ = random.Random(seed)
    count = 80
    needs = [
        random_.sample(range(index), min(index, random_.randrange(4))) for index in range(count)
    ]
    expected = [1] * count
    for index in range(count):
        expected[index] += sum(expected[below] for below in needs[index])
    shelf = new_shelf(owner)
    loads: list[int] = []

    def load(index: int) -> np.ndarray:
        loads.append(index)
        return np.array([1 + sum(int(shelf.get(below, load)[0]) for below in needs[index])])

    at_once = threading.Barrier(8)

    def ask(number: int) -> list[int]:
        order = list(range(count))
        random.Random(number).shuffle(order)
        at_once.wait(PATIENCE_S)
        return [index for index in order if shelf.get(index, load)[0] != expected[index]]

    assert list(pool.map(ask, range(8))) == [[]] * 8
    assert sorted(loads) == list(range(count))


def test_helpers_of_one_cell_may_share_what_they_begin(owner, pool):
    """Two threads inside one flight, one of which waits for what the other began."""
    shelf = new_shelf(owner)
    began, go_on = threading.Event(), threading.Event()

    def inner(index: int) -> np.ndarray:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return np.array([5])

    def outer(index: int) -> np.ndarray:
        flight = current_flight()

        def part() -> np.ndarray:
            with inside(flight):
                return shelf.get(1, inner)

        first = pool.submit(part)
        assert began.wait(PATIENCE_S)
        second = pool.submit(part)
        pool.submit(go_on.set)
        return first.result(PATIENCE_S) + second.result(PATIENCE_S)

    assert shelf.get(0, outer)[0] == 10
    assert shelf.stats().loads == 2


def test_the_current_flight_is_restored_after_success_and_error(owner):
    assert current_flight() is None
    flight = Flight(owner, 1)
    with inside(flight):
        assert current_flight() is flight
        inner = Flight(owner, 2)
        assert inner.parent is flight

        def fail() -> None:
            with inside(inner):
                assert current_flight() is inner
                raise LookupError

        with pytest.raises(LookupError):
            fail()
        assert current_flight() is flight
        with inside(None):
            assert current_flight() is None
    assert current_flight() is None
    assert Flight(owner, 3).parent is None


def test_another_thread_has_no_current_flight(owner, pool):
    with inside(Flight(owner, 1)):
        assert pool.submit(current_flight).result(PATIENCE_S) is None


def test_a_flight_knows_whether_it_began_itself_further_up(owner):
    other = Owner()
    top = Flight(owner, 1)
    with inside(top):
        assert Flight(owner, 1).begun_by_itself()
        assert not Flight(owner, 2).begun_by_itself()
        assert not Flight(other, 1).begun_by_itself()
        with inside(Flight(other, 2)):
            assert Flight(owner, 1).begun_by_itself()
    assert not Flight(owner, 1).begun_by_itself()


def test_waiting_for_a_flight_that_has_landed_ends_at_once(owner):
    flight = Flight(owner, 1)
    done = flight.prepare_join()
    assert flight.prepare_join() is done
    flight.land()
    flight.join(done)
    with inside(Flight(owner, 2)):
        flight.join(done)
    assert not flight._waiting, "nobody is left on the list"
