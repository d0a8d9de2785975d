"""The image as a dask array.

The graph is symbolic: `CellLayer` knows how to make the task of a cell and makes it only for the
cells that are asked for. In the process that defined the image a task is one call of the loader,
so that it shares the cache with direct reading, and an image upstream is read inside that call.
A layer that was pickled runs elsewhere (dask's distributed scheduler unpickles it before it
makes tasks): there the cells of images upstream are tasks of their own, so that each is computed
once for all workers. Chunks of dask arrays are always tasks that the cell depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
from dask.task_spec import DataNode, Task, TaskRef
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, IrregularGrid, tiles
from cellimg_dask.loading.loader import CellLoader, ImageReader
from cellimg_dask.loading.readers import ChunkedReader, Reader, TiledReader

__all__ = ["CellLayer", "dask_name", "to_dask"]


def to_dask(loader: CellLoader) -> da.Array:
    """Return the image of ``loader`` as a dask array, one chunk per cell."""
    grid = loader.grid
    meta = np.empty((0,) * grid.ndim, loader.dtype)
    if grid.num_cells == 0:
        return da.zeros(grid.shape, dtype=loader.dtype, chunks=grid.chunks)
    name = dask_name(loader)
    if da.array_expr_enabled():
        return _to_dask_expression(loader, name, meta)
    return da.Array(_graph(loader, name), name, grid.chunks, meta=meta)


def dask_name(loader: CellLoader) -> str:
    """Return the name of the image's keys: the same for the same definition.

    It changes when the image is invalidated, so that nothing computed before is taken for new.
    """
    # Upstream first, so that a long chain needs no deep recursion.
    names = [_own_name(item) for item in loader.ancestry()]
    return names[-1]


def _own_name(loader: CellLoader) -> str:
    known = loader.token
    if known is None or known[0] != loader.edition:
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
        )
        # As dask does, so that a dashboard shows the function.
        prefix = loader.function.name.rpartition(".")[2].strip("<>") or "cells"
        known = loader.token = (loader.edition, f"{prefix}-{token}")
    return known[1]


def _reader_token(reader: Reader) -> Any:
    if isinstance(reader, ImageReader):
        return _own_name(reader.loader)
    array = getattr(reader, "array", reader)
    return array.name if isinstance(array, da.Array) else array


def _is_dask(reader: Reader) -> bool:
    return isinstance(reader, ChunkedReader) and isinstance(reader.array, da.Array)


def _graph(loader: CellLoader, name: str) -> HighLevelGraph:
    """Return the layers of the image and of all that it rests on."""
    layers: dict[str, Any] = {}
    dependencies: dict[str, set[str]] = {}
    on_dask: set[CellLoader] = set()
    for image in loader.ancestry():
        upstream: dict[int, tuple[str, CellGrid | IrregularGrid]] = {}
        fed = []
        for number, reader in enumerate(image.readers):
            if isinstance(reader, ImageReader):
                upstream[number] = _own_name(reader.loader), reader.loader.grid
                if reader.loader in on_dask:
                    fed.append(number)
            elif _is_dask(reader):
                array = reader.array  # type: ignore[attr-defined]
                upstream[number] = array.name, reader.grid  # type: ignore[attr-defined]
                fed.append(number)
                graph = _layers_of(array)
                layers.update(graph.layers)
                dependencies.update(graph.dependencies)
        if fed:
            on_dask.add(image)
        own = _own_name(image)
        layers[own] = CellLayer(own, image, upstream, fed)
        dependencies[own] = {above for above, _ in upstream.values()}
    assert name in layers
    return HighLevelGraph(layers, dependencies)


def _layers_of(array: da.Array) -> HighLevelGraph:
    graph = array.__dask_graph__()
    if isinstance(graph, HighLevelGraph):
        return graph
    return HighLevelGraph({array.name: MaterializedLayer(dict(graph))}, {array.name: set()})


class CellLayer(Layer):  # type: ignore[misc]  # dask is not typed
    """The tasks of an image's cells, made when they are asked for.

    Parameters
    ----------
    name : str
        First part of the keys, the rest is the cell's position.
    loader : CellLoader
        Computes the cells.
    upstream : mapping of int to (str, grid)
        Inputs that are dask arrays or images: the name of their keys and their grid.
    fed : sequence of int
        Which of them reach a cell through the graph in this process.
    """

    has_legacy_tasks = False

    def __init__(
        self,
        name: str,
        loader: CellLoader,
        upstream: Mapping[int, tuple[str, CellGrid | IrregularGrid]],
        fed: Sequence[int],
        *,
        elsewhere: bool = False,
        annotations: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(annotations=annotations)
        self.name = name
        self.loader = loader
        self.upstream = dict(upstream)
        self.fed = tuple(fed)
        self.elsewhere = elsewhere
        self._call = CellCall(loader, self.fed)
        self._call_key = f"{name}-definition"

    def __reduce__(self) -> tuple[Any, ...]:
        # On a cluster every input that has tasks is fed by them.
        fed = tuple(self.upstream)
        return _layer_elsewhere, (
            self.name,
            self.loader.without_readers(fed),
            self.upstream,
            fed,
            self.annotations,
        )

    def is_materialized(self) -> bool:
        """Return False: there are no tasks yet."""
        return False

    def get_output_keys(self) -> set[Any]:
        """Return the keys of all cells."""
        return set(self._cell_keys())

    def __len__(self) -> int:
        return self.loader.grid.num_cells + self.elsewhere

    def __iter__(self) -> Iterator[Any]:
        yield from self._cell_keys()
        if self.elsewhere:
            yield self._call_key

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple) and key and key[0] == self.name:
            grid = self.loader.grid.grid_shape
            return len(key) == len(grid) + 1 and all(
                isinstance(p, int) and 0 <= p < n for p, n in zip(key[1:], grid, strict=True)
            )
        return self.elsewhere and key == self._call_key

    def __getitem__(self, key: Any) -> Task | DataNode:
        if key not in self:
            raise KeyError(key)
        if key == self._call_key:
            return DataNode(key, self._call)
        grid = self.loader.grid
        index = grid.index(key[1:])
        chunks = [
            TaskRef((self.upstream[number][0], *self.upstream[number][1].position(tile)))
            for number, tile in self._call.tiles(index, self._grids())
        ]
        if self.elsewhere:
            # The definition travels once to each worker, not once with each task.
            return Task(key, _run, TaskRef(self._call_key), index, *chunks)
        return Task(key, self._call, index, *chunks)

    def cull(
        self, keys: set[Any], all_hlg_keys: Any
    ) -> tuple[MaterializedLayer, dict[Any, set[Any]]]:
        """Return the tasks of the wanted cells and what they depend on."""
        tasks: dict[Any, Any] = {
            key: self[key] for key in keys if type(key) is tuple and key[0] == self.name
        }
        dependencies: dict[Any, set[Any]] = {
            key: set(task.dependencies) for key, task in tasks.items()
        }
        if self.elsewhere and tasks:
            tasks[self._call_key] = self[self._call_key]
            dependencies[self._call_key] = set()
        return MaterializedLayer(tasks, annotations=self.annotations), dependencies

    def _cell_keys(self) -> Iterator[Any]:
        return product([self.name], *map(range, self.loader.grid.grid_shape))

    def _grids(self) -> dict[int, CellGrid | IrregularGrid]:
        return {number: self.upstream[number][1] for number in self.fed}


def _layer_elsewhere(
    name: str,
    loader: CellLoader,
    upstream: Mapping[int, tuple[str, CellGrid | IrregularGrid]],
    fed: Sequence[int],
    annotations: Mapping[str, Any] | None,
) -> CellLayer:
    return CellLayer(name, loader, upstream, fed, elsewhere=True, annotations=annotations)


class CellCall:
    """Computes a cell in a task; tiles of the ``fed`` inputs are given with the call."""

    def __init__(self, loader: CellLoader, fed: Sequence[int]) -> None:
        self.loader = loader
        self.fed = tuple(fed)
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
        with loader.crew().working():
            return loader.load(index, self._readers(index, chunks))

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
    return TiledReader(reader.grid, reader.dtype, lambda tile: np.asarray(given[number, tile]))


def _run(call: CellCall, index: int, *chunks: NDArray[Any]) -> NDArray[Any]:
    return call.past_cache(index, *chunks)


def _to_dask_expression(loader: CellLoader, name: str, meta: NDArray[Any]) -> da.Array:
    """Return the image for dask's ``array.query-planning``, which has no symbolic layers.

    The graph is written out when dask computes, so there a slice costs in proportion to the
    number of cells; building and pickling do not.
    """
    # dask 2026.8 has no public way to make such an array from a graph.
    from dask.array._array_expr._collection import from_graph

    graph = _WrittenOut(_graph(loader, name), name)
    keys = _Keys(name, loader.grid.grid_shape)
    return from_graph(graph, meta, loader.grid.chunks, keys, "cells")


class _WrittenOut:
    """A graph that becomes a plain dictionary when dask asks for its keys."""

    def __init__(self, graph: HighLevelGraph, name: str) -> None:
        self._graph = graph
        self._name = name
        self._tasks: dict[Any, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _WrittenOut, (self._graph, self._name)

    def __dask_tokenize__(self) -> str:
        return self._name

    def keys(self) -> Any:
        if self._tasks is None:
            # Without what is only needed where each image's cells are tasks of their own.
            layer = self._graph.layers[self._name]
            self._tasks = dict(self._graph.cull(layer.get_output_keys()))
        return self._tasks.keys()

    def __getitem__(self, key: Any) -> Any:
        self.keys()
        assert self._tasks is not None
        return self._tasks[key]


class _Keys:
    """The keys of an image's cells, never listed before somebody iterates."""

    def __init__(self, name: str, grid_shape: tuple[int, ...]) -> None:
        self._name = name
        self._grid_shape = grid_shape

    def __dask_tokenize__(self) -> tuple[str, tuple[int, ...]]:
        return self._name, self._grid_shape

    def __iter__(self) -> Iterator[Any]:
        return product([self._name], *map(range, self._grid_shape))
