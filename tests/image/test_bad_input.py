"""What is wrong is an error at the earliest moment that says value, place and way out."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.blocks.errors import ParameterError

IMAGE = np.arange(24).reshape(4, 6)


def untouched(*blocks: NDArray[Any]) -> NDArray[Any]:
    """A block function that no definition may call."""
    raise AssertionError("called although something is wrong with the definition")


def outcome(work: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Return what ``work`` returns or raises in a thread of its own; fail if it hangs."""
    (result,) = outcomes([work], timeout_s)
    return result


def outcomes(works: list[Callable[[], Any]], timeout_s: float = 60) -> list[Any]:
    """Run several in threads of their own at the same time."""
    results: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads), "a read hangs"
    return results


# ---------------------------------------------------------------- definitions


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        # sizes of cells
        ({"cell_shape": 0}, ValueError, r"cell_shape must be at least 1, got 0"),
        ({"cell_shape": (2, 0)}, ValueError, r"cell_shape\[1\] must be at least 1, got 0"),
        ({"cell_shape": (-3, 2)}, ValueError, r"cell_shape\[0\] must be at least 1, got -3"),
        ({"cell_shape": 2.0}, TypeError, r"cell_shape must be an integer, got 2\.0 of type float"),
        ({"cell_shape": (2, 1.5)}, TypeError, r"cell_shape\[1\] must be an integer, got 1\.5"),
        ({"cell_shape": (2,)}, ValueError, r"cell_shape must have one value for each of 2 axes"),
        ({"cell_shape": (2, 2, 2)}, ValueError, r"one value for each of 2 axes, got 3"),
        ({"cell_shape": "auto"}, TypeError, r"cell_shape must be .*'auto'"),
        ({"cell_shape": True}, TypeError, r"cell_shape must be an integer, got the boolean True"),
        # halos
        ({"halo": -1}, ValueError, r"halo must be at least 0, got -1"),
        ({"halo": (0, -2)}, ValueError, r"halo\[1\] must be at least 0, got -2"),
        ({"halo": [(0, 0), (0, -2)]}, ValueError, r"halo\[1\]\[1\] must be at least 0, got -2"),
        ({"halo": 1.0}, TypeError, r"halo must be an integer, got 1\.0 of type float"),
        ({"halo": (1, 0.5)}, TypeError, r"halo\[1\] must be an integer, got 0\.5"),
        ({"halo": (1,)}, ValueError, r"halo must have one value for each of 2 axes, got 1"),
        ({"halo": (1, 2, 3)}, ValueError, r"halo must have one value for each of 2 axes, got 3"),
        ({"halo": [(1, 2, 3), 0]}, ValueError, r"halo\[0\] must be .*\(before, after\) pair"),
        ({"halo": {0: 1, 1: 1}}, TypeError, r"halo must be .*per axis, got \{0: 1, 1: 1\}"),
        ({"halo": "3"}, TypeError, r"halo must be .*per axis, got '3'"),
        # boundaries, by the names that dask and SciPy have for them
        ({"boundary": "periodic"}, ValueError, r"unknown boundary 'periodic'.*is 'wrap' here"),
        ({"boundary": "nearest"}, ValueError, r"unknown boundary 'nearest'.*is 'edge' here"),
        ({"boundary": "mirror"}, ValueError, r"unknown boundary 'mirror'.*is 'reflect' here"),
        ({"boundary": "grid-wrap"}, ValueError, r"'grid-wrap'.*is 'wrap' here"),
        ({"boundary": None}, ValueError, r"unknown boundary None.*dask's None is 'none' here"),
        ({"boundary": 0}, ValueError, r"boundary 0.*boundary='constant', fill_value=0"),
        ({"boundary": "WRAP"}, ValueError, r"'WRAP'; use one of none, constant, reflect, symm"),
        ({"boundary": ["wrap", "edge"]}, ValueError, r"unknown boundary \['wrap', 'edge'\]; use"),
        ({"boundary": {0: "wrap"}}, ValueError, r"unknown boundary \{0: 'wrap'\}; use one of"),
        # fill values that the input cannot hold
        (
            {"boundary": "constant", "fill_value": 0.5},
            ValueError,
            r"0\.5 cannot be held by input 0",
        ),
        (
            {"boundary": "constant", "fill_value": np.nan},
            ValueError,
            r"nan cannot be held .* int64",
        ),
        ({"boundary": "constant", "fill_value": "x"}, ValueError, r"'x' cannot be held by input 0"),
        ({"boundary": "constant", "fill_value": [1, 2]}, ValueError, r"\[1, 2\] cannot be held by"),
        ({"boundary": "constant", "fill_value": 2**70}, ValueError, r"cannot be held by input 0"),
        ({"boundary": "constant", "fill_value": 1j}, ValueError, r"1j cannot be held by input 0"),
        # dtype
        ({"dtype": None}, TypeError, r"cannot be known without running it: give dtype=…"),
        ({"dtype": object}, ValueError, r"dtype object cannot be kept in cells; give one of fixed"),
        ({"dtype": "nonsense"}, TypeError, r"nonsense"),
        # the rest
        ({"params": [1]}, TypeError, r"params must be a mapping of names, got list"),
        ({"params": {1: 2}}, TypeError, r"params must have strings as names, got 1"),
        (
            {"cache": "mine"},
            TypeError,
            r"cache must be \"shared\", a CellCache or None, got 'mine'",
        ),
        (
            {"cache": 10**6},
            TypeError,
            r"cache must be \"shared\", a CellCache or None, got 1000000",
        ),
    ],
)
def test_map_cells_refuses_at_once(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ci.map_cells(untouched, IMAGE, **{"dtype": int, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"halo": (1,)}, ValueError, r"halo must have one value for each of 2 axes, got 1"),
        ({"halo": 0.5}, TypeError, r"halo must be an integer, got 0\.5"),
        ({"boundary": "periodic"}, ValueError, r"'periodic'.*is 'wrap' here"),
        ({"dtype": None}, TypeError, r"cannot know the dtype: give dtype=…"),
        ({"dtype": object}, ValueError, r"dtype object cannot be kept"),
        ({"params": 3}, TypeError, r"params must be a mapping"),
        ({"cache": 3}, TypeError, r"cache must be"),
    ],
)
def test_fill_cells_refuses_at_once(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ci.fill_cells(untouched, ci.CellGrid((4, 6), 2), IMAGE, **{"dtype": int, **settings})


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ci.map_cells(untouched), TypeError, r"at least one input; fill_cells makes"),
        (lambda: ci.map_cells(5, IMAGE), TypeError, r"f must be callable, got int"),
        (lambda: ci.map_cells("f", IMAGE), ValueError, r"'f' has no colon.*module:function"),
        (lambda: ci.map_cells(IMAGE, untouched), TypeError, r"f must be callable, got ndarray"),
        (
            lambda: ci.fill_cells(3, ci.CellGrid((4,), 2), dtype=int),
            TypeError,
            r"f must be callable or a BlockCode, got int",
        ),
        (
            lambda: ci.fill_cells(untouched, (4, 6), dtype=int),
            TypeError,
            r"grid must be a CellGrid, got tuple",
        ),
        (
            lambda: ci.map_cells(untouched, ci.Input(IMAGE, index_map=lambda roi: roi), dtype=int),
            ValueError,
            r"every input has one; use fill_cells with a grid",
        ),
        (
            lambda: ci.Input(IMAGE, index_map=3),
            TypeError,
            r"index_map must be a callable from Roi to Roi, got int",
        ),
        (lambda: ci.Input(IMAGE, boundary="nearest"), ValueError, r"'nearest'.*'edge' here"),
        (
            lambda: ci.map_cells(untouched, IMAGE, ci.Input(IMAGE, halo=(1,)), dtype=int),
            ValueError,
            r"halo of input 1: halo must have one value for each of 2 axes, got 1",
        ),
        (
            lambda: ci.map_cells(untouched, IMAGE, ci.Input(IMAGE, halo=1.5), dtype=int),
            TypeError,
            r"halo of input 1: halo must be an integer, got 1\.5",
        ),
        (
            lambda: ci.map_cells(
                untouched,
                IMAGE,
                ci.Input(IMAGE[0], index_map=lambda roi: roi),
                halo=(1, 2),
                dtype=int,
            ),
            ValueError,
            r"halo of input 1: .* got 2: \(1, 2\); give input 1 its own: Input\(array, halo=…\)",
        ),
        (
            lambda: ci.map_cells(
                untouched,
                IMAGE,
                ci.Input(IMAGE.astype("u1"), boundary="constant", fill_value=-1),
                dtype=int,
            ),
            ValueError,
            r"fill_value -1 cannot be held by input 1 of dtype uint8; give one that can",
        ),
        (lambda: ci.CellCache(-1), ValueError, r"max_bytes must be at least 0, got -1"),
        (lambda: ci.CellCache(1e9), TypeError, r"max_bytes must be an integer, got 1000000000\.0"),
        (lambda: ci.set_cache(-5), ValueError, r"max_bytes must be at least 0, got -5"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    call: Callable[[], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call()


def test_an_unknown_boundary_is_refused_even_where_nothing_is_read() -> None:
    with pytest.raises(ValueError, match=r"'periodic'.*is 'wrap' here"):
        ci.fill_cells(untouched, ci.CellGrid((4,), 2), dtype=int, boundary="periodic")


@pytest.mark.parametrize("value", [1j, None, 1e300, "1"])
def test_a_fill_value_that_a_float_input_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"fill_value .* cannot be held by input 0 of dtype float32"
    ):
        ci.map_cells(
            untouched, IMAGE.astype("f4"), boundary="constant", fill_value=value, dtype="f4"
        )


@pytest.mark.parametrize("value", [0.1, np.nan, np.inf, -np.inf, 7, True, np.float64(1 / 3)])
def test_a_fill_value_is_rounded_to_the_precision_of_a_float_input(value: Any) -> None:
    image = np.zeros(2, "f4")
    seen = []

    def look(a: NDArray[Any]) -> NDArray[Any]:
        seen.append(a.copy())
        return a

    ci.map_cells(look, image, halo=1, boundary="constant", fill_value=value, dtype="f4")[:]
    np.testing.assert_array_equal(
        seen[0], np.pad(image, 1, constant_values=np.float32(value)), strict=True
    )


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ([(4, 6), (4, 5)], r"shapes \(4, 6\), \(4, 5\) do not fit .* Input\(array, index_map="),
        ([(4, 6), (4,)], r"shapes \(4, 6\), \(4,\) do not fit together as NumPy broadcasts"),
        ([(4, 6), (2, 3, 6)], r"shapes \(4, 6\), \(2, 3, 6\) do not fit together"),
        ([(0, 6), (4, 6)], r"shapes \(0, 6\), \(4, 6\) do not fit together"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(
    shapes: list[tuple[int, ...]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        ci.map_cells(untouched, *map(np.zeros, shapes), dtype=float)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 6), (6, 4), (2, 1)])
def test_an_input_that_does_not_fit_the_grid_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"input 1 has shape .*, expected \(4, 6\) or .* Input\(array, index_map="
    ):
        ci.fill_cells(untouched, ci.CellGrid((4, 6), 2), IMAGE, np.zeros(shape), dtype=int)


class NoDtype:
    shape = (4,)

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("must not be read")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "image.tif",
            r"str has no shape and no dtype; open the file first: open_image\(path\)",
        ),
        (Path("image.zarr"), r"has no shape and no dtype.*open the file first"),
        (b"image", r"bytes has no shape and no dtype"),
        ([1, 2, 3], r"list has no shape and no dtype; use numpy\.asarray"),
        ((1, 2), r"tuple has no shape and no dtype; use numpy\.asarray"),
        (3, r"int has no shape and no dtype and no __getitem__; use numpy\.asarray"),
        (2.5, r"float has no .*; use numpy\.asarray"),
        (None, r"NoneType has no shape"),
        (np.zeros, r"has no shape"),
        ({"a": 1}, r"dict has no shape and no dtype"),
        (NoDtype(), r"NoDtype has no dtype"),
        (ci.CellGrid((4,), 2), r"CellGrid has no dtype and no __getitem__"),
    ],
)
def test_what_is_no_array_is_refused(value: Any, says: str) -> None:
    for define in (
        lambda: ci.map_cells(untouched, value, dtype=int),
        lambda: ci.map_cells(untouched, IMAGE, value, dtype=int),
        lambda: ci.fill_cells(untouched, ci.CellGrid((4,), 2), value, dtype=int),
        lambda: ci.Input(value),
    ):
        with pytest.raises(TypeError, match=says):
            define()


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.masked_greater(IMAGE, 5)
    for define in (
        lambda: ci.map_cells(untouched, masked, dtype=int),
        lambda: ci.map_cells(untouched, IMAGE, ci.Input(masked), dtype=int),
        lambda: ci.fill_cells(untouched, ci.CellGrid((4, 6), 2), masked, dtype=int),
    ):
        with pytest.raises(TypeError, match=r"masked array, its mask would be lost; .*filled"):
            define()


def test_a_dask_array_of_unknown_chunks_is_refused() -> None:
    array = da.from_array(np.arange(10), chunks=5)
    unknown = array[array > 3]
    with pytest.raises(ValueError, match=r"unknown chunk sizes .*compute_chunk_sizes\(\)"):
        ci.map_cells(untouched, unknown, dtype=int)


@pytest.mark.parametrize("answer", [None, (slice(0, 2),), ci.Roi((0,), (2,))])
def test_an_index_map_that_gives_no_roi_of_the_input_is_an_error(answer: Any) -> None:
    lazy = ci.map_cells(
        lambda a, b: a,
        IMAGE,
        ci.Input(IMAGE, index_map=lambda roi: answer),
        dtype=int,
        cell_shape=2,
    )
    with pytest.raises(
        (TypeError, ci.CellimgError), match=r"index_map of input 1 must return a Roi with 2 axes"
    ):
        lazy[...]


# ---------------------------------------------------------------- reading


def lazy_image() -> ci.CellImg:
    return ci.map_cells(np.negative, IMAGE, cell_shape=(3, 4))


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [
        (4, IndexError, r"index 4 on axis 0 leaves the image; allowed is -4\.\.3"),
        ((0, -7), IndexError, r"index -7 on axis 1 leaves the image; allowed is -6\.\.5"),
        (slice(0, 5), IndexError, r"slice bound 5 on axis 0 .* allowed is -4\.\.4; Roi\.clip"),
        ((0, slice(-7, 2)), IndexError, r"slice bound -7 on axis 1 .* allowed is -6\.\.6"),
        (slice(None, None, 2), ValueError, r"step 2 on axis 0: .*use image\.to_dask\(\)"),
        ((..., slice(None, None, -1)), ValueError, r"step -1 on axis 1: .*image\.to_dask\(\)"),
        (ci.Roi((0, 0), (4, 7)), IndexError, r"region 0:7 on axis 1 .*allowed is 0:6; Roi\.clip"),
        (ci.Roi((-1, 0), (4, 6)), IndexError, r"region -1:4 on axis 0 .*allowed is 0:4"),
        (ci.Roi((0,), (4,)), IndexError, r"has 1 axes, the image has 2"),
        ((0, 0, 0), IndexError, r"too many indices: the image has 2 axes, 3 were given"),
        (None, TypeError, r"index None on axis 0: .*to_dask\(\) for masks, lists and new axes"),
        ((None, 0), TypeError, r"index None on axis 0: .*to_dask\(\)"),
        ([0, 1], TypeError, r"index \[0, 1\] on axis 0: .*to_dask\(\)"),
        (IMAGE > 3, TypeError, r"on axis 0: .*to_dask\(\) for masks"),
        ((0, [True] * 6), TypeError, r"on axis 1: .*to_dask\(\) for masks"),
        (np.array([0, 1]), TypeError, r"on axis 0: .*to_dask\(\) for masks, lists"),
        (1.0, TypeError, r"index on axis 0 must be an integer, got 1\.0"),
        (slice(0.5, 2), TypeError, r"slice bound on axis 0 must be an integer, got 0\.5"),
        ("z", TypeError, r"index on axis 0 must be an integer, got 'z'"),
    ],
)
def test_a_wrong_region_is_refused_and_nothing_is_computed(
    key: Any, error: type[Exception], says: str
) -> None:
    lazy = lazy_image()
    for use in (
        lambda: lazy[key],
        lambda: lazy.prefetch(key),
        lambda: lazy.invalidate(key),
        lambda: lazy.read_into(np.zeros((4, 6), int), key),
    ):
        with pytest.raises(error, match=says):
            use()
    assert lazy.stats().misses == 0


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        (4, IndexError, r"cell index 4 lies outside the grid; allowed is 0\.\.3"),
        (-1, IndexError, r"cell index -1 lies outside the grid; allowed is 0\.\.3"),
        ((0, 2), IndexError, r"position\[1\] = 2 lies outside the grid; allowed is 0\.\.1"),
        ((0,), IndexError, r"position \(0,\) has 1 axes, the grid has 2"),
        (0.0, TypeError, r"cell index must be an integer, got 0\.0"),
        (True, TypeError, r"cell index must be an integer, got the boolean True"),
        ("0", TypeError, r"must be .*integer.*'0'"),
    ],
)
def test_a_cell_that_is_not_there_is_refused(index: Any, error: type[Exception], says: str) -> None:
    lazy = lazy_image()
    for use in (lazy.load, lazy.peek):
        with pytest.raises(error, match=says):
            use(index)
    assert lazy.stats().misses == 0


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        ([[0] * 6] * 4, TypeError, r"out must be a NumPy array, got list"),
        (np.zeros((4, 5), int), ValueError, r"out has shape \(4, 5\), expected \(4, 6\)"),
        (np.zeros((4, 6), "i4"), ValueError, r"out has dtype int32, which cannot hold int64"),
        (np.broadcast_to(np.array(0), (4, 6)), ValueError, r"out is read-only; give a writable"),
    ],
)
def test_an_array_that_cannot_take_the_result_is_refused(
    out: Any, error: type[Exception], says: str
) -> None:
    lazy = lazy_image()
    with pytest.raises(error, match=says):
        lazy.read_into(out)
    assert lazy.stats().misses == 0


def test_an_image_has_no_memory_to_share() -> None:
    with pytest.raises(ValueError, match=r"no memory to share: .* copy=False cannot"):
        np.asarray(lazy_image(), copy=False)
    with pytest.raises(TypeError, match=r"len\(\) of an image without axes"):
        len(ci.map_cells(np.negative, np.array(3)))


# ---------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("function", "dtype", "says"),
    [
        (lambda a: None, int, r"returned NoneType, expected an array of shape \(3, 2\); .*fill_ce"),
        (lambda a: a.tolist(), int, r"returned list, expected an array .*return a NumPy array"),
        (lambda a: (a, a), int, r"returned tuple, expected an array"),
        (lambda a: "no", int, r"returned str, expected an array"),
        (lambda a: a[1:], int, r"returned shape \(2, 2\), expected \(3, 2\)"),
        (lambda a: a[0], int, r"returned shape \(2,\), expected \(3, 2\)"),
        (lambda a: np.stack([a, a]), int, r"returned shape \(2, 3, 2\), expected \(3, 2\).*new_ax"),
        (lambda a: a[:1, :1], int, r"returned shape \(1, 1\), expected \(3, 2\)"),
        (lambda a: a, "u1", r"returned dtype int64, which uint8 cannot hold; .*astype\('uint8'\)"),
        (lambda a: a, "f4", r"returned dtype int64, which float32 cannot hold"),
        (lambda a: a / 2, int, r"returned dtype float64, which int64 cannot hold.*dtype='float64'"),
        (lambda a: a * 1j, float, r"returned dtype complex128, which float64 cannot hold"),
        (lambda a: a, bool, r"returned dtype int64, which bool cannot hold"),
        (lambda a: a.astype(object), int, r"returned dtype object, which int64 cannot hold"),
        (lambda a: a.astype(str), int, r"returned dtype <U\d+, which int64 cannot hold"),
        (lambda a: np.ma.masked_greater(a, 3), int, r"masked"),
    ],
)
@pytest.mark.parametrize("cache", ["shared", None])
def test_a_result_that_does_not_fit_names_cell_got_and_expected(
    function: Callable[..., Any], dtype: Any, says: str, cache: Any
) -> None:
    lazy = ci.map_cells(function, IMAGE, dtype=dtype, cell_shape=(3, 4), cache=cache)
    for use in (
        lambda: lazy.load((0, 1)),
        lambda: lazy[:3, 4:],
        lambda: lazy[1:2, 4:],
        lambda: lazy.to_dask()[:3, 4:].compute(scheduler="sync"),
    ):
        with pytest.raises(ci.ResultError, match=says) as caught:
            use()
        assert (caught.value.position, caught.value.roi) == ((0, 1), ci.Roi((0, 4), (3, 6)))
        assert isinstance(caught.value, ValueError)
        assert "at cell (0, 1) [0:3, 4:6]: " in str(caught.value)
    assert lazy.peek((0, 1)) is None
    assert lazy.stats().loads == 0


# ---------------------------------------------------------------- a block that raises


class TroubleError(RuntimeError):
    """What the functions below raise."""


class Fails:
    """A block function that fails where its block holds 12, until it is repaired."""

    def __init__(self) -> None:
        self.broken = True
        self.calls = 0
        self.error = TroubleError("twelve is too much")

    def __call__(self, a: NDArray[Any]) -> NDArray[Any]:
        self.calls += 1
        if self.broken and 12 in a:
            raise self.error
        return -a


def prefetch(lazy: ci.CellImg) -> None:
    request = lazy.prefetch()
    assert request.wait(60)
    assert request.error is not None
    raise request.error


@pytest.mark.parametrize("cache", ["shared", None])
@pytest.mark.parametrize(
    "read",
    [
        lambda lazy: lazy.load((1, 0)),
        lambda lazy: lazy[2:, :3],
        lambda lazy: lazy[3, 1],
        lambda lazy: lazy[...],
        np.asarray,
        prefetch,
        lambda lazy: lazy.to_dask().compute(scheduler="sync"),
        lambda lazy: lazy.compute(scheduler="threads"),
        lambda lazy: lazy.read_into(np.zeros((4, 6), int)),
    ],
    ids=["load", "cell", "voxel", "whole", "asarray", "prefetch", "sync", "threads", "into"],
)
def test_a_block_that_raises(read: Callable[[ci.CellImg], Any], cache: Any) -> None:
    function = Fails()
    lazy = ci.map_cells(function, IMAGE, dtype=int, cell_shape=(2, 3), cache=cache)
    for _ in range(2):
        caught = outcome(lambda: read(lazy))
        assert type(caught) is ci.BlockError
        assert isinstance(caught, RuntimeError)
        assert caught.__cause__ is function.error
        assert (caught.function, caught.position) == ("Fails", (1, 0))
        assert caught.roi == ci.Roi((2, 0), (4, 3))
        assert str(caught) == "Fails at cell (1, 0) [2:4, 0:3]: TroubleError: twelve is too much"
        # Nothing is kept of the cell, and the others are as good as ever.
        assert lazy.peek((1, 0)) is None
        np.testing.assert_array_equal(lazy[:2], -IMAGE[:2])
        np.testing.assert_array_equal(lazy[2:, 3:], -IMAGE[2:, 3:])
    assert lazy.stats().errors == 2
    function.broken = False
    np.testing.assert_array_equal(lazy.load((1, 0)), -IMAGE[2:, :3])
    np.testing.assert_array_equal(lazy[...], -IMAGE)


def test_cells_that_were_computed_before_the_error_stay() -> None:
    function = Fails()
    lazy = ci.map_cells(function, IMAGE, dtype=int, cell_shape=(2, 3))
    lazy[:2]
    calls = function.calls
    with pytest.raises(ci.BlockError):
        lazy[...]
    assert all(lazy.peek(index) is not None for index in (0, 1))
    function.broken = False
    lazy[...]
    # Only the two cells below were missing; one may have been computed beside the failing one.
    assert calls == 2
    assert function.calls - calls <= 4


def test_every_thread_that_waits_gets_an_error_of_its_own(waiting: Callable[[int], None]) -> None:
    inside = threading.Event()
    trouble = TroubleError("for all")

    def fail(a: NDArray[Any]) -> NDArray[Any]:
        inside.set()
        waiting(4)
        raise trouble

    lazy = ci.map_cells(fail, IMAGE, dtype=int, cell_shape=6)

    def read_when_it_is_under_way() -> Any:
        assert inside.wait(60)
        return lazy.load(0)

    errors = outcomes([lambda: lazy.load(0), *[read_when_it_is_under_way] * 4])
    assert [type(error) for error in errors] == [ci.BlockError] * 5
    assert len({id(error) for error in errors}) == 5
    assert all(error.__cause__ is trouble for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert lazy.stats().errors == 1
    assert lazy.peek(0) is None


def test_every_thread_that_waits_for_an_input_gets_its_error(
    waiting: Callable[[int], None],
) -> None:
    inside = threading.Event()

    class Gone:
        shape = (4,)
        dtype = np.dtype(int)

        def __getitem__(self, key: Any) -> Any:
            inside.set()
            waiting(1)
            raise OSError(5, "the disk is gone")

    lazy = ci.map_cells(np.negative, Gone())

    def read_when_it_is_under_way() -> Any:
        assert inside.wait(60)
        return lazy.load(0)

    for error in outcomes([lambda: lazy.load(0), read_when_it_is_under_way]):
        assert type(error) is ci.ReadError, repr(error)
        assert "the disk is gone" in str(error)


def test_an_error_upstream_names_the_cell_upstream() -> None:
    function = Fails()
    first = ci.map_cells(function, IMAGE, dtype=int, cell_shape=(2, 3))
    second = ci.map_cells(np.negative, first, halo=1, cell_shape=(4, 2))
    for _ in range(2):
        with pytest.raises(ci.BlockError, match=r"Fails at cell \(1, 0\)") as caught:
            second.load(0)
        assert caught.value.__cause__ is function.error
        assert second.peek(0) is None
    np.testing.assert_array_equal(second.load((0, 2)), IMAGE[:, 4:])
    function.broken = False
    np.testing.assert_array_equal(second[...], IMAGE)


@pytest.mark.parametrize("cache", ["shared", None])
@pytest.mark.parametrize("error", [SystemExit(3), SystemExit("bye"), SystemExit()])
def test_exit_in_a_block_is_contained(error: SystemExit, cache: Any) -> None:
    broken = [True]

    def leave(a: NDArray[Any]) -> NDArray[Any]:
        if broken:
            raise error
        return a

    lazy = ci.map_cells(leave, IMAGE, dtype=int, cell_shape=2, cache=cache)
    for read in (
        lambda: lazy.load(0),
        lambda: lazy[...],
        lambda: lazy.prefetch().result(timeout=60),
        lambda: lazy.to_dask().compute(scheduler="sync"),
    ):
        caught = outcome(read)
        assert type(caught) is ci.BlockError
        assert caught.__cause__ is error
        assert "leave at cell" in str(caught)
        assert "SystemExit" in str(caught)
    broken.clear()
    np.testing.assert_array_equal(lazy[...], IMAGE)


def test_a_fill_function_that_fails_half_way_leaves_nothing() -> None:
    broken = [True]

    def half(block: ci.Block) -> None:
        block.data[:1] = 99
        if broken:
            raise TroubleError("half way")
        block.data[1:] = 1

    lazy = ci.fill_cells(half, ci.CellGrid((4,), 2), dtype=int)
    for read in (lambda: lazy.load(1), lambda: lazy[:], lambda: lazy[2:]):
        with pytest.raises(ci.BlockError, match="half way"):
            read()
        assert lazy.peek(1) is None
    broken.clear()
    np.testing.assert_array_equal(lazy[:], [99, 1, 99, 1])


def scaled(a: Any, b: Any = 0, *, factor: Any, task: Any = None) -> Any:
    raise AssertionError("called although something is wrong with the definition")


@pytest.mark.parametrize(
    ("inputs", "params", "mistakes"),
    [
        (1, {"factr": 1}, ["factr: no such parameter; did you mean factor?", "factor: is missing"]),
        (1, {"factor": 1, "q": 1}, ["q: no such parameter; there are b, factor"]),
        (1, {"factor": 1, "a": 1}, ["a: is an array that is given after the function, and no p"]),
        (2, {"factor": 1, "b": 1}, ["b: is an array that is given after the function, and no p"]),
        (2, None, ["factor: is missing: give it in params"]),
    ],
)
@pytest.mark.parametrize(
    "define",
    [
        lambda *inputs, params: ci.map_cells(scaled, *inputs, dtype=int, params=params),
        lambda *inputs, params: ci.map_labels(scaled, *inputs, halo=1, params=params),
        lambda *inputs, params: ci.map_points(scaled, *inputs, params=params),
        lambda *inputs, params: ci.reduce_cells(scaled, sum, *inputs, params=params),
        lambda *inputs, params: ci.segment(scaled, *inputs, halo=1, params=params),
        lambda *inputs, params: ci.segment(
            lambda model, a, b=0, *, factor, task=None: scaled(a, factor=1),
            *inputs,
            halo=1,
            load_model=int,
            params=params,
        ),
    ],
    ids=["map_cells", "map_labels", "map_points", "reduce_cells", "segment", "with a model"],
)
def test_wrong_names_of_params_are_refused_at_once(
    define: Any, inputs: int, params: Any, mistakes: list[str]
) -> None:
    with pytest.raises(ParameterError) as caught:
        define(*[IMAGE] * inputs, params=params)
    title, *lines = str(caught.value).splitlines()
    assert title.startswith("parameters of ")
    assert len(lines) == len(mistakes)
    for line, mistake in zip(lines, mistakes, strict=True):
        assert line.startswith(f"  {mistake}")


def test_functions_that_do_not_say_what_they_take_are_given_all_params() -> None:
    def any_names(a: Any, **more: Any) -> Any:
        return a + sum(more.values())

    lazy = ci.map_cells(any_names, IMAGE, dtype=int, params={"x": 1, "y": 2})
    np.testing.assert_array_equal(lazy[...], IMAGE + 3)
    ci.map_cells(np.clip, IMAGE, dtype=int, params={"a_min": 1, "a_max": 2})


# ---------------------------------------------------------------- cycles


READS = {
    "load": lambda lazy: lazy.load(0),
    "cell": lambda lazy: lazy[:2],
    "part": lambda lazy: lazy[1],
    "whole": lambda lazy: lazy[...],
    "asarray": np.asarray,
    "prefetch": lambda lazy: lazy.prefetch().result(timeout=60),
    "dask sync": lambda lazy: lazy.to_dask().compute(scheduler="sync"),
    "dask threads": lambda lazy: lazy.to_dask().compute(scheduler="threads"),
}

both_caches = pytest.mark.parametrize("cache", ["shared", None])
each_read = pytest.mark.parametrize("read", READS.values(), ids=READS.keys())


def check_cycle(caught: Any, name: str) -> None:
    assert type(caught) is ci.CycleError, repr(caught)
    assert isinstance(caught, RuntimeError)
    assert name in caught.function
    assert f"at cell {caught.position} " in str(caught)
    assert "needs itself" in str(caught)


@both_caches
@each_read
@pytest.mark.parametrize("inner", ["own cell", "whole", "asarray", "load", "dask"])
def test_an_image_that_reads_itself(read: Callable[[Any], Any], inner: str, cache: Any) -> None:
    images = []

    def itself(block: ci.Block) -> None:
        (image,) = images
        if inner == "own cell":
            block.data[...] = image[block.roi]
        elif inner == "whole":
            block.data[...] = image[...][block.roi.slices]
        elif inner == "asarray":
            block.data[...] = np.asarray(image)[block.roi.slices]
        elif inner == "load":
            block.data[...] = image.load(block.index)
        else:
            block.data[...] = image.to_dask()[block.roi.slices].compute(scheduler="sync")

    images.append(ci.fill_cells(itself, ci.CellGrid((6,), 2), dtype=int, cache=cache))
    check_cycle(outcome(lambda: read(images[0])), "itself")
    assert all(images[0].peek(index) is None for index in range(3))


@both_caches
@each_read
def test_an_image_that_reads_itself_through_another(read: Callable[[Any], Any], cache: Any) -> None:
    images: dict[str, ci.CellImg] = {}

    def first(block: ci.Block) -> None:
        block.data[...] = images["third"][block.roi]

    images["first"] = ci.fill_cells(first, ci.CellGrid((6,), 2), dtype=int, cache=cache)
    images["second"] = ci.map_cells(np.negative, images["first"], cell_shape=3, cache=cache)
    images["third"] = ci.map_cells(np.negative, images["second"], halo=1, cell_shape=2, cache=cache)
    for name in images:
        caught = outcome(lambda name=name: read(images[name]))
        assert isinstance(caught, ci.CycleError), repr(caught)
        assert "needs itself" in str(caught)


def test_cells_of_one_image_that_need_each_other_in_a_ring() -> None:
    images = []

    def ring(block: ci.Block) -> None:
        block.data[...] = images[0].load((block.index + 1) % 5)

    images.append(ci.fill_cells(ring, ci.CellGrid((5,), 1), dtype=int))
    check_cycle(outcome(lambda: images[0].load(2)), "ring")
    check_cycle(outcome(lambda: images[0][...]), "ring")


def test_an_input_that_reads_the_image_is_a_cycle() -> None:
    class Source:
        shape = (4,)
        dtype = np.dtype(int)

        def __getitem__(self, key: Any) -> NDArray[Any]:
            return image[key]

    image = ci.map_cells(np.negative, Source(), cell_shape=2)
    check_cycle(outcome(lambda: image[...]), "negative")


@pytest.mark.parametrize("cache", ["shared", None])
def test_two_threads_whose_cells_need_each_other(cache: Any) -> None:
    images = []
    # Both are in the middle of their cell before either asks for the other's.
    meet = threading.Barrier(2)

    def other(block: ci.Block) -> None:
        meet.wait(timeout=60)
        block.data[...] = images[0].load(1 - block.index)

    images.append(ci.fill_cells(other, ci.CellGrid((2,), 1), dtype=int, cache=cache))
    errors = outcomes([lambda: images[0].load(0), lambda: images[0].load(1)])
    for error in errors:
        check_cycle(error, "other")
    assert images[0].peek(0) is None
    assert images[0].peek(1) is None


def test_three_threads_whose_images_need_each_other() -> None:
    images: list[ci.CellImg] = []
    meet = threading.Barrier(3)

    def make(number: int) -> ci.CellImg:
        def next_one(block: ci.Block) -> None:
            meet.wait(timeout=60)
            block.data[...] = images[(number + 1) % 3][block.roi]

        return ci.fill_cells(next_one, ci.CellGrid((4,), 4), dtype=int)

    images.extend(make(number) for number in range(3))
    for error in outcomes([lambda n=n: images[n].load(0) for n in range(3)]):
        check_cycle(error, "next_one")


def test_a_ring_is_an_error_for_every_thread_that_reads_it() -> None:
    images = []
    start = threading.Barrier(6)

    def ring(block: ci.Block) -> None:
        block.data[...] = images[0].load((block.index + 1) % 6)

    images.append(ci.fill_cells(ring, ci.CellGrid((6,), 1), dtype=int))

    def read(index: int) -> Any:
        start.wait(timeout=60)
        return images[0].load(index)

    for error in outcomes([lambda n=n: read(n) for n in range(6)]):
        check_cycle(error, "ring")


def test_a_recurrence_is_no_cycle() -> None:
    # Each cell needs the one before it: a running sum.
    images = []

    def running(block: ci.Block) -> None:
        before = images[0].load(block.index - 1)[-1] if block.index else 0
        block.data[...] = before + np.cumsum(block.inputs[0])

    source = np.arange(40)
    images.append(ci.fill_cells(running, ci.CellGrid((40,), 4), source, dtype=int))
    start = threading.Barrier(4)

    def read(index: int) -> Any:
        start.wait(timeout=60)
        return images[0].load(index) if index else images[0][...]

    expected = np.cumsum(source)
    whole, *cells = outcomes([lambda n=n: read(n) for n in (0, 9, 5, 7)])
    np.testing.assert_array_equal(whole, expected)
    for cell, index in zip(cells, (9, 5, 7), strict=True):
        np.testing.assert_array_equal(cell, expected[4 * index : 4 * index + 4])
    assert images[0].stats().loads == 10


def test_after_a_cycle_the_image_can_be_read() -> None:
    images = []
    tangled = [True]

    def itself(block: ci.Block) -> None:
        block.data[...] = images[0][block.roi] if tangled else 7

    images.append(ci.fill_cells(itself, ci.CellGrid((4,), 2), dtype=int))
    check_cycle(outcome(lambda: images[0][...]), "itself")
    tangled.clear()
    np.testing.assert_array_equal(images[0][...], [7] * 4)


ON_OTHER_THREADS = """
import cellimg_dask as ci

def itself(block):
    {body}

image = ci.fill_cells(itself, ci.CellGrid((4,), 2), dtype=int)
try:
    image[...]
except ci.CycleError as error:
    print("CycleError", error)
"""


@pytest.mark.parametrize(
    "body",
    [
        "block.data[...] = image.to_dask()[block.roi.slices].compute(scheduler='threads')",
        "image.prefetch(block.roi).result()",
    ],
    ids=["dask", "prefetch"],
)
def test_an_image_that_reads_itself_on_other_threads(body: str) -> None:
    # In a process of its own: threads that hang would keep this one from ending.
    try:
        run = subprocess.run(
            [sys.executable, "-c", ON_OTHER_THREADS.format(body=body)],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.fail("the read hangs")
    assert run.stdout.startswith("CycleError itself at cell"), run.stdout + run.stderr
