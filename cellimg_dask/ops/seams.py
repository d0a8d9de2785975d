"""Points that several cells found: each cell decides on its own, and all decide alike.

A detector may see one object at slightly different places in neighbouring blocks. Then each cell
keeps the points in its core and those up to a tolerance outside, and of the copies of an object
the one that lies deepest in the core of its own cell stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import CellGrid

__all__ = ["Seams", "depths"]

_NEAR_FACE = 1e-6
"""A point so close below a face lies on it: whole coordinates may come out rounded."""


def depths(points: NDArray[Any], grid: CellGrid, position: tuple[int, ...]) -> NDArray[np.float64]:
    """Return how deep points lie in a cell, in voxels, below 0 outside.

    Parameters
    ----------
    points : float array of shape (points, axes)
        In voxels of the image; a voxel's centre has whole coordinates.
    grid : CellGrid
        Its cells are half-open intervals of coordinates; the outer faces of the image are
        infinitely far away.
    position : ints
        Of the cell.

    Returns
    -------
    float array of shape (points,)
        The distance along an axis to the nearest face, the smallest of all axes. A point on the
        upper face is outside.
    """
    result = np.full(len(points), np.inf)
    roi = grid.roi(position)
    for axis, place in enumerate(position):
        along = points[:, axis] + _NEAR_FACE
        if place > 0:
            np.minimum(result, along - roi.start[axis], out=result)
        if place < grid.grid_shape[axis] - 1:
            above = roi.stop[axis] - along
            # On the face itself it is the next cell's.
            np.minimum(result, np.where(above == 0, -np.finfo(float).tiny, above), out=result)
    return result


@dataclass(frozen=True)
class Seams:
    """Keeps of a cell's points those that no neighbour has found as well, and deeper inside.

    Called with a block whose input holds the tables of the cell and of its neighbours.

    Two points of two cells are copies of one object if they are no farther apart than the
    tolerance; each point of one cell has at most one copy in the other, nearest pairs first. As
    this depends on nothing but the tables of the two cells, both come to the same result.
    """

    name: str
    """Of the function that finds the points."""
    grid: CellGrid
    """Of the image."""
    axes: tuple[str, ...]
    """Columns that hold the coordinates."""
    tol: float
    """Greatest distance of two copies, in voxels."""

    @property
    def __name__(self) -> str:
        """How messages call it."""
        return self.name

    @property
    def reach(self) -> tuple[int, ...]:
        """How far away, in cells, there may be copies of a point."""
        # Both may lie that far outside of their cells, and that far from each other.
        return tuple(int(3 * self.tol // size) + 1 for size in self.grid.cell_shape)

    def __call__(self, block: Block) -> Any:
        """Return the table of a cell without what others keep."""
        (tables,) = block.inputs
        here = tuple(
            min(place, wide) for place, wide in zip(block.position, self.reach, strict=True)
        )
        table = tables[here]
        points = self._points(table)
        depth = depths(points, self.grid, block.position)
        keep = np.ones(len(points), bool)
        near = np.flatnonzero(depth <= 2 * self.tol)
        if near.size == 0:
            return table
        for there in product(*map(range, tables.shape)):
            if there == here:
                continue
            position = tuple(
                place + at - own for place, at, own in zip(block.position, there, here, strict=True)
            )
            theirs = self._points(tables[there])
            their_depth = depths(theirs, self.grid, position)
            close = np.flatnonzero(their_depth <= 2 * self.tol)
            # In the same order for both, so that equal distances are told apart alike.
            turned = position < block.position
            first, second = (theirs[close], points[near])[:: 1 if turned else -1]
            for pair in _copies(first, second, self.tol):
                they, we = pair[:: 1 if turned else -1]
                own, other = near[we], close[they]
                if (depth[own], turned) < (their_depth[other], not turned):
                    keep[own] = False
        return table if keep.all() else table[keep].reset_index(drop=True)

    def _points(self, table: Any) -> NDArray[np.float64]:
        points: NDArray[np.float64] = table[list(self.axes)].to_numpy(np.float64)
        return points


def _copies(
    first: NDArray[np.float64], second: NDArray[np.float64], tol: float
) -> Iterator[tuple[int, int]]:
    """Yield pairs of points that are no farther apart than ``tol``, each point once."""
    from scipy.spatial import cKDTree

    if not len(first) or not len(second):
        return
    found = cKDTree(first).sparse_distance_matrix(cKDTree(second), tol, output_type="ndarray")
    taken: Mapping[int, set[int]] = {0: set(), 1: set()}
    for one, other, _ in found[np.lexsort((found["j"], found["i"], found["v"]))].tolist():
        if one not in taken[0] and other not in taken[1]:
            taken[0].add(one)
            taken[1].add(other)
            yield one, other
