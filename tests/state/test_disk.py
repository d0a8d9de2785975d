"""Cells in files: whole or absent, bounded, and safe to share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cellimg_dask.state.disk import DiskCells

KEYS = [f"{number:032x}" for number in range(64)]

posix = pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")


@pytest.fixture
def disk(tmp_path: Path) -> DiskCells:
    return DiskCells(tmp_path / "cells", 1 << 20)


def files(disk: DiskCells) -> list[Path]:
    return sorted(disk.folder.rglob("*.cell"))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype="u2").reshape(2, 3, 4),
        np.array(3.5),
        np.zeros((0, 4), bool),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2026-11-21"], dtype="M8[D]"),
        np.array([1 + 2j], dtype="c16"),
        np.arange(10)[::2],
    ],
)
def test_what_is_kept_is_found(disk, array):
    disk.put(KEYS[0], array)
    found = DiskCells(disk.folder, 1 << 20).get(KEYS[0])
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)


def test_what_was_never_kept_is_absent(disk):
    assert disk.get(KEYS[1]) is None


@pytest.mark.parametrize("place", [0, 9, 30, -1])
def test_a_damaged_file_counts_as_absent_and_is_removed(disk, place):
    disk.put(KEYS[0], np.arange(100))
    (file,) = files(disk)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert disk.get(KEYS[0]) is None
    assert files(disk) == []
    disk.put(KEYS[0], np.arange(100))
    np.testing.assert_array_equal(disk.get(KEYS[0]), np.arange(100))


@pytest.mark.parametrize("length", [0, 5, 24, 60])
def test_a_truncated_file_counts_as_absent(disk, length):
    disk.put(KEYS[0], np.arange(100))
    (file,) = files(disk)
    file.write_bytes(file.read_bytes()[:length])
    assert disk.get(KEYS[0]) is None


def test_a_file_under_another_name_is_not_taken_for_it(disk):
    disk.put(KEYS[0], np.arange(3))
    (file,) = files(disk)
    file.rename(file.with_name(f"{KEYS[1]}.cell"))
    assert disk.get(KEYS[1]) is None


def test_pickles_are_neither_written_nor_read(disk):
    with pytest.raises(ValueError, match="Object arrays"):
        disk.put(KEYS[0], np.array([object()]))
    assert files(disk) == []


def test_the_folder_stays_within_its_bound_and_loses_what_is_unused_for_longest(tmp_path):
    disk = DiskCells(tmp_path, 10_000)
    for number, key in enumerate(KEYS[:8]):
        disk.put(key, np.zeros(1000, "u1"))
        os.utime(disk._path(key), (number, number))
    assert disk.get(KEYS[0]) is not None  # And so it is used last.
    for key in KEYS[8:12]:
        disk.put(key, np.zeros(1000, "u1"))
        assert sum(file.stat().st_size for file in files(disk)) <= 10_000
    assert disk.get(KEYS[0]) is not None
    assert disk.get(KEYS[1]) is None
    assert disk.get(KEYS[11]) is not None


def test_a_cell_larger_than_the_bound_is_not_kept(tmp_path):
    disk = DiskCells(tmp_path, 100)
    disk.put(KEYS[0], np.zeros(1000))
    assert disk.get(KEYS[0]) is None


@posix
def test_a_folder_is_made_for_its_owner_alone(disk):
    assert disk.folder.stat().st_mode & 0o777 == 0o700


@posix
def test_a_folder_that_others_can_write_is_refused(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="of your own"):
        DiskCells(folder, 100)


def test_what_a_killed_process_left_behind_is_removed_once_it_is_old(disk):
    disk.put(KEYS[0], np.zeros(3))
    (file,) = files(disk)
    old, new = file.with_name("a.part"), file.with_name("b.part")
    for part in (old, new):
        part.write_bytes(b"half a cell")
    os.utime(old, (0, 0))
    DiskCells(disk.folder, 100)
    assert not old.exists()
    assert new.exists()


def test_threads_and_processes_share_a_folder_without_torn_reads(disk):
    """Writers replace the same few cells all the time; a reader sees one of them whole, or none."""
    program = """
import sys
import numpy as np
from cellimg_dask.state.disk import DiskCells
disk = DiskCells(sys.argv[1], 1 << 20)
for turn in range(150):
    for key in sys.argv[2:]:
        disk.put(key, np.full(5000, turn % 100, "u1"))
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(disk.folder), *KEYS[:4]])
        for _ in range(2)
    ]
    torn: list[str] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            for key in KEYS[:4]:
                found = disk.get(key)
                if found is not None and (found.shape != (5000,) or len(set(found.tolist())) != 1):
                    torn.append(key)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    codes = [writer.wait(120) for writer in writers]
    ended.set()
    for reader in readers:
        reader.join()
    assert codes == [0, 0]
    assert torn == []
    assert all(disk.get(key) is not None for key in KEYS[:4])
