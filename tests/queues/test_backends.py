"""One behaviour over threads, processes and a cluster."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci

Make = Callable[..., ci.BlockQueue]
Begin = Callable[..., Future[Any]]
Case = Callable[[ci.BlockQueue, np.random.Generator, Path], tuple[Any, Any]]

PATIENCE_S = 60
"""What takes longer hangs."""

CASES: dict[str, Case] = {}
"""Each gives a function that defines an image, and what SciPy or NumPy make of the whole."""

ON_CRASH = pytest.mark.parametrize("backend", ["processes", "distributed"], indirect=True)
LOCAL = pytest.mark.parametrize("backend", ["threads", "processes"], indirect=True)
PROCESSES = pytest.mark.parametrize("backend", ["processes"], indirect=True)
THREADS = pytest.mark.parametrize("backend", ["threads"], indirect=True)


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def numbers(queue: ci.BlockQueue | None, count: int = 4, function: Any = None) -> ci.CellImg:
    """An image of ``count`` cells with a voxel each, numbered, or what ``function`` fills in."""

    def number(block: ci.Block) -> None:
        block.data[...] = block.index

    grid = ci.CellGrid((count,), 1)
    return ci.fill_cells(function or number, grid, dtype=int, queue=queue)


@pytest.fixture(scope="module")
def shared_workers(backend: str, nothing_left: Any) -> Iterator[ci.BlockQueue | None]:
    """Processes for all tests that do them no harm, as each takes half a second to start."""
    if backend != "processes":
        yield None
        return
    with nothing_left(), ci.BlockQueue(2, backend=backend) as queue:
        yield queue


@pytest.fixture
def queue(shared_workers: ci.BlockQueue | None, make_queue: Make) -> ci.BlockQueue:
    """A queue that is not to be closed."""
    return make_queue() if shared_workers is None else shared_workers


def stop_worker_processes(queue: ci.BlockQueue, client: Any, until: Any) -> None:
    """Kill all workers; the cluster's are there again afterwards."""
    if queue.blocks is not None:
        for pid in queue.blocks.pids:  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)
            # The library, which waits for an answer, may have seen its end before.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return
    before = client.run(os.getpid)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    def all_new() -> bool:
        now = client.run(os.getpid, on_error="ignore")
        return len(now) == len(before) and not set(now.values()) & set(before.values())

    until(all_new)


@pytest.fixture
def kill_workers(
    backend: str, request: pytest.FixtureRequest, until: Any
) -> Callable[[ci.BlockQueue], None]:
    client = request.getfixturevalue("client") if backend == "distributed" else None
    return lambda queue: stop_worker_processes(queue, client, until)


@pytest.fixture
def pending(backend: str, request: pytest.FixtureRequest) -> Callable[[ci.BlockQueue], int]:
    """Count the blocks that wait for a worker."""
    if backend != "distributed":
        return lambda queue: queue.blocks.num_waiting  # type: ignore[union-attr]
    client = request.getfixturevalue("client")

    def count(dask_scheduler: Any) -> int:
        cells = [task for task in dask_scheduler.tasks.values() if isinstance(task.key, tuple)]
        # Less the two that the workers compute at the moment.
        return sum(task.state in ("waiting", "processing", "queued") for task in cells) - 2

    return lambda queue: client.run_on_scheduler(count)


# ---------------------------------------------------------------------------- same results


def medians(array: Any, cell_shape: Any, queue: Any) -> ci.CellImg:
    return ci.map_cells(
        lambda a: ndi.median_filter(a, 3),
        array,
        halo=1,
        dtype="f4",
        cell_shape=cell_shape,
        queue=queue,
    )


@case
def a_halo_over_ragged_cells(queue: Any, rng: Any, folder: Path) -> Any:
    volume = rng.random((13, 17, 11), dtype="f4")
    return (
        lambda: medians(volume, (5, 17, 4), queue),
        ndi.median_filter(volume, 3),
    )


@case
def an_asymmetric_halo_wider_than_the_image(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.integers(0, 9, 7)

    def mean_of_all(array: Any) -> Any:
        return ndi.uniform_filter1d(array, 27, origin=0, mode="wrap").astype("i8")

    return (
        lambda: ci.map_cells(
            mean_of_all,
            row,
            halo=[(20, 15)],
            boundary="wrap",
            dtype="i8",
            cell_shape=3,
            queue=queue,
        ),
        mean_of_all(row),
    )


@case
def a_border_of_a_constant(queue: Any, rng: Any, folder: Path) -> Any:
    plane = rng.integers(0, 9, (6, 7))
    return (
        lambda: ci.map_cells(
            lambda a: ndi.maximum_filter(a, 3),
            plane,
            halo=1,
            boundary="constant",
            fill_value=5,
            dtype=plane.dtype,
            cell_shape=4,
            queue=queue,
        ),
        ndi.maximum_filter(plane, 3, mode="constant", cval=5),
    )


@case
def a_function_that_fills(queue: Any, rng: Any, folder: Path) -> Any:
    plane = rng.random((9, 8))

    def fill(block: ci.Block) -> None:
        assert block.data.shape == block.shape == block.roi.shape
        block.data[...] = ndi.gaussian_filter(block.inputs[0], 1, truncate=2)[block.halo]

    return (
        lambda: ci.fill_cells(
            fill, ci.CellGrid((9, 8), 4), plane, halo=2, dtype=float, queue=queue
        ),
        ndi.gaussian_filter(plane, 1, truncate=2),
    )


@case
def code(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.integers(0, 99, 10)
    text = "block.data[...] = ndi.grey_dilation(block.inputs[0], 3)[block.halo]"
    return (
        lambda: ci.fill_cells(
            ci.BlockCode(text, init="import scipy.ndimage as ndi"),
            ci.CellGrid((10,), 3),
            row,
            halo=1,
            dtype=int,
            queue=queue,
        ),
        ndi.grey_dilation(row, 3),
    )


@case
def a_cell_knows_where_it_is(queue: Any, rng: Any, folder: Path) -> Any:
    def place(block: ci.Block) -> None:
        bounds = zip(block.min, block.max, strict=True)
        grid = np.ogrid[tuple(slice(low, high + 1) for low, high in bounds)]
        block.data[...] = grid[0] * 100 + grid[1]

    return (
        lambda: ci.fill_cells(place, ci.CellGrid((5, 7), (2, 3)), dtype=int, queue=queue),
        np.add.outer(np.arange(5) * 100, np.arange(7)),
    )


@case
def parameters(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.integers(0, 99, 10)
    table = rng.integers(0, 99, 100)
    return (
        lambda: ci.map_cells(
            lambda a, table, add: table[a] + add,
            row,
            params={"table": table, "add": 3},
            dtype=int,
            cell_shape=4,
            queue=queue,
        ),
        table[row] + 3,
    )


@case
def several_inputs(queue: Any, rng: Any, folder: Path) -> Any:
    plane, row, wide = rng.random((6, 7)), rng.random(7), rng.random((6, 7))

    def together(a: Any, b: Any, c: Any) -> Any:
        return a[1:-1, 1:-1] + b + ndi.maximum_filter(c, 3)[1:-1, 1:-1]

    def whole() -> Any:
        return plane + row + ndi.maximum_filter(wide, 3, mode="constant")

    return (
        lambda: ci.map_cells(
            together,
            ci.Input(plane, halo=1),
            ci.Input(row, halo=0),
            ci.Input(wide, halo=1),
            boundary="constant",
            dtype=float,
            cell_shape=(2, 3),
            queue=queue,
        ),
        whole(),
    )


@case
def another_dtype_and_byte_order(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.integers(0, 60_000, 11).astype(">u2")
    return (
        lambda: ci.map_cells(
            lambda a: np.sqrt(a.astype("c8") - 9), row, dtype="c16", cell_shape=3, queue=queue
        ),
        np.sqrt(row.astype("c8") - 9).astype("c16"),
    )


@case
def truth_values(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.random(11)
    return (
        lambda: ci.map_cells(lambda a: a > 0.5, row, dtype=bool, cell_shape=3, queue=queue),
        row > 0.5,
    )


@case
def a_new_axis_and_one_less(queue: Any, rng: Any, folder: Path) -> Any:
    volume = rng.random((3, 6, 5))

    def extremes(array: Any) -> Any:
        return np.stack([array.min(0), array.max(0)], -1)

    return (
        lambda: ci.map_cells(
            extremes,
            volume,
            drop_axis=0,
            new_axis={2: 2},
            dtype=float,
            cell_shape=(4, 3, 2),
            queue=queue,
        ),
        extremes(volume),
    )


@case
def a_smaller_result(queue: Any, rng: Any, folder: Path) -> Any:
    plane = rng.random((7, 9))
    return (
        lambda: ci.map_cells(
            lambda a: a[::2, ::3], plane, shrink=(2, 3), dtype=float, cell_shape=2, queue=queue
        ),
        plane[::2, ::3],
    )


@case
def no_axes(queue: Any, rng: Any, folder: Path) -> Any:
    return (
        lambda: ci.map_cells(lambda a: a + 1, np.array(4), dtype=int, queue=queue),
        np.array(5),
    )


@case
def no_voxels(queue: Any, rng: Any, folder: Path) -> Any:
    return (
        lambda: ci.map_cells(
            lambda a: a + 1, np.zeros((3, 0, 2)), dtype=float, cell_shape=2, queue=queue
        ),
        np.zeros((3, 0, 2)),
    )


@case
def a_turned_input(queue: Any, rng: Any, folder: Path) -> Any:
    plane = rng.random((6, 7))

    def turned(roi: ci.Roi) -> ci.Roi:
        return ci.Roi(roi.start[::-1], roi.stop[::-1])

    def fill(block: ci.Block) -> None:
        block.data[...] = block.inputs[0].T

    return (
        lambda: ci.fill_cells(
            fill,
            ci.CellGrid((7, 6), 4),
            ci.Input(plane, index_map=turned),
            dtype=float,
            queue=queue,
        ),
        plane.T,
    )


@case
def without_a_cache(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.random(9)
    return (
        lambda: ci.map_cells(lambda a: -a, row, dtype=float, cell_shape=2, cache=None, queue=queue),
        -row,
    )


@case
def a_cache_of_its_own(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.random(9)
    return (
        lambda: ci.map_cells(
            lambda a: -a, row, dtype=float, cell_shape=2, cache=ci.CellCache(64), queue=queue
        ),
        -row,
    )


@case
def an_input_given_back(queue: Any, rng: Any, folder: Path) -> Any:
    plane = np.asfortranarray(rng.random((6, 7)))[::-1, ::2]
    return (
        lambda: ci.map_cells(lambda a: a, plane, dtype=float, cell_shape=4, queue=queue),
        plane,
    )


def two_filters(volume: Any, first: Any, second: Any) -> Any:
    def build() -> ci.CellImg:
        lower = medians(volume, (4, 5), first)
        return ci.map_cells(
            lambda a: ndi.maximum_filter(a, 5),
            lower,
            halo=2,
            dtype="f4",
            cell_shape=(3, 12),
            queue=second,
        )

    return build, ndi.maximum_filter(ndi.median_filter(volume, 3), 5)


@case
def a_chain_on_one_queue(queue: Any, rng: Any, folder: Path) -> Any:
    return two_filters(rng.random((9, 12), dtype="f4"), queue, queue)


@case
def a_queued_image_over_a_plain_one(queue: Any, rng: Any, folder: Path) -> Any:
    return two_filters(rng.random((9, 12), dtype="f4"), None, queue)


@case
def a_plain_image_over_a_queued_one(queue: Any, rng: Any, folder: Path) -> Any:
    return two_filters(rng.random((9, 12), dtype="f4"), queue, None)


@case
def a_chain_deeper_than_a_pillar_is_far(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.integers(0, 99, 8)

    def build() -> ci.CellImg:
        image = row
        for _ in range(25):
            image = ci.map_cells(  # type: ignore[assignment]
                lambda a: ndi.maximum_filter(a, 3)[1:-1] + 1,
                image,
                halo=1,
                boundary="edge",
                dtype=row.dtype,
                cell_shape=3,
                queue=queue,
            )
        return image  # type: ignore[return-value]

    expected = row
    for _ in range(25):
        expected = ndi.maximum_filter(expected, 3) + 1
    return build, expected


@case
def a_block_that_reads_an_image_of_the_same_queue(queue: Any, rng: Any, folder: Path) -> Any:
    row = rng.integers(0, 99, 12)

    def build() -> ci.CellImg:
        lower = ci.map_cells(lambda a: a * 2, row, dtype=int, cell_shape=2, queue=queue)

        def turn(block: ci.Block) -> None:
            low, high = 12 - block.roi.stop[0], 12 - block.roi.start[0]
            block.data[...] = lower[low:high][::-1]

        return ci.fill_cells(turn, ci.CellGrid((12,), 5), dtype=int, queue=queue)

    return build, row[::-1] * 2


@case
def zarr_input(queue: Any, rng: Any, folder: Path) -> Any:
    plane = rng.random((11, 13), dtype="f4")
    array = zarr.create_array(str(folder / "in.zarr"), data=plane, chunks=(4, 5))
    return (
        lambda: medians(array, (6, 4), queue),
        ndi.median_filter(plane, 3),
    )


@case
def dask_input(queue: Any, rng: Any, folder: Path) -> Any:
    plane = rng.random((11, 13), dtype="f4")
    array = da.from_array(plane, chunks=(4, 5)) + 1
    return (
        lambda: medians(array, (6, 4), queue),
        ndi.median_filter(plane + 1, 3),
    )


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_whole(
    queue: ci.BlockQueue, in_time: Any, tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    build, expected = CASES[name](queue, rng, tmp_path)

    def check(got: Any, wanted: Any) -> None:
        assert got.dtype == wanted.dtype.newbyteorder("=")
        np.testing.assert_array_equal(got, wanted)

    image = build()
    middle = tuple(slice(n // 3, n - n // 4) for n in expected.shape)
    check(in_time(lambda: image[middle]), expected[middle])
    check(in_time(lambda: image[...]), expected)
    check(in_time(lambda: np.asarray(image)), expected)
    for scheduler in ("threads", "synchronous"):
        fresh = build()
        check(in_time(lambda: fresh.to_dask().compute(scheduler=scheduler)), expected)  # noqa: B023


def test_one_worker_is_enough_for_images_that_rest_on_images(
    make_queue: Make, in_time: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    queue = make_queue(1)
    for name in (
        "a_chain_on_one_queue",
        "a_plain_image_over_a_queued_one",
        "a_block_that_reads_an_image_of_the_same_queue",
    ):
        build, expected = CASES[name](queue, rng, tmp_path)
        np.testing.assert_array_equal(in_time(lambda: build()[...]), expected)  # noqa: B023


def test_more_cells_than_are_asked_for_at_a_time(queue: ci.BlockQueue, in_time: Any) -> None:
    image = ci.map_cells(lambda a: a + 1, np.arange(3000), dtype=int, cell_shape=1, queue=queue)
    np.testing.assert_array_equal(in_time(lambda: image[...]), np.arange(3000) + 1)


def test_a_cell_is_computed_once_and_then_held(queue: ci.BlockQueue, log: Any) -> None:
    image = numbers(queue, 4, log.fill)
    for _ in range(2):
        np.testing.assert_array_equal(image[...], range(4))
    assert sorted(log.first_words()) == ["0", "1", "2", "3"]
    image.invalidate(ci.Roi((1,), (2,)))
    np.testing.assert_array_equal(image[...], range(4))
    assert sorted(log.first_words()) == ["0", "1", "1", "2", "3"]


def test_prefetched_cells_are_not_computed_again(
    queue: ci.BlockQueue, log: Any, in_time: Any
) -> None:
    image = numbers(queue, 4, log.fill)
    assert image.prefetch().result(PATIENCE_S) is None
    np.testing.assert_array_equal(in_time(lambda: image[...]), range(4))
    assert sorted(log.first_words()) == ["0", "1", "2", "3"]


def test_blocks_run_elsewhere(queue: ci.BlockQueue, backend: str, log: Any) -> None:
    add = log.add
    numbers(queue, 4, lambda block: add("block"))[...]
    here = os.getpid()
    assert (set(log.by_process()) == {here}) == (backend == "threads")
    assert (here, threading.get_native_id()) not in log.by_worker()


# ---------------------------------------------------------------------------- same errors


def test_an_exception_names_function_and_cell(queue: ci.BlockQueue, in_time: Any) -> None:
    def no_model(block: ci.Block) -> None:
        if block.index == 2:
            raise LookupError("no model")

    image = ci.fill_cells(no_model, ci.CellGrid((6, 4), (3, 2)), dtype=int, queue=queue)
    with pytest.raises(
        ci.BlockError, match=r"no_model at cell \(1, 0\) \[3:6, 0:2\].*no model"
    ) as got:
        in_time(lambda: image[...])
    assert type(got.value) is ci.BlockError
    assert got.value.function.endswith("no_model")
    assert got.value.position == (1, 0)
    assert got.value.roi == ci.Roi((3, 0), (6, 2))
    assert type(got.value.__cause__) is LookupError
    assert got.value.__cause__.args == ("no model",)
    assert image.peek((1, 0)) is None
    np.testing.assert_array_equal(in_time(lambda: image[:3]), 0)


def test_an_exception_of_the_users_own_class(queue: ci.BlockQueue, in_time: Any) -> None:
    class OutOfFocusError(Exception):
        def __init__(self, depth: int, *, unit: str) -> None:
            super().__init__(f"{depth} {unit}")

    def fail(array: Any) -> Any:
        raise OutOfFocusError(3, unit="um")

    image = ci.map_cells(fail, np.zeros(2), dtype=float, queue=queue)
    with pytest.raises(ci.BlockError, match="OutOfFocusError: 3 um") as got:
        in_time(lambda: image[...])
    # Its arguments do not make it anew, so elsewhere its text may stand for it.
    assert "3 um" in str(got.value.__cause__)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.zeros(3), r"returned shape \(3,\), expected \(2,\)"),
        (np.zeros(2, complex), "returned dtype complex128"),
        (None, "returned NoneType"),
        (np.ma.zeros(2), "masked array"),
    ],
    ids=["shape", "dtype", "nothing", "masked"],
)
def test_a_result_that_does_not_fit(
    queue: ci.BlockQueue, in_time: Any, result: Any, message: str
) -> None:
    image = ci.map_cells(lambda a: result, np.zeros(4), dtype=float, cell_shape=2, queue=queue)
    with pytest.raises(ci.ResultError, match=message) as got:
        in_time(lambda: image[2:])
    assert got.value.position == (1,)
    assert image.peek(1) is None


def test_inputs_are_read_only(queue: ci.BlockQueue, in_time: Any) -> None:
    def spoil(array: Any) -> Any:
        array[0] = 1
        return array

    image = ci.map_cells(spoil, np.zeros(4), dtype=float, cell_shape=2, queue=queue)
    with pytest.raises(ci.BlockError, match="read-only"):
        in_time(lambda: image[...])


def test_after_an_error_the_next_read_tries_again(
    queue: ci.BlockQueue, in_time: Any, tmp_path: Path
) -> None:
    flag = str(tmp_path / "broken")

    def fill(block: ci.Block) -> None:
        if os.path.exists(flag):  # noqa: PTH110 - what goes to a process is kept small
            raise OSError("the disk is full")
        block.data[...] = block.index

    image = numbers(queue, 4, fill)
    Path(flag).touch()
    for _ in range(2):
        with pytest.raises(ci.BlockError, match="the disk is full"):
            in_time(lambda: image[...])
        # On several threads it would go on with the others after the first error.
        with pytest.raises(ci.BlockError, match="the disk is full"):
            in_time(lambda: image.to_dask().compute(scheduler="synchronous"))
    assert [image.peek(index) for index in range(4)] == [None] * 4
    Path(flag).unlink()
    np.testing.assert_array_equal(in_time(lambda: image[...]), range(4))


def test_an_error_upstream_names_the_cell_upstream(queue: ci.BlockQueue, in_time: Any) -> None:
    def fail_second(array: Any) -> Any:
        if array[0] == 2:
            raise ValueError("bad plane")
        return array

    lower = ci.map_cells(fail_second, np.arange(6), dtype=int, cell_shape=2, queue=queue)
    upper = ci.map_cells(lambda a: a, lower, dtype=int, cell_shape=3, queue=queue)
    with pytest.raises(ci.BlockError, match="bad plane") as got:
        in_time(lambda: upper[...])
    assert got.value.function.endswith("fail_second")
    assert got.value.position == (1,)


def test_an_error_of_a_nested_read_names_the_cell_that_failed(
    queue: ci.BlockQueue, in_time: Any
) -> None:
    def fail(array: Any) -> Any:
        raise ValueError("bad plane")

    lower = ci.map_cells(fail, np.arange(6), dtype=int, cell_shape=2, queue=queue)
    upper = numbers(queue, 2, lambda block: lower[4:6])
    with pytest.raises(ci.BlockError, match="bad plane") as got:
        in_time(lambda: upper[...])
    assert got.value.function.endswith("fail")
    assert got.value.position == (2,)


def test_sys_exit_in_a_block_is_an_error_of_the_block(queue: ci.BlockQueue, in_time: Any) -> None:
    def leave(array: Any) -> Any:
        raise SystemExit("enough")

    image = ci.map_cells(leave, np.zeros(2), dtype=float, queue=queue)
    with pytest.raises(ci.BlockError, match="enough") as got:
        in_time(lambda: image[...])
    assert type(got.value) is ci.BlockError
    assert isinstance(got.value.__cause__, SystemExit)
    np.testing.assert_array_equal(in_time(lambda: numbers(queue)[...]), range(4))


@ON_CRASH
@pytest.mark.parametrize("what", ["function", "params"])
def test_what_cannot_be_sent_is_said(queue: ci.BlockQueue, in_time: Any, what: str) -> None:
    lock = threading.Lock()

    def locked(array: Any, lock: Any = None) -> Any:
        return array

    def closed_over(array: Any) -> Any:
        with lock:
            return array

    image = ci.map_cells(
        closed_over if what == "function" else locked,
        np.zeros(2),
        params=None if what == "function" else {"lock": lock},
        dtype=float,
        queue=queue,
    )
    name = "closed_over" if what == "function" else "locked"
    with pytest.raises(ci.CellimgError, match=rf"{name} cannot be sent.*pickle '_thread.lock'"):
        in_time(lambda: image[...])
    np.testing.assert_array_equal(in_time(lambda: numbers(queue)[...]), range(4))


@pytest.fixture
def only_here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that no other process can import, with a function."""
    module = types.ModuleType("module_of_this_process")
    exec("def known_here(array=None): return array", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@ON_CRASH
def test_what_cannot_be_imported_there_is_said(
    queue: ci.BlockQueue, in_time: Any, only_here: Any
) -> None:
    image = ci.map_cells(only_here.known_here, np.zeros(2), dtype=float, queue=queue)
    with pytest.raises(ci.CellimgError, match=r"known_here.*No module named"):
        in_time(lambda: image[...])
    np.testing.assert_array_equal(in_time(lambda: numbers(queue)[...]), range(4))


@ON_CRASH
@pytest.mark.parametrize(
    ("crash", "how"),
    [
        (lambda: os._exit(7), "exit status 7"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
    ],
    ids=["exit", "segfault"],
)
def test_a_crash_costs_its_cell_only(
    make_queue: Make, backend: str, in_time: Any, crash: Any, how: str
) -> None:
    def fragile(block: ci.Block) -> None:
        if block.index == 2:
            crash()
        block.data[...] = block.index

    queue = make_queue()
    image = numbers(queue, 4, fragile)
    with pytest.raises(ci.WorkerDiedError, match=r"fragile at cell \(2,\) \[2:3\].*died") as got:
        in_time(lambda: image[...])
    assert got.value.position == (2,)
    assert got.value.roi == ci.Roi((2,), (3,))
    if backend == "processes":
        assert how in str(got.value)
    assert image.peek(2) is None
    np.testing.assert_array_equal(in_time(lambda: image[:2]), [0, 1])
    np.testing.assert_array_equal(in_time(lambda: image[3:]), [3])
    np.testing.assert_array_equal(in_time(lambda: numbers(queue)[...]), range(4))


# ---------------------------------------------------------------------------- init


@pytest.mark.parametrize("form", ["code", "global", "mapping"])
def test_names_of_init_are_seen_by_all_blocks(make_queue: Make, in_time: Any, form: str) -> None:
    def declares() -> None:
        global scale_of_init
        scale_of_init = 3

    def returns() -> dict[str, int]:
        return {"scale_of_init": 3}

    init = {"code": "scale_of_init = 3", "global": declares, "mapping": returns}[form]

    def by_name(array: Any) -> Any:
        return array * scale_of_init  # type: ignore[name-defined]

    def by_name_inside(array: Any) -> Any:
        return np.array([n * scale_of_init for n in array])  # type: ignore[name-defined]

    def by_worker(array: Any) -> Any:
        return array * ci.get_worker().namespace["scale_of_init"]

    queue = make_queue(2, init)
    row = np.arange(6)
    for function in (by_name, by_name_inside, by_worker):
        image = ci.map_cells(function, row, dtype=int, cell_shape=2, queue=queue)
        np.testing.assert_array_equal(in_time(lambda: image[...]), 3 * row)  # noqa: B023
    code = ci.BlockCode(
        "block.data[...] = scale_of_init * block.inputs[0] + one", init="one = scale_of_init - 2"
    )
    image = ci.fill_cells(code, ci.CellGrid((6,), 4), row, dtype=int, queue=queue)
    np.testing.assert_array_equal(in_time(lambda: image[...]), 3 * row + 1)
    globals().pop("scale_of_init", None)


def test_two_queues_keep_their_names_apart(make_queue: Make, in_time: Any) -> None:
    def scaled_by_init(array: Any) -> Any:
        return array * scale  # type: ignore[name-defined]  # noqa: F821

    code = ci.BlockCode("block.data[...] = scale * block.inputs[0]")
    for factor in (2, 5):
        queue = make_queue(2, f"scale = {factor}")
        image = ci.map_cells(scaled_by_init, np.arange(4), dtype=int, cell_shape=1, queue=queue)
        np.testing.assert_array_equal(in_time(lambda: image[...]), factor * np.arange(4))  # noqa: B023
        filled = ci.fill_cells(code, ci.CellGrid((4,), 1), np.arange(4), dtype=int, queue=queue)
        np.testing.assert_array_equal(in_time(lambda: filled[...]), factor * np.arange(4))  # noqa: B023


def test_outside_a_block_there_is_no_worker(queue: ci.BlockQueue) -> None:
    with pytest.raises(RuntimeError, match="no BlockQueue runs this"):
        ci.get_worker()


def workers_in(log: Any, backend: str) -> dict[Any, list[str]]:
    """What each worker added: a thread, or a process."""
    return log.by_worker() if backend == "threads" else log.by_process()


def noting(word: str = "block") -> Callable[[ci.Block], None]:
    """A function that uses the name ``add`` of init."""

    def note(block: ci.Block) -> None:
        add(word)  # type: ignore[name-defined]  # noqa: F821
        block.data[...] = block.index

    return note


def test_init_runs_once_on_each_worker_before_its_first_block(
    make_queue: Make, backend: str, log: Any, in_time: Any
) -> None:
    queue = make_queue(2, log.code + "add('init')")
    # At once, so that what is wrong is known at once.
    assert log.first_words() == ["init", "init"]
    for word in ("first", "second"):
        in_time(np.asarray, numbers(queue, 8, noting(word)))
    workers = workers_in(log, backend)
    assert len(workers) == 2
    for words in workers.values():
        assert words[0] == "init"
        assert set(words[1:]) <= {"first", "second"}
    assert log.first_words().count("first") == log.first_words().count("second") == 8


def test_init_does_not_run_again_for_a_block_that_reads_an_image(
    make_queue: Make, backend: str, log: Any, in_time: Any
) -> None:
    queue = make_queue(2, log.code + "add('init')")
    lower = numbers(queue, 4, noting("lower"))

    def read(block: ci.Block) -> None:
        add("upper")  # type: ignore[name-defined]  # noqa: F821
        block.data[...] = lower[3 - block.index] + 1

    np.testing.assert_array_equal(in_time(lambda: numbers(queue, 4, read)[...]), [4, 3, 2, 1])
    for words in workers_in(log, backend).values():
        assert words[0] == "init"
        assert "init" not in words[1:]


@ON_CRASH
def test_init_runs_again_on_a_worker_that_was_started_again(
    make_queue: Make, log: Any, in_time: Any, kill_workers: Any
) -> None:
    queue = make_queue(2, log.code + "add('init')")
    in_time(lambda: numbers(queue, 4, noting())[...])
    before = set(log.by_process())
    kill_workers(queue)
    np.testing.assert_array_equal(in_time(lambda: numbers(queue, 8, noting())[...]), range(8))
    new = {pid: words for pid, words in log.by_process().items() if pid not in before}
    assert new
    for words in new.values():
        assert words[0] == "init"
        assert set(words[1:]) == {"block"}


@pytest.mark.parametrize("form", ["code", "callable", "sys.exit"])
def test_init_that_fails_is_an_error_at_once(make_queue: Make, in_time: Any, form: str) -> None:
    def fail() -> None:
        raise LookupError("no gpu")

    init: Any = fail
    if form == "code":
        init = "raise LookupError('no gpu')"
    elif form == "sys.exit":
        init = "import sys; sys.exit('no gpu')"
    for _ in range(2):
        with pytest.raises(ci.InitError, match="no gpu"):
            in_time(make_queue, 2, init)


def test_init_that_fails_on_one_worker_only(make_queue: Make, in_time: Any, tmp_path: Path) -> None:
    first = str(tmp_path / "first")
    init = f"import os\nos.close(os.open({first!r}, os.O_CREAT | os.O_EXCL))"
    with pytest.raises(ci.InitError, match="FileExistsError"):
        in_time(make_queue, 2, init)


@PROCESSES
def test_a_crash_in_init(make_queue: Make, in_time: Any) -> None:
    with pytest.raises(ci.InitError, match="exit status 3"):
        in_time(make_queue, 2, "import os; os._exit(3)")


@ON_CRASH
def test_init_that_cannot_be_sent(make_queue: Make, in_time: Any) -> None:
    lock = threading.Lock()

    def init() -> None:
        lock.acquire()

    with pytest.raises(ci.InitError, match="init cannot be sent"):
        in_time(make_queue, 2, init)


@ON_CRASH
def test_init_that_cannot_be_imported_there(make_queue: Make, in_time: Any, only_here: Any) -> None:
    with pytest.raises(ci.InitError, match=r"init could not be read.*No module named"):
        in_time(make_queue, 2, only_here.known_here)


@ON_CRASH
def test_no_block_runs_on_a_later_worker_whose_init_fails(
    make_queue: Make, log: Any, in_time: Any, kill_workers: Any, tmp_path: Path
) -> None:
    flag = tmp_path / "no licence"
    init = (
        log.code
        + f"add('init')\nif os.path.exists({str(flag)!r}): raise RuntimeError('no licence')"
    )
    queue = make_queue(2, init)
    note = log.add

    def fill(block: ci.Block) -> None:
        note("block")
        block.data[...] = block.index

    np.testing.assert_array_equal(in_time(lambda: numbers(queue, 4, fill)[...]), range(4))
    flag.touch()
    kill_workers(queue)
    image = numbers(queue, 4, fill)
    for _ in range(2):
        with pytest.raises(ci.InitError, match="no licence"):
            in_time(lambda: image[...])
    with pytest.raises(ci.InitError, match="no licence"):
        in_time(lambda: image.to_dask().compute(scheduler="threads"))
    assert log.first_words().count("block") == 4
    assert [image.peek(index) for index in range(4)] == [None] * 4
    flag.unlink()
    np.testing.assert_array_equal(
        in_time(lambda: numbers(make_queue(2, init), 4, fill)[...]), range(4)
    )


# ---------------------------------------------------------------------------- pickled


def test_an_image_that_travels_runs_init_where_it_arrives(
    make_queue: Make, log: Any, in_time: Any
) -> None:
    queue = make_queue(2, log.code + "add('init')")
    image = numbers(queue, 4, noting())
    before = set(log.by_process())
    with dask.config.set({"multiprocessing.initializer": None}):
        got = in_time(lambda: image.to_dask().compute(scheduler="processes", num_workers=1))
    np.testing.assert_array_equal(got, range(4))
    there = {pid: words for pid, words in log.by_process().items() if pid not in before}
    assert [words for words in there.values() if words[0] != "init"] == []
    assert sum(words.count("block") for words in there.values()) == 4
    assert all(words.count("init") == 1 for words in there.values())


def test_a_queue_that_arrived_runs_blocks_where_it_is(
    make_queue: Make, in_time: Any, log: Any
) -> None:
    queue = make_queue(2, log.code + "add('init')\nscale = 3")
    image = ci.map_cells(
        lambda a: a * scale,  # type: ignore[name-defined]  # noqa: F821
        np.arange(4),
        dtype=int,
        cell_shape=2,
        queue=queue,
    )
    # With the queue closed: nothing of it is needed.
    again = pickle.loads(cloudpickle.dumps(image))
    queue.close()
    np.testing.assert_array_equal(in_time(lambda: again[...]), 3 * np.arange(4))
    assert log.first_words() == ["init"] * 3


# ---------------------------------------------------------------------------- closing


def test_closing_turns_away_who_waits_and_lets_end_what_runs(
    make_queue: Make, backend: str, gate: Any, begin: Begin, until: Any, pending: Any
) -> None:
    hold = gate.hold

    def fill(block: ci.Block) -> None:
        hold()
        block.data[...] = 7

    queue = make_queue()
    image = numbers(queue, 5, fill)
    running = [begin(image.load, index) for index in range(2)]
    gate.wait_for(2)
    waiting = [begin(image.load, index) for index in range(2, 5)]
    until(lambda: pending(queue) == 3)
    closing = begin(queue.close)
    for reader in waiting:
        with pytest.raises(ci.QueueClosedError):
            reader.result(PATIENCE_S)
    if backend == "distributed":
        # The cluster goes on, nobody waits for it. Asked before there is anything to return.
        for reader in running:
            with pytest.raises(ci.QueueClosedError):
                reader.result(PATIENCE_S)
    gate.open()
    closing.result(PATIENCE_S)
    if backend != "distributed":
        for reader in running:
            np.testing.assert_array_equal(reader.result(PATIENCE_S), [7])


def test_a_closed_queue_refuses(make_queue: Make, in_time: Any) -> None:
    queue = make_queue()
    image = numbers(queue)
    np.testing.assert_array_equal(in_time(lambda: image[:2]), [0, 1])
    assert not queue.closed
    queue.close()
    queue.close()
    assert queue.closed
    assert "closed" in repr(queue)
    # What was computed is there.
    np.testing.assert_array_equal(image[:2], [0, 1])
    with pytest.raises(ci.QueueClosedError):
        in_time(lambda: image[...])
    with pytest.raises(ci.QueueClosedError):
        in_time(lambda: image.to_dask().compute(scheduler="threads"))
    with pytest.raises(ci.QueueClosedError):
        image.prefetch().result(PATIENCE_S)
    with pytest.raises(ci.QueueClosedError):
        numbers(queue)


def test_a_queue_is_closed_at_the_end_of_its_with(make_queue: Make) -> None:
    with make_queue() as queue:
        np.testing.assert_array_equal(numbers(queue)[...], range(4))
    assert queue.closed
    with pytest.raises(LookupError), make_queue() as queue:
        raise LookupError
    assert queue.closed


@PROCESSES
def test_closing_at_once_kills_what_never_ends(
    make_queue: Make, gate: Any, begin: Begin, in_time: Any
) -> None:
    hold = gate.hold
    queue = make_queue()
    pids = queue.blocks.pids  # type: ignore[union-attr]
    reader = begin(lambda: numbers(queue, 6, lambda block: hold())[...])
    gate.wait_for(2)
    in_time(queue.close, 0)
    with pytest.raises(ci.QueueClosedError):
        reader.result(PATIENCE_S)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@PROCESSES
def test_closing_at_once_while_a_worker_starts_again(
    make_queue: Make, make_gate: Any, begin: Begin, in_time: Any, kill_workers: Any, tmp_path: Path
) -> None:
    hold = make_gate()
    wait_in_init = tmp_path / "wait"
    prepare = cloudpickle.dumps(hold.hold)
    init = (
        f"import os, pickle\nif os.path.exists({str(wait_in_init)!r}): pickle.loads({prepare!r})()"
    )
    queue = make_queue(1, init)
    wait_in_init.touch()
    kill_workers(queue)
    reader = begin(np.asarray, numbers(queue, 1))
    hold.wait_for(1)
    in_time(queue.close, 0)
    with pytest.raises(ci.QueueClosedError):
        reader.result(PATIENCE_S)


@THREADS
def test_threads_that_cannot_be_killed_end_with_their_blocks(
    make_queue: Make, gate: Any, begin: Begin, in_time: Any, until: Any
) -> None:
    hold = gate.hold
    before = set(threading.enumerate())
    queue = make_queue()
    reader = begin(lambda: numbers(queue, 2, lambda block: hold())[...])
    gate.wait_for(2)
    with pytest.raises(TimeoutError, match="a block still runs"):
        in_time(queue.close, 0)
    gate.open()
    np.testing.assert_array_equal(reader.result(PATIENCE_S), [0, 0])
    until(lambda: set(threading.enumerate()) <= before)


@THREADS
def test_a_block_whose_reader_was_interrupted_still_counts_as_running(
    make_queue: Make, gate: Any, interrupt_when: Any, in_time: Any
) -> None:
    hold = gate.hold
    queue = make_queue(1)
    with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: gate.wait_for(1)):
        numbers(queue, 1, lambda block: hold())[...]
    with pytest.raises(TimeoutError, match="a block still runs"):
        in_time(queue.close, 0)


def test_an_unclosed_queue_is_closed_when_nobody_has_it(
    backend: str, request: pytest.FixtureRequest
) -> None:
    where = request.getfixturevalue("client") if backend == "distributed" else backend
    queue = ci.BlockQueue(2, backend=where)
    np.testing.assert_array_equal(numbers(queue)[...], range(4))
    held = [queue]
    del queue
    with pytest.warns(ResourceWarning, match="not closed"):
        held.clear()


# ---------------------------------------------------------------------------- interrupts, order


@pytest.fixture
def interrupt_when(begin: Begin) -> Iterator[Callable[[Callable[[], None]], Any]]:
    """Press Ctrl-C, as it were, while the main thread is inside."""
    interrupts: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if interrupts:
            interrupts.clear()
            raise KeyboardInterrupt

    @contextmanager
    def interrupted(ready: Callable[[], None]) -> Iterator[None]:
        over = threading.Event()

        def press() -> None:
            ready()
            interrupts.append(signal.SIGINT)
            # Python overlooks a signal that comes just before it begins to wait for a lock.
            while not over.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                over.wait(0.1)

        pressed = begin(press)
        try:
            yield
        finally:
            over.set()
            pressed.result(PATIENCE_S)

    before = signal.signal(signal.SIGINT, on_signal)
    yield interrupted
    signal.signal(signal.SIGINT, before)


def test_after_an_interrupt_the_queue_goes_on(
    make_queue: Make, gate: Any, interrupt_when: Any, in_time: Any
) -> None:
    queue = make_queue()
    image = numbers(queue, 2, gate.fill)
    with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: gate.wait_for(1)):
        # One cell, so that no other thread has to end its own first.
        image[:1]
    gate.open()
    np.testing.assert_array_equal(in_time(lambda: image[...]), [0, 1])
    np.testing.assert_array_equal(in_time(lambda: numbers(queue, 8)[...]), range(8))


@ON_CRASH
def test_workers_lost_in_the_middle_of_a_read(
    make_queue: Make, backend: str, gate: Any, begin: Begin, in_time: Any, kill_workers: Any
) -> None:
    queue = make_queue()
    image = numbers(queue, 6, gate.fill)
    reader = begin(lambda: image[...])
    gate.wait_for(2)
    kill_workers(queue)
    gate.open()
    # Not their fault: they are given to others.
    np.testing.assert_array_equal(reader.result(PATIENCE_S), range(6))
    np.testing.assert_array_equal(in_time(lambda: image[...]), range(6))


def test_what_somebody_waits_for_goes_before_a_prefetch(
    make_queue: Make, backend: str, gate: Any, log: Any, begin: Begin, until: Any, pending: Any
) -> None:
    hold, add = gate.hold, log.add
    # A scheduler gives something to each worker, and no more than it has to, if there are more
    # than two for each.
    workers, several = (2, 5) if backend == "distributed" else (1, 1)
    queue = make_queue(workers)
    image = numbers(queue, several + 1, lambda block: add("foreground"))
    # So that a cluster has its definition.
    image.load(several)
    held = begin(lambda: numbers(queue, several, lambda block: hold())[...])
    gate.wait_for(workers)
    background = numbers(queue, 12, lambda block: add("background")).prefetch()
    # On this machine as many as there are threads that prefetch.
    ahead = several - workers + {"threads": 1, "processes": 2, "distributed": 12}[backend]
    until(lambda: pending(queue) == ahead)
    foreground = begin(lambda: image[:several])
    until(lambda: pending(queue) == ahead + several)
    gate.open()
    for future in (held, foreground, background):
        future.result(PATIENCE_S)
    ahead_of_it = 0
    for words in log.by_worker().values():
        if "foreground" in words:
            # Each by itself: while one comes to its last, others may have done the rest.
            last = len(words) - words[::-1].index("foreground")
            ahead_of_it += words[:last].count("background")
    assert ahead_of_it <= (2 * workers if backend == "distributed" else 0)


@THREADS
def test_a_block_may_read_what_somebody_else_waits_to_compute(
    make_queue: Make, begin: Begin, pending: Any, until: Any
) -> None:
    queue = make_queue(1)
    lower = numbers(queue, 1)
    running, go = threading.Event(), threading.Event()

    def read(block: ci.Block) -> None:
        running.set()
        assert go.wait(PATIENCE_S)
        block.data[...] = lower[0] + 1

    upper = begin(lambda: numbers(queue, 1, read)[...])
    assert running.wait(PATIENCE_S)
    # Its cell is under way, but the only worker is the one that is going to read it.
    other = begin(lambda: lower[...])
    until(lambda: pending(queue) == 1)
    go.set()
    np.testing.assert_array_equal(upper.result(20), [1])
    np.testing.assert_array_equal(other.result(20), [0])


@THREADS
def test_blocks_that_read_images_do_not_wait_for_each_others_helpers(
    make_queue: Make, begin: Begin
) -> None:
    # Two workers, each of which reads many cells of one image: nobody may end up waiting for a
    # worker on behalf of a block that a worker waits for.
    queue = make_queue(2)
    lower = ci.map_cells(
        lambda a: ndi.median_filter(a, 9),
        np.zeros((60, 60)),
        cell_shape=6,
        dtype=float,
        queue=queue,
    )
    meet = threading.Barrier(2)

    def read(block: ci.Block) -> None:
        meet.wait(PATIENCE_S)
        block.data[...] = int(lower[...].sum())

    readers = [begin(np.asarray, numbers(queue, 1, read)) for _ in range(2)]
    for reader in readers:
        np.testing.assert_array_equal(reader.result(20), [0])


# ---------------------------------------------------------------------------- nothing is left


def computing(make_queue: Make, **_: Any) -> None:
    with make_queue() as queue:
        np.testing.assert_array_equal(numbers(queue)[...], range(4))
        grown = ci.map_cells(
            lambda a: a + 1, np.zeros((99, 999)), dtype=float, cell_shape=(40, 999), queue=queue
        )
        np.testing.assert_array_equal(grown[...], 1)


def failing_block(make_queue: Make, **_: Any) -> None:
    def fail(block: ci.Block) -> None:
        raise ValueError("bad plane")

    with make_queue(1) as queue, pytest.raises(ci.BlockError):
        numbers(queue, 4, fail)[...]


def failing_init(make_queue: Make, **_: Any) -> None:
    with pytest.raises(ci.InitError):
        make_queue(1, "raise ValueError('no gpu')")


def interrupted(make_queue: Make, make_gate: Any, interrupt_when: Any, **_: Any) -> None:
    gate = make_gate()
    hold = gate.hold
    with make_queue(1) as queue:
        with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: gate.wait_for(1)):
            numbers(queue, 1, lambda block: hold())[...]
        gate.open()
    gate.close()


def closed_under_way(
    make_queue: Make, make_gate: Any, begin: Begin, until: Any, pending: Any, **_: Any
) -> None:
    gate = make_gate()
    hold = gate.hold
    queue = make_queue()
    image = numbers(queue, 6, lambda block: hold())
    readers = [begin(image.load, index) for index in range(6)]
    gate.wait_for(2)
    until(lambda: pending(queue) >= 1)
    closing = begin(queue.close)
    until(lambda: queue.closed)
    gate.open()
    closing.result(PATIENCE_S)
    for reader in readers:
        assert reader.exception(PATIENCE_S) is None or isinstance(
            reader.exception(), ci.QueueClosedError
        )
    gate.close()


def crashing(make_queue: Make, backend: str, **_: Any) -> None:
    if backend != "processes":
        return
    with make_queue(1, crash_retries=0) as queue:
        with pytest.raises(ci.WorkerDiedError):
            numbers(queue, 1, lambda block: os._exit(1))[...]
        np.testing.assert_array_equal(numbers(queue)[...], range(4))
    with pytest.raises(ci.InitError):
        make_queue(1, "import os; os._exit(1)")


@pytest.mark.parametrize(
    "use", [computing, failing_block, failing_init, interrupted, closed_under_way, crashing]
)
def test_nothing_is_left_however_often(
    make_queue: Make,
    make_gate: Any,
    backend: str,
    interrupt_when: Any,
    begin: Begin,
    until: Any,
    pending: Any,
    footprint: Any,
    use: Any,
) -> None:
    def once() -> None:
        use(
            make_queue=make_queue,
            make_gate=make_gate,
            backend=backend,
            interrupt_when=interrupt_when,
            begin=begin,
            until=until,
            pending=pending,
        )
        gc.collect()

    once()
    # Threads of the test that have set their result end by themselves.
    until(lambda: not [t for t in threading.enumerate() if t.name == "test"])
    before = footprint()
    # What is left behind once shows; only threads are cheap.
    for _ in range(5 if backend == "threads" else 1):
        once()
    until(lambda: not [t for t in threading.enumerate() if t.name == "test"])
    after = footprint()
    if backend == "distributed":
        # Its connections come and go.
        before.pop("descriptors")
        after.pop("descriptors")
    assert after == before


# ---------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_workers": 0}, ValueError, "num_workers"),
        ({"num_workers": -1}, ValueError, "num_workers"),
        ({"num_workers": 1.5}, TypeError, "num_workers"),
        ({"num_workers": "2"}, TypeError, "num_workers"),
        ({"init": 3}, TypeError, r"init must be code .* or a callable .*, got int"),
        ({"init": b"x = 1"}, TypeError, "got bytes"),
        ({"init": "x = ("}, SyntaxError, None),
        ({"backend": "process"}, ValueError, '"threads", "processes"'),
        ({"backend": ""}, ValueError, '"threads", "processes"'),
        ({"backend": 3}, TypeError, '"threads", "processes".*got int'),
        ({"block_timeout_s": 1}, TypeError, "a thread cannot be killed"),
        ({"backend": "processes", "block_timeout_s": 0}, ValueError, "more than 0"),
        ({"backend": "processes", "block_timeout_s": "1"}, TypeError, "seconds"),
        ({"crash_retries": -1}, ValueError, "crash_retries"),
        ({"backend": "tcp://127.0.0.1:9", "on_update": print}, TypeError, "on_update is for"),
        ({"on_update": 3}, TypeError, "on_update must be callable, got int"),
        ({"env": "/opt/venv"}, TypeError, r"env must be an Env, got str"),
        ({"max_bytes": 1}, TypeError, "max_bytes is for clusters"),
        ({"backend": "processes", "max_bytes": 1}, TypeError, 'backend="processes"'),
        ({"resources": {"GPU": 1}}, TypeError, "resources is for clusters"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, message: str | None) -> None:
    with pytest.raises(error, match=message):
        ci.BlockQueue(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_bytes": -1}, ValueError, "max_bytes"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes"),
        ({"max_bytes": "1 GB"}, TypeError, "max_bytes"),
        ({"timeout_s": 0}, ValueError, "timeout_s must be above 0"),
        ({"timeout_s": -1}, ValueError, "timeout_s must be above 0"),
        ({"timeout_s": float("nan")}, ValueError, "timeout_s must be above 0"),
        ({"timeout_s": "60"}, TypeError, "timeout_s"),
        ({"resources": {"GPU": 1}, "timeout_s": 0.1}, ci.NoWorkersError, "GPU"),
        ({"resources": ["GPU"]}, TypeError, "resources"),
        ({"resources": {"GPU": "1"}}, TypeError, "resources"),
        ({"num_workers": 3, "timeout_s": 0.1}, ci.NoWorkersError, "2 of 3 workers"),
    ],
)
def test_bad_arguments_for_a_cluster(
    client: Any, arguments: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        ci.BlockQueue(backend=client, **arguments)


@pytest.mark.parametrize("queue", ["threads", 2, object()])
def test_an_image_takes_a_queue_only(queue: Any) -> None:
    with pytest.raises(TypeError, match="queue must be a BlockQueue"):
        numbers(queue)


@LOCAL
def test_by_default_there_is_a_worker_for_each_core(backend: str) -> None:
    with ci.BlockQueue(backend=backend) as queue:
        assert queue.num_workers == len(os.sched_getaffinity(0))
        assert queue.backend == backend
        assert repr(queue) == f"BlockQueue({queue.num_workers}, backend={backend!r})"
    assert repr(queue) == f"BlockQueue({queue.num_workers}, backend={backend!r}, closed)"


class Clipped:
    """A callable of the user's, with an attribute that is called as one of the library's is."""

    bound = 3

    def __call__(self, block: ci.Block) -> None:
        block.data[...] = min(block.index, self.bound)


def test_attributes_of_a_users_callable_are_the_users(make_queue: Make) -> None:
    queue = make_queue(init="factor = 2")
    image = ci.fill_cells(Clipped(), ci.CellGrid((6,), (1,)), dtype=int, queue=queue)
    np.testing.assert_array_equal(image[...], [0, 1, 2, 3, 3, 3])
