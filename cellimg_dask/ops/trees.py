"""How values of cells are put together, group by group."""

from __future__ import annotations

__all__ = ["fan"]

_GROUP = 64
"""About how many are put together at once."""


def fan(ndim: int) -> int:
    """Return how many neighbours along each axis a node of a tree puts together."""
    return max(2, int(_GROUP ** (1 / max(ndim, 1)) + 0.5))
