"""The grid's arithmetic against NumPy, dask and a scan of every cell."""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dask.array.core import normalize_chunks
from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.geometry import Cell, CellGrid, Roi

# Extents small enough that every cell of a grid of single voxels can be looked at.
MAX_EXTENT = {0: 0, 1: 60, 2: 12, 3: 7, 4: 5, 5: 3, 6: 3}


@st.composite
def grids(draw: st.DrawFn) -> CellGrid:
    ndim = draw(st.integers(0, 6))
    shape = draw(st.tuples(*[st.integers(0, MAX_EXTENT[ndim])] * ndim))
    cells = draw(st.tuples(*[st.integers(1, MAX_EXTENT[ndim] + 2)] * ndim))
    return CellGrid(shape, cells)


@st.composite
def grids_and_rois(draw: st.DrawFn) -> tuple[CellGrid, Roi]:
    grid = draw(grids())
    start = [draw(st.integers(-5, n + 5)) for n in grid.shape]
    stop = [draw(st.integers(low, n + 8)) for low, n in zip(start, grid.shape, strict=True)]
    return grid, Roi(tuple(start), tuple(stop))


@given(grids())
def test_cells_cover_the_image_exactly_once(grid: CellGrid) -> None:
    times = np.zeros(grid.shape, int)
    for index in range(grid.num_cells):
        times[grid.cell(index).roi.slices] += 1
    assert np.all(times == 1)


@given(grids())
def test_cells_are_truncated_at_the_high_edge_only(grid: CellGrid) -> None:
    for index in range(grid.num_cells):
        cell = grid.cell(index)
        for axis, extent in enumerate(grid.shape):
            nominal = grid.cell_shape[axis]
            assert cell.roi.start[axis] == cell.position[axis] * nominal
            assert cell.shape[axis] == min(nominal, extent - cell.roi.start[axis]) > 0


@given(grids())
def test_index_and_position_are_numpys_ravel_and_unravel(grid: CellGrid) -> None:
    assert grid.num_cells == np.prod(grid.grid_shape, dtype=int)
    for index in range(grid.num_cells):
        position = tuple(int(p) for p in np.unravel_index(index, grid.grid_shape))
        assert grid.position(index) == position
        assert grid.index(position) == index
        if grid.ndim:
            assert grid.index(position) == np.ravel_multi_index(position, grid.grid_shape)
        assert grid.cell(position) == grid.cell(index) == Cell(index, position, grid.roi(position))


@given(grids())
def test_chunks_are_those_of_dask(grid: CellGrid) -> None:
    assert grid.chunks == normalize_chunks(grid.cell_shape, grid.shape)


@given(grids_and_rois())
def test_cells_in_a_roi_are_those_that_a_scan_finds(case: tuple[CellGrid, Roi]) -> None:
    grid, roi = case
    # The flat index of the cell at each voxel, painted by NumPy alone.
    painted = np.zeros(grid.shape, int)
    for axis, size in enumerate(grid.cell_shape):
        steps = np.arange(grid.shape[axis]) // size
        below = np.prod(grid.grid_shape[axis + 1 :], dtype=int)
        painted += (steps * below).reshape(-1, *[1] * (grid.ndim - axis - 1))
    inside = [
        [x for x in range(low, high) if 0 <= x < n]
        for low, high, n in zip(roi.start, roi.stop, grid.shape, strict=True)
    ]
    expected = np.unique(painted[np.ix_(*inside)] if grid.ndim else painted).tolist()

    found = grid.cells_in(roi)
    assert [cell.index for cell in found] == expected
    assert list(found.indices()) == expected
    assert len(found) == len(expected)
    for index in range(grid.num_cells):
        assert (grid.cell(index) in found) == (index in expected)


@given(grids_and_rois())
def test_axis_parts_are_those_that_a_scan_finds(case: tuple[CellGrid, Roi]) -> None:
    grid, roi = case
    inside = roi.clip(grid.shape)
    for axis, n in enumerate(grid.shape):
        low, high, size = inside.start[axis], inside.stop[axis], grid.cell_shape[axis]
        bounds = [(p, p * size, min(p * size + size, n)) for p in range(grid.grid_shape[axis])]
        expected = [
            (
                p,
                slice(max(low, a) - a, min(high, b) - a),
                slice(max(low, a) - low, min(high, b) - low),
            )
            for p, a, b in bounds
            if max(low, a) < min(high, b)
        ]
        assert list(zip(*grid.axis_parts(axis, low, high), strict=True)) == expected


def test_an_image_without_axes_has_one_cell() -> None:
    grid = CellGrid((), ())
    assert (grid.grid_shape, grid.num_cells, grid.chunks) == ((), 1, ())
    assert grid.cell(0) == grid.cell(()) == Cell(0, (), Roi((), ()))
    assert [cell.index for cell in grid.cells_in(Roi((), ()))] == [0]


def test_an_empty_axis_means_no_cells() -> None:
    grid = CellGrid((4, 0, 3), 2)
    assert (grid.grid_shape, grid.num_cells) == ((2, 0, 2), 0)
    assert grid.chunks == ((2, 2), (0,), (2, 1))
    assert list(grid.cells_in(Roi((0, 0, 0), (4, 9, 3)))) == []
    with pytest.raises(IndexError, match=r"no cells: its shape \(4, 0, 3\) is empty"):
        grid.cell(0)
    with pytest.raises(IndexError, match=r"no cells: its shape \(4, 0, 3\) is empty on axis 1"):
        grid.index((0, 0, 0))


def test_one_integer_stands_for_all_axes() -> None:
    assert CellGrid((5, 6, 7), 2) == CellGrid((5, 6, 7), (2, 2, 2))


def test_numpy_integers_become_plain_ones() -> None:
    grid = CellGrid(np.array([5, 6], np.uint8), (np.int64(2), np.array(3)))
    assert grid == CellGrid((5, 6), (2, 3))
    assert all(type(n) is int for n in (*grid.shape, *grid.cell_shape, *grid.grid_shape))
    assert grid.cell(np.int32(3)) == grid.cell((np.int16(1), np.uint8(1)))


def test_a_position_may_be_a_numpy_array() -> None:
    grid = CellGrid((5, 6), 2)
    assert grid.cell(np.array([1, 2])) == grid.cell((1, 2))


def test_grids_are_values() -> None:
    grid = CellGrid((5, 6), (2, 3))
    copy = pickle.loads(pickle.dumps(grid))
    assert copy == grid
    assert copy.num_cells == grid.num_cells
    assert len({grid, copy, CellGrid((5, 6), (2, 4))}) == 2
    with pytest.raises(AttributeError):
        grid.shape = (1, 1)  # type: ignore[misc]


# ---------------------------------------------------------------- a grid of 8·10⁹ cells


def lines_run(work: Callable[[], Any]) -> int:
    """Count the lines of Python that ``work`` executes, calls included."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    # The collector would run finalisers of other tests' images.
    gc.disable()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


@pytest.mark.parametrize(
    "work",
    [
        lambda n: CellGrid((n * 64,) * 3, 64),
        lambda n: CellGrid((n * 64,) * 3, 64).cell(n**3 - 1),
        lambda n: CellGrid((n * 64,) * 3, 64).cell((n - 1,) * 3),
        lambda n: CellGrid((n * 64,) * 3, 64).index((n - 1, 0, n - 1)),
        lambda n: CellGrid((n * 64,) * 3, 64).position(n**3 - 2),
        lambda n: len(CellGrid((n * 64,) * 3, 64).cells_in(Roi((0,) * 3, (n * 64,) * 3))),
        lambda n: list(
            CellGrid((n * 64,) * 3, 64).cells_in(Roi((n * 64 - 65,) * 3, (n * 64,) * 3))
        ),
        lambda n: (
            CellGrid((n * 64,) * 3, 64).cell(n**3 - 1)
            in CellGrid((n * 64,) * 3, 64).cells_in(Roi((0,) * 3, (n * 64,) * 3))
        ),
        lambda n: list(CellGrid((n * 64,) * 3, 64).axis_parts(0, n * 64 - 65, n * 64)),
        lambda n: repr(CellGrid((n * 64,) * 3, 64)),
    ],
    ids=["make", "cell", "cell at", "index", "position", "len", "far end", "in", "axis", "repr"],
)
def test_8e9_cells_take_the_steps_that_8_take(work: Callable[[int], Any]) -> None:
    assert lines_run(lambda: work(2000)) == lines_run(lambda: work(2)) < 1000


def test_the_far_end_of_8e9_cells() -> None:
    grid = CellGrid((2000 * 64,) * 3, 64)
    assert grid.num_cells == 8_000_000_000
    last = grid.cell(grid.num_cells - 1)
    assert last.position == (1999, 1999, 1999)
    assert last.roi == Roi((127_936,) * 3, (128_000,) * 3)
    near = grid.cells_in(Roi((127_935,) * 3, (200_000,) * 3))
    assert [cell.position for cell in near] == [
        (1998 + z, 1998 + y, 1998 + x) for z in (0, 1) for y in (0, 1) for x in (0, 1)
    ]
    assert [cell.index for cell in near] == [
        int(np.ravel_multi_index(cell.position, (2000,) * 3)) for cell in near
    ]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shape", "cell_shape", "error", "says"),
    [
        ((4, -1), 2, ValueError, r"shape\[1\] must be at least 0, got -1"),
        ((4.0, 1), 2, TypeError, r"shape\[0\] must be an integer, got 4\.0 of type float"),
        ((4, np.float32(3)), 2, TypeError, r"shape\[1\] must be an integer, got .*3\.0"),
        ((4, True), 2, TypeError, r"shape\[1\] must be an integer, got the boolean True"),
        (("4",), 2, TypeError, r"shape\[0\] must be an integer, got '4'"),
        ("44", 2, TypeError, r"shape must be a sequence of integers, got '44'"),
        (4, 2, TypeError, r"shape must be a sequence of integers, got 4"),
        ((4, 4), 0, ValueError, r"cell_shape must be at least 1, got 0"),
        ((4, 4), (2, 0), ValueError, r"cell_shape\[1\] must be at least 1, got 0"),
        ((4, 4), (-2, 2), ValueError, r"cell_shape\[0\] must be at least 1, got -2"),
        ((4, 4), 2.0, TypeError, r"cell_shape must be an integer, got 2\.0 of type float"),
        ((4, 4), (2, 2.5), TypeError, r"cell_shape\[1\] must be an integer, got 2\.5"),
        ((4, 4), None, TypeError, r"cell_shape must be an integer, got None"),
        ((4, 4), (2,), ValueError, r"cell_shape must have one value for each of 2 axes, got 1"),
        ((4, 4), (2, 2, 2), ValueError, r"one value for each of 2 axes, got 3: \(2, 2, 2\)"),
        ((), (1,), ValueError, r"one value for each of 0 axes, got 1"),
    ],
)
def test_a_wrong_grid_is_refused(
    shape: Any, cell_shape: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        CellGrid(shape, cell_shape)


@pytest.mark.parametrize(
    ("where", "error", "says"),
    [
        (6, IndexError, r"cell index 6 .* allowed is 0\.\.5"),
        (-1, IndexError, r"cell index -1 .* allowed is 0\.\.5"),
        (1.0, TypeError, r"cell index must be an integer, got 1\.0"),
        (None, TypeError, r"cell index must be an integer, got None"),
        ((3, 0), IndexError, r"position\[0\] = 3 .* allowed is 0\.\.2"),
        ((0, -1), IndexError, r"position\[1\] = -1 .* allowed is 0\.\.1"),
        ((0, 0, 0), IndexError, r"position \(0, 0, 0\) has 3 axes, the grid has 2"),
        ((0, 1.5), TypeError, r"position\[1\] must be an integer, got 1\.5"),
    ],
)
def test_a_cell_that_is_not_there_is_refused(where: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CellGrid((5, 4), 2).cell(where)


def test_a_roi_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape has 2 axes, this Roi has 1"):
        CellGrid((5, 4), 2).cells_in(Roi((0,), (1,)))
