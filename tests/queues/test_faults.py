"""What goes wrong around queues of threads and processes: interrupts, forks, exits, odd blocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.bare.places import Segments
from cellimg_dask.bare.segments import Segment
from cellimg_dask.bare.wire import Wire
from cellimg_dask.loading.crew import Crew
from cellimg_dask.queues.pool import Pool

Make = Callable[..., ci.BlockQueue]
Begin = Callable[..., Future[Any]]

PATIENCE_S = 60
"""What takes longer hangs."""

LOCAL = pytest.mark.parametrize("backend", ["threads", "processes"], indirect=True)
PROCESSES = pytest.mark.parametrize("backend", ["processes"], indirect=True)
THREADS = pytest.mark.parametrize("backend", ["threads"], indirect=True)


def numbers(queue: ci.BlockQueue | None, count: int = 4, function: Any = None) -> ci.CellImg:
    """An image of ``count`` cells with a voxel each, numbered, or what ``function`` fills in."""

    def number(block: ci.Block) -> None:
        block.data[...] = block.index

    grid = ci.CellGrid((count,), 1)
    return ci.fill_cells(function or number, grid, dtype=int, queue=queue)


def interrupted_at_call(number: int, function: Callable[[], Any]) -> bool:
    """Call something that is interrupted where its n-th inner call begins; False if none does."""
    left = number

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left == -2:
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def run_python(code: str, *options: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own, with standard streams as the shell makes them."""
    command = [sys.executable, *options, "-c", code]
    if shell:
        command = ["sh", "-c", f'exec "$0" "$@" {shell}', *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE_S)


PREPARED = """
import os, sys, threading
import numpy as np
import cellimg_dask as ci
def double(a):
    return 2 * a + shift
queue = ci.BlockQueue(2, "shift = 1", {backend!r})
data = np.arange(40)
image = ci.map_cells(double, data, dtype=int, cell_shape=5, queue=queue, cache=None)
def check():
    assert (image[...] == 2 * data + 1).all()
check()
"""


# ---------------------------------------------------------------------------- interrupts


def test_a_worker_comes_back_wherever_its_borrower_is_interrupted(until: Any, begin: Begin) -> None:
    def borrow(pool: Pool[str]) -> str:
        with pool.lend() as worker:
            return worker

    number, interrupted = 0, True
    while interrupted:
        pool = Pool(["worker"])
        interrupted = interrupted_at_call(number, partial(borrow, pool))
        assert begin(borrow, pool).result(PATIENCE_S) == "worker"

        # The same, where another one waits for the worker.
        lent = pool.lend()
        lent.__enter__()
        other = begin(borrow, pool)
        until(lambda pool=pool: pool.num_waiting == 1)
        interrupted |= interrupted_at_call(number, partial(lent.__exit__, None, None, None))
        del lent
        assert other.result(PATIENCE_S) == "worker"
        assert begin(pool.close).result(PATIENCE_S)
        number += 1
    assert number > 3


@PROCESSES
def test_a_late_reply_is_not_taken_for_another_blocks(
    make_queue: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(1)
    image = numbers(queue)
    image[0]

    def interrupted(wire: Wire, wait_s: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # As if the signal that kills the worker took its time.
        patch.setattr(subprocess.Popen, "kill", lambda process: None)
        patch.setattr(Wire, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            image[1]
    np.testing.assert_array_equal(image[...], range(4))
    np.testing.assert_array_equal(numbers(queue, 9)[...], range(9))


@PROCESSES
def test_a_segment_that_an_interrupted_worker_may_still_write_to_is_not_used_again(
    make_queue: Any, monkeypatch: pytest.MonkeyPatch, footprint: Callable[[], dict[str, Any]]
) -> None:
    queue = make_queue(1)
    image = numbers(queue)

    def segments() -> set[str]:
        image[...]
        return set(footprint()["segments"])

    image[...]
    before = segments()
    image.invalidate()

    def interrupted(wire: Wire, wait_s: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Wire, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            image[1]
    left = set(footprint()["segments"])
    assert left < before
    image.invalidate()
    np.testing.assert_array_equal(image[...], range(4))


@PROCESSES
def test_callers_do_not_take_more_segments_than_workers_need(
    make_queue: Any, gate: Any, begin: Begin, footprint: Callable[[], dict[str, Any]]
) -> None:
    queue = make_queue(2)
    before = set(footprint()["segments"])
    image = ci.fill_cells(gate.fill, ci.CellGrid((12,), 1), dtype=int, queue=queue)
    reads = [begin(partial(image.load, index)) for index in range(12)]
    gate.wait_for(2)
    assert len(set(footprint()["segments"]) - before) <= 4
    gate.open()
    assert [int(read.result(PATIENCE_S)[0]) for read in reads] == list(range(12))


def test_a_crew_ends_threads_that_it_has_lost_count_of(begin: Begin) -> None:
    crew = Crew(2, spare_tiny=False)
    for _ in range(2):
        came = threading.Event()
        assert crew._start(came.set)
        assert came.wait(PATIENCE_S)
    # As where whoever started it was interrupted before it was noted.
    lost = crew._threads.pop(0)
    begin(crew.close).result(PATIENCE_S)
    lost.join(PATIENCE_S)
    assert not lost.is_alive()


def test_a_crew_may_be_closed_by_a_thread_of_its_own() -> None:
    # The one that drops the last reference to a queue.
    crew = Crew(2)
    closed = threading.Event()

    def close() -> None:
        crew.close()
        closed.set()

    assert crew._start(close)
    assert closed.wait(PATIENCE_S)


@LOCAL
def test_an_init_without_end_can_be_interrupted(
    make_queue: Make, gate: Any, begin: Begin, backend: str
) -> None:
    hold = gate.hold
    over = threading.Event()

    def press() -> None:
        gate.wait_for(2)
        # Python overlooks a signal that comes just before it begins to wait for a lock.
        while not over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            over.wait(0.1)

    def on_signal(number: int, frame: Any) -> None:
        if not over.is_set():
            over.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    pressed = begin(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_queue(2, hold)
    finally:
        over.set()
        pressed.result(PATIENCE_S)
        signal.signal(signal.SIGINT, before)


@PROCESSES
def test_an_init_that_fails_does_not_wait_for_one_without_end(
    make_queue: Make, gate: Any, in_time: Any, tmp_path: Path
) -> None:
    hold, lock = gate.hold, str(tmp_path / "lock")

    def init() -> None:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise ValueError("no gpu") from None
        hold()

    with pytest.raises(ci.InitError, match="no gpu"):
        in_time(make_queue, 2, init)


# ---------------------------------------------------------------------------- forks and exits


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_a_forked_process_leaves_the_workers_alone(backend: str) -> None:
    code = PREPARED.format(backend=backend) + (
        "pids = getattr(queue.blocks, 'pids', None)\n"
        "for way in range(3):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        if way > 0:\n"
        "            check()\n"
        "        if way > 1:\n"
        "            queue.close()\n"
        "        sys.exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    check()\n"
        "assert pids == getattr(queue.blocks, 'pids', None)\n"
        "queue.close()\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_python_ends_without_ado_though_a_queue_is_open(backend: str) -> None:
    # The thread keeps the names of the script, and so the queue, alive to the very end.
    code = PREPARED.format(backend=backend) + (
        "threading.Thread(target=lambda: threading.Event().wait(), daemon=True).start()\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_ends_though_blocks_run_in_processes() -> None:
    code = PREPARED.format(backend="processes") + (
        "import tempfile\n"
        "folder = tempfile.TemporaryDirectory()\n"
        "os.mkfifo(folder.name + '/began')\n"
        "began = os.open(folder.name + '/began', os.O_RDWR)\n"
        "def forever(a, name):\n"
        "    os.write(os.open(name, os.O_WRONLY), b'.')\n"
        "    threading.Event().wait()\n"
        "endless = ci.map_cells(\n"
        "    forever, data, dtype=int, cell_shape=5, queue=queue,\n"
        "    params={'name': folder.name + '/began'},\n"
        ")\n"
        "endless.prefetch()\n"
        "os.read(began, 1)\n"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_worker_processes_need_no_standard_streams(closed: str) -> None:
    code = PREPARED.format(backend="processes") + (
        "def say(a):\n"
        "    print('dust', flush=True)\n"
        "    os.write(2, b'dust')\n"
        "    return a\n"
        "loud = ci.map_cells(say, data, dtype=int, cell_shape=5, queue=queue)\n"
        "assert (loud[...] == data).all()\n"
        "queue.close()\n"
        "print('done')\n"
    )
    done = run_python(code, shell=closed)
    assert (done.returncode, done.stdout) == (0, "done\n")


@PROCESSES
def test_a_crash_is_seen_though_the_block_left_a_child(
    make_queue: Make, gate: Any, in_time: Any
) -> None:
    hold = gate.hold

    def crash(block: ci.Block) -> None:
        if os.fork() == 0:
            hold()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    queue = make_queue(1)
    with pytest.raises(ci.WorkerDiedError, match="SIGKILL"):
        in_time(lambda: numbers(queue, 1, crash)[...])
    gate.wait_for(1)


@PROCESSES
def test_what_a_block_forks_does_not_answer(make_queue: Make, in_time: Any) -> None:
    def fork(block: ci.Block) -> None:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            block.data[...] = block.index

    queue = make_queue(1)
    np.testing.assert_array_equal(in_time(lambda: numbers(queue, 4, fork)[...]), range(4))
    np.testing.assert_array_equal(in_time(lambda: numbers(queue, 9)[...]), range(9))


# ---------------------------------------------------------------------------- blocks and errors


@PROCESSES
def test_python_objects_travel_beside_shared_memory(make_queue: Make) -> None:
    objects = np.array([1, "two", None, 4.0], dtype=object)
    image = ci.map_cells(
        lambda a: np.array([len(str(item)) for item in a]),
        objects,
        dtype=int,
        cell_shape=2,
        queue=make_queue(),
    )
    np.testing.assert_array_equal(image[...], [1, 3, 4, 3])


@PROCESSES
def test_objects_that_cannot_travel_are_an_error(make_queue: Make) -> None:
    objects = np.array([1, threading.Lock()], dtype=object)
    image = ci.map_cells(
        lambda a: np.zeros(a.shape), objects, dtype=float, cell_shape=1, queue=make_queue()
    )
    assert image[0] == 0
    with pytest.raises(ci.ReadError, match="lock"):
        image[1]


@PROCESSES
def test_errors_that_cannot_be_made_anew_still_say_what_happened(make_queue: Make) -> None:
    def own(block: ci.Block) -> None:
        class OwnError(ci.CellimgError):
            def __init__(self, what: str, where: str) -> None:
                super().__init__(f"{what} in {where}")

        raise OwnError("dust", "the light path")

    def leaving(block: ci.Block) -> None:
        class LeavingError(Exception):
            def __reduce__(self) -> Any:
                return sys.exit, (4,)

        raise LeavingError("dust")

    queue = make_queue(1)
    with pytest.raises(ci.CellimgError, match="dust in the light path"):
        numbers(queue, 1, own)[...]
    with pytest.raises(ci.CellimgError, match="LeavingError: dust"):
        numbers(queue, 1, leaving)[...]
    np.testing.assert_array_equal(numbers(queue)[...], range(4))


@PROCESSES
@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="no real-time signals")
def test_a_signal_without_a_name(make_queue: Make) -> None:
    number = signal.SIGRTMIN + 3
    queue = make_queue(1)
    with pytest.raises(ci.WorkerDiedError, match=f"signal {number:d}"):
        numbers(queue, 1, lambda block: os.kill(os.getpid(), number))[...]


@PROCESSES
def test_what_a_block_prints_before_a_crash_is_seen(
    make_queue: Make, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def crash(block: ci.Block) -> None:
        print("dust on the lens")
        os._exit(1)

    queue = make_queue(1, crash_retries=0)
    with pytest.raises(ci.WorkerDiedError, match="dust on the lens") as caught:
        numbers(queue, 1, crash)[...]
    assert (caught.value.exit_code, caught.value.stderr) == (1, "dust on the lens")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "dust on the lens\n")


@LOCAL
def test_init_runs_once_though_blocks_read_images_of_their_queue(
    make_queue: Make, log: Any
) -> None:
    add = log.add
    queue = make_queue(1, lambda: add("init"))
    lower = numbers(queue, 2)

    def read(block: ci.Block) -> None:
        block.data[...] = lower[...].sum()

    np.testing.assert_array_equal(numbers(queue, 2, read)[...], [1, 1])
    assert log.first_words() == ["init"]


@THREADS
def test_a_block_that_reads_its_own_cell_is_a_cycle(make_queue: Make, in_time: Any) -> None:
    images: list[ci.CellImg] = []

    def read(block: ci.Block) -> None:
        block.data[...] = images[0][block.index]

    images.append(numbers(make_queue(2), 2, read))
    with pytest.raises(ci.CycleError):
        in_time(lambda: images[0][...])


def test_a_worker_process_lets_go_of_segments_that_are_gone() -> None:
    segments = [Segment.create(None, 100) for _ in range(3)]
    attached = Segments()
    for segment in segments[:2]:
        assert attached.get(segment.name).name == segment.name
    segments[0].unlink()
    assert attached.get(segments[1].name) is attached.get(segments[1].name)
    assert set(attached._attached) == {segment.name for segment in segments[:2]}
    attached.get(segments[2].name)
    assert set(attached._attached) == {segment.name for segment in segments[1:]}
    for segment in segments:
        segment.unlink()
        segment.close()
