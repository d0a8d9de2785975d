"""Thin-plate splines: the smoothest transform that brings landmarks upon landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np

from cellimg_dask.ops.transforms import Floats, as_numbers, checked_points

__all__ = ["ThinPlateSpline"]

_AT_A_TIME = 1 << 14
"""So many points are transformed together: what is in between stays in the processor's cache."""
_CUTS = 7
"""How often at most a box is cut to find where it comes to lie."""
_MOST_PAIRS = 1 << 17
"""With more pairs of a part of a box and a landmark the parts are not cut further."""
_LOOSE = 0.01
"""How much wider than necessary the box that is found may be."""
_SLACK = 1e-9
"""For rounding, relative to what is added up."""


@dataclass(frozen=True, eq=False)
class ThinPlateSpline:
    """The thin-plate spline through pairs of landmarks.

    It leads from the fixed image to the moving one, since that is what `warp` asks: where does
    this voxel come from? In any number of axes, the same as SciPy's
    ``RBFInterpolator(target_points, source_points, kernel="thin_plate_spline", degree=1)``.

    Parameters
    ----------
    source_points : array-like
        Where the landmarks lie in the moving image, the one that is warped; shape
        (landmarks, axes).
    target_points : array-like
        Where they lie in the fixed image, and so in the result; shape (landmarks, axes).
    smoothing : float
        0: each landmark comes exactly upon its partner. The greater, the nearer is the transform
        to an affine one, for landmarks that are not exact; as SciPy's parameter of that name.

    Raises
    ------
    TypeError, ValueError
        If the points do not fit together, are too few, or the target points lie in one plane
        (one line, in two axes), or two of them in one place.

    Examples
    --------
    >>> fixed = [[0, 0], [0, 9], [9, 0], [9, 9]]
    >>> moving = [[1, 0], [1, 9], [10, 0], [10, 9]]
    >>> spline = ThinPlateSpline(moving, fixed)
    >>> spline(np.array([[4.0, 5.0]])).round(6)
    array([[5., 5.]])
    """

    source_points: Any
    target_points: Any
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("source_points", "target_points"):
            points = as_numbers(getattr(self, name), name)
            if points.ndim != 2 or points.shape[1] == 0:
                raise ValueError(
                    f"{name} must have the shape (landmarks, axes), got {points.shape}"
                )
            object.__setattr__(self, name, points)
        if len(self.source_points) != len(self.target_points):
            raise ValueError(
                f"landmarks come in pairs: got {len(self.source_points)} source_points and "
                f"{len(self.target_points)} target_points"
            )
        smoothing = self.smoothing
        if not isinstance(smoothing, Real) or isinstance(smoothing, bool):
            raise TypeError(f"smoothing must be a number, got {smoothing!r}")
        if not (isfinite(smoothing) and smoothing >= 0):
            raise ValueError(f"smoothing must be at least 0 and finite, got {smoothing}")
        object.__setattr__(self, "smoothing", float(smoothing))
        self._check_places()
        _ = self._weights

    def _check_places(self) -> None:
        target = self.target_points
        num_points, num_axes = target.shape
        if num_points <= num_axes:
            raise ValueError(
                f"a thin-plate spline in {num_axes} axes needs at least {num_axes + 1} landmarks, "
                f"got {num_points}"
            )
        if np.linalg.matrix_rank(self._places - self._places[0], tol=1e-9) < num_axes:
            flat = {1: "in one place", 2: "on one line", 3: "in one plane"}
            raise ValueError(
                f"all target_points lie {flat.get(num_axes, 'in one hyperplane')}, so that they "
                f"say nothing of what lies beside it; add a landmark elsewhere"
            )
        if not self.smoothing:
            found, counts = np.unique(target, axis=0, return_counts=True)
            if (counts > 1).any():
                raise ValueError(
                    f"two target_points lie in one place, {found[counts > 1][0].tolist()}; remove "
                    f"one of the two, or give smoothing=…"
                )

    # The unit of length is half the extent of the landmarks: the equations are then as well
    # conditioned as they can be, and the spline does not depend on it.

    @cached_property
    def _centre(self) -> Floats:
        low, high = self.target_points.min(axis=0), self.target_points.max(axis=0)
        centre: Floats = (low + high) / 2
        return centre

    @cached_property
    def _unit(self) -> float:
        return float(np.ptp(self.target_points, axis=0).max()) / 2 or 1.0

    @cached_property
    def _places(self) -> Floats:
        places: Floats = (self.target_points - self._centre) / self._unit
        return places

    @cached_property
    def _weights(self) -> Floats:
        """One row per landmark, then one per axis and one of constants."""
        places = self._places
        num_points, num_axes = places.shape
        size = num_points + num_axes + 1
        matrix = np.zeros((size, size))
        squares = ((places[:, None] - places) ** 2).sum(axis=-1)
        matrix[:num_points, :num_points] = _kernel(squares)
        matrix[:num_points, :num_points] += np.eye(num_points) * self.smoothing / self._unit**2
        matrix[:num_points, num_points:-1] = places
        matrix[:num_points, -1] = 1
        matrix[num_points:, :num_points] = matrix[:num_points, num_points:].T
        values = np.zeros((size, self.source_points.shape[1]))
        values[:num_points] = self.source_points
        try:
            weights: Floats = np.linalg.solve(matrix, values)
        except np.linalg.LinAlgError:
            weights = np.full_like(values, np.nan)
        if not np.isfinite(weights).all():
            raise ValueError(
                "the landmarks do not determine a thin-plate spline: some target_points lie too "
                "near to each other, or nearly in one plane; remove some, or give smoothing=…"
            )
        return weights

    @property
    def num_axes_in(self) -> int:
        """Number of axes of the points that it is given."""
        return int(self.target_points.shape[1])

    @property
    def num_axes_out(self) -> int:
        """Number of axes of the points that it returns."""
        return int(self.source_points.shape[1])

    def __call__(self, points: Floats) -> Floats:
        """Return where points of the fixed image lie in the moving one.

        Parameters
        ----------
        points : ndarray
            Shape (n, axes).

        Returns
        -------
        ndarray of float64
            Shape (n, axes). A point has one result, to the last bit, whatever others it comes with.
        """
        points = checked_points(points, self.num_axes_in)
        found = np.empty((self.num_axes_out, len(points)))
        for start in range(0, len(points), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            self._transform(np.ascontiguousarray(points[part].T), found[:, part])
        return found.T

    def _transform(self, points: Floats, out: Floats) -> None:
        """Write where points lie; both arrays have one row per axis."""
        scaled = (points - self._centre[:, None]) / self._unit
        num_points, num_axes = self._places.shape
        *slopes, constant = self._weights[num_points:]
        # Added up one by one, never as a product of matrices: that rounds as it likes.
        sums = np.empty_like(scaled, shape=(len(out), scaled.shape[1]))
        sums[...] = constant[:, None]
        for axis in range(num_axes):
            for row, slope in enumerate(slopes[axis]):
                sums[row] += scaled[axis] * slope
        squares, term = np.empty_like(scaled[0]), np.empty_like(scaled[0])
        for place, weights in zip(self._places, self._weights[:num_points], strict=True):
            np.subtract(scaled[0], place[0], out=squares)
            np.multiply(squares, squares, out=squares)
            for axis in range(1, num_axes):
                np.subtract(scaled[axis], place[axis], out=term)
                np.multiply(term, term, out=term)
                squares += term
            values = _kernel(squares)
            for row, weight in enumerate(weights):
                sums[row] += np.multiply(values, weight, out=term)
        out[...] = sums

    def bounds(self, low: Floats, high: Floats) -> tuple[Floats, Floats]:
        """Return two corners of a box that holds where all points of a box lie.

        The box is cut into parts. In each the spline is its tangent in the middle, up to a
        remainder that the second derivatives bound; parts whose remainder may matter are cut
        further, until what it adds is below one part in 100 of the box that is found.
        """
        low, high = (np.asarray(corner, np.float64) for corner in (low, high))
        half = (high - low) / self._unit / 2
        middles = ((low - self._centre) / self._unit + half)[None]
        ends: list[tuple[Floats, Floats]] = []
        for step in range(_CUTS):
            # In three at first, then in two; an axis along which the box is thin is not cut.
            counts = [(3 if step == 0 else 2) if width > 0 else 1 for width in half]
            half = half / counts
            steps = np.array(list(product(*(range(n) for n in counts)))) * 2.0
            shifts = half * (steps + 1 - np.array(counts))
            middles = (middles[:, None] + shifts).reshape(-1, len(half))
            least, greatest, rest = self._ranges(middles, half)
            # What is attained for certain, and what may be.
            inner = [(least + rest).min(axis=0), (greatest - rest).max(axis=0)]
            for first, last in ends:
                inner = [np.minimum(inner[0], first), np.maximum(inner[1], last)]
            allowed = (inner[1] - inner[0]).clip(0) * _LOOSE
            open_ = (least < inner[0] - allowed) | (greatest > inner[1] + allowed)
            again = open_.any(axis=1)
            last_step = step == _CUTS - 1 or again.sum() * len(self._places) > _MOST_PAIRS
            settled = slice(None) if last_step else ~again
            if again.all() and not last_step:
                middles = middles[again]
                continue
            ends.append((least[settled].min(axis=0), greatest[settled].max(axis=0)))
            if last_step or not again.any():
                break
            middles = middles[again]
        return (
            np.min([first for first, _ in ends], axis=0),
            np.max([last for _, last in ends], axis=0),
        )

    def _ranges(self, middles: Floats, half: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the least and greatest values around some points, and what is uncertain of them.

        One row per point, one column per axis of the values; ``half`` is the extent to both sides.
        """
        num_points, _ = self._places.shape
        weights, slopes = self._weights[:num_points], self._weights[num_points:-1]
        away = middles[:, None] - self._places
        squares = (away**2).sum(axis=-1)
        values = _kernel(squares)
        centres = values @ weights + middles @ slopes + self._weights[-1]
        size = np.abs(values) @ np.abs(weights) + np.abs(middles) @ np.abs(slopes)
        # The derivative of r² log r is (2 log r + 1) times the way.
        logs = np.log(np.maximum(squares, np.finfo(float).tiny))
        slope = np.matmul((away * (logs + 1)[..., None]).swapaxes(1, 2), weights) + slopes
        rest = _remainders(away, squares, logs, half, weights)
        rest += _SLACK * (size + np.abs(self._weights[-1]) + 1)
        width = np.einsum("x,pxo->po", half, np.abs(slope)) + rest
        return centres - width, centres + width, rest * 2


def _kernel(squares: Floats) -> Floats:
    """Return r² log r of squared distances."""
    logs = np.log(np.maximum(squares, np.finfo(float).tiny))
    logs *= squares
    logs *= 0.5
    return logs


def _remainders(
    away: Floats, squares: Floats, logs: Floats, half: Floats, weights: Floats
) -> Floats:
    """Return how far a sum of r² log r lies from its tangent, at most, around some points.

    Since the weights of all landmarks add up to 0, and so do their moments, a multiple of r² may be
    taken off each term. What is bounded is r² (log r - c), of whichever c serves best.

    Of landmarks far away the second derivatives at the point are added up, and the third ones are
    at most 2^(3/2) / r. Of those near by the second derivatives, 2 (log r - c) + 1 and + 3, are
    bounded; within reach that has no bound, and log r is integrated along a way through the
    landmark.

    Parameters
    ----------
    away : ndarray
        From landmarks to points, of shape (points, landmarks, axes).
    squares, logs : ndarray
        The squares of the distances, and their logarithms.
    half : ndarray
        How far the surroundings reach along each axis.
    weights : ndarray
        Of shape (landmarks, values).

    Returns
    -------
    ndarray
        Of shape (points, values).
    """
    reach = float(np.sqrt((half**2).sum()))
    if not reach:
        return np.zeros((len(away), weights.shape[1]))
    distances, taken = np.sqrt(squares), np.log(reach) + 0.5
    is_far = distances > 3 * reach
    bounds = np.where(
        is_far,
        np.sqrt(2) / 3 * reach**3 / np.maximum(distances - reach, reach),
        _near(distances, reach, taken),
    )
    rest: Floats = bounds @ np.abs(weights)
    # Second derivatives of r² (log r - c) - r²: 2 (log r - c) - 1, and + 2 along the way.
    across = np.where(is_far, logs - 2 * taken - 1, 0) @ weights
    along = np.where(is_far, 2 / np.maximum(squares, reach**2), 0)
    for axis, width in enumerate(half):
        for other in range(axis + 1):
            second = (along * away[..., axis] * away[..., other]) @ weights
            if other == axis:
                rest += np.abs(second + across) * (width**2 / 2)
            else:
                rest += np.abs(second) * (width * half[other])
    return rest


def _near(distances: Floats, reach: float, taken: float) -> Floats:
    """Return how far r² (log r - taken) - r² lies from its tangent, ``reach`` around points."""
    nearest, farthest = np.maximum(distances - reach, 0), distances + reach
    widest = np.abs(np.log(farthest) - taken)
    with np.errstate(divide="ignore"):
        second = reach**2 * (np.maximum(np.abs(np.log(nearest) - taken), widest) + 0.5)
    # |log r - c| is at most that of the far end, and what log(far end / r) integrates to.
    drop = reach * (1 + np.log(2 * farthest / reach))
    least: Floats = np.minimum(second, reach**2 * (widest + 0.5) + 2 * reach * drop)
    return least
