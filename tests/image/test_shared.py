"""``ci.shared`` with all else: inputs of images, sources, other processes, whatever can be put."""

from __future__ import annotations

import pickle
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import h5py
import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci
from cellimg_dask.image import shared as module


@pytest.fixture
def name() -> Iterator[str]:
    """A name that nobody has, and which is free again after the test."""
    name = f"cellimg-test-{secrets.token_hex(4)}"
    yield name
    ci.shared.cleanup(dead_owners=False, own=True)
    assert not Path("/dev/shm", name).exists()


@pytest.fixture
def image(rng: np.random.Generator) -> Any:
    return rng.integers(0, 1000, (20, 30, 40)).astype("u2")


def smoothed(image: Any) -> Any:
    return ndi.gaussian_filter(image.astype("f4"), 1, truncate=3)


def maximum(block: Any) -> Any:
    return ndi.maximum_filter(block, 3)


# ---------------------------------------------------------------------- as an input


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u2", ">u2"])
def test_an_image_reads_it_as_any_array(name: str, image: Any, order: str, dtype: str) -> None:
    with ci.shared.put(name, np.asarray(image.astype(dtype), order=order), "zyx") as shared:
        lazy = ci.map_cells(smoothed, shared, halo=3, dtype="f4", cell_shape=16)
        np.testing.assert_array_equal(lazy[...], smoothed(image))
        edged = ci.Input(shared, halo=1, boundary="edge")
        other = ci.map_cells(maximum, edged, dtype="u2", cell_shape=16)
        np.testing.assert_array_equal(other[...], ndi.maximum_filter(image, 3, mode="nearest"))


def test_blocks_are_views_of_the_memory(name: str, image: Any) -> None:
    seen = []

    def look(block: Any) -> Any:
        seen.append((np.shares_memory(block, shared.array), block.flags.writeable))
        return block

    with ci.shared.put(name, image) as shared:
        ci.map_cells(look, shared, halo=1, dtype="u2", cell_shape=10)[...]
        assert seen
        assert set(seen) == {(True, False)}
        seen.clear()


def test_what_changed_is_read_after_it_is_said(name: str) -> None:
    with ci.shared.put(name, np.zeros(6)) as mine, ci.shared.open(name) as other:
        lazy = ci.map_cells(np.negative, other, cell_shape=2)
        assert not lazy[...].any()
        mine[3] = 4
        lazy.invalidate(np.s_[3:4])
        assert lazy[...].tolist() == [0, 0, 0, -4, 0, 0]


def test_an_image_goes_on_when_the_handle_is_closed(name: str) -> None:
    with ci.shared.put(name, np.arange(6)):
        with ci.shared.open(name) as other:
            lazy = ci.map_cells(np.negative, other, cell_shape=2)
        assert lazy[4] == -4
    assert lazy[5] == -5


def test_an_image_written_into_its_own_input_reads_it_first(name: str, image: Any) -> None:
    with ci.shared.put(name, image) as shared:
        lazy = ci.map_cells(
            lambda block: ndi.maximum_filter(block, 3), shared, halo=1, dtype="u2", cell_shape=8
        )
        lazy.read_into(shared.array)
        np.testing.assert_array_equal(shared.array, ndi.maximum_filter(image, 3))


def test_a_graph_names_it(name: str) -> None:
    with ci.shared.put(name, np.zeros((4, 4))) as shared:
        lazy = ci.map_cells(np.add, shared, shared, dtype="f8")
        assert f"shared array {name}" in str(lazy.graph())
        assert f"Source in shared array {name}" in str(
            ci.map_cells(np.negative, shared.to_source(), dtype="f8").graph()
        )
        assert sum(node.kind == "array" for node in lazy.graph().nodes) == 1


def test_keys_on_disk_tell_its_values(name: str, tmp_path: Path) -> None:
    with ci.shared.put(name, np.arange(6)) as shared:
        lazy = ci.map_cells(np.negative, shared, cell_shape=3)
        target = tmp_path / "out.zarr"
        assert ci.run(lazy, target, progress=False).computed == 2
        again = ci.map_cells(np.negative, np.arange(6), cell_shape=3)
        assert ci.run(again, target, progress=False).skipped == 2
        shared[0] = 9
        changed = ci.map_cells(np.negative, shared, cell_shape=3)
        assert ci.run(changed, target, progress=False).computed == 1


# ---------------------------------------------------------------------- in other processes


def test_it_travels_as_its_name(name: str, image: Any) -> None:
    with ci.shared.put(name, image) as shared:
        lazy = ci.map_cells(np.negative, shared, dtype="u2", cell_shape=10)
        data = pickle.dumps(lazy)
        assert len(data) < image.nbytes / 4
        assert b"cellimg-test" in data
        there = pickle.loads(data)
        shared[0, 0, 0] = 5
        np.testing.assert_array_equal(there[...], np.negative(shared.array))
        assert len(pickle.dumps(lazy.to_dask())) < image.nbytes / 4
    del there
    with pytest.raises(FileNotFoundError, match="is gone: it travels as its name"):
        pickle.loads(data)


def test_dask_names_it_by_its_name(name: str) -> None:
    with ci.shared.put(name, np.zeros(10)) as shared:
        again = ci.shared.open(name)
        names = {ci.map_cells(np.negative, each).to_dask().name for each in (shared, again)} | {
            ci.map_cells(np.negative, pickle.loads(pickle.dumps(shared))).to_dask().name
        }
        assert len(names) == 1
        second = ci.shared.put(f"{name}-2", np.zeros(10))
        assert ci.map_cells(np.negative, second).to_dask().name not in names
    with ci.shared.put(name, np.zeros(10)) as later:
        assert ci.map_cells(np.negative, later).to_dask().name not in names


def test_worker_processes_and_clusters_read_it(name: str, image: Any, client: Any) -> None:
    expected = maximum(image)
    with ci.shared.put(name, image) as shared:
        with ci.BlockQueue(2, backend="processes") as queue:
            lazy = ci.map_cells(maximum, shared, halo=1, dtype="u2", cell_shape=10, queue=queue)
            np.testing.assert_array_equal(lazy[...], expected)
        with ci.BlockQueue(2, backend=client) as queue:
            lazy = ci.map_cells(maximum, shared, halo=1, dtype="u2", cell_shape=10, queue=queue)
            np.testing.assert_array_equal(lazy[...], expected)
        lazy = ci.map_cells(maximum, shared, halo=1, dtype="u2", cell_shape=10)
        with dask.config.set(scheduler=client):
            np.testing.assert_array_equal(lazy.to_dask().compute(), expected)
        # Workers write into it, too.
        with (
            dask.config.set(scheduler=client),
            ci.shared.empty(f"{name}-out", image.shape, "u2") as out,
        ):
            da.store(lazy.to_dask(), out, lock=False)
            np.testing.assert_array_equal(out.array, expected)
            with ci.shared.put(f"{name}-da", lazy.to_dask()) as put:
                np.testing.assert_array_equal(put.array, expected)
    assert not Path("/dev/shm", name).exists()


# ---------------------------------------------------------------------- as a source


def test_edits_of_a_source_are_seen_by_others(name: str, image: Any) -> None:
    with ci.shared.put(name, image) as mine, ci.shared.open(name, readonly=True) as theirs:
        source = mine.to_source(cell_shape=10)
        lazy = ci.map_cells(maximum, source, halo=1, dtype="u2")
        np.testing.assert_array_equal(lazy[...], maximum(image))
        before = lazy.snapshot()
        changes: list[Any] = []
        callback = lazy.on_dirty(changes.append)
        with source.edit() as a:
            a[3, 4:6, 5] = 60_000
            assert theirs[3, 4, 5] == image[3, 4, 5]
        assert theirs[3, 4, 5] == mine[3, 5, 5] == 60_000
        changed = image.copy()
        changed[3, 4:6, 5] = 60_000
        np.testing.assert_array_equal(theirs.array, changed)
        np.testing.assert_array_equal(lazy[...], maximum(changed))
        assert len(changes) == 1
        assert callback is not None
        # Who took a snapshot has what was computed, or is told; nobody gets a mixture.
        np.testing.assert_array_equal(before[12:, 12:, 12:], maximum(image)[12:, 12:, 12:])
        late = ci.map_cells(maximum, source, halo=1, dtype="u2", cell_shape=15).snapshot()
        with source.edit() as a:
            a[:] = 1
        with pytest.raises(ci.CellimgError, match="holds but one version"):
            late[0, 0, 0]
        assert theirs.array.max() == theirs.array.min() == 1


def test_a_source_copies_the_cells_that_are_read_only(name: str) -> None:
    cache = ci.CellCache(1 << 20)
    with ci.shared.put(name, np.zeros((100, 100))) as shared:
        source = shared.to_source(10, cache=cache)
        assert cache.stats().bytes == 0
        assert source[55, 55] == 0
        assert cache.stats().bytes == 800


def test_a_source_elsewhere_refuses_what_was_written_since(name: str) -> None:
    with ci.shared.put(name, np.arange(8.0)) as shared:
        source = shared.to_source(2)
        lazy = ci.map_cells(np.negative, source, cell_shape=2)
        data = pickle.dumps(lazy)
        assert pickle.loads(data)[:2].tolist() == [0, -1]
        with source.edit() as a:
            a[0] = 5
        with pytest.raises(ci.CellimgError, match="was written to after the snapshot was taken"):
            pickle.loads(data)[2:4]
        again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(lazy))))
        assert again[:2].tolist() == [-5, -1]
        later = shared.to_source(2, save="later")
        with later.edit() as a:
            a[1] = 7
        assert shared[1] == 1
        later.close()
        assert shared[1] == 7


def test_a_source_needs_to_write(name: str) -> None:
    with (
        ci.shared.put(name, np.arange(8.0)),
        ci.shared.open(name, readonly=True) as reader,
        pytest.raises(ValueError, match="for reading only; open it with readonly=False"),
    ):
        reader.to_source()


# ---------------------------------------------------------------------- what can be put


class Counted:
    """An array that notes how much of it is read at once."""

    def __init__(self, array: Any, chunks: Any) -> None:
        self._array, self.chunks = array, chunks
        self.shape, self.dtype = array.shape, array.dtype
        self.largest = 0

    def __getitem__(self, key: Any) -> Any:
        part = self._array[key]
        self.largest = max(self.largest, part.nbytes)
        return part


def kinds(image: Any, folder: Path) -> dict[str, Any]:
    v3 = zarr.create_array(folder / "v3.zarr", data=image, chunks=(7, 8, 9))
    sharded = zarr.create_array(
        folder / "shards.zarr", data=image, chunks=(5, 8, 8), shards=(10, 16, 16)
    )
    file = h5py.File(folder / "a.h5", "w")
    source = ci.Source(image, 10)
    stored = ci.Source(zarr.create_array(folder / "s.zarr", data=image, chunks=(9, 9, 9)))
    for each in (source, stored):
        with each.edit() as a:
            a[0] = a[0]
    zeros = np.zeros_like(image)
    return {
        "ndarray": image,
        "Fortran": np.asfortranarray(image),
        "strided": np.repeat(image, 2, axis=1)[:, ::2],
        "list": image.tolist(),
        "zarr": v3,
        "sharded": sharded,
        "HDF5": file.create_dataset("a", data=image, chunks=(4, 30, 40)),
        "HDF5 contiguous": file.create_dataset("b", data=image),
        "dask": da.from_array(image, chunks=(6, 30, 7)),
        "image": ci.map_cells(np.add, image, zeros, dtype="u2", cell_shape=(3, 20, 20)),
        "image of one cell": ci.map_cells(np.add, image, zeros, dtype="u2", cell_shape=90),
        "source": source,
        "stored source": stored,
        "unlike chunks": Counted(image, ((6, 14), (30,), (1, 39))),
    }


def test_whatever_is_an_array_can_be_put(name: str, image: Any, tmp_path: Path) -> None:
    for kind, array in kinds(image, tmp_path).items():
        with ci.shared.put(name, array) as shared:
            assert shared.dtype == (np.int64 if kind == "list" else "u2"), kind
            np.testing.assert_array_equal(shared.array, image, err_msg=kind)
            assert shared.order == ("F" if kind == "Fortran" else "C")


def test_other_libraries_arrays_can_be_put(name: str, image: Any, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    for array in (image, da.from_array(image, chunks=7)):
        with ci.shared.put(name, xarray.DataArray(array)) as shared:
            np.testing.assert_array_equal(shared.array, image)


def test_tensorstore_arrays_can_be_put(name: str, image: Any, tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    zarr.create_array(tmp_path / "a.zarr", data=image, chunks=(7, 8, 9))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "a.zarr")}}
    array = tensorstore.open(spec).result()
    with ci.shared.put(name, array) as shared:
        np.testing.assert_array_equal(shared.array, image)


@pytest.mark.parametrize("shape", [(), (0, 5), (5, 0)])
def test_lazy_images_without_voxels_or_axes_can_be_put(name: str, shape: tuple[int, ...]) -> None:
    lazy = ci.map_cells(np.negative, np.ones(shape), dtype="f8")
    with ci.shared.put(name, lazy) as shared:
        assert shared.shape == shape
        np.testing.assert_array_equal(shared.array, -np.ones(shape))


def test_large_things_are_read_by_pieces(name: str) -> None:
    array = np.ones((64, 256, 256))
    counted = Counted(array, None)
    with ci.shared.put(name, counted) as shared:
        assert shared.array.sum() == array.size
    assert counted.largest <= 16 << 20


def test_a_bar_shows_how_far_it_is(name: str, image: Any, capsys: Any) -> None:
    lazy = ci.map_cells(np.negative, image, cell_shape=2)
    for array in (image, lazy, da.from_array(image, chunks=10)):
        with ci.shared.put(name, array, progress="sharing"):
            told = capsys.readouterr().err
            assert "sharing:   0%" in told
            assert "100%" in told
    with pytest.raises(TypeError, match="progress must be a bool"):
        ci.shared.put(name, image, progress=5)  # type: ignore[arg-type]


def test_an_image_that_fails_leaves_nothing(name: str) -> None:
    def fail(block: Any) -> Any:
        raise ArithmeticError("no")

    lazy = ci.map_cells(fail, np.zeros((8, 8)), dtype="f8", cell_shape=2)
    for array in (lazy, lazy.to_dask()):
        with pytest.raises(ci.BlockError, match="ArithmeticError: no"):
            ci.shared.put(name, array)
        assert not Path("/dev/shm", name).exists()


def test_a_source_is_put_as_it_is_at_one_moment(name: str, pool: Any, tmp_path: Path) -> None:
    for store in (
        np.zeros((30, 30)),
        zarr.create_array(tmp_path / "a.zarr", data=np.zeros((30, 30)), chunks=(5, 5)),
    ):
        source = ci.Source(store, 5)
        done = threading.Event()

        def edit(source: ci.Source = source, done: threading.Event = done) -> None:
            number = 0
            while not done.is_set():
                number += 1
                with source.edit() as a:
                    a[...] = number

        task = pool.submit(edit)
        try:
            for _ in range(5):
                with ci.shared.put(name, source) as shared:
                    assert len(np.unique(shared.array)) == 1
        finally:
            done.set()
        task.result()


# ---------------------------------------------------------------------- the module


def test_shared_arrays_are_listed(name: str) -> None:
    with ci.shared.put(name, np.zeros((2, 3), "u2"), ("y", "x")) as shared:
        [info] = [info for info in ci.shared.list() if info.name == name]
        assert (info.shape, info.dtype, info.axes) == ((2, 3), np.dtype("u2"), ("y", "x"))
        assert (info.owner, info.is_alive, info.is_ready) == (shared.owner, True, True)
        assert info.nbytes == shared.offset + shared.nbytes
        ci.shared.remove(name)
        assert shared.closed
    assert name not in [info.name for info in ci.shared.list()]


def test_what_is_opened_and_unpickled_is_of_the_public_class(name: str) -> None:
    with ci.shared.put(name, [1]) as shared:
        for each in (shared, ci.shared.open(name), pickle.loads(pickle.dumps(shared))):
            assert type(each) is ci.shared.SharedArray


def test_the_module_is_the_public_one() -> None:
    assert ci.shared is module
    assert "multiprocessing.shared_memory" not in module.__dict__
