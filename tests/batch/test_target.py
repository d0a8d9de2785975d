"""Layouts and stored cells: what a zarr reader sees, and which files belong to which cell."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellimg_dask.batch import target as targets
from cellimg_dask.batch.folder import open_folder
from cellimg_dask.batch.target import Layout, Target, open_target
from cellimg_dask.geometry import CellGrid

GRID = CellGrid((10, 13), (4, 5))


def layout(grid=GRID, dtype="f4", **options):
    return Layout.of(grid, np.dtype(dtype), **options)


@pytest.fixture(params=["tensorstore", "zarr", "memory"])
def make(request, tmp_path, monkeypatch):
    """Make targets that are written by tensorstore, by zarr alone, or elsewhere than in files."""
    if request.param == "zarr":
        monkeypatch.setattr(targets, "_open_twin", lambda where, array: None)

    def make(**options):
        where = str(tmp_path / "out.zarr")
        if request.param == "memory":
            where = f"memory://target-test/{tmp_path.name}/out.zarr"
        described = layout(**options)
        described.create(where, overwrite=True)
        stored = Target(where, described.grid)
        assert (stored._tensorstore() is not None) == (request.param == "tensorstore")
        return stored

    return make


# ---------------------------------------------------------------- layouts


def test_by_default_a_chunk_is_a_cell():
    plain = layout()
    assert (plain.chunks, plain.sharded, plain.compressor, plain.level) == (
        (4, 5),
        False,
        "zstd",
        1,
    )
    assert plain.fill_value == 0
    assert plain.fill_value.dtype == "f4"


def test_several_chunks_of_a_cell_are_a_shard():
    assert layout(chunks=(2, 5)).sharded
    assert layout(chunks=1).chunks == (1, 1)
    assert not layout(chunks=(2, 5), sharded=False).sharded
    assert layout(sharded=True).chunks == (4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 3}, r"chunks\[0\] = 3 does not divide the cell, which has 4 voxels"),
        ({"chunks": (4, 10)}, r"chunks\[1\] = 10 does not divide"),
        ({"chunks": (4, 2)}, r"chunks\[1\] = 2 does not divide"),
        ({"chunks": (8, 5)}, r"chunks\[0\] = 8 does not divide"),
        ({"chunks": (4,)}, "chunks"),
        ({"chunks": 0}, "chunks"),
        ({"chunks": 2.5}, "chunks"),
        ({"compressor": "lzma"}, "unknown compressor 'lzma'.*'zstd', 'blosc', 'gzip', None"),
        ({"fill_value": "x"}, "fill_value 'x' is no value of dtype float32"),
        ({"fill_value": [0]}, r"fill_value \[0\] is no value"),
        ({"fill_value": 1e300}, "is no value of dtype float32"),
        ({"fill_value": None}, "is no value"),
        ({"fill_value": 1j}, "is no value"),
    ],
)
def test_what_cannot_be_stored_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layout(**options)


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("u1", 255, True),
        ("u1", 256, False),
        ("u1", -1, False),
        ("u1", 0.5, False),
        ("u1", np.nan, False),
        ("f4", 0.1, True),
        ("f2", np.nan, True),
        ("f2", 1e6, False),
        ("f8", -np.inf, True),
        ("i8", 2**63 - 1, True),
        ("i8", 2**63, False),
        ("?", True, True),
        ("?", 2, False),
        ("c8", 1 + 2j, True),
    ],
)
def test_fill_values_are_values_of_the_dtype(dtype, value, fits):
    if fits:
        filled = layout(dtype=dtype, fill_value=value).fill_value
        assert filled.dtype == dtype
        np.testing.assert_equal(filled, np.dtype(dtype).type(value))
    else:
        with pytest.raises(ValueError, match="is no value of dtype"):
            layout(dtype=dtype, fill_value=value)


@pytest.mark.filterwarnings("ignore:The data type:zarr.errors.UnstableSpecificationWarning")
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("M8[s]", ["1970-01-01", "2001-02-03"]),
        ("m8[us]", [0, 5]),
        ("S4", [b"", b"abc"]),
        ("U3", ["", "xyz"]),
        ([("a", "f4"), ("b", "i2")], [(0, 0), (1.5, -2)]),
    ],
    ids=str,
)
def test_by_default_zero_is_that_of_the_dtype(tmp_path, dtype, values):
    grid, data = CellGrid((2,), (1,)), np.array(values, dtype)
    where = str(tmp_path / "out.zarr")
    Layout.of(grid, data.dtype).create(where, overwrite=False)
    stored = Target(where, grid)
    for index in range(2):
        stored.write(index, data[index : index + 1])
    assert stored.array.fill_value == data[0]
    assert (stored.array[:] == data).all()


def test_python_objects_cannot_be_stored():
    with pytest.raises(TypeError, match="dtype object cannot be stored"):
        layout(dtype=object)


def test_small_images_have_small_chunks(tmp_path):
    small = layout(CellGrid((3, 5), 64), chunks=(64, 8))
    assert small.chunks == (3, 5)
    assert not small.sharded
    small.create(str(tmp_path / "a.zarr"), overwrite=False)
    assert layout(CellGrid((0, 5), (2, 2))).chunks == (2, 2)
    assert layout(CellGrid((), ())).chunks == ()


def test_an_array_that_differs_is_described(tmp_path):
    path = tmp_path / "a.zarr"
    layout().create(str(path), overwrite=False)
    array = zarr.open_array(path)
    assert layout().differences(array) == []
    assert layout(compressor="gzip", fill_value=3).differences(array) == []
    (text,) = layout(CellGrid((10, 14), (4, 5))).differences(array)
    assert text == "shape (10, 13), expected (10, 14)"
    assert [t.split()[0] for t in layout(dtype="u1").differences(array)] == ["dtype"]
    found = layout(chunks=(2, 5)).differences(array)
    assert [t.split()[0] for t in found] == ["chunks", "shards"]
    old = zarr.create_array(
        tmp_path / "v2.zarr", shape=GRID.shape, chunks=(4, 5), dtype="f4", zarr_format=2
    )
    assert layout().differences(old) == ["zarr format 2, expected 3"]


def test_the_grid_is_noted_for_whoever_asks(tmp_path):
    folder, where = open_folder(str(tmp_path / "beside")), str(tmp_path / "array")
    assert open_target(folder, where) is None
    folder.write("layout.json", layout().as_json())
    layout().create(where, overwrite=False)
    found = open_target(folder, where)
    assert isinstance(found, Target)
    assert found.grid == GRID


# ---------------------------------------------------------------- stored cells


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (2, 5)},
        {"chunks": (2, 5), "sharded": False},
        {"sharded": True},
        {"compressor": "blosc"},
        {"compressor": "gzip", "level": 9},
        {"compressor": None},
        {"compressor": None, "chunks": (1, 5)},
        {"fill_value": -1},
    ],
    ids=str,
)
def test_cells_are_written_apart_and_read_by_anybody(make, rng, options):
    stored = make(**options)
    whole = rng.random(GRID.shape).astype("f4")
    names = [name for index in range(GRID.num_cells) for name in stored.objects(index)]
    assert len(set(names)) == len(names)
    for index in rng.permutation(GRID.num_cells):
        assert set(stored.sizes(index).values()) == {None}
        assert set(stored.checksums(index).values()) == {None}
        box = GRID.cell(int(index)).roi.slices
        stored.write(index, whole[box])
        assert all(stored.checksums(index).values())
    assert np.array_equal(zarr.open_array(stored.where, mode="r")[...], whole)
    for index in range(GRID.num_cells):
        assert np.array_equal(stored.read(index), whole[GRID.cell(index).roi.slices])
        sums = stored.checksums(index)
        assert stored.sizes(index) == {name: entry[0] for name, entry in sums.items()}
        assert list(sums) == stored.objects(index)
    folder = open_folder(stored.where)
    assert set(folder.names("c")) == set(names)


def test_a_chunk_of_nothing_but_the_fill_value_is_left_out(make):
    stored = make(fill_value=7, chunks=(4, 5), sharded=False)
    stored.write(0, np.full((4, 5), 7, "f4"))
    assert stored.checksums(0) == {"c/0/0": None}
    stored.write(0, np.full((4, 5), 8, "f4"))
    assert stored.checksums(0)["c/0/0"] is not None
    # And goes where there was one.
    stored.write(0, np.full((4, 5), 7, "f4"))
    assert stored.checksums(0) == {"c/0/0": None}
    assert (stored.read(0) == 7).all()


def test_every_bit_counts_for_checksums_and_the_length_for_sizes(make):
    stored = make()
    stored.write(3, np.arange(20, dtype="f4").reshape(4, 5))
    folder, (name,) = open_folder(stored.where), stored.objects(3)
    sums, sizes = stored.checksums(3), stored.sizes(3)
    content = folder.read(name)
    folder.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    assert stored.checksums(3) != sums
    assert stored.sizes(3) == sizes
    folder.write(name, content[:-1])
    assert stored.sizes(3) != sizes
    folder.write(name, content)
    assert (stored.checksums(3), stored.sizes(3)) == (sums, sizes)


def test_no_axes_and_no_cells(make):
    stored = make(grid=CellGrid((), ()), dtype="i8")
    stored.write(0, np.array(5))
    assert stored.read(0) == 5
    assert len(stored.objects(0)) == 1
    assert make(grid=CellGrid((0, 4), 2)).array.shape == (0, 4)


def test_a_target_travels_as_its_path(make):
    stored = pickle.loads(pickle.dumps(make()))
    stored.write(0, np.ones((4, 5), "f4"))
    assert (stored.read(0) == 1).all()
    assert stored.grid == GRID


def test_what_zarr_writes_is_on_the_disk(tmp_path, monkeypatch):
    # tensorstore syncs by itself.
    monkeypatch.setattr(targets, "_open_twin", lambda where, array: None)
    synced = []
    fsync = os.fsync

    def noted(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    where = str(tmp_path / "out.zarr")
    layout().create(where, overwrite=False)
    stored = Target(where, GRID)
    monkeypatch.setattr(os, "fsync", noted)
    stored.write(0, np.ones((4, 5), "f4"))
    stored.write(1, np.zeros((4, 5), "f4"))
    assert synced == ["0"]
