"""Tables of blobs from overlapped blocks: none lost, none twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellimg_dask.ops.blobs import merge_blobs, prune_blobs
from cellimg_dask.ops.stacks import split_stack

# ---------------------------------------------------------------- merging


@st.composite
def grids(draw: st.DrawFn) -> tuple[NDArray[np.object_], int]:
    """Tables of a grid of 1 to 5 axes, and how many columns they have."""
    ndim = draw(st.integers(1, 5))
    shape = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    columns = ndim + draw(st.integers(0, 3))
    counts = draw(st.lists(st.integers(-1, 3), min_size=prod(shape), max_size=prod(shape)))
    tables = np.empty(len(counts), object)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    for number, count in enumerate(counts):
        # Without any row, None or a table that nobody gave a dtype.
        tables[number] = None if count < 0 else np.empty((0, columns))
        if count > 0:
            tables[number] = rng.integers(0, 99, (count, columns)).astype("f4")
    return tables.reshape(shape), columns


@settings(max_examples=60)
@given(grid=grids(), form=st.sampled_from(["array", "lists", "mapping", "pairs"]))
def test_merged_tables_hold_each_row_and_where_it_was_found(
    grid: tuple[NDArray[np.object_], int], form: str
) -> None:
    tables, columns = grid
    expected = [
        [*row, *place]
        for place in np.ndindex(tables.shape)
        for row in (() if tables[place] is None else tables[place].tolist())
    ]
    given: Any = {
        "array": tables,
        "lists": tables.tolist(),
        "mapping": {place: tables[place] for place in np.ndindex(tables.shape)},
        "pairs": ((place, tables[place]) for place in np.ndindex(tables.shape)),
    }[form]
    merged = merge_blobs(given)
    if all(table is None for table in tables.flat):
        columns = tables.ndim
    assert merged.shape == (len(expected), columns + tables.ndim)
    assert merged.tolist() == expected
    if expected:
        assert merged.dtype == np.dtype("f4")


@pytest.mark.parametrize(
    ("tables", "dtype"),
    [
        ([np.zeros((1, 3), "u1")], "u1"),
        ([np.zeros((1, 3), "i1")], "i2"),
        ([np.zeros((1, 3), "u1"), None] * 200, "u2"),
        ([np.zeros((1, 3), "f2")] * 300, "f4"),
        ([np.zeros((1, 3), "i8"), np.zeros((0, 3))], "i8"),
        ([np.zeros((1, 3), "i8"), np.zeros((1, 3), "f4")], "f8"),
        ([np.zeros((1, 3), ">f4")], "f4"),
        ([np.zeros((0, 3), "f4"), None], "f4"),
        ([None, None], "f8"),
        ([np.array([])], "f8"),
    ],
)
def test_the_dtype_holds_all_values_and_positions(tables: list[Any], dtype: str) -> None:
    merged = merge_blobs(tables)
    assert merged.dtype == np.dtype(dtype)
    assert merged.dtype.isnative
    expected = [p for p, table in enumerate(tables) if table is not None and len(table)]
    assert merged[:, -1].tolist() == expected


def test_offsets_make_coordinates_those_of_the_stack() -> None:
    shape = (300, 500)
    points = np.array([[3, 4], [255, 256], [299, 499], [128, 130]])
    slices, offsets = split_stack(shape, (100, 128))
    tables = np.empty(slices.shape, object)
    for place in np.ndindex(slices.shape):
        inside = [part.start <= points[:, axis] for axis, part in enumerate(slices[place])]
        inside += [points[:, axis] < part.stop for axis, part in enumerate(slices[place])]
        local = points[np.all(inside, axis=0)] - offsets[place]
        tables[place] = np.column_stack([local, 7 * np.ones(len(local))]).astype("u1")
    merged = merge_blobs(tables, offsets)
    assert merged.dtype == np.int64
    assert sorted(merged[:, :2].tolist()) == sorted(points.tolist())
    assert set(merged[:, 2]) == {7}
    assert (merged[:, :2] // (100, 128) == merged[:, 3:]).all()
    # Near the end of a large stack a float of 4 bytes would move a point.
    far = merge_blobs([np.array([[0.1]], "f4")], offsets=[[1 << 24]])
    assert far[0, 0] == (1 << 24) + np.float64(np.float32(0.1))


@pytest.mark.parametrize(
    ("tables", "offsets", "error", "says"),
    [
        (
            [[np.zeros((1, 3)), np.zeros((1, 4))]],
            None,
            ValueError,
            r"at \(0, 1\) has 4 columns, expected 3",
        ),
        ([[np.zeros((1, 1))]], None, ValueError, r"at \(0, 0\) has 1 columns, .* least 2 coord"),
        ([[np.zeros(3)]], None, ValueError, r"at \(0, 0\) has float64 of shape \(3,\), expected"),
        ([[np.zeros((1, 3), object)]], None, ValueError, r"at \(0, 0\) has object of shape"),
        (np.zeros((3, 4)), None, TypeError, "blob_blocks must be an object array .* lists"),
        ([np.zeros((1, 3))], [[0, 0]], ValueError, r"offsets .* shape \(1, 1\), .* \(1, 2\)"),
        ([np.zeros((1, 3))], [[0.0]], ValueError, "offsets must be integers .* got float64"),
        (iter([((1,), np.zeros((1, 3)))]), [[0]], ValueError, r"at \(1,\) lies outside offsets"),
        (iter([((1,), None), ((1, 2), None)]), None, ValueError, r"\(1, 2\) .* 2 axes, not 1"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tables: Any, offsets: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        merge_blobs(tables, offsets)


# ---------------------------------------------------------------- pruning


def found_in_blocks(
    points: NDArray[np.float64],
    shape: tuple[int, ...],
    max_pixels: Any,
    overlap: Any,
    side: str = "after",
    jitter: Callable[[int], NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """What a detector finds that sees each point in each block, or next to where it is.

    The third column from the coordinates on is the number of the point.
    """
    slices, offsets = split_stack(shape, max_pixels, overlap, side)
    tables = np.empty(slices.shape, object)
    for place in np.ndindex(slices.shape):
        low = np.array([part.start for part in slices[place]])
        high = np.array([part.stop for part in slices[place]])
        (seen,) = np.nonzero(((points >= low) & (points < high)).all(axis=1))
        coords = points[seen] - low
        if jitter is not None:
            coords = coords + jitter(len(seen))
        tables[place] = np.column_stack([coords, seen])
    return merge_blobs(tables, offsets)


def numbers(table: NDArray[Any], ndim: int) -> list[int]:
    return sorted(table[:, ndim].astype(int).tolist())


@pytest.mark.parametrize("tol", [None, 5, (5, 5, 5)])
@pytest.mark.parametrize("side", ["after", "before", "both"])
@pytest.mark.parametrize("max_pixels", [25, 8, (50, 13, 100)])
def test_a_perfect_detector_loses_none_of_400_points_and_finds_none_twice(
    max_pixels: Any, side: str, tol: Any, rng: np.random.Generator
) -> None:
    # Pruning by a box around each blob loses 91 of 400 here, and with small blocks leaves
    # hundreds of duplicates.
    shape = (100, 100, 100)
    points = rng.uniform(0, 100, (400, 3))
    found = found_in_blocks(points, shape, max_pixels, 5, side)
    assert len(found) > 400
    pruned = prune_blobs(found, shape, max_pixels, tol)
    assert numbers(pruned, 3) == list(range(400))
    # Nothing is moved either.
    np.testing.assert_allclose(pruned[np.argsort(pruned[:, 3]), :3], points, rtol=0, atol=1e-12)


@settings(max_examples=60)
@given(data=st.data())
def test_a_perfect_detector_is_exact_in_any_number_of_axes(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 4))
    shape = data.draw(st.tuples(*[st.integers(1, 20)] * ndim))
    max_pixels = data.draw(st.tuples(*[st.integers(1, 9)] * ndim))
    widths = st.integers(0, 12)
    overlap = data.draw(st.tuples(*[st.tuples(widths, widths)] * ndim))
    points = np.array(
        [[data.draw(st.integers(0, 2 * n - 1)) / 2 for n in shape] for _ in range(12)]
    )
    found = found_in_blocks(points, shape, max_pixels, overlap)
    assert numbers(prune_blobs(found, shape, max_pixels), ndim) == list(range(12))


def apart(
    rng: np.random.Generator, shape: tuple[int, ...], gap: float, count: int
) -> NDArray[np.float64]:
    """Random points farther apart than ``gap``."""
    points = np.empty((0, len(shape)))
    while len(points) < count:
        one = rng.uniform(0, shape)
        if len(points) == 0 or np.linalg.norm(points - one, axis=1).min() > gap:
            points = np.vstack([points, one])
    return points


@pytest.mark.parametrize("side", ["after", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_with_jitter_none_is_lost_and_none_is_left_twice(seed: int, side: str) -> None:
    rng = np.random.default_rng(seed)
    tol = 2 * np.sqrt(3)
    shape = (60, 130, 130)
    points = apart(rng, shape, tol + 2, 1800)
    found = found_in_blocks(
        points, shape, (20, 33, 47), 6, side, lambda n: rng.integers(-1, 2, (n, 3))
    )
    kept = numbers(prune_blobs(found, shape, (20, 33, 47), tol), 3)
    assert kept == list(range(1800))
    own = numbers(prune_blobs(found, shape, (20, 33, 47)), 3)
    # Ownership alone is for detectors without jitter.
    assert len(own) > len(set(own))
    assert len(set(own)) < 1800


@settings(max_examples=40)
@given(data=st.data())
def test_with_jitter_in_any_number_of_axes(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 4))
    jitter = data.draw(st.sampled_from([0.25, 1.0]))
    tol = 2 * jitter * np.sqrt(ndim)
    wide = int(np.ceil(tol))
    shape = data.draw(st.tuples(*[st.integers(1, 40)] * ndim))
    max_pixels = data.draw(st.tuples(*[st.integers(max(2, wide), 15)] * ndim))
    widths = st.integers(wide, wide + 9)
    side = data.draw(st.sampled_from(["after", "before", "both"]))
    overlap = data.draw(st.tuples(*[widths] * ndim))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    spread = rng.uniform(0, shape, (60, ndim))
    points = spread[:1]
    for one in spread[1:]:
        # Each may move by the jitter along each axis.
        if np.abs(points - one).max(axis=1).min() > tol + 2 * jitter:
            points = np.vstack([points, one])
    found = found_in_blocks(
        points, shape, max_pixels, overlap, side, lambda n: rng.uniform(-jitter, jitter, (n, ndim))
    )
    kept = prune_blobs(found, shape, max_pixels, tol)
    assert numbers(kept, ndim) == list(range(len(points)))


def test_objects_that_are_closer_than_tol_stay_two_where_a_block_saw_both() -> None:
    # Two on either side of the border at 10, each found by both blocks.
    found = merge_blobs([np.array([[9.0], [11.0]]), np.array([[9.25], [11.25]])])
    assert prune_blobs(found, (20,), 10, tol=3).tolist() == [[9.0, 0], [11.25, 1]]


def test_of_copies_the_one_deepest_in_its_own_core_is_kept_as_it_is() -> None:
    found = merge_blobs([np.array([[10.75, 5.0]]), np.array([[10.5, 6.0]])])
    assert prune_blobs(found[:, [0, 1, 2]], (20,), 10, tol=1).tolist() == [[10.5, 6.0, 1.0]]
    # On the border itself it belongs to the block that begins there.
    found = merge_blobs([np.array([[10.0]]), np.array([[10.0]])])
    for tol in (None, 1):
        assert prune_blobs(found, (20,), 10, tol).tolist() == [[10.0, 1.0]]


def test_what_one_block_alone_found_just_outside_its_core_is_kept_and_farther_not() -> None:
    found = merge_blobs([np.array([[10.75], [13.0]]), None])
    assert prune_blobs(found, (20,), 10, tol=1).tolist() == [[10.75, 0.0]]
    assert prune_blobs(found, (20,), 10).tolist() == []


def test_beyond_the_border_of_the_stack_the_last_block_owns() -> None:
    found = merge_blobs([[np.array([[-1.5, 3.0]]), np.array([[2.0, 20.5]])]])
    for tol in (None, 1):
        assert len(prune_blobs(found, (5, 20), 10, tol)) == 2


def test_a_tolerance_per_axis_is_an_ellipsoid() -> None:
    # Three apart along the first axis, one along the second.
    tables = [[np.array([[2.0, 9.0]]), np.array([[5.0, 10.0]])]]
    found = merge_blobs(tables)
    assert len(prune_blobs(found, (20, 20), (20, 10), tol=(4, 2))) == 1
    assert len(prune_blobs(found, (20, 20), (20, 10), tol=(3, 2))) == 2


def test_four_blocks_around_a_corner_find_one() -> None:
    rng = np.random.default_rng(1)
    tables = np.empty((2, 2), object)
    for place in product(range(2), repeat=2):
        tables[place] = 10 + rng.uniform(-1, 1, (1, 2))
    assert len(prune_blobs(merge_blobs(tables), (20, 20), 10, tol=3)) == 1


@pytest.mark.parametrize("tol", [None, 2])
@pytest.mark.parametrize("shape", [(20, 10), (0, 10)])
def test_no_blobs_stay_none(tol: Any, shape: tuple[int, int]) -> None:
    none = merge_blobs([[None, np.empty((0, 3), "f4")]])
    pruned = prune_blobs(none, shape, 10, tol)
    assert pruned.shape == (0, 5)
    assert pruned.dtype == np.dtype("f4")


@pytest.mark.parametrize(
    ("blobs", "tol", "says"),
    [
        (np.zeros((3, 3)), None, r"shape \(blobs, columns\) with at least 4 .* got \(3, 3\)"),
        (np.zeros(4), None, r"shape \(blobs, columns\) with at least 4"),
        ([[0, 0, 0, 0], [np.nan, 0, 0, 0]], None, "blob 1 has coordinates that are not finite"),
        ([[0, 0, 0, 2]], None, r"blob 0 has \[0.*, 2.*\] .* grid of \(2, 2\) in the last 2"),
        ([[0, 0, 0, -1]], None, "blob 0 has .* as merge_blobs appends"),
        ([[0, 0, 0, 0.5]], None, "blob 0 has .* as merge_blobs appends"),
        ([[0, 0, 0, np.nan]], None, "blob 0 has .* as merge_blobs appends"),
        (np.zeros((1, 4)), 0, "tol must be a positive number, .* each of 2 axes; got 0"),
        (np.zeros((1, 4)), (1, 2, 3), "tol must be a positive number"),
        (np.zeros((1, 4)), np.inf, "tol must be a positive number"),
    ],
)
def test_tables_that_are_not_merged_ones_are_refused(blobs: Any, tol: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prune_blobs(blobs, (20, 20), 10, tol)
