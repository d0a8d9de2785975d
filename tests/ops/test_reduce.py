"""Reductions over all cells, in trees."""

from __future__ import annotations

import os
import pickle
import threading
from collections import Counter
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.ops.reduce import Reduced, reduce_cells
from cellimg_dask.ops.trees import group_shape

PATIENCE_S = 60


class Counting:
    """A function that notes with what it was called."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: Counter[Any] = Counter()
        self.combined: list[int] = []

    def sum(self, array: NDArray[Any]) -> int:
        with self._lock:
            self.calls[int(array.flat[0])] += 1
        return int(array.sum())

    def combine(self, parts: list[int]) -> int:
        with self._lock:
            self.combined.append(len(parts))
        return sum(parts)

    def reset(self) -> None:
        self.calls.clear()
        self.combined.clear()


def total(array: NDArray[Any]) -> int:
    return int(array.sum())


def voxels(array: NDArray[Any]) -> list[int]:
    return sorted(array.reshape(-1).tolist())


def merged(parts: list[list[int]]) -> list[int]:
    return sorted(item for part in parts for item in part)


# ---------------------------------------------------------------- the result


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    return shape, tuple(draw(st.integers(1, 11)) for _ in shape)


@settings(max_examples=50)
@given(cut=cuts())
@example(cut=((), ()))
@example(cut=((300,), (1,)))
@example(cut=((5, 0), (2, 2)))
@example(cut=((70, 3, 3), (1, 1, 1)))
def test_every_voxel_counts_once(cut: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape, cells = cut
    image = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    found = reduce_cells(voxels, merged, image, cell_shape=cells)
    assert isinstance(found, Reduced)
    assert found.cells.shape == ci.CellGrid(shape, cells).grid_shape
    assert found.image.shape == (1,) * len(shape)
    assert found.result() == list(range(image.size))
    assert found.compute(scheduler="sync") == list(range(image.size))


def test_without_cells_nothing_is_combined() -> None:
    found = reduce_cells(total, lambda parts: (parts, "nothing"), np.zeros((0, 4)), cell_shape=2)
    assert found.result() == ([], "nothing")
    assert dask.compute(found) == (([], "nothing"),)


def test_one_cell_is_combined_too() -> None:
    found = reduce_cells(total, lambda parts: ("combined", parts), np.arange(4))
    assert found.result() == ("combined", [6])


def test_halo_parameters_inputs_and_finish() -> None:
    image, row = np.arange(24).reshape(4, 6), np.arange(6)

    def f(a: NDArray[Any], b: NDArray[Any], *, times: int) -> int:
        return int(a.size * times + b.sum())

    found = reduce_cells(
        f,
        sum,
        image,
        ci.Input(row, halo=0),
        halo=((1, 0), (0, 1)),
        boundary="edge",
        cell_shape=(2, 3),
        params={"times": 10},
        finish=lambda value: {"all": value},
    )
    assert found.result() == {"all": 4 * (3 * 4) * 10 + 2 * row.sum()}


def test_cells_are_those_of_the_input_by_default() -> None:
    image = ci.map_cells(np.negative, np.zeros((10, 10)), cell_shape=(3, 4))
    assert reduce_cells(total, sum, image).cells.shape == (4, 3)
    chunked = da.zeros((10, 10), chunks=(5, 2))
    assert reduce_cells(total, sum, chunked).cells.shape == (2, 5)
    assert reduce_cells(total, sum, np.zeros((10, 10))).cells.shape == (1, 1)


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((64,), (64,)),
        ((65,), (33,)),
        ((1000,), (63,)),
        ((64, 64), (8, 8)),
        ((100, 2), (25, 2)),
        ((3, 1000), (3, 21)),
        ((8, 8, 8), (4, 4, 4)),
        ((9, 9, 9, 9), (3, 3, 3, 2)),
        ((1, 1), (1, 1)),
        ((2,) * 10, (2,) * 10),
        ((), ()),
    ],
)
def test_groups_of_about_64(shape: tuple[int, ...], group: tuple[int, ...]) -> None:
    assert group_shape(shape) == group


@given(shape=st.lists(st.integers(1, 10_000), max_size=7))
def test_every_level_of_a_tree_is_much_smaller(shape: list[int]) -> None:
    sizes = group_shape(shape)
    above = [-(-n // g) for n, g in zip(shape, sizes, strict=True)]
    if np.prod(shape, dtype=float) > 1:
        assert np.prod(above, dtype=float) <= np.prod(shape, dtype=float) / 2
    assert np.prod(sizes, dtype=int) <= 128


def test_nothing_is_computed_while_it_is_defined() -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("called")

    source = ci.map_cells(fail, np.broadcast_to(0.0, (10**6,) * 3), dtype=float, cell_shape=10**4)
    found = reduce_cells(fail, fail, np.zeros((10,)), cell_shape=1, finish=fail)
    found.to_delayed()
    assert found.__dask_keys__()
    # A million cells cost no more than a few.
    large = reduce_cells(fail, fail, source)
    assert large.cells.size == 10**6
    assert "1,000,000 cells" in repr(large)


# ---------------------------------------------------------------- how it is computed


def test_cells_and_nodes_are_computed_once() -> None:
    count = Counting()
    image = np.arange(1000)
    found = reduce_cells(count.sum, count.combine, image, cell_shape=1)
    assert found.result() == image.sum()
    assert found.result() == image.sum()
    assert found.compute() == image.sum()
    assert count.calls == dict.fromkeys(range(1000), 1)
    assert sorted(count.combined) == [16] + [55] + [63] * 15


@pytest.mark.parametrize("max_bytes", [0, 1000, 20_000])
def test_a_small_cache_makes_nothing_be_computed_twice(max_bytes: int) -> None:
    count = Counting()
    image = np.arange(500)
    cache = ci.CellCache(max_bytes) if max_bytes else None
    found = reduce_cells(
        count.sum, count.combine, image, cell_shape=1, cache=cache, finish=lambda value: value
    )
    assert found.result() == image.sum()
    assert count.calls == dict.fromkeys(range(500), 1)
    assert sum(count.combined) == 500 + 8
    count.reset()
    assert found.compute() == image.sum()
    assert set(count.calls.values()) <= {1}
    assert found.image[...].item() == image.sum()


def test_an_edit_combines_one_path_again() -> None:
    count = Counting()
    source = ci.Source(np.arange(16 * 16 * 16).reshape(16, 16, 16))
    found = reduce_cells(count.sum, count.combine, source, cell_shape=1)
    before = found.result()
    assert len(count.calls) == 4096
    count.reset()
    lazy = found.to_delayed()
    with source.edit() as array:
        array[3, 4, 5] += 7
    assert found.result() == before + 7
    assert sum(count.calls.values()) == 1
    assert count.combined == [64, 64]
    assert lazy.compute(scheduler="sync") == before, "as it was when it was made"
    assert found.compute(scheduler="sync") == before + 7


def test_all_threads_have_something_to_do() -> None:
    """Two groups, of which the one is computed long before the other could be."""
    both = threading.Barrier(2, timeout=PATIENCE_S)
    threads = set()

    def wait(array: NDArray[Any]) -> int:
        # Only if two threads come does anybody get on.
        both.wait()
        threads.add(threading.get_ident())
        return 1

    with ci.BlockQueue(2) as queue:
        for how in ("result", "compute"):
            threads.clear()
            found = reduce_cells(wait, sum, np.zeros(130), cell_shape=1, queue=queue)
            assert getattr(found, how)() == 130
            assert len(threads) == 2


def test_a_failing_cell_is_named() -> None:
    def fail(array: NDArray[Any]) -> int:
        if array[0] == 3:
            raise LookupError("no model")
        return 1

    def mend(parts: list[int]) -> int:
        raise ArithmeticError("cannot add")

    found = reduce_cells(fail, sum, np.arange(6), cell_shape=3)
    for compute in (found.result, found.compute):
        with pytest.raises(ci.BlockError, match=r"fail at cell \(1,\) \[3:6\].*no model"):
            compute()
    with pytest.raises(ci.BlockError, match=r"mend at cell \(0,\).*cannot add"):
        reduce_cells(total, mend, np.arange(6), cell_shape=3).result()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: reduce_cells(1, sum, np.zeros(3)), TypeError, "f must be callable, got int"),
        (lambda: reduce_cells(total, np.zeros(3), np.zeros(3)), TypeError, "combine must be call"),
        (lambda: reduce_cells(total, sum, np.zeros(3), finish=3), TypeError, "finish must be"),
        (lambda: reduce_cells(total, sum), TypeError, "at least one input"),
        (
            lambda: reduce_cells(total, sum, np.zeros(3), np.zeros(4)),
            ValueError,
            r"\(3,\), \(4,\) do not fit",
        ),
        (lambda: reduce_cells(total, sum, [1, 2]), TypeError, "numpy.asarray"),
    ],
)
def test_what_is_wrong_is_said_at_once(wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        wrong()


# ---------------------------------------------------------------- dask


def test_it_is_a_dask_collection() -> None:
    image = np.arange(100)
    a = reduce_cells(total, sum, image, cell_shape=7)
    b = reduce_cells(np.max, max, image, cell_shape=9)
    assert dask.is_dask_collection(a)
    assert dask.compute(a, b, [a, {"b": b}]) == (4950, 99, [4950, {"b": 99}])
    assert a.to_delayed().compute() == 4950
    assert (a.to_delayed() + b.to_delayed()).compute(scheduler="sync") == 5049
    assert dask.delayed(pow)(a, 2).compute(scheduler="sync") == 4950**2
    assert a.persist().compute() == 4950
    assert dask.base.tokenize(a) == dask.base.tokenize(
        reduce_cells(total, sum, image, cell_shape=7)
    )
    assert dask.base.tokenize(a) != dask.base.tokenize(b)


def test_on_chunks_of_a_dask_array() -> None:
    image = da.from_array(np.arange(1000).reshape(10, 100), chunks=(3, 7))
    found = reduce_cells(total, sum, image)
    assert found.result() == 499_500
    assert found.compute(scheduler="sync") == 499_500
    assert found.compute(scheduler="threads") == 499_500


def test_other_images_read_the_result() -> None:
    image = np.arange(12.0).reshape(3, 4)
    largest = reduce_cells(np.max, max, image, cell_shape=2)
    scaled = ci.map_cells(
        lambda a, top: a / top.item(), image, largest.image, dtype=float, cell_shape=2
    )
    np.testing.assert_array_equal(scaled[...], image / 11)


# ---------------------------------------------------------------- elsewhere


def where(array: NDArray[Any]) -> tuple[int, frozenset[int], frozenset[int]]:
    return int(array.sum()), frozenset([os.getpid()]), frozenset()


def where_all(parts: list[Any]) -> tuple[int, frozenset[int], frozenset[int]]:
    return (
        sum(part[0] for part in parts),
        frozenset().union(*(part[1] for part in parts)),
        frozenset([os.getpid()]).union(*(part[2] for part in parts)),
    )


def test_in_processes() -> None:
    image = np.arange(200)
    with ci.BlockQueue(2, backend="processes") as queue:
        found = reduce_cells(where, where_all, image, cell_shape=2, queue=queue)
        result, leaves, nodes = found.result()
    assert result == image.sum()
    assert os.getpid() not in leaves | nodes


def test_on_a_cluster(client: Any) -> None:
    image = np.arange(200)
    source = ci.Source(image.copy(), cell_shape=2)
    with ci.BlockQueue(backend=client) as queue:
        found = reduce_cells(where, where_all, source, cell_shape=2, queue=queue)
        result, leaves, nodes = found.result()
        assert result == image.sum()
        assert len(leaves) == 2
        assert os.getpid() not in leaves | nodes
        with source.edit() as array:
            array[7] += 5
        assert found.compute()[0] == result + 5
    plain = reduce_cells(where, where_all, image, cell_shape=2)
    result, leaves, nodes = client.compute(plain).result(timeout=PATIENCE_S)
    assert result == image.sum()
    assert len(leaves) == 2
    assert os.getpid() not in leaves | nodes


def test_it_can_be_pickled() -> None:
    found = reduce_cells(total, sum, np.arange(10), cell_shape=3)
    assert pickle.loads(pickle.dumps(found)).result() == 45
