"""What only a cluster has: results that stay on the workers, several clients, workers that go."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci
from cellimg_dask.queues import cluster as implementation

distributed = pytest.importorskip("distributed")

Begin = Callable[..., Future[Any]]
Until = Callable[[Callable[[], object]], None]

PATIENCE_S = 20
"""What takes longer hangs."""

CELL = (4, 4)
REGION = np.s_[0:16, 0:16]
"""Sixteen cells."""
BELOW = np.s_[4:20, 0:16]
"""The same, a row of cells further down."""


# ---------------------------------------------------------------------------- clusters


def start_cluster(num_workers: int = 2, **options: Any) -> Any:
    # An address of its own for the dashboard: the usual one may be somebody else's.
    return distributed.LocalCluster(
        n_workers=num_workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        silence_logs=50,
        **options,
    )


def connect(cluster: Any) -> Any:
    return distributed.Client(cluster.scheduler_address, set_as_default=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers for all who do them no harm."""
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Any) -> Iterator[Any]:
    """A client that is nobody's default."""
    with connect(cluster) as client:
        yield client


@pytest.fixture
def make_client() -> Iterator[Callable[..., Any]]:
    """Start clusters for one test, that blames a task for the first death of a worker."""
    made: list[Any] = []

    def make(num_workers: int = 2, **options: Any) -> Any:
        options = {"scheduler_kwargs": {"allowed_failures": 0}, **options}
        made.append(start_cluster(num_workers, **options))
        made.append(connect(made[-1]))
        made[-1].started_with = made[-2]
        return made[-1]

    yield make
    for item in reversed(made):
        item.close()


@pytest.fixture
def make_queue(client: Any) -> Iterator[Callable[..., ci.BlockQueue]]:
    """Make queues on the shared cluster, or on another one's client."""
    made: list[ci.BlockQueue] = []

    def make(
        backend: Any = None, num_workers: int = 1, init: Any = None, **options: Any
    ) -> ci.BlockQueue:
        backend = client if backend is None else backend
        made.append(ci.BlockQueue(num_workers, init, backend, **options))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


@pytest.fixture
def queue(make_queue: Any) -> ci.BlockQueue:
    return make_queue()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Have small reads do what large ones do: look at a few cells, then send batches."""
    monkeypatch.setattr(implementation, "_FEW_CELLS", 4)
    # However slow the machine is at the moment.
    monkeypatch.setattr(implementation, "_WORTH_A_KEY_S", 10.0)
    return 4


@pytest.fixture
def source(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 1000, (32, 32))


@pytest.fixture
def expected(source: np.ndarray) -> np.ndarray:
    return ndi.maximum_filter(source, 3)


def held(queue: ci.BlockQueue) -> Any:
    return queue.cells.held  # type: ignore[union-attr]


def known_keys(client: Any) -> dict[Any, str]:
    """Return what the scheduler knows, and in which state it is."""

    def states(dask_scheduler: Any) -> dict[Any, str]:
        return {key: task.state for key, task in dask_scheduler.tasks.items()}

    return client.run_on_scheduler(states)


def cells_known(client: Any) -> dict[Any, str]:
    return {key: state for key, state in known_keys(client).items() if isinstance(key, tuple)}


def forget_here(*images: ci.CellImg) -> None:
    """Empty the cache in front of the cluster."""
    for image in images:
        image.loader.shelf.invalidate(None)


def counts(log: Any) -> Counter[str]:
    return Counter(log.first_words())


def cells(image: ci.CellImg, region: Any, grow: int = 0) -> set[str]:
    """Return the cells that meet a region, as a log has them."""
    roi = ci.Roi([s.start for s in region], [s.stop for s in region])
    return {str(cell.index) for cell in image.grid.cells_in(roi.grow(ci.Halo.of(grow, roi.ndim)))}


def once(found: set[str]) -> Counter[str]:
    return Counter(dict.fromkeys(found, 1))


def maximum(
    log: Any, source: Any, queue: ci.BlockQueue | None, cell: Any = CELL, **options: Any
) -> ci.CellImg:
    """A maximum filter that says which cells it computes; exact with any border."""
    add = log.add

    def fill(block: ci.Block) -> None:
        add(block.index)
        block.data[...] = ndi.maximum_filter(block.inputs[0], 3)[block.halo]

    grid = ci.CellGrid(source.shape, cell)
    return ci.fill_cells(fill, grid, source, dtype=source.dtype, halo=1, queue=queue, **options)


def numbers(queue: ci.BlockQueue | None, count: int, function: Any = None) -> ci.CellImg:
    """An image of cells with a voxel each, numbered, or what ``function`` fills in."""

    def number(block: ci.Block) -> None:
        block.data[...] = block.index

    return ci.fill_cells(function or number, ci.CellGrid((count,), 1), dtype=int, queue=queue)


# ---------------------------------------------------------------------------- interactive


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_region_of_sixteen_cells_read_again_is_not_computed_again(
    queue: ci.BlockQueue, log: Any, rng: np.random.Generator, ndim: int
) -> None:
    volume = rng.integers(0, 1000, {1: (70,), 2: (19, 20), 3: (5, 7, 20)}[ndim])
    cell = {1: 4, 2: (5, 5), 3: (3, 4, 4)}[ndim]
    region = {1: np.s_[3:63], 2: np.s_[0:19, 2:20], 3: np.s_[1:4, 2:6, 3:16]}[ndim]
    image = maximum(log, volume, queue, cell)
    for _ in range(3):
        np.testing.assert_array_equal(image[region], ndi.maximum_filter(volume, 3)[region])
        ci.get_cache().clear()
    box = region if ndim > 1 else (region,)
    assert len(cells(image, box)) == 16
    assert counts(log) == once(cells(image, box))


def test_shifted_by_a_row_only_the_new_cells_are_computed(
    queue: ci.BlockQueue, log: Any, source: np.ndarray, expected: np.ndarray
) -> None:
    image = maximum(log, source, queue)
    np.testing.assert_array_equal(image[REGION], expected[REGION])
    assert len(counts(log)) == 16
    ci.get_cache().clear()
    np.testing.assert_array_equal(image[BELOW], expected[BELOW])
    assert counts(log) == once(cells(image, REGION) | cells(image, BELOW))
    assert len(counts(log)) == 20


def test_an_image_without_a_cache_here_is_held_there(
    queue: ci.BlockQueue, log: Any, source: np.ndarray, expected: np.ndarray
) -> None:
    image = maximum(log, source, queue, cache=None)
    for _ in range(2):
        np.testing.assert_array_equal(image[REGION], expected[REGION])
        np.testing.assert_array_equal(image.load((1, 1)), expected[4:8, 4:8])
    assert counts(log) == once(cells(image, REGION))
    assert image.peek((1, 1)) is None


def test_a_prefetch_and_single_cells_use_what_is_held(
    queue: ci.BlockQueue, log: Any, source: np.ndarray, expected: np.ndarray
) -> None:
    image = maximum(log, source, queue)
    image.prefetch(REGION).result(PATIENCE_S)
    forget_here(image)
    np.testing.assert_array_equal(image.load((2, 1)), expected[8:12, 4:8])
    image.prefetch(BELOW).result(PATIENCE_S)
    np.testing.assert_array_equal(image[BELOW], expected[BELOW])
    assert counts(log) == once(cells(image, REGION) | cells(image, BELOW))


def test_a_second_client_computes_nothing_again(
    cluster: Any,
    make_queue: Any,
    log: Any,
    source: np.ndarray,
    expected: np.ndarray,
) -> None:
    mine = maximum(log, source, make_queue())
    np.testing.assert_array_equal(mine[REGION], expected[REGION])
    with connect(cluster) as second:
        theirs = maximum(log, source, make_queue(second))
        assert theirs.loader is not mine.loader
        np.testing.assert_array_equal(theirs[REGION], expected[REGION])
        np.testing.assert_array_equal(theirs[BELOW], expected[BELOW])
        # What the one who asked first lets go stays for the other.
        del mine
        gc.collect()
        forget_here(theirs)
        np.testing.assert_array_equal(theirs[REGION], expected[REGION])
    assert counts(log) == once(cells(theirs, REGION) | cells(theirs, BELOW))


ELSEWHERE = """
    import sys

    import distributed
    import numpy as np

    import cellimg_dask as ci
    from {module} import define

    if __name__ == "__main__":
        with (
            distributed.Client({address!r}, set_as_default=False) as client,
            ci.BlockQueue(backend=client) as queue,
        ):
            np.save({result!r}, define(queue)[0:16, 0:16])
"""

DEFINITIONS = {
    "code": """
        import numpy as np
        import cellimg_dask as ci

        CODE = {log_code!r}

        def define(queue):
            code = ci.BlockCode(
                "add(block.index); block.data[...] = block.inputs[0] * 3", init=CODE
            )
            source = np.arange(1024).reshape(32, 32)
            grid = ci.CellGrid((32, 32), (4, 4))
            return ci.fill_cells(code, grid, source, dtype=int, queue=queue)
    """,
    "function": """
        import numpy as np
        import cellimg_dask as ci

        exec({log_code!r})

        def tripled(block):
            add(block.index)
            block.data[...] = block.inputs[0] * 3

        def define(queue):
            source = np.arange(1024).reshape(32, 32)
            grid = ci.CellGrid((32, 32), (4, 4))
            return ci.fill_cells(tripled, grid, source, dtype=int, queue=queue)
    """,
}


@pytest.mark.parametrize("kind", ["code", "function"])
def test_a_client_in_another_process_computes_nothing_again(
    client: Any,
    cluster: Any,
    queue: ci.BlockQueue,
    log: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
) -> None:
    module = f"defines_an_image_by_{kind}"
    path = tmp_path / f"{module}.py"
    path.write_text(textwrap.dedent(DEFINITIONS[kind]).format(log_code=log.code))
    monkeypatch.syspath_prepend(tmp_path)
    client.upload_file(str(path))
    image = importlib.import_module(module).define(queue)
    request.addfinalizer(lambda: sys.modules.pop(module))
    tripled = 3 * np.arange(1024).reshape(32, 32)
    np.testing.assert_array_equal(image[REGION], tripled[REGION])

    result = tmp_path / "result.npy"
    program = tmp_path / "elsewhere.py"
    program.write_text(
        textwrap.dedent(ELSEWHERE).format(
            module=module, address=cluster.scheduler_address, result=str(result)
        )
    )
    subprocess.run([sys.executable, str(program)], check=True, timeout=PATIENCE_S)
    np.testing.assert_array_equal(np.load(result), tripled[REGION])
    assert counts(log) == once(cells(image, REGION))


def kill_a_worker(client: Any, until: Until) -> int:
    """Kill a worker, wait until the scheduler knows, and return its process id."""
    address, victim = next(iter(client.run(os.getpid).items()))
    os.kill(victim, signal.SIGKILL)
    # Whoever asks a dead worker before the scheduler knows tries for half a minute.
    until(lambda: address not in client.scheduler_info(n_workers=-1)["workers"])
    return int(victim)


def test_a_lost_worker_costs_its_cells_only(
    make_client: Any,
    make_queue: Any,
    log: Any,
    source: np.ndarray,
    expected: np.ndarray,
    until: Until,
) -> None:
    # The scheduler computes again by itself what is wanted and was lost.
    client = make_client()
    image = maximum(log, source, make_queue(client, 2), cache=None)
    np.testing.assert_array_equal(image[REGION], expected[REGION])
    by_process = log.by_process()
    assert len(by_process) == 2
    victim = kill_a_worker(client, until)
    np.testing.assert_array_equal(image[REGION], expected[REGION])
    np.testing.assert_array_equal(image[REGION], expected[REGION])
    assert counts(log) == once(cells(image, REGION)) + Counter(by_process[victim])


def chain(
    make_log: Any, source: np.ndarray, queues: Any
) -> tuple[ci.CellImg, ci.CellImg, Any, Any]:
    first, second = make_log("first"), make_log("second")
    below = maximum(first, source, queues[0], (5, 6))
    return below, maximum(second, below, queues[1]), first, second


@pytest.mark.parametrize("upstream", ["same queue", "no queue", "queue of threads"])
def test_each_cell_of_a_chain_is_computed_once_also_in_two_parts(
    queue: ci.BlockQueue, make_log: Any, source: np.ndarray, upstream: str
) -> None:
    expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)
    with ci.BlockQueue(1) as threads:
        other = {"same queue": queue, "no queue": None, "queue of threads": threads}[upstream]
        below, image, first, second = chain(make_log, source, (other, queue))
        for region in (REGION, BELOW, np.s_[0:32, 0:32]):
            np.testing.assert_array_equal(image[region], expected[region])
            forget_here(image, below)
            assert counts(second).keys() >= cells(image, region)
            assert counts(first).keys() >= cells(below, region, 1)
        assert counts(second) == once(set(map(str, range(64))))
        assert counts(first) == once(set(map(str, range(42))))
        here = str(os.getpid())
        assert all(words[-2] != here for words in first.lines() + second.lines())


def test_what_was_computed_of_an_image_upstream_serves_the_one_downstream(
    queue: ci.BlockQueue, make_log: Any, source: np.ndarray
) -> None:
    below, image, first, second = chain(make_log, source, (queue, queue))
    np.testing.assert_array_equal(below[...], ndi.maximum_filter(source, 3))
    np.testing.assert_array_equal(image[...], ndi.maximum_filter(ndi.maximum_filter(source, 3), 3))
    assert counts(first) == once(set(map(str, range(42))))
    assert counts(second) == once(set(map(str, range(64))))


def test_one_cell_read_by_many_at_once_is_computed_once(
    queue: ci.BlockQueue,
    log: Any,
    source: np.ndarray,
    expected: np.ndarray,
    begin: Begin,
) -> None:
    image = maximum(log, source, queue)
    reads = [begin(lambda: image[REGION]) for _ in range(6)]
    for read in reads:
        np.testing.assert_array_equal(read.result(PATIENCE_S), expected[REGION])
    assert counts(log) == once(cells(image, REGION))


# ---------------------------------------------------------------------------- held in bytes


def test_held_results_keep_to_their_bound_and_the_oldest_go(
    client: Any, make_queue: Any, log: Any, source: np.ndarray, until: Until
) -> None:
    cell_bytes = 16 * source.itemsize
    queue = make_queue(max_bytes=6 * cell_bytes + 1)
    image = maximum(log, source, queue)
    for row in range(3):
        np.testing.assert_array_equal(
            image[4 * row : 4 * row + 4, 0:16],
            ndi.maximum_filter(source, 3)[4 * row : 4 * row + 4, 0:16],
        )
        assert held(queue).bytes <= held(queue).max_bytes
    name = next(iter(cells_known(client)))[0]
    youngest = {(name, *position) for position in [(1, 2), (1, 3)]} | {
        (name, 2, column) for column in range(4)
    }
    until(lambda: cells_known(client).keys() == youngest)
    assert {key for key in client.who_has() if isinstance(key, tuple)} == youngest
    # Two are still there, two are computed again.
    ci.get_cache().clear()
    image[4:8, 0:16]
    assert counts(log) == once(cells(image, np.s_[0:12, 0:16])) + once({"8", "9"})


def test_what_was_used_last_is_held(make_queue: Any, log: Any, source: np.ndarray) -> None:
    queue = make_queue(max_bytes=4 * 16 * source.itemsize)
    image = maximum(log, source, queue, cache=None)
    for index in (0, 1, 2, 3, 0, 4, 0):
        image.load(index)
    assert counts(log) == once(set("01234"))
    image.load(1)
    assert counts(log)["1"] == 2


def test_a_bound_of_nothing_still_computes(
    client: Any, make_queue: Any, log: Any, source: np.ndarray, expected: np.ndarray, until: Until
) -> None:
    queue = make_queue(max_bytes=0)
    image = maximum(log, source, queue, cache=None)
    for _ in range(2):
        np.testing.assert_array_equal(image[REGION], expected[REGION])
        until(lambda: not cells_known(client))
    assert set(counts(log).values()) == {2}


def test_a_chain_whose_cells_are_let_go_while_others_read_it(
    make_queue: Any, make_log: Any, source: np.ndarray, begin: Begin
) -> None:
    # Cells upstream leave the table of one read while another one builds upon them.
    queue = make_queue(max_bytes=12 * 16 * source.itemsize)
    _, image, _, _ = chain(make_log, source, (queue, queue))
    expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)

    def walk(offset: int) -> None:
        for step in range(12):
            row = (4 * step + offset) % 28
            forget_here(image)
            np.testing.assert_array_equal(image[row : row + 5, 3:19], expected[row : row + 5, 3:19])

    for walker in [begin(walk, offset) for offset in (0, 8, 16)]:
        walker.result(PATIENCE_S)


def test_invalidating_releases_the_affected_cells_only(
    client: Any, queue: ci.BlockQueue, make_log: Any, source: np.ndarray, until: Until
) -> None:
    before = source.copy()
    below, image, first, second = chain(make_log, source, (queue, queue))
    image[...]
    source[16:18, 8:9] += 5000
    below.invalidate(np.s_[16:18, 8:9])
    gone_below = cells(below, np.s_[16:18, 8:9], 1)
    # The cells that were forgotten, and one more voxel of filter around them.
    rows, columns = np.s_[15:20], np.s_[6:12]
    gone = cells(image, (rows, columns), 1)
    assert len(held(queue)) == 64 + 42 - len(gone) - len(gone_below)
    known = len(gone) + len(gone_below)
    until(lambda: len(cells_known(client)) == 64 + 42 - known)

    expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)
    assert (expected != ndi.maximum_filter(ndi.maximum_filter(before, 3), 3)).any()
    forget_here(image, below)
    np.testing.assert_array_equal(image[...], expected)
    forget_here(image, below)
    np.testing.assert_array_equal(below[...], ndi.maximum_filter(source, 3))
    np.testing.assert_array_equal(image[...], expected)
    assert counts(first) == once(set(map(str, range(42)))) + once(gone_below)
    assert counts(second) == once(set(map(str, range(64)))) + once(gone)


def test_an_image_that_nobody_has_any_more_leaves_the_scheduler(
    client: Any, queue: ci.BlockQueue, make_log: Any, source: np.ndarray, until: Until
) -> None:
    below, image, _, _ = chain(make_log, source, (queue, queue))
    image[REGION]
    number = len(cells_known(client))
    assert number == 16 + len(cells(below, REGION, 1))
    del image
    gc.collect()
    until(lambda: len(cells_known(client)) == number - 16)
    del below
    gc.collect()
    until(lambda: not known_keys(client))
    assert len(held(queue)) == 0


def test_an_image_in_a_circle_of_references_leaves_the_scheduler(
    client: Any, queue: ci.BlockQueue, until: Until
) -> None:
    image = numbers(queue, 3)
    image[...]
    circle: list[Any] = [image]
    circle.append(circle)
    gone = weakref.ref(image.loader)
    del image, circle
    gc.collect()
    assert gone() is None
    until(lambda: not known_keys(client))


def test_a_closed_queue_leaves_nothing_and_the_client_goes_on(
    client: Any, make_queue: Any, make_log: Any, source: np.ndarray, until: Until
) -> None:
    queue = make_queue()
    _, image, _, _ = chain(make_log, source, (queue, queue))
    image[REGION]
    assert known_keys(client)
    queue.close()
    until(lambda: not known_keys(client))
    assert client.submit(sum, [1, 2]).result(PATIENCE_S) == 3
    with pytest.raises(ci.QueueClosedError):
        image[BELOW]


def test_a_queue_that_is_closed_under_way_leaves_nothing(
    client: Any, make_queue: Any, gate: Any, begin: Begin, until: Until
) -> None:
    queue = make_queue()
    image = numbers(queue, 6, gate.fill)
    read = begin(lambda: image[...])
    gate.wait_for(2)
    queue.close()
    with pytest.raises(ci.QueueClosedError, match="closed"):
        read.result(PATIENCE_S)
    gate.open()
    until(lambda: not known_keys(client))
    assert len(held(queue)) == 0
    assert "closed" in repr(queue)


# ---------------------------------------------------------------------------- change


def test_a_changed_array_travels_anew(queue: ci.BlockQueue, log: Any, source: np.ndarray) -> None:
    image = maximum(log, source, queue)
    np.testing.assert_array_equal(image[REGION], ndi.maximum_filter(source, 3)[REGION])
    for value in (5000, 6000):
        source[3, 3] = value
        image.invalidate(np.s_[3:4, 3:4])
        np.testing.assert_array_equal(image[...], ndi.maximum_filter(source, 3))
    assert counts(log)["0"] == 3
    assert counts(log)["3"] == 1


def test_a_changed_store_is_read_anew(
    queue: ci.BlockQueue, log: Any, source: np.ndarray, tmp_path: Path
) -> None:
    store = zarr.create_array(str(tmp_path / "a.zarr"), data=source, chunks=(8, 8))
    image = maximum(log, store, queue)
    np.testing.assert_array_equal(image[...], ndi.maximum_filter(source, 3))
    for value in (5000, 6000):
        store[3, 3] = source[3, 3] = value
        image.invalidate(np.s_[3:4, 3:4])
        np.testing.assert_array_equal(image[...], ndi.maximum_filter(source, 3))
    assert counts(log)["0"] == 3
    assert counts(log)["3"] == 1


@pytest.mark.parametrize("upstream", ["same queue", "no queue", "queue of threads"])
def test_a_change_upstream_reaches_the_workers(
    queue: ci.BlockQueue, make_log: Any, source: np.ndarray, upstream: str
) -> None:
    with ci.BlockQueue(1) as threads:
        other = {"same queue": queue, "no queue": None, "queue of threads": threads}[upstream]
        below, image, _, second = chain(make_log, source, (other, queue))
        for value in (5000, 6000):
            image[...]
            source[9, 9] = value
            below.invalidate(np.s_[9:10, 9:10])
            expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)
            np.testing.assert_array_equal(image[...], expected)
        assert counts(second)["0"] == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_what_was_under_way_when_its_source_changed_is_not_held(
    queue: ci.BlockQueue, gate: Any, begin: Begin, depth: int
) -> None:
    hold = gate.hold
    source = np.zeros(8, int)

    def waits(block: ci.Block) -> None:
        array = block.inputs[0].copy()
        if block.index == 0:
            hold()
        block.data[...] = array

    grid = ci.CellGrid((8,), 2)
    below = image = ci.fill_cells(waits, grid, source, dtype=int, queue=queue)
    if depth == 2:
        image = ci.map_cells(lambda a: a + 0, below, dtype=int, queue=queue)
    before = begin(lambda: image[...])
    gate.wait_for(1)
    source[...] = 1
    below.invalidate()
    gate.open(1)
    assert set(before.result(PATIENCE_S)) <= {0}
    gate.open(1)
    np.testing.assert_array_equal(image[...], np.ones(8))
    forget_here(image, below)
    np.testing.assert_array_equal(image[...], np.ones(8))
    np.testing.assert_array_equal(below[...], np.ones(8))


def test_no_read_ever_sees_less_than_what_was_there_before_it_began(
    queue: ci.BlockQueue, begin: Begin
) -> None:
    source = np.zeros(6, int)
    below = ci.map_cells(lambda a: a + 0, source, dtype=int, cell_shape=2, queue=queue)
    image = ci.map_cells(lambda a: a + 0, below, dtype=int, queue=queue)
    written = 0
    over = threading.Event()

    def write() -> None:
        nonlocal written
        for value in range(1, 40):
            source[...] = value
            below.invalidate()
            written = value
        over.set()

    def read() -> int:
        count = 0
        while not over.is_set():
            least = written
            assert image[...].min() >= least
            count += 1
        return count

    readers = [begin(read) for _ in range(3)]
    begin(write).result(PATIENCE_S)
    assert all(reader.result(PATIENCE_S) for reader in readers)
    np.testing.assert_array_equal(image[...], np.full(6, 39))


# ---------------------------------------------------------------------------- priorities


def test_what_somebody_looks_at_goes_before_what_is_fetched_in_advance(
    client: Any, queue: ci.BlockQueue, log: Any, gate: Any, begin: Begin, until: Until
) -> None:
    add, hold = log.add, gate.hold

    def in_advance(block: ci.Block) -> None:
        add("background")
        hold()

    def looked_at(block: ci.Block) -> None:
        add("foreground")

    image = numbers(queue, 7, looked_at)
    image.load(6)
    background = numbers(queue, 30, in_advance).prefetch()
    gate.wait_for(2)
    foreground = begin(lambda: image[:6])
    until(lambda: len(cells_known(client)) == 37)
    gate.open()
    foreground.result(PATIENCE_S)
    background.result(PATIENCE_S)
    assert counts(log) == {"background": 30, "foreground": 7}
    for words in log.by_process().values():
        if "foreground" in words:
            # A worker has begun some, and was given some already.
            last = len(words) - words[::-1].index("foreground")
            assert words[:last].count("background") <= 6


def interrupt_when(condition: Callable[[], None]) -> threading.Thread:
    """Press Ctrl-C once something has come about."""

    def press() -> None:
        condition()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_an_interrupted_read_cancels_what_nobody_else_waits_for(
    client: Any, queue: ci.BlockQueue, log: Any, gate: Any, begin: Begin, until: Until
) -> None:
    add, hold = log.add, gate.hold

    def fill(block: ci.Block) -> None:
        add(block.index)
        hold()
        block.data[...] = block.index

    image = numbers(queue, 20, fill)
    other = begin(lambda: image[18:20])
    gate.wait_for(1)
    thread = interrupt_when(lambda: until(lambda: len(cells_known(client)) == 20))
    with pytest.raises(KeyboardInterrupt):
        image[...]
    thread.join()
    until(lambda: {key[1] for key in cells_known(client)} == {18, 19})
    gate.open()
    np.testing.assert_array_equal(other.result(PATIENCE_S), [18, 19])
    assert counts(log)["18"] == counts(log)["19"] == 1
    # One more that was under way, at most, and one that its worker had been given.
    assert len(log.lines()) <= 4
    np.testing.assert_array_equal(image[...], range(20))
    assert counts(log)["18"] == counts(log)["19"] == 1


def test_a_read_that_fails_cancels_what_nobody_else_waits_for(
    client: Any,
    queue: ci.BlockQueue,
    log: Any,
    make_gate: Any,
    begin: Begin,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = make_gate(), make_gate()
    add, hold_all, hold = log.add, first.hold, second.hold

    def fill(block: ci.Block) -> None:
        add(block.index)
        if block.index == 1:
            raise LookupError("no model")
        if block.index == 2:
            hold()
        block.data[...] = block.index

    def fills() -> set[int]:
        return {key[1] for key in cells_known(client) if key[0].startswith("fill")}

    blocking = numbers(queue, 10, lambda block: hold_all())
    busy = begin(lambda: blocking[...])
    first.wait_for(2)
    # One of two cells fails while two more were submitted already.
    monkeypatch.setattr(implementation, "_WAVE_TASKS", 2)
    image = numbers(queue, 4, fill)
    other = begin(lambda: image[3:4])
    until(lambda: fills() == {3})
    fails = begin(lambda: image[...])
    until(lambda: fills() == {0, 1, 2, 3})
    first.open()
    second.wait_for(1)
    with pytest.raises(ci.BlockError, match="no model"):
        fails.result(PATIENCE_S)
    until(lambda: not {1, 2} & fills())
    second.open()
    assert other.result(PATIENCE_S) == [3]
    busy.result(PATIENCE_S)
    np.testing.assert_array_equal(image[2:], [2, 3])
    assert counts(log)["3"] == 1


# ---------------------------------------------------------------------------- errors


def test_errors_name_their_cell_and_have_a_cause(queue: ci.BlockQueue) -> None:
    def fail(block: ci.Block) -> None:
        if block.index == 2:
            raise LookupError("no model")

    def exits(block: ci.Block) -> None:
        sys.exit(3)

    with pytest.raises(ci.BlockError, match=r"fail at cell \(2,\) \[2:3\].*no model") as got:
        numbers(queue, 4, fail)[...]
    assert (got.value.position, got.value.roi) == ((2,), ci.Roi((2,), (3,)))
    assert type(got.value) is ci.BlockError
    assert isinstance(got.value.__cause__, LookupError)

    with pytest.raises(ci.BlockError, match=r"exits at cell \(0,\).*SystemExit") as got:
        numbers(queue, 1, exits)[...]
    assert isinstance(got.value.__cause__, SystemExit)

    wrong = ci.map_cells(lambda a: np.zeros(9), np.zeros(4), dtype=float, cell_shape=2, queue=queue)
    with pytest.raises(ci.ResultError, match=r"returned shape \(9,\), expected \(2,\)"):
        wrong[2:]
    np.testing.assert_array_equal(numbers(queue, 4)[...], range(4))


def test_a_source_that_fails_is_an_error_of_reading(queue: ci.BlockQueue) -> None:
    class Broken:
        shape, dtype = (4,), np.dtype(float)

        def __getitem__(self, key: Any) -> Any:
            raise OSError("the disk is gone")

    image = ci.map_cells(lambda a: a, Broken(), dtype=float, cell_shape=2, queue=queue)
    with pytest.raises(ci.ReadError, match=r"cell \(1,\).*the disk is gone") as got:
        image[2:]
    assert isinstance(got.value.__cause__, OSError)


def test_a_dask_chunk_that_fails_is_an_error_of_reading(queue: ci.BlockQueue) -> None:
    def broken(chunk: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    array = da.zeros(4, chunks=2).map_blocks(broken, dtype=float)
    image = ci.map_cells(lambda a: a, array, dtype=float, cell_shape=4, queue=queue)
    for _ in range(2):
        with pytest.raises(ci.ReadError, match=r"cell \(0,\) \[0:4\].*the disk is gone") as got:
            image[...]
        assert isinstance(got.value.__cause__, OSError)


@pytest.mark.parametrize("form", ["keyed", "batched"])
@pytest.mark.parametrize("upstream", [False, True])
def test_after_an_error_the_next_read_tries_again_at_once(
    queue: ci.BlockQueue,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    form: str,
    upstream: bool,
) -> None:
    if form == "batched":
        request.getfixturevalue("few")
    broken = str(tmp_path / "broken")

    def fill(block: ci.Block) -> None:
        if os.path.exists(broken):  # noqa: PTH110 - what goes to a process is kept small
            raise OSError("the disk is full")
        block.data[...] = block.index

    image = first = numbers(queue, 24, fill)
    if upstream:
        image = ci.map_cells(lambda a: a + 0, first, dtype=int, queue=queue)
    for _ in range(5):
        Path(broken).touch()
        image.invalidate()
        first.invalidate()
        with pytest.raises(ci.BlockError, match="the disk is full"):
            image[...]
        with pytest.raises(ci.BlockError, match="the disk is full"):
            image.load(3)
        Path(broken).unlink()
        np.testing.assert_array_equal(image[...], range(24))


def failing(guilty: int, broken: Path, log: Any) -> Callable[[ci.Block], None]:
    """Return a function that logs and numbers cells, and fails at one while there is a file."""
    add, name = log.add, str(broken)

    def fill(block: ci.Block) -> None:
        add(block.index)
        if block.index == guilty and os.path.exists(name):  # noqa: PTH110
            raise OSError("the disk is full")
        block.data[...] = block.index

    return fill


def test_what_was_computed_beside_a_failing_cell_is_held(
    queue: ci.BlockQueue, log: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    image = numbers(queue, 10, failing(5, broken, log))
    broken.touch()
    with pytest.raises(ci.BlockError, match="the disk is full"):
        image[...]
    broken.unlink()
    np.testing.assert_array_equal(image[...], range(10))
    assert counts(log) == once(set(map(str, range(10)))) + once({"5"})


def test_a_definition_that_could_not_be_read_is_sent_again(
    client: Any, queue: ci.BlockQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "comes_to_the_workers_later.py"
    path.write_text("def twice(array): return 2 * array\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(path.stem)
    image = ci.map_cells(module.twice, np.arange(4), dtype=int, cell_shape=2, queue=queue)
    for _ in range(2):
        with pytest.raises(ci.CellimgError, match=f"twice.*No module named '{path.stem}'"):
            image[...]
    client.upload_file(str(path))
    np.testing.assert_array_equal(image[...], [0, 2, 4, 6])


@pytest.mark.parametrize("form", ["keyed", "batched"])
def test_a_cell_that_kills_its_worker_is_named_and_others_are_not(
    make_client: Any, make_queue: Any, request: pytest.FixtureRequest, form: str
) -> None:
    if form == "batched":
        request.getfixturevalue("few")
    queue = make_queue(make_client(), 2)
    guilty = 20

    def fill(block: ci.Block) -> None:
        if block.index == guilty:
            os._exit(7)
        block.data[...] = block.index

    image = numbers(queue, 24, fill)
    with pytest.raises(ci.WorkerDiedError, match=r"fill at cell \(20,\) \[20:21\].*died") as got:
        image[...]
    assert got.value.position == (guilty,)
    np.testing.assert_array_equal(image[:guilty], range(guilty))
    np.testing.assert_array_equal(image[guilty + 1 :], range(guilty + 1, 24))


def test_several_cells_that_kill_do_not_put_the_blame_on_others(
    make_client: Any, make_queue: Any, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two requests are under way at a time, and in the second one too a cell kills.
    monkeypatch.setattr(implementation, "_WAVE_TASKS", 4)
    monkeypatch.setattr(implementation, "_WORTH_A_KEY_S", 0.0)
    queue = make_queue(make_client(), 2)

    def fill(block: ci.Block) -> None:
        if block.index in (1, 6):
            os._exit(7)
        block.data[...] = block.index

    image = numbers(queue, 10, fill)
    with pytest.raises(ci.WorkerDiedError) as got:
        image[...]
    assert got.value.position in [(1,), (6,)]
    for good in (np.s_[0:1], np.s_[2:6], np.s_[7:10]):
        np.testing.assert_array_equal(image[good], np.arange(10)[good])


def test_a_cell_upstream_that_kills_is_the_one_that_is_named(
    make_client: Any, make_queue: Any
) -> None:
    queue = make_queue(make_client(), 2)

    def kills(block: ci.Block) -> None:
        if block.index == 3:
            os._exit(7)
        block.data[...] = block.index

    def innocent(array: np.ndarray) -> np.ndarray:
        return array + 0

    upper = numbers(queue, 8, kills)
    image = ci.map_cells(innocent, upper, dtype=int, cell_shape=4, queue=queue)
    with pytest.raises(ci.WorkerDiedError, match=r"kills at cell \(3,\)") as got:
        image[...]
    assert got.value.position == (3,)
    np.testing.assert_array_equal(image[4:], range(4, 8))


# ---------------------------------------------------------------------------- init


def test_init_runs_once_in_each_process_and_again_after_a_restart(
    make_client: Any, make_queue: Any, log: Any, source: np.ndarray, until: Until
) -> None:
    client = make_client()
    queue = make_queue(client, 2, init=log.code + "add('init')\nscale = 3\n")
    code = ci.BlockCode("add('block'); block.data[...] = scale * block.inputs[0]")

    def define() -> ci.CellImg:
        return ci.fill_cells(
            code, ci.CellGrid((32, 32), CELL), source, dtype=int, queue=queue, cache=None
        )

    image = define()
    for _ in range(2):
        np.testing.assert_array_equal(image[...], 3 * source)
    first = log.by_process()
    assert {words[0] for words in first.values()} == {"init"}
    assert [words.count("init") for words in first.values()] == [1, 1]

    client.restart()
    # What was held is gone, and is computed again.
    np.testing.assert_array_equal(image[...], 3 * source)
    np.testing.assert_array_equal(define()[...], 3 * source)
    assert len(log.by_process()) > 2
    for words in log.by_process().values():
        assert (words[0], words.count("init")) == ("init", 1)


def test_no_block_runs_on_a_later_worker_whose_init_fails(
    make_client: Any, make_queue: Any, log: Any, make_log: Any, tmp_path: Path
) -> None:
    client = make_client(1)
    broken = tmp_path / "broken"
    init = (
        log.code + f"import os\nif os.path.exists({str(broken)!r}): raise OSError('no licence')\n"
    )
    queue = make_queue(client, init=init + "ready = True\n")
    blocks = make_log("blocks").add

    def fill(block: ci.Block) -> None:
        blocks(block.index, "ready" in ci.get_worker().namespace)
        block.data[...] = block.index

    np.testing.assert_array_equal(numbers(queue, 4, fill)[...], range(4))
    (first,) = client.run(os.getpid).values()
    broken.touch()
    client.started_with.scale(2)
    client.wait_for_workers(2, timeout=PATIENCE_S)
    image = numbers(queue, 40, fill)
    failed = 0
    for index in range(40):
        try:
            image.load(index)
        except ci.InitError:
            failed += 1
    with pytest.raises(ci.InitError, match="no licence"):
        make_queue(client, 2, init=init + "ready = True\n")
    lines = make_log("blocks").lines()
    assert {words[1] for words in lines} == {"True"}
    assert {int(words[-2]) for words in lines} == {first}
    assert failed + len(lines) >= 44


@pytest.mark.parametrize(
    ("init", "message", "allowed_failures"),
    [
        ("raise OSError('no licence')", "no licence", 3),
        ("import sys; sys.exit(2)", "SystemExit", 3),
        ("import os; os._exit(2)", "died while init", 3),
        ("import os; os._exit(2)", "died while init", 0),
    ],
    ids=["raises", "exits", "dies", "dies and is blamed"],
)
def test_an_init_that_fails_is_an_error_at_construction(
    make_client: Any, in_time: Any, init: str, message: str, allowed_failures: int
) -> None:
    client = make_client(1, scheduler_kwargs={"allowed_failures": allowed_failures})
    with pytest.raises(ci.InitError, match=message):
        in_time(lambda: ci.BlockQueue(1, init, client))


def test_a_worker_that_is_busy_with_something_else_runs_init_later(
    make_client: Any, make_queue: Any, gate: Any, begin: Begin, log: Any
) -> None:
    client, hold = make_client(2), gate.hold
    address = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
    busy = client.submit(hold, workers=[address], pure=False)
    gate.wait_for(1)
    init = log.code + "add('init')\n"
    queue = begin(lambda: make_queue(client, 2, init, timeout_s=0.2)).result(PATIENCE_S)
    assert counts(log) == {"init": 1}
    gate.open()
    busy.result(PATIENCE_S)

    add = log.add

    def fill(block: ci.Block) -> None:
        add(os.getpid())
        block.data[...] = block.index

    np.testing.assert_array_equal(numbers(queue, 40, fill)[...], range(40))
    assert counts(log)["init"] == 2


def test_a_worker_that_dies_while_a_queue_is_made_is_not_the_end(
    make_client: Any, make_queue: Any, log: Any, tmp_path: Path, begin: Begin
) -> None:
    client, first = make_client(2), str(tmp_path / "first")
    # The first that runs it dies, whatever the reason.
    init = log.code + (
        "import os\n"
        f"try: os.close(os.open({first!r}, os.O_CREAT | os.O_EXCL))\n"
        "except FileExistsError: add('init')\n"
        "else: os._exit(1)\n"
    )
    queue = begin(lambda: make_queue(client, 2, init)).result(PATIENCE_S)
    np.testing.assert_array_equal(numbers(queue, 20)[...], range(20))
    assert counts(log)["init"] >= 1


# ---------------------------------------------------------------------------- batches


def submitted(queue: ci.BlockQueue, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note the keys that are asked for."""
    keys: list[Any] = []
    client = queue.cells.client  # type: ignore[union-attr]
    get = client.get

    def noted(tasks: Any, wanted: Any, **options: Any) -> Any:
        keys.extend(wanted)
        return get(tasks, wanted, **options)

    monkeypatch.setattr(client, "get", noted)
    return keys


def test_many_cheap_cells_go_in_few_tasks(
    client: Any, queue: ci.BlockQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow machine is no reason to stop.
    monkeypatch.setattr(implementation, "_WORTH_A_KEY_S", 10.0)
    keys = submitted(queue, monkeypatch)
    source = np.arange(2001 * 3).reshape(2001, 3)
    image = ci.map_cells(lambda a: a * 2 + 1, source, dtype=int, cell_shape=(2, 2), queue=queue)
    np.testing.assert_array_equal(image[...], source * 2 + 1)
    assert image.grid.num_cells == 2002
    assert len(keys) < 50
    assert image.stats().loads == 2002
    assert all(image.peek(index) is not None for index in (0, 1000, 2001))
    assert len(cells_known(client)) == 0
    assert len(held(queue)) == 2002


def test_batches_are_held_and_a_second_client_finds_them(
    cluster: Any, make_queue: Any, few: int, log: Any, source: np.ndarray, expected: np.ndarray
) -> None:
    mine = maximum(log, source, make_queue())
    np.testing.assert_array_equal(mine[...], expected)
    forget_here(mine)
    np.testing.assert_array_equal(mine[...], expected)
    with connect(cluster) as second:
        theirs = maximum(log, source, make_queue(second))
        np.testing.assert_array_equal(theirs[...], expected)
    assert counts(log) == once(set(map(str, range(64))))


def test_parts_of_batches_are_found(
    client: Any,
    queue: ci.BlockQueue,
    few: int,
    log: Any,
    source: np.ndarray,
    expected: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = maximum(log, source, queue)
    region = np.s_[0:24, 0:32]
    np.testing.assert_array_equal(image[region], expected[region])
    assert len(cells_known(client)) == 0
    # Many cells, of which some are in batches; then a few, which have keys from now on.
    forget_here(image)
    np.testing.assert_array_equal(image[...], expected)
    monkeypatch.setattr(implementation, "_FEW_CELLS", 64)
    forget_here(image)
    np.testing.assert_array_equal(image[4:12, 8:20], expected[4:12, 8:20])
    assert len(cells_known(client)) == 6
    # Another image can be made from them.
    below = maximum(log, image, queue, (8, 8))
    before = counts(log)
    np.testing.assert_array_equal(below[8:24, 8:16], ndi.maximum_filter(expected, 3)[8:24, 8:16])
    assert counts(log) - before == once(cells(below, np.s_[8:24, 8:16]))
    assert before == once(set(map(str, range(64))))


def test_a_change_costs_the_affected_cells_of_batches_only(
    queue: ci.BlockQueue, few: int, log: Any, source: np.ndarray
) -> None:
    image = maximum(log, source, queue)
    image[...]
    source[16:18, 8:9] += 5000
    image.invalidate(np.s_[16:18, 8:9])
    gone = cells(image, np.s_[16:18, 8:9], 1)
    assert len(held(queue)) == 64 - len(gone)
    forget_here(image)
    np.testing.assert_array_equal(image[...], ndi.maximum_filter(source, 3))
    assert counts(log) == once(set(map(str, range(64)))) + once(gone)


def test_a_lost_worker_costs_its_batches_only(
    make_client: Any,
    make_queue: Any,
    few: int,
    log: Any,
    source: np.ndarray,
    expected: np.ndarray,
    until: Until,
) -> None:
    client = make_client()
    image = maximum(log, source, make_queue(client, 2), cache=None)
    np.testing.assert_array_equal(image[...], expected)
    by_process = log.by_process()
    victim = kill_a_worker(client, until)
    for _ in range(2):
        np.testing.assert_array_equal(image[...], expected)
    assert counts(log) == once(set(map(str, range(64)))) + Counter(by_process[victim])


def test_batches_that_come_back_shorter(
    make_client: Any,
    make_queue: Any,
    few: int,
    make_log: Any,
    tmp_path: Path,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lost with their worker and computed again, they may take longer and end earlier."""
    client, slow = make_client(1), str(tmp_path / "slow")
    monkeypatch.setattr(implementation, "_LONGEST_BATCH_S", 0.05)

    def fill(block: ci.Block) -> None:
        if os.path.exists(slow):  # noqa: PTH110 - what goes to a process is kept small
            time.sleep(0.06)
        block.data[...] = block.index

    grid = ci.CellGrid((40,), 1)
    image = ci.fill_cells(fill, grid, dtype=int, queue=make_queue(client), cache=None)
    np.testing.assert_array_equal(image[...], range(40))
    below = ci.map_cells(lambda a: a + 1, image, dtype=int, queue=image.loader.queue, cache=None)
    Path(slow).touch()
    kill_a_worker(client, until)
    np.testing.assert_array_equal(below[14:17], range(15, 18))
    np.testing.assert_array_equal(image[...], range(40))


def test_a_batch_of_slow_cells_leaves_them_to_others(
    client: Any, queue: ci.BlockQueue, few: int, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "_LONGEST_BATCH_S", 0.0)
    keys = submitted(queue, monkeypatch)
    image = numbers(queue, 60, log.fill)
    for _ in range(2):
        np.testing.assert_array_equal(image[...], range(60))
        forget_here(image)
    assert counts(log) == once(set(map(str, range(60))))
    # Each ended after its second cell at the latest.
    assert len(keys) >= 30


def test_a_cell_that_fails_in_a_batch_is_tried_again_alone(
    cluster: Any, make_queue: Any, few: int, log: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    fill = failing(77, broken, log)
    image = numbers(make_queue(), 100, fill)
    broken.touch()
    with pytest.raises(ci.BlockError, match=r"cell \(77,\).*the disk is full"):
        image[...]
    # Of the batch with this cell, the ones before it, and whole batches before that.
    before = set(map(str, range(77)))
    assert counts(log)["77"] == 1
    broken.unlink()
    np.testing.assert_array_equal(image[...], range(100))
    assert {index: n for index, n in counts(log).items() if index in before} == once(before)
    broken.touch()
    with connect(cluster) as second:
        # Somebody else gets no old error, and one that is new.
        theirs = numbers(make_queue(second), 100, fill)
        del image
        gc.collect()
        with pytest.raises(ci.BlockError, match=r"cell \(77,\).*the disk is full"):
            theirs[...]
        broken.unlink()
        np.testing.assert_array_equal(theirs[...], range(100))


@pytest.mark.parametrize("keep", [True, False])
def test_ragged_cells_in_batches(
    queue: ci.BlockQueue, few: int, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    keys = submitted(queue, monkeypatch)
    source = np.random.default_rng(0).random((7, 11, 5))
    image = ci.map_cells(
        lambda a: ndi.median_filter(a, 3),
        source,
        halo=1,
        dtype=float,
        cell_shape=(3, 2, 4),
        queue=queue,
        cache="shared" if keep else None,
    )
    np.testing.assert_array_equal(image[...], ndi.median_filter(source, 3))
    assert any("batch" in key for key in keys if isinstance(key, str))


def test_an_error_in_a_batch_names_its_cell(
    queue: ci.BlockQueue, few: int, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = submitted(queue, monkeypatch)
    add = log.add

    def fill(block: ci.Block) -> None:
        add(block.index)
        if block.index == 77:
            raise LookupError("no model")
        block.data[...] = block.index

    image = numbers(queue, 100, fill)
    with pytest.raises(ci.BlockError, match=r"fill at cell \(77,\) \[77:78\].*no model") as got:
        image[...]
    assert isinstance(got.value.__cause__, LookupError)
    assert any("batch" in key for key in keys if isinstance(key, str))
    np.testing.assert_array_equal(image[:77], range(77))
    np.testing.assert_array_equal(image[78:], range(78, 100))
    assert counts(log)["0"] == 1, "what came before the error is kept"


def test_cheap_and_slow_cells_mixed(queue: ci.BlockQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_FEW_CELLS", 4)

    def fill(block: ci.Block) -> None:
        if block.index % 16 == 0:
            time.sleep(0.02)
        block.data[...] = block.index

    image = numbers(queue, 200, fill)
    np.testing.assert_array_equal(image[...], range(200))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4, 1), (1,), (5, 1)])
def test_grids_without_axes_or_without_cells(
    queue: ci.BlockQueue, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    # However few they are, they may go as a batch.
    monkeypatch.setattr(implementation, "_FEW_CELLS", 0)
    source = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    image = ci.map_cells(
        lambda a: a + 1, source, dtype=int, cell_shape=(2,) * len(shape), queue=queue
    )
    for _ in range(2):
        np.testing.assert_array_equal(image[...], source + 1)
        forget_here(image)
    image.prefetch().result(PATIENCE_S)
    np.testing.assert_array_equal(image[...], source + 1)


def test_slow_cells_keep_keys_of_their_own(
    client: Any, queue: ci.BlockQueue, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    monkeypatch.setattr(implementation, "_FEW_CELLS", 4)
    monkeypatch.setattr(implementation, "_WORTH_A_KEY_S", 0.0)
    image = numbers(queue, 40, log.fill)
    for _ in range(2):
        np.testing.assert_array_equal(image[...], range(40))
        ci.get_cache().clear()
    assert counts(log) == once(set(map(str, range(40))))
    # Also those by which it was found out how slow they are.
    assert len(cells_known(client)) == 40


# ---------------------------------------------------------------------------- loss


def test_all_workers_gone_in_the_middle_of_a_read(
    make_client: Any, make_queue: Any, gate: Any, begin: Begin
) -> None:
    client = make_client(2)
    queue = make_queue(client, timeout_s=2)
    image = numbers(queue, 6, gate.fill)
    read = begin(lambda: image[...])
    gate.wait_for(2)
    client.started_with.scale(0)
    with pytest.raises(ci.NoWorkersError, match="no worker for 2 s"):
        read.result(PATIENCE_S)
    # It goes on when some are there.
    client.started_with.scale(1)
    gate.open()
    np.testing.assert_array_equal(begin(lambda: image[...]).result(PATIENCE_S), range(6))


def test_all_workers_gone_between_computing_and_fetching(
    make_client: Any, make_queue: Any, begin: Begin, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    client = make_client(1)
    queue = make_queue(client, timeout_s=0.5)
    image = numbers(queue, 3)
    image[...]
    forget_here(image)
    client.started_with.scale(0)
    until(lambda: not client.scheduler_info(n_workers=-1)["workers"])
    with pytest.raises(ci.NoWorkersError, match=r"no worker for 0\.5 s"):
        begin(lambda: image[...]).result(PATIENCE_S)
    client.started_with.scale(1)
    np.testing.assert_array_equal(begin(lambda: image[...]).result(PATIENCE_S), range(3))


def test_the_scheduler_gone(make_client: Any, make_queue: Any, gate: Any, begin: Begin) -> None:
    client = make_client(1)
    queue, hold = make_queue(client), gate.hold

    def fill(block: ci.Block) -> None:
        if block.index:
            hold()
        block.data[...] = block.index

    image = numbers(queue, 3, fill)
    assert image[:1] == [0]
    read = begin(lambda: image[...])
    gate.wait_for(1)
    client.started_with.close()
    gate.open()
    for trial in (read, begin(lambda: image[...])):
        with pytest.raises(ci.NoWorkersError, match="scheduler at tcp://127"):
            # Who asks it something at this very moment waits as long as distributed tries, 30 s.
            trial.result(3 * PATIENCE_S)
    assert queue.num_workers == 0


def test_a_scheduler_that_goes_while_it_is_asked(
    make_client: Any, make_queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(1)
    queue = make_queue(client)
    assert queue.num_workers == 1

    def gone(**options: Any) -> Any:
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(client, "scheduler_info", gone)
    assert queue.num_workers == 0


def test_the_client_closed_while_somebody_reads(
    cluster: Any, make_queue: Any, gate: Any, begin: Begin
) -> None:
    client = connect(cluster)
    queue = make_queue(client)
    image = numbers(queue, 3, gate.fill)
    read = begin(lambda: image[...])
    gate.wait_for(1)
    client.close()
    gate.open()
    for trial in (read, begin(lambda: image[...]), begin(lambda: numbers(queue, 100)[...])):
        with pytest.raises(ci.NoWorkersError, match="connection to the scheduler"):
            trial.result(PATIENCE_S)
    assert queue.num_workers == 0
    queue.close()


def test_a_queue_with_a_client_of_its_own_closed_while_somebody_reads(
    cluster: Any, make_queue: Any, gate: Any, begin: Begin
) -> None:
    queue = make_queue(cluster.scheduler_address)
    image = numbers(queue, 3, gate.fill)
    read = begin(lambda: image[...])
    gate.wait_for(1)
    queue.close()
    gate.open()
    with pytest.raises(ci.QueueClosedError):
        read.result(PATIENCE_S)
    with pytest.raises(ci.QueueClosedError):
        image[...]
    assert "closed" in repr(queue)


def test_a_cluster_that_was_restarted_computes_again(
    make_client: Any, make_queue: Any, make_log: Any, source: np.ndarray, in_time: Any
) -> None:
    client = make_client(1)
    queue = make_queue(client)
    below, image, _, second = chain(make_log, source, (queue, queue))
    expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)
    np.testing.assert_array_equal(image[REGION], expected[REGION])
    forget_here(image, below)
    client.restart()
    np.testing.assert_array_equal(in_time(lambda: image[REGION]), expected[REGION])
    assert counts(second) == once(cells(image, REGION)) + once(cells(image, REGION))
    forget_here(image, below)
    np.testing.assert_array_equal(in_time(lambda: image[REGION]), expected[REGION])
    assert set(counts(second).values()) == {2}


def test_more_workers_than_there_are(client: Any, make_queue: Any) -> None:
    with pytest.raises(ci.NoWorkersError, match=r"has 2 of 3 workers after 0\.2 s; start more"):
        make_queue(num_workers=3, timeout_s=0.2)
    assert make_queue(num_workers=2).num_workers == 2
    assert client.status == "running"


def test_a_resource_that_no_worker_has(make_queue: Any) -> None:
    with pytest.raises(ci.NoWorkersError, match=r"resources \{'GPU': 1\}.*--resources GPU=1"):
        make_queue(resources={"GPU": 1}, timeout_s=0.2)


def test_cells_run_where_their_resources_are(
    make_client: Any, make_queue: Any, log: Any, source: np.ndarray, until: Until
) -> None:
    client = make_client(1, resources={"GPU": 1})
    (with_gpu,) = client.run(os.getpid).values()
    # One more worker, without.
    cluster = client.started_with
    spec = cluster.new_worker_spec()
    for options in spec.values():
        options["options"] = {**options["options"], "resources": {}}
    cluster.worker_spec.update(spec)
    cluster.sync(cluster._correct_state)
    client.wait_for_workers(2, timeout=PATIENCE_S)
    assert len(set(client.run(os.getpid).values())) == 2

    with pytest.raises(ci.NoWorkersError, match="1 of 2 workers with the resources"):
        make_queue(client, 2, resources={"GPU": 1}, timeout_s=0.2)
    queue = make_queue(client, resources={"GPU": 1})
    assert queue.num_workers == 1
    image = maximum(log, source, queue)
    np.testing.assert_array_equal(image[...], ndi.maximum_filter(source, 3))
    assert set(log.by_process()) == {with_gpu}


# ---------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("kind", ["chunks", "layers", "persisted", "rechunked"])
def test_dask_arrays_are_inputs(
    cluster: Any, client: Any, queue: ci.BlockQueue, log: Any, source: np.ndarray, kind: str
) -> None:
    array = da.from_array(source, chunks=(7, 32))
    if kind == "layers":
        array = (array[1:, ::-1] * 2 + array[:-1, ::-1].T.T).rechunk((5, 9))
    elif kind == "persisted":
        array = client.persist(array + 1)
    elif kind == "rechunked":
        array = array.rechunk((32, 3))
    whole = {
        "chunks": source,
        "layers": source[1:, ::-1] * 2 + source[:-1, ::-1],
        "persisted": source + 1,
        "rechunked": source,
    }[kind]
    image = maximum(log, array, queue)
    expected = ndi.maximum_filter(whole, 3)
    np.testing.assert_array_equal(image[REGION], expected[REGION])
    ci.get_cache().clear()
    np.testing.assert_array_equal(image[...], expected)
    assert counts(log) == once(set(map(str, range(image.grid.num_cells))))


def test_stores_and_chains_of_images_are_inputs(
    queue: ci.BlockQueue, make_log: Any, source: np.ndarray, tmp_path: Path
) -> None:
    store = zarr.create_array(str(tmp_path / "a.zarr"), data=source, chunks=(8, 8))
    below, image, first, second = chain(make_log, store, (queue, queue))
    last = ci.map_cells(lambda a, b, c: a + b + c, image, below, source, dtype=int, queue=queue)
    once_filtered = ndi.maximum_filter(source, 3)
    twice = ndi.maximum_filter(once_filtered, 3)
    np.testing.assert_array_equal(last[...], twice + once_filtered + source)
    assert set(counts(first).values()) == set(counts(second).values()) == {1}


def test_dask_on_the_same_client_uses_what_is_held(
    client: Any, queue: ci.BlockQueue, make_log: Any, source: np.ndarray
) -> None:
    below, image, first, second = chain(make_log, source, (queue, queue))
    expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)
    np.testing.assert_array_equal(image[...], expected)
    np.testing.assert_array_equal(client.compute(image.to_dask()).result(PATIENCE_S), expected)
    # Not optimised: dask would make one task of a cell and what follows it, by another name.
    total = image.to_dask()[0:9].sum() + below.to_dask().max()
    future = client.compute(total, optimize_graph=False)
    assert future.result(PATIENCE_S) == expected[0:9].sum() + source.max()
    assert set(counts(first).values()) == set(counts(second).values()) == {1}


def test_an_image_that_runs_here_reads_one_on_the_cluster(
    queue: ci.BlockQueue, make_log: Any, source: np.ndarray
) -> None:
    first, second = make_log("first"), make_log("second")
    expected = ndi.maximum_filter(ndi.maximum_filter(source, 3), 3)
    below = maximum(first, source, queue, (8, 8))
    here = maximum(second, below, None)
    np.testing.assert_array_equal(here[...], expected)
    with ci.BlockQueue(2, backend="processes") as processes:
        np.testing.assert_array_equal(maximum(second, below, processes)[...], expected)
    assert counts(first) == once(set(map(str, range(16))))
    pid = str(os.getpid())
    assert all(words[-2] != pid for words in first.lines())


def test_other_clients_are_not_asked(
    cluster: Any, make_client: Any, source: np.ndarray, log: Any
) -> None:
    # One that is everybody's default, on another cluster.
    other = make_client(1)
    with (
        other.as_current(),
        ci.BlockQueue(backend=cluster.scheduler_address) as queue,
    ):
        image = maximum(log, source, queue)
        np.testing.assert_array_equal(image[...], ndi.maximum_filter(source, 3))
        assert not known_keys(other)


def test_parameters_and_functions_travel_once_to_each_worker_and_not_with_each_task(
    client: Any, queue: ci.BlockQueue, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    add = log.add

    class Model:
        """Says when it arrives."""

        def __init__(self) -> None:
            self.weight = 2

        def __setstate__(self, state: dict[str, Any]) -> None:
            add("arrived")
            self.__dict__.update(state)

    def apply(array: np.ndarray, model: Any) -> np.ndarray:
        return array * model.weight

    image = ci.map_cells(
        apply, np.arange(60), dtype=int, cell_shape=1, params={"model": Model()}, queue=queue
    )
    image.to_dask()
    # To name the image dask copies what it cannot hash otherwise.
    named = counts(log)["arrived"]
    np.testing.assert_array_equal(image[:30], 2 * np.arange(30))
    np.testing.assert_array_equal(image[30:], 2 * np.arange(30, 60))
    arrivals = log.by_process()
    # The scheduler, which is in this process, does not look into definitions.
    assert len(arrivals.pop(os.getpid(), [])) == named
    # Between two reads dask may let go of all copies of a definition but one.
    assert {len(words) for words in arrivals.values()} <= {1, 2}
    assert 1 <= len(arrivals) <= 2


# ---------------------------------------------------------------------------- the real volume


@pytest.mark.parametrize("backend", ["threads", "processes", "distributed"])
def test_a_gaussian_of_the_real_volume_equals_that_of_the_whole(
    client: Any, shared_data: Path, tmp_path: Path, backend: str
) -> None:
    tifffile = pytest.importorskip("tifffile")
    volume = tifffile.imread(shared_data / "brain_signal.tif")
    assert (volume.shape, volume.dtype) == ((30, 510, 667), np.dtype("u2"))
    source: Any = volume
    if backend == "distributed":
        # What workers read for themselves need not be sent.
        source = zarr.create_array(str(tmp_path / "a.zarr"), data=volume, chunks=(30, 128, 128))

    def gaussian(array: np.ndarray) -> np.ndarray:
        return ndi.gaussian_filter(array.astype("f4"), 1.5, truncate=3.0)

    with ci.BlockQueue(2, backend=client if backend == "distributed" else backend) as queue:
        # Rounded up: int(3 * 1.5 + 0.5) voxels on each side.
        image = ci.map_cells(
            gaussian, source, halo=5, dtype="f4", cell_shape=(30, 128, 128), queue=queue
        )
        got = image[...]
    np.testing.assert_array_equal(got, gaussian(volume))
