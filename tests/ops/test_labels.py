"""Connected components block by block, against those of the whole image."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from support import same_objects

import cellimg_dask as ci
from cellimg_dask.loading.crew import usable_cores


def random_case(rng: np.random.Generator) -> tuple[NDArray[Any], Any, tuple[int, ...]]:
    """Return a mask, a structuring element and a cell shape: ragged, tiny, or too large."""
    ndim = int(rng.integers(1, 5))
    most = (0, 300, 22, 9, 6)[ndim]
    shape = tuple(map(int, rng.integers(1, most + 1, ndim)))
    cells = tuple(map(int, rng.integers(1, (0, 9, 7, 5, 4)[ndim] + 1, ndim)))
    mask = rng.random(shape) < rng.uniform(0.1, 0.9)
    kind = rng.integers(3)
    structure = None
    if kind == 1:
        structure = ndimage.generate_binary_structure(ndim, int(rng.integers(1, ndim + 1)))
    elif kind == 2:
        # Odd ones: diagonals of one direction, holes, nothing but the middle.
        structure = rng.random((3,) * ndim) < rng.random()
        structure |= np.flip(structure)
    return mask, structure, cells


def test_components_equal_scipy_for_500_random_images() -> None:
    rng = np.random.default_rng(6)
    for _ in range(500):
        mask, structure, cells = random_case(rng)
        consecutive = bool(rng.integers(2))
        expected, count = ndimage.label(mask, structure)
        labels = ci.label(mask, structure, cell_shape=cells, consecutive=consecutive)
        found = labels[...]
        case = f"{mask.shape} in {cells}, {structure}"
        assert same_objects(found, expected), case
        assert labels.num_objects() == count, case
        if consecutive:
            np.testing.assert_array_equal(np.unique(found[found > 0]), np.arange(1, count + 1))


def test_one_cell_has_scipys_numbers() -> None:
    mask = np.random.default_rng(1).random((20, 30)) < 0.4
    labels = ci.label(mask, cell_shape=(20, 30))
    np.testing.assert_array_equal(labels[...], ndimage.label(mask)[0])


def test_any_nonzero_value_is_foreground() -> None:
    image = np.array([[0, -2, 3], [0.5, 0, 0], [0, 0, np.nan]])
    expected, _ = ndimage.label(image)
    assert same_objects(ci.label(image, cell_shape=2)[...], expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1)])
@pytest.mark.parametrize("value", [False, True])
def test_images_without_borders(shape: tuple[int, ...], value: bool) -> None:
    labels = ci.label(np.full(shape, value), cell_shape=2, consecutive=True)
    np.testing.assert_array_equal(labels[...], np.full(shape, value))
    assert labels.num_objects() == int(value and 0 not in shape)
    assert labels.dtype == np.uint64


def test_a_snake_through_all_cells_is_one_object() -> None:
    mask = np.zeros((40, 41), bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    labels = ci.label(mask, cell_shape=3, consecutive=True)
    np.testing.assert_array_equal(labels[...], mask)


def mask_of(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    noise = np.random.default_rng(2).random(shape)
    return np.asarray(ndimage.gaussian_filter(noise, 1) > 0.52)


@pytest.mark.parametrize("consecutive", [False, True])
def test_ids_do_not_depend_on_the_scheduler(client: Any, consecutive: bool) -> None:
    mask = mask_of((28, 35))
    settings: dict[str, Any] = {"cell_shape": 4, "consecutive": consecutive}
    expected = ci.label(mask, cache=ci.CellCache(1 << 26), **settings)[...]
    assert same_objects(expected, ndimage.label(mask)[0])

    def fresh(queue: Any = None) -> ci.CellImg:
        return ci.label(mask, cache=ci.CellCache(1 << 26), queue=queue, **settings)

    with ci.BlockQueue(2, backend="threads") as queue:
        np.testing.assert_array_equal(fresh(queue)[...], expected)
    with ci.BlockQueue(2, backend="processes") as queue:
        np.testing.assert_array_equal(fresh(queue)[...], expected)
    with ci.BlockQueue(backend=client) as queue:
        np.testing.assert_array_equal(fresh(queue)[...], expected)
    np.testing.assert_array_equal(fresh().to_dask().compute(scheduler="threads"), expected)
    np.testing.assert_array_equal(fresh().to_dask().compute(scheduler="sync"), expected)
    np.testing.assert_array_equal(client.compute(fresh().to_dask()).result(), expected)
    # From the last cell to the first, a cell at a time.
    image = fresh()
    for index in reversed(range(image.grid.num_cells)):
        cell = image.grid.cell(index)
        np.testing.assert_array_equal(image[cell.roi], expected[cell.roi.slices])


def test_there_are_few_tasks_per_cell(client: Any) -> None:
    from cellimg_dask.queues.tasks import graph_of

    labels = ci.label(np.zeros((64, 64, 64), bool), cell_shape=4)
    graph = dict(graph_of(labels.snapshot().loader, elsewhere=True))
    assert len(graph) <= 4 * labels.grid.num_cells


def test_a_lazy_mask_is_not_computed_before_it_is_read(rng: np.random.Generator) -> None:
    calls = []

    def noise(block: ci.Block) -> None:
        calls.append(block.index)
        block.data[...] = np.random.default_rng(block.index).random(block.shape)

    image = ci.fill_cells(noise, ci.CellGrid((20, 20), (6, 6)), dtype=float)
    labels = ci.label(image > 0.6)
    assert labels.cell_shape == (6, 6)
    assert not calls
    expected, count = ndimage.label(image[...] > 0.6)
    assert labels.num_objects() == count
    assert same_objects(labels[...], expected)
    assert sorted(calls) == list(range(16))


def test_an_edit_finds_the_labels_of_the_affected_blocks_again() -> None:
    mask = mask_of((40, 40))
    source = ci.Source(mask, cell_shape=8)
    labels = ci.label(source)
    before = labels[...]
    assert same_objects(before, ndimage.label(mask)[0])
    loads = labels.blocks.stats().loads
    snapshot = labels.snapshot()
    with source.edit() as array:
        array[20:22, :] = True
    mask[20:22, :] = True
    expected, count = ndimage.label(mask)
    assert same_objects(labels[...], expected)
    assert labels.num_objects() == count
    # The row of cells that holds it; the one before has it in no halo.
    assert labels.blocks.stats().loads == loads + 5
    np.testing.assert_array_equal(snapshot[...], before)


def test_a_cache_that_keeps_nothing_is_no_reason_to_compute_all_again() -> None:
    calls: list[int] = []

    def count(a: NDArray[Any]) -> NDArray[Any]:
        calls.append(1)
        return np.asarray(ndimage.label(a)[0])

    labels = ci.map_labels(
        count, mask_of((30, 30)), halo=1, link="components", cell_shape=5, cache=None
    )
    labels[...]
    # Once for its neighbours, and once for its own cell.
    assert len(calls) <= 2 * 36


@pytest.mark.parametrize(
    ("structure", "error"),
    [
        (np.ones((3, 3, 3)), "3 voxels along each of the 2 axes"),
        (np.ones((5, 5)), "3 voxels along each of the 2 axes"),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 0]], "symmetric"),
    ],
)
def test_bad_structures(structure: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ci.label(np.zeros((4, 4)), structure)


@given(st.data())
def test_blocks_that_were_stored_are_stitched_the_same(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 12)) for _ in range(ndim))
    cells = tuple(data.draw(st.integers(1, 6)) for _ in range(ndim))
    halo = [(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))) for _ in range(ndim)]
    seed = data.draw(st.integers(0, 1 << 16))
    mask = np.random.default_rng(seed).random(shape) < 0.5

    def components(a: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(ndimage.label(a)[0])

    labels = ci.map_labels(components, mask, halo=halo, link="components", cell_shape=cells)
    assert same_objects(labels[...], ndimage.label(mask)[0])
    stored = np.asarray(labels.blocks)
    again = ci.stitch(stored, ci.CellGrid(shape, cells), halo, link="components")
    np.testing.assert_array_equal(again[...], labels[...])


def test_dask_gives_what_the_image_gives() -> None:
    mask = mask_of((20, 20))
    labels = ci.label(mask, cell_shape=7)
    (found,) = dask.compute(labels)
    np.testing.assert_array_equal(found, labels[...])


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
@pytest.mark.parametrize("how", ["read", "request", "dask"])
def test_blocks_are_labelled_by_several_threads_at_once(how: str) -> None:
    both = threading.Barrier(2)

    def segment(a: NDArray[Any]) -> NDArray[Any]:
        # Nobody gets on alone.
        both.wait(60)
        return np.asarray(ndimage.label(a)[0])

    labels = ci.map_labels(
        segment, mask_of((16, 16)), halo=1, cell_shape=4, cache=ci.CellCache(1 << 24)
    )
    if how == "read":
        labels[...]
    elif how == "request":
        labels.request().result(60)
    else:
        labels.to_dask().compute(scheduler="threads", num_workers=2)


def test_deep_trees_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    for number in range(60):
        mask, structure, cells = random_case(rng)
        consecutive = bool(number % 2)
        settings: dict[str, Any] = {"cell_shape": cells, "consecutive": consecutive}
        flat = ci.label(mask, structure, **settings)
        with monkeypatch.context() as patch:
            patch.setattr("cellimg_dask.ops.labels.fan", lambda ndim: 2)
            deep = ci.label(mask, structure, **settings)
        found = deep[...]
        assert same_objects(found, ndimage.label(mask, structure)[0])
        assert deep.num_objects() == flat.num_objects()
        if consecutive:
            every = np.arange(1, deep.num_objects() + 1)
            np.testing.assert_array_equal(np.unique(found[found > 0]), every)
        else:
            np.testing.assert_array_equal(found, flat[...])


def test_the_version_of_stored_blocks_is_that_of_all_that_is_made_of_them(tmp_path: Path) -> None:
    mask = mask_of((12, 12))
    labels = ci.map_labels(
        lambda a: ndimage.label(a)[0], mask, halo=1, link="components", cell_shape=5
    )
    # What a dask array holds cannot be compared.
    blocks = dask.array.from_array(np.asarray(labels.blocks), chunks=7)
    grid = ci.CellGrid((12, 12), (5, 5))
    again = ci.stitch(ci.Input(blocks, version="1"), grid, 1, link="components")
    report = ci.run(again, tmp_path / "labels.zarr", progress=False)
    assert report.ok
    assert ci.run(again, tmp_path / "labels.zarr", progress=False).skipped == 9
    with pytest.raises(ci.NoContentError, match="version"):
        ci.run(ci.stitch(blocks, grid, 1), tmp_path / "other.zarr", progress=False)
