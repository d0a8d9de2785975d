"""Which voxels a brush touches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, Roi

__all__ = ["stroke_masks", "tight_box"]

_SLACK = 1e-9


def stroke_masks(
    points: NDArray[np.float64],
    radius: float,
    scale: Sequence[float],
    free: Sequence[bool],
    normal: NDArray[np.float64] | None,
    grid: CellGrid,
) -> Iterator[tuple[Roi, NDArray[np.bool_]]]:
    """Yield what a stroke touches, piece by piece: a tight box and its voxels that are touched.

    Each box lies in one cell, and they are about as long as the brush is wide, so that little is
    in a box that is not touched. Boxes may overlap.

    Parameters
    ----------
    points : array (n, ndim)
        Voxels that the brush's centre passes on straight lines; integers are centres.
    radius : float
        In units of ``scale``. Voxels through which the line goes are always touched.
    scale : floats
        Distance of two voxels along each axis.
    free : bools
        The axes along which the brush is round; along the others (time, channel) it is as thin
        as a voxel.
    normal : array (ndim,), optional
        Direction in which the brush is as thin as a voxel, in units: a disc. Default: a ball.
    grid : CellGrid
        Of what is painted.

    Notes
    -----
    A voxel is touched where its centre is not further from the line than the radius. A disc
    touches the voxels through which its plane goes, so that a plane seen at any angle has no holes.
    """
    steps = np.asarray(scale, float)
    is_free = np.asarray(free, bool)
    reach = np.where(is_free, radius / steps, 0.0)
    if normal is not None and normal[np.abs(normal).argmax()] < 0:
        # Of two planes that are equally near, the same one from both sides.
        normal = -normal
    if normal is not None:
        half = float(np.abs(normal * steps).sum()) / 2
        flat = radius * np.sqrt(np.clip(1 - normal**2, 0, 1)) + half * np.abs(normal)
        reach = np.where(is_free, flat / steps, 0.0)
    pieces = list(_pieces(points, radius, steps, is_free))
    low = np.array([np.floor(np.minimum(a, b) - reach + 0.5 - _SLACK) for a, b in pieces])
    high = np.array([np.floor(np.maximum(a, b) + reach + 0.5 + _SLACK) + 1 for a, b in pieces])
    low = np.clip(low, 0, grid.shape).astype(np.int64)
    high = np.clip(high, 0, grid.shape).astype(np.int64)
    for piece, start, stop in zip(pieces, low, high, strict=True):
        if (start >= stop).any():
            continue
        for cell in grid.cells_in(Roi(tuple(start.tolist()), tuple(stop.tolist()))):
            roi = grid.roi(cell.position)
            first, last = np.maximum(start, roi.start), np.minimum(stop, roi.stop)
            mask = _near(*piece, first, last, radius, steps, is_free, normal)
            bounds = tight_box(mask)
            if bounds is not None:
                corners = zip(first.tolist(), bounds, strict=True)
                corner = tuple(at + begin for at, (begin, _) in corners)
                mask = mask[tuple(slice(*each) for each in bounds)]
                far = tuple(at + extent for at, extent in zip(corner, mask.shape, strict=True))
                yield Roi(corner, far), mask


def _pieces(
    points: NDArray[np.float64], radius: float, steps: NDArray[np.float64], free: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield the lines in pieces about as long as the brush is wide, so that boxes stay small."""
    if len(points) == 1:
        yield points[0], points[0]
    for start, stop in pairwise(points):
        length = float(np.linalg.norm((stop - start) * steps))
        longest = max(2 * radius, 8 * float(steps.max()))
        if not np.array_equal(np.rint(start[~free]), np.rint(stop[~free])):
            # It goes from one picture of a film to another: there is no line between them.
            yield start, start
            yield stop, stop
            continue
        count = max(1, int(np.ceil(length / longest)))
        ends = [start + (stop - start) * (part / count) for part in range(count + 1)]
        yield from pairwise(ends)


def _near(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
    radius: float,
    steps: NDArray[np.float64],
    free: NDArray[np.bool_],
    normal: NDArray[np.float64] | None,
) -> NDArray[np.bool_]:
    """Return which voxels of a box are near a line."""
    ndim = len(steps)
    if (start >= stop).any():
        return np.zeros(np.maximum(stop - start, 0), bool)
    offsets = [
        ((np.arange(start[axis], stop[axis]) - a[axis]) * steps[axis]).reshape(
            [-1 if axis == other else 1 for other in range(ndim)]
        )
        for axis in range(ndim)
    ]
    line = np.where(free, (b - a) * steps, 0.0)
    squared = float(line @ line)
    along = sum(offset * part for offset, part in zip(offsets, line, strict=True))
    share = np.clip(along / squared, 0, 1) if squared else 0.0
    distance = sum(
        np.square(offset - share * part)
        for axis, (offset, part) in enumerate(zip(offsets, line, strict=True))
        if free[axis]
    )
    reach = (radius * (1 + _SLACK)) ** 2
    if normal is None:
        near = distance <= reach
    else:
        # Half the thickness of a voxel in this direction; within it, only what lies in the plane
        # of the disc counts.
        half = float(np.abs(normal * steps).sum()) / 2
        slack = _SLACK * half
        height = sum(offset * part for offset, part in zip(offsets, normal, strict=True))
        near = (height > -half + slack) & (height <= half + slack)
        near = near & (distance - np.square(height) <= reach)
    near = np.broadcast_to(near, tuple(stop - start)).copy()
    # However thin the brush is, its line has no gaps.
    near |= _crossed(a, np.where(free, b, a), start, stop)
    return near


def _crossed(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return the voxels of a box through which a line goes."""
    enter: Any = -np.inf
    leave: Any = np.inf
    for axis in range(len(a)):
        shape = [-1 if axis == other else 1 for other in range(len(a))]
        low = np.arange(start[axis], stop[axis]).reshape(shape) - 0.5
        step = b[axis] - a[axis]
        if step:
            ends = (low - a[axis]) / step, (low + 1 - a[axis]) / step
            enter = np.maximum(enter, np.minimum(*ends))
            leave = np.minimum(leave, np.maximum(*ends))
        else:
            is_here = low == np.floor(a[axis] + 0.5 + _SLACK) - 0.5
            enter = np.where(is_here, enter, np.inf)
    crossed = np.maximum(enter, 0) < np.minimum(leave, 1)
    found = np.broadcast_to(crossed, tuple(stop - start)).copy()
    for point in (a, b):
        voxel = np.floor(point + 0.5 + _SLACK).astype(np.int64)
        if ((voxel >= start) & (voxel < stop)).all():
            found[tuple(voxel - start)] = True
    return found


def tight_box(mask: NDArray[np.bool_]) -> list[tuple[int, int]] | None:
    """Return the bounds along each axis of all that is set; None where nothing is."""
    if not mask.any():
        return None
    box = []
    for axis in range(mask.ndim):
        rest = tuple(other for other in range(mask.ndim) if other != axis)
        found = np.flatnonzero(mask.any(axis=rest))
        box.append((int(found[0]), int(found[-1]) + 1))
    return box
