"""What is known of the objects of a label image, and how it is put together from cells.

All that is kept can be merged: numbers of voxels, boxes, sums of coordinates and of intensities.
Sums of coordinates of order 1 and 2 are exact integers, counted from the object's box. Moments of
higher order, and those weighted by intensity, are summed twice, where both are wanted: counted
from the box and about the centroid. Neither could be had from the other without that something
cancels, for objects of some shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellimg_dask.ops.moments import shifted

__all__ = ["Intensities", "Objects", "Wants", "measure", "merge", "select"]

_SAFE = 2.0**62
"""Integers up to this are summed as such, larger ones as Python's."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What is collected of each object, beside its number of voxels, box and centroid."""

    second: bool = False
    """Sums of the products of two coordinates."""
    raw: bool = False
    """Moments of order 0 to 3 along each axis, counted from the box."""
    central: bool = False
    """The same, about the centroid."""
    sums: bool = False
    """Sums of intensities."""
    extremes: bool = False
    """Smallest and largest intensities."""
    spread: bool = False
    """Sums of squared distances of intensities from their mean."""
    weighted_raw: bool = False
    """Moments of order 0 to 3 that are weighted by intensity, counted from the box."""
    weighted_central: int | None = None
    """Highest order of such moments about the centroid of the voxels; None: not collected."""

    @property
    def intensities(self) -> bool:
        """Whether intensities are needed."""
        moments = self.weighted_raw or self.weighted_central is not None
        return self.sums or self.extremes or self.spread or moments


@dataclass(frozen=True, slots=True, eq=False)
class Intensities:
    """What is known of the intensities of objects, in each of some channels."""

    sum: NDArray[Any] | None = None
    """``(objects, channels)``; exact of integers."""
    min: NDArray[Any] | None = None
    max: NDArray[Any] | None = None
    near: NDArray[np.float64] | None = None
    """The mean, rounded."""
    rest: NDArray[np.float64] | None = None
    """What the mean has above that."""
    spread: NDArray[np.float64] | None = None
    """Sum of squared distances from the mean."""
    raw: NDArray[np.float64] | None = None
    """Weighted moments, ``(objects, channels, 4, …)``, counted from the start of the box."""
    central: NDArray[np.float64] | None = None
    """``(objects, channels, order + 1, …)``, about the centroid of the voxels."""


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """What is known of some objects, in the order of their labels."""

    label: NDArray[Any]
    count: NDArray[np.int64]
    """Number of voxels."""
    start: NDArray[np.int64]
    """``(objects, axes)``: first voxel of the box."""
    stop: NDArray[np.int64]
    """One past the last voxel of the box."""
    first: NDArray[Any]
    """``(objects, axes)``: sums of coordinates, counted from the start of the box."""
    second: NDArray[Any] | None = None
    """``(objects, pairs of axes)``: sums of products of two such coordinates."""
    raw: NDArray[np.float64] | None = None
    """Moments, ``(objects, 4, …)``, counted from the start of the box."""
    central: NDArray[np.float64] | None = None
    """The same about the centroid."""
    intensities: Intensities | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def ndim(self) -> int:
        """Number of axes of the label image."""
        return int(self.start.shape[1])

    @property
    def centre(self) -> NDArray[np.float64]:
        """Centroids, counted from the starts of the boxes."""
        return (self.first / self.count[:, None]).astype(np.float64)


def pairs(ndim: int) -> list[tuple[int, int]]:
    """Return the pairs of axes for which there are sums of products."""
    return list(combinations_with_replacement(range(ndim), 2))


# ---------------------------------------------------------------- one cell


def measure(
    labels: NDArray[Any], image: NDArray[Any] | None, origin: ArrayLike, wants: Wants
) -> Objects:
    """Return the objects in a block.

    Parameters
    ----------
    labels : ndarray of integers
        At least one axis; what is not above 0 is no object.
    image : ndarray, optional
        Intensities, perhaps with an axis of channels behind those of ``labels``.
    origin : ints
        Where the block begins.
    wants : Wants
        What to collect.
    """
    labels = np.ascontiguousarray(labels)
    runs = _Runs.of(labels)
    count = runs.sums(runs.length)
    lines = runs.lines
    low = [runs.reduce(np.minimum, line) for line in [*lines, runs.begin]]
    high = [runs.reduce(np.maximum, line) + 1 for line in lines]
    high.append(runs.reduce(np.maximum, runs.begin + runs.length))
    start = np.stack(low, axis=1)
    # Counted from the box of the object.
    near = [line - low[axis][runs.object] for axis, line in enumerate(lines)]
    begin = runs.begin - low[-1][runs.object]
    length = runs.length
    along = length * begin + length * (length - 1) // 2
    first = np.stack([*(runs.sums(length * line) for line in near), runs.sums(along)], axis=1)
    second = None
    if wants.second:
        squares = (
            length * begin * begin
            + begin * length * (length - 1)
            + (length - 1) * length * (2 * length - 1) // 6
        )
        last = len(near)
        sums = []
        for a, b in pairs(labels.ndim):
            if a == last:
                sums.append(runs.sums(squares))
            elif b == last:
                sums.append(runs.sums(near[a] * along))
            else:
                sums.append(runs.sums(length * near[a] * near[b]))
        second = np.stack(sums, axis=1)
    centre = first / count[:, None]
    zero = np.zeros(centre.shape)
    raw = runs.moments(near, begin, zero) if wants.raw else None
    central = runs.moments(near, begin, centre) if wants.central else None
    offset = np.asarray(origin, np.int64)
    stop = np.stack(high, axis=1)
    intensities = None
    if image is not None and wants.intensities:
        weigh = _Weigh(runs, near, begin, zero, centre, wants)
        intensities = _measure_intensities(labels, image, runs, count, weigh, wants)
    return Objects(
        runs.label, count, start + offset, stop + offset, first, second, raw, central, intensities
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """The voxels of objects as runs along the last axis, by object."""

    label: NDArray[Any]
    """Of each object, increasing."""
    bounds: NDArray[np.intp]
    """First run of each object."""
    object: NDArray[np.intp]
    """Number of the object of each run."""
    lines: list[NDArray[np.int64]]
    """Where each run is along all axes but the last."""
    begin: NDArray[np.int64]
    """First voxel of each run along the last axis."""
    length: NDArray[np.int64]
    place: NDArray[np.int64]
    """First voxel of each run in the flat block."""

    @classmethod
    def of(cls, labels: NDArray[Any]) -> _Runs:
        flat, width = labels.reshape(-1), labels.shape[-1]
        if flat.size == 0:
            none = np.zeros(0, np.int64)
            return cls(
                flat.astype(_label_dtype(flat.dtype)),
                none,
                none,
                [none] * (labels.ndim - 1),
                none,
                none,
                none,
            )
        new = np.empty(flat.size, bool)
        np.not_equal(flat[1:], flat[:-1], out=new[1:])
        new[::width] = True
        place = np.flatnonzero(new)
        length = np.diff(place, append=flat.size)
        value = flat[place]
        there = value > 0
        place, length, value = place[there], length[there], value[there]
        found, number = np.unique(value, return_inverse=True)
        order = np.argsort(number, kind="stable")
        place, length, number = place[order], length[order], number[order]
        line, begin = np.divmod(place, width)
        return cls(
            found.astype(_label_dtype(flat.dtype)),
            np.searchsorted(number, np.arange(len(found))),
            number,
            _unravelled(line, labels.shape[:-1]),
            begin,
            length,
            place,
        )

    def reduce(self, ufunc: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """Reduce what there is for each run to what there is for each object."""
        if not len(self.bounds):
            return values[:0]
        result: NDArray[Any] = ufunc.reduceat(values, self.bounds, axis=0)
        return result

    def sums(self, values: NDArray[Any]) -> NDArray[Any]:
        return self.reduce(np.add, values)

    def moments(
        self,
        near: Sequence[NDArray[np.int64]],
        begin: NDArray[np.int64],
        about: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Sum products of powers of coordinates less ``about``, which there is for each object."""
        length = self.length
        middle = begin + (length - 1) / 2 - about[self.object, -1]
        # The powers of the coordinates along a run, summed, from the middle of the run.
        wide = length * (length * length - 1) / 12
        along = [
            length.astype(np.float64),
            length * middle,
            length * middle**2 + wide,
            length * middle**3 + 3 * wide * middle,
        ]
        return self.product_sums(near, about, along)

    def product_sums(
        self,
        near: Sequence[NDArray[np.int64]],
        about: NDArray[np.float64],
        along: Sequence[NDArray[np.float64]],
    ) -> NDArray[np.float64]:
        """Sum products of powers: of places across runs, and what there is along each run."""
        size = len(along)
        away = [line - about[self.object, axis] for axis, line in enumerate(near)]
        powers = [[line**power for power in range(size)] for line in away]
        sums = []
        for across in product(range(size), repeat=len(near)):
            factor: Any = 1.0
            for axis, power in enumerate(across):
                if power:
                    factor = factor * powers[axis][power]
            sums += [self.sums(factor * part) for part in along]
        return np.stack(sums, axis=1).reshape((-1, *(size,) * (len(near) + 1)))


def _unravelled(index: NDArray[np.int64], shape: tuple[int, ...]) -> list[NDArray[np.int64]]:
    # NumPy's has no answer where there are no axes.
    return [np.asarray(c, np.int64) for c in np.unravel_index(index, shape)] if shape else []


def _label_dtype(dtype: np.dtype[Any]) -> type[np.generic]:
    return np.uint64 if dtype == np.uint64 else np.int64


@dataclass(frozen=True, slots=True, eq=False)
class _Weigh:
    """Sums moments that are weighted by intensity."""

    runs: _Runs
    near: Sequence[NDArray[np.int64]]
    begin: NDArray[np.int64]
    zero: NDArray[np.float64]
    centre: NDArray[np.float64]
    wants: Wants

    def moments(self, values: NDArray[Any], begins: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the moments that are wanted of one channel."""
        found = {}
        if self.wants.weighted_raw:
            found["raw"] = self._about(self.zero, values, begins, 3)
        if self.wants.weighted_central is not None:
            order = self.wants.weighted_central
            found["central"] = self._about(self.centre, values, begins, order)
        return found

    def _about(
        self,
        about: NDArray[np.float64],
        values: NDArray[Any],
        begins: NDArray[np.int64],
        order: int,
    ) -> NDArray[np.float64]:
        runs = self.runs
        if not len(runs.length):
            return np.zeros((0, *(order + 1,) * (len(self.near) + 1)))
        first = self.begin - begins - about[runs.object, -1]
        away = np.arange(values.size) + np.repeat(first, runs.length)
        weight = values.astype(np.float64)
        along = []
        with np.errstate(all="ignore"):
            for _ in range(order + 1):
                along.append(np.add.reduceat(weight, begins))
                weight = weight * away
            return runs.product_sums(self.near, about, along)


def _measure_intensities(
    labels: NDArray[Any],
    image: NDArray[Any],
    runs: _Runs,
    count: NDArray[np.int64],
    weigh: _Weigh,
    wants: Wants,
) -> Intensities:
    # The voxels of objects only, run after run.
    ends = np.cumsum(runs.length)
    begins = ends - runs.length
    steps = np.arange(ends[-1] if len(ends) else 0) - np.repeat(begins - runs.place, runs.length)
    num_channels = image.shape[-1] if image.ndim > labels.ndim else 1
    voxels = image.reshape(labels.size, num_channels)[steps]
    if voxels.dtype.kind == "b":
        voxels = voxels.view(np.uint8)
    by_run = _ByRun(runs, begins)
    channels = []
    for channel in range(num_channels):
        values = np.ascontiguousarray(voxels[:, channel])
        found = weigh.moments(values, begins)
        if wants.extremes:
            found["min"] = by_run.reduce(np.minimum, values)
            found["max"] = by_run.reduce(np.maximum, values)
        total = by_run.exact_sums(values) if wants.sums or wants.spread else count
        if wants.sums:
            found["sum"] = total
        if wants.spread:
            with np.errstate(all="ignore"):
                mean = (total / count).astype(np.float64)
                away = values - np.repeat(mean[runs.object], runs.length)
                rest = by_run.reduce(np.add, away) / count
                spread = by_run.reduce(np.add, away * away) - count * rest**2
            found |= {"near": mean, "rest": rest, "spread": spread}
        channels.append(found)
    if not channels:
        return Intensities()
    return Intensities(
        **{name: np.stack([found[name] for found in channels], axis=1) for name in channels[0]}
    )


@dataclass(frozen=True, slots=True, eq=False)
class _ByRun:
    """Reduces what there is for each voxel of the runs."""

    runs: _Runs
    begins: NDArray[np.int64]

    def reduce(self, ufunc: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """Return what there is for each object."""
        if not len(self.begins):
            return values[:0]
        return self.runs.reduce(ufunc, ufunc.reduceat(values, self.begins))

    def exact_sums(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum floats as float64, and integers without overflow."""
        if values.dtype.kind == "f":
            with np.errstate(all="ignore"):
                return self.reduce(np.add, values.astype(np.float64))
        if values.dtype.itemsize < 8:
            kind = np.uint64 if values.dtype.kind == "u" else np.int64
            return self.reduce(np.add, values.astype(kind))
        # Halves of 32 bits each, put together as Python's integers.
        upper = self.reduce(np.add, values >> 32).astype(object)
        lower = self.reduce(np.add, values & 0xFFFFFFFF).astype(object)
        return np.asarray(upper * (1 << 32) + lower)


# ---------------------------------------------------------------- several cells


def select(objects: Objects, which: NDArray[Any]) -> Objects:
    """Return some of the objects, in their order."""
    return _each(objects, lambda column: column[which])


def merge(parts: Sequence[Objects]) -> Objects:
    """Return the objects of several blocks; what has one label is one object."""
    if len(parts) == 1:
        return parts[0]
    rows = _joined(parts)
    label, number = np.unique(rows.label, return_inverse=True)
    if len(label) == len(rows):
        return select(rows, np.argsort(rows.label, kind="stable"))
    order = np.argsort(number, kind="stable")
    rows, number = select(rows, order), number[order]
    groups = _Groups(number, np.searchsorted(number, np.arange(len(label))))
    start, stop = groups.reduce(np.minimum, rows.start), groups.reduce(np.maximum, rows.stop)
    count = groups.sums(rows.count)
    # How far the boxes are from that of all.
    by = rows.start - start[number]
    per_row = rows.count[:, None]
    largest = float(count.max()) * float((stop - start).max()) ** 2
    if largest > _SAFE:
        by, per_row = by.astype(object), per_row.astype(object)
    first = groups.sums(rows.first + per_row * by)
    second = None
    if rows.second is not None:
        products = [
            rows.second[:, column]
            + by[:, a] * rows.first[:, b]
            + by[:, b] * rows.first[:, a]
            + per_row[:, 0] * by[:, a] * by[:, b]
            for column, (a, b) in enumerate(pairs(rows.ndim))
        ]
        second = groups.sums(np.stack(products, axis=1))
    merged = Objects(label, count, start, stop, first, second)
    # From the centroid of a part to that of the whole.
    move = by.astype(np.float64) + rows.centre - merged.centre[number]
    far = by.astype(np.float64)
    raw = central = intensities = None
    if rows.raw is not None:
        raw = groups.sums(groups.moved(rows.raw, far))
    if rows.central is not None:
        central = groups.sums(groups.moved(rows.central, move))
    if rows.intensities is not None:
        intensities = _merged_intensities(rows, rows.intensities, groups, far, move)
    return Objects(label, count, start, stop, first, second, raw, central, intensities)


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Rows that belong together, one group after the other."""

    number: NDArray[np.intp]
    """Group of each row."""
    bounds: NDArray[np.intp]
    """First row of each group."""

    def reduce(self, ufunc: np.ufunc, rows: NDArray[Any]) -> NDArray[Any]:
        result: NDArray[Any] = ufunc.reduceat(rows, self.bounds, axis=0)
        return result

    def sums(self, rows: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return self.reduce(np.add, rows)

    def moved(self, moments: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return moments of coordinates to which ``by`` is added."""
        sizes = np.diff(self.bounds, append=len(self.number))
        # Who is alone stays where it is.
        several = sizes[self.number] > 1
        result = moments.copy()
        result[several] = shifted(moments[several], by[several])
        return result


def _merged_intensities(
    rows: Objects,
    known: Intensities,
    groups: _Groups,
    far: NDArray[np.float64],
    move: NDArray[np.float64],
) -> Intensities:
    found: dict[str, NDArray[Any]] = {}
    if known.sum is not None:
        total = known.sum
        if total.dtype.kind in "iu" and len(total):
            largest = float(np.abs(total.astype(np.float64)).max()) * len(total)
            total = total.astype(object) if largest > _SAFE else total
        found["sum"] = groups.sums(total)
    if known.min is not None and known.max is not None:
        found["min"] = groups.reduce(np.minimum, known.min)
        found["max"] = groups.reduce(np.maximum, known.max)
    if known.near is not None and known.rest is not None and known.spread is not None:
        count = rows.count[:, None]
        with np.errstate(all="ignore"):
            near = known.near[groups.bounds]
            above = (known.near - near[groups.number]) + known.rest
            total_count = groups.sums(rows.count)[:, None]
            rest = groups.sums(count * above) / total_count
            apart = above - rest[groups.number]
            spread = groups.sums(known.spread + count * apart**2)
        found |= {"near": near, "rest": rest, "spread": spread}
    for name, moments, by in (("raw", known.raw, far), ("central", known.central, move)):
        if moments is not None:
            channels = [
                groups.sums(groups.moved(moments[:, channel], by))
                for channel in range(moments.shape[1])
            ]
            if channels:
                found[name] = np.stack(channels, axis=1)
    return Intensities(**found)


def _each(objects: Objects, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Objects:
    """Return objects with every column changed."""
    columns = {name: None if c is None else change(c) for name, c in _columns(objects)}
    known = objects.intensities
    inner = None
    if known is not None:
        inner = Intensities(**{n: None if c is None else change(c) for n, c in _columns(known)})
    return Objects(**columns, intensities=inner)  # type: ignore[arg-type]


def _joined(parts: Sequence[Objects]) -> Objects:
    """Return the objects of all parts one after the other."""

    def join(several: Sequence[Any]) -> dict[str, Any]:
        names = [name for name, column in _columns(several[0]) if column is not None]
        return {name: np.concatenate([getattr(part, name) for part in several]) for name in names}

    known = [part.intensities for part in parts]
    return Objects(
        **join(parts), intensities=None if known[0] is None else Intensities(**join(known))
    )


def _columns(part: Objects | Intensities) -> Iterator[tuple[str, NDArray[Any] | None]]:
    for name in type(part).__slots__:
        if name != "intensities":
            yield name, getattr(part, name)
