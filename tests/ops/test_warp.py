"""Warped images: SciPy's map_coordinates on the whole image, from just the cells that matter."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import map_coordinates

import cellimg_dask as ci
from cellimg_dask.ops.label_image import LabelImg
from cellimg_dask.ops.thin_plate import ThinPlateSpline
from cellimg_dask.ops.transforms import Affine
from cellimg_dask.ops.warp import warp


def coordinates_of(transform, shape):
    """Return where all voxels come from, one row per axis of the input."""
    points = np.indices(shape).reshape(len(shape), -1).T.astype(float)
    return np.asarray(transform(points)).T


def whole(image, transform, shape, order=1, fill_value=0, dtype=None):
    found = map_coordinates(
        image,
        coordinates_of(transform, shape),
        image.dtype if dtype is None else dtype,
        order,
        "constant",
        fill_value,
    )
    return found.reshape(shape)


def random_spline(rng, shape, out_shape, count=8, size=0.1):
    """Landmarks all over the result, which come from about the same part of the image."""
    part = rng.uniform(0, 1, (count, len(out_shape)))
    part[: len(out_shape) + 1] += np.eye(len(out_shape) + 1, len(out_shape))
    target = part * (np.array(out_shape) - 1)
    matrix = rng.normal(0, 0.2, (len(shape), len(out_shape))) + np.eye(len(shape), len(out_shape))
    source = (part @ matrix.T + rng.normal(0, size, (count, len(shape)))) * shape
    return ThinPlateSpline(source, target)


def scaled(factor):
    return lambda points: points * factor


# ------------------------------------------------------------------- equal to the whole image


@settings(max_examples=40)
@given(st.data())
def test_equals_map_coordinates(data):
    ndim, out_ndim = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (3, 2), (2, 3)]))
    shape = tuple(data.draw(st.integers(1, 14)) for _ in range(ndim))
    out_shape = tuple(data.draw(st.integers(1, 12)) for _ in range(out_ndim))
    cells = tuple(data.draw(st.integers(1, 12)) for _ in range(out_ndim))
    order = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from(["u1", "i2", ">u2", "f4", "f8", "?", "c16", "i8"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    image = (rng.random(shape) * 200 - (0 if dtype in ("u1", ">u2", "?") else 50)).astype(dtype)
    spline = random_spline(rng, shape, np.maximum(out_shape, 2))
    kind = data.draw(st.sampled_from(["spline", "affine", "callable"]))
    transform = spline
    if kind == "affine":
        # Integers and halves too: what lies just on voxels and on borders.
        matrix = rng.normal(0, 1, (ndim, out_ndim)).round(data.draw(st.integers(0, 2)))
        transform = Affine(matrix, rng.uniform(-3, 9, ndim).round(1))
    elif kind == "callable":
        transform = lambda points: spline(points)  # noqa: E731
    given = ci.map_cells(np.copy, image, dtype=image.dtype, cell_shape=5)
    fill = data.draw(st.sampled_from([0, 1]))
    lazy = warp(given, transform, shape=out_shape, cell_shape=cells, order=order, fill_value=fill)
    native = image.astype(image.dtype.newbyteorder("="))
    expected = whole(native, transform, out_shape, order, fill)
    assert lazy.dtype == native.dtype
    if order < 2:
        np.testing.assert_array_equal(lazy[...], expected)
    else:
        # The image is no longer than the halo of the filter here; but sums are rounded.
        scale = 1e-10 * (1 + np.abs(native).max())
        step = 0 if dtype in ("f8", "f4", "c16") else 1
        np.testing.assert_allclose(
            lazy[...].astype(complex),
            expected.astype(complex),
            rtol=1e-6 if dtype == "f4" else 0,
            atol=scale + step,
        )


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_the_filter_has_a_halo_and_its_error_is_stated(rng, order):
    image = rng.random((150, 160))
    image[70:80] *= 1e6
    lazy = ci.map_cells(np.copy, image, dtype=image.dtype, cell_shape=24)
    spline = random_spline(rng, image.shape, image.shape, size=0.02)
    found = warp(lazy, spline, order=order, cell_shape=40)[...]
    expected = whole(image, spline, image.shape, order)
    assert expected.any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * image.max())
    rounded = warp((image / 10).astype("u2"), spline, order=order, cell_shape=40)[...]
    expected = whole((image / 10).astype("u2"), spline, image.shape, order)
    np.testing.assert_array_equal(rounded, expected)


def test_landmarks_equal_scipy_on_a_real_volume(shared_data, rng):
    moving = tifffile.imread(shared_data / "brain_signal.tif")[:, 100:356, 200:456]
    fixed = rng.uniform(0, 1, (12, 3)) * moving.shape
    landmarks = fixed + rng.normal(0, (1.5, 6, 6), fixed.shape)
    lazy = ci.map_cells(np.copy, moving, dtype="u2", cell_shape=(10, 64, 64))
    found = warp(lazy, ThinPlateSpline(landmarks, fixed), cell_shape=(16, 70, 90))[...]
    scipys = RBFInterpolator(fixed, landmarks, kernel="thin_plate_spline", degree=1)
    expected = whole(moving, scipys, moving.shape)
    assert (expected > 0).mean() > 0.8
    # Coordinates differ in the twelfth digit, which decides how one in millions is rounded.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 1e-5


def test_labels_take_the_nearest_exactly(rng):
    labels = ci.label(rng.random((30, 40)) > 0.6, cell_shape=16)
    assert isinstance(labels, LabelImg)
    spline = random_spline(rng, labels.shape, labels.shape)
    found = warp(labels, spline)
    assert found.dtype == np.uint64
    np.testing.assert_array_equal(found[...], whole(labels[...], spline, labels.shape, 0))
    ids = np.array([(1 << 63) + 1, (1 << 53) + 1], np.uint64)
    np.testing.assert_array_equal(warp(ids, scaled(0.4), shape=3, order=0)[...], ids[[0, 0, 1]])


@pytest.mark.parametrize(
    ("dtype", "result"),
    [("f8", "u1"), ("f8", "i2"), ("i4", "u1"), ("u1", "f4"), ("f4", "f2"), ("f2", "f2")],
)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_other_dtypes_are_rounded(rng, dtype, result, order):
    image = (rng.random((9, 9)) * 200).astype(dtype)
    transform = Affine(np.eye(2) * 0.7, 0.3)
    found = warp(image, transform, dtype=result, order=order, cell_shape=4)
    through = [np.float32 if name == "f2" else name for name in (dtype, result)]
    expected = whole(image.astype(through[0]), transform, (9, 9), order, dtype=through[1])
    assert found.dtype == result
    np.testing.assert_allclose(found[...], expected.astype(result), rtol=2e-3, atol=0)


def test_what_is_not_finite_is_outside():
    image = np.arange(1.0, 7)

    def broken(points):
        return np.where(points == 2, np.nan, np.where(points == 3, np.inf, points))

    found = warp(image, broken, cell_shape=2, fill_value=-1)
    np.testing.assert_array_equal(found[...], [1, 2, -1, -1, 5, 6])


def test_a_voxel_that_does_not_matter_may_be_nan():
    image = np.array([1, np.nan, 3, 4.0])
    np.testing.assert_array_equal(warp(image, [[1, 2]], shape=2, cell_shape=1)[...], [3, 4])


def test_empty_images():
    assert warp(np.zeros((4, 4)), scaled(1), shape=(0, 3))[...].shape == (0, 3)
    nothing = warp(np.zeros((0, 4)), scaled(1), shape=(2, 3), fill_value=5)
    np.testing.assert_array_equal(nothing[...], np.full((2, 3), 5))


# ------------------------------------------------------------------------- what the result is


def test_the_result_is_like_the_fixed_image(rng):
    moving = rng.random((20, 30))
    fixed = ci.map_cells(np.copy, np.zeros((25, 15)), dtype="f8", cell_shape=(10, 5)).with_space(
        axes="yx", units="um", scale=(2, 3), translation=(5, 7)
    )
    lazy = warp(moving, scaled(1), like=fixed)
    assert (lazy.shape, lazy.cell_shape, lazy.space) == ((25, 15), (10, 5), fixed.space)
    plane = warp(rng.random((5, 6, 7)), Affine(np.ones((3, 2))), like=fixed)
    assert (plane.shape, plane.space) == ((25, 15), fixed.space)
    pair = warp(moving, scaled(1), like=((4, 5), fixed.space), cell_shape=3)
    assert (pair.shape, pair.cell_shape, pair.space) == ((4, 5), (3, 3), fixed.space)
    own = warp(fixed, scaled(1), shape=(3, 4))
    assert (own.shape, own.cell_shape, own.space) == ((3, 4), (10, 5), fixed.space)
    assert warp(fixed, Affine(np.ones((2, 1))), shape=9).space == ci.Space.of(1)
    with pytest.raises(ValueError, match="a shape of 3 axes and a space of 2"):
        warp(moving, scaled(1), like=((4, 5, 6), fixed.space))


def test_landmarks_in_units(rng):
    image = rng.random((20, 24))
    moving = ci.map_cells(np.copy, image, dtype="f8", cell_shape=7).with_space(
        axes="yx", units="um", scale=(2, 0.5), translation=(-3, 100)
    )
    space = ci.Space.of(2, "yx", "um", (1.5, 0.25), (4, 101))
    source = rng.uniform((0, 100), (35, 111), (6, 2))
    target = source + rng.normal(0, 0.3, (6, 2)) * (2, 0.5)
    spline = ThinPlateSpline(source, target)
    found = warp(moving, spline, like=((18, 40), space), coordinates="units", cell_shape=11)

    def between_voxels(points):
        places = spline(points * space.scale + space.translation)
        return (places - (-3, 100)) / (2, 0.5)

    expected = whole(image, between_voxels, (18, 40))
    assert (expected > 0).mean() > 0.5
    np.testing.assert_array_equal(found[...], expected)
    any_callable = warp(moving, spline.__call__, like=((18, 40), space), coordinates="units")
    np.testing.assert_array_equal(any_callable[...], expected)
    # The same place in units is the same voxel in another image of the space.
    np.testing.assert_array_equal(warp(moving, np.eye(3), coordinates="units")[...], image)


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_channels_are_warped_alike(rng, kept):
    planes = rng.random((3, 9, 11))
    image = np.moveaxis(planes, 0, kept)
    spline = random_spline(rng, (9, 11), (9, 11))
    lazy = warp(image, spline, kept_axes=kept, cell_shape=[4 if n > 3 else 2 for n in image.shape])
    expected = np.moveaxis([whole(plane, spline, (9, 11)) for plane in planes], 0, kept)
    np.testing.assert_array_equal(lazy[...], expected)
    named = ci.map_cells(np.copy, image, dtype="f8", cell_shape=8).with_space(axes="abc")
    cubic = warp(named, spline, kept_axes=kept, order=3)
    assert cubic.axes == ("a", "b", "c")
    expected = np.moveaxis([whole(plane, spline, (9, 11), 3) for plane in planes], 0, kept)
    np.testing.assert_allclose(cubic[...], expected, rtol=0, atol=1e-12)
    # A fixed image with channels, or without.
    for like in (np.zeros(image.shape), np.zeros((9, 11))):
        for transform in (spline, spline.__call__):
            same = warp(image, transform, like=like, kept_axes=kept)
            np.testing.assert_array_equal(same[...], lazy[...])


def test_a_slice_at_any_angle_of_all_channels(rng):
    image = rng.random((6, 7, 8, 2))
    plane = Affine([[0.3, 0.1], [0.5, 0.2], [0.1, 0.7]], (1, 1, 1))
    lazy = warp(image, plane, shape=(8, 9), kept_axes=3, cell_shape=(1, 4, 4))
    expected = [whole(image[..., channel], plane, (8, 9)) for channel in range(2)]
    np.testing.assert_array_equal(lazy[...], expected)


# ---------------------------------------------------------------------------- what is computed


def test_one_region_computes_exactly_the_cells_it_comes_from(rng):
    asked = []

    def load(block):
        asked.append(block.index)
        block.data[...] = block.index

    moving = ci.fill_cells(load, ci.CellGrid((400, 400), (20, 20)), dtype="i4")
    angle = np.deg2rad(30)
    turn = Affine([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], (150.25, 20.5))
    lazy = warp(moving, turn, cell_shape=50)
    lazy.load((1, 2))
    coordinates = turn(
        np.stack(np.meshgrid(np.arange(50, 100.0), np.arange(100, 150.0)), -1).reshape(-1, 2)
    )
    low = np.floor(coordinates.min(axis=0)).astype(int)
    high = np.ceil(coordinates.max(axis=0)).astype(int)
    box = ci.Roi(tuple(low.tolist()), tuple((high + 1).tolist()))
    assert sorted(asked) == [cell.index for cell in moving.grid.cells_in(box)]
    moving.invalidate()
    asked.clear()
    # An identity reads each cell for one cell, and whole steps no more than they must.
    warp(moving, np.eye(3)).load((3, 4))
    assert asked == [moving.grid.index((3, 4))]
    moving.invalidate()
    asked.clear()
    warp(moving, [[1, 0, 20], [0, 1, -40]]).load((5, 6))
    assert asked == [moving.grid.index((6, 4))]
    moving.invalidate()
    asked.clear()
    warp(moving, [[1, 0, 0.4], [0, 1, -0.4]], order=0).load((7, 8))
    assert asked == [moving.grid.index((7, 8))]


def test_a_spline_computes_no_cell_beside_its_own(rng):
    asked = []

    def load(block):
        asked.append(block.index)
        block.data[...] = 1

    moving = ci.fill_cells(load, ci.CellGrid((200, 200, 200), (10, 10, 10)), dtype="u1")
    fixed = rng.uniform(0, 200, (10, 3))
    spline = ThinPlateSpline(fixed + rng.normal(0, 3, (10, 3)), fixed)
    lazy = warp(moving, spline, cell_shape=30)
    lazy.load((2, 3, 3))
    points = np.indices((30, 30, 30)).reshape(3, -1).T + np.array([60.0, 90, 90])
    found = spline(points)
    low, high = np.floor(found.min(axis=0)).astype(int), np.ceil(found.max(axis=0)).astype(int)
    box = ci.Roi(tuple(low.tolist()), tuple((high + 1).tolist()))
    needed = {cell.index for cell in moving.grid.cells_in(box)}
    wider = {cell.index for cell in moving.grid.cells_in(box.grow(ci.Halo((1,) * 3, (1,) * 3)))}
    assert needed <= set(asked) <= wider
    assert len(asked) == len(set(asked))


def test_what_lies_outside_reads_nothing():
    def fail(block):
        raise AssertionError(f"cell {block.position} was read")

    moving = ci.fill_cells(fail, ci.CellGrid((40, 40), (10, 10)), dtype="f4")
    for transform in ([[1, 0, 39.5], [0, 1, 0]], lambda points: points - 1e6):
        lazy = warp(moving, transform, cell_shape=20, fill_value=np.nan)
        assert np.isnan(lazy.load((1, 1))).all()
    # One that lies in the image along one axis, and beside it along the other.
    assert not warp(moving, [[1, 0, 0], [0, 1, -100]])[...].any()


def test_nothing_is_called_before_data_are_asked_for(rng):
    asked = []

    def transform(points):
        asked.append(len(points))
        return points

    image = rng.random((40, 40))
    lazy = warp(image, transform, cell_shape=20, order=3)
    array = lazy.to_dask()
    assert not asked
    lazy[:10, :10]
    # Once for the plan and the block together.
    assert asked == [400]
    np.testing.assert_allclose(array.compute(scheduler="threads"), image, atol=1e-12)


def test_an_edit_reaches_just_the_cells_that_read_it(rng):
    source = ci.Source(rng.random((60, 60)), cell_shape=10)
    spline = random_spline(rng, (60, 60), (50, 50), size=0.03)
    for transform in (spline, spline.__call__):
        lazy = warp(source, transform, shape=(50, 50), cell_shape=10)
        lazy[...]
        changed = []
        watch = lazy.on_dirty(lambda change, seen=changed: seen.extend(change.cells))
        with source.edit() as array:
            array[20:23, 31:33] += 1
        loads = lazy.stats().loads
        found = lazy[...]
        np.testing.assert_array_equal(found, whole(np.asarray(source), transform, (50, 50)))
        assert lazy.stats().loads == loads + len(changed)
        field = lazy.loader.planner.inputs[0].index_map
        edited = ci.Roi((20, 31), (23, 33))
        reading = [
            cell.index
            for cell in map(lazy.grid.cell, range(lazy.grid.num_cells))
            if field(cell.roi).intersect(edited).size
        ]
        assert sorted(changed) == reading
        assert 0 < len(reading) < 8
        del watch


def test_threads_share_what_they_find(rng, pool):
    image = rng.random((64, 64))
    barrier = threading.Barrier(8)
    lazy = warp(image, lambda points: points * 0.9 + 1, cell_shape=16)
    expected = whole(image, lambda points: points * 0.9 + 1, (64, 64))

    def read(_):
        barrier.wait(60)
        return lazy[...]

    for found in pool.map(read, range(8)):
        np.testing.assert_array_equal(found, expected)
    assert lazy.stats().loads == 16


# ------------------------------------------------------------------------------ elsewhere, later


def test_processes(rng):
    image = rng.random((30, 40))
    spline = random_spline(rng, (30, 40), (30, 40))
    with ci.BlockQueue(1, backend="processes") as queue:
        for transform in (spline, lambda points: points * 0.8):
            for order in (1, 3):
                lazy = warp(image, transform, cell_shape=16, order=order, queue=queue)
                expected = whole(image, transform, (30, 40), order)
                np.testing.assert_allclose(lazy[...], expected, rtol=0, atol=1e-12)


def test_a_run_knows_what_it_has_done(rng, tmp_path):
    image = rng.random((30, 40))
    spline = random_spline(rng, (30, 40), (30, 40))

    def lazy(transform, order=1):
        return warp(image, transform, cell_shape=20, order=order)

    target = tmp_path / "warped.zarr"
    assert ci.run(lazy(spline), target, progress=False).computed == 4
    same = ThinPlateSpline(spline.source_points, spline.target_points)
    again = lazy(same)
    again[:5, :5]
    assert ci.run(again, target, progress=False).skipped == 4
    other = ThinPlateSpline(spline.source_points + 1, spline.target_points)
    assert ci.run(lazy(other), target, progress=False).computed == 4
    np.testing.assert_array_equal(zarr.open(target)[...], whole(image, other, (30, 40)))
    for factor in (0.5, 0.7):
        report = ci.run(lazy(scaled(factor)), tmp_path / "scaled.zarr", progress=False)
        assert (report.computed, report.skipped) == (4, 0)
    report = ci.run(lazy(scaled(0.7)), tmp_path / "scaled.zarr", progress=False)
    assert (report.computed, report.skipped) == (0, 4)


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": 6}, ValueError, "order must be from 0 to 5"),
        ({"order": 1.5}, TypeError, "order"),
        ({"coordinates": "nm"}, ValueError, '"voxels" or "units"'),
        ({"fill_value": 300}, ValueError, "fill_value 300"),
        ({"dtype": "U3"}, TypeError, "numbers of at most 64 bits"),
        ({"kept_axes": (0, 1)}, ValueError, "no axis to warp"),
        ({"kept_axes": 2}, ValueError, "kept_axes 2"),
        ({"shape": (3, 4, 5)}, ValueError, "starts from points of 2 axes"),
        ({"like": np.zeros(3)}, ValueError, "starts from points of 2 axes"),
        ({"shape": (-1, 4)}, ValueError, "shape"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        warp(np.zeros((4, 5), "u1"), Affine(np.eye(2)), **options)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="no halo, boundary or index_map"):
        warp(ci.Input(np.zeros((4, 5)), halo=1), Affine(np.eye(2)))
    with pytest.raises(ValueError, match="points of 3 axes, and the image has 2"):
        warp(np.zeros((4, 5)), Affine(np.eye(3)))
    with pytest.raises(TypeError, match="complex128 cannot be warped to float64"):
        warp(np.zeros((4, 5), complex), Affine(np.eye(2)), dtype=float)


@pytest.mark.parametrize(
    "transform",
    [
        lambda points: points.T,
        lambda points: points[:-1],
        lambda points: points.astype(str),
        lambda points: None,
    ],
)
def test_a_transform_that_returns_something_else(transform):
    lazy = warp(np.zeros((4, 6)), transform)
    with pytest.raises(ci.CellimgError, match="must return real numbers of shape"):
        lazy[...]


def test_a_transform_that_raises():
    def transform(points):
        raise RuntimeError("no idea")

    lazy = warp(np.zeros((4, 6)), transform)
    for _ in range(2):
        with pytest.raises(ci.CellimgError, match="no idea"):
            lazy[...]
