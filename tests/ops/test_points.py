"""Points found cell by cell are those of the whole image, each once, in a table."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage import feature

import cellimg_dask as ci
from cellimg_dask.geometry import BOUNDARIES
from cellimg_dask.ops.detect import blob_log
from cellimg_dask.ops.frames import latest
from cellimg_dask.ops.point_table import PointTable
from cellimg_dask.ops.points import map_points

MAX_EXTENT = {1: 40, 2: 12, 3: 7, 4: 4}


def rows(table: Any) -> Counter[tuple[Any, ...]]:
    """The rows of a table, each as often as it is there."""
    values = table.to_numpy() if isinstance(table, pd.DataFrame) else np.asarray(table)
    return Counter(map(tuple, values.tolist()))


def bright(array: NDArray[Any]) -> NDArray[Any]:
    """Every voxel that is not 0, with its value."""
    places = np.nonzero(array)
    return np.column_stack([*places, array[places]])


def computed(frame: dd.DataFrame) -> pd.DataFrame:
    return frame.compute(scheduler="sync")


@st.composite
def images(draw: st.DrawFn, smallest: int = 0) -> tuple[NDArray[Any], tuple[int, ...]]:
    """An image with few voxels that are not 0, all different, and a cell shape."""
    ndim = draw(st.integers(1, 4))
    top = MAX_EXTENT[ndim]
    shape = draw(st.tuples(*[st.integers(smallest, top)] * ndim))
    cells = tuple(draw(st.integers(max(1, -(-n * ndim // 12)), top + 3)) for n in shape)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    image = np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape)
    image[rng.random(shape) > draw(st.sampled_from([0.05, 0.3, 1.0]))] = 0
    dtype = draw(st.sampled_from(["u2", ">u2", "i4", ">f4", "f8"]))
    return image.astype(dtype), cells


@st.composite
def halos(draw: st.DrawFn, ndim: int, smallest: int = 0) -> tuple[tuple[int, int], ...]:
    width = st.integers(smallest, MAX_EXTENT[ndim] + 3)
    return draw(st.tuples(*[st.tuples(width, width)] * ndim))


# ---------------------------------------------------------------- equal to the whole


@settings(max_examples=60)
@given(case=images(), data=st.data())
def test_every_point_is_found_once_whatever_the_cells_and_the_halo(
    case: tuple[NDArray[Any], tuple[int, ...]], data: st.DataObject
) -> None:
    image, cell_shape = case
    boundary = data.draw(st.sampled_from(BOUNDARIES if image.size else ("none",)))
    frame = map_points(
        bright,
        image,
        halo=data.draw(halos(image.ndim)),
        boundary=boundary,
        fill_value=1,
        columns={"value": image.dtype},
        cell_shape=cell_shape,
    )
    grid = ci.CellGrid(image.shape, cell_shape)
    assert frame.npartitions == max(grid.num_cells, 1)
    table = computed(frame)
    assert rows(table) == rows(bright(image))
    names = [f"axis-{axis}" for axis in range(image.ndim)]
    kinds = [*[np.dtype(float)] * image.ndim, image.dtype.newbyteorder("=")]
    assert list(table.dtypes.items()) == list(zip([*names, "value"], kinds, strict=True))
    assert list(frame.dtypes.items()) == list(table.dtypes.items())
    for index in range(min(grid.num_cells, 3)):
        part, roi = frame.partitions[index], grid.cell(index).roi
        points = computed(part)[names].to_numpy()
        assert ((points >= roi.start) & (points < roi.stop)).all()


@settings(max_examples=40)
@given(case=images(smallest=1), tol=st.sampled_from([0, 0.5, 1, 2.5, 6]), data=st.data())
def test_seams_change_nothing_where_all_blocks_agree(
    case: tuple[NDArray[Any], tuple[int, ...]], tol: float, data: st.DataObject
) -> None:
    image, cell_shape = case
    # Two points at one place are two points, also beside each other and in cells below tol.
    twice = partial(_twice, bright)
    frame = map_points(
        twice,
        image,
        halo=data.draw(halos(image.ndim, int(np.ceil(tol)))),
        columns=["value"],
        merge=("seam", tol),
        cell_shape=cell_shape,
    )
    assert rows(computed(frame)) == rows(twice(image))


def _twice(f: Any, array: NDArray[Any]) -> NDArray[Any]:
    points = np.repeat(f(array), 2, axis=0).astype(float)
    points[1::2, -1] *= -1
    return points


def test_centres_on_faces_are_not_lost_by_rounding() -> None:
    # Objects that are symmetric around a whole coordinate, weighted so that sums are rounded.
    profile = np.exp(-(np.arange(-3, 4) ** 2) / 3.7)
    image = np.zeros(2000)
    for centre in range(10, 1990, 10):
        image[centre - 3 : centre + 4] = profile / centre

    def centres(array: NDArray[Any]) -> NDArray[Any]:
        labels, count = ndimage.label(array > 0)
        return np.array(ndimage.center_of_mass(array, labels, range(1, count + 1))).reshape(-1, 1)

    whole = centres(image)
    assert (whole != np.round(whole)).any()
    table = computed(map_points(centres, image, halo=7, cell_shape=20))
    assert len(table) == len(whole)
    np.testing.assert_allclose(np.sort(table["axis-0"]), whole[:, 0], atol=1e-9)


def test_points_outside_the_image_belong_to_the_nearest_cell() -> None:
    def around(array: NDArray[Any]) -> NDArray[Any]:
        return np.array([[-0.5, -3.0], [array.shape[0] - 0.6, array.shape[1] + 2.0]])

    frame = map_points(around, np.zeros((4, 4)), cell_shape=4)
    assert rows(computed(frame)) == rows([[-0.5, -3.0], [3.4, 6.0]])
    # With a border there is something out there, which is not the image's.
    frame = map_points(around, np.zeros((4, 4)), halo=1, boundary="edge", cell_shape=4)
    assert rows(computed(frame)) == Counter()
    frame = map_points(
        lambda a: np.array([[0.625], [a.size - 1.625]]), np.zeros(4), halo=1, boundary="edge"
    )
    assert rows(computed(frame)) == rows([[-0.375], [3.375]])


def test_several_inputs_with_settings_of_their_own() -> None:
    rng = np.random.default_rng(3)
    image = rng.random((20, 30))
    level, mask = rng.random(30), np.zeros((40, 60), bool)
    mask[1::2, 1::4] = True
    inputs = (
        ci.Input(image, halo=(3, (1, 2)), boundary="constant", fill_value=9),
        level,
        ci.Input(mask, halo=0, index_map=lambda roi: ci.Roi(*(_cells_of(roi)))),
    )

    def f(array: NDArray[Any], row: NDArray[Any], mask: NDArray[Any], more: float) -> Any:
        assert array.shape[1] == row.size + 3 or row.size == 30
        points = np.argwhere((array > 0.8) & (array < 1))
        inner = array[3:-3, 1:-2]
        assert mask.shape == (2 * inner.shape[0], 2 * inner.shape[1])
        return np.column_stack([points, np.full(len(points), more)])

    frame = map_points(
        f, *inputs, columns=["more"], cell_shape=(10, 30), params={"more": 2.5}, axes="yx"
    )
    expected = np.argwhere(image > 0.8)
    table = computed(frame)
    assert rows(table[["y", "x"]]) == rows(expected)
    assert set(table["more"]) == {2.5}


def _cells_of(roi: ci.Roi) -> tuple[tuple[int, ...], tuple[int, ...]]:
    (a, b), (c, d) = roi.start, roi.stop
    return (20 * a, 60 * b), (20 * c, 60 * d)


# ---------------------------------------------------------------- detectors that jitter


class Jitter:
    """Finds objects up to one voxel beside where they are, in each block elsewhere."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, image: NDArray[Any], cell: NDArray[Any]) -> NDArray[Any]:
        found = bright(image)
        for row in found:
            rng = np.random.default_rng([self.seed, int(row[-1]), int(cell.item())])
            row[:-1] += rng.integers(-1, 2, image.ndim)
        return found


def scattered(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> NDArray[Any]:
    """Objects at least seven voxels apart along some axis, numbered from 1."""
    sites = np.stack(np.meshgrid(*[np.arange(3, n - 6, 10) for n in shape], indexing="ij"), -1)
    sites = rng.permutation(sites.reshape(-1, len(shape)))[:count]
    places = sites + rng.integers(0, 4, sites.shape)
    assert len(places) == count
    image = np.zeros(shape, np.int64)
    image[tuple(places.T)] = np.arange(1, count + 1)
    return image


def jittered(image: NDArray[Any], cell_shape: Any, halo: int, merge: Any) -> tuple[int, int]:
    """How often an object is there once too much, and how many are lost."""
    grid = ci.CellGrid(image.shape, cell_shape)
    cells = np.arange(grid.num_cells).reshape(grid.grid_shape)
    frame = map_points(
        Jitter(1),
        image,
        ci.Input(cells, halo=0, index_map=lambda roi: roi),
        halo=halo,
        columns={"object": int},
        merge=merge,
        cell_shape=cell_shape,
    )
    table = computed(frame)
    times = Counter(table["object"])
    # Where it is found is near where it is.
    true = np.column_stack(np.nonzero(image))[np.argsort(image[np.nonzero(image)])]
    away = table.to_numpy()[:, :-1] - true[table["object"].to_numpy() - 1]
    assert np.abs(away).max() <= 1
    return sum(times.values()) - len(times), int(image.max()) - len(times)


@pytest.mark.parametrize(
    ("shape", "cell_shape", "tol"),
    [((520, 520), 64, 3), ((520, 520), (27, 1000), 3), ((150, 140, 150), 48, 3.5)],
)
def test_no_jittering_object_is_lost_or_counted_twice(
    shape: tuple[int, ...], cell_shape: Any, tol: float, rng: np.random.Generator
) -> None:
    image = scattered(shape, 1800, rng)
    halo = int(np.ceil(tol)) + 1
    assert jittered(image, cell_shape, halo, ("seam", tol)) == (0, 0)
    twice, lost = jittered(image, cell_shape, halo, "own")
    assert twice > 5
    assert lost > 5


@pytest.mark.parametrize("cell_shape", [3, (2, 20), 5])
def test_cells_may_be_smaller_than_the_tolerance(cell_shape: Any, rng: np.random.Generator) -> None:
    image = scattered((50, 60), 25, rng)
    assert jittered(image, cell_shape, 6, ("seam", 3)) == (0, 0)


def test_each_cell_keeps_the_deepest_copy() -> None:
    # Cell 0 sees it at 9.5 or 10.5, cell 1 at another place; the face is at 10.
    def see(places: dict[int, list[float]], image: NDArray[Any], cell: NDArray[Any]) -> Any:
        start = {0: 0, 1: 10 - 4, 2: 20 - 4}[int(cell.item())]
        return np.array(places.get(int(cell.item()), [])).reshape(-1, 1) - start

    def keeps(**places: list[float]) -> list[float]:
        frame = map_points(
            partial(see, {int(name[1:]): found for name, found in places.items()}),
            np.zeros(30),
            ci.Input(np.arange(3), halo=0, index_map=lambda roi: roi),
            halo=4,
            merge=("seam", 2.0),
            cell_shape=10,
        )
        return sorted(computed(frame)["axis-0"])

    assert keeps(c0=[9.5], c1=[9.0]) == [9.5]
    assert keeps(c0=[10.5], c1=[9.0]) == [10.5]
    assert keeps(c0=[9.0], c1=[10.5]) == [9.0]
    assert keeps(c0=[8.0], c1=[11.0]) == [8.0, 11.0]
    assert keeps(c0=[11.9]) == [11.9]
    assert keeps(c0=[12.1]) == []
    # Deeper than tol inside, and seen by the neighbour as well.
    assert keeps(c0=[7.5], c1=[8.5]) == [7.5]
    # As many as each of them found, not one.
    assert keeps(c0=[9.0, 9.8], c1=[9.1, 9.9]) == [9.0, 9.8]
    # At equal depth.
    assert keeps(c0=[9.5], c1=[10.5 - 2e-6]) in ([9.5], [10.5 - 2e-6])
    # The outer faces are no faces.
    assert keeps(c0=[-1.0], c2=[31.0]) == [-1.0, 31.0]


# ---------------------------------------------------------------- what a function may return


def as_frame(array: NDArray[Any]) -> pd.DataFrame:
    y, x = np.nonzero(array)
    return pd.DataFrame({"value": array[y, x], "x": x, "y": y}, index=range(5, 5 + len(y)))


def as_mapping(array: NDArray[Any]) -> dict[str, Any]:
    y, x = np.nonzero(array)
    return {"x": x.tolist(), "value": array[y, x], "y": y}


def as_structure(array: NDArray[Any]) -> NDArray[Any]:
    y, x = np.nonzero(array)
    found = np.empty(len(y), [("y", ">i2"), ("value", ">f4"), ("x", "u1")])
    found["y"], found["x"], found["value"] = y, x, array[y, x]
    return found


def as_rows(array: NDArray[Any]) -> list[list[float]]:
    return bright(array).tolist()


@pytest.mark.parametrize("f", [bright, as_frame, as_mapping, as_structure, as_rows])
@pytest.mark.parametrize("merge", ["own", ("seam", 1)])
def test_all_forms_of_a_result_give_one_table(f: Any, merge: Any) -> None:
    image = np.zeros((9, 12), "f4")
    image[2, 3], image[7, 11], image[4, 4] = 1, 2, 3
    frame = map_points(
        f,
        image,
        halo=1,
        columns={"value": "f4"},
        merge=merge,
        cell_shape=4,
        axes="yx",
        voxel_size=(0.5, 2),
    )
    table = computed(frame).reset_index(drop=True)
    expected = pd.DataFrame(
        {
            "y": [2.0, 4.0, 7.0],
            "x": [3.0, 4.0, 11.0],
            "value": np.array([1, 3, 2], "f4"),
            "physical-y": [1.0, 2.0, 3.5],
            "physical-x": [6.0, 8.0, 22.0],
        }
    )
    pd.testing.assert_frame_equal(table, expected)
    pd.testing.assert_frame_equal(frame._meta, expected[:0], check_index_type=False)
    for number in range(frame.npartitions):
        part = computed(frame.partitions[number])
        pd.testing.assert_series_equal(part.dtypes, expected.dtypes)


@pytest.mark.parametrize(
    "nothing", [[], (), np.empty((0, 3)), np.empty((0, 7)), np.array([]), {}, pd.DataFrame()]
)
def test_nothing_may_be_written_in_many_ways(nothing: Any) -> None:
    frame = map_points(lambda array: nothing, np.zeros((2, 2)), columns={"value": "i4"})
    table = computed(frame)
    assert len(table) == 0
    assert table.dtypes.astype(str).tolist() == ["float64", "float64", "int32"]


# dask's own writing has not heard of pandas 3.1 yet.
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")
def test_categories_that_cells_find_go_to_parquet_and_back(tmp_path: Path) -> None:
    def f(array: NDArray[Any]) -> dict[str, Any]:
        (x,) = np.nonzero(array)
        return {"x": x, "kind": [f"k{n}" for n in x]}

    image = np.zeros(40, bool)
    image[[3, 24, 35, 37]] = True
    frame = map_points(f, image, columns={"kind": "category"}, axes=["x"], cell_shape=10)
    assert not frame["kind"].cat.known
    frame.to_parquet(tmp_path / "points", compute_kwargs={"scheduler": "sync"})
    back = pd.read_parquet(tmp_path / "points")
    assert back["kind"].tolist() == ["k3", "k4", "k5", "k7"]
    assert frame.compute(scheduler="sync")["kind"].tolist() == ["k3", "k4", "k5", "k7"]


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")
def test_columns_of_any_dtype_go_to_parquet_and_back(tmp_path: Path) -> None:
    kind = pd.CategoricalDtype(["round", "long"])

    def f(array: NDArray[Any]) -> pd.DataFrame:
        (x,) = np.nonzero(array)
        count = len(x)
        return pd.DataFrame(
            {
                "x": x,
                "label": x * 1.0,
                "kind": ["long"] * count,
                "name": [f"n{n}" for n in x],
                "seen": [True] * count,
                "when": pd.to_datetime(["2026-11-21"] * count),
                "maybe": pd.array([None] * count, "Int64"),
            }
        )

    image = np.zeros(40, bool)
    image[[3, 35, 37]] = True
    columns = {
        "label": "u4",
        "kind": kind,
        "name": "str",
        "seen": bool,
        "when": "datetime64[s]",
        "maybe": "Int64",
    }
    frame = map_points(f, image, columns=columns, axes=["x"], cell_shape=10)
    frame.to_parquet(tmp_path / "points", compute_kwargs={"scheduler": "sync"})
    back = pd.read_parquet(tmp_path / "points").reset_index(drop=True)
    assert back["x"].tolist() == [3, 35, 37]
    assert back["label"].tolist() == [3, 5, 7]
    assert back["name"].tolist() == ["n3", "n5", "n7"]
    assert back["label"].dtype == np.uint32
    assert len(list((tmp_path / "points").glob("*.parquet"))) == 4
    for number in range(4):
        assert list(computed(frame.partitions[number]).dtypes) == list(frame.dtypes)
    empty = pd.read_parquet(tmp_path / "points" / "part.1.parquet")
    assert len(empty) == 0
    assert list(empty.columns) == ["x", *columns]


def returned(value: Any, columns: Any = None, axes: Any = "yx") -> ci.ResultError:
    def finds(array: NDArray[Any]) -> Any:
        return value

    frame = map_points(finds, np.zeros((4, 6)), columns=columns, axes=axes, cell_shape=(4, 3))
    with pytest.raises(ci.ResultError) as caught:
        computed(frame.partitions[1])
    error = caught.value
    assert error.position == (0, 1)
    assert error.roi == ci.Roi((0, 3), (4, 6))
    assert "finds at cell (0, 1) [0:4, 3:6]: returned" in str(error)
    return error


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ["NoneType", "(points, 2)", "columns y, x"]),
        ("points", ["str"]),
        (7, ["int"]),
        (np.zeros((3, 3)), ["(3, 3)", "(points, 2)", "columns= declares"]),
        (np.zeros(2), ["(2,)"]),
        (np.zeros((3, 0)), ["(3, 0)"]),
        ([[1, 2], [3]], ["different lengths"]),
        (np.array([["a", "b"]]), ["dtype <U1"]),
        (np.array([[1j, 2]]), ["complex128"]),
        (np.ma.masked_array([[1.0, 2.0]]), ["masked"]),
        (np.array([[0, 1], [2, np.nan], [np.inf, 1]]), ["2 of 3 points", "row 1, x = nan"]),
        ({"y": [1]}, ["without column 'x'"]),
        ({"y": [1], "x": [2], "sigma": [1]}, ["'sigma' besides", "columns="]),
        ({"y": [1], "x": [2, 3]}, ["different lengths"]),
        ({"y": 1, "x": [2]}, ["'y' has shape ()"]),
        ({"y": ["one"], "x": [2]}, ["'y' has dtype"]),
        (pd.DataFrame([[1, 2]], columns=["y", "y"]), ["two columns of one name"]),
        (np.zeros((2, 2), [("y", float), ("x", float)]), ["(2, 2)"]),
    ],
)
def test_a_wrong_result_is_named(value: Any, words: list[str]) -> None:
    message = str(returned(value))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        ([[1, 2, 1.5]], int, ["'value'", "1 values are no int64"]),
        ([[1, 2, np.nan]], int, ["'value'", "int64"]),
        ([[1, 2, 300]], "u1", ["1 values are no uint8"]),
        ([[1, 2, 1e300]], "f4", ["1 values are no float32"]),
        ({"y": [1], "x": [1], "value": ["a"]}, float, ["is no float64"]),
        ({"y": [1], "x": [1], "value": ["c"]}, pd.CategoricalDtype(["a"]), ["no category"]),
        ({"y": [1], "x": [1], "value": [[1, 2]]}, float, ["(1, 2)"]),
        ([[1, 2]], float, ["(points, 3)", "columns y, x, value"]),
    ],
)
def test_a_column_that_cannot_hold_its_values_is_named(
    value: Any, dtype: Any, words: list[str]
) -> None:
    message = str(returned(value, {"value": dtype}))
    assert [word for word in words if word not in message] == []


def test_floats_may_be_rounded_and_nothing_else() -> None:
    values = [[0, 0, 0.1], [0, 1, np.nan], [0, 2, np.inf]]
    frame = map_points(lambda a: values, np.zeros((1, 3)), columns={"v": "f4"})
    np.testing.assert_array_equal(computed(frame)["v"], np.array([0.1, np.nan, np.inf], "f4"))


def test_an_error_of_the_function_names_it_and_the_cell() -> None:
    def fails(array: NDArray[Any]) -> Any:
        raise KeyError("no points today")

    frame = map_points(fails, np.zeros((4, 6)), cell_shape=3)
    with pytest.raises(ci.BlockError, match=r"fails at cell \(1, 0\) \[3:4, 0:3\]: KeyError"):
        computed(frame.partitions[2])


# ---------------------------------------------------------------- what may be asked for


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"merge": "nearest"}, ValueError, '"own" or'),
        ({"merge": ("seam", -1)}, ValueError, "at least 0"),
        ({"merge": ("seam", "2")}, ValueError, "distance"),
        ({"merge": ("seam", 2), "halo": 1}, ValueError, "halo 1 on axis 0 is narrower"),
        ({"merge": ("seam", 2), "halo": ((2, 2), (3, 1))}, ValueError, "halo 1 on axis 1"),
        ({"axes": "zyx"}, ValueError, "each of 2 axes"),
        ({"axes": "yy"}, ValueError, "twice"),
        ({"axes": 3}, TypeError, "names"),
        ({"axes": ["y", 1]}, TypeError, "names"),
        ({"columns": "value"}, TypeError, "sequence of names"),
        ({"columns": ["axis-0"]}, ValueError, "'axis-0' would be there twice"),
        ({"columns": {"value": "nonsense"}}, TypeError, "no dtype"),
        ({"columns": {1: float}}, TypeError, "strings"),
        ({"voxel_size": 0}, ValueError, "positive"),
        ({"voxel_size": (1, 2, 3)}, ValueError, "each of 2 axes"),
        ({"boundary": "mirror"}, ValueError, "'reflect'"),
        ({"halo": -1}, ValueError, "halo"),
        ({"cell_shape": 0}, ValueError, "cell_shape"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        map_points(np.argwhere, np.zeros((40, 40)), **{"cell_shape": 8, **options})
    assert words in str(caught.value)


def test_wrong_functions_and_inputs() -> None:
    image = np.zeros((4, 4))
    with pytest.raises(TypeError, match="comes first"):
        map_points(image, np.argwhere)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BlockCode"):
        map_points(ci.BlockCode("pass"), image)
    with pytest.raises(TypeError, match="at least one input"):
        map_points(np.argwhere)
    with pytest.raises(ValueError, match="put another input first"):
        map_points(np.argwhere, np.zeros(4), image)
    with pytest.raises(ValueError, match="put another input first"):
        map_points(np.argwhere, ci.Input(image, index_map=lambda roi: roi), image)
    with pytest.raises(ValueError, match="do not fit"):
        map_points(np.argwhere, np.zeros((3, 4)), image)


def test_the_tolerance_needs_no_halo_where_there_is_no_face() -> None:
    image = np.eye(4, 60)
    frame = map_points(
        np.argwhere, image, halo=(0, 2), merge=("seam", 2), cell_shape=(4, 10), voxel_size=2
    )
    assert rows(computed(frame)[["axis-0", "axis-1"]]) == rows(np.argwhere(image))


def test_default_cells_are_those_of_the_first_input() -> None:
    below = ci.map_cells(np.negative, np.ones((20, 30)), cell_shape=(10, 10))
    assert map_points(np.argwhere, below).npartitions == 6
    assert map_points(np.argwhere, da.ones((20, 30), chunks=(20, 5))).npartitions == 6


def test_names_of_columns() -> None:
    table = PointTable.of(3, None, ["sigma"], 2.0)
    assert list(table.names()) == [
        *("axis-0", "axis-1", "axis-2", "sigma"),
        *("physical-0", "physical-1", "physical-2"),
    ]
    table = PointTable.of(2, ("row", "column"), None, (1, 2))
    assert list(table.names()) == ["row", "column", "physical-row", "physical-column"]


# ---------------------------------------------------------------- lazy, and one task per cell


class Counted:
    """Counts its calls, by the value of the first voxel."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        with self._lock:
            self.calls.append(int(array.flat[0]))
        return np.argwhere(array > 1000)


def test_nothing_is_called_before_data_are_asked_for() -> None:
    counted = Counted()
    image = np.arange(100).reshape(10, 10)
    for merge in ("own", ("seam", 1)):
        frame = map_points(counted, image, halo=1, merge=merge, cell_shape=5)
        narrow = frame[frame["axis-0"] > 3]["axis-1"].sum()
        assert repr(frame)
        assert (frame.npartitions, len(frame.columns), narrow.npartitions) == (4, 2, 1)
    assert counted.calls == []


def test_one_partition_computes_one_cell() -> None:
    counted = Counted()
    image = np.arange(100).reshape(10, 10)
    frame = map_points(counted, image, cell_shape=5)
    computed(frame.partitions[2])
    assert counted.calls == [50]
    computed(frame.partitions[0])
    assert sorted(counted.calls) == [0, 50]


@pytest.mark.parametrize("merge", ["own", ("seam", 1)])
def test_one_task_per_cell(merge: Any) -> None:
    frame = map_points(np.argwhere, np.zeros((40, 40)), halo=1, merge=merge, cell_shape=4)
    graph = frame.optimize().__dask_graph__()
    assert len(graph) == 100
    assert {key[0] for key in graph} == {frame.optimize().expr._name}


def test_a_grid_of_a_million_cells_is_built_and_looked_into_at_once() -> None:
    image = np.broadcast_to(np.uint8(1), (100, 100, 100))
    frame = map_points(np.argwhere, image, halo=2, merge=("seam", 2), cell_shape=1)
    assert frame.npartitions == 1_000_000
    part = frame.partitions[555_555]
    assert len(part.optimize().__dask_graph__()) == 1
    assert rows(computed(part)) == rows([[55, 55, 55]])


def test_neighbours_do_not_compute_a_cell_again_where_nothing_is_kept() -> None:
    counted = Counted()
    image = np.arange(225).reshape(15, 15)
    frame = map_points(counted, image, halo=1, merge=("seam", 1), cell_shape=5, cache=None)
    computed(frame)
    assert len(counted.calls) == 9


def test_the_table_may_be_written_into() -> None:
    image = np.eye(4)
    frame = map_points(np.argwhere, image, cell_shape=4)
    first = computed(frame)
    first.loc[:, "axis-0"] = 77.0
    assert rows(computed(frame)) == rows(np.argwhere(image))


def test_dask_arrays_and_lazy_images_are_read() -> None:
    rng = np.random.default_rng(5)
    image = rng.random((30, 40)) > 0.95
    expected = rows(np.argwhere(image))
    lazy = da.from_array(image, chunks=(7, 11))
    assert rows(computed(map_points(np.argwhere, lazy, halo=1, cell_shape=9))) == expected
    below = ci.map_cells(np.logical_not, ~image, cell_shape=8)
    for merge in ("own", ("seam", 2)):
        frame = map_points(np.argwhere, below, halo=2, merge=merge, cell_shape=9)
        assert rows(computed(frame)) == expected


# ---------------------------------------------------------------- changes


@pytest.mark.parametrize("merge", ["own", ("seam", 1)])
def test_an_edit_computes_only_the_cells_that_see_it(merge: Any) -> None:
    values = np.arange(400).reshape(20, 20)
    source = ci.Source(values.copy(), cell_shape=5)
    counted = Counted()
    frame = map_points(counted, source, halo=1, merge=merge, cell_shape=5)
    derived = frame[frame["axis-0"] > 0]["axis-1"].sum()
    assert computed(frame).empty
    assert len(counted.calls) == 16
    counted.calls.clear()
    with source.edit() as array:
        # At the corner of four cells, so that their halos see it.
        array[5, 5] = 5000
    again = latest(frame)
    assert again is not frame
    assert rows(computed(again)) == rows([[5, 5]])
    assert len(counted.calls) == 4
    assert latest(derived).compute(scheduler="sync") == 5
    assert len(counted.calls) == 4
    with source.edit() as array:
        array[12, 12] = 6000
    assert rows(computed(latest(frame))) == rows([[5, 5], [12, 12]])
    assert len(counted.calls) == 5
    # What was taken before the edit stays what it was.
    assert computed(frame).empty


def test_latest_of_what_has_not_changed_is_the_same() -> None:
    frame = map_points(np.argwhere, np.eye(4), cell_shape=2)
    assert latest(frame) is frame
    with pytest.raises(TypeError, match="dask data frame"):
        latest(computed(frame))
    plain = dd.from_pandas(computed(frame), npartitions=1)
    assert latest(plain) is plain


def test_images_that_are_defined_alike_change_apart() -> None:
    image = np.zeros((6, 6))
    below, twin = (ci.map_cells(np.negative, image, cell_shape=3) for _ in range(2))
    first = map_points(np.argwhere, below)
    second = map_points(np.argwhere, twin)
    assert computed(first).empty
    assert computed(second).empty
    image[4, 4] = 1
    twin.invalidate()
    assert latest(first) is first
    assert computed(latest(first)).empty
    assert rows(computed(latest(second))) == rows([[4, 4]])


# ---------------------------------------------------------------- elsewhere


@pytest.fixture(scope="module")
def work() -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(8)
    image = rng.random((40, 50))
    return image, np.argwhere(image > 0.97)


def threshold(array: NDArray[Any], level: float) -> NDArray[Any]:
    return np.argwhere(array > level)


def test_a_queue_of_processes(work: Any) -> None:
    image, expected = work
    with ci.BlockQueue(2, backend="processes") as queue:
        frame = map_points(
            threshold,
            image,
            halo=2,
            merge=("seam", 2),
            cell_shape=20,
            params={"level": 0.97},
            queue=queue,
        )
        assert rows(frame.compute(scheduler="threads")) == rows(expected)
        wrong = map_points(lambda a: None, image, cell_shape=20, queue=queue)
        with pytest.raises(ci.ResultError, match=r"<lambda> at cell \(0, 0\) .* NoneType"):
            computed(wrong.partitions[0])


def test_dask_on_processes(work: Any) -> None:
    image, expected = work
    frame = map_points(partial(threshold, level=0.97), image, halo=2, cell_shape=(40, 25))
    assert rows(frame.compute(scheduler="processes", num_workers=1)) == rows(expected)


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.set_index")
def test_a_cluster(work: Any, client: Any, tmp_path: Path) -> None:
    image, expected = work
    below = ci.map_cells(np.copy, da.from_array(image, chunks=16), dtype=float, cell_shape=16)
    frame = map_points(
        partial(threshold, level=0.97), below, halo=2, merge=("seam", 2), cell_shape=20
    )
    assert rows(client.compute(frame).result()) == rows(expected)
    assert rows(client.compute(frame.partitions[0]).result()) == rows(
        expected[(expected < 20).all(axis=1)]
    )
    written = frame.to_parquet(tmp_path / "points", compute=False)
    client.compute(written).result()
    assert rows(pd.read_parquet(tmp_path / "points")) == rows(expected)
    spots = ndimage.gaussian_filter(image, 1.5)
    options = {"min_sigma": 1, "max_sigma": 2, "num_sigma": 2, "threshold": 0.05}
    found = client.compute(blob_log(spots, cell_shape=20, **options)).result()
    assert rows(found) == rows(feature.blob_log(spots, **options))
    assert len(found) > 5
    # Elsewhere nobody knows of changes.
    sent = client.submit(_why_not, frame).result()
    assert "another process" in sent


def _why_not(frame: Any) -> str:
    with pytest.raises(ValueError) as caught:
        latest(frame)
    return str(caught.value)
