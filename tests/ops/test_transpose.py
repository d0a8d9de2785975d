"""Images with their axes in another order."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci


@st.composite
def cases(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], list[int], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
    cells = tuple(draw(st.integers(1, 5)) for _ in shape)
    order = draw(st.permutations(range(len(shape))))
    box = []
    for axis in order:
        low = draw(st.integers(0, shape[axis]))
        box.append(slice(low, draw(st.integers(low, shape[axis]))))
    return shape, cells, order, tuple(box)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_equals_numpy(case: Any) -> None:
    shape, cells, order, box = case
    data = np.arange(int(np.prod(shape)), dtype="i4").reshape(shape)
    image = ci.transpose(ci.Source(data, cell_shape=cells), order)
    expected = data.transpose(order)
    assert image.shape == expected.shape
    if data.size:
        assert image.cell_shape == tuple(cells[axis] for axis in order)
    np.testing.assert_array_equal(image[box], expected[box])
    np.testing.assert_array_equal(image, expected)


def test_axes_by_name_keep_where_they_lie() -> None:
    space = ci.Space.of(4, "zcyx", units={"z": "um"}, scale=(5, 1, 2, 3), translation=(7, 0, 0, 9))
    source = ci.Source(np.zeros((3, 2, 4, 5)), space=space)
    turned = ci.transpose(source, "czyx")
    assert turned.axes == ("c", "z", "y", "x")
    assert turned.scale == (1, 5, 2, 3)
    assert turned.translation == (0, 7, 0, 9)
    assert turned.units == (None, "micrometer", None, None)
    # There and back is the image itself.
    assert ci.transpose(turned, ("z", "c", "y", "x")).space == space
    image = ci.map_cells(np.negative, source)
    assert ci.transpose(image, "zcyx") is image
    assert ci.transpose(image, (-1, 0, 1, 2)).axes == ("x", "z", "c", "y")


def test_an_edit_outdates_just_the_cells_that_show_it() -> None:
    source = ci.Source(np.zeros((6, 8)), cell_shape=2)
    turned = ci.map_cells(np.negative, ci.transpose(source, (1, 0)))
    turned[...]
    source[0, 4] = 1
    assert turned.stats().loads == 12
    assert turned[4, 0] == -1
    np.testing.assert_array_equal(turned, -source[...].T)
    assert turned.stats().loads == 13


def test_it_travels_and_has_a_key(tmp_path: Any) -> None:
    data = np.arange(24.0).reshape(2, 3, 4)
    image = ci.transpose(ci.map_cells(np.negative, data, version="1"), (2, 0, 1))
    again = pickle.loads(pickle.dumps(image))
    np.testing.assert_array_equal(again, -data.transpose(2, 0, 1))
    assert ci.run(image, tmp_path / "a.zarr", progress=False).ok
    assert ci.run(again, tmp_path / "a.zarr", progress=False).computed == 0


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ("zyx", ValueError, "must be those of the image, z, c, y, x, got"),
        ("zzyx", ValueError, "must be those of the image"),
        ((0, 1, 2), ValueError, "one value for each of 4 axes"),
        ((0, 1, 2, 2), ValueError, "axes must be all of 0 to 3 once"),
        ((0, 1, 2, 4), ValueError, "axes must be all of 0 to 3 once"),
        ((0, 1, 2, 1.5), TypeError, "integer"),
        (7, ValueError, "one value for each of 4 axes"),
        (["z", 1, "y", "x"], ValueError, "must be those of the image"),
    ],
)
def test_wrong_axes(axes: Any, error: type[Exception], message: str) -> None:
    source = ci.Source(np.zeros((3, 2, 4, 5)), space=ci.Space.of(4, "zcyx"))
    with pytest.raises(error, match=message):
        ci.transpose(source, axes)


def test_names_of_what_has_none() -> None:
    with pytest.raises(ValueError, match=r"no names; give numbers, .*with_space\(axes="):
        ci.transpose(np.zeros((3, 4)), "yx")
