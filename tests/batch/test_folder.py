"""Small files beside a target: whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cellimg_dask.batch import folder as folders
from cellimg_dask.batch.folder import LocalFolder, UrlFolder, is_url, open_folder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return open_folder(str(tmp_path / "beside"))
    return open_folder(f"memory://folder-test/{tmp_path.name}")


def test_urls_and_paths():
    assert is_url("s3://bucket/x")
    assert is_url("memory://x")
    assert not is_url("/tmp/x")
    assert not is_url("C:\\x")
    assert isinstance(open_folder("memory://x"), UrlFolder)
    assert isinstance(open_folder("x"), LocalFolder)


def test_what_is_written_is_read(folder):
    assert folder.read("a") is None
    assert folder.read("deep/er/a") is None
    folder.write("deep/er/a", b"one")
    assert folder.read("deep/er/a") == b"one"
    folder.write("deep/er/a", b"")
    assert folder.read("deep/er/a") == b""


def test_only_the_first_creates(folder):
    assert folder.create("a", b"one")
    assert not folder.create("a", b"two")
    assert folder.read("a") == b"one"
    folder.remove("a")
    assert folder.create("a", b"two")
    assert folder.read("a") == b"two"


def test_what_is_not_there_may_be_removed(folder):
    folder.remove("a")
    folder.write("a", b"")
    folder.remove("a")
    folder.remove("a")
    assert folder.read("a") is None


def test_names_are_those_below_a_folder(folder):
    assert list(folder.names("done")) == []
    folder.write("other", b"")
    folder.write("done/000/1.json", b"")
    folder.write("done/001/1001.json", b"")
    assert set(folder.names("done")) == {"done/000/1.json", "done/001/1001.json"}
    assert set(folder.names("")) == {"other", "done/000/1.json", "done/001/1001.json"}


def test_of_many_that_create_at_once_one_wins(tmp_path):
    folder, start = LocalFolder(tmp_path), threading.Barrier(8)

    def create(number):
        start.wait(10)
        return folder.create("a", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert folder.read("a") == b"%d" % won.index(True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_readers_see_whole_contents_only(tmp_path):
    folder, ended = LocalFolder(tmp_path), threading.Event()
    contents = [bytes([65 + number]) * 200_000 for number in range(3)]
    folder.write("a", contents[0])

    def write():
        for turn in range(30):
            folder.write("a", contents[turn % 3])
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not ended.is_set():
        seen.add(folder.read("a"))
    writer.join()
    assert seen <= set(contents)


@pytest.mark.parametrize("write", ["write", "create"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, write):
    folder = LocalFolder(tmp_path)
    if write == "write":
        folder.write("a", b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        getattr(folder, write)("a", b"new")
    assert folder.read("a") == (b"old" if write == "write" else None)
    assert len(list(tmp_path.iterdir())) == (write == "write")


def test_a_write_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (happened.append("sync"), fsync(descriptor))[1]
    )
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (happened.append("rename"), replace(path, to))[1]
    )
    LocalFolder(tmp_path).write("a", b"x")
    # The content, its name, and the folder that holds the name.
    assert happened == ["sync", "rename", "sync"]


def test_what_is_being_written_has_no_name_yet(tmp_path):
    folder = LocalFolder(tmp_path)
    folder.write("a", b"")
    (tmp_path / "b.0123.part").write_bytes(b"half")
    assert list(folder.names("")) == ["a"]


def test_a_file_in_the_way_is_no_content(tmp_path):
    (tmp_path / "file").write_text("x")
    assert LocalFolder(tmp_path / "file").read("a") is None
    with pytest.raises(OSError, match="file"):
        LocalFolder(tmp_path / "file").write("a", b"")


def test_systems_without_folders_to_sync(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "O_DIRECTORY")
    folders.sync_folder(tmp_path)


def test_what_killed_writers_left_is_swept_and_nothing_else(folder):
    unique = "0123456789abcdef" * 2
    kept = ["a", "deep/er/b.part", "deep/my__lock", f"c.{unique}", f"{unique}.part", "d.partial"]
    left = [f"a.{unique}.part", f"deep/er/b.json.{unique}.part", "deep/0.__lock"]
    left.append(f"deep/0.{unique}.partial")
    for name in kept + left:
        folder.write(name, b"x")
    folder.sweep()
    if isinstance(folder, LocalFolder):
        files = [path for path in folder.path.rglob("*") if path.is_file()]
        assert {path.relative_to(folder.path).as_posix() for path in files} == set(kept)
    else:
        # Nobody writes there under other names.
        assert set(folder.names("")) == set(kept + left)
