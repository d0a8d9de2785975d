"""Keys of cells that hold on disk: equal exactly where the same would be computed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cellimg_dask.blocks.content import (
    NoContentError,
    array_content,
    digest,
    dtype_content,
    value_content,
)
from cellimg_dask.blocks.functions import BlockCode, BlockFunction
from cellimg_dask.blocks.plan import Box, CellPlan, Planner
from cellimg_dask.blocks.worker import BlockJob
from cellimg_dask.geometry import CellGrid, tiles
from cellimg_dask.loading.file_array import FileArray, check_unchanged, file_state
from cellimg_dask.loading.hdf5_state import hdf5_state, other_places
from cellimg_dask.loading.readers import (
    ArrayReader,
    ChunkedReader,
    PinnedReader,
    Reader,
    stored_array,
)
from cellimg_dask.loading.running import Queue
from cellimg_dask.loading.source import MemoryReader, StoredReader

__all__ = ["ContentKeys"]

_SCHEMA = 1
_REMEMBERED = 1 << 16


Described = dict[int, tuple[Any, Any]]
"""Of inputs in stores, what takes long to make: of a zarr array the metadata and their digest, of
a data set of HDF5 the data set and where else its values may be."""


class Image(Protocol):
    """What has to be known of the loader of an image."""

    function: BlockFunction
    planner: Planner
    readers: tuple[Reader, ...]
    job: BlockJob
    queue: Queue | None

    @property
    def grid(self) -> CellGrid:
        """Grid of the image."""
        ...

    def plan(self, index: int) -> CellPlan:
        """Return the plan of a cell."""
        ...


class ContentKeys:
    """Makes the keys of an image's cells.

    A key tells the function, its parameters, the queue's ``init`` and environment, grid, halo,
    boundary, dtype, the cell, and what the cell reads of each input, halo included: bytes of an
    array, the files of a store's chunks with size and time of change, the keys of another image's
    cells.

    Parameters
    ----------
    loader : CellLoader
        Of the image.

    Raises
    ------
    NoContentError
        If something can not be compared; the message says what, and that ``version=`` helps.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, loader: Image) -> None:
        self._image = _ImageKeys(loader)
        known = self._known = {loader: self._image}
        todo = [self._image]
        # Each image once, and without recursion: a chain may be deeper than Python's stack.
        while todo:
            image = todo.pop()
            for number, reader in image.images_read():
                if reader.loader not in known:
                    known[reader.loader] = _ImageKeys(reader.loader)
                    todo.append(known[reader.loader])
                image.upstream[number] = reader.grid, known[reader.loader]

    def of(self, loader: Image) -> ContentKeys:
        """Return the keys of an image upstream, which are not made a second time."""
        if loader not in self._known:
            # Some version stands for it.
            return ContentKeys(loader)
        keys = object.__new__(ContentKeys)
        keys._image, keys._known = self._known[loader], self._known
        return keys

    def key(self, index: int) -> str:
        """Return the key of a cell: 32 hexadecimal digits."""
        return self._follow(index, remember=True)

    def key_now(self, index: int) -> str:
        """Return the key of a cell as its inputs are at this moment, remembering nothing."""
        return self._follow(index, remember=False)

    def _follow(self, index: int, *, remember: bool) -> str:
        found: dict[tuple[_ImageKeys, int], str] = {}
        stack = [(self._image, index)]
        while stack:
            image, cell = stack[-1]
            key = image.remembered(cell) if remember else None
            if key is None and (image, cell) not in found:
                plan = image.loader.plan(cell)
                missing = [each for each in image.rests_on(plan) if each not in found]
                if missing:
                    stack += missing
                    continue
                key = image.make(plan, found)
                if remember:
                    image.remember(cell, key)
            if key is not None:
                found[image, cell] = key
            stack.pop()
        return found[self._image, index]


class _ImageKeys:
    """What the keys of one image's cells consist of, and those that are remembered."""

    def __init__(self, loader: Image) -> None:
        self.loader = loader
        self.upstream: dict[int, tuple[Any, _ImageKeys]] = {}
        """Of the inputs that are images: their grid and keys."""
        self._definition = digest(_definition(loader))
        self._lock = threading.Lock()
        self._known: dict[int, str] = {}
        self._described: Described = {}

    def images_read(self) -> list[tuple[int, Any]]:
        """Return number and reader of the inputs that are images and have no version."""
        return [
            (number, reader)
            for number, reader in enumerate(self.loader.readers)
            if hasattr(reader, "loader") and self.loader.planner.inputs[number].version is None
        ]

    def remembered(self, index: int) -> str | None:
        """Return a key that was made before."""
        return self._known.get(index)

    def remember(self, index: int, key: str) -> None:
        """Remember a key."""
        with self._lock:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[index] = key

    def rests_on(self, plan: CellPlan) -> list[tuple[_ImageKeys, int]]:
        """Return the cells of images that a cell reads."""
        return [
            (image, cell)
            for number, (grid, image) in self.upstream.items()
            for cell in _met(grid, plan.boxes(number))
        ]

    def make(self, plan: CellPlan, found: Mapping[tuple[_ImageKeys, int], str]) -> str:
        """Return the key of a cell, given those that it rests on."""
        contents: list[Any] = []
        for number, reader in enumerate(self.loader.readers):
            version = self.loader.planner.inputs[number].version
            boxes = plan.boxes(number)
            if version is not None:
                contents.append(["version", version])
            elif number in self.upstream:
                grid, image = self.upstream[number]
                contents.append([found[image, cell] for cell in _met(grid, boxes)])
            else:
                contents.append(_stored(reader, boxes, number, self._described))
        return digest([self._definition, plan.index, *contents])


def _definition(loader: Image) -> Any:
    job = loader.job
    name = loader.function.name
    version = job.version
    init = None if loader.queue is None else getattr(loader.queue, "init", None)
    env = None if loader.queue is None else getattr(loader.queue, "env", None)

    def content(value: Any, what: str) -> Any:
        try:
            return value_content(value, what)
        except NoContentError as error:
            if version is not None:
                return ["version"]
            raise NoContentError(
                f"{error}; give the image version=…, a text that you change with its function "
                f"and parameters"
            ) from error

    return [
        _SCHEMA,
        type(loader.function).__name__,
        # It stands for the function, and for what else cannot be compared.
        ["version", name, version]
        if version is not None
        else content(getattr(loader.function, "function"), name),  # noqa: B009
        {key: content(value, f"params[{key!r}]") for key, value in job.params.items()},
        content(BlockCode(init) if isinstance(init, str) else init, "init"),
        *([] if env is None else [["env", env.token]]),
        dtype_content(job.dtype),
        loader.grid.shape,
        loader.grid.cell_shape,
        [
            [
                item.shape,
                item.halo.before,
                item.halo.after,
                item.boundary,
                content(item.fill_value, "fill_value"),
                content(item.index_map, "index_map"),
                [[link.axis, link.factor] for link in item.links or ()],
            ]
            for item in loader.planner.inputs
        ],
    ]


def _met(grid: Any, boxes: Sequence[Box]) -> list[int]:
    """Return the tiles that boxes meet, each once, in order."""
    found: dict[int, None] = {}
    for box in boxes:
        _, parts = tiles(grid, [part.start for part in box], [part.stop for part in box])
        found.update((index, None) for index, _, _ in parts)
    return sorted(found)


def _stored(reader: Reader, boxes: Sequence[Box], number: int, described: Described) -> Any:
    if isinstance(reader, (ArrayReader, MemoryReader, StoredReader)):
        return [array_content(reader.read(box)) for box in boxes]
    array: Any = getattr(reader, "array", reader)
    if isinstance(reader, ChunkedReader):
        array = stored_array(reader)
        if type(array).__module__.startswith("zarr."):
            return _zarr(array, reader, boxes, number, described)
    if isinstance(array, FileArray):
        content = array.content(boxes)
        if content is not None:
            return content
    module = type(array).__module__.partition(".")[0]
    if module == "h5py":
        known = described.get(number)
        if known is None or known[0] is not array:
            known = described[number] = array, other_places(array)
        return ["h5py", array.name, *hdf5_state(array, known[1])]
    raise NoContentError(
        f"input {number} is a {module}.{type(array).__name__}, of which cannot be said what is in "
        f"it: give Input(array, version=…), a text that you change with its content"
    )


def _check_same_layout(array: Any, folder: Path) -> None:
    """Refuse a zarr array that was made anew, with other chunks say, since it was opened.

    It may have grown.
    """
    import zarr

    now = zarr.open_array(array.store, path=array.path, mode="r").metadata
    said = [each.to_dict() | {"attributes": None} for each in (array.metadata, now)]
    pairs = zip(array.metadata.shape, now.shape, strict=False)
    if len(array.shape) == len(now.shape) and all(before <= after for before, after in pairs):
        said = [each | {"shape": None} for each in said]
    check_unchanged(folder, digest(value_content(said[0])), digest(value_content(said[1])))


def _zarr(
    array: Any,
    reader: ChunkedReader | PinnedReader,
    boxes: Sequence[Box],
    number: int,
    described: Described,
) -> Any:
    store = array.store
    if type(store).__name__ == "MemoryStore":
        return [array_content(reader.tile(index)) for index in _met(reader.grid, boxes)]
    root = getattr(store, "root", None)
    if type(store).__name__ != "LocalStore" or root is None:
        raise NoContentError(
            f"input {number} is a zarr array in a {type(store).__name__}, whose changes cannot be "
            f"seen: give Input(array, version=…), a text that you change with its content"
        )
    folder = Path(root).resolve() / array.path
    known = described.get(number)
    if known is None or known[0] is not array.metadata:
        content = value_content(array.metadata.to_dict() | {"attributes": None}, "metadata")
        _check_same_layout(array, folder)
        known = described[number] = array.metadata, digest(content)
    grid = CellGrid(array.shape, getattr(array, "shards", None) or array.chunks)
    names = [array.metadata.encode_chunk_key(grid.position(index)) for index in _met(grid, boxes)]
    files = [[name, file_state(folder / name)] for name in names]
    return ["zarr", str(folder), known[1], files]
