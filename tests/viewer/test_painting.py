from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import in_time

import cellimg_dask as ci
from cellimg_dask.viewer.painting import Brush
from cellimg_dask.viewer.strokes import stroke_masks
from cellimg_dask.viewer.view import view


def near_line(points: Any, radius: float, scale: Any, shape: Any, normal: Any = None) -> Any:
    """Which voxels of a whole image a brush touches, asked one line at a time."""
    steps = np.asarray(scale, float)
    centers = np.stack(np.indices(shape), axis=-1) * steps
    ends = np.atleast_2d(points) * steps
    found = np.zeros(shape, bool)
    for a, b in zip(ends, [*ends[1:], ends[-1]], strict=True):
        line = b - a
        along = (centers - a) @ line
        share = np.clip(along / (line @ line), 0, 1) if line.any() else np.zeros(shape)
        offset = centers - a - share[..., None] * line
        if normal is None:
            found |= np.linalg.norm(offset, axis=-1) <= radius + 1e-9
        else:
            height = offset @ normal
            flat = offset - height[..., None] * normal
            is_near = np.linalg.norm(flat, axis=-1) <= radius + 1e-9
            half = np.abs(normal * steps).sum() / 2
            found |= is_near & (height > -half + 1e-9) & (height <= half + 1e-9)
    return found


def on_line(points: Any, shape: Any, reach: float) -> Any:
    """Which voxels are so near to a line, in voxels along any axis."""
    ends = np.atleast_2d(points).astype(float)
    places = np.indices(shape)
    found = np.zeros(shape, bool)
    for a, b in zip(ends, [*ends[1:], ends[-1]], strict=True):
        for share in np.linspace(0, 1, 300):
            place = (a + share * (b - a)).reshape(-1, *[1] * len(shape))
            found |= (np.abs(places - place) < reach).all(axis=0)
    return found


def painted(source: ci.Source) -> Any:
    return np.asarray(source) != 0


points_2d = st.lists(
    st.tuples(st.integers(-24, 68), st.integers(-24, 68)).map(lambda p: (p[0] / 4, p[1] / 4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(
    points_2d,
    st.integers(1, 40).map(lambda n: n / 4 + 0.01),
    st.sampled_from([(1.0, 1.0), (2.0, 0.5), (0.25, 3.0)]),
    st.integers(1, 20),
)
def test_a_stroke_paints_what_is_near_the_line(
    points: Any, radius: float, scale: Any, cell: int
) -> None:
    grid = ci.CellGrid((13, 17), cell)
    found = np.zeros(grid.shape, bool)
    for roi, mask in stroke_masks(np.asarray(points), radius, scale, (True, True), None, grid):
        assert mask.shape == roi.shape
        assert len(list(grid.cells_in(roi))) == 1
        # Tight, so that no more is computed anew than must be.
        for axis in range(2):
            assert mask.take(0, axis).any()
            assert mask.take(-1, axis).any()
        found[roi.slices] |= mask
    near = near_line(points, radius, scale, grid.shape)
    # However thin the brush is, its line has no gaps.
    assert found[near | on_line(points, grid.shape, 0.5 - 1e-6)].all()
    assert not found[~near & ~on_line(points, grid.shape, 0.7)].any()


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(0, 40).map(lambda n: n / 4)] * 3),
    st.tuples(*[st.integers(-4, 4)] * 3).filter(any),
    st.integers(1, 20).map(lambda n: n / 4 + 0.01),
    st.sampled_from([(1.0, 1.0, 1.0), (3.0, 1.0, 0.5)]),
)
def test_a_disc_has_no_holes_at_any_angle(
    point: Any, direction: Any, radius: float, scale: Any
) -> None:
    normal = np.asarray(direction, float) / np.linalg.norm(direction)
    if normal[np.abs(normal).argmax()] < 0:
        normal = -normal
    grid = ci.CellGrid((11, 11, 11), 4)
    found = np.zeros(grid.shape, bool)
    for roi, mask in stroke_masks(np.asarray([point]), radius, scale, (True,) * 3, normal, grid):
        found[roi.slices] |= mask
    near = near_line(point, radius, scale, grid.shape, normal)
    voxel = np.floor(np.asarray(point) + 0.5).astype(int)
    near[tuple(voxel)] = True
    np.testing.assert_array_equal(found, near)


def test_a_disc_lies_in_one_plane_and_a_ball_does_not() -> None:
    source = ci.Source(np.zeros((9, 9, 9), "u1"), cell_shape=4)
    brush = Brush(source, size=4.1)
    assert brush.stroke((4, 4, 4)) == 13
    assert np.argwhere(painted(source))[:, 0].tolist() == [4] * 13
    brush.undo()
    brush.stroke((4, 4, 4), normal=(0, 0, 2))
    assert set(np.argwhere(painted(source))[:, 2]) == {4}
    brush.undo()
    brush.shape = "ball"
    assert brush.stroke((4, 4, 4)) == 33


def test_sizes_and_points_are_in_units() -> None:
    space = ci.Space.of(2, "yx", units="um", scale=(2, 0.5), translation=(10, 0))
    source = ci.Source(np.zeros((8, 40), "u1"), space=space)
    brush = Brush(source, size=4.1)
    brush.stroke([(16, 10)], in_units=True)
    assert np.argwhere(painted(source)).min(axis=0).tolist() == [2, 16]
    assert np.argwhere(painted(source)).max(axis=0).tolist() == [4, 24]


def test_time_and_channels_are_painted_one_at_a_time() -> None:
    source = ci.Source(np.zeros((3, 4, 6, 6), "u1"), space=ci.Space.of(4, "tzyx"))
    Brush(source, size=5, shape="ball").stroke([(1, 2, 3, 3)])
    assert np.flatnonzero(painted(source).any(axis=(1, 2, 3))).tolist() == [1]
    # There is no line between two pictures of a film.
    source = ci.Source(np.zeros((3, 4, 6, 6), "u1"), space=ci.Space.of(4, "tzyx"))
    Brush(source, size=1).stroke([(0, 0, 0, 0), (2, 3, 5, 5)])
    assert painted(source)[1].sum() == 0
    assert painted(source)[0].sum() == painted(source)[2].sum() == 1


def test_a_stroke_computes_the_cells_it_reaches_and_no_others() -> None:
    source = ci.Source(np.zeros((40, 40), "u1"), cell_shape=10)
    image = ci.map_cells(np.copy, source, dtype="u1", halo=2)
    np.asarray(image)
    before = image.stats().loads
    changes: list[Any] = []
    watch = image.on_dirty(changes.append)
    brush = Brush(source, size=2.1)
    # Along the diagonal; the box around it would hold all cells.
    brush.stroke([(5, 5), (35, 35)])
    (change,) = changes
    cells = {image.grid.position(index) for index in change.cells}
    assert cells == {
        position
        for position in map(image.grid.position, range(image.grid.num_cells))
        if painted(source)[tuple(slice(max(0, 10 * p - 2), 10 * p + 12) for p in position)].any()
    }
    np.testing.assert_array_equal(np.asarray(image), np.asarray(source))
    assert image.stats().loads == before + len(cells)
    # The same once more changes nothing.
    assert brush.stroke([(5, 5), (35, 35)]) == 0
    assert len(changes) == 1
    del watch


def test_undo_and_redo(rng: np.random.Generator) -> None:
    first = rng.integers(0, 3, (20, 20)).astype("u2")
    source = ci.Source(first, cell_shape=8)
    brush = Brush(source, size=5, value=7)
    states = [np.asarray(source)]
    for points, erase in (([(3, 3), (15, 15)], False), ([(3, 15)], True), ([(15, 3)], False)):
        brush.stroke(points, erase=erase)
        states.append(np.asarray(source))
    assert (states[2] == 0).sum() > (states[1] == 0).sum()
    for state in states[-2::-1]:
        assert brush.undo()
        np.testing.assert_array_equal(np.asarray(source), state)
    assert not brush.undo()
    for state in states[1:3]:
        assert brush.redo()
        np.testing.assert_array_equal(np.asarray(source), state)
    brush.stroke([(10, 10)])
    assert not brush.redo()


def test_what_the_page_draws_is_one_stroke_in_parts() -> None:
    space = ci.Space.of(3, "zyx", units="um", scale=(2, 1, 1))
    source = ci.Source(np.zeros((6, 20, 20), "u1"), cell_shape=5, space=space)
    brush = Brush(source, size=1, name="labels", value=3)
    shown = {"names": ["x", "y", "z"], "scales": [1e-6, 1e-6, 1e-6], "units": ["m"] * 3}
    message = {
        "kind": "stroke",
        "stroke": "a-1",
        "points": [[2, 4, 6]],
        "plane": [[1, 0, 0], [0, 1, 0]],
        "erase": False,
        "end": False,
        "space": shown,
    }
    assert brush.answer(message) == {"changed": 1}
    assert np.argwhere(painted(source)).tolist() == [[3, 4, 2]]
    # The line goes on from where it was.
    assert brush.answer({**message, "points": [[6, 4, 6]]}) == {"changed": 4}
    assert brush.answer({**message, "points": [], "end": True}) == {"changed": 0}
    assert brush.answer({**message, "stroke": "a-2", "points": [[9, 9, 0]], "end": True}) == {
        "changed": 1
    }
    assert brush.answer({"kind": "undo"}) == {"done": True}
    assert painted(source).sum() == 5
    assert brush.answer({"kind": "undo"}) == {"done": True}
    assert not painted(source).any()
    assert brush.answer({"kind": "redo"}) == {"done": True}
    assert painted(source).sum() == 5
    assert brush.answer({"kind": "larger"}) == {"size": 1.25}
    facts = brush.facts()
    assert facts["radius"] == pytest.approx(0.625e-6)
    assert facts["layer"] == "labels"
    with pytest.raises(ValueError, match="nothing is known"):
        brush.answer({"kind": "dance"})


def test_strokes_of_many_threads_follow_one_another(pool: Any) -> None:
    source = ci.Source(np.zeros((40, 40), "u1"), cell_shape=10)
    brush = Brush(source, size=1)
    ready = threading.Barrier(8)

    def draw(row: int) -> int:
        ready.wait()
        return brush.stroke([(row, 0), (row, 39)])

    assert sum(pool.map(draw, range(8))) == 320
    while brush.undo():
        pass
    assert not painted(source).any()


def test_values_are_those_that_the_source_can_hold() -> None:
    source = ci.Source(np.zeros((4, 4), "u1"))
    brush = Brush(source)
    assert brush.size == 10
    for value in (256, -1, 0.5, "red", [1]):
        with pytest.raises(ValueError, match="value must be one that uint8 can hold"):
            brush.value = value
    floats = Brush(ci.Source(np.zeros((4, 4), "f4")), value=0.25, size=1)
    floats.stroke((1, 1))
    assert floats.source[1, 1] == 0.25
    truths = Brush(ci.Source(np.zeros((4, 4), bool)), value=True, size=1)
    truths.stroke((1, 1))
    assert truths.source[1, 1]


def test_what_does_not_fit_is_said() -> None:
    source = ci.Source(np.zeros((4, 4, 4), "u1"))
    brush = Brush(source)
    for points in ([(1, 2)], [], [[[1, 2, 3]]]):
        with pytest.raises(ValueError, match="points must be an array of shape"):
            brush.stroke(points)
    with pytest.raises(ValueError, match="finite"):
        brush.stroke([(1, 2, np.nan)])
    with pytest.raises(ValueError, match="normal must be a direction of 3"):
        brush.stroke([(1, 2, 3)], normal=(0, 0))
    with pytest.raises(ValueError, match="size must be positive"):
        brush.size = 0
    with pytest.raises(ValueError, match="shape must be"):
        brush.shape = "square"
    brush.close()
    with pytest.raises(ValueError, match="closed"):
        brush.stroke((1, 2, 3))
    with pytest.raises(ValueError, match="without axes"):
        Brush(ci.Source(np.zeros(())))


def test_only_sources_are_painted() -> None:
    source = ci.Source(np.zeros((4, 4), "u1"))
    with view({"image": np.zeros((4, 4), "u1"), "labels": source}) as shown:
        with pytest.raises(TypeError, match="'image', a ndarray, cannot be painted: only a Source"):
            shown.paint("image")
        with pytest.raises(KeyError, match="no layer 'other'; there is 'image', 'labels'"):
            shown.paint("other")
        with pytest.raises(KeyError, match="no layer of this view shows"):
            shown.paint(np.zeros(3))
        with pytest.raises(ValueError, match="nothing is painted"):
            shown._answer({"kind": "undo"})
        first = shown.paint(source)
        second = shown.paint("labels", size=3)
        assert first.closed
        assert not second.closed
        assert shown._frame.facts["brush"]["radius"] == 1.5
        second.erase = True
        assert shown._frame.facts["brush"]["erase"]
        in_time(second.stroke, (1, 1))
    assert second.closed
