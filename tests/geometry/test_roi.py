"""Boxes against sets of points, and index expressions against NumPy's indexing."""

from __future__ import annotations

import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.geometry import Halo, Roi, parse_index

Point = tuple[int, ...]
axes = st.integers(0, 4)
coordinates = st.integers(-4, 4)
widths = st.integers(0, 3)


@st.composite
def rois(draw: st.DrawFn, ndim: int) -> Roi:
    start = draw(st.tuples(*[coordinates] * ndim))
    extent = draw(st.tuples(*[st.integers(0, 4)] * ndim))
    return Roi(start, tuple(a + n for a, n in zip(start, extent, strict=True)))


def points(roi: Roi) -> set[Point]:
    return set(product(*map(range, roi.start, roi.stop)))


@given(axes.flatmap(rois))
def test_shape_and_size_count_points(roi: Roi) -> None:
    assert roi.size == len(points(roi))
    assert roi.shape == tuple(len(range(a, b)) for a, b in zip(roi.start, roi.stop, strict=True))
    assert roi.ndim == len(roi.shape)


@given(axes.flatmap(lambda ndim: st.tuples(rois(ndim), rois(ndim))))
def test_intersect_is_the_common_points(pair: tuple[Roi, Roi]) -> None:
    one, other = pair
    common = one.intersect(other)
    assert points(common) == points(one) & points(other)
    for axis in range(one.ndim):
        here = range(one.start[axis], one.stop[axis])
        meeting = [x for x in range(other.start[axis], other.stop[axis]) if x in here]
        assert common.shape[axis] == len(meeting)


@given(axes.flatmap(lambda ndim: st.tuples(rois(ndim), rois(ndim))))
def test_contains_is_superset(pair: tuple[Roi, Roi]) -> None:
    one, other = pair
    assert one.contains(other) == (points(one) >= points(other))
    assert one.contains(one.intersect(other))


@given(axes.flatmap(lambda n: st.tuples(rois(n), st.tuples(*[st.tuples(widths, widths)] * n))))
def test_grow_adds_the_neighbours(case: tuple[Roi, tuple[tuple[int, int], ...]]) -> None:
    roi, halo = case
    grown = roi.grow(Halo.of(halo, roi.ndim))
    # Along each axis the points of the box and those within reach of its two ends.
    per_axis = [
        {x for x in range(-20, 20) if a - before <= x < b + after}
        for (a, b), (before, after) in zip(zip(roi.start, roi.stop, strict=True), halo, strict=True)
    ]
    assert points(grown) == set(product(*per_axis))
    if roi.size:
        steps = list(product(*[range(-before, after + 1) for before, after in halo]))
        reached = {
            tuple(x + s for x, s in zip(point, step, strict=True))
            for point in points(roi)
            for step in steps
        }
        assert points(grown) == reached


@given(axes.flatmap(lambda n: st.tuples(rois(n), st.tuples(*[st.integers(0, 5)] * n))))
def test_clip_keeps_the_points_of_the_image(case: tuple[Roi, tuple[int, ...]]) -> None:
    roi, shape = case
    clipped = roi.clip(shape)
    assert points(clipped) == points(roi) & points(Roi.of_shape(shape))
    for low, high, extent in zip(clipped.start, clipped.stop, shape, strict=True):
        assert 0 <= low <= high <= extent


@given(axes.flatmap(lambda ndim: st.tuples(rois(ndim), st.tuples(*[coordinates] * ndim))))
def test_shift_moves_every_point(case: tuple[Roi, Point]) -> None:
    roi, offset = case
    moved = {tuple(x + d for x, d in zip(p, offset, strict=True)) for p in points(roi)}
    assert points(roi.shift(offset)) == moved


@given(axes.flatmap(rois))
def test_slices_cut_the_points_out_of_an_array(roi: Roi) -> None:
    inside = roi.clip((9,) * roi.ndim)
    found = np.stack(np.meshgrid(*[np.arange(9)] * roi.ndim, indexing="ij")) if roi.ndim else None
    if found is None:
        assert inside.slices == ()
    else:
        cut = found[(slice(None), *inside.slices)].reshape(roi.ndim, -1).T
        assert set(map(tuple, cut.tolist())) == points(inside)


def test_a_box_before_the_origin_has_no_slices() -> None:
    with pytest.raises(ValueError, match=r"Roi\(.*-1.* before the origin .* clip it to a shape"):
        _ = Roi((0, -1), (2, 3)).slices


def test_boxes_are_values() -> None:
    roi = Roi((np.int64(1), 2), np.array([3, 4]))
    assert all(type(x) is int for x in (*roi.start, *roi.stop))
    assert pickle.loads(pickle.dumps(roi)) == roi
    assert len({roi, Roi((1, 2), (3, 4))}) == 1
    with pytest.raises(AttributeError):
        roi.start = (0, 0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("start", "stop", "error", "says"),
    [
        ((0, 5), (4, 3), ValueError, r"stop\[1\] = 3 .*start\[1\] = 5.*at least 5"),
        ((0,), (1, 2), ValueError, r"same length, got 1 and 2"),
        ((0.0,), (1,), TypeError, r"Roi start\[0\] must be an integer, got 0\.0"),
        ((0,), (np.float64(1),), TypeError, r"Roi stop\[0\] must be an integer"),
        ((False,), (1,), TypeError, r"Roi start\[0\] must be an integer, got the boolean False"),
        (0, (1,), TypeError, r"Roi start must be a sequence of integers, got 0"),
        ((0,), None, TypeError, r"Roi stop must be a sequence of integers, got None"),
        ("0", "1", TypeError, r"Roi start must be a sequence of integers, got '0'"),
    ],
)
def test_a_wrong_box_is_refused(start: Any, stop: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Roi(start, stop)


@pytest.mark.parametrize(
    "call",
    [
        lambda roi: roi.intersect(Roi((0,), (1,))),
        lambda roi: roi.contains(Roi((0,), (1,))),
        lambda roi: roi.grow(Halo.of(1, 1)),
        lambda roi: roi.clip((4,)),
        lambda roi: roi.shift((1,)),
    ],
    ids=["intersect", "contains", "grow", "clip", "shift"],
)
def test_another_number_of_axes_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"has 1 axes, this Roi has 2"):
        call(Roi((0, 0), (2, 2)))


# ---------------------------------------------------------------- index expressions


@st.composite
def keys(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    """A shape and an index expression that a lazy image accepts."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    given_axes = draw(st.integers(0, len(shape)))
    dots = draw(st.one_of(st.none(), st.integers(0, given_axes)))
    # Where the ellipsis stands decides which axes the items belong to.
    skipped = len(shape) - given_axes
    of_axis = [n if dots is None or n < dots else n + skipped for n in range(given_axes)]
    items: list[Any] = []
    for axis in of_axis:
        extent = shape[axis]
        bound = st.one_of(st.none(), st.integers(-extent, extent))
        kinds = [st.builds(slice, bound, bound, st.sampled_from([None, 1]))]
        if extent:
            kinds.append(st.integers(-extent, extent - 1))
            kinds.append(st.integers(-extent, extent - 1).map(np.int16))
        items.append(draw(st.one_of(kinds)))
    if dots is not None:
        items.insert(dots, ...)
    if len(items) == 1 and draw(st.booleans()):
        return shape, items[0]
    return shape, tuple(items)


@given(keys())
def test_an_index_means_what_it_means_to_numpy(case: tuple[tuple[int, ...], Any]) -> None:
    shape, key = case
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    roi, dropped = parse_index(key, shape)
    assert roi.clip(shape) == roi
    box = array[roi.slices]
    got = box[tuple(0 if axis in dropped else slice(None) for axis in range(len(shape)))]
    np.testing.assert_array_equal(got, array[key])


def test_a_roi_is_an_index() -> None:
    assert parse_index(Roi((1, 0), (2, 3)), (2, 3)) == (Roi((1, 0), (2, 3)), ())


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [
        (5, IndexError, r"index 5 on axis 0 leaves the image; allowed is -4\.\.3"),
        ((0, -7), IndexError, r"index -7 on axis 1 leaves the image; allowed is -6\.\.5"),
        (slice(0, 5), IndexError, r"slice bound 5 on axis 0 .* allowed is -4\.\.4; Roi\.clip"),
        ((..., slice(-7, None)), IndexError, r"slice bound -7 on axis 1 .* allowed is -6\.\.6"),
        (slice(None, None, 2), ValueError, r"step 2 on axis 0: .*to_dask\(\)"),
        ((0, slice(None, None, -1)), ValueError, r"step -1 on axis 1: .*to_dask\(\)"),
        (slice(None, None, 0), ValueError, r"step 0 on axis 0"),
        (slice(0.0, 2), TypeError, r"slice bound on axis 0 must be an integer, got 0\.0"),
        (slice(None, None, 1.0), TypeError, r"step on axis 0 must be an integer, got 1\.0"),
        (1.0, TypeError, r"index on axis 0 must be an integer, got 1\.0"),
        ("a", TypeError, r"index on axis 0 must be an integer, got 'a'"),
        (None, TypeError, r"index None on axis 0: .*to_dask\(\) for masks, lists and new axes"),
        ((0, None), TypeError, r"index None on axis 1: .*to_dask\(\)"),
        (True, TypeError, r"index True on axis 0: .*to_dask\(\)"),
        ([0, 1], TypeError, r"index \[0, 1\] on axis 0: .*to_dask\(\)"),
        (np.array([True, False, True, True]), TypeError, r"on axis 0: .*to_dask\(\) for masks"),
        (np.array([0, 1]), TypeError, r"on axis 0: .*to_dask\(\) for masks, lists"),
        (np.ones((4, 6), bool), TypeError, r"on axis 0: .*to_dask\(\) for masks, lists"),
        ((..., ...), IndexError, r"only one ellipsis"),
        ((0, 0, 0), IndexError, r"too many indices: the image has 2 axes, 3 were given"),
        (Roi((0,), (1,)), IndexError, r"has 1 axes, the image has 2"),
        (Roi((0, 0), (4, 7)), IndexError, r"region 0:7 on axis 1 .* allowed is 0:6; Roi\.clip"),
        (Roi((-1, 0), (4, 6)), IndexError, r"region -1:4 on axis 0 .* allowed is 0:4"),
    ],
)
def test_a_wrong_index_is_refused(key: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_index(key, (4, 6))
