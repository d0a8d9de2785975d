"""Blocked equals whole: filters over random shapes, grids, halos and borders, bit for bit.

The oracle never sees a block. For ``boundary="none"`` it is the filter on the whole image, with
the filter's own border handling; for the other modes the whole image is padded by `numpy.pad`,
filtered, and cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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

MAX_EXTENT = {0: 0, 1: 40, 2: 12, 3: 7, 4: 4}
MAX_EXTRA = {0: 0, 1: 90, 2: 20, 3: 8, 4: 3}
REAL = ["bool", "u1", ">u2", "i2", "<i4", ">f4", "f4", "f8"]
ANY = [*REAL, "c8", ">c16"]


@dataclass(frozen=True)
class Case:
    """An image, how it is cut, and what lies around it."""

    image: NDArray[Any]
    cell_shape: tuple[int, ...]
    extra: Pairs
    """Halo beyond what the filter needs."""
    boundary: str
    fill_value: Any
    regions: tuple[tuple[slice, ...], ...]
    """Regions that are read before the whole."""

    def halo(self, need: Sequence[tuple[int, int]]) -> Pairs:
        """The halo: what the filter needs, and more."""
        return tuple((a + c, b + d) for (a, b), (c, d) in zip(need, self.extra, strict=True))


def make_image(shape: tuple[int, ...], dtype: Any, seed: int) -> NDArray[Any]:
    kind = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if kind.kind in "biu":
        top = 2 if kind.kind == "b" else min(np.iinfo(kind).max, 60_000) + 1
        return rng.integers(0, top, shape).astype(kind)
    values = rng.normal(size=shape)
    if kind.kind == "c":
        values = values + 1j * rng.normal(size=shape)
    return np.asarray(values).astype(kind)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, ...]:
    low = [draw(st.integers(0, n)) for n in shape]
    return tuple(slice(a, draw(st.integers(a, n))) for a, n in zip(low, shape, strict=True))


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Sequence[str] = REAL,
    min_extent: int = 0,
    boundaries: Sequence[str] = BOUNDARIES,
    ndims: tuple[int, int] = (0, 4),
) -> Case:
    ndim = draw(st.integers(*ndims))
    top = MAX_EXTENT[ndim]
    shape = draw(st.tuples(*[st.integers(min_extent, top)] * ndim))
    # Not more than some hundred cells.
    cells = tuple(draw(st.integers(max(1, -(-n * ndim // 12)), top + 3)) for n in shape)
    width = st.one_of(st.just(0), st.integers(0, MAX_EXTRA[ndim]))
    return Case(
        make_image(shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 1000))),
        cells,
        draw(st.tuples(*[st.tuples(width, width)] * ndim)),
        draw(st.sampled_from(boundaries)),
        draw(st.sampled_from([0, 1])),
        tuple(draw(st.lists(regions(shape), max_size=2))),
    )


def whole(
    function: Function, image: NDArray[Any], halo: Pairs, boundary: str, fill_value: Any, dtype: Any
) -> NDArray[Any]:
    """Filter the whole image at once, in native byte order as a block is."""
    image = image.astype(image.dtype.newbyteorder("="))
    if image.size == 0:
        return np.zeros(image.shape, dtype)
    if boundary == "none" or image.ndim == 0:
        return np.asarray(function(image))
    fill = {"constant_values": fill_value} if boundary == "constant" else {}
    padded = np.pad(image, halo, mode=boundary, **fill)
    crop = tuple(slice(a, a + n) for (a, _), n in zip(halo, image.shape, strict=True))
    return np.asarray(function(padded)[crop])


def check(
    case: Case,
    function: Function,
    need: Sequence[tuple[int, int]],
    dtype: Any = None,
    block_function: Function | None = None,
) -> None:
    """Compare the blocked result with the whole one, region by region, read and by dask."""
    dtype = np.dtype(dtype or case.image.dtype).newbyteorder("=")
    halo = case.halo(need)
    expected = whole(function, case.image, halo, case.boundary, case.fill_value, dtype)
    assert expected.dtype == dtype
    lazy = ci.map_cells(
        block_function or function,
        case.image,
        halo=halo,
        boundary=case.boundary,
        fill_value=case.fill_value,
        dtype=dtype,
        cell_shape=case.cell_shape,
    )
    assert lazy.shape == case.image.shape
    assert lazy.dtype == dtype
    for region in case.regions:
        assert_same(lazy[region], expected[region])
    assert_same(lazy[...], expected)
    assert_same(np.asarray(lazy), expected)


def assert_same(got: NDArray[Any], expected: NDArray[Any]) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)


def own_border(case: Case, symmetric: bool) -> dict[str, Any]:
    """A border mode of SciPy that needs no more than the halo, for where the halo is clipped.

    A mirror looks as far inside as the filter does outside, so it needs a halo as wide on the
    other side.
    """
    modes = ["reflect", "mirror", "nearest", "constant"] if symmetric else ["nearest", "constant"]
    return {"mode": modes[case.image.size % len(modes)], "cval": 1}


# ---------------------------------------------------------------- the filters

settings.register_profile("filters", settings.get_profile("default"), max_examples=80)
filters = settings(settings.get_profile("filters"))


@filters
@given(case=cases(ANY), sigma=st.sampled_from([0.3, 0.8, 1.4, 3.0]), data=st.data())
def test_gaussian(case: Case, sigma: float, data: st.DataObject) -> None:
    # The radius follows from where SciPy truncates: int(truncate * sigma + 0.5).
    sigmas = [
        data.draw(st.sampled_from([0, sigma]), label=f"sigma of axis {axis}")
        for axis in range(case.image.ndim)
    ]
    need = [(int(2 * s + 0.5),) * 2 for s in sigmas]
    check(
        case,
        partial(ndimage.gaussian_filter, sigma=sigmas, truncate=2.0, **own_border(case, True)),
        need,
    )


@filters
@given(case=cases(["f4", "f8", "c16"], min_extent=1, ndims=(1, 3)), seed=st.integers(0, 99))
def test_gaussian_of_an_image_with_gaps(case: Case, seed: int) -> None:
    # Not-a-number spreads as far as the radius and no further.
    gaps = np.random.default_rng(seed).random(case.image.shape) < 0.1
    case.image[gaps] = np.nan
    function = partial(ndimage.gaussian_filter, sigma=1.0, truncate=2.0, **own_border(case, True))
    check(case, function, [(2, 2)] * case.image.ndim)


def median_filter(a: NDArray[Any], size: Any, origin: Any = 0, **border: Any) -> NDArray[Any]:
    """SciPy's median, 1-D images by its code for 2-D: that for 1-D reads past short ones."""
    if a.ndim != 1:
        return ndimage.median_filter(a, size=size, origin=origin, **border)
    return ndimage.median_filter(
        a[None], size=(1, *np.atleast_1d(size)), origin=(0, *np.atleast_1d(origin)), **border
    )[0]


@st.composite
def windows(draw: st.DrawFn, ndim: int) -> tuple[list[int], list[int], Pairs]:
    """Size and origin of a rank filter per axis, and the halo that just suffices for it."""
    top = {1: 9, 2: 5, 3: 3, 4: 2}[ndim]
    size = [draw(st.integers(1, top)) for _ in range(ndim)]
    origin = [draw(st.integers(-(n // 2), (n - 1) // 2)) for n in size]
    need = tuple(
        (n // 2 + shift, n - n // 2 - 1 - shift) for n, shift in zip(size, origin, strict=True)
    )
    return size, origin, need


@pytest.mark.parametrize(
    "function",
    [median_filter, ndimage.maximum_filter, ndimage.minimum_filter],
    ids=["median", "maximum", "minimum"],
)
@filters
@given(case=cases(REAL, ndims=(1, 4)), data=st.data())
def test_rank_filters_with_shifted_windows(
    function: Function, case: Case, data: st.DataObject
) -> None:
    size, origin, need = data.draw(windows(case.image.ndim), label="size, origin, halo")
    symmetric = all(before == after for before, after in need)
    check(
        case,
        partial(function, size=size, origin=origin, **own_border(case, symmetric)),
        need,
    )


@pytest.mark.parametrize("name", ["sobel", "prewitt"])
@filters
@given(case=cases(["i2", "<i4", ">f4", "f8", "c8"], ndims=(1, 4)), data=st.data())
def test_gradient_filters(name: str, case: Case, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, case.image.ndim - 1), label="axis")
    check(
        case,
        partial(getattr(ndimage, name), axis=axis, **own_border(case, True)),
        [(1, 1)] * case.image.ndim,
    )


@filters
@given(case=cases(["f4", "f8"], ndims=(1, 3)), sigma=st.sampled_from([0.6, 1.0]))
def test_gaussian_gradient_magnitude(case: Case, sigma: float) -> None:
    check(
        case,
        partial(
            ndimage.gaussian_gradient_magnitude,
            sigma=sigma,
            truncate=2.0,
            **own_border(case, True),
        ),
        [(int(2 * sigma + 0.5),) * 2] * case.image.ndim,
    )


@filters
@given(case=cases(["u1", ">u2", "f4", "f8", "c16"], min_extent=2, ndims=(1, 4)), data=st.data())
def test_numpys_gradient(case: Case, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, case.image.ndim - 1), label="axis")
    need = [(int(n == axis),) * 2 for n in range(case.image.ndim)]
    dtype = np.gradient(np.zeros(2, case.image.dtype.newbyteorder("="))).dtype
    check(case, partial(np.gradient, axis=axis), need, dtype)


def differences(a: NDArray[Any], axis: int, step: int) -> NDArray[Any]:
    """``a[i + step] - a[i]`` where both are there, else 0: a filter that looks to one side."""
    result = np.zeros_like(a)
    n = a.shape[axis]
    near = [slice(None)] * a.ndim
    far = list(near)
    if step >= 0:
        near[axis], far[axis] = slice(0, max(n - step, 0)), slice(min(step, n), n)
    else:
        near[axis], far[axis] = slice(min(-step, n), n), slice(0, max(n + step, 0))
    result[tuple(near)] = a[tuple(far)] - a[tuple(near)]
    return result


@filters
@given(case=cases(["i2", "<i4", "f4", ">c16"], ndims=(1, 4)), data=st.data())
def test_one_sided_differences(case: Case, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, case.image.ndim - 1), label="axis")
    step = data.draw(st.integers(-4, 4), label="step")
    need = [(0, 0)] * case.image.ndim
    need[axis] = (max(-step, 0), max(step, 0))
    check(case, partial(differences, axis=axis, step=step), need)


@filters
@given(
    case=cases(["i2", "f8"], boundaries=[b for b in BOUNDARIES if b != "none"], ndims=(1, 3)),
    data=st.data(),
)
def test_a_function_may_return_just_the_cell(case: Case, data: st.DataObject) -> None:
    # As `mode="valid"` of a convolution: what the function returns has no halo any more.
    size, origin, need = data.draw(windows(case.image.ndim), label="size, origin, halo")
    halo = case.halo(need)

    def valid(a: NDArray[Any]) -> NDArray[Any]:
        result = ndimage.maximum_filter(a, size=size, origin=origin)
        ends = zip(halo, a.shape, strict=True)
        return result[tuple(slice(before, n - after) for (before, after), n in ends)]

    function = partial(ndimage.maximum_filter, size=size, origin=origin)
    check(case, function, need, block_function=valid)


@filters
@given(case=cases(ANY))
@example(Case(np.zeros((), "f8"), (), (), "reflect", 0, ((),)))
@example(Case(np.zeros((0, 3), "u1"), (2, 2), ((9, 9), (9, 9)), "wrap", 0, ()))
@example(Case(np.ones((1, 1), ">u2"), (5, 5), ((40, 0), (0, 41)), "reflect", 0, ()))
@example(Case(np.ones((1, 5), "f4"), (1, 1), ((0, 0), (99, 0)), "symmetric", 0, ()))
def test_copying_with_any_halo_changes_nothing(case: Case) -> None:
    check(case, np.array, [(0, 0)] * case.image.ndim)


@filters
@given(case=cases(ANY), data=st.data())
def test_blocks_are_cut_out_of_the_padded_image(case: Case, data: st.DataObject) -> None:
    """The function sees just what `numpy.pad` gives, not only what its result shows."""
    assume(case.image.size)
    expected = (
        case.image
        if case.boundary == "none" or not case.image.ndim
        else np.pad(
            case.image,
            case.extra,
            mode=case.boundary,
            **({"constant_values": case.fill_value} if case.boundary == "constant" else {}),
        )
    )

    def look(block: ci.Block) -> None:
        (got,) = block.inputs
        read = block.read_roi
        if case.boundary == "none":
            read = read.clip(case.image.shape)
        else:
            read = read.shift([before for before, _ in case.extra])
        np.testing.assert_array_equal(got, expected[read.slices])
        assert got.dtype == case.image.dtype.newbyteorder("=")
        block.data[...] = got[block.halo]

    lazy = ci.fill_cells(
        look,
        ci.CellGrid(case.image.shape, case.cell_shape),
        case.image,
        dtype=case.image.dtype,
        halo=case.extra,
        boundary=case.boundary,
        fill_value=case.fill_value,
    )
    np.testing.assert_array_equal(lazy[...], case.image)


# ---------------------------------------------------------------- chains


@dataclass(frozen=True)
class Stage:
    name: str
    function: Function
    need: int
    dtype: Any


STAGES = [
    Stage(
        "smooth", partial(ndimage.gaussian_filter, sigma=1.0, truncate=2.0, output="f8"), 2, "f8"
    ),
    Stage("largest", partial(ndimage.maximum_filter, size=3), 1, None),
    Stage("median", partial(median_filter, size=3), 1, None),
    Stage("mask", partial(np.greater, 100), 0, "?"),
    Stage("slope", partial(ndimage.sobel, output="f4"), 1, "f4"),
]


@st.composite
def chains(draw: st.DrawFn) -> tuple[Case, list[tuple[Stage, Case]]]:
    first = draw(cases(["u1", ">u2", "f8"], ndims=(1, 3)))
    steps = []
    for _ in range(draw(st.integers(2, 3))):
        cut = draw(cases(["u1"], ndims=(first.image.ndim,) * 2))
        steps.append((draw(st.sampled_from(STAGES)), cut))
    return first, steps


def chain_of(
    image: NDArray[Any], steps: list[tuple[Stage, Case]], cache: Any = "shared"
) -> tuple[Any, NDArray[Any]]:
    """The lazy chain, and its whole result."""
    lazy: Any = image
    result = image
    for stage, cut in steps:
        if stage.name in ("slope", "median") and result.dtype == bool:
            continue
        dtype = np.dtype(stage.dtype or result.dtype).newbyteorder("=")
        halo = cut.halo([(stage.need, stage.need)] * image.ndim)
        lazy = ci.map_cells(
            stage.function,
            lazy,
            halo=halo,
            boundary=cut.boundary,
            dtype=dtype,
            cell_shape=cut.cell_shape,
            cache=cache,
        )
        result = whole(stage.function, result, halo, cut.boundary, 0, dtype)
    return lazy, result


@filters
@given(chain=chains(), keep=st.booleans())
def test_chains_of_images_with_different_grids(
    chain: tuple[Case, list[tuple[Stage, Case]]], keep: bool
) -> None:
    case, steps = chain
    lazy, expected = chain_of(case.image, steps, "shared" if keep else None)
    for region in case.regions:
        assert_same(np.asarray(lazy[region]), expected[region])
    assert_same(np.asarray(lazy[...]), expected)


# ---------------------------------------------------------------- through dask


@settings(max_examples=15)
@given(chain=chains())
def test_dask_computes_the_same(chain: tuple[Case, list[tuple[Stage, Case]]]) -> None:
    case, steps = chain
    lazy, expected = chain_of(case.image, steps)
    if not isinstance(lazy, ci.CellImg):
        return
    array = lazy.to_dask()
    assert (array.shape, array.dtype, array.chunks) == (lazy.shape, lazy.dtype, lazy.chunks)
    for region in case.regions:
        assert_same(array[region].compute(scheduler="sync"), expected[region])
    assert_same(np.asarray(array.compute(scheduler="sync")), expected)


@settings(max_examples=15)
@given(case=cases(["f8", ">u2"], ndims=(1, 3)))
def test_steps_and_reversals_go_through_dask(case: Case) -> None:
    lazy = ci.map_cells(np.negative, case.image, cell_shape=case.cell_shape)
    key = (slice(None, None, -1), *[slice(None, None, 2)] * (case.image.ndim - 1))
    got = lazy.to_dask()[key].compute(scheduler="sync")
    assert_same(got, np.negative(case.image)[key])


# ---------------------------------------------------------------- a real image


@pytest.fixture(scope="module")
def brain(shared_data: Path) -> NDArray[Any]:
    tifffile = pytest.importorskip("tifffile")
    return tifffile.imread(shared_data / "brain_signal.tif")  # type: ignore[no-any-return]


@pytest.mark.parametrize("boundary", ["none", "reflect"])
def test_two_stages_on_a_real_volume(brain: NDArray[Any], boundary: str) -> None:
    assert (brain.shape, brain.dtype) == ((30, 510, 667), np.uint16)
    sigma = (0.7, 1.5, 1.5)
    smooth = partial(ndimage.gaussian_filter, sigma=sigma, truncate=2.0, output="f4")
    largest = partial(ndimage.maximum_filter, size=(3, 5, 5))
    halo: Pairs = ((1, 1), (3, 3), (3, 3))
    around: Pairs = ((1, 1), (2, 2), (2, 2))
    first = whole(smooth, brain, halo, boundary, 0, "f4")
    expected = whole(largest, first, around, boundary, 0, "f4")

    blurred = ci.map_cells(
        smooth, brain, halo=halo, boundary=boundary, dtype="f4", cell_shape=(16, 128, 128)
    )
    lazy = ci.map_cells(
        largest, blurred, halo=around, boundary=boundary, dtype="f4", cell_shape=(30, 100, 333)
    )
    assert_same(lazy[10:14, 95:105, 300:400], expected[10:14, 95:105, 300:400])
    assert_same(np.asarray(lazy), expected)
