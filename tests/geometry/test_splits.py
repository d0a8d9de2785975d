"""Overlapped splits: each block reads its core and the overlap, and cores tile the axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.geometry import AxisSplit, Halo, StackSplit, as_overlap

widths = st.integers(0, 12)


@st.composite
def axes(draw: st.DrawFn) -> AxisSplit:
    factor = draw(st.integers(1, 4))
    scale, shrink = draw(st.sampled_from([(1, 1), (factor, 1), (1, factor)]))
    return AxisSplit(
        draw(st.integers(0, 30)),
        draw(st.integers(1, 12)),
        draw(widths),
        draw(widths),
        scale,
        shrink,
    )


@given(axis=axes())
def test_cores_tile_the_axis_and_blocks_hold_them(axis: AxisSplit) -> None:
    at = 0
    for i in range(axis.num_blocks):
        low, high = axis.read(i)
        assert low == max(i * axis.size - axis.before, 0)
        assert high == min((i + 1) * axis.size + axis.after, axis.extent)
        assert axis.core(i)[0] == at
        at = axis.core(i)[1]
        if axis.shrink == 1:
            assert axis.scaled(i) == (low * axis.scale, high * axis.scale)
            assert axis.scaled(i)[0] <= axis.core(i)[0] < axis.core(i)[1] <= axis.scaled(i)[1]
    assert at == axis.length == -(-axis.extent * axis.scale // axis.shrink)


@given(axis=axes())
def test_the_phase_is_refused_where_a_shrunk_block_is_no_part_of_the_whole_and_only_there(
    axis: AxisSplit,
) -> None:
    axis = replace(axis, scale=1)
    step = axis.shrink
    groups = [set(range(j, min(j + step, axis.extent))) for j in range(0, axis.extent, step)]
    right = True
    for i in range(axis.num_blocks):
        read = range(*axis.read(i))
        mine = [set(read[j : j + step]) for j in range(0, len(read), step)]
        low, high = axis.core(i)
        right = right and groups[low:high] == mine[low - axis.scaled(i)[0] :][: high - low]
        right = right and read.start % step == 0
    if right:
        axis.check_phase(0)
    else:
        with pytest.raises(ValueError, match=r"shrink\[0\] = .* but block \d+ (begins|ends) at"):
            axis.check_phase(0)


def test_a_split_of_no_axes_has_one_block() -> None:
    split = StackSplit(())
    assert split.grid_shape == split.shape == ()
    assert list(split.positions()) == [()]
    assert split.core(()) == split.crop(()) == ()


@pytest.mark.parametrize(
    ("overlap", "side", "before", "after"),
    [
        (None, "after", (0, 0), (0, 0)),
        (3, "after", (0, 0), (3, 3)),
        (3, "before", (3, 3), (0, 0)),
        (np.int32(3), "both", (3, 3), (3, 3)),
        ((1, 2), "after", (0, 0), (1, 2)),
        ([1, 2], "before", (1, 2), (0, 0)),
        (iter([1, 2]), "both", (1, 2), (1, 2)),
        (np.array([1, 2]), "after", (0, 0), (1, 2)),
        (np.array([[1, 2], [3, 4]]), "after", (1, 3), (2, 4)),
        ([(1, 2), 5], "after", (1, 0), (2, 5)),
        ([5, (1, 2)], "before", (5, 1), (0, 2)),
        (Halo((1, 2), (3, 4)), "before", (1, 2), (3, 4)),
    ],
)
def test_an_overlap_is_a_halo_whose_single_widths_lie_on_one_side(
    overlap: Any, side: str, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    assert as_overlap(overlap, 2, side) == Halo(before, after)


@pytest.mark.parametrize(
    ("overlap", "side", "error", "says"),
    [
        (-1, "after", ValueError, "overlap is read like a halo: halo must be at least 0, got -1"),
        (1.0, "after", TypeError, "overlap .* must be an integer, got 1.0"),
        ([1, 2, 3], "after", ValueError, "overlap .* one value for each of 2 axes, got 3"),
        ([(1, 2, 3), 1], "both", ValueError, r"overlap .* \(before, after\) pair"),
        ("12", "after", TypeError, "overlap .* got '12'"),
        (1, "end", ValueError, "side must be one of 'after', 'before', 'both', got 'end'"),
        (1, None, ValueError, "side must be one of .* got None"),
    ],
)
def test_a_wrong_overlap_is_refused(
    overlap: Any, side: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        as_overlap(overlap, 2, side)
