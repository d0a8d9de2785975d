"""Instances that a segmenter finds block by block: known objects, cut by cells and put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from support import same_objects

import cellimg_dask as ci


def renamed(truth: NDArray[Any], first: NDArray[Any]) -> NDArray[Any]:
    """Return the labels of a block as a segmenter would give them: numbers of its own."""
    names, labels = np.unique(truth, return_inverse=True)
    order = np.random.default_rng(int(first.sum()) + truth.size).permutation(names.size) + 1
    order[names == 0] = 0
    return np.asarray(order[labels.reshape(truth.shape)])


def territories(shape: tuple[int, ...], count: int) -> NDArray[Any]:
    """Objects without any background between them."""
    rng = np.random.default_rng(3)
    seeds = np.zeros(shape, int)
    places = rng.choice(seeds.size, count, replace=False)
    seeds.reshape(-1)[places] = np.arange(1, count + 1)
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    return np.asarray(seeds[tuple(nearest)])


def balls(shape: tuple[int, ...], radius: int) -> NDArray[Any]:
    """Objects with a gap here and there, centres on a lattice that meets cell corners."""
    truth = territories(shape, int(np.prod(shape)) // (2 * radius) ** len(shape))
    step = 2 * radius
    points = np.zeros(shape, bool)
    points[tuple(slice(0, None, step) for _ in shape)] = True
    near = ndimage.distance_transform_edt(~points) <= radius
    return np.where(near, truth, 0)


def rings(shape: tuple[int, ...]) -> NDArray[Any]:
    """Rings within rings, each a single object around many cells."""
    middle = [np.arange(n) - n / 2 for n in shape]
    distance = np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*middle, indexing="ij")))
    return np.where(distance < min(shape) / 2, (distance // 3).astype(int) + 1, 0)


def bricks(shape: tuple[int, ...]) -> NDArray[Any]:
    """Objects that end exactly at the seams of cells of 8, where others begin."""
    index = [np.arange(n) // 4 for n in shape]
    truth = np.zeros(shape, int)
    for axis in np.meshgrid(*index, indexing="ij"):
        truth = truth * 100 + axis
    return truth + 1


def strokes(shape: tuple[int, ...]) -> NDArray[Any]:
    """Diagonal lines, which go from cell to cell through corners."""
    truth = np.zeros(shape, int)
    along = np.arange(min(shape[:-1]))
    for number, shift in enumerate(range(-along.size, shape[-1], 3)):
        inside = (along + shift >= 0) & (along + shift < shape[-1])
        diagonal = along[inside]
        truth[(*[diagonal] * (len(shape) - 1), diagonal + shift)] = number + 1
    return truth


FLAT = (40, 36)
DEEP = (24, 20, 22)
TRUTHS = {
    "territories": territories(FLAT, 40),
    "balls": balls(FLAT, 4),
    "rings": rings(FLAT),
    "bricks": bricks(FLAT),
    "strokes": strokes(FLAT),
    "territories 3D": territories(DEEP, 60),
    "balls 3D": balls(DEEP, 4),
    "rings 3D": rings(DEEP),
    "bricks 3D": bricks(DEEP),
    "strokes 3D": strokes(DEEP),
}
CELLS = {2: [(8, 8), (7, 5), (10, 36), (40, 9), (13, 13), (3, 20), (16, 6)]}
CELLS[3] = [(8, 8, 8), (7, 5, 6), (24, 10, 11), (5, 20, 22), (12, 7, 9), (6, 20, 4), (11, 11, 11)]


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("number", range(7))
def test_known_objects_are_recovered(name: str, number: int) -> None:
    truth = TRUTHS[name]
    cells = CELLS[truth.ndim][number]
    places = np.arange(truth.size).reshape(truth.shape)
    labels = ci.map_labels(renamed, truth, places, halo=2, cell_shape=cells, consecutive=True)
    found = labels[...]
    assert same_objects(found, truth)
    count = np.unique(truth[truth > 0]).size
    assert labels.num_objects() == count
    np.testing.assert_array_equal(np.unique(found[found > 0]), np.arange(1, count + 1))


@pytest.mark.parametrize("halo", [1, (0, 1), [(2, 0), (0, 3)], 9])
def test_two_that_touch_at_a_seam_stay_two(halo: Any) -> None:
    truth = np.zeros((12, 12), int)
    truth[2:10, 2:6] = 5
    truth[2:10, 6:10] = 9
    pair = [halo, halo] if isinstance(halo, tuple) else halo
    labels = ci.map_labels(lambda a: a, truth, halo=pair, cell_shape=(12, 6))
    assert same_objects(labels[...], truth)
    # Each ends where the block of the other cell begins, unless the halo shows it whole.
    assert labels.num_objects() == 2


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("boundary", ["none", "reflect"])
def test_an_axis_that_labels_lack_is_read_whole(axis: int, boundary: str) -> None:
    truth = TRUTHS["balls"]
    # No channel shows the objects, the product of all of them does.
    channels = np.stack([np.full_like(truth, 2), truth, np.full_like(truth, 5)], axis)
    offset = np.arange(3) * 1000
    extra = offset.reshape([3 if a == axis % 3 else 1 for a in range(3)])

    def segment(block: NDArray[Any], added: NDArray[Any]) -> NDArray[Any]:
        assert added.shape == extra.shape
        first, second, third = np.moveaxis(block, axis, 0)
        assert (first == 2).all()
        assert (third == 5).all()
        np.testing.assert_array_equal(added, extra)
        return second

    labels = ci.map_labels(
        segment, channels, extra, halo=2, cell_shape=(13, 9), drop_axis=axis, boundary=boundary
    )
    assert labels.shape == truth.shape
    assert same_objects(labels[...], truth)


def test_an_input_of_another_geometry_has_a_halo_of_its_own() -> None:
    truth = TRUTHS["balls"]
    rows = np.arange(truth.shape[0])

    def segment(block: NDArray[Any], numbers: NDArray[Any]) -> NDArray[Any]:
        assert numbers.size <= 8
        return block

    by_row = ci.Input(rows, halo=0, index_map=lambda roi: ci.Roi(roi.start[:1], roi.stop[:1]))
    assert same_objects(
        ci.map_labels(segment, truth, by_row, halo=[2, 3], cell_shape=8)[...], truth
    )
    with pytest.raises(ValueError, match="input 1 has a halo of its own"):
        ci.map_labels(segment, truth, ci.Input(truth, halo=1), halo=2)
    with pytest.raises(ValueError, match="give input 1 its own"):
        ci.map_labels(
            segment,
            truth,
            ci.Input(rows, index_map=lambda roi: ci.Roi(roi.start[:1], roi.stop[:1])),
            halo=2,
        )
    with pytest.raises(ValueError, match="drop_axis 2"):
        ci.map_labels(segment, truth, truth, halo=2, drop_axis=2)
