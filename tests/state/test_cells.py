"""Sets of cells are the sets they say, and unions are exact and of few parts.

The oracle is Python's own set of flat indices.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.state import cells as cells_module
from cellimg_dask.state.cells import (
    CellList,
    CellMask,
    CellProduct,
    Cells,
    CellTest,
    CellUnion,
    boxes_of,
    distinct,
    listed,
    no_cells,
    runs_of,
    union,
)
from cellimg_dask.state.dirty import cells_meeting, region_of


def box(grid: ci.CellGrid, low: tuple[int, ...], high: tuple[int, ...]) -> CellProduct:
    return CellProduct(grid, [range(a, b) for a, b in zip(low, high, strict=True)])


def check(cells: Cells, expected: set[int]) -> None:
    grid = cells.grid
    assert isinstance(grid, ci.CellGrid)
    assert {index for index in range(grid.num_cells) if index in cells} == expected
    assert sorted(cells) == sorted(expected), "each once"
    last = cells.parts[-1] if isinstance(cells, CellUnion) else cells
    assert len(cells) == (grid.num_cells if isinstance(last, CellTest) else len(expected))
    covered = np.zeros(grid.shape, int)
    for roi in boxes_of(cells):
        assert roi.size > 0
        covered[(*roi.slices, ...)] += 1
    voxels = np.zeros(grid.shape, int)
    for index in expected:
        voxels[(*grid.cell(index).roi.slices, ...)] = 1
    np.testing.assert_array_equal(covered, voxels)


# ------------------------------------------------------------------------------ single sets


def test_a_product_of_positions_is_the_set_of_its_cells():
    grid = ci.CellGrid((10, 9, 8), (3, 2, 5))
    cells = CellProduct(grid, [[0, 3], range(1, 3), [1]])
    check(cells, {grid.index((i, j, 1)) for i in (0, 3) for j in (1, 2)})


def test_a_product_without_axes_is_the_one_cell():
    check(CellProduct(ci.CellGrid((), ()), []), {0})


def test_membership_of_billions_of_cells_is_arithmetic():
    grid = ci.CellGrid((2000 * 64,) * 3, 64)
    cells = cells_meeting(grid, region_of(ci.Roi((0, 0, 0), grid.shape)))
    assert len(cells) == 8 * 10**9
    assert 7 * 10**9 in cells
    assert list(boxes_of(cells)) == [ci.Roi((0, 0, 0), grid.shape)]


def test_a_test_of_cells_is_the_set_of_those_that_pass():
    cells = CellTest(ci.CellGrid((10,), (2,)), lambda index: index % 2 == 0)
    check(cells, {0, 2, 4})
    assert len(cells) == 5, "an upper bound is what deciding how to iterate needs"


def test_a_test_may_pass_the_question_on_and_asks_nothing_twice():
    grid = ci.CellGrid((10,), (1,))
    asked: list[int] = []

    def odd(index: int) -> bool:
        asked.append(index)
        return index % 2 == 1

    bottom = CellTest(grid, odd)
    arms = [
        CellTest(grid, lambda index: [(bottom, max(index - 1, 0)), (bottom, index)])
        for _ in range(2)
    ]
    top = CellTest(grid, lambda index: [(arm, index) for arm in arms])
    check(top, set(range(1, 10)))
    assert sorted(asked) == list(range(10))


def test_a_test_that_fails_is_asked_again():
    calls: list[int] = []

    def shaky(index: int) -> bool:
        calls.append(index)
        if len(calls) == 1:
            raise RuntimeError("no")
        return True

    bottom = CellTest(ci.CellGrid((4,), (1,)), shaky)
    top = CellTest(bottom.grid, lambda index: [(bottom, index)])
    with pytest.raises(RuntimeError):
        2 in top  # noqa: B015
    assert 2 in top


@given(positions=st.sets(st.integers(0, 20)))
def test_runs_of_positions(positions):
    runs = runs_of(sorted(positions))
    assert [p for low, high in runs for p in range(low, high)] == sorted(positions)
    assert all(b < c for (_, b), (c, _) in pairwise(runs))


@given(numbers=st.lists(st.integers(-5, 5)))
def test_distinct_numbers_increase(numbers):
    assert distinct(np.array(numbers, np.int64)).tolist() == sorted(set(numbers))


# ----------------------------------------------------------------------------------- unions


@st.composite
def grids(draw: st.DrawFn) -> ci.CellGrid:
    ndim = draw(st.integers(0, 3))
    shape = [draw(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, 9)) for _ in range(ndim)]
    return ci.CellGrid(shape, [draw(st.integers(1, 3)) for _ in shape])


@st.composite
def sets(draw: st.DrawFn, grid: ci.CellGrid) -> tuple[Cells, set[int]]:
    kind = draw(st.sampled_from(["box", "product", "list", "mask", "test"]))
    if kind in ("box", "product"):
        axes: list[Any] = []
        for n in grid.grid_shape:
            if kind == "box":
                low = draw(st.integers(0, n))
                axes.append(range(low, draw(st.integers(low, n))))
            else:
                axes.append(sorted(draw(st.sets(st.integers(0, max(n - 1, 0))))) if n else [])
        cells: Cells = CellProduct(grid, axes)
        return cells, set(cells)
    share = draw(st.sampled_from([0.1, 0.5, 1]))
    numbers = np.random.default_rng(draw(st.integers(0, 99)))
    indices = np.flatnonzero(numbers.random(grid.num_cells) < share)
    expected = set(indices.tolist())
    if kind == "test":
        return CellTest(grid, lambda index: index in expected), expected
    if kind == "list":
        return CellList(grid, indices), expected
    return listed(grid, indices), expected


@given(data=st.data())
@settings(max_examples=250)
def test_a_union_is_the_union(data):
    """Also where masks are refused and lists avoided, as happens with large sets."""
    grid = data.draw(grids())
    drawn = data.draw(st.lists(sets(grid), max_size=12))
    small = st.sampled_from([2, 1 << 16])
    limits = {name: data.draw(small) for name in ("_SMALL", "_DENSE", "_LARGEST")}
    with patch.multiple(cells_module, **limits):
        cells = union(grid, [part for part, _ in drawn])
        expected = set().union(*(own for _, own in drawn))
        check(cells, expected)
        more = data.draw(sets(grid))
        both = union(grid, [cells, more[0], cells])
        check(both, expected | more[1])
    for found in (cells, both):
        assert not isinstance(found, CellUnion) or len(found.parts) <= 3


def test_a_union_of_nothing_is_empty():
    grid = ci.CellGrid((4, 4), (2, 2))
    check(union(grid, []), set())
    check(union(grid, [no_cells(grid), box(grid, (1, 1), (1, 2))]), set())


def test_a_single_part_comes_back_as_it_is():
    grid = ci.CellGrid((4, 4), (2, 2))
    part = box(grid, (0, 1), (1, 2))
    assert union(grid, [no_cells(grid), part]) is part


def test_what_lies_in_another_part_is_dropped():
    grid = ci.CellGrid((128_000,) * 3, 64)
    whole = box(grid, (0, 0, 0), grid.grid_shape)
    inner = box(grid, (5, 5, 5), (900, 900, 900))
    stepped = CellProduct(grid, [[0, 4, 8], range(2000), [7]])
    scattered = CellList(grid, np.array([5, 7_999_999_999]))
    asked = CellTest(grid, lambda index: True)
    assert union(grid, [inner, stepped, whole, scattered, asked]) is whole


def test_boxes_side_by_side_become_a_product():
    grid = ci.CellGrid((128_000,) * 3, 64)
    parts = [box(grid, (a, 0, 0), (a + 500, 2000, 2000)) for a in (0, 1000, 500)]
    cells = union(grid, parts)
    assert isinstance(cells, CellProduct)
    assert cells.positions[0] == range(1500)
    assert list(boxes_of(cells)) == [ci.Roi((0, 0, 0), (96_000, 128_000, 128_000))]


def test_large_boxes_that_overlap_become_one_mask():
    grid = ci.CellGrid((128_000,) * 3, 64)
    steps = range(0, 50, 5)
    parts = [box(grid, (n, 60 - n, n), (n + 900, 1900 - n, 2000)) for n in steps]
    cells = union(grid, parts)
    assert isinstance(cells, CellMask)
    boxes = list(boxes_of(cells))
    assert len(boxes) < 300
    assert sum(roi.size for roi in boxes) == len(cells) * 64**3
    numbers = np.random.default_rng(0)
    places = numbers.integers(0, 100, (500, 3))
    places[::2] += [850, 1800, 1900]
    for place in places.tolist():
        index = grid.index(place)
        assert (index in cells) == any(index in part for part in parts)


def test_many_small_parts_become_one():
    grid = ci.CellGrid((128_000,) * 3, 64)
    numbers = np.random.default_rng(0)
    corners = numbers.integers(0, 1990, (300, 3)).tolist()
    parts = [box(grid, tuple(c), tuple(n + 3 for n in c)) for c in corners]
    cells = union(grid, parts)
    assert isinstance(cells, CellList)
    assert set(cells) == set().union(*parts)
    whole = box(grid, (0, 0, 0), (1000, 2000, 2000))
    both = union(grid, [cells, whole])
    assert isinstance(both, CellUnion)
    assert len(both.parts) == 2
    outside = set(cells) - {index for index in cells if index in whole}
    assert len(both) == 1000 * 2000 * 2000 + len(outside)
    assert all(index in both for index in cells)


def test_boxes_of_a_list_join_neighbours():
    grid = ci.CellGrid((20, 21), (2, 2))
    indices = [grid.index((i, j)) for i in (3, 4, 5) for j in (9, 10)] + [grid.index((7, 0))]
    cells = CellList(grid, np.array(indices))
    assert sorted(boxes_of(cells), key=lambda roi: roi.start) == [
        ci.Roi((6, 18), (12, 21)),
        ci.Roi((14, 0), (16, 2)),
    ]
