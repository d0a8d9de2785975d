"""What can be done with an image of labels besides reading it, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cloudpickle
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from support import same_objects

import cellimg_dask as ci
from cellimg_dask.ops.label_image import BlockLabels
from cellimg_dask.ops.linking import shared_labels


def components(a: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(ndimage.label(a)[0])


@pytest.fixture
def mask() -> NDArray[np.bool_]:
    return np.random.default_rng(0).random((13, 17)) < 0.5


@pytest.mark.parametrize("dtype", ["f2", "g", "c8", ">c16", ">f4", ">i2", "O"])
def test_masks_of_all_numbers(mask: Any, dtype: str) -> None:
    # SciPy itself refuses most of them.
    labels = ci.label(mask.astype(dtype), cell_shape=4)
    assert same_objects(labels[...], components(mask))


@pytest.mark.parametrize("dtype", ["S1", "U1", "M8[s]", [("a", "u1")]])
def test_masks_of_what_has_no_zero_are_refused(dtype: Any) -> None:
    with pytest.raises(TypeError, match="booleans or numbers"):
        ci.label(np.zeros((3, 3), dtype))


@pytest.mark.parametrize("boundary", ["edge", "constant", "wrap", "none"])
def test_inputs_have_boundaries_of_their_own(mask: Any, boundary: str) -> None:
    item = ci.Input(mask, boundary=boundary)
    assert same_objects(ci.label(item, cell_shape=4)[...], components(mask))
    for whole in ("none", "symmetric"):
        labels = ci.map_labels(
            components, item, halo=1, link="components", cell_shape=4, boundary=whole
        )
        if boundary != "wrap":
            assert same_objects(labels[...], components(mask))
        assert labels[...].shape == mask.shape


@pytest.mark.parametrize("max_bytes", [0, 10, 2000, 1 << 20])
def test_a_line_into_every_second_place(max_bytes: int) -> None:
    mask = np.random.default_rng(1).random(60) < 0.5
    labels = ci.label(mask, cell_shape=7, cache=ci.CellCache(max_bytes))
    out = np.zeros((60, 2), np.uint64)
    labels.read_into(out[:, 0])
    assert same_objects(out[:, 0], components(mask))


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (ndimage.label, "a tuple of 2"),
        (lambda a: np.ma.masked_less(components(a), 2), "mask would be lost"),
        (lambda a: None, "object"),
        (lambda a: components(a)[1:], "halo included"),
    ],
)
def test_results_that_are_no_labels(mask: Any, f: Any, words: str) -> None:
    labels = ci.map_labels(f, mask, halo=1, cell_shape=5)
    with pytest.raises(ci.ResultError, match=words):
        labels[...]


@pytest.mark.parametrize("threshold", [np.float32(0.5), np.float64(0.5), 0, np.int64(0)])
def test_thresholds_are_any_numbers(mask: Any, threshold: Any) -> None:
    labels = ci.map_labels(components, mask, halo=2, cell_shape=5, link=("iou", threshold))
    assert labels[...].shape == mask.shape


@pytest.mark.parametrize("threshold", [1, -0.1, np.nan, True, False, "0.5", 1j])
def test_bad_thresholds(mask: Any, threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold"):
        ci.map_labels(components, mask, halo=2, cell_shape=5, link=("iou", threshold))


@pytest.mark.parametrize("link", ["components", ("iou", 0.5)])
def test_negative_labels_are_not_stitched(mask: Any, link: Any) -> None:
    labels = ci.map_labels(components, mask, halo=2, cell_shape=4)
    stored = labels.blocks[...]
    stored[stored == 2] = -1
    again = ci.stitch(stored, ci.CellGrid(mask.shape, (4, 4)), 2, link=link)
    with pytest.raises(ci.BlockError, match="label -1"):
        again[...]


def test_parameters_are_those_of_the_function() -> None:
    image = np.random.default_rng(2).random((20, 20))

    def above(a: NDArray[Any], level: float) -> NDArray[Any]:
        return components(a > level)

    labels = ci.map_labels(
        above, image, halo=2, cell_shape=6, link="components", params={"level": 0.5}
    )
    assert dict(labels.params) == {"level": 0.5}
    assert same_objects(labels[...], components(image > 0.5))
    labels.set_params(level=0.8)
    assert dict(labels.params) == {"level": 0.8}
    assert same_objects(labels[...], components(image > 0.8))
    assert labels.num_objects() == components(image > 0.8).max()
    with pytest.raises(TypeError, match="no parameter 'levle'"):
        labels.set_params(levle=1)
    with pytest.raises(TypeError, match="no parameter"):
        ci.label(image, cell_shape=6).set_params(level=1)
    stored = ci.stitch(labels.blocks[...], ci.CellGrid(image.shape, (6, 6)), 2)
    with pytest.raises(TypeError, match="no parameters"):
        stored.set_params(level=1)


@pytest.mark.parametrize("way", ["pickle", "copy", "snapshot"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_copy_knows_its_objects(mask: Any, way: str, stored: bool) -> None:
    source = ci.Source(mask.copy(), cell_shape=8)
    labels = ci.map_labels(components, source, halo=2, cell_shape=4)
    if stored:
        labels = ci.stitch(np.asarray(labels.blocks), labels.blocks.layout.grid, 2)
    if way == "pickle":
        other = pickle.loads(cloudpickle.dumps(labels))
    else:
        other = copy.copy(labels) if way == "copy" else labels.snapshot()
    expected = labels[...], labels.num_objects(), labels.cut_objects()
    with source.edit() as values:
        values[...] = False
    assert isinstance(other, ci.LabelImg)
    np.testing.assert_array_equal(other[...], expected[0])
    assert other.num_objects() == expected[1]
    np.testing.assert_array_equal(other.cut_objects(), expected[2])
    if not stored:
        assert isinstance(other.blocks, BlockLabels)
        assert labels.num_objects() == 0
        again = ci.stitch(other.blocks)
        np.testing.assert_array_equal(again[...], expected[0])


@pytest.mark.parametrize("boundary", ["none", "reflect", "wrap"])
def test_what_is_invalidated_is_found_again(mask: Any, boundary: str) -> None:
    line = np.random.default_rng(3).random((1, 17)) < 0.8

    def both(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        return components(a & b)

    def labels_of(cache: Any) -> ci.LabelImg:
        halo = ((0, 3), (7, 2))
        return ci.map_labels(
            both, mask, line, halo=halo, cell_shape=3, boundary=boundary, cache=cache
        )

    labels = labels_of(ci.CellCache(1 << 24))
    labels[...]
    for array, place in ((mask, (0, 0)), (mask, (12, 9)), (line, (0, 4))):
        loads = labels.blocks.stats().loads
        array[place] ^= True
        region = np.s_[:, 4] if array is line else place
        labels.invalidate(region)
        np.testing.assert_array_equal(labels[...], labels_of(ci.CellCache(1 << 24))[...])
        if array is mask:
            assert labels.blocks.stats().loads - loads < labels.grid.num_cells
    labels.invalidate(np.s_[3:3])
    loads = labels.blocks.stats().loads
    labels[...]
    assert labels.blocks.stats().loads == loads


def test_stored_blocks_that_were_written_are_stitched_again(mask: Any) -> None:
    grid = ci.CellGrid(mask.shape, (4, 4))
    stored = np.asarray(ci.map_labels(components, mask, halo=2, cell_shape=4).blocks)
    labels = ci.stitch(stored, grid, 2)
    labels[...]
    stored[8:16, 8:16] = 0
    labels.invalidate(np.s_[4:8, 4:8])
    np.testing.assert_array_equal(labels[...], ci.stitch(stored.copy(), grid, 2)[...])


def test_axes_that_labels_lack_are_invalidated_whole(mask: Any) -> None:
    stack = np.stack([mask, mask[::-1]])

    def both(a: NDArray[Any]) -> NDArray[Any]:
        return components(a.all(0))

    labels = ci.map_labels(both, stack, halo=1, drop_axis=0, cell_shape=4, link="components")
    assert same_objects(labels[...], components(stack.all(0)))
    stack[1] = True
    labels.invalidate()
    assert same_objects(labels[...], components(mask))


def test_code_that_returns_nothing_finds_no_labels(mask: Any) -> None:
    with pytest.raises(TypeError, match="BlockCode returns nothing"):
        ci.map_labels(ci.BlockCode("block.data[...] = 1"), mask, halo=1)


def test_a_threshold_that_is_met_exactly_is_not_exceeded() -> None:
    for total in range(1, 101):
        for common in range(1, total + 1):
            first = np.repeat([1, 1], [common, total - common])
            second = np.repeat([1, 0], [common, total - common])
            threshold = float(f"{common / total:.12g}")
            if threshold == common / total:
                assert not shared_labels(first, second, threshold)[0].size
            assert shared_labels(first, second, threshold - 1e-9)[0].size
