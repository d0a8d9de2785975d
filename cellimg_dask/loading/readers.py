"""Reading a box of an input, whatever kind of array it is.

A reader returns exactly the box it is asked for, as a view wherever that is possible. Chunked
stores are read chunk by chunk through the cell cache, so that a chunk is decoded once and not
once for each neighbouring cell.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.shared_array import SharedArray
from cellimg_dask.blocks.errors import SourceChangedError
from cellimg_dask.blocks.plan import Box, Region
from cellimg_dask.geometry import AxisWindow, CellGrid, IrregularGrid, TileGrid, tiles
from cellimg_dask.loading.file_array import FileArray, is_xarray, unwrapped
from cellimg_dask.state.cache import CellCache, get_cache
from cellimg_dask.state.dirty import cells_meeting

__all__ = [
    "AbsentReader",
    "ArrayReader",
    "ChunkedReader",
    "PinnedReader",
    "Reader",
    "SharedReader",
    "TiledReader",
    "make_reader",
    "native",
    "pinned",
    "portable",
    "quick_source",
    "read_windows",
    "stored_array",
]


class Reader(Protocol):
    """Gives boxes of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, box: Box) -> NDArray[Any]:
        """Return the box, perhaps as a view that must not be written to."""
        ...


def native(dtype: Any) -> np.dtype[Any]:
    """Return ``dtype`` in this machine's byte order."""
    result: np.dtype[Any] = np.dtype(dtype).newbyteorder("=")
    return result


def read_windows(reader: Reader, windows: Sequence[AxisWindow], fill_value: Any) -> NDArray[Any]:
    """Read a block with its border: the spans, mirrored or repeated, then the constants.

    Returns
    -------
    ndarray
        Read-only, native byte order; a view of the input where no copy is needed.
    """
    box = tuple([window.plain for window in windows])
    if None not in box:
        block = reader.read(box)  # type: ignore[arg-type]
        if not block.dtype.isnative:
            block = block.astype(native(block.dtype))
        if block.flags.writeable:
            # Readers return views of their own, so the flag does not reach the source.
            block.flags.writeable = False
        return block
    joined = IrregularGrid([[b - a for a, b in window.spans] for window in windows])
    starts = [[a for a, _ in window.spans] for window in windows]
    if len(joined.grid_shape) == sum(joined.grid_shape):
        block = reader.read(tuple(slice(*window.spans[0]) for window in windows))
    else:
        # A wrapped border: the image's two ends lie side by side.
        block = np.empty(joined.shape, native(reader.dtype))
        for position in np.ndindex(*joined.grid_shape):
            target = joined.slices(position)
            block[target] = reader.read(
                tuple(
                    slice(starts[axis][p], starts[axis][p] + part.stop - part.start)
                    for axis, (p, part) in enumerate(zip(position, target, strict=True))
                )
            )
    for axis, window in enumerate(windows):
        if window.take is not None:
            block = block.take(window.take, axis=axis)
    if any(window.before or window.after for window in windows):
        framed = np.full(
            tuple(window.length for window in windows), fill_value, native(reader.dtype)
        )
        framed[tuple(slice(window.before, window.length - window.after) for window in windows)] = (
            block
        )
        block = framed
    if not block.dtype.isnative:
        block = block.astype(native(block.dtype))
    block.flags.writeable = False
    return block


class ArrayReader:
    """Reads memory: NumPy arrays and memory maps, without a copy."""

    def __init__(self, array: NDArray[Any]) -> None:
        # Not np.asarray: a memmap's own slicing is many times slower than its buffer's.
        self.array = array.view(np.ndarray)
        self.shape = array.shape
        self.dtype = array.dtype

    def read(self, box: Box) -> NDArray[Any]:
        """Return a view of the box."""
        return self.array[box] if box else self.array.view()


class SharedReader(ArrayReader):
    """Reads a shared array, without a copy; where this is pickled, that is attached to."""

    def __init__(self, shared: SharedArray) -> None:
        super().__init__(shared.array)
        # Closed by its owner the memory can be read all the same.
        self.shared = shared

    def __reduce__(self) -> tuple[Any, ...]:
        return make_reader, (self.shared, get_cache())


class FileReader(ArrayReader):
    """Reads a file that is mapped into memory; where this is pickled, it is mapped anew."""

    def __init__(self, file: FileArray, array: NDArray[Any]) -> None:
        super().__init__(array)
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return make_reader, (self.file, get_cache())


class RegionReader:
    """Reads anything that takes slices and has no chunks, region by region."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = np.dtype(array.dtype)

    def read(self, box: Box) -> NDArray[Any]:
        """Return the box as the array gives it."""
        return _checked(self.array[box], box, self.array).view()

    def __reduce__(self) -> tuple[Any, ...]:
        return make_reader, (portable(self.array), get_cache())


class TiledReader:
    """Reads from tiles that are made one by one: chunks of a store, cells of an image.

    Parameters
    ----------
    grid : TileGrid
        Where the tiles lie.
    dtype : dtype
        Of the tiles.
    tile : callable
        From the flat index of a tile to its array.
    """

    def __init__(
        self, grid: TileGrid | CellGrid, dtype: np.dtype[Any], tile: Callable[[int], NDArray[Any]]
    ) -> None:
        self.grid = grid
        self.shape = grid.shape
        self.dtype = dtype
        self.tile = tile

    def read(self, box: Box) -> NDArray[Any]:
        """Return the box: a view where it lies in one tile, else put together."""
        low = [part.start for part in box]
        high = [part.stop for part in box]
        count, parts = tiles(self.grid, low, high)
        if count == 1:
            index, source, _ = next(parts)
            tile = self.tile(index)
            return tile[source] if source else tile.view()
        block = np.empty([b - a for a, b in zip(low, high, strict=True)], native(self.dtype))
        self._join(low, high, block)
        return block

    def _join(self, low: Sequence[int], high: Sequence[int], block: NDArray[Any]) -> None:
        _, parts = tiles(self.grid, low, high)
        for index, source, target in parts:
            block[target] = self.tile(index)[source]


class AbsentReader(TiledReader):
    """Stands for an input whose tiles are handed over with each call."""

    def __init__(self, grid: TileGrid | CellGrid, dtype: np.dtype[Any]) -> None:
        super().__init__(grid, dtype, _absent)

    def __reduce__(self) -> tuple[Any, ...]:
        return AbsentReader, (self.grid, self.dtype)


def _absent(index: int) -> NDArray[Any]:
    raise AssertionError(f"tile {index} was not handed over")


class ChunkedReader(TiledReader):
    """Reads a store through its own chunks, each decoded once and kept in the cell cache."""

    def __init__(
        self,
        array: Any,
        grid: TileGrid | CellGrid,
        dtype: np.dtype[Any],
        decode: Callable[[int], NDArray[Any]],
        cache: CellCache,
    ) -> None:
        self.array = array
        self.edition = 0
        """How often something was forgotten because the store changed."""
        self.shelf = cache.shelf(self, alike=True)
        self._decode = decode
        shelf = self.shelf
        super().__init__(grid, dtype, lambda index: shelf.get(index, decode))

    def read_ahead(self, box: Box) -> None:
        """Decode the chunks of a box, unless they fill most of the cache."""
        if type(self.array).__module__.startswith("dask."):
            return
        _, parts = tiles(self.grid, [part.start for part in box], [part.stop for part in box])
        left = self.shelf.cache.max_bytes // 4
        for index, _, _ in parts:
            left -= self.tile(index).nbytes
            if left < 0:
                return

    def forget(self, region: Region | None) -> None:
        """Decode again what meets the region; None: everything."""
        self.edition += 1
        self.shelf.invalidate(None if region is None else cells_meeting(self.grid, region))

    def __reduce__(self) -> tuple[Any, ...]:
        return make_reader, (portable(self.array), self.shelf.cache)


class PinnedReader(ChunkedReader):
    """Reads a store as it was at a time, and refuses chunks that were written later.

    Parameters
    ----------
    reader : ChunkedReader
        Of a zarr array in a local folder.
    when : int
        Nanoseconds since 1970.
    """

    def __init__(self, reader: ChunkedReader, when: int) -> None:
        # It shares everything, the decoded chunks too.
        self.__dict__.update(reader.__dict__)
        self._reader = reader
        self._when = when
        self._file_of = _chunk_files(stored_array(reader))
        self.tile = self._pinned_tile

    def _pinned_tile(self, index: int) -> NDArray[Any]:
        chunk = self._reader.tile(index)
        # Asked after reading: what was written before that shows.
        path = self._file_of(self.grid, index)
        try:
            written = os.stat(path).st_mtime_ns  # noqa: PTH116 - the quickest, for each chunk
        except FileNotFoundError:
            return chunk
        if written > self._when:
            raise SourceChangedError(
                f"{path} was written after the snapshot was taken, and the store holds what is "
                f"there now only (or the clock of that file system is ahead of this machine's); "
                f"call image.invalidate(roi) for what has changed, and make a new snapshot"
            )
        return chunk

    def __reduce__(self) -> tuple[Any, ...]:
        return pinned, (self._reader, self._when)


def pinned(reader: Reader, when: int) -> Reader:
    """Return a reader that refuses what was written after ``when``, where that can be known."""
    if isinstance(reader, ChunkedReader) and _is_in_a_folder(stored_array(reader)):
        reader = reader._reader if isinstance(reader, PinnedReader) else reader
        return PinnedReader(reader, when)
    return reader


def _is_in_a_folder(array: Any) -> bool:
    return (
        type(array).__module__.startswith("zarr.")
        and type(array.store).__name__ == "LocalStore"
        and getattr(array.store, "root", None) is not None
    )


def _chunk_files(array: Any) -> Callable[[Any, int], str]:
    """Return a function from a tile of a grid to the file in which the chunk is."""
    sizes = getattr(array, "shards", None) or array.chunks
    folder = os.path.join(str(array.store.root), array.path)  # noqa: PTH118 - paths are strings
    encode = array.metadata.encode_chunk_key

    def path(grid: CellGrid, index: int) -> str:
        start = grid.roi(grid.position(index)).start
        position = tuple(low // size for low, size in zip(start, sizes, strict=True))
        return os.path.join(folder, encode(position))  # noqa: PTH118 - joined for each chunk

    return path


# Images of one store share its reader, and so its decoded chunks. A reader holds its array, so
# no other array can have that id meanwhile.
_readers: weakref.WeakValueDictionary[tuple[int, int], ChunkedReader] = (
    weakref.WeakValueDictionary()
)


def make_reader(array: Any, cache: CellCache) -> Reader:
    """Return a reader for an array-like; ``cache`` keeps the decoded chunks of stores.

    The same store and cache give the same reader.

    Raises
    ------
    TypeError
        If ``array`` lacks ``shape``, ``dtype`` or ``__getitem__``, or is a masked array.
    """
    array = unwrapped(array)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            "an input cannot be a masked array, its mask would be lost; "
            "give array.filled(value), and the mask as a second input"
        )
    if isinstance(array, np.ndarray):
        return ArrayReader(array)
    if isinstance(array, SharedArray):
        return SharedReader(array)
    if isinstance(array, _H5Path):
        array = array.open()
    if isinstance(array, FileArray):
        memory = array.memory()
        if memory is not None:
            return FileReader(array, memory)
    check_array(array)
    if is_xarray(array):
        if array.chunks is not None:
            array = array.data
        elif isinstance(getattr(array.variable, "_data", None), np.ndarray):
            # In memory; what was opened lazily is read region by region.
            return ArrayReader(array.values)
    known = _readers.get((id(array), id(cache)))
    if known is not None:
        return known
    reader = _new_reader(array, cache)
    if isinstance(reader, ChunkedReader):
        reader.array = array
        _readers[id(array), id(cache)] = reader
    return reader


def _new_reader(array: Any, cache: CellCache) -> Reader:
    module = type(array).__module__.partition(".")[0]
    if module == "tensorstore":
        return _tensorstore_reader(array, cache)
    # An xarray without chunks has the protocol and no graph.
    if hasattr(array, "__dask_graph__") and array.chunks is not None:
        return _dask_reader(array, cache)
    if module == "zarr":
        array = _Twin(array)
    chunks = getattr(array, "chunks", None)
    grid = _chunk_grid(chunks, tuple(int(n) for n in array.shape))
    if grid is None:
        return RegionReader(array)

    def decode(index: int) -> NDArray[Any]:
        box = _tile_box(grid, index)
        chunk = _checked(array[box], box, array)
        # These decode into a new array each time; others may give out memory of their own.
        is_new = module in ("zarr", "h5py") or isinstance(array, FileArray)
        return chunk if is_new else chunk.copy()

    return ChunkedReader(array, grid, np.dtype(array.dtype), decode, cache)


def check_array(array: Any) -> None:
    """Refuse what is not an array with a message that says what to do."""
    missing = [name for name in ("shape", "dtype", "__getitem__") if not hasattr(array, name)]
    if missing:
        hint = ""
        if isinstance(array, str) or hasattr(array, "__fspath__"):
            hint = "; open the file first: open_image(path)"
        elif isinstance(array, (list, tuple, int, float)):
            hint = "; use numpy.asarray"
        raise TypeError(
            f"an input must have shape, dtype and __getitem__; {type(array).__name__} "
            f"has no {' and no '.join(missing)}{hint}"
        )
    if not isinstance(array.shape, tuple):
        raise TypeError(
            f"the shape of an input must be known, {type(array).__name__} has {array.shape!r}; "
            f"for a dask Delayed use dask.array.from_delayed"
        )
    if any(extent != extent for extent in array.shape):
        raise ValueError(
            "a dask array of unknown chunk sizes cannot be an input; "
            "call array.compute_chunk_sizes() first"
        )


class _H5Path(NamedTuple):
    """Where an HDF5 dataset is; the dataset itself cannot be sent to another process."""

    file: str
    name: str

    def open(self) -> Any:
        import h5py

        return h5py.File(self.file, "r")[self.name]


def portable(array: Any) -> Any:
    """Return what can be sent to another process in place of ``array``."""
    if type(array).__module__.partition(".")[0] != "h5py":
        return array
    if array.file.mode != "r":
        raise TypeError(
            f"HDF5 dataset {array.name!r} of {array.file.filename!r} is open for writing and "
            f"cannot be read by other processes; open the file with mode='r'"
        )
    return _H5Path(array.file.filename, array.name)


def _chunk_grid(chunks: Any, shape: tuple[int, ...]) -> CellGrid | IrregularGrid | None:
    """Return the grid of a store's chunks, or None where it has none that can be used."""
    if not isinstance(chunks, (tuple, list)) or len(chunks) != len(shape) or 0 in shape:
        return None
    if all(isinstance(size, (int, np.integer)) and size > 0 for size in chunks):
        return CellGrid(shape, tuple(chunks))
    if all(isinstance(sizes, (tuple, list)) for sizes in chunks):
        grid = IrregularGrid(chunks)
        return grid if grid.shape == shape else None
    return None


def _tile_box(grid: CellGrid | IrregularGrid, index: int) -> Box:
    position = grid.position(index)
    if isinstance(grid, IrregularGrid):
        return grid.slices(position)
    return grid.roi(position).slices


def _checked(data: Any, box: Box, array: Any) -> NDArray[Any]:
    """Return what a store gave for a box as an array of just the shape and dtype it promises."""
    if np.ma.is_masked(data):
        raise TypeError(
            f"{type(array).__name__} gave a masked array, whose mask would be lost; give it "
            f"filled, and the mask as a second input"
        )
    block = np.asarray(data)
    shape = tuple(part.stop - part.start for part in box)
    if block.shape != shape:
        raise ValueError(
            f"{type(array).__name__} gave shape {block.shape} for a region of shape {shape}: "
            f"its shape attribute says {tuple(array.shape)}"
        )
    if native(block.dtype) != native(array.dtype):
        raise TypeError(
            f"{type(array).__name__} gave dtype {block.dtype}, its dtype attribute says "
            f"{array.dtype}; make it say what it gives, for instance with astype"
        )
    return block


def stored_array(reader: ChunkedReader) -> Any:
    """Return the store's own array behind a reader."""
    array = reader.array
    return array._array if isinstance(array, _Twin) else array


def quick_source(array: Any) -> Any:
    """Return what reads an array the quickest, by boxes."""
    array = unwrapped(array)
    return _Twin(array) if type(array).__module__.partition(".")[0] == "zarr" else array


class _Twin:
    """A zarr array, read by tensorstore where that is installed and can read it.

    tensorstore decodes the same chunk in about half the time and needs the interpreter only to
    begin and to end. Arrays in other stores than a local folder, and dtypes or codecs that it
    does not know, are read by zarr itself.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, array.chunks
        self._lock = threading.Lock()
        self._opened_in: int | None = None
        self._twin: Any = None

    def __getitem__(self, box: Box) -> Any:
        # tensorstore's threads do not survive a fork; zarr starts its own anew.
        if self._opened_in is None:
            with self._lock:
                if self._opened_in is None:
                    self._twin = _open_with_tensorstore(self._array)
                    self._opened_in = os.getpid()
        if self._twin is None or self._opened_in != os.getpid():
            return self._array[box]
        return self._twin[box].read().result()


def _open_with_tensorstore(array: Any) -> Any:
    root = getattr(array.store, "root", None)
    if type(array.store).__name__ != "LocalStore" or root is None:
        return None
    try:
        import tensorstore
    except ImportError:
        return None
    spec = {
        "driver": "zarr3" if array.metadata.zarr_format == 3 else "zarr",
        "kvstore": {"driver": "file", "path": str(root / array.path)},
    }
    try:
        twin = tensorstore.open(spec, read=True, write=False, create=False).result()
        fits = twin.shape == array.shape and native(twin.dtype.numpy_dtype) == native(array.dtype)
    except Exception:
        # What tensorstore does not know is zarr's business; it will say what is wrong, if
        # anything is.
        return None
    return twin if fits else None


def _tensorstore_reader(array: Any, cache: CellCache) -> Reader:
    # A domain may begin anywhere; readers count from 0.
    array = array[tuple(slice(a, b) for a, b in zip(*_domain(array), strict=True))]
    array = array.translate_to[(0,) * array.ndim]
    dtype = np.dtype(array.dtype.numpy_dtype)
    chunk = array.chunk_layout.read_chunk.shape
    shape = tuple(int(n) for n in array.shape)
    grid = None
    if chunk is not None:
        grid = _chunk_grid(tuple(int(c or n) for c, n in zip(chunk, shape, strict=True)), shape)
    if grid is None:
        return _TensorStoreRegions(array, dtype)

    def decode(index: int) -> NDArray[Any]:
        box = _tile_box(grid, index)
        return np.asarray(array[box].read().result())

    return ChunkedReader(array, grid, dtype, decode, cache)


class _TensorStoreRegions(RegionReader):
    def __init__(self, array: Any, dtype: np.dtype[Any]) -> None:
        self.array = array
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = dtype

    def read(self, box: Box) -> NDArray[Any]:
        return np.asarray(self.array[box].read().result())


def _domain(array: Any) -> tuple[Sequence[int], Sequence[int]]:
    return array.domain.inclusive_min, array.domain.exclusive_max


def _dask_reader(array: Any, cache: CellCache) -> Reader:
    from dask.local import get_sync
    from dask.utils import ensure_dict

    grid = IrregularGrid(array.chunks)
    graph: dict[Any, Any] = {}

    def decode(index: int) -> NDArray[Any]:
        # The graph is written out once, when a chunk is read without a scheduler for the first
        # time; after that a chunk costs what it depends on.
        if not graph:
            from dask._task_spec import convert_legacy_graph

            graph.update(convert_legacy_graph(ensure_dict(array.__dask_graph__())))
        key = (array.name, *grid.position(index))
        # A copy: the chunk may be memory of the user's.
        box = grid.slices(grid.position(index))
        return _checked(get_sync(_reachable(graph, key), key), box, array).copy()

    return ChunkedReader(array, grid, np.dtype(array.dtype), decode, cache)


def _reachable(graph: dict[Any, Any], key: Any) -> dict[Any, Any]:
    """Return the part of a graph that ``key`` depends on."""
    part: dict[Any, Any] = {}
    todo = [key]
    while todo:
        name = todo.pop()
        if name not in part:
            part[name] = task = graph[name]
            todo.extend(task.dependencies)
    return part
