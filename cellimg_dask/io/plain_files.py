"""Images in files that hold just one array: ``.npy``, PNG and JPEG."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from cellimg_dask.geometry import Space
from cellimg_dask.io.channels import channels_of_mode
from cellimg_dask.io.location import Location, UnreadableError
from cellimg_dask.io.opened import Found, ListedArray
from cellimg_dask.io.optional import optional
from cellimg_dask.loading.file_array import FileArray

__all__ = [
    "NpyArray",
    "PictureArray",
    "RemoteNpyArray",
    "find_npy",
    "find_picture",
    "list_npy",
    "list_picture",
]

_HEADER_BYTES = 1 << 16
_FETCHED_BYTES = 4 << 20
_COMPRESSION = {"PNG": "deflate", "JPEG": "jpeg"}


class NpyArray(FileArray):
    """A ``.npy`` file of this machine, mapped into memory."""

    chunks = None

    def __init__(self, location: Location) -> None:
        self._location = location
        try:
            self._array = np.load(location.path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            # An empty array cannot be mapped.
            self._array = np.load(location.path, allow_pickle=False)
        if not isinstance(self._array, np.ndarray):
            raise UnreadableError(f"{location.url} holds no array")
        self.shape = self._array.shape
        self.dtype = self._array.dtype
        self.label = f"npy {location.last_name}"

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a view of a box."""
        view: NDArray[Any] = self._array.view(np.ndarray)[box]
        return view

    def memory(self) -> NDArray[Any]:
        """Return the whole array."""
        found: NDArray[Any] = self._array
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return NpyArray, (self._location,)


class RemoteNpyArray(FileArray):
    """A ``.npy`` file that is reached by a URL, fetched in pieces along its slowest axis."""

    def __init__(self, location: Location) -> None:
        self._location = location
        start = location.read(stop=_HEADER_BYTES) or b""
        header = io.BytesIO(start)
        version = npy_format.read_magic(header)
        read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        if version not in read:
            raise UnreadableError(f"{location.url} is of version {version} of .npy, not 1.0 or 2.0")
        shape, self._turned, self.dtype = read[version](header)
        if self.dtype.hasobject:
            raise UnreadableError(f"{location.url} holds Python objects, which are not read")
        self.shape = shape
        self._offset = header.tell()
        # As it lies in the file, slowest axis first.
        self._lying = shape[::-1] if self._turned else shape
        self._row_bytes = self.dtype.itemsize * int(np.prod(self._lying[1:], dtype=np.int64))
        self.chunks = self._pieces() if shape and 0 not in shape else None
        self.label = f"npy {location.last_name}"

    def _pieces(self) -> tuple[int, ...]:
        rows = min(self._lying[0], max(1, _FETCHED_BYTES // max(self._row_bytes, 1)))
        pieces = (rows, *self._lying[1:])
        return pieces[::-1] if self._turned else pieces

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a box."""
        turned = box[::-1] if self._turned else box
        first, last = (turned[0].start, turned[0].stop) if turned else (0, 1)
        if last <= first:
            return np.empty([max(0, part.stop - part.start) for part in box], self.dtype)
        begin, end = self._offset + first * self._row_bytes, self._offset + last * self._row_bytes
        data = self._location.read_part(begin, end)
        if len(data) != end - begin:
            raise OSError(f"{self._location.url} ends after {begin + len(data)} bytes")
        shape = (last - first, *self._lying[1:]) if self._lying else ()
        part = np.frombuffer(data, self.dtype).reshape(shape)[
            (slice(None), *turned[1:])[: len(shape)]
        ]
        # A copy: may be written to, and does not keep the rows that were fetched beside it.
        return np.array(part.T if self._turned else part)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteNpyArray, (self._location,)


class PictureArray(FileArray):
    """A PNG or JPEG file, decoded as a whole when it is read for the first time."""

    chunks = None

    def __init__(self, location: Location, kind: str) -> None:
        self._location = location
        self._kind = kind
        self._lock = threading.Lock()
        self._decoded: NDArray[Any] | None = None
        iio = optional("imageio.v3", f"reading {location.url}")
        # From the header; a palette counts as its colours.
        said = iio.improps(self._file(), plugin="pillow", index=0)
        self.shape = tuple(said.shape)
        self.dtype = np.dtype(said.dtype)
        self.label = f"{kind} {location.last_name}"

    def _file(self) -> Any:
        if self._location.is_local:
            return self._location.path
        return self._location.read()

    def memory(self) -> NDArray[Any]:
        """Return the whole picture."""
        with self._lock:
            if self._decoded is None:
                iio = optional("imageio.v3", f"reading {self._location.url}")
                self._decoded = np.asarray(iio.imread(self._file(), plugin="pillow", index=0))
                self._decoded.flags.writeable = False
            return self._decoded

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a view of a box."""
        view: NDArray[Any] = self.memory()[box]
        return view

    def __reduce__(self) -> tuple[Any, ...]:
        return PictureArray, (self._location, self._kind)


def find_npy(location: Location, name: str | None) -> Found:
    """Return the array of a ``.npy`` file."""
    _no_name(location, name, "npy")
    array = NpyArray(location) if location.is_local else RemoteNpyArray(location)
    return Found(location, "", "npy", [""], lambda level: array, _nothing_said)


def list_npy(location: Location) -> list[ListedArray]:
    """Return the array of a ``.npy`` file."""
    array = find_npy(location, None).array(0)
    size = location.nbytes
    return [
        ListedArray("npy", "", array.shape, array.dtype, None, array.chunks, None, "none", 1, size)
    ]


def _nothing_said(found: Found, level: int) -> Space:
    return Space.of(len(found.array(level).shape))


def find_picture(location: Location, name: str | None, kind: str) -> Found:
    """Return the picture of a PNG or JPEG file."""
    _no_name(location, name, kind)
    array = PictureArray(location, kind)
    axes = _picture_axes(array)
    return Found(
        location,
        "",
        kind,
        [""],
        lambda level: array,
        lambda found, level: Space.of(len(axes), axes),
        channels=channels_of_mode(_mode(array, kind), array.dtype),
    )


def list_picture(location: Location, kind: str) -> list[ListedArray]:
    """Return the picture of a PNG or JPEG file."""
    array = PictureArray(location, kind)
    return [
        ListedArray(
            kind,
            "",
            array.shape,
            array.dtype,
            _picture_axes(array),
            None,
            None,
            _COMPRESSION[kind],
            1,
            location.nbytes,
        )
    ]


def _picture_axes(array: PictureArray) -> tuple[str, ...]:
    return ("y", "x") if len(array.shape) == 2 else ("y", "x", "s")


def _mode(array: PictureArray, kind: str) -> str:
    """Return what its samples are, if they are not red, green and blue."""
    samples = array.shape[2] if len(array.shape) == 3 else 1
    # What JPEG has beside colours is no opacity.
    return "LA" if samples == 2 else "CMYK" if samples == 4 and kind == "JPEG" else ""


def _no_name(location: Location, name: str | None, kind: str) -> None:
    if name is not None:
        raise UnreadableError(
            f"{location.url} ({kind}) holds one array without a name, not {name!r}"
        )
