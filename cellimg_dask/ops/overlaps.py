"""Of blobs that overlap the larger one stays, by scikit-image's rule."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["overlaps", "prune_overlapping"]

_MOST_PAIRS_IN_A_SET = 4_000_000
_PAIRS_AT_ONCE = 1 << 20


def overlaps(
    first: NDArray[np.floating], second: NDArray[np.floating], sigma_dim: int
) -> NDArray[np.floating]:
    """Return which part of the smaller of two blobs lies in the other, for pairs of blobs.

    Parameters
    ----------
    first, second : float arrays of shape (pairs, axes + sigma_dim)
        Coordinates and sigmas, of which there is one, or one per axis. The radius of a blob is
        ``sqrt(axes)`` times its sigma.
    sigma_dim : int
        Number of sigmas.

    Returns
    -------
    float array of shape (pairs,)
        Between 0 and 1: in 2D of areas, in 1D and 3D of volumes of spheres. More axes: 0.

    Notes
    -----
    Space is scaled so that the larger blob is a ball of radius 1. Formulas for the lens in which
    two circles, or two spheres, meet: https://mathworld.wolfram.com/Circle-CircleIntersection.html
    and https://mathworld.wolfram.com/Sphere-SphereIntersection.html
    """
    ndim = first.shape[1] - sigma_dim
    result = np.zeros(len(first), first.dtype)
    if ndim > 3:
        return result
    small, large = first[:, -1], second[:, -1]
    larger = np.where((small > large)[:, None], first, second)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.minimum(small, large) / np.maximum(small, large)
        scale = larger[:, -sigma_dim:] * math.sqrt(ndim)
        d = np.sqrt(np.sum((second[:, :ndim] / scale - first[:, :ndim] / scale) ** 2, axis=1))
    result[d <= np.abs(1 - r)] = 1
    meet = (d > np.abs(1 - r)) & (d <= 1 + r)
    r, d = r[meet], d[meet]
    if ndim == 2:
        # Two sectors without the kite between the centres and the points where the circles meet.
        one = np.arccos(np.clip((d**2 + 1 - r**2) / (2 * d), -1, 1))
        other = np.arccos(np.clip((d**2 + r**2 - 1) / (2 * d * r), -1, 1))
        kite = np.sqrt(np.abs((r + 1 - d) * (d - r + 1) * (d + r - 1) * (d + r + 1)))
        result[meet] = (one + r**2 * other - kite / 2) / (math.pi * r**2)
    else:
        lens = (1 + r - d) ** 2 * (d**2 + 2 * d * (1 + r) - 3 * (1 + r**2) + 6 * r)
        result[meet] = math.pi / (12 * d) * lens / (4 / 3 * math.pi * r**3)
    return result


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
        part = part[overlaps(blobs[part[:, 0]], blobs[part[:, 1]], sigma_dim) > overlap]
        for one, other in part.tolist():
            if alive[one] and alive[other]:
                alive[other if blobs[one, -1] > blobs[other, -1] else one] = False
    return np.flatnonzero(alive)
