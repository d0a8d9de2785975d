"""The one path from a cell to its data: depth, changes while it runs, errors."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.loading import node as node_module
from cellimg_dask.loading.loader import CellLoader

PATIENCE_S = 30


class Gate:
    """A block function that stops at its first call until it is told to go on."""

    def __init__(self, function: Callable[..., np.ndarray]) -> None:
        self.function = function
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.calls = 0
        self.__name__ = "gate"

    def __call__(self, *blocks: np.ndarray) -> np.ndarray:
        self.calls += 1
        # What was read is read; a view of the input would change with it.
        result = self.function(*[block.copy() for block in blocks])
        self.began.set()
        assert self.go_on.wait(PATIENCE_S)
        return result


def cells_held(img: ci.CellImg) -> set[int]:
    return {index for index in range(img.grid.num_cells) if img.peek(index) is not None}


# ----------------------------------------------------------------------------------- chains


def sum_of_three(line: np.ndarray) -> np.ndarray:
    """Return the sum of each voxel and its neighbours; what is at the ends is cropped later."""
    total = line.copy()
    total[1:] += line[:-1]
    total[:-1] += line[1:]
    return total % 1009


def chain(image: np.ndarray, depth: int, cell_shapes: tuple[int, ...], **kwargs: Any):
    stages = []
    for level in range(depth):
        image = ci.map_cells(
            sum_of_three,
            image,
            dtype=np.int64,
            halo=1,
            boundary="wrap",
            cell_shape=cell_shapes[level % len(cell_shapes)],
            **kwargs,
        )
        stages.append(image)
    return stages


def chain_expected(image: np.ndarray, depth: int) -> np.ndarray:
    for _ in range(depth):
        image = (image + np.roll(image, 1) + np.roll(image, -1)) % 1009
    return image


def maxima(image: ci.CellImg, depth: int, boundary: str, **params: Any) -> list[ci.CellImg]:
    """Return images of the largest of each three voxels of the one before."""
    stages = [image]
    for _ in range(depth):
        stages.append(
            ci.map_cells(
                ndi.maximum_filter1d,
                stages[-1],
                dtype=int,
                halo=1,
                boundary=boundary,
                params={"size": 3, **params},
            )
        )
    return stages[1:]


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize(
    # Without a cache a cell is computed for each of its readers, so there has to be just one.
    ("cell_shapes", "cached"),
    [((7,), True), ((7, 5, 11), True), ((40,), True), ((40,), False)],
)
def test_chains_of_depth_60_end_whatever_the_number_of_threads(
    make_crew, num_threads, cell_shapes, cached
):
    crew = make_crew(num_threads)
    image = np.arange(40) ** 2
    stages = chain(image, 60, cell_shapes, **({} if cached else {"cache": None}))
    for stage in stages:
        stage.loader.crew = lambda: crew
    np.testing.assert_array_equal(stages[-1][:], chain_expected(image, 60))
    if cached:
        assert all(stage.stats().loads == stage.grid.num_cells for stage in stages)
        assert all(stage.stats().errors == 0 for stage in stages)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_block_functions_that_read_images_themselves_end_too(make_crew, num_threads):
    """Each block of each level asks for the whole level below, through the same few threads."""
    crew = make_crew(num_threads)
    image = np.arange(24)
    below: Any = image
    levels = []
    for _ in range(12):

        def f(block: np.ndarray, below: Any = below) -> np.ndarray:
            return block + int(np.asarray(below).sum()) % 1009

        below = ci.map_cells(f, image, dtype=np.int64, cell_shape=3)
        below.loader.crew = lambda: crew
        levels.append(below)
    expected = image
    for _ in range(12):
        expected = image + expected.sum() % 1009
    np.testing.assert_array_equal(below[:], expected)
    assert all(level.stats().loads == 8 for level in levels)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_many_readers_of_one_chain_load_each_cell_once(make_crew, pool, num_threads):
    crew = make_crew(num_threads)
    image = np.arange(60)
    stages = chain(image, 10, (4, 9))
    for stage in stages:
        stage.loader.crew = lambda: crew
    at_once = threading.Barrier(8)

    def read(number: int) -> bool:
        at_once.wait(PATIENCE_S)
        level = 10 - number % 5
        return np.array_equal(stages[level - 1][:], chain_expected(image, level))

    assert all(pool.map(read, range(8)))
    assert [stage.stats().loads for stage in stages] == [s.grid.num_cells for s in stages]


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_chains_deeper_than_pythons_stack_end_too(make_crew, num_threads):
    crew = make_crew(num_threads)
    image = np.arange(20)
    stages = chain(image, 300, (5, 7))
    for stage in stages:
        stage.loader.crew = lambda: crew
    np.testing.assert_array_equal(stages[-1][3:9], chain_expected(image, 300)[3:9])
    np.testing.assert_array_equal(stages[-1][:], chain_expected(image, 300))
    assert all(stage.stats().loads == stage.grid.num_cells for stage in stages)
    assert all(stage.stats().errors == 0 for stage in stages)


@pytest.mark.parametrize("max_bytes", [0, 100, 1000])
def test_a_long_chain_needs_no_room_in_the_cache(max_bytes):
    """What is held on the way down is held by whoever computes, evicted or not."""
    cache = ci.CellCache(max_bytes)
    image = np.arange(20)
    stages = chain(image, 200, (20,), cache=cache)
    for level in (200, 198, 200):
        result = stages[level - 1].load(0)
        np.testing.assert_array_equal(result, chain_expected(image, level))
        assert cache.bytes <= max_bytes


def test_a_long_chain_computes_only_the_cells_that_a_read_needs():
    """One cell of 200, at the border, from where ``wrap`` leads to the other end."""
    for boundary in ("none", "wrap", "reflect"):
        image = np.arange(1000)
        stages = [ci.map_cells(copied, image, dtype=int, cell_shape=5)]
        stages += maxima(stages[0], 70, boundary)
        stages[-1].load(0)
        loads = [stage.stats().loads for stage in stages]
        sides = 2 if boundary == "wrap" else 1
        # Each level computes whole cells, so each adds a cell at either end.
        assert loads == [1 + sides * (70 - level) for level in range(71)], boundary


def test_a_long_chain_through_index_maps_computes_only_the_cells_that_a_read_needs():
    image = np.arange(1000)
    grid = ci.CellGrid((1000,), 5)

    def fill(block: ci.Block) -> None:
        block.data[...] = block.inputs[0]

    stages = [ci.map_cells(copied, image, dtype=int, cell_shape=5)]
    for _ in range(70):
        same = ci.Input(stages[-1], index_map=lambda roi: roi)
        stages.append(ci.fill_cells(fill, grid, same, dtype=int))
    np.testing.assert_array_equal(stages[-1].load(100), np.arange(500, 505))
    assert [stage.stats().loads for stage in stages] == [1] * 71


def test_a_cell_of_a_long_chain_needs_nothing_further_up_than_what_is_held():
    image = np.arange(40)
    stages = chain(image, 70, (5,))
    expected = stages[-1][:]
    for stage in stages[:-2]:
        stage.loader.shelf.invalidate(None)  # As if it had been evicted.
    stages[-1].loader.shelf.invalidate({3})
    loads = [stage.stats().loads for stage in stages]
    np.testing.assert_array_equal(stages[-1][:], expected)
    loads[-1] += 1
    assert [stage.stats().loads for stage in stages] == loads


def test_an_error_in_a_cell_that_is_not_needed_does_not_reach_a_long_chain():
    def broken(block: np.ndarray) -> np.ndarray:
        if 500 in block:
            raise ZeroDivisionError
        return block.copy()

    stages = [ci.map_cells(broken, np.arange(1000), dtype=int, cell_shape=5)]
    stages += maxima(stages[0], 70, "wrap", mode="wrap")
    np.testing.assert_array_equal(stages[-1][75:100], np.arange(145, 170))
    np.testing.assert_array_equal(stages[-1][0:5], [999] * 5)


def test_a_block_function_of_a_long_chain_may_read_another_long_chain():
    image = np.arange(20)
    other = chain(image, 300, (5,))[-1]

    def f(block: np.ndarray) -> np.ndarray:
        return block + other[:5].sum()

    last = ci.map_cells(f, chain(image, 30, (5,))[-1], dtype=int)
    expected = chain_expected(image, 30) + chain_expected(image, 300)[:5].sum()
    np.testing.assert_array_equal(last[:], expected)


def test_a_change_in_the_middle_of_a_long_chain_is_no_error():
    """What was loaded from below is forgotten again while what is above is on its way."""
    image = np.arange(20)
    source = ci.map_cells(copied, image, dtype=np.int64, cell_shape=5)
    changes = iter(range(100, 105))

    def paint(block: np.ndarray) -> np.ndarray:
        for value in changes:
            image[7] = value
            source.invalidate(np.s_[7:8])
        return block.copy()

    lower = chain(source, 130, (5,))
    middle = ci.map_cells(paint, lower[-1], dtype=np.int64)
    last = chain(middle, 130, (5,))[-1]
    last[:]
    np.testing.assert_array_equal(last[:], chain_expected(image, 260))


def test_invalidating_a_very_deep_chain_needs_no_stack():
    image = np.arange(20)
    stages = chain(image, 2000, (5,))
    stages[-1].loader.shelf.get(0, lambda _: np.zeros(5))
    stages[0].invalidate()
    assert stages[-1].peek(0) is None


# ------------------------------------------------------------------------------ invalidate

FILTERS = {
    "none": "nearest",
    "symmetric": "reflect",
    "reflect": "mirror",
    "edge": "nearest",
    "wrap": "wrap",
}


def copied(block: np.ndarray) -> np.ndarray:
    return block.copy()


@given(data=st.data())
@settings(max_examples=80)
def test_after_a_change_and_invalidate_everything_is_as_computed_from_scratch(data):
    boundary = data.draw(st.sampled_from(sorted(FILTERS)))
    mode = FILTERS[boundary]
    shape = tuple(data.draw(st.lists(st.integers(3, 12), min_size=1, max_size=2)))
    sizes = [data.draw(st.integers(2, 7)) for _ in range(3)]
    radii = [data.draw(st.integers(0, 4)) for _ in range(2)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = rng.integers(0, 1000, shape)
    cache = ci.CellCache(data.draw(st.sampled_from([1000, 1 << 20])))

    source = ci.map_cells(copied, image, dtype=image.dtype, cell_shape=sizes[0], cache=cache)
    stages = [source]
    for size, radius in zip(sizes[1:], radii, strict=True):
        stages.append(
            ci.map_cells(
                ndi.maximum_filter,
                stages[-1],
                dtype=image.dtype,
                halo=radius,
                boundary=boundary,
                cell_shape=size,
                params={"size": 2 * radius + 1, "mode": mode},
                cache=cache,
            )
        )

    def scratch() -> Iterator[np.ndarray]:
        result = image
        yield result
        for radius in radii:
            result = ndi.maximum_filter(result, 2 * radius + 1, mode=mode)
            yield result

    for _ in range(4):
        # Downstream first, so that each image is read as the one before left it.
        for stage, expected in reversed(list(zip(stages, scratch(), strict=True))):
            np.testing.assert_array_equal(stage[...], expected)
        start = [data.draw(st.integers(0, n - 1)) for n in shape]
        stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)]
        roi = ci.Roi(start, stop)
        image[roi.slices] = rng.integers(0, 1000, roi.shape)
        source.invalidate(roi)


@given(data=st.data())
@settings(max_examples=80)
def test_an_image_that_reads_a_changed_array_with_a_halo_is_as_computed_from_scratch(data):
    """The region is that of the change; who reads it from further away is found."""
    boundary = data.draw(st.sampled_from(sorted(FILTERS)))
    radius, factor = data.draw(st.integers(0, 6)), data.draw(st.sampled_from([1, 1, 2, 3]))
    length, cell = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 8))
    image = np.random.default_rng(length).integers(0, 1000, length)
    params = {"size": 2 * radius + 1, "mode": FILTERS[boundary]}
    img = ci.map_cells(
        lambda block: ndi.maximum_filter1d(block, **params)[::factor],
        image,
        dtype=image.dtype,
        halo=radius,
        boundary=boundary,
        cell_shape=cell,
        shrink=factor,
    )
    for value in range(3):
        expected = ndi.maximum_filter1d(image, **params)[::factor]
        np.testing.assert_array_equal(img[:], expected)
        low = data.draw(st.integers(0, img.shape[0] - 1))
        high = data.draw(st.integers(low + 1, img.shape[0]))
        # The voxels that lie under the region of the image.
        image[low * factor : high * factor] = 2000 * value
        img.invalidate(np.s_[low:high])


def test_the_name_that_dask_sees_changes_after_the_cells_were_forgotten(monkeypatch):
    """Under a new name nothing old may be computed, for a scheduler keeps what has a name."""
    source = ci.map_cells(copied, np.arange(8), dtype=int, cell_shape=4)
    later = ci.map_cells(np.negative, source)
    names: list[tuple[str, str]] = []
    for img in (source, later):
        shelf = img.loader.shelf
        invalidate = shelf.invalidate

        def noted(*args: Any, invalidate: Callable[..., None] = invalidate) -> None:
            names.append((source.to_dask().name, later.to_dask().name))
            invalidate(*args)
            names.append((source.to_dask().name, later.to_dask().name))

        monkeypatch.setattr(shelf, "invalidate", noted)
    before = (source.to_dask().name, later.to_dask().name)
    source.invalidate(np.s_[0:1])
    after = (source.to_dask().name, later.to_dask().name)
    assert before[0] != after[0]
    assert before[1] != after[1]
    # Until then everybody sees what was before, of both images.
    assert names == [before] * 4


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_invalidate_while_a_load_downstream_is_running_leaves_nothing_stale(pool, distance):
    """A computation that has read old voxels, far down a chain, is not kept when it ends."""
    image = np.arange(12)
    source = ci.map_cells(copied, image, dtype=image.dtype, cell_shape=4)
    stage = source
    for _ in range(distance - 1):
        stage = ci.map_cells(np.negative, stage)
    gate = Gate(np.negative)
    last = ci.map_cells(gate, stage, dtype=image.dtype, halo=1)
    beyond = ci.map_cells(np.negative, last)
    sign = (-1) ** distance

    running = pool.submit(lambda: beyond[0:4])
    assert gate.began.wait(PATIENCE_S)
    image[2:6] = 100
    source.invalidate(np.s_[2:6])
    gate.go_on.set()
    running.result(PATIENCE_S)

    assert last.peek(0) is None
    assert beyond.peek(0) is None
    np.testing.assert_array_equal(last[:], sign * image)
    np.testing.assert_array_equal(beyond[:], -sign * image)


def test_invalidate_while_a_load_waits_for_an_old_one_leaves_nothing_stale(pool):
    """Downstream joined an upstream load that began before the change."""
    image = np.arange(12)
    gate = Gate(copied)
    source = ci.map_cells(gate, image, dtype=image.dtype, cell_shape=4)
    later = [ci.map_cells(np.negative, source) for _ in range(3)]
    running = [pool.submit(stage.load, 1) for stage in later]
    assert gate.began.wait(PATIENCE_S)
    image[5] = 100
    source.invalidate(np.s_[5:6])
    # Asked for after the change, so it must be new although the old load has not ended.
    gate.go_on.set()
    for future in running:
        future.result(PATIENCE_S)
    for stage in later:
        np.testing.assert_array_equal(stage[:], -image)


def test_who_asks_after_invalidate_does_not_get_the_load_that_began_before(pool):
    image = np.arange(4)
    gate = Gate(copied)
    source = ci.map_cells(gate, image, dtype=image.dtype, cell_shape=4)
    later = ci.map_cells(np.negative, source)
    old = pool.submit(later.load, 0)
    assert gate.began.wait(PATIENCE_S)
    image[0] = 50
    source.invalidate()
    gate.function = copied
    new = pool.submit(later.load, 0)
    gate.go_on.set()
    assert new.result(PATIENCE_S)[0] == -50
    assert old.result(PATIENCE_S)[0] == 0
    assert later[0] == -50


def test_a_read_past_the_cache_publishes_nothing(pool):
    """A region of more than half of the budget goes past the cache, old or new."""
    image = np.arange(64)
    cache = ci.CellCache(600)
    gate = Gate(np.negative)
    img = ci.map_cells(gate, image, dtype=image.dtype, cell_shape=8, cache=cache)
    running = pool.submit(lambda: img[:])
    assert gate.began.wait(PATIENCE_S)
    image[:] = 7
    img.invalidate()
    gate.go_on.set()
    running.result(PATIENCE_S)
    assert cells_held(img) == set()
    assert cache.bytes == 0
    np.testing.assert_array_equal(img[:], -image)


def test_a_read_past_the_cache_takes_what_is_held():
    calls: list[int] = []

    def f(block: np.ndarray) -> np.ndarray:
        calls.append(int(block[0]))
        return -block

    image = np.arange(64)
    img = ci.map_cells(f, image, dtype=image.dtype, cell_shape=8, cache=ci.CellCache(600))
    img[8:24]
    assert calls == [8, 16]
    np.testing.assert_array_equal(img[:], -image)
    assert sorted(calls) == [0, 8, 16, 24, 32, 40, 48, 56]
    assert cells_held(img) == {1, 2}
    stats = img.stats()
    assert (stats.loads, stats.misses) == (8, 8)


def test_an_image_defined_while_another_is_invalidated_is_not_left_stale(monkeypatch, pool):
    """Neither does it read an old cell, nor is it missing when the walk looks for images."""
    image = np.arange(12)
    source = ci.map_cells(copied, image, dtype=image.dtype, cell_shape=4)
    middle = ci.map_cells(np.negative, source)
    middle[:]
    late: list[Future[ci.CellImg]] = []
    affected = node_module.affected_cells

    def meanwhile(*args: Any) -> Any:
        if not late:
            late.append(pool.submit(ci.map_cells, np.negative, middle))
        return affected(*args)

    monkeypatch.setattr(node_module, "affected_cells", meanwhile)
    image[5] = 100
    source.invalidate(np.s_[5:6])
    np.testing.assert_array_equal(middle[:], -image)
    img = late[0].result(PATIENCE_S)
    np.testing.assert_array_equal(img[:], image)
    image[5] = 200
    source.invalidate(np.s_[5:6])
    np.testing.assert_array_equal(img[:], image)


def test_images_may_be_defined_while_another_is_invalidated(pool):
    """Many definitions against many walks over the images downstream."""
    source = ci.map_cells(copied, np.arange(12), dtype=int, cell_shape=4)
    kept = [ci.map_cells(np.negative, source) for _ in range(50)]
    stop = threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def define() -> None:
        while not stop.is_set():
            kept[0] = ci.map_cells(np.negative, source)

    try:
        running = [pool.submit(define) for _ in range(2)]
        for _ in range(100):
            source.invalidate(np.s_[0:1])
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    for future in running:
        future.result(PATIENCE_S)


def test_an_index_map_may_read_an_image_while_that_is_invalidated():
    """It is the user's code, so no lock may be held when it is called."""
    cache = ci.CellCache(1 << 20)
    source = ci.map_cells(copied, np.arange(8), dtype=int, cell_shape=4, cache=cache)
    table = ci.map_cells(copied, np.array([4, 0]), dtype=int, cell_shape=1, cache=cache)

    def swap(roi: ci.Roi) -> ci.Roi:
        start = int(table[roi.start[0] // 4])
        return ci.Roi((start,), (start + 4,))

    def fill(block: ci.Block) -> None:
        block.data[...] = block.inputs[0]

    grid = ci.CellGrid((8,), 4)
    img = ci.fill_cells(fill, grid, ci.Input(source, index_map=swap), dtype=int, cache=cache)
    np.testing.assert_array_equal(img[:], [4, 5, 6, 7, 0, 1, 2, 3])
    thread = threading.Thread(target=source.invalidate, args=(np.s_[0:1],), daemon=True)
    thread.start()
    thread.join(3)
    assert not thread.is_alive(), "invalidate calls the index map with the cache's lock held"
    assert cells_held(img) == {0}


def test_a_dropped_image_downstream_is_no_longer_notified():
    source = ci.map_cells(copied, np.arange(8), dtype=int, cell_shape=4)
    later = ci.map_cells(np.negative, source)
    assert source.node.dependents == [later.node]
    del later
    gc.collect()
    assert not source.node.dependents
    source.invalidate()


# ----------------------------------------------------------------------------------- stores


def test_changed_chunks_of_a_store_are_decoded_again_after_invalidate(tmp_path):
    store = zarr.open_array(
        tmp_path / "a.zarr", mode="w", shape=(20, 20), chunks=(6, 5), dtype="i4"
    )
    store[...] = np.arange(400).reshape(20, 20)
    img = ci.map_cells(np.negative, store, cell_shape=(7, 8))
    smooth = ci.map_cells(
        ndi.maximum_filter, img, dtype="i4", halo=1, boundary="none", params={"size": 3}
    )
    np.testing.assert_array_equal(smooth[...], ndi.maximum_filter(-store[...], 3))

    store[3:9, 11:14] = 5000
    expected = ndi.maximum_filter(-store[...], 3)
    assert not np.array_equal(smooth[...], expected), "nobody has said that it changed"
    img.invalidate(np.s_[3:9, 11:14])
    np.testing.assert_array_equal(img[...], -store[...])
    np.testing.assert_array_equal(smooth[...], expected)


def test_changed_chunks_are_decoded_again_where_the_region_has_a_halo(tmp_path):
    """The cells of the region read beyond it, so more chunks than those of the region."""
    store = zarr.open_array(tmp_path / "a.zarr", mode="w", shape=(30,), chunks=(3,), dtype="i4")
    store[...] = np.arange(30)
    for boundary, mode in FILTERS.items():
        img = ci.map_cells(
            ndi.maximum_filter,
            store,
            dtype="i4",
            halo=4,
            boundary=boundary,
            cell_shape=5,
            params={"size": 9, "mode": mode},
        )
        np.testing.assert_array_equal(img[:], ndi.maximum_filter(store[:], 9, mode=mode))
        store[...] = (store[:] * 7 + 11) % 31
        img.invalidate(np.s_[10:20])
        np.testing.assert_array_equal(img[10:20], ndi.maximum_filter(store[:], 9, mode=mode)[10:20])
        img.invalidate()


class CountingStore:
    """An array with chunks that counts how often each is decoded."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...]) -> None:
        self.array, self.chunks = array, chunks
        self.shape, self.dtype = array.shape, array.dtype
        self.decoded: list[tuple[int, ...]] = []

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        self.decoded.append(tuple(part.start for part in box))
        return self.array[box]


def test_only_the_chunks_that_the_region_reads_are_decoded_again():
    store = CountingStore(np.arange(144).reshape(12, 12), (3, 3))
    img = ci.map_cells(np.negative, store, cell_shape=4)
    other = ci.map_cells(np.abs, store, cell_shape=12)
    np.testing.assert_array_equal(img[...], -store.array)
    np.testing.assert_array_equal(other[...], store.array)
    assert len(store.decoded) == 16, "each once, for both images"
    store.decoded.clear()
    store.array[5, 5] = -1
    img.invalidate(np.s_[5:6, 5:6])
    np.testing.assert_array_equal(img[...], -store.array)
    # One cell was dropped, 4:8 along both axes; it reads chunks 3:6 and 6:9.
    assert sorted(store.decoded) == [(3, 3), (3, 6), (6, 3), (6, 6)]


def test_a_chunk_being_decoded_when_it_changes_is_not_kept(pool):
    began, go_on = threading.Event(), threading.Event()

    class Slow(CountingStore):
        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            chunk = super().__getitem__(box).copy()
            began.set()
            assert go_on.wait(PATIENCE_S)
            return chunk

    store = Slow(np.arange(8), (4,))
    img = ci.map_cells(np.negative, store, cell_shape=8)
    running = pool.submit(lambda: img[:])
    assert began.wait(PATIENCE_S)
    store.array[0] = 99
    img.invalidate()
    go_on.set()
    running.result(PATIENCE_S)
    np.testing.assert_array_equal(img[:], -store.array)


def test_invalidate_lists_neither_cells_nor_chunks():
    """An image of billions of cells over a chunked store: what is not held costs nothing."""

    class Huge:
        shape = (1 << 20, 1 << 20)
        chunks = (1 << 10, 1 << 10)
        dtype = np.dtype("u1")

        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            return np.zeros([part.stop - part.start for part in box], np.uint8)

    img = ci.map_cells(np.negative, Huge(), cell_shape=1 << 10)
    img[5, 5]
    img.invalidate(np.s_[:1, :1])  # Whatever is built once is built.
    tracemalloc.start()
    try:
        img.invalidate()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A million cells; a list of them would take more than thirty megabytes.
    assert peak < 4e6


# ----------------------------------------------------------------------------------- errors


def test_an_error_is_passed_down_a_chain_as_it_was_raised():
    def broken(block: np.ndarray) -> np.ndarray:
        if block[0] == 4:
            raise ZeroDivisionError("four")
        return block

    source = ci.map_cells(broken, np.arange(8), dtype=int, cell_shape=2)
    stages = [source]
    for _ in range(3):
        stages.append(ci.map_cells(np.negative, stages[-1]))
    with pytest.raises(ci.BlockError, match="four") as caught:
        stages[-1][:]
    error = caught.value
    assert "broken" in error.function
    assert (error.position, error.roi) == ((2,), ci.Roi((4,), (6,)))
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert all(stage.peek(2) is None for stage in stages)
    np.testing.assert_array_equal(stages[-1][:4], [0, -1, -2, -3])


def test_a_store_that_fails_is_a_read_error_that_names_the_cell_and_is_tried_again():
    class Flaky(CountingStore):
        broken = True

        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            if self.broken:
                raise ConnectionError("the network is away")
            return super().__getitem__(box)

    store = Flaky(np.arange(8), (4,))
    img = ci.map_cells(np.negative, store, cell_shape=4)
    with pytest.raises(ci.ReadError, match="the network is away") as caught:
        img[5]
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert caught.value.position == (1,)
    assert caught.value.roi == ci.Roi((4,), (8,))
    store.broken = False
    np.testing.assert_array_equal(img[:], -store.array)


def test_a_cell_that_reads_its_own_image_is_a_cycle_error():
    images: list[ci.CellImg] = []

    def f(block: np.ndarray) -> np.ndarray:
        return block + images[0][int(block[0])]

    images.append(ci.map_cells(f, np.arange(8), dtype=int, cell_shape=4))
    with pytest.raises(ci.CycleError) as caught:
        images[0][:]
    assert caught.value.position in {(0,), (1,)}
    uncached = ci.map_cells(
        lambda block: block + int(uncached[0]), np.arange(8), dtype=int, cell_shape=4, cache=None
    )
    with pytest.raises(ci.CycleError):
        uncached[:]


def test_two_images_that_read_each_other_are_a_cycle_error_from_any_thread(pool):
    images: list[ci.CellImg] = []

    def first(block: np.ndarray) -> np.ndarray:
        return block + images[1][0]

    def second(block: np.ndarray) -> np.ndarray:
        return block + images[0][0]

    images.append(ci.map_cells(first, np.arange(8), dtype=int, cell_shape=4))
    images.append(ci.map_cells(second, np.arange(8), dtype=int, cell_shape=4))
    at_once = threading.Barrier(8)

    def read(number: int) -> BaseException | None:
        at_once.wait(PATIENCE_S)
        try:
            images[number % 2][:]
        except ci.CycleError as error:
            return error
        return None

    assert all(isinstance(error, ci.CycleError) for error in pool.map(read, range(8)))


def test_an_image_is_freed_as_soon_as_nobody_holds_it(make_crew):
    """Loaders hold what is upstream of them, and nothing holds itself in a circle."""
    cache = ci.CellCache(1 << 20)
    source = ci.map_cells(copied, np.arange(8), dtype=int, cell_shape=4, cache=cache)
    later = ci.map_cells(np.negative, source, cache=cache)
    crew = make_crew(1)  # A helper may hold on for a moment.
    source.loader.crew = later.loader.crew = lambda: crew
    later[:]
    upstream: weakref.ref[CellLoader] = weakref.ref(source.loader)
    del source
    assert upstream() is not None
    gc.disable()
    try:
        del later
        assert upstream() is None
        assert cache.bytes == 0
    finally:
        gc.enable()
