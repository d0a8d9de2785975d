"""Ways of using an image that are easy to get wrong from the inside."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci


@pytest.mark.parametrize("cache", ["shared", None])
def test_block_data_can_be_reshaped_into_a_view(cache: Any) -> None:
    def fill(block: ci.Block) -> None:
        block.data.reshape(-1)[:] = 7

    image = ci.fill_cells(fill, ci.CellGrid((6, 6), 4), dtype="i4", cache=cache)
    np.testing.assert_array_equal(image[:], np.full((6, 6), 7))
    np.testing.assert_array_equal(image[1:5, 2:6], np.full((4, 4), 7))


@pytest.mark.parametrize("boundary", ["none", "constant", "reflect", "symmetric", "edge", "wrap"])
def test_a_dropped_axis_is_read_without_halo(boundary: str) -> None:
    volume = np.arange(4 * 6 * 7.0).reshape(4, 6, 7)
    image = ci.map_cells(
        lambda a: a.sum(axis=0),
        volume,
        drop_axis=0,
        halo=1,
        boundary=boundary,
        fill_value=5,
        dtype=float,
        cell_shape=3,
    )
    np.testing.assert_array_equal(image[:], volume.sum(axis=0))


def test_masks_that_a_store_gives_are_not_lost_in_silence() -> None:
    masked = np.ma.masked_greater(np.arange(9.0), 5)

    class Masking:
        shape, dtype = masked.shape, masked.dtype

        def __getitem__(self, box: tuple[slice, ...]) -> Any:
            return masked[box]

    for source in (Masking(), da.from_array(masked, chunks=3)):
        image = ci.map_cells(np.negative, source, cell_shape=3)
        np.testing.assert_array_equal(image[:6], -np.arange(6.0))
        with pytest.raises(ci.ReadError, match="mask would be lost"):
            image[6:]
    with pytest.raises(ci.ReadError, match="mask would be lost"):
        image.to_dask().compute(scheduler="sync")


@pytest.mark.parametrize("cache", ["shared", None])
def test_reading_into_the_input_itself(cache: Any) -> None:
    data = np.arange(48.0).reshape(6, 8)
    expected = ndi.maximum_filter(data, 3)
    image = ci.map_cells(
        ndi.maximum_filter, data, halo=1, dtype=float, cell_shape=2, params={"size": 3}, cache=cache
    )
    image.read_into(data)
    np.testing.assert_array_equal(data, expected)


def test_a_new_image_over_a_store_that_changed_has_another_name(tmp_path: Path) -> None:
    store = zarr.create_array(str(tmp_path / "a.zarr"), shape=(8,), chunks=(4,), dtype="u1")
    first = ci.map_cells(np.negative, store)
    before = first.to_dask().name
    store[:] = 2
    first.invalidate()
    assert ci.map_cells(np.negative, store).to_dask().name != before


def test_arithmetic_into_somebodys_array() -> None:
    image = ci.map_cells(np.negative, np.arange(6), cell_shape=4)
    out = np.empty(6, int)
    assert np.add(image, 1, out=out) is out
    np.testing.assert_array_equal(out, 1 - np.arange(6))
    with pytest.raises(TypeError, match=r"numpy\.add\.reduce has no lazy form; .*numpy\.sum"):
        np.add.reduce(image)


@pytest.mark.parametrize("name", ["mean", "T", "astype", "rechunk", "store"])
def test_methods_of_arrays_say_where_they_are(name: str) -> None:
    image = ci.map_cells(np.negative, np.arange(6))
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; use image\.to_dask\(\)"):
        getattr(image, name)
    assert not hasattr(image, "__cuda_array_interface__")


def test_truth_is_numpys() -> None:
    assert bool(ci.map_cells(np.negative, np.array([3])))
    assert not ci.map_cells(np.negative, np.array(0))
    with pytest.raises(ValueError, match="truth of an image of 6 voxels is ambiguous"):
        bool(ci.map_cells(np.negative, np.arange(6)))


def test_arguments_in_the_wrong_order() -> None:
    with pytest.raises(
        TypeError, match="f must be callable, got ndarray; the function comes first"
    ):
        ci.map_cells(np.arange(3), np.negative)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"make one by CellGrid\(shape, cell_shape\)"):
        ci.fill_cells(lambda block: None, (4, 6), dtype=int)  # type: ignore[arg-type]


def test_an_exception_that_cannot_say_what_it_is() -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no message")

    def fail(array: np.ndarray) -> np.ndarray:
        raise SilentError

    with pytest.raises(ci.BlockError, match="SilentError") as caught:
        ci.map_cells(fail, np.zeros(2), dtype=float)[:]
    assert isinstance(caught.value.__cause__, SilentError)


@pytest.mark.parametrize("chunks", [(2, 2), None])
def test_hdf5_travels_by_name(tmp_path: Path, chunks: Any) -> None:
    data = np.arange(24).reshape(4, 6)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("group/data", data=data, chunks=chunks)
        with pytest.raises(TypeError, match=r"open for writing .*mode='r'"):
            pickle.dumps(ci.map_cells(np.negative, dataset))
    with h5py.File(path, "r") as file:
        image = ci.map_cells(np.negative, file["group/data"], cell_shape=3)
        copy = pickle.loads(pickle.dumps(image))
        np.testing.assert_array_equal(copy[:], -data)
        np.testing.assert_array_equal(image.to_dask().compute(scheduler="processes"), -data)


def test_zarr_is_read_by_tensorstore_and_by_itself_alike(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    data = np.random.default_rng(0).integers(0, 1000, (9, 10)).astype(">u2")
    for number, options in enumerate(
        (
            {"zarr_format": 2, "dtype": ">u2"},
            {"zarr_format": 3, "dtype": "u2"},
            {"zarr_format": 3, "dtype": "u2", "shards": (8, 8)},
            {"zarr_format": 2, "dtype": "u2", "order": "F", "fill_value": 3},
        )
    ):
        local = zarr.create_array(
            str(tmp_path / f"{number}.zarr"), shape=(9, 10), chunks=(4, 4), **options
        )
        memory = zarr.create_array({}, shape=(9, 10), chunks=(4, 4), **options)
        for store in (local, memory):
            store[:4] = data[:4]  # The rest is never written.
            image = ci.map_cells(np.invert, store, cell_shape=5)
            np.testing.assert_array_equal(image[:], np.invert(store[:]))


def test_forgetting_millions_of_positions_lists_none() -> None:
    class Line:
        shape, dtype = (1 << 40,), np.dtype("u1")

        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            return np.zeros(box[0].stop - box[0].start, "u1")

    image = ci.map_cells(np.negative, Line(), cell_shape=64)
    image[5]
    image.invalidate()
    assert image.peek(0) is None


@pytest.mark.parametrize("moment", ["_load", "_admit"])
def test_an_interrupt_at_any_moment_of_a_load_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from cellimg_dask.state import cache as module

    image = ci.map_cells(np.negative, np.ones(4), cell_shape=2)
    owner = module.Shelf if moment == "_load" else module.CellCache

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            image.load(0)
    read: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: read.append(image.load(0)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the next read hangs"
    np.testing.assert_array_equal(read[0], [-1, -1])
