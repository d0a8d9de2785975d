"""Statistics, histograms and quantiles of whole images, against NumPy."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.ops.histograms import histogram, quantiles
from cellimg_dask.ops.statistics import Statistics, statistics

INTEGERS = ["?", "u1", "i1", ">u2", "<i2", "u4", ">i4", "u8", "i8"]
FLOATS = ["f2", "f4", ">f8"]


@st.composite
def images(
    draw: st.DrawFn, dtypes: list[str], *, nan: bool = True, min_side: int = 0
) -> tuple[NDArray[Any], tuple[int, ...]]:
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=min_side, max_side=6))
    elements: Any = None
    if dtype.kind == "f":
        width = 8 * dtype.itemsize
        elements = st.floats(-1000, 1000, width=width) | (
            st.sampled_from([np.nan, np.inf, -np.inf, -0.0]) if nan else st.just(-0.0)
        )
    image = draw(hnp.arrays(dtype, shape, elements=elements))
    return image, tuple(draw(st.integers(1, 7)) for _ in shape)


def quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# ---------------------------------------------------------------- moments


@given(case=images(INTEGERS))
@example(case=(np.array([2**64 - 1, 2**64 - 1, 0], "u8"), (1,)))
@example(case=(np.array([-(2**63), -(2**63), 2**63 - 1]), (2,)))
@example(case=(np.full(9, 2**31 - 1, "i4"), (2,)))
@example(case=(np.array([-(2**31), 2**31 - 1], "i4"), (2,)))
def test_moments_of_integers_are_exact(case: tuple[NDArray[Any], tuple[int, ...]]) -> None:
    image, cells = case
    got = statistics(image, cell_shape=cells).result()
    assert isinstance(got, Statistics)
    voxels = [int(value) for value in image.reshape(-1)]
    assert (got.count, got.sum) == (len(voxels), sum(voxels))
    if not voxels:
        assert got.min is None
        assert np.isnan(got.mean)
        assert np.isnan(got.std)
        return
    native = image.dtype.newbyteorder("=")
    assert (got.min, got.max) == (image.min(), image.max())
    assert np.asarray(got.min).dtype == native
    assert got.mean == sum(voxels) / len(voxels)
    mean = Fraction(sum(voxels), len(voxels))
    var = float(sum((value - mean) ** 2 for value in voxels) / len(voxels))
    if image.dtype.itemsize <= 4:
        assert got.var == var
    else:
        assert got.var == pytest.approx(var, rel=1e-9, abs=1e-9 * float(max(map(abs, voxels))))


@given(case=images([*FLOATS, "c8", "c16"]))
def test_moments_of_floats(case: tuple[NDArray[Any], tuple[int, ...]]) -> None:
    image, cells = case
    got = quiet(statistics(image, cell_shape=cells).result)
    wide = image.astype("c16" if image.dtype.kind == "c" else "f8")
    assert got.count == image.size
    if image.size == 0:
        return
    if not np.all(np.isfinite(wide)) and image.dtype.kind == "c":
        return
    np.testing.assert_equal(got.min, image.min())
    np.testing.assert_equal(got.max, image.max())
    scale = np.abs(wide[np.isfinite(wide)]).max(initial=1.0)
    close = {"rtol": 1e-12, "atol": 1e-12 * float(scale)}
    np.testing.assert_allclose(got.sum, quiet(wide.sum), **close)
    np.testing.assert_allclose(got.mean, quiet(wide.mean), **close)
    np.testing.assert_allclose(got.var, quiet(wide.var), rtol=1e-10, atol=1e-12 * float(scale**2))
    np.testing.assert_allclose(got.std, np.sqrt(got.var))


@given(case=images(FLOATS))
def test_moments_without_what_is_not_a_number(case: tuple[NDArray[Any], tuple[int, ...]]) -> None:
    image, cells = case
    got = quiet(statistics(image, cell_shape=cells, nan_policy="omit").result)
    numbers = image[~np.isnan(image)].astype("f8")
    assert got.count == numbers.size
    if numbers.size:
        assert (got.min, got.max) == (numbers.min(), numbers.max())
        np.testing.assert_allclose(got.mean, quiet(numbers.mean), rtol=1e-12, atol=1e-9)


def test_nothing_cancels() -> None:
    image = 1e9 + np.random.default_rng(1).random((50, 60))
    got = statistics(image, cell_shape=7).result()
    assert got.var == pytest.approx(image.var(), rel=1e-9)
    assert got.mean == pytest.approx(image.mean(), rel=1e-15)


# ---------------------------------------------------------------- histograms


@given(
    case=images([*INTEGERS, *FLOATS], nan=False),
    bins=st.integers(1, 20) | st.lists(st.integers(-5, 300), min_size=2, max_size=6).map(sorted),
    ends=st.none() | st.tuples(st.integers(-10, 5), st.integers(5, 300)),
    density=st.booleans(),
)
@example(case=(np.zeros((0, 3)), (1, 1)), bins=3, ends=None, density=False)
@example(case=(np.full((1,), 4503599627370498, "u8"), (1,)), bins=1, ends=None, density=False)
@example(case=(np.full((3, 3), 7, "i2"), (2, 2)), bins=3, ends=None, density=True)
@example(case=(np.full((3, 3), 7.0), (2, 2)), bins=3, ends=None, density=True)
def test_counts_and_edges_are_numpys(
    case: tuple[NDArray[Any], tuple[int, ...]], bins: Any, ends: Any, density: bool
) -> None:
    image, cells = case
    native = image.astype(image.dtype.newbyteorder("="))
    native = native.view("u1") if native.dtype == bool else native
    found = histogram(image, bins, ends, density=density, cell_shape=cells)
    try:
        counts, edges = quiet(np.histogram, native, bins, ends, density=density)
    except ValueError as error:
        # Where numbers are too large to tell the ends of a bin apart.
        with pytest.raises(ci.BlockError, match=str(error)):
            quiet(found.result)
        return
    got_counts, got_edges = quiet(found.result)
    np.testing.assert_array_equal(got_counts, counts)
    np.testing.assert_array_equal(got_edges, edges)
    assert got_edges.dtype == edges.dtype
    assert got_counts.dtype == counts.dtype


def test_a_range_leaves_out_what_is_not_a_number() -> None:
    image = np.array([1, 2, np.nan, np.inf, 3, 9])
    counts, _ = histogram(image, 3, (0, 3), cell_shape=2).result()
    np.testing.assert_array_equal(counts, [0, 1, 2])
    with pytest.raises(ci.BlockError, match=r"no ends of bins; give range"):
        histogram(image, 3, cell_shape=2).result()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: histogram(np.zeros(3), "auto"), TypeError, "number of bins"),
        (lambda: histogram(np.zeros(3), 0), ValueError, "bins"),
        (lambda: histogram(np.zeros(3), 2.5), TypeError, "bins"),
        (lambda: histogram(np.zeros(3), [3, 1]), ValueError, "increasing"),
        (lambda: histogram(np.zeros(3), 3, (5, 1)), ValueError, "low and high"),
        (lambda: histogram(np.zeros(3), 3, (0, np.inf)), ValueError, "finite"),
        (lambda: histogram(np.zeros(3, complex)), TypeError, "complex128"),
        (lambda: statistics(np.zeros(3, "M8[s]")), TypeError, "datetime64"),
        (lambda: statistics(np.zeros(3), nan_policy="raise"), ValueError, "omit"),
        (lambda: quantiles(np.zeros(3), 1.5), ValueError, "from 0 to 1"),
        (lambda: quantiles(np.zeros(3), np.nan), ValueError, "from 0 to 1"),
        (lambda: quantiles(np.zeros(3, complex), 0.5), TypeError, "complex"),
    ],
)
def test_what_is_wrong_is_said_at_once(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        wrong()


# ---------------------------------------------------------------- quantiles


@given(
    case=images([*INTEGERS, *FLOATS]),
    q=st.floats(0, 1) | st.lists(st.floats(0, 1), max_size=5),
)
@example(case=(np.array([-1, 1, -(2**31), 2**31 - 1], "i4"), (2,)), q=[0, 0.3, 0.5, 1])
@example(case=(np.array([-1.5, 1e300, -1e-300, 0, -0.0]), (2,)), q=[0, 0.25, 0.5, 1])
def test_quantiles_are_numpys(case: tuple[NDArray[Any], tuple[int, ...]], q: Any) -> None:
    image, cells = case
    got = quiet(quantiles(image, q, cell_shape=cells).result)
    native = image.astype("f8") if image.dtype.itemsize < 8 else image
    assert np.shape(got) == np.shape(q)
    assert got.dtype == (image.dtype.newbyteorder("=") if image.dtype.kind == "f" else "f8")
    if image.size == 0 or (image.dtype.kind == "f" and np.isnan(image).any()):
        assert np.all(np.isnan(got))
        return
    expected = quiet(
        np.quantile, native.astype(native.dtype.newbyteorder("=")), np.asarray(q, "f8")
    )
    infinite = np.isnan(expected)
    if image.dtype.kind in "iu" and image.dtype.itemsize == 8:
        # NumPy rounds the two neighbours first.
        np.testing.assert_allclose(got, expected, rtol=1e-15)
    else:
        expected = np.asarray(expected).astype(got.dtype)
        np.testing.assert_array_equal(np.asarray(got)[~infinite], expected[~infinite])


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", "u8"])
def test_quantiles_of_many_voxels(dtype: str) -> None:
    random = np.random.default_rng(3)
    image = random.normal(100, 30, (60, 70)).astype(dtype)
    q = np.linspace(0, 1, 21)
    got = quantiles(image, q, cell_shape=(17, 23)).result()
    np.testing.assert_array_equal(got, np.quantile(image.astype("f8"), q).astype(got.dtype))


# ---------------------------------------------------------------- together


def test_one_computation_for_all() -> None:
    calls = []

    def noted(array: NDArray[Any]) -> NDArray[Any]:
        calls.append(1)
        return array * 2

    image = ci.map_cells(noted, np.arange(100, dtype="f4"), dtype="f4", cell_shape=10)
    found = dask.compute(
        statistics(image), histogram(image, 5), quantiles(image, 0.5), scheduler="threads"
    )
    assert found[0].mean == 99
    assert found[1][0].tolist() == [20] * 5
    assert found[2] == 99
    assert len(calls) == 10


def test_an_edit_counts_one_cell_again() -> None:
    source = ci.Source(np.arange(64, dtype="u1").reshape(8, 8))
    several = [
        statistics(source, cell_shape=2),
        histogram(source, 4, cell_shape=2),
        quantiles(source, 0.5, cell_shape=2),
    ]
    for found in several:
        found.result()
    with source.edit() as array:
        array[0, 0] = 200
    data = np.arange(64, dtype="u1").reshape(8, 8)
    data[0, 0] = 200
    assert several[0].result().sum == data.sum()
    np.testing.assert_array_equal(several[1].result()[0], np.histogram(data, 4)[0])
    assert several[2].result() == np.median(data)
    assert [found.cells.stats().loads for found in several[:2]] == [17, 17]


def test_chunks_of_dask(rng: np.random.Generator) -> None:
    data = rng.random((20, 30), dtype="f4")
    image = da.from_array(data, chunks=(7, 11))
    np.testing.assert_array_equal(histogram(image, 9).compute()[0], np.histogram(data, 9)[0])
    assert quantiles(image, 0.25).compute(scheduler="sync") == np.quantile(data, 0.25)


def test_on_a_cluster(client: Any, rng: np.random.Generator) -> None:
    data = rng.random((20, 30), dtype="f4")
    with ci.BlockQueue(backend=client) as queue:
        settings: dict[str, Any] = {"cell_shape": 9, "queue": queue}
        assert quantiles(data, 0.25, **settings).result() == np.quantile(data, 0.25)
        np.testing.assert_array_equal(
            histogram(data, 9, **settings).result()[0], np.histogram(data, 9)[0]
        )
    here = statistics(data, cell_shape=9)
    assert client.compute(here).result(timeout=60) == here.result()


def test_a_real_volume(shared_data: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    brain = tifffile.imread(shared_data / "brain_signal.tif")[:, :200, :200]
    got = statistics(brain, cell_shape=(16, 64, 64)).result()
    assert (got.min, got.max, got.sum) == (brain.min(), brain.max(), brain.sum(dtype=int))
    assert got.std == pytest.approx(brain.std(), rel=1e-12)
    counts, edges = np.histogram(brain, 50)
    found = histogram(brain, 50, cell_shape=(16, 64, 64)).result()
    np.testing.assert_array_equal(found[0], counts)
    np.testing.assert_array_equal(found[1], edges)
    q = [0.001, 0.5, 0.998]
    np.testing.assert_array_equal(
        quantiles(brain, q, cell_shape=(16, 64, 64)).result(), np.quantile(brain, q)
    )
