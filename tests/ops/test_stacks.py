"""A stack that was split and merged is what it was, whatever was done to its blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.ops.blobs import merge_blobs, prune_blobs
from cellimg_dask.ops.stacks import map_stack, merge_stack, split_stack, stack_shape

DTYPES = ["bool", "u1", ">u2", "<i4", "f4", ">f8", "c8", "S3", "M8[s]"]
MAX_EXTENT = {0: 0, 1: 40, 2: 13, 3: 8, 4: 5, 5: 4}


@dataclass(frozen=True)
class Case:
    """A stack and how it is cut."""

    image: NDArray[Any]
    max_pixels: Any
    overlap: Any
    side: str
    pairs: tuple[tuple[int, int], ...]
    """What the overlap means."""

    @property
    def cut(self) -> tuple[Any, Any, str]:
        return self.max_pixels, self.overlap, self.side

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(m) for m in np.broadcast_to(self.max_pixels, self.image.ndim))

    def blocks(self, function: Callable[[NDArray[Any]], Any] = np.asarray) -> NDArray[np.object_]:
        slices, _ = split_stack(self.image.shape, *self.cut)
        flat = np.empty(slices.size, object)
        for number, where in enumerate(slices.flat):
            flat[number] = function(self.image[where])
        return flat.reshape(slices.shape)


def make_image(shape: tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[Any]:
    numbers = np.random.default_rng(seed).integers(0, 100, shape)
    return np.asarray(numbers).astype(dtype)


@st.composite
def cases(draw: st.DrawFn, ndims: tuple[int, int] = (1, 5)) -> Case:
    ndim = draw(st.integers(*ndims))
    top = MAX_EXTENT[ndim]
    shape = draw(st.tuples(*[st.integers(0, top)] * ndim))
    # Not more than some hundred blocks.
    smallest = max(1, max(shape, default=1) * ndim // 12)
    size = st.integers(smallest, top + 2)
    max_pixels = draw(st.one_of(size, st.tuples(*[size] * ndim)))
    width = st.one_of(st.just(0), st.integers(0, top + 3))
    ints, both = st.tuples(*[width] * ndim), st.tuples(*[st.tuples(width, width)] * ndim)
    side = draw(st.sampled_from(["after", "before", "both"]))
    kind = draw(st.sampled_from(["none", "int", "ints", "pairs", "halo"]))
    overlap: Any = None
    if kind in ("pairs", "halo"):
        pairs = overlap = draw(both)
        if kind == "halo":
            overlap = ci.Halo.of(pairs, ndim)
    else:
        given = (0,) * ndim
        if kind != "none":
            given = draw(ints) if kind == "ints" else (draw(width),) * ndim
            overlap = given if kind == "ints" or not ndim else given[0]
        pairs = tuple((n * (side != "after"), n * (side != "before")) for n in given)
    image = make_image(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    return Case(image, max_pixels, overlap, side, pairs)


def as_form(blocks: NDArray[np.object_], form: str, seed: int = 0) -> Any:
    """The same blocks in another form; pairs come in any order."""
    pairs = [(place, blocks[place]) for place in np.ndindex(blocks.shape)]
    if form == "lists":
        return blocks.tolist() if blocks.ndim else blocks
    if form == "mapping":
        return dict(pairs)
    if form == "pairs":
        order = np.random.default_rng(seed).permutation(len(pairs))
        return (pairs[i] for i in order)
    return blocks


def make_out(kind: str, shape: tuple[int, ...], dtype: Any) -> Any:
    if kind == "zarr" and np.dtype(dtype).kind not in "SM":
        chunks = tuple(max(1, n // 2) for n in shape)
        native = np.dtype(dtype).newbyteorder("=")
        return zarr.create_array(
            zarr.storage.MemoryStore(), shape=shape, chunks=chunks, dtype=native
        )
    if kind == "memmap" and 0 not in shape:
        with tempfile.TemporaryFile() as file:
            return np.memmap(file, dtype, "w+", shape=shape)
    return np.zeros(shape, dtype)


def assert_same(got: Any, expected: NDArray[Any]) -> None:
    got = np.asarray(got[...])
    assert got.shape == expected.shape
    assert got.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got, expected)


FORMS = ["array", "lists", "mapping", "pairs"]
OUTS = ["none", "memory", "memmap", "zarr"]
quick = settings(max_examples=80)


# ---------------------------------------------------------------- identity


@quick
@given(case=cases((0, 5)))
@example(Case(np.zeros((), "f4"), 3, 2, "after", ()))
@example(Case(np.zeros((0, 7), "u1"), (2, 3), 1, "both", ((1, 1), (1, 1))))
def test_blocks_are_the_cores_and_the_overlap(case: Case) -> None:
    image = case.image
    slices, offsets = split_stack(image.shape, *case.cut)
    grid_shape = tuple(-(-n // m) for n, m in zip(image.shape, case.sizes, strict=True))
    assert slices.shape == grid_shape
    assert slices.dtype == object
    assert offsets.shape == (*grid_shape, image.ndim)
    assert offsets.dtype == np.int64
    for place in np.ndindex(grid_shape):
        expected = tuple(
            slice(max(i * m - before, 0), min((i + 1) * m + after, n))
            for i, m, n, (before, after) in zip(
                place, case.sizes, image.shape, case.pairs, strict=True
            )
        )
        assert slices[place] == expected
        assert offsets[place].tolist() == [part.start for part in expected]


@quick
@given(case=cases((0, 5)), form=st.sampled_from(FORMS), kind=st.sampled_from(OUTS))
def test_split_and_merged_is_what_it_was(case: Case, form: str, kind: str) -> None:
    image = case.image
    blocks = case.blocks()
    known: dict[str, Any] = {}
    if kind != "none":
        known["out"] = make_out(kind, image.shape, image.dtype)
    if image.size == 0 or (form == "pairs" and kind == "none"):
        known["shape"] = image.shape
        if image.size == 0 and kind == "none":
            known["dtype"] = image.dtype
    merged = merge_stack(as_form(blocks, form), *case.cut, **known)
    assert_same(merged, image)
    assert kind == "none" or merged is known["out"]
    if image.size:
        assert stack_shape(blocks, *case.cut) == image.shape


def enlarged(block: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    for axis, factor in enumerate(factors):
        block = block.repeat(factor, axis)
    return block


@quick
@given(
    case=cases(),
    factors=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    form=st.sampled_from(FORMS),
    kind=st.sampled_from(OUTS),
)
def test_enlarged_blocks_make_the_enlarged_stack(
    case: Case, factors: list[int], form: str, kind: str
) -> None:
    scale = tuple(f if n < 20 else 1 for f, n in zip(factors, case.image.shape, strict=False))
    expected = enlarged(case.image, scale)
    blocks = case.blocks(lambda block: enlarged(block, scale))
    known: dict[str, Any] = {"scale": scale if len(set(scale)) > 1 else scale[0]}
    if kind != "none":
        known["out"] = make_out(kind, expected.shape, expected.dtype)
    else:
        known["dtype"] = expected.dtype
    if expected.size == 0 or (form == "pairs" and kind == "none"):
        known["shape"] = case.image.shape
    assert_same(merge_stack(as_form(blocks, form), *case.cut, **known), expected)
    if expected.size:
        assert stack_shape(blocks, *case.cut, scale=scale) == expected.shape


def sampled(block: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    return block[tuple(slice(None, None, factor) for factor in factors)]


def binned(block: NDArray[Any], factors: tuple[int, ...]) -> NDArray[Any]:
    """The largest value of each group of voxels, also of one that the end cuts short."""
    for axis, factor in enumerate(factors):
        block = np.maximum.reduceat(block, range(0, block.shape[axis], factor), axis=axis)
    return block


@quick
@given(
    case=cases(),
    factors=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    regular=st.booleans(),
    function=st.sampled_from([sampled, binned]),
    form=st.sampled_from(FORMS),
)
def test_shrunk_blocks_make_the_shrunk_stack_or_it_is_an_error(
    case: Case,
    factors: list[int],
    regular: bool,
    function: Callable[..., NDArray[Any]],
    form: str,
) -> None:
    image = make_image(case.image.shape, "i4")
    shrink = tuple(factors[: image.ndim])
    if regular:
        sizes = tuple(m * k for m, k in zip(case.sizes, shrink, strict=True))
        pairs = tuple((b // k * k, a) for (b, a), k in zip(case.pairs, shrink, strict=True))
        case = Case(image, sizes, pairs, "after", pairs)
    else:
        case = Case(image, *case.cut, case.pairs)
    expected = function(image, shrink) if image.size else sampled(image, shrink)
    blocks = case.blocks(lambda block: function(block, shrink))
    known: dict[str, Any] = {"shrink": shrink}
    if image.size == 0 or form == "pairs":
        known |= {"shape": image.shape, "dtype": image.dtype}
    try:
        merged = merge_stack(as_form(blocks, form), *case.cut, **known)
    except ValueError as error:
        assert not regular
        assert "shrink[" in str(error)  # noqa: PT017 - just some are refused
        return
    assert_same(merged, expected)
    if image.size:
        assert stack_shape(blocks, *case.cut, shrink=shrink) == expected.shape


def test_pairs_find_out_from_out_how_a_shrunk_stack_was_cut() -> None:
    image = make_image((11, 7), "u1")
    case = Case(image, (4, 8), (1, 0), "after", ())
    out = np.zeros((6, 7), "u1")
    blocks = case.blocks(lambda block: block[::2])
    assert_same(
        merge_stack(as_form(blocks, "pairs"), *case.cut, shrink=(2, 1), out=out), image[::2]
    )
    with pytest.raises(ValueError, match=r"max_pixels\[0\] = 3 is no multiple of shrink\[0\] = 2"):
        merge_stack(iter([((0, 0), image[:2])]), 3, shrink=2, out=out)


@pytest.mark.parametrize("kind", ["zarr", "zarr_sharded", "h5py", "memmap"])
def test_merging_into_files(tmp_path: Path, kind: str) -> None:
    image = make_image((23, 31, 5), "u2")
    case = Case(image, (7, 9, 5), (3, (2, 4), 0), "after", ())
    if kind == "h5py":
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "a.h5", "w") as file:
            out = file.create_dataset("a", image.shape, "u2", chunks=(8, 8, 5))
            merge_stack(case.blocks(), *case.cut, out=out)
            assert_same(out, image)
        return
    if kind == "memmap":
        np.save(tmp_path / "a.npy", np.zeros_like(image))
        merge_stack(case.blocks(), *case.cut, out=np.load(tmp_path / "a.npy", mmap_mode="r+"))
        assert_same(np.load(tmp_path / "a.npy"), image)
        return
    shards = {"shards": (16, 16, 5)} if kind == "zarr_sharded" else {}
    out = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=image.shape, chunks=(8, 8, 5), dtype="u2", **shards
    )
    assert merge_stack(case.blocks(), *case.cut, out=out) is out
    assert_same(zarr.open_array(str(tmp_path / "a.zarr"), mode="r"), image)


# ---------------------------------------------------------------- blocks of all kinds


def test_axes_behind_those_that_are_cut_are_taken_whole() -> None:
    image = make_image((9, 7, 3, 2), "u1")
    slices, offsets = split_stack(image.shape[:2], 4, 2)
    assert offsets.shape == (3, 2, 2)
    blocks = [[image[where] for where in row] for row in slices]
    assert_same(merge_stack(blocks, 4, 2), image)
    assert stack_shape(blocks, 4, 2) == image.shape
    out = np.zeros(image.shape, "u1")
    pairs = zip(np.ndindex(slices.shape), (image[where] for where in slices.flat), strict=True)
    assert_same(merge_stack(pairs, 4, 2, out=out), image)
    with pytest.raises(
        ValueError, match=r"at \(0, 0\) has shape \(6, 6\), expected \(6, 6, 3, 2\)"
    ):
        merge_stack(iter([((0, 0), blocks[0][0][..., 0, 0])]), 4, 2, out=out)
    # A function may add such an axis, too.
    hot = [[np.stack([block, block], axis=-1) for block in row] for row in blocks]
    assert_same(merge_stack(hot, 4, 2), np.stack([image, image], axis=-1))


@pytest.mark.parametrize("form", ["dask", "delayed", "future", "zarr", "lazy", "list"])
def test_blocks_may_be_lazy(form: str) -> None:
    image = make_image((10, 7), "i4")
    case = Case(image, (4, 3), ((0, 3), (1, 0)), "after", ())
    with ThreadPoolExecutor(2) as pool:
        make: dict[str, Callable[[NDArray[Any]], Any]] = {
            "dask": lambda block: da.from_array(block, chunks=2) * 2,
            "delayed": lambda block: dask.delayed(np.multiply)(block, 2),
            "future": lambda block: pool.submit(np.multiply, block, 2),
            "zarr": lambda block: zarr.array(block * 2, chunks=(2, 2)),
            "lazy": lambda block: ci.map_cells(np.multiply, block, 2 * np.ones_like(block)),
            "list": lambda block: (block * 2).tolist(),
        }
        # A list is one more level of a grid, so it is told from one by its position.
        for other in ["mapping", "pairs"] + (["array"] if form != "list" else []):
            blocks = as_form(case.blocks(make[form]), other)
            assert_same(merge_stack(blocks, *case.cut, shape=image.shape).astype("i4"), 2 * image)


class Counting:
    """An array that counts the voxels that are read."""

    read = 0

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        assert all(type(part) is slice for part in key)
        type(self).read += self._array[key].size
        return self._array[key]


def test_of_a_lazy_block_only_the_core_is_read() -> None:
    image = make_image((20, 20), "u1")
    case = Case(image, 4, 8, "both", ())
    Counting.read = 0
    assert_same(merge_stack(case.blocks(Counting), *case.cut), image)
    assert Counting.read == image.size


def test_each_block_of_a_mapping_is_computed_once_and_let_go() -> None:
    image = make_image((12, 9), "u1")
    slices, _ = split_stack(image.shape, 4, 1)
    calls: list[tuple[int, ...]] = []

    class Computing(dict[tuple[int, ...], Any]):
        def __getitem__(self, place: tuple[int, ...]) -> Any:
            calls.append(place)
            return image[slices[place]]

    blocks = Computing.fromkeys(np.ndindex(slices.shape))
    assert_same(merge_stack(blocks, 4, 1), image)
    assert sorted(calls) == sorted(np.ndindex(slices.shape))


def test_the_dtype_of_a_new_array_holds_all_blocks() -> None:
    a, b = np.zeros(3, ">u2"), np.ones(2, "i2")
    merged = merge_stack([a, b], 3)
    assert merged.dtype == np.dtype("i4")
    assert merge_stack([b[:1], a[:1]], 1, dtype="f8").dtype == np.dtype("f8")
    assert merge_stack([np.zeros(1, ">f4")], 1).dtype == np.dtype("f4")
    with pytest.raises(ValueError, match=r"at \(1,\) has dtype .*u2, which int16 .* dtype="):
        merge_stack(iter([((0,), b[:1]), ((1,), a[:1])]), 1, shape=(2,))
    with pytest.raises(ValueError, match=r"at \(0,\) has dtype .*u2, which uint8 cannot hold$"):
        merge_stack([a], 3, out=np.zeros(3, "u1"))
    assert merge_stack([a], 3, out=np.ones(3, "i4")).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- errors


def two_by_two() -> list[list[NDArray[Any]]]:
    """A stack of 5 x 7 in blocks of 3 x 4 with an overlap of 1 behind."""
    image = make_image((5, 7), "u1")
    slices, _ = split_stack((5, 7), (3, 4), 1)
    return [[image[where] for where in row] for row in slices]


def changed(place: tuple[int, int], block: Any) -> list[list[Any]]:
    blocks: list[list[Any]] = two_by_two()
    blocks[place[0]][place[1]] = block
    return blocks


EQUAL = np.array([[np.ones((2, 2))] * 2] * 2, dtype=object)
PIECES = dict(as_form(Case(make_image((5, 7), "u1"), (3, 4), 1, "after", ()).blocks(), "mapping"))


@pytest.mark.parametrize(
    ("blocks", "options", "error", "says"),
    [
        (
            changed((0, 1), np.zeros((4, 4))),
            {},
            ValueError,
            r"at \(0, 1\) .* \(4, 4\), expected \(4, 3\)",
        ),
        (
            changed((1, 0), np.zeros(3)),
            {},
            ValueError,
            r"at \(1, 0\) has shape \(3,\), expected \(2, 5\)",
        ),
        (
            changed((1, 1), np.zeros((4, 3))),
            {},
            ValueError,
            r"at \(1, 1\), the last one, has 4 voxels along axis 0, expected 1 to 3; max_pixels",
        ),
        (changed((1, 1), np.zeros(3)), {}, ValueError, r"at \(1, 1\) .* at least 2 axes"),
        (changed((0, 0), None), {}, TypeError, r"at \(0, 0\) is None, expected an array"),
        (changed((0, 0), "block"), {}, TypeError, r"at \(0, 0\) is 'block', expected an array"),
        (
            changed((0, 0), np.ma.masked_array(np.zeros((4, 5)))),
            {},
            TypeError,
            r"at \(0, 0\) is a masked",
        ),
        (
            changed((0, 0), [1, 2]),
            {},
            ValueError,
            "on axis 2 some entries are lists and some are not",
        ),
        ([[1], [2, 3]], {}, ValueError, r"nested like a grid; on axis 1 .* \[1, 2\]"),
        ([((0, 0), np.zeros(3)), ((0, 1), np.zeros(3))], {}, ValueError, "iterator or a dict"),
        (EQUAL, {}, ValueError, "at .* positions? of|expected"),
        (np.zeros((2, 2)), {}, TypeError, "object array .* got an array of float64 and shape"),
        (7, {}, TypeError, "object array, nested lists, a mapping .* got int"),
        (da.zeros(3), {}, TypeError, "object array, nested lists, a mapping .* got Array"),
        ([], {}, ValueError, r"grid of \(0,\), which has no blocks; .* shape=…"),
        ({}, {}, ValueError, "no blocks, or they come one by one; .* shape=…|there are no blocks"),
        (iter(PIECES.items()), {}, ValueError, "come one by one; .*shape=…"),
        (iter(PIECES.values()), {"shape": (5, 7)}, TypeError, r"must be \(position, block\) pairs"),
        ({**PIECES, (0, -1): 3}, {}, ValueError, "position of blocks.* at least 0, got -1"),
        ({**PIECES, "a": 3}, {}, TypeError, "position of blocks.* integer"),
        ({**PIECES, (1,): 3}, {}, ValueError, r"positions of \[1, 2\] axes"),
        ({**PIECES, (2, 1): 3}, {}, ValueError, r"lacks position \(2, 0\): it has 5 of 6"),
        (
            iter({**PIECES, (2, 1): 3}.items()),
            {"shape": (5, 7)},
            ValueError,
            r"\(2, 1\) .* outside the grid \(2, 2\)",
        ),
        (
            iter({**PIECES, (2,): 3}.items()),
            {"shape": (5, 7)},
            ValueError,
            r"\(2,\) .* has 1 axes, not 2",
        ),
        (
            iter([*PIECES.items(), *PIECES.items()]),
            {"shape": (5, 7)},
            ValueError,
            r"\(0, 0\) came twice",
        ),
        (
            iter([*PIECES.items()][:3]),
            {"shape": (5, 7)},
            ValueError,
            r"at \(1, 1\) is missing: 3 of 4 came",
        ),
        (
            two_by_two(),
            {"shape": (5, 9)},
            ValueError,
            r"grid of \(2, 2\), expected \(2, 3\) for a stack of \(5, 9\)",
        ),
        (
            two_by_two(),
            {"shape": (5, 6)},
            ValueError,
            r"at \(0, 1\) has shape \(4, 3\), expected \(4, 2\)",
        ),
        (two_by_two(), {"shape": (5.0, 6)}, TypeError, "shape.* integer, got 5.0"),
        (two_by_two(), {"max_pixels": 0}, ValueError, "max_pixels must be at least 1, got 0"),
        (
            two_by_two(),
            {"max_pixels": (3, 4, 5)},
            ValueError,
            "max_pixels must have one value for each of 2",
        ),
        (two_by_two(), {"max_pixels": 2.0}, TypeError, "max_pixels must be an integer"),
        (two_by_two(), {"overlap": [1]}, ValueError, "overlap .* for each of 2 axes"),
        (
            two_by_two(),
            {"overlap": 2},
            ValueError,
            r"at \(0, 0\) has shape \(4, 5\), expected \(5, 6\)",
        ),
        (two_by_two(), {"scale": 0}, ValueError, "scale must be at least 1, got 0"),
        (two_by_two(), {"scale": 0.5}, TypeError, "scale must be an integer, got 0.5"),
        (
            two_by_two(),
            {"scale": 2},
            ValueError,
            r"last one, has 3 voxels along axis 1, expected 2 to 8 in steps of 2",
        ),
        (
            two_by_two(),
            {"shrink": 2, "scale": 2},
            ValueError,
            "an axis is either enlarged or shrunk",
        ),
        (
            two_by_two(),
            {"shrink": 2},
            ValueError,
            r"shrink\[0\] = 2, but block 1 begins at voxel 3",
        ),
        (
            two_by_two(),
            {"out": np.zeros((5, 8))},
            ValueError,
            r"out has shape \(5, 8\), expected \(5, 7\)",
        ),
        (two_by_two(), {"out": [1]}, TypeError, "out must have shape and __setitem__, got list"),
        (two_by_two(), {"out": np.zeros((5, 7)), "dtype": "u1"}, TypeError, "out has its own"),
        (
            iter(PIECES.items()),
            {"out": np.zeros(5)},
            ValueError,
            "out has 1 axes, the blocks' positions have 2",
        ),
        (
            iter(PIECES.items()),
            {"out": np.zeros((5, 7)), "scale": 2},
            ValueError,
            r"5 voxels along axis 0, .* scale\[0\] = 2",
        ),
        (
            [],
            {"shape": (0,), "max_pixels": 3},
            ValueError,
            "empty and no block says its dtype; give dtype=",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    blocks: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    options = {"max_pixels": (3, 4), "overlap": 1, **options}
    with pytest.raises(error, match=says):
        merge_stack(blocks, **options)


def test_arrays_of_one_shape_that_numpy_made_one_of_are_told_of() -> None:
    with pytest.raises(ValueError, match=r"give the list itself"):
        merge_stack(EQUAL, 2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: split_stack(5, 2), TypeError, "shape must be a sequence"),
        (lambda: split_stack((5, -1), 2), ValueError, r"shape\[1\] must be at least 0"),
        (lambda: split_stack((5, 5), (2, 0)), ValueError, r"max_pixels\[1\] must be at least 1"),
        (lambda: split_stack((5, 5), 2, 1, "left"), ValueError, "side must be one of"),
        (lambda: stack_shape(iter([]), 2), TypeError, "one by one; give a grid"),
    ],
)
def test_a_wrong_split_is_refused(
    call: Callable[[], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()


# ---------------------------------------------------------------- on workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("backend", ["threads", "processes", "distributed"])
def test_blocks_of_a_queue_are_those_of_the_split(
    backend: str, request: pytest.FixtureRequest
) -> None:
    # The largest value of a block tells which voxels it has read.
    image = np.random.default_rng(5).permutation(300).reshape(20, 15).astype("i4")
    pairs = [(2, 3), (0, 6)]

    def from_largest(block: NDArray[Any]) -> NDArray[Any]:
        return block.max() - block

    slices, offsets = split_stack(image.shape, (6, 4), pairs)
    blocks = [[from_largest(image[where]) for where in row] for row in slices]
    large = [[np.kron(block, np.ones((2, 2), "i4")) for block in row] for row in blocks]
    where = request.getfixturevalue("client") if backend == "distributed" else backend

    def enlarge(block: NDArray[Any]) -> NDArray[Any]:
        return np.kron(from_largest(block), np.ones((2, 2), "i4"))

    def find(block: NDArray[Any], factor: int) -> NDArray[Any]:
        return np.argwhere(block % factor == 0)

    with ci.BlockQueue(2, init="factor_of_init = 3", backend=where) as queue:
        lazy = ci.map_cells(
            from_largest, image, cell_shape=(6, 4), halo=pairs, dtype="i4", queue=queue
        )
        assert_same(lazy, merge_stack(blocks, (6, 4), pairs))
        cut: dict[str, Any] = {"max_pixels": (6, 4), "overlap": pairs}
        merged = merge_stack(map_stack(enlarge, image, queue=queue, **cut), scale=2, **cut)
        assert_same(merged, merge_stack(large, (6, 4), pairs, scale=2))
        tables = map_stack(find, image, params={"factor": 7}, queue=queue, **cut)
        found = prune_blobs(merge_blobs(tables, offsets), image.shape, (6, 4))
        assert sorted(found[:, :2].tolist()) == np.argwhere(image % 7 == 0).tolist()
        named = map_stack(lambda block: factor_of_init, image, queue=queue, **cut)  # noqa: F821
        assert set(named[...].flat) == {3}


def test_blocks_of_a_stack_are_made_when_they_are_asked_for_and_keep_no_input() -> None:
    image = make_image((70, 3), "i4")
    calls: list[tuple[int, ...]] = []

    def same(block: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        calls.append(block.shape)
        assert block.shape == other.shape
        return block

    blocks = map_stack(same, image, -image, max_pixels=(2, 3), overlap=(3, 0))
    assert blocks.shape == (35, 1)
    assert not calls
    before = image.copy()
    assert_same(merge_stack(blocks, (2, 3), (3, 0)), before)
    assert len(calls) == 35
    assert calls.count((5, 3)) == 33
    image[...] = 0
    assert_same(merge_stack(blocks, (2, 3), (3, 0)), before)
    out = np.zeros_like(before)
    merge_stack(map_stack(np.negative, before, max_pixels=9), 9, out=out)
    assert_same(out, -before)
    assert_same(merge_stack(map_stack(np.negative, np.array(3), max_pixels=1), 1), np.array(-3))
    empty = map_stack(np.negative, np.zeros((0, 3), "u1"), max_pixels=2)
    assert empty.shape == (0, 2)
    assert merge_stack(empty, 2, shape=(0, 3), dtype="u1").shape == (0, 3)


def test_a_block_that_fails_is_named() -> None:
    def fragile(block: NDArray[Any]) -> NDArray[Any]:
        return block if block[0] == 0 else block / 0

    with np.errstate(divide="raise"):
        blocks = map_stack(fragile, np.arange(9), max_pixels=4)
        with pytest.raises(ci.BlockError, match=r"fragile at cell \([12],\) .*FloatingPointError"):
            merge_stack(blocks, 4)
    for call, says in [
        (lambda: map_stack(np.zeros(3), np.negative, max_pixels=2), "f must be callable"),
        (lambda: map_stack(np.negative, max_pixels=2), "at least one array"),
    ]:
        with pytest.raises(TypeError, match=says):
            call()


def test_blocks_of_a_pool_are_merged_as_they_come() -> None:
    image = make_image((40, 30), "u1")
    slices, _ = split_stack(image.shape, 16, 3)
    with ThreadPoolExecutor(2) as pool:
        blocks = pool.map(lambda where: 255 - image[where], slices.flat)
        merged = merge_stack(
            zip(np.ndindex(slices.shape), blocks, strict=True), 16, 3, shape=image.shape
        )
    assert_same(merged, 255 - image)


# ---------------------------------------------------------------- what others get wrong


def test_offsets_are_integers_for_any_number_of_axes() -> None:
    for ndim in range(6):
        slices, offsets = split_stack((5,) * ndim, 2, 1)
        assert offsets.dtype == np.int64
        assert offsets.shape == (*slices.shape, ndim) == (*(3,) * ndim, ndim)


def test_the_overlap_lies_behind_the_core_by_default() -> None:
    slices, _ = split_stack((20,), 6, 4)
    assert [where for (where,) in slices] == [
        slice(0, 10),
        slice(6, 16),
        slice(12, 20),
        slice(18, 20),
    ]


def test_merging_into_a_given_array_returns_it_and_counts_cores_not_blocks() -> None:
    # A cursor that moves on by the first block's shape, overlap included, would leave gaps.
    image = np.arange(20)
    slices, _ = split_stack((20,), 6, 4)
    out = np.full(20, -1)
    assert merge_stack([image[where] for where in slices], 6, 4, out=out) is out
    assert out.tolist() == image.tolist()


@pytest.mark.parametrize("n", range(13, 25))
def test_the_total_shape_is_right_where_the_last_but_one_block_is_clipped(n: int) -> None:
    slices, _ = split_stack((n,), 6, 5)
    assert stack_shape([np.zeros(n)[where] for where in slices], 6, 5) == (n,)


def test_scaling_blocks_that_are_out_of_phase_is_refused() -> None:
    image = np.arange(10)
    slices, _ = split_stack((10,), 3)
    blocks = [image[where][::2] for where in slices]
    assert np.concatenate(blocks).tolist() == [0, 2, 3, 5, 6, 8, 9]
    with pytest.raises(ValueError, match=r"block 1 begins at voxel 3 .* multiples of 2"):
        merge_stack(blocks, 3, shrink=2)
    slices, _ = split_stack((10,), 4, 3)
    blocks = [image[where][::2] for where in slices]
    assert merge_stack(blocks, 4, 3, shrink=2).tolist() == [0, 2, 4, 6, 8]


def test_with_context_on_both_sides_blocks_equal_the_whole_on_a_real_volume(
    shared_data: Path,
) -> None:
    tifffile = pytest.importorskip("tifffile")
    volume = tifffile.imread(shared_data / "brain_signal.tif")
    volume = np.asarray(volume[tuple(slice(n // 3, n // 3 + 40) for n in volume.shape)], "f4")

    def smooth(block: NDArray[Any]) -> NDArray[Any]:
        return ndimage.gaussian_filter(block, 1.0)

    whole = smooth(volume)
    wrong = {}
    for side in ("after", "both"):
        slices, _ = split_stack(volume.shape, 17, 4, side)
        blocks = as_form(np.empty(slices.shape, object), "array")
        for place in np.ndindex(slices.shape):
            blocks[place] = smooth(volume[slices[place]])
        wrong[side] = int((merge_stack(blocks, 17, 4, side) != whole).sum())
    assert wrong["both"] == 0
    assert wrong["after"] > 0
