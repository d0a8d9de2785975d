"""Histograms and quantiles of whole images, put together from counts of cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import as_int
from cellimg_dask.image.define import grid_of
from cellimg_dask.image.input import Input, as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.reduce import Reduced, combine_values
from cellimg_dask.ops.statistics import numeric_dtype
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["histogram", "quantiles"]

_BITS = 16
"""So many bits of a voxel are counted in one pass over the image."""


def histogram(
    image: Any,
    bins: SupportsIndex | ArrayLike = 10,
    range: tuple[float, float] | None = None,
    *,
    density: bool = False,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> Reduced:
    """Return a histogram of all voxels, as `numpy.histogram` counts them, lazily.

    Parameters
    ----------
    image : array-like or Input
        Whatever `map_cells` reads, of real numbers or bool.
    bins : int or array-like
        Number of bins of equal width, or the edges of bins, increasing.
    range : (float, float), optional
        Lower and upper end of the bins. Default: the smallest and the largest voxel. Of dtypes
        other than integers of up to 16 bits these are found in a pass of its own, and if they may
        have changed everything is counted again.
    density : bool
        Whether to give the density of the distribution in place of counts.
    cell_shape, cache, queue
        As in `map_cells`.

    Returns
    -------
    Reduced
        Of ``(counts, edges)``, exactly those of `numpy.histogram`; both read-only.

    Raises
    ------
    TypeError, ValueError
        If the image has no real numbers, or bins or range are wrong.

    Examples
    --------
    >>> import numpy as np
    >>> counts, edges = histogram(np.array([1, 2, 2, 5]), 4, cell_shape=3).result()
    >>> counts, edges
    (array([1, 2, 0, 1]), array([1., 2., 3., 4., 5.]))
    """
    dtype = numeric_dtype(image, "biuf")
    asked = _Bins.of(bins, range)
    passes = _Passes(image, cell_shape, cache, queue)
    finish = _HistogramOf(asked, bool(density), dtype)
    if dtype.kind in "biu" and dtype.itemsize <= 2:
        # So few values that all are counted: when the extremes change only the bins move.
        return passes.reduced(_CountValues(), finish)
    if asked.needs_extremes:
        return passes.reduced(_CountBins(asked), finish, passes.reduced(_Extremes()))
    return passes.reduced(_CountBins(asked), finish)


def quantiles(
    image: Any,
    q: ArrayLike,
    *,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> Reduced:
    """Return quantiles of all voxels, as `numpy.quantile` interpolates them, lazily.

    They are exact. Voxels are counted by 16 of their bits in one pass over the image: dtypes of
    8 and 16 bits take one pass, those of 32 bits two and of 64 bits four. What a pass of one cell
    hands on is small.

    Parameters
    ----------
    image : array-like or Input
        Whatever `map_cells` reads, of real numbers of up to 64 bits, or bool.
    q : float or array-like of floats
        Which quantiles, from 0 to 1.
    cell_shape, cache, queue
        As in `map_cells`.

    Returns
    -------
    Reduced
        Of a number, or an array of the shape of ``q``, read-only: of the image's dtype if that is
        a float, else float64. Not a number where some voxel is not one, or there is none.

    Raises
    ------
    TypeError, ValueError
        If the image has other voxels, or some ``q`` is not from 0 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.array([[3, 1, 2], [9, 4, 0]])
    >>> quantiles(image, [0, 0.5, 0.9], cell_shape=2).result()
    array([0. , 2.5, 6.5])
    """
    dtype = numeric_dtype(image, "biuf")
    if dtype.itemsize > 8:
        raise TypeError(f"quantiles of dtype {dtype} cannot be had; give image.astype('f8')")
    wanted = np.asarray(q, np.float64)
    if not bool(np.all((wanted >= 0) & (wanted <= 1))):
        raise ValueError(f"q must be from 0 to 1, got {q!r}")
    passes = _Passes(image, cell_shape, cache, queue)
    ranks = tuple(wanted.reshape(-1).tolist())
    bits = 8 * dtype.itemsize
    found = passes.reduced(_CountKeys(max(bits - _BITS, 0)), _First(ranks))
    for shift in (bits - _BITS * number for number in (2, 3, 4)):
        if shift >= 0:
            found = passes.reduced(_CountKeys(shift), _next, found)
    return combine_values(
        found.image, _only, _QuantilesOf(ranks, wanted.shape, dtype), **passes.where
    )


class _Passes:
    """Passes over one image, of which each may need what the one before has found."""

    def __init__(
        self,
        image: Any,
        cell_shape: SupportsIndex | Iterable[SupportsIndex] | None,
        cache: CellCache | str | None,
        queue: BlockQueue | None,
    ) -> None:
        self._item = as_input(image)
        self._grid = grid_of(cell_shape, [self._item])
        self.where: dict[str, Any] = {"cache": cache, "queue": queue}

    def reduced(
        self,
        count: Callable[[Block], Any],
        finish: Callable[[Any], Any] | None = None,
        before: Reduced | None = None,
    ) -> Reduced:
        # Of one voxel, and so given to all cells.
        more = [] if before is None else [Input(before.image, halo=0)]
        cells = cell_values(count, self._grid, self._item, *more, **self.where)
        return combine_values(cells, _merge, finish, **self.where)


@dataclass(frozen=True, eq=False)
class _Counts:
    """How often each of some values occurs; or, without values, each of a number of bins."""

    counts: NDArray[np.int64]
    values: NDArray[Any] | None = None
    """Different ones, increasing."""
    others: int = 0
    """How many voxels are not a number."""
    given: Any = None
    """What the pass before has found."""


def _merge(parts: list[Any]) -> Any:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    first = known[0]
    if not isinstance(first, _Counts):
        return tuple(f([part[n] for part in known]) for n, f in enumerate((np.min, np.max)))
    if first.values is None:
        return _Counts(np.sum([part.counts for part in known], axis=0), given=first.given)
    values, places = np.unique(np.concatenate([p.values for p in known]), return_inverse=True)
    counts = np.zeros(values.size, np.int64)
    np.add.at(counts, places, np.concatenate([part.counts for part in known]))
    return _Counts(counts, values, sum(part.others for part in known), first.given)


def _only(parts: list[Any]) -> Any:
    return parts[0]


# ---------------------------------------------------------------- histograms


@dataclass(frozen=True, eq=False)
class _Bins:
    """Bins as they were asked for."""

    bins: int | NDArray[Any]
    range: tuple[float, float] | None

    @classmethod
    def of(cls, bins: Any, range: Any) -> _Bins:
        if isinstance(bins, str):
            raise TypeError(
                f"bins={bins!r}: a rule that looks at all voxels at once has no lazy form; give a "
                f"number of bins, or their edges"
            )
        if range is not None:
            low, high = range
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"range must be two finite numbers, low and high, got {range!r}")
            range = (low, high)
        if np.ndim(bins) == 0:
            return cls(as_int(bins, "bins", minimum=1), range)
        edges = np.array(bins)
        if edges.ndim != 1 or edges.size < 2 or not bool(np.all(edges[:-1] <= edges[1:])):
            raise ValueError(
                f"bins must be a number, or at least two edges in increasing order, got {bins!r}"
            )
        edges.flags.writeable = False
        return cls(edges, None)

    @property
    def needs_extremes(self) -> bool:
        return self.range is None and isinstance(self.bins, int)


@dataclass(frozen=True)
class _CountBins:
    """Counts the voxels of a cell by bins."""

    asked: _Bins

    def __call__(self, block: Block) -> _Counts:
        array, *more = block.inputs
        ends = self.asked.range
        if more:
            ends = more[0].item()
            if not (np.isfinite(ends[0]) and np.isfinite(ends[1])):
                raise ValueError(
                    f"the voxels are from {ends[0]} to {ends[1]}, which are no ends of bins; give "
                    f"range=(low, high)"
                )
        return _Counts(np.histogram(_numbers(array), self.asked.bins, ends)[0], given=ends)


@dataclass(frozen=True)
class _Extremes:
    def __call__(self, block: Block) -> tuple[Any, Any]:
        array = _numbers(block.inputs[0])
        return array.min(), array.max()


@dataclass(frozen=True)
class _CountValues:
    """Counts the voxels of a cell by their values, all of which there are few."""

    def __call__(self, block: Block) -> _Counts:
        array = _numbers(block.inputs[0])
        low = int(array.min())
        counts = np.bincount(array.reshape(-1).astype(np.int32) - low)
        there = np.flatnonzero(counts)
        return _Counts(counts[there], (there + low).astype(array.dtype))


@dataclass(frozen=True)
class _HistogramOf:
    asked: _Bins
    density: bool
    dtype: np.dtype[Any]

    def __call__(self, found: _Counts | None) -> tuple[NDArray[Any], NDArray[Any]]:
        bins, ends = self.asked.bins, self.asked.range
        if found is None or found.values is not None:
            values: NDArray[Any] = np.array([], self.dtype)
            weights = np.array([], np.int64)
            if found is not None and found.values is not None:
                values, weights = found.values, found.counts
            counts, edges = np.histogram(_numbers(values), bins, ends, weights=weights)
        else:
            counts = found.counts
            edges = np.histogram_bin_edges(np.array([], self.dtype), bins, ends or found.given)
        if self.density:
            counts = counts / np.diff(edges).astype(float) / counts.sum()
        counts.flags.writeable = edges.flags.writeable = False
        return counts, edges


def _numbers(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.uint8) if array.dtype.kind == "b" else array


# ---------------------------------------------------------------- quantiles


@dataclass(frozen=True, eq=False)
class _Found:
    """How far the search for some ranks has come."""

    total: int
    """Number of voxels."""
    others: int
    """How many of them are not a number."""
    keys: NDArray[np.uint64]
    """Different beginnings of the keys of what is searched for, increasing."""
    ranks: tuple[tuple[int, int, int], ...]
    """(rank, number of its beginning, rank among the voxels whose keys begin so)."""


@dataclass(frozen=True)
class _CountKeys:
    """Counts the voxels of a cell by the first bits of their keys."""

    shift: int
    """Bits that are left out at the end."""

    def __call__(self, block: Block) -> _Counts:
        array, *more = block.inputs
        flat = array.reshape(-1)
        others = 0
        if flat.dtype.kind == "f":
            numbers = ~np.isnan(flat)
            others = flat.size - int(np.count_nonzero(numbers))
            flat = flat[numbers] if others else flat
        keys = _keys(flat) >> self.shift
        if not more:
            counts = np.bincount(keys.astype(np.intp))
            there = np.flatnonzero(counts)
            return _Counts(counts[there], there.astype(np.uint64), others)
        found: _Found = more[0].item()
        begins = keys >> _BITS
        # Where the search has ended nothing is counted.
        place = np.searchsorted(found.keys, begins).clip(0, max(found.keys.size - 1, 0))
        wanted = keys[found.keys[place] == begins] if found.keys.size else keys[:0]
        values, counts = np.unique(wanted, return_counts=True)
        return _Counts(counts, values.astype(np.uint64), others, found)


@dataclass(frozen=True)
class _First:
    """Finds with which bits the keys of the wanted voxels begin."""

    q: tuple[float, ...]

    def __call__(self, found: _Counts | None) -> _Found | None:
        if found is None:
            return None
        total = int(found.counts.sum())
        wanted = {0} if total else set()
        for q in self.q if total else ():
            below = min(int(q * (total - 1)), total - 1)
            wanted.update((below, min(below + 1, total - 1)))
        return _searched(
            found, total + found.others, found.others, [(r, r) for r in sorted(wanted)]
        )


def _next(found: _Counts | None) -> _Found | None:
    """Go on with the search for each wanted voxel among those whose keys begin as its own."""
    if found is None:
        return None
    before: _Found = found.given
    assert found.values is not None
    begins = found.values >> _BITS
    first = np.searchsorted(begins, before.keys)
    passed = np.concatenate([[0], np.cumsum(found.counts)])
    # Ranks among all that were counted, in place of those among the voxels of one beginning.
    ranks = [(rank, int(passed[first[place]]) + within) for rank, place, within in before.ranks]
    return _searched(found, before.total, before.others, ranks)


def _searched(found: _Counts, total: int, others: int, ranks: Sequence[tuple[int, int]]) -> _Found:
    assert found.values is not None
    stops = np.cumsum(found.counts)
    places = np.searchsorted(stops, [rank for _, rank in ranks], side="right")
    chosen, numbers = np.unique(places, return_inverse=True)
    begins = stops - found.counts
    return _Found(
        total,
        others,
        found.values[chosen] if chosen.size else found.values[:0],
        tuple(
            (rank, int(number), within - int(begins[place]))
            for (rank, within), number, place in zip(ranks, numbers, places, strict=True)
        ),
    )


@dataclass(frozen=True)
class _QuantilesOf:
    q: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __call__(self, found: _Found | None) -> Any:
        dtype = self.dtype if self.dtype.kind == "f" else np.dtype(np.float64)
        if found is None or found.others or not found.ranks:
            result = np.full(self.shape, np.nan, dtype)
        else:
            values = _values_of(found.keys, self.dtype)
            at = {rank: values[number].item() for rank, number, _ in found.ranks}
            last = found.total - 1
            each = [_between(at, q * last, last) for q in self.q]
            result = np.array(each, np.float64).astype(dtype).reshape(self.shape)
        result.flags.writeable = False
        return result if self.shape else result[()]


def _between(at: dict[int, Any], place: float, last: int) -> float:
    """Interpolate as NumPy does: from the nearer side."""
    below = min(int(place), last)
    low, high = at[below], at[min(below + 1, last)]
    if low == high:
        return float(low)
    part = place - below
    step = high - low
    return float(low + step * part if part < 0.5 else high - step * (1 - part))


def _keys(array: NDArray[Any]) -> NDArray[Any]:
    """Return unsigned integers in the order of the voxels."""
    bits = 8 * array.dtype.itemsize
    unsigned = np.dtype(f"u{array.dtype.itemsize}").type
    keys: NDArray[Any] = np.ascontiguousarray(array).view(unsigned)
    top = unsigned(1 << (bits - 1))
    if array.dtype.kind == "i":
        keys = keys ^ top
    elif array.dtype.kind == "f":
        # Of negative numbers all bits are turned: the larger they are, the smaller the number.
        keys = keys ^ np.where(keys >= top, unsigned((1 << bits) - 1), top)
    return keys


def _values_of(keys: NDArray[np.uint64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the voxels that have these keys."""
    bits = 8 * dtype.itemsize
    unsigned = np.dtype(f"u{dtype.itemsize}").type
    found: NDArray[Any] = keys.astype(unsigned)
    top = unsigned(1 << (bits - 1))
    if dtype.kind == "i":
        found = found ^ top
    elif dtype.kind == "f":
        found = found ^ np.where(found >= top, top, unsigned((1 << bits) - 1))
    return found.view(np.uint8 if dtype.kind == "b" else dtype)
