"""One run at a time on a target, also after a run was killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cellimg_dask.batch.folder import open_folder
from cellimg_dask.batch.lock import Permit, RunLock, TargetInUseError
from cellimg_dask.blocks.errors import CellimgError

HOLDER = """
import sys, time
from cellimg_dask.batch.folder import open_folder
from cellimg_dask.batch.lock import RunLock
with RunLock(open_folder(sys.argv[1]), "out.zarr") as lock:
    print(lock.permit.token, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return open_folder(str(tmp_path / "beside"))
    return open_folder(f"memory://lock-test/{tmp_path.name}/beside")


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of a folder, and the token of its permit."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        token = process.stdout.readline().strip()
        assert token
        yield process, token
        process.kill()


def test_a_second_one_is_refused_until_the_first_ends(folder):
    with RunLock(folder, "out.zarr"):
        with pytest.raises(TargetInUseError) as refused, RunLock(folder, "out.zarr"):
            pass
        # And whoever was refused has broken nothing.
        with pytest.raises(TargetInUseError), RunLock(folder, "out.zarr"):
            pass
    text = str(refused.value)
    assert f"another run works on out.zarr (process {os.getpid()} on " in text
    assert "wait for it, or give another target" in text
    assert isinstance(refused.value, CellimgError)
    assert isinstance(refused.value, FileExistsError)
    with RunLock(folder, "out.zarr"):
        pass


def test_it_ends_with_an_error_too(folder):
    with pytest.raises(KeyError), RunLock(folder, "out.zarr"):
        raise KeyError
    with RunLock(folder, "out.zarr"):
        pass


def test_of_many_threads_one_has_it(folder):
    start, held = threading.Barrier(6), []

    def take():
        start.wait(10)
        try:
            with RunLock(folder, "out.zarr"):
                held.append("held")
                everybody.wait(10)
        except TargetInUseError:
            held.append("refused")
            everybody.wait(10)

    everybody = threading.Barrier(6)
    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(folder, type(open_folder("x"))):
        assert sorted(held) == ["held"] + 5 * ["refused"]
    else:
        # As far as the store can tell: it may be that nobody has it, but never two.
        assert held.count("held") <= 1


def test_a_killed_process_holds_nothing(holder, tmp_path):
    process, _ = holder
    with (
        pytest.raises(TargetInUseError, match=f"process {process.pid} on "),
        RunLock(open_folder(str(tmp_path)), "out.zarr"),
    ):
        pass
    process.kill()
    process.wait()
    with RunLock(open_folder(str(tmp_path)), "out.zarr"):
        pass


def test_what_is_in_the_file_does_not_matter(tmp_path):
    (tmp_path / "lock.json").write_bytes(b"\xff garbage")
    with (
        RunLock(open_folder(str(tmp_path)), "out.zarr"),
        pytest.raises(TargetInUseError),
        RunLock(open_folder(str(tmp_path)), "out.zarr"),
    ):
        pass


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{}", b'{"beat": "never"}', b'{"beat": 1}'])
def test_elsewhere_what_was_left_behind_counts_no_more(tmp_path, content):
    folder = open_folder(f"memory://lock-test/{tmp_path.name}/left")
    folder.write("lock.json", content)
    with RunLock(folder, "out.zarr"), pytest.raises(TargetInUseError), RunLock(folder, "out.zarr"):
        pass
    assert folder.read("lock.json") is None


def test_elsewhere_a_fresh_entry_counts(tmp_path):
    folder = open_folder(f"memory://lock-test/{tmp_path.name}/fresh")
    entry = {"token": "x", "host": "other-host", "pid": 7, "beat": time.time()}
    folder.write("lock.json", json.dumps(entry).encode())
    with pytest.raises(TargetInUseError, match="process 7 on other-host"), RunLock(folder, "o"):
        pass
    assert json.loads(folder.read("lock.json")) == entry


def test_elsewhere_the_entry_is_renewed(tmp_path, monkeypatch):
    from cellimg_dask.batch import lock

    monkeypatch.setattr(lock, "_BEAT_S", 0.001)
    folder = open_folder(f"memory://lock-test/{tmp_path.name}/beat")
    with RunLock(folder, "out.zarr"):
        first = json.loads(folder.read("lock.json"))
        now = first
        while now["beat"] == first["beat"]:
            now = json.loads(folder.read("lock.json"))
        assert now["token"] == first["token"]
    assert folder.read("lock.json") is None


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(OSError, match="No locks available"),
        RunLock(open_folder(str(tmp_path)), "out.zarr"),
    ):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


# ---------------------------------------------------------------- leave to write


def test_who_writes_has_the_permit_of_the_run_that_lasts(folder):
    with RunLock(folder, "out.zarr") as first:
        # It travels to the workers.
        permit = pickle.loads(pickle.dumps(first.permit))
        with permit.writing(), permit.writing():
            pass
    with pytest.raises(TargetInUseError, match=r"out\.zarr: the worker stores nothing more"):
        permit.writing().__enter__()
    with RunLock(folder, "out.zarr") as second:
        with pytest.raises(TargetInUseError, match="another one has taken over"):
            permit.writing().__enter__()
        with second.permit.writing():
            pass


def test_a_killed_run_leaves_its_workers_their_permit_until_the_next(holder, tmp_path):
    process, token = holder
    permit = Permit(open_folder(str(tmp_path)), "out.zarr", token)
    process.kill()
    process.wait()
    with permit.writing():
        pass
    with RunLock(open_folder(str(tmp_path)), "out.zarr"), pytest.raises(TargetInUseError):
        permit.writing().__enter__()


def test_a_run_waits_for_cells_that_an_earlier_one_is_storing(tmp_path):
    folder, happened = open_folder(str(tmp_path)), []
    with RunLock(folder, "out.zarr") as first:
        token = first.permit.token
    # As if the run had been killed and not ended.
    (tmp_path / "permit").write_text(token)

    def begin():
        with RunLock(folder, "out.zarr"):
            happened.append("begun")

    with first.permit.writing():
        beginning = threading.Thread(target=begin)
        beginning.start()
        # From here on no other cell is begun.
        while (tmp_path / "permit").read_text() == token:
            time.sleep(0.001)
        with pytest.raises(TargetInUseError):
            first.permit.writing().__enter__()
        happened.append("stored")
    beginning.join()
    assert happened == ["stored", "begun"]


def test_it_waits_in_bounded_time(tmp_path, monkeypatch):
    from cellimg_dask.batch import lock

    monkeypatch.setattr(lock, "_WRITERS_S", 0.02)
    folder = open_folder(str(tmp_path))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with RunLock(folder, "out.zarr") as first, first.permit.writing():
        # As if the process with the lock had been killed, and not the one that writes.
        os.close(first._descriptor)
        first._descriptor = None
        with (
            pytest.raises(
                TargetInUseError, match=r"has been storing a cell of out\.zarr for 0\.02"
            ),
            RunLock(folder, "out.zarr"),
        ):
            pass
        first._descriptor = os.open(tmp_path / "lock.json", os.O_RDWR)
    with RunLock(folder, "out.zarr"):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
