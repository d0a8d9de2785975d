"""Blobs found cell by cell are those that scikit-image finds in the whole image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage import color, data, feature
from skimage.feature.blob import _blob_overlap, _prune_blobs

import cellimg_dask as ci
from cellimg_dask.ops import overlaps as overlaps_module
from cellimg_dask.ops.detect import blob_dog, blob_log
from cellimg_dask.ops.frames import latest
from cellimg_dask.ops.overlaps import overlapping, prune_overlapping

WHOLE = {blob_log: feature.blob_log, blob_dog: feature.blob_dog}


def rows(blobs: Any) -> list[tuple[float, ...]]:
    """Rows of a table in a fixed order, those that come twice twice."""
    return sorted(map(tuple, np.asarray(blobs, float).tolist()))


def check(detector: Any, image: NDArray[Any], cell_shape: Any, **options: Any) -> int:
    """Compare with the whole image; return how many blobs there are."""
    expected = rows(WHOLE[detector](image, **options))
    frame = detector(image, cell_shape=cell_shape, **options)
    table = frame.compute(scheduler="sync")
    assert (table.dtypes == np.float64).all()
    assert list(table.columns) == list(frame.columns)
    assert rows(table) == expected
    return len(expected)


# ---------------------------------------------------------------- real images


@cache
def cells() -> NDArray[Any]:
    return data.cell()[100:420, 100:450]


@cache
def galaxies() -> NDArray[Any]:
    return color.rgb2gray(data.hubble_deep_field()[300:620, 200:560])


GRIDS_2D = [100, 64, (400, 70), (87, 131), 200]


@pytest.mark.parametrize("cell_shape", GRIDS_2D)
def test_blobs_of_a_phase_contrast_image(cell_shape: Any) -> None:
    options = {"min_sigma": 3, "max_sigma": 12, "num_sigma": 5, "threshold": 0.02}
    assert check(blob_log, cells(), cell_shape, **options) > 30


@pytest.mark.parametrize("cell_shape", GRIDS_2D)
def test_blobs_of_a_field_of_galaxies(cell_shape: Any) -> None:
    options = {"min_sigma": 1, "max_sigma": 6, "num_sigma": 6, "threshold": 0.05}
    assert check(blob_log, galaxies(), cell_shape, **options) == 449


@pytest.fixture(scope="module")
def brain(shared_data: Path) -> NDArray[Any]:
    tifffile = pytest.importorskip("tifffile")
    volume = tifffile.imread(shared_data / "brain_signal.tif")
    return volume[:, 250:370, 150:310]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "cell_shape", [(30, 64, 64), (16, 70, 90), (10, 120, 100), (30, 50, 200), (20, 120, 160)]
)
def test_blobs_of_a_volume(brain: NDArray[Any], cell_shape: Any) -> None:
    options = {"min_sigma": 1.5, "max_sigma": 3, "num_sigma": 3, "threshold": 0.01}
    assert check(blob_log, brain, cell_shape, **options) > 20


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.02},
        {"threshold": None, "threshold_rel": 0.1},
        {"threshold": 0.01, "threshold_rel": 0.1},
        {"threshold": 0.02, "threshold_rel": 0.01},
        {"threshold": 0.02, "overlap": 0.05},
        {"threshold": 0.02, "overlap": 1},
        {"threshold": 0.02, "exclude_border": 25},
        {"threshold": 0.02, "exclude_border": (0, 50)},
        {"threshold": 0.02, "exclude_border": (0, 200)},
        {"threshold": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("detector", [blob_log, blob_dog])
def test_all_options(detector: Any, options: dict[str, Any]) -> None:
    image = cells()[100:, 50:300]
    sizes: dict[str, Any] = {"min_sigma": 2, "max_sigma": 6}
    if detector is blob_log:
        sizes |= {"num_sigma": 3, "log_scale": True}
    found = check(detector, image, (97, 81), **sizes, **options)
    assert (found > 0) == (options["threshold"] != 5 and options.get("exclude_border") != (0, 200))


@pytest.mark.parametrize("dtype", ["f4", "f2", ">u2", "i4", "f8"])
@pytest.mark.parametrize("detector", [blob_log, blob_dog])
def test_sizes_per_axis_and_dtypes(detector: Any, dtype: str) -> None:
    image = (cells()[100:220, 50:180].astype(float) * 4).astype(dtype)
    whole = image.astype(image.dtype.newbyteorder("="))
    sizes = {"min_sigma": (1.1, 2), "max_sigma": (4.7, 5)}
    options = {**sizes, "threshold": None, "threshold_rel": 0.2}
    expected = rows(WHOLE[detector](whole, **options))
    table = detector(image, cell_shape=50, axes="yx", **options).compute(scheduler="sync")
    assert list(table.columns) == ["y", "x", "sigma-y", "sigma-x"]
    assert rows(table) == expected
    assert expected


# ---------------------------------------------------------------- any image


@st.composite
def images(draw: st.DrawFn) -> tuple[NDArray[Any], tuple[int, ...]]:
    ndim = draw(st.integers(1, 4))
    top = {1: 60, 2: 16, 3: 9, 4: 5}[ndim]
    shape = draw(st.tuples(*[st.integers(1, top)] * ndim))
    cells = tuple(draw(st.integers(max(1, -(-n * ndim // 8)), top + 3)) for n in shape)
    dtype = np.dtype(draw(st.sampled_from(["bool", "u1", "i2", "u2", "f4", "f8"])))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    # Few levels, so that there are plateaus and equal peaks.
    image = rng.integers(0, draw(st.sampled_from([1, 2, 100])) + 1, shape)
    if draw(st.booleans()):
        image[rng.random(shape) < 0.9] = 0
    scale = np.iinfo(dtype).max // 100 if dtype.kind in "iu" else 1
    return (image * scale).astype(dtype), cells


@settings(max_examples=60)
@given(
    case=images(),
    detector=st.sampled_from([blob_log, blob_dog]),
    sizes=st.sampled_from([(0.7, 0.7), (0.6, 1.5), (1, 3)]),
    threshold=st.sampled_from([None, 0.0, 0.01, 0.1, -0.1]),
    threshold_rel=st.sampled_from([None, 0.0, 0.3, -1.0]),
    overlap=st.sampled_from([0, 0.5, 1]),
)
def test_any_image(
    case: tuple[NDArray[Any], tuple[int, ...]],
    detector: Any,
    sizes: tuple[float, float],
    threshold: float | None,
    threshold_rel: float | None,
    overlap: float,
) -> None:
    image, cell_shape = case
    options: dict[str, Any] = {"min_sigma": sizes[0], "max_sigma": sizes[1], "overlap": overlap}
    options |= {"threshold": threshold, "threshold_rel": threshold_rel}
    if detector is blob_log:
        options["num_sigma"] = 3 if sizes[0] < sizes[1] else 1
    assume(image.size * 3 < 3000)
    check(detector, image, cell_shape, **options)


def test_an_image_that_is_everywhere_the_same_has_no_blobs() -> None:
    options = {"max_sigma": 2, "num_sigma": 2, "threshold": -1.0}
    assert check(blob_log, np.zeros((20, 30)), 8, **options) == 0
    # At 0.7 the scales differ in the last digit, and blobs of any size are everywhere.
    assert check(blob_log, np.full((20, 30), 0.7), 8, **options) > 0
    # But for one voxel at one scale, which scikit-image takes for a peak.
    assert check(blob_log, np.ones((1, 1)), 8, num_sigma=1, threshold=-1.0) == 1


def test_an_empty_image_has_no_blobs() -> None:
    table = blob_log(np.zeros((0, 5)), cell_shape=2).compute(scheduler="sync")
    assert len(table) == 0
    assert list(table.columns) == ["axis-0", "axis-1", "sigma"]


# ---------------------------------------------------------------- overlaps


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
@pytest.mark.parametrize("per_axis", [False, True])
def test_overlapping_blobs_go_as_in_scikit_image(
    ndim: int, per_axis: bool, dtype: str, rng: np.random.Generator
) -> None:
    sigma_dim = ndim if per_axis else 1
    top = {1: 300, 2: 40, 3: 12, 4: 6}[ndim]
    blobs = np.hstack(
        [
            rng.integers(0, top, (200, ndim)),
            rng.integers(1, 5, (200, 1)) * np.linspace(1, 1.5, sigma_dim),
        ]
    ).astype(dtype)
    first, second = blobs[:100], blobs[100:]
    expected = np.array(
        [_blob_overlap(*pair, sigma_dim=sigma_dim) for pair in zip(first, second, strict=True)]
    )
    for overlap in (0, 0.13, 0.5, 1):
        np.testing.assert_array_equal(
            overlapping(first, second, overlap, sigma_dim), expected > overlap
        )
        kept = blobs[prune_overlapping(blobs, overlap, sigma_dim)]
        whole = _prune_blobs(blobs.copy(), overlap, sigma_dim=sigma_dim)
        np.testing.assert_array_equal(kept, whole)
        if ndim < 4 and overlap < 1:
            assert len(kept) < len(blobs)


def test_more_pairs_than_a_set_should_hold(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = np.hstack([rng.integers(0, 60, (300, 2)), rng.integers(1, 4, (300, 1))]).astype(float)
    monkeypatch.setattr(overlaps_module, "_MOST_PAIRS_IN_A_SET", 10)
    monkeypatch.setattr(overlaps_module, "_PAIRS_AT_ONCE", 7)
    kept = blobs[prune_overlapping(blobs, 0.3, 1)]
    assert 0 < len(kept) < len(blobs)
    # No two of them overlap, and each that is gone overlaps some other blob.
    for number, blob in enumerate(kept):
        others = np.delete(kept, number, axis=0)
        assert not overlapping(np.repeat(blob[None], len(others), 0), others, 0.3, 1).any()


# ---------------------------------------------------------------- as a table


def test_one_partition_per_cell_with_its_own_blobs() -> None:
    image = cells()[:300, :300]
    options = {"min_sigma": 3, "max_sigma": 8, "num_sigma": 3, "threshold": 0.02}
    frame = blob_log(image, cell_shape=128, voxel_size=(2, 0.5), axes=("row", "column"), **options)
    assert frame.npartitions == 9
    assert list(frame.columns) == ["row", "column", "sigma", "physical-row", "physical-column"]
    grid = ci.CellGrid(image.shape, 128)
    found = 0
    for index in range(9):
        part = frame.partitions[index].compute(scheduler="sync")
        points, roi = part[["row", "column"]].to_numpy(), grid.cell(index).roi
        assert ((points >= roi.start) & (points < roi.stop)).all()
        np.testing.assert_array_equal(part["physical-row"], 2 * part["row"])
        assert part.index.tolist() == list(range(len(part)))
        found += len(part)
    assert found == len(feature.blob_log(image, **options)) > 10


def test_many_cells_are_put_together_in_steps() -> None:
    image = cells()[200:280, 100:200]
    assert check(blob_log, image, 5, max_sigma=2, num_sigma=2, threshold=0.01) > 3


def test_an_edit_finds_again_only_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellimg_dask.ops import scale_space

    calls = []
    responses = scale_space.LaplacianOfGaussian.responses

    def counted(self: Any, image: NDArray[Any]) -> Any:
        calls.append(image.shape)
        return responses(self, image)

    monkeypatch.setattr(scale_space.LaplacianOfGaussian, "responses", counted)
    source = ci.Source(cells()[100:300, 100:300].astype(float) / 255, cell_shape=50)
    options = {"min_sigma": 2, "max_sigma": 3, "num_sigma": 2, "threshold": 0.03}
    frame = blob_log(source, cell_shape=50, **options)
    assert calls == []
    before = rows(frame.compute(scheduler="sync"))
    assert len(calls) == 16
    with source.edit() as array:
        array[24:27, 24:27] = 3
    again = rows(latest(frame).compute(scheduler="sync"))
    assert len(calls) == 17
    assert again != before
    assert again == rows(feature.blob_log(np.asarray(source), **options))


def test_nothing_is_found_twice_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellimg_dask.ops import scale_space

    calls = []
    responses = scale_space.DifferenceOfGaussians.responses

    def counted(self: Any, image: NDArray[Any]) -> Any:
        calls.append(image.shape)
        return responses(self, image)

    monkeypatch.setattr(scale_space.DifferenceOfGaussians, "responses", counted)
    frame = blob_dog(cells()[:100, :100], max_sigma=2, cell_shape=25, cache=None)
    frame.compute(scheduler="sync")
    assert len(calls) == 16


def test_lazy_images_and_queues_are_taken() -> None:
    image = cells()[100:200, 100:220]
    options = {"min_sigma": 2, "max_sigma": 3, "num_sigma": 2, "threshold": 0.02}
    below = ci.map_cells(np.copy, image, dtype=image.dtype, cell_shape=40)
    expected = rows(feature.blob_log(image, **options))
    with ci.BlockQueue(2) as queue:
        frame = blob_log(below, queue=queue, cache=ci.CellCache(1 << 20), **options)
        assert frame.npartitions == 9
        assert rows(frame.compute(scheduler="threads")) == expected
    assert expected


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_sigma": 0}, ValueError, "min_sigma must be a positive"),
        ({"max_sigma": (1, 2, 3)}, ValueError, "each of 2 axes"),
        ({"num_sigma": 0}, ValueError, "num_sigma"),
        ({"num_sigma": 2.0}, TypeError, "num_sigma"),
        ({"threshold": "0.1"}, TypeError, "threshold must be a number or None"),
        ({"threshold_rel": True}, TypeError, "threshold_rel"),
        ({"overlap": None}, TypeError, "overlap"),
        ({"exclude_border": True}, ValueError, "how many voxels"),
        ({"exclude_border": (1, 2, 3)}, ValueError, "exclude_border"),
        ({"exclude_border": -1}, ValueError, "at least 0"),
        ({"axes": "zyx"}, ValueError, "each of 2 axes"),
        ({"axes": ("sigma", "x")}, ValueError, "twice"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        blob_log(np.zeros((10, 10)), **options)
    assert words in str(caught.value)


def test_wrong_images() -> None:
    with pytest.raises(TypeError, match="real numbers"):
        blob_log(np.zeros((3, 3), complex))
    with pytest.raises(ValueError, match="without axes"):
        blob_log(np.zeros(()))
    with pytest.raises(ValueError, match="give the array"):
        blob_log(ci.Input(np.zeros((3, 3)), halo=1))
    with pytest.raises(ValueError, match="sigma_ratio must be a number above 1"):
        blob_dog(np.zeros((3, 3)), sigma_ratio=1)
