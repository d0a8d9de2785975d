"""Points that several cells found: each cell decides on its own, and all decide alike.

A detector may see one object at slightly different places in neighbouring blocks. Then each cell
keeps the points in its core and those up to a tolerance outside, and of the copies of an object
the one that lies deepest in the core of its own cell stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import CellGrid
from cellimg_dask.ops.point_table import Found

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

    Called with a block whose input holds what was `Found` for the cell and for its neighbours.

    Two points of two cells are copies of one object if they are no farther apart than the
    tolerance; each point of one cell has at most one copy in the other, nearest pairs first. As
    this depends on nothing but what the two cells found, both come to the same result.
    """

    name: str
    """Of the function that finds the points."""
    grid: CellGrid
    """Of the image."""
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

    def __call__(self, block: Block) -> Found:
        """Return the points of a cell without those that others keep."""
        window: Any = block.inputs[0]
        here = tuple(
            min(place, wide) for place, wide in zip(block.position, self.reach, strict=True)
        )
        found = window[here]
        depth = depths(found.points, self.grid, block.position)
        keep = np.ones(len(depth), bool)
        near = np.flatnonzero(depth <= 2 * self.tol)
        for there in np.ndindex(window.shape) if near.size else ():
            points = window[there].points
            if there == here or not len(points):
                continue
            position = np.add(block.position, np.subtract(there, here))
            their_depth = depths(points, self.grid, tuple(position.tolist()))
            close = np.flatnonzero(their_depth <= 2 * self.tol)
            theirs, ours = points[close], found.points[near]
            # In the same order for both, so that equal distances are told apart alike.
            if there < here:
                pairs = _copies(theirs, ours, self.tol)
            else:
                pairs = [(they, we) for we, they in _copies(ours, theirs, self.tol)]
            for they, we in pairs:
                own, other = near[we], close[they]
                if (depth[own], there < here) < (their_depth[other], here < there):
                    keep[own] = False
        kept: Found = found if keep.all() else found.take(keep)
        return kept


def _copies(
    first: NDArray[np.float64], second: NDArray[np.float64], tol: float
) -> list[tuple[int, int]]:
    """Return pairs of points that are no farther apart than ``tol``, each point at most once."""
    from scipy.spatial import cKDTree

    pairs: list[tuple[int, int]] = []
    if not len(first) or not len(second):
        return pairs
    found = cKDTree(first).sparse_distance_matrix(cKDTree(second), tol, output_type="ndarray")
    taken: set[int] = set()
    others_taken: set[int] = set()
    for one, other, _ in found[np.lexsort((found["j"], found["i"], found["v"]))].tolist():
        if one not in taken and other not in others_taken:
            taken.add(one)
            others_taken.add(other)
            pairs.append((one, other))
    return pairs
