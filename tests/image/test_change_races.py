"""Changes at the worst moment: while cells are computed, inside callbacks, inside other changes."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr
from support import PATIENCE_S, begin, in_time, until

import cellimg_dask as ci
from cellimg_dask.loading import node as node_module
from cellimg_dask.state.history import clock


class Doors:
    """A function of arrays that waits in front of chosen calls, and counts them."""

    def __init__(self) -> None:
        self.calls: list[np.ndarray] = []
        self.arrived = threading.Semaphore(0)
        self._open = threading.Event()
        self._open.set()

    def __call__(self, block: np.ndarray, *others: np.ndarray) -> np.ndarray:
        self.calls.append(block.copy())
        if not self._open.is_set():
            self.arrived.release()
            assert self._open.wait(PATIENCE_S)
        return sum(others, block + 1)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def wait_for(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=PATIENCE_S), "nobody came"


def plus_one(array: Any, f: Callable[..., Any] | None = None, **options: Any) -> ci.CellImg:
    f = f or (lambda a: a + 1)
    return ci.map_cells(f, array, **{"dtype": float, "cell_shape": 2, **options})


def held(image: ci.CellImg) -> set[int]:
    return {n for n in range(image.grid.num_cells) if image.peek(n) is not None}


def cells_of(log: list[ci.Change]) -> list[list[int]]:
    return [sorted(change.cells) for change in log]


@pytest.fixture
def source() -> ci.Source:
    return ci.Source(np.zeros(8), 2)


@pytest.fixture
def stored() -> ci.Source:
    """A source whose cells are twice as large as those of the images."""
    array = zarr.create_array(zarr.storage.MemoryStore(), shape=(8,), chunks=(4,), dtype=float)
    return ci.Source(array)


# ------------------------------------------------------- while something is being computed


def test_a_block_computed_during_an_edit_serves_those_who_wait_and_is_not_kept(
    source: ci.Source,
) -> None:
    doors = Doors()
    image = plus_one(source, doors, halo=1)
    image[...]
    image.invalidate()
    doors.calls.clear()
    doors.close()
    first = begin(lambda: image[0:2])
    doors.wait_for()
    second = begin(lambda: image[0:2])
    until(lambda: image.loader.shelf._flights[0]._done)
    source[1] = 5
    doors.open()
    assert first.result(PATIENCE_S).tolist() == [1, 1]
    assert second.result(PATIENCE_S).tolist() == [1, 1]
    assert len(doors.calls) == 1
    assert held(image) == set()
    assert image[...].tolist() == [1, 6, 1, 1, 1, 1, 1, 1]
    assert len(doors.calls) == 1 + 4
    source[3] = 2
    assert held(image) == {0, 3}
    assert image[...].tolist() == [1, 6, 1, 3, 1, 1, 1, 1]
    assert len(doors.calls) == 5 + 2
    stats = image.stats()
    assert (stats.joins, stats.errors, stats.misses) == (1, 0, stats.loads)


def test_a_block_computed_during_an_edit_of_other_cells_is_kept(source: ci.Source) -> None:
    doors = Doors()
    image = plus_one(source, doors)
    doors.close()
    before = begin(lambda: image[0:2])
    doors.wait_for()
    source[2] = 5
    after = begin(lambda: image[0:2])
    until(lambda: image.loader.shelf._flights[0]._done)
    doors.open()
    assert before.result(PATIENCE_S).tolist() == after.result(PATIENCE_S).tolist() == [1, 1]
    assert held(image) == {0}
    assert len(doors.calls) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_a_commit_between_two_cells_of_a_read(source: ci.Source, depth: int) -> None:
    doors = Doors()
    upper = plus_one(source)
    for _ in range(depth - 1):
        upper = plus_one(upper, halo=1)
    image = plus_one(upper, doors)
    doors.close()
    one = threading.local()

    def read() -> np.ndarray:
        one.here = True
        return image[...]

    reading = begin(read)
    doors.wait_for()
    source[...] = 10
    doors.open()
    assert reading.result(PATIENCE_S).tolist() == [1.0 + depth] * 8
    assert image[...].tolist() == [11.0 + depth] * 8
    assert upper[...].tolist() == [10.0 + depth] * 8
    calls = len(doors.calls)
    assert image[...].tolist() == [11.0 + depth] * 8
    assert len(doors.calls) == calls


def test_a_read_begun_before_several_edits_sees_none_of_them(source: ci.Source) -> None:
    doors = Doors()
    image = plus_one(plus_one(source, halo=1), doors)
    doors.close()
    reading = begin(lambda: image[...])
    doors.wait_for()
    for number in range(70):
        # More than are remembered one by one.
        source[number % 8] = number
    doors.open()
    assert reading.result(PATIENCE_S).tolist() == [2.0] * 8
    np.testing.assert_array_equal(image[...], source[...] + 2)


def test_an_image_defined_during_a_commit_reads_what_is_there_afterwards(
    source: ci.Source,
) -> None:
    upper = plus_one(source)
    upper[...]
    asked = threading.Event()
    answer = threading.Event()

    def where(roi: ci.Roi) -> ci.Roi:
        if threading.current_thread() is committing:
            asked.set()
            assert answer.wait(PATIENCE_S)
        return roi

    committing: threading.Thread | None = None
    mapped = ci.map_cells(
        lambda a, b: a + b, np.zeros(8), ci.Input(upper, index_map=where), dtype=float, cell_shape=2
    )
    mapped[...]

    def commit() -> None:
        nonlocal committing
        committing = threading.current_thread()
        source[3] = 7

    editing = begin(commit)
    assert asked.wait(PATIENCE_S)
    # Nothing has taken place yet, for anybody.
    assert upper[...].tolist() == mapped[...].tolist() == [1.0] * 8
    defining = begin(lambda: plus_one(upper))
    answer.set()
    editing.result(PATIENCE_S)
    expected = [2, 2, 2, 9, 2, 2, 2, 2]
    assert defining.result(PATIENCE_S)[...].tolist() == expected
    assert mapped[...].tolist() == [1, 1, 1, 8, 1, 1, 1, 1]


def test_who_waits_for_an_old_edition_of_a_store_computes_anew(stored: ci.Source) -> None:
    """The old edition finds the store changed, in a voxel that the cell does not even read."""
    doors = Doors()
    gated = plus_one(np.zeros(8), doors)
    image = ci.map_cells(np.add, gated, stored, cell_shape=2)
    doors.close()
    before = begin(lambda: image[0:2])
    doors.wait_for()
    stored[3] = 5
    after = begin(lambda: image[0:2])
    until(lambda: image.loader.shelf._flights[0]._done)
    doors.open()
    assert after.result(PATIENCE_S).tolist() == [1, 1]
    assert before.result(PATIENCE_S).tolist() == [1, 1]


def test_a_store_that_is_saved_at_once_never_fails_a_reader(
    stored: ci.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving in the background may begin before the edit returns."""
    image = plus_one(stored)
    saver = stored._saver
    assert saver is not None
    add, seen = saver.add, []

    def add_and_save(versions: Any) -> None:
        add(versions)
        saver.save()
        seen.append(begin(lambda: image[...]).result(PATIENCE_S).tolist())

    monkeypatch.setattr(saver, "add", add_and_save)
    image[...]
    stored[1] = 5
    assert seen == [[1, 6, 1, 1, 1, 1, 1, 1]]


def test_an_old_edition_of_a_long_chain_is_read(source: ci.Source) -> None:
    image: Any = source
    for _ in range(300):
        image = plus_one(image)
    before = image.snapshot()
    source[1] = 5
    # Whatever the latest edition holds in memory.
    assert image[...].tolist() == [300, 305, *[300] * 6]
    assert before[...].tolist() == [300] * 8


# ------------------------------------------------------------------------ edits in edits


def test_an_edit_inside_a_block_function(source: ci.Source) -> None:
    other = ci.Source(np.zeros(8), 2)
    edits = itertools.count(1)

    def f(a: np.ndarray) -> np.ndarray:
        number = next(edits)
        if number <= 4:
            other[number] = number
        return a + 1

    image = plus_one(source, f)
    watched = plus_one(other)
    watched[...]
    log: list[ci.Change] = []
    callback = watched.on_dirty(log.append)
    np.testing.assert_array_equal(in_time(lambda: image[...]), 1.0)
    assert watched[...].tolist() == [1, 2, 3, 4, 5, 1, 1, 1]
    assert sorted(map(tuple, cells_of(log))) == [(0,), (1,), (1,), (2,)]
    del callback


def test_a_block_function_that_edits_what_it_reads(source: ci.Source) -> None:
    calls = []

    def f(a: np.ndarray) -> np.ndarray:
        calls.append(a.tolist())
        if len(calls) == 1:
            source[0] = 5
        return a + 1

    image = plus_one(source, f)
    assert in_time(lambda: image[0:2]).tolist() == [1, 1]
    assert held(image) == set()
    assert in_time(lambda: image[0:2]).tolist() == [6, 1]
    assert calls == [[0, 0], [5, 0]]


def test_an_edit_inside_another_source_s_edit(source: ci.Source) -> None:
    other = ci.Source(np.zeros(8), 2)
    image = ci.map_cells(np.add, source, other, cell_shape=2)
    image[...]
    with source.edit() as a:
        a[0] = 1
        with other.edit() as b:
            b[7] = 2
            # Reading shows what took place, which is nothing yet.
            assert in_time(lambda: image[...]).tolist() == [0.0] * 8
            assert image[...].tolist() == [0.0] * 8
        assert image[...].tolist() == [0.0] * 7 + [2]
        assert a[0] == 1
    assert image[...].tolist() == [1] + [0.0] * 6 + [2]


def test_an_edit_inside_the_same_source_s_edit_is_an_error(source: ci.Source) -> None:
    def nested() -> None:
        with source.edit() as a:
            a[0] = 1
            source[1] = 2

    with pytest.raises(ci.CycleError):
        in_time(nested)
    assert not source[...].any()
    in_time(lambda: source.__setitem__(0, 3))
    assert source[0] == 3


def test_a_block_read_in_an_edit_that_edits_the_same_source_is_an_error(
    source: ci.Source,
) -> None:
    def f(a: np.ndarray) -> np.ndarray:
        source[1] = 2
        return a

    image = plus_one(source, f)

    def read_in_an_edit() -> None:
        with source.edit() as a:
            a[0] = 1
            image[...]

    with pytest.raises(ci.CycleError):
        in_time(read_in_an_edit)
    assert not source[...].any()


def test_two_threads_that_edit_two_sources_crosswise(source: ci.Source) -> None:
    other = ci.Source(np.zeros(8), 2)
    both = threading.Barrier(2)

    def nested(outer: ci.Source, inner: ci.Source, value: int) -> None:
        with outer.edit() as a:
            a[0] = value
            both.wait(PATIENCE_S)
            with inner.edit() as b:
                b[1] = value

    threads = [
        begin(lambda: nested(source, other, 1)),
        begin(lambda: nested(other, source, 2)),
    ]
    errors = [thread.exception(PATIENCE_S) for thread in threads]
    assert sorted(type(error).__name__ for error in errors) == ["CycleError", "NoneType"]
    # What failed has changed nothing.
    value = 1 + (errors[0] is not None)
    outer, inner = (source, other) if value == 1 else (other, source)
    assert outer[:3].tolist() == [value, 0, 0]
    assert inner[:3].tolist() == [0, value, 0]


def test_a_block_that_waits_for_an_edit_that_waits_for_the_block(source: ci.Source) -> None:
    """Either is told, none hangs, and the other goes on."""
    edited, computing = threading.Event(), threading.Event()

    def f(a: np.ndarray) -> np.ndarray:
        computing.set()
        assert edited.wait(PATIENCE_S)
        source[1] = 2
        return a + 1

    image = plus_one(np.zeros(8), f)

    def edit() -> None:
        with source.edit() as a:
            a[0] = 1
            assert computing.wait(PATIENCE_S)
            edited.set()
            image[0:2]

    reading, editing = begin(lambda: image[0:2]), begin(edit)
    errors = [reading.exception(PATIENCE_S), editing.exception(PATIENCE_S)]
    assert any(isinstance(error, ci.CycleError) for error in errors)
    in_time(lambda: source.__setitem__(7, 1))


def test_a_write_that_fails_inside_an_edit_writes_nothing(source: ci.Source) -> None:
    image = plus_one(source)
    image[...]
    with source.edit() as a:
        a[7] = 9
        with pytest.raises(ValueError, match="could not convert"):
            a[...] = np.array(["1", "2", "3", "4", "5", "6", "7", "x"])
        with pytest.raises(ValueError, match="could not convert"):
            a[[0, 5]] = ["1", "x"]
        with pytest.raises(ValueError, match="cannot be written"):
            a[0:2] = [1, 2, 3]
        assert a[...].tolist() == [0] * 7 + [9]
    assert image[...].tolist() == [1] * 7 + [10]


def test_a_number_that_does_not_fit_is_an_error_as_in_numpy() -> None:
    source = ci.Source(np.zeros(4, np.uint8), 2)
    for key in (0, slice(None), [0, 1], np.ones(4, bool)):
        with pytest.raises(OverflowError):
            source[key] = 300
    assert not source[...].any()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_an_index_gives_what_numpy_gives(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    source = ci.Source(array, 2)
    keys: list[Any] = [(), ..., (...,)]
    if shape:
        keys += [
            None,
            array > 1,
            True,
            0,
            -1,
            np.int64(1),
            [0, 1],
            (0, ...),
            np.array(1),
            slice(None, None, -2),
            (None, 0),
        ]
    if len(shape) == 3:
        keys += [(0, 1, 2), (0, 1, 2, ...), (np.array(0), 1, 2), ([0], slice(None), [1]), (0, None)]
    for key in keys:
        found, expected = source[key], array[key]
        assert type(found) is type(expected), key
        np.testing.assert_array_equal(found, expected, strict=True)


# -------------------------------------------------------------------------- callbacks


def test_a_callback_that_edits_the_same_source(source: ci.Source) -> None:
    image = plus_one(source)
    image[...]
    log: list[tuple[str, list[int]]] = []

    def edits(change: ci.Change) -> None:
        log.append(("source", sorted(change.cells)))
        if len(log) == 1:
            source[4] = 1
            # Told later, after those that are told of the first one.
            assert len(log) == 1

    def told(change: ci.Change) -> None:
        log.append(("image", sorted(change.cells)))

    source.on_dirty(edits)
    image.on_dirty(told)
    in_time(lambda: source.__setitem__(0, 1))
    assert log == [("source", [0]), ("image", [0]), ("source", [2]), ("image", [2])]
    assert image[...].tolist() == [2, 1, 1, 1, 2, 1, 1, 1]


def test_a_callback_reads_what_is_new_upstream_and_downstream(source: ci.Source) -> None:
    upper = plus_one(source)
    lower = plus_one(upper)
    lower[...]
    seen = []

    def read(change: ci.Change) -> None:
        seen.append((source[0], upper[0], lower[0]))

    for each in (source, upper, lower):
        each.on_dirty(read)
    in_time(lambda: source.__setitem__(0, 5))
    assert seen == [(5, 6, 7)] * 3


def test_a_callback_that_raises_is_logged_and_the_others_are_told(
    source: ci.Source, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[ci.Change] = []

    def raises(change: ci.Change) -> None:
        raise ValueError("not today")

    image = plus_one(source)
    source.on_dirty(raises)
    callback = image.on_dirty(log.append)
    image.on_dirty(raises)
    with caplog.at_level(logging.ERROR, "cellimg_dask"):
        source[0] = 1
        source[2] = 1
    assert cells_of(log) == [[0], [1]]
    assert len(caplog.records) == 4
    del callback


def test_a_callback_that_was_dropped_is_not_called(source: ci.Source) -> None:
    log: list[ci.Change] = []

    class Watcher:
        def told(self, change: ci.Change) -> None:
            log.append(change)

    watcher = Watcher()
    source.on_dirty(watcher.told)
    source.on_dirty(lambda change: log.append(change))
    source[0] = 1
    assert cells_of(log) == [[0]]
    del watcher
    source[0] = 2
    assert len(log) == 1


def test_a_thread_that_edits_does_not_wait_for_the_callbacks_of_another(
    source: ci.Source,
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    order: list[float] = []

    def slow(change: ci.Change) -> None:
        order.append(change.number)
        if not inside.is_set():
            inside.set()
            assert go_on.wait(PATIENCE_S)

    source.on_dirty(slow)
    first = begin(lambda: source.__setitem__(0, 1))
    assert inside.wait(PATIENCE_S)
    in_time(lambda: source.__setitem__(0, 2))
    assert source[0] == 2
    go_on.set()
    first.result(PATIENCE_S)
    assert len(order) == 2
    assert order == sorted(order)


# ------------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize(
    "where", ["forget", "_prepare", "_settle", "_renewed", "_tell", "spread", "along"]
)
def test_an_interrupted_commit_takes_place_wholly_or_not_at_all(
    source: ci.Source, monkeypatch: pytest.MonkeyPatch, where: str, call: int, when: str
) -> None:
    upper = plus_one(source)
    lower = plus_one(upper, halo=1)
    lower[...]
    log: list[tuple[int, list[int]]] = []
    callbacks = [
        each.on_dirty(lambda change, n=n: log.append((n, sorted(change.cells))))
        for n, each in enumerate((source, upper, lower))
    ]
    owner: Any = (
        next(
            kind
            for kind in (node_module.ImageNode, node_module.Node, node_module._Change)
            if hasattr(kind, where)
        )
        if where != "along"
        else None
    )
    calls = itertools.count()
    if owner is None:
        change = source.node.change

        def along() -> None:
            if next(calls) == call:
                raise KeyboardInterrupt

        monkeypatch.setattr(source.node, "change", lambda *args: change(*args[:2], along))
    else:
        real = getattr(owner, where)

        def interrupted(*args: Any) -> Any:
            mine = next(calls) == call
            if mine and when == "before":
                raise KeyboardInterrupt
            result = real(*args)
            if mine:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, where, interrupted)
    number = clock.number
    interruption = None
    try:
        source[2] = 5
    except KeyboardInterrupt as error:
        interruption = error
    monkeypatch.undo()
    took_place = clock.number > number
    assert took_place == (where != "spread" or interruption is None)
    value = 5 if took_place else 0
    expected = np.zeros(8)
    expected[2] = value
    np.testing.assert_array_equal(source[...], expected)
    np.testing.assert_array_equal(upper[...], expected + 1)
    np.testing.assert_array_equal(lower[...], expected + 2)
    assert log == ([(0, [1]), (1, [1]), (2, [0, 1, 2])] if took_place else [])
    log.clear()
    source[7] = 1
    expected[7] = 1
    assert held(upper) == {0, 1, 2}
    assert held(lower) == {0, 1}
    np.testing.assert_array_equal(lower[...], expected + 2)
    assert log == [(0, [3]), (1, [3]), (2, [2, 3])]
    del callbacks


def test_an_edit_that_is_interrupted_is_discarded(source: ci.Source) -> None:
    image = plus_one(source)
    image[...]

    def edit() -> None:
        with source.edit() as a:
            a[0] = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_time(edit)
    assert held(image) == {0, 1, 2, 3}
    assert not source[...].any()
    in_time(lambda: source.__setitem__(0, 2))
    assert image[0] == 3


# ---------------------------------------------------------------------------- freezing


def test_a_frozen_image_shows_the_same_after_many_edits(source: ci.Source) -> None:
    """More than the history of an image remembers."""
    image = plus_one(source)
    image[...]
    image.freeze(-1)
    log: list[ci.Change] = []
    callback = image.on_dirty(log.append)
    for number in range(70):
        source[number % 4] = number
        if number % 7 == 0:
            plus_one(image)[...]
    assert image[...].tolist() == [1.0] * 8
    assert log == []
    image.thaw()
    assert cells_of(log) == [[0, 1]]
    np.testing.assert_array_equal(image[...], source[...] + 1)
    del callback


def test_a_frozen_image_shows_the_same_after_other_parameters_and_edits(
    source: ci.Source,
) -> None:
    image = ci.map_cells(lambda a, p: a + p, source, dtype=float, cell_shape=2, params={"p": 1})
    below = plus_one(image)
    below[...]
    image.freeze(-1)
    image.set_params(p=7)
    source[0] = 5
    assert below[...].tolist() == [13.0] + [8.0] * 7
    assert image[...].tolist() == [1.0] * 8
    image.set_params(p=1)
    assert below[...].tolist() == [7.0] + [2.0] * 7
    assert image[...].tolist() == [1.0] * 8
    source[0:4] = 6
    assert below[...].tolist() == [8.0] * 4 + [2.0] * 4
    assert image[...].tolist() == [1.0] * 8
    image.thaw()
    assert image[...].tolist() == [7.0] * 4 + [1.0] * 4


# ---------------------------------------------------------------------------- parameters


def test_two_threads_that_set_two_parameters_both_do(
    source: ci.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = ci.map_cells(
        lambda a, p, q: a + p + q, source, dtype=float, cell_shape=2, params={"p": 0, "q": 0}
    )
    set_params = node_module.ImageNode.set_params
    both = threading.Barrier(2)

    def together(node: Any, params: Any) -> None:
        both.wait(PATIENCE_S)
        set_params(node, params)

    monkeypatch.setattr(node_module.ImageNode, "set_params", together)
    threads = [begin(lambda: image.set_params(p=1)), begin(lambda: image.set_params(q=20))]
    for thread in threads:
        thread.result(PATIENCE_S)
    assert dict(image.params) == {"p": 1, "q": 20}
    assert image[0] == 21
