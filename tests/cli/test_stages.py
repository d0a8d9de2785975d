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
from support import same_objects

from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.batch.queue_spec import CondaSpec, EnvSpec, QueueSpec, SlurmSpec, UvSpec
from cellimg_dask.batch.spec import KINDS, InputSpec, WholeSpec

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


def tell(story: Story, first: int, second: int) -> tuple[dict[str, int], list[str]]:
    """Run a story that is killed in two stages; check that nothing is done twice."""
    lines = []
    total = int(
        np.prod([-(-n // size) for n, size in zip(story.volume.shape, (16, 128, 128), strict=True)])
    )
    blocks = Manifest("cells.zarr").pass_of(1)

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


# ---------------------------------------------------------------- stages

FUNCTIONS = """
from pathlib import Path
import numpy as np
from scipy import ndimage

def smooth(a, sigma=1.0):
    with open("calls", "a") as file:
        file.write("smooth\\n")
    return ndimage.gaussian_filter(a.astype("f4"), sigma, truncate=3)

def segment(a, at=0.5):
    if Path("broken").exists() and a[0, 0] < 0.5:
        raise ValueError("broken")
    return ndimage.label(a > at)[0]

def bright(a):
    return np.argwhere(a > 0.55)

def load():
    return 0.8

def predict(at, a):
    return ndimage.label(a > at)

def longest(mask):
    return max(mask.shape)
"""

STAGES = {
    "soft": {
        "inputs": "in.npy",
        "function": "functions.py:smooth",
        "halo": 3,
        "dtype": "float32",
        "cell_shape": 20,
        "target": "soft.zarr",
    },
    "less": {"inputs": ["soft", "in.npy"], "function": "numpy:minimum"},
    "parts": {
        "kind": "labels",
        "inputs": "less",
        "function": "functions.py:segment",
        "halo": 4,
        "target": "parts.zarr",
    },
    "spots": {
        "kind": "points",
        "inputs": "soft",
        "function": "functions.py:bright",
        "axes": ["row", "column"],
        "target": "spots.parquet",
    },
    "sizes": {
        "kind": "table",
        "labels": "parts",
        "properties": ["label", "area"],
        "max_extent": 40,
        "extra_properties": ["functions.py:longest"],
        "target": "sizes.parquet",
    },
}


@pytest.fixture
def image(rng):
    return np.where(rng.random((50, 44)) > 0.1, rng.random((50, 44)), 0.4)


@pytest.fixture
def write(image):
    """Write a spec of several stages, its input and its functions into the current folder."""

    def write(stages=STAGES, **settings):
        np.save("in.npy", image)
        Path("functions.py").write_text(FUNCTIONS)
        Path("calls").touch()
        Path("spec.yaml").write_text(
            yaml.safe_dump({"stages": stages, **settings}, sort_keys=False)
        )
        return "spec.yaml"

    return write


def changed(stage: str, **entries: object) -> dict[str, dict[str, object]]:
    """Return the stages with other entries in one of them; None removes one."""
    content = {**STAGES[stage], **entries}
    return {**STAGES, stage: {key: value for key, value in content.items() if value is not None}}


def expected_parts(image):
    soft = ndimage.gaussian_filter(image.astype("f4"), 1.0, truncate=3)
    return ndimage.label(np.minimum(soft, image) > 0.5)[0]


def test_stages_read_files_and_each_other(run, write, image):
    done = run("run", write(), "--no-progress")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line.partition(":")[0] for line in lines] == ["soft", "parts", "spots", "sizes"]
    labels = zarr.open_array("parts.zarr")[...]
    assert same_objects(labels, expected_parts(image))
    sizes = pd.read_parquet("sizes.parquet")
    assert sizes["area"].sum() == (labels > 0).sum()
    assert (sizes["longest"] > 0).all()
    soft = zarr.open_array("soft.zarr")[...]
    spots = pd.read_parquet("spots.parquet").sort_values(["row", "column"]).to_numpy()
    assert np.array_equal(spots, np.argwhere(soft > 0.55))
    # A stage without a target is nowhere but where it is read.
    assert not list(Path().glob("less*"))
    assert Path("calls").read_text().count("smooth") == 9
    again = run("run", "spec.yaml", "--no-progress")
    assert again.stdout.count(": 0 cells computed") == 4, again.output
    assert Path("calls").read_text().count("smooth") == 9


def test_a_change_goes_as_far_as_it_reaches(run, write, image):
    run("run", write(), "--no-progress")
    done = run("run", "spec.yaml", "--no-progress", "--set", "stages.parts.params.at=0.52")
    assert done.exit_code == 0, done.output
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert "0 cells computed, 9 done before" in lines["soft"]
    assert "9 cells computed" in lines["parts"]
    assert "0 cells computed" in lines["spots"]
    assert "1 cells computed" in lines["sizes"]


def test_one_stage_and_what_it_reads(run, write):
    done = run("run", write(), "--no-progress", "--stage", "spots")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in Path().glob("*.parquet")) == ["spots.parquet"]
    assert sorted(path.name for path in Path().glob("*.zarr")) == ["soft.zarr"]
    refused = run("run", "spec.yaml", "--stage", "spot")
    assert refused.exit_code == 2
    assert "--stage spot: there is no such stage; there are soft, less, parts" in refused.stderr


def test_cells_that_fail_end_the_run(run, write):
    Path("broken").touch()
    failed = run("run", write(retries=0), "--no-progress")
    assert failed.exit_code == 3
    assert "parts: 0 cells computed" in failed.stdout
    assert "BlockError: segment at cell" in failed.stdout
    assert "not begun: spots, sizes, which come after parts" in failed.stderr
    assert not Path("spots.parquet").exists()
    shown = run("status", "spec.yaml")
    assert shown.exit_code == 3
    text = shown.stdout
    assert "soft:\n  done     9 of 9" in text
    assert re.search("parts:\n  done     0 of 9\n.*\n.*\n  failed   [1-9]", text)
    assert re.search("  pass 1   [1-8] of 9 done", text)
    assert text.endswith("sizes:\n  not begun\n")
    Path("broken").unlink()
    assert run("run", "spec.yaml", "--no-progress").exit_code == 0
    assert run("status", "spec.yaml").exit_code == 0
    assert run("status", "sizes.parquet").stdout.startswith("done     1 of 1")


def test_the_resolved_spec_runs_by_itself(run, write, tmp_path, monkeypatch):
    run("run", write(), "--no-progress")
    before = Path.cwd()
    monkeypatch.chdir(tmp_path)
    for name in ("soft.zarr", "sizes.parquet"):
        again = run("run", before / f"{name}.run" / "spec.yaml", "--no-progress")
        assert again.exit_code == 0, again.output
        assert again.stdout.count(": 0 cells computed") == 4


def test_settings_of_all_and_of_one(run, write):
    spec = write(changed("parts", queue={"num_workers": 1}), queue={"num_workers": 3}, retries=5)
    facts = run("plan", spec).stdout
    threads = re.findall(r"^(\S.*):$|(\d+) threads", facts, re.MULTILINE)
    flat = [name or number for name, number in threads]
    assert flat == [
        "soft",
        "6",
        "less",
        "parts (pass 1)",
        "2",
        "parts",
        "2",
        "spots",
        "6",
        # It reads the labels for sums, and for masks.
        *("sizes", "6", "sizes", "6"),
    ]
    assert run("run", spec, "--no-progress").exit_code == 0
    text = yaml.safe_load(Path("parts.zarr.run/spec.yaml").read_text())
    assert text["stages"]["parts"]["retries"] == 5
    assert text["stages"]["parts"]["queue"]["num_workers"] == 1


def test_a_plan_of_stages(run, write):
    shown = run("plan", write())
    assert shown.exit_code == 0, shown.output
    assert "less:\n  read by   parts, and not written\n" in shown.stdout
    assert "  shape     (74, 68) int32" in shown.stdout
    assert "  columns   row float64, column float64" in shown.stdout
    assert "  written   a part for each of 9 cells, to spots.parquet" in shown.stdout
    assert sorted(path.name for path in Path().glob("*.*")) == [
        "functions.py",
        "in.npy",
        "spec.yaml",
    ]


@pytest.mark.parametrize("backend", ["processes", "cluster"])
def test_stages_on_workers(run, write, image, backend):
    if backend == "cluster":
        distributed = pytest.importorskip("distributed")
        with distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=":0"
        ) as c:
            spec = write(queue={"backend": c.scheduler_address})
            done = run("run", spec, "--no-progress")
    else:
        done = run("run", write(queue={"backend": "processes", "num_workers": 1}), "--no-progress")
    assert done.exit_code == 0, done.output
    assert same_objects(zarr.open_array("parts.zarr")[...], expected_parts(image))
    assert Path("calls").read_text().count("smooth") == 9
    # Where it runs makes no difference to what is done.
    again = run("run", "spec.yaml", "--no-progress", "--set", "queue={}")
    assert again.stdout.count(": 0 cells computed") == 4, again.output


ALONE = {
    "labels": {"kind": "labels", "inputs": "in.npy", "threshold": 0.5, "connectivity": 2},
    "points": {"kind": "points", "inputs": "in.npy", "function": "functions.py:bright", "halo": 1,
               "merge": ["seam", 0.5], "columns": []},
    "table": {"kind": "table", "labels": "labels.npy"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ALONE)
def test_a_spec_of_one_stage(run, write, image, kind):
    write()
    labels, count = ndimage.label(image > 0.5, np.ones((3, 3)))
    np.save("labels.npy", labels)
    spec = {**ALONE[kind], "target": "out", "cell_shape": 16, "cache_bytes": 10_000_000}
    Path("alone.yaml").write_text(yaml.safe_dump(spec))
    planned = run("plan", "alone.yaml")
    assert planned.exit_code == 0, planned.output
    done = run("run", "alone.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    if kind == "labels":
        assert same_objects(zarr.open_array("out")[...], labels)
    else:
        assert len(pd.read_parquet("out")) == (count if kind == "table" else (image > 0.55).sum())
    again = run("run", "out.run/spec.yaml", "--no-progress")
    assert again.stdout.startswith("0 cells computed"), again.output


def test_a_network_with_its_model(run, write, image):
    stages = changed(
        "parts",
        inputs="in.npy",
        function="functions.py:predict",
        load_model="functions.py:load",
        normalize=[5, 95],
        cell_shape=20,
    )
    done = run("run", write({"parts": stages["parts"]}), "--no-progress")
    assert done.exit_code == 0, done.output
    low, high = np.percentile(image, (5, 95))
    labels, _ = ndimage.label((image - low) / (high - low) > 0.8)
    assert same_objects(zarr.open_array("parts.zarr")[...], labels)
    again = run("run", Path("parts.zarr.run/spec.yaml"), "--no-progress")
    assert again.stdout.startswith("parts: 0 cells computed"), again.output


MISTAKES = {
    "a later stage": (changed("less", inputs="parts"), "less.inputs: parts is this stage or"),
    "itself": (changed("soft", inputs="soft"), "stages.soft.inputs: soft is this stage or a later"),
    "a table as image": (changed("sizes", labels="spots"), "stages.sizes.labels: spots is a table"),
    "a kind": (changed("soft", kind="blob"), "soft.kind: must be 'image', 'labels', 'points' or"),
    "nobody reads it": (changed("spots", target=None), "stages.spots.target: is missing: path or"),
    "one target for two": (changed("parts", target="soft.zarr"), "is another stage's target, too"),
    "no halo": (changed("parts", halo=None), "stages.parts: give halo: blocks are linked by"),
    "function and threshold": (changed("parts", threshold=1), "give either function or threshold"),
    "connectivity": (changed("parts", connectivity=1), "stages.parts: connectivity goes with thr"),
    "threshold and halo": (
        changed("parts", function=None, threshold=1), "stages.parts: halo goes with function"),
    "link": (changed("parts", link=["iou"]), "stages.parts.link: cannot be ['iou']: with function"),
    "a detector": (changed("spots", function=None, detector="dot"), "spots.detector: must be"),
    "detector and function": (changed("spots", detector="blob_log"), "either function or detector"),
    "two images": (
        changed("spots", function=None, detector="blob_dog", inputs=["soft", "less"]),
        "stages.spots: detector is for one input"),
    "blosc for tables": (changed("spots", compressor="blosc"), "must be 'zstd', 'gzip' or 'none'"),
    "no labels": (changed("sizes", labels=None), "stages.sizes.labels: is missing: labels of the"),
    "an entry of all": ({**STAGES, "soft": {**STAGES["soft"], "cache_bytes": 1}}, "bytes: no such"),
    "a name": ({"a.b": STAGES["soft"]}, "stages: 'a.b' is no name: use letters"),
    "no stage": ({}, "stages: there is no stage"),
    "no entries": ({"soft": 1}, "stages.soft: must be a valid dict"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(run, write, what):
    stages, message = MISTAKES[what]
    refused = run("run", write(stages), "--no-progress")
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert not Path("soft.zarr").exists()
    assert run("plan", "spec.yaml").exit_code == 2


def test_mistakes_on_the_command_line(run, write):
    write()
    for arguments, message in (
        (["--set", "stages.part.halo=1"], "there is no stage part; did you mean parts?"),
        (["--set", "stages.parts.haloes=1"], "stages.parts.haloes: no such entry; did you mean"),
        (["--set", "inputs=a.zarr"], "inputs: no such entry"),
        (["--target", "x"], "--target is for a spec without stages"),
    ):
        refused = run("run", "spec.yaml", "--no-progress", *arguments)
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr


def test_errors_name_the_stage(run, write):
    for changes, message in (
        (
            changed("parts", function="functions.py:cut"),
            "stage parts: AttributeError: functions.py",
        ),
        (changed("soft", inputs="no.npy"), "stage soft: cannot read no.npy"),
        (changed("spots", inputs={"path": "in.npy", "name": "a"}), "stage spots: in.npy has no"),
        (changed("soft", chunks=7), "stage soft: ValueError: chunks[0] = 7 does not divide"),
    ):
        refused = run("run", write(changes), "--no-progress")
        assert refused.exit_code in (1, 2), refused.output
        assert message in refused.stderr


def test_a_file_with_the_name_of_a_stage(run, write, image):
    np.save("less.npy", image)
    Path("less.npy").rename("less")
    done = run("run", write(changed("spots", inputs="./less")), "--no-progress")
    assert done.exit_code == 0, done.output
    assert len(pd.read_parquet("spots.parquet")) == (image > 0.55).sum()


def test_ctrl_c_names_the_stage(run, write, monkeypatch):
    import cellimg_dask as ci

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ci, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["cellimg", "run", "spec.yaml", "--overwrite"])
    ended = run("run", write())
    assert ended.exit_code == 130
    assert ended.stderr == (
        "stage soft: interrupted; what is done is kept. To carry on:\n  cellimg run spec.yaml\n"
    )


# ---------------------------------------------------------------- the reference


def test_the_reference_tells_of_every_entry():
    text = REFERENCE.read_text(encoding="utf-8")
    for model in (
        *KINDS.values(),
        *(WholeSpec, InputSpec, QueueSpec, SlurmSpec, EnvSpec, UvSpec, CondaSpec),
    ):
        for name in model.model_fields:
            assert f"`{name}`" in text, f"{name} of {model.__name__}"
