"""An image in a file or store, opened for reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellimg_dask.blocks.errors import ReadError
from cellimg_dask.blocks.plan import Box
from cellimg_dask.geometry import CellGrid, Roi, Space, even_cell_shape, tiles
from cellimg_dask.image.describe import size_text
from cellimg_dask.image.gridded import Gridded
from cellimg_dask.image.indexing import take_boxes
from cellimg_dask.image.labelled import to_xarray
from cellimg_dask.image.space_of import Placed
from cellimg_dask.io.channels import Channel
from cellimg_dask.io.listing import found_at
from cellimg_dask.io.location import Location
from cellimg_dask.io.opened import Found
from cellimg_dask.loading.file_array import FileArray, StandsFor
from cellimg_dask.loading.readers import native, quick_source

if TYPE_CHECKING:
    import dask.array
    import xarray

__all__ = ["StoredImage", "said_of_channels"]


class StoredImage(StandsFor, Gridded, Placed):
    """An image in a file or store, opened for reading by `open_image`.

    Reading (``image[...]``, ``numpy.asarray(image)``) reads from the file each time. As an input
    of `map_cells` and everything else it is read as fast as the array that it stands for,
    `array`. Pickled it is a path, and opened again where it arrives.

    A context manager, which closes the file at the end; otherwise that happens when nothing uses
    it any more.

    Notes
    -----
    Thread-safe.
    """

    _noun = "an image"

    def __init__(self, found: Found, level: int) -> None:
        self._found = found
        self._level = level
        self._grid: CellGrid | None = None
        self._dtype: np.dtype[Any] | None = None
        self._source: Any = None

    # ------------------------------------------------------------------ what it is

    @property
    def array(self) -> Any:
        """The array of the library that reads the format, with axes in NumPy order."""
        return self._found.array(self._level)

    @property
    def grid(self) -> CellGrid:
        """Grid of the chunks that are read at once; of a file without such, of about a million."""
        if self._grid is None:
            array = self.array
            shape = tuple(int(extent) for extent in array.shape)
            self._grid = CellGrid(shape, _cell_shape(getattr(array, "chunks", None), shape))
        return self._grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type, in native byte order."""
        if self._dtype is None:
            self._dtype = native(self.array.dtype)
        return self._dtype

    @property
    def space(self) -> Space:
        """Where the voxels lie, as far as the file says it."""
        return self._found.space(self._level)

    @property
    def url(self) -> str:
        """Absolute path or URL of the file or folder."""
        return self._found.location.url

    @property
    def name(self) -> str:
        """Where in the file the image is; empty where that need not be said."""
        return self._found.name

    @property
    def kind(self) -> str:
        """The format, for instance ``"TIFF"`` or ``"zarr v3"``."""
        return self._found.kind

    @property
    def level(self) -> int:
        """Which of `levels` this is."""
        return self._level

    @property
    def levels(self) -> tuple[StoredImage, ...]:
        """The image in all sizes that are stored, finest first, this one among them.

        The arrays of the others are opened when they are used.
        """
        return tuple(
            self if number == self._level else StoredImage(self._found, number)
            for number in range(len(self._found.levels))
        )

    @property
    def labels(self) -> Mapping[str, StoredImage]:
        """The label images that are stored with it, by name; opened when they are used."""
        return _Labels(self._found)

    @property
    def is_labels(self) -> bool:
        """Whether the file says that the voxels are numbers of objects."""
        return self._found.is_labels

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What the file says of each channel: label, colour, contrast, whether it is seen."""
        return self._found.channels

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What the file says of the image, unchanged."""
        return MappingProxyType(dict(self._found.attributes))

    def __repr__(self) -> str:
        where = f"{self.url}, {self.name}" if self.name else self.url
        size = f"shape {self.shape}, {self.dtype}, {size_text(self.nbytes)}"
        cells = f"in {self.grid.num_cells:,} cells of {self.cell_shape}"
        lines = [f"<StoredImage {where}", f"{self.kind}, {size}, {cells}"]
        space = self.space
        if not space.is_plain:
            lines.append(f"voxels: {space}")
        if len(self._found.levels) > 1:
            lines.append(f"level {self._level} of {len(self._found.levels)}")
        if self._found.labels:
            lines.append(f"labels: {', '.join(self._found.labels)}")
        return "\n  ".join(lines) + ">"

    # ------------------------------------------------------------------ reading

    def __getitem__(self, key: Any) -> Any:
        """Read and return what NumPy would for any index, as a new array; a `Roi` is one too.

        Raises
        ------
        ReadError
            If that cannot be read; names the cell, which is a chunk of the file.
        """
        return take_boxes(self.grid, self.dtype, self._read, key)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an image in a file is read by np.asarray; copy=False cannot be")
        whole: NDArray[Any] = self[...]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _read(self, box: Box) -> NDArray[Any]:
        try:
            return self._raw(box)
        except Exception as error:
            if self._found.is_closed:
                raise
            position, roi, cause = self._damage(box, error)
            raise ReadError(
                self._label(), position, roi, f"reading failed: {type(cause).__name__}: {cause}"
            ) from cause

    def _raw(self, box: Box) -> NDArray[Any]:
        array = self.array
        if self._source is None:
            self._source = quick_source(array)
        data = np.asarray(self._source[box])
        shape = tuple(part.stop - part.start for part in box)
        if data.shape != shape:
            raise ValueError(f"got shape {data.shape} for a region of shape {shape}")
        is_shared = isinstance(array, FileArray) and array.memory() is not None
        return data.astype(self.dtype, copy=is_shared)

    def _damage(self, box: Box, error: Exception) -> tuple[tuple[int, ...], Roi, Exception]:
        """Return which cell of a box cannot be read, and why."""
        low, high = [part.start for part in box], [part.stop for part in box]
        _, parts = tiles(self.grid, low, high)
        for index, _, _ in parts:
            position = self.grid.position(index)
            roi = self.grid.roi(position)
            try:
                self._raw(roi.slices)
            except Exception as cause:
                return position, roi, cause
        # Not twice: perhaps the network.
        return (), Roi(tuple(low), tuple(high)), error

    def to_dask(self) -> dask.array.Array:
        """Return a dask array with a task per cell; each reads from the file."""
        import dask.array

        return dask.array.from_array(self, self.chunks)

    def to_xarray(self, name: str | None = None) -> xarray.DataArray:
        """Return the image as a lazy array of xarray; see `CellImg.to_xarray`."""
        return to_xarray(self.to_dask(), self.space, name)

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """Close the file, of all levels and labels; reading them is a `ValueError` then."""
        self._found.close()

    def __enter__(self) -> StoredImage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _label(self) -> str:
        last = self._found.location.last_name
        return f"{last}/{self.name}" if self.name else last

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return "StoredImage", self._found.token, self._level

    def __reduce__(self) -> tuple[Any, ...]:
        found = self._found
        # With its token, so that dask names it alike there.
        said = found.location, found.name, self._level, found.is_labels, found.token
        return _reopened, said


def _reopened(
    location: Location, name: str, level: int, is_labels: bool, token: str
) -> StoredImage:
    found = found_at(location, name or None)
    found.is_labels, found.token = is_labels, token
    return StoredImage(found, level)


class _Labels(Mapping[str, StoredImage]):
    def __init__(self, found: Found) -> None:
        self._found = found

    def __getitem__(self, name: str) -> StoredImage:
        if name not in self._found.labels or self._found.open_label is None:
            raise KeyError(name)
        return StoredImage(self._found.open_label(name), 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.labels)

    def __len__(self) -> int:
        return len(self._found.labels)

    def __repr__(self) -> str:
        return f"<labels: {', '.join(self) or 'none'}>"


def said_of_channels(image: Any) -> tuple[Channel, ...]:
    """Return what the file says of the channels of an image, or of its finest level."""
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    return first.channels if isinstance(first, StoredImage) else ()


def _cell_shape(chunks: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    if chunks is None:
        # As `map_cells` chooses them for an array without chunks.
        return even_cell_shape(len(shape))
    sizes = (max(size) if isinstance(size, (tuple, list)) else size for size in chunks)
    return tuple(max(1, int(size)) for size in sizes)
