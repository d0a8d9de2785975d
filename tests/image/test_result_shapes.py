"""Results of another dtype or shape, against NumPy on the whole array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.geometry import BOUNDARIES

Pairs = tuple[tuple[int, int], ...]
Function = Callable[..., NDArray[Any]]

MAX_EXTENT = {0: 0, 1: 40, 2: 11, 3: 7, 4: 4}
MAX_HALO = {0: 0, 1: 20, 2: 9, 3: 5, 4: 2}
shapes_profile = settings(max_examples=70)


@st.composite
def images(draw: st.DrawFn, ndims: tuple[int, int] = (0, 4), min_extent: int = 0) -> NDArray[Any]:
    """An image of whole numbers, so that sums are exact in any order."""
    ndim = draw(st.integers(*ndims))
    shape = draw(st.tuples(*[st.integers(min_extent, MAX_EXTENT[ndim])] * ndim))
    values = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 200, shape)
    return values.astype(draw(st.sampled_from(["u1", ">u2", "i4", "f8"])))


@st.composite
def surroundings(draw: st.DrawFn, ndim: int, need: int = 0) -> dict[str, Any]:
    """Halo of at least ``need``, boundary and fill value."""
    width = st.integers(need, need + MAX_HALO[ndim])
    return {
        "halo": draw(st.tuples(*[st.tuples(width, width)] * ndim)),
        "boundary": draw(st.sampled_from(BOUNDARIES)),
        "fill_value": draw(st.sampled_from([0, 3])),
    }


def cell_shapes(shape: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
    ndim = len(shape)
    return st.tuples(*[st.integers(max(1, -(-n * ndim // 12)), n + 3) for n in shape])


def whole(
    function: Function,
    image: NDArray[Any],
    around: dict[str, Any],
    axes: Sequence[int | None],
    factors: Sequence[int] | None = None,
) -> NDArray[Any]:
    """Apply ``function`` to the whole padded image and cut the border off the result.

    ``axes`` says for each axis of the result which axis of the image it comes from, None for a
    new one.
    """
    factors = factors or (1,) * image.ndim
    image = image.astype(image.dtype.newbyteorder("="))
    if around["boundary"] == "none" or image.ndim == 0:
        return np.asarray(function(image))
    mode = around["boundary"]
    fill = {"constant_values": around["fill_value"]} if mode == "constant" else {}
    # Halos are rounded up to whole steps of the result.
    halo = [
        tuple(-(-width // factor) * factor for width in pair)
        for pair, factor in zip(around["halo"], factors, strict=True)
    ]
    result = function(np.pad(image, halo, mode=mode, **fill))
    crop = []
    for axis in axes:
        if axis is None:
            crop.append(slice(None))
        else:
            first = halo[axis][0] // factors[axis]
            crop.append(slice(first, first - (-image.shape[axis] // factors[axis])))
    return np.asarray(result[tuple(crop)])


def check(lazy: ci.CellImg, expected: NDArray[Any], data: st.DataObject | None = None) -> None:
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    if data is not None:
        low = [data.draw(st.integers(0, n)) for n in expected.shape]
        high = [data.draw(st.integers(a, n)) for a, n in zip(low, expected.shape, strict=True)]
        region = tuple(map(slice, low, high))
        np.testing.assert_array_equal(lazy[region], expected[region])
    np.testing.assert_array_equal(lazy[...], expected)
    for cell in lazy.grid.cells_in(ci.Roi((0,) * lazy.ndim, lazy.shape)):
        block = lazy.load(cell.index)
        assert (block.shape, block.dtype) == (cell.shape, lazy.dtype)
        np.testing.assert_array_equal(block, expected[cell.roi.slices])


# ---------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda a: a > 100, "?"),
        (lambda a: np.sqrt(a.astype("f4")), "f4"),
        (lambda a: a.astype("f8") / 7, "f8"),
        (lambda a: a * (1 - 2j), "c16"),
        (lambda a: a.astype("i8") * -(10**9), "i8"),
        (lambda a: a.astype("f2"), "f2"),
        (lambda a: a.astype(">i4"), ">i4"),
        (lambda a: a.astype("M8[s]"), "M8[s]"),
    ],
    ids=["bool", "f4", "f8", "complex", "i8", "f2", "big-endian", "time"],
)
@shapes_profile
@given(image=images(), data=st.data())
def test_another_dtype(function: Function, dtype: str, image: NDArray[Any], data: Any) -> None:
    image = image.astype("i4")
    lazy = ci.map_cells(
        function, image, dtype=dtype, cell_shape=data.draw(cell_shapes(image.shape))
    )
    expected = np.asarray(function(image)).astype(np.dtype(dtype).newbyteorder("="))
    check(lazy, expected, data)


@pytest.mark.parametrize(
    ("given_back", "declared"),
    [
        ("u1", "u2"),
        ("u1", "i2"),
        ("?", "u1"),
        ("f4", "f8"),
        ("f8", "c16"),
        ("i4", "f8"),
        (">u2", "u2"),
        (">f4", "f8"),
        ("i2", ">i4"),
    ],
)
def test_a_result_is_cast_where_the_dtype_holds_it(given_back: str, declared: str) -> None:
    image = np.arange(12).reshape(3, 4)
    lazy = ci.map_cells(lambda a: a.astype(given_back), image, dtype=declared, cell_shape=2)
    native = np.dtype(declared).newbyteorder("=")
    for source in (lazy[...], lazy.load(0), lazy.to_dask().compute(scheduler="sync")):
        assert source.dtype == native
    np.testing.assert_array_equal(lazy[...], image.astype(given_back).astype(native))


@pytest.mark.parametrize(
    ("ufunc", "dtypes"),
    [
        (np.negative, ["i2"]),
        (np.sqrt, ["u1"]),
        (np.sqrt, [">f4"]),
        (np.isnan, ["f4"]),
        (np.add, ["u1", "i2"]),
        (np.true_divide, ["u2", "u2"]),
        (np.equal, ["c8", "i4"]),
        (np.absolute, ["c16"]),
    ],
)
def test_the_dtype_of_a_ufunc_is_numpys(ufunc: np.ufunc, dtypes: list[str]) -> None:
    inputs = [np.arange(1, 7).reshape(2, 3).astype(dtype) for dtype in dtypes]
    lazy = ci.map_cells(ufunc, *inputs, cell_shape=2)
    expected = ufunc(*inputs)
    assert lazy.dtype == expected.dtype.newbyteorder("=")
    np.testing.assert_array_equal(lazy[...], expected)


def halve(a: NDArray[Any]) -> NDArray[np.float32]:
    return (a / 2).astype("f4")


def anything(a: NDArray[Any]) -> NDArray[Any]:
    raise AssertionError("must not be called")


def some_float(a: NDArray[Any]) -> NDArray[np.floating[Any]]:
    raise AssertionError("must not be called")


def test_the_dtype_of_an_annotation() -> None:
    lazy = ci.map_cells(halve, np.arange(6), cell_shape=4)
    assert lazy.dtype == np.float32
    np.testing.assert_array_equal(lazy[:], (np.arange(6) / 2).astype("f4"))


@pytest.mark.parametrize("function", [anything, some_float, lambda a: anything(a)])
def test_an_unknown_dtype_is_refused_and_nothing_is_called(function: Function) -> None:
    with pytest.raises(TypeError, match=r"cannot be known without running it: give dtype=…"):
        ci.map_cells(function, np.arange(6, dtype="u2"))


# ---------------------------------------------------------------- new axes


def stacked(a: NDArray[Any], axis: int) -> NDArray[Any]:
    return np.stack(
        [ndimage.maximum_filter(a, 3, mode="nearest"), ndimage.minimum_filter(a, 3, mode="nearest")]
        if a.ndim
        else [a, a + 1],
        axis=axis,
    )


@shapes_profile
@given(image=images(), data=st.data())
def test_a_new_axis_of_two_filters(image: NDArray[Any], data: st.DataObject) -> None:
    ndim = image.ndim
    place = data.draw(st.integers(-ndim - 1, ndim), label="axis")
    around = data.draw(surroundings(ndim, need=1))
    axes: list[int | None] = list(range(ndim))
    axes.insert(place % (ndim + 1), None)
    cells = list(data.draw(cell_shapes(image.shape)))
    cells.insert(place % (ndim + 1), data.draw(st.integers(2, 5)))
    function = partial(stacked, axis=place)
    if 0 in image.shape:
        expected = np.zeros(
            [2 if axis is None else image.shape[axis] for axis in axes],
            image.dtype.newbyteorder("="),
        )
    else:
        expected = whole(function, image, around, axes)
    lazy = ci.map_cells(
        function, image, dtype=image.dtype, new_axis={place: 2}, cell_shape=cells, **around
    )
    check(lazy, expected, data)


@shapes_profile
@given(image=images(ndims=(0, 3)), data=st.data())
def test_two_new_axes(image: NDArray[Any], data: st.DataObject) -> None:
    def spread(a: NDArray[Any]) -> NDArray[Any]:
        first = np.stack([a, a + 1, a + 2], axis=-1)
        return np.stack([first, first * 2])

    cells = data.draw(cell_shapes(image.shape))
    lazy = ci.map_cells(
        spread, image, dtype="f8", new_axis={-1: 3, 0: 2}, cell_shape=(2, *cells, 3)
    )
    check(lazy, spread(image).astype("f8"), data)


def test_one_cell_size_for_all_leaves_a_new_axis_whole() -> None:
    image = np.arange(20).reshape(4, 5)
    lazy = ci.map_cells(
        lambda a: np.stack([a] * 7), image, dtype=int, new_axis={0: 7}, cell_shape=2
    )
    assert lazy.cell_shape == (7, 2, 2)
    check(lazy, np.stack([image] * 7))
    default = ci.map_cells(lambda a: np.stack([a] * 7), image, dtype=int, new_axis={0: 7})
    check(default, np.stack([image] * 7))


# ---------------------------------------------------------------- dropped axes


@pytest.mark.parametrize("name", ["max", "sum", "mean"])
@shapes_profile
@given(image=images(ndims=(1, 4), min_extent=1), data=st.data())
def test_a_projection(name: str, image: NDArray[Any], data: st.DataObject) -> None:
    ndim = image.ndim
    dropped = data.draw(
        st.lists(st.integers(0, ndim - 1), min_size=1, max_size=ndim, unique=True), label="axes"
    )
    around = data.draw(surroundings(ndim))
    kept = [axis for axis in range(ndim) if axis not in dropped]

    def project(a: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(getattr(np, name)(a.astype("f8"), axis=tuple(dropped)))

    lazy = ci.map_cells(
        project,
        image,
        dtype="f8",
        # Axes may be counted from the end, and come in any order.
        drop_axis=[axis - ndim if axis % 2 else axis for axis in dropped],
        cell_shape=data.draw(cell_shapes([image.shape[axis] for axis in kept])),
        **around,
    )
    check(lazy, whole(project, image, around, kept), data)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("drop", [0, -1, (1,), (0, 2)])
def test_a_projection_of_an_image_with_an_empty_axis(boundary: str, drop: Any) -> None:
    # Along an axis without voxels a sum is 0 and a maximum is not defined, as in NumPy.
    image = np.zeros((3, 0, 4))
    axes = (drop,) if isinstance(drop, int) else drop
    lazy = ci.map_cells(
        partial(np.sum, axis=axes), image, dtype="f8", drop_axis=drop, boundary=boundary
    )
    check(lazy, image.sum(axis=axes))


def test_a_maximum_along_an_empty_axis_fails_as_in_numpy() -> None:
    lazy = ci.map_cells(
        partial(np.max, axis=0), np.zeros((0, 4)), dtype="f8", drop_axis=0, cell_shape=2
    )
    with pytest.raises(ci.BlockError, match="zero-size array") as caught:
        lazy[:]
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("boundary", ["reflect", "symmetric", "edge", "wrap"])
def test_other_axes_have_their_border_beside_an_empty_dropped_axis(boundary: str) -> None:
    # NumPy cannot extend the empty axis, but nobody asks it to: the halo lies on the other.
    image = np.zeros((0, 4))
    widths = []

    def project(a: NDArray[Any]) -> NDArray[Any]:
        widths.append(a.shape)
        return a.sum(axis=0)

    lazy = ci.map_cells(
        project, image, dtype="f8", drop_axis=0, halo=(0, 2), boundary=boundary, cell_shape=4
    )
    np.testing.assert_array_equal(lazy[:], np.zeros(4))
    assert widths == [np.pad(image, [(0, 0), (2, 2)], mode=boundary).shape]


@pytest.mark.parametrize("boundary", ["reflect", "symmetric", "edge", "wrap"])
def test_an_empty_axis_that_is_read_cannot_be_extended(boundary: str) -> None:
    # What NumPy refuses, an error here too: at the latest when it is read.
    image = np.zeros((0, 4))
    with pytest.raises(ValueError, match="empty"):
        np.pad(image, [(1, 1), (2, 2)], mode=boundary)
    with pytest.raises((ValueError, ci.CellimgError), match="empty"):
        ci.map_cells(
            partial(np.sum, axis=0), image, dtype="f8", drop_axis=0, halo=(1, 2), boundary=boundary
        )[:]


# ---------------------------------------------------------------- smaller by a factor


def steps(a: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    return a[tuple(slice(None, None, factor) for factor in factors)]


def every(a: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    """Take every n-th voxel of a maximum filter of width 3."""
    return steps(ndimage.maximum_filter(a, 3, mode="nearest") if a.size else a, factors)


def block_sums(a: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    """Add up boxes of voxels; those at the high edge may be smaller."""
    total = a.astype("f8")
    for axis, factor in enumerate(factors):
        starts = np.arange(0, a.shape[axis], factor)
        total = np.add.reduceat(total, starts, axis=axis)
    return total


def block_means(a: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    return block_sums(a, factors) / block_sums(np.ones(a.shape), factors)


@pytest.mark.parametrize("reduce", [every, block_means])
@shapes_profile
@given(image=images(ndims=(1, 4), min_extent=1), data=st.data())
def test_smaller_by_a_factor(reduce: Function, image: NDArray[Any], data: st.DataObject) -> None:
    ndim = image.ndim
    factors = data.draw(st.tuples(*[st.sampled_from([1, 2, 3])] * ndim), label="factors")
    # Neither halos nor extents need be multiples of the factors.
    around = data.draw(surroundings(ndim, need=1))
    function = partial(reduce, factors=factors)
    expected = whole(function, image, around, range(ndim), factors)
    lazy = ci.map_cells(
        function,
        image,
        dtype=expected.dtype,
        shrink=factors,
        cell_shape=data.draw(cell_shapes(expected.shape)),
        **around,
    )
    assert lazy.shape == tuple(-(-n // f) for n, f in zip(image.shape, factors, strict=True))
    check(lazy, expected, data)


@pytest.mark.parametrize("factor", [2, 3, 7])
@pytest.mark.parametrize("extent", [1, 2, 3, 6, 7, 20, 21, 22, 23])
@pytest.mark.parametrize("halo", [0, 1, (2, 0), (0, 5)])
def test_one_factor_for_all_axes_and_odd_extents(factor: int, extent: int, halo: Any) -> None:
    image = np.arange(extent * extent).reshape(extent, extent)
    width = halo if isinstance(halo, int) else [halo, halo]
    for boundary in BOUNDARIES:
        lazy = ci.map_cells(
            partial(steps, factors=(factor, factor)),
            image,
            dtype=int,
            shrink=factor,
            halo=width,
            boundary=boundary,
            cell_shape=2,
        )
        check(lazy, image[::factor, ::factor])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0, 3)])
def test_an_empty_image_becomes_no_smaller_than_empty(shape: tuple[int, ...]) -> None:
    lazy = ci.map_cells(np.negative, np.zeros(shape), shrink=2, halo=3, boundary="wrap")
    check(lazy, np.zeros([-(-n // 2) for n in shape]))


def test_a_pyramid_is_a_chain_of_factors() -> None:
    image = np.random.default_rng(3).integers(0, 99, (37, 50)).astype("f8")
    level: Any = image
    expected = image
    for _ in range(4):
        level = ci.map_cells(
            partial(block_means, factors=(2, 2)), level, dtype="f8", shrink=2, cell_shape=(3, 4)
        )
        expected = block_means(expected, (2, 2))
    check(level, expected)


# ---------------------------------------------------------------- all together


@shapes_profile
@given(image=images(ndims=(2, 4), min_extent=1), data=st.data())
@example(image=np.arange(30.0).reshape(2, 3, 5), data=None)
def test_dropped_and_new_and_smaller_axes(image: NDArray[Any], data: Any) -> None:
    ndim = image.ndim
    if data is None:
        drop, place, factors, around, cells = 1, 0, (2, 1, 3), None, (2, 1, 1)
    else:
        drop = data.draw(st.integers(0, ndim - 1), label="dropped")
        place = data.draw(st.integers(-ndim, ndim - 1), label="new")
        factors = data.draw(st.tuples(*[st.sampled_from([1, 2, 3])] * ndim), label="factors")
        factors = tuple(1 if axis == drop else f for axis, f in enumerate(factors))
        around = data.draw(surroundings(ndim))
        cells = None
    around = around or {"halo": ((1, 2),) * ndim, "boundary": "wrap", "fill_value": 0}

    def reduce(a: NDArray[Any]) -> NDArray[Any]:
        small = block_sums(a, factors)
        return np.stack([small.max(axis=drop), small.min(axis=drop)], axis=place)

    axes: list[int | None] = [axis for axis in range(ndim) if axis != drop]
    axes.insert(place % ndim, None)
    expected = whole(reduce, image, around, axes, factors)
    if cells is None:
        cells = list(data.draw(cell_shapes(expected.shape)))
        cells[place % ndim] = 2
    lazy = ci.map_cells(
        reduce,
        image,
        dtype="f8",
        drop_axis=drop,
        new_axis={place: 2},
        shrink=factors,
        cell_shape=cells,
        **around,
    )
    check(lazy, expected, data)
    np.testing.assert_array_equal(lazy.to_dask().compute(scheduler="sync"), expected)


@shapes_profile
@given(image=images(ndims=(3, 3), min_extent=1), data=st.data())
def test_smaller_together_with_an_input_that_is_broadcast(
    image: NDArray[Any], data: st.DataObject
) -> None:
    factors = data.draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 3), label="factors")
    assume(image.shape[0] > 1)
    plane = image[:1] + 1
    line = image[0, 0] + 2
    around = data.draw(surroundings(3))

    def combine(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> NDArray[Any]:
        return steps(a.astype("f8") + b + c, factors)

    # Broadcast first, then padded: an axis that is stretched needs no halo.
    full = [np.broadcast_to(each, image.shape) for each in (image, plane, line)]
    expected = steps(sum(each.astype("f8") for each in full), factors)
    lazy = ci.map_cells(
        combine,
        image,
        plane,
        line,
        dtype="f8",
        shrink=factors,
        cell_shape=data.draw(cell_shapes(expected.shape)),
        **around,
    )
    check(lazy, expected, data)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"drop_axis": 2}, ValueError, r"drop_axis 2: allowed is -2\.\.1"),
        ({"drop_axis": -3}, ValueError, r"drop_axis -3: allowed is -2\.\.1"),
        ({"drop_axis": (0, -2)}, ValueError, r"drop_axis names an axis twice: \(0, -2\)"),
        ({"drop_axis": 0.0}, TypeError, r"drop_axis.* must be an integer, got 0\.0"),
        ({"drop_axis": "0"}, TypeError, r"drop_axis must be .*, got '0'"),
        ({"shrink": 0}, ValueError, r"shrink must be at least 1, got 0"),
        ({"shrink": (2, -1)}, ValueError, r"shrink\[1\] must be at least 1, got -1"),
        ({"shrink": 1.5}, TypeError, r"shrink must be an integer, got 1\.5"),
        ({"shrink": (2, 2, 2)}, ValueError, r"shrink must have one value for each of 2 axes"),
        ({"shrink": (2, 1), "drop_axis": 0}, ValueError, r"shrink\[0\] = 2 on axis 0, which is dr"),
        ({"new_axis": 0}, TypeError, r"new_axis must map .* for instance \{0: 3\}; got 0"),
        ({"new_axis": {3: 2}}, ValueError, r"new_axis 3: allowed is -3\.\.2"),
        ({"new_axis": {-4: 2}}, ValueError, r"new_axis -4: allowed is -3\.\.2"),
        ({"new_axis": {0: -1}}, ValueError, r"new_axis\[0\] must be at least 0, got -1"),
        ({"new_axis": {0: 2.0}}, TypeError, r"new_axis\[0\] must be an integer, got 2\.0"),
        ({"new_axis": {0.0: 2}}, TypeError, r"new_axis must be an integer, got 0\.0"),
        ({"new_axis": {0: 2, -4: 2}}, ValueError, r"new_axis names an axis twice"),
        (
            {"new_axis": {0: 5}, "cell_shape": (2, 3, 3)},
            ValueError,
            r"cell_shape\[0\] = 2 on the new axis 0: .* must be 5",
        ),
        ({"dtype": object}, ValueError, r"dtype object cannot be kept in cells"),
        ({"dtype": "U"}, ValueError, r"dtype <U0 cannot be kept in cells"),
        ({"dtype": "no such"}, TypeError, r"no such"),
    ],
)
def test_a_wrong_declaration_is_refused(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    settings = {"dtype": int, **settings}
    with pytest.raises(error, match=says):
        ci.map_cells(np.negative, np.zeros((4, 6)), **settings)


@pytest.mark.parametrize(
    ("settings", "function", "got", "expected"),
    [
        ({"drop_axis": 0}, lambda a: a, r"\(4, 3\)", r"\(3,\)"),
        ({"new_axis": {0: 2}}, lambda a: a, r"\(2, 3\)", r"\(2, 2, 3\)"),
        ({"new_axis": {0: 2}}, lambda a: np.stack([a] * 3), r"\(3, 2, 3\)", r"\(2, 2, 3\)"),
        ({"shrink": 2}, lambda a: a, r"\(4, 6\)", r"\(2, 3\)"),
        ({}, lambda a: a[::2], r"\(1, 3\)", r"\(2, 3\)"),
        ({}, lambda a: a.T, r"\(3, 2\)", r"\(2, 3\)"),
    ],
)
def test_a_result_of_another_shape_than_declared_names_cell_got_and_expected(
    settings: dict[str, Any], function: Function, got: str, expected: str
) -> None:
    cells = {"drop_axis": 3, "new_axis": (2, 2, 3)}.get(next(iter(settings), ""), (2, 3))
    lazy = ci.map_cells(function, np.zeros((4, 6)), dtype="f8", cell_shape=cells, **settings)
    with pytest.raises(
        ci.ResultError, match=rf"<lambda> at cell \(0.*returned shape {got}, expected {expected}"
    ):
        lazy.load(0)
    assert lazy.peek(0) is None
