"""Finding the cells that read something, from large regions to small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, Roi

__all__ = ["cells_found_from_above"]

_MOST_QUESTIONS = 2000
"""Asking about a region may take some tenths of a millisecond."""


def cells_found_from_above(
    grid: CellGrid, reads: Callable[[Roi], bool]
) -> NDArray[np.int64] | None:
    """Return the cells that read something, sorted; None where there are too many to look for.

    Parameters
    ----------
    grid : CellGrid
        The cells.
    reads : callable
        Whether a region does. One that does not has no part that does.
    """
    if not grid.num_cells:
        return np.empty(0, np.int64)
    found: list[int] = []
    todo = [((0,) * grid.ndim, grid.grid_shape)]
    for _ in range(_MOST_QUESTIONS):
        if not todo:
            return np.sort(np.array(found, np.int64))
        low, high = todo.pop()
        if not reads(_region(grid, low, high)):
            continue
        steps = [b - a for a, b in zip(low, high, strict=True)]
        longest = max(steps, default=1)
        if longest == 1:
            found.append(sum(p * stride for p, stride in zip(low, grid.strides, strict=True)))
            continue
        axis = steps.index(longest)
        middle = low[axis] + longest // 2
        todo.append((low, (*high[:axis], middle, *high[axis + 1 :])))
        todo.append(((*low[:axis], middle, *low[axis + 1 :]), high))
    return None


def _region(grid: CellGrid, low: Sequence[int], high: Sequence[int]) -> Roi:
    """Return the voxels of the cells from one position to another."""
    sizes = list(zip(grid.cell_shape, grid.shape, strict=True))
    return Roi(
        tuple(a * size for a, (size, _) in zip(low, sizes, strict=True)),
        tuple(min(b * size, extent) for b, (size, extent) in zip(high, sizes, strict=True)),
    )
