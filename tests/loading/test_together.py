"""Several cells in one call give what single cells give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr
from hypothesis import given
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.loading.memory import Room
from cellimg_dask.loading.together import Together, cells_together

BOUNDARIES = ["none", "constant", "reflect", "symmetric", "edge", "wrap"]


def median(block: np.ndarray) -> np.ndarray:
    return ndi.median_filter(block, 3)


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    cell=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    per_call=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    boundary=st.sampled_from(BOUNDARIES),
)
def test_a_call_for_several_cells_is_cut_into_the_same_cells(shape, cell, per_call, boundary):
    image = np.random.default_rng(1).integers(0, 99, shape)
    img = ci.map_cells(
        median, image, halo=1, boundary=boundary, dtype=image.dtype, cell_shape=cell, cache=None
    )
    together = Together(img.loader, per_call)
    every = list(range(img.grid.num_cells))
    groups = together.groups(every)
    assert sorted(index for group in groups for index in group) == every
    for group in groups:
        box = together.box_of(group[0])
        data = together.coarse.compute_owned(box)
        for index, part in together.cut(box, data, group):
            np.testing.assert_array_equal(part, img.load(index))


@pytest.mark.parametrize("per_call", [None, 2, (2, 1, 3), "auto", 100])
def test_a_run_writes_the_same_however_many_cells_a_call_has(tmp_path: Path, rng, per_call):
    image = rng.random((20, 33, 17))
    calls = []

    def smooth(block: np.ndarray) -> np.ndarray:
        calls.append(block.shape)
        return ndi.gaussian_filter(block, 1)

    img = ci.map_cells(smooth, image, halo=4, dtype="f8", cell_shape=8, version="1")
    report = ci.run(img, tmp_path / "out.zarr", cells_per_call=per_call, progress=False)
    assert report.computed == img.grid.num_cells == 45
    if per_call in (2, 100):
        assert len(calls) == {2: 12, 100: 1}[per_call]
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / "out.zarr")[...], ndi.gaussian_filter(image, 1)
    )
    calls.clear()
    assert ci.run(img, tmp_path / "out.zarr", progress=False).skipped == 45
    assert calls == []


def test_results_of_another_shape_are_cut_right(tmp_path: Path):
    image = np.arange(24 * 12 * 10).reshape(24, 12, 10)
    img = ci.map_cells(
        lambda a: a[::2, ::2].max(axis=2),
        image,
        shrink=(2, 2, 1),
        drop_axis=2,
        dtype=image.dtype,
        cell_shape=3,
        version="1",
    )
    ci.run(img, tmp_path / "out.zarr", cells_per_call=2, progress=False)
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / "out.zarr")[...], image[::2, ::2].max(axis=2)
    )


def test_a_cell_that_fails_does_not_take_the_others_of_its_call_along(tmp_path: Path):
    image = np.arange(64.0).reshape(8, 8)

    def picky(block: np.ndarray) -> np.ndarray:
        if 27 in block:
            raise ValueError("27")
        return block

    img = ci.map_cells(picky, image, dtype="f8", cell_shape=2)
    report = ci.run(img, tmp_path / "out.zarr", cells_per_call=4, retries=0, progress=False)
    assert list(report.failed) == [(1, 1)]
    assert report.computed == 15


def test_where_few_cells_are_missing_they_come_alone(tmp_path: Path):
    calls = []

    def count(block: np.ndarray) -> np.ndarray:
        calls.append(block.size)
        return block

    img = ci.map_cells(count, np.zeros((8, 8)), dtype="f8", cell_shape=2, version="1")
    ci.run(img, tmp_path / "out.zarr", cells_per_call=2, progress=False)
    assert calls == [16] * 4
    (tmp_path / "out.zarr" / "c" / "0" / "0").write_bytes(b"x")
    calls.clear()
    ci.run(img, tmp_path / "out.zarr", cells_per_call=2, progress=False)
    assert calls == [4]


def test_auto_grows_where_the_halo_is_widest_and_within_the_memory():
    image = np.zeros((256, 64, 64), "f4")
    img = ci.map_cells(np.copy, image, halo=(8, 0, 0), dtype="f4", cell_shape=8)
    grown = cells_together(img.loader, "auto", [Room(1, 1 << 30)])
    assert grown is not None
    assert grown.per_call == (32, 1, 1)
    assert cells_together(img.loader, "auto", [Room(1, 1)]) is None
    little = cells_together(img.loader, "auto", [Room(1, 40_000)])
    assert little is not None
    assert 1 < little.per_call[0] < 32


def test_without_halo_auto_leaves_cells_alone():
    img = ci.map_cells(np.copy, np.zeros((64, 64)), dtype="f8", cell_shape=8)
    assert cells_together(img.loader, "auto", [Room(2, 1 << 30)]) is None


@pytest.mark.parametrize("value", [0, -1, (2,), 1.5, "many"])
def test_numbers_of_cells_that_are_none_are_refused(tmp_path: Path, value):
    img = ci.map_cells(np.copy, np.zeros((8, 8)), dtype="f8", cell_shape=2)
    with pytest.raises((TypeError, ValueError), match="cells_per_call"):
        ci.run(img, tmp_path / "out.zarr", cells_per_call=value, progress=False)
    assert not (tmp_path / "out.zarr").exists()


def test_functions_that_see_one_cell_are_refused(tmp_path: Path):
    def fill(block: ci.Block) -> None:
        block.data[...] = block.index

    img = ci.fill_cells(fill, ci.CellGrid((8,), (2,)), dtype="u1")
    with pytest.raises(ValueError, match="called for each cell"):
        ci.run(img, tmp_path / "out.zarr", cells_per_call=2, progress=False)
    assert ci.run(img, tmp_path / "b.zarr", cells_per_call="auto", progress=False).computed == 4


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    per_call=st.one_of(st.just("auto"), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    boundary=st.sampled_from(BOUNDARIES),
    data=st.data(),
)
def test_a_region_is_the_same_however_many_cells_a_call_has(shape, per_call, boundary, data):
    image = np.random.default_rng(1).integers(0, 99, shape)
    img = ci.map_cells(
        median, image, halo=1, boundary=boundary, dtype=image.dtype, cell_shape=3, cache=None
    )
    corner = data.draw(st.tuples(*(st.integers(0, extent - 1) for extent in shape)))
    roi = ci.Roi(corner, shape)
    expected = img[roi]
    out = np.empty(roi.shape, image.dtype)
    assert img.read_into(out, roi, cells_per_call=per_call) is out
    np.testing.assert_array_equal(out, expected)
    # Into another dtype, and into the memory that is read.
    wide = np.empty(roi.shape, "f8")
    np.testing.assert_array_equal(img.read_into(wide, roi, cells_per_call=per_call), expected)
    np.testing.assert_array_equal(
        img.read_into(image[roi.slices], roi, cells_per_call=per_call), expected
    )


def test_reading_with_several_cells_in_a_call_calls_less_often():
    calls = []

    def count(block: np.ndarray) -> np.ndarray:
        calls.append(block.shape)
        return block

    img = ci.map_cells(count, np.arange(64.0).reshape(8, 8), halo=1, dtype="f8", cell_shape=2)
    out = np.empty((8, 8))
    img.read_into(out, cells_per_call=4)
    assert calls == [(8, 8)]
    with pytest.raises(ValueError, match="cells_per_call"):
        img.read_into(out, cells_per_call=0)
