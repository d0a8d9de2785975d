"""Every kind of input gives the same result, without copies and decoding where none is needed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.geometry import BOUNDARIES

SHAPE = (7, 11, 13)
CHUNKS = (3, 4, 5)


class Minimal:
    """An object with ``shape``, ``dtype`` and ``__getitem__`` and nothing else."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        # No index but plain slices may be asked of such an object.
        assert isinstance(key, tuple)
        assert all(type(part) is slice and part.step in (None, 1) for part in key)
        assert all(0 <= p.start <= p.stop <= n for p, n in zip(key, self.shape, strict=True))
        return self._array[key]


class Chunked(Minimal):
    """A minimal object that says how it is chunked."""

    def __init__(self, array: NDArray[Any], chunks: Any) -> None:
        super().__init__(array)
        self.chunks = chunks


class Counting(Chunked):
    """A store that counts which regions are decoded."""

    def __init__(self, array: Any, chunks: Any) -> None:
        super().__init__(array, chunks)
        self.decoded: Counter[tuple[tuple[int, int], ...]] = Counter()
        self._lock = threading.Lock()

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        with self._lock:
            self.decoded[tuple((part.start, part.stop) for part in key)] += 1
        return super().__getitem__(key)


class Store:
    """Makes arrays of one kind in a folder; closes files in the end."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack

    def c_order(self, data: NDArray[Any]) -> Any:
        return np.array(data, order="C")

    def fortran_order(self, data: NDArray[Any]) -> Any:
        return np.asfortranarray(data)

    def negative_strides(self, data: NDArray[Any]) -> Any:
        backwards = (slice(None, None, -1),) * data.ndim
        return data[backwards].copy()[backwards]

    def strided(self, data: NDArray[Any]) -> Any:
        wide = np.zeros(tuple(3 * n for n in data.shape), data.dtype)
        wide[(slice(1, None, 3),) * data.ndim] = data
        return wide[(slice(1, None, 3),) * data.ndim]

    def other_byte_order(self, data: NDArray[Any]) -> Any:
        return data.astype(data.dtype.newbyteorder("S"))

    def read_only(self, data: NDArray[Any]) -> Any:
        locked = data.copy()
        locked.flags.writeable = False
        return locked

    def memmap(self, data: NDArray[Any], dtype: Any = None) -> Any:
        path = self.folder / "array.raw"
        kind = np.dtype(dtype or data.dtype)
        path.write_bytes(data.astype(kind).tobytes())
        return np.memmap(path, kind, "r", shape=data.shape)

    def memmap_of_other_byte_order(self, data: NDArray[Any]) -> Any:
        return self.memmap(data, data.dtype.newbyteorder("S"))

    def _zarr(self, data: NDArray[Any], **settings: Any) -> Any:
        array = zarr.create_array(
            str(self.folder / "array.zarr"),
            shape=data.shape,
            chunks=CHUNKS[: data.ndim],
            dtype=data.dtype,
            **settings,
        )
        array[...] = data
        return zarr.open_array(str(self.folder / "array.zarr"), mode="r")

    def zarr_3(self, data: NDArray[Any]) -> Any:
        return self._zarr(data)

    def zarr_3_without_compression(self, data: NDArray[Any]) -> Any:
        return self._zarr(data, compressors=None)

    def zarr_3_big_endian(self, data: NDArray[Any]) -> Any:
        return self._zarr(data, serializer=zarr.codecs.BytesCodec(endian="big"))

    def zarr_2(self, data: NDArray[Any]) -> Any:
        return self._zarr(data, zarr_format=2)

    def zarr_2_fortran_big_endian(self, data: NDArray[Any]) -> Any:
        return self._zarr(data.astype(data.dtype.newbyteorder(">")), zarr_format=2, order="F")

    def zarr_sharded(self, data: NDArray[Any]) -> Any:
        array = self._zarr(data, shards=tuple(2 * n for n in CHUNKS[: data.ndim]))
        assert array.shards is not None
        return array

    def _h5py(self, data: NDArray[Any], **settings: Any) -> Any:
        h5py = pytest.importorskip("h5py")
        file = self.stack.enter_context(h5py.File(self.folder / "array.h5", "w"))
        return file.create_dataset("array", data=data, **settings)

    def h5py_contiguous(self, data: NDArray[Any]) -> Any:
        return self._h5py(data)

    def h5py_chunked(self, data: NDArray[Any]) -> Any:
        return self._h5py(data, chunks=CHUNKS[: data.ndim])

    def h5py_compressed(self, data: NDArray[Any]) -> Any:
        return self._h5py(data, chunks=CHUNKS[: data.ndim], compression="gzip", shuffle=True)

    def tensorstore_zarr3(self, data: NDArray[Any]) -> Any:
        ts = pytest.importorskip("tensorstore")
        path = str(self.folder / "array.ts")
        store = ts.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}},
            create=True,
            dtype=data.dtype.newbyteorder("="),
            shape=data.shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=CHUNKS[: data.ndim]),
        ).result()
        store[...].write(data).result()
        return store

    def tensorstore_with_a_shifted_domain(self, data: NDArray[Any]) -> Any:
        offsets = (-100, 5, 2)[: data.ndim]
        return self.tensorstore_zarr3(data).translate_by[offsets]

    def tensorstore_cut_out_of_a_larger_one(self, data: NDArray[Any]) -> Any:
        larger = np.pad(data, [(2, 1)] * data.ndim, constant_values=1)
        store = self.tensorstore_zarr3(larger)
        # The domain begins at 2 and does not begin with a chunk.
        return store[tuple(slice(2, 2 + n) for n in data.shape)]

    def tensorstore_in_memory(self, data: NDArray[Any]) -> Any:
        ts = pytest.importorskip("tensorstore")
        return ts.array(data)

    def dask_regular(self, data: NDArray[Any]) -> Any:
        return da.from_array(data, chunks=CHUNKS[: data.ndim])

    def dask_irregular(self, data: NDArray[Any]) -> Any:
        chunks = ((1, 4, 2), (5, 6), (2, 2, 8, 1))[: data.ndim]
        return da.from_array(data, chunks=chunks)

    def dask_computed(self, data: NDArray[Any]) -> Any:
        return (da.from_array(data, chunks=4).T + 0).T.rechunk(3)[...]

    def dask_with_empty_chunks(self, data: NDArray[Any]) -> Any:
        chunks = ((0, 3, 0, 4), (11, 0), (0, 13))[: data.ndim]
        return da.from_array(data, chunks=chunks)

    def cell_image(self, data: NDArray[Any]) -> Any:
        return ci.map_cells(np.array, data, dtype=data.dtype, cell_shape=(2, 9, 4)[: data.ndim])

    def cell_image_that_is_not_kept(self, data: NDArray[Any]) -> Any:
        return ci.map_cells(np.array, data, dtype=data.dtype, cell_shape=3, cache=None)

    def minimal(self, data: NDArray[Any]) -> Any:
        return Minimal(data)

    def with_chunks(self, data: NDArray[Any]) -> Any:
        return Chunked(data, CHUNKS[: data.ndim])

    def with_a_list_of_chunks(self, data: NDArray[Any]) -> Any:
        return Chunked(data, [np.int64(n) for n in CHUNKS[: data.ndim]])

    def with_irregular_chunks(self, data: NDArray[Any]) -> Any:
        return Chunked(data, ((1, 4, 2), (5, 6), (2, 2, 8, 1))[: data.ndim])

    def with_chunks_that_do_not_fit(self, data: NDArray[Any]) -> Any:
        # Nothing to go by: read region by region.
        return Chunked(data, ((1, 4), (5, 6), (2,)))

    def with_chunks_none(self, data: NDArray[Any]) -> Any:
        return Chunked(data, None)


KINDS = [name for name in vars(Store) if not name.startswith("_")]
IN_MEMORY = KINDS[: KINDS.index("memmap_of_other_byte_order") + 1]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with ExitStack() as stack:
        yield Store(tmp_path, stack)


@pytest.fixture
def data(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 60_000, SHAPE).astype("u2")


def largest(a: NDArray[Any]) -> NDArray[Any]:
    return ndimage.maximum_filter(a, 3, mode="nearest")


def whole(function: Callable[..., Any], data: NDArray[Any], halo: int, mode: str) -> NDArray[Any]:
    if mode == "none" or not data.size:
        return np.asarray(function(data))
    fill = {"constant_values": 7} if mode == "constant" else {}
    crop = tuple(slice(halo, halo + n) for n in data.shape)
    return np.asarray(function(np.pad(data, halo, mode=mode, **fill))[crop])


# ---------------------------------------------------------------- all kinds


@pytest.mark.parametrize("boundary", ["none", "constant", "reflect", "wrap"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_same(store: Store, data: NDArray[Any], kind: str, boundary: str) -> None:
    source = getattr(store, kind)(data)
    expected = whole(largest, data, 2, boundary)
    lazy = ci.map_cells(
        largest,
        source,
        halo=2,
        boundary=boundary,
        fill_value=7,
        dtype="u2",
        cell_shape=(4, 5, 6),
    )
    assert lazy.dtype == np.uint16
    np.testing.assert_array_equal(lazy[5:, 3:7, 12], expected[5:, 3:7, 12])
    np.testing.assert_array_equal(lazy[...], expected)
    np.testing.assert_array_equal(lazy.to_dask().compute(scheduler="sync"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_native_and_read_only(store: Store, data: NDArray[Any], kind: str) -> None:
    source = getattr(store, kind)(data)
    before = np.array(data)
    seen = []

    def spoil(a: NDArray[Any]) -> NDArray[Any]:
        seen.append((a.dtype, a.flags.writeable, type(a)))
        a += 1
        return a

    lazy = ci.map_cells(spoil, source, halo=1, boundary="edge", dtype="u2", cell_shape=5)
    for index in (0, lazy.grid.num_cells // 2, lazy.grid.num_cells - 1):
        with pytest.raises(ci.BlockError, match="read-only") as caught:
            lazy.load(index)
        assert isinstance(caught.value.__cause__, ValueError)
    assert {(dtype.isnative, flag, kind) for dtype, flag, kind in seen} == {
        (True, False, np.ndarray)
    }
    np.testing.assert_array_equal(
        ci.map_cells(np.array, source, dtype="u2", cell_shape=5)[...], before
    )
    np.testing.assert_array_equal(data, before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cell_shape_the_cells_are_the_chunks(
    store: Store, data: NDArray[Any], kind: str
) -> None:
    source = getattr(store, kind)(data)
    lazy = ci.map_cells(np.negative, source, dtype="u2")
    expected = {
        "dask_irregular": (4, 6, 8),
        "with_irregular_chunks": (4, 6, 8),
        "cell_image": (2, 9, 4),
        **dict.fromkeys([k for k in KINDS if k.startswith("zarr")], CHUNKS),
        **dict.fromkeys(["h5py_chunked", "h5py_compressed", "dask_regular"], CHUNKS),
        **dict.fromkeys(["tensorstore_zarr3", "tensorstore_with_a_shifted_domain"], CHUNKS),
        **dict.fromkeys(["with_chunks", "with_a_list_of_chunks"], CHUNKS),
    }
    if kind in expected:
        assert lazy.cell_shape == expected[kind]
    assert all(size >= 1 for size in lazy.cell_shape)
    np.testing.assert_array_equal(lazy[...], np.negative(data))


ZERO_D = [
    "c_order",
    "other_byte_order",
    "zarr_3",
    "zarr_2",
    "h5py_contiguous",
    "tensorstore_zarr3",
    "tensorstore_in_memory",
    "dask_regular",
    "cell_image",
    "minimal",
    "with_chunks",
    "with_chunks_none",
]


@pytest.mark.parametrize("kind", ZERO_D)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_arrays_without_axes(store: Store, kind: str, boundary: str) -> None:
    source = getattr(store, kind)(np.array(42, "u2"))
    lazy = ci.map_cells(np.negative, source, halo=3, boundary=boundary, dtype="u2")
    assert (lazy.shape, lazy.grid.num_cells) == ((), 1)
    assert lazy[()] == np.negative(np.uint16(42))
    assert lazy.to_dask().compute(scheduler="sync") == np.negative(np.uint16(42))


EMPTY = [kind for kind in ZERO_D if kind != "other_byte_order"] + ["h5py_chunked"]


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0)])
def test_arrays_without_voxels(store: Store, kind: str, shape: tuple[int, ...]) -> None:
    if kind == "h5py_chunked":
        h5py = pytest.importorskip("h5py")
        file = store.stack.enter_context(h5py.File(store.folder / "empty.h5", "w"))
        source = file.create_dataset(
            "array", shape, "u2", chunks=(2,) * len(shape), maxshape=(None,) * len(shape)
        )
    else:
        source = getattr(store, kind)(np.zeros(shape, "u2"))
    lazy = ci.map_cells(np.negative, source, halo=1, boundary="reflect", dtype="u2")
    assert lazy[...].shape == lazy.to_dask().compute(scheduler="sync").shape == shape


@pytest.mark.parametrize("kind", ["c_order", "memmap", "zarr_3", "zarr_2", "h5py_chunked"])
@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", ">f4", "f8", "c8", "c16"])
def test_dtypes_of_stores(store: Store, rng: np.random.Generator, kind: str, dtype: str) -> None:
    data = (rng.normal(size=(6, 8)) * 50).astype("c16" if "c" in dtype else "f8")
    data = np.abs(data).astype(dtype) if dtype in "?u8" else data.astype(dtype)
    source = getattr(store, kind)(data)
    native = data.astype(data.dtype.newbyteorder("="))
    lazy = ci.map_cells(np.array, source, halo=2, boundary="wrap", dtype=dtype, cell_shape=3)
    assert lazy.dtype == native.dtype
    np.testing.assert_array_equal(lazy[...], native)


@settings(max_examples=40)
@given(draw=st.data())
def test_any_chunks_any_cells(draw: st.DataObject) -> None:
    ndim = draw.draw(st.integers(1, 3))
    shape = draw.draw(st.tuples(*[st.integers(1, 9)] * ndim))
    image = np.arange(np.prod(shape)).reshape(shape)
    chunks = tuple(
        tuple(np.diff([0, *sorted(draw.draw(st.lists(st.integers(0, n), max_size=3))), n]).tolist())
        for n in shape
    )
    sources = {
        "numpy": image,
        "dask": da.from_array(image, chunks=chunks),
        "chunks": Chunked(image, chunks),
        "image": ci.map_cells(np.array, image, dtype=int, cell_shape=tuple(max(c) for c in chunks)),
    }
    boundary = draw.draw(st.sampled_from(BOUNDARIES))
    width = draw.draw(st.integers(0, 12))
    cells = draw.draw(st.tuples(*[st.integers(1, 10)] * ndim))
    expected = whole(largest, image, width + 1, boundary)
    for name, source in sources.items():
        lazy = ci.map_cells(
            largest,
            source,
            halo=width + 1,
            boundary=boundary,
            fill_value=7,
            dtype=int,
            cell_shape=cells,
        )
        np.testing.assert_array_equal(lazy[...], expected, err_msg=name)


# ---------------------------------------------------------------- no copies


@pytest.mark.parametrize(
    "kind",
    ["c_order", "fortran_order", "negative_strides", "strided", "read_only", "memmap"],
)
@pytest.mark.parametrize("halo", [0, 1])
def test_a_block_shares_the_memory_of_an_array(
    store: Store, data: NDArray[Any], kind: str, halo: int
) -> None:
    source = getattr(store, kind)(data)
    was_writeable = source.flags.writeable
    blocks = []

    def look(a: NDArray[Any]) -> NDArray[Any]:
        blocks.append(a)
        return a

    lazy = ci.map_cells(look, source, halo=halo, dtype="u2", cell_shape=(3, 4, 5))
    cell = lazy.load((1, 1, 1))
    (block,) = blocks
    assert np.shares_memory(block, source)
    assert not block.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        block[...] = 0
    assert source.flags.writeable == was_writeable
    region = tuple(
        slice(c - halo, min(2 * c + halo, n)) for c, n in zip((3, 4, 5), SHAPE, strict=True)
    )
    np.testing.assert_array_equal(block, data[region])
    # What is kept is a copy: it stays when the array changes.
    assert not np.shares_memory(cell, source)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_never_shares_memory_with_an_input(
    store: Store, data: NDArray[Any], kind: str
) -> None:
    source = getattr(store, kind)(data)
    blocks = []

    def identity(a: NDArray[Any]) -> NDArray[Any]:
        blocks.append(a)
        return a

    lazy = ci.map_cells(identity, source, dtype="u2", cell_shape=CHUNKS)
    cell = lazy.load(0)
    assert not np.shares_memory(cell, blocks[0])
    assert cell.flags.owndata
    assert not cell.flags.writeable
    np.testing.assert_array_equal(cell, data[:3, :4, :5])


def test_a_block_that_is_one_cell_of_an_image_is_that_cell(data: NDArray[Any]) -> None:
    upstream = ci.map_cells(np.array, data, dtype="u2", cell_shape=CHUNKS)
    blocks = []

    def look(a: NDArray[Any]) -> NDArray[Any]:
        blocks.append(a)
        return a

    ci.map_cells(look, upstream, dtype="u2", cell_shape=CHUNKS).load((1, 1, 1))
    assert np.shares_memory(blocks[0], upstream.load((1, 1, 1)))
    assert not blocks[0].flags.writeable


def test_a_new_array_is_returned_by_each_read(data: NDArray[Any]) -> None:
    lazy = ci.map_cells(lambda a: a, data, dtype="u2", cell_shape=SHAPE)
    one, other = lazy[...], lazy[...]
    one[...] = 0
    np.testing.assert_array_equal(other, data)
    np.testing.assert_array_equal(lazy.load(0), data)


def test_a_store_that_uses_its_buffer_again_is_copied() -> None:
    class Reusing(Chunked):
        """Gives out one and the same memory for each chunk."""

        buffer = np.zeros(2)

        def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
            self.buffer[...] = super().__getitem__(key)
            return self.buffer

    image = np.arange(6.0)
    lazy = ci.map_cells(np.array, Reusing(image, (2,)), dtype=float, cell_shape=6)
    np.testing.assert_array_equal(lazy[:], image)


def test_a_function_that_uses_its_buffer_again_is_copied() -> None:
    buffer = np.zeros(2)

    def reusing(a: NDArray[Any]) -> NDArray[Any]:
        buffer[...] = a
        return buffer

    image = np.arange(6.0)
    lazy = ci.map_cells(reusing, image, dtype=float, cell_shape=2)
    cells = [lazy.load(index) for index in range(3)]
    np.testing.assert_array_equal(np.concatenate(cells), image)


# ---------------------------------------------------------------- each chunk once


def chunk_boxes(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Counter[Any]:
    grid = ci.CellGrid(shape, chunks)
    return Counter(
        tuple(zip(cell.roi.start, cell.roi.stop, strict=True))
        for cell in map(grid.cell, range(grid.num_cells))
    )


def counting(store: Store, data: NDArray[Any], kind: str) -> Counting:
    return Counting(getattr(store, kind)(data), CHUNKS)


COUNTED = ["c_order", "zarr_3", "h5py_chunked"]


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("boundary", ["none", "wrap"])
def test_each_chunk_is_decoded_once_for_a_whole_read_with_halo(
    store: Store, data: NDArray[Any], kind: str, boundary: str
) -> None:
    source = counting(store, data, kind)
    lazy = ci.map_cells(
        largest, source, halo=2, boundary=boundary, dtype="u2", cell_shape=(2, 3, 4)
    )
    assert not source.decoded
    np.testing.assert_array_equal(lazy[...], whole(largest, data, 2, boundary))
    assert source.decoded == chunk_boxes(SHAPE, CHUNKS)


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("kept", ["shared", None])
def test_each_chunk_is_decoded_once_by_eight_threads(
    store: Store, data: NDArray[Any], kind: str, kept: str | None
) -> None:
    source = counting(store, data, kind)
    lazy = ci.map_cells(
        largest, source, halo=2, boundary="none", dtype="u2", cell_shape=(2, 3, 4), cache=kept
    )
    expected = whole(largest, data, 2, "none")
    start = threading.Barrier(8)
    right = []

    def work() -> None:
        start.wait(timeout=30)
        right.append(np.array_equal(lazy[...], expected))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert right == [True] * 8
    assert source.decoded == chunk_boxes(SHAPE, CHUNKS)


def test_each_chunk_is_decoded_once_for_all_images_of_a_store(
    store: Store, data: NDArray[Any]
) -> None:
    source = counting(store, data, "zarr_3")
    one = ci.map_cells(largest, source, halo=1, dtype="u2", cell_shape=4)
    other = ci.map_cells(np.negative, source, dtype="u2", cell_shape=5)
    both = ci.map_cells(np.add, one, source, cell_shape=3)
    both[...], other[...], one[...]
    assert source.decoded == chunk_boxes(SHAPE, CHUNKS)


def test_a_region_decodes_only_the_chunks_it_needs(store: Store, data: NDArray[Any]) -> None:
    source = counting(store, data, "zarr_3")
    lazy = ci.map_cells(largest, source, halo=1, dtype="u2", cell_shape=CHUNKS)
    lazy[3:6, 4:8, 5:10]
    near = {
        box
        for box in chunk_boxes(SHAPE, CHUNKS)
        if all(a <= n for (a, _), n in zip(box, (6, 8, 10), strict=True))
    }
    assert set(source.decoded) == near
    assert set(source.decoded.values()) == {1}


def test_each_dask_chunk_is_computed_once(data: NDArray[Any]) -> None:
    runs: Counter[Any] = Counter()
    lock = threading.Lock()

    def note(a: NDArray[Any], block_info: Any = None) -> NDArray[Any]:
        with lock:
            runs[block_info[0]["chunk-location"]] += 1
        return a

    source = da.map_blocks(note, da.from_array(data, chunks=CHUNKS), dtype="u2", meta=data[:0])
    lazy = ci.map_cells(largest, source, halo=2, dtype="u2", cell_shape=(2, 3, 4))
    assert not runs
    np.testing.assert_array_equal(lazy[...], largest(data))
    assert set(runs.values()) == {1}
    assert len(runs) == np.prod(source.numblocks)


def test_a_chunk_that_cannot_be_decoded_is_an_error_and_tried_again() -> None:
    class Failing(Chunked):
        broken = True

        def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
            if self.broken and key[0].start == 4:
                raise OSError(5, "the disk is gone")
            return super().__getitem__(key)

    for chunks in ((4,), None):
        source = Failing(np.arange(8.0), chunks)
        lazy = ci.map_cells(np.negative, source, cell_shape=4)
        with pytest.raises(
            ci.ReadError, match=r"negative at cell \(1,\) \[4:8\]: .*disk is gone"
        ) as it:
            lazy[:]
        assert isinstance(it.value, OSError)
        assert isinstance(it.value.__cause__, OSError)
        assert "input 0" in str(it.value)
        assert lazy.peek(1) is None
        np.testing.assert_array_equal(lazy[:4], np.negative(np.arange(4.0)))
        source.broken = False
        np.testing.assert_array_equal(lazy[:], np.negative(np.arange(8.0)))


@pytest.mark.parametrize("chunks", [(4,), None])
def test_a_store_that_lies_about_its_shape_is_an_error(chunks: Any) -> None:
    source = Chunked(np.arange(8.0), chunks)
    source.shape = (9,)
    lazy = ci.map_cells(np.negative, source, cell_shape=3)
    with pytest.raises(ci.ReadError, match=r"gave shape \([02],\) for a region of shape \(") as it:
        lazy[:] if chunks is None else lazy.load(2)
    assert it.value.position == (2,)


@pytest.mark.parametrize("kind", ["chunks", "regions", "dask"])
def test_a_store_that_lies_about_its_dtype_is_an_error_or_is_cast_everywhere(kind: str) -> None:
    # What a block gets must not depend on how many chunks it touches.
    class Lying(Chunked):
        def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
            return super().__getitem__(key) + 0.5

    values = np.arange(8, dtype="i4")
    source: Any = Lying(values, (4,) if kind == "chunks" else None)
    if kind == "dask":
        source = da.from_array(values, chunks=4).map_blocks(
            lambda a: a + 0.5, dtype="i4", meta=values[:0]
        )
    seen = set()

    def look(a: NDArray[Any]) -> NDArray[Any]:
        seen.add(a.dtype)
        return a

    lazy = ci.map_cells(look, source, halo=1, boundary="edge", dtype="f8", cell_shape=2)
    try:
        lazy[:]
    except ci.ReadError as error:
        says = str(error)
    else:
        says = "cast from float64 to int32"
        assert seen == {np.dtype("i4")}
    assert "float64" in says
    assert "int32" in says


# ---------------------------------------------------------------- several inputs


@settings(max_examples=25)
@given(draw=st.data())
def test_inputs_of_different_grids_and_dtypes(draw: st.DataObject) -> None:
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    arrays = [rng.integers(0, 99, (6, 8)).astype(dtype) for dtype in ("u1", ">i2", "f4", "c8")]
    sources = [
        arrays[0],
        Chunked(arrays[1], (4, 3)),
        da.from_array(arrays[2], chunks=((1, 5), (3, 3, 2))),
        ci.map_cells(np.array, arrays[3], dtype="c8", cell_shape=(5, 2)),
    ]
    order = draw.draw(st.permutations(range(4)))

    def combine(*blocks: NDArray[Any]) -> NDArray[Any]:
        smooth = [ndimage.uniform_filter(b.astype("c16"), 3, mode="nearest") for b in blocks]
        return smooth[0] * 8 + smooth[1] * 4 + smooth[2] * 2 + smooth[3]

    lazy = ci.map_cells(
        combine,
        *[sources[n] for n in order],
        halo=1,
        dtype="c16",
        cell_shape=draw.draw(st.tuples(st.integers(1, 7), st.integers(1, 9))),
    )
    # A running mean is not the same bit for bit wherever it begins.
    np.testing.assert_allclose(lazy[...], combine(*[arrays[n] for n in order]), rtol=1e-12)


def test_inputs_are_broadcast_as_numpy_does(data: NDArray[Any]) -> None:
    volume, plane, line, number = data, data[:1], data[0, 0], np.array(3, "u2")

    def combine(*blocks: NDArray[Any]) -> NDArray[Any]:
        return sum((b.astype("i8") * 10**n for n, b in enumerate(blocks)), np.int64(0))

    for inputs in (
        [volume, plane, line, number],
        [number, line, plane, volume],
        [line, volume],
        # None of them has the whole shape.
        [data[:, :1], data[:1, :, :1]],
        [data[:, :1, :1], line],
        [np.zeros((1, 1, 1), "u2"), plane],
    ):
        expected = combine(*inputs)
        for halo, boundary in ((0, "none"), (2, "reflect"), ([(0, 1), (5, 0), (1, 2)], "edge")):
            lazy = ci.map_cells(
                combine,
                *inputs,
                dtype="i8",
                halo=halo,
                boundary=boundary,
                cell_shape=(3, 4, 5),
            )
            np.testing.assert_array_equal(lazy[...], expected)
            got = lazy.to_dask().compute(scheduler="sync")
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["zarr_3", "dask_irregular", "cell_image", "minimal"])
def test_a_store_is_broadcast_too(store: Store, data: NDArray[Any], kind: str) -> None:
    source = getattr(store, kind)(data[0, 0][:7])
    lazy = ci.map_cells(np.add, data[:, :, :7], source, halo=1, cell_shape=(3, 4, 5))
    np.testing.assert_array_equal(lazy[...], data[:, :, :7] + data[0, 0][:7])


def test_each_input_has_its_own_halo_boundary_and_fill(data: NDArray[Any]) -> None:
    image, other = data[0].astype("i4"), data[1].astype("i4")
    shapes = set()

    def combine(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any], d: NDArray[Any]) -> NDArray[Any]:
        shapes.add((a.shape, b.shape, c.shape, d.shape))
        return (
            a
            + b[2:-2, 2:-2] * b[:-4, 4:]
            + c[1:, :] * c[:-1, :]
            + ndimage.maximum_filter(d, 3)[1:-1, 3:-3]
        )

    def combined(cell_shape: tuple[int, int]) -> ci.CellImg:
        return ci.map_cells(
            combine,
            ci.Input(image, halo=0),
            ci.Input(other, halo=2, boundary="constant", fill_value=-9),
            ci.Input(other, halo=[(1, 0), (0, 0)], boundary="edge"),
            image,
            halo=(1, 3),
            boundary="wrap",
            dtype="i4",
            cell_shape=cell_shape,
        )

    around = np.pad(other, 2, constant_values=-9)
    above = np.pad(other, [(1, 0), (0, 0)], mode="edge")
    expected = (
        image
        + around[2:-2, 2:-2] * around[:-4, 4:]
        + above[1:] * above[:-1]
        + ndimage.maximum_filter(np.pad(image, [(1, 1), (3, 3)], mode="wrap"), 3)[1:-1, 3:-3]
    )
    np.testing.assert_array_equal(combined((11, 13))[...], expected)
    assert shapes == {((11, 13), (15, 17), (12, 13), (13, 19))}
    np.testing.assert_array_equal(combined((4, 5))[...], expected)


def test_an_index_map_relates_a_reference_to_a_series(data: NDArray[Any]) -> None:
    # One plane next to a series of them, read with a border of its own.
    reference = data[3].astype("f8")
    series = data.astype("f8")

    def divide(frames: NDArray[Any], plane: NDArray[Any]) -> NDArray[Any]:
        smooth = ndimage.maximum_filter(plane, 3)[1:-1, 1:-1]
        return frames / (1 + smooth)

    lazy = ci.map_cells(
        divide,
        series,
        ci.Input(
            reference,
            halo=1,
            boundary="symmetric",
            index_map=lambda roi: ci.Roi(roi.start[1:], roi.stop[1:]),
        ),
        dtype="f8",
        cell_shape=(2, 4, 5),
    )
    smooth = ndimage.maximum_filter(np.pad(reference, 1, mode="symmetric"), 3)[1:-1, 1:-1]
    np.testing.assert_array_equal(lazy[...], series / (1 + smooth))


def test_index_maps_may_transpose_shift_and_scale(data: NDArray[Any]) -> None:
    image = data[0]  # (11, 13)
    fine = np.repeat(np.repeat(image, 2, axis=0), 3, axis=1).astype("u4")
    turned = np.ascontiguousarray(image.T)

    def swap(roi: ci.Roi) -> ci.Roi:
        return ci.Roi(roi.start[::-1], roi.stop[::-1])

    def finer(roi: ci.Roi) -> ci.Roi:
        (y0, x0), (y1, x1) = roi.start, roi.stop
        return ci.Roi((2 * y0, 3 * x0), (2 * y1, 3 * x1))

    def combine(block: ci.Block) -> None:
        flat, small, moved = block.inputs
        block.data[...] = flat.T + small[::2, ::3] + moved.astype("u4")

    def check(sources: list[Any]) -> None:
        lazy = ci.fill_cells(
            combine,
            ci.CellGrid((11, 13), (4, 5)),
            ci.Input(sources[0], index_map=swap),
            ci.Input(sources[1], index_map=finer),
            ci.Input(
                sources[2],
                index_map=lambda roi: roi.shift((2, -3)),
                boundary="constant",
                fill_value=5,
            ),
            dtype="u4",
        )
        moved = np.pad(image, [(0, 2), (3, 0)], constant_values=5)[2:, :-3]
        expected = turned.T + fine[::2, ::3] + moved.astype("u4")
        np.testing.assert_array_equal(lazy[...], expected)
        np.testing.assert_array_equal(lazy.to_dask().compute(scheduler="sync"), expected)

    check([turned, fine, image])
    check([da.from_array(turned, chunks=3), Chunked(fine, (5, 5)), Minimal(image)])
    check([ci.map_cells(np.array, a, dtype=a.dtype, cell_shape=3) for a in (turned, fine, image)])


def test_the_same_array_may_be_several_inputs(data: NDArray[Any]) -> None:
    source = Counting(data, CHUNKS)
    lazy = ci.map_cells(
        lambda a, b, c: a + b[2:-2, 2:-2, 2:-2] + c,
        source,
        ci.Input(source, halo=2, boundary="reflect"),
        source,
        dtype="u2",
        cell_shape=4,
    )
    np.testing.assert_array_equal(lazy[...], data * np.uint16(3))
    assert source.decoded == chunk_boxes(SHAPE, CHUNKS)


def test_an_image_reads_itself_at_another_time_through_a_chain(data: NDArray[Any]) -> None:
    # Not a cycle: two images of one definition, one reading the other twice.
    first = ci.map_cells(np.negative, data, cell_shape=CHUNKS)
    second = ci.map_cells(np.subtract, first, first, cell_shape=(5, 5, 5))
    np.testing.assert_array_equal(second[...], np.zeros(SHAPE))
    assert first.stats().loads == first.grid.num_cells


def test_many_inputs_read_no_more_than_their_part(data: NDArray[Any]) -> None:
    sources = [Counting(data + np.uint16(n), CHUNKS) for n in range(5)]
    lazy = ci.map_cells(lambda *blocks: sum(blocks), *sources, dtype="u2", cell_shape=CHUNKS)
    lazy[:3, :4, :5]
    for source in sources:
        assert source.decoded == Counter({((0, 3), (0, 4), (0, 5)): 1})
