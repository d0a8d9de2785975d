"""Thin-plate splines and affine transforms: SciPy's values, and boxes that hold them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RBFInterpolator

from cellimg_dask.blocks.content import value_content
from cellimg_dask.ops.thin_plate import ThinPlateSpline
from cellimg_dask.ops.transforms import Affine, Bounded, as_transform, in_units


def lattice(start, stop):
    axes = [np.arange(low, high, dtype=float) for low, high in zip(start, stop, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


@st.composite
def landmarks(draw):
    """Pairs of landmarks that determine a spline well."""
    num_axes, num_out = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    count = draw(st.integers(num_axes + 1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    size, shift = 10.0 ** draw(st.integers(-3, 4)), 10.0 ** draw(st.integers(-2, 4))
    # One near each corner of a simplex, the others anywhere.
    target = rng.uniform(0, 1, (count, num_axes))
    target[: num_axes + 1] += 2 * np.eye(num_axes + 1, num_axes)
    source = rng.normal(0, 1, (count, num_out)) * 10.0 ** draw(st.integers(-2, 2))
    smoothing = draw(st.sampled_from([0.0, 0.1, 30.0]))
    return source, target * size + shift, smoothing


@given(landmarks())
def test_equals_scipy(case):
    source, target, smoothing = case
    low, high = target.min(axis=0), target.max(axis=0)
    points = np.random.default_rng(0).uniform(2 * low - high, 2 * high - low, (50, len(low)))
    spline = ThinPlateSpline(source, target, smoothing)
    # In SciPy's own units of length, which do not matter, its equations may be hard to solve.
    unit = np.ptp(target)
    expected = RBFInterpolator(
        (target - low) / unit,
        source,
        kernel="thin_plate_spline",
        degree=1,
        smoothing=smoothing / unit**2,
    )((points - low) / unit)
    scale = np.abs(source).max() + np.abs(expected).max()
    np.testing.assert_allclose(spline(points), expected, rtol=0, atol=1e-7 * scale)
    if not smoothing:
        np.testing.assert_allclose(spline(target), source, rtol=0, atol=1e-7 * scale)


def test_equals_scipy_on_voxels(rng):
    target = rng.uniform(0, 500, (40, 3))
    source = target + rng.normal(0, 5, (40, 3))
    points = rng.uniform(-50, 550, (1000, 3))
    expected = RBFInterpolator(target, source, kernel="thin_plate_spline", degree=1)(points)
    found = ThinPlateSpline(source, target)(points)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 7, 1000, (1 << 14) + 3])
def test_a_point_has_one_result_whatever_comes_with_it(rng, size):
    spline = ThinPlateSpline(rng.random((9, 3)), rng.random((9, 3)))
    turn = Affine(rng.random((3, 3)), rng.random(3))
    points = rng.uniform(-1, 2, ((1 << 15) + 5, 3))
    for transform in (spline, turn):
        whole = transform(points)
        np.testing.assert_array_equal(transform(points[5 : 5 + size]), whole[5 : 5 + size])
        np.testing.assert_array_equal(transform(points[::-1]), whole[::-1])


@settings(max_examples=60)
@given(landmarks(), st.integers(1, 8), st.integers(0, 1 << 32))
def test_a_box_holds_its_points(case, size, seed):
    source, target, smoothing = case
    spline = ThinPlateSpline(source, target, smoothing)
    low, high = target.min(axis=0), target.max(axis=0)
    rng = np.random.default_rng(seed)
    step = (high - low) / rng.integers(1, 20)
    # A landmark at a corner, where the second derivatives have no bound, or anywhere.
    start = target[0] if seed % 2 else rng.uniform(low, high)
    shape = rng.integers(1, size + 1, len(low))
    points = start + step * lattice([0] * len(low), shape)
    first, last = spline.bounds(points.min(axis=0), points.max(axis=0))
    found = spline(points)
    assert (first <= found.min(axis=0)).all()
    assert (last >= found.max(axis=0)).all()


def test_a_box_is_hardly_wider_than_its_points(rng):
    target = rng.uniform(0, 300, (20, 3))
    spline = ThinPlateSpline(target + rng.normal(0, 4, target.shape), target)
    for start in rng.integers(0, 260, (10, 3)):
        first, last = spline.bounds(start, start + 39)
        found = spline(lattice(start, start + 40))
        assert (found.min(axis=0) - first < 0.5).all()
        assert (last - found.max(axis=0) < 0.5).all()


@given(
    st.integers(0, 1 << 32), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1e-6, 1, 1e9])
)
def test_the_box_of_an_affine_transform_is_exact(seed, num_in, num_out, size):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(0, size, (num_out, num_in)).round(rng.integers(0, 8))
    transform = in_units(
        Affine(matrix, rng.normal(0, 1, num_out)),
        rng.uniform(0.1, 3, num_in),
        rng.normal(0, 9, num_in),
        rng.uniform(0.1, 3, num_out),
        rng.normal(0, 9, num_out),
    )
    assert isinstance(transform, Bounded)
    start = rng.integers(-9, 9, num_in)
    stop = start + rng.integers(1, 5, num_in)
    low, high = transform.bounds(start.astype(float), stop - 1.0)
    found = transform(lattice(start, stop))
    np.testing.assert_array_equal(low, found.min(axis=0))
    np.testing.assert_array_equal(high, found.max(axis=0))


def test_matrices_as_transforms():
    turn = np.array([[0.0, -1, 7], [1, 0, 3]])
    points = lattice((0, 0), (3, 4))
    expected = points @ turn[:, :2].T + turn[:, 2]
    np.testing.assert_array_equal(as_transform(turn, 2)(points), expected)
    np.testing.assert_array_equal(as_transform([*turn.tolist(), [0, 0, 1]], 2)(points), expected)
    for bad, message in [
        (turn[:, :2], "Affine"),
        (np.eye(3)[:2, :2], "Affine"),
        ([[1, 0, 0], [0, 1, 0], [0, 1, 1]], "last row"),
        (np.eye(4), "shape"),
        (5, "shape"),
        ([[1, 0, np.nan], [0, 1, 0]], "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            as_transform(bad, 2)
    for none in ("turn", [[1, 2], [3]], [[1j, 0, 0], [0, 1, 0]], None):
        with pytest.raises(TypeError, match="real numbers"):
            as_transform(none, 2)
    with pytest.raises(ValueError, match="points of 3 axes, and the image has 2"):
        as_transform(Affine(np.eye(3)), 2)
    with pytest.raises(ValueError, match="offset must be"):
        Affine(np.eye(3), (1, 2))
    with pytest.raises(ValueError, match="matrix must have"):
        Affine([1, 2, 3])
    with pytest.raises(ValueError, match="points must have"):
        Affine(np.eye(3))(np.zeros((4, 2)))


SQUARE = [[0, 0], [0, 9], [9, 0], [9, 9]]


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        (SQUARE[:2], SQUARE[:2], ValueError, "at least 3 landmarks, got 2"),
        (SQUARE, [[0, 0], [1, 1], [2, 2], [5, 5]], ValueError, "on one line"),
        (np.eye(4)[:, :3], [[0, 0, 1], [3, 1, 1], [5, 9, 1], [1, 1, 1]], ValueError, "one plane"),
        ([[1], [2]], [[4], [4]], ValueError, "in one place"),
        ([*SQUARE, [3, 3]], [*SQUARE, [9, 0]], ValueError, r"in one place, \[9\.0, 0\.0\]"),
        (SQUARE, SQUARE[:3], ValueError, "pairs: got 4 source_points and 3"),
        ([1, 2, 3], [1, 2, 3], ValueError, "source_points must have the shape"),
        (SQUARE, [[0, 0], [0, 9], [9, np.inf], [9, 9]], ValueError, "target_points must be finite"),
        (SQUARE, "landmarks", TypeError, "target_points must be real numbers"),
        (SQUARE, [[0, 0], [0], [9, 0], [9, 9]], TypeError, "rows of equal length"),
    ],
)
def test_landmarks_that_determine_nothing(source, target, error, message):
    with pytest.raises(error, match=message):
        ThinPlateSpline(source, target)


def test_smoothing():
    twice = [*SQUARE, [9, 0]]
    spline = ThinPlateSpline([*SQUARE, [9, 2]], twice, smoothing=1e-6)
    np.testing.assert_allclose(spline([[9, 0]]), [[9, 1]], atol=1e-5)
    for bad, error in (("1", TypeError), (True, TypeError), (-1, ValueError), (np.nan, ValueError)):
        with pytest.raises(error, match="smoothing must be"):
            ThinPlateSpline(SQUARE, SQUARE, smoothing=bad)


def test_transforms_are_values(rng):
    spline = ThinPlateSpline(rng.random((5, 2)), rng.random((5, 2)))
    points = rng.random((10, 2))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(spline))(points), spline(points))
    same = ThinPlateSpline(spline.source_points.tolist(), spline.target_points.copy())
    other = ThinPlateSpline(spline.source_points, spline.target_points + 1)
    same(points)
    content = value_content(spline, "spline")
    assert value_content(same, "same") == content != value_content(other, "other")
    with pytest.raises(ValueError, match="read-only"):
        spline.source_points[0] = 1
    given_points = rng.random((5, 2))
    spline = ThinPlateSpline(given_points, rng.random((5, 2)))
    before = spline(points)
    given_points[:] = 0
    np.testing.assert_array_equal(spline(points), before)
