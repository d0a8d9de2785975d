"""Runs whose workers, schedulers, clients and blocks fail at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr

import cellimg_dask as ci

LOCAL = pytest.mark.parametrize("backend", [None, "threads", "processes"])


@pytest.fixture
def image():
    return np.arange(1, 60 * 8 + 1).reshape(60, 8)


@pytest.fixture
def slow(calls, target, twice, image):
    """An image whose blocks take a while and note whether they were committed before."""
    add = calls.add

    def f(block):
        number = block.index
        add(-1 if Path(f"{target}.run/done/000000/{number}.json").exists() else number)
        threading.Event().wait(0.01)
        block.data[...] = 2 * block.inputs[0]

    return twice(image, (1, 8), f=f)


@pytest.fixture
def when(calls, until):
    """Do something when so many blocks were begun; each in its turn."""

    @contextmanager
    def when(actions):
        def go():
            for count, action in actions.items():
                until(lambda count=count: len(calls.so_far()) >= count)
                action()

        thread = threading.Thread(target=go)
        thread.start()
        yield
        thread.join()

    return when


@pytest.fixture
def open_queue():
    """Make a queue, or none."""

    @contextmanager
    def open_queue(backend):
        if backend is None:
            yield None
        else:
            with ci.BlockQueue(2, backend=backend) as queue:
                yield queue

    return open_queue


# ---------------------------------------------------------------- clusters


@pytest.fixture
def queue(client):
    # One is enough: a worker that is killed while it starts is not started again.
    with ci.BlockQueue(1, backend=client, timeout_s=60) as queue:
        yield queue


def test_workers_killed_again_and_again(
    cluster, queue, slow, image, target, calls, when, go, stored
):
    def kill():
        nanny = next(nanny for nanny in cluster.workers.values() if nanny.pid)
        os.kill(nanny.pid, signal.SIGKILL)

    with when(dict.fromkeys((5, 20, 40), kill)):
        report = go(slow, target, queue=queue)
    assert (report.computed, report.failed) == (60, {})
    begun = calls.take()
    assert set(begun) == set(range(60)), "computed after it was committed"
    # What was under way in a worker: a task, of as many cells as take a tenth of a second.
    assert len(begun) <= 60 + 3 * 10
    assert np.array_equal(stored(target), 2 * image)
    assert go(slow, target).skipped == 60


def test_who_is_killed_alone_once_is_not_to_blame(
    cluster, queue, twice, image, target, calls, go, stored
):
    """Where the scheduler allows no failures, even alone one death may be somebody else's."""
    add, count = calls.add, calls.count

    def f(block):
        add(block.index)
        if block.index == 7 and count(7) <= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        block.data[...] = 2 * block.inputs[0]

    report = go(twice(image, (1, 8), f=f), target, queue=queue)
    assert calls.take().count(7) == 3
    assert report.failed == {}
    assert np.array_equal(stored(target), 2 * image)


def test_200_good_ones_and_one_that_always_kills(queue, twice, target, calls, go, stored):
    add = calls.add
    image = np.arange(1, 201 * 8 + 1).reshape(201, 8)

    def f(block):
        add(block.index)
        if block.index == 100:
            os.kill(os.getpid(), signal.SIGSEGV)
        block.data[...] = 2 * block.inputs[0]

    img = twice(image, (1, 8), f=f)
    with ci.BlockQueue(2, backend="processes") as processes:
        for where, queue_used in ((f"{target}1", processes), (f"{target}2", queue)):
            report = go(img, where, queue=queue_used, retries=1)
            assert report.computed == 200
            assert list(report.failed) == [(100, 0)]
            error = report.failed[100, 0]
            assert isinstance(error, ci.WorkerDiedError)
            assert error.position == (100, 0)
            good = np.delete(np.arange(201), 100)
            assert np.array_equal(stored(where)[good], 2 * image[good])
            assert not stored(where)[100].any()
            assert set(calls.take()) == set(range(201))


def test_sys_exit_in_a_block_ends_no_worker(client, queue, twice, image, target, calls, go, stored):
    add, count = calls.add, calls.count

    def f(block):
        add(block.index)
        if block.index % 10 == 0 and count(block.index) == 1:
            sys.exit(3)
        block.data[...] = 2 * block.inputs[0]

    before = set(client.run(os.getpid).values())
    assert go(twice(image, (1, 8), f=f), target, queue=queue).failed == {}
    assert calls.take() == sorted([*range(60), *range(0, 60, 10)])
    # Others may have come back meanwhile.
    assert before <= set(client.run(os.getpid).values())
    assert np.array_equal(stored(target), 2 * image)


def test_workers_that_retire(in_this_process, slow, image, target, calls, when, go, stored):
    with in_this_process(3) as (_, client, queue):

        def retire():
            client.retire_workers([min(client.nthreads())])

        with when(dict.fromkeys((5, 20), retire)):
            report = go(slow, target, queue=queue)
        assert queue.num_workers == 1
    assert (report.computed, report.failed) == (60, {})
    # The thread of a worker that has left may begin what another one has done meanwhile.
    taken = calls.take()
    assert set(taken) - {-1} == set(range(60)), "not computed"
    assert taken.count(-1) <= 2, "computed after it was committed"
    assert np.array_equal(stored(target), 2 * image)


def test_a_damaged_cell_is_not_taken_for_one_that_was_committed_meanwhile(
    queue, slow, image, target, calls, go, stored
):
    go(slow, target, compressor=None)
    calls.take()
    # Of the same size.
    chunk = Path(target, "c", "9", "0")
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    report = go(slow, target, queue=queue, compressor=None)
    assert calls.take() == [9]
    assert (report.computed, report.redone) == (1, {"damaged": 1})
    assert np.array_equal(stored(target), 2 * image)


SCHEDULER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=":0"
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A scheduler and a worker in a process of their own, and their address."""
    script = tmp_path / "scheduler.py"
    script.write_text(SCHEDULER)
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def test_a_scheduler_that_is_lost_ends_the_run(
    elsewhere, slow, image, target, calls, when, marked, go, stored
):
    import distributed

    process, address = elsewhere
    with (
        distributed.Client(address, set_as_default=False, timeout=2) as client,
        ci.BlockQueue(1, backend=client) as queue,
        when({10: process.kill}),
        pytest.raises(ci.NoWorkersError, match=r"scheduler is lost.*run again") as lost,
    ):
        go(slow, target, queue=queue)
    assert "what is committed stays" in str(lost.value)
    begun, committed = calls.take(), marked(target)
    assert committed <= set(begun)
    assert 0 < len(committed) < 60
    report = go(slow, target)
    assert (report.computed, report.skipped) == (60 - len(committed), len(committed))
    assert calls.take() == sorted(set(range(60)) - committed)
    assert np.array_equal(stored(target), 2 * image)


CLIENT = """
import sys, time
from pathlib import Path
import numpy as np
import cellimg_dask as ci

address, target, entered, gate = sys.argv[1:]

def f(block):
    if block.index == 5:
        Path(entered).touch()
        while not Path(gate).exists():
            time.sleep(0.01)
    block.data[...] = 99

img = ci.fill_cells(f, ci.CellGrid((60, 8), (1, 8)), dtype=int)
with ci.BlockQueue(1, backend=address) as queue:
    ci.run(img, target, queue=queue, progress=False)
"""


@pytest.mark.parametrize("after", ["during the next run", "after the next run"])
def test_what_a_killed_client_left_running_does_not_mix_with_the_next_run(
    elsewhere, twice, image, target, tmp_path, calls, until, when, go, stored, after
):
    import distributed

    _, address = elsewhere
    entered, gate, straggled = (tmp_path / name for name in ("entered", "gate", "straggled"))
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    command = [sys.executable, str(script), address, target, str(entered), str(gate)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        until(lambda: entered.exists() or process.poll() is not None)
        process.kill()
    add, seen = calls.add, str(straggled)

    def executing(dask_worker):
        return len(dask_worker.state.executing)

    with distributed.Client(address, set_as_default=False) as client:

        def let_go():
            assert any(client.run(executing).values())
            gate.touch()
            until(lambda: not any(client.run(executing).values()))
            straggled.touch()

        def f(block):
            add(block.index)
            block.data[...] = 2 * block.inputs[0]
            while block.index == 6 and not Path(seen).exists():
                threading.Event().wait(0.01)

        if after == "after the next run":
            # Nobody waits in that one.
            straggled.touch()
            assert go(twice(image, (1, 8), f=f), target).computed == 60
            let_go()
        else:
            with when({6: let_go}):
                assert go(twice(image, (1, 8), f=f), target).computed == 60
    assert np.array_equal(stored(target), 2 * image)
    # And every marker is that of the new run.
    calls.take()
    assert go(twice(image, (1, 8), f=f), target).skipped == 60
    assert calls.take() == []


# ---------------------------------------------------------------- blocks that never end


@LOCAL
def test_a_block_that_never_ends_ends_the_run(
    backend, open_queue, twice, image, target, tmp_path, calls, marked, go, stored
):
    # As text: the content of a path is that of its file.
    add, gate = calls.add, str(tmp_path / "gate")

    def f(block):
        add(block.index)
        while block.index in (20, 40) and not Path(gate).exists():
            threading.Event().wait(0.01)
        block.data[...] = 2 * block.inputs[0]

    # Leaving the queue waits for nothing either.
    with (
        pytest.raises(ci.NoWorkersError, match=r"no cell was done for 2 s; under way are") as stuck,
        open_queue(backend) as queue,
    ):
        go(twice(image, (1, 8), f=f), target, queue=queue, timeout_s=2)
    assert "(20, 0)" in str(stuck.value)
    assert "what is committed stays" in str(stuck.value)
    committed = marked(target)
    assert committed == set(calls.take()) - {20, 40}
    Path(gate).touch()
    with open_queue(backend) as queue:
        report = go(twice(image, (1, 8), f=f), target, queue=queue)
    assert report.skipped == len(committed)
    # Threads that were stuck may have gone on, but stored nothing.
    assert sorted(set(calls.take())) == sorted(set(range(60)) - committed)
    assert np.array_equal(stored(target), 2 * image)


PROGRAM = """
import os, signal, sys, time
import numpy as np
import cellimg_dask as ci

def f(block):
    # At once, whole.
    os.write(1, b"%d\\n" % block.index)
    while block.index == 3:
        time.sleep(1)
    block.data[...] = block.index

# What starts this may ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
img = ci.fill_cells(f, ci.CellGrid((9,), 1), dtype=int)
try:
    ci.run(img, sys.argv[1], progress=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_a_run_that_is_stuck_and_python_too(tmp_path, target, marked):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(script), target],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        seen = {process.stdout.readline().strip() for _ in range(9)}
        assert seen == set("012345678")
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert rest == "interrupted\n"
    assert process.returncode == 0
    assert marked(target) == set(range(9)) - {3}


# ---------------------------------------------------------------- cells of which nothing is known


@pytest.fixture(params=[None, "processes", "cluster"])
def any_queue(request, open_queue):
    if request.param == "cluster":
        yield request.getfixturevalue("queue")
    else:
        with open_queue(request.param) as queue:
            yield queue


def test_an_index_map_that_fails_is_the_failure_of_its_cells(
    any_queue, image, target, tmp_path, calls, go, stored
):
    add, cure = calls.add, str(tmp_path / "cure")

    def where(roi):
        # The first, whose key is made before anything, and the one in the middle.
        if roi.start[0] in (0, 30, 41) and not os.path.exists(cure):  # noqa: PTH110
            raise LookupError(f"nothing is known of {roi.start[0]}")
        return roi

    def f(block):
        add(block.index)
        block.data[...] = 2 * block.inputs[0]

    item = ci.Input(image, index_map=where)
    img = ci.fill_cells(f, ci.CellGrid(image.shape, (1, 8)), item, dtype=int)
    report = go(img, target, queue=any_queue)
    assert set(report.failed) == {(0, 0), (30, 0), (41, 0)}
    error = report.failed[41, 0]
    assert isinstance(error, ci.ReadError)
    assert (error.position, str(error.__cause__)) == ((41, 0), "nothing is known of 41")
    assert calls.take() == sorted(set(range(60)) - {0, 30, 41})
    Path(cure).touch()
    assert go(img, target, queue=any_queue).computed == 3
    assert calls.take() == [0, 30, 41]
    # Also where cells are marked already.
    Path(cure).unlink()
    report = go(img, target, queue=any_queue)
    assert (report.skipped, set(report.failed)) == (57, {(0, 0), (30, 0), (41, 0)})
    assert report.redone == {}
    assert np.array_equal(stored(target), 2 * image)


def test_an_input_that_cannot_be_looked_at_is_the_failure_of_its_cells(
    any_queue, image, target, tmp_path, calls, twice, go, stored
):
    path = tmp_path / "in.zarr"
    source = zarr.create_array(path, data=image, chunks=(1, 8), compressors=None)
    # Of one the file is cut, the folder of another is a file.
    os.truncate(path / "c" / "7" / "0", 5)
    (path / "c" / "30" / "0").unlink()
    (path / "c" / "30").rmdir()
    (path / "c" / "30").symlink_to(path / "c" / "30")
    report = go(twice(source, (1, 8)), target, queue=any_queue, retries=0)
    assert set(report.failed) == {(7, 0), (30, 0)}
    assert all(isinstance(error, ci.ReadError) for error in report.failed.values())
    assert report.computed == 58
    assert calls.take() == sorted(set(range(60)) - {7, 30})
    good = np.delete(np.arange(60), [7, 30])
    assert np.array_equal(stored(target)[good], 2 * image[good])


# ---------------------------------------------------------------- what the killed leave


def test_what_killed_writers_left_is_swept(image, target, twice, go, stored):
    go(twice(image, (1, 8)), target)
    unique = "0123456789abcdef" * 2
    left = [
        Path(f"{target}.run", "done", "000000", f"7.json.{unique}.part"),
        Path(f"{target}.run", f"report.json.{unique}.part"),
        Path(target, "c", "7", "0.__lock"),
        Path(target, "c", "9", f"0.{unique}.partial"),
    ]
    others = [
        Path(f"{target}.run", "notes.part"),
        Path(target, "c", "7", "0.partial"),
        Path(target, "c", "my__lock"),
    ]
    for path in left + others:
        path.write_bytes(b"half of something")
    os.truncate(f"{target}/c/7/0", 3)
    assert go(twice(image, (1, 8)), target).computed == 1
    assert [path for path in left if path.exists()] == []
    assert [path for path in others if not path.exists()] == []
    assert np.array_equal(stored(target), 2 * image)
