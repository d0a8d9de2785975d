"""The cache against a plain model: what a cell's value must be, and when it must not be loaded."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from cellimg_dask.state.cache import CellCache, Shelf

_CELLS = 12
_cells = st.integers(0, _CELLS - 1)
_bounds = st.sampled_from([0, 1, 7, 40, 150, 400, 10_000])


class Owner:
    """What a shelf belongs to."""


class Model:
    """What is known of one shelf: the version of each cell, and the arrays that live."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.versions = [0] * _CELLS
        self.given: dict[int, weakref.ref[np.ndarray[Any, Any]]] = {}
        """Per cell the array given out last; dropped when the cell is invalidated."""
        self.loads = 0
        self.hits = 0

    def nbytes(self, index: int) -> int:
        return 1 + (index * 37 + self.number * 11) % 90

    def value(self, index: int) -> np.ndarray[Any, Any]:
        """Return the one right value of a cell now."""
        content = (self.number * 83 + index * 7 + self.versions[index] * 29) % 251
        return np.full(self.nbytes(index), content, np.uint8)

    def living(self, index: int) -> np.ndarray[Any, Any] | None:
        """Return the array of a cell if anybody, the cache included, still holds it."""
        reference = self.given.get(index)
        return None if reference is None else reference()

    def change(self, indices: set[int] | None) -> None:
        for index in range(_CELLS) if indices is None else indices:
            self.versions[index] += 1
            self.given.pop(index, None)


class CacheMachine(RuleBasedStateMachine):
    """Random use of several shelves of one cache."""

    shelves = Bundle("shelves")

    @initialize(max_bytes=_bounds)
    def start(self, max_bytes: int) -> None:
        self.clock = 0.0
        self.cache = CellCache(max_bytes, timer=lambda: self.clock)
        self.owners: dict[int, Owner] = {}
        self.models: dict[int, Model] = {}
        self.known: dict[int, Shelf] = {}
        self.kept: list[np.ndarray[Any, Any]] = []
        """Arrays that the user still holds."""
        self.past_loads = self.past_hits = 0

    @rule(target=shelves)
    def add_shelf(self) -> int:
        number = len(self.models) + 1
        self.models[number] = Model(number)
        self.owners[number] = Owner()
        self.known[number] = self.cache.shelf(self.owners[number])
        return number

    @rule(number=shelves, index=_cells, keep=st.booleans(), seconds=st.floats(0, 5))
    def get(self, number: int, index: int, keep: bool, seconds: float) -> None:
        if number not in self.owners:
            return
        model, shelf = self.models[number], self.known[number]
        loaded = []

        def load(wanted: int) -> np.ndarray[Any, Any]:
            loaded.append(wanted)
            self.clock += seconds
            return model.value(wanted)

        before = model.living(index)
        evictions, free = self._evictions(), self.cache.max_bytes - self.cache.bytes
        value = shelf.get(index, load)

        np.testing.assert_array_equal(value, model.value(index))
        assert not value.flags.writeable
        if before is None:
            assert loaded == [index]
            model.loads += 1
        else:
            assert value is before
            assert not loaded
            model.hits += 1
        if value.nbytes <= free:
            assert self._evictions() == evictions, "evicted though there was room"
        if value.nbytes <= self.cache.max_bytes:
            assert index in shelf.held(), "what was asked for last is held if it fits at all"
        model.given[index] = weakref.ref(value)
        if keep:
            self.kept.append(value)

    @rule(number=shelves, index=_cells, broken=st.sampled_from([LookupError, KeyboardInterrupt]))
    def get_by_a_broken_load(self, number: int, index: int, broken: type[BaseException]) -> None:
        if number not in self.owners or self.models[number].living(index) is not None:
            return

        def load(wanted: int) -> np.ndarray[Any, Any]:
            raise broken

        try:
            self.known[number].get(index, load)
        except broken:
            pass
        else:
            raise AssertionError("the error was swallowed")
        assert self.known[number].peek(index) is None

    @rule(number=shelves, index=_cells)
    def get_while_it_is_invalidated(self, number: int, index: int) -> None:
        if number not in self.owners or self.models[number].living(index) is not None:
            return
        model, shelf = self.models[number], self.known[number]
        old = model.value(index)

        def load(wanted: int) -> np.ndarray[Any, Any]:
            value = model.value(wanted)
            model.change({wanted})
            shelf.invalidate({wanted})
            return value

        np.testing.assert_array_equal(shelf.get(index, load), old)
        assert shelf.peek(index) is None
        model.loads += 1

    @rule(number=shelves, index=_cells)
    def peek(self, number: int, index: int) -> None:
        if number in self.owners:
            assert self.known[number].peek(index) is self.models[number].living(index)

    @rule(number=shelves, indices=st.lists(_cells, max_size=6))
    def get_many(self, number: int, indices: list[int]) -> None:
        if number not in self.owners:
            return
        model, shelf = self.models[number], self.known[number]
        held = set(shelf.held())
        values = shelf.get_many(indices)
        assert len(values) == len(indices)
        for index, value in zip(indices, values, strict=True):
            assert (value is not None) == (index in held)
            if value is not None:
                assert value is model.living(index)
                model.hits += 1

    @rule(number=shelves, indices=st.none() | st.sets(_cells))
    def invalidate(self, number: int, indices: set[int] | None) -> None:
        if number in self.owners:
            self.models[number].change(indices)
            self.known[number].invalidate(indices)

    @rule(data=st.data())
    def drop_references(self, data: st.DataObject) -> None:
        if self.kept:
            count = data.draw(st.integers(1, len(self.kept)))
            del self.kept[:count]

    @rule(max_bytes=_bounds)
    def resize(self, max_bytes: int) -> None:
        self.cache.resize(max_bytes)
        assert self.cache.max_bytes == max_bytes

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.bytes == 0
        for number in self.owners:
            self.models[number].change(None)

    @rule(number=shelves, inside=st.booleans())
    def lose_owner(self, number: int, inside: bool) -> None:
        if number not in self.owners:
            return
        before = self.cache.bytes - self.known[number].stats().bytes
        if inside:
            with self.cache._lock:
                del self.owners[number]
            self.cache.stats()  # Finishes what could not be done under the lock.
        else:
            del self.owners[number]
        assert self.cache.bytes == before
        model = self.models[number]
        self.past_loads, self.past_hits = (
            self.past_loads + model.loads,
            self.past_hits + model.hits,
        )
        del self.known[number]

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        counted = 0
        for number, shelf in self.known.items():
            model = self.models[number]
            for index in shelf.held():
                value = shelf.peek(index)
                assert value is not None
                np.testing.assert_array_equal(value, model.value(index))
                counted += value.nbytes
            stats = shelf.stats()
            assert (stats.loads, stats.hits) == (model.loads, model.hits)
            for index in range(_CELLS):
                # Whatever lives is found, held or not; what does not is not.
                assert shelf.peek(index) is model.living(index)
        assert counted == self.cache.bytes <= self.cache.max_bytes
        total = self.cache.stats()
        assert total.bytes == counted
        assert total.loads == self.past_loads + sum(self.models[n].loads for n in self.known)
        assert total.hits == self.past_hits + sum(self.models[n].hits for n in self.known)

    def _evictions(self) -> int:
        return self.cache.stats().evictions

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.owners.clear()
        gc.collect(0)
        assert self.cache.bytes == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=60)
