"""Keys of cells: exactly those change whose cells would be computed differently."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.loading.content import ContentKeys

SHAPE, CELLS = (20, 30), (8, 8)


def twice(a, by=2):
    return a * by


def keys_of(img: ci.CellImg) -> list[str]:
    keys = ContentKeys(img.loader)
    found = [keys.key(index) for index in range(img.grid.num_cells)]
    assert len(set(found)) == len(found)
    assert [keys.key_now(index) for index in range(len(found))] == found
    assert all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in found)
    return found


def differing(before: list[str], after: list[str]) -> set[int]:
    assert len(before) == len(after)
    return {number for number, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}


def reading(img: ci.CellImg, voxel: tuple[int, ...]) -> set[int]:
    """Return the cells whose box, grown by the halo within the image, holds a voxel."""
    found = set()
    for index in range(img.grid.num_cells):
        plan = img.loader.plan(index)
        for box in plan.boxes(0):
            if all(part.start <= at < part.stop for part, at in zip(box, voxel, strict=True)):
                found.add(index)
    return found


@pytest.fixture
def image(rng):
    return rng.integers(0, 99, SHAPE)


# ---------------------------------------------------------------- the definition


def define(image, **changes: Any) -> ci.CellImg:
    options: dict[str, Any] = {
        "f": twice,
        "halo": 1,
        "boundary": "constant",
        "fill_value": 0,
        "dtype": image.dtype,
        "cell_shape": CELLS,
        "params": {"by": 2},
    }
    options.update(changes)
    return ci.map_cells(options.pop("f"), image, **options)


DEFINITIONS: dict[str, dict[str, Any]] = {
    "function": {"f": lambda a, by: a + by},
    "param": {"params": {"by": 3}},
    "kind of a param": {"params": {"by": 2.0}},
    "no param": {"params": None},
    "halo": {"halo": 2},
    "halo on one side": {"halo": ((1, 2), (1, 1))},
    "boundary": {"boundary": "reflect"},
    "fill_value": {"fill_value": 7},
    "dtype": {"dtype": "float64"},
    "cell_shape": {"cell_shape": (8, 7)},
    "version": {"version": "1"},
}


@pytest.mark.parametrize("what", DEFINITIONS)
def test_every_part_of_the_definition_changes_every_key(image, what):
    before = keys_of(define(image))
    assert keys_of(define(image)) == before
    after = keys_of(define(image, **DEFINITIONS[what]))
    assert not set(before) & set(after)


def test_versions_stand_for_the_function(image):
    one = keys_of(define(image, version="1"))
    # Another function of that name: the version says that it is the same.
    other = define(image, f=lambda a, by: a - by, version="1")
    other.loader.function.name = "twice"
    assert keys_of(other) == one
    assert not set(keys_of(define(image, version="2"))) & set(one)


def test_function_of_blocks_and_function_of_arrays_differ(image):
    def f(a):
        return None

    grid = ci.CellGrid(SHAPE, CELLS)
    one = ci.fill_cells(f, grid, image, dtype=image.dtype)
    two = ci.map_cells(f, image, dtype=image.dtype, cell_shape=CELLS)
    assert not set(keys_of(one)) & set(keys_of(two))


def test_init_of_the_queue_counts_and_its_kind_does_not(image):
    def keys(init, backend="threads"):
        with ci.BlockQueue(1, init, backend) as queue:
            return keys_of(define(image, queue=queue))

    without = keys_of(define(image))
    assert keys(None) == keys(None, "processes") == without
    assert not set(keys("N = 1")) & set(without)
    assert not set(keys("N = 1")) & set(keys("N = 2"))
    assert keys("N = 1") == keys("# one\nN = 1")


def test_nothing_is_computed_and_keys_do_not_depend_on_the_order(image):
    def f(a):
        raise AssertionError("nobody asked for a cell")

    img = ci.map_cells(f, image, dtype=image.dtype, cell_shape=CELLS)
    keys = ContentKeys(img.loader)
    backwards = [keys.key(index) for index in reversed(range(img.grid.num_cells))]
    assert backwards[::-1] == keys_of(img)


def test_many_threads_get_the_same_keys(image):
    chain = define(define(image))
    expected = keys_of(chain)
    keys = ContentKeys(chain.loader)
    start = threading.Barrier(4)

    def ask(turn):
        start.wait(10)
        order = np.random.default_rng(turn).permutation(len(expected))
        return {int(index): keys.key(int(index)) for index in order}

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ask, range(4)):
            assert [found[index] for index in range(len(expected))] == expected


# ---------------------------------------------------------------- NumPy inputs


@given(
    st.tuples(st.integers(0, SHAPE[0] - 1), st.integers(0, SHAPE[1] - 1)),
    st.integers(0, 9),
    st.sampled_from(["none", "constant", "reflect", "wrap", "edge"]),
)
@settings(max_examples=40)
def test_one_voxel_changes_the_keys_of_those_that_read_it(voxel, halo, boundary):
    image = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    img = define(image, halo=halo, boundary=boundary)
    before = keys_of(img)
    image[voxel] += 1
    affected = differing(before, keys_of(img))
    assert affected == reading(img, voxel)
    own = img.grid.index(tuple(v // c for v, c in zip(voxel, CELLS, strict=True)))
    assert own in affected
    image[voxel] -= 1
    assert keys_of(img) == before


def test_the_dtype_of_an_input_counts(image):
    one = define(image.astype("<i4"), dtype="i8")
    assert not set(keys_of(one)) & set(keys_of(define(image.astype(">i4"), dtype="i8")))
    assert not set(keys_of(one)) & set(keys_of(define(image.astype("u4"), dtype="i8")))


def test_each_input_counts(image):
    other = image.copy()
    img = ci.map_cells(np.add, image, ci.Input(other, halo=2), cell_shape=CELLS, dtype=image.dtype)
    before = keys_of(img)
    other[9, 9] += 1
    # The cell at 8 to 16, and those that read it with their halo of 2.
    assert differing(before, keys_of(img)) == {0, 1, 4, 5}
    other[9, 9] -= 1
    image[9, 9] += 1
    assert differing(before, keys_of(img)) == {5}


def test_swapped_inputs_differ(image):
    other = image + 1
    one = ci.map_cells(np.subtract, image, other, cell_shape=CELLS)
    two = ci.map_cells(np.subtract, other, image, cell_shape=CELLS)
    assert not set(keys_of(one)) & set(keys_of(two))


def test_an_input_that_is_broadcast_concerns_every_cell(image):
    row = np.arange(SHAPE[1])
    img = ci.map_cells(np.add, image, row, cell_shape=CELLS)
    before = keys_of(img)
    row[20] += 1
    assert differing(before, keys_of(img)) == {2, 6, 10}


def test_a_version_stands_for_an_input(image):
    def img(version):
        return ci.map_cells(np.negative, ci.Input(image, version=version), cell_shape=CELLS)

    before = keys_of(img("1"))
    image[...] = 5
    assert keys_of(img("1")) == before
    assert not set(keys_of(img("2"))) & set(before)


def test_index_maps_count_by_what_they_are_and_what_they_read(image):
    def img(shift):
        def moved(roi):
            return ci.Roi([n + shift for n in roi.start], [n + shift for n in roi.stop])

        grid = ci.CellGrid((8, 16), 8)
        return ci.fill_cells(
            max, grid, ci.Input(image, index_map=moved), dtype=image.dtype, version="1"
        )

    before = keys_of(img(2))
    assert keys_of(img(2)) == before
    assert not set(keys_of(img(3))) & set(before)
    image[1, 1] += 1
    assert keys_of(img(2)) == before
    image[2, 12] += 1
    assert differing(before, keys_of(img(2))) == {1}


# ---------------------------------------------------------------- stores


def rewrite(array, box, value):
    """Write into a store, as if time went by."""
    root = array.store.root
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    array[box] = value
    for path, stamp in before.items():
        if path.stat().st_mtime_ns != stamp:
            os.utime(path, ns=(stamp + 10**6, stamp + 10**6))


LAYOUTS: dict[str, dict[str, Any]] = {
    "v3": {"chunks": (8, 10)},
    "sharded": {"chunks": (4, 5), "shards": (8, 10)},
    "v2": {"chunks": (8, 10), "zarr_format": 2},
    "uncompressed": {"chunks": (8, 10), "compressors": None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_chunk_changes_the_keys_of_those_that_read_it(tmp_path, image, layout):
    stored = zarr.create_array(tmp_path / "in.zarr", data=image, **LAYOUTS[layout])
    img = define(stored, boundary="none")
    before = keys_of(img)
    # Opened anew by somebody else: the same.
    again = define(zarr.open_array(tmp_path / "in.zarr", mode="r"), boundary="none")
    assert keys_of(again) == before
    rewrite(stored, (slice(8, 16), slice(10, 20)), 5)
    # All that read rows 8 to 15, columns 10 to 19, with a halo of 1: also rows 7 and 16.
    expected = {
        index
        for index in range(img.grid.num_cells)
        for box in img.loader.plan(index).boxes(0)
        if box[0].start < 16 and box[0].stop > 8 and box[1].start < 20 and box[1].stop > 10
    }
    assert differing(before, keys_of(img)) == expected
    assert 0 < len(expected) < img.grid.num_cells
    assert keys_of(again) == keys_of(img)


def test_a_chunk_that_appears_or_goes_is_seen(tmp_path):
    stored = zarr.create_array(tmp_path / "in.zarr", shape=(16,), chunks=(4,), dtype="i4")
    img = ci.map_cells(np.negative, stored, cell_shape=4)
    before = keys_of(img)
    stored[4:8] = 1
    assert differing(before, keys_of(img)) == {1}
    (tmp_path / "in.zarr" / "c" / "1").unlink()
    assert keys_of(img) == before


def test_attributes_of_a_store_do_not_count_but_its_codecs_do(tmp_path, image):
    def keys():
        return keys_of(define(zarr.open_array(tmp_path / "in.zarr", mode="r")))

    stored = zarr.create_array(tmp_path / "in.zarr", data=image, chunks=CELLS)
    before = keys()
    stored.attrs["name"] = "another"
    assert keys() == before
    metadata = tmp_path / "in.zarr" / "zarr.json"
    text = metadata.read_text()
    assert '"fill_value": 0' in text
    metadata.write_text(text.replace('"fill_value": 0', '"fill_value": 1'))
    assert not set(keys()) & set(before)


def test_another_store_of_the_same_look_is_another_input(tmp_path, image):
    keys = []
    for name in ("a.zarr", "b.zarr"):
        stored = zarr.create_array(tmp_path / name, data=image, chunks=CELLS, compressors=None)
        image = image + 1
        for path in (tmp_path / name).rglob("*"):
            # As an archive unpacks them: of the same size and time.
            os.utime(path, (10**9, 10**9))
        keys.append(keys_of(define(stored)))
    assert not set(keys[0]) & set(keys[1])


def test_an_array_in_a_group_and_a_link_to_it(tmp_path, image):
    group = zarr.create_group(tmp_path / "in.zarr")
    stored = group.create_array("deep/er", data=image, chunks=CELLS)
    before = keys_of(define(stored))
    (tmp_path / "link").symlink_to(tmp_path / "in.zarr")
    linked = zarr.open_array(tmp_path / "link" / "deep" / "er", mode="r")
    assert keys_of(define(linked)) == before
    rewrite(stored, (slice(0, 1), slice(0, 1)), 7)
    assert differing(before, keys_of(define(stored, boundary="none", halo=0))) == set(range(12))
    assert len(differing(before, keys_of(define(stored)))) == 4


def test_memory_stores_are_compared_by_their_values(image):
    def stored(values):
        return zarr.create_array(zarr.storage.MemoryStore(), data=values, chunks=CELLS)

    before = keys_of(define(stored(image)))
    assert keys_of(define(stored(image.copy()))) == before
    image[0, 0] += 1
    assert len(differing(before, keys_of(define(stored(image), boundary="none")))) == 12
    assert differing(before, keys_of(define(stored(image)))) == {0, 1, 4, 5}


def test_hdf5_is_compared_by_its_file(tmp_path, image):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "in.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("chunked", data=image, chunks=CELLS)
        file.create_dataset("plain", data=image)
    for stamp, name in enumerate(("chunked", "plain")):
        with h5py.File(path, "r") as file:
            before = keys_of(define(file[name]))
            assert keys_of(define(file[name])) == before
        os.utime(path, ns=(stamp, stamp))
        with h5py.File(path, "r") as file:
            assert not set(keys_of(define(file[name]))) & set(before)


class Strange:
    def __init__(self, array):
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, box):
        return self._array[box]


def test_what_cannot_be_compared_is_refused_with_a_way_out(tmp_path, image):
    import dask.array as da
    import tensorstore

    urls = zarr.create_array("memory://content/in.zarr", data=image, chunks=CELLS, overwrite=True)
    spec = {"driver": "array", "dtype": "int64", "array": image.tolist()}
    cases = {
        "Strange": Strange(image),
        "dask.Array": da.from_array(image, chunks=CELLS),
        "FsspecStore": urls,
        "tensorstore": tensorstore.open(spec).result(),
    }
    for kind, array in cases.items():
        img = define(array, dtype="i8")
        with pytest.raises(ci.NoContentError, match=rf"input 0 is .*{kind}.*Input\(array, version"):
            ContentKeys(img.loader).key(0)
        with_version = ci.map_cells(
            twice, ci.Input(array, version="1"), dtype=image.dtype, cell_shape=CELLS
        )
        assert len(keys_of(with_version)) == 12


def test_functions_and_params_that_cannot_be_compared_are_refused_with_a_way_out(image):
    lock = threading.Lock()

    def guarded(a, by=2, n=0):
        with lock:
            return a * by

    with pytest.raises(ci.NoContentError, match=r"lock of .*guarded is a _thread.lock.*version="):
        ContentKeys(define(image, f=guarded).loader)
    with pytest.raises(ci.NoContentError, match=r"params\['by'\] is a _thread.lock.*version="):
        ContentKeys(define(image, params={"by": lock}).loader)
    both = define(image, f=guarded, params={"by": lock, "n": 1}, version="1")
    assert len(keys_of(both)) == 12
    other = define(image, f=guarded, params={"by": lock, "n": 2}, version="1")
    assert not set(keys_of(other)) & set(keys_of(both))


# ---------------------------------------------------------------- chains


def test_a_chain_passes_on_what_changes(image):
    first = ci.map_cells(twice, image, halo=1, dtype=image.dtype, cell_shape=CELLS)
    last = ci.map_cells(twice, first, halo=2, dtype=image.dtype, cell_shape=(5, 6))
    before = keys_of(last)
    image[0, 0] += 1
    # What is read of first's cell 0, rows and columns 0 to 7, with a halo of 2.
    expected = {last.grid.index((row, column)) for row in (0, 1) for column in (0, 1)}
    assert differing(before, keys_of(last)) == expected
    image[0, 0] -= 1
    other = ci.map_cells(
        twice, image, halo=1, dtype=image.dtype, cell_shape=CELLS, params={"by": 3}
    )
    changed = ci.map_cells(twice, other, halo=2, dtype=image.dtype, cell_shape=(5, 6))
    assert not set(keys_of(changed)) & set(before)


def test_a_version_of_an_image_that_is_read_stands_for_all_above_it(image):
    lock = threading.Lock()
    first = ci.map_cells(lambda a: a + bool(lock), image, dtype=image.dtype, cell_shape=CELLS)
    with pytest.raises(ci.NoContentError, match="lock"):
        ContentKeys(define(first).loader)
    img = ci.map_cells(np.negative, ci.Input(first, version="1"), cell_shape=CELLS)
    before = keys_of(img)
    image += 1
    assert keys_of(img) == before


def test_long_chains_and_diamonds_take_no_time(image):
    long = define(image)
    for _ in range(400):
        long = define(long, halo=0, boundary="none")
    assert len(keys_of(long)) == 12
    wide = define(image)
    for _ in range(60):
        wide = ci.map_cells(np.add, wide, wide, cell_shape=CELLS)
    before = keys_of(wide)
    image[0, 0] += 1
    assert differing(before, keys_of(wide)) == {0}


# ---------------------------------------------------------------- invalidation


def test_keys_are_remembered_as_long_as_the_image_is_not_invalidated(image):
    first = define(image, halo=1, boundary="none")
    last = ci.map_cells(np.negative, first, cell_shape=CELLS)
    keys = ContentKeys(last.loader)
    before = [keys.key(index) for index in range(12)]
    image[1, 1] += 1
    assert [keys.key(index) for index in range(12)] == before
    now = [keys.key_now(index) for index in range(12)]
    assert differing(before, now) == {0}
    assert [keys.key(index) for index in range(12)] == before
    first.invalidate(ci.Roi((0, 0), (2, 2)))
    keys = ContentKeys(last.loader)
    assert [keys.key(index) for index in range(12)] == now
