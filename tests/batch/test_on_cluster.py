"""Runs on a dask cluster: workers compute, store and mark cells themselves."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import cellimg_dask as ci

pytest.importorskip("distributed")


@pytest.fixture
def queue(client):
    with ci.BlockQueue(2, backend=client, timeout_s=60) as queue:
        yield queue


@pytest.fixture
def image():
    return np.arange(1, 41 * 8 + 1).reshape(41, 8)


def test_equals_the_whole_image(queue, rng, target, go, stored):
    whole = rng.random((50, 40)).astype("f4")

    def smooth(array, sigma):
        return ndimage.gaussian_filter(array, sigma, mode="nearest", truncate=2)

    first = ci.map_cells(
        smooth, whole, halo=2, params={"sigma": 1}, dtype="f4", cell_shape=16, queue=queue
    )
    last = ci.map_cells(smooth, first, halo=4, params={"sigma": 2}, dtype="f4", cell_shape=(9, 20))
    report = go(last, target, queue=queue, chunks=(3, 20))
    assert report.ok
    np.testing.assert_allclose(stored(target), smooth(smooth(whole, 1), 2), rtol=1e-5)
    assert report.bytes_written == sum(
        path.stat().st_size for path in Path(target, "c").rglob("*") if path.is_file()
    )
    # What workers committed counts for runs anywhere.
    assert go(last, target, chunks=(3, 20)).skipped == last.grid.num_cells
    Path(target, "c", "0", "0").unlink()
    assert go(last, target, queue=queue, chunks=(3, 20)).computed == 1
    np.testing.assert_allclose(stored(target), smooth(smooth(whole, 1), 2), rtol=1e-5)


def test_a_function_that_gives_the_same_memory_again(queue, target, go, stored):
    buffer = np.empty((4, 8))

    def doubled(array):
        return np.multiply(array, 2, out=buffer)

    image = np.arange(160 * 8.0).reshape(160, 8)
    lazy = ci.map_cells(doubled, image, dtype=float, cell_shape=(4, 8))
    assert go(lazy, target, queue=queue).computed == 40
    np.testing.assert_array_equal(stored(target), 2 * image)


def test_many_small_cells_once_each(queue, target, twice, calls, go, stored):
    image = np.arange(40_000).reshape(400, 100)
    assert go(twice(image, (10, 10)), target, queue=queue).computed == 400
    assert calls.take() == list(range(400))
    assert np.array_equal(stored(target), 2 * image)
    assert go(twice(image, (10, 10)), target, queue=queue).skipped == 400
    assert calls.take() == []


def test_exceptions_are_those_of_their_cells(queue, image, target, twice, calls, go, stored):
    add = calls.add

    def f(block):
        add(block.index)
        if block.index in (5, 17):
            raise ValueError(f"no luck with {block.index}")
        block.data[...] = 2 * block.inputs[0]

    report = go(twice(image, (1, 8), f=f), target, queue=queue, retries=1)
    assert calls.take() == sorted([*range(41), 5, 17])
    assert set(report.failed) == {(5, 0), (17, 0)}
    error = report.failed[5, 0]
    assert isinstance(error, ci.BlockError)
    assert isinstance(error.__cause__, ValueError)
    assert "no luck with 5" in str(error)
    good = np.delete(np.arange(41), [5, 17])
    assert np.array_equal(stored(target)[good], 2 * image[good])
    assert go(twice(image, (1, 8), f=f), target, queue=queue, retries=0).skipped == 39
    assert calls.take() == [5, 17]


def test_a_cell_that_kills_its_worker_takes_no_other_along(
    queue, image, target, twice, calls, go, stored
):
    add = calls.add

    def f(block):
        add(block.index)
        if block.index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        block.data[...] = 2 * block.inputs[0]

    report = go(twice(image, (1, 8), f=f), target, queue=queue)
    assert list(report.failed) == [(20, 0)]
    error = report.failed[20, 0]
    assert isinstance(error, ci.WorkerDiedError)
    assert "every worker process that computed this cell alone died" in str(error)
    assert report.computed == 40
    done = calls.take()
    assert set(done) == set(range(41))
    # Others may have been under way on the worker that died, and only those come twice.
    assert 2 <= done.count(20) <= 4
    assert len(done) - done.count(20) <= 40 + 4
    good = np.delete(np.arange(41), 20)
    assert np.array_equal(stored(target)[good], 2 * image[good])
    assert not stored(target)[20].any()


def test_a_worker_killed_from_outside_loses_nothing(
    client, queue, image, target, twice, calls, go, stored, until
):
    add = calls.add
    pids = list(client.run(os.getpid).values())
    assert len(pids) == 2

    def f(block):
        add(block.index)
        threading.Event().wait(0.01)
        block.data[...] = 2 * block.inputs[0]

    def kill():
        until(lambda: len(calls.so_far()) >= 5)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = go(twice(image, (1, 8), f=f), target, queue=queue)
    killer.join()
    assert report.ok
    assert np.array_equal(stored(target), 2 * image)
    done = calls.take()
    assert set(done) == set(range(41))
    assert len(done) <= 41 + 4


def test_ctrl_c_leaves_what_is_done(
    client, queue, image, target, twice, calls, go, stored, marked, until
):
    add, me = calls.add, os.getpid()

    def executing(dask_worker):
        return len(dask_worker.state.executing)

    def f(block):
        add(block.index)
        threading.Event().wait(0.02)
        block.data[...] = 2 * block.inputs[0]

    def interrupt():
        until(lambda: len(calls.so_far()) >= 5)
        os.kill(me, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        go(twice(image, (1, 8), f=f), target, queue=queue)
    interrupter.join()
    # What runs on the workers at that moment may still be committed.
    until(lambda: not any(client.run(executing).values()))
    committed = marked(target)
    assert len(committed) < 41
    begun = len(calls.so_far())
    assert go(twice(image, (1, 8), f=f), target, queue=queue).computed == 41 - len(committed)
    assert sorted(calls.so_far()[begun:]) == sorted(set(range(41)) - committed)
    assert np.array_equal(stored(target), 2 * image)


def test_a_disk_that_fails_ends_the_run(queue, image, target, twice, go, stored):
    def f(block):
        block.data[...] = 2 * block.inputs[0]

    assert go(twice(image, (1, 8), f=f), target, queue=queue).ok
    # Where chunks of the last row should go there is something else.
    Path(target, "c", "40", "0").unlink()
    Path(target, "c", "40").rmdir()
    Path(target, "c", "40").write_text("in the way")
    with pytest.raises((OSError, ValueError), match=r"c/40"):
        go(twice(image, (1, 8), f=f), target, queue=queue)
    Path(target, "c", "40").unlink()
    assert go(twice(image, (1, 8), f=f), target, queue=queue).computed == 1
    assert np.array_equal(stored(target), 2 * image)


def test_without_workers_a_run_ends_in_bounded_time(
    in_this_process, image, target, twice, calls, go, stored, until
):
    with in_this_process(1) as (cluster, _, queue):
        cluster.scale(0)
        until(lambda: queue.num_workers == 0)
        with pytest.raises(ci.NoWorkersError, match=r"no cell was done for 2 s, with 0 workers"):
            go(twice(image), target, queue=queue, timeout_s=2)
        assert calls.take() == []
        cluster.scale(1)
        assert go(twice(image), target, queue=queue).ok
    assert np.array_equal(stored(target), 2 * image)
