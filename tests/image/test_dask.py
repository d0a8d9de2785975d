"""The image as a dask array, on every scheduler that needs no cluster."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import dask
import dask.array as da
import numpy as np
import pytest
import scipy.ndimage as ndi
from dask.base import collections_to_expr
from dask.task_spec import Alias

import cellimg_dask as ci


class Counted:
    """A smoothing filter that counts its calls; picklable, so it can go to other processes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, array: np.ndarray, size: int = 3) -> np.ndarray:
        self.calls += 1
        return ndi.median_filter(array, size)


@pytest.fixture
def volume(rng: np.random.Generator) -> np.ndarray:
    return rng.random((20, 23, 31), dtype="f4")


def two_stages(volume: np.ndarray, first: Counted, second: Counted) -> ci.CellImg:
    below = ci.map_cells(first, volume, halo=1, dtype="f4", cell_shape=(8, 9, 10))
    return ci.map_cells(
        second, below, halo=2, dtype="f4", cell_shape=(7, 12, 16), params={"size": 5}
    )


def whole(volume: np.ndarray) -> np.ndarray:
    return ndi.median_filter(ndi.median_filter(volume, 3), 5)


def tasks_of(array: da.Array) -> dict:
    """Return the tasks that a scheduler would get; aliases name one and do nothing."""
    graph = dict(array.__dask_optimize__(array.__dask_graph__(), array.__dask_keys__()))
    return {key: task for key, task in graph.items() if not isinstance(task, Alias)}


@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
@pytest.mark.parametrize("optimize_graph", [True, False])
def test_equals_whole_on_every_scheduler(
    volume: np.ndarray, scheduler: str, optimize_graph: bool
) -> None:
    array = two_stages(volume, Counted(), Counted()).to_dask()
    with dask.config.set(num_workers=2):
        got = array.compute(scheduler=scheduler, optimize_graph=optimize_graph)
        part = array[3:18, 5, 4:].compute(scheduler=scheduler, optimize_graph=optimize_graph)
    np.testing.assert_array_equal(got, whole(volume))
    np.testing.assert_array_equal(part, whole(volume)[3:18, 5, 4:])


def test_stays_lazy_until_computed(volume: np.ndarray) -> None:
    first, second = Counted(), Counted()
    image = two_stages(volume, first, second)
    array = image.to_dask()
    lazy = (array + 1)[2:9].mean(axis=0)
    repr(lazy), repr(image), image._repr_html_(), tasks_of(lazy)
    dask.base.tokenize(image)
    assert (first.calls, second.calls) == (0, 0)
    lazy.compute()
    assert first.calls > 0


def test_one_task_per_cell(volume: np.ndarray) -> None:
    image = two_stages(volume, Counted(), Counted())
    assert len(tasks_of(image.to_dask())) == image.grid.num_cells
    # dask fuses its cutting with the cell; only the cells that the slice meets are there.
    part = image.to_dask()[0:7, 0:12, 0:16]
    assert len(tasks_of(part)) == 1


def test_a_dask_input_adds_only_its_own_chunks(volume: np.ndarray) -> None:
    source = da.from_array(volume, chunks=(11, 10, 9))
    image = ci.map_cells(Counted(), source, halo=1, dtype="f4", cell_shape=8)
    chunks = int(np.prod(source.numblocks))
    graph = tasks_of(image.to_dask())
    # from_array keeps the array itself as one more node.
    assert len(graph) <= image.grid.num_cells + 2 * chunks + 1


def test_shares_the_cache_with_direct_reading(volume: np.ndarray) -> None:
    first, second = Counted(), Counted()
    image = two_stages(volume, first, second)
    image[:]
    calls = first.calls, second.calls
    assert calls == (first.calls, image.grid.num_cells)
    image.to_dask().compute(scheduler="threads")
    image.to_dask()[2:5, 3].compute(scheduler="sync")
    image.to_dask().sum().compute(scheduler="threads")
    assert (first.calls, second.calls) == calls


def test_concurrent_computes_call_once_per_cell(volume: np.ndarray) -> None:
    from concurrent.futures import ThreadPoolExecutor

    first, second = Counted(), Counted()
    array = two_stages(volume, first, second).to_dask()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: array.compute(scheduler="threads"), range(4)))
    for result in results:
        np.testing.assert_array_equal(result, whole(volume))
    image_cells = int(np.prod(array.numblocks))
    assert second.calls == image_cells


def test_is_a_dask_collection(volume: np.ndarray) -> None:
    image = two_stages(volume, Counted(), Counted())
    assert dask.is_dask_collection(image)
    (computed,) = dask.compute(image)
    np.testing.assert_array_equal(computed, whole(volume))
    np.testing.assert_array_equal(image.compute(), whole(volume))
    (persisted,) = dask.persist(image)
    np.testing.assert_array_equal(persisted.compute(), whole(volume))
    np.testing.assert_array_equal(image.persist().compute(), whole(volume))
    (optimised,) = dask.optimize(image)
    np.testing.assert_array_equal(optimised.compute(), whole(volume))


def test_numpy_functions_and_arithmetic_stay_lazy(volume: np.ndarray) -> None:
    first = Counted()
    image = ci.map_cells(first, volume, halo=1, dtype="f4", cell_shape=9)
    expected = ndi.median_filter(volume, 3)
    lazy = {
        "mean": (np.mean(image, axis=1), expected.mean(axis=1)),
        "where": (np.where(image > 0.5, image, 0), np.where(expected > 0.5, expected, 0)),
        "stack": (np.stack([image, image]), np.stack([expected, expected])),
        "ufunc": (np.sqrt(image), np.sqrt(expected)),
        "arithmetic": (1 - image * 2 + image, 1 - expected * 2 + expected),
        "array": (image + volume, expected + volume),
        "reflected": (volume - image, volume - expected),
        "dask": (da.from_array(volume) - image, volume - expected),
        "both": (image @ np.swapaxes(image, 1, 2), expected @ np.swapaxes(expected, 1, 2)),
    }
    assert first.calls == 0
    for name, (result, wanted) in lazy.items():
        assert isinstance(result, da.Array), name
        np.testing.assert_allclose(result.compute(), wanted, rtol=1e-4, atol=1e-6, err_msg=name)


def test_dask_asarray_takes_it(volume: np.ndarray) -> None:
    image = two_stages(volume, Counted(), Counted())
    assert da.asarray(image).name == image.to_dask().name
    assert da.asanyarray(image).chunks == image.chunks


def test_keys_are_the_same_for_the_same_definition(volume: np.ndarray) -> None:
    def make(sigma: float, halo: int = 4) -> str:
        image = ci.map_cells(
            ndi.gaussian_filter, volume, halo=halo, dtype="f4", params={"sigma": sigma}
        )
        return ci.map_cells(np.negative, image).to_dask().name

    assert make(1.0) == make(1.0)
    assert len({make(1.0), make(2.0), make(1.0, halo=5)}) == 3


def test_keys_change_when_the_data_did(volume: np.ndarray) -> None:
    below = ci.map_cells(np.negative, volume, cell_shape=8)
    image = ci.map_cells(np.abs, below)
    before = image.to_dask()
    below.invalidate()
    after = image.to_dask()
    assert before.name != after.name
    assert image.to_dask().name == after.name


def test_empty_and_zero_dimensional_images() -> None:
    empty = ci.map_cells(np.negative, np.zeros((0, 4)))
    assert empty.to_dask().compute().shape == (0, 4)
    scalar = ci.map_cells(np.negative, np.array(3.0))
    assert scalar.to_dask().compute() == -3.0
    assert scalar[()] == -3.0


def test_shared_upstream_is_built_once() -> None:
    # Doubled at each of 40 stages, a walk over all paths would take 2**40 steps.
    image = ci.map_cells(np.negative, np.arange(6.0), cell_shape=2)
    for _ in range(40):
        image = ci.map_cells(np.add, image, image)
    expected = -np.arange(6.0) * 2.0**40
    np.testing.assert_array_equal(image.to_dask().compute(), expected)
    np.testing.assert_array_equal(image[:], expected)


def test_building_costs_nothing_per_cell() -> None:
    class Huge:
        shape = (2000 * 64,) * 3
        dtype = np.dtype("u1")
        chunks = None

        def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
            return np.ones([part.stop - part.start for part in box], "u1")

    image = ci.map_cells(np.negative, Huge(), cell_shape=64, halo=2)
    assert image.grid.num_cells == 8_000_000_000
    array = image.to_dask()
    assert array.npartitions == 8_000_000_000
    corner = array[-3:, -3:, -3:]
    assert len(tasks_of(corner)) == 1
    np.testing.assert_array_equal(corner.compute(), np.full((3, 3, 3), 255, "u1"))


def test_pickled_graph_does_not_grow_with_the_cells() -> None:
    from distributed.protocol.pickle import dumps

    sizes = []
    for cells in (10, 1000):
        block = np.lib.stride_tricks.as_strided(np.zeros(1, "u1"), (cells, 64), (0, 0))
        image = ci.fill_cells(_number, ci.CellGrid(block.shape, (1, 64)), dtype="u1")
        sizes.append(len(dumps(collections_to_expr(image.to_dask()))))
    # Only dask's own tuple of chunk sizes and list of output keys grow.
    assert sizes[1] - sizes[0] < 60 * 1000


def _number(block: ci.Block) -> None:
    block.data[...] = block.index % 256


def test_query_planning_gives_the_same() -> None:
    # The switch is read once in a process, so this needs its own.
    script = textwrap.dedent(
        """
        import dask
        dask.config.set({"array.query-planning": True})
        import dask.array as da, numpy as np, scipy.ndimage as ndi
        import cellimg_dask as ci

        assert da.array_expr_enabled()
        calls = []
        def smooth(a):
            calls.append(1)
            return ndi.median_filter(a, 3)
        data = np.random.default_rng(0).random((20, 23))
        expected = ndi.median_filter(ndi.median_filter(data, 3), 3)
        for source in (data, da.from_array(data, chunks=(7, 9))):
            below = ci.map_cells(smooth, source, halo=1, dtype="f8", cell_shape=6)
            image = ci.map_cells(smooth, below, halo=1, dtype="f8")
            before = len(calls)
            array = image.to_dask()
            assert len(calls) == before
            for optimize_graph in (True, False):
                for scheduler in ("sync", "threads"):
                    got = array.compute(scheduler=scheduler, optimize_graph=optimize_graph)
                    np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(array[3:9, 4].compute(), expected[3:9, 4])
            np.testing.assert_array_equal(dask.compute(image)[0], expected)
            np.testing.assert_array_equal((image + 1).compute(), expected + 1)
            np.testing.assert_array_equal(image.persist().compute(), expected)
        print("same")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"
