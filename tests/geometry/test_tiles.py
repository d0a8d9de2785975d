"""Cutting a box into the parts that lie in the cells of a grid."""

from __future__ import annotations

import numpy as np
import pytest
from dask.array.core import slices_from_chunks
from hypothesis import example, given
from hypothesis import strategies as st

from cellimg_dask.geometry import CellGrid, IrregularGrid, tiles

MAX_EXTENT = {0: 0, 1: 40, 2: 10, 3: 6, 4: 4, 5: 3}


@st.composite
def regular(draw: st.DrawFn) -> CellGrid:
    ndim = draw(st.integers(0, 5))
    return CellGrid(
        draw(st.tuples(*[st.integers(0, MAX_EXTENT[ndim])] * ndim)),
        draw(st.tuples(*[st.integers(1, MAX_EXTENT[ndim] + 2)] * ndim)),
    )


@st.composite
def irregular(draw: st.DrawFn) -> IrregularGrid:
    sizes = st.lists(st.integers(0, 4), min_size=1, max_size=4)
    return IrregularGrid(draw(st.lists(sizes, max_size=3)))


@st.composite
def boxes(
    draw: st.DrawFn, grids: st.SearchStrategy[CellGrid | IrregularGrid]
) -> tuple[CellGrid | IrregularGrid, list[int], list[int]]:
    grid = draw(grids)
    low = [draw(st.integers(0, n)) for n in grid.shape]
    high = [draw(st.integers(a, n)) for a, n in zip(low, grid.shape, strict=True)]
    return grid, low, high


def cell_arrays(grid: CellGrid | IrregularGrid, image: np.ndarray) -> list[np.ndarray]:
    """Cut an image into its cells, in C order, as dask does."""
    return [image[part] for part in slices_from_chunks(grid.chunks)]


@given(st.one_of(boxes(regular()), boxes(irregular())))
@example((IrregularGrid([[0, 2, 0, 0, 3, 0]]), [0], [5]))
@example((IrregularGrid([[0, 2, 0, 3]]), [2], [5]))
@example((IrregularGrid([[0]]), [0], [0]))
@example((IrregularGrid([]), [], []))
def test_parts_cover_a_box_exactly_once(
    case: tuple[CellGrid | IrregularGrid, list[int], list[int]],
) -> None:
    grid, low, high = case
    image = np.arange(np.prod(grid.shape, dtype=int)).reshape(grid.shape)
    cells = cell_arrays(grid, image) if 0 not in grid.shape else []
    expected = image[tuple(map(slice, low, high))]

    count, parts = tiles(grid, low, high)
    listed = list(parts)
    assert count == len(listed)
    assert len({index for index, _, _ in listed}) == count
    box = np.full(expected.shape, -1)
    times = np.zeros(expected.shape, int)
    for index, source, target in listed:
        if expected.size:
            box[target] = cells[index][source]
        times[target] += 1
    assert np.all(times == 1)
    np.testing.assert_array_equal(box, expected)


@given(boxes(regular()))
def test_only_cells_that_share_a_voxel_are_named(
    case: tuple[CellGrid, list[int], list[int]],
) -> None:
    grid, low, high = case
    _, parts = tiles(grid, low, high)
    for _, source, target in parts:
        for part in (*source, *target):
            assert 0 <= part.start < part.stop


@given(irregular())
def test_an_irregular_grid_is_dasks(grid: IrregularGrid) -> None:
    boxes = slices_from_chunks(grid.chunks)
    assert grid.shape == tuple(map(sum, grid.chunks))
    assert grid.grid_shape == tuple(map(len, grid.chunks))
    for index, box in enumerate(boxes):
        position = grid.position(index)
        assert position == tuple(np.unravel_index(index, grid.grid_shape))
        assert grid.slices(position) == box


@given(st.integers(1, 9), st.integers(1, 30))
def test_a_regular_grid_and_the_same_chunks_give_the_same_parts(size: int, extent: int) -> None:
    grid = CellGrid((extent, extent), size)
    same = IrregularGrid(grid.chunks)
    low, high = (extent // 3, 0), (extent, extent // 2)
    assert list(tiles(grid, low, high)[1]) == list(tiles(same, low, high)[1])


def test_counting_the_parts_makes_none_of_them() -> None:
    grid = CellGrid((2000 * 64,) * 3, 64)
    count, parts = tiles(grid, (0, 0, 127_000), (1, 1, 128_000))
    assert count == 16
    first, source, target = next(parts)
    assert first == grid.index((0, 0, 127_000 // 64))
    assert source == (slice(0, 1), slice(0, 1), slice(127_000 % 64, 64))
    assert target == (slice(0, 1), slice(0, 1), slice(0, 64 - 127_000 % 64))


def test_a_box_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        tiles(CellGrid((4, 4), 2), (0, 0), (1,))
