"""The plan of a cell: what it reads of each input, and what it keeps of the result."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cellimg_dask.blocks import plan as plan_module
from cellimg_dask.blocks.plan import AxisLink, CellPlan, InputPlan, Planner
from cellimg_dask.geometry import BOUNDARIES, AxisWindow, CellGrid, Halo, Roi

FILL = -1


def image_of(shape: tuple[int, ...]) -> NDArray[Any]:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def read(windows: tuple[AxisWindow, ...], image: NDArray[Any]) -> NDArray[Any]:
    """Read a block of ``image`` as the windows' documentation says."""
    block = image
    for axis, window in enumerate(windows):
        samples = np.concatenate([np.arange(a, b) for a, b in window.spans])
        if window.take is not None:
            samples = samples[window.take]
        block = block.take(samples, axis=axis)
        around = [(0, 0)] * image.ndim
        around[axis] = (window.before, window.after)
        block = np.pad(block, around, constant_values=FILL)
    return block


def bordered(image: NDArray[Any], halo: Halo, boundary: str) -> NDArray[Any]:
    """The whole image with its border, by NumPy."""
    widths = list(zip(halo.before, halo.after, strict=True))
    fill = {"constant_values": FILL} if boundary == "constant" else {}
    return np.pad(image, widths, mode=boundary, **fill) if image.ndim else image


@st.composite
def planners(draw: st.DrawFn) -> Planner:
    """A planner of one input of which each output axis is smaller by a factor of its own."""
    ndim = draw(st.integers(0, 4))
    extents = {0: 0, 1: 20, 2: 9, 3: 5, 4: 3}[ndim]
    factors = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    shape = draw(st.tuples(*[st.integers(1, extents)] * ndim))
    widths = st.integers(0, 8)
    halo = Halo(
        tuple(draw(widths) // f * f for f in factors), tuple(draw(widths) // f * f for f in factors)
    )
    grid = CellGrid(
        tuple(-(-n // f) for n, f in zip(shape, factors, strict=True)),
        draw(st.tuples(*[st.integers(1, extents + 1)] * ndim)),
    )
    links = tuple(AxisLink(axis, factor) for axis, factor in enumerate(factors))
    boundary = draw(st.sampled_from(BOUNDARIES))
    return Planner(grid, [InputPlan(shape, halo, boundary, links, fill_value=FILL)])


def factors_of(planner: Planner) -> tuple[int, ...]:
    links = planner.inputs[0].links
    assert links is not None
    return tuple(link.factor for link in links)


@given(planners())
def test_a_cell_reads_its_part_of_the_padded_image(planner: Planner) -> None:
    (item,) = planner.inputs
    image = image_of(item.shape)
    factors = factors_of(planner)
    for cell in planner.grid.cells_in(Roi.of_shape(planner.grid.shape)):
        plan = planner.plan(cell.index)
        block = read(plan.windows[0], image)
        low = [a * f for a, f in zip(cell.roi.start, factors, strict=True)]
        high = [min(b * f, n) for b, f, n in zip(cell.roi.stop, factors, item.shape, strict=True)]
        if item.boundary == "none":
            grown = Roi(tuple(low), tuple(high)).grow(item.halo).clip(item.shape)
            expected = image[grown.slices]
        else:
            # In the padded image everything lies `before` further on.
            both = map(sum, zip(item.halo.before, item.halo.after, strict=True))
            ends = [b + extra for b, extra in zip(high, both, strict=True)]
            expected = bordered(image, item.halo, item.boundary)[tuple(map(slice, low, ends))]
        np.testing.assert_array_equal(block, expected)


@given(planners())
def test_the_crop_leaves_the_cell(planner: Planner) -> None:
    (item,) = planner.inputs
    steps = tuple(slice(None, None, factor) for factor in factors_of(planner))
    image = image_of(item.shape)
    small = image[steps]
    for cell in planner.grid.cells_in(Roi.of_shape(planner.grid.shape)):
        plan = planner.plan(cell.index)
        result = read(plan.windows[0], image)[steps]
        assert result.shape == plan.full_shape
        np.testing.assert_array_equal(result[plan.crop], small[cell.roi.slices])


@given(planners())
def test_a_plan_knows_its_cell(planner: Planner) -> None:
    (item,) = planner.inputs
    factors = factors_of(planner)
    for cell in planner.grid.cells_in(Roi.of_shape(planner.grid.shape)):
        plan = planner.plan(cell.index)
        assert (plan.index, plan.position, plan.roi) == (cell.index, cell.position, cell.roi)
        assert (plan.start, plan.stop, plan.shape) == (cell.roi.start, cell.roi.stop, cell.shape)
        if set(factors) <= {1}:
            assert plan.read_roi == cell.roi.grow(item.halo)


@given(planners())
def test_boxes_lie_in_the_input_and_hold_what_is_read(planner: Planner) -> None:
    (item,) = planner.inputs
    image = image_of(item.shape)
    for index in range(planner.grid.num_cells):
        plan = planner.plan(index)
        times = np.zeros(item.shape, int)
        for box in plan.boxes(0):
            for part, extent in zip(box, item.shape, strict=True):
                assert 0 <= part.start <= part.stop <= extent
            times[box] += 1
        assert times.max(initial=0) <= 1
        needed = set(read(plan.windows[0], image).ravel().tolist()) - {FILL}
        assert needed <= set(image[times > 0].tolist())


@given(planners())
def test_a_plan_made_again_or_elsewhere_is_the_same(planner: Planner) -> None:
    image = image_of(planner.inputs[0].shape)
    elsewhere = pickle.loads(pickle.dumps(planner))
    for index in reversed(range(planner.grid.num_cells)):
        first = planner.plan(index)
        for again in (planner.plan(index), elsewhere.plan(index)):
            assert_same(first, again, image)


def assert_same(one: CellPlan, other: CellPlan, image: NDArray[Any]) -> None:
    names = ("index", "position", "roi", "read_roi", "shape", "full_shape", "crop")
    for name in names:
        assert getattr(one, name) == getattr(other, name)
    np.testing.assert_array_equal(read(one.windows[0], image), read(other.windows[0], image))


def test_what_is_remembered_is_bounded_and_may_be_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "_REMEMBERED_PIECES", 3)
    links = (AxisLink(0),)
    item = InputPlan((100,), Halo((1,), (2,)), "wrap", links)
    planner = Planner(CellGrid((100,), (3,)), [item])
    image = image_of((100,))
    for index in [*range(34), *range(33, -1, -1)]:
        fresh = Planner(CellGrid((100,), (3,)), [item])
        assert_same(planner.plan(index), fresh.plan(index), image)
        assert len(planner._pieces[0]) <= 3


def test_plans_in_a_grid_of_8e9_cells_are_made_at_once() -> None:
    size = 2000 * 64
    links = tuple(AxisLink(axis) for axis in range(3))
    item = InputPlan((size,) * 3, Halo((8,) * 3, (9,) * 3), "reflect", links)
    planner = Planner(CellGrid((size,) * 3, 64), [item])
    plan = planner.plan(planner.grid.num_cells - 1)
    assert plan.position == (1999, 1999, 1999)
    assert plan.read_roi == Roi((size - 72,) * 3, (size + 9,) * 3)
    assert plan.boxes(0) == [(slice(size - 72, size),) * 3]
    assert plan.full_shape == (81, 81, 81)


# ---------------------------------------------------------------- several inputs, other axes


def test_an_axis_that_no_output_axis_follows_is_read_whole_with_its_halo() -> None:
    # A projection along axis 1: the output has axes 0 and 2 of the input.
    links = (AxisLink(0), AxisLink(None), AxisLink(1))
    item = InputPlan((4, 3, 5), Halo((1, 2, 0), (0, 1, 1)), "edge", links)
    planner = Planner(CellGrid((4, 5), (2, 2)), [item])
    image = image_of((4, 3, 5))
    padded = np.pad(image, [(1, 0), (2, 1), (0, 1)], mode="edge")
    for cell in planner.grid.cells_in(Roi((0, 0), (4, 5))):
        plan = planner.plan(cell.index)
        (y0, x0), (y1, x1) = cell.roi.start, cell.roi.stop
        np.testing.assert_array_equal(
            read(plan.windows[0], image), padded[y0 : y1 + 1, :, x0 : x1 + 1]
        )
        assert plan.full_shape == (y1 - y0 + 1, x1 - x0 + 1)


def test_each_input_has_its_own_halo_and_the_first_that_follows_an_axis_says_the_crop() -> None:
    wide = InputPlan((1, 6), Halo((0, 3), (0, 3)), "reflect", (AxisLink(None), AxisLink(1)))
    narrow = InputPlan((4, 6), Halo((1, 1), (1, 1)), "none", (AxisLink(0), AxisLink(1)))
    planner = Planner(CellGrid((4, 6), (2, 3)), [wide, narrow])
    plan = planner.plan(0)
    assert [w.length for w in plan.windows[0]] == [1, 9]
    assert [w.length for w in plan.windows[1]] == [3, 4]
    # Axis 0 follows only the second input, axis 1 the first.
    assert plan.full_shape == (3, 9)
    assert plan.crop == (slice(0, 2), slice(3, 6))
    assert plan.read_roi == Roi((-1, -3), (3, 6))


def test_without_inputs_a_plan_is_just_the_cell() -> None:
    plan = Planner(CellGrid((5, 5), (2, 3)), []).plan(5)
    assert plan.full_shape == plan.shape == (1, 2)
    assert plan.crop == (slice(0, 1), slice(0, 2))
    assert plan.read_roi == plan.roi == Roi((4, 3), (5, 5))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_index_map_says_where_an_input_is_read(boundary: str) -> None:
    # The input is the image transposed and twice as fine along its first axis.
    def finer(roi: Roi) -> Roi:
        (y0, x0), (y1, x1) = roi.start, roi.stop
        return Roi((2 * x0, y0), (2 * x1, y1))

    halo = Halo((2, 0), (1, 7))
    item = InputPlan((10, 4), halo, boundary, None, finer, FILL)
    planner = Planner(CellGrid((4, 5), (3, 2)), [item])
    image = image_of((10, 4))
    for cell in planner.grid.cells_in(Roi((0, 0), (4, 5))):
        roi = finer(cell.roi)
        if boundary == "none":
            expected = image[roi.grow(halo).clip((10, 4)).slices]
        else:
            grown = roi.grow(halo).shift(halo.before)
            expected = bordered(image, halo, boundary)[grown.slices]
        block = read(planner.plan(cell.index).windows[0], image)
        np.testing.assert_array_equal(block, expected)


@given(st.integers(-30, 30), st.integers(0, 12), st.sampled_from(BOUNDARIES))
@example(25, 3, "reflect")
@example(-25, 3, "none")
def test_an_index_map_may_leave_the_input(start: int, extent: int, boundary: str) -> None:
    item = InputPlan(
        (7,), Halo((0,), (0,)), boundary, None, lambda _: Roi((start,), (start + extent,)), FILL
    )
    block = read(Planner(CellGrid((4,), (4,)), [item]).plan(0).windows[0], image_of((7,)))
    if boundary == "none":
        expected = [x for x in range(start, start + extent) if 0 <= x < 7]
    else:
        padded = bordered(image_of((7,)), Halo((30,), (60,)), boundary)
        expected = padded[30 + start : 30 + start + extent].tolist()
    assert block.tolist() == expected


@pytest.mark.parametrize("answer", [None, (slice(0, 1),), Roi((0,), (1,)), Roi((), ())])
def test_an_index_map_that_gives_no_fitting_roi_is_refused(answer: Any) -> None:
    item = InputPlan((4, 4), Halo((0, 0), (0, 0)), "none", None, lambda roi: answer)
    with pytest.raises(TypeError, match=r"index_map of input 0 must return a Roi with 2 axes"):
        Planner(CellGrid((4,), (2,)), [item]).plan(0)


def test_an_unknown_boundary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'periodic' of dask or SciPy is 'wrap' here"):
        InputPlan((4,), Halo((0,), (0,)), "periodic", (AxisLink(0),))
