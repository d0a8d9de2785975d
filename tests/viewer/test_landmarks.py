from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import neuroglancer
import numpy as np
import pytest
from support import until

import cellimg_dask as ci
from cellimg_dask.viewer.view import View, view


@pytest.fixture
def two() -> Any:
    fixed = ci.map_cells(np.copy, np.zeros((4, 30, 40), "u1"), dtype="u1", cell_shape=8)
    moving = ci.map_cells(np.copy, np.zeros((6, 20, 20), "u1"), dtype="u1", cell_shape=8)
    with view(
        {
            "fixed": fixed.with_space(axes="zyx", units="um", scale=(2, 1, 1)),
            "moving": moving.with_space(
                axes="zyx", units="nm", scale=500, translation=(1000, 0, -250)
            ),
        }
    ) as shown:
        yield shown


PAIRS = [
    ((1.0, 2.0, 3.0), (5.0, 1.5, 0.25)),
    ((0.0, 29.0, 39.0), (0.0, 0.0, 19.0)),
    ((3.0, 0.0, 0.0), (2.0, 19.0, 0.0)),
]


def test_pairs_in_voxels_and_units(two: View) -> None:
    landmarks = two.landmarks("fixed", "moving")
    assert len(landmarks) == 0
    assert [array.shape for array in landmarks.pairs()] == [(0, 3), (0, 3)]
    assert [landmarks.add(*pair) for pair in PAIRS] == [1, 2, 3]
    moving, fixed = landmarks.pairs()
    np.testing.assert_allclose(fixed, [pair[0] for pair in PAIRS], atol=1e-5)
    np.testing.assert_allclose(moving, [pair[1] for pair in PAIRS], atol=1e-5)
    moving, fixed = landmarks.pairs(in_units=True)
    np.testing.assert_allclose(fixed[0], (2, 2, 3), atol=1e-5)
    np.testing.assert_allclose(moving[0], (3500, 750, -125), rtol=1e-5)
    assert repr(landmarks) == "<Landmarks of 'fixed' and 'moving': 3 pairs>"
    landmarks.remove(2)
    assert len(landmarks) == 2
    with pytest.raises(KeyError, match="no landmark 2"):
        landmarks.remove(2)
    assert landmarks.add(*PAIRS[1]) == 4
    landmarks.clear()
    assert len(landmarks) == 0


def test_files(two: View, tmp_path: Path) -> None:
    landmarks = two.landmarks("fixed", "moving")
    for pair in PAIRS:
        landmarks.add(*pair)
    before = landmarks.pairs()
    path = tmp_path / "landmarks.csv"
    landmarks.save(path)
    landmarks.clear()
    landmarks.load(path)
    for mine, theirs in zip(landmarks.pairs(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="no landmarks: its columns are a, b"):
        landmarks.load(path)
    path.write_text("number,layer,axis_0\n1,fixed,3\n")
    with pytest.raises(ValueError, match=r"line 2 .* must have 3 finite numbers"):
        landmarks.load(path)
    assert len(landmarks) == 3


HEAD = b"number,layer,axis_0,axis_1,axis_2\n"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no landmarks"),
        (b"\xff\xfe\x00number", "no landmarks"),
        (HEAD + b"1,fixed,1,2,3\n1,fixed,4,5,6\n", "line 3 .* each comes once"),
        (HEAD + b"0,fixed,1,2,3\n", "line 2 .* begin with 1"),
        (HEAD + b"-1,fixed,1,2,3\n", "line 2 .* begin with 1"),
        (HEAD + b"1,other,1,2,3\n", 'line 2 .* "fixed" or "moving"'),
        (HEAD + b"1,fixed,1,nan,3\n", "line 2 .* finite"),
        (HEAD + b"1,fixed,1e999,2,3\n", "line 2 .* finite"),
        (HEAD + b"1\n", "line 2"),
        (HEAD + b"1,fixed," + b"9" * 200_000 + b",2,3\n", "no landmark"),
        (HEAD + b"1,fixed,1,2,3\n2,fixed,\xff,2,3\n", "no landmark"),
    ],
)
def test_damaged_files_change_nothing(two: View, tmp_path: Path, data: bytes, match: str) -> None:
    landmarks = two.landmarks("fixed", "moving")
    landmarks.add(*PAIRS[0])
    path = tmp_path / "damaged.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        landmarks.load(path)
    assert len(landmarks) == 1


def test_files_that_a_spreadsheet_has_saved(two: View, tmp_path: Path) -> None:
    landmarks = two.landmarks("fixed", "moving")
    landmarks.add(*PAIRS[0])
    before = landmarks.pairs()
    path = tmp_path / "landmarks.csv"
    landmarks.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    landmarks.clear()
    landmarks.load(path)
    for mine, theirs in zip(landmarks.pairs(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_notebook_cell_that_is_run_again_does_not_double_the_keys(two: View) -> None:
    for _ in range(3):
        landmarks = two.landmarks("fixed", "moving")
    press(two, "fixed", (6, 4, 4))
    press(two, "moving", (6, 4, 4))
    assert len(landmarks) == 1
    assert "without" not in repr(landmarks)
    assert len(two._landmarks) == 1


def press(shown: View, side: str, place: tuple[float, ...]) -> None:
    """What the page says when a key is pressed."""
    state = neuroglancer.ViewerState(shown.viewer.state.to_json())
    action = {"viewerState": state.to_json(), "mousePosition": list(place)}
    shown.viewer.actions.invoke(f"cellimg-landmark-{side}", action)


def test_keys_place_the_points_of_a_pair_in_any_order(two: View) -> None:
    landmarks = two.landmarks("fixed", "moving")
    told: list[int] = []
    landmarks.on_change(lambda each: told.append(len(each)))
    # The viewer's dimensions are x, y and z, in steps of 500 nm.
    assert two.viewer.state.dimensions.names == ("x", "y", "z")
    np.testing.assert_allclose(two.viewer.state.dimensions.scales, 500e-9)
    press(two, "fixed", (6, 4, 4))
    press(two, "fixed", (2, 2, 8))
    assert len(landmarks) == 0
    assert "2 points without a partner" in repr(landmarks)
    press(two, "moving", (0.5, 2, 3))
    press(two, "moving", (1.5, 0, 2))
    press(two, "moving", (3.5, 0, 2))
    moving, fixed = landmarks.pairs()
    np.testing.assert_allclose(fixed, [(1, 2, 3), (2, 1, 1)])
    np.testing.assert_allclose(moving, [(1, 2, 1), (0, 0, 2)], atol=1e-9)
    until(lambda: told and told[-1] == 2)
    config = two.viewer.config_state.state.to_json()
    assert config["inputEventBindings"]["dataView"]["keyf"] == "cellimg-landmark-fixed"
    landmarks.close()
    press(two, "fixed", (0, 0, 0))
    assert "1 points without" in repr(landmarks)


def test_points_moved_and_deleted_in_the_viewer(two: View, caplog: Any) -> None:
    landmarks = two.landmarks("fixed", "moving", side_by_side=True)
    for pair in PAIRS:
        landmarks.add(*pair)
    told: list[int] = []

    def failing(_: Any) -> None:
        raise RuntimeError("no such luck")

    landmarks.on_change(failing)
    callback = landmarks.on_change(lambda each: told.append(len(each)))
    with two.viewer.txn() as state:
        layer = state.layers["landmarks of fixed"].layer
        points = list(layer.annotations)
        points[0].point = [0, 0, 0]
        # One without our number is one that was placed with neuroglancer's own tool.
        layer.annotations = [points[0], points[2], neuroglancer.PointAnnotation(point=[2, 2, 2])]
    until(lambda: told == [2])
    until(lambda: "no such luck" in caplog.text)
    assert landmarks.pairs()[1][0].tolist() == [0, 0, 0]
    landmarks.off_change(callback)
    landmarks.clear()
    assert len(landmarks) == 0


def test_all_layers_are_in_panels_beside_one_another() -> None:
    # The page takes away layers that are in no panel.
    stack = ci.Source(np.zeros((2, 8, 9), "u1"), space=ci.Space.of(3, "cyx"))
    plain = np.zeros((8, 9), "u1")
    with view({"fixed": plain, "moving": stack, "other": plain}, work=True) as v:
        v.landmarks("fixed", "moving", side_by_side=True)
        left, right = v.viewer.state.layout
        assert list(right.layers) == [
            "moving 0", "moving 1", "work on moving", "landmarks of moving",
        ]  # fmt: skip
        v.add("late", stack)
        v.landmarks("fixed", "other")
        left, right = v.viewer.state.layout
        shown = [each.name for each in v.viewer.state.layers]
        assert sorted([*left.layers, *right.layers]) == sorted(shown)
        assert {"late 0", "late 1", "work on late", "landmarks of other"} <= set(left.layers)


def test_a_channel_called_as_the_landmarks_are(two: View) -> None:
    stack = ci.Source(np.zeros((2, 4, 30, 40), "u1"), space=ci.Space.of(4, "czyx", "um"))
    two.add("landmarks", ci.Layer(stack, channels=["a", "of fixed"]))
    with pytest.raises(ValueError, match="'landmarks of fixed' is called as that of the landmarks"):
        two.landmarks("fixed", "moving")


def test_a_warp_by_landmarks_fits_them() -> None:
    fixed = np.zeros((24, 24), "f4")
    moving = np.zeros((24, 24), "f4")
    at = [(4, 5), (4, 18), (19, 6), (18, 19), (11, 12)]
    to = [(6, 5), (5, 19), (18, 8), (19, 17), (12, 10)]
    for place in to:
        moving[place] = 1
    with view({"fixed": fixed, "moving": moving}) as shown:
        landmarks = shown.landmarks("fixed", "moving")
        for pair in zip(at, to, strict=True):
            landmarks.add(*pair)
        from cellimg_dask.ops.thin_plate import ThinPlateSpline
        from cellimg_dask.ops.warp import warp

        warped = warp(moving, ThinPlateSpline(*landmarks.pairs()), like=fixed)
        shown.add("warped", warped)
        np.testing.assert_allclose([warped[place] for place in at], 1, atol=1e-3)


def test_what_does_not_fit_is_said(two: View) -> None:
    with pytest.raises(ValueError, match="two different layers"):
        two.landmarks("fixed", "fixed")
    with pytest.raises(KeyError, match="no layer 'other'"):
        two.landmarks("fixed", "other")
    landmarks = two.landmarks("fixed", "moving")
    with pytest.raises(ValueError, match="a point of 'moving' must have 3 finite numbers"):
        landmarks.add((1, 2, 3), (1, 2))


def test_a_callback_may_take_its_time_while_the_page_is_answered(two: View) -> None:
    landmarks = two.landmarks("fixed", "moving")
    begun, go_on, told = threading.Event(), threading.Event(), []

    @landmarks.on_change
    def slow(changed: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        told.append(len(changed))

    landmarks.add(*PAIRS[0])
    assert begun.wait(60)
    # The server's thread answers meanwhile.
    answered = threading.Event()
    two.viewer.defer_callback(answered.set)
    assert answered.wait(60)
    landmarks.add(*PAIRS[1])
    go_on.set()
    until(lambda: told[-1:] == [2] and not landmarks._telling)
    assert len(told) <= 2
