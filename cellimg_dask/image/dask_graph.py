"""The image as a dask array: a symbolic graph, whose tasks are made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
from dask.highlevelgraph import HighLevelGraph
from numpy.typing import NDArray

from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.queues.tasks import dask_name, graph_of

__all__ = ["to_dask"]


def to_dask(loader: CellLoader) -> da.Array:
    """Return the image of ``loader`` as a dask array, one chunk per cell."""
    grid = loader.grid
    meta = np.empty((0,) * grid.ndim, loader.dtype)
    if grid.num_cells == 0:
        return da.zeros(grid.shape, dtype=loader.dtype, chunks=grid.chunks)
    name = dask_name(loader)
    loader = loader.pinned()
    if da.array_expr_enabled():
        return _to_dask_expression(loader, name, meta)
    return da.Array(graph_of(loader), name, grid.chunks, meta=meta)


def _to_dask_expression(loader: CellLoader, name: str, meta: NDArray[Any]) -> da.Array:
    """Return the image for dask's ``array.query-planning``, which has no symbolic layers.

    The graph is written out when dask computes, so there a slice costs in proportion to the
    number of cells; building and pickling do not.
    """
    # dask 2026.8 has no public way to make such an array from a graph.
    from dask.array._array_expr._collection import from_graph

    graph = _WrittenOut(graph_of(loader), name)
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
            self._tasks = dict(self._graph)
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
