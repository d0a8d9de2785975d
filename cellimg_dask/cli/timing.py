"""Timing the demo's filter in three ways on one array."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.cli.pipeline import Pipeline
from cellimg_dask.loading.crew import get_crew

__all__ = ["Timing", "compare"]


@dataclass(frozen=True)
class Timing:
    """How long one way took."""

    way: str
    seconds: float | None
    """Median; None where the way is impossible."""
    rounds: int
    note: str = ""


def compare(
    pipeline: Pipeline,
    image: NDArray[Any],
    cells: tuple[int, ...],
    reference: NDArray[np.float32],
    *,
    enough_seconds: float = 2.0,
) -> list[Timing]:
    """Time three ways from an array in memory to one in memory, taking turns.

    Parameters
    ----------
    pipeline : Pipeline
        What to compute.
    image : ndarray
        The image of one channel.
    cells : ints
        Cell shape, and chunk shape for dask.
    reference : ndarray
        The right result; a way that gives another is marked.
    enough_seconds : float
        No round, of at most five, begins after so many.
    """
    threads = get_crew().num_threads
    many = f"{threads} thread{'s' if threads > 1 else ''}"

    def lazily() -> NDArray[Any]:
        return np.asarray(pipeline.lazy(image, cells, ci.CellCache(ci.get_cache().max_bytes))[1])

    def by_map_overlap() -> NDArray[Any]:
        array = pipeline.overlapped(image, cells)
        return np.asarray(array.compute(scheduler="threads", num_workers=threads))

    ways: dict[str, Callable[[], NDArray[Any]]] = {
        f"cellimg_dask, cell by cell, {many}": lazily,
        f"dask's map_overlap, the same cells, {many}": by_map_overlap,
        "SciPy, the whole image in one piece, 1 thread": lambda: pipeline.whole(image),
    }
    impossible = []
    try:
        pipeline.overlapped(image, cells)
    except ValueError as error:
        # It refuses a depth beyond the array.
        name = next(name for name, way in ways.items() if way is by_map_overlap)
        del ways[name]
        impossible = [Timing(name, None, 0, f"not possible: {error}")]

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    notes: dict[str, str] = {}
    began = perf_counter()
    for _ in range(5):
        for name, way in ways.items():
            start = perf_counter()
            result = way()
            seconds[name].append(perf_counter() - start)
            if not np.array_equal(result, reference, equal_nan=True):
                notes[name] = "with another result"
        if perf_counter() - began > enough_seconds:
            break
    return [
        Timing(name, statistics.median(times), len(times), notes.get(name, ""))
        for name, times in seconds.items()
    ] + impossible
