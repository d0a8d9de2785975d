"""Tables of objects, against scikit-image's on the whole image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.measure import label as label_whole
from skimage.measure import regionprops_table

import cellimg_dask as ci
from cellimg_dask.ops import tables
from cellimg_dask.ops.frames import latest
from cellimg_dask.ops.objects import Wants, measure, merge
from cellimg_dask.ops.properties import MASK_PROPERTIES, PROPERTIES
from cellimg_dask.ops.tables import region_table

OURS = {"touches_border", "intensity_sum"}
FLAT = {"eccentricity", "orientation", "moments_hu", "moments_weighted_hu"}
LENGTHS = {"axis_major_length", "axis_minor_length"}
WEIGHTED = {name for name in PROPERTIES if "weighted" in name}
OF_IMAGE = WEIGHTED | {name for name in PROPERTIES if name.startswith("intensity")}


def both_have(ndim: int, spacing: Sequence[float] | None, *, image: bool) -> list[str]:
    """Return the properties that scikit-image has too, for such an image."""
    names = set(PROPERTIES) - OURS
    if not image:
        names -= OF_IMAGE
    if ndim != 2:
        names -= FLAT
    if ndim not in (2, 3):
        names -= LENGTHS
    if spacing is not None and any(step != 1 for step in spacing):
        names -= {"moments_hu", "moments_weighted_hu"}
    return sorted(names)


def whole(labels: Any, image: Any, names: Sequence[str], spacing: Any = None) -> pd.DataFrame:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return pd.DataFrame(regionprops_table(labels, image, names, spacing=spacing))


def magnitudes(
    labels: NDArray[Any], weight: NDArray[Any] | None, spacing: Sequence[float]
) -> dict[int, dict[tuple[int, ...], float]]:
    """Return for each object how large central moments would be if nothing cancelled."""
    found = {}
    for value in np.unique(labels[labels > 0]).tolist():
        places = np.argwhere(labels == value) * np.asarray(spacing)
        w = np.ones(len(places)) if weight is None else weight[labels == value].astype("f8")
        away = np.abs(places - (places * w[:, None]).sum(0) / w.sum()) + 1e-3 * np.asarray(spacing)
        found[value] = {
            powers: float((w * (away**powers).prod(1)).sum())
            for powers in product(range(4), repeat=labels.ndim)
        }
    return found


def assert_tables_equal(
    got: pd.DataFrame,
    expected: pd.DataFrame,
    labels: NDArray[Any],
    image: NDArray[Any] | None = None,
    spacing: Sequence[float] | None = None,
) -> None:
    ndim = labels.ndim
    steps = spacing or (1.0,) * ndim
    assert list(got.columns) == list(expected.columns)
    plain: Any = None
    weighted: dict[int | None, Any] = {}
    for name in expected.columns:
        have, want = got[name], expected[name]
        if name == "slice":
            assert list(have) == list(want)
            continue
        if want.dtype.kind in "iub":
            np.testing.assert_array_equal(have, want, name)
            continue
        assert have.dtype == want.dtype, name
        atol = 0.0 if "intensity" not in name else 1e-9 * np.abs(image).max(initial=1)
        kind, *numbers = name.split("-")
        powers = tuple(map(int, numbers[:ndim]))
        if kind.endswith(("central", "normalized")):
            if "weighted" in kind:
                assert image is not None
                channel = int(numbers[ndim]) if len(numbers) > ndim else None
                if channel not in weighted:
                    part = image if channel is None else image[..., channel]
                    weighted[channel] = magnitudes(labels, part, steps)
                scale = weighted[channel]
            else:
                plain = plain or magnitudes(labels, None, steps)
                scale = plain
            scales = np.array([scale[value][powers] for value in expected["label"]])
            if kind.endswith("normalized"):
                total = np.array([scale[v][(0,) * ndim] for v in expected["label"]])
                scales = scales / min(steps) ** sum(powers) / total ** (sum(powers) / ndim + 1)
            bad = ~(np.abs(have - want) <= 1e-9 * scales) & ~(have.isna() & want.isna())
            assert not bad.any(), f"{name}: {have[bad]} {want[bad]} {scales[bad]}"
        elif kind in ("eccentricity", "axis_minor_length", "inertia_tensor_eigvals"):
            # Of a line in no main direction the least eigenvalue is 0 but for rounding, and the
            # root of that is large.
            size = max(steps) * max(labels.shape)
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-6 * size, err_msg=name)
        elif kind == "orientation":
            continue
        elif kind.endswith("hu"):
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-9, err_msg=name)
        elif kind == "inertia_tensor":
            size = max(step * n for step, n in zip(steps, labels.shape, strict=True)) ** 2
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-12 * size, err_msg=name)
        else:
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=atol, err_msg=name)
    if "orientation" in expected and len(expected):
        check_orientation(got, expected)


def check_orientation(got: pd.DataFrame, expected: pd.DataFrame) -> None:
    a, b, c = (expected[f"inertia_tensor-{n}"] for n in ("0-0", "0-1", "1-1"))
    # An object without a longest axis has none, but scikit-image names one.
    clear = np.hypot(a - c, 2 * b) > 1e-6 * (a + c)
    apart = np.abs(got["orientation"] - expected["orientation"])[clear]
    # A quarter turn up and one down are the same.
    assert (np.minimum(apart, np.abs(np.pi - apart)) < 1e-9).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[Any], Any, tuple[int, ...], Any]:
    # scikit-image knows no others.
    ndim = draw(st.integers(2, 3))
    top = {1: 60, 2: 14, 3: 7, 4: 4}[ndim]
    shape = tuple(draw(st.integers(1, top)) for _ in range(ndim))
    cells = tuple(draw(st.integers(1, top)) for _ in range(ndim))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    # Chunky or as fine as sand; labels of several pieces, far from each other.
    coarse = draw(st.integers(1, 4))
    small = random.integers(0, draw(st.integers(2, 7)), [-(-n // coarse) for n in shape])
    labels = np.kron(small, np.ones((coarse,) * ndim, int))[tuple(map(slice, shape))]
    labels = labels.astype(draw(st.sampled_from(["u1", "i2", ">i4", "i8", "u4"])))
    channels = draw(st.sampled_from([(), (), (1,), (2,)]))
    dtype = np.dtype(draw(st.sampled_from(["u1", ">u2", "i4", "f8", "?", None])) or "f8")
    image: Any = random.random(shape + channels) * 200 + 1
    image = image > 60 if dtype.kind == "b" else image.astype(dtype)
    if dtype.kind == "b":
        image[...] = True
    spacing = draw(st.sampled_from([None, (0.5,) * ndim, tuple(np.arange(ndim) * 0.7 + 0.3)]))
    return labels, image if draw(st.booleans()) else None, cells, spacing


@settings(max_examples=40)
@given(case=cases())
def test_all_that_both_have(case: tuple[NDArray[Any], Any, tuple[int, ...], Any]) -> None:
    labels, image, cells, spacing = case
    names = both_have(labels.ndim, spacing, image=image is not None)
    native = labels.astype("i8")
    expected = whole(native, image, names, spacing)
    table = region_table(labels, image, names, spacing=spacing, cell_shape=cells)
    got = table.compute(scheduler="sync")
    assert_tables_equal(got, expected, native, image, spacing)
    assert (got.dtypes == table.dtypes).all()


@pytest.mark.parametrize("shape", [(90,), (5, 4, 3, 6)])
def test_other_numbers_of_axes(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    labels, ndim = rng.integers(0, 5, shape), len(shape)
    image = rng.integers(1, 1000, shape)
    spacing = tuple(np.arange(ndim) + 0.5)
    names = both_have(ndim, spacing, image=True)
    table = region_table(labels, image, names, spacing=spacing, cell_shape=3).compute()
    assert table["label"].tolist() == [1, 2, 3, 4]
    for _, row in table.iterrows():
        places = np.argwhere(labels == row["label"])
        values = image[labels == row["label"]]
        start = places.min(axis=0)
        local = (places - start) * spacing
        mean, weighted = local.mean(axis=0), (local * values[:, None]).sum(axis=0) / values.sum()
        assert row["num_pixels"] == len(places)
        assert row["intensity_std"] == pytest.approx(values.std(), rel=1e-12)
        cov = np.cov(local.T, bias=True).reshape(ndim, ndim)
        for axis in range(ndim):
            assert row[f"bbox-{axis}"] == start[axis]
            assert row[f"centroid_local-{axis}"] == pytest.approx(mean[axis], rel=1e-12)
            assert row[f"centroid_weighted-{axis}"] == pytest.approx(
                weighted[axis] + start[axis] * spacing[axis], rel=1e-12
            )
            own = np.trace(cov) - cov[axis, axis]
            assert row[f"inertia_tensor-{axis}-{axis}"] == pytest.approx(own, rel=1e-12, abs=1e-12)
        for powers in product(range(4), repeat=ndim):
            end = "-".join(map(str, powers))
            for name, x, w in [
                ("moments", local, 1),
                ("moments_central", local - mean, 1),
                ("moments_weighted", local, values),
                ("moments_weighted_central", local - weighted, values),
            ]:
                parts = w * (x**powers).prod(axis=1)
                expected = pytest.approx(parts.sum(), rel=1e-9, abs=1e-12 * np.abs(parts).sum())
                assert row[f"{name}-{end}"] == expected


@pytest.mark.parametrize("cells", [(64, 64), (17, 23), (5, 64), (1, 9)])
def test_objects_of_a_segmented_picture(cells: tuple[int, ...], rng: np.random.Generator) -> None:
    from scipy import ndimage

    image = ndimage.gaussian_filter(rng.random((64, 64)), 2)
    labels = label_whole(image > np.median(image))
    names = both_have(2, None, image=True)
    got = region_table(labels, image, names, cell_shape=cells).compute()
    assert_tables_equal(got, whole(labels, image, names), labels, image)
    np.testing.assert_allclose(
        got["orientation"], whole(labels, image, names)["orientation"], rtol=1e-9, atol=1e-9
    )


def test_a_real_volume(shared_data: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    brain = tifffile.imread(shared_data / "brain_signal.tif")[:, 100:220, 100:220]
    labels = label_whole(brain > np.quantile(brain, 0.97))
    names = both_have(3, (5, 1, 1), image=True)
    table = region_table(labels, brain, names, spacing=(5, 1, 1), cell_shape=(16, 50, 64))
    expected = whole(labels, brain, names, (5, 1, 1))
    assert len(expected) > 100
    assert_tables_equal(table.compute(), expected, labels, brain, (5, 1, 1))


def discs() -> NDArray[Any]:
    y, x = np.indices((40, 90))
    labels = np.zeros((40, 90), int)
    for number, (row, column, radius) in enumerate([(9, 9, 8), (20, 40, 19), (19.5, 70.5, 15)], 1):
        labels[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = number
    labels[30:37, 2:9] = 4
    labels[39, 88] = 5
    return labels


@pytest.mark.parametrize("cell", [3, 7, 11, 100])
def test_what_is_symmetric_is_exactly_so(cell: int) -> None:
    """Where it depends on the last bit, scikit-image's whole image decides."""
    labels = discs()
    names = ["label", "inertia_tensor", "orientation", "eccentricity", "moments_hu", "centroid"]
    got = region_table(labels, properties=names, cell_shape=cell).compute()
    expected = whole(labels, None, names)
    even = [0, 2, 3, 4]
    np.testing.assert_array_equal(got["orientation"][even], expected["orientation"][even])
    same = got["inertia_tensor-0-0"] == got["inertia_tensor-1-1"]
    assert same.tolist() == [True, False, True, True, True]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_sums_and_borders(rng: np.random.Generator) -> None:
    labels = np.zeros((12, 12), int)
    labels[1:3, 1:3], labels[0, 8], labels[5:9, 11], labels[5:8, 3:6] = 1, 2, 3, 40
    for dtype in ("u1", "i2", "u4", "i8", "u8", "f4"):
        image = rng.integers(0, 200, labels.shape).astype(dtype)
        table = region_table(
            labels, image, ["label", "touches_border", "intensity_sum"], cell_shape=5
        ).compute()
        assert table["touches_border"].tolist() == [False, True, True, False]
        assert table["intensity_sum"].tolist() == [
            image[labels == value].sum() for value in table["label"]
        ]
        kind = {"f": "f8", "u": "u8"}.get(image.dtype.kind, "i8")
        assert table["intensity_sum"].dtype == kind


def test_integers_that_need_more_than_64_bits() -> None:
    labels = np.ones(10, int)
    image = np.full(10, 2**63 + 11, "u8")
    image[3] = 2**64 - 1
    names = ["intensity_sum", "intensity_mean", "intensity_max", "intensity_std"]
    (row,) = region_table(labels, image, names, cell_shape=3).compute().to_dict("records")
    exact = sum(map(int, image))
    assert row["intensity_sum"] == exact % 2**64
    assert row["intensity_mean"] == exact / 10
    assert row["intensity_max"] == float(2**64)
    assert row["intensity_std"] == pytest.approx(image.astype(float).std(), rel=1e-9)


def test_single_precision_is_computed_in_double(rng: np.random.Generator) -> None:
    labels = np.repeat([1, 2], 50_000).reshape(100, 1000)
    image = (rng.random((100, 1000)) + 1000).astype("f4")
    names = ["intensity_mean", "intensity_std"]
    got = region_table(labels, image, names, cell_shape=99).compute()
    np.testing.assert_allclose(got, whole(labels, image.astype("f8"), names), rtol=1e-9)


def test_what_is_no_number_stays_in_its_object() -> None:
    labels = np.array([0, 1, 1, 0, 2, 2, 0, 3])
    image = np.array([np.nan, 1, 2, np.inf, 3, np.nan, 0, 4])
    names = ["intensity_mean", "intensity_max", "intensity_std", "centroid_weighted"]
    got = region_table(labels, image, names, cell_shape=3).compute()
    np.testing.assert_array_equal(got.isna().any(axis=1), [False, True, False])
    np.testing.assert_allclose(got["centroid_weighted-0"], [5 / 3, np.nan, 7])


# ---------------------------------------------------------------- large numbers


def test_large_sparse_labels(rng: np.random.Generator) -> None:
    values = np.array([0, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63 + 5, 2**64 - 1], "u8")
    small = np.kron(rng.integers(0, 7, (6, 7)), np.ones((3, 4), int))
    names = ["label", "area", "bbox", "centroid", "moments_central"]
    expected = whole(small, None, names)
    for dtype, top in (("u8", 7), ("i8", 5)):
        labels = values.astype(dtype)[np.where(small < top, small, 0)]
        got = region_table(labels, properties=names, cell_shape=(5, 6), npartitions=2).compute()
        got = got.sort_values("label", ignore_index=True)
        assert got["label"].dtype == dtype
        assert got["label"].tolist() == values[1:top].tolist()
        np.testing.assert_allclose(
            got.drop(columns="label"), expected[: top - 1].drop(columns="label"), atol=1e-6
        )
    negative = np.where(small == 3, -3, small)
    assert 3 not in region_table(negative, cell_shape=4).compute()["label"].tolist()


def test_far_from_the_origin() -> None:
    """Nothing cancels however large the coordinates are."""
    small = label_whole(np.random.default_rng(5).random((37, 29)) < 0.55)
    far = 10**6

    def paint(block: ci.Block) -> None:
        first, stop = max(block.min[0], far), block.max[0] + 1
        if first < stop:
            columns = block.roi.slices[1]
            block.data[first - block.min[0] :] = small[first - far : stop - far, columns]

    labels = ci.fill_cells(paint, ci.CellGrid((far + 37, 29), (27_015, 11)), dtype="i4", cache=None)
    names = both_have(2, None, image=False)
    expected = whole(small, None, names)
    for column in ("centroid-0", "bbox-0", "bbox-2"):
        expected[column] += far
    got = region_table(labels, properties=names).compute()
    assert got["slice"][0][0].start == got["bbox-0"][0]
    assert_tables_equal(got.drop(columns="slice"), expected.drop(columns="slice"), small)


def test_an_object_as_large_as_can_be() -> None:
    far = 2**40
    wants = Wants(second=True, raw=True, central=True)
    parts = [
        measure(np.ones((2, 1), int), None, start, wants) for start in [(0, 0), (far, far + 2)]
    ]
    found = tables.Measured(merge(parts), (2**41,) * 2, (1, 1), None, np.dtype("f8"))
    rows = [Fraction(n) for n in (0, 1, far, far + 1)]
    columns = [Fraction(n) for n in (0, 0, far + 2, far + 2)]

    def moment(a: list[Fraction], b: list[Fraction]) -> float:
        mean_a, mean_b = sum(a) / 4, sum(b) / 4
        return float(sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / 4)

    tensor = found["inertia_tensor"][0]
    assert tensor[0, 1] == -moment(rows, columns)
    assert tensor[1, 1] == moment(rows, rows)
    assert found["num_pixels"].tolist() == [4]


# ---------------------------------------------------------------- with masks


def with_masks(ndim: int) -> list[str]:
    return [name for name, known in MASK_PROPERTIES.items() if not known.axes or ndim in known.axes]


@pytest.mark.parametrize(("shape", "cells"), [((40, 50), (9, 14)), ((16, 30, 30), (5, 9, 30))])
def test_scikit_images_own_properties_of_objects_that_fit(
    shape: tuple[int, ...], cells: tuple[int, ...], rng: np.random.Generator
) -> None:
    from scipy import ndimage

    image = ndimage.gaussian_filter(rng.random(shape), 1)
    labels = label_whole(image > np.quantile(image, 0.9), connectivity=1).astype("i8") * 10**12
    if len(shape) == 3:
        # scikit-image has no diameter of what is flat.
        found = [labels == value for value in np.unique(labels)[1:]]
        flat = [mask for mask in found if np.ptp(np.argwhere(mask), axis=0).min() < 2]
        labels[np.any(flat, axis=0)] = 0
    # In two pieces, of which the second is in another cell.
    pieces = np.unique(labels)[[2, 3]]
    labels[labels == pieces[1]] = pieces[0]
    names = ["label", "area", "bbox", *with_masks(len(shape))]
    small = np.unique(labels, return_inverse=True)[1].reshape(shape)
    expected = whole(small, image, names)
    expected["label"] = np.unique(labels)[1:]
    box = tuple(np.array(shape) // 4 + 1)
    with warnings.catch_warnings():
        # Of objects that are flat there is no hull.
        warnings.simplefilter("ignore")
        got = region_table(labels, image, names, max_extent=box, cell_shape=cells).compute()
    ndim = len(shape)
    extents = [expected[f"bbox-{a + ndim}"] - expected[f"bbox-{a}"] for a in range(ndim)]
    fits = np.all([extent <= n for extent, n in zip(extents, box, strict=True)], axis=0)
    assert 5 < fits.sum() < len(fits)
    assert got["fits"].tolist() == fits.tolist()
    assert list(got.columns) == [*expected.columns, "fits"]
    for name in expected.columns:
        if name not in with_masks(ndim):
            np.testing.assert_array_equal(got[name], expected[name])
            continue
        assert got[name][~fits].isna().all(), name
        for have, want in zip(got[name][fits], expected[name][fits], strict=True):
            np.testing.assert_array_equal(have, want, name)
    if "euler_number" in got:
        assert got["euler_number"].dtype == "Int64"


def spread(mask: NDArray[Any], image: NDArray[Any]) -> float:
    return float(np.ptp(image[mask]))


def corner(mask: NDArray[Any]) -> bool:
    return bool(mask[0, 0])


def ends(mask: NDArray[Any]) -> NDArray[Any]:
    return np.array(mask.shape)


def test_functions_of_ones_own(rng: np.random.Generator) -> None:
    labels, image = discs(), rng.random((40, 90, 2))
    got = region_table(
        labels,
        image,
        ["label", "coords_scaled"],
        spacing=(2, 0.5),
        max_extent=20,
        extra_properties=[spread, (corner, bool), (ends, np.dtype(("i4", (2,))))],
        cell_shape=16,
    ).compute()
    assert got["fits"].tolist() == [True, False, False, True, True]
    assert got.columns.tolist() == [
        "label", "coords_scaled", "spread-0", "spread-1", "corner", "ends-0", "ends-1", "fits",
    ]  # fmt: skip
    for row in got[got["fits"]].itertuples(index=False):
        where = labels == row.label
        values = image[where]
        assert list(row)[2:4] == [np.ptp(values[:, 0]), np.ptp(values[:, 1])]
        np.testing.assert_array_equal(row.coords_scaled, np.argwhere(where) * [2, 0.5])
        bounds = np.argwhere(where)
        assert list(row)[5:7] == (np.ptp(bounds, axis=0) + 1).tolist()
    assert got["corner"].tolist() == [False, pd.NA, pd.NA, True, True]
    assert got["ends-1"].dtype == "Int32"

    def fails(mask: NDArray[Any]) -> float:
        raise LookupError("no model")

    with pytest.raises(ci.BlockError, match=r"region_table at cell \(\d, \d\).*no model"):
        region_table(labels, max_extent=20, extra_properties=[fails], cell_shape=16).compute()
    with pytest.raises(ci.BlockError, match=r"ends returned shape \(2,\).*say what it returns"):
        region_table(labels, max_extent=20, extra_properties=[ends], cell_shape=16).compute()


# ---------------------------------------------------------------- the data frame


def test_the_schema_is_known_before_anything_is_computed(rng: np.random.Generator) -> None:
    def fail(block: ci.Block) -> None:
        raise AssertionError("computed")

    grid = ci.CellGrid((10**5, 10**5), 64)
    labels = ci.fill_cells(fail, grid, dtype="u8")
    image = ci.fill_cells(fail, grid, dtype="u2")
    table = region_table(labels, image, npartitions=8)
    assert isinstance(table, dd.DataFrame)
    assert table.npartitions == 8
    assert table.columns.tolist() == [
        "label", "area", "bbox-0", "bbox-1", "bbox-2", "bbox-3", "centroid-0", "centroid-1",
        "touches_border", "intensity_mean", "intensity_std", "intensity_min", "intensity_max",
    ]  # fmt: skip
    assert table["label"].dtype == "u8"
    assert table["touches_border"].dtype.kind == "b"


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
@pytest.mark.parametrize("npartitions", [1, 2, 5])
def test_partitions_hold_all_objects_once(
    npartitions: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    labels = np.kron(rng.permutation(400).reshape(20, 20), np.ones((3, 2), int))
    names = ["label", "area", "bbox", "solidity"]
    table = region_table(
        labels, properties=names, npartitions=npartitions, max_extent=3, cell_shape=4
    )
    parts = dask.compute(*table.partitions)
    assert len(parts) == npartitions
    assert all(part["label"].is_monotonic_increasing for part in parts)
    if npartitions > 1:
        assert min(map(len, parts)) > 400 / npartitions / 2
    expected = whole(labels, None, names).sort_values("label", ignore_index=True)
    got = table.compute().sort_values("label", ignore_index=True)
    pd.testing.assert_frame_equal(got.drop(columns="fits"), expected)
    table.to_parquet(tmp_path / "table")
    back = dd.read_parquet(tmp_path / "table").compute()
    pd.testing.assert_frame_equal(
        back.sort_values("label", ignore_index=True).convert_dtypes(), got.convert_dtypes()
    )
    assert int(table[table["area"] > 5]["area"].count().compute()) == 399


@pytest.mark.parametrize("shape", [(0, 5), (7, 9)])
@pytest.mark.parametrize("npartitions", [1, 3])
def test_without_objects(shape: tuple[int, ...], npartitions: int) -> None:
    labels, image = np.zeros(shape, "u2"), np.zeros((*shape, 2), "f4")
    names = [*both_have(2, None, image=True), *with_masks(2), *sorted(OURS)]
    table = region_table(labels, image, names, npartitions=npartitions, max_extent=3, cell_shape=4)
    got = table.compute()
    assert len(got) == 0
    assert (got.dtypes == table.dtypes).all()
    expected = whole(np.zeros((7, 9), "u2"), np.zeros((7, 9, 2)), names[: -len(OURS)])
    assert set(expected.columns) <= set(got.columns)


def test_dask_arrays_lazy_images_and_chunks(rng: np.random.Generator) -> None:
    labels = np.kron(rng.integers(0, 9, (5, 6)), np.ones((4, 4), int))
    image = rng.random(labels.shape)
    expected = region_table(labels, image).compute()
    chunked = da.from_array(labels, chunks=(7, 5)), da.from_array(image, chunks=(3, 20))
    pd.testing.assert_frame_equal(
        region_table(*chunked).compute(), expected, check_exact=False, rtol=1e-12
    )
    mask = ci.map_cells(np.greater, image, 0.5 + 0 * image, dtype=bool, cell_shape=6)
    found = region_table(ci.label(mask), properties=["label", "area"]).compute()
    assert found["area"].sum() == (image > 0.5).sum()
    assert len(found) == label_whole(image > 0.5, connectivity=1).max()


def test_an_edit_measures_one_cell_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = measure

    def counted(*args: Any) -> Any:
        calls.append(args[2])
        return original(*args)

    monkeypatch.setattr(tables, "measure", counted)
    data = np.kron(np.arange(1, 65).reshape(8, 8), np.ones((4, 4), int))
    source = ci.Source(data.copy(), cell_shape=2)
    table = region_table(source, cell_shape=2)
    before = table.compute()
    assert before["area"].tolist() == [16.0] * 64
    # One more for the schema.
    assert len(calls) == 256 + 1
    calls.clear()
    with source.edit() as array:
        array[7, 9] = 0
    after = latest(table).compute()
    assert calls == [(6, 8)]
    data[7, 9] = 0
    pd.testing.assert_frame_equal(after, region_table(data).compute())
    # The one that was made before is what it was.
    pd.testing.assert_frame_equal(table.compute(), before)


def test_parameters_that_are_wrong() -> None:
    labels = np.zeros((4, 4), int)
    image = np.zeros((4, 4))
    for wrong, error, text in [
        ({"labels": image}, TypeError, "must be integers, got dtype float64"),
        ({"labels": labels > 0}, TypeError, r"label\(mask\)"),
        ({"labels": np.array(3)}, ValueError, "at least one axis"),
        ({"image": np.zeros((4, 5))}, ValueError, r"shape \(4, 5\), expected \(4, 4\)"),
        ({"image": np.zeros((4, 4, 2, 2))}, ValueError, "axis of channels"),
        ({"image": np.zeros((4, 4), complex)}, TypeError, "real numbers"),
        ({"properties": ["aera"]}, ValueError, "'aera'; is 'area' meant"),
        ({"properties": ["mean_intensity"]}, ValueError, "is 'intensity_mean' meant"),
        ({"properties": ["major_axis_length"]}, ValueError, "is 'axis_major_length' meant"),
        ({"properties": ["xyzzy"]}, ValueError, "there are area, "),
        ({"properties": "area"}, TypeError, "a sequence of names"),
        ({"properties": [np.mean]}, TypeError, "extra_properties"),
        ({"properties": ["area", "area"]}, ValueError, "twice"),
        ({"properties": ["intensity_mean"]}, ValueError, "needs the image"),
        ({"properties": ["image_intensity"], "max_extent": 3}, ValueError, "needs the image"),
        ({"properties": ["solidity"]}, ValueError, "max_extent"),
        ({"properties": ["moments_hu"], "spacing": 2}, ValueError, "spacing of 1 only"),
        ({"properties": ["perimeter"], "spacing": (1, 2), "max_extent": 9}, ValueError, "same"),
        ({"labels": labels[None], "properties": ["orientation"]}, ValueError, "2 axes, got 3"),
        ({"extra_properties": [corner]}, ValueError, "max_extent"),
        ({"extra_properties": [spread], "max_extent": 2}, ValueError, "needs the image"),
        ({"extra_properties": [3], "max_extent": 2}, TypeError, "functions with a name"),
        ({"spacing": (1, 2, 3)}, ValueError, "one for each of 2 axes"),
        ({"spacing": 0}, ValueError, "above 0"),
        ({"npartitions": 0}, ValueError, "npartitions"),
        ({"max_extent": 0}, ValueError, "max_extent"),
    ]:
        with pytest.raises(error, match=text):
            region_table(**{"labels": labels, **wrong})


# ---------------------------------------------------------------- elsewhere


def test_the_same_everywhere(client: Any, rng: np.random.Generator) -> None:
    labels = np.kron(rng.integers(0, 30, (9, 9)), np.ones((3, 5), int))
    image = rng.random(labels.shape)
    names = ["label", "centroid_weighted", "moments_central", "intensity_std", "solidity"]

    def table(**settings: Any) -> Any:
        return region_table(
            labels, image, names, max_extent=(27, 45), npartitions=2, cell_shape=8, **settings
        )

    expected = table().compute(scheduler="sync")
    pd.testing.assert_frame_equal(table().compute(scheduler="threads"), expected)
    pd.testing.assert_frame_equal(client.compute(table()).result(timeout=60), expected)
    with ci.BlockQueue(backend=client) as queue:
        pd.testing.assert_frame_equal(table(queue=queue).compute(scheduler="threads"), expected)
