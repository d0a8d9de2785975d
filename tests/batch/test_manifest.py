"""Markers: a cell is done exactly where its marker vouches for what is stored."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from cellimg_dask.batch.folder import open_folder
from cellimg_dask.batch.manifest import Manifest, run_folder
from cellimg_dask.batch.target import Layout, Target
from cellimg_dask.geometry import CellGrid

GRID = CellGrid((4, 6), (2, 3))
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(params=["local", "memory"])
def where(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "out.zarr")
    return f"memory://manifest-test/{tmp_path.name}/out.zarr"


@pytest.fixture
def stored(where):
    Layout.of(GRID, np.dtype("u1")).create(where, overwrite=False)
    return Target(where, GRID)


@pytest.fixture
def manifest(where):
    return Manifest(where)


def commit(manifest, stored, index, key=KEY, value=1):
    stored.write(index, np.full((2, 3), value, "u1"))
    manifest.commit(index, key, stored.checksums(index))


def states(manifest, stored, index, key=KEY):
    return [manifest.state(index, key, stored, checksums=exact) for exact in (True, False)]


def test_it_lies_beside_the_target():
    assert run_folder("a/out.zarr") == run_folder("a/out.zarr/") == "a/out.zarr.run"
    assert run_folder("s3://bucket/out.zarr/") == "s3://bucket/out.zarr.run"


def test_what_is_committed_is_done(manifest, stored):
    assert states(manifest, stored, 2) == ["missing", "missing"]
    commit(manifest, stored, 2)
    assert states(manifest, stored, 2) == ["done", "done"]
    assert states(manifest, stored, 2, None) == ["done", "done"]
    assert states(manifest, stored, 1) == ["missing", "missing"]
    assert list(manifest.marked()) == [2]


def test_a_cell_of_nothing_but_the_fill_value_is_done_too(manifest, stored):
    commit(manifest, stored, 0, value=0)
    assert stored.checksums(0) == {"c/0/0": None}
    assert states(manifest, stored, 0) == ["done", "done"]
    # Until somebody puts something there.
    stored.write(0, np.ones((2, 3), "u1"))
    assert states(manifest, stored, 0) == ["damaged", "damaged"]


def test_data_without_a_marker_are_nothing(manifest, stored):
    stored.write(0, np.ones((2, 3), "u1"))
    assert states(manifest, stored, 0) == ["missing", "missing"]


def test_a_withdrawn_marker_is_gone(manifest, stored):
    commit(manifest, stored, 0)
    manifest.withdraw(0)
    manifest.withdraw(0)
    assert states(manifest, stored, 0) == ["missing", "missing"]
    assert list(manifest.marked()) == []


def test_another_key_is_another_computation(manifest, stored):
    commit(manifest, stored, 0)
    assert states(manifest, stored, 0, KEY[::-1]) == ["other", "other"]


@pytest.mark.parametrize("harm", ["truncated", "emptied", "removed", "longer", "flipped"])
def test_what_changed_since_is_damaged(manifest, stored, where, harm):
    commit(manifest, stored, 3)
    folder, (name,) = open_folder(where), stored.objects(3)
    content = folder.read(name)
    if harm == "removed":
        folder.remove(name)
    else:
        changed = {
            "truncated": content[:-1],
            "emptied": b"",
            "longer": content + b"x",
            "flipped": bytes([content[0] ^ 1]) + content[1:],
        }
        folder.write(name, changed[harm])
    exact, by_size = states(manifest, stored, 3)
    assert exact == "damaged"
    assert by_size == ("done" if harm == "flipped" else "damaged")


def test_a_marker_vouches_for_its_own_cell_only(manifest, stored, where):
    commit(manifest, stored, 0)
    commit(manifest, stored, 1, key=KEY[::-1], value=2)
    beside = open_folder(run_folder(where))
    beside.write("done/000000/1.json", beside.read("done/000000/0.json"))
    assert states(manifest, stored, 1, KEY[::-1]) == ["other", "other"]
    # Even if it were the same key, other files are named.
    assert states(manifest, stored, 1, KEY) == ["damaged", "damaged"]


GARBAGE = [
    b"", b"\xff\xfe\x00", b"{", b"null", b"[]", b'"text"', b"3", b"{}", b"\x00" * 100,
    json.dumps({"schema": 1, "key": KEY}).encode(),
    json.dumps({"schema": 1, "key": KEY, "objects": None}).encode(),
    json.dumps({"schema": 1, "key": KEY, "objects": []}).encode(),
    json.dumps({"schema": 1, "key": KEY, "objects": {"c/0/0": 3}}).encode(),
    json.dumps({"schema": 1, "key": KEY, "objects": {"c/0/0": []}}).encode(),
    json.dumps({"schema": 1, "key": KEY, "objects": {}}).encode(),
    b"[" * 500,
]  # fmt: skip


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_vouches_for_nothing(manifest, stored, where, content):
    commit(manifest, stored, 0)
    open_folder(run_folder(where)).write("done/000000/0.json", content)
    assert states(manifest, stored, 0) == ["damaged", "damaged"]
    assert states(manifest, stored, 0, None) == ["damaged", "damaged"]


def test_markers_of_another_version_of_this_library_are_others(manifest, stored, where):
    commit(manifest, stored, 0)
    beside = open_folder(run_folder(where))
    content = json.loads(beside.read("done/000000/0.json")) | {"schema": 99}
    beside.write("done/000000/0.json", json.dumps(content).encode())
    assert states(manifest, stored, 0) == ["other", "other"]


def test_no_folder_has_many_entries(manifest, where):
    for index in (0, 999, 1000, 1_234_567):
        manifest.commit(index, KEY, {})
    beside = open_folder(run_folder(where))
    assert set(beside.names("done")) == {
        "done/000000/0.json",
        "done/000000/999.json",
        "done/000001/1000.json",
        "done/001234/1234567.json",
    }
    beside.write("done/000000/notes.txt", b"")
    assert sorted(manifest.marked()) == [0, 999, 1000, 1_234_567]


def test_a_manifest_travels_as_its_path(manifest, stored):
    commit(pickle.loads(pickle.dumps(manifest)), stored, 0)
    assert states(manifest, stored, 0) == ["done", "done"]
