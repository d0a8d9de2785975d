"""The tasks that compute the cells of an image, and their keys.

`CellLayer` knows how to make the task of a cell and makes it only for the cells that are asked
for. In the process that defined the image a task is one call of the loader, so that it shares the
cache with direct reading, and an image upstream is read inside that call. Tasks for elsewhere
(made by a layer that was pickled, since dask's distributed scheduler unpickles it before it makes
tasks, and by a queue on a cluster) have the cells of images upstream as tasks of their own, so
that each is computed once for all workers. Chunks of dask arrays are always tasks that the cell
depends on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from operator import mul
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, IrregularGrid, tiles
from cellimg_dask.loading.loader import CellLoader, ImageReader
from cellimg_dask.loading.readers import ChunkedReader, Reader, SharedReader, TiledReader, native
from cellimg_dask.loading.source import MemoryReader, StoredReader
from cellimg_dask.state.cache import get_cache
from cellimg_dask.state.flights import Flight, current_flight, inside

__all__ = [
    "CellCall",
    "CellLayer",
    "chunk_tasks",
    "dask_name",
    "fit_cache",
    "graph_of",
    "stages_of",
]


def dask_name(loader: CellLoader) -> str:
    """Return the name of the image's keys: the same for the same definition.

    It changes when the image is invalidated, so that nothing computed before is taken for new.
    """
    # Upstream first, so that a long chain needs no deep recursion.
    names = [_own_name(item) for item in loader.ancestry()]
    return names[-1]


def _own_name(loader: CellLoader) -> str:
    if loader.token is None:
        token = tokenize(
            type(loader.function).__name__,
            getattr(loader.function, "function", loader.function),
            loader.params,
            loader.dtype,
            loader.grid.shape,
            loader.grid.cell_shape,
            loader.edition,
            [
                (
                    item.shape,
                    item.halo.before,
                    item.halo.after,
                    item.boundary,
                    item.fill_value,
                    item.index_map,
                    [(link.axis, link.factor) for link in item.links or ()],
                )
                for item in loader.planner.inputs
            ],
            [_reader_token(reader) for reader in loader.readers],
            None if loader.queue is None else loader.queue.token,
        )
        # As dask does, so that a dashboard shows the function.
        prefix = loader.function.name.rpartition(".")[2].strip("<>") or "cells"
        loader.token = f"{prefix}-{token}"
    return loader.token


def _reader_token(reader: Reader) -> Any:
    if isinstance(reader, ImageReader):
        return _own_name(reader.loader)
    if isinstance(reader, SharedReader):
        return reader.shared
    array = getattr(reader, "array", reader)
    if isinstance(array, da.Array):
        return array.name
    if isinstance(reader, (MemoryReader, StoredReader)):
        return reader.token
    # A store's handle does not say what is in it, so at least what it was told counts.
    return array, getattr(reader, "edition", 0)


def _fed_array(reader: Reader) -> da.Array | None:
    """Return the dask array whose chunks are given to a cell that reads it, if it is one."""
    if isinstance(reader, ChunkedReader) and isinstance(reader.array, da.Array):
        return reader.array
    if isinstance(reader, MemoryReader):
        return _array_of(reader)
    return None


def _array_of(reader: MemoryReader) -> da.Array:
    """Return an edition of a source as a dask array, one chunk per cell."""
    graph = HighLevelGraph({reader.token: TileLayer(reader)}, {reader.token: set()})
    meta = np.empty((0,) * reader.grid.ndim, reader.dtype)
    return da.Array(graph, reader.token, reader.grid.chunks, meta=meta)


def dask_arrays(loader: CellLoader) -> list[da.Array]:
    """Return the dask arrays that an image and those upstream of it rest on."""
    found = [_fed_array(reader) for image in loader.ancestry() for reader in image.readers]
    return [array for array in found if array is not None]


def stages_of(loader: CellLoader) -> list[tuple[str, CellLoader, dict[int, Upstream]]]:
    """Return name, loader, and inputs that can have tasks, of each image upstream and of this."""
    stages = []
    for image in loader.ancestry():
        upstream: dict[int, Upstream] = {}
        for number, reader in enumerate(image.readers):
            if isinstance(reader, ImageReader):
                upstream[number] = Upstream(_own_name(reader.loader), reader.loader.grid, False)
            elif (array := _fed_array(reader)) is not None:
                grid = reader.grid  # type: ignore[attr-defined]
                upstream[number] = Upstream(array.name, grid, True)
        stages.append((_own_name(image), image, upstream))
    return stages


def graph_of(loader: CellLoader, *, elsewhere: bool = False) -> HighLevelGraph:
    """Return the image's layer, and those of the dask arrays that it rests on."""
    layers: dict[str, Any] = {}
    dependencies: dict[str, set[str]] = {}
    name = dask_name(loader)
    arrays = dask_arrays(loader)
    for array in arrays:
        graph = _layers_of(array)
        layers.update(graph.layers)
        dependencies.update(graph.dependencies)
    layers[name] = CellLayer(stages_of(loader), elsewhere=elsewhere)
    dependencies[name] = {array.name for array in arrays}
    return HighLevelGraph(layers, dependencies)


def chunk_tasks(loader: CellLoader, tasks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the tasks of the dask chunks that tasks of cells depend on."""
    from dask._task_spec import convert_legacy_graph

    wanted = {above for task in tasks.values() for above in task.dependencies} - tasks.keys()
    found: dict[Any, Any] = {}
    for array in dask_arrays(loader):
        mine = {key for key in wanted if isinstance(key, tuple) and key[0] == array.name}
        if mine:
            found |= convert_legacy_graph(dict(_layers_of(array).cull(mine)))
    return found


def _layers_of(array: da.Array) -> HighLevelGraph:
    graph = array.__dask_graph__()
    if isinstance(graph, HighLevelGraph):
        return graph
    return HighLevelGraph({array.name: MaterializedLayer(dict(graph))}, {array.name: set()})


class CellCall:
    """Computes a cell in a task; tiles of the ``fed`` inputs are given with the call."""

    def __init__(
        self, loader: CellLoader, fed: Sequence[int], flight: Flight | None = None
    ) -> None:
        self.loader = loader
        self.fed = tuple(fed)
        # Where a block function computes with dask: the computation that waits for this one,
        # which dask's threads could not know.
        self._flight = flight
        self._grids: dict[int, Any] = {
            number: reader.grid
            for number, reader in enumerate(loader.readers)
            if number in self.fed and isinstance(reader, TiledReader)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return CellCall, (self.loader.without_readers(self.fed), self.fed)

    def tiles(self, index: int, grids: Mapping[int, Any]) -> list[tuple[int, int]]:
        """Return (input, tile) of the tiles that a cell reads, each once, in a fixed order."""
        if not self.fed:
            return []
        plan = self.loader.planner.plan(index)
        wanted: dict[tuple[int, int], None] = {}
        for number in self.fed:
            for box in plan.boxes(number):
                _, parts = tiles(grids[number], [b.start for b in box], [b.stop for b in box])
                wanted.update(((number, tile), None) for tile, _, _ in parts)
        return list(wanted)

    def __call__(self, index: int, *chunks: NDArray[Any]) -> NDArray[Any]:
        """Return the cell, through the cache of this process."""
        loader = self.loader
        # Held until the cell is there, however small the cache is.
        shared = [] if self.fed else loader.prepare()
        with loader.crew().working(), inside(self._flight or current_flight()):
            if self.fed:
                cell = loader.load(index, self._readers(index, chunks))
            else:
                cell = loader.load_after(index)
        del shared
        return cell

    def past_cache(self, index: int, *chunks: NDArray[Any]) -> NDArray[Any]:
        """Return the cell and keep nothing: the scheduler keeps results."""
        loader = self.loader
        with loader.crew().working():
            return loader.compute_owned(index, self._readers(index, chunks))

    def _readers(self, index: int, chunks: Sequence[NDArray[Any]]) -> Sequence[Reader]:
        if not self.fed:
            return self.loader.readers
        given = dict(zip(self.tiles(index, self._grids), chunks, strict=True))
        readers = list(self.loader.readers)
        for number in self.fed:
            readers[number] = _given_reader(readers[number], number, given)
        return readers


def _given_reader(
    reader: Reader, number: int, given: Mapping[tuple[int, int], NDArray[Any]]
) -> TiledReader:
    assert isinstance(reader, TiledReader)
    dtype = reader.dtype

    def tile(index: int) -> NDArray[Any]:
        if np.ma.is_masked(given[number, index]):
            raise TypeError("a dask chunk is a masked array, whose mask would be lost; fill it")
        chunk = np.asarray(given[number, index])
        if native(chunk.dtype) != native(dtype):
            raise TypeError(
                f"a dask chunk has dtype {chunk.dtype}, its array says {dtype}; make it say what "
                f"it gives, for instance with astype"
            )
        return chunk

    return TiledReader(reader.grid, dtype, tile)


def _run(call: CellCall, index: int, *chunks: NDArray[Any]) -> NDArray[Any]:
    fit_cache()
    return call.past_cache(index, *chunks)


@functools.cache
def fit_cache() -> None:
    """Bound the cache by a quarter of a cluster's worker, where this process is one."""
    try:
        from distributed import get_worker

        worker = get_worker()
    except (ImportError, ValueError):
        return
    if worker.address.startswith("inproc"):
        # This is the process of whoever reads, who has set a bound.
        return
    cache, limit = get_cache(), worker.memory_manager.memory_limit
    if limit and cache.max_bytes > limit // 4:
        cache.resize(limit // 4)


class TileLayer(Layer):  # type: ignore[misc]  # dask is not typed
    """The cells of a source as tasks, made when they are asked for."""

    has_legacy_tasks = False

    def __init__(self, reader: MemoryReader) -> None:
        super().__init__()
        self._reader = reader

    def is_materialized(self) -> bool:
        """Return False: there are no tasks yet."""
        return False

    def get_output_keys(self) -> set[Any]:
        """Return the keys of all cells."""
        return set(self)

    def __len__(self) -> int:
        return self._reader.grid.num_cells

    def __iter__(self) -> Iterator[Any]:
        return product([self._reader.token], *map(range, self._reader.grid.grid_shape))

    def __getitem__(self, key: Any) -> DataNode:
        if not isinstance(key, tuple) or key[:1] != (self._reader.token,):
            raise KeyError(key)
        return DataNode(key, self._reader.tile(self._reader.grid.index(key[1:])))

    def cull(
        self, keys: set[Any], all_hlg_keys: Any
    ) -> tuple[MaterializedLayer, dict[Any, set[Any]]]:
        """Return the wanted cells; they depend on nothing."""
        # Among the keys are those of other layers.
        mine = [key for key in keys if isinstance(key, tuple) and key[:1] == (self._reader.token,)]
        tasks = {key: self[key] for key in mine}
        return MaterializedLayer(tasks), {key: set() for key in tasks}

    def __reduce__(self) -> tuple[Any, ...]:
        return MaterializedLayer, ({key: self[key] for key in self},)


class Upstream(NamedTuple):
    """An input whose tiles can be tasks."""

    name: str
    """First part of the tiles' keys."""
    grid: CellGrid | IrregularGrid
    """Where the tiles lie."""
    is_dask: bool
    """Whether it is a dask array, or a source in memory; else it is another image."""


class _Stage(NamedTuple):
    """One image of a chain, in a layer."""

    loader: CellLoader
    upstream: Mapping[int, Upstream]
    call: CellCall
    call_key: str


class CellLayer(Layer):  # type: ignore[misc]  # dask is not typed
    """The tasks of an image's cells, made when they are asked for.

    The layer knows the whole chain of images. Here it makes tasks for the last one, and for
    those upstream that rest on a dask array; unpickled elsewhere, for all of them.

    Parameters
    ----------
    stages : sequence of (str, CellLoader, mapping of int to Upstream)
        The images, each after its own upstream: the first part of the keys, the loader, and the
        inputs that are dask arrays or images.
    elsewhere : bool
        Whether the tasks run in other processes than the one that defined the image.
    """

    has_legacy_tasks = False

    def __init__(
        self,
        stages: Sequence[tuple[str, CellLoader, Mapping[int, Upstream]]],
        *,
        elsewhere: bool = False,
        annotations: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(annotations=annotations)
        self._definition = tuple(stages)
        self._elsewhere = elsewhere
        fed_by: dict[str, list[int]] = {}
        for name, _, upstream in stages:
            fed_by[name] = [
                number
                for number, above in upstream.items()
                if elsewhere or above.is_dask or fed_by[above.name]
            ]
        last = stages[-1][0]
        needed = {last}
        for name, _, upstream in reversed(stages):
            if name in needed:
                needed.update(upstream[number].name for number in fed_by[name])
        self._stages = {
            name: _Stage(loader, upstream, CellCall(loader, fed_by[name]), f"{name}-definition")
            for name, loader, upstream in stages
            if name in needed
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # Elsewhere every input that can have tasks is fed by them.
        stages = [
            (name, loader.without_readers(tuple(upstream)), upstream)
            for name, loader, upstream in self._definition
        ]
        return _layer_elsewhere, (stages, self.annotations)

    def is_materialized(self) -> bool:
        """Return False: there are no tasks yet."""
        return False

    def get_output_keys(self) -> set[Any]:
        """Return the keys of all cells."""
        return set(self)

    def __len__(self) -> int:
        return sum(stage.loader.grid.num_cells + self._elsewhere for stage in self._stages.values())

    def __iter__(self) -> Iterator[Any]:
        for name, stage in self._stages.items():
            yield from product([name], *map(range, stage.loader.grid.grid_shape))
            if self._elsewhere:
                yield stage.call_key

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple) and key and key[0] in self._stages:
            grid = self._stages[key[0]].loader.grid.grid_shape
            return len(key) == len(grid) + 1 and all(
                isinstance(p, int) and 0 <= p < n for p, n in zip(key[1:], grid, strict=True)
            )
        return self._elsewhere and any(key == stage.call_key for stage in self._stages.values())

    def __getitem__(self, key: Any) -> Task | DataNode:
        if key not in self:
            raise KeyError(key)
        if isinstance(key, tuple):
            return self._task(key, self._stages[key[0]])
        call = next(stage.call for stage in self._stages.values() if stage.call_key == key)
        return DataNode(key, call)

    def cull(
        self, keys: set[Any], all_hlg_keys: Any
    ) -> tuple[MaterializedLayer, dict[Any, set[Any]]]:
        """Return the tasks that the wanted cells need, and what each depends on."""
        tasks = self.tasks(keys, lambda key: None)
        dependencies = {key: set(task.dependencies) for key, task in tasks.items()}
        return MaterializedLayer(tasks, annotations=self.annotations), dependencies

    def tasks(self, keys: Iterable[Any], held: Callable[[Any], Any]) -> dict[Any, Any]:
        """Return the tasks that the wanted cells need.

        ``held(key)`` gives the key under which a cell upstream is there already, a task that takes
        it from there, or None.
        """
        wanted: dict[str, dict[Any, None]] = {name: {} for name in self._stages}
        for key in keys:
            if isinstance(key, tuple) and key[0] in wanted:
                wanted[key[0]][key] = None
        tasks: dict[Any, Any] = {}
        # From the last image up, so that a key comes after everything that depends on it.
        for name in reversed(self._stages):
            stage = self._stages[name]
            for key in wanted[name]:
                task = self._task(key, stage)
                renamed: dict[Any, Any] = {}
                for above in task.dependencies:
                    if not (isinstance(above, tuple) and above[0] in wanted):
                        continue
                    there = held(above)
                    if there is None:
                        wanted[above[0]][above] = None
                    elif isinstance(there, Task):
                        tasks[above] = there
                    elif there != above:
                        # Computed before its image changed elsewhere, and named so.
                        renamed[above] = there
                tasks[key] = task.substitute(renamed) if renamed else task
            if self._elsewhere and wanted[name]:
                tasks[stage.call_key] = DataNode(stage.call_key, stage.call)
        return tasks

    def _task(self, key: Any, stage: _Stage) -> Task:
        # The key is known to be a cell's, so this need not be checked again.
        index = sum(map(mul, key[1:], stage.loader.grid.strides))
        grids = {number: stage.upstream[number].grid for number in stage.call.fed}
        tiles = [
            TaskRef((stage.upstream[number].name, *grids[number].position(tile)))
            for number, tile in stage.call.tiles(index, grids)
        ]
        if self._elsewhere:
            # The definition travels once to each worker, not once with each task.
            return Task(key, _run, TaskRef(stage.call_key), index, *tiles)
        call, flight = stage.call, current_flight()
        if flight is not None:
            call = CellCall(stage.loader, call.fed, flight)
        return Task(key, call, index, *tiles)


def _layer_elsewhere(
    stages: Sequence[tuple[str, CellLoader, Mapping[int, Upstream]]],
    annotations: Mapping[str, Any] | None,
) -> CellLayer:
    return CellLayer(stages, elsewhere=True, annotations=annotations)
