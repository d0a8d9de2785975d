"""Runs of images of which something of the whole has to be known first, as of labels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.batch.passes import needed_whole
from cellimg_dask.blocks.functions import ValueFunction
from cellimg_dask.image.values import cell_values
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.ops.stitching import CutBands


@pytest.fixture
def blobs(rng):
    """Return a picture with some objects in each cell, and larger ones."""
    return ndimage.gaussian_filter(rng.random((60, 50)), 1.5)


@pytest.fixture
def segment(calls):
    """Label bright objects, and count the blocks by the size of the picture before them."""
    add = calls.add

    def segment(block, at):
        add(int(block.size))
        return ndimage.label(block > at)[0]

    return segment


@pytest.fixture
def labelled(segment):
    """Make labels of a picture."""

    def make(image, at=0.5, **options):
        options = {"halo": 4, "cell_shape": (20, 17), "link": "components"} | options
        return ci.map_labels(
            segment, image, params={"at": at}, cache=ci.CellCache(1 << 26), **options
        )

    return make


@pytest.fixture
def bands(monkeypatch):
    """Count how often the bands of each block are made in this process."""
    made = Counter()
    lock, apply = threading.Lock(), ValueFunction.apply

    def counted(function, plan, *args):
        if isinstance(function.function, CutBands):
            with lock:
                made[plan.position] += 1
        return apply(function, plan, *args)

    monkeypatch.setattr(ValueFunction, "apply", counted)
    return made


def test_each_block_is_computed_once_and_stored(blobs, target, labelled, calls, bands, go, stored):
    img = labelled(blobs)
    expected = img[...]
    assert len(calls.take()) == 9
    bands.clear()
    # Nothing is kept in memory but what was stored.
    report = go(labelled(blobs), target)
    assert len(calls.take()) == 9
    assert set(bands.values()) == {1}
    assert len(bands) == 9
    np.testing.assert_array_equal(stored(target), expected)
    (first,) = report.passes
    assert (first.computed, first.skipped, report.computed) == (9, 0, 9)
    assert stored(Manifest(target).pass_of(1)).dtype == np.int32
    for other in (labelled(blobs), img):
        again = go(other, target)
        assert again.skipped == 9
        assert again.passes == []
    assert calls.take() == []
    text = json.loads(Path(f"{target}.run/report.json").read_text())
    assert text["skipped"] == 9


def test_stored_blocks_can_be_linked_in_another_way(blobs, target, labelled, go, stored):
    img = labelled(blobs)
    go(img, target)
    blocks = zarr.open_array(Manifest(target).pass_of(1), mode="r")
    other = ci.stitch(blocks, img.grid, 4, link=("iou", 0.3))
    expected = labelled(blobs, link=("iou", 0.3))
    np.testing.assert_array_equal(other[...], expected[...])


def test_a_change_computes_the_blocks_that_read_it(blobs, target, labelled, calls, go, stored):
    go(labelled(blobs), target)
    calls.take()
    blobs[0, 0] += 0.01
    report = go(labelled(blobs), target)
    assert len(calls.take()) == 1
    assert report.passes[0].redone == {"other": 1}
    # An id may come from anywhere.
    assert report.computed == 9
    np.testing.assert_array_equal(stored(target), labelled(blobs)[...])


def test_a_damaged_cell_needs_no_block(blobs, target, labelled, calls, go, stored):
    go(labelled(blobs), target)
    expected = stored(target)
    calls.take()
    Path(target, "c/1/1").unlink()
    assert go(labelled(blobs), target).computed == 1
    assert calls.take() == []
    Path(target, "c/2/1").unlink()
    Path(Manifest(target).pass_of(1), "c/0/1").write_bytes(b"harm")
    assert go(labelled(blobs), target).computed == 1
    assert len(calls.take()) == 1
    np.testing.assert_array_equal(stored(target), expected)


def test_what_was_stored_first_may_be_deleted(blobs, target, labelled, calls, go):
    import shutil

    go(labelled(blobs), target)
    calls.take()
    shutil.rmtree(Manifest(target).pass_of(1))
    assert go(labelled(blobs), target).skipped == 9
    assert calls.take() == []
    Path(target, "c/1/1").unlink()
    assert go(labelled(blobs), target).computed == 1
    assert len(calls.take()) == 9


def test_a_block_that_fails_keeps_the_others(blobs, target, labelled, calls, go, stored, segment):
    def picky(block, at):
        if block[0, 0] == blobs[0, 0] and not Path(target).with_name("cured").exists():
            raise ValueError("not this one")
        return segment(block, at)

    img = ci.map_labels(picky, blobs, halo=4, cell_shape=(20, 17), params={"at": 0.5})
    report = ci.run(img, target, progress=False, retries=0)
    assert set(report.failed) == {(0, 0)}
    assert "not this one" in str(report.failed[0, 0])
    assert not report.ok
    assert (report.computed, report.passes[0].computed) == (0, 8)
    assert "not this one" in str(report)
    assert len(calls.take()) == 8
    Path(target).with_name("cured").touch()
    report = go(img, target)
    assert report.ok
    assert len(calls.take()) == 1
    np.testing.assert_array_equal(stored(target), labelled(blobs)[...])


def test_another_grid_replaces_the_blocks(blobs, target, labelled, calls, go, stored):
    go(labelled(blobs), target)
    calls.take()
    other = labelled(blobs, cell_shape=30)
    with pytest.raises(FileExistsError, match="is another array"):
        go(other, target)
    assert go(other, target, overwrite=True).computed == 4
    assert len(calls.take()) == 4
    # Cells of the same shape, whose blocks are wider.
    wide = labelled(blobs, cell_shape=30, halo=6)
    assert go(wide, target).redone == {"other": 4}
    assert len(calls.take()) == 4
    np.testing.assert_array_equal(stored(target), wide[...])


def test_labels_further_up_the_chain(blobs, target, labelled, calls, bands, go, stored):
    def fewer(labels):
        return labels // 2

    def images():
        labels = labelled(blobs)
        halved = ci.map_cells(fewer, labels, dtype=np.uint64, cell_shape=20)
        return labels, ci.map_cells(np.add, halved, labels, cell_shape=20)

    labels, total = images()
    assert needed_whole(total.loader) == [labels.blocks.loader]
    report = go(total, target)
    assert (report.computed, len(report.passes)) == (9, 1)
    assert len(calls.take()) == 9
    assert set(bands.values()) == {1}
    np.testing.assert_array_equal(stored(target), labels[...] // 2 + labels[...])
    calls.take()
    assert go(images()[1], target).skipped == 9
    assert calls.take() == []


def test_labels_of_labels(blobs, target, labelled, calls, go, stored):
    def images():
        first = labelled(blobs)
        return ci.label(first, cell_shape=20, cache=ci.CellCache(1 << 26))

    report = go(images(), target)
    assert [done.num_cells for done in report.passes] == [9, 9]
    assert len(calls.take()) == 9
    np.testing.assert_array_equal(stored(target), images()[...])


def test_a_value_of_a_whole_image_beside_it(blobs, target, go, stored, twice, calls):
    lazy = twice(blobs, (16, 16), cache=None)

    def largest(block):
        return max(np.max(part) for part in block.inputs[0].flat)

    each = cell_values(lambda block: block.inputs[0].max(), lazy.grid, lazy)
    most = cell_values(largest, ci.CellGrid(each.shape, each.shape), each)

    def scaled(block):
        block.data[...] = block.inputs[0] / block.inputs[1].item()

    one = ci.Input(most, index_map=lambda roi: ci.Roi((0, 0), (1, 1)))
    img = ci.fill_cells(scaled, lazy.grid, lazy, one, dtype=float)
    assert needed_whole(img.loader) == [lazy.loader]
    assert go(img, target).computed == 16
    assert calls.take() == list(range(16))
    np.testing.assert_allclose(stored(target), blobs / blobs.max())


def test_what_is_local_is_not_stored_first(blobs, target, go, tmp_path):
    smooth = ci.map_cells(np.negative, blobs, cell_shape=20)
    assert go(ci.map_cells(np.negative, smooth), target).passes == []
    blocks = zarr.create_array(tmp_path / "blocks.zarr", data=np.ones((9, 9), "i4"), chunks=(3, 3))
    stitched = ci.stitch(blocks, ci.CellGrid((6, 6), 2), ((0, 1), (0, 1)), link="components")
    assert needed_whole(stitched.loader) == []


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_on_queues(blobs, target, labelled, calls, go, stored, backend):
    with ci.BlockQueue(2, backend=backend) as queue:
        assert go(labelled(blobs, queue=queue), target).ok
        assert len(calls.take()) == 9
        np.testing.assert_array_equal(stored(target), labelled(blobs)[...])
        calls.take()
        # The queue of a run is that of what it needs first.
        assert go(labelled(blobs), f"{target}2", queue=queue).ok
    assert len(calls.take()) == 9
    np.testing.assert_array_equal(stored(f"{target}2"), stored(target))


@pytest.mark.parametrize("how", ["own", "the run's"])
def test_on_a_cluster_nothing_is_computed_twice(
    blobs, target, labelled, calls, bands, go, stored, in_this_process, how
):
    expected = labelled(blobs)[...]
    calls.take()
    bands.clear()
    with in_this_process(2) as (_, _, queue):
        img = labelled(blobs, queue=queue if how == "own" else None)
        assert go(img, target, queue=None if how == "own" else queue).ok
        assert len(calls.take()) == 9
        assert len(bands) == 9
        assert set(bands.values()) == {1}
        np.testing.assert_array_equal(stored(target), expected)
        # And so it is further up the chain.
        bands.clear()
        negative = ci.map_cells(np.invert, img, cell_shape=20)
        assert go(negative, f"{target}2", queue=queue).ok
        assert set(bands.values()) == {1}
        np.testing.assert_array_equal(stored(f"{target}2"), ~expected)


def test_workers_in_other_processes_are_given_the_tables(
    blobs, target, labelled, calls, go, stored, client, monkeypatch
):
    made = []
    compute = CellLoader.compute_owned

    with ci.BlockQueue(2, backend=client) as queue:
        img = labelled(blobs, queue=queue)
        monkeypatch.setattr(
            CellLoader,
            "compute_owned",
            lambda loader, *args: (made.append(loader), compute(loader, *args))[1],
        )
        assert go(img, target).ok
    # Nothing of it was computed here.
    assert made == []
    assert len(calls.take()) == 9
    np.testing.assert_array_equal(stored(target), labelled(blobs)[...])


KILLED = """
import sys, time
import numpy as np
from scipy import ndimage
import cellimg_dask as ci

def segment(block):
    with open("begun", "a") as file:
        file.write(f"{block.shape}\\n")
    time.sleep(0.02)
    return ndimage.label(block > 0.5)[0]

image = np.load("image.npy")
img = ci.map_labels(segment, image, halo=2, cell_shape=(6, 50), link="components")
print(ci.run(img, "out.zarr", progress=False, queue=ci.BlockQueue(1)).ok)
"""


def test_a_killed_run_loses_no_block(blobs, tmp_path, stored, until):
    np.save(tmp_path / "image.npy", blobs)
    begun = tmp_path / "begun"
    begun.touch()

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", KILLED],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    manifest = Manifest(Manifest(str(tmp_path / "out.zarr")).pass_of(1))
    with start() as process:
        until(lambda: len(set(manifest.marked())) >= 3 or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
    done = len(set(manifest.marked()))
    assert 3 <= done < 10
    before = len(begun.read_text().splitlines())
    with start() as process:
        out, _ = process.communicate(timeout=60)
    assert out == "True\n"
    assert len(begun.read_text().splitlines()) - before == 10 - done
    labels = stored(tmp_path / "out.zarr")
    expected, count = ndimage.label(blobs > 0.5)
    assert len(np.unique(labels)) == count + 1
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel().astype("u8")]), axis=1)
    assert pairs.shape[1] == count + 1
