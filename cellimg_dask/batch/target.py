"""The zarr array that a run fills, cell by cell."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cellimg_dask.batch.folder import Folder, is_url, open_folder
from cellimg_dask.batch.parquet import TableTarget
from cellimg_dask.geometry import CellGrid, as_ints, tiles
from cellimg_dask.image.input import checked_fill

__all__ = ["Layout", "Target", "open_target"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How an image is stored; cells are whole numbers of stored objects."""

    grid: CellGrid
    """Cells of the image."""
    dtype: np.dtype[Any]
    """Of the voxels."""
    chunks: tuple[int, ...]
    """Shape of a chunk, the unit of compression."""
    sharded: bool
    """Whether the chunks of a cell lie in one object."""
    compressor: str | None
    """``"zstd"``, ``"blosc"``, ``"gzip"`` or None."""
    level: int
    """How hard the compressor tries."""
    fill_value: Any
    """Value of voxels that are not stored."""
    zarr_format: Literal[2, 3] = 3
    """Version of zarr."""
    axes: tuple[str, ...] | None = None
    """Names of the axes, where they are known."""

    @classmethod
    def of(
        cls,
        grid: CellGrid,
        dtype: np.dtype[Any],
        *,
        chunks: Any = None,
        sharded: bool | None = None,
        compressor: str | None = "zstd",
        level: int | None = None,
        fill_value: Any = 0,
        zarr_format: Literal[2, 3] = 3,
        axes: tuple[str, ...] | None = None,
    ) -> Layout:
        """Return a checked layout; default: one chunk per cell.

        Raises
        ------
        TypeError, ValueError
            If a cell is not a whole number of chunks, or an argument is unknown.
        """
        whole = _cell_extent(grid)
        sizes = whole if chunks is None else as_ints(chunks, "chunks", ndim=grid.ndim, minimum=1)
        # What reaches beyond the image in one cell may as well end with it.
        sizes = tuple(
            cell if chunk > cell >= extent else chunk
            for chunk, cell, extent in zip(sizes, whole, grid.shape, strict=True)
        )
        for axis, (cell, chunk) in enumerate(zip(whole, sizes, strict=True)):
            # A cell that is alone along an axis shares chunks with no other.
            if cell % chunk and grid.grid_shape[axis] > 1:
                raise ValueError(
                    f"chunks[{axis}] = {chunk} does not divide the cell, which has {cell} voxels "
                    f"on axis {axis}: two cells would share a chunk"
                )
        if compressor not in _CODECS:
            raise ValueError(
                f"unknown compressor {compressor!r}; use one of {', '.join(map(repr, _CODECS))}"
            )
        if zarr_format not in (2, 3):
            raise ValueError(f"zarr_format must be 2 or 3, got {zarr_format!r}")
        if sharded and zarr_format == 2:
            raise ValueError("zarr 2 has no shards: leave sharded out, or use zarr_format=3")
        if sharded is None:
            sharded = sizes != whole and zarr_format == 3
        try:
            fill = (
                _zero(dtype)
                if _is_zero(fill_value)
                else checked_fill(fill_value, dtype, "a target")
            )
        except ValueError:
            raise ValueError(f"fill_value {fill_value!r} is no value of dtype {dtype}") from None
        default = 1 if compressor == "zstd" else 5
        return cls(
            grid,
            dtype,
            sizes,
            bool(sharded),
            compressor,
            default if level is None else level,
            fill,
            zarr_format,
            axes,
        )

    def create(self, where: str, *, overwrite: bool) -> None:
        """Create the array, empty."""
        import zarr

        latest = self.zarr_format == 3
        zarr.create_array(
            where,
            shape=self.grid.shape,
            dtype=self.dtype,
            chunks=self.chunks,
            shards=self.shards,
            compressors=(_CODECS if latest else _OLD_CODECS)[self.compressor](self.level),
            fill_value=self.fill_value,
            overwrite=overwrite,
            zarr_format=self.zarr_format,
            chunk_key_encoding={"name": "default" if latest else "v2", "separator": "/"},
            dimension_names=self.axes if latest else None,
        )

    @property
    def shards(self) -> tuple[int, ...] | None:
        """Shape of a shard: the chunks of a cell; None where chunks lie by themselves."""
        if not self.sharded:
            return None
        pairs = zip(_cell_extent(self.grid), self.chunks, strict=True)
        return tuple(-(-cell // chunk) * chunk for cell, chunk in pairs)

    @property
    def noun(self) -> str:
        """What messages call a target."""
        return "array"

    def target(self, where: str) -> Target:
        """Return the array that was created."""
        return Target(where, self.grid)

    def existing(self, where: str, *, by_a_run: bool) -> Any:
        """Return the array at a path or URL, None where there is nothing but what a run left.

        Raises
        ------
        FileExistsError
            If there is something else.
        """
        import zarr

        try:
            return zarr.open_array(where, mode="r")
        except (FileNotFoundError, NotADirectoryError, zarr.errors.BaseZarrError):
            is_file = not is_url(where) and Path(where).is_file()
            something = is_file or next(open_folder(where).names(""), None) is not None
            if something and (is_file or not by_a_run):
                # Not even to be overwritten: it may be anything.
                raise FileExistsError(
                    f"{where} exists and is no zarr array; give another target, or a path in it"
                ) from None
            return None

    def as_json(self) -> bytes:
        """Return the layout as JSON text, for whoever asks for the state of a target."""
        content = {
            "schema": 1,
            "shape": self.grid.shape,
            "cell_shape": self.grid.cell_shape,
            "dtype": self.dtype.str,
        }
        return json.dumps(content).encode()

    def differences(self, array: Any) -> list[str]:
        """Return in what an existing array differs, as text."""
        expected = {
            "zarr format": (array.metadata.zarr_format, self.zarr_format),
            "shape": (tuple(array.shape), self.grid.shape),
            "dtype": (np.dtype(array.dtype), self.dtype),
            "chunks": (tuple(array.chunks), self.chunks),
            "shards": (array.shards, self.shards),
        }
        return [f"{k} {a}, expected {b}" for k, (a, b) in expected.items() if a != b]


def _is_zero(value: Any) -> bool:
    return type(value) is int and value == 0


def _zero(dtype: np.dtype[Any]) -> Any:
    """Return what 0 means for a dtype: the epoch, the empty text, 0 in every field."""
    if dtype.hasobject:
        raise TypeError(f"voxels of dtype {dtype} cannot be stored: Python objects have no bytes")
    return np.zeros((), dtype)[()]


def _zstd(level: int) -> Any:
    from zarr.codecs import ZstdCodec

    return ZstdCodec(level=level)


def _blosc(level: int) -> Any:
    from zarr.codecs import BloscCodec

    return BloscCodec(cname="zstd", clevel=level)


def _gzip(level: int) -> Any:
    from zarr.codecs import GzipCodec

    return GzipCodec(level=level)


def _old_zstd(level: int) -> Any:
    from numcodecs import Zstd

    return Zstd(level)


def _old_blosc(level: int) -> Any:
    from numcodecs import Blosc

    return Blosc("zstd", level)


def _old_gzip(level: int) -> Any:
    from numcodecs import GZip

    return GZip(level)


_CODECS: dict[str | None, Callable[[int], Any]] = {
    "zstd": _zstd,
    "blosc": _blosc,
    "gzip": _gzip,
    None: lambda level: None,
}
_OLD_CODECS: dict[str | None, Callable[[int], Any]] = {
    "zstd": _old_zstd,
    "blosc": _old_blosc,
    "gzip": _old_gzip,
    None: lambda level: None,
}
"""Those of zarr 2."""


def _cell_extent(grid: CellGrid) -> tuple[int, ...]:
    """Return the shape of the first cell, at least 1 along each axis."""
    pairs = zip(grid.cell_shape, grid.shape, strict=True)
    return tuple(min(cell, extent) if extent else cell for cell, extent in pairs)


class Target:
    """An array on the disk, and the stored objects of its cells.

    Parameters
    ----------
    where : str
        Path or URL of an array that exists.
    grid : CellGrid
        Cells; whole numbers of stored objects.

    Notes
    -----
    Thread-safe: two cells never share an object. It pickles as its path.
    """

    def __init__(self, where: str, grid: CellGrid) -> None:
        import zarr

        self.where = where
        self.grid = grid
        self.array: Any = zarr.open_array(where, mode="r+")
        self._objects = CellGrid(self.array.shape, self.array.shards or self.array.chunks)
        self._folder = open_folder(where)
        self._lock = threading.Lock()
        self._twin: Any = None
        self._twin_tried = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Target, (self.where, self.grid)

    def write(self, index: int, data: NDArray[Any]) -> None:
        """Store a cell; it is on the disk when this returns."""
        self.begin(index, data)()

    def begin(self, index: int, data: NDArray[Any]) -> Callable[[], object]:
        """Begin to store a cell, and return what waits until it is on the disk.

        The data must not change before that.
        """
        box = self.grid.roi(self.grid.position(index)).slices
        for name in self.objects(index):
            # At the image's end a part of a chunk is written, and that is to be put into what is
            # there, which may be damaged.
            self._folder.remove(name)
        twin = self._tensorstore()
        if twin is not None:
            # Writes each object under another name, syncs it and renames it.
            writing: Callable[[], object] = (
                twin[box].write(data, can_reference_source_data_indefinitely=True).result
            )
            return writing
        self.array[box] = data
        return partial(self._sync, index)

    def _sync(self, index: int) -> None:
        if not is_url(self.where):
            for name in self.objects(index):
                _sync(Path(self.where) / name)

    def read(self, index: int) -> NDArray[Any]:
        """Return a stored cell."""
        box = self.grid.roi(self.grid.position(index)).slices
        data: NDArray[Any] = np.asarray(self.array[box])
        return data

    def objects(self, index: int) -> list[str]:
        """Return the names of the stored objects of a cell."""
        roi = self.grid.roi(self.grid.position(index))
        _, parts = tiles(self._objects, roi.start, roi.stop)
        encode = self.array.metadata.encode_chunk_key
        return [encode(self._objects.position(number)) for number, _, _ in parts]

    def checksums(self, index: int) -> dict[str, Any]:
        """Return size and CRC-32C of each stored object of a cell; None where there is none."""
        found: dict[str, Any] = {}
        for name in self.objects(index):
            content = self._folder.read(name)
            found[name] = (
                None if content is None else [len(content), f"{google_crc32c.value(content):08x}"]
            )
        return found

    def sizes(self, index: int) -> dict[str, int | None]:
        """Return the size of each stored object of a cell; None where there is none."""
        if is_url(self.where):
            return {n: None if c is None else c[0] for n, c in self.checksums(index).items()}
        found: dict[str, int | None] = {}
        for name in self.objects(index):
            try:
                found[name] = (Path(self.where) / name).stat().st_size
            except FileNotFoundError:
                found[name] = None
        return found

    def _tensorstore(self) -> Any:
        if not self._twin_tried:
            with self._lock:
                if not self._twin_tried:
                    self._twin = None if is_url(self.where) else _open_twin(self.where, self.array)
                    self._twin_tried = True
        return self._twin


def _open_twin(where: str, array: Any) -> Any:
    try:
        import tensorstore
    except ImportError:
        return None
    driver = "zarr3" if array.metadata.zarr_format == 3 else "zarr"
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(Path(where).resolve())}}
    try:
        twin = tensorstore.open(spec, read=True, write=True, create=False).result()
    except Exception:
        # A codec or dtype that it does not know is zarr's business.
        return None
    return twin if twin.dtype.numpy_dtype == np.dtype(array.dtype) else None


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        # Nothing but fill values.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_target(beside: Folder, where: str) -> Target | TableTarget | None:
    """Return what a run has begun to write, None where there was no run.

    Parameters
    ----------
    beside : Folder
        Where the run has noted what it writes.
    where : str
        Path or URL of the target.
    """
    content = beside.read("layout.json")
    if content is None:
        return None
    found = json.loads(content)
    grid = CellGrid(found["shape"], found["cell_shape"])
    return TableTarget(where, grid) if found.get("kind") == "parquet" else Target(where, grid)
