"""Where voxels lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.geometry import Space


def test_nothing_is_known_by_default() -> None:
    space = Space.of(2)
    assert space.axes is None
    assert space.units == (None, None)
    assert space.scale == (1, 1)
    assert space.translation == (0, 0)
    assert space.is_plain
    assert not Space.of(2, "yx").is_plain
    assert Space.of(0).named.axes == ()


@pytest.mark.parametrize(
    ("ndim", "axes"),
    [(1, "x"), (2, "yx"), (3, "zyx"), (4, "czyx"), (5, "tczyx")],
)
def test_axes_without_names_are_the_last_of_five(ndim: int, axes: str) -> None:
    assert Space.of(ndim).named.axes == tuple(axes)
    assert Space.of(ndim, [f"a{n}" for n in range(ndim)]).named.axes != tuple(axes)


def test_seven_axes() -> None:
    assert Space.of(7).named.axes == ("dim_0", "dim_1", "t", "c", "z", "y", "x")


def test_one_unit_is_for_axes_in_space() -> None:
    assert Space.of(4, "tzyx", "nm").units == (None, *("nanometer",) * 3)
    assert Space.of(2, units="µm").units == ("micrometer",) * 2
    assert Space.of(2, units=("s", "furlong")).units == ("second", "furlong")


def test_values_by_name() -> None:
    space = Space.of(3, "cyx", {"x": "um"}, {"x": 0.5, "y": 2}, {"y": -3})
    assert space.units == (None, None, "micrometer")
    assert space.scale == (1, 2, 0.5)
    assert space.translation == (0, -3, 0)


def test_numbers_of_numpy_are_numbers() -> None:
    space = Space.of(2, scale=np.array([2, 3]), translation=np.float32(1))
    assert space.scale == (2.0, 3.0)
    assert all(type(value) is float for value in (*space.scale, *space.translation))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
        lambda factors: st.tuples(
            st.just(factors), st.lists(st.integers(1, 5), min_size=len(factors), max_size=4)
        )
    )
)
def test_shrunk_voxels_lie_in_the_middle_of_theirs(steps: tuple[list[int], list[int]]) -> None:
    first, second = steps
    second = second[: len(first)]
    space = Space.of(len(first), scale=0.5, translation=2.0)
    twice = space.shrunk(first).shrunk(second)
    at_once = space.shrunk([a * b for a, b in zip(first, second, strict=True)])
    assert twice.scale == pytest.approx(at_once.scale)
    assert twice.translation == pytest.approx(at_once.translation)
    centres = 2.0 + 0.5 * np.arange(first[0] * second[0])
    assert twice.translation[0] == pytest.approx(centres.mean())


def test_axes_come_and_go() -> None:
    space = Space.of(3, "zyx", "um", scale=(4, 1, 2), translation=(1, 2, 3))
    flat = space.without((0,))
    assert flat == Space.of(2, "yx", "um", scale=(1, 2), translation=(2, 3))
    more = flat.with_axis(0)
    assert more == Space.of(
        3, ("dim_0", "y", "x"), (None, "um", "um"), scale=(1, 1, 2), translation=(0, 2, 3)
    )
    assert more.with_axis(3).axes == ("dim_0", "y", "x", "dim_1")
    assert Space.of(1).with_axis(1) == Space.of(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"axes": "zyx"}, ValueError, "each of 2 axes, got 3"),
        ({"axes": "xx"}, ValueError, "different names"),
        ({"axes": {"x", "y"}}, TypeError, "in order"),
        ({"axes": 3}, TypeError, "letters such as"),
        ({"axes": ["x", 1]}, TypeError, "letters such as"),
        ({"units": 3}, TypeError, "units"),
        ({"units": ["um"]}, ValueError, "one value for each of 2 axes, got 1"),
        ({"units": {"x": "um"}}, ValueError, "give axes= as well"),
        ({"scale": 0}, ValueError, r"scale\[0\] must be positive"),
        ({"scale": (1, -1)}, ValueError, r"scale\[1\] must be positive"),
        ({"scale": float("nan")}, ValueError, "positive and finite"),
        ({"scale": (1, 2, 3)}, ValueError, "one value for each of 2 axes, got 3"),
        ({"scale": "1 um"}, TypeError, "must be a number"),
        ({"scale": (True, 1)}, TypeError, "must be a number"),
        ({"scale": {2, 1}}, TypeError, "in the order of axes"),
        ({"scale": None}, TypeError, "must be a number"),
        ({"axes": "yx", "scale": {"z": 1}}, ValueError, "names axis 'z'; there is y, x"),
        ({"translation": float("inf")}, ValueError, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Space.of(2, **arguments)


@pytest.mark.parametrize("ndim", [-1, 1.5, "2", None])
def test_the_number_of_axes_is_one(ndim: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="ndim must be"):
        Space.of(ndim)
