"""Which cells a change reaches, through halos, borders and changes of scale.

A cell is affected if what it reads holds a changed voxel, and no other cell is. Reading separates
over the axes: along each, a voxel matters only by the positions that read it, so changes are first
reduced to groups of voxels that the same positions read. Nothing here depends on the number of
cells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.plan import Planner, Region
from cellimg_dask.geometry import AxisWindow, CellGrid, Roi, TileGrid, axis_window
from cellimg_dask.state.cells import (
    CellList,
    CellMask,
    CellProduct,
    Cells,
    CellTest,
    CellUnion,
    Runs,
    distinct,
    listed,
    no_cells,
    positions_of,
    runs_of,
    settled,
    union,
)
from cellimg_dask.state.nested import cells_found_from_above

__all__ = [
    "Points",
    "Touched",
    "VoxelMask",
    "affected_cells",
    "cells_meeting",
    "region_of",
    "region_read",
]

_Ints: TypeAlias = NDArray[np.int64]
_Bools: TypeAlias = NDArray[np.bool_]
_IntOrInts = TypeVar("_IntOrInts", int, NDArray[np.int64])

_DENSE = 1 << 22
"""Scattered voxels are put into a mask of their groups if it has not more elements."""
_LISTED = 1 << 24
"""So many cells are listed where voxels are scattered; more are asked one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class VoxelMask:
    """The voxels that a boolean array names, which lies somewhere in the image.

    What of it lies outside the image is no voxel.
    """

    origin: tuple[int, ...]
    """Where the mask's first element lies."""
    mask: _Bools
    """True where the voxel is meant."""


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Single voxels, however far apart.

    What of them lies outside the image is no voxel.
    """

    coords: NDArray[np.int64]
    """One row per voxel, one column per axis; rows may come twice."""


Touched: TypeAlias = Region | VoxelMask | Points | Cells
"""Changed voxels of an array, or cells of an image all of whose voxels changed."""


def region_of(roi: Roi) -> Region:
    """Return a box as a region."""
    return tuple(((low, high),) for low, high in zip(roi.start, roi.stop, strict=True))


def cells_meeting(grid: CellGrid | TileGrid, change: Region | VoxelMask | Points) -> Cells:
    """Return the cells of ``grid`` that hold a changed voxel.

    A mask or points need a `CellGrid`.
    """
    if not isinstance(change, tuple):
        assert isinstance(grid, CellGrid)
        own = [
            _Reading(axis, size, count, extent, extent, 0, 0, "none")
            for axis, (size, count, extent) in enumerate(
                zip(grid.cell_shape, grid.grid_shape, grid.shape, strict=True)
            )
        ]
        found = _readers_of(grid, own, _voxels(change, grid.shape))
        assert found is not None
        return found
    positions: list[Sequence[int]] = []
    for axis, (intervals, extent) in enumerate(zip(change, grid.shape, strict=True)):
        found_on_axis = [
            grid.axis_positions(axis, max(low, 0), min(high, extent)) for low, high in intervals
        ]
        positions.append(
            found_on_axis[0] if len(found_on_axis) == 1 else sorted(set().union(*found_on_axis))
        )
    return CellProduct(grid, positions)


def affected_cells(planner: Planner, number: int, change: Touched) -> Cells:
    """Return the cells that read a changed voxel of input ``number``, and no others.

    An index map is asked only when the result is asked for a cell, or iterated; where it fails,
    the cell counts as affected. One whose attribute ``is_nested`` is true promises that the box of
    a region holds all voxels that matter to its parts: it is asked at once, from large regions to
    small ones. Where all that is known of the change is a `CellTest`, the result is one too.
    """
    grid = planner.grid
    parts = change.parts if isinstance(change, CellUnion) else (change,)
    voxels = [
        _voxels(part, planner.inputs[number].shape)
        for part in parts
        if not isinstance(part, CellTest)
    ]
    # A union has one test at most.
    test = next((part for part in parts if isinstance(part, CellTest)), None)
    if planner.inputs[number].index_map is not None:
        some = [part for part in voxels if not part.empty]
        return _asked(planner, number, some, test) if some or test else no_cells(grid)
    readings = _readings(planner, number)
    found: list[Cells] = []
    for part in voxels:
        readers = _readers_of(grid, readings, part)
        found.append(_asked(planner, number, [part], None) if readers is None else readers)
    if test is not None:
        found.append(_asked(planner, number, [], test))
    return found[0] if len(found) == 1 else union(grid, found)


def region_read(planner: Planner, number: int, cells: Cells) -> Region | None:
    """Return a region that holds all that cells read of an input; None: perhaps everything."""
    item = planner.inputs[number]
    parts = cells.parts if isinstance(cells, CellUnion) else (cells,)
    if item.links is None or any(isinstance(part, CellTest) for part in parts):
        return None
    region: list[tuple[tuple[int, int], ...]] = []
    for axis, reading in enumerate(_readings(planner, number)):
        found: dict[tuple[int, int], None] = {}
        for part in parts if len(cells) else ():
            if reading.out is None:
                found[0, item.shape[axis]] = None
            else:
                for low, high in _positions_on(part, reading.out):
                    found.update(dict.fromkeys(reading.spans(low, high)))
        region.append(tuple(found))
    return tuple(region)


# ------------------------------------------------------------------- voxels in three forms


class _Box:
    """A product of runs."""

    def __init__(self, runs: Sequence[Runs]) -> None:
        self.runs = runs
        self.empty = not all(runs)
        self._bounds: list[tuple[list[int], list[int]]] | None = None

    def meets(self, windows: Sequence[AxisWindow]) -> bool:
        if self._bounds is None:
            self._bounds = [([a for a, _ in runs], [b for _, b in runs]) for runs in self.runs]
        for window, (lows, highs) in zip(windows, self._bounds, strict=True):
            for low, high in window.spans:
                place = bisect_right(highs, low)
                if low < high and place < len(lows) and lows[place] < high:
                    break
            else:
                return False
        return True


class _Groups:
    """A mask over groups of pieces; ``labels`` says per piece the group or -1."""

    def __init__(self, edges: Sequence[_Ints], labels: Sequence[_Ints], mask: _Bools):
        self.edges = edges
        self.labels = labels
        self.mask = mask
        self.empty = not mask.any()

    def meets(self, windows: Sequence[AxisWindow]) -> bool:
        found = []
        for window, edges, labels in zip(windows, self.edges, self.labels, strict=True):
            pieces = [
                labels[
                    max(int(edges.searchsorted(low, "right")) - 1, 0) : int(
                        edges.searchsorted(high)
                    )
                ]
                for low, high in window.spans
                if low < high
            ]
            groups = np.concatenate(pieces) if pieces else labels[:0]
            found.append(distinct(groups[groups >= 0]))
        return bool(self.mask[np.ix_(*found)].any())


class _Scatter:
    """Boxes of one size, ``start`` to ``start + size``, but cut at the image's border."""

    def __init__(self, places: _Ints, size: Sequence[int], shape: Sequence[int]) -> None:
        self.places = places
        """Per axis and box the start in multiples of the size."""
        self.size = size
        self.shape = shape
        self.empty = not places.shape[1]
        self._sorted: tuple[int, _Ints] | None = None

    def meets(self, windows: Sequence[AxisWindow]) -> bool:
        if self.empty or not windows:
            return not self.empty
        if self._sorted is None:
            spread = np.ptp(self.places, axis=1) * np.asarray(self.size)
            axis = int(spread.argmax())
            self._sorted = axis, self.places[:, self.places[axis].argsort()]
        axis, places = self._sorted
        for low, high in windows[axis].spans:
            first, last = places[axis].searchsorted(
                (low // self.size[axis], -(-high // self.size[axis]))
            )
            left = places[:, first:last] if low < high else places[:, :0]
            for other, window in enumerate(windows):
                if other != axis:
                    hit = np.zeros(left.shape[1], np.bool_)
                    for a, b in window.spans:
                        if a < b:
                            hit |= (left[other] >= a // self.size[other]) & (
                                left[other] < -(-b // self.size[other])
                            )
                    left = left[:, hit]
            if left.shape[1]:
                return True
        return False


_Voxels: TypeAlias = _Box | _Groups | _Scatter


def _voxels(
    change: Region | VoxelMask | Points | CellProduct | CellMask | CellList, shape: Sequence[int]
) -> _Voxels:
    """Return a change of an array of ``shape`` in one of the three forms."""
    if isinstance(change, tuple):
        return _Box(
            [_joined(intervals, extent) for intervals, extent in zip(change, shape, strict=True)]
        )
    if isinstance(change, VoxelMask):
        low = [min(max(-at, 0), n) for at, n in zip(change.origin, change.mask.shape, strict=True)]
        high = [
            max(a, min(n, extent - at))
            for a, at, n, extent in zip(low, change.origin, change.mask.shape, shape, strict=True)
        ]
        edges = [
            np.arange(a + at, b + at + 1) for a, b, at in zip(low, high, change.origin, strict=True)
        ]
        labels = [np.arange(b - a) for a, b in zip(low, high, strict=True)]
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        # The ellipsis makes it a view also where there are no axes.
        inner: _Bools = change.mask[(*box, ...)]  # type: ignore[arg-type]
        return _Groups(edges, labels, inner)
    if isinstance(change, Points):
        places = np.asarray(change.coords, np.int64).T
        inside = np.ones(places.shape[1], np.bool_)
        for steps, extent in zip(places, shape, strict=True):
            inside &= (steps >= 0) & (steps < extent)
        return _Scatter(places[:, inside], (1,) * len(shape), shape)
    grid = change.grid
    assert isinstance(grid, CellGrid)
    if isinstance(change, CellProduct):
        return _Box(
            [
                [(low * size, min(high * size, extent)) for low, high in runs_of(steps)]
                for steps, size, extent in zip(
                    change.positions, grid.cell_shape, shape, strict=True
                )
            ]
        )
    if isinstance(change, CellMask):
        edges = [
            np.minimum(cuts * size, extent)
            for cuts, size, extent in zip(change.edges, grid.cell_shape, shape, strict=True)
        ]
        return _Groups(edges, change.labels, change.mask)
    if not grid.ndim:
        return _Scatter(np.empty((0, len(change)), np.int64), (), ())
    positions = np.unravel_index(change.indices, grid.grid_shape)
    return _Scatter(np.stack(positions).astype(np.int64), grid.cell_shape, shape)


def _joined(intervals: Sequence[tuple[int, int]], extent: int) -> Runs:
    """Return intervals, cut to the axis, as runs."""
    inside = [(max(low, 0), min(high, extent)) for low, high in intervals]
    runs: Runs = []
    for low, high in sorted(inside) if len(inside) > 1 else inside:
        if low >= high:
            continue
        if runs and low <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(high, runs[-1][1]))
        else:
            runs.append((low, high))
    return runs


# ------------------------------------------------------------------- who reads, axis by axis


@dataclass(frozen=True, slots=True)
class _Reading:
    """How positions along an output axis read an axis of an input."""

    out: int | None
    """The output axis; None: every cell reads the whole extent."""
    step: int
    """Voxels of the input from one position to the next."""
    count: int
    """Number of positions."""
    extent: int
    """Extent of the input."""
    end: int
    """Where the last position ends, without halo."""
    before: int
    after: int
    boundary: str

    def copies(self) -> list[tuple[int, int]]:
        """Return how the border repeats the axis: x is seen at ``sign * x + offset`` too."""
        before, after, n = self.before, self.after, self.extent
        # What is beyond the edge is the voxel at the edge, which whoever looks beyond reads anyway.
        single = n == 1 or self.boundary in ("none", "constant", "edge")
        if single or not (before or after):
            return [(1, 0)]
        mirrors: list[int]
        if self.boundary == "wrap":
            period, mirrors = n, []
        elif self.boundary == "symmetric":
            period, mirrors = 2 * n, [-1]
        else:
            assert self.boundary == "reflect", self.boundary
            period, mirrors = 2 * n - 2, [0]
        found = []
        for turn in range(-before // period - 1, -(-after // period) + 2):
            offset = turn * period
            if -before - n < offset < n + after:
                found.append((1, offset))
            for shift in mirrors:
                if -before <= offset + shift and offset + shift - n + 1 < n + after:
                    found.append((-1, offset + shift))
        return found

    def readers(self, runs: Runs) -> Runs:
        """Return the positions that read a voxel of the runs, which lie in the axis."""
        copies = self.copies()
        if len(runs) * len(copies) > 8:
            bounds = np.array(runs, np.int64)
            _, lows, highs = self.reader_ranges(bounds[:, 0], bounds[:, 1])
            return _joined(list(zip(lows.tolist(), highs.tolist(), strict=True)), self.count)
        found = []
        beyond = self.end + self.after
        for start, stop in runs:
            for sign, offset in copies:
                a, b = _copied(start, stop, sign, offset)
                if a < beyond:
                    low = min((a - self.after) // self.step, self.count - 1)
                    found.append((low, -(-(b + self.before) // self.step)))
        return _joined(found, self.count)

    def reader_ranges(self, start: _Ints, stop: _Ints) -> tuple[_Ints, _Ints, _Ints]:
        """Return which interval it is, and the positions ``low .. high`` that read a part of it.

        An interval comes as often as border and image show it to other positions, always in the
        same order; ranges may be empty or overlap.
        """
        lows, highs = [], []
        beyond = self.end + self.after
        copies = self.copies()
        for sign, offset in copies:
            a, b = _copied(start, stop, sign, offset)
            low = np.minimum((a - self.after) // self.step, self.count - 1)
            low = np.maximum(low, 0)
            high = np.minimum(-(-(b + self.before) // self.step), self.count)
            lows.append(low)
            highs.append(np.where(a < beyond, np.maximum(high, low), low))
        which = np.tile(np.arange(len(start)), len(copies))
        return which, np.concatenate(lows), np.concatenate(highs)

    def spans(self, low: int, high: int) -> list[tuple[int, int]]:
        """Return what the positions ``low .. high`` together read."""
        start = low * self.step - self.before
        stop = min(high * self.step, self.end) + self.after
        spans = [(max(start, 0), min(stop, self.extent))]
        if self.boundary not in ("none", "constant") and spans[0] != (0, self.extent):
            if start < 0:
                spans += axis_window(start, min(stop, 0), self.extent, self.boundary).spans
            if stop > self.extent:
                begin = max(start, self.extent)
                spans += axis_window(begin, stop, self.extent, self.boundary).spans
        return [(a, b) for a, b in spans if a < b]


def _copied(
    start: _IntOrInts, stop: _IntOrInts, sign: int, offset: int
) -> tuple[_IntOrInts, _IntOrInts]:
    if sign > 0:
        return start + offset, stop + offset
    return offset + 1 - stop, offset + 1 - start


def _readings(planner: Planner, number: int) -> list[_Reading]:
    """Return how the axes of an input that has links are read."""
    item, grid = planner.inputs[number], planner.grid
    assert item.links is not None
    readings = []
    for link, extent, before, after in zip(
        item.links, item.shape, item.halo.before, item.halo.after, strict=True
    ):
        if link.axis is None:
            readings.append(_Reading(None, 1, 1, extent, extent, before, after, item.boundary))
            continue
        readings.append(
            _Reading(
                link.axis,
                grid.cell_shape[link.axis] * link.factor,
                grid.grid_shape[link.axis],
                extent,
                min(grid.shape[link.axis] * link.factor, extent),
                before,
                after,
                item.boundary,
            )
        )
    return readings


# ----------------------------------------------------------------- from voxels to the cells


def _readers_of(grid: CellGrid, readings: Sequence[_Reading], voxels: _Voxels) -> Cells | None:
    """Return the cells that read some of the voxels; None: too many, and scattered."""
    if voxels.empty:
        return no_cells(grid)
    if isinstance(voxels, _Box):
        positions: list[Sequence[int]] = [range(count) for count in grid.grid_shape]
        for reading, runs in zip(readings, voxels.runs, strict=True):
            if reading.out is not None:
                positions[reading.out] = positions_of(reading.readers(runs))
        return CellProduct(grid, positions)
    if isinstance(voxels, _Groups):
        return _readers_of_groups(grid, readings, voxels)
    return _readers_of_scatter(grid, readings, voxels)


@dataclass(slots=True)
class _Seen:
    """Groups of voxels along an axis, and the ranges of positions that read them."""

    count: int
    """Number of groups."""
    group: _Ints
    low: _Ints
    high: _Ints


def _readers_of_groups(grid: CellGrid, readings: Sequence[_Reading], voxels: _Groups) -> Cells:
    mask, seen = voxels.mask, []
    for axis, reading in enumerate(readings):
        labels, cuts = voxels.labels[axis], voxels.edges[axis]
        if reading.out is None:
            mask = np.logical_or.reduce(mask, axis=axis, keepdims=True)
            zero = np.zeros(1, np.int64)
            seen.append(_Seen(1, zero, zero, zero))
            continue
        which, low, high = reading.reader_ranges(cuts[:-1], cuts[1:])
        if len(labels) > 1 and np.array_equal(labels, np.arange(mask.shape[axis])):
            # Each piece is a group: those that are read alike become one.
            firsts = _runs_of_like(low, high, len(labels))
            if len(firsts) < len(labels):
                mask = _any_of_runs(mask, axis, firsts)
                kept = np.zeros(len(labels), np.bool_)
                kept[firsts] = True
                taken = kept[which]
                low, high = low[taken], high[taken]
                labels = np.arange(len(firsts))
                which = np.tile(labels, len(low) // len(firsts))
        group = labels[which]
        own = (group >= 0) & (low < high)
        seen.append(_Seen(mask.shape[axis], group[own], low[own], high[own]))
    return _readers_of_seen(grid, readings, seen, mask)


def _runs_of_like(low: _Ints, high: _Ints, count: int) -> _Ints:
    """Return where intervals begin whose ranges are others than those of the one before."""
    lows, highs = low.reshape(-1, count), high.reshape(-1, count)
    new = ((lows[:, 1:] != lows[:, :-1]) | (highs[:, 1:] != highs[:, :-1])).any(axis=0)
    return np.append(0, np.flatnonzero(new) + 1)


def _any_of_runs(mask: _Bools, axis: int, firsts: _Ints) -> _Bools:
    """Return per run along an axis whether any is True; runs follow each other."""
    found: _Bools
    if axis + 1 < mask.ndim and mask.size > 1 << 14:
        # `reduceat` walks along the axis, however far its elements are apart.
        parts = np.split(mask, firsts[1:], axis=axis)
        found = np.stack([np.logical_or.reduce(part, axis=axis) for part in parts], axis=axis)
    else:
        found = np.logical_or.reduceat(mask, firsts, axis=axis)
    return found


def _readers_of_seen(
    grid: CellGrid, readings: Sequence[_Reading], seen: Sequence[_Seen], mask: _Bools
) -> Cells:
    """Return the cells that read a group of voxels named in a mask over the groups."""
    edges = [np.array([0, count]) for count in grid.grid_shape]
    labels = [np.zeros(1, np.int64) for _ in grid.grid_shape]
    order: list[int] = []
    for reading, side in zip(readings, seen, strict=True):
        if reading.out is None:
            mask = np.logical_or.reduce(mask, axis=0)
            continue
        if not side.group.size:
            return no_cells(grid)
        cuts = distinct(np.concatenate((side.low, side.high)))
        changes = np.zeros((side.count, len(cuts)), np.int64)
        np.add.at(changes, (side.group, cuts.searchsorted(side.low)), 1)
        np.add.at(changes, (side.group, cuts.searchsorted(side.high)), -1)
        reads = np.cumsum(changes, axis=1)[:, :-1] > 0
        # Products of 0 and 1 only, so that the sum is 0 just where all are.
        found = np.tensordot(mask.astype(np.float32), reads.astype(np.float32), axes=(0, 0))
        mask = found > 0
        edges[reading.out], labels[reading.out] = cuts, np.arange(len(cuts) - 1)
        order.append(reading.out)
    mask = mask.transpose(np.argsort(order))
    followed = set(order)
    mask = mask[tuple(slice(None) if n in followed else None for n in range(grid.ndim))]
    if not all(grid.grid_shape):
        return no_cells(grid)
    return settled(grid, edges, labels, mask)


def _readers_of_scatter(
    grid: CellGrid, readings: Sequence[_Reading], voxels: _Scatter
) -> Cells | None:
    seen, own = [], []
    for axis, reading in enumerate(readings):
        if reading.out is None:
            zero = np.zeros(1, np.int64)
            seen.append(_Seen(1, zero, zero, zero))
            own.append(np.zeros(voxels.places.shape[1], np.int64))
            continue
        steps, places = np.unique(voxels.places[axis], return_inverse=True)
        start = steps * voxels.size[axis]
        stop = np.minimum(start + voxels.size[axis], voxels.shape[axis])
        which, low, high = reading.reader_ranges(start, stop)
        firsts = _runs_of_like(low, high, len(steps))
        numbers = np.zeros(len(steps), np.int64)
        numbers[firsts[1:]] = 1
        numbers = np.cumsum(numbers)
        taken = np.zeros(len(steps), np.bool_)
        taken[firsts] = True
        taken = taken[which] & (low < high)
        seen.append(_Seen(len(firsts), numbers[which][taken], low[taken], high[taken]))
        own.append(numbers[places])
    shape = [side.count for side in seen]
    if prod(shape) <= _DENSE:
        mask = np.zeros(shape, np.bool_)
        mask[tuple(own)] = True
        return _readers_of_seen(grid, readings, seen, mask)
    return _listed_readers(grid, readings, seen, own)


def _listed_readers(
    grid: CellGrid, readings: Sequence[_Reading], seen: Sequence[_Seen], own: Sequence[_Ints]
) -> Cells | None:
    """Return the cells that read boxes, told by their groups along each axis, from a list."""
    # Axis by axis the groups are replaced by the positions that read them.
    sizes = [side.count for side in seen]
    *groups, flat = _distinct_rows([*own, np.zeros_like(own[0])], [*sizes, grid.num_cells])
    for axis, (reading, side) in enumerate(zip(readings, seen, strict=True)):
        if reading.out is not None:
            widths = side.high - side.low
            counts = np.bincount(side.group, widths, side.count).astype(np.int64)
            repeats = counts[groups[0]]
            if widths.sum() > _LISTED or repeats.sum() > _LISTED:
                return None
            order = np.argsort(side.group, kind="stable")
            steps = _ranges(side.low[order], widths[order])
            begins = (np.cumsum(counts) - counts)[groups[0]]
            flat = np.repeat(flat, repeats)
            flat += steps[_ranges(begins, repeats)] * grid.strides[reading.out]
            groups = [np.repeat(group, repeats) for group in groups]
        *groups, flat = _distinct_rows([*groups[1:], flat], [*sizes[axis + 1 :], grid.num_cells])
    followed = {reading.out for reading in readings}
    for axis, (count, stride) in enumerate(zip(grid.grid_shape, grid.strides, strict=True)):
        if axis not in followed:
            if len(flat) * count > _LISTED:
                return None
            flat = np.add.outer(np.arange(count) * stride, flat).ravel()
    return listed(grid, np.sort(flat))


def _distinct_rows(columns: Sequence[_Ints], sizes: Sequence[int]) -> list[_Ints]:
    """Return the distinct rows of columns whose numbers are below ``sizes``."""
    if prod(sizes) < 1 << 63:
        key = np.zeros(len(columns[0]), np.int64)
        for column, size in zip(columns, sizes, strict=True):
            key = key * size + column
        key = distinct(key)
        found = []
        for size in reversed(sizes):
            key, column = np.divmod(key, size)
            found.append(column)
        return found[::-1]
    order = np.lexsort(columns)
    new = np.zeros(len(order), np.bool_)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order[1:]] != column[order[:-1]]
    return [column[order[new]] for column in columns]


def _ranges(start: _Ints, size: _Ints) -> _Ints:
    """Return the numbers ``start .. start + size`` of each, one after the other."""
    ends = np.cumsum(size)
    numbers: _Ints = np.arange(int(size.sum())) + np.repeat(start - (ends - size), size)
    return numbers


# ------------------------------------------------------------------------- cell by cell


def _asked(
    planner: Planner, number: int, voxels: Sequence[_Voxels], upstream: CellTest | None
) -> CellTest | CellProduct | CellMask | CellList:
    """Return the cells that read some of the voxels or a cell that passes a test."""
    if upstream is None and getattr(planner.inputs[number].index_map, "is_nested", False):

        def reads(roi: Roi) -> bool:
            try:
                windows = planner.windows_of(number, roi.start, roi.stop)
            except Exception:
                return True  # As below.
            return any(part.meets(windows) for part in voxels)

        found = cells_found_from_above(planner.grid, reads)
        if found is not None:
            return listed(planner.grid, found)

    def test(index: int) -> bool | Iterator[tuple[CellTest, int]]:
        try:
            windows = _windows(planner, number, index)
        except Exception:
            # The user's index map fails for this cell now; what was made with it may be anything.
            return True
        if any(part.meets(windows) for part in voxels):
            return True
        return False if upstream is None else _cells_in(upstream, windows)

    return CellTest(planner.grid, test)


def _windows(planner: Planner, number: int, index: int) -> Sequence[AxisWindow]:
    item = planner.inputs[number]
    if item.links is None:
        return planner.plan(index).windows[number]
    position = planner.grid.position(index)
    windows = []
    for axis, link in enumerate(item.links):
        if link.axis is None:
            windows.append(item.window(axis, 0, 0))
        else:
            piece = planner.piece(link.axis, position[link.axis])
            windows.append(next(w for n, a, w in piece.windows if (n, a) == (number, axis)))
    return windows


def _cells_in(test: CellTest, windows: Sequence[AxisWindow]) -> Iterator[tuple[CellTest, int]]:
    """Yield the cells of the test's image that windows meet."""
    grid = test.grid
    axes = [
        {
            position * stride: None
            for low, high in window.spans
            for position in grid.axis_positions(axis, low, high)
        }
        for axis, (window, stride) in enumerate(zip(windows, grid.strides, strict=True))
    ]
    return ((test, index) for index in map(sum, product(*axes)))


def _positions_on(part: CellProduct | CellMask | CellList | CellTest, axis: int) -> Runs:
    """Return the positions that cells have along an axis."""
    if isinstance(part, CellProduct):
        return runs_of(part.positions[axis])
    if isinstance(part, CellMask):
        cuts, groups = part.edges[axis], part.labels[axis]
        own = np.flatnonzero(groups >= 0)
        return list(zip(cuts[own].tolist(), cuts[own + 1].tolist(), strict=True))
    assert isinstance(part, CellList)
    stride, count = part.grid.strides[axis], part.grid.grid_shape[axis]
    return runs_of(distinct(part.indices // stride % count))
