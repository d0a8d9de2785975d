"""A change reaches the cells that read a changed voxel, and no others.

The oracle knows nothing of intervals: it numbers the voxels of the source, extends the numbers
with `numpy.pad`, cuts out what each cell reads, and looks whether a changed number is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.blocks.plan import AxisLink, InputPlan, Planner
from cellimg_dask.geometry import BOUNDARIES, Halo
from cellimg_dask.state import cells as cells_module
from cellimg_dask.state import dirty as dirty_module
from cellimg_dask.state.cells import (
    CellList,
    CellProduct,
    Cells,
    CellTest,
    CellUnion,
    boxes_of,
    listed,
    union,
)
from cellimg_dask.state.dirty import (
    Points,
    Touched,
    VoxelMask,
    affected_cells,
    cells_meeting,
    region_of,
    region_read,
)

# ------------------------------------------------------------------------------ the oracle


def voxels_read(
    shape: tuple[int, ...], low: Sequence[int], high: Sequence[int], boundary: str
) -> np.ndarray:
    """Return the flat numbers of the voxels that a box reads, which may leave the image."""
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    if not shape:
        return numbers.ravel()
    if boundary == "none":
        box = tuple(
            slice(min(max(a, 0), n), min(max(b, 0), n))
            for a, b, n in zip(low, high, shape, strict=True)
        )
        return numbers[box].ravel()
    before = [max(0, -a) for a in low]
    after = [max(0, b - n) for b, n in zip(high, shape, strict=True)]
    widths = list(zip(before, after, strict=True))
    if boundary == "constant":
        padded = np.pad(numbers, widths, constant_values=-1)
    else:
        padded = np.pad(numbers, widths, mode=boundary)  # type: ignore[call-overload]
    box = tuple(slice(a + p, b + p) for a, b, p in zip(low, high, before, strict=True))
    read = padded[box].ravel()
    return read[read >= 0]


def boxes(grid: ci.CellGrid) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the bounds of all cells, in C order."""
    bounds = []
    for position in np.ndindex(
        *(-(-n // c) for n, c in zip(grid.shape, grid.cell_shape, strict=True))
    ):
        low = tuple(p * c for p, c in zip(position, grid.cell_shape, strict=True))
        high = tuple(
            min(a + c, n) for a, c, n in zip(low, grid.cell_shape, grid.shape, strict=True)
        )
        bounds.append((low, high))
    return bounds


def mask_of(shape: tuple[int, ...], low: Sequence[int], high: Sequence[int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


@dataclass
class Stage:
    """A lazy image with, per input, what each of its cells reads there, told by the oracle."""

    img: ci.CellImg
    sources: list[Stage]
    reads: list[list[np.ndarray]]
    """Per source and cell the flat numbers of the voxels read."""
    numbers: Sequence[int] = (0, 1, 2)
    """Per source which input of the image it is."""

    def cells_hit(self, changed: dict[int, np.ndarray]) -> set[int]:
        """Return the cells that read a changed voxel of any source."""
        return {
            index
            for source, reads in zip(self.sources, self.reads, strict=True)
            if id(source) in changed
            for index, read in enumerate(reads)
            if changed[id(source)].ravel()[read].any()
        }

    def voxels_of(self, cells: set[int]) -> np.ndarray:
        mask = np.zeros(self.img.shape, bool)
        for index in cells:
            low, high = boxes(self.img.grid)[index]
            mask |= mask_of(self.img.shape, low, high)
        return mask

    def held(self) -> set[int]:
        return {n for n in range(self.img.grid.num_cells) if self.img.peek(n) is not None}


def check(source: Stage, later: Sequence[Stage], roi: ci.Roi) -> None:
    """Invalidate a region of ``source`` and compare every image with the oracle."""
    stages = [source, *later]
    for stage in stages:
        for index in range(stage.img.grid.num_cells):
            stage.img.load(index)
        assert stage.held() == set(range(stage.img.grid.num_cells))
    source.img.invalidate(roi)

    region = mask_of(source.img.shape, roi.start, roi.stop)
    inside = {
        index
        for index, (low, high) in enumerate(boxes(source.img.grid))
        if (mask_of(source.img.shape, low, high) & region).any()
    }
    # A cell is computed anew as a whole, so all of its voxels count as changed.
    changed = {id(source): source.voxels_of(inside)}
    everything = set(range(source.img.grid.num_cells))
    assert source.held() == everything - inside
    for stage in later:
        hit = stage.cells_hit(changed)
        # A cell is computed anew as a whole, so all of its voxels count as changed.
        changed[id(stage)] = stage.voxels_of(hit)
        survivors = stage.held()
        everything = set(range(stage.img.grid.num_cells))
        assert not survivors & hit, "a cell that reads a changed voxel survived"
        assert survivors == everything - hit, "a cell that reads none was dropped"


# ----------------------------------------------------------------------------- what is drawn


def make_source(shape: tuple[int, ...], cell_shape: tuple[int, ...], cache: ci.CellCache) -> Stage:
    numbers = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape)
    img = ci.map_cells(np.negative, numbers, cell_shape=cell_shape, cache=cache)
    return Stage(img, [], [])


def make_filter(
    source: Stage,
    *,
    halo: Sequence[tuple[int, int]],
    boundary: str,
    cell_shape: Sequence[int],
    factors: Sequence[int] | None = None,
    dropped: Sequence[int] = (),
    added: dict[int, int] | None = None,
) -> Stage:
    """Put an image on top of ``source`` that has a halo, shrinks, drops and adds axes."""
    shape = source.img.shape
    factors = tuple(factors or (1,) * len(shape))
    added = added or {}

    def f(block: np.ndarray) -> np.ndarray:
        result = block[tuple(slice(None, None, step) for step in factors)]
        result = result.sum(axis=tuple(dropped), keepdims=False) if dropped else result
        for axis in sorted(added):
            result = np.expand_dims(result, axis).repeat(added[axis], axis)
        return result

    img = ci.map_cells(
        f,
        source.img,
        dtype=np.int64,
        halo=list(halo),
        boundary=boundary,
        cell_shape=cell_shape,
        shrink=factors,
        drop_axis=dropped,
        new_axis=added,
        cache=source.img.loader.shelf.cache,
    )
    kept = [axis for axis in range(len(shape)) if axis not in dropped]
    rest = iter(kept)
    from_axis = [None if axis in added else next(rest) for axis in range(img.ndim)]
    reads = []
    for low, high in boxes(img.grid):
        start, stop = [0] * len(shape), list(shape)
        for axis, origin in enumerate(from_axis):
            if origin is not None:
                start[origin] = low[axis] * factors[origin]
                stop[origin] = min(high[axis] * factors[origin], shape[origin])
        for axis, (before, after) in enumerate(halo):
            # The halo is rounded up to whole steps where the image shrinks.
            start[axis] -= -(-before // factors[axis]) * factors[axis]
            stop[axis] += -(-after // factors[axis]) * factors[axis]
        reads.append(voxels_read(shape, start, stop, boundary))
    return Stage(img, [source], [reads])


@st.composite
def geometries(draw: st.DrawFn, max_axes: int = 3) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ndim = draw(st.integers(1, max_axes))
    longest = {1: 14, 2: 9, 3: 6}[ndim]
    shape = tuple(draw(st.integers(1, longest)) for _ in range(ndim))
    return shape, tuple(draw(st.integers(1, n + 1)) for n in shape)


@st.composite
def rois(draw: st.DrawFn, shape: tuple[int, ...]) -> ci.Roi:
    start = [draw(st.integers(0, n - 1)) for n in shape]
    return ci.Roi(start, [draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)])


@st.composite
def halos(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zero, one-sided, wider than the cell, wider than the image."""
    width = [st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 2 * n + 2)) for n in shape]
    return [(draw(w), draw(w)) for w in width]


@st.composite
def filters(draw: st.DrawFn, source: Stage) -> Stage:
    shape = source.img.shape
    ndim = len(shape)
    dropped = draw(st.sets(st.integers(0, ndim - 1), max_size=ndim - 1)) if ndim > 1 else set()
    factors = [1 if a in dropped else draw(st.sampled_from([1, 1, 2, 3])) for a in range(ndim)]
    kept = ndim - len(dropped)
    added = {}
    if kept < 3 and draw(st.booleans()):
        added = {draw(st.integers(0, kept)): draw(st.integers(1, 2))}
    rest = iter([-(-shape[a] // factors[a]) for a in range(ndim) if a not in dropped])
    out = [added.get(a) or next(rest) for a in range(kept + len(added))]
    cell_shape = [added.get(axis) or draw(st.integers(1, n + 1)) for axis, n in enumerate(out)]
    return make_filter(
        source,
        halo=draw(halos(shape)),
        # An empty axis has nothing to repeat.
        boundary=draw(st.sampled_from(BOUNDARIES[:2] if 0 in shape else BOUNDARIES)),
        cell_shape=cell_shape,
        factors=factors,
        dropped=sorted(dropped),
        added=added,
    )


# --------------------------------------------------------------------------------- the tests


@given(data=st.data())
@settings(max_examples=150)
def test_chains_of_filters_drop_what_the_oracle_says(data):
    source = make_source(*data.draw(geometries()), ci.CellCache(1 << 22))
    later = [data.draw(filters(source))]
    for _ in range(data.draw(st.integers(0, 2))):
        later.append(data.draw(filters(later[-1])))
    check(source, later, data.draw(rois(source.img.shape)))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("cell", [1, 2, 5, 11])
def test_each_voxel_and_boundary_alone(boundary, cell):
    """All single voxels of a short axis, with halos to both sides far beyond the image."""
    shape = (11,)
    for halo in [(0, 0), (1, 0), (0, 4), (3, 2), (25, 1), (0, 23)]:
        source = make_source(shape, (3,), ci.CellCache(1 << 20))
        stage = make_filter(source, halo=[halo], boundary=boundary, cell_shape=(cell,))
        for voxel in range(11):
            check(source, [stage], ci.Roi((voxel,), (voxel + 1,)))


def test_an_empty_region_changes_nothing():
    source = make_source((6, 6), (2, 2), ci.CellCache(1 << 20))
    later = [
        make_filter(source, halo=[(1, 1)] * 2, boundary="wrap", cell_shape=(3, 3)),
        make_filter(source, halo=[(1, 1)] * 2, boundary="none", cell_shape=(3,), dropped=[0]),
    ]
    for roi in (ci.Roi((3, 0), (3, 6)), ci.Roi((0, 3), (6, 3)), ci.Roi((3, 3), (3, 3))):
        check(source, later, roi)


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[Stage, Stage]:
    """An image of two inputs, the second of which NumPy would broadcast to the first."""
    cache = ci.CellCache(1 << 22)
    shape, cells = draw(geometries())
    skip = draw(st.integers(0, len(shape)))
    small = tuple(1 if draw(st.booleans()) else n for n in shape[skip:])
    source = make_source(small, tuple(draw(st.integers(1, n + 1)) for n in small), cache)
    boundary = draw(st.sampled_from(BOUNDARIES))
    halo = draw(halos(shape))
    own = draw(st.none() | halos(small))
    img = ci.map_cells(
        lambda large, _: large,
        np.zeros(shape, np.int64),
        source.img if own is None else ci.Input(source.img, halo=own),
        dtype=np.int64,
        halo=halo,
        boundary=boundary,
        cell_shape=cells,
        cache=cache,
    )
    reads = []
    for low, high in boxes(img.grid):
        start, stop = [], []
        for axis, n in enumerate(small):
            stretched = n == 1 != shape[axis + skip]
            a, b = (0, 1) if stretched else (low[axis + skip], high[axis + skip])
            before, after = (halo[skip:] if own is None else own)[axis]
            if own is None and stretched:
                before = after = 0
            start.append(a - before)
            stop.append(b + after)
        reads.append(voxels_read(small, start, stop, boundary))
    return source, Stage(img, [source], [reads], [1])


@given(data=st.data())
@settings(max_examples=80)
def test_broadcast_inputs_drop_what_the_oracle_says(data):
    source, stage = data.draw(broadcasts())
    later = [stage]
    if data.draw(st.booleans()):
        later.append(data.draw(filters(stage)))
    check(source, later, data.draw(rois(source.img.shape)))


def shifted(offset: Sequence[int]) -> Callable[[ci.Roi], ci.Roi]:
    return lambda roi: roi.shift(offset)


class Nested:
    """An index map that promises that the box of a region holds those of all its parts."""

    is_nested = True

    def __init__(self, index_map: Callable[[ci.Roi], ci.Roi]) -> None:
        self.index_map = index_map
        self.calls = 0

    def __call__(self, roi: ci.Roi) -> ci.Roi:
        self.calls += 1
        return self.index_map(roi)


def transposed(roi: ci.Roi) -> ci.Roi:
    return ci.Roi(roi.start[::-1], roi.stop[::-1])


@st.composite
def mapped(draw: st.DrawFn) -> tuple[Stage, Stage]:
    """An image that reads its input through an index map."""
    cache = ci.CellCache(1 << 22)
    shape, cells = draw(geometries(max_axes=2))
    kind = draw(st.sampled_from(["shift", "transpose", "coarse"]))
    small = shape
    if kind == "transpose":
        small, index_map = shape[::-1], transposed
    elif kind == "shift":
        index_map = shifted([draw(st.integers(-4, 4)) for _ in shape])
    else:
        small = tuple(-(-n // 2) for n in shape)

        def index_map(roi: ci.Roi) -> ci.Roi:
            return ci.Roi(tuple(a // 2 for a in roi.start), tuple(-(-b // 2) for b in roi.stop))

    if draw(st.booleans()):
        index_map = Nested(index_map)
    source = make_source(small, tuple(draw(st.integers(1, n + 1)) for n in small), cache)
    boundary = draw(st.sampled_from(BOUNDARIES))
    halo = draw(halos(small))

    def fill(block: ci.Block) -> None:
        block.data[...] = block.index

    img = ci.fill_cells(
        fill,
        ci.CellGrid(shape, cells),
        ci.Input(source.img, halo=halo, index_map=index_map),
        dtype=np.int64,
        boundary=boundary,
        cache=cache,
    )
    reads = []
    for low, high in boxes(img.grid):
        roi = index_map(ci.Roi(low, high))
        start = [a - before for a, (before, _) in zip(roi.start, halo, strict=True)]
        stop = [b + after for b, (_, after) in zip(roi.stop, halo, strict=True)]
        reads.append(voxels_read(small, start, stop, boundary))
    return source, Stage(img, [source], [reads])


@given(data=st.data())
@settings(max_examples=80)
def test_index_maps_drop_what_the_oracle_says(data):
    source, stage = data.draw(mapped())
    later = [stage]
    if data.draw(st.booleans()):
        later.append(data.draw(filters(stage)))
    check(source, later, data.draw(rois(source.img.shape)))


@given(data=st.data())
@settings(max_examples=80)
def test_diamonds_drop_what_the_oracle_says(data):
    """Two filters on one source, and a third that reads both and the source itself."""
    shape, cells = data.draw(geometries(max_axes=2))
    cache = ci.CellCache(1 << 22)
    source = make_source(shape, cells, cache)
    arms = [
        make_filter(
            source,
            halo=data.draw(halos(shape)),
            boundary=data.draw(st.sampled_from(BOUNDARIES)),
            cell_shape=[data.draw(st.integers(1, n + 1)) for n in shape],
        )
        for _ in range(2)
    ]
    inputs = [source, *arms]
    widths = [data.draw(halos(shape)) for _ in inputs]
    boundary = data.draw(st.sampled_from(BOUNDARIES))

    def fill(block: ci.Block) -> None:
        block.data[...] = block.index

    img = ci.fill_cells(
        fill,
        ci.CellGrid(shape, [data.draw(st.integers(1, n + 1)) for n in shape]),
        *(ci.Input(stage.img, halo=h) for stage, h in zip(inputs, widths, strict=True)),
        dtype=np.int64,
        boundary=boundary,
        cache=cache,
    )
    reads = [
        [
            voxels_read(
                shape,
                [a - before for a, (before, _) in zip(low, halo, strict=True)],
                [b + after for b, (_, after) in zip(high, halo, strict=True)],
                boundary,
            )
            for low, high in boxes(img.grid)
        ]
        for halo in widths
    ]
    check(source, [*arms, Stage(img, inputs, reads)], data.draw(rois(shape)))


def test_an_image_is_notified_once_for_each_of_many_ways_to_it():
    """Ten diamonds in a row have 2^10 ways from end to end."""
    cache = ci.CellCache(1 << 22)
    first = image = make_source((32,), (4,), cache).img
    images = [image]
    for _ in range(10):
        left = ci.map_cells(np.negative, image, cache=cache)
        right = ci.map_cells(np.negative, image, cache=cache)
        image = ci.map_cells(np.add, left, right, cache=cache)
        images += [left, right, image]
    whole = image[:]
    calls: list[tuple[int, list[int]]] = []
    watches = [
        img.on_dirty(lambda change, number=number: calls.append((number, list(change.cells))))
        for number, img in enumerate(images)
    ]
    first.invalidate(np.s_[5:6])
    assert len(watches) == len(images)
    # Each once, an image after both that it reads.
    assert sorted(calls) == [(number, [1]) for number in range(len(images))]
    order = [number for number, _ in calls]
    assert all(order.index(n) > order.index(n - k) for n in range(3, 31, 3) for k in (1, 2))
    assert all([n for n in range(8) if step.peek(n) is None] == [1] for step in images)
    np.testing.assert_array_equal(image[:], whole)


# ------------------------------------------------------------------- changes of every kind


@contextmanager
def limits(draw: Any) -> Iterator[None]:
    """Send small images down the ways that are made for large ones."""
    with ExitStack() as stack:
        for module, name, small in [
            (dirty_module, "_DENSE", 1),
            (dirty_module, "_LISTED", 3),
            (cells_module, "_SMALL", 0),
            (cells_module, "_DENSE", 2),
            (cells_module, "_LARGEST", 1),
        ]:
            if draw(st.integers(0, 3)) == 0:
                stack.enter_context(patch.object(module, name, small))
        yield


def agree(cells: Cells, grid: ci.CellGrid, expected: set[int]) -> None:
    """Compare a set of cells with the oracle's in every way it can be asked."""
    everything = range(grid.num_cells)
    assert {index for index in everything if index in cells} == expected
    assert sorted(cells) == sorted(expected), "each once"
    last = cells.parts[-1] if isinstance(cells, CellUnion) else cells
    assert len(cells) == (grid.num_cells if isinstance(last, CellTest) else len(expected))
    seen = np.zeros(grid.shape, int)
    for box in boxes_of(cells):
        assert box.size > 0
        seen[(*box.slices, ...)] += 1
    voxels = np.zeros(grid.shape, int)
    for index in expected:
        low, high = boxes(grid)[index]
        voxels[(*(slice(a, b) for a, b in zip(low, high, strict=True)), ...)] = 1
    np.testing.assert_array_equal(seen, voxels)


@st.composite
def changes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Touched, np.ndarray]:
    """Changed voxels as the library is told, and as an array."""
    changed = np.zeros(shape, bool)
    kind = draw(st.sampled_from(["region", "mask", "points"]))
    if kind == "region":
        lines, region = [], []
        for n in shape:
            bounds = st.integers(-2, n + 2)
            intervals = draw(st.lists(st.tuples(bounds, bounds), max_size=3))
            if draw(st.booleans()):
                step = draw(st.integers(1, 3))
                intervals = [(at, at + 1) for at in range(draw(st.integers(0, 2)), n, step)]
            line = np.zeros(n, bool)
            for low, high in intervals:
                line[max(low, 0) : max(high, 0)] = True
            lines.append(line)
            region.append(tuple(intervals))
        changed[...] = True
        for axis, line in enumerate(lines):
            changed &= line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return tuple(region), changed
    if kind == "mask":
        # It may hang over, or lie outside altogether.
        origin = tuple(draw(st.integers(-3, n + 1)) for n in shape)
        sizes = tuple(draw(st.integers(0, n + 3)) for n in shape)
        if draw(st.booleans()):
            origin, sizes = (0,) * len(shape), shape
        count = int(np.prod(sizes, dtype=int))
        share = draw(st.sampled_from([0.05, 0.3, 0.9, 1]))
        numbers = np.random.default_rng(draw(st.integers(0, 999)))
        mask = (numbers.random(count) < share).reshape(sizes)
        for place in np.argwhere(mask):
            at = place + origin
            if (at >= 0).all() and (at < shape).all():
                changed[tuple(at)] = True
        return VoxelMask(origin, mask), changed
    rows = draw(st.lists(st.tuples(*(st.integers(-1, n) for n in shape)), max_size=6))
    for place in rows:
        if all(0 <= at < n for at, n in zip(place, shape, strict=True)):
            changed[place] = True
    coords = np.array(rows, int).reshape(len(rows), len(shape))
    return Points(coords), changed


def walk(source: Stage, later: Sequence[Stage], change: Touched, changed: np.ndarray) -> None:
    """Follow a change of the source's voxels and compare each image's cells with the oracle."""
    told: dict[int, Touched] = {id(source): change}
    truth = {id(source): changed}
    for stage in later:
        planner = stage.img.loader.planner
        found = [
            affected_cells(planner, number, told[id(origin)])
            for number, origin in zip(stage.numbers, stage.sources, strict=False)
        ]
        cells = union(stage.img.grid, found)
        hit = stage.cells_hit(truth)
        agree(cells, stage.img.grid, hit)
        told[id(stage)] = cells
        truth[id(stage)] = stage.voxels_of(hit)


@st.composite
def sources(draw: st.DrawFn) -> Stage:
    """An image, now and then without voxels or without axes."""
    shape, cells = draw(geometries())
    kind = draw(st.integers(0, 11))
    if kind == 0:
        shape, cells = (), ()
    elif kind == 1:
        shape = (*shape[:-1], 0)
    return make_source(shape, cells, ci.CellCache(1 << 22))


@given(data=st.data())
@settings(max_examples=160)
def test_changes_of_every_kind_reach_what_the_oracle_says(data):
    source = data.draw(sources())
    later: list[Stage] = []
    for _ in range(data.draw(st.integers(1, 3))):
        before = later[-1] if later else source
        later.append(data.draw(filters(before)))
    with limits(data.draw):
        walk(source, later, *data.draw(changes(source.img.shape)))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_each_pair_of_voxels_and_boundary(boundary, size):
    """As points, mask and region, with halos to both sides far beyond a short axis."""
    source = make_source((size,), (2,), ci.CellCache(1 << 20))
    for halo in [(0, 0), (1, 0), (0, 4), (3, 2), (25, 1), (0, 23)]:
        for cell in (1, 3):
            stage = make_filter(source, halo=[halo], boundary=boundary, cell_shape=(cell,))
            for one in range(size):
                for two in range(one, size):
                    changed = np.zeros(size, bool)
                    changed[[one, two]] = True
                    walk(source, [stage], VoxelMask((0,), changed), changed)
                    walk(source, [stage], Points(np.array([[two], [one]])), changed)
                    walk(source, [stage], (((one, one + 1), (two, two + 1)),), changed)


@given(data=st.data())
@settings(max_examples=80)
def test_changes_reach_broadcast_inputs_as_the_oracle_says(data):
    source, stage = data.draw(broadcasts())
    later = [stage]
    if data.draw(st.booleans()):
        later.append(data.draw(filters(stage)))
    with limits(data.draw):
        walk(source, later, *data.draw(changes(source.img.shape)))


@given(data=st.data())
@settings(max_examples=100)
def test_changes_go_through_chains_of_index_maps_as_the_oracle_says(data):
    """Equal sets also downstream of an index map, and after a second one."""
    source, stage = data.draw(mapped())
    later = [stage]
    for _ in range(data.draw(st.integers(0, 2))):
        later.append(data.draw(filters(later[-1])))
    if data.draw(st.booleans()):
        later.append(data.draw(mapped_from(later[-1])))
    with limits(data.draw):
        walk(source, later, *data.draw(changes(source.img.shape)))


@st.composite
def mapped_from(draw: st.DrawFn, source: Stage) -> Stage:
    """An image of its own grid that reads a shifted part of another of as many axes."""
    small = source.img.shape
    offset = [draw(st.integers(-3, 3)) for _ in small]
    shape = tuple(draw(st.integers(1, 7)) for _ in small)
    grid = ci.CellGrid(shape, [draw(st.integers(1, n)) for n in shape])
    boundary = draw(st.sampled_from(BOUNDARIES))
    halo = draw(halos(small))

    def fill(block: ci.Block) -> None:
        block.data[...] = block.index

    img = ci.fill_cells(
        fill,
        grid,
        ci.Input(source.img, halo=halo, index_map=shifted(offset)),
        dtype=np.int64,
        boundary=boundary,
        cache=source.img.loader.shelf.cache,
    )
    reads = []
    for low, high in boxes(grid):
        start = [a + o - before for a, o, (before, _) in zip(low, offset, halo, strict=True)]
        stop = [b + o + after for b, o, (_, after) in zip(high, offset, halo, strict=True)]
        reads.append(voxels_read(small, start, stop, boundary))
    return Stage(img, [source], [reads])


def joined(draw: Any, inputs: Sequence[Stage], maps: bool) -> Stage:
    """Put an image on several others of one shape; some are read through a shift."""
    shape = inputs[0].img.shape
    widths = [draw(halos(shape)) for _ in inputs]
    shifts = [
        [draw(st.integers(-2, 2)) for _ in shape] if maps and draw(st.booleans()) else None
        for _ in inputs
    ]
    boundary = draw(st.sampled_from(BOUNDARIES))

    def fill(block: ci.Block) -> None:
        block.data[...] = block.index

    img = ci.fill_cells(
        fill,
        ci.CellGrid(shape, [draw(st.integers(1, n + 1)) for n in shape]),
        *(
            ci.Input(stage.img, halo=h, index_map=None if shift is None else shifted(shift))
            for stage, h, shift in zip(inputs, widths, shifts, strict=True)
        ),
        dtype=np.int64,
        boundary=boundary,
        cache=inputs[0].img.loader.shelf.cache,
    )
    reads = [
        [
            voxels_read(
                shape,
                [a + o - before for a, o, (before, _) in zip(low, shift, halo, strict=True)],
                [b + o + after for b, o, (_, after) in zip(high, shift, halo, strict=True)],
                boundary,
            )
            for low, high in boxes(img.grid)
        ]
        for halo, shift in ((h, s or [0] * len(shape)) for h, s in zip(widths, shifts, strict=True))
    ]
    return Stage(img, list(inputs), reads, range(len(inputs)))


@given(data=st.data())
@settings(max_examples=100)
def test_changes_meet_again_as_the_oracle_says(data):
    """Images that read two others and what those read, also through index maps."""
    source = make_source(*data.draw(geometries(max_axes=2)), ci.CellCache(1 << 22))
    later: list[Stage] = []
    for _ in range(data.draw(st.integers(1, 2))):
        top = later[-1] if later else source
        arms = [joined(data.draw, [top], maps=True) for _ in range(2)]
        later += [*arms, joined(data.draw, [top, *arms], maps=True)]
    with limits(data.draw):
        walk(source, later, *data.draw(changes(source.img.shape)))


@given(data=st.data())
def test_cells_that_hold_a_changed_voxel(data):
    source = data.draw(sources())
    change, changed = data.draw(changes(source.img.shape))
    grid = source.img.grid
    expected = {
        index
        for index, (low, high) in enumerate(boxes(grid))
        if changed[(*(slice(a, b) for a, b in zip(low, high, strict=True)), ...)].any()
    }
    with limits(data.draw):
        agree(cells_meeting(grid, change), grid, expected)


@given(data=st.data())
@settings(max_examples=80)
def test_what_is_read_lies_in_the_region_that_is_told(data):
    """And for a product of cells it is that region."""
    source = data.draw(sources())
    stage = data.draw(filters(source))
    grid = stage.img.grid
    asked = set(data.draw(st.lists(st.integers(0, max(grid.num_cells - 1, 0)), max_size=4)))
    indices = np.array(sorted(asked if grid.num_cells else ()), np.int64)
    with limits(data.draw):
        cells = listed(grid, indices)
    region = region_read(stage.img.loader.planner, 0, cells)
    assert region is not None
    told = np.ones(source.img.shape, bool)
    for axis, intervals in enumerate(region):
        line = np.zeros(told.shape[axis], bool)
        for low, high in intervals:
            line[low:high] = True
        told &= line.reshape([-1 if a == axis else 1 for a in range(told.ndim)])
    read = np.zeros(source.img.shape, bool)
    for index in indices:
        read.reshape(-1)[stage.reads[0][index]] = True
    assert told[read].all()
    if isinstance(cells, CellProduct):
        np.testing.assert_array_equal(told, read)


def test_what_is_read_is_not_known_where_cells_have_to_be_asked():
    planner = linked((8,), (2,), 0)
    test = CellTest(planner.grid, lambda index: True)
    assert region_read(planner, 0, test) is None
    one = CellList(planner.grid, np.array([3]))
    assert region_read(planner, 0, CellUnion(planner.grid, [one, test])) is None
    assert region_read(planner, 0, one) == (((6, 8),),)


# --------------------------------------------------------------------------- large images


def linked(shape: Sequence[int], cell_shape: Sequence[int], halo: Any, inputs: int = 1) -> Planner:
    grid = ci.CellGrid(shape, cell_shape)
    links = tuple(AxisLink(axis) for axis in range(grid.ndim))
    item = InputPlan(grid.shape, Halo.of(halo, grid.ndim), "none", links)
    return Planner(grid, [item] * inputs)


LEFT, RIGHT, AFTER = (
    [(1, 0), (0, 3), (1, 0)],
    [(0, 1), (3, 0), (0, 1)],
    [(0, 0), (0, 0), (1, 0)],
)


def diamonds(shape: Sequence[int], change: Touched) -> list[Cells]:
    """Send a change through ten diamonds whose sides have halos to different sides."""
    sides = [
        linked(shape, (2,) * 3, LEFT),
        linked(shape, (2,) * 3, RIGHT),
    ]
    join = linked(shape, (2,) * 3, AFTER, inputs=2)
    found: list[Cells] = []
    for _ in range(10):
        arms = [affected_cells(side, 0, change) for side in sides]
        change = union(
            join.grid, [affected_cells(join, number, arm) for number, arm in enumerate(arms)]
        )
        found += [*arms, change]
    return found


@pytest.mark.parametrize("kind", ["box", "mask", "points"])
def test_ten_diamonds_in_a_row_stay_few_parts_and_exact(kind):
    """In a grid of 8·10⁹ cells the same set as in a small one, where it is compared."""
    offset, far = 50, 2_000
    disk = np.add.outer(np.arange(-4, 5) ** 2, np.arange(-4, 5) ** 2) < 17

    def change(at: int) -> Touched:
        if kind == "box":
            return region_of(ci.Roi((at, at, at), (at + 15, at + 4, at + 1)))
        if kind == "mask":
            return VoxelMask((at,) * 3, disk[:, :, None])
        return Points(np.array([[at, at, at], [at + 20, at, at + 5], [at + 1, at + 16, at]]))

    small = diamonds((120,) * 3, change(offset))
    large = diamonds((4_000,) * 3, change(far))
    # The oracle: cells side by side, one boolean per cell.
    mask = np.zeros((120,) * 3, bool)
    told = change(offset)
    for box in boxes_of(cells_meeting(ci.CellGrid(mask.shape, 1), told)):  # type: ignore[arg-type]
        mask[box.slices] = True
    grid = ci.CellGrid((120,) * 3, 2)
    for step in range(0, 30, 3):
        arms = [
            dilated(mask, LEFT),
            dilated(mask, RIGHT),
        ]
        join = np.logical_or.reduce([dilated(a, AFTER) for a in arms])
        for cells, expected in zip(small[step : step + 3], [*arms, join], strict=True):
            whole = expected.reshape((60, 2) * 3).any(axis=(1, 3, 5))
            assert np.array_equal(np.sort(list(cells)), np.flatnonzero(whole))
        mask = join
    shift = (far - offset) // 2
    wide = large[0].grid
    for near, distant in zip(small, large, strict=True):
        assert not isinstance(distant, CellUnion) or len(distant.parts) <= 3
        places = np.stack(np.unravel_index(np.sort(list(near)), grid.grid_shape)) + shift
        moved = np.ravel_multi_index(tuple(places), wide.grid_shape)
        assert np.array_equal(np.sort(list(distant)), np.sort(moved))
    assert len(list(boxes_of(large[-1]))) < 1000


def dilated(mask: np.ndarray, halo: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the voxels of the cells of two voxels whose halo'd box holds a voxel of the mask."""
    for axis, (before, after) in enumerate(halo):
        mask = np.moveaxis(mask, axis, 0)
        cells = range(0, len(mask), 2)
        hit = np.stack([mask[max(a - before, 0) : a + 2 + after].any(axis=0) for a in cells])
        mask = np.moveaxis(hit.repeat(2, axis=0), 0, axis)
    return mask


def test_ten_diamonds_above_an_index_map_ask_it_once_per_cell():
    asked: list[ci.Roi] = []

    def index_map(roi: ci.Roi) -> ci.Roi:
        asked.append(roi)
        return roi.shift((2,))

    grid = ci.CellGrid((400,), 4)
    plain = InputPlan((400,), Halo.of(0, 1), "edge", (AxisLink(0),))
    item = InputPlan((400,), Halo.of(0, 1), "edge", None, index_map)
    cells = affected_cells(Planner(grid, [plain, item]), 1, (((200, 201),),))
    sides = [linked((400,), (4,), [(5, 0)]), linked((400,), (4,), [(0, 3)])]
    join = linked((400,), (4,), 0, inputs=2)
    for _ in range(10):
        arms = [affected_cells(side, 0, cells) for side in sides]
        cells = union(grid, [affected_cells(join, n, arm) for n, arm in enumerate(arms)])
    assert isinstance(cells, CellTest)
    assert asked == [], "nobody has asked for a cell"
    # Voxel 200 is read by cell 49 (198:202). Its left side goes two cells to the right, as five
    # voxels before meet two cells, and its right side one cell to the left, ten times each.
    assert sorted(cells) == list(range(49 - 10, 49 + 20 + 1))
    assert len(asked) == len(set(asked)) == 100


def test_a_chain_above_an_index_map_may_be_deeper_than_the_stack():
    grid = ci.CellGrid((40,), 4)
    item = InputPlan((40,), Halo.of(0, 1), "none", None, lambda roi: roi)
    cells = affected_cells(Planner(grid, [item]), 0, (((0, 1),),))
    plain = linked((40,), (4,), 0)
    for _ in range(5000):
        cells = affected_cells(plain, 0, cells)
    assert 0 in cells
    assert 1 not in cells
    assert list(cells) == [0]


def test_a_nested_index_map_is_asked_from_above():
    index_map = Nested(shifted((3, -5, 0)))
    grid = ci.CellGrid((1 << 20,) * 3, 64)
    item = InputPlan(grid.shape, Halo.of(8, 3), "none", None, index_map)
    change = region_of(ci.Roi((1000, 2000, 3000), (1200, 2001, 3100)))
    cells = affected_cells(Planner(grid, [item]), 0, change)
    assert index_map.calls < 800
    assert not isinstance(cells, CellTest)
    edited = ci.Roi((1000, 2000, 3000), (1200, 2001, 3100))
    expected = [
        cell.index
        for cell in grid.cells_in(ci.Roi((800, 1800, 2800), (1400, 2200, 3300)))
        if shifted((3, -5, 0))(cell.roi).grow(ci.Halo.of(8, 3)).intersect(edited).size
    ]
    assert list(cells) == sorted(expected)
    # Of a change of everything only membership is known.
    everything = affected_cells(Planner(grid, [item]), 0, region_of(ci.Roi.of_shape(grid.shape)))
    assert 0 in everything
    assert grid.num_cells - 1 in everything


def test_a_cell_whose_index_map_fails_is_affected():
    def index_map(roi: ci.Roi) -> ci.Roi:
        if roi.start == (4,):
            raise RuntimeError("no")
        return roi

    grid = ci.CellGrid((40,), 4)
    item = InputPlan((40,), Halo.of(0, 1), "none", None, index_map)
    cells = affected_cells(Planner(grid, [item]), 0, Points(np.array([[20]])))
    assert list(cells) == [1, 5]
    # One that promises something is not asked for the cell, but for what holds it.
    nested = InputPlan((40,), Halo.of(0, 1), "none", None, Nested(lambda roi: index_map(None)))
    every = affected_cells(Planner(grid, [nested]), 0, Points(np.array([[20]])))
    assert list(every) == list(range(10))
    assert list(affected_cells(linked((40,), (4,), [(1, 0)]), 0, cells)) == [1, 2, 5, 6]


def test_far_points_of_a_huge_image_are_listed():
    planner = linked((1 << 20,) * 3, (64,) * 3, 8)
    numbers = np.random.default_rng(0)
    coords = numbers.integers(0, 1 << 20, (1000, 3))
    cells = affected_cells(planner, 0, Points(coords))
    expected = set()
    for voxel in coords.tolist():
        sides = [range(max(x - 8, 0) // 64, min((x + 8) // 64, (1 << 14) - 1) + 1) for x in voxel]
        expected |= {
            planner.grid.index((i, j, k)) for i in sides[0] for j in sides[1] for k in sides[2]
        }
    assert isinstance(cells, CellList)
    assert set(cells) == expected
    below = affected_cells(planner, 0, cells)
    assert set(below) == {
        planner.grid.index(place) for index in expected for place in neighbours(planner.grid, index)
    }


def neighbours(grid: ci.CellGrid, index: int) -> Iterator[tuple[int, ...]]:
    """Yield the positions at most one step away along each axis."""
    for step in np.ndindex(3, 3, 3):
        place = tuple(p + s - 1 for p, s in zip(grid.position(index), step, strict=True))
        if all(0 <= p < n for p, n in zip(place, grid.grid_shape, strict=True)):
            yield place


def test_points_that_a_huge_number_of_cells_read_are_asked_cell_by_cell():
    """Scattered points of a plane that is broadcast along an axis of 10⁶ cells."""
    grid = ci.CellGrid((10**6, 10**6, 10**6), 1)
    plane = InputPlan((10**6,) * 2, Halo.of(0, 2), "none", (AxisLink(1), AxisLink(2)))
    rows = np.arange(5000) * 7
    cells = affected_cells(Planner(grid, [plane]), 0, Points(np.stack([rows, rows * 3], axis=1)))
    assert grid.index((12345, 7, 21)) in cells
    assert grid.index((12345, 7, 42)) not in cells


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_large_mask_is_reduced_alike_along_each_axis(axis):
    shape = tuple(60 if n == axis else 30 for n in range(3))
    mask = np.random.default_rng(0).random(shape) < 0.001
    planner = linked((90,) * 3, (7, 5, 9), [(2, 1), (0, 3), (4, 0)])
    cells = affected_cells(planner, 0, VoxelMask((20, 11, 3), mask))
    changed = np.zeros((90,) * 3, bool)
    changed[20 : 20 + shape[0], 11 : 11 + shape[1], 3 : 3 + shape[2]] = mask
    expected = {
        index
        for index in range(planner.grid.num_cells)
        if any(changed[box].any() for box in planner.plan(index).boxes(0))
    }
    assert set(cells) == expected


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("limit", [1, 1 << 22])
def test_an_input_whose_axes_follow_in_another_order(boundary, limit, monkeypatch):
    """Two axes crossed, one that is read whole, and an output axis that none follows."""
    monkeypatch.setattr(dirty_module, "_DENSE", limit)
    shape = (7, 3, 9)
    grid = ci.CellGrid((9, 5, 7), (1, 2, 2))
    links = (AxisLink(2), AxisLink(None), AxisLink(0))
    for halo in [(0, 0, 0), (1, 2, 0), (0, 0, 11)]:
        item = InputPlan(shape, Halo(halo, halo[::-1]), boundary, links)
        planner = Planner(grid, [item])
        for seed in range(5):
            changed = np.random.default_rng(seed).random(shape) < 0.03
            expected = {
                index
                for index in range(grid.num_cells)
                if any(changed[box].any() for box in planner.plan(index).boxes(0))
            }
            assert expected, "something to compare"
            mask = affected_cells(planner, 0, VoxelMask((0, 0, 0), changed))
            agree(mask, grid, expected)
            agree(affected_cells(planner, 0, Points(np.argwhere(changed))), grid, expected)
