"""Making an array smaller by whole factors: one voxel for each window. Knows NumPy only.

What a voxel becomes depends on its window alone, to the last bit, wherever a block begins and
however large it is: sums are added in an order that the window gives. The last window of an axis
has the voxels that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["downsample_mean", "downsample_mode", "downsample_nearest"]

Window: TypeAlias = tuple[int, ...]
"""Extent of a window along each axis, in voxels."""

# Voxels at a time, so that what lies between an array and its result stays in the processor's
# cache.
_PIECE_VOXELS = 1 << 18


def downsample_mean(a: NDArray[Any], factors: Window) -> NDArray[Any]:
    """Return the mean of each window, in the dtype of ``a``.

    Parameters
    ----------
    a : ndarray
        Booleans, integers, floats or complex numbers, of any number of axes.
    factors : tuple of int
        Extent of a window along each axis, at least 1.

    Returns
    -------
    ndarray
        ``ceil(n / factor)`` voxels along an axis of ``n``. Integers: the exact mean, rounded to
        the nearest one, halves to the even one. Booleans: whether more than half are True.
        Floats: sums in the dtype itself, those of half precision in single.

    Examples
    --------
    >>> downsample_mean(np.array([1, 2, 3, 4, 9], "u1"), (2,))
    array([2, 4, 9], dtype=uint8)
    """
    if a.dtype.kind == "b":
        return downsample_mean(a.view(np.uint8), factors).view(np.bool_)
    return _by_windows(_mean, a, factors)


def downsample_mode(a: NDArray[Any], factors: Window) -> NDArray[Any]:
    """Return the most frequent value of each window.

    Parameters
    ----------
    a : ndarray
        Labels: booleans, integers or floats, of any number of axes.
    factors : tuple of int
        Extent of a window along each axis, at least 1.

    Returns
    -------
    ndarray
        ``ceil(n / factor)`` voxels along an axis of ``n``, in the dtype of ``a``. Of values that
        are equally frequent the smallest, but 0, the background, only if there is no other. NaN
        is a value as any other, and the largest.

    Examples
    --------
    >>> downsample_mode(np.array([[1, 1, 0, 7], [1, 2, 0, 7]]), (2, 2))
    array([[1, 7]])
    """
    if a.dtype.kind == "b":
        return downsample_mode(a.view(np.uint8), factors).view(np.bool_)
    return _by_windows(_mode, a, factors)


def downsample_nearest(a: NDArray[Any], factors: Window) -> NDArray[Any]:
    """Return a view of the first voxel of each window.

    Examples
    --------
    >>> downsample_nearest(np.arange(7), (3,))
    array([0, 3, 6])
    """
    return a[tuple(slice(None, None, factor) for factor in factors)]


def _by_windows(
    reduce: Callable[[NDArray[Any], Window], NDArray[Any]], a: NDArray[Any], factors: Window
) -> NDArray[Any]:
    """Apply ``reduce`` to pieces of whole windows of one extent."""
    shape = [-(-n // factor) for n, factor in zip(a.shape, factors, strict=True)]
    result = np.empty(shape, a.dtype)
    for source, target, window in _pieces(a.shape, factors):
        result[target] = reduce(a[source], window)
    return result


def _pieces(
    shape: tuple[int, ...], factors: Window
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], Window]]:
    """Yield boxes of an array, those of the result, and the extent of their windows."""
    axes: list[list[tuple[slice, slice, int]]] = []
    room = max(_PIECE_VOXELS // prod(factors), 1)
    for n, factor in zip(reversed(shape), reversed(factors), strict=True):
        whole, rest = divmod(n, factor)
        step = max(min(whole, room), 1)
        room = max(room // step, 1)
        parts = []
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            parts.append((slice(start * factor, stop * factor), slice(start, stop), factor))
        if rest:
            parts.append((slice(whole * factor, n), slice(whole, whole + 1), rest))
        axes.append(parts)
    for piece in product(*reversed(axes)):
        sources, targets, window = zip(*piece, strict=True) if piece else ((), (), ())
        yield sources, targets, window


def _fold(
    combine: np.ufunc, a: NDArray[Any], window: Window, dtype: DTypeLike | None = None
) -> NDArray[Any]:
    """Combine the voxels of each window, halves with halves, an axis after the other."""
    how = {} if dtype is None else {"dtype": dtype}
    for axis, extent in enumerate(window):
        if extent == 1:
            continue
        before: tuple[Any, ...] = (slice(None),) * (axis + 1)
        parts = a.reshape(*a.shape[:axis], a.shape[axis] // extent, extent, *a.shape[axis + 1 :])
        while extent > 1:
            half = extent // 2
            joined = combine(
                parts[(*before, slice(half))], parts[(*before, slice(half, 2 * half))], **how
            )
            if extent % 2:
                first = joined[(*before, 0)]
                combine(first, parts[(*before, -1)], out=first, **how)
            parts, extent = joined, half
        a = parts[(*before, 0)]
    return a


# ---------------------------------------------------------------- mean


def _mean(a: NDArray[Any], window: Window) -> NDArray[Any]:
    count = prod(window)
    if count == 1:
        return a
    if a.dtype.kind in "iu":
        return _integer_mean(a, window, count).astype(a.dtype)
    total = _fold(np.add, a, window, np.float32 if a.dtype == np.float16 else None)
    total /= count
    return total


def _integer_mean(a: NDArray[Any], window: Window, count: int) -> NDArray[Any]:
    wide = _sum_dtype(a.dtype, count)
    if wide is not None:
        return _rounded(_fold(np.add, a, window, wide), count)
    # Quotients and remainders are summed apart. What the former may exceed the dtype by, the
    # latter bring back: such integers are taken modulo 2 to the 64.
    a = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64, copy=False)
    quotients = _divided(a, count)
    total = _fold(np.add, quotients, window)
    quotients *= count
    rest = _fold(np.add, a - quotients, window)
    carried = _divided(rest, count)
    total += carried
    carried *= count
    rest -= carried
    half = rest.dtype.type(count // 2)
    if count % 2:
        total += rest > half
    else:
        # Half a unit rounds up where the number below is odd.
        total += (rest + (total & 1)) > half
    return total


def _sum_dtype(dtype: np.dtype[Any], count: int) -> np.dtype[Any] | None:
    """Return the smallest dtype for sums of ``count`` integers and for rounding them, or None."""
    largest = (np.iinfo(dtype).max + 1) * count - 1
    for size in (2, 4, 8):
        wide = np.dtype(f"{dtype.kind}{size}")
        if largest <= np.iinfo(wide).max:
            return wide
    return None


def _rounded(total: NDArray[Any], count: int) -> NDArray[Any]:
    """Divide by ``count`` and round to the nearest integer, halves to even, in place."""
    half = count // 2
    if count % 2:
        total += total.dtype.type(half)
    else:
        odd = _divided(total, count)
        odd &= 1
        total += total.dtype.type(half - 1)
        total += odd
    return _divided(total, count, total)


def _divided(a: NDArray[Any], count: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return ``a // count``."""
    if count & (count - 1) == 0:
        shifted: NDArray[Any] = np.right_shift(a, a.dtype.type(count.bit_length() - 1), out=out)
        return shifted
    quotient: NDArray[Any] = np.floor_divide(a, a.dtype.type(count), out=out)
    return quotient


# ---------------------------------------------------------------- mode


def _mode(a: NDArray[Any], window: Window) -> NDArray[Any]:
    if prod(window) == 1:
        return a
    # Most windows lie inside an object, most others hold two labels; only the rest is sorted.
    result = _fold(np.minimum, a, window)
    mixed = np.flatnonzero(result != _fold(np.maximum, a, window))
    if not mixed.size:
        return result
    chosen = np.empty(mixed.size, a.dtype)
    step = max(_PIECE_VOXELS // prod(window), 1)
    flat = np.ascontiguousarray(a).reshape(-1)
    for start in range(0, mixed.size, step):
        part = slice(start, start + step)
        values = flat.take(_places(mixed[part], result.shape, a.shape, window))
        chosen[part] = _most_frequent(values)
    result = np.ascontiguousarray(result)
    result.reshape(-1)[mixed] = chosen
    return result


def _places(
    numbers: NDArray[np.intp], grid: tuple[int, ...], shape: tuple[int, ...], window: Window
) -> NDArray[np.intp]:
    """Return the flat indices of the voxels (first axis) of some windows (second axis)."""
    first = np.zeros(numbers.size, np.intp)
    within = np.zeros(1, np.intp)
    for position, n, extent in zip(np.unravel_index(numbers, grid), shape, window, strict=True):
        first = first * n + position * extent
        within = np.add.outer(within * n, np.arange(extent)).reshape(-1)
    places: NDArray[np.intp] = within[:, None] + first
    return places


def _most_frequent(values: NDArray[Any]) -> NDArray[Any]:
    """Return the mode of each column."""
    count = len(values)
    few = np.min_scalar_type(count)
    low, high = values.min(axis=0), values.max(axis=0)
    num_low = np.add.reduce(values == low, axis=0, dtype=few)
    num_high = np.add.reduce(values == high, axis=0, dtype=few)
    takes_high = (num_high > num_low) | ((num_high == num_low) & (low == 0))
    result: NDArray[Any] = np.where(takes_high, high, low)
    # Of so small numbers the sum might be too large.
    several = np.flatnonzero(num_low != count - num_high)
    if several.size:
        result[several] = _most_frequent_sorted(np.sort(values[:, several].T, axis=1))
    return result


def _most_frequent_sorted(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the mode of each row, whose values ascend."""
    num_rows, count = rows.shape
    begins = np.ones(rows.shape, np.bool_)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=begins[:, 1:])
    if rows.dtype.kind == "f":
        begins[:, 1:] &= ~np.isnan(rows[:, :-1])
    starts = np.flatnonzero(begins)
    values = rows.reshape(-1)[starts]
    row_of = starts // count
    # Of equally long runs one that is not of the background.
    score = 2 * np.diff(starts, append=num_rows * count) + (values != 0)
    best = np.maximum.reduceat(score, np.flatnonzero(starts % count == 0))
    candidates = np.flatnonzero(score == best[row_of])
    _, first = np.unique(row_of[candidates], return_index=True)
    chosen: NDArray[Any] = values[candidates[first]]
    return chosen
