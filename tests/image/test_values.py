"""Images of values: one Python object for each cell of a grid."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from dask.base import tokenize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.blocks.content import value_content
from cellimg_dask.blocks.wrappers import FunctionWrapper, function_name
from cellimg_dask.image.values import cell_values
from cellimg_dask.loading.lasting import Lasting
from cellimg_dask.state.disk import DiskCells
from cellimg_dask.state.sizes import num_bytes


class Wrapped(FunctionWrapper):
    """What a module that builds on values makes of a user's function."""

    def __call__(self, block: ci.Block) -> Any:
        return block.position, self.function(*block.inputs, **block.params)


def seen(block: ci.Block) -> dict[str, Any]:
    return {"position": block.position, "inputs": [array.copy() for array in block.inputs]}


def values_of(image: ci.CellImg) -> list[Any]:
    return list(np.asarray(image).reshape(-1))


# ---------------------------------------------------------------- what a value is made from


@st.composite
def cuts(draw: st.DrawFn) -> tuple[NDArray[Any], tuple[int, ...], list[tuple[int, int]]]:
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=4)))
    cells = tuple(draw(st.integers(1, 9)) for _ in shape)
    halo = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in shape]
    return np.arange(np.prod(shape, dtype=int)).reshape(shape), cells, halo


@settings(max_examples=60)
@given(cut=cuts(), boundary=st.sampled_from(["none", "edge", "wrap", "constant"]))
@example(cut=(np.array(5), (), []), boundary="none")
@example(cut=(np.zeros((0, 3), int), (2, 2), [(1, 1), (0, 2)]), boundary="none")
def test_a_value_is_made_from_its_cell_with_the_halo(
    cut: tuple[NDArray[Any], tuple[int, ...], list[tuple[int, int]]], boundary: str
) -> None:
    array, cells, halo = cut
    grid = ci.CellGrid(array.shape, cells)
    image = cell_values(seen, grid, array, halo=halo, boundary=boundary, fill_value=-1)
    assert (image.shape, image.dtype) == (grid.grid_shape, np.dtype(object))
    assert image.cell_shape == (1,) * array.ndim
    padded = array
    if boundary == "constant":
        padded = np.pad(array, halo, constant_values=-1) if halo else array
    elif boundary != "none" and array.size:
        padded = np.pad(array, halo, mode=boundary) if halo else array
    for value, position in zip(values_of(image), np.ndindex(*grid.grid_shape), strict=True):
        assert value["position"] == position
        roi = grid.roi(position).grow(ci.Halo.of(halo, array.ndim))
        if boundary == "none":
            roi = roi.clip(array.shape)
        else:
            roi = roi.shift([before for before, _ in halo])
        np.testing.assert_array_equal(value["inputs"][0], padded[roi.slices])


def test_any_object_is_a_value() -> None:
    objects: list[Any] = [
        None,
        [1, 2],
        (1, 2),
        {},
        "text",
        np.arange(3),
        np.array(5),
        np.zeros((1, 1)),
        np.float32(3),
        ValueError,
        slice(1),
    ]

    def pick(block: ci.Block) -> Any:
        return objects[block.index]

    for shape, cells in [((len(objects),), 1), ((1, 1, len(objects)), 1)]:
        image = cell_values(pick, ci.CellGrid(shape, cells))
        assert all(got is given for got, given in zip(values_of(image), objects, strict=True)), (
            "the very objects"
        )
    for number, value in enumerate(objects):
        alone = cell_values(lambda block, value=value: value, ci.CellGrid((), ()))
        assert alone[()] is value or alone[...].item() is value, number
        assert alone.load(0).item() is value


def test_inputs_broadcast_as_in_numpy() -> None:
    image = np.arange(24).reshape(2, 3, 4)
    row, column, one = np.arange(4), np.arange(3)[:, None], np.array(7)
    grid = ci.CellGrid(image.shape, (2, 2, 3))
    values = cell_values(seen, grid, image, row, column, one, halo=1)
    got = values[0, 1, 1]["inputs"]
    np.testing.assert_array_equal(got[0], image[0:2, 1:3, 2:4])
    np.testing.assert_array_equal(got[1], row[2:4])
    np.testing.assert_array_equal(got[2], column[1:3])
    assert got[3] == 7
    # What is stretched has no halo, what has a halo of its own has that.
    values = cell_values(seen, grid, image[:1], ci.Input(row, halo=0), halo=1)
    assert [a.shape for a in values[0, 1, 1]["inputs"]] == [(1, 2, 2), (1,)]


def test_inputs_with_a_map_are_given_positions() -> None:
    table = np.arange(10) * 100
    grid = ci.CellGrid((9, 5), (2, 5))
    rois = []

    def nth(roi: ci.Roi) -> ci.Roi:
        rois.append(roi)
        return ci.Roi(roi.start[:1], roi.stop[:1])

    values = cell_values(seen, grid, ci.Input(table, halo=0, index_map=nth))
    assert [value["inputs"][0].tolist() for value in values_of(values)] == [
        [0],
        [100],
        [200],
        [300],
        [400],
    ]
    assert ci.Roi((3, 0), (4, 1)) in rois


def test_values_of_values() -> None:
    image = np.arange(35).reshape(5, 7)
    sums = cell_values(lambda block: int(block.inputs[0].sum()), ci.CellGrid((5, 7), 2), image)
    grid = ci.CellGrid(sums.shape, (2, 3))
    both = cell_values(lambda block: block.inputs[0].tolist(), grid, sums)
    assert both.shape == (2, 2)
    assert sum(sum(map(sum, value)) for value in values_of(both)) == image.sum()
    lazy = ci.map_cells(lambda a: a.astype(float), sums, dtype=float, cell_shape=2)
    assert np.asarray(lazy).sum() == image.sum()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: cell_values(3, ci.CellGrid((4,), 2)), TypeError, "f must be callable, got int"),
        (lambda: cell_values(seen, (4,)), TypeError, r"CellGrid, got tuple; make one"),
        (lambda: cell_values(ci.BlockCode("pass"), ci.CellGrid((4,), 2)), TypeError, "BlockCode"),
        (
            lambda: cell_values(seen, ci.CellGrid((4,), 2), np.zeros(5)),
            ValueError,
            r"input 0 has shape \(5,\), expected \(4,\)",
        ),
        (
            lambda: cell_values(seen, ci.CellGrid((4,), 2), np.zeros(4), boundary="periodic"),
            ValueError,
            "wrap",
        ),
        (lambda: cell_values(seen, ci.CellGrid((4,), 2), boundary="periodic"), ValueError, "wrap"),
        (
            lambda: cell_values(seen, ci.CellGrid((4,), 2), np.zeros(4), halo=(1, 2, 3)),
            ValueError,
            "halo",
        ),
        (lambda: cell_values(seen, ci.CellGrid((4,), 2), params={1: 2}), TypeError, "params"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    wrong: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        wrong()


# ---------------------------------------------------------------- errors


def fails(array: NDArray[Any]) -> Any:
    if array[0, 0] == 6:
        raise LookupError("no model")
    return array.sum()


def test_an_error_names_function_cell_and_voxels() -> None:
    image = np.arange(12).reshape(2, 6)
    values = cell_values(Wrapped(fails), ci.CellGrid((2, 6), (1, 4)), image)
    assert values[0, 0] == ((0, 0), 6)
    with pytest.raises(
        ci.BlockError, match=r"fails at cell \(1, 0\) \[1:2, 0:4\].*no model"
    ) as got:
        values[1, 0]
    assert got.value.position == (1, 0)
    assert got.value.roi == ci.Roi((1, 0), (2, 4))
    assert isinstance(got.value.__cause__, LookupError)
    assert values.stats().errors == 1
    assert "fails" in repr(values)


# ---------------------------------------------------------------- the cache


def test_each_value_is_computed_once() -> None:
    calls: Counter[int] = Counter()

    def count(block: ci.Block) -> list[int]:
        calls[block.index] += 1
        return [block.index]

    values = cell_values(count, ci.CellGrid((10,), 3))
    first = values_of(values)
    again = values_of(values)
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert calls == dict.fromkeys(range(4), 1)
    assert values.peek(2).item() is first[2]
    with pytest.raises(ValueError, match="read-only"):
        values.load(1)[0] = None


def test_bytes_of_objects_count() -> None:
    cache = ci.CellCache(1 << 20)
    grid = ci.CellGrid((4,), 1)
    values = cell_values(lambda block: {"big": np.zeros(100_000, "u1")}, grid, cache=cache)
    values.load(0)
    assert 100_000 < cache.stats().bytes < 102_000
    for index in range(4):
        values.load(index)
    assert 400_000 < cache.stats().bytes < 410_000
    small = ci.CellCache(250_000)
    values = cell_values(lambda block: {"big": np.zeros(100_000, "u1")}, grid, cache=small)
    values[...]
    assert small.stats().bytes < 250_000
    assert values.stats().evictions == 2


def test_a_frame_says_how_large_it_is() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": np.zeros(10_000), "name": ["abc" * 10] * 10_000})
    assert 80_000 < num_bytes(frame) < 2_000_000
    twice = [frame, frame]
    assert num_bytes(twice) < num_bytes(frame) + 200


def test_sizes_end_in_circles_and_at_code() -> None:
    circle: list[Any] = [np.zeros(1000)]
    circle.append(circle)
    assert 8000 < num_bytes(circle) < 9000
    assert num_bytes((np, function_name, dict)) < 1000
    deep: Any = None
    for _ in range(10_000):
        deep = [deep]
    assert num_bytes(deep) > 10_000

    class Odd:
        __slots__ = ("_here", "data")

        def __init__(self) -> None:
            self.data = np.zeros(500)

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("asked for what is not there")

    assert 4000 < num_bytes(Odd()) < 5000


def lengths(values: NDArray[Any]) -> NDArray[Any]:
    return np.array([len(value["inputs"][0]) for value in values])


def test_nothing_is_written_to_the_disk(tmp_path: Path) -> None:
    image = np.arange(12.0)

    def define() -> tuple[ci.CellImg, ci.CellImg]:
        cache = ci.CellCache(1 << 20, disk=DiskCells(tmp_path / "cells", 1 << 20))
        values = cell_values(seen, ci.CellGrid((12,), 5), image, cache=cache)
        return values, ci.map_cells(lengths, values, dtype=int, cache=cache)

    values, below = define()
    assert below[...].tolist() == [5, 5, 2]
    assert values.stats().loads == 3
    files = [path for path in (tmp_path / "cells").rglob("*") if path.is_file()]
    assert files, "of the image that reads the values"
    assert not any(b"position" in path.read_bytes() for path in files)
    values, below = define()
    assert below[...].tolist() == [5, 5, 2]
    assert values.stats().loads == 0, "what was made from the values was on the disk"


def test_nothing_kept_is_right_too() -> None:
    image = np.arange(30).reshape(5, 6)
    values = cell_values(seen, ci.CellGrid((5, 6), (2, 4)), image, cache=None)
    assert [v["inputs"][0].sum() for v in values_of(values)] == [36, 30, 132, 78, 102, 57]


# ---------------------------------------------------------------- names and keys


def test_wrapped_functions_have_a_name_a_token_and_content() -> None:
    one, same, other = Wrapped(fails), Wrapped(fails), Wrapped(seen)
    assert tokenize(one) == tokenize(same) == tokenize(pickle.loads(pickle.dumps(one)))
    assert tokenize(one) != tokenize(other)
    assert value_content(one) == value_content(same) != value_content(other)
    grid, image = ci.CellGrid((4, 4), 2), np.zeros((4, 4))
    names = [cell_values(f, grid, image).to_dask().name for f in (one, same, other)]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("fails-")
    keys = [Lasting(cell_values(f, grid, image).loader)._key(1) for f in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_the_grid_is_in_the_name() -> None:
    image = np.zeros(6)
    names = {
        cell_values(seen, ci.CellGrid((6,), cell), image).to_dask().name for cell in (2, 3, 4, 5)
    }
    assert len(names) == 4


# ---------------------------------------------------------------- elsewhere


def total(array: NDArray[Any], *, scale: int) -> dict[str, Any]:
    return {"sum": int(array.sum()) * scale, "array": array.copy(), "process": os.getpid()}


def check_totals(make: Callable[..., ci.CellImg], image: NDArray[Any]) -> list[Any]:
    values = make(Wrapped(total), ci.CellGrid(image.shape, (4, 5)), image, params={"scale": 10})
    joined = make(
        lambda block: [value[1]["sum"] for value in block.inputs[0].flat],
        ci.CellGrid(values.shape, (2, 1)),
        values,
    )
    found = values_of(values)
    assert sum(value["sum"] for _, value in found) == image.sum() * 10
    assert [position for position, _ in found] == list(np.ndindex(*values.shape))
    assert sum(map(sum, values_of(joined))) == image.sum() * 10
    return found


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_values_made_by_a_queue(backend: str) -> None:
    image = np.arange(99).reshape(9, 11)
    with ci.BlockQueue(2, backend=backend) as queue:
        found = check_totals(partial(cell_values, queue=queue), image)
        if backend == "processes":
            assert os.getpid() not in {value["process"] for _, value in found}
        bad = cell_values(Wrapped(fails), ci.CellGrid((2, 6), (1, 3)), image[:2, :6], queue=queue)
        with pytest.raises(ci.BlockError, match=r"fails at cell \(0, 1\) \[0:1, 3:6\].*no model"):
            np.asarray(
                cell_values(
                    Wrapped(fails), ci.CellGrid((2, 6), (1, 3)), image[:2, :6] + 3, queue=queue
                )
            )
        assert bad[1, 1] is not None


def test_what_cannot_be_sent_from_a_process_is_said() -> None:
    def lock(block: ci.Block) -> Any:
        import threading

        return threading.Lock()

    with (
        ci.BlockQueue(1, backend="processes") as queue,
        pytest.raises(ci.CellimgError, match="cannot be sent"),
    ):
        cell_values(lock, ci.CellGrid((2,), 1), queue=queue)[0]


def test_values_through_dask() -> None:
    image = np.arange(99).reshape(9, 11)
    values = cell_values(Wrapped(np.sum), ci.CellGrid((9, 11), (4, 5)), image)
    array = values.to_dask()
    assert (array.shape, array.dtype, array.chunks) == (values.shape, object, values.chunks)
    for scheduler in ("sync", "threads"):
        got = array.compute(scheduler=scheduler)
        assert got.tolist() == np.asarray(values).tolist()
    assert array[1:, 1].compute(scheduler="sync").tolist() == values[1:, 1].tolist()
    assert dask.compute(values)[0].tolist() == np.asarray(values).tolist()


def test_an_image_of_values_can_be_pickled() -> None:
    image = np.arange(12)
    values = cell_values(Wrapped(np.sum), ci.CellGrid((12,), 5), image)
    assert values_of(pickle.loads(pickle.dumps(values))) == [((0,), 10), ((1,), 35), ((2,), 21)]


def test_values_made_by_a_cluster(client: Any) -> None:
    image = np.arange(99).reshape(9, 11)
    with ci.BlockQueue(backend=client) as queue:
        found = check_totals(partial(cell_values, queue=queue), image)
        assert os.getpid() not in {value["process"] for _, value in found}
        with pytest.raises(ci.BlockError, match=r"fails at cell \(0, 1\) \[0:1, 3:6\].*no model"):
            np.asarray(
                cell_values(
                    Wrapped(fails), ci.CellGrid((2, 6), (1, 3)), image[:2, :6] + 3, queue=queue
                )
            )
        # Batches of cells that share a task.
        many = cell_values(lambda block: (block.index,) * 2, ci.CellGrid((300,), 1), queue=queue)
        assert values_of(many) == [(n, n) for n in range(300)]
    values = cell_values(Wrapped(np.sum), ci.CellGrid((9, 11), (4, 5)), image)
    got = client.compute(values.to_dask()).result(timeout=60)
    assert got.tolist() == np.asarray(values).tolist()


def test_held_values_of_a_cluster_count_their_bytes(client: Any) -> None:
    with ci.BlockQueue(backend=client, max_bytes=250_000) as queue:
        values = cell_values(
            lambda block: np.zeros(100_000, "u1"), ci.CellGrid((4,), 1), queue=queue
        )
        for index in range(4):
            values.load(index)
        held = queue.cells.held
        assert 200_000 < held.bytes <= 250_000
        assert len(held) == 2
        # Those that another image reads, and that never come here, count as well.
        both = cell_values(
            lambda block: len(block.inputs[0]), ci.CellGrid((4,), 4), values, queue=queue
        )
        assert both[0] == 4
        assert 200_000 < held.bytes <= 250_000


def test_values_are_no_image_to_be_stored(tmp_path: Path) -> None:
    values = cell_values(seen, ci.CellGrid((4,), 2))
    with pytest.raises((TypeError, ValueError), match="object"):
        ci.run(values, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


# ---------------------------------------------------------------- change


def test_an_edit_outdates_just_the_values_that_it_touched() -> None:
    calls: Counter[tuple[int, ...]] = Counter()

    def count(block: ci.Block) -> int:
        calls[block.position] += 1
        return int(block.inputs[0].sum())

    def gather(block: ci.Block) -> int:
        return sum(block.inputs[0].flat)

    source = ci.Source(np.ones((10, 10)))
    values = cell_values(count, ci.CellGrid((10, 10), 4), source, halo=1)
    sums = cell_values(gather, ci.CellGrid(values.shape, (1, 3)), values)
    changes: list[Any] = []
    callback = values.on_dirty(changes.append)
    before = values_of(values)
    sums_before = values_of(sums)
    snapshot = values.snapshot()
    lazy = values.to_dask()
    calls.clear()
    with source.edit() as array:
        array[4, 9] = 5
    assert callback is not None
    assert {values.grid.position(index) for index in changes[0].cells} == {(0, 2), (1, 2)}
    after = values_of(values)
    assert set(calls) == {(0, 2), (1, 2)}
    assert after[2] == before[2] + 4
    assert after[5] == before[5] + 4
    assert [a for n, a in enumerate(after) if n not in (2, 5)] == [
        b for n, b in enumerate(before) if n not in (2, 5)
    ]
    assert [a - b for a, b in zip(values_of(sums), sums_before, strict=True)] == [4, 4, 0]
    assert sums.stats().loads == 5
    assert values_of(snapshot) == before
    assert list(lazy.compute(scheduler="sync").flat) == before


def test_parameters_of_values_can_change() -> None:
    values = cell_values(Wrapped(total), ci.CellGrid((4,), 2), np.ones(4, int), params={"scale": 1})
    assert [value["sum"] for _, value in values_of(values)] == [2, 2]
    values.set_params(scale=5)
    assert [value["sum"] for _, value in values_of(values)] == [10, 10]


def test_values_on_request() -> None:
    values = cell_values(Wrapped(np.sum), ci.CellGrid((6,), 2), np.arange(6))
    assert values.request().result(60).tolist() == [((0,), 1), ((1,), 5), ((2,), 9)]
    assert values.prefetch().wait(60)
    assert "sum" in repr(values.graph())
    assert "object" in repr(values)
    assert values._repr_html_()


def test_chains_of_values_may_be_longer_than_the_stack() -> None:
    grid, cache = ci.CellGrid((3,), 1), ci.CellCache(1 << 26)
    chain = cell_values(lambda block: int(block.inputs[0][0]), grid, np.arange(3), cache=cache)
    for _ in range(1200):
        chain = cell_values(lambda block: block.inputs[0].item() + 1, grid, chain, cache=cache)
    assert chain[...].tolist() == [1200, 1201, 1202]


def test_what_cannot_say_how_large_it_is_is_a_value() -> None:
    class Closed:
        @property
        def nbytes(self) -> int:
            raise OSError("the file is closed")

    values = cell_values(lambda block: Closed(), ci.CellGrid((2,), 1))
    assert [type(value) for value in values[...]] == [Closed, Closed]
