"""Images in TIFF files: pages, tiles, stacks, ImageJ's and OME's, in several sizes."""

from __future__ import annotations

import html
import math
import os
import re
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.plan import Box
from cellimg_dask.geometry import Space
from cellimg_dask.io.channels import Channel, channels_of_mode
from cellimg_dask.io.location import Location
from cellimg_dask.io.opened import Found, ListedArray, choose
from cellimg_dask.io.optional import optional
from cellimg_dask.io.spaces import shrunk_to, tolerant_space
from cellimg_dask.io.tiff_said import imagej_channels, imagej_sizes, ome_channels, ome_sizes
from cellimg_dask.loading.file_array import FileArray, check_unchanged, file_state

__all__ = ["TiffArray", "find_tiff", "list_tiff"]

_UNKNOWN_AXES = "iq"
_UNCOMPRESSED = 1
_BLACK_IS_ZERO = 1
_INKS = 5
_LARGEST_PAGE_BYTES = 32 << 20
_STRIPS_BYTES = 4 << 20
_OWN_UUID = re.compile(r"""<(?:\w+:)?OME\s[^>]*?\bUUID=["']([^"']+)""")
_FILE = re.compile(r"""<(?:\w+:)?UUID\s+FileName=["']([^"']+)["']\s*>\s*([^<\s]*)""")
"""In OME-XML: which file this is, and which one holds some of the planes."""


class _TiffHandle:
    """A TIFF file that is open in this process; opened anew in others."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._lock = threading.Lock()
        self._file: Any = None
        self._opened_in: int | None = None
        self._closing: Any = None
        self._others: tuple[str, ...] = ()
        self._states: Any = None
        self.is_closed = False

    def file(self) -> Any:
        """Return the open file."""
        with self._lock:
            # The position in a file is shared with the processes that are forked.
            if self._file is None or self._opened_in != os.getpid():
                if self.is_closed:
                    raise ValueError(f"{self.location.url} is closed; open it again")
                tifffile = optional("tifffile", f"reading {self.location.url}")
                before = self._state_now(())
                opened = None if self.location.is_local else self.location.open()
                try:
                    self._file = tifffile.TiffFile(
                        self.location.url if opened is None else opened,
                        name=self.location.last_name,
                    )
                except BaseException:
                    if opened is not None:
                        opened.close()
                    raise
                self._opened_in = os.getpid()
                self._closing = weakref.finalize(self, _close, self._file, opened)
                self._others = _other_files(self._file.ome_metadata or "")
                self._states = before + self._state_now(self._others)[1:]
            return self._file

    def _state_now(self, others: Sequence[str]) -> list[Any]:
        """Return size and time of change of the file, and of others with their names."""
        if not self.location.is_local:
            return []
        path = self.location.path.resolve()
        more = [[[name, file_state(path.parent / name)] for name in others]] if others else []
        return [file_state(path), *more]

    def states(self) -> list[Any]:
        """Return size and time of change of all files, which are those that were opened."""
        others = self.others()
        now = self._state_now(others)
        check_unchanged(self.location.url, self._states, now)
        return now

    def others(self) -> tuple[str, ...]:
        """Return the names of the files beside this one that hold planes of its images."""
        self.file()
        return self._others

    def close(self) -> None:
        """Close the file; reading is an error then."""
        with self._lock:
            self.is_closed = True
            self._file = None
            if self._closing is not None:
                self._closing()


def _other_files(xml: str) -> tuple[str, ...]:
    own = _OWN_UUID.search(xml)
    named = {name for name, uuid in _FILE.findall(xml) if own is None or uuid != own[1]}
    return tuple(sorted(map(html.unescape, named)))


def _close(file: Any, opened: Any) -> None:
    file.close()
    if opened is not None:
        opened.close()


class TiffArray(FileArray):
    """A series of a TIFF file at one level, read tile by tile, strip by strip or page by page."""

    def __init__(self, handle: _TiffHandle, series: int, level: int) -> None:
        self._handle = handle
        self._series = series
        self._level = level
        self._lock = threading.Lock()
        self._array: Any = None
        self._read_from: Any = None
        found = self._open()
        self.shape = tuple(int(extent) for extent in found.shape)
        self.dtype = np.dtype(found.dtype)
        self.chunks = tuple(int(extent) for extent in found.chunks)
        if not self._by_page and not self._is_tiled:
            self.chunks = _joined_strips(self.chunks, self.shape, self.dtype.itemsize)
        self.label = f"TIFF {handle.location.last_name}"

    def _open(self) -> Any:
        import zarr

        with self._lock:
            file = self._handle.file()
            if self._read_from is not file:
                series = file.series[self._series].levels[self._level]
                self._is_tiled = series.keyframe.is_tiled
                self._by_page = _is_read_by_page(series.keyframe)
                compressed = series.keyframe.compression != _UNCOMPRESSED
                # Decoded by several threads; by itself it does so for some compressions only.
                workers = max(2, os.cpu_count() or 1) if compressed else None
                mode = "page" if self._by_page else "strile"
                store = series.aszarr(level=0, chunkmode=mode, maxworkers=workers)
                self._array = zarr.open_array(store, mode="r")
                self._read_from = file
            return self._array

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a box."""
        return np.asarray(self._open()[box])

    def content(self, boxes: Sequence[Box]) -> Any:
        """Return the file's place, size and time of change."""
        location = self._handle.location
        if not location.is_local:
            return None
        path = location.path.resolve()
        return ["TIFF", str(path), self._series, self._level, *self._handle.states()]

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self._handle.location, self._series, self._level)


def _is_read_by_page(page: Any) -> bool:
    """Whether a page is read as a whole: its strips are often of a few rows only."""
    return not page.is_tiled and page.nbytes <= _LARGEST_PAGE_BYTES


def _joined_strips(
    chunks: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[int, ...]:
    """Return the shape of as many strips of a large page as are read well together."""
    for axis in reversed(range(len(shape))):
        if chunks[axis] < shape[axis]:
            count = max(1, _STRIPS_BYTES // (itemsize * math.prod(chunks)))
            rows = min(shape[axis], chunks[axis] * count)
            return (*chunks[:axis], rows, *chunks[axis + 1 :])
    return chunks


def _arrived(location: Location, series: int, level: int) -> TiffArray:
    return TiffArray(_TiffHandle(location), series, level)


def find_tiff(location: Location, name: str | None) -> Found:
    """Return the first series of a TIFF file, or the one that is named."""
    handle = _TiffHandle(location)
    try:
        file = handle.file()
        number = _series_number(location, file, name)
        series = file.series[number]
        _warn_of_missing(handle)
        return Found(
            location,
            _name(file, number),
            "TIFF",
            [str(level) for level in range(len(series.levels))],
            lambda level: TiffArray(handle, number, level),
            lambda found, level: _space(found, level, file, number),
            attributes=_attributes(file, series),
            channels=_channels(file, number),
            close=handle.close,
        )
    except BaseException:
        handle.close()
        raise


def _warn_of_missing(handle: _TiffHandle) -> None:
    """Say which files of a set are not there: tifffile gives zeros for them."""
    if not handle.location.is_local:
        return
    folder = handle.location.path.resolve().parent
    missing = [name for name in handle.others() if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        warnings.warn(
            f"{handle.location.url} is one of several files of an image, and of these "
            f"{', '.join(missing[:5])}{more} cannot be found: their planes are read as zeros",
            stacklevel=2,
        )


def list_tiff(location: Location) -> list[ListedArray]:
    """Return the series of a TIFF file, each with its levels."""
    handle = _TiffHandle(location)
    try:
        file = handle.file()
        listed = []
        for number, series in enumerate(file.series):
            array = TiffArray(handle, number, 0)
            alone = len(file.series) == 1
            stored = location.nbytes() if alone else sum(map(_tiff_bytes, series.levels))
            listed.append(
                ListedArray(
                    "TIFF",
                    _name(file, number),
                    array.shape,
                    array.dtype,
                    tuple(series.axes.lower()),
                    array.chunks,
                    None,
                    str(getattr(series.keyframe.compression, "name", "none")).lower(),
                    len(series.levels),
                    partial(_same, stored),
                )
            )
        return listed
    finally:
        handle.close()


def _same(size: int | None) -> int | None:
    return size


def _name(file: Any, number: int) -> str:
    return f"series {number}" if len(file.series) > 1 else ""


def _series_number(location: Location, file: Any, name: str | None) -> int:
    if name is None:
        choose(location, None, ["series 0"] if file.series else [], "TIFF")
        return 0
    names = [f"series {number}" for number in range(len(file.series))]
    for number, series in enumerate(file.series):
        if name in (names[number], str(number), series.name):
            return number
    return names.index(choose(location, name, names, "TIFF"))


def _tiff_bytes(series: Any) -> int:
    if series.dataoffset is not None:
        return int(series.nbytes)
    return sum(sum(page.databytecounts) for page in series.pages if page is not None)


def _attributes(file: Any, series: Any) -> Mapping[str, Any]:
    """Return what the file says, as it is there: OME-XML, ImageJ's entries, the description."""
    found: dict[str, Any] = {"axes": series.axes, "name": series.name}
    if file.ome_metadata:
        found["ome_xml"] = file.ome_metadata
    if file.imagej_metadata:
        found["imagej"] = file.imagej_metadata
    description = getattr(series.keyframe, "description", "")
    if description and "ome_xml" not in found:
        found["description"] = description
    return found


def _channels(file: Any, number: int) -> Sequence[Channel]:
    series = file.series[number]
    if "C" not in series.axes and "S" in series.axes:
        return channels_of_mode(_mode(series.keyframe), np.dtype(series.dtype))
    if series.kind == "ome" and file.ome_metadata:
        return ome_channels(file.ome_metadata, number)
    return imagej_channels(file) if file.is_imagej else ()


def _mode(page: Any) -> str:
    """Return what the samples of a page are, if they are not red, green and blue."""
    what, number = int(page.photometric), page.samplesperpixel
    more = [int(sample) for sample in page.extrasamples]
    if what == _BLACK_IS_ZERO and number == 2 and more in ([1], [2]):
        return "LA"
    return "CMYK" if what == _INKS and number == 4 and not more else ""


def _space(found: Found, level: int, file: Any, number: int) -> Space:
    shape = found.array(level).shape
    series = file.series[number]
    what = found.location.url
    if level:
        first = found.array(0).shape
        if len(first) != len(shape):
            return Space.of(len(shape))
        return shrunk_to(found.space(0), first, shape)
    letters = series.axes.lower()
    sizes: dict[str, tuple[float, str | None]] = {}
    if series.kind == "ome" and file.ome_metadata:
        sizes = ome_sizes(file.ome_metadata, number)
    elif file.is_imagej:
        sizes = imagej_sizes(file)
    scale = [sizes[letter][0] if letter in sizes else 1.0 for letter in letters]
    units = [sizes[letter][1] if letter in sizes else None for letter in letters]
    if len(letters) != len(shape):
        return Space.of(len(shape))
    return tolerant_space(len(shape), _axes(letters), units, scale, [0.0] * len(shape), what)


def _axes(letters: str) -> tuple[str, ...] | None:
    """Return names of axes; None where the file does not really say them."""
    known = "".join(letter for letter in letters if letter not in _UNKNOWN_AXES)
    if len(set(letters)) != len(letters) or (known != letters and known in ("", "x", "yx")):
        # Pages one after the other: along what, nobody has said.
        return None
    return tuple(letters)
