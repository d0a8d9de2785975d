"""The order of a run: every cell once, neighbours soon after each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.batch.order import neighbours_together
from cellimg_dask.geometry import CellGrid


@given(st.lists(st.integers(0, 6), max_size=4), st.data())
def test_every_cell_comes_once(shape, data):
    grid = CellGrid(tuple(shape), 1)
    some = data.draw(st.sets(st.integers(0, grid.num_cells - 1)) if grid.num_cells else st.just(()))
    order = neighbours_together(grid, sorted(some))
    assert sorted(order) == sorted(some)
    assert all(type(index) is int for index in order)


@given(st.integers(2, 3), st.integers(1, 3))
def test_cubes_of_cells_come_together(ndim, level):
    size = 2**level
    grid = CellGrid((2 * size,) * ndim, 1)
    order = neighbours_together(grid, range(grid.num_cells))
    per_cube = size**ndim
    for first in range(0, grid.num_cells, per_cube):
        places = np.array([grid.position(index) for index in order[first : first + per_cube]])
        assert (np.ptp(places, axis=0) == size - 1).all()


@pytest.mark.parametrize("shape", [(), (5,), (2**40, 2, 2, 2)])
def test_where_no_order_is_better_it_stays(shape):
    grid = CellGrid(shape, 1)
    indices = [0] if shape == () else [4, 2, 3]
    assert neighbours_together(grid, indices) == indices


def test_a_million_cells():
    grid = CellGrid((100, 100, 100), 1)
    order = neighbours_together(grid, range(grid.num_cells))
    assert np.array_equal(np.sort(order), np.arange(grid.num_cells))
