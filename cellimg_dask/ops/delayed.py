"""Values of images as dask's delayed objects."""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller

from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import Task, TaskRef

from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.queues.tasks import dask_name, graph_of

__all__ = ["to_delayed"]


def to_delayed(loader: CellLoader, index: int = 0) -> Delayed:
    """Return a value of an image of values, as it would be computed now."""
    name = dask_name(loader)
    graph = graph_of(loader.pinned())
    position: Sequence[int] = loader.grid.position(index)
    key = f"{name}-value-{index}"
    task = Task(key, methodcaller("item"), TaskRef((name, *position)))
    layers = {**graph.layers, key: MaterializedLayer({key: task})}
    dependencies = {**graph.dependencies, key: {name}}
    return Delayed(key, HighLevelGraph(layers, dependencies), layer=key)
