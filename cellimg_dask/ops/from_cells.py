"""A leaf of dask's data frame expressions that reads the cells of an image."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pandas as pd
from dask._task_spec import convert_legacy_graph
from dask.base import normalize_token

# The public dask.dataframe.from_graph writes all tasks out for any one partition, and from_map
# sends the whole definition with each task.
from dask.dataframe.dask_expr._collection import new_collection
from dask.dataframe.dask_expr._expr import PartitionsFiltered
from dask.dataframe.dask_expr.io.io import IO
from dask.task_spec import DataNode, Task

from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.queues.tasks import dask_name, graph_of

__all__ = ["Cells", "FromCells", "Make", "new_collection"]

Make = Callable[[Any], pd.DataFrame]
"""From the value of a cell to a new table."""


class Cells:
    """The tasks of an image of tables, made when they are asked for."""

    def __init__(
        self,
        graph: Any,
        name: str,
        token: str,
        num_cells: int,
        strides: tuple[int, ...],
        meta: pd.DataFrame,
        make: Make,
        image: CellImg | None,
    ) -> None:
        self._graph = graph
        self._name = name
        # Expressions of one token are one object for dask. Two images may be defined alike and
        # change apart from each other.
        self._token = token
        self.num_cells = num_cells
        self._strides = strides
        self.meta = meta
        self.make = make
        self.image = image
        """What may have changed since; not known elsewhere."""

    @classmethod
    def of(cls, image: CellImg, meta: pd.DataFrame, make: Make) -> Cells:
        """Return the image's tasks as it is now."""
        loader = image.loader.pinned()
        grid = loader.grid
        name = dask_name(loader)
        token = f"{name}-{id(image.node)}"
        return cls(graph_of(loader), name, token, grid.num_cells, grid.strides, meta, make, image)

    def __reduce__(self) -> tuple[Any, ...]:
        known = self._graph, self._name, self._token, self.num_cells, self._strides
        return Cells, (*known, self.meta, self.make, None)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        kinds = [(name, str(kind)) for name, kind in self.meta.dtypes.items()]
        return "cells", self._token, kinds, normalize_token(self.make)

    @property
    def prefix(self) -> str:
        """How dask shows the tasks."""
        return self._name.rpartition("-")[0]

    def tasks(self, name: str, cells: Any) -> dict[Any, Any]:
        """Return what computes the tables of some cells, under the keys ``(name, 0)`` and on."""
        if not self.num_cells:
            # There is one partition at least.
            return {(name, 0): DataNode((name, 0), self.meta)}
        keys = [(self._name, *self._position(cell)) for cell in cells]
        graph: dict[Any, Any] = convert_legacy_graph(dict(self._graph.cull(set(keys))))
        for number, key in enumerate(keys):
            task = graph[key]
            # In one step, so that a cell stays one task.
            graph[name, number] = Task((name, number), _table, self.make, task.func, *task.args)
        for key in keys:
            graph.pop(key, None)
        return graph

    def _position(self, cell: int) -> tuple[int, ...]:
        position = []
        for stride in self._strides:
            step, cell = divmod(cell, stride)
            position.append(step)
        return tuple(position)


def _table(make: Make, compute: Callable[..., Any], *args: Any) -> pd.DataFrame:
    return make(compute(*args).item())


class FromCells(PartitionsFiltered, IO):  # type: ignore[misc]  # dask is not typed
    """Reads a data frame from cells."""

    _parameters = ["cells", "_partitions"]  # noqa: RUF012
    _defaults = {"_partitions": None}  # noqa: RUF012

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.operand('cells').prefix}-{self.deterministic_token}"

    @property
    def _meta(self) -> pd.DataFrame:
        return self.operand("cells").meta

    def _divisions(self) -> tuple[None, ...]:
        cells: Cells = self.operand("cells")
        return (None,) * (max(cells.num_cells, 1) + 1)

    def _layer(self) -> dict[Any, Any]:
        tasks: dict[Any, Any] = self.operand("cells").tasks(self._name, self._partitions)
        return tasks
