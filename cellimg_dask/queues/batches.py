"""Cells of a cluster that share a task, because none of them is worth a task of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid
from cellimg_dask.queues.tasks import CellCall, fit_cache

__all__ = ["BatchResult", "Place", "batch_key", "cut", "places_of", "run_batch", "without_error"]

# The first cell of a worker pays for what is imported and compiled, so it may take so many times
# what the whole batch should, before the batch ends with it.
_PATIENCE_WITH_THE_FIRST = 10


class Place(NamedTuple):
    """Where a cell is in the result of its batch."""

    number: int
    """Of the cell in the batch."""
    begin: int
    """Its first voxel in the one axis of the result."""
    stop: int
    """Behind its last voxel."""
    shape: tuple[int, ...]
    """Of the cell."""


@dataclass(frozen=True)
class BatchResult:
    """The first cells of a batch, up to one that failed, or until it had taken long enough."""

    flat: NDArray[Any]
    """The voxels of all of them in one axis: one message and not one for each."""
    num_cells: int
    """How many there are."""
    seconds: float
    """What a cell takes."""
    error: Exception | None
    """Why the cell after these failed."""

    def get(self, place: Place) -> NDArray[Any] | None:
        """Return a cell; None if it is not among the first."""
        if place.number >= self.num_cells:
            return None
        return self.flat[place.begin : place.stop].reshape(place.shape)


def batch_key(name: str, indices: Sequence[int]) -> str:
    """Return the key of a task for some cells: the same for everybody who asks for the same."""
    return f"{name}-batch-{blake2b(np.array(indices).tobytes(), digest_size=16).hexdigest()}"


def places_of(grid: CellGrid, indices: Sequence[int]) -> dict[int, Place]:
    """Return where cells are in the result of their batch."""
    if not grid.shape:
        return {0: Place(0, 0, 1, ())}
    positions = np.stack(np.unravel_index(np.asarray(indices), grid.grid_shape), axis=-1)
    shapes = np.minimum(grid.cell_shape, grid.shape - positions * np.array(grid.cell_shape))
    stops = np.cumsum(np.prod(shapes, axis=-1)).tolist()
    begins = [0, *stops[:-1]]
    items = zip(indices, count(), begins, stops, map(tuple, shapes.tolist()), strict=False)
    return {index: Place(*place) for index, *place in items}


def run_batch(call: CellCall, indices: Sequence[int], patience_s: float) -> BatchResult:
    """Compute cells one after the other; not the last of them if they take too long."""
    fit_cache()
    voxels: list[NDArray[Any]] = []
    costs: list[float] = []
    failure = None
    left_s = patience_s * (1 + _PATIENCE_WITH_THE_FIRST)
    with call.loader.crew().working():
        for index in indices:
            began = perf_counter()
            try:
                voxels.append(call.past_cache(index).reshape(-1))
            except Exception as error:
                failure = error
                break
            costs.append(perf_counter() - began)
            left_s -= costs[-1]
            if left_s < 0:
                break
            if len(costs) == 1:
                left_s = patience_s
    flat = np.concatenate(voxels) if voxels else np.empty(0, call.loader.dtype)
    return BatchResult(flat, len(voxels), median(costs[1:] or costs or [0.0]), failure)


def cut(result: BatchResult, call: CellCall, index: int, place: Place) -> NDArray[Any]:
    """Return a cell of a batch.

    A batch that was computed again, because its worker was lost, may have become shorter.
    """
    cell = result.get(place)
    return call.past_cache(index) if cell is None else cell


def without_error(result: BatchResult) -> BatchResult:
    """Return a batch as if only those of its cells had been wanted that could be computed."""
    return replace(result, error=None)
