"""Which cells a changed region reaches, through halos, borders and changes of scale.

Regions and sets of cells are products of one set per axis, as the plans are, so nothing here
depends on the number of cells. Positions along an axis are listed; cells are not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product
from math import prod
from typing import TypeAlias

from cellimg_dask.blocks.plan import InputPlan, Planner, Region
from cellimg_dask.geometry import AxisWindow, CellGrid, Roi, TileGrid

__all__ = [
    "CellProduct",
    "CellTest",
    "affected_cells",
    "cells_meeting",
    "hull",
    "merge_regions",
    "region_of",
    "region_read",
    "touched_region",
]

Interval: TypeAlias = tuple[int, int]


class CellProduct(Collection[int]):
    """Flat indices of the cells whose position along each axis is in that axis' list."""

    def __init__(self, grid: CellGrid | TileGrid, positions: Sequence[Sequence[int]]) -> None:
        self.grid = grid
        self.positions = tuple(positions)
        self._known = tuple(
            steps if isinstance(steps, range) else frozenset(steps) for steps in self.positions
        )

    def __len__(self) -> int:
        return prod(map(len, self.positions))

    def __iter__(self) -> Iterator[int]:
        axes = [
            [p * stride for p in steps]
            for steps, stride in zip(self.positions, self.grid.strides, strict=True)
        ]
        return map(sum, product(*axes))

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        for stride, known in zip(self.grid.strides, self._known, strict=True):
            step, index = divmod(index, stride)
            if step not in known:
                return False
        return True


class CellTest(Collection[int]):
    """Flat indices of the cells that pass a test; only membership is cheap."""

    def __init__(self, grid: CellGrid, test: Callable[[int], bool]) -> None:
        self.grid = grid
        self._test = test

    def __len__(self) -> int:
        return self.grid.num_cells

    def __iter__(self) -> Iterator[int]:
        return filter(self._test, range(self.grid.num_cells))

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        return self._test(index)


def region_of(roi: Roi) -> Region:
    """Return a box as a region."""
    return tuple(((low, high),) for low, high in zip(roi.start, roi.stop, strict=True))


def cells_meeting(grid: CellGrid | TileGrid, region: Region) -> CellProduct:
    """Return the cells of ``grid`` that share a voxel with ``region``."""
    positions: list[Sequence[int]] = []
    for axis, (intervals, extent) in enumerate(zip(region, grid.shape, strict=True)):
        found = [
            grid.axis_positions(axis, max(low, 0), min(high, extent)) for low, high in intervals
        ]
        positions.append(found[0] if len(found) == 1 else sorted(set().union(*found)))
    return CellProduct(grid, positions)


def affected_cells(planner: Planner, number: int, region: Region) -> CellProduct | CellTest:
    """Return the cells that read a voxel of ``region`` of input ``number``."""
    item, grid = planner.inputs[number], planner.grid
    if item.index_map is not None:
        return CellTest(grid, lambda index: _maps_onto(planner, index, number, region))
    assert item.links is not None
    positions: list[Sequence[int]] = [range(n) for n in grid.grid_shape]
    for axis, (link, intervals) in enumerate(zip(item.links, region, strict=True)):
        if link.axis is None:
            if not _meet(item.window(axis, 0, 0), intervals):
                return CellProduct(grid, [[] for _ in grid.grid_shape])
        else:
            hit = _affected_positions(planner, item, number, axis, link.axis, intervals)
            known = positions[link.axis]
            if len(known) < grid.grid_shape[link.axis]:
                both = set(known)
                hit = [position for position in hit if position in both]
            positions[link.axis] = hit
    return CellProduct(grid, positions)


def region_read(planner: Planner, number: int, cells: CellProduct | CellTest) -> Region | None:
    """Return what cells read of input ``number``; None: perhaps everything."""
    item = planner.inputs[number]
    if item.links is None or isinstance(cells, CellTest):
        return None
    region: list[tuple[Interval, ...]] = []
    for axis, link in enumerate(item.links):
        steps = None if link.axis is None else cells.positions[link.axis]
        if link.axis is None or steps is None or len(steps) == cells.grid.grid_shape[link.axis]:
            region.append(((0, item.shape[axis]),))
        else:
            windows = [_window(planner, number, axis, link.axis, position) for position in steps]
            region.append(tuple({span: None for window in windows for span in window.spans}))
    return tuple(region)


def merge_regions(regions: Sequence[Region], limit: int = 8) -> list[Region]:
    """Return the distinct ones; beyond ``limit`` their bounding box, which is never too small."""
    distinct = [region for region in dict.fromkeys(regions) if all(region)]
    if len(distinct) <= limit:
        return distinct
    return [hull(distinct)]


def hull(regions: Sequence[Region]) -> Region:
    """Return the bounding box of regions that are not empty."""
    return tuple(
        ((min(axis[0][0] for axis in axes), max(axis[-1][1] for axis in axes)),)
        for axes in zip(*regions, strict=True)
    )


def touched_region(cells: CellProduct | CellTest) -> Region:
    """Return the voxels of the cells, or of the whole image where only a test is known."""
    grid = cells.grid
    if isinstance(cells, CellTest):
        return tuple(((0, extent),) for extent in grid.shape)
    assert isinstance(grid, CellGrid)
    region: list[tuple[Interval, ...]] = []
    for axis, steps in enumerate(cells.positions):
        if isinstance(steps, range):
            low = min(steps.start * grid.cell_shape[axis], grid.shape[axis])
            high = min(steps.stop * grid.cell_shape[axis], grid.shape[axis])
            whole: tuple[Interval, ...] = ((low, high),) if low < high else ()
            region.append(whole)
            continue
        joined: list[Interval] = []
        for position in steps:
            low = position * grid.cell_shape[axis]
            high = min(low + grid.cell_shape[axis], grid.shape[axis])
            if joined and joined[-1][1] == low:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        region.append(tuple(joined))
    return tuple(region)


def _affected_positions(
    planner: Planner,
    item: InputPlan,
    number: int,
    axis: int,
    out_axis: int,
    intervals: tuple[Interval, ...],
) -> Sequence[int]:
    assert item.links is not None
    step = planner.grid.cell_shape[out_axis] * item.links[axis].factor
    count, extent = planner.grid.grid_shape[out_axis], item.shape[axis]
    before, after = item.halo.before[axis], item.halo.after[axis]
    candidates: set[int] = set()
    for low, high in intervals:
        if low >= high:
            continue
        if low <= 0 and high >= extent:
            return range(count)
        candidates.update(
            range(max((low - after) // step, 0), min(-(-(high + before) // step), count))
        )
    if item.boundary not in ("none", "constant") and any(a < b for a, b in intervals):
        # What a cell at the border mirrors or wraps may lie anywhere.
        candidates.update(range(min(-(-before // step), count)))
        candidates.update(range(max((extent - after) // step, 0), count))
    return sorted(
        p for p in candidates if _meet(_window(planner, number, axis, out_axis, p), intervals)
    )


def _window(planner: Planner, number: int, axis: int, out_axis: int, position: int) -> AxisWindow:
    """Return how the cells at ``position`` along an output axis read an axis of an input."""
    piece = planner.piece(out_axis, position)
    return next(window for n, a, window in piece.windows if (n, a) == (number, axis))


def _maps_onto(planner: Planner, index: int, number: int, region: Region) -> bool:
    try:
        windows = planner.plan(index).windows[number]
    except Exception:
        # The user's index map fails for this cell now; what was made with it may be anything.
        return True
    return all(_meet(window, intervals) for window, intervals in zip(windows, region, strict=True))


def _meet(window: AxisWindow, intervals: tuple[Interval, ...]) -> bool:
    return any(a < high and low < b for a, b in window.spans for low, high in intervals if a < b)
