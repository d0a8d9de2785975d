"""Moments of objects, many at a time: moved to other origins, and what follows from them.

A moment is the sum of products of powers of coordinates. Of each object there is one for every
combination of the powers 0 to ``order`` of each axis, in C order: an array of shape
``(objects, order + 1, …, order + 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "axis_lengths",
    "eigenvalues",
    "hu_moments",
    "inertia_tensors",
    "normalized",
    "orientations",
    "scaled",
    "shifted",
]

Floats = NDArray[np.float64]


def shifted(moments: Floats, by: Floats) -> Floats:
    """Return moments as they are when ``by`` is added to all coordinates.

    Parameters
    ----------
    moments : ndarray
        Shape ``(objects, order + 1, …)``, one axis of powers for each axis of the image.
    by : ndarray
        Shape ``(objects, axes)``.
    """
    count, ndim = by.shape
    size = moments.shape[1] if ndim else 1
    powers = by[:, :, None] ** np.arange(size)
    for axis in range(ndim):
        # The binomial theorem along one axis at a time.
        change = np.zeros((count, size, size))
        for power in range(size):
            for below in range(power + 1):
                change[:, power, below] = comb(power, below) * powers[:, axis, power - below]
        lines = moments.reshape(count, size**axis, size, size ** (ndim - axis - 1))
        moments = np.einsum("npq,naqb->napb", change, lines).reshape(moments.shape)
    return moments


def scaled(moments: Floats, spacing: Sequence[float]) -> Floats:
    """Return moments of coordinates that are multiplied by ``spacing``."""
    for axis, step in enumerate(spacing):
        size = moments.shape[axis + 1]
        shape = [1] * moments.ndim
        shape[axis + 1] = size
        moments = moments * (float(step) ** np.arange(size)).reshape(shape)
    return moments


def normalized(central: Floats, spacing: Sequence[float]) -> Floats:
    """Return moments that do not depend on the scale; those of order 0 and 1 are no numbers."""
    ndim = len(spacing)
    order = np.indices(central.shape[1:]).sum(axis=0)
    total = central[(slice(None), *(slice(1),) * ndim)]
    with np.errstate(all="ignore"):
        result: Floats = central / min(spacing) ** order / total ** (order / ndim + 1)
    result[:, order < 2] = np.nan
    return result


def hu_moments(nu: Floats) -> Floats:
    """Return the seven invariants of Hu (1962) of normalized moments in two axes.

    Shape ``(objects, 7)``.
    """
    p, q = nu[:, 3, 0] + nu[:, 1, 2], nu[:, 2, 1] + nu[:, 0, 3]
    r, s = nu[:, 3, 0] - 3 * nu[:, 1, 2], 3 * nu[:, 2, 1] - nu[:, 0, 3]
    plus, minus = nu[:, 2, 0] + nu[:, 0, 2], nu[:, 2, 0] - nu[:, 0, 2]
    mixed = nu[:, 1, 1]
    pp, qq = p * p, q * q
    left, right = p * (pp - 3 * qq), q * (3 * pp - qq)
    return np.stack(
        [
            plus,
            minus**2 + 4 * mixed**2,
            r**2 + s**2,
            pp + qq,
            r * left + s * right,
            minus * (pp - qq) + 4 * mixed * p * q,
            s * left - r * right,
        ],
        axis=1,
    )


def inertia_tensors(count: NDArray[Any], second: Floats) -> Floats:
    """Return the inertia tensors of objects, divided by their numbers of voxels.

    Parameters
    ----------
    count : ndarray
        Numbers of voxels.
    second : ndarray
        Shape ``(objects, axes, axes)``: the central moments of order 2, of each pair of axes.
    """
    ndim = second.shape[1]
    own = np.einsum("naa->na", second)
    result: Floats = -second / count[:, None, None]
    # About an axis turns what is away from it along the others.
    total = own.sum(axis=1, keepdims=True)
    result[:, range(ndim), range(ndim)] = (total - own) / count[:, None]
    return result


def eigenvalues(tensors: Floats) -> Floats:
    """Return the eigenvalues of inertia tensors, largest first, shape ``(objects, axes)``."""
    if not len(tensors):
        return np.zeros(tensors.shape[:2])
    values: Floats = np.array(np.linalg.eigvalsh(tensors)[:, ::-1], np.float64)
    # Rounded, some are a little below 0.
    values[values < 0] = 0
    return values


def axis_lengths(values: Floats) -> tuple[Floats, Floats]:
    """Return the longest and the shortest axis of the ellipses with these eigenvalues."""
    if values.shape[1] == 2:
        lengths: Floats = 4 * np.sqrt(values)
    else:
        first, second, third = values.T
        squares = np.stack([first + second - third, second + third - first], axis=1)
        lengths = np.asarray(np.sqrt(10 * np.maximum(squares, 0.0)))
    return lengths[:, 0], lengths[:, 1]


def orientations(tensors: Floats) -> Floats:
    """Return the angles between the first axis and the longest axis of objects, in two axes."""
    a, b, c = tensors[:, 0, 0], tensors[:, 0, 1], tensors[:, 1, 1]
    angles = 0.5 * np.arctan2(-2 * b, c - a)
    # As long along both diagonals, or all around.
    return np.where(a == c, np.where(b < 0, np.pi / 4, -np.pi / 4), angles)
