"""Of blobs that overlap the larger one stays, by scikit-image's rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["overlapping", "prune_overlapping"]

_MOST_PAIRS_IN_A_SET = 4_000_000
_PAIRS_AT_ONCE = 1 << 20
_CLOSE = 1e-5


def overlapping(
    first: NDArray[np.floating], second: NDArray[np.floating], overlap: float, sigma_dim: int
) -> NDArray[np.bool_]:
    """Return of which pairs of blobs a greater part of the smaller one lies in the other.

    Parameters
    ----------
    first, second : float arrays of shape (pairs, axes + sigma_dim)
        Coordinates and sigmas, of which there is one, or one per axis. The radius of a blob is
        ``sqrt(axes)`` times its sigma.
    overlap : float
        Which part: in 2D of the area of a circle, in 1D and 3D of the volume of a sphere. With more
        axes no blobs overlap.
    sigma_dim : int
        Number of sigmas.
    """
    d, r1, r2 = _distances(first, second, sigma_dim)
    part = _parts(d, r1, r2, first.shape[1] - sigma_dim)
    result = part > overlap
    # Where circles touch, or the part is the one asked for, the last digit decides, in which a
    # formula for arrays and one for numbers may differ.
    touch = np.minimum(np.abs(d - r1 - r2), np.abs(d - np.abs(r1 - r2))) < _CLOSE
    for pair in np.flatnonzero((np.abs(part - overlap) < _CLOSE) | touch).tolist():
        one_is_larger = first[pair, -1] > second[pair, -1]
        one, other = (1, r2[pair]) if one_is_larger else (r1[pair], 1)
        result[pair] = _part(d[pair], one, other, first.shape[1] - sigma_dim) > overlap
    return result


def _distances(
    first: NDArray[np.floating], second: NDArray[np.floating], sigma_dim: int
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
    """Return distances and both radii, in a space where the larger blob is a ball of radius 1."""
    ndim = first.shape[1] - sigma_dim
    small, large = first[:, -1:], second[:, -1:]
    bigger = np.where(small > large, first, second)
    scale = bigger[:, -sigma_dim:] * math.sqrt(ndim)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = second[:, :ndim] / scale - first[:, :ndim] / scale
        radii = [side[:, -1] / bigger[:, -1] for side in (first, second)]
    return np.sqrt(np.sum(steps**2, axis=1)), radii[0], radii[1]


def _parts(
    d: NDArray[np.floating], r1: NDArray[np.floating], r2: NDArray[np.floating], ndim: int
) -> NDArray[np.floating]:
    """Return which part of the smaller of two balls lies in the other, for arrays of pairs."""
    result = np.zeros_like(d)
    if ndim > 3:
        return result
    result[d <= np.abs(r1 - r2)] = 1
    meet = (d > np.abs(r1 - r2)) & (d <= r1 + r2)
    d, r = d[meet], np.minimum(r1, r2)[meet]
    if ndim == 2:
        # Two sectors, without the kite between the centres and where the circles meet.
        one = np.arccos(np.clip((d**2 + 1 - r**2) / (2 * d), -1, 1))
        other = np.arccos(np.clip((d**2 + r**2 - 1) / (2 * d * r), -1, 1))
        kite = np.sqrt(np.abs((r + 1 - d) * (d - r + 1) * (d + r - 1) * (d + r + 1)))
        result[meet] = (one + r**2 * other - kite / 2) / (math.pi * r**2)
    else:
        lens = (1 + r - d) ** 2 * (d**2 + 2 * d * (1 + r) - 3 * (1 + r**2) + 6 * r)
        result[meet] = math.pi / (12 * d) * lens / (4 / 3 * math.pi * r**3)
    return result


def _part(d: Any, r1: Any, r2: Any, ndim: int) -> Any:
    """Return the same for one pair, rounded as the formulas of the lens are usually written.

    That is https://mathworld.wolfram.com/Circle-CircleIntersection.html, equation 14, and
    https://mathworld.wolfram.com/Sphere-SphereIntersection.html, equation 16.
    """
    if ndim > 3 or d > r1 + r2:
        return 0.0
    if d <= abs(r1 - r2):
        return 1.0
    if ndim == 2:
        cos1 = np.clip((d**2 + r1**2 - r2**2) / (2 * d * r1), -1, 1)
        cos2 = np.clip((d**2 + r2**2 - r1**2) / (2 * d * r2), -1, 1)
        kite = math.sqrt(abs((-d + r2 + r1) * (d - r2 + r1) * (d + r2 - r1) * (d + r2 + r1)))
        area = r1**2 * math.acos(cos1) + r2**2 * math.acos(cos2) - 0.5 * kite
        return area / (math.pi * (min(r1, r2) ** 2))
    cube = d**2 + 2 * d * (r1 + r2) - 3 * (r1**2 + r2**2) + 6 * r1 * r2
    volume = math.pi / (12 * d) * (r1 + r2 - d) ** 2 * cube
    return volume / (4.0 / 3 * math.pi * min(r1, r2) ** 3)


def prune_overlapping(
    blobs: NDArray[np.floating], overlap: float, sigma_dim: int
) -> NDArray[np.intp]:
    """Return the rows of the blobs that stay, in order.

    Parameters
    ----------
    blobs : float array of shape (blobs, axes + sigma_dim)
        Coordinates and sigmas, in the order in which scikit-image has them: by response, highest
        first.
    overlap : float
        Of two blobs of which a greater part overlaps the one of smaller sigma goes, or the earlier.
    sigma_dim : int
        Number of sigmas.

    Notes
    -----
    Where three blobs overlap in a row, the outcome depends on which pair is looked at first. It is
    the same as scikit-image's, which goes through a Python set of pairs; more than four million
    pairs do not fit into one well, and are gone through in order.
    """
    from scipy.spatial import cKDTree

    if len(blobs) == 0:
        return np.empty(0, np.intp)
    tree = cKDTree(blobs[:, :-sigma_dim])
    distance = 2 * blobs[:, -sigma_dim:].max() * math.sqrt(blobs.shape[1] - sigma_dim)
    pairs = tree.query_pairs(distance, output_type="ndarray")
    if len(pairs) <= _MOST_PAIRS_IN_A_SET:
        pairs = np.array(list(tree.query_pairs(distance)), np.intp).reshape(-1, 2)
    else:
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    alive = blobs[:, -1] > 0
    for begin in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[begin : begin + _PAIRS_AT_ONCE]
        # Only blobs that both still stand can change anything.
        first, second = blobs[part[:, 0]], blobs[part[:, 1]]
        part = part[overlapping(first, second, overlap, sigma_dim)]
        for one, other in part.tolist():
            if alive[one] and alive[other]:
                alive[other if blobs[one, -1] > blobs[other, -1] else one] = False
    return np.flatnonzero(alive)
