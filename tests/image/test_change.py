"""Editions, snapshots, freezing, parameters: what a change reaches and what it leaves alone."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci

PATIENCE_S = 20


class Counting:
    """A block function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", "function")
        self._lock = threading.Lock()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self.calls += 1
        return self.function(*args, **kwargs)

    def since(self) -> int:
        """Return the number of calls since the last time."""
        with self._lock:
            calls, self.calls = self.calls, 0
        return calls


def maximum(block: np.ndarray, size: int = 3) -> np.ndarray:
    return ndi.maximum_filter(block, size)


# -------------------------------------------------------------------------------- the cells


@pytest.mark.parametrize("halo", [0, 1, 2, 4])
def test_on_four_axes_exactly_the_cells_within_the_halo_are_computed_again(halo, rng):
    data = rng.integers(0, 1000, (9, 10, 11, 12))
    source = ci.Source(data, cell_shape=5)
    count = Counting(maximum)
    size = 2 * halo + 1
    image = ci.map_cells(
        count, source, halo=halo, dtype=data.dtype, cell_shape=3, params={"size": size}
    )
    np.testing.assert_array_equal(image[...], ndi.maximum_filter(data, size))
    count.since()
    changes: list[ci.Change] = []
    watch = image.on_dirty(changes.append)
    assert watch
    for voxel in [(0, 0, 0, 0), (8, 9, 10, 11), (4, 5, 3, 6), (2, 3, 5, 8)]:
        hits = image.stats().hits
        data[voxel] = 2000
        source[voxel] = 2000
        expected = {
            cell
            for cell in range(image.grid.num_cells)
            if all(
                low - halo <= v < high + halo
                for v, low, high in zip(
                    voxel,
                    image.grid.cell(cell).roi.start,
                    image.grid.cell(cell).roi.stop,
                    strict=True,
                )
            )
        }
        (change,) = changes
        changes.clear()
        assert set(change.cells) == expected
        assert len(change.cells) == len(expected)
        covered = np.zeros(data.shape, int)
        for region in change.regions:
            covered[region.slices] += 1
        for cell in range(image.grid.num_cells):
            box = image.grid.cell(cell).roi.slices
            assert (covered[box] == (cell in expected)).all()
        np.testing.assert_array_equal(image[...], ndi.maximum_filter(data, size))
        assert count.since() == len(expected)
        assert image.stats().hits - hits == image.grid.num_cells - len(expected)


def test_an_old_reader_goes_on_with_what_there_was(pool):
    """A read that has begun before a change is of the edition before, in all of its cells."""
    source = ci.Source(np.zeros(8, int), cell_shape=2)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(block: np.ndarray) -> np.ndarray:
        begun.release()
        assert go_on.wait(PATIENCE_S)
        return block + 1

    queue = ci.BlockQueue(1)
    first = ci.map_cells(slow, source, dtype=int, queue=queue)
    second = ci.map_cells(np.negative, first)
    with queue:
        reading = pool.submit(lambda: second[:])
        assert begun.acquire(timeout=PATIENCE_S)
        source[...] = 10
        go_on.set()
        np.testing.assert_array_equal(reading.result(PATIENCE_S), -1)
        np.testing.assert_array_equal(second[:], -11)
        np.testing.assert_array_equal(first[:], 11)


def test_what_an_old_reader_computes_is_not_kept_as_new_and_the_rest_is(pool):
    source = ci.Source(np.zeros(6, int), cell_shape=2)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(block: np.ndarray) -> np.ndarray:
        begun.release()
        assert go_on.wait(PATIENCE_S)
        return block + 1

    image = ci.map_cells(slow, source, dtype=int)
    reading = [pool.submit(image.load, index) for index in range(3)]
    for _ in range(3):
        assert begun.acquire(timeout=PATIENCE_S)
    source[2] = 10
    go_on.set()
    assert [int(task.result(PATIENCE_S)[0]) for task in reading] == [1, 1, 1]
    assert [image.peek(index) is not None for index in range(3)] == [True, False, True]
    np.testing.assert_array_equal(image[:], [1, 1, 11, 1, 1, 1])
    assert image.stats().loads == 4


def test_data_of_before_a_change_are_let_go():
    source = ci.Source(np.zeros(8), cell_shape=4)
    image = ci.map_cells(np.negative, source)
    image[:]
    source[0] = 1
    image[:]
    old = weakref.ref(source.node.now.tile(0))
    assert old() is not None
    snapshot = image.snapshot()
    source[0] = 2
    gc.collect()
    assert old() is not None, "the snapshot needs it"
    del snapshot
    image[:]
    gc.collect()
    assert old() is None


def test_images_that_read_nothing_of_a_change_are_left_alone():
    source = ci.Source(np.zeros((6, 6)), cell_shape=3)
    other = ci.Source(np.zeros((6, 6)), cell_shape=3)
    count = Counting(np.add)
    image = ci.map_cells(count, source, other, dtype=float)
    apart = ci.map_cells(np.negative, other)
    corner = ci.fill_cells(
        lambda block: block.data.fill(block.inputs[0].sum()),
        ci.CellGrid((2,), 2),
        ci.Input(source, index_map=lambda roi: ci.Roi((0, 0), (2, 2))),
        dtype=float,
    )
    for each in (image, apart, corner):
        each[...]
    changes: list[str] = []
    watches = [
        each.on_dirty(lambda change, name=name: changes.append(name))
        for name, each in (("image", image), ("apart", apart), ("corner", corner))
    ]
    assert len(watches) == 3
    count.since()
    source[4, 4] = 1
    assert changes == ["image"]
    assert image[4, 4] == 1
    assert corner.peek(0) is not None
    source[1, 1] = 5
    assert changes == ["image", "image", "corner"]
    np.testing.assert_array_equal(corner[:], 5)


# ---------------------------------------------------------------------------- who is told


def test_callbacks_are_held_weakly_and_one_that_raises_breaks_nothing(caplog):
    source = ci.Source(np.zeros(4))
    image = ci.map_cells(np.negative, source)
    told: list[str] = []

    class Viewer:
        def changed(self, change: ci.Change) -> None:
            told.append("method")

    viewer = Viewer()

    @image.on_dirty
    def fails(change: ci.Change) -> None:
        raise ZeroDivisionError("in a callback")

    image.on_dirty(viewer.changed)
    image.on_dirty(lambda change: told.append("nobody holds it"))
    watch = image.on_dirty(lambda change: told.append("function"))
    with caplog.at_level(logging.ERROR, "cellimg_dask"):
        source[0] = 1
    assert told == ["method", "function"]
    assert "in a callback" in caplog.text
    del viewer, watch
    with caplog.at_level(logging.CRITICAL, "cellimg_dask"):
        source[0] = 2
    assert told == ["method", "function"]
    assert fails

    class Unheld:
        __slots__ = ()

        def __call__(self, change: ci.Change) -> None: ...

    with pytest.raises(TypeError, match="held weakly"):
        image.on_dirty(Unheld())


def test_callbacks_may_read_and_edit_and_are_told_in_order():
    source = ci.Source(np.zeros(8, int), cell_shape=2)
    first = ci.map_cells(np.negative, source)
    second = ci.map_cells(np.negative, first, halo=1)
    told: list[tuple[str, int, Any]] = []

    @first.on_dirty
    def one(change: ci.Change) -> None:
        told.append(("first", change.number, first[:2].tolist()))
        if source[0] < 3:
            source[0] += 1

    @second.on_dirty
    def two(change: ci.Change) -> None:
        told.append(("second", change.number, second[:2].tolist()))

    assert one
    assert two
    source[0] = 1
    numbers = [number for _, number, _ in told]
    assert numbers == sorted(numbers)
    assert [name for name, _, _ in told] == ["first", "second"] * 3
    # Whoever is told sees at least that change.
    assert told[-1][2] == [3, 0]
    assert told[0][2] == [-1, 0]


def test_a_change_that_another_thread_makes_in_a_callback_hangs_nobody(pool):
    source = ci.Source(np.zeros(4, int))
    image = ci.map_cells(np.negative, source)
    numbers: list[int] = []

    @image.on_dirty
    def changed(change: ci.Change) -> None:
        numbers.append(change.number)
        if len(numbers) == 1:
            pool.submit(source.__setitem__, 1, 5).result(PATIENCE_S)

    assert changed
    source[0] = 1
    assert len(numbers) == 2
    assert numbers == sorted(numbers)
    np.testing.assert_array_equal(image[:2], [-1, -5])


# ------------------------------------------------------------------------------- snapshots


def test_snapshots_and_dask_arrays_show_what_there_was(pool):
    source = ci.Source(np.arange(20).reshape(4, 5), cell_shape=2)
    count = Counting(maximum)
    image = ci.map_cells(count, source, halo=1, dtype=int)
    kept = []
    for step in range(5):
        expected = ndi.maximum_filter(source[...], 3)
        kept.append((expected, image.snapshot(), image.to_dask(), np.sum(image)))
        if step % 2:
            image[...]
        source[step % 4, step] = 100 + step
    for expected, snapshot, lazy, total in kept:
        np.testing.assert_array_equal(snapshot[...], expected)
        assert snapshot.to_dask().compute().tolist() == expected.tolist()
        for scheduler in ("threads", "synchronous"):
            with dask.config.set(scheduler=scheduler):
                np.testing.assert_array_equal(lazy.compute(), expected)
                assert total.compute() == expected.sum()
    np.testing.assert_array_equal(image[...], ndi.maximum_filter(source[...], 3))
    assert len({lazy.name for _, _, lazy, _ in kept}) == 5


def test_a_snapshot_shares_the_cells_that_stay_the_same():
    source = ci.Source(np.zeros(40), cell_shape=4)
    count = Counting(np.negative)
    image = ci.map_cells(count, source, dtype=float)
    image[:]
    snapshot = image.snapshot()
    source[0] = 1
    count.since()
    np.testing.assert_array_equal(snapshot[:], 0)
    # One cell has changed and was forgotten for it.
    assert count.since() == 1
    np.testing.assert_array_equal(snapshot[:], 0)
    assert count.since() == 0
    assert image[0] == -1
    assert count.since() == 1


def test_a_snapshot_never_changes():
    source = ci.Source(np.zeros(4))
    image = ci.map_cells(maximum, source, dtype=float, params={"size": 1})
    snapshot = image.snapshot()
    for change in (snapshot.invalidate, lambda: snapshot.set_params(size=3)):
        with pytest.raises(TypeError, match="a snapshot never changes"):
            change()
    later = ci.map_cells(np.negative, snapshot)
    source[0] = 5
    np.testing.assert_array_equal(later[:], 0)
    copy = pickle.loads(pickle.dumps(snapshot))
    np.testing.assert_array_equal(copy[:], 0)


def test_a_running_batch_writes_the_edition_of_the_time_of_asking(tmp_path):
    source, one_at_a_time = ci.Source(np.zeros((8, 8), int), cell_shape=4), threading.Lock()

    def edits(block: np.ndarray) -> np.ndarray:
        # As somebody at the screen might, meanwhile.
        with one_at_a_time:
            source[...] += 1
        return block + 1

    image = ci.map_cells(edits, source, dtype=int, version="1")
    report = ci.run(image, tmp_path / "out.zarr", progress=False)
    assert report.computed == 4
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "out.zarr")[...], 1)
    np.testing.assert_array_equal(source[...], 4)


def test_a_zarr_array_written_behind_a_snapshots_back_is_an_error(tmp_path):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(8, 8), chunks=(4, 4), dtype="i4")
    stored[...] = 1
    image = ci.map_cells(np.negative, stored)
    snapshot, lazy = image.snapshot(), image.to_dask()
    np.testing.assert_array_equal(snapshot[:4], -1)
    stored[4:, :4] = 2
    # The clock of a file system may be some milliseconds slow.
    chunk = tmp_path / "a.zarr" / "c" / "1" / "0"
    os.utime(chunk, ns=(time.time_ns(), time.time_ns() + 10**9))
    np.testing.assert_array_equal(snapshot[:4], -1)
    for read in (lambda: snapshot[4:, :4], lambda: lazy[4:, :4].compute()):
        with pytest.raises(ci.SourceChangedError, match="written after the snapshot"):
            read()
    # Nobody has told the image; when it is told, it is right again.
    os.utime(chunk)
    image.invalidate(np.s_[4:, :4])
    assert (image[4:, :4] == -2).all()
    assert (image.snapshot()[4:, :4] == -2).all()


# ---------------------------------------------------------------------------------- frozen


def test_a_frozen_image_shows_what_was_in_memory():
    source = ci.Source(np.arange(12), cell_shape=2)
    count = Counting(np.negative)
    image = ci.map_cells(count, source, dtype=int)
    later = ci.map_cells(np.negative, image)
    image[:6]
    told: list[list[int]] = []

    @image.on_dirty
    def changed(change: ci.Change) -> None:
        told.append(sorted(change.cells))

    assert changed
    count.since()
    image.freeze(fill_value=99)
    assert image.is_frozen
    expected = [0, -1, -2, -3, -4, -5] + [99] * 6
    np.testing.assert_array_equal(image[:], expected)
    source[2] = 50
    source[3] = 51
    source[9] = 52
    np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(image.read_into(np.zeros(12, int)), expected)
    np.testing.assert_array_equal(image.load(1), [-2, -3])
    np.testing.assert_array_equal(image.load(5), [99, 99])
    assert count.since() == 0
    assert not told
    # Whoever computes with it gets the truth, and that does not show.
    np.testing.assert_array_equal(later[:], source[:])
    np.testing.assert_array_equal(image.to_dask().compute(), -source[:])
    np.testing.assert_array_equal(image[:4], [0, -1, -2, -3])
    source[2] = 60
    np.testing.assert_array_equal(image[:4], [0, -1, -2, -3])
    image.thaw()
    assert told == [[1, 4]]
    np.testing.assert_array_equal(image[:], -source[:])
    source[0] = 7
    assert told == [[1, 4], [0]]
    with pytest.raises(ValueError, match="not frozen"):
        image.thaw()


def test_thawing_without_a_change_tells_nobody():
    source = ci.Source(np.arange(4))
    image = ci.map_cells(np.negative, source)
    told: list[ci.Change] = []
    watch = image.on_dirty(told.append)
    assert watch
    image.freeze()
    with pytest.raises(ValueError, match="frozen already"):
        image.freeze()
    image.thaw()
    assert not told
    with pytest.raises(ValueError, match="fill_value"):
        image.freeze(fill_value="x")


# -------------------------------------------------------------------------------- parameters


def test_a_parameter_that_comes_back_finds_its_results_again(rng):
    data = rng.integers(0, 1000, (12, 12))
    source = ci.Source(data, cell_shape=4)
    first_count, second_count = Counting(maximum), Counting(np.negative)
    first = ci.map_cells(first_count, source, halo=3, dtype=int, params={"size": 3})
    second = ci.map_cells(second_count, first, dtype=int)

    def check(size: int) -> tuple[int, int]:
        np.testing.assert_array_equal(second[...], -ndi.maximum_filter(source[...], size))
        return first_count.since(), second_count.since()

    told: list[int] = []
    watch = second.on_dirty(lambda change: told.append(len(change.cells)))
    assert watch
    assert check(3) == (9, 9)
    first.set_params(size=5)
    assert first.params == {"size": 5}
    assert told == [9]
    assert check(5) == (9, 9)
    first.set_params(size=3)
    assert check(3) == (0, 0)
    first.set_params(size=5)
    assert check(5) == (0, 0)
    # A change is not forgotten over it, for neither value.
    source[0, 0] = 5000
    assert check(5) == (1, 1)
    first.set_params(size=3)
    assert check(3) == (1, 1)
    first.set_params(size=7)
    assert check(7) == (9, 9)
    first.set_params(size=3)
    assert check(3) == (0, 0)


def test_parameters_of_several_images_are_found_again_together():
    source = ci.Source(np.arange(8), cell_shape=4)
    count = Counting(np.add)

    def times(block: np.ndarray, factor: int) -> np.ndarray:
        return factor * block

    left = ci.map_cells(times, source, dtype=int, params={"factor": 1})
    right = ci.map_cells(times, source, dtype=int, params={"factor": 1})
    both = ci.map_cells(count, left, right, dtype=int)
    seen = set()
    for a, b in itertools.chain([(1, 1)], itertools.product([1, 2], repeat=2), [(1, 1), (2, 1)]):
        left.set_params(factor=a)
        right.set_params(factor=b)
        np.testing.assert_array_equal(both[:], (a + b) * np.arange(8))
        assert count.since() == (0 if (a, b) in seen else 2)
        seen.add((a, b))


def test_a_computation_goes_on_with_the_parameters_that_it_began_with(pool):
    begun, go_on = threading.Semaphore(0), threading.Event()

    def add(block: np.ndarray, value: int) -> np.ndarray:
        if value == 1:
            begun.release()
            assert go_on.wait(PATIENCE_S)
        return block + value

    first = ci.map_cells(add, np.zeros(8, int), dtype=int, cell_shape=2, params={"value": 1})
    second = ci.map_cells(np.negative, first)
    reading = pool.submit(lambda: second[:])
    assert begun.acquire(timeout=PATIENCE_S)
    first.set_params(value=2)
    np.testing.assert_array_equal(second[:], -2)
    go_on.set()
    np.testing.assert_array_equal(reading.result(PATIENCE_S), -1)
    np.testing.assert_array_equal(second[:], -2)
    first.set_params(value=1)
    np.testing.assert_array_equal(second[:], -1)


def test_parameters_that_cannot_be_compared_are_never_taken_for_others():
    class Model:
        def __init__(self, value: int) -> None:
            self.value = value

        def __reduce__(self) -> Any:
            raise TypeError("not this one")

    def apply(block: np.ndarray, model: Model) -> np.ndarray:
        return block + model.value

    image = ci.map_cells(apply, np.zeros(2, int), dtype=int, params={"model": Model(1)})
    for value in (1, 2, 1, 3):
        image.set_params(model=Model(value))
        np.testing.assert_array_equal(image[:], value)


def test_a_parameter_that_the_function_does_not_have_is_refused():
    image = ci.map_cells(maximum, np.zeros(4), dtype=float, params={"size": 3})
    with pytest.raises(TypeError, match=r"maximum has no parameter 'sise'; it has block, size"):
        image.set_params(sise=5)
    assert image.params == {"size": 3}
    with pytest.raises(TypeError):
        image.params["size"] = 5  # type: ignore[index]


def test_parameters_on_other_workers():
    for backend in ("threads", "processes"):
        with ci.BlockQueue(1, backend=backend) as queue:
            image = ci.map_cells(
                np.full_like,
                np.zeros(4, int),
                dtype=int,
                cell_shape=2,
                params={"fill_value": 1},
                queue=queue,
            )
            for value in (1, 2, 1):
                image.set_params(fill_value=value)
                np.testing.assert_array_equal(image[:], value)
            assert image.stats().loads == 4


# ---------------------------------------------------------------------------------- requests


def test_a_request_is_of_the_edition_of_the_time_of_asking():
    source = ci.Source(np.zeros(8, int), cell_shape=2)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(block: np.ndarray) -> np.ndarray:
        begun.release()
        assert go_on.wait(PATIENCE_S)
        return block + 1

    image = ci.map_cells(slow, source, dtype=int)
    request = image.request()
    assert begun.acquire(timeout=PATIENCE_S)
    source[...] = 10
    later = image.request()
    go_on.set()
    np.testing.assert_array_equal(request.result(PATIENCE_S), 1)
    np.testing.assert_array_equal(later.result(PATIENCE_S), 11)


def test_a_request_of_a_frozen_image_shows_what_is_in_memory():
    image = ci.map_cells(np.negative, np.arange(8), cell_shape=2)
    image[:4]
    image.freeze(fill_value=7)
    request = image.request(np.s_[2:6])
    assert request.state == "done"
    assert request.progress.done == 2
    np.testing.assert_array_equal(request.result(), [-2, -3, 7, 7])
    assert image.prefetch().result() is None
    assert image.peek(3) is None
    image.thaw()
    np.testing.assert_array_equal(image.request(np.s_[2:6]).result(PATIENCE_S), [-2, -3, -4, -5])


@pytest.mark.parametrize("way", ["result", "callback", "await"])
def test_a_request_begins_again_if_the_store_is_written_to(tmp_path, pool, way):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(8,), chunks=(2,), dtype="i4")
    source = ci.Source(stored)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(block: np.ndarray) -> np.ndarray:
        begun.release()
        assert go_on.wait(PATIENCE_S)
        return block + 1

    queue = ci.BlockQueue(1)
    with queue:
        image = ci.map_cells(slow, source, dtype="i4", queue=queue)
        request = image.request()
        assert begun.acquire(timeout=PATIENCE_S)
        # The last cells are not read yet, and what they were is gone.
        source[...] = 10
        done = threading.Event()
        states: list[str] = []

        @request.add_done_callback
        def told(request: ci.Request) -> None:
            states.append(request.state)
            done.set()

        go_on.set()
        if way == "await":

            async def wait() -> Any:
                return await request

            result = asyncio.run(wait())
        else:
            if way == "callback":
                assert done.wait(PATIENCE_S)
            result = request.result(PATIENCE_S)
        np.testing.assert_array_equal(result, 11)
        assert done.wait(PATIENCE_S)
        assert states == ["done"]
        assert request.state == "done"


def test_a_request_of_a_snapshot_whose_store_changed_fails(tmp_path):
    stored = zarr.create_array(tmp_path / "a.zarr", shape=(8,), chunks=(2,), dtype="i4")
    source = ci.Source(stored)
    snapshot = ci.map_cells(np.negative, source).snapshot()
    source[...] = 10
    with pytest.raises(ci.SourceChangedError):
        snapshot.request().result(PATIENCE_S)
