"""What lies beyond the border, against `numpy.pad`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellimg_dask.geometry import BOUNDARIES, AxisWindow, axis_window, check_boundary

PADDING = [name for name in BOUNDARIES if name != "none"]
FILL = -7


def realise(window: AxisWindow, axis: NDArray[Any]) -> NDArray[Any]:
    """Read an axis as the window's documentation says."""
    samples = np.concatenate([axis[a:b] for a, b in window.spans])
    if window.take is not None:
        samples = samples[window.take]
    return np.concatenate([[FILL] * window.before, samples, [FILL] * window.after]).astype(int)


def padded(axis: NDArray[Any], start: int, stop: int, mode: str) -> NDArray[Any]:
    """Samples ``start`` to ``stop`` of the axis, as NumPy extends it."""
    before, after = max(-start, 0), max(stop - len(axis), 0)
    fill = {"constant_values": FILL} if mode == "constant" else {}
    return np.pad(axis, (before, after), mode=mode, **fill)[start + before : stop + before]


def check_is_a_plan(window: AxisWindow, size: int) -> None:
    ends = [end for span in window.spans for end in span]
    assert ends == sorted(ends)
    assert len(window.spans) == 1 or len(set(ends)) == len(ends)
    assert ends[0] >= 0
    assert ends[-1] <= size
    if window.plain is not None:
        assert window.spans == ((window.plain.start, window.plain.stop),)
        assert (window.take, window.before, window.after) == (None, 0, 0)


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, int, int]:
    size = draw(st.integers(1, 9))
    start = draw(st.integers(-60, 60))
    return start, draw(st.integers(start, start + 70)), size


@pytest.mark.parametrize("mode", PADDING)
@given(case=windows())
@example(case=(-5, 9, 1))
@example(case=(-50, 53, 3))
@example(case=(0, 100, 2))
@example(case=(-99, 2, 2))
@example(case=(20, 30, 4))
@example(case=(-30, -20, 4))
@example(case=(3, 3, 4))
def test_windows_read_what_numpy_pads(mode: str, case: tuple[int, int, int]) -> None:
    start, stop, size = case
    axis = np.arange(100, 100 + size)
    window = axis_window(start, stop, size, mode)
    np.testing.assert_array_equal(realise(window, axis), padded(axis, start, stop, mode))
    assert window.length == stop - start
    check_is_a_plan(window, size)


@pytest.mark.parametrize("mode", PADDING)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 40), (40, 0), (1, 2), (1000, 333)])
def test_the_whole_axis_is_padded_at_any_width(
    mode: str, size: int, before: int, after: int
) -> None:
    axis = np.arange(size) ** 2
    window = axis_window(-before, size + after, size, mode)
    fill = {"constant_values": FILL} if mode == "constant" else {}
    np.testing.assert_array_equal(
        realise(window, axis), np.pad(axis, (before, after), mode=mode, **fill)
    )


@given(case=windows())
@example(case=(0, 0, 1))
@example(case=(-9, 20, 1))
def test_none_clips(case: tuple[int, int, int]) -> None:
    start, stop, size = case
    axis = np.arange(100, 100 + size)
    window = axis_window(start, stop, size, "none")
    kept = [x for x in range(start, stop) if 0 <= x < size]
    np.testing.assert_array_equal(realise(window, axis), axis[kept])
    assert window.length == len(kept)
    assert window.plain is not None
    check_is_a_plan(window, size)


@pytest.mark.parametrize("mode", BOUNDARIES)
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (2, 4), (0, 1), (4, 5), (3, 3)])
def test_inside_the_axis_every_mode_is_one_plain_slice(mode: str, start: int, stop: int) -> None:
    assert axis_window(start, stop, 5, mode).plain == slice(start, stop)


@pytest.mark.parametrize("mode", ["reflect", "symmetric", "edge", "wrap"])
def test_few_samples_are_read_however_wide_the_halo(mode: str) -> None:
    window = axis_window(10**6 - 2, 10**6 + 3, 10**6, mode)
    assert sum(b - a for a, b in window.spans) <= 5


def test_an_empty_axis_can_be_filled_and_clipped_but_not_repeated() -> None:
    empty = np.arange(0)
    assert axis_window(-2, 3, 0, "none").length == 0
    np.testing.assert_array_equal(realise(axis_window(-2, 3, 0, "constant"), empty), [FILL] * 5)
    for mode in ("reflect", "symmetric", "edge", "wrap"):
        assert axis_window(0, 0, 0, mode).length == 0
        with pytest.raises(ValueError, match=rf"empty axis cannot be extended by .*'{mode}'"):
            axis_window(-2, 3, 0, mode)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_known_names_pass(name: str) -> None:
    assert check_boundary(name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("periodic", r"'periodic' of dask or SciPy is 'wrap' here"),
        ("nearest", r"'nearest' of dask or SciPy is 'edge' here"),
        ("mirror", r"'mirror' of dask or SciPy is 'reflect' here"),
        ("grid-mirror", r"'grid-mirror' of dask or SciPy is 'symmetric' here"),
        ("grid-wrap", r"'wrap' here"),
        ("grid-constant", r"'constant' here"),
        ("Reflect", r"unknown boundary 'Reflect'; use one of none, constant, reflect, symmetric"),
        ("", r"unknown boundary ''; use one of"),
        (None, r"unknown boundary None.*dask's None is 'none' here"),
        (0, r"unknown boundary 0.*boundary='constant', fill_value=0"),
        (1.5, r"unknown boundary 1\.5.*boundary='constant', fill_value=1\.5"),
        (np.float32(1), r"unknown boundary .*boundary='constant', fill_value="),
        (np.uint8(3), r"unknown boundary .*boundary='constant', fill_value="),
        (("reflect", "edge"), r"unknown boundary \('reflect', 'edge'\); use one of"),
    ],
)
def test_unknown_names_are_refused_with_numpys_name(name: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_boundary(name)


def test_foreign_names_mean_what_the_hint_says() -> None:
    # The hints are worth something only if the two names really name the same border.
    from scipy.ndimage import shift

    from cellimg_dask.geometry.border import _FOREIGN_NAMES

    axis = np.arange(10, 15)
    for foreign, ours in _FOREIGN_NAMES.items():
        if foreign in ("periodic", "zero", "zeros"):
            continue  # dask's own words
        # Shifting by whole samples shows the border as SciPy extends it.
        low = shift(axis, 3, order=0, mode=foreign, cval=FILL)[:3]
        np.testing.assert_array_equal(realise(axis_window(-3, 0, 5, ours), axis), low)
