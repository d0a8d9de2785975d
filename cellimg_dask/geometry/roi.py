"""Half-open boxes, and the index expressions that name them."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

from cellimg_dask.geometry.integers import as_int, as_ints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cellimg_dask.geometry.halo import Halo

__all__ = ["Roi", "parse_index"]


@dataclass(frozen=True, slots=True)
class Roi:
    """A half-open box ``[start, stop)`` in voxels, axes in NumPy order.

    A box may be empty along any axis and may lie outside any image.

    Raises
    ------
    ValueError
        If ``start`` and ``stop`` differ in length, or a stop lies before its start.
    TypeError
        If a coordinate is not an integer.

    Examples
    --------
    >>> roi = Roi((0, 2), (4, 8))
    >>> roi.shape, roi.size
    ((4, 6), 24)
    >>> roi.intersect(Roi((3, 0), (9, 3)))
    Roi(start=(3, 2), stop=(4, 3))
    """

    start: tuple[int, ...]
    """First voxel along each axis."""
    stop: tuple[int, ...]
    """One past the last voxel along each axis."""

    def __post_init__(self) -> None:
        start = as_ints(self.start, "Roi start")
        stop = as_ints(self.stop, "Roi stop")
        if len(start) != len(stop):
            raise ValueError(
                f"Roi start and stop must have the same length, "
                f"got {len(start)} and {len(stop)}: {start}, {stop}"
            )
        for axis, (low, high) in enumerate(zip(start, stop, strict=True)):
            if high < low:
                raise ValueError(
                    f"Roi stop[{axis}] = {high} lies before start[{axis}] = {low}; "
                    f"it must be at least {low}"
                )
        # Mostly they are what they should be: boxes are made by the thousand.
        if start is not self.start:
            object.__setattr__(self, "start", start)
        if stop is not self.stop:
            object.__setattr__(self, "stop", stop)

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Roi:
        """Return the box of a whole image of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis, in voxels."""
        return tuple(high - low for low, high in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of voxels."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index for an array that starts at the origin.

        Raises
        ------
        ValueError
            If the box begins before the origin, where a slice would count from the end.
        """
        if any(low < 0 for low in self.start):
            raise ValueError(
                f"{self} begins before the origin and has no slices; clip it to a shape first"
            )
        return tuple(slice(low, high) for low, high in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Roi) -> Roi:
        """Return the common box, empty along every axis on which the two do not meet."""
        self._check_ndim(other.ndim, "other")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(max, start, map(min, self.stop, other.stop)))
        return Roi(start, stop)

    def contains(self, other: Roi) -> bool:
        """Whether every voxel of ``other`` lies in this box."""
        self._check_ndim(other.ndim, "other")
        return other.size == 0 or self.intersect(other) == other

    def grow(self, halo: Halo) -> Roi:
        """Return the box widened by ``halo``; it may leave the image."""
        self._check_ndim(halo.ndim, "halo")
        return Roi(
            tuple(low - extra for low, extra in zip(self.start, halo.before, strict=True)),
            tuple(high + extra for high, extra in zip(self.stop, halo.after, strict=True)),
        )

    def clip(self, shape: Sequence[int]) -> Roi:
        """Return the part of the box that lies in an image of ``shape``."""
        self._check_ndim(len(shape), "shape")
        start = tuple(
            min(max(low, 0), extent) for low, extent in zip(self.start, shape, strict=True)
        )
        stop = tuple(
            max(low, min(high, extent))
            for low, high, extent in zip(start, self.stop, shape, strict=True)
        )
        return Roi(start, stop)

    def shift(self, offset: Sequence[int]) -> Roi:
        """Return the box moved by ``offset`` voxels along each axis."""
        self._check_ndim(len(offset), "offset")
        return Roi(
            tuple(low + step for low, step in zip(self.start, offset, strict=True)),
            tuple(high + step for high, step in zip(self.stop, offset, strict=True)),
        )

    def _check_ndim(self, ndim: int, what: str) -> None:
        if ndim != self.ndim:
            raise ValueError(f"{what} has {ndim} axes, this Roi has {self.ndim}")


def parse_index(key: Any, shape: tuple[int, ...]) -> tuple[Roi, tuple[int, ...]]:
    """Read an index expression as a box and the axes that it drops.

    Accepts a `Roi`, integers, slices of step 1, and one ellipsis, as NumPy does; negative
    numbers count from the end. Unlike NumPy, a bound outside the image is an error: on a
    lazy image it is a mistake more often than a wish.

    Returns
    -------
    roi : Roi
        The box within ``shape``.
    dropped : tuple of int
        Axes that were indexed by an integer.

    Raises
    ------
    IndexError
        If a bound lies outside the image or there are too many indices.
    ValueError
        If a slice has a step.
    TypeError
        For anything else (masks, lists, ``None``).
    """
    ndim = len(shape)
    if isinstance(key, Roi):
        if key.ndim != ndim:
            raise IndexError(f"{key} has {key.ndim} axes, the image has {ndim}")
        for axis, (low, high) in enumerate(zip(key.start, key.stop, strict=True)):
            if low < 0 or high > shape[axis]:
                raise IndexError(
                    f"region {low}:{high} on axis {axis} leaves the image; allowed is "
                    f"0:{shape[axis]}; Roi.clip(image.shape) cuts it"
                )
        return key, ()
    items = key if isinstance(key, tuple) else (key,)
    # By identity: an array in the index would compare element by element.
    ellipses = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can hold only one ellipsis ('...')")
    given = len(items) - len(ellipses)
    if given > ndim:
        raise IndexError(f"too many indices: the image has {ndim} axes, {given} were given")
    if given < ndim or ellipses:
        at = ellipses[0] if ellipses else len(items)
        items = (*items[:at], *(slice(None),) * (ndim - given), *items[at + 1 :])

    start: list[int] = []
    stop: list[int] = []
    dropped: list[int] = []
    for axis, (item, extent) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            if item.start is None and item.stop is None and item.step is None:
                low, high = 0, extent
            else:
                low, high = _slice_bounds(item, axis, extent)
        else:
            low = _position(item, axis, extent)
            high = low + 1
            dropped.append(axis)
        start.append(low)
        stop.append(high)
    return Roi(tuple(start), tuple(stop)), tuple(dropped)


def _slice_bounds(item: slice, axis: int, extent: int) -> tuple[int, int]:
    if item.step is not None and as_int(item.step, f"the step on axis {axis}") != 1:
        raise ValueError(
            f"step {item.step} on axis {axis}: a lazy image is read in steps of 1; "
            f"use image.to_dask() for stepped and reversed slices"
        )

    def bound(value: SupportsIndex | None, default: int) -> int:
        if value is None:
            return default
        number = as_int(value, f"the slice bound on axis {axis}")
        if not -extent <= number <= extent:
            raise IndexError(
                f"slice bound {number} on axis {axis} leaves the image; allowed is "
                f"{-extent}..{extent}; Roi.clip(image.shape) cuts a region"
            )
        return number + extent if number < 0 else number

    low = bound(item.start, 0)
    return low, max(low, bound(item.stop, extent))


def _position(item: Any, axis: int, extent: int) -> int:
    if item is None or isinstance(item, (bool, list)) or getattr(item, "ndim", 0) != 0:
        what = f"of type {type(item).__name__}" if hasattr(item, "ndim") else reprlib.repr(item)
        raise TypeError(
            f"index {what} on axis {axis}: a lazy image takes integers, slices, '...' or a "
            f"Roi; use image.to_dask() for masks, lists and new axes"
        )
    number = as_int(item, f"the index on axis {axis}")
    if not -extent <= number < extent:
        raise IndexError(
            f"index {number} on axis {axis} leaves the image; allowed is {-extent}..{extent - 1}"
        )
    return number + extent if number < 0 else number
