"""Images in HDF5 files: data sets with whatever names their axes, and BigDataViewer's pyramids."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.plan import Box
from cellimg_dask.geometry import Space
from cellimg_dask.image.labelled import even_steps
from cellimg_dask.io.location import Location, UnreadableError
from cellimg_dask.io.opened import Found, ListedArray, choose, joined
from cellimg_dask.io.optional import optional
from cellimg_dask.io.spaces import attributes_space, numbers, tolerant_space
from cellimg_dask.loading.file_array import FileArray
from cellimg_dask.loading.hdf5_state import check_not_replaced, hdf5_state, other_places

__all__ = ["Hdf5Array", "find_hdf5", "list_hdf5"]

_VIEWER_NAME = re.compile(r"(t\d{5,}/(s\d{2,}))/(\d+)/cells")
"""How BigDataViewer calls its data sets: time point, setup, level."""


class Hdf5Array(FileArray):
    """A data set of an HDF5 file that h5py's own does not do for.

    That is one that is reached by a URL, which h5py alone cannot open again, or one of
    BigDataViewer's, which writes unsigned numbers and calls them signed.
    """

    def __init__(self, location: Location, name: str, file: Any = None) -> None:
        self._location = location
        self._name = name
        # h5py lets one thread in at a time.
        self._file = _open(location) if file is None else file
        # Perhaps of another file, which a link leads to: held, the same file is read each time.
        self._data = found = self._file[name]
        self.shape = tuple(found.shape)
        self.dtype = _dtype(name, found)
        self.chunks = found.chunks
        self._others = other_places(found) if location.is_local else []
        self.label = f"HDF5 {location.last_name}/{name}"

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a box."""
        if not self._file:
            raise ValueError(f"{self._location.url} is closed; open it again")
        return np.asarray(self._data[box]).view(self.dtype)

    def content(self, boxes: Sequence[Box]) -> Any:
        """Return place, size and time of change of the files that the values lie in."""
        if not self._location.is_local:
            return None
        path = self._location.path.resolve()
        check_not_replaced(self._file)
        return ["HDF5", str(path), self._name, *hdf5_state(self._data, self._others)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Hdf5Array, (self._location, self._name)


def _dtype(name: str, item: Any) -> np.dtype[Any]:
    """Return the data type of a data set, of BigDataViewer's as it is meant."""
    dtype: np.dtype[Any] = np.dtype(item.dtype)
    is_meant_unsigned = dtype.kind == "i" and dtype.itemsize == 2 and _VIEWER_NAME.fullmatch(name)
    if is_meant_unsigned:
        dtype = np.dtype(dtype.str.replace("i", "u"))
    return dtype


def _open(location: Location) -> Any:
    h5py = optional("h5py", f"reading {location.url}")
    try:
        return h5py.File(location.url if location.is_local else location.open(), "r")
    except BlockingIOError as error:
        raise UnreadableError(
            f"{location.url} is open for writing in another program, and HDF5 lets nobody read it "
            f"until that closes it ({error})"
        ) from error


class _Handle:
    """Closes a file once."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                file.close()


def find_hdf5(location: Location, name: str | None) -> Found:
    """Return the only image of an HDF5 file, or the one that is named."""
    file = _open(location)
    try:
        return _found(location, file, name)
    except BaseException:
        file.close()
        raise


def _found(location: Location, file: Any, name: str | None) -> Found:
    sets = dict(_datasets(file))
    wanted = None if name is None else name.strip("/")
    # Also by another name, that of a link.
    meant = None if not wanted else sets.get(wanted, _linked(file, wanted))
    if wanted and hasattr(meant, "shape"):
        sets[wanted] = meant
        chosen = wanted
    else:
        chosen = choose(location, wanted, _images(sets), "HDF5")
    levels = _levels(chosen, sets)
    first = sets[levels[0]]

    def open_level(level: int) -> Any:
        item = file[levels[level]]
        if location.is_local and _dtype(levels[level], item) == item.dtype:
            return item
        return Hdf5Array(location, levels[level], file)

    def space(found: Found, level: int) -> Space:
        what = f"{location.url}, {levels[level]}"
        if not level or chosen in sets:
            return _space(file[levels[level]], what)
        factors = _factors(file, levels)
        base = _space(file[levels[0]], what)
        return base if factors is None else base.shrunk(factors[level])

    return Found(
        location,
        chosen,
        "HDF5",
        levels,
        open_level,
        space,
        attributes=_plain(first.attrs),
        close=_Handle(file).close,
    )


def list_hdf5(location: Location) -> list[ListedArray]:
    """Return the data sets of an HDF5 file."""
    with _open(location) as file:
        sets = dict(_datasets(file))
        listed = []
        for name, item in sets.items():
            stored = item.id.get_storage_size()
            axes = _axes(item)
            listed.append(
                ListedArray(
                    "HDF5",
                    name,
                    item.shape,
                    _dtype(name, item),
                    None if axes is None else tuple(axis.lower() for axis in axes),
                    item.chunks,
                    None,
                    item.compression or "none",
                    1,
                    partial(int, stored),
                )
            )
        return listed


def _datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Return names and data sets of a file, each once, and those that links to others lead to."""
    h5py = optional("h5py", "reading HDF5")
    found: list[tuple[str, Any]] = []
    outward: list[str] = []

    def visit(above: str, name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found.append((joined(above, name), item))

    def visit_link(name: str, link: Any) -> None:
        if isinstance(link, h5py.ExternalLink):
            outward.append(name)

    file.visititems(partial(visit, ""))
    file.visititems_links(visit_link)
    for name in outward:
        item = _linked(file, name)
        if isinstance(item, h5py.Group):
            item.visititems(partial(visit, name))
        else:
            visit("", name, item)
    return iter(found)


def _linked(file: Any, name: str) -> Any:
    """Return what has a name; None where there is nothing, or a link leads nowhere."""
    try:
        return file[name]
    except (KeyError, OSError):
        return None


def _images(sets: Mapping[str, Any]) -> list[str]:
    """Return what may be meant: often there are numbers and names beside the images."""
    names: dict[str, None] = {}
    for name, item in sets.items():
        match = _VIEWER_NAME.fullmatch(name)
        if match:
            names[match[1]] = None
        elif item.ndim > 1 and item.dtype.kind in "biufc" and not _is_viewers(name, sets):
            names[name] = None
    return list(names) or [name for name, item in sets.items() if item.dtype.kind in "biufc"]


def _is_viewers(name: str, sets: Mapping[str, Any]) -> bool:
    """Whether it is one of the tables in which BigDataViewer describes its pyramids."""
    head, _, last = name.partition("/")
    return last in ("resolutions", "subdivisions") and f"t00000/{head}/0/cells" in sets


def _levels(chosen: str, sets: Mapping[str, Any]) -> list[str]:
    if chosen in sets:
        return [chosen]
    found = [
        (int(match[3]), name)
        for name in sets
        if (match := _VIEWER_NAME.fullmatch(name)) and match[1] == chosen
    ]
    return [name for _, name in sorted(found)]


def _factors(file: Any, levels: list[str]) -> list[tuple[int, ...]] | None:
    """Return how many voxels of the finest level make one of each, as BigDataViewer says it."""
    match = _VIEWER_NAME.fullmatch(levels[0])
    table = None if match is None else file.get(f"{match[2]}/resolutions")
    if table is None or getattr(table, "shape", ()) != (len(levels), 3):
        return None
    # It counts x first.
    found = [tuple(round(float(n)) for n in row[::-1]) for row in table[...]]
    return found if all(n > 0 for row in found for n in row) else None


def _plain(attributes: Any) -> dict[str, Any]:
    found = {}
    for key in attributes:
        try:
            found[key] = attributes[key]
        except (OSError, TypeError, KeyError):
            # Of a type that h5py does not know.
            continue
    return found


def _axes(item: Any) -> tuple[str, ...] | None:
    tags = _tags(item)
    if tags:
        names = tuple(str(tag.get("key", "")) for tag in tags)
    else:
        names = tuple(dim.label for dim in item.dims)
        if not all(names):
            names = tuple(_scale_name(dim) for dim in item.dims)
    return names if names and all(names) and len(set(names)) == item.ndim else None


def _scale_name(dim: Any) -> str:
    return str(dim[0].name).rpartition("/")[2] if len(dim) else ""


def _tags(item: Any) -> list[Mapping[str, Any]]:
    """Return vigra's description of the axes, as ilastik writes it."""
    text = item.attrs.get("axistags")
    try:
        axes = json.loads(text)["axes"]
    except (TypeError, ValueError, KeyError):
        return []
    fits = isinstance(axes, list) and len(axes) == item.ndim
    return axes if fits and all(isinstance(axis, dict) for axis in axes) else []


def _space(item: Any, what: str) -> Space:
    ndim = item.ndim
    said = _plain(item.attrs)
    axes = _axes(item)
    base = attributes_space(ndim, axes, said, what)
    scale, shift, units = list(base.scale), list(base.translation), list(base.units)
    for axis, tag in enumerate(_tags(item)):
        step = tag.get("resolution")
        if isinstance(step, (int, float)) and step > 0:
            scale[axis] = float(step)
    for axis, dim in enumerate(item.dims):
        if len(dim) and dim[0].shape == (item.shape[axis],):
            scale[axis], shift[axis] = even_steps(np.asarray(dim[0][...]))
            unit = dim[0].attrs.get("units")
            text = unit.decode(errors="replace") if isinstance(unit, bytes) else unit
            units[axis] = text if isinstance(text, str) and text else None
    for axis, size in _element_sizes(said, base.axes, ndim):
        scale[axis], units[axis] = size, "micrometer"
    return tolerant_space(ndim, base.axes, units, scale, shift, what)


def _element_sizes(
    said: Mapping[str, Any], axes: tuple[str, ...] | None, ndim: int
) -> list[tuple[int, float]]:
    """Return axes and micrometres of ``element_size_um``, which is in the order z, y, x."""
    given = said.get("element_size_um")
    count = np.size(given) if given is not None else 0
    sizes = numbers(given, int(count))
    if not sizes or count > min(3, ndim):
        return []
    names = "zyx"[-len(sizes) :]
    if axes is not None and all(name in axes for name in names):
        return [(axes.index(name), size) for name, size in zip(names, sizes, strict=True)]
    return list(zip(range(ndim - len(sizes), ndim), sizes, strict=True))
