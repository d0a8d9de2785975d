"""Values in messages come out as they went in."""

from __future__ import annotations

import json
import math
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from cellimg_dask.bare.trees import (
    decode,
    dtype_from,
    dtype_name,
    encode,
    from_attached,
    with_attached,
)

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
)
hashable = st.one_of(st.text(), st.integers(), st.booleans(), st.binary(), st.none())
dtypes = st.one_of(
    nps.boolean_dtypes(),
    nps.integer_dtypes(),
    nps.unsigned_integer_dtypes(),
    nps.floating_dtypes(),
    nps.complex_number_dtypes(),
    nps.datetime64_dtypes(),
    nps.byte_string_dtypes(),
    nps.unicode_string_dtypes(),
    nps.array_dtypes(max_size=3),
)
arrays = nps.arrays(
    dtype=dtypes, shape=nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
)
values = st.recursive(
    st.one_of(plain, arrays, nps.arrays(nps.scalar_dtypes(), ()).map(lambda a: a[()])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(hashable, inner, max_size=3),
        st.dictionaries(st.sampled_from(["$tuple", "$array", "a"]), inner, max_size=2),
        st.frozensets(hashable, max_size=3).map(set),
    ),
    max_leaves=8,
)


def same(found: Any, expected: Any) -> bool:
    """Whether two values are equal, of the same types, and NaN where there was NaN."""
    if isinstance(expected, (np.ndarray, np.generic)):
        return (
            type(found) is type(expected)
            and found.dtype == expected.dtype
            and found.shape == expected.shape
            and found.tobytes() == expected.tobytes()
        )
    if type(found) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(map(same, found.values(), expected.values()))
    if isinstance(expected, float):
        return found == expected or (math.isnan(found) and math.isnan(expected))
    if isinstance(expected, complex):
        return same(found.real, expected.real) and same(found.imag, expected.imag)
    return bool(found == expected)


@given(values)
def test_values_survive_a_message(value: Any) -> None:
    tree, attached = with_attached(value)
    line = json.dumps(tree)
    assert "\n" not in line
    assert same(from_attached(json.loads(line), list(attached)), value)


@pytest.mark.parametrize("value", [np.bytes_(b""), np.str_(""), np.void(b"")])
def test_scalars_without_bytes_survive_a_message(value: Any) -> None:
    tree, attached = with_attached(value)
    found = from_attached(tree, list(attached))
    assert len(found) == 0
    assert np.asarray(found).dtype.kind == value.dtype.kind


@given(dtypes)
def test_dtypes_survive_a_message(dtype: np.dtype[Any]) -> None:
    assert dtype_from(json.loads(json.dumps(dtype_name(dtype)))) == dtype


def test_numbers_of_other_classes_become_plain_ones() -> None:
    class Axis(IntEnum):
        Z = 2

    found = encode([Axis.Z, np.float64(0.5), True], lambda array: None)
    assert found[0] == 2
    assert type(found[0]) is int
    assert same(decode(found, lambda place: np.empty(0)), [2, np.float64(0.5), True])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (object(), "builtins.object cannot be sent"),
        ([{"a": {1: open}}], "builtin_function_or_method"),
        (np.array([None]), "Python objects"),
        (np.ma.masked_array([1, 2], [0, 1]), "filled"),
    ],
)
def test_what_cannot_be_sent(value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        encode(value, lambda array: None)


def test_what_a_later_version_sends_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\$frame"):
        decode({"$frame": 1}, lambda place: np.empty(0))
