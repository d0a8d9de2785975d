"""The order in which a run goes through the cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellimg_dask.geometry import CellGrid

__all__ = ["neighbours_together"]


def neighbours_together(grid: CellGrid, indices: Sequence[int]) -> list[int]:
    """Return cells in Morton order: neighbours soon follow each other, along every axis.

    So what neighbours share, halos of cells upstream and decoded chunks, is still held when the
    next one needs it; in C order it would have to be held for a whole layer of cells.
    """
    if grid.ndim < 2 or len(indices) < 2:
        return list(indices)
    flat = np.asarray(indices, dtype=np.int64)
    positions = np.unravel_index(flat, grid.grid_shape)
    bits = max(int(size - 1).bit_length() for size in grid.grid_shape)
    if bits * grid.ndim > 62:
        return list(indices)
    code = np.zeros(len(flat), dtype=np.int64)
    for bit in range(bits):
        for axis, position in enumerate(positions):
            place = bit * grid.ndim + (grid.ndim - 1 - axis)
            code |= ((position >> bit) & 1) << place
    ordered: list[int] = flat[np.argsort(code, kind="stable")].tolist()
    return ordered
