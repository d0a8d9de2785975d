"""The cell cache: once-only, bounded, exact in its books, and safe to invalidate at any time."""

from __future__ import annotations

import gc
import os
import signal
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.blocks.errors import CellError
from cellimg_dask.state import flights
from cellimg_dask.state.cache import CellCache, Shelf, own
from cellimg_dask.state.flights import Flight

PATIENCE_S = 30
"""How long a test waits for an event that comes at once unless something is broken."""


class Owner:
    """What a shelf belongs to."""


class Clock:
    """A clock that stands still unless a load says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def load_of(nbytes: int, clock: Clock | None = None, seconds: float = 0.0) -> Callable[..., Any]:
    """Return a loader of arrays of that size that takes so long by ``clock``."""

    def load(index: int) -> np.ndarray:
        if clock is not None:
            clock.now += seconds
        return np.full(nbytes, index, np.uint8)

    return load


def never(index: int) -> np.ndarray:
    raise AssertionError(f"cell {index} was loaded although it was held")


def recount(*shelves: Shelf) -> int:
    """Return the bytes of the entries, counted from the arrays themselves."""
    total = 0
    for shelf in shelves:
        for index in shelf.held():
            value = shelf.peek(index)
            assert value is not None
            total += value.nbytes
    return total


@pytest.fixture
def owner() -> Owner:
    return Owner()


class Gate:
    """A loader that says when it began and goes on when it is told to."""

    def __init__(self, make: Callable[[int], np.ndarray]) -> None:
        self.make = make
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.calls = 0

    def __call__(self, index: int) -> np.ndarray:
        self.calls += 1
        value = self.make(index)
        self.began.set()
        assert self.go_on.wait(PATIENCE_S)
        return value


# ------------------------------------------------------------------------------- once only


def test_64_threads_on_one_key_cause_one_load_and_get_one_object(owner, waiting, pool):
    cache = CellCache(1 << 20)
    shelf = cache.shelf(owner)
    gate = Gate(load_of(100))
    at_once = threading.Barrier(64)

    def ask() -> np.ndarray:
        at_once.wait(PATIENCE_S)
        return shelf.get(7, gate)

    futures = [pool.submit(ask) for _ in range(64)]
    waiting(63)
    gate.go_on.set()
    values = [future.result(PATIENCE_S) for future in futures]

    assert gate.calls == 1
    assert {id(value) for value in values} == {id(values[0])}
    np.testing.assert_array_equal(values[0], np.full(100, 7, np.uint8))
    stats = shelf.stats()
    assert (stats.loads, stats.misses, stats.joins, stats.hits) == (1, 1, 63, 0)


def test_different_keys_load_at_the_same_time(owner, pool):
    shelf = CellCache(1 << 20).shelf(owner)
    together = threading.Barrier(4)

    def load(index: int) -> np.ndarray:
        together.wait(PATIENCE_S)  # Broken unless four loads run at once.
        return np.array([index])

    values = list(pool.map(lambda index: shelf.get(index, load), range(4)))
    assert [int(value[0]) for value in values] == [0, 1, 2, 3]


def test_no_lock_is_held_while_something_is_loaded(owner):
    cache = CellCache(1 << 20)
    shelf = cache.shelf(owner)

    def load(index: int) -> np.ndarray:
        if index:
            # Everything else works meanwhile, in this thread or any other.
            shelf.get(index - 1, load)
            cache.stats(), shelf.peek(9), shelf.get_many([9]), shelf.held()
            cache.resize(1 << 19)
            cache.shelf(owner).invalidate(None)
        return np.array([index])

    assert shelf.get(3, load)[0] == 3
    assert sorted(shelf.held()) == [0, 1, 2, 3]


def test_the_array_that_comes_back_is_read_only_and_owns_its_memory(owner):
    shelf = CellCache(1 << 20).shelf(owner)
    large = np.arange(1000, dtype=np.uint8)
    value = shelf.get(0, lambda _: large[10:20])
    assert not value.flags.writeable
    assert value.flags.owndata
    assert value.base is None
    assert not np.shares_memory(value, large)
    assert shelf.stats().bytes == value.nbytes == 10
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 1


def test_own_copies_a_view_and_nothing_else():
    array = np.arange(4)
    assert own(array) is array
    assert own(array.reshape(2, 2)) is not array


# ---------------------------------------------------------------------------------- errors


def block_error(index: int) -> np.ndarray:
    try:
        raise ZeroDivisionError("the cause")
    except ZeroDivisionError as cause:
        raise ci.BlockError("f", (index,), ci.Roi((0,), (1,)), "broke") from cause


def plain_error(index: int) -> np.ndarray:
    raise LookupError("plain")


@pytest.mark.parametrize(
    ("load", "kind"), [(block_error, ci.BlockError), (plain_error, LookupError)]
)
def test_a_raising_loader_reaches_every_waiter_and_is_not_kept(owner, waiting, pool, load, kind):
    cache = CellCache(1 << 20)
    shelf = cache.shelf(owner)
    go_on = threading.Event()
    calls = []

    def slow(index: int) -> np.ndarray:
        calls.append(index)
        assert go_on.wait(PATIENCE_S)
        return load(index)

    futures = [pool.submit(shelf.get, 5, slow) for _ in range(16)]
    waiting(15)
    go_on.set()
    errors = [future.exception(PATIENCE_S) for future in futures]

    assert calls == [5]
    assert {type(error) for error in errors} == {kind}
    if issubclass(kind, CellError):
        # Each thread raises an object of its own, so that tracebacks do not mix.
        assert len({id(error) for error in errors}) == 16
        assert {type(error.__cause__) for error in errors} == {ZeroDivisionError}
        assert {error.args for error in errors} == {errors[0].args}
    assert shelf.peek(5) is None
    assert cache.bytes == 0
    stats = shelf.stats()
    assert (stats.errors, stats.loads, stats.misses, stats.joins) == (1, 0, 1, 15)

    assert shelf.get(5, load_of(3))[0] == 5, "the next request tries again"
    assert shelf.stats().loads == 1


def test_an_error_of_one_cell_leaves_the_others_alone(owner):
    shelf = CellCache(1 << 20).shelf(owner)
    first = shelf.get(1, load_of(3))
    with pytest.raises(LookupError):
        shelf.get(2, plain_error)
    assert shelf.get(1, never) is first


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupted_load_is_taken_up_by_one_of_those_who_wait(owner, waiting, pool, interrupt):
    shelf = CellCache(1 << 20).shelf(owner)
    go_on = threading.Event()

    def interrupted(index: int) -> np.ndarray:
        assert go_on.wait(PATIENCE_S)
        raise interrupt

    began = threading.Event()

    def first() -> str:
        def load(index: int) -> np.ndarray:
            began.set()
            return interrupted(index)

        try:
            shelf.get(1, load)
        except interrupt:
            return "interrupted"
        return "no"

    calls = []

    def load_again(index: int) -> np.ndarray:
        calls.append(index)
        return np.array([42])

    loser = pool.submit(first)
    assert began.wait(PATIENCE_S)
    waiters = [pool.submit(shelf.get, 1, load_again) for _ in range(8)]
    waiting(8)
    go_on.set()
    assert loser.result(PATIENCE_S) == "interrupted"
    values = [waiter.result(PATIENCE_S) for waiter in waiters]
    assert calls == [1]
    assert {id(value) for value in values} == {id(shelf.peek(1))}
    assert shelf.stats().errors == 0


def test_an_interrupt_after_the_load_leaves_nobody_waiting(owner, waiting, pool):
    """Ctrl-C may come at any moment; here it comes when the load has just ended."""
    times = iter([0.0, KeyboardInterrupt])

    def timer() -> float:
        moment = next(times, 1.0)
        if not isinstance(moment, float):
            raise moment
        return moment

    shelf = CellCache(1 << 20, timer=timer).shelf(owner)
    gate = Gate(load_of(3))
    interrupted = pool.submit(shelf.get, 0, gate)
    assert gate.began.wait(PATIENCE_S)
    thread = threading.Thread(target=shelf.get, args=(0, load_of(4)), daemon=True)
    thread.start()
    waiting(1)
    gate.go_on.set()
    assert isinstance(interrupted.exception(PATIENCE_S), KeyboardInterrupt)
    thread.join(5)
    assert not thread.is_alive(), "who waited still waits"
    assert shelf.peek(0) is not None


def test_a_cell_that_needs_itself_is_an_error_and_not_a_deadlock(owner):
    shelf = CellCache(1 << 20).shelf(owner)
    with pytest.raises(flights.CircularWaitError):
        shelf.get(0, lambda index: shelf.get(index, never))
    assert shelf.get(0, load_of(1))[0] == 0


# ------------------------------------------------------------------------------ the budget

_THREADS, _OPERATIONS = 8, 125_000
_KEYS, _LARGEST = 512, 40_000


def test_bytes_never_exceed_the_bound_over_a_million_random_operations():
    cache = CellCache(_LARGEST)
    owners = [Owner() for _ in range(4)]
    shelves = [cache.shelf(owner) for owner in owners]
    # One array in some hundreds is larger than the smallest bound.
    sizes = np.random.default_rng(5).integers(1, 400, (4, _KEYS))
    sizes[:, ::200] = _LARGEST + 1
    sizes = sizes.tolist()
    problems: list[str] = []

    def check() -> None:
        # Under the lock, because a resize changes two numbers.
        with cache._lock:
            held, bound = cache.bytes, cache.max_bytes
        if not 0 <= held <= bound:
            problems.append(f"{held} of {bound} bytes")

    def load(size: int) -> Callable[[int], np.ndarray]:
        return lambda index: np.empty(size, np.uint8)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        kinds = rng.integers(0, 1000, _OPERATIONS).tolist()
        keys = (rng.beta(0.6, 1.2, _OPERATIONS) * _KEYS).astype(int).tolist()
        for step, (kind, key) in enumerate(zip(kinds, keys, strict=True)):
            which = (kind + key) & 3
            shelf, size = shelves[which], sizes[which]
            if kind < 560:
                value = shelf.get(key, loads[which][key])
                if value.nbytes != size[key]:
                    problems.append(f"a cell of {value.nbytes} bytes for one of {size[key]}")
            elif kind < 880:
                shelf.peek(key)
            elif kind < 960:
                shelf.get_many((key, key >> 1, key >> 2))
            elif kind < 997:
                shelf.invalidate({key, (key * 7) % _KEYS})
            elif kind < 998:
                shelf.invalidate(None)
            else:
                cache.resize(_LARGEST // (1 + step % 3))
            if cache.bytes > _LARGEST:
                problems.append(f"{cache.bytes} bytes at once")
            if step & 7 == 0:
                check()

    loads = [[load(size) for size in row] for row in sizes]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not problems, problems[:5]
    assert cache.bytes == recount(*shelves) == sum(shelf.stats().bytes for shelf in shelves)
    assert cache.bytes == cache.stats().bytes <= cache.max_bytes
    total = cache.stats()
    assert total.loads == total.misses, "whatever was missed was loaded, once"
    assert total.errors == 0
    assert min(total.hits, total.loads, total.evictions) > 1000, "the test did exercise all"
    for shelf in shelves:
        assert not shelf._flights, "no load is thought to be under way for ever"
        shelf.invalidate(None)
    assert cache.bytes == 0


def test_a_cache_of_no_bytes_keeps_nothing_but_loads_once(owner, waiting, pool):
    cache = CellCache(0)
    shelf = cache.shelf(owner)
    gate = Gate(load_of(5))
    futures = [pool.submit(shelf.get, 0, gate) for _ in range(4)]
    waiting(3)
    gate.go_on.set()
    assert len({id(future.result(PATIENCE_S)) for future in futures}) == 1
    assert gate.calls == 1
    assert cache.bytes == 0
    assert shelf.held() == []
    del futures
    gc.collect()
    assert shelf.peek(0) is None
    assert shelf.get(0, load_of(5)).nbytes == 5
    assert shelf.stats().loads == 2


def test_an_array_larger_than_the_bound_is_given_out_and_displaces_nothing(owner):
    cache = CellCache(100)
    shelf = cache.shelf(owner)
    for index in range(10):
        shelf.get(index, load_of(10))
    large = shelf.get(99, load_of(101))
    assert large.nbytes == 101
    assert sorted(shelf.held()) == list(range(10))
    assert shelf.stats().evictions == 0
    assert shelf.get(99, never) is large, "it is found as long as somebody holds it"
    assert cache.bytes == 100
    del large
    assert shelf.peek(99) is None


def test_an_array_of_just_the_bound_is_kept(owner):
    cache = CellCache(100)
    shelf = cache.shelf(owner)
    shelf.get(0, load_of(1))
    value = shelf.get(1, load_of(100))
    assert shelf.held() == [1]
    assert shelf.get(1, never) is value


def test_resize_evicts_at_once_and_growing_keeps_all(owner):
    clock = Clock()
    cache = CellCache(100, timer=clock)
    shelf = cache.shelf(owner)
    for index in range(10):
        shelf.get(index, load_of(10, clock, seconds=index + 1))
    cache.resize(35)
    assert cache.bytes == 30
    assert sorted(shelf.held()) == [7, 8, 9], "the three that cost most stay"
    assert shelf.stats().evictions == 7
    cache.resize(1000)
    assert cache.max_bytes == 1000
    assert sorted(shelf.held()) == [7, 8, 9]
    cache.resize(0)
    assert cache.bytes == 0


@pytest.mark.parametrize("bad", [-1, 1.5, True, None, "8"])
def test_bounds_that_are_no_counts_are_refused(bad):
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        CellCache(bad)
    cache = CellCache(8)
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        cache.resize(bad)
    assert cache.max_bytes == 8
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        ci.set_cache(bad)


def test_clear_forgets_every_shelf(owner):
    cache = CellCache(1000)
    shelves = [cache.shelf(owner) for _ in range(3)]
    for shelf in shelves:
        shelf.get(0, load_of(10))
    cache.clear()
    assert cache.bytes == 0
    assert all(shelf.peek(0) is None for shelf in shelves)
    assert cache.stats().loads == 3, "counters stay"


def test_clear_during_a_load_publishes_nothing(owner, pool):
    cache = CellCache(1000)
    shelf = cache.shelf(owner)
    gate = Gate(load_of(10))
    future = pool.submit(shelf.get, 0, gate)
    assert gate.began.wait(PATIENCE_S)
    cache.clear()
    gate.go_on.set()
    assert future.result(PATIENCE_S).nbytes == 10
    assert shelf.held() == []
    assert cache.bytes == 0


def test_set_cache_changes_the_cache_that_all_images_share():
    cache = ci.get_cache()
    assert ci.set_cache(12345) is cache is ci.get_cache()
    assert cache.max_bytes == 12345


# -------------------------------------------------------------------------------- eviction


def test_eviction_is_greedy_dual_size(owner):
    """Priority is L + seconds / bytes, and L is that of the last entry evicted."""
    clock = Clock()
    cache = CellCache(100, timer=clock)
    shelf = cache.shelf(owner)
    shelf.get(0, load_of(50, clock, seconds=100.0))  # 2.0 per byte
    shelf.get(1, load_of(25, clock, seconds=75.0))  # 3.0
    shelf.get(2, load_of(25, clock, seconds=25.0))  # 1.0
    shelf.get(3, load_of(20, clock, seconds=10.0))  # 0.5: evicts 2, L = 1, so 1.5
    assert sorted(shelf.held()) == [0, 1, 3]
    # 3 has the lowest priority, though 0 is older and as large as all others together.
    shelf.get(4, load_of(10, clock, seconds=5.0))  # evicts 3, L = 1.5, so 2.0
    assert sorted(shelf.held()) == [0, 1, 4]
    # A hit renews the priority: 0 becomes 1.5 + 2.0 = 3.5, above 1 (3.0) and 4 (2.0).
    shelf.get(0, never)
    shelf.get(5, load_of(20, clock, seconds=80.0))  # evicts 4, L = 2; then 5 is 6.0
    assert sorted(shelf.held()) == [0, 1, 5]
    shelf.get(6, load_of(20, clock, seconds=20.0))  # evicts 1 (3.0), L = 3, so 4.0
    assert sorted(shelf.held()) == [0, 5, 6]
    shelf.get(7, load_of(50, clock, seconds=50.0))  # evicts 0 (3.5), L = 3.5
    assert sorted(shelf.held()) == [5, 6, 7]
    assert shelf.stats().evictions == 5


def test_eviction_looks_at_all_shelves_of_a_cache(owner):
    clock = Clock()
    cache = CellCache(100, timer=clock)
    cheap, dear = cache.shelf(owner), cache.shelf(owner)
    for index in range(5):
        dear.get(index, load_of(10, clock, seconds=9.0))
        cheap.get(index, load_of(10, clock, seconds=1.0))
    for index in range(5, 8):
        dear.get(index, load_of(10, clock, seconds=9.0))
    assert sorted(dear.held()) == list(range(8))
    assert sorted(cheap.held()) == [3, 4], "of equals the oldest goes first"
    assert (cheap.stats().evictions, dear.stats().evictions) == (3, 0)


def test_a_whole_gathering_counts_as_a_use_of_each(owner):
    clock = Clock()
    cache = CellCache(30, timer=clock)
    shelf = cache.shelf(owner)
    for index in range(3):
        shelf.get(index, load_of(10, clock, seconds=10.0))  # all 1.0
    shelf.get(3, load_of(10, clock, seconds=10.0))  # evicts 0, L = 1, so 2.0
    shelf.get_many([1, 99])  # 1 becomes 2.0, 2 stays 1.0
    shelf.get(4, load_of(10, clock, seconds=10.0))
    assert sorted(shelf.held()) == [1, 3, 4]


def test_peek_counts_as_no_use(owner):
    clock = Clock()
    cache = CellCache(30, timer=clock)
    shelf = cache.shelf(owner)
    for index in range(4):
        shelf.get(index, load_of(10, clock, seconds=10.0))
    before = shelf.stats()
    assert shelf.peek(1) is not None
    assert shelf.stats() == before
    shelf.get(4, load_of(10, clock, seconds=10.0))
    assert sorted(shelf.held()) == [2, 3, 4]


def test_the_heap_does_not_grow_without_bound(owner):
    cache = CellCache(1000)
    shelf = cache.shelf(owner)
    for _ in range(200):
        for index in range(50):
            shelf.get(index, load_of(10))
        shelf.invalidate(set(range(50)))
    assert len(cache._heap) <= 200
    for round_ in range(2000):
        shelf.get(round_ % 150, load_of(10))
    assert len(cache._heap) <= 400


# --------------------------------------------------------------------------- weak identity


def test_an_evicted_array_that_is_still_referenced_is_found_again(owner):
    cache = CellCache(20, timer=Clock())
    shelf = cache.shelf(owner)
    first = shelf.get(0, load_of(10))
    for index in range(1, 5):
        shelf.get(index, load_of(10))
    assert 0 not in shelf.held()
    assert shelf.peek(0) is first
    hits = shelf.stats().hits
    assert shelf.get(0, never) is first
    assert shelf.stats().hits == hits + 1
    assert 0 in shelf.held(), "and it is held again"
    assert cache.bytes == recount(shelf) <= 20


def test_an_array_keeps_its_price_when_it_comes_back(owner):
    clock = Clock()
    cache = CellCache(20, timer=clock)
    shelf = cache.shelf(owner)
    kept = shelf.get(0, load_of(10, clock, seconds=50.0))
    shelf.get(1, load_of(10, clock, seconds=60.0))
    shelf.get(2, load_of(10, clock, seconds=40.0))  # evicts 0, L = 5, so 9.0
    assert sorted(shelf.held()) == [1, 2]
    assert shelf.get(0, never) is kept  # evicts 1, L = 6, so 6.0 + 5.0
    shelf.get(3, load_of(10, clock, seconds=1.0))  # evicts 2
    assert sorted(shelf.held()) == [0, 3]


def test_an_evicted_array_that_nobody_references_is_gone(owner):
    cache = CellCache(10, timer=Clock())
    shelf = cache.shelf(owner)
    alive = weakref.ref(shelf.get(0, load_of(10)))
    shelf.get(1, load_of(10))
    assert alive() is None
    assert shelf.peek(0) is None
    assert not shelf._living, "nothing is left of what died"
    assert shelf.get(0, load_of(10))[0] == 0
    assert shelf.stats().loads == 3


def test_invalidated_arrays_are_not_found_again_though_somebody_holds_them(owner):
    cache = CellCache(10)
    shelf = cache.shelf(owner)
    old = shelf.get(0, load_of(10))
    shelf.get(1, load_of(10))
    shelf.invalidate({0})
    assert shelf.peek(0) is None
    new = shelf.get(0, load_of(10))
    assert new is not old
    assert shelf.stats().loads == 3


# ------------------------------------------------------------------------------ invalidate


@pytest.mark.parametrize("which", [{3}, None, range(10)], ids=["set", "all", "range"])
@pytest.mark.parametrize("asked_meanwhile", [False, True])
def test_invalidate_during_a_load_never_publishes_old_data(
    owner, waiting, pool, which, asked_meanwhile
):
    cache = CellCache(1000)
    shelf = cache.shelf(owner)
    version = [1]
    gate = Gate(lambda _: np.array([version[0]]))
    first = pool.submit(shelf.get, 3, gate)
    assert gate.began.wait(PATIENCE_S)
    second = pool.submit(shelf.get, 3, never)
    waiting(1)

    version[0] = 2
    shelf.invalidate(which)
    if asked_meanwhile:
        # Who asks after the change does not join the old load, and gets the new data at once.
        assert shelf.get(3, lambda _: np.array([version[0]]))[0] == 2
    gate.go_on.set()
    assert first.result(PATIENCE_S)[0] == 1, "who asked before the change gets an answer"
    assert second.result(PATIENCE_S)[0] == 1
    held = shelf.peek(3)
    if asked_meanwhile:
        assert held is not None
        assert held[0] == 2
    else:
        assert held is None
    assert shelf.get(3, lambda _: np.array([version[0]]))[0] == 2
    assert cache.bytes == recount(shelf)


def test_an_old_load_that_fails_after_invalidate_leaves_the_new_one_alone(owner, waiting, pool):
    shelf = CellCache(1000).shelf(owner)
    old, new = Gate(load_of(1)), Gate(load_of(2))

    def fail(index: int) -> np.ndarray:
        old(index)
        raise LookupError("old")

    first = pool.submit(shelf.get, 0, fail)
    assert old.began.wait(PATIENCE_S)
    shelf.invalidate({0})
    second = pool.submit(shelf.get, 0, new)
    assert new.began.wait(PATIENCE_S)
    old.go_on.set()
    assert isinstance(first.exception(PATIENCE_S), LookupError)
    third = pool.submit(shelf.get, 0, never)
    waiting(1)
    new.go_on.set()
    assert second.result(PATIENCE_S) is third.result(PATIENCE_S) is shelf.peek(0)


def test_invalidate_of_other_cells_lets_a_load_be_published(owner, pool):
    shelf = CellCache(1000).shelf(owner)
    gate = Gate(load_of(1))
    future = pool.submit(shelf.get, 3, gate)
    assert gate.began.wait(PATIENCE_S)
    shelf.invalidate({2, 4})
    gate.go_on.set()
    assert future.result(PATIENCE_S) is shelf.peek(3)


def test_invalidate_takes_whole_ranges_that_are_never_listed(owner):
    """What is iterated is the smaller of the two, so a set may stand for billions of cells."""

    class Endless:
        def __len__(self) -> int:
            return 8 * 10**9

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("listed")

        def __contains__(self, index: object) -> bool:
            return index != 1

    shelf = CellCache(1000).shelf(owner)
    for index in range(4):
        shelf.get(index, load_of(1))
    shelf.invalidate(Endless())  # type: ignore[arg-type]
    assert shelf.held() == [1]


def test_forgetting_few_costs_nothing_per_cell_held(owner):
    """A brush stroke in a viewer forgets a few cells of very many, with the lock held."""
    shelf = CellCache(1 << 22).shelf(owner)
    for index in range(20_000):
        shelf.get(index, lambda _: np.zeros(1))
    shelf.invalidate({0, 99_999})
    tracemalloc.start()
    try:
        shelf.invalidate({5, 99_999})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert shelf.peek(5) is None
    assert len(shelf.held()) == 19_998
    assert peak < 50_000, "it has listed what is held"


# ------------------------------------------------------------------------- owners that go


def test_the_shelf_of_a_collected_owner_gives_its_bytes_back():
    cache = CellCache(1000)
    staying, going = Owner(), Owner()
    kept, lost = cache.shelf(staying), cache.shelf(going)
    kept.get(0, load_of(10))
    lost.get(0, load_of(20))
    assert cache.bytes == 30
    del going
    gc.collect()
    assert cache.bytes == 10 == recount(kept)
    assert cache.stats().loads == 2, "the sum still counts what is gone"
    assert cache.stats().bytes == 10


def test_an_owner_in_a_loop_gives_its_bytes_back_when_the_collector_comes():
    cache = CellCache(1000)
    owner = Owner()
    owner.myself = owner  # type: ignore[attr-defined]
    cache.shelf(owner).get(0, load_of(20))
    del owner
    gc.collect()
    assert cache.bytes == 0


def test_the_collector_may_run_inside_a_locked_section():
    cache = CellCache(1000)
    owner = Owner()
    owner.myself = owner  # type: ignore[attr-defined]
    cache.shelf(owner).get(0, load_of(20))
    other = Owner()
    shelf = cache.shelf(other)
    gc.disable()
    try:
        del owner
        with cache._lock:
            gc.collect()  # A finaliser that waited for the lock would hang here.
    finally:
        gc.enable()
    # Whoever needs room next finishes the work.
    shelf.get(0, load_of(5))
    assert cache.bytes == 5 == recount(shelf)
    assert cache.stats().loads == 2


def test_room_is_made_from_departed_shelves_before_anything_is_evicted():
    cache = CellCache(30)
    owner, other = Owner(), Owner()
    cache.shelf(owner).get(0, load_of(20))
    shelf = cache.shelf(other)
    shelf.get(0, load_of(10))
    with cache._lock:
        del owner
    shelf.get(1, load_of(20))
    assert sorted(shelf.held()) == [0, 1]
    assert shelf.stats().evictions == 0


def test_a_load_that_ends_after_its_owner_has_gone_is_not_kept(pool):
    cache = CellCache(1000)
    owner = Owner()
    shelf = cache.shelf(owner)
    gate = Gate(load_of(20))
    future = pool.submit(shelf.get, 0, gate)
    assert gate.began.wait(PATIENCE_S)
    del owner
    gc.collect()
    gate.go_on.set()
    assert future.result(PATIENCE_S).nbytes == 20
    # Nobody could ever ask for it again, and no shelf of the cache would count it.
    assert cache.bytes == 0


def test_images_that_go_give_their_cells_back():
    cache = CellCache(1 << 20)
    img = ci.map_cells(np.negative, np.arange(64), cell_shape=8, cache=cache)
    img[:]
    assert cache.bytes == 64 * 8
    assert cache.bytes == img.stats().bytes
    del img
    gc.collect()
    assert cache.bytes == 0


# ------------------------------------------------------------------------------- the books


def test_stats_count_each_thing_once(owner, waiting, pool):
    clock = Clock()
    cache = CellCache(30, timer=clock)
    shelf = cache.shelf(owner)
    shelf.get(0, load_of(10, clock, seconds=2.0))  # miss, load
    shelf.get(0, never)  # hit
    shelf.get_many([0, 1, 2])  # one hit
    with pytest.raises(LookupError):
        shelf.get(1, plain_error)  # miss, error
    gate = Gate(load_of(15))
    futures = [pool.submit(shelf.get, 2, gate) for _ in range(3)]  # miss, load, two joins
    waiting(2)
    gate.go_on.set()
    for future in futures:
        future.result(PATIENCE_S)
    shelf.get(3, load_of(10, clock, seconds=0.5))  # miss, load, evicts 2
    assert shelf.stats() == ci.CacheStats(
        hits=2, misses=4, joins=2, loads=3, load_seconds=2.5, evictions=1, bytes=20, errors=1
    )
    assert cache.stats() == shelf.stats()
    shelf.stats().hits = 99
    assert shelf.stats().hits == 2, "a copy"


def test_loads_past_the_cache_are_counted_too(owner):
    shelf = CellCache(10).shelf(owner)
    shelf.record(1.5)
    shelf.record(9.0, failed=True)
    assert shelf.stats() == ci.CacheStats(misses=2, loads=1, load_seconds=1.5, errors=1)


def test_stats_add_up():
    one = ci.CacheStats(1, 2, 3, 4, 5.5, 6, 7, 8)
    assert one + one == ci.CacheStats(2, 4, 6, 8, 11.0, 12, 14, 16)


# ---------------------------------------------------------------------------- other places


def in_a_fork(work: Callable[[], bool]) -> None:
    """Run ``work`` in a forked child; fail if it says False, raises, or hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # Ends a child that hangs.
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


forking = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # Python 3.12 and later warn of what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


class Holder:
    """A thread that holds a lock while the test forks."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._held, self._release = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def _hold(self) -> None:
        with self._lock:
            self._held.set()
            self._release.wait(PATIENCE_S)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._held.wait(PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        self._release.set()
        self._thread.join()


class TestFork:
    pytestmark = forking

    def test_a_child_works_though_the_lock_was_held(self, owner):
        cache = CellCache(100)
        shelf = cache.shelf(owner)
        shelf.get(0, load_of(10))
        with Holder(cache._lock):
            in_a_fork(
                lambda: (
                    cache.bytes == 0
                    and shelf.get(0, load_of(20)).nbytes == 20
                    and cache.bytes == 20
                    and cache.stats().bytes == 20
                )
            )
        assert shelf.get(0, never).nbytes == 10

    def test_a_child_does_not_wait_for_loads_of_the_parent(self, owner, pool):
        shelf = CellCache(100).shelf(owner)
        gate = Gate(load_of(10))
        future = pool.submit(shelf.get, 0, gate)
        assert gate.began.wait(PATIENCE_S)
        in_a_fork(lambda: shelf.get(0, load_of(20)).nbytes == 20)
        gate.go_on.set()
        assert future.result(PATIENCE_S).nbytes == 10

    def test_a_child_has_the_shared_cache_though_its_lock_was_held(self):
        from cellimg_dask.state import cache as module

        bound = ci.get_cache().max_bytes
        with Holder(module._shared_lock):
            in_a_fork(lambda: ci.get_cache().max_bytes == bound)

    def test_a_child_can_wait_inside_a_load_though_another_thread_was_about_to(
        self, owner, monkeypatch
    ):
        shelf = CellCache(100).shelf(owner)
        gate = Gate(load_of(1))
        join = Flight.join

        def let_go(flight: Flight, done: threading.Event) -> None:
            gate.go_on.set()
            join(flight, done)

        monkeypatch.setattr(Flight, "join", let_go)

        def nested_join() -> bool:
            thread = threading.Thread(target=shelf.get, args=(1, gate), daemon=True)
            thread.start()
            gate.began.wait(PATIENCE_S)
            return shelf.get(0, lambda _: shelf.get(1, never)).nbytes == 1

        with Holder(flights._joins):
            in_a_fork(nested_join)

    def test_a_child_reads_an_image_that_its_parent_has_read(self):
        image = np.arange(400).reshape(20, 20)
        img = ci.map_cells(np.negative, image, halo=1, cell_shape=3)
        img[:10]
        with Holder(ci.get_cache()._lock):
            in_a_fork(lambda: np.array_equal(img[:], -image))


def test_a_cache_is_pickled_as_its_bound(owner):
    import pickle

    cache = CellCache(123)
    cache.shelf(owner).get(0, load_of(10))
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.max_bytes, copy.bytes) == (123, 0)
    assert pickle.loads(pickle.dumps(ci.get_cache())) is ci.get_cache()
    assert repr(cache) == "CellCache(max_bytes=123, bytes=10)"
