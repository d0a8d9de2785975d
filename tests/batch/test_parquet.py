"""Runs of tables: what pandas and dask read is what was computed, after any harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import cellimg_dask as ci
from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.ops.detect import blob_log
from cellimg_dask.ops.points import map_points

dd = pytest.importorskip("dask.dataframe")


pytestmark = pytest.mark.filterwarnings(
    # Of dask's own.
    "ignore:The inplace keyword:pandas.errors.Pandas4Warning"
)


def same_rows(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), expected.reset_index(drop=True), check_dtype=False
    )


@pytest.fixture
def image(rng):
    """Return a picture with empty cells."""
    image = rng.random((30, 40))
    image[:10] = 0
    return image


@pytest.fixture
def target(tmp_path):
    return str(tmp_path / "out.parquet")


@pytest.fixture
def bright(image, calls):
    """Find bright voxels, and count the cells by their first coordinates."""
    add = calls.add

    def bright(array, at):
        add(len(array))
        places = np.argwhere(array > at)
        return {
            "y": places[:, 0],
            "x": places[:, 1],
            "value": array[array > at],
            "name": [f"no. {number}" for number in range(len(places))],
        }

    def make(array=image, at=0.95, columns=None, **options: Any):
        options = {"cell_shape": 10, "axes": "yx", "cache": None} | options
        columns = columns or {"value": "float32", "name": "str"}
        return map_points(bright, array, columns=columns, params={"at": at}, **options)

    return make


def test_pandas_and_dask_read_the_whole(bright, target, calls):
    points = bright(voxel_size=[2, 0.5])
    expected = points.compute()
    assert 0 < len(expected) < 100
    calls.take()
    report = ci.run(points, target, progress=False)
    assert (report.computed, report.ok) == (12, True)
    assert len(calls.take()) == 12
    found = pd.read_parquet(target)
    same_rows(found, expected)
    assert list(found.columns) == ["y", "x", "value", "name", "physical-y", "physical-x"]
    assert [str(kind) for kind in found.dtypes] == [str(kind) for kind in points.dtypes]
    lazy = dd.read_parquet(target)
    assert lazy.npartitions == 12
    same_rows(lazy.compute(), expected)
    # Cells without points have the same columns.
    schemas = [pq.read_schema(path) for path in sorted(Path(target).iterdir())]
    assert len(schemas) == 12
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)
    assert report.bytes_written == sum(path.stat().st_size for path in Path(target).iterdir())
    assert ci.run(points, target, progress=False).skipped == 12
    assert calls.take() == []


@pytest.mark.parametrize("dtype", ["Int64", "bool", "datetime64[ns]", "category", "object", "u1"])
def test_every_kind_of_column(image, target, dtype):
    def find(array):
        places = np.argwhere(array > 0.97)
        values: Any = np.arange(len(places)) % 2
        if dtype in ("category", "object"):
            values = [f"kind {value}" for value in values]
        return {
            "axis-0": places[:, 0],
            "axis-1": places[:, 1],
            "kind": pd.Series(values, dtype=dtype),
        }

    points = map_points(find, image, columns={"kind": dtype}, cell_shape=10)
    assert ci.run(points, target, progress=False).ok
    found, expected = pd.read_parquet(target), points.compute()
    same_rows(found.astype({"kind": str}), expected.astype({"kind": str}))
    if dtype not in ("object", "category"):
        assert found["kind"].dtype == dtype


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (1, 1)])
def test_tables_of_small_and_empty_images(bright, target, shape):
    points = bright(np.ones(shape))
    report = ci.run(points, target, progress=False)
    assert report.ok
    for found in (pd.read_parquet(target), dd.read_parquet(target).compute()):
        assert list(found.columns) == list(points.columns)
        assert len(found) == np.prod(shape)
    assert ci.run(points, target, progress=False).ok


@pytest.mark.parametrize("options", [{"compressor": "gzip", "level": 3}, {"compressor": None}])
def test_compression(bright, target, options):
    ci.run(bright(), target, progress=False, **options)
    part = pq.read_metadata(Path(target, "part-11.parquet")).row_group(0).column(0)
    assert part.compression == ("GZIP" if options["compressor"] else "UNCOMPRESSED")
    same_rows(pd.read_parquet(target), bright().compute())


@pytest.mark.parametrize("harm", ["removed", "cut", "changed", "not marked"])
def test_exactly_what_was_harmed_is_computed_again(bright, target, calls, harm):
    ci.run(bright(), target, progress=False)
    before = pd.read_parquet(target)
    calls.take()
    part = Path(target, "part-07.parquet")
    content = bytearray(part.read_bytes())
    if harm == "removed":
        part.unlink()
    elif harm == "cut":
        part.write_bytes(content[:-5])
    elif harm == "changed":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    else:
        Path(f"{target}.run/done/000000/7.json").unlink()
    report = ci.run(bright(), target, progress=False)
    assert (report.computed, report.skipped) == (1, 11)
    assert len(calls.take()) == 1
    same_rows(pd.read_parquet(target), before)


def test_what_decides_is_content(bright, image, target, calls):
    def again(*args, **options):
        report = ci.run(bright(*args, **options), target, progress=False)
        same_rows(pd.read_parquet(target), bright(*args, **options).compute())
        return report.computed

    assert again() == 12
    assert again(at=0.9) == 12
    assert again(image, 0.9) == 0
    changed = image.copy()
    changed[0, 0] = 1
    assert again(changed, 0.9) == 1


def test_other_columns_are_another_table(bright, target, image):
    ci.run(bright(), target, progress=False)
    with pytest.raises(FileExistsError, match=r"is another table .columns y double, x double, val"):
        ci.run(bright(voxel_size=2), target, progress=False)
    assert ci.run(bright(voxel_size=2), target, progress=False, overwrite=True).computed == 12
    # The values of the cells are the same, and what is made of them is not.
    assert ci.run(bright(voxel_size=3), target, progress=False).redone == {"other": 12}
    same_rows(pd.read_parquet(target), bright(voxel_size=3).compute())


def test_fewer_cells_leave_no_parts_behind(bright, target):
    ci.run(bright(), target, progress=False)
    assert ci.run(bright(cell_shape=20), target, progress=False, overwrite=True).computed == 4
    assert len(list(Path(target).iterdir())) == 4
    same_rows(pd.read_parquet(target), bright(cell_shape=20).compute())


@pytest.mark.parametrize("what", ["a file", "files", "an array", "dask's"])
def test_what_no_run_made_is_left_alone(bright, target, what):
    if what == "a file":
        Path(target).write_text("x")
    elif what == "files":
        Path(target).mkdir()
        Path(target, "part-0.parquet").write_text("x")
    elif what == "an array":
        ci.run(ci.map_cells(np.negative, np.arange(3)), target, progress=False)
    else:
        bright().to_parquet(target)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is no table that a run has made"):
            ci.run(bright(), target, progress=False, overwrite=overwrite)
    assert Path(target).exists()


def test_bad_arguments(bright, target):
    for options in ({"chunks": 2}, {"sharded": True}, {"compressor": "blosc"}):
        with pytest.raises(ValueError, match=r"is for images|parquet knows no compressor"):
            ci.run(bright(), target, **options)
    with pytest.raises(ValueError, match="cells_per_call"):
        ci.run(bright(), target, cells_per_call=2)
    points = bright()
    with pytest.raises(TypeError, match="dask has computed from others"):
        ci.run(points[points.value > 0.97], target)
    assert not Path(f"{target}.run").exists()


def test_cells_that_fail(image, target, tmp_path):
    def picky(array):
        if array[0, 0] == image[10, 10] and not (tmp_path / "cured").exists():
            raise ValueError("not this one")
        return np.argwhere(array > 0.97)

    points = map_points(picky, image, cell_shape=10, cache=None)
    report = ci.run(points, target, progress=False, retries=0)
    assert list(report.failed) == [(1, 1)]
    assert (report.computed, len(list(Path(target).iterdir()))) == (11, 11)
    (tmp_path / "cured").touch()
    assert ci.run(points, target, progress=False).computed == 1
    same_rows(pd.read_parquet(target), points.compute())


def test_a_url(bright, tmp_path):
    target = f"memory://tables/{tmp_path.name}/out.parquet"
    assert ci.run(bright(), target, progress=False).computed == 12
    assert ci.run(bright(), target, progress=False).skipped == 12
    same_rows(pd.read_parquet(target), bright().compute())


def test_seams_and_detectors(bright, image, target):
    """Their cells rest on values of other cells."""
    for number, points in enumerate(
        (bright(merge=("seam", 1.0), halo=2), blob_log(image, 1, 2, 2, 0.05, cell_shape=10))
    ):
        expected = points.compute()
        assert len(expected) > 3
        assert ci.run(points, f"{target}{number}", progress=False).computed == 12
        same_rows(pd.read_parquet(f"{target}{number}"), expected)
        assert ci.run(points, f"{target}{number}", progress=False).skipped == 12


@pytest.mark.parametrize("merge", ["own", ("seam", 1.0)])
def test_on_a_cluster(bright, target, calls, in_this_process, merge):
    expected = bright(merge=merge, halo=2).compute()
    calls.take()
    with in_this_process(2) as (_, _, queue):
        points = bright(merge=merge, halo=2, cache="shared")
        assert ci.run(points, target, progress=False, queue=queue).computed == 12
    assert len(calls.take()) == 12
    same_rows(pd.read_parquet(target), expected)


def test_the_state_is_told(bright, target):
    from cellimg_dask.batch.target import open_target

    ci.run(bright(), target, progress=False)
    manifest = Manifest(target)
    stored = open_target(manifest.folder, target)
    assert stored is not None
    assert {manifest.state(n, None, stored, checksums=True) for n in range(12)} == {"done"}
    assert json.loads(Path(f"{target}.run/layout.json").read_text())["shape"] == [3, 4]


KILLED = """
import time
import numpy as np
import cellimg_dask as ci
from cellimg_dask.ops.points import map_points

def bright(array):
    with open("begun", "a") as file:
        file.write("x")
    time.sleep(0.03)
    return np.argwhere(array > 0.97)

points = map_points(bright, np.load("image.npy"), cell_shape=(2, 40))
print(ci.run(points, "out.parquet", progress=False, queue=ci.BlockQueue(1)).ok)
"""


def test_a_killed_run_is_carried_on(image, tmp_path, until):
    np.save(tmp_path / "image.npy", image)
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

    manifest = Manifest(str(tmp_path / "out.parquet"))
    with start() as process:
        until(lambda: len(set(manifest.marked())) >= 3 or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
    done = len(set(manifest.marked()))
    assert 3 <= done < 15
    # What is there can be read.
    assert pd.read_parquet(tmp_path / "out.parquet").shape[1] == 2
    before = len(begun.read_text())
    with start() as process:
        out, _ = process.communicate(timeout=60)
    assert out == "True\n"
    assert len(begun.read_text()) - before == 15 - done
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert np.array_equal(found.sort_values(["axis-0", "axis-1"]), np.argwhere(image > 0.97))
