"""Where the voxels of images lie, and what operations make of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.loading.file_array import is_xarray

SPACE = ci.Space.of(3, "zyx", "um", scale=(4, 1, 0.5), translation=(10, 0, -1))


def raw(**settings: Any) -> ci.Input:
    array = np.arange(8 * 12 * 10, dtype="f4").reshape(8, 12, 10)
    return ci.Input(array, space=SPACE, **settings)


def test_an_image_lies_where_its_input_does() -> None:
    image = ci.map_cells(np.negative, raw(), cell_shape=4)
    assert image.space == SPACE
    assert image.axes == ("z", "y", "x")
    assert image.units == ("micrometer",) * 3
    assert image.scale == (4, 1, 0.5)
    assert image.translation == (10, 0, -1)
    chained = ci.map_cells(ndimage.gaussian_filter, image, params={"sigma": 1}, dtype="f4", halo=4)
    assert chained.space == SPACE
    assert chained.snapshot().space == SPACE
    assert pickle.loads(pickle.dumps(chained)).space == SPACE


def test_nobody_knows_by_default() -> None:
    image = ci.map_cells(np.negative, np.zeros((4, 4)), cell_shape=2)
    assert image.axes is None
    assert image.space.is_plain


def test_the_first_input_that_says_something_counts() -> None:
    plain = np.ones((8, 12, 10), "f4")
    other = ci.Input(plain, space=ci.Space.of(3, scale=9))
    plane = ci.Input(plain[0], space=ci.Space.of(2, scale=7))
    image = ci.map_cells(lambda a, b, c, d: a, plane, plain, raw(), other, dtype="f4")
    assert image.space == SPACE


def test_axes_that_go_come_and_shrink() -> None:
    flat = ci.map_cells(lambda a: a.max(axis=0), raw(), drop_axis=0, dtype="f4")
    assert flat.space == SPACE.without((0,))
    half = ci.map_cells(lambda a: a[::2, :, ::2], raw(), shrink=(2, 1, 2), dtype="f4")
    assert half.scale == (8, 1, 1)
    assert half.translation == (12, 0, -0.75)
    both = ci.map_cells(
        lambda a: np.stack([a, a]), raw(), new_axis={0: 2}, dtype="f4", cell_shape=(2, 4, 4, 4)
    )
    assert both.axes == ("dim_0", "z", "y", "x")
    assert both.scale == (1, 4, 1, 0.5)


def test_an_image_with_a_grid_of_its_own() -> None:
    def copy(block: ci.Block) -> None:
        block.data[...] = block.inputs[0]

    image = ci.fill_cells(copy, ci.CellGrid((8, 12, 10), 4), raw(), dtype="f4")
    assert image.space == SPACE
    assert ci.fill_cells(copy, ci.CellGrid((4,), 2), dtype="f4").space.is_plain


def test_labels_lie_where_their_image_does() -> None:
    labels = ci.label(raw(), cell_shape=4)
    assert labels.space == SPACE
    assert labels.snapshot().space == SPACE
    assert pickle.loads(pickle.dumps(labels)).space == SPACE
    found = ci.map_labels(lambda a: a > 3, raw(), halo=1, cell_shape=4)
    assert found.space == SPACE
    assert isinstance(found.with_space(scale=2), ci.LabelImg)
    assert found.with_space(scale=2).num_objects() == 1


def test_a_source_says_where_it_lies() -> None:
    source = ci.Source(np.zeros((4, 6)), cell_shape=2, space=ci.Space.of(2, "yx", "nm"))
    image = ci.map_cells(np.negative, source)
    assert image.units == source.units == ("nanometer",) * 2
    with pytest.raises(ValueError, match="a space of 3 axes"):
        ci.Source(np.zeros((4, 6)), space=SPACE)


def test_with_space_is_the_same_image() -> None:
    image = ci.map_cells(np.negative, np.zeros((4, 6)), cell_shape=2)
    image[...]
    placed = image.with_space(axes="yx", units="um", scale={"x": 0.5})
    assert placed.node is image.node
    assert placed.peek((0, 0)) is image.peek((0, 0))
    assert image.axes is None
    assert placed.with_space(translation=(1, 2)).space == ci.Space.of(
        2, "yx", "um", scale=(1, 0.5), translation=(1, 2)
    )
    assert image.with_space(placed.space).space == placed.space
    with pytest.raises(ValueError, match="a space of 3 axes for an image of 2"):
        image.with_space(SPACE)
    with pytest.raises(TypeError, match="must be a Space"):
        image.with_space("yx")  # type: ignore[arg-type]


def test_an_image_shows_where_it_lies() -> None:
    image = ci.map_cells(np.negative, raw(), cell_shape=4)
    text = "z 4 micrometer from 10, y 1 micrometer, x 0.5 micrometer from -1"
    assert f"voxels        {text}" in repr(image)
    assert text in image._repr_html_()
    assert "voxels" not in repr(image.with_space(ci.Space.of(3)))
    assert str(ci.Space.of(2)) == "1, 1"


def test_a_space_has_to_fit_its_input() -> None:
    with pytest.raises(ValueError, match=r"a space of 3 axes for an array of shape \(4, 6\)"):
        ci.Input(np.zeros((4, 6)), space=SPACE)
    with pytest.raises(TypeError, match="must be a Space"):
        ci.Input(np.zeros(4), space="x")  # type: ignore[arg-type]


def test_arrays_that_name_their_axes(tmp_path: Path) -> None:
    stored = zarr.create_array(
        tmp_path / "a.zarr", shape=(4, 6), dtype="u1", chunks=(2, 2), dimension_names=("row", "col")
    )
    assert ci.map_cells(np.negative, stored).axes == ("row", "col")
    bare = zarr.create_array(tmp_path / "b.zarr", shape=(4, 6), dtype="u1", chunks=(2, 2))
    assert ci.map_cells(np.negative, bare).axes is None
    with ci.shared.put("cellimg-test-space", np.zeros((2, 3)), axes="yx") as shared:
        assert ci.map_cells(np.negative, shared).axes == ("y", "x")


def test_there_and_back_through_xarray() -> None:
    image = ci.map_cells(np.negative, raw(), cell_shape=4)
    labelled = image.to_xarray("minus")
    assert labelled.dims == ("z", "y", "x")
    assert labelled.name == "minus"
    assert labelled.chunks == image.chunks
    assert image.stats().loads == 0
    np.testing.assert_allclose(labelled.coords["x"], -1 + 0.5 * np.arange(10))
    assert labelled.coords["z"].attrs == {"units": "micrometer"}
    again = ci.map_cells(np.negative, labelled)
    assert again.space == SPACE
    assert again.cell_shape == (4, 4, 4)
    np.testing.assert_array_equal(again[...], raw().array)
    # A part of it knows where it begins.
    assert ci.map_cells(np.negative, labelled[2:, ::2]).translation == (18, 0, -1)
    assert ci.map_cells(np.negative, labelled[2:, ::2]).scale == (4, 2, 0.5)


def test_xarray_in_memory_has_content_that_a_run_compares(tmp_path: Path) -> None:
    array = xarray.DataArray(np.arange(12).reshape(3, 4), dims=("y", "x"))
    for value in (1, 2):
        array[0, 0] = value
        image = ci.map_cells(np.negative, array, cell_shape=2)
        assert ci.run(image, tmp_path / "a.zarr", progress=False).computed == (4, 1)[value - 1]
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a.zarr")[:], -array.values)


def test_what_is_of_xarray() -> None:
    array = xarray.DataArray(np.zeros(3))
    assert is_xarray(array)
    assert not any(map(is_xarray, (array.values, array.chunk().data, None)))


def test_xarray_of_what_nobody_named() -> None:
    image = ci.map_cells(np.negative, np.zeros((4, 6)), cell_shape=2)
    labelled = image.to_xarray()
    assert labelled.dims == ("y", "x")
    assert not labelled.coords


@pytest.mark.parametrize(
    ("places", "step", "first"),
    [
        ([3.0, 5.0, 7.0], 2, 3),
        ([3.0, 5.0, 8.0], 1, 0),  # Not even.
        ([7.0, 5.0, 3.0], 1, 0),  # Falling.
        (["a", "b", "c"], 1, 0),
        ([0.1, 0.2, 0.3000001], 0.1, 0.1),
        ([1, 1, 1], 1, 0),
        ([2.0, np.nan, 4.0], 1, 0),
        ([5.0], 1, 5),
        ([np.nan], 1, 0),
        ([-np.inf], 1, 0),
    ],
)
def test_coordinates_of_xarray(places: list[Any], step: float, first: float) -> None:
    array = xarray.DataArray(np.zeros(len(places)), {"x": places}, ["x"])
    image = ci.map_cells(np.negative, array)
    assert image.scale == pytest.approx((step,), rel=1e-5)
    assert image.translation == (first,)
