"""Pyramids against oracles that take window by window of the whole level below."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.ops import downsample
from cellimg_dask.ops.downsample import downsample_mean, downsample_mode, downsample_nearest
from cellimg_dask.ops.pyramid import Pyramid, pyramid

Factors = tuple[int, ...]
METHODS = {"mean": downsample_mean, "mode": downsample_mode, "nearest": downsample_nearest}
MAX_EXTENT = {0: 0, 1: 60, 2: 17, 3: 10, 4: 6}
REAL = ["?", "u1", "u2", ">u2", "i2", "u4", "<i4", "u8", "i8", ">i8", "f2", "f4", ">f8"]
ANY = [*REAL, "c8", ">c16"]

# ---------------------------------------------------------------- oracles


def mean_of(window: NDArray[Any]) -> Any:
    values = window.ravel().tolist()
    if window.dtype.kind == "b":
        return 2 * sum(values) > len(values)
    if window.dtype.kind in "iu":
        # Python rounds fractions exactly, halves to even.
        return round(Fraction(sum(values), len(values)))
    return sum(values) / len(values)


def mode_of(window: NDArray[Any]) -> Any:
    counts = Counter("nan" if v != v else v for v in window.ravel().tolist())
    most = max(counts.values())
    best = [value for value, number in counts.items() if number == most]
    return min(best, key=lambda v: (v == 0, v == "nan", v if v != "nan" else 0))


def first_of(window: NDArray[Any]) -> Any:
    return window.flat[0]


ORACLES: dict[str, Callable[[NDArray[Any]], Any]] = {
    "mean": mean_of,
    "mode": mode_of,
    "nearest": first_of,
}


def coarse(a: NDArray[Any], factors: Factors, method: str) -> NDArray[Any]:
    """Go from window to window; the last ones of an axis hold what is left."""
    shape = [-(-n // f) for n, f in zip(a.shape, factors, strict=True)]
    result = np.empty(shape, a.dtype.newbyteorder("="))
    for place in np.ndindex(*shape):
        box = tuple(slice(p * f, (p + 1) * f) for p, f in zip(place, factors, strict=True))
        result[place] = ORACLES[method](a[box])
    return result


def check_level(got: NDArray[Any], below: NDArray[Any], factors: Factors, method: str) -> None:
    """Compare with the oracle, and with one call on the whole level below, to the last bit."""
    expected = coarse(below, factors, method)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if method == "mean" and got.dtype.kind in "fc":
        # The oracle adds up in double precision.
        top = np.abs(below).max(initial=0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=4 * np.finfo(got.dtype).eps * top)
    else:
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, METHODS[method](below, factors))


def numbers(shape: tuple[int, ...], dtype: str, seed: int, few: bool = False) -> NDArray[Any]:
    """Numbers over the whole range of the dtype, or few of them, as labels are."""
    kind = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if few:
        values = np.asarray(rng.integers(0, 4, shape) - (kind.kind in "if")).astype(kind)
        if kind.kind == "f":
            values[rng.random(shape) < 0.2] = np.nan
        return values
    if kind.kind == "b":
        return rng.random(shape) < 0.5
    if kind.kind in "iu":
        info = np.iinfo(kind)
        native = kind.newbyteorder("=")
        # Ends of the range, where sums would overflow, and small numbers, which meet halves.
        edge = np.array([info.min, info.max, info.max - 1, 0, 1, 2, 3], native)
        spread = rng.integers(info.min, info.max, shape, native, endpoint=True)
        return np.where(rng.random(shape) < 0.5, rng.choice(edge, shape), spread).astype(kind)
    values = 100 * rng.normal(size=shape)
    if kind.kind == "c":
        values = values + 1j * rng.normal(size=shape)
    return np.asarray(values).astype(kind)


# ---------------------------------------------------------------- equal to the whole


@dataclasses.dataclass(frozen=True)
class Cut:
    """An image's shape, how it is cut, and the factors of two levels."""

    shape: tuple[int, ...]
    cell_shape: tuple[int, ...]
    factors: tuple[Factors, Factors]
    lazy: bool = False
    """Whether the image is a lazy one, of other cells."""
    seed: int = 0


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    ndim = draw(st.integers(0, 4))
    top = MAX_EXTENT[ndim]
    # Seldom an empty axis, and not mostly short ones.
    extents = st.sampled_from([0, *list(range(1, top + 1)) * 2])
    shape = draw(st.tuples(*[extents] * ndim))
    factors = st.one_of(st.just((2,) * ndim), st.tuples(*[st.integers(1, 4)] * ndim))
    return Cut(
        shape,
        # Not more than some hundred cells.
        tuple(draw(st.sampled_from(range(max(1, -(-n * ndim // 12)), n + 3))) for n in shape),
        (draw(factors), draw(factors)),
        draw(st.booleans()),
        draw(st.integers(0, 999)),
    )


def check(cut: Cut, image: NDArray[Any], **how: Any) -> None:
    whole = image.astype(image.dtype.newbyteorder("="))
    source: Any = image
    if cut.lazy:
        source = ci.map_cells(np.array, image, dtype=image.dtype, cell_shape=2)
    factors = cut.factors if image.ndim else 2
    levels = pyramid(source, 3, factors=factors, cell_shape=cut.cell_shape, **how)
    assert len(levels) == 3
    assert (levels[0] is source) == cut.lazy
    np.testing.assert_array_equal(levels[0][...], whole)
    for level, step in zip(levels[1:], cut.factors, strict=True):
        assert level.cell_shape == cut.cell_shape
        got = level[...]
        check_level(got, whole, step, levels.method)
        whole = got


ODD = Cut((7,), (3,), ((2,), (2,)))


@settings(max_examples=100)
@given(cut=cuts(), dtype=st.sampled_from(ANY))
@example(cut=ODD, dtype="u8")
@example(cut=Cut((5, 0, 3), (2, 1, 1), ((2, 2, 2), (2, 2, 2))), dtype="f4")
def test_means_are_those_of_the_whole_level_below(cut: Cut, dtype: str) -> None:
    check(cut, numbers(cut.shape, dtype, cut.seed))


@settings(max_examples=100)
@given(cut=cuts(), dtype=st.sampled_from(REAL))
@example(cut=ODD, dtype="i2")
def test_modes_are_those_of_the_whole_level_below(cut: Cut, dtype: str) -> None:
    check(cut, numbers(cut.shape, dtype, cut.seed, few=True), kind="labels")


@settings(max_examples=40)
@given(cut=cuts(), dtype=st.sampled_from([*ANY, "M8[s]", "S3"]))
def test_nearest_takes_the_first_voxel_of_each_window(cut: Cut, dtype: str) -> None:
    image = numbers(cut.shape, "u1", cut.seed).astype(dtype)
    check(cut, image, kind="labels", method="nearest")


@pytest.mark.parametrize("method", ["mean", "mode"])
@pytest.mark.parametrize("shape", [(33,), (9, 10), (5, 4, 7)])
def test_pieces_of_any_size_give_the_same(method: str, shape: Factors, monkeypatch: Any) -> None:
    for dtype in ("u1", "i8", "f4"):
        image = numbers(shape, dtype, 1, few=method == "mode")
        factors = (2, 3, 2)[: len(shape)]
        for voxels in (1, 13, 40):
            monkeypatch.setattr(downsample, "_PIECE_VOXELS", voxels)
            check_level(METHODS[method](image, factors), image, factors, method)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "u8", "i8"])
@pytest.mark.parametrize("count", [2, 3, 6, 7, 8, 24, 255, 256, 257, 1000])
def test_integers_are_rounded_exactly_for_windows_of_any_size(dtype: str, count: int) -> None:
    image = numbers((count * 50 + 1,), dtype, count)
    # Sums just at, below and above halves.
    steps = (np.arange(20 * count) // 7 % 3).astype(dtype)
    image[: 20 * count] = image.dtype.type(np.iinfo(dtype).max) - steps
    check_level(downsample_mean(image, (count,)), image, (count,), "mean")


@pytest.mark.parametrize("order", ["C", "F", "reversed", "strided"])
def test_memory_order_does_not_matter(order: str) -> None:
    for dtype in ("u2", "f4"):
        image = numbers((9, 11, 6), dtype, 3, few=dtype == "u2")
        views = {
            "C": image,
            "F": np.asfortranarray(image),
            "reversed": image[::-1, ::-1].copy()[::-1, ::-1],
            "strided": np.repeat(image, 2, axis=2)[..., ::2],
        }
        for method, function in METHODS.items():
            np.testing.assert_array_equal(
                function(views[order], (2, 2, 2)), function(image, (2, 2, 2)), err_msg=method
            )


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("u1", 255),
        ("i8", -(2**63)),
        ("u8", 2**64 - 1),
        ("f2", np.finfo("f2").max),  # Half precision does not hold the sum of two.
        ("f4", 2.0**120),
        ("?", True),
    ],
)
def test_an_image_of_one_value_keeps_it(dtype: str, value: Any) -> None:
    image = np.full((5, 6, 7), value, dtype)
    for factors in (2, 3):
        for level in pyramid(image, 4, factors=factors, cell_shape=2):
            assert (level[...] == image.flat[0]).all()


def test_equals_downscale_local_mean_where_windows_are_whole(rng: np.random.Generator) -> None:
    transform = pytest.importorskip("skimage.transform")
    image = rng.random((8, 12, 16))
    levels = pyramid(image, 3, cell_shape=(3, 5, 4))
    for number, level in enumerate(levels):
        expected = transform.downscale_local_mean(image, 2**number)
        np.testing.assert_allclose(level[...], expected, rtol=1e-14)


def test_equals_tensorstore(rng: np.random.Generator) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    for dtype, method in (("u1", "mean"), ("i4", "mean"), ("u4", "mode")):
        image = rng.integers(1, 6, (7, 10, 5)).astype(dtype)
        peer = tensorstore.downsample(tensorstore.array(image), [2, 3, 2], method)
        levels = pyramid(image, 2, factors=(2, 3, 2), method=method, cell_shape=3)
        np.testing.assert_array_equal(levels[1][...], peer.read().result())


# ---------------------------------------------------------------- ties, gaps


def test_halves_are_rounded_to_even() -> None:
    assert downsample_mean(np.array([0, 1, 1, 2, 2, 3]), (2,)).tolist() == [0, 2, 2]
    assert downsample_mean(np.array([0, -1, -1, -2, -2, -3]), (2,)).tolist() == [0, -2, -2]


def test_of_booleans_more_than_half_have_to_be_true() -> None:
    image = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0]], bool)
    assert downsample_mean(image, (2, 2)).tolist() == [[True, False, True], [False, False, False]]


def test_background_gives_way_to_a_label_that_is_as_frequent() -> None:
    image = np.array([[0, 0, 3, 5, -1, 0, 4, 9], [7, 7, 5, 3, 0, -1, 8, 0]])
    assert downsample_mode(image, (2, 2)).tolist() == [[7, 3, -1, 4]]
    line = np.zeros((16, 16, 16), "u4")
    line[3] = 5
    assert [int(level[...].max()) for level in pyramid(line, 5, "labels")] == [5] * 5


def test_modes_of_transposed_and_mirrored_labels_are_transposed_and_mirrored(rng: Any) -> None:
    image = rng.integers(0, 3, (8, 6, 10)).astype("u2")
    expected = downsample_mode(image, (2, 2, 2))
    np.testing.assert_array_equal(downsample_mode(image.T, (2, 2, 2)), expected.T)
    mirrored = downsample_mode(image[::-1, :, ::-1], (2, 2, 2))
    np.testing.assert_array_equal(mirrored, expected[::-1, :, ::-1])


def test_not_a_number_spreads_in_means_and_is_a_label_as_any_other() -> None:
    image = np.array([1, np.nan, 1, 3, np.nan, np.nan, np.nan, 0], "f4")
    np.testing.assert_array_equal(downsample_mean(image, (2,)), [np.nan, 2, np.nan, np.nan])
    np.testing.assert_array_equal(downsample_mode(image, (4,)), [1, np.nan])
    np.testing.assert_array_equal(downsample_mode(image[::2], (2,)), [1, np.nan])


# ---------------------------------------------------------------- levels, scales, places


def test_levels_go_on_until_one_cell_holds_them() -> None:
    shapes = [level.shape for level in pyramid(np.zeros((129, 128, 5), "u1"), cell_shape=32)]
    assert shapes == [(129, 128, 5), (65, 64, 3), (33, 32, 2), (17, 16, 1)]
    # An axis of just two cells gets a level of one.
    assert len(pyramid(np.zeros((64, 64)), cell_shape=32)) == 2
    assert len(pyramid(np.zeros((32, 5)), cell_shape=32)) == 1
    assert len(pyramid(np.zeros((0, 5)), cell_shape=2)) == 3
    assert len(pyramid(np.zeros(()), cell_shape=())) == 1
    assert len(pyramid(np.zeros((300, 300)))) == 1


def test_axes_that_stay_are_no_reason_for_more_levels() -> None:
    film = np.zeros((50, 3, 40, 70), "u1")
    levels = pyramid(film, factors=(1, 1, 2, 2), cell_shape=(1, 1, 16, 16))
    assert [level.shape[2:] for level in levels] == [(40, 70), (20, 35), (10, 18), (5, 9)]
    assert {level.shape[:2] for level in levels} == {(50, 3)}
    assert levels.scales[-1] == (1, 1, 8, 8)
    assert levels.translations[-1] == (0, 0, 3.5, 3.5)
    assert len(pyramid(film, factors=1, cell_shape=4)) == 1


def test_the_number_of_levels_is_that_asked_for() -> None:
    image = np.arange(6, dtype="u1").reshape(2, 3)
    levels = pyramid(image, 6)
    assert [level.shape for level in levels] == [(2, 3), (1, 2), *[(1, 1)] * 4]
    assert levels.scales[-1] == levels.scales[2] == (2, 4)
    assert len(pyramid(image, 1)) == len(pyramid(image, np.int64(1))) == 1


def test_factors_per_level() -> None:
    space = ci.Space.of(3, "zyx", "um", scale=(4, 1, 0.5), translation=(0, 0, 10))
    image = ci.Input(np.zeros((10, 40, 40), "u1"), space=space)
    levels = pyramid(image, factors=[(1, 2, 2), 2, (2, 3, 3)])
    assert [level.shape for level in levels] == [(10, 40, 40), (10, 20, 20), (5, 10, 10), (3, 4, 4)]
    assert levels.scales == ((1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 12, 12))
    assert levels.translations == ((0, 0, 0), (0, 0.5, 0.5), (0.5, 1.5, 1.5), (1.5, 5.5, 5.5))
    assert levels[0].space == space
    assert levels[3].axes == ("z", "y", "x")
    assert levels[3].scale == (16, 12, 6)
    assert levels[3].translation == (6, 5.5, 12.75)
    same = pyramid(image, 4, factors=np.array([(1, 2, 2), (2, 2, 2), (2, 3, 3)]))
    assert same.scales == levels.scales
    assert pyramid(image, 3, factors=iter((1, 2, 2))).scales[2] == (1, 4, 4)


def test_a_factor_above_the_length_counts_as_the_length() -> None:
    image = np.arange(15, dtype="f8").reshape(3, 1, 5)
    levels = pyramid(image, 3, factors=(10**9, 2, 4))
    assert levels.scales == ((1, 1, 1), (3, 1, 4), (3, 1, 8))
    assert levels.translations[1] == (1, 0, 1.5)
    np.testing.assert_array_equal(levels[1][0, 0], [image[:, 0, :4].mean(), image[:, 0, 4].mean()])
    # As large as the whole image, in blocks of one window each.
    long = np.arange(100_001, dtype="u2")
    assert pyramid(long, 2, factors=10**6)[1][:] == round(Fraction(int(long.sum()), long.size))
    assert pyramid(long, 2, "labels", factors=10**6)[1][:] == [1]


@pytest.mark.parametrize("method", ["mean", "mode", "nearest"])
@pytest.mark.parametrize("factors", [2, (3, 2), (1, 4), [(2, 3), (3, 3)]])
def test_translations_are_the_centres_of_what_voxels_are_made_of(method: str, factors: Any) -> None:
    """A level of the coordinates themselves shows where its voxels lie."""
    sizes = (0.5, 3.0)
    shape = (36, 144)
    for axis in range(2):
        ramp = np.broadcast_to(
            np.arange(shape[axis], dtype="f8").reshape((-1, 1) if axis == 0 else (1, -1)), shape
        )
        # The mode of a window has no place of its own: it is made of the same voxels as the mean.
        how = "nearest" if method == "nearest" else "mean"
        found = pyramid(ramp, 3, factors=factors, method=how, cell_shape=(7, 10))  # type: ignore[arg-type]
        sized = ci.Input(ramp, space=ci.Space.of(2, scale=sizes))
        levels = pyramid(sized, 3, factors=factors, method=method)  # type: ignore[arg-type]
        for number, level in enumerate(found):
            places = level[:, 0] if axis == 0 else level[0, :]
            index = np.arange(len(places))
            scale, shift = levels.scales[number][axis], levels.translations[number][axis]
            np.testing.assert_allclose(places, scale * index + shift)
            physical = levels[number].scale[axis] * index + levels[number].translation[axis]
            np.testing.assert_allclose(places * sizes[axis], physical)


def test_a_pyramid_is_a_frozen_sequence_of_images() -> None:
    levels = pyramid(np.arange(9, dtype="u1"), 3, cell_shape=4)
    assert isinstance(levels, Pyramid)
    assert len(levels) == 3
    assert list(levels) == list(levels.levels)
    assert levels[-1] is levels.levels[2]
    assert levels[1:] == levels.levels[1:]
    assert levels.method == "mean"
    with pytest.raises(IndexError):
        levels[3]
    with pytest.raises(dataclasses.FrozenInstanceError):
        levels.method = "mode"  # type: ignore[misc]
    assert repr(levels).splitlines() == [
        "Pyramid of uint8 by mean",
        "level  shape  cells  scale  translation",
        "0      (9,)       3  (1,)   (0.0,)",
        "1      (5,)       2  (2,)   (0.5,)",
        "2      (3,)       1  (4,)   (1.5,)",
    ]


# ---------------------------------------------------------------- lazy, and after changes


class Untouched:
    """An array that nobody may read."""

    shape = (100, 1000, 1000)
    dtype = np.dtype("u2")

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("read while building")


def test_nothing_is_read_or_computed_while_building() -> None:
    def never(block: NDArray[Any]) -> NDArray[Any]:
        raise AssertionError("called while building")

    for method in METHODS:
        levels = pyramid(Untouched(), method=method, cell_shape=32)  # type: ignore[arg-type]
        assert len(levels) == 6
        assert "100" in repr(levels)
    lazy = ci.map_cells(never, np.zeros((64, 64)), dtype="f8", cell_shape=8)
    levels = pyramid(lazy)
    assert [level.cell_shape for level in levels] == [(8, 8)] * 4
    assert all(level.stats().loads == 0 for level in levels)


def test_a_voxel_reads_only_the_cells_below_it() -> None:
    image = ci.map_cells(np.negative, np.arange(4096).reshape(64, 64), cell_shape=8)
    levels = pyramid(image)
    levels[2][3, 5]
    assert [level.stats().loads for level in levels] == [16, 4, 1, 0]
    levels[1][12, 15]
    assert [level.stats().loads for level in levels] == [16, 4, 1, 0]


def test_an_edit_outdates_the_cells_above_it_and_no_others(rng: np.random.Generator) -> None:
    data = rng.integers(0, 1000, (37, 50)).astype("u2")
    source = ci.Source(data, cell_shape=6)
    levels = pyramid(source, 4, cell_shape=5)
    told: dict[int, list[ci.Change]] = {number: [] for number in range(4)}
    watches = [level.on_dirty(told[number].append) for number, level in enumerate(levels)]
    assert len(watches) == 4
    for level in levels:
        level[...]
    loads = [level.stats().loads for level in levels]
    for voxel in [(0, 0), (36, 49), (17, 23), (20, 39)]:
        data[voxel] += 5000
        source[voxel] = data[voxel]
        whole = data
        for number, level in enumerate(levels):
            (change,) = told[number]
            told[number].clear()
            place = [v // 2**number // 5 for v in voxel]
            assert list(change.cells) == [level.grid.index(place)]
            if number:
                whole = coarse(whole, (2, 2), "mean")
            np.testing.assert_array_equal(level[...], whole)
        # Level 0 keeps nothing: it is read where it is.
        now = [level.stats().loads for level in levels]
        assert [a - b for a, b in zip(now[1:], loads[1:], strict=True)] == [1, 1, 1]
        loads = now


def test_what_is_invalidated_below_is_computed_again_above() -> None:
    image = np.zeros((16, 16))
    levels = pyramid(image, 3, cell_shape=4)
    assert levels[2][...].max() == 0
    image[3, 3] = 16
    levels[0].invalidate(np.s_[3, 3])
    assert levels[2][0, 0] == 1
    assert levels[2].stats().loads == 2
    snapshot = levels[2].snapshot()
    np.testing.assert_array_equal(snapshot[...], levels[2][...])


# ---------------------------------------------------------------- inputs, queues, caches


@pytest.mark.parametrize("kind", ["zarr", "dask", "h5py", "source", "input", "memmap", "lazy"])
def test_any_input(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.integers(0, 200, (13, 22, 9)).astype(">u2")
    image: Any = data
    if kind == "zarr":
        image = zarr.create_array(
            tmp_path / "a.zarr", shape=data.shape, chunks=(4, 5, 6), dtype="u2"
        )
        image[...] = data
    elif kind == "dask":
        image = da.from_array(data, chunks=(4, 5, 6))
    elif kind == "h5py":
        h5py = pytest.importorskip("h5py")
        image = h5py.File(tmp_path / "a.h5", "w").create_dataset("a", data=data, chunks=(4, 5, 6))
    elif kind == "source":
        image = ci.Source(data, cell_shape=(4, 5, 6))
    elif kind == "input":
        image = ci.Input(data, version="1")
    elif kind == "memmap":
        np.save(tmp_path / "a.npy", data)
        image = np.load(tmp_path / "a.npy", mmap_mode="r")
    elif kind == "lazy":
        image = ci.map_cells(np.array, data, dtype="u2", cell_shape=(4, 5, 6))
    levels = pyramid(image)
    chunked = kind not in ("input", "memmap")
    assert len(levels) == (4 if chunked else 1)
    assert levels[-1].cell_shape == ((4, 5, 6) if chunked else levels[0].cell_shape)
    levels = pyramid(image, 3)
    whole = data.astype("u2")
    for number, level in enumerate(levels):
        if number:
            whole = downsample_mean(whole, (2, 2, 2))
        np.testing.assert_array_equal(level[...], whole)
        np.testing.assert_array_equal(level.to_dask().compute(), whole)
    if kind == "h5py":
        image.file.close()


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_on_a_queue(backend: str, rng: np.random.Generator) -> None:
    image = rng.integers(0, 5, (19, 30)).astype("u2")
    with ci.BlockQueue(2, backend=backend) as queue:
        for method, function in METHODS.items():
            levels = pyramid(image, 3, method=method, cell_shape=7, queue=queue)  # type: ignore[arg-type]
            expected = function(function(image, (2, 2)), (2, 2))
            np.testing.assert_array_equal(levels[2][...], expected)


def test_the_cache_keeps_the_levels_and_not_the_array() -> None:
    image = np.ones((32, 32), "u1")
    cache = ci.CellCache(1 << 20)
    levels = pyramid(image, cell_shape=8, cache=cache)
    for level in levels:
        level[...]
    assert [level.stats().bytes > 0 for level in levels] == [False, True, True]
    nothing = pyramid(image, cell_shape=8, cache=None)
    nothing[2][...]
    nothing[2][...]
    assert nothing[2].stats().loads == 2


def test_a_level_goes_into_a_store_and_is_known_again(tmp_path: Path) -> None:
    image = np.arange(900, dtype="u2").reshape(30, 30)
    levels = pyramid(image, 3, cell_shape=8)
    target = tmp_path / "level.zarr"
    assert ci.run(levels[1], target, progress=False).computed == 4
    again = pyramid(image.copy(), 3, cell_shape=8)
    assert ci.run(again[1], target, progress=False).skipped == 4
    np.testing.assert_array_equal(zarr.open_array(target)[...], levels[1][...])
    together = levels[1].read_into(np.empty((15, 15), "u2"), cells_per_call="auto")
    np.testing.assert_array_equal(together, levels[1][...])
    sent = pickle.loads(pickle.dumps(levels[2].to_dask()))
    np.testing.assert_array_equal(sent.compute(scheduler="sync"), levels[2][...])


def test_the_real_volume(shared_data: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    volume = tifffile.imread(shared_data / "brain_signal.tif")
    levels = pyramid(volume, cell_shape=(17, 40, 33))
    whole = volume
    for level in levels[1:]:
        whole = downsample_mean(whole, (2,) * volume.ndim)
        np.testing.assert_array_equal(level[...], whole)
    labels = volume > np.percentile(volume, 99)
    whole = labels
    for level in pyramid(labels, 3, "labels", cell_shape=(17, 40, 33))[1:]:
        whole = downsample_mode(whole, (2,) * volume.ndim)
        np.testing.assert_array_equal(level[...], whole)


# ---------------------------------------------------------------- what is refused


IMAGE = np.zeros((8, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kind": "picture"}, ValueError, "kind must be"),
        ({"kind": None}, ValueError, "kind must be"),
        ({"method": "median"}, ValueError, "method must be"),
        ({"kind": "labels", "method": "mean"}, ValueError, "mean of labels"),
        ({"levels": 0}, ValueError, "levels must be at least 1, got 0"),
        ({"levels": -1}, ValueError, "levels must be at least 1"),
        ({"levels": 2.0}, TypeError, "levels must be an integer"),
        ({"levels": True}, TypeError, "boolean"),
        ({"levels": "labels"}, TypeError, "levels must be an integer"),
        ({"factors": 0}, ValueError, "factors must be at least 1, got 0"),
        ({"factors": (2, -2)}, ValueError, r"factors\[1\] must be at least 1, got -2"),
        ({"factors": (2, 2, 2)}, ValueError, "one value for each of 2 axes, got 3"),
        ({"factors": ()}, ValueError, "one value for each of 2 axes, got 0"),
        ({"factors": 1.5}, TypeError, "integer"),
        ({"factors": "2"}, TypeError, "in the order of axes"),
        ({"factors": {0: 2, 1: 2}}, TypeError, "in the order of axes"),
        ({"factors": [{1, 2}]}, TypeError, r"factors\[0\] must be a number, or"),
        ({"factors": [2, (2, 2), 1.0]}, TypeError, r"factors\[2\] must be an integer"),
        ({"factors": [(2, 2), (2,)]}, ValueError, r"factors\[1\] must have one value for each"),
        ({"factors": [(2, 2), (2, 0)]}, ValueError, r"factors\[1\]\[1\] must be at least 1"),
        ({"factors": [(2, 2)], "levels": 3}, ValueError, "expected 2 levels"),
        ({"cell_shape": 0}, ValueError, "cell_shape"),
        ({"cell_shape": (2, 2, 2)}, ValueError, "one value for each of 2 axes"),
        ({"cache": 5, "levels": 2}, TypeError, "cache must be"),
        ({"queue": 5, "levels": 2}, TypeError, "queue must be"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pyramid(IMAGE, **arguments)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ([[1, 2]], "numpy.asarray"),
        ("image.tif", "open the file first"),
        (None, "must have shape"),
        (np.ma.masked_array([1, 2], [True, False]), "masked"),
        (np.zeros(4, "M8[s]"), 'no mean of dtype .*; method="nearest" takes any'),
        (np.zeros(4, [("r", "u1"), ("g", "u1")]), "no mean of dtype"),
        (pyramid, "must have shape"),
    ],
)
def test_wrong_images(image: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        pyramid(image, 2)


def test_complex_labels_have_no_mode() -> None:
    with pytest.raises(TypeError, match="no mode of dtype complex128"):
        pyramid(np.zeros(4, "c16"), 2, "labels")


def test_overflowing_floats_are_as_in_numpy() -> None:
    image = np.full(4, 3e38, "f4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(downsample_mean(image, (2,)), image.reshape(2, 2).mean(1))


@pytest.mark.parametrize(
    ("axes", "factors"),
    [
        ("tczyx", (1, 1, 2, 2, 2)),
        ("yxs", (2, 2, 1)),
        (("time", "channel", "row"), (1, 1, 2)),
        (None, (1, 1, 2, 2, 2)),
        (("dim_0", "a"), (2, 2)),
    ],
)
def test_neither_times_nor_channels_are_put_together(axes, factors):
    space = None if axes is None else ci.Space.of(len(axes), axes)
    source = ci.Source(np.zeros((4,) * len(factors), "u1"), space=space)
    found = ci.pyramid(source, 2)
    assert found.scales[1] == factors
    assert ci.pyramid(source, 2, factors=2).scales[1] == (2,) * len(factors)
