"""How values of cells are put together, group by group."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["fan", "group_shape"]

_GROUP = 64
"""About how many are put together at once."""


def fan(ndim: int) -> int:
    """Return how many neighbours along each axis a node of a tree puts together."""
    return max(2, int(_GROUP ** (1 / max(ndim, 1)) + 0.5))


def group_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many neighbours along each axis a node puts together, of a grid of ``shape``.

    What a short axis leaves is for the others. Groups are about equally large, so that threads
    have about as much to do.
    """
    sizes = [1] * len(shape)
    left, axes = _GROUP, sorted(range(len(shape)), key=lambda axis: shape[axis])
    for number, axis in enumerate(axes):
        if shape[axis] > 1:
            most = max(2, int(left ** (1 / (len(axes) - number)) + 0.5))
            groups = -(-shape[axis] // most)
            sizes[axis] = -(-shape[axis] // groups)
            left = max(1, left // sizes[axis])
    return tuple(sizes)
