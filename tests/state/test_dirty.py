"""`invalidate` reaches the cells that read a changed voxel, and for plain maps no others.

The oracle knows nothing of intervals: it numbers the voxels of the source, extends the numbers
with `numpy.pad`, cuts out what each cell reads, and looks whether a changed number is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.geometry import BOUNDARIES
from cellimg_dask.state.dirty import (
    CellProduct,
    CellTest,
    cells_meeting,
    merge_regions,
    region_of,
    touched_region,
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
    plain: bool = True
    """Whether the map separates over the axes, so that the library must be exact."""

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
    exact = True
    for stage in later:
        hit = stage.cells_hit(changed)
        # A cell is computed anew as a whole, so all of its voxels count as changed.
        changed[id(stage)] = stage.voxels_of(hit)
        survivors = stage.held()
        everything = set(range(stage.img.grid.num_cells))
        assert not survivors & hit, "a cell that reads a changed voxel survived"
        if exact:
            assert survivors == everything - hit, "a cell that reads none was dropped"
        # After a map that need not be exact, too many cells may be dropped further down.
        exact = exact and stage.plain


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
        boundary=draw(st.sampled_from(BOUNDARIES)),
        cell_shape=cell_shape,
        factors=factors,
        dropped=sorted(dropped),
        added=added,
    )


# --------------------------------------------------------------------------------- the tests


@given(data=st.data())
@settings(max_examples=300)
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
    return source, Stage(img, [source], [reads])


@given(data=st.data())
@settings(max_examples=150)
def test_broadcast_inputs_drop_what_the_oracle_says(data):
    source, stage = data.draw(broadcasts())
    later = [stage]
    if data.draw(st.booleans()):
        later.append(data.draw(filters(stage)))
    check(source, later, data.draw(rois(source.img.shape)))


def shifted(offset: Sequence[int]) -> Callable[[ci.Roi], ci.Roi]:
    return lambda roi: roi.shift(offset)


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
    return source, Stage(img, [source], [reads], plain=False)


@given(data=st.data())
@settings(max_examples=150)
def test_index_maps_drop_what_the_oracle_says(data):
    source, stage = data.draw(mapped())
    later = [stage]
    if data.draw(st.booleans()):
        later.append(data.draw(filters(stage)))
    check(source, later, data.draw(rois(source.img.shape)))


@given(data=st.data())
@settings(max_examples=150)
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
    """Ten diamonds in a row have 2^10 ways from end to end; the work grows with the images."""
    calls: list[int] = []
    cache = ci.CellCache(1 << 22)
    first = image = make_source((32,), (4,), cache).img
    images = [image]
    for _ in range(10):
        left = ci.map_cells(np.negative, image, cache=cache)
        right = ci.map_cells(np.negative, image, cache=cache)
        image = ci.map_cells(np.add, left, right, cache=cache)
        images += [left, right, image]
    whole = image[:]
    for step in images:
        original = step.loader.shelf.invalidate

        def counted(indices: Any, original: Callable[[Any], None] = original) -> None:
            calls.append(1)
            original(indices)

        step.loader.shelf.invalidate = counted  # type: ignore[method-assign]
    first.invalidate(np.s_[5:6])
    assert all([n for n in range(8) if step.peek(n) is None] == [1] for step in images)
    # Both sides of a diamond say the same, so no image hears of more than its two inputs.
    assert len(calls) <= 2 * len(images)
    np.testing.assert_array_equal(image[:], whole)


# ---------------------------------------------------------------------------- the small parts


def test_a_product_of_positions_is_the_set_of_its_cells():
    grid = ci.CellGrid((10, 9, 8), (3, 2, 5))
    cells = CellProduct(grid, [[0, 3], range(1, 3), [1]])
    expected = {grid.index((i, j, 1)) for i in (0, 3) for j in (1, 2)}
    assert set(cells) == expected
    assert len(cells) == len(expected) == 4
    assert {index for index in range(grid.num_cells) if index in cells} == expected


def test_a_product_without_axes_is_the_one_cell():
    cells = CellProduct(ci.CellGrid((), ()), [])
    assert list(cells) == [0]
    assert len(cells) == 1
    assert 0 in cells


def test_membership_of_billions_of_cells_is_arithmetic():
    grid = ci.CellGrid((2000 * 64,) * 3, 64)
    region = region_of(ci.Roi((0, 0, 0), grid.shape))
    cells = cells_meeting(grid, region)
    assert len(cells) == 8 * 10**9
    assert 7 * 10**9 in cells
    assert touched_region(cells) == region


def test_a_test_of_cells_is_the_set_of_those_that_pass():
    grid = ci.CellGrid((10,), (2,))
    cells = CellTest(grid, lambda index: index % 2 == 0)
    assert list(cells) == [0, 2, 4]
    assert 2 in cells
    assert 3 not in cells
    assert len(cells) == 5, "an upper bound is what deciding how to iterate needs"
    assert touched_region(cells) == (((0, 10),),)


@given(data=st.data())
def test_cells_meeting_a_region_are_those_that_share_a_voxel(data):
    shape, cell_shape = data.draw(geometries())
    grid = ci.CellGrid(shape, cell_shape)
    region = []
    mask = np.ones(shape, bool)
    for axis, n in enumerate(shape):
        cuts = sorted(data.draw(st.sets(st.integers(-2, n + 2), max_size=4)))
        intervals = tuple(zip(cuts[::2], cuts[1::2], strict=False))
        line = np.zeros(n, bool)
        for low, high in intervals:
            line[max(low, 0) : max(high, 0)] = True
        mask &= line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        region.append(intervals)
    expected = {
        index
        for index, (low, high) in enumerate(boxes(grid))
        if mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].any()
    }
    cells = cells_meeting(grid, tuple(region))
    assert set(cells) == expected
    touched = np.ones(shape, bool)
    for axis, intervals in enumerate(touched_region(cells)):
        line = np.zeros(shape[axis], bool)
        for low, high in intervals:
            line[low:high] = True
        touched &= line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    voxels = np.zeros(shape, bool)
    for index in expected:
        low, high = boxes(grid)[index]
        voxels |= mask_of(shape, low, high)
    np.testing.assert_array_equal(touched, voxels)


def test_merging_keeps_few_regions_apart_and_covers_many():
    few = [(((n, n + 1),),) for n in range(0, 16, 2)]
    assert merge_regions([*few, few[0]]) == few
    many = [(((n, n + 1), (n + 3, n + 4)),) for n in range(0, 40, 2)]
    assert merge_regions(many) == [(((0, 42),),)]
    assert merge_regions([((),)]) == [], "what is empty is nothing"
    assert merge_regions([()]) == [()], "an image without axes has one voxel"
