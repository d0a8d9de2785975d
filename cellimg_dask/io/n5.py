"""Images in N5, whose axes are turned round: N5 counts x first, NumPy last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.content import digest
from cellimg_dask.blocks.plan import Box
from cellimg_dask.geometry import CellGrid, Space, tiles
from cellimg_dask.io.location import Location, UnreadableError
from cellimg_dask.io.opened import Found, ListedArray, choose, joined
from cellimg_dask.io.optional import optional
from cellimg_dask.io.spaces import first_of, numbers, shrunk_to, texts, tolerant_space
from cellimg_dask.loading.file_array import FileArray, check_unchanged, file_state

__all__ = ["N5Array", "find_n5", "list_n5"]

_ATTRIBUTES = "attributes.json"
_DTYPES = frozenset(
    f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)
) - {"float8", "float16"}
_DEEPEST = 8
_MOST_LEVELS = 64


class N5Array(FileArray):
    """A data set of N5, with axes in NumPy order.

    tensorstore reads it. Of file systems that only fsspec reaches, its chunks are fetched first.
    """

    def __init__(self, location: Location, name: str) -> None:
        self._location = location
        self._name = name
        self._attributes = _dataset_attributes(location, name)
        shape, chunks = self._attributes["dimensions"], self._attributes["blockSize"]
        self.shape = tuple(shape[::-1])
        self.chunks = tuple(chunks[::-1])
        self.dtype = np.dtype(self._attributes["dataType"])
        self.label = f"N5 {joined(location.last_name, name)}"
        self._grid = CellGrid(self.shape, self.chunks)
        self._lock = threading.Lock()
        self._opened_in: int | None = None
        self._twin: Any = None
        # So that what it does not know is said here.
        self._now()

    def _now(self) -> Any:
        """Return tensorstore's array, of a place of its own where the files must be fetched."""
        with self._lock:
            if self._opened_in not in (None, os.getpid()):
                # Its threads do not survive a fork: it would end the process.
                raise OSError(
                    f"{self._location.url} was read before this process was forked, and "
                    f"tensorstore cannot go on here: start processes with the method spawn or "
                    f"forkserver"
                )
            if self._opened_in is None:
                place = {"driver": "memory"}
                if self._location.is_local:
                    place = {"driver": "file", "path": str(self._location.path / self._name)}
                self._twin = _open(place, self._attributes)
                self._opened_in = os.getpid()
            return self._twin

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a box."""
        if not self._location.is_local:
            return self._fetched(box)
        return np.asarray(self._now()[box].read().result())

    def _fetched(self, box: Box) -> NDArray[Any]:
        names = [joined(self._name, name) for name in self._chunk_names([box])]
        files = self._location.read_many(names)
        tensorstore = optional("tensorstore", f"reading {self._location.url}")
        # A store of its own for these chunks.
        context = tensorstore.Context()
        memory = tensorstore.KvStore.open("memory://", context=context).result()
        for name, data in files.items():
            memory.write(name[len(self._name) :].lstrip("/"), data).result()
        twin = _open({"driver": "memory"}, self._attributes, context)
        return np.asarray(twin[box].read().result())

    def _chunk_names(self, boxes: Sequence[Box]) -> list[str]:
        """Return the names of the files that hold the chunks of boxes."""
        found: dict[int, None] = {}
        for box in boxes:
            low, high = [part.start for part in box], [part.stop for part in box]
            found.update((index, None) for index, _, _ in tiles(self._grid, low, high)[1])
        positions = (self._grid.position(index) for index in sorted(found))
        return ["/".join(map(str, position[::-1])) for position in positions]

    def content(self, boxes: Sequence[Box]) -> Any:
        """Return place, size and time of change of the chunks' files."""
        if not self._location.is_local:
            return None
        now = _dataset_attributes(self._location, self._name)
        check_unchanged(self._location.below(self._name).url, self._attributes, now)
        folder = self._location.path.resolve() / self._name
        files = [[name, file_state(folder / name)] for name in self._chunk_names(boxes)]
        return ["N5", str(folder), digest(self._attributes), files]

    def __reduce__(self) -> tuple[Any, ...]:
        return N5Array, (self._location, self._name)


def _open(place: Mapping[str, Any], attributes: Mapping[str, Any], context: Any = None) -> Any:
    tensorstore = optional("tensorstore", "reading N5")
    spec: dict[str, Any] = {"driver": "n5", "kvstore": dict(place), "metadata": dict(attributes)}
    spec |= {"open": True, "assume_metadata": True}
    more = {} if context is None else {"context": context}
    return tensorstore.open(spec, read=True, write=False, **more).result().T


def _dataset_attributes(location: Location, name: str) -> dict[str, Any]:
    """Return what is needed to read a data set, of what its attributes say."""
    said = location.read_json(joined(name, _ATTRIBUTES)) or {}
    place = location.below(name).url
    dimensions, chunks = said.get("dimensions"), said.get("blockSize")
    for key, value in (("dimensions", dimensions), ("blockSize", chunks)):
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise UnreadableError(f"{place} (N5): {key} must be a list of whole numbers: {value!r}")
    assert dimensions is not None
    assert chunks is not None
    if len(dimensions) != len(chunks) or not all(chunks):
        raise UnreadableError(f"{place} (N5): blockSize {chunks} does not fit {dimensions}")
    if said.get("dataType") not in _DTYPES:
        raise UnreadableError(
            f"{place} (N5) has data type {said.get('dataType')!r}; numbers can be read: "
            f"{', '.join(sorted(_DTYPES))}"
        )
    # The first version of N5 had a name only.
    compression = said.get("compression", {"type": said.get("compressionType", "raw")})
    return {
        "dimensions": dimensions,
        "blockSize": chunks,
        "dataType": said["dataType"],
        "compression": compression,
    }


def find_n5(location: Location, name: str | None) -> Found:
    """Return the image of an N5 data set or group, or the one called ``name`` in it."""
    path = "" if name is None else name.strip("/")
    said = location.read_json(joined(path, _ATTRIBUTES)) or {}
    if "dimensions" in said:
        above = path.rpartition("/")[0]
        around = location.read_json(joined(above, _ATTRIBUTES)) or {} if path else {}
        levels = _levels(location, above, around) if path else []
        if path in levels:
            number = levels.index(path)
            image = _Pyramid(location, above, around, levels)
            return _found(location, path, [path], lambda _: image.space(number), said)
        return _found(location, path, [path], _Pyramid(location, "", {}, [path]).space, said)
    levels = _levels(location, path, said)
    if levels:
        return _found(location, path, levels, _Pyramid(location, path, said, levels).space, said)
    names = _images(location, path)
    if name is not None and not names:
        choose(location, name, _images(location, ""), "N5")
    if not names:
        choose(location.below(path), None, names, "N5")
    chosen = choose(location, None, [joined(path, each) for each in names], "N5")
    return find_n5(location, chosen)


def _found(
    location: Location, path: str, levels: Sequence[str], space: Any, said: Mapping[str, Any]
) -> Found:
    optional("tensorstore", f"reading {location.url}")
    return Found(
        location,
        path,
        "N5",
        levels,
        lambda level: N5Array(location, levels[level]),
        lambda found, level: space(level),
        attributes=said,
    )


def _levels(location: Location, path: str, said: Mapping[str, Any]) -> list[str]:
    """Return the data sets of an image in several sizes: named, or s0, s1 and so on."""
    named = [joined(path, item["path"]) for item in _datasets(said)]
    if named and all(_is_dataset(location, name) for name in named):
        return named
    levels: list[str] = []
    while len(levels) < _MOST_LEVELS:
        name = joined(path, f"s{len(levels)}")
        if not _is_dataset(location, name):
            break
        levels.append(name)
    return levels


def _is_dataset(location: Location, name: str) -> bool:
    return "dimensions" in (location.read_json(joined(name, _ATTRIBUTES)) or {})


def _datasets(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    scales = said.get("multiscales")
    first = scales[0] if isinstance(scales, list) and scales else scales
    items = first.get("datasets") if isinstance(first, Mapping) else None
    if not isinstance(items, list):
        return []
    return [
        item for item in items if isinstance(item, Mapping) and isinstance(item.get("path"), str)
    ]


class _Pyramid:
    """Where the voxels of levels lie, by what N5-viewer, BigDataViewer or COSEM write."""

    def __init__(
        self, location: Location, path: str, said: Mapping[str, Any], levels: Sequence[str]
    ) -> None:
        self._location = location
        self._path = path
        self._group = said
        self._levels = levels

    def space(self, level: int) -> Space:
        """Return where the voxels of a level lie."""
        name = self._levels[level]
        own = self._location.read_json(joined(name, _ATTRIBUTES)) or {}
        ndim = len(own["dimensions"])
        what = self._location.below(name).url
        transform = own.get("transform") or self._listed_transform(name)
        if isinstance(transform, Mapping):
            found = _transformed(ndim, transform, what)
            if found is not None:
                return found
        if level:
            base = self.space(0)
            factors = self._factors(level, own, ndim)
            if factors is not None:
                return base.shrunk(factors)
            first = self._location.read_json(joined(self._levels[0], _ATTRIBUTES)) or {}
            shapes = first["dimensions"][::-1], own["dimensions"][::-1]
            return shrunk_to(base, *shapes)
        scale, units = _resolution(own, ndim)
        if scale is None:
            scale, units = _resolution(self._group, ndim)
        axes = texts(first_of({**self._group, **own}, "axes"), ndim)
        if axes is not None:
            axes = axes[::-1] if len(set(axes)) == ndim else None
        shift = numbers(own.get("offset"), ndim) if scale is not None else None
        return tolerant_space(
            ndim,
            axes,
            (units or ())[::-1],
            (scale or [1.0] * ndim)[::-1],
            (shift or [0.0] * ndim)[::-1],
            what,
        )

    def _listed_transform(self, name: str) -> Any:
        for item in _datasets(self._group):
            if joined(self._path, item["path"]) == name:
                return item.get("transform")
        return None

    def _factors(self, level: int, own: Mapping[str, Any], ndim: int) -> tuple[int, ...] | None:
        """Return how many voxels of the finest level make one, in NumPy order."""
        found = own.get("downsamplingFactors")
        if found is None:
            every = first_of(self._group, "downsamplingFactors", "scales")
            found = every[level] if isinstance(every, list) and level < len(every) else None
        factors = numbers(found, ndim)
        if factors is None or not all(n >= 1 and n == int(n) for n in factors):
            return None
        return tuple(int(n) for n in factors[::-1])


def _resolution(
    said: Mapping[str, Any], ndim: int
) -> tuple[list[float] | None, tuple[str | None, ...] | None]:
    """Return distances and units, x first."""
    found = first_of(said, "pixelResolution", "resolution")
    units = first_of(said, "units", "unit")
    if isinstance(found, Mapping):
        units = found.get("unit", units)
        found = found.get("dimensions")
    # BigDataViewer tells those of space only, in a series over time or channels too.
    count = len(found) if isinstance(found, list) else 0
    scale = numbers(found, count)
    if scale is None or not 0 < count <= ndim:
        return None, None
    more = ndim - count
    said_units = texts(units, count) or (None,) * count
    kept = tuple(unit if unit not in ("pixel", "px", "") else None for unit in said_units)
    return scale + [1.0] * more, kept + (None,) * more


def _transformed(ndim: int, transform: Mapping[str, Any], what: str) -> Space | None:
    """Return the space of a transform as COSEM writes it, in the order of its axes."""
    scale = numbers(transform.get("scale"), ndim)
    if scale is None:
        return None
    shift = numbers(transform.get("translate"), ndim) or [0.0] * ndim
    axes = texts(transform.get("axes"), ndim)
    units: tuple[str | None, ...] = texts(transform.get("units"), ndim) or (None,) * ndim
    if axes is not None and axes[0] == "x" and axes[-1] != "x":
        axes, units, scale, shift = axes[::-1], units[::-1], scale[::-1], shift[::-1]
    return tolerant_space(ndim, axes, units, scale, shift, what)


# ---------------------------------------------------------------------- listing


def list_n5(location: Location) -> list[ListedArray]:
    """Return the data sets of an N5 container, images in several sizes in order of these."""
    listed = []
    for name in _walk(location, "", 0):
        try:
            array = _dataset_attributes(location, name)
        except UnreadableError:
            continue  # Of objects, say.
        compression = array["compression"]
        kind = compression.get("type") if isinstance(compression, Mapping) else compression
        listed.append(
            ListedArray(
                "N5",
                name,
                tuple(array["dimensions"][::-1]),
                np.dtype(array["dataType"]),
                None,
                tuple(array["blockSize"][::-1]),
                None,
                "none" if kind == "raw" else str(kind),
                1,
                partial(location.nbytes, name),
            )
        )
    return listed


def _walk(location: Location, path: str, depth: int) -> Iterator[str]:
    """Yield the data sets below a group."""
    try:
        if _is_dataset(location, path):
            yield path
            return
    except UnreadableError:
        if not depth:
            raise
    if depth < _DEEPEST:
        for name in sorted(location.below(path).folders(), key=_in_order):
            yield from _walk(location, joined(path, name), depth + 1)


def _in_order(name: str) -> tuple[str, int, str]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or -1), name


def _images(location: Location, path: str) -> list[str]:
    """Return the images below a group: each once, whatever sizes it has."""
    found: dict[str, None] = {}
    for name in _walk(location, path, 0):
        below = name[len(path) :].strip("/")
        above, _, last = below.rpartition("/")
        is_level = last[:1] == "s" and last[1:].isdigit() and above
        found[above if is_level else below] = None
    return list(found)
