"""A source behaves as the NumPy array that it stands for, in memory and in a store."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cellimg_dask as ci
from cellimg_dask.state.pages import Pages

PATIENCE_S = 20


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Return any index that NumPy takes for assignment."""
    kinds = ["basic"]
    if shape and 0 not in shape:
        kinds += ["mask", "integers", "mixed", "first axis"]
    kind = draw(st.sampled_from(kinds))
    if kind == "basic":
        return draw(hnp.basic_indices(shape, allow_ellipsis=True))
    if kind == "mask":
        return draw(hnp.arrays(bool, shape))
    if kind == "integers":
        return draw(hnp.integer_array_indices(shape))
    if kind == "first axis":
        return draw(hnp.arrays(bool, shape[:1]))
    axis = draw(st.integers(0, len(shape) - 1))
    picked = draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), max_size=4))
    return (*(slice(None),) * axis, np.array(picked, dtype=int))


@st.composite
def sources(draw: st.DrawFn) -> tuple[np.ndarray, ci.Source]:
    shape = draw(shapes())
    array = np.arange(np.prod(shape, dtype=int), dtype="i4").reshape(shape)
    cells = tuple(draw(st.integers(1, 5)) for _ in shape)
    return array, ci.Source(array, cells)


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_reading_and_writing_by_any_index_is_as_in_numpy(data):
    array, source = data.draw(sources())
    expected = array.copy()
    changes: list[ci.Change] = []
    watch = source.on_dirty(changes.append)
    assert watch is not None
    for step in range(data.draw(st.integers(1, 3))):
        key = data.draw(indices(array.shape))
        np.testing.assert_array_equal(source[key], expected[key], strict=True)
        part = expected[key]
        value: Any = -1 - step
        if data.draw(st.booleans()):
            value = -np.arange(1, 1 + part.size, dtype="i4").reshape(part.shape)
            if part.ndim and data.draw(st.booleans()):
                value = value[:1] if part.shape[0] else value
        written = np.zeros(expected.shape, bool)
        written[key] = True
        expected[key] = value
        changes.clear()
        with source.edit() as edit:
            edit[key] = value
            np.testing.assert_array_equal(edit[...], expected)
        np.testing.assert_array_equal(np.asarray(source), expected, strict=True)
        cells = {
            source.grid.index(tuple(v // c for v, c in zip(voxel, source.cell_shape, strict=True)))
            for voxel in np.argwhere(written)
        }
        assert [set(change.cells) for change in changes] == ([cells] if cells else [])
    assert array.sum() == np.arange(array.size).sum(), "the array that was given was written to"


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pages_are_a_mapping_that_never_changes(data):
    expected: dict[int, int] = {}
    pages = Pages()
    older: list[tuple[Pages, dict[int, int]]] = []
    for _ in range(5):
        items = data.draw(st.dictionaries(st.integers(0, 3000), st.integers()))
        older.append((pages, dict(expected)))
        pages = pages.replaced(items)
        expected.update(items)
        assert dict(pages) == expected
        assert len(pages) == len(expected)
        for index in [*items, 5000]:
            assert pages.get(index) == expected.get(index)
            assert (index in pages) == (index in expected)
    for mapping, items in older:
        assert dict(mapping) == items


def test_what_is_written_is_cast_as_numpy_casts_it():
    source = ci.Source(np.zeros(4, "u1"))
    with source.edit() as a:
        a[:2] = 1.9
        a[2] = True
    np.testing.assert_array_equal(source[:], [1, 1, 1, 0])
    with pytest.raises((TypeError, ValueError)), source.edit() as a:
        a[0] = "x"
    with pytest.raises(ValueError, match=r"shape \(3,\) .* shape \(2,\)"), source.edit() as a:
        a[:2] = [1, 2, 3]


@pytest.mark.parametrize("key", [4, -5, (0, 0), np.array([4]), (slice(None), 1)])
def test_an_index_outside_is_an_error_and_changes_nothing(key):
    source = ci.Source(np.arange(4))

    def edit() -> None:
        with source.edit() as a:
            a[0] = 9
            a[key] = 1

    with pytest.raises(IndexError):
        edit()
    np.testing.assert_array_equal(source[:], range(4))


def test_an_exception_inside_discards_the_whole_edit():
    source = ci.Source(np.arange(6), cell_shape=2)
    image = ci.map_cells(np.negative, source)
    before = image[:]
    changes: list[ci.Change] = []
    watch = image.on_dirty(changes.append)

    def edit() -> None:
        with source.edit() as a:
            a[:3] = 0
            a[4] = 1 // 0

    with pytest.raises(ZeroDivisionError):
        edit()
    assert watch
    assert not changes
    np.testing.assert_array_equal(source[:], range(6))
    np.testing.assert_array_equal(image[:], before)
    assert image.stats().loads == 3


def test_an_edit_shows_what_it_wrote_and_everybody_else_what_was_before():
    source = ci.Source(np.arange(6), cell_shape=2)
    image = ci.map_cells(np.negative, source)
    with source.edit() as a:
        a[1:3] = [10, 20]
        a += 1
        np.multiply(a, 2, out=a)
        a[a[:] > 40] = 0
        np.testing.assert_array_equal(a[:], [2, 22, 0, 8, 10, 12])
        np.testing.assert_array_equal(np.asarray(a), a[:])
        assert (a + 1)[0] == 3
        np.testing.assert_array_equal(source[:], range(6))
        np.testing.assert_array_equal(image[:], -np.arange(6))
    np.testing.assert_array_equal(image[:], -np.array([2, 22, 0, 8, 10, 12]))
    with pytest.raises(ValueError, match="the edit is over"):
        a[0] = 1


def test_an_edit_that_writes_nothing_changes_nothing():
    source = ci.Source(np.arange(6), cell_shape=2)
    changes: list[ci.Change] = []
    watch = source.on_dirty(changes.append)
    with source.edit() as a:
        a[3:3] = 5
        a[np.zeros(6, bool)] = 7
    assert watch
    assert not changes


def test_edits_of_several_threads_follow_one_another(pool):
    source = ci.Source(np.zeros(8, int), cell_shape=2)

    def add() -> None:
        for _ in range(25):
            with source.edit() as a:
                a[...] += 1

    for future in [pool.submit(add) for _ in range(4)]:
        future.result(PATIENCE_S)
    np.testing.assert_array_equal(source[:], 100)


def test_the_same_source_cannot_be_edited_inside_an_edit_and_goes_on_to_work():
    source = ci.Source(np.zeros(8, int), cell_shape=2)

    def edit_in_an_edit() -> None:
        with source.edit() as a:
            a[0] = 1
            source[1] = 1

    with pytest.raises(ci.CycleError):
        edit_in_an_edit()
    with source.edit() as a:
        a[0] = 2
    assert source[0] == 2


def test_a_source_looks_like_an_array(tmp_path):
    source = ci.Source(np.zeros((5, 6), ">f4"), cell_shape=(2, 3))
    assert (source.shape, source.ndim, source.size, source.nbytes) == ((5, 6), 2, 30, 120)
    assert source.dtype == np.dtype("f4")
    assert source.dtype.isnative
    assert source.chunks == ((2, 2, 1), (3, 3))
    assert len(source) == 5
    assert source.num_unsaved == 0
    assert "(5, 6), float32" in repr(source)
    assert ci.map_cells(np.negative, source).cell_shape == (2, 3)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(source)
    with pytest.raises(TypeError, match="without axes"):
        len(ci.Source(np.zeros(())))


def test_an_image_of_a_source_can_be_pickled_and_is_a_snapshot():
    source = ci.Source(np.arange(6), cell_shape=2)
    image = ci.map_cells(np.negative, source)
    source[1] = 7
    copy = pickle.loads(pickle.dumps(image))
    source[1] = 8
    np.testing.assert_array_equal(copy[:], [0, -7, -2, -3, -4, -5])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ci.Source("a.zarr"), TypeError, "open the file first"),
        (lambda: ci.Source(np.ma.masked_equal([1, 2], 1)), TypeError, "filled"),
        (lambda: ci.Source(np.array([object()])), TypeError, "object"),
        (lambda: ci.Source(np.zeros(4), cell_shape=0), ValueError, "cell_shape"),
        (lambda: ci.Source(np.zeros(4), save="never"), ValueError, "at once"),
        (lambda: ci.Source(np.zeros(4), cache=7), TypeError, "CellCache"),
        (lambda: ci.Source(ci.map_cells(np.negative, np.zeros(4))), TypeError, "invalidate"),
    ],
)
def test_bad_input_is_told_in_words(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ------------------------------------------------------------------------------- in a store


@pytest.fixture
def stored(tmp_path):
    array = zarr.create_array(tmp_path / "a.zarr", shape=(20, 30), chunks=(5, 10), dtype="i4")
    array[...] = np.arange(600).reshape(20, 30)
    return array


def test_an_edit_of_a_store_is_in_the_store_when_it_returns(stored):
    expected = stored[...]
    source = ci.Source(stored)
    image = ci.map_cells(np.negative, source)
    np.testing.assert_array_equal(image[...], -expected)
    for key, value in [(np.s_[3:9, 4], 7), (np.s_[::7], -1), (([1, 19], [2, 29]), [5, 6])]:
        with source.edit() as a:
            a[key] = value
        expected[key] = value
        np.testing.assert_array_equal(stored[...], expected)
        np.testing.assert_array_equal(image[...], -expected)
        np.testing.assert_array_equal(source[...], expected)
    assert source.num_unsaved == 0


def test_only_the_chunks_that_were_written_are_written(stored, tmp_path):
    source = ci.Source(stored)
    files = sorted((tmp_path / "a.zarr" / "c").rglob("*"))
    before = {path: path.stat().st_mtime_ns for path in files if path.is_file()}
    with source.edit() as a:
        a[0, 0] = 5
    changed = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert changed == [tmp_path / "a.zarr" / "c" / "0" / "0"]


def test_stores_of_other_kinds(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("a", data=np.arange(12.0).reshape(3, 4), chunks=(2, 2))
        with ci.Source(dataset) as source:
            source[1, 1:3] = 9
        assert dataset[1].tolist() == [4, 9, 9, 7]
    mapped = np.memmap(tmp_path / "a.raw", "f4", "w+", shape=(8, 8))
    source = ci.Source(mapped, cell_shape=4)
    source[2:6, 2] = 3
    np.testing.assert_array_equal(mapped[:, 2], [0, 0, 3, 3, 3, 3, 0, 0])
    with pytest.raises(ValueError, match="reading only"):
        ci.Source(np.memmap(tmp_path / "a.raw", "f4", "r", shape=(8, 8)))


def test_a_store_that_is_open_for_reading_only_is_refused(tmp_path, stored):
    with pytest.raises(ValueError, match=r"mode='r\+'"):
        ci.Source(zarr.open_array(tmp_path / "a.zarr", mode="r"))


def test_cells_must_be_whole_chunks(stored):
    assert ci.Source(stored, cell_shape=(10, 30)).cell_shape == (10, 30)
    with pytest.raises(ValueError, match="two cells would share a chunk"):
        ci.Source(stored, cell_shape=(7, 10))


def test_what_is_written_later_is_seen_at_once_and_saved_by_persist(tmp_path):
    source = ci.Source.empty((6, 6), "i2", (2, 6), store=tmp_path / "b.zarr", fill_value=-1)
    image = ci.map_cells(np.negative, source)
    assert (image[...] == 1).all()
    source[3] = 5
    assert source.num_unsaved == 1
    assert (image[3] == -5).all()
    on_disk = zarr.open_array(tmp_path / "b.zarr", mode="r")
    assert (on_disk[...] == -1).all()
    source.persist()
    assert source.num_unsaved == 0
    assert (on_disk[3] == 5).all()
    np.testing.assert_array_equal(source[...], on_disk[...])
    source[0] = 6
    source.close()
    assert (on_disk[0] == 6).all()
    with pytest.raises(ValueError, match="closed"):
        source[0] = 7
    assert (source[0] == 6).all()


def test_a_store_that_exists_is_not_overwritten(tmp_path):
    ci.Source.empty((6,), "i2", store=tmp_path / "b.zarr").close()
    with pytest.raises(FileExistsError, match=r"zarr\.open_array"):
        ci.Source.empty((6,), "i2", store=tmp_path / "b.zarr")


def test_a_dropped_source_is_saved(tmp_path):
    source = ci.Source.empty((6,), "i2", store=tmp_path / "b.zarr")
    source[2] = 4
    del source
    gc.collect()
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "b.zarr")[...], [0, 0, 4, 0, 0, 0])


def test_a_source_is_saved_when_python_ends(tmp_path):
    program = f"""
        import cellimg_dask as ci
        source = ci.Source.empty((6,), "i2", 2, store={str(tmp_path / "b.zarr")!r})
        source[1:5] = 4
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "b.zarr")[...], [0, 4, 4, 4, 4, 0])


def test_an_array_much_larger_than_the_cache_is_written_cell_by_cell(tmp_path):
    """20 million float32 through a cache of two cells."""
    extent, cell = 20_000_000, 500_000
    cache = ci.CellCache(2 * cell * 4)
    source = ci.Source.empty((extent,), "f4", (cell,), store=tmp_path / "b.zarr", cache=cache)
    most = 0
    for low in range(0, extent, cell):
        with source.edit() as a:
            a[low : low + cell] = np.arange(low, low + cell, dtype="f4") % 1021
        most = max(most, source.num_unsaved)
        assert cache.bytes <= cache.max_bytes
    assert most <= 2
    source.close()
    again = ci.Source(zarr.open_array(tmp_path / "b.zarr"), cache=cache)
    for low in range(0, extent, cell):
        np.testing.assert_array_equal(
            again[low : low + cell], np.arange(low, low + cell, dtype="f4") % 1021
        )


class Full:
    """A store on a disk that can be full."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, array.chunks
        self.full = False
        self.gate: threading.Event | None = None

    def __getitem__(self, key: Any) -> Any:
        return self.array[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        if self.full:
            raise OSError(28, "No space left on device")
        self.array[key] = value


@pytest.fixture
def disk(tmp_path):
    array = zarr.create_array(tmp_path / "b.zarr", shape=(40,), chunks=(4,), dtype="i4")
    return Full(array)


def test_a_full_disk_is_an_error_and_nothing_is_lost(disk):
    cache = ci.CellCache(2 * 4 * 4)
    source = ci.Source(disk, cache=cache, save="later")
    expected = np.zeros(40, int)
    told: list[tuple[str, type]] = []
    for low in range(0, 40, 4):
        disk.full = low >= 16
        try:
            source[low : low + 4] = low
        except ci.SaveError as error:
            told.append((str(error), type(error.__cause__)))
        else:
            expected[low : low + 4] = low
        np.testing.assert_array_equal(source[:], expected)
        assert source.num_unsaved <= 2
    assert len(told) >= 4
    assert all("No space left" in text and kind is OSError for text, kind in told)
    for _ in range(2):
        with pytest.raises(ci.SaveError, match=r"persist\(\)"):
            source.persist()
    assert source.num_unsaved > 0
    with pytest.raises(ci.SaveError):
        source.close()
    disk.full = False
    source[36:] = 36
    expected[36:] = 36
    source.close()
    np.testing.assert_array_equal(disk.array[:], expected)
    np.testing.assert_array_equal(source[:], expected)


def test_an_edit_that_could_not_be_saved_at_once_is_kept(disk):
    source = ci.Source(disk)
    image = ci.map_cells(np.negative, source)
    disk.full = True
    with pytest.raises(ci.SaveError):
        source[3:6] = 5
    assert source.num_unsaved == 2
    np.testing.assert_array_equal(image[:8], [0, 0, 0, -5, -5, -5, 0, 0])
    disk.full = False
    source.persist()
    assert source.num_unsaved == 0
    np.testing.assert_array_equal(disk.array[:8], [0, 0, 0, 5, 5, 5, 0, 0])


def test_a_slow_disk_keeps_nobody_from_reading(disk, pool):
    """Reading waits for no write, neither of what is written nor of what is not."""
    source = ci.Source(disk, save="later")
    image = ci.map_cells(np.negative, source)
    source[:8] = 3
    disk.gate = threading.Event()
    saving = pool.submit(source.persist)
    np.testing.assert_array_equal(
        pool.submit(lambda: image[:]).result(PATIENCE_S)[:9], [-3] * 8 + [0]
    )
    source[5] = 4
    assert source[5] == 4
    disk.gate.set()
    saving.result(PATIENCE_S)
    source.persist()
    np.testing.assert_array_equal(disk.array[:9], [3, 3, 3, 3, 3, 4, 3, 3, 0])


def test_several_threads_write_back_and_read(disk, pool):
    cache = ci.CellCache(3 * 4 * 4)
    source = ci.Source(disk, cache=cache, save="later")
    image = ci.map_cells(np.negative, source, cache=cache)

    def write(number: int) -> None:
        for step in range(20):
            with source.edit() as a:
                a[number::4] = step

    def read() -> None:
        for _ in range(40):
            whole = image[:]
            # Each edit writes all of one remainder.
            assert all(len(set(whole[number::4])) == 1 for number in range(4))

    tasks = [pool.submit(write, number) for number in range(2)]
    tasks += [pool.submit(read) for _ in range(2)]
    for task in tasks:
        task.result(PATIENCE_S)
    source.close()
    np.testing.assert_array_equal(disk.array[:4], [19, 19, 0, 0])
    np.testing.assert_array_equal(image[:], -disk.array[:])


def test_reading_a_store_while_it_is_edited_gives_one_edition(disk):
    source = ci.Source(disk)
    real = disk.array

    class Edits:
        """What is read first changes what is read afterwards."""

        def __getitem__(self, key):
            disk.array = real
            source[...] = 5
            return np.zeros_like(real[key])

    disk.array = Edits()
    np.testing.assert_array_equal(source[:], 5)


def test_a_snapshot_of_a_store_that_changed_is_an_error_that_says_so(stored):
    source = ci.Source(stored)
    image = ci.map_cells(np.negative, source)
    snapshot = image.snapshot()
    lazy = image.to_dask()
    image[:5, :10]
    source[7, 3] = 1
    # What was in memory, or has not changed, is as it was.
    np.testing.assert_array_equal(snapshot[:5], -np.arange(150).reshape(5, 30))
    for read in (lambda: snapshot[5:10, :10], lambda: lazy[5:10, :10].compute()):
        with pytest.raises(ci.SourceChangedError, match="has changed since"):
            read()
    assert image[7, 3] == -1


def test_the_folder_is_where_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ci.Source.empty((4,), "u1", store="c.zarr") as source:
        source[1] = 3
    assert Path("c.zarr/zarr.json").is_file()
