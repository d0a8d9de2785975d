"""Every way to write a halo, and every refusal."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from cellimg_dask.geometry import Halo


@pytest.mark.parametrize(
    ("value", "ndim", "before", "after"),
    [
        (0, 0, (), ()),
        (3, 0, (), ()),
        ((), 0, (), ()),
        (0, 3, (0, 0, 0), (0, 0, 0)),
        (2, 3, (2, 2, 2), (2, 2, 2)),
        (np.int64(2), 2, (2, 2), (2, 2)),
        (np.array(2), 2, (2, 2), (2, 2)),
        ((1, 2), 2, (1, 2), (1, 2)),
        ([1, 2, 3], 3, (1, 2, 3), (1, 2, 3)),
        (np.array([1, 2], np.uint8), 2, (1, 2), (1, 2)),
        (((1, 2),), 1, (1,), (2,)),
        ([(1, 2), (0, 5)], 2, (1, 0), (2, 5)),
        ([[1, 2], [0, 5]], 2, (1, 0), (2, 5)),
        (np.array([[1, 2], [0, 5]]), 2, (1, 0), (2, 5)),
        ([4, (0, 5), np.int8(1)], 3, (4, 0, 1), (4, 5, 1)),
        ((w for w in (1, 2)), 2, (1, 2), (1, 2)),
        (10**12, 1, (10**12,), (10**12,)),
        (Halo((1, 2), (3, 4)), 2, (1, 2), (3, 4)),
    ],
)
def test_accepted_forms(
    value: Any, ndim: int, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    halo = Halo.of(value, ndim)
    assert (halo.before, halo.after, halo.ndim) == (before, after, ndim)
    assert all(type(width) is int for width in (*halo.before, *halo.after))


@pytest.mark.parametrize(
    ("value", "ndim", "error", "says"),
    [
        (-1, 2, ValueError, r"halo must be at least 0, got -1"),
        ((1, -1), 2, ValueError, r"halo\[1\] must be at least 0, got -1"),
        (((0, 0), (0, -3)), 2, ValueError, r"halo\[1\]\[1\] must be at least 0, got -3"),
        (1.0, 2, TypeError, r"halo must be an integer, got 1\.0 of type float"),
        (np.float64(1), 2, TypeError, r"halo must be an integer, got .*1\.0"),
        ((1, 1.5), 2, TypeError, r"halo\[1\] must be an integer, got 1\.5"),
        (((0, 0.5), 1), 2, TypeError, r"halo\[0\]\[1\] must be an integer, got 0\.5"),
        (np.array([1.0, 2.0]), 2, TypeError, r"halo\[0\] must be an integer, got .*1\.0"),
        (True, 2, TypeError, r"halo must be an integer, got the boolean True"),
        ((1, False), 2, TypeError, r"halo\[1\] must be an integer, got the boolean False"),
        (None, 2, TypeError, r"halo must be an integer, got None"),
        ((None, 1), 2, TypeError, r"halo\[0\] must be an integer, got None"),
        ("2", 1, TypeError, r"halo must be an integer, integers per axis or .* got '2'"),
        (b"2", 1, TypeError, r"halo must be an integer, integers per axis or .* got b'2'"),
        (("2",), 1, TypeError, r"halo\[0\] must be .*integer.*, got '2'"),
        ({0: 1}, 1, TypeError, r"halo must be an integer, integers per axis or .* got \{0: 1\}"),
        ((1,), 2, ValueError, r"one value for each of 2 axes, got 1: \(1,\)"),
        ((1, 2, 3), 2, ValueError, r"one value for each of 2 axes, got 3: \(1, 2, 3\)"),
        ((1, 2), 1, ValueError, r"one value for each of 1 axes, got 2: \(1, 2\)"),
        ((1,), 0, ValueError, r"one value for each of 0 axes, got 1"),
        (((1, 2, 3),), 1, ValueError, r"halo\[0\] must be .*\(before, after\) pair, got \(1, 2, 3"),
        (((1,), 1), 2, ValueError, r"halo\[0\] must be .*\(before, after\) pair, got \(1,\)"),
        (Halo((1,), (1,)), 2, ValueError, r"one value for each of 2 axes, got 1: Halo\("),
    ],
)
def test_refused_forms(value: Any, ndim: int, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Halo.of(value, ndim)


@pytest.mark.parametrize(
    ("before", "after", "error", "says"),
    [
        ((1,), (1, 2), ValueError, r"same length, got 1 and 2"),
        ((-1,), (1,), ValueError, r"halo before\[0\] must be at least 0, got -1"),
        ((1, 1), (1, -2), ValueError, r"halo after\[1\] must be at least 0, got -2"),
        ((1.0,), (1,), TypeError, r"halo before\[0\] must be an integer, got 1\.0"),
        (2, 3, TypeError, r"halo before must be a sequence of integers, got 2"),
    ],
)
def test_the_constructor_refuses(
    before: Any, after: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Halo(before, after)


def test_halos_are_values() -> None:
    halo = Halo(np.array([1, 2]), [3, 4])  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(halo)) == halo == Halo((1, 2), (3, 4))
    assert len({halo, Halo((1, 2), (3, 4)), Halo((1, 2), (3, 5))}) == 2
    with pytest.raises(AttributeError):
        halo.before = (0, 0)  # type: ignore[misc]
