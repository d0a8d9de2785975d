"""napari and ndv show lazy images as they are: they read the cells that they show.

Neither is needed by anything else, so these tests run where they are installed, and what they ask
of an array is asked of it without them as well. With warnings as errors napari's own plugins for
pytest do not load: ``pytest -p no:napari -p no:npe2``.
"""

from __future__ import annotations

import os
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci

# What they warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def napari() -> Any:
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("napari.components", reason="napari is not installed")


@pytest.fixture
def ndv() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("ndv", reason="ndv is not installed")


def numbered(
    shape: tuple[int, ...] = (64, 128, 128), cell_shape: tuple[int, ...] = (16, 64, 64)
) -> ci.CellImg:
    """An image of the numbers of its cells, beginning with 1."""

    def fill(block: Any) -> None:
        block.data[...] = block.index + 1

    return ci.fill_cells(fill, ci.CellGrid(shape, cell_shape), dtype="u2")


def held(image: ci.CellImg) -> list[tuple[int, ...]]:
    grid = image.grid
    positions = map(grid.position, range(grid.num_cells))
    return [position for position in positions if image.peek(position) is not None]


def layer(*numbers: int) -> list[tuple[int, ...]]:
    """Return the cells of these layers of the grid."""
    return list(product(numbers, (0, 1), (0, 1)))


# ------------------------------------------------------------------ what they ask of an array


def test_a_plane_is_read_as_an_array_from_its_cells() -> None:
    image = numbered()
    plane = image[(np.int64(3), slice(None, None), slice(0, 128, 1))]
    assert type(plane) is np.ndarray
    assert plane.shape == (128, 128)
    assert held(image) == layer(0)
    assert image[(20, slice(0, 64), slice(-64, None))].tolist() == [[6] * 64] * 64
    assert len(held(image)) == 5
    # A value under the mouse.
    assert image[(np.int64(40), np.int64(1), np.int64(100))] == 10
    assert len(held(image)) == 6
    assert np.dtype(image.dtype) == "u2"
    assert (image.ndim, image.size, len(image)) == (3, 64 * 128 * 128, 64)


def test_what_is_painted_is_taken_by_lists_of_voxels() -> None:
    source = ci.Source(np.zeros((8, 20, 20), "u4"), cell_shape=4)
    where = tuple(np.array([[3, 3, 3], [4, 5, 6], [7, 7, 7]]))
    before = source[where]
    source[where] = 9
    assert source[3, 4:7, 7].tolist() == [9, 9, 9]
    source[where] = before
    assert not source[...].any()


# ------------------------------------------------------------------ napari


def test_napari_reads_the_cells_of_the_plane_that_it_shows(napari: Any) -> None:
    image = numbered()
    viewer = napari.ViewerModel()
    shown = viewer.add_image(image, contrast_limits=(0, 20))
    assert shown.data is image
    assert viewer.dims.current_step[0] == 31
    # The first plane is looked at before the viewer goes to the middle.
    assert held(image) == layer(0, 1)
    viewer.dims.set_current_step(0, 50)
    assert held(image) == layer(0, 1, 3)
    np.testing.assert_array_equal(np.unique(shown._slice.image.view), [13, 14, 15, 16])
    loads = image.stats().loads
    viewer.dims.set_current_step(0, 51)
    assert image.stats().loads == loads
    # Planes of another direction go through all layers.
    viewer.dims.order = (1, 0, 2)
    assert len(held(image)) < image.grid.num_cells


def test_napari_looks_for_contrast_in_what_it_shows_first(napari: Any) -> None:
    image = numbered((64, 512, 512), (16, 256, 256))
    shown = napari.ViewerModel().add_image(image)
    assert held(image) == layer(0, 1)
    low, high = shown.contrast_limits
    assert low <= 1
    assert high >= 4


def test_napari_takes_levels_and_units(napari: Any) -> None:
    levels = [numbered((16, 2048, 2048), (16, 256, 256)), numbered((16, 256, 256), (16, 64, 64))]
    viewer = napari.ViewerModel()
    shown = viewer.add_image(levels, multiscale=True, contrast_limits=(0, 20))
    assert shown.multiscale
    # The coarsest is shown until somebody looks nearer.
    assert not held(levels[0])
    assert held(levels[1])
    pyramid = ci.pyramid(numbered(), 3)
    assert viewer.add_image(pyramid, contrast_limits=(0, 20)).multiscale
    placed = numbered().with_space(axes="zyx", units="um", scale=(5, 2, 2))
    shown = viewer.add_image(
        placed, scale=placed.scale, units=placed.units, axis_labels=placed.axes
    )
    assert shown.scale.tolist() == [5, 2, 2]
    assert [str(unit) for unit in shown.units] == ["micrometer"] * 3


def test_napari_paints_into_a_source(napari: Any) -> None:
    source = ci.Source(np.zeros((32, 64, 64), "u4"), cell_shape=16)
    doubled = ci.map_cells(lambda data: 2 * data, source, dtype="u4")
    viewer = napari.ViewerModel()
    labels, seen = viewer.add_labels(source), viewer.add_labels(doubled)
    loads = doubled.stats().loads
    labels.brush_size = 4
    labels.paint((15, 20, 20), 7)
    assert 4 < (source[...] == 7).sum() < 30
    # It does not know of the other's change.
    seen.refresh()
    assert doubled.stats().loads == loads + 1
    assert seen.get_value((15, 20, 20)) == 14
    labels.undo()
    assert not source[...].any()


def test_napari_shows_labels(napari: Any) -> None:
    even = ci.map_cells(lambda data: data % 2 == 0, numbered((32, 32), (16, 16)), dtype=bool)
    objects = ci.label(even)
    shown = napari.ViewerModel().add_labels(objects)
    assert shown.data is objects
    assert shown.get_value((3, 20)) == objects[3, 20] > 0


def test_napari_shows_a_stored_image(napari: Any, tmp_path: Any) -> None:
    ci.write_ome_zarr(numbered(), tmp_path / "image.zarr", levels=2, progress=False)
    with ci.open_image(tmp_path / "image.zarr") as stored:
        viewer = napari.ViewerModel()
        viewer.add_image(stored, contrast_limits=(0, 20))
        assert viewer.add_image(list(stored.levels), contrast_limits=(0, 20)).multiscale


# ------------------------------------------------------------------ ndv


def test_ndv_reads_the_cells_of_the_plane_that_it_shows(ndv: Any) -> None:
    image = numbered()
    wrapper = ndv.DataWrapper.create(image)
    assert wrapper.data is image
    assert (wrapper.dims, wrapper.dtype) == ((0, 1, 2), np.uint16)
    assert "uint16" in wrapper.summary_info()
    assert not held(image)
    plane = wrapper.isel({0: 3})
    assert type(plane) is np.ndarray
    assert plane.shape == (128, 128)
    assert held(image) == layer(0)


def test_ndv_knows_the_axes_of_what_xarray_names(ndv: Any) -> None:
    image = numbered().with_space(axes="zyx")
    wrapper = ndv.DataWrapper.create(image.to_xarray())
    assert wrapper.dims == ("z", "y", "x")
    assert (wrapper.isel({0: 63}) >= 13).all()
    assert held(image) == layer(3)
