"""Edits of a source whose images are computed by queues, clusters and dask's schedulers."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import pytest

import cellimg_dask as ci


def cell_of(roi: ci.Roi) -> ci.Roi:
    """Return which of the cells of two voxels a region is, as a region of their numbers."""
    return ci.Roi((roi.start[0] // 2,), (roi.start[0] // 2 + 1,))


def logged(add: Callable[..., None], name: str) -> Callable[..., np.ndarray]:
    def f(block: np.ndarray, number: np.ndarray) -> np.ndarray:
        add(f"{name}{number[0]}")
        return block + 1

    return f


def plus_one(array: Any, log: Any, name: str, halo: int = 0, **options: Any) -> ci.CellImg:
    """Return an image in cells of two voxels, whose function notes what it computes."""
    numbers = ci.Input(np.arange(4), halo=0, index_map=cell_of)
    return ci.map_cells(
        logged(log.add, name), array, numbers, dtype=float, cell_shape=2, halo=halo, **options
    )


def counts(log: Any, before: int = 0) -> dict[str, int]:
    return dict(Counter(log.first_words()[before:]))


def once(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1)


ALL = [f"{name}{number}" for name in "ul" for number in range(4)]


@pytest.mark.parametrize("queued", ["lower", "both"])
def test_edits_recompute_just_the_affected_cells(make_queue: Any, log: Any, queued: str) -> None:
    queue = make_queue(2)
    source = ci.Source(np.zeros(8), 2)
    upper = plus_one(source, log, "u", queue=queue if queued == "both" else None)
    lower = plus_one(upper, log, "l", halo=1, queue=queue)
    assert lower[...].tolist() == [2.0] * 8
    assert counts(log) == once(*ALL)

    source[1] = 5
    before = len(log.lines())
    assert lower[...].tolist() == [2, 7, 2, 2, 2, 2, 2, 2]
    assert counts(log, before) == once("u0", "l0", "l1")

    with source.edit() as a:
        a[4] = 1
        a[7] = 2
    before = len(log.lines())
    snapshot = lower.snapshot()
    assert lower[...].tolist() == [2, 7, 2, 2, 3, 2, 2, 4]
    assert counts(log, before) == once("u2", "u3", "l1", "l2", "l3")

    source[0] = 9
    before = len(log.lines())
    lower.invalidate(ci.Roi((7,), (8,)))
    assert lower[...].tolist() == [11, 7, 2, 2, 3, 2, 2, 4]
    # The cells that hold the voxel, or read it.
    assert counts(log, before) == once("u0", "l0", "l1", "l3")
    assert snapshot[...].tolist() == [2, 7, 2, 2, 3, 2, 2, 4]
    # What an old edition computes is not kept for the latest.
    assert lower[...].tolist() == [11, 7, 2, 2, 3, 2, 2, 4]


def test_an_edit_while_a_cell_is_computed_on_a_queue(
    make_queue: Any, gate: Any, begin: Any
) -> None:
    queue = make_queue(2)
    source = ci.Source(np.zeros(8), 2)
    hold = gate.hold

    def f(a: np.ndarray) -> np.ndarray:
        hold()
        return a + 1

    upper = ci.map_cells(lambda a: a + 1, source, dtype=float, cell_shape=2)
    image = ci.map_cells(f, upper, dtype=float, cell_shape=2, queue=queue)
    reading = begin(lambda: image[0:2])
    gate.wait_for(1)
    source[0] = 5
    gate.open()
    assert reading.result(60).tolist() == [2, 2]
    assert image.peek(0) is None
    assert image[0:2].tolist() == [7, 2]
    assert upper[0:2].tolist() == [6, 1]


def test_parameters_that_come_back_on_a_queue(make_queue: Any) -> None:
    queue = make_queue(2)
    source = ci.Source(np.zeros(8), 2)
    upper = ci.map_cells(lambda a, p: a + p, source, dtype=float, cell_shape=2, params={"p": 1})
    lower = ci.map_cells(lambda a: 2 * a, upper, dtype=float, cell_shape=2, queue=queue)
    assert lower[...].tolist() == [2.0] * 8
    upper.set_params(p=3)
    assert lower[...].tolist() == [6.0] * 8
    source[0] = 1
    upper.set_params(p=1)
    assert lower[...].tolist() == [4.0] + [2.0] * 7
    upper.set_params(p=3)
    assert lower[...].tolist() == [8.0] + [6.0] * 7


@pytest.fixture
def chain() -> tuple[ci.Source, ci.Source, ci.CellImg]:
    """Two sources, and an image that reads both."""
    one, two = ci.Source(np.zeros(8), 2), ci.Source(np.arange(8.0), 3)
    upper = ci.map_cells(np.negative, one, cell_shape=2)
    return one, two, ci.map_cells(np.add, upper, two, cell_shape=2, halo=1)


@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
def test_a_dask_array_is_what_there_was(
    chain: tuple[ci.Source, ci.Source, ci.CellImg], scheduler: str
) -> None:
    one, two, image = chain
    image[0:2]
    expected = np.arange(8.0)
    taken = image.to_dask()
    one[...] = 100
    two[5] = -1
    # Also a key of the same image as it is now is another.
    now = image.to_dask()
    options = {"num_workers": 1} if scheduler == "processes" else {}
    with dask.config.set(scheduler=scheduler, **options):
        both = dask.compute(taken, now)
    expected[5] = -1
    np.testing.assert_array_equal(both[0], np.arange(8.0))
    np.testing.assert_array_equal(both[1], expected - 100)
    np.testing.assert_array_equal(image[...], expected - 100)


def test_a_pickled_image_is_a_snapshot(chain: tuple[ci.Source, ci.Source, ci.CellImg]) -> None:
    one, two, image = chain
    one[0] = 1
    packed = pickle.dumps(image)
    one[...] = 100
    two[...] = 7
    there = pickle.loads(packed)
    expected = np.arange(8.0)
    expected[0] = -1
    np.testing.assert_array_equal(there[...], expected)
    np.testing.assert_array_equal(image[...], [-93.0] * 8)
    again = pickle.loads(pickle.dumps(there))
    np.testing.assert_array_equal(again[...], expected)


def test_a_dask_array_on_a_cluster_of_threads_is_what_there_was(
    chain: tuple[ci.Source, ci.Source, ci.CellImg],
) -> None:
    distributed = pytest.importorskip("distributed")
    one, two, image = chain
    taken = image.to_dask()
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        first = client.persist(image.to_dask())
        one[...] = 100
        np.testing.assert_array_equal(client.compute(taken).result(60), np.arange(8.0))
        two[3] = 0
        now = client.compute(image.to_dask()).result(60)
        np.testing.assert_array_equal(client.compute(taken).result(60), np.arange(8.0))
        np.testing.assert_array_equal(client.compute(first).result(60), np.arange(8.0))
    np.testing.assert_array_equal(now, [-100, -99, -98, -100, -96, -95, -94, -93])


def test_two_reads_on_a_cluster_that_learn_of_a_change_at_once(
    client: Any, begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins when the first knows of the change, and has not yet forgotten anything."""
    queue = ci.BlockQueue(1, backend=client)
    source = ci.Source(np.zeros(8), 2)
    upper = ci.map_cells(lambda a: a + 1, source, dtype=float, cell_shape=2)
    images = [
        ci.map_cells(lambda a, n=n: a + n, upper, dtype=float, cell_shape=2, queue=queue)
        for n in range(2)
    ]
    for image in images:
        image[...]
    source[0] = 5
    held = queue.cells.held  # type: ignore[union-attr]
    forget = held.forget
    seen: list[Any] = []

    def forget_later(*args: Any) -> None:
        if not seen:
            seen.append(None)
            seen[0] = begin(lambda: images[1][...]).result(60)
        forget(*args)

    monkeypatch.setattr(held, "forget", forget_later)
    np.testing.assert_array_equal(images[0][...], [6, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(seen[0], [7, 2, 2, 2, 2, 2, 2, 2])
    queue.close()
