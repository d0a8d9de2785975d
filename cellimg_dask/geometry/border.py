"""What lies beyond the border of an image, axis by axis.

A block's region may leave the image. `axis_window` says, for one axis, which samples to read
and where each goes. The six modes mean what `numpy.pad` means by them, at any width.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BOUNDARIES", "AxisWindow", "axis_window", "check_boundary"]

BOUNDARIES = ("none", "constant", "reflect", "symmetric", "edge", "wrap")
"""Names of the boundary modes; ``none`` clips, the others are those of `numpy.pad`."""

_FOREIGN_NAMES = {
    "periodic": "wrap",
    "nearest": "edge",
    "mirror": "reflect",
    "grid-mirror": "symmetric",
    "grid-wrap": "wrap",
    "grid-constant": "constant",
    "zero": "constant",
    "zeros": "constant",
}


def check_boundary(name: Any) -> str:
    """Return ``name`` if it is a boundary mode.

    Raises
    ------
    ValueError
        If it is not; where dask or SciPy use that name, the message gives NumPy's.
    """
    if isinstance(name, str) and name in BOUNDARIES:
        return name
    hint = ""
    if isinstance(name, str) and name in _FOREIGN_NAMES:
        hint = (
            f"; names are NumPy's: {name!r} of dask or SciPy is {_FOREIGN_NAMES[name]!r} here "
            f"(and dask's 'reflect' is 'symmetric')"
        )
    elif name is None:
        hint = "; dask's None is 'none' here"
    elif isinstance(name, Number):
        hint = f"; for a constant border say boundary='constant', fill_value={name!r}"
    raise ValueError(f"unknown boundary {name!r}; use one of {', '.join(BOUNDARIES)}{hint}")


@dataclass(frozen=True, slots=True)
class AxisWindow:
    """How one axis of a block is read from one axis of an image.

    Read ``spans``, put them side by side, pick ``take`` from them, then add ``before`` and
    ``after`` constant samples.
    """

    spans: tuple[tuple[int, int], ...]
    """Increasing, disjoint half-open intervals of the image axis."""
    take: NDArray[np.intp] | None
    """For each sample of the block its place in the joined spans; None: as they are."""
    before: int
    """Number of constant samples in front."""
    after: int
    """Number of constant samples behind."""
    length: int
    """Number of samples that the block has along this axis."""
    plain: slice | None
    """The one slice that is the whole window, where it is so simple; else None."""


def axis_window(start: int, stop: int, size: int, boundary: str) -> AxisWindow:
    """Plan reading samples ``start`` to ``stop`` of an axis that has ``size`` samples.

    Parameters
    ----------
    start, stop : int
        Half-open interval; it may leave the axis on both sides by any width.
    size : int
        Number of samples of the axis.
    boundary : str
        One of `BOUNDARIES`.

    Raises
    ------
    ValueError
        If the axis is empty and the mode has nothing to repeat.
    """
    low, high = min(max(start, 0), size), min(max(stop, 0), size)
    if boundary == "none" or (low == start and high == stop):
        return AxisWindow(((low, high),), None, 0, 0, high - low, slice(low, high))
    if boundary == "constant":
        before = min(max(-start, 0), stop - start)
        after = stop - start - before - (high - low)
        return AxisWindow(((low, high),), None, before, after, stop - start, None)
    if size == 0:
        raise ValueError(f"an empty axis cannot be extended by boundary {boundary!r}")
    source = _mirror(np.arange(start, stop, dtype=np.intp), size, boundary)
    if source.size == 0:
        return AxisWindow(((0, 0),), None, 0, 0, 0, slice(0, 0))
    needed = np.unique(source)
    breaks = np.flatnonzero(np.diff(needed) > 1) + 1
    spans = tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(needed, breaks))
    take = np.searchsorted(needed, source)
    take.flags.writeable = False
    return AxisWindow(spans, take, 0, 0, source.size, None)


def _mirror(index: NDArray[np.intp], size: int, boundary: str) -> NDArray[np.intp]:
    """Map coordinates of any value into ``0 .. size - 1``, as `numpy.pad` repeats an array."""
    if boundary == "edge" or size == 1:
        return np.clip(index, 0, size - 1)
    if boundary == "wrap":
        return index % size
    if boundary == "symmetric":
        folded = index % (2 * size)
        return np.minimum(folded, 2 * size - 1 - folded)
    assert boundary == "reflect", boundary
    folded = index % (2 * size - 2)
    return np.minimum(folded, 2 * size - 2 - folded)
