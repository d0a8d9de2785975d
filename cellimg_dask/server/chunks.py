"""The chunks of a served array: where they are, what they hold, and as what they are sent."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Roi
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.ops.pyramid import original
from cellimg_dask.server.documents import Codec, chunk_shape
from cellimg_dask.server.versions import CellVersions

__all__ = ["ServedArray", "position_of"]

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


class ServedArray:
    """One level of a layer.

    Parameters
    ----------
    image : CellImg
        The level.
    fill_value : scalar
        Of its dtype; chunks that hold nothing else are not sent.
    codec : "zstd", "gzip" or None
        How chunks are compressed.
    """

    def __init__(self, image: CellImg, fill_value: Any, codec: Codec | None) -> None:
        self.image = image
        self.grid = image.grid
        self.codec = codec
        self.shape = chunk_shape(image.grid)
        """Of a chunk."""
        self.fill = np.asarray(fill_value, image.dtype)
        self.versions = CellVersions(image)
        self._fill_bytes = self.fill.reshape(1).view(np.uint8)
        self._is_zero = not self._fill_bytes.any()
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * image.dtype.itemsize
        """Of a chunk, before it is compressed."""
        queue = image.loader.queue
        self.elsewhere = queue is not None and queue.cells is not None
        """Whether each region that is asked for takes a thread of its own."""
        self.only_reads = getattr(image.loader.function, "function", None) is original
        """Whether nothing is computed: it is what some array holds."""

    def roi(self, index: int) -> Roi:
        """Return the box of a cell."""
        return self.grid.roi(self.grid.position(index))

    def tag(self, loader: CellLoader, index: int) -> bytes | None:
        """Return the name of a cell's present version as HTTP writes it."""
        if self.image.node.frozen is not None:
            return None
        version = self.versions.of(loader, index)
        return None if version is None else f'"{version}"'.encode()

    def held(self, loader: CellLoader, index: int) -> NDArray[Any] | None:
        """Return a cell if it is in memory; computes nothing."""
        if self.image.node.frozen is not None:
            return None
        # Not only looked at: who is asked for often stays in the cache.
        return loader.gather((index,))[0]

    def body(self, cell: NDArray[Any]) -> memoryview | None:
        """Return the bytes of a chunk, without a copy if it can be; None where all is fill."""
        if cell.shape != self.shape:
            if self._is_fill(_bytes_of(cell)):
                return None
            whole = np.empty(self.shape, self.image.dtype)
            whole[...] = self.fill
            whole[tuple(map(slice, cell.shape))] = cell
            return _bytes_of(whole).data
        flat = _bytes_of(cell)
        return None if self._is_fill(flat) else flat.data

    def _is_fill(self, flat: NDArray[np.uint8]) -> bool:
        """Whether all voxels have the very bytes of the fill value."""
        if self._is_zero:
            return not _any(flat)
        size = self._fill_bytes.size
        # Most chunks show with their first voxel that they hold something.
        if not np.array_equal(flat[:size], self._fill_bytes):
            return False
        return bool((flat.reshape(-1, size) == self._fill_bytes).all())

    def encode(self, body: memoryview) -> bytes | memoryview:
        """Compress a chunk."""
        if self.codec is None:
            return body
        if self.codec == "gzip":
            return gzip.compress(body, 1, mtime=0)
        from numcodecs.zstd import Zstd

        encoded: bytes = Zstd(level=1).encode(body)
        return encoded


def position_of(parts: Sequence[str], grid_shape: Sequence[int]) -> int | None:
    """Return the flat index of the position that parts of a path name; None if there is none."""
    if len(parts) != len(grid_shape):
        return None
    index = 0
    for part, count in zip(parts, grid_shape, strict=True):
        # Another spelling of the same number is another key, which is not there.
        if _NUMBER.fullmatch(part) is None or (number := int(part)) >= count:
            return None
        index = index * count + number
    return index


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _any(flat: NDArray[np.uint8]) -> bool:
    """Whether any byte is not 0."""
    if not flat.size:
        return False
    if flat[0] or flat[flat.size // 2] or flat[-1]:
        return True
    # Eight at a time, as far as that goes.
    end = flat.size // 8 * 8
    words = flat[:end] if flat.ctypes.data % 8 else flat[:end].view(np.uint64)
    return bool(words.any() or flat[end:].any())
