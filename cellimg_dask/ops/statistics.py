"""Statistics of whole images: extremes and moments, put together from those of cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.image.input import as_input
from cellimg_dask.ops.reduce import Reduced, reduce_cells
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["Statistics", "numeric_dtype", "statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments and extremes of all voxels of an image."""

    count: int
    """Number of voxels; with ``nan_policy="omit"`` of those that are numbers."""
    min: Any
    """Smallest voxel, of the image's dtype; None where there is none."""
    max: Any
    """Largest voxel, of the image's dtype; None where there is none."""
    sum: Any
    """Sum of all voxels; exact for integers, whatever the size."""
    mean: Any
    """Arithmetic mean; not a number where there is no voxel."""
    var: float
    """Variance, the mean of squared distances from the mean, as ``numpy.var``."""

    @property
    def std(self) -> float:
        """Standard deviation, the root of the variance, as ``numpy.std``."""
        return math.sqrt(self.var)


def statistics(
    image: Any,
    *,
    nan_policy: Literal["propagate", "omit"] = "propagate",
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> Reduced:
    """Return count, extremes, sum, mean and variance of all voxels, lazily and in one pass.

    Parameters
    ----------
    image : array-like or Input
        Whatever `map_cells` reads, of a numeric dtype or bool.
    nan_policy : {"propagate", "omit"}
        Whether voxels that are not a number make results so, as in ``numpy.mean``, or are left
        out, as in ``numpy.nanmean``.
    cell_shape, cache, queue
        As in `map_cells`.

    Returns
    -------
    Reduced
        Of `Statistics`. For integers of up to 32 bits, mean and variance are the exact ones,
        rounded once; else they are put together from those of cells by the update of Chan, Golub
        and LeVeque (1979), so that nothing cancels.

    Raises
    ------
    TypeError
        If the image is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> found = statistics(np.array([1, 2, 3, 6], "u1"), cell_shape=3).result()
    >>> found.count, int(found.min), int(found.max), found.sum, found.mean, found.var
    (4, 1, 6, 12, 3.0, 3.5)
    """
    if nan_policy not in ("propagate", "omit"):
        raise ValueError(f'nan_policy must be "propagate" or "omit", got {nan_policy!r}')
    dtype = numeric_dtype(image, "biufc")
    moments: Callable[..., Any] = _moments
    if dtype.kind in "biu":
        moments = _integer_moments if dtype.itemsize <= 4 else _large_integer_moments
    return reduce_cells(
        moments,
        _merge_moments,
        image,
        params={"omit": nan_policy == "omit"},
        cell_shape=cell_shape,
        finish=_statistics_of,
        cache=cache,
        queue=queue,
    )


@dataclass(frozen=True, slots=True)
class _Moments:
    count: int
    min: Any
    max: Any
    sum: Any
    squares: int | None = None
    """Exact sum of the squares, of integers."""
    spread: float = 0.0
    """Sum of squared distances from the mean, where the squares are not known."""
    near: Any = 0.0
    """The mean, rounded; so that means can be told apart that differ by less than that."""
    rest: Any = 0.0
    """What the mean has above that."""


def _moments(array: NDArray[Any], *, omit: bool) -> _Moments | None:
    if omit:
        array = array[~np.isnan(array)]
    if array.size == 0:
        return None
    wide = np.result_type(array.dtype, np.float64)
    with np.errstate(all="ignore"):
        total = np.sum(array, dtype=wide).item()
    return _Moments(array.size, array.min(), array.max(), total, None, *_spread(array, total))


def _spread(array: NDArray[Any], total: Any) -> tuple[float, Any, Any]:
    """Return the sum of squared distances from the mean, the mean rounded, and the rest of it."""
    near = np.asarray(total / array.size)
    with np.errstate(all="ignore"):
        away = array - near
        rest = away.mean()
        spread = np.sum(np.square(away.real) + np.square(away.imag)) - array.size * abs(rest) ** 2
    return float(spread), near[()], rest


def _integer_moments(array: NDArray[Any], *, omit: bool) -> _Moments | None:
    if array.size == 0:
        return None
    low, high = array.min(), array.max()
    # Distances from the smallest are below 2**32; they and their halves can be squared.
    away = np.subtract(array, low, dtype=np.int64, casting="unsafe").astype(np.uint64)
    upper, lower = away >> 16, away & 0xFFFF
    first = int(away.sum())
    second = (
        (int(np.sum(upper * upper)) << 32)
        + (int(np.sum(upper * lower)) << 17)
        + int(np.sum(lower * lower))
    )
    base, count = int(low), array.size
    return _Moments(
        count,
        low,
        high,
        first + base * count,
        second + 2 * base * first + base * base * count,
    )


def _large_integer_moments(array: NDArray[Any], *, omit: bool) -> _Moments | None:
    if array.size == 0:
        return None
    total = (int(np.sum(array >> 32)) << 32) + int(np.sum(array & 0xFFFFFFFF))
    return _Moments(array.size, array.min(), array.max(), total, None, *_spread(array, total))


def _merge_moments(parts: list[_Moments | None]) -> _Moments | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    merged = known[0]
    with np.errstate(all="ignore"):
        for part in known[1:]:
            merged = _merge_two(merged, part)
    return merged


def _merge_two(one: _Moments, two: _Moments) -> _Moments:
    count, total = one.count + two.count, one.sum + two.sum
    low, high = np.minimum(one.min, two.min), np.maximum(one.max, two.max)
    if one.squares is not None and two.squares is not None:
        return _Moments(count, low, high, total, one.squares + two.squares)
    apart = (two.near - one.near) + (two.rest - one.rest)
    spread = one.spread + two.spread + float(abs(apart) ** 2) * (one.count * two.count / count)
    rest = one.rest + apart * (two.count / count)
    return _Moments(count, low, high, total, None, spread, one.near, rest)


def _statistics_of(moments: _Moments | None) -> Statistics:
    if moments is None:
        return Statistics(0, None, None, 0, math.nan, math.nan)
    count = moments.count
    if moments.squares is None:
        var = moments.spread / count
    else:
        var = (moments.squares * count - moments.sum**2) / count**2
    return Statistics(count, moments.min, moments.max, moments.sum, moments.sum / count, var)


def numeric_dtype(image: Any, kinds: str) -> np.dtype[Any]:
    """Return the native dtype of an input, which is of one of these kinds.

    Raises
    ------
    TypeError
        If it is of another.
    """
    array = as_input(image).array
    dtype: np.dtype[Any] = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    if dtype.kind not in kinds:
        wanted = "numbers" if "c" in kinds else "real numbers"
        raise TypeError(f"the image must be of {wanted} or bool, got dtype {dtype}")
    return dtype.newbyteorder("=")
