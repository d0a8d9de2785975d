"""Specs of several stages: the whole story of a volume, killed and carried on; and mistakes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml
import zarr
from scipy import ndimage
from skimage.feature import blob_log
from skimage.measure import regionprops_table

from cellimg_dask.batch.manifest import Manifest, pass_of
from cellimg_dask.batch.spec import KINDS, InputSpec, QueueSpec, SlurmSpec, WholeSpec

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "spec.md"


def example() -> tuple[str, str]:
    """Return the spec and the functions of the reference."""
    text = REFERENCE.read_text(encoding="utf-8")
    (spec,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (functions,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return spec, functions


COUNTED = '''

import functools
import os
import signal
from pathlib import Path


def note(name):
    """Note that a function is called; at a number of calls die as if the power had failed."""
    with open("calls", "a") as file:
        file.write(f"{name}\\n")
    last = Path(f"die in {name}")
    if last.exists() and Path("calls").read_text().split().count(name) >= int(last.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)


def counted(function):
    @functools.wraps(function)
    def call(*arrays, **params):
        note(function.__name__)
        return function(*arrays, **params)

    return call


smooth, flat, split = map(counted, (smooth, flat, split))
'''


class Story:
    """A folder with the example of the reference on some volume."""

    def __init__(self, folder: Path, volume: np.ndarray, **changes: object) -> None:
        self.folder = folder
        self.volume = volume
        spec, self.functions = example()
        tifffile.imwrite(folder / "brain.tif", volume, metadata={"axes": "ZYX"})
        (folder / "spec.yaml").write_text(spec)
        (folder / "segment.py").write_text(self.functions + COUNTED)
        (folder / "calls").touch()

    def cells(self, name: str) -> int:
        """Return how many cells of a stage, or blocks of its labels, are marked."""
        return len(set(Manifest(str(self.folder / name)).marked()))

    def run(self, die: dict[str, int] | None = None) -> tuple[int, str, dict[str, int]]:
        """Run the command; return the exit code, what it said, and the calls by function."""
        before = self.calls()
        for name, number in (die or {}).items():
            (self.folder / f"die in {name}").write_text(str(before.get(name, 0) + number))
        done = subprocess.run(
            [sys.executable, "-m", "cellimg_dask", "run", "spec.yaml", "--no-progress"],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        for path in self.folder.glob("die in *"):
            path.unlink()
        after = self.calls()
        calls = {name: after[name] - before.get(name, 0) for name in after}
        return done.returncode, done.stdout + done.stderr, calls

    def calls(self) -> dict[str, int]:
        """Return how often each function was called."""
        names = (self.folder / "calls").read_text().split()
        return {name: names.count(name) for name in ("smooth", "flat", "split")}

    def check(self) -> dict[str, int]:
        """Compare everything with what SciPy and scikit-image make of the whole; return counts."""
        whole: dict[str, object] = {}
        exec(self.functions, whole)
        smooth = whole["smooth"](self.volume, (1, 2, 2))
        flat = whole["flat"](smooth, (4, 12, 12))
        split = whole["split"](flat, 300)
        clumps, _ = ndimage.label(flat > 300, np.ones((3, 3, 3)))
        array = {
            name: zarr.open_array(self.folder / f"{name}.zarr", mode="r")[...]
            for name in ("smooth", "cells", "clumps")
        }
        np.testing.assert_array_equal(array["smooth"], smooth)
        assert same_objects(array["clumps"], clumps)
        assert same_objects(array["cells"], split)
        count = int(split.max())
        np.testing.assert_array_equal(np.unique(array["cells"]), np.arange(count + 1))

        table = pd.read_parquet(self.folder / "cells.parquet")
        properties = ["label", "area", "bbox", "centroid", "intensity_mean", "intensity_max"]
        expected = pd.DataFrame(
            regionprops_table(array["cells"].astype("i8"), self.volume, properties=properties)
        )
        pd.testing.assert_frame_equal(table, expected, check_dtype=False, rtol=1e-9)

        spots = pd.read_parquet(self.folder / "spots.parquet")
        found = {tuple(row) for row in spots[["z", "y", "x", "sigma"]].to_numpy().tolist()}
        known = blob_log(self.volume, 2, 4, 3, 0.005)
        assert found == {tuple(row) for row in known.tolist()}
        np.testing.assert_allclose(spots["physical-y"], 2 * spots["y"])
        return {"cells": count, "clumps": int(clumps.max()), "spots": len(spots)}


def same_objects(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two images of labels show the same objects, whatever they call them."""
    pairs = np.unique(np.stack([found.ravel(), expected.ravel().astype(found.dtype)]), axis=1)
    return bool(
        np.array_equal(found == 0, expected == 0)
        and pairs.shape[1] == np.unique(found).size == np.unique(expected).size
    )


def tell(story: Story, first: int, second: int) -> tuple[dict[str, int], list[str]]:
    """Run a story that is killed in two stages; check that nothing is done twice."""
    lines = []
    total = int(
        np.prod([-(-n // size) for n, size in zip(story.volume.shape, (16, 128, 128), strict=True)])
    )
    blocks = pass_of("cells.zarr", 1)

    code, _, calls = story.run(die={"smooth": first})
    assert code == -signal.SIGKILL
    smoothed = story.cells("smooth.zarr")
    assert smoothed < total
    lines.append(f"killed in smooth after {calls['smooth']} calls, {smoothed} of {total} done")

    code, said, calls = story.run(die={"split": second})
    assert code == -signal.SIGKILL, said
    assert calls["smooth"] == total - smoothed
    assert f"smooth: {total - smoothed} cells computed, {smoothed} done before" in said
    labelled = story.cells(blocks)
    assert labelled < total
    lines.append(f"killed in cells after {calls['split']} calls, {labelled} of {total} done")

    code, said, calls = story.run()
    assert code == 0, said
    assert (calls["smooth"], calls["split"]) == (0, total - labelled)
    assert f"cells: {total} cells computed" in said
    lines += said.splitlines()

    code, said, calls = story.run()
    assert code == 0, said
    assert set(calls.values()) == {0}
    assert len(re.findall("^[a-z]+: 0 cells computed", said, re.MULTILINE)) == 5
    return story.check(), lines


def test_the_whole_story_on_a_part_of_the_real_volume(tmp_path, shared_data):
    volume = tifffile.imread(shared_data / "brain_signal.tif")[:24, 130:290, 200:400]
    counts, _ = tell(Story(tmp_path, volume), first=4, second=4)
    assert counts["cells"] >= counts["clumps"] > 3
    assert counts["spots"] > 3


def test_the_reference_tells_of_every_entry():
    text = REFERENCE.read_text(encoding="utf-8")
    for model in (*KINDS.values(), WholeSpec, InputSpec, QueueSpec, SlurmSpec):
        for name in model.model_fields:
            assert f"`{name}`" in text, f"{name} of {model.__name__}"
