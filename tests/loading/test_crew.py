"""Sharing work among threads: everything once, errors once, and never a deadlock."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.loading.crew import Crew, _Job, get_crew, usable_cores
from cellimg_dask.state.flights import Flight, current_flight, inside

PATIENCE_S = 30
SIZES = [1, 2, 8]


def slow_enough(barrier: threading.Barrier) -> None:
    barrier.wait(PATIENCE_S)


@pytest.mark.parametrize("num_threads", SIZES)
@pytest.mark.parametrize("count", [0, 1, 2, 17, 1000])
def test_every_item_is_worked_on_once(make_crew, num_threads, count):
    done: list[int] = []
    make_crew(num_threads).run(iter(range(count)), done.append, count)
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("num_threads", [2, 8])
def test_helpers_join_in(make_crew, num_threads):
    together = threading.Barrier(num_threads)  # Broken unless so many work at once.
    names = set()

    def work(_: int) -> None:
        together.wait(PATIENCE_S)
        names.add(threading.get_ident())

    make_crew(num_threads).run(range(3 * num_threads), work, 3 * num_threads)
    assert len(names) == num_threads
    assert threading.get_ident() in names, "who asks works too"


def test_one_thread_works_in_order_and_starts_no_other(make_crew):
    crew = make_crew(1)
    idents = []
    done = []

    def work(item: int) -> None:
        idents.append(threading.get_ident())
        done.append(item)

    crew.run(range(50), work, 50)
    assert done == list(range(50))
    assert set(idents) == {threading.get_ident()}
    assert crew._threads == []


@pytest.mark.parametrize("num_threads", SIZES)
def test_never_more_threads_than_allowed_work_at_once(make_crew, num_threads):
    """Counted at the leaves of nested work, where no thread waits for another."""
    crew = make_crew(num_threads)
    lock = threading.Lock()
    working = most = 0

    def leaf(_: int) -> None:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        sum(range(3000))
        with lock:
            working -= 1

    def branch(_: int) -> None:
        crew.run(range(40), leaf, 40)

    crew.run(range(10), branch, 10)
    assert 1 <= most <= num_threads


@pytest.mark.parametrize("num_threads", SIZES)
@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, SystemExit])
def test_an_error_stops_an_endless_job_and_is_raised_once(make_crew, num_threads, kind):
    crew = make_crew(num_threads)
    broken = kind("at 5")

    def work(item: int) -> None:
        if item == 5:
            raise broken

    with pytest.raises(kind) as caught:
        crew.run(itertools.count(), work, 1 << 60)
    assert caught.value is broken
    done: list[int] = []
    crew.run(range(9), done.append, 9)
    assert sorted(done) == list(range(9)), "and the crew works on"


def test_of_several_errors_the_first_is_raised(make_crew, monkeypatch):
    both = threading.Barrier(2)
    recorded = threading.Event()
    fail = _Job._fail

    def recording(job: _Job, error: BaseException) -> None:
        fail(job, error)
        recorded.set()

    monkeypatch.setattr(_Job, "_fail", recording)

    def work(item: int) -> None:
        both.wait(PATIENCE_S)
        if item == 0:
            raise LookupError("first")
        assert recorded.wait(PATIENCE_S)
        raise LookupError("second")

    with pytest.raises(LookupError, match="first"):
        make_crew(2).run(range(2), work, 2)


def test_an_error_waits_for_what_is_running(make_crew):
    """When the error reaches the caller nothing of the job runs any more."""
    both = threading.Barrier(2)
    failed = threading.Event()
    ended = []

    def work(item: int) -> None:
        both.wait(PATIENCE_S)
        if item == 0:
            failed.set()
            raise LookupError
        assert failed.wait(PATIENCE_S)
        sum(range(200_000))
        ended.append(item)

    with pytest.raises(LookupError):
        make_crew(2).run(range(2), work, 2)
    assert ended == [1]


@pytest.mark.parametrize("num_threads", SIZES)
def test_an_error_of_the_items_themselves_is_raised(make_crew, num_threads):
    def items() -> Iterator[int]:
        yield from range(3)
        raise LookupError("no more")

    done: list[int] = []
    with pytest.raises(LookupError, match="no more"):
        make_crew(num_threads).run(items(), done.append, 100)
    assert sorted(done) == [0, 1, 2]


@pytest.mark.parametrize("num_threads", SIZES)
def test_nested_work_ends_whatever_the_number_of_threads(make_crew, num_threads):
    crew = make_crew(num_threads)
    leaves: list[int] = []

    def work(depth: int) -> Callable[[int], None]:
        def at(_: int) -> None:
            if depth == 0:
                leaves.append(1)
            else:
                crew.run(range(4), work(depth - 1), 4)

        return at

    crew.run(range(4), work(4), 4)
    assert len(leaves) == 4**5


@pytest.mark.parametrize("num_threads", [2, 8])
def test_callers_from_outside_are_served_though_all_threads_are_taken(make_crew, num_threads):
    crew = make_crew(num_threads)
    release = threading.Event()
    taken = threading.Semaphore(0)

    def occupy() -> None:
        taken.release()
        assert release.wait(PATIENCE_S)

    for _ in range(num_threads):
        assert crew._start(occupy)
    for _ in range(num_threads):
        assert taken.acquire(timeout=PATIENCE_S)
    done: list[int] = []
    crew.run(range(20), done.append, 20)
    assert sorted(done) == list(range(20))
    release.set()


def test_a_helper_that_never_got_a_thread_is_not_waited_for(make_crew):
    crew = make_crew(2)
    release = threading.Event()
    # The threads are taken by something that the crew has not counted.
    for _ in range(2):
        assert crew._start(lambda: release.wait(PATIENCE_S))
    done: list[int] = []
    caller = threading.Thread(target=crew.run, args=(range(20), done.append, 20), daemon=True)
    caller.start()
    caller.join(10)
    ended = not caller.is_alive()
    release.set()
    assert ended
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("num_threads", SIZES)
def test_many_callers_at_once_all_end(make_crew, num_threads):
    crew = make_crew(num_threads)
    sums: list[int] = []

    def call(number: int) -> None:
        done: list[int] = []
        crew.run(range(number, number + 100), done.append, 100)
        sums.append(sum(done) - 100 * number)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sums == [sum(range(100))] * 16


def test_helpers_count_as_part_of_the_cell_that_hired_them(make_crew):
    together = threading.Barrier(4)
    seen = []

    def work(_: int) -> None:
        together.wait(PATIENCE_S)
        seen.append(current_flight())

    flight = Flight(object(), 3)
    with inside(flight):
        make_crew(4).run(range(4), work, 4)
    assert seen == [flight] * 4


def test_a_closed_crew_starts_again_when_it_is_needed():
    crew = Crew(3)
    together = threading.Barrier(3)
    crew.run(range(3), lambda _: slow_enough(together), 3)
    before = set(threading.enumerate())
    crew.close()
    assert all(not thread.is_alive() for thread in before - set(threading.enumerate()))
    crew.close()
    crew.run(range(3), lambda _: slow_enough(together), 3)
    crew.close()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_numbers_of_threads_that_are_no_counts_are_refused(bad):
    with pytest.raises((TypeError, ValueError), match="num_threads"):
        Crew(bad)


def test_by_default_there_is_one_crew_with_a_thread_per_core():
    assert get_crew() is get_crew()
    assert get_crew().num_threads == usable_cores() >= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_a_crew_of_its_own():
    together = threading.Barrier(usable_cores())
    get_crew().run(range(usable_cores()), lambda _: slow_enough(together), usable_cores())
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # Ends a child that hangs.
        code = 1
        try:
            fresh = threading.Barrier(usable_cores())
            get_crew().run(range(usable_cores()), lambda _: slow_enough(fresh), usable_cores())
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_image_can_be_read_while_the_interpreter_shuts_down():
    """A thread that outlives the main one may still read; no helper can be had any more."""
    program = """
import threading
import numpy as np
import cellimg_dask as ci

img = ci.map_cells(np.negative, np.arange(100), cell_shape=5)
main = threading.main_thread()

def read():
    main.join()
    print(img[:].sum(), flush=True)

threading.Thread(target=read).start()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout.strip(), result.stderr) == (str(-sum(range(100))), "")


def test_leaving_python_does_not_wait_for_a_whole_prefetch():
    """What has begun is finished, the rest of the list is not."""
    program = """
import atexit
import threading
import numpy as np
import cellimg_dask as ci

begun = threading.Event()
let_go = threading.Event()

def f(block):
    print("cell", flush=True)
    begun.set()
    let_go.wait(30)
    return block

img = ci.map_cells(f, np.zeros(100_000, "u1"), dtype="u1", cell_shape=1)
img.prefetch()
begun.wait(30)
atexit.register(let_go.set)  # Called before what was registered earlier.
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert 1 <= result.stdout.count("cell") < 100_000
    assert result.stderr == ""


def test_tiny_items_are_left_to_the_caller(make_crew, monkeypatch):
    """A helper that sees the caller do many in no time does not take any itself."""
    crew = make_crew(2)
    monkeypatch.setattr("cellimg_dask.loading.crew._TINY_S", 1e9)  # Everything is tiny.
    helped = []
    looked_on = threading.Event()
    wait = threading.Event.wait

    def wait_and_tell(self: threading.Event, timeout: float | None = None) -> bool:
        if timeout is not None and threading.current_thread().name.startswith("cellimg"):
            looked_on.set()
        return wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait_and_tell)
    caller = threading.get_ident()

    def work(item: int) -> None:
        if threading.get_ident() != caller:
            helped.append(item)
        elif item == 50_000:
            assert wait(looked_on, PATIENCE_S)

    crew.run(range(100_000), work, 100_000)
    # Only a look during which the caller was stopped altogether makes a helper join.
    assert len(helped) < 100_000 / 2


def test_prefetch_fills_the_cache_in_the_background():
    calls: list[int] = []

    def f(block: np.ndarray) -> np.ndarray:
        calls.append(1)
        return block + 1

    image = np.arange(36).reshape(6, 6)
    img = ci.map_cells(f, image, dtype=image.dtype, cell_shape=2)
    assert img.prefetch(np.s_[:4, 2:]).result(PATIENCE_S) is None
    assert sorted(img.loader.shelf.held()) == [1, 2, 4, 5]
    assert len(calls) == 4
    np.testing.assert_array_equal(img[:4, 2:], image[:4, 2:] + 1)
    assert len(calls) == 4
    assert img.prefetch().result(PATIENCE_S) is None
    assert len(calls) == 9
    assert img.prefetch(np.s_[1:1]).result(PATIENCE_S) is None


def test_prefetch_gives_the_error_of_a_cell():
    def f(block: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    img = ci.map_cells(f, np.arange(6), dtype=int, cell_shape=2)
    request = img.prefetch()
    with pytest.raises(ZeroDivisionError):
        request.result(PATIENCE_S)
    assert isinstance(request.error, ci.BlockError)
