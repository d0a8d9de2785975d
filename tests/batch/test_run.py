"""Runs: the result of the whole image, and after any harm exactly what is missing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.batch import target as targets
from cellimg_dask.batch.folder import LocalFolder, open_folder
from cellimg_dask.batch.manifest import Manifest


def smooth(array, sigma):
    return ndimage.gaussian_filter(array, sigma, mode="nearest", truncate=2)


def marker(target, index):
    return Path(f"{target}.run/done/000000/{index}.json")


# ---------------------------------------------------------------- the result


@pytest.mark.parametrize(
    ("shape", "cells"), [((20, 25), 16), ((7, 9, 11), (4, 5, 6)), ((50,), 7), ((3, 4), 64)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": 1, "compressor": None},
        {"sharded": True, "compressor": "blosc"},
        {"compressor": "gzip", "fill_value": np.nan},
        {"compressor": None, "fill_value": 0.1},
    ],
    ids=str,
)
def test_equals_the_whole_image(rng, target, go, stored, shape, cells, options):
    image = rng.random(shape).astype("f4")
    img = ci.map_cells(smooth, image, halo=4, params={"sigma": 2}, dtype="f4", cell_shape=cells)
    report = go(img, target, **options)
    assert (report.computed, report.skipped) == (img.grid.num_cells, 0)
    np.testing.assert_allclose(stored(target), smooth(image, 2), rtol=1e-5)
    files = [path for path in Path(target, "c").rglob("*") if path.is_file()]
    assert report.bytes_written == sum(path.stat().st_size for path in files)
    again = go(img, target, **options)
    assert (again.computed, again.skipped) == (0, img.grid.num_cells)


DTYPES = ["?", "u1", "<u2", ">i2", "<i8", "f2", ">f4", "f8", "c8", ">c16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("writer", ["tensorstore", "zarr"])
def test_every_dtype(rng, target, twice, go, stored, monkeypatch, dtype, writer):
    if writer == "zarr":
        monkeypatch.setattr(targets, "_open_twin", lambda where, array: None)
    image = rng.random((6, 7)) * 3
    image = (image + 1j * image.T.reshape(6, 7) if "c" in dtype else image).astype(dtype)
    img = twice(image, by=1)
    assert go(img, target).ok
    assert np.array_equal(stored(target), image)
    assert stored(target).dtype == image.dtype.newbyteorder("=")
    assert go(img, target).computed == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (1, 1, 1)])
def test_small_and_empty_shapes(target, go, stored, shape):
    image = np.full(shape, 3.0)
    img = ci.map_cells(np.negative, image, cell_shape=(2,) * len(shape))
    assert go(img, target).computed == img.grid.num_cells
    assert np.array_equal(stored(target), -image)
    assert stored(target).shape == shape
    assert go(img, target).skipped == img.grid.num_cells


def test_chains_and_several_inputs(rng, target, go, stored, tmp_path):
    image = rng.random((30, 20)).astype("f4")
    source = zarr.create_array(tmp_path / "in.zarr", data=image, chunks=(8, 8), shards=(16, 16))
    first = ci.map_cells(smooth, source, halo=2, params={"sigma": 1}, dtype="f4", cell_shape=8)
    last = ci.map_cells(np.subtract, source, first, cell_shape=(7, 9))
    assert go(last, target).ok
    np.testing.assert_allclose(stored(target), image - smooth(image, 1), atol=1e-6)


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_on_a_queue(rng, target, twice, calls, go, stored, backend):
    image = rng.integers(0, 99, (30, 20))
    with ci.BlockQueue(2, "offset = 5", backend) as queue:
        code = ci.BlockCode("block.data[...] = block.inputs[0] + offset")
        grid = ci.CellGrid(image.shape, 8)
        img = ci.fill_cells(code, grid, image, dtype=image.dtype, queue=queue)
        assert go(img, target).ok
        assert np.array_equal(stored(target), image + 5)
        # The queue of a run goes before the image's.
        assert go(twice(image), f"{target}2", queue=queue).ok
        assert np.array_equal(stored(f"{target}2"), 2 * image)
    assert len(set(calls.take())) == 40


@pytest.mark.parametrize("kind", ["path", "string", "relative", "file url", "memory"])
def test_every_kind_of_target(tmp_path, monkeypatch, twice, calls, go, stored, kind):
    monkeypatch.chdir(tmp_path)
    target = {
        "path": tmp_path / "out.zarr",
        "string": str(tmp_path / "deep" / "er" / "out.zarr"),
        "relative": "out.zarr",
        "file url": (tmp_path / "with space.zarr").as_uri(),
        "memory": f"memory://run-test/{tmp_path.name}/out.zarr",
    }[kind]
    image = np.arange(60).reshape(6, 10)
    report = go(twice(image), target)
    assert report.computed == 6
    assert np.array_equal(stored(report.target), 2 * image)
    assert len(calls.take()) == 6
    assert go(twice(image), target).skipped == 6
    open_folder(f"{report.target}.run").remove("done/000000/4.json")
    assert go(twice(image), target).computed == 1
    assert calls.take() == [4]
    if kind == "file url":
        assert (tmp_path / "with space.zarr" / "zarr.json").is_file()


def test_a_chunk_of_nothing_but_the_fill_value_is_left_out_and_done(
    target, twice, calls, go, stored
):
    image = np.zeros((8, 8), "u1")
    image[0, 0] = 1
    assert go(twice(image), target).computed == 4
    files = [path for path in Path(target, "c").rglob("*") if path.is_file()]
    assert len(files) == 1
    calls.take()
    assert go(twice(image), target).skipped == 4
    assert calls.take() == []
    assert np.array_equal(stored(target), 2 * image)


# ---------------------------------------------------------------- carrying on


@pytest.fixture
def image():
    return np.arange(1, 145).reshape(12, 12)


CHUNK = "c/1/1"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


HARMS = {
    "nothing": lambda chunk, marker, other: None,
    "chunk truncated": lambda chunk, marker, other: os.truncate(chunk, 7),
    "chunk emptied": lambda chunk, marker, other: os.truncate(chunk, 0),
    "byte flipped": lambda chunk, marker, other: flip(chunk),
    "chunk removed": lambda chunk, marker, other: chunk.unlink(),
    "data of another cell": lambda chunk, marker, other: chunk.write_bytes(other.read_bytes()),
    "marker removed": lambda chunk, marker, other: marker(None).unlink(),
    "marker garbage": lambda chunk, marker, other: marker(None).write_bytes(b"\xff{]"),
    "marker empty": lambda chunk, marker, other: marker(None).write_bytes(b""),
    "marker of another cell": lambda chunk, marker, other: marker(None).write_bytes(
        marker(0).read_bytes()
    ),
    "both removed": lambda chunk, marker, other: (chunk.unlink(), marker(None).unlink()),
    "chunk flipped, marker removed": lambda chunk, marker, other: (
        flip(chunk),
        marker(None).unlink(),
    ),
}


WHOLE, RAGGED = (12, 12), (6, 7)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    ("writer", "layout", "shape"),
    [
        ("tensorstore", {}, WHOLE),
        ("tensorstore", {}, RAGGED),
        ("tensorstore", {"chunks": 2}, WHOLE),
        ("tensorstore", {"chunks": 2}, RAGGED),
        ("tensorstore", {"chunks": 2, "sharded": False}, RAGGED),
        ("zarr", {}, RAGGED),
        ("zarr", {"chunks": 2}, RAGGED),
    ],
)
def test_after_harm_exactly_what_was_harmed(
    image, target, twice, calls, go, stored, monkeypatch, harm, layout, shape, writer
):
    if writer == "zarr":
        monkeypatch.setattr(targets, "_open_twin", lambda where, array: None)
    image = image[: shape[0], : shape[1]]
    # Where the image is ragged it is the last cell, which is smaller than its chunk.
    img = twice(image)
    cell, count = img.grid.index((1, 1)), img.grid.num_cells
    chunk = Path(target, "c/2/2" if "sharded" in layout else "c/1/1")
    assert go(img, target, **layout).ok
    assert calls.take() == list(range(count))
    HARMS[harm](
        chunk,
        lambda index: marker(target, cell if index is None else index),
        Path(target, "c/0/0"),
    )
    again = [] if harm == "nothing" else [cell]
    report = go(twice(image), target, **layout)
    assert calls.take() == again
    assert (report.computed, report.skipped) == (len(again), count - len(again))
    if harm == "nothing" or "marker removed" in harm or harm == "both removed":
        assert report.redone == {}
    else:
        assert report.redone == {"other" if harm == "marker of another cell" else "damaged": 1}
    assert np.array_equal(stored(target), 2 * image)
    assert go(twice(image), target, **layout).computed == 0


def test_sizes_are_quicker_and_see_less(image, target, twice, calls, go):
    go(twice(image), target)
    calls.take()
    flip(Path(target, CHUNK))
    assert go(twice(image), target, verify="sizes").computed == 0
    os.truncate(f"{target}/c/0/0", 3)
    assert go(twice(image), target, verify="sizes").computed == 1
    assert calls.take() == [0]
    assert go(twice(image), target, verify="checksums").computed == 1
    assert calls.take() == [4]


def test_what_was_edited_is_computed_again(image, target, twice, calls, go, stored):
    add = calls.add

    def edited(block):
        add(block.index)
        block.data[...] = 1 + block.params["by"] * block.inputs[0][block.halo]

    go(twice(image), target)
    calls.take()
    for img, expected in (
        (twice(image, by=3), 3 * image),
        (twice(image, by=3, f=edited), 3 * image + 1),
        (twice(image, by=3, f=edited, version="1"), 3 * image + 1),
    ):
        report = go(img, target)
        assert calls.take() == list(range(9))
        assert (report.computed, report.redone) == (9, {"other": 9})
        assert np.array_equal(stored(target), expected)
        assert go(img, target).computed == 0


def test_a_change_of_a_region_concerns_those_that_read_it(image, target, twice, calls, go, stored):
    go(twice(image, halo=1), target)
    calls.take()
    image[3, 3] = 999
    report = go(twice(image, halo=1), target)
    assert calls.take() == [0, 1, 3, 4]
    assert report.redone == {"other": 4}
    assert np.array_equal(stored(target), 2 * image)


def test_a_store_that_was_overwritten_is_read_anew(
    tmp_path, image, target, twice, calls, go, stored
):
    source = zarr.create_array(tmp_path / "in.zarr", data=image, chunks=(4, 4))
    first = ci.map_cells(np.negative, source)
    img = twice(first)
    assert np.array_equal(img[...], -2 * image)
    calls.take()
    go(img, target)
    assert calls.take() == list(range(9))
    source[4:8, 4:8] = 7
    path = tmp_path / "in.zarr" / "c" / "1" / "1"
    os.utime(path, ns=(path.stat().st_mtime_ns - 10**6,) * 2)
    image[4:8, 4:8] = 7
    # The same image, whose chunks and cells upstream are in the cache as they were.
    assert go(img, target).redone == {"other": 1}
    assert calls.take() == [4]
    assert np.array_equal(stored(target), -2 * image)


def test_inputs_that_cannot_be_compared_are_refused_before_anything_is_made(image, target, go):
    import dask.array as da

    img = ci.map_cells(np.negative, da.from_array(image, chunks=4))
    with pytest.raises(ci.NoContentError, match=r"give Input\(array, version="):
        go(img, target)
    assert not Path(target).exists()
    assert not Path(f"{target}.run").exists()
    img = ci.map_cells(np.negative, ci.Input(da.from_array(image, chunks=4), version="1"))
    assert go(img, target).ok


def test_the_report_lies_beside(image, target, twice, go):
    report = go(twice(image), target)
    saved = json.loads(Path(f"{target}.run/report.json").read_text())
    assert saved == report.as_dict()
    assert (saved["computed"], saved["skipped"], saved["num_cells"]) == (9, 0, 9)
    assert saved["peak_memory"] > 1 << 20
    assert saved["seconds"] > 0
    assert str(report).startswith("9 cells computed, 0 done before, 0 failed of 9 in ")
    assert str(report).endswith(f" MiB written to {target}")


# ---------------------------------------------------------------- cells that fail


def test_a_failing_cell_is_tried_again_and_reported(
    image, target, twice, calls, go, stored, tmp_path
):
    add, cure = calls.add, str(tmp_path / "cure")

    def f(block):
        add(block.index)
        if block.index in (2, 5) and not Path(cure).exists():
            raise ValueError(f"no luck with {block.index}")
        block.data[...] = 2 * block.inputs[0]

    report = go(twice(image, f=f), target, retries=3)
    assert calls.take() == sorted([0, 1, 3, 4, 6, 7, 8] + 4 * [2, 5])
    assert (report.computed, report.ok) == (7, False)
    assert set(report.failed) == {(0, 2), (1, 2)}
    error = report.failed[1, 2]
    assert isinstance(error, ci.BlockError)
    assert (error.position, str(error.__cause__)) == ((1, 2), "no luck with 5")
    assert "(1, 2): BlockError: " in str(report)
    saved = json.loads(Path(f"{target}.run/report.json").read_text())["failed"]
    assert [entry["position"] for entry in saved] == [[0, 2], [1, 2]]
    assert "ValueError: no luck with 2" in saved[0]["error"]
    good = np.ones((12, 12), bool)
    good[0:8, 8:12] = False
    assert np.array_equal(stored(target)[good], 2 * image[good])
    # Nothing of the others is done again, and the failed ones are.
    assert set(go(twice(image, f=f), target, retries=0).failed) == {(0, 2), (1, 2)}
    assert calls.take() == [2, 5]
    Path(cure).touch()
    assert go(twice(image, f=f), target).computed == 2
    assert calls.take() == [2, 5]
    assert np.array_equal(stored(target), 2 * image)


def test_a_cell_that_fails_once_is_no_failure(image, target, twice, calls, go, stored):
    add, count = calls.add, calls.count

    def f(block):
        add(block.index)
        if count(block.index) == 1:
            raise ValueError("not at once")
        block.data[...] = 2 * block.inputs[0]

    assert go(twice(image, f=f), target, retries=1).ok
    assert calls.take() == sorted(2 * list(range(9)))
    assert np.array_equal(stored(target), 2 * image)


def test_an_error_upstream_is_that_of_each_cell_that_needs_it(image, target, go):
    def upstream(block):
        if block.index == 0:
            raise ValueError("no luck")
        block.data[...] = block.inputs[0]

    first = ci.fill_cells(upstream, ci.CellGrid((12, 12), 8), image, dtype=int)
    img = ci.map_cells(np.negative, first, cell_shape=4)
    report = go(img, target, retries=0)
    assert set(report.failed) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert report.computed == 5
    assert all("no luck" in str(error) for error in report.failed.values())


def test_a_result_of_the_wrong_shape_is_a_failure(image, target, go):
    img = ci.map_cells(lambda a: a[:1], image, dtype=int, cell_shape=(4, 12))
    report = go(img, target, retries=0)
    assert len(report.failed) == 3
    assert {type(error) for error in report.failed.values()} == {ci.ResultError}


def test_an_init_that_fails_ends_the_run(image, target, go):
    code = ci.BlockCode("block.data[...] = 1", init="1 / 0")
    img = ci.fill_cells(code, ci.CellGrid((12, 12), 4), dtype=int)
    with pytest.raises(ci.InitError, match="ZeroDivisionError"):
        go(img, target)


def test_worker_processes_that_die(image, target, twice, calls, go, stored):
    add, count = calls.add, calls.count

    def f(block):
        add(block.index)
        if block.index == 7 or (block.index == 3 and count(3) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        block.data[...] = 2 * block.inputs[0]

    with ci.BlockQueue(2, backend="processes") as queue:
        report = go(twice(image, f=f), target, queue=queue, retries=1)
    assert list(report.failed) == [(2, 1)]
    assert isinstance(report.failed[2, 1], ci.WorkerDiedError)
    assert calls.take() == sorted([*range(9), 3, 7])
    good = np.ones((12, 12), bool)
    good[8:12, 4:8] = False
    assert np.array_equal(stored(target)[good], 2 * image[good])
    with ci.BlockQueue(2, backend="processes") as queue:
        assert go(twice(image), target, queue=queue).redone == {"other": 8}


# ---------------------------------------------------------------- what is there already


def contents(path):
    return {
        str(each.relative_to(path)): (each.read_bytes(), each.stat().st_mtime_ns)
        for each in sorted(Path(path).rglob("*"))
        if each.is_file()
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["v3", "v2", "group", "folder", "file"])
def test_what_others_made_is_refused_and_not_touched(tmp_path, image, twice, go, what, overwrite):
    target = tmp_path / "there"
    if what == "v3":
        zarr.create_array(target, data=image, chunks=(4, 4))
    elif what == "v2":
        zarr.create_array(target, data=image, chunks=(4, 4), zarr_format=2)
    elif what == "group":
        zarr.create_group(target).create_array("a", data=image)
    elif what == "folder":
        target.mkdir()
        (target / "photo.jpg").write_bytes(b"precious")
    else:
        target.write_bytes(b"precious")
    before = contents(tmp_path)
    if overwrite and what in ("v2", "v3"):
        assert go(twice(image), target, overwrite=True).computed == 9
        assert np.array_equal(zarr.open_array(target)[...], 2 * image)
        return
    expected = "not made by a run" if what in ("v2", "v3") else "is no zarr array"
    with pytest.raises(FileExistsError, match=expected):
        go(twice(image), target, overwrite=overwrite)
    now = contents(tmp_path)
    assert {name: now[name] for name in before} == before
    assert not set(contents(target)) - {name.partition("/")[2] for name in before}


def test_a_target_in_a_group_of_others(tmp_path, image, twice, go, stored):
    zarr.create_group(tmp_path / "all.zarr").create_array("raw", data=image)
    assert go(twice(image), tmp_path / "all.zarr" / "twice").ok
    assert np.array_equal(zarr.open_group(tmp_path / "all.zarr")["raw"][...], image)
    assert np.array_equal(stored(tmp_path / "all.zarr" / "twice"), 2 * image)


def test_an_empty_folder_will_do(target, image, twice, go):
    Path(target).mkdir()
    assert go(twice(image), target).ok


def test_another_array_is_refused_until_it_may_be_replaced(image, target, twice, calls, go, stored):
    go(twice(image), target)
    before = contents(target)
    for img, options, message in (
        (twice(image[:8]), {}, r"shape \(12, 12\), expected \(8, 12\)"),
        (twice(image.astype("u1")), {}, "dtype int64, expected uint8"),
        (twice(image, cells=6), {}, r"chunks \(4, 4\), expected \(6, 6\)"),
        (twice(image), {"chunks": 2}, "shards None"),
        (twice(image), {"resume": False}, "resume=True carries it on"),
    ):
        with pytest.raises(FileExistsError, match=message):
            go(img, target, **options)
        assert contents(target) == before
    calls.take()
    assert go(twice(image, cells=6), target, overwrite=True).computed == 4
    assert calls.take() == [0, 1, 2, 3]
    assert np.array_equal(stored(target), 2 * image)
    # Markers of the cells that are no more are gone.
    assert go(twice(image, cells=6), target).skipped == 4
    assert go(twice(image), target, overwrite=True).computed == 9


def test_overwriting_computes_everything_again(image, target, twice, calls, go):
    go(twice(image), target)
    calls.take()
    assert go(twice(image), target, overwrite=True).computed == 9
    assert calls.take() == list(range(9))
    assert go(twice(image), target, resume=True, overwrite=False).skipped == 9


def test_killed_between_the_first_files(image, target, twice, go, stored, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(zarr, "create_array", killed)
        with pytest.raises(Killed):
            go(twice(image), target)
    # What was made of an array that was being overwritten.
    Path(target, "c", "0").mkdir(parents=True)
    Path(target, "c", "0", "0").write_bytes(b"old")
    assert go(twice(image), target).computed == 9
    assert np.array_equal(stored(target), 2 * image)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retries": -1}, ValueError, "retries"),
        ({"retries": 1.5}, TypeError, "retries"),
        ({"verify": "no"}, ValueError, 'verify must be "checksums" or "sizes"'),
        ({"chunks": 3}, ValueError, "does not divide the cell"),
        ({"compressor": "zip"}, ValueError, "unknown compressor"),
        ({"fill_value": "a"}, ValueError, "is no value of dtype"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    image, target, twice, go, options, error, message
):
    with pytest.raises(error, match=message):
        go(twice(image), target, **options)
    assert not Path(f"{target}.run").exists()
    with pytest.raises(TypeError, match=r"img must be a CellImg, or .*, got ndarray"):
        ci.run(image, target)
    with pytest.raises(TypeError, match="PathLike object, not int"):
        ci.run(twice(image), 3)
    with pytest.raises(TypeError, match="target must be a path or an URL, got bytes"):
        ci.run(twice(image), b"x")


# ---------------------------------------------------------------- one at a time


def test_a_second_run_is_refused_in_another_process_too(image, target, twice, go, stored):
    entered, go_on = threading.Event(), threading.Event()

    def f(block):
        entered.set()
        go_on.wait(20)
        block.data[...] = 2 * block.inputs[0]

    img = twice(image, f=f, version="1")
    found = []
    runner = threading.Thread(target=lambda: found.append(go(img, target)))
    runner.start()
    try:
        assert entered.wait(20)
        with pytest.raises(ci.TargetInUseError, match=f"process {os.getpid()} on "):
            go(twice(image), target, overwrite=True)
        program = (
            "import sys, numpy as np, cellimg_dask as ci\n"
            "img = ci.map_cells(np.negative, np.zeros((12, 12)), cell_shape=4)\n"
            "try: ci.run(img, sys.argv[1], overwrite=True, progress=False)\n"
            "except ci.TargetInUseError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, target],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert f"process {os.getpid()} on " in done.stdout, done.stderr
    finally:
        go_on.set()
        runner.join()
    assert found[0].computed == 9
    assert np.array_equal(stored(target), 2 * image)
    assert go(img, target).skipped == 9


# ---------------------------------------------------------------- killed and interrupted


PROGRAM = """
import os, sys, time
import numpy as np
import cellimg_dask as ci

log = sys.argv[2]

def f(block):
    with open(log, "a") as file:
        file.write(f"{block.index}\\n")
    time.sleep(0.004)
    block.data[...] = 2 * block.inputs[0]

image = np.arange(120 * 8).reshape(120, 8)
img = ci.fill_cells(f, ci.CellGrid(image.shape, (1, 8)), image, dtype=image.dtype)
with ci.BlockQueue(3) as queue:
    print(ci.run(img, sys.argv[1], queue=queue, progress=False), flush=True)
"""


def test_killed_five_times_nothing_is_lost_and_nothing_done_twice(
    target, calls, marked, stored, until, tmp_path
):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), target, calls.name]
    begun, rng = 0, np.random.default_rng(7)
    for _ in range(5):
        committed = marked(target)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
            wanted = begun + int(rng.integers(3, 21))
            until(lambda wanted=wanted: len(calls.so_far()) >= wanted or process.poll() is not None)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        again = calls.so_far()[begun:]
        assert not committed & set(again), "computed after it was committed"
        assert len(again) == len(set(again))
        begun += len(again)
    committed = marked(target)
    assert 5 < len(committed) < 120
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert f"{120 - len(committed)} cells computed, {len(committed)} done before" in done.stdout
    rest = calls.so_far()[begun:]
    assert sorted(rest) == sorted(set(range(120)) - committed)
    assert np.array_equal(stored(target), 2 * np.arange(120 * 8).reshape(120, 8))


def test_ctrl_c_leaves_what_is_done(image, target, twice, calls, go, stored, marked):
    add, count, me = calls.add, calls.count, os.getpid()

    def f(block):
        add(block.index)
        if block.index == 3 and count(3) == 1:
            os.kill(me, signal.SIGINT)
        block.data[...] = 2 * block.inputs[0]

    with pytest.raises(KeyboardInterrupt):
        go(twice(image, f=f), target)
    committed = marked(target)
    begun = calls.so_far()
    assert committed <= set(begun)
    report = json.loads(Path(f"{target}.run/report.json").read_text())
    assert (report["num_cells"], report["failed"]) == (9, [])
    assert go(twice(image, f=f), target).ok
    assert sorted(calls.so_far()[len(begun) :]) == sorted(set(range(9)) - committed)
    assert np.array_equal(stored(target), 2 * image)


# ---------------------------------------------------------------- disks


def test_a_full_disk_ends_the_run_and_more_room_carries_it_on(
    disk, twice, calls, marked, go, stored, rng
):
    # So small that what all threads have under way does not fill the disk alone.
    image = rng.integers(0, 255, (64, 16 * 1024), dtype="u1")
    img, target = twice(image, cells=(1, 16 * 1024)), str(disk.path / "out.zarr")
    with pytest.raises((OSError, ValueError), match=r"No space left|RESOURCE_EXHAUSTED"):
        go(img, target)
    committed = marked(target)
    assert 0 < len(committed) < 64
    calls.take()
    # Still full.
    with pytest.raises((OSError, ValueError), match=r"No space left|RESOURCE_EXHAUSTED"):
        go(img, target)
    assert not set(calls.take()) & committed
    disk.set("size=4m")
    committed = marked(target)
    report = go(img, target)
    assert report.ok
    assert calls.take() == sorted(set(range(64)) - committed)
    assert np.array_equal(stored(target), 2 * image)


def test_a_read_only_target_is_an_error_and_stays_as_it_was(disk, image, twice, calls, go, stored):
    target = str(disk.path / "out.zarr")
    go(twice(image), target)
    Path(target, CHUNK).unlink()
    calls.take()
    disk.set("ro")
    with pytest.raises(OSError, match="Read-only file system"):
        go(twice(image), target)
    with pytest.raises(OSError, match="Read-only file system"):
        go(twice(image), disk.path / "new.zarr")
    assert calls.take() == []
    disk.set("rw")
    assert go(twice(image), target).computed == 1
    assert np.array_equal(stored(target), 2 * image)


@pytest.mark.parametrize("writer", ["tensorstore", "zarr"])
def test_a_limit_on_the_size_of_files(
    target, twice, calls, marked, go, stored, rng, monkeypatch, writer
):
    if writer == "zarr":
        monkeypatch.setattr(targets, "_open_twin", lambda where, array: None)
    image = rng.integers(0, 127, (8, 256 * 1024), dtype="u1")
    # Only this one does not compress well.
    image[:5] = 1
    img = twice(image, cells=(1, 256 * 1024))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, hard))
    try:
        with pytest.raises((OSError, ValueError), match="File too large"):
            go(img, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    committed = marked(target)
    assert committed <= {0, 1, 2, 3, 4}
    calls.take()
    assert go(img, target).ok
    assert calls.take() == sorted(set(range(8)) - committed)
    assert np.array_equal(stored(target), 2 * image)


def test_a_marker_does_not_outlive_its_data(image, target, twice, calls, go, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    go(twice(image), target, compressor=None)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", killed)
        with pytest.raises(Killed):
            go(twice(image, by=3), target)
    harmed = set(range(9)) - set(Manifest(target).marked())
    assert harmed
    calls.take()
    # Of the same size as before, so that the marker would be believed.
    assert go(twice(image), target, verify="sizes").computed == len(harmed)
    assert calls.take() == sorted(harmed)


def test_a_marker_that_cannot_be_written_marks_nothing(
    image, target, twice, calls, marked, go, stored, monkeypatch
):
    write = LocalFolder.write

    def full(folder, name, content):
        if name.endswith("/3.json"):
            raise OSError(28, "No space left on device")
        write(folder, name, content)

    monkeypatch.setattr(LocalFolder, "write", full)
    with pytest.raises(OSError, match="No space left"):
        go(twice(image), target)
    committed = marked(target)
    assert 3 not in committed
    monkeypatch.undo()
    calls.take()
    assert go(twice(image), target).ok
    assert calls.take() == sorted(set(range(9)) - committed)
    assert np.array_equal(stored(target), 2 * image)


# ---------------------------------------------------------------- what shows


def test_a_bar_with_cells_on_standard_error(image, target, twice, capsys):
    ci.run(twice(image), target)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "9/9" in shown.err
    assert "cell/s" in shown.err


def test_nothing_is_left_behind_after_a_refusal(image, target, twice, go, footprint):
    go(twice(image), target)
    before = footprint()
    for _ in range(3):
        with pytest.raises(FileExistsError):
            go(twice(image[:8]), target)
    after = footprint()
    assert after["threads"] == before["threads"]
    assert after["descriptors"] <= before["descriptors"]
