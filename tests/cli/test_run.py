"""``cellimg run``, ``plan`` and ``status``, as a person or a shell script uses them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from scipy import ndimage

import cellimg_dask as ci

FUNCTIONS = '''
"""Functions of a user's."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage


@dataclass
class Options:
    sigma: float = 1.0


def helper(a, options: Options):
    return ndimage.gaussian_filter(a.astype("f4"), options.sigma, truncate=3)


def smooth(a, sigma=1.0):
    return helper(a, Options(sigma))


def picky(a):
    if a[0, 0] == 0 and not Path("cured").exists():
        raise ValueError("no zeros, please")
    return -a.astype("f4")


class Filters:
    @staticmethod
    def negative(a):
        return -a.astype("f4")


number = 3
'''


@pytest.fixture
def image():
    return np.arange(40 * 30, dtype="u2").reshape(40, 30)


@pytest.fixture
def write(image):
    """Write a spec, its input and its functions into the current folder."""

    def write(name="spec.yaml", **changes):
        zarr.create_array("in.zarr", data=image, chunks=(16, 16), overwrite=True)
        Path("filters.py").write_text(FUNCTIONS)
        spec = {
            "inputs": "in.zarr",
            "target": "out.zarr",
            "function": "filters.py:smooth",
            "dtype": "float32",
            "halo": 3,
            "cell_shape": [16, 16],
        } | changes
        spec = {key: value for key, value in spec.items() if value is not None}
        Path(name).write_text(yaml.safe_dump(spec))
        return name

    return write


def result(path="out.zarr"):
    return zarr.open_array(path, mode="r")[...]


def smoothed(image, sigma=1.0):
    return ndimage.gaussian_filter(image.astype("f4"), sigma, truncate=3)


# ---------------------------------------------------------------- run


def test_a_run_and_the_same_again(run, write, image):
    first = run("run", write(), "--no-progress")
    assert first.exit_code == 0, first.output
    assert "6 cells computed, 0 done before, 0 failed of 6" in first.stdout
    assert first.stderr == ""
    np.testing.assert_allclose(result(), smoothed(image), rtol=1e-5)
    again = run("run", "spec.yaml")
    assert again.exit_code == 0
    assert "0 cells computed, 6 done before" in again.stdout
    assert "6/6" in again.stderr


def test_settings_on_the_command_line(run, write, image):
    write(params={"sigma": 2.0, "mode": "x"})
    done = run(
        "run", "spec.yaml", "--no-progress", "--target", "other.zarr",
        "--set", "params={sigma: 1.0}", "--set", "halo=4", "--set", "cell_shape=[8, 30]",
        "--set", "queue.num_workers=1", "--set", "compressor=none", "--set", "params.sigma=0.5",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "5 cells computed" in done.stdout
    np.testing.assert_allclose(result("other.zarr"), smoothed(image, 0.5), rtol=1e-5)
    assert zarr.open_array("other.zarr").compressors == ()
    assert not Path("out.zarr").exists()


def test_paths_are_those_of_the_spec_and_of_the_shell(run, write, image, tmp_path, monkeypatch):
    write()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    spec = Path("spec.yaml").absolute()
    monkeypatch.chdir(elsewhere)
    assert run("run", spec, "--no-progress").exit_code == 0
    assert (spec.parent / "out.zarr").is_dir()
    assert run("run", spec, "--no-progress", "--target", "typed.zarr").exit_code == 0
    assert (elsewhere / "typed.zarr").is_dir()
    assert run("status", "typed.zarr").exit_code == 0


def test_the_resolved_spec_runs_by_itself(run, write, image, tmp_path, monkeypatch):
    write(params={"sigma": 2.0}, halo=[[6, 7], 6], cell_shape=None)
    assert run("run", "spec.yaml", "--no-progress", "--set", "params.sigma=0.5").exit_code == 0
    before = result()
    resolved = Path("out.zarr.run/spec.yaml").absolute()
    text = yaml.safe_load(resolved.read_text())
    assert text["params"] == {"sigma": 0.5}
    assert text["retries"] == 2
    assert text["queue"]["timeout_s"] == 60.0
    monkeypatch.chdir(tmp_path)
    again = run("run", resolved, "--no-progress")
    assert "0 cells computed, 6 done before" in again.stdout, again.output
    anew = run("run", resolved, "--no-progress", "--target", tmp_path / "copy.zarr")
    assert "6 cells computed" in anew.stdout
    assert np.array_equal(result(tmp_path / "copy.zarr"), before)


def test_overwriting(run, write):
    assert run("run", write(), "--no-progress").exit_code == 0
    refused = run("run", "spec.yaml", "--no-progress", "--set", "cell_shape=8")
    assert refused.exit_code == 1
    assert "is another array (chunks (16, 16), expected (8, 8))" in refused.stderr
    done = run("run", "spec.yaml", "--no-progress", "--set", "cell_shape=8", "--overwrite")
    assert "20 cells computed" in done.stdout


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_functions_of_a_file_run_anywhere(run, write, image, backend):
    write(queue={"backend": backend, "num_workers": 2}, function="filters.py:smooth")
    done = run("run", "spec.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(result(), smoothed(image), rtol=1e-5)
    # Where it runs makes no difference to what is done.
    again = run("run", "spec.yaml", "--no-progress", "--set", "queue.backend=threads")
    assert "6 done before" in again.stdout


def test_an_edit_of_the_file_is_seen_and_a_comment_is_not(run, write, image):
    write()
    run("run", "spec.yaml", "--no-progress")
    path = Path("filters.py")
    path.write_text("# A comment.\n" + path.read_text())
    assert "6 done before" in run("run", "spec.yaml", "--no-progress").stdout
    path.write_text(path.read_text().replace("truncate=3", "truncate=2"))
    assert "6 cells computed" in run("run", "spec.yaml", "--no-progress").stdout
    expected = ndimage.gaussian_filter(image.astype("f4"), 1.0, truncate=2)
    np.testing.assert_allclose(result(), expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_files_beside_that_of_the_function(run, write, image, backend, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(queue={"backend": backend, "num_workers": 2}, function="uses.py:f", halo=0)
    Path("uses.py").write_text("import beside_uses\n\ndef f(a): return beside_uses.twice(a)\n")
    for factor in (2, 3):
        Path("beside_uses.py").write_text(f"def twice(a): return {factor}.0 * a\n")
        # As in a new process.
        monkeypatch.delitem(sys.modules, "beside_uses", raising=False)
        importlib.invalidate_caches()
        done = run("run", "spec.yaml", "--no-progress", "--set", "dtype=float64")
        assert "6 cells computed" in done.stdout, done.output
        np.testing.assert_array_equal(result(), factor * image)


def test_what_looks_like_a_date_is_text(run, write, image, tmp_path):
    Path("dated.py").write_text("def f(a, day): return a + float(day[:4])\n")
    write(function="dated.py:f", params=None, halo=0, dtype="float64")
    Path("spec.yaml").write_text(Path("spec.yaml").read_text() + "params: {day: 2024-05-06}\n")
    done = run("run", "spec.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(result(), image + 2024)
    again = run("run", str(tmp_path / "work" / "out.zarr.run" / "spec.yaml"), "--no-progress")
    assert "6 done before" in again.stdout, again.output


@pytest.mark.parametrize("name", ["signal.py", "random.py", "numpy.py", "my filters.py"])
def test_a_file_may_be_called_as_it_likes(run, write, name):
    write(function=f"{name}:f", params={}, halo=0)
    Path(name).write_text("def f(a): return a + 1.0\n")
    done = run("run", "spec.yaml", "--no-progress", "--set", "dtype=float64")
    assert done.exit_code == 0, done.output
    Path(name).write_text("def f(a): return a + 2.0\n")
    again = run("run", "spec.yaml", "--no-progress", "--set", "dtype=float64")
    assert "6 cells computed" in again.stdout, again.output
    assert result()[0, 0] == 2


@pytest.mark.parametrize(
    "function", ["filters.py:Filters.negative", "numpy:negative", "scipy.ndimage:grey_erosion"]
)
def test_functions_by_name(run, write, image, function):
    write(function=function, halo=1, dtype=None if "numpy" in function else "float32")
    arguments = (
        ["--set", "params={size: 3}", "--set", "dtype=uint16"] if "scipy" in function else []
    )
    done = run("run", "spec.yaml", "--no-progress", *arguments)
    assert done.exit_code == 0, done.output
    expected = (
        ndimage.grey_erosion(image, 3) if "scipy" in function else -image.astype(result().dtype)
    )
    assert np.array_equal(result(), expected)


def test_code(run, write, image):
    write(
        function=None,
        code="block.data[...] = scale * block.inputs[0][block.halo]",
        queue={"init": "scale = 3"},
    )
    done = run("run", "spec.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    assert np.array_equal(result(), 3 * image.astype("f4"))
    write(
        function=None,
        code="block.data[...] = scale * block.inputs[0][block.halo]",
        queue={"init": "scale = 4"},
    )
    assert "6 cells computed" in run("run", "spec.yaml", "--no-progress").stdout
    assert np.array_equal(result(), 4 * image.astype("f4"))


def test_several_inputs_of_several_kinds(run, write, image):
    write(function="numpy:add", halo=0, dtype="uint16", inputs=["in.zarr", {"path": "b.npy"}])
    np.save("b.npy", image[::-1])
    assert run("run", "spec.yaml", "--no-progress").exit_code == 0
    assert np.array_equal(result(), image + image[::-1])
    edited = image[::-1].copy()
    edited[0, 0] += 1
    np.save("b.npy", edited)
    assert "1 cells computed, 5 done before" in run("run", "spec.yaml", "--no-progress").stdout
    assert np.array_equal(result(), image + edited)


@pytest.mark.parametrize("chunks", [(8, 8), None])
def test_hdf5_and_tiff_are_compared_by_their_files(run, write, image, chunks):
    import h5py
    import tifffile

    with h5py.File("in.h5", "w") as file:
        file.create_dataset("deep/raw", data=image, chunks=chunks)
        file.create_dataset("deep/other", data=image[:2])
    tifffile.imwrite("in.tif", image)
    for path, name in (("in.h5", "deep/raw"), ("in.tif", "")):
        write(inputs={"path": path, "name": name}, target=f"{path}.zarr")
        done = run("run", "spec.yaml", "--no-progress")
        assert done.exit_code == 0, done.output
        np.testing.assert_allclose(result(f"{path}.zarr"), smoothed(image), rtol=1e-5)
        assert "6 done before" in run("run", "spec.yaml", "--no-progress").stdout
        os.utime(path, (1, 1))
        assert "6 cells computed" in run("run", "spec.yaml", "--no-progress").stdout


def test_cells_that_fail(run, write, image):
    write(function="filters.py:picky", halo=0, retries=0)
    failed = run("run", "spec.yaml", "--no-progress")
    assert failed.exit_code == 3
    assert "5 cells computed, 0 done before, 1 failed of 6" in failed.stdout
    assert "(0, 0): BlockError: picky at cell (0, 0)" in failed.stdout
    assert "no zeros, please" in failed.stdout
    shown = run("status", "out.zarr")
    assert shown.exit_code == 3
    assert [line.split(" in ")[0] for line in shown.stdout.splitlines()[:4]] == [
        "done     5 of 6",
        "missing  1 of 6",
        "damaged  0 of 6",
        "failed   1",
    ]
    assert "(0, 0): BlockError: picky at cell (0, 0)" in shown.stdout
    Path("cured").touch()
    done = run("run", "spec.yaml", "--no-progress")
    assert done.exit_code == 0
    assert "1 cells computed, 5 done before" in done.stdout
    assert run("status", "out.zarr").exit_code == 0


def test_a_target_in_use(run, write):
    from cellimg_dask.batch.folder import open_folder
    from cellimg_dask.batch.lock import RunLock

    assert run("run", write(), "--no-progress").exit_code == 0
    before = Path("out.zarr.run/spec.yaml").read_text()
    with RunLock(open_folder("out.zarr.run"), "out.zarr"):
        refused = run("run", "spec.yaml", "--no-progress", "--set", "params.sigma=2.0")
    assert refused.exit_code == 4
    assert "another run works on" in refused.stderr
    # What it says is still what the other one does.
    assert Path("out.zarr.run/spec.yaml").read_text() == before


# ---------------------------------------------------------------- mistakes


def test_five_mistakes_and_their_messages(run, write):
    write(
        target=None,
        function="smooth",
        cell_shape=[16, 0],
        compressor="zip",
        halos=2,
        dtype="float33",
    )
    refused = run("run", "spec.yaml")
    assert refused.exit_code == 2
    text = refused.stderr
    assert "spec.yaml has mistakes:" in text
    for expected in (
        "target: is missing: path or URL of the zarr array to write",
        "function: 'smooth' must be module:name or file.py:name",
        "cell_shape: cannot be [16, 0]: shape of a cell, a number or one for each axis, from 1",
        "compressor: must be 'zstd', 'blosc', 'gzip' or 'none', got 'zip'",
        "halos: no such entry; did you mean halo?",
        "dtype: 'float33' is no dtype that NumPy knows",
    ):
        assert f"  {expected}" in text
    assert not Path("out.zarr.run").exists()


MISTAKES = {
    "neither function nor code": ({"function": None}, 2, "give either function or code"),
    "both": ({"code": "pass"}, 2, "give either function or code"),
    "code without dtype": (
        {"function": None, "code": "pass", "dtype": None},
        2,
        "code says nothing of the dtype",
    ),
    "no inputs": ({"inputs": []}, 2, "inputs is empty"),
    "an unknown entry of an input": ({"inputs": {"path": "in.zarr", "hallo": 1}}, 2, "hallo: no"),
    "an unknown entry of the queue": ({"queue": {"threads": 1}}, 2, "queue.threads"),
    "no workers": ({"queue": {"num_workers": 0}}, 2, "queue.num_workers"),
    "a halo below 0": ({"halo": -1}, 2, "halo: cannot be -1: voxels that a block reads"),
    "cells of nothing": ({"cell_shape": 0}, 2, "cell_shape: cannot be 0: shape of a cell"),
    "an input without a path": ({"inputs": [{"name": "a"}]}, 2, "inputs.0.path: is missing: file"),
    "a boundary": ({"boundary": "mirror"}, 2, "boundary"),
    "retries": ({"retries": -1}, 2, "retries"),
    "a backend": ({"queue": {"backend": "gpu"}}, 1, "backend 'gpu': allowed are"),
    "an input that is not there": ({"inputs": "no.zarr"}, 1, "cannot read no.zarr"),
    "an array that is not there": (
        {"inputs": {"path": "in.zarr", "name": "raw"}},
        2,
        "in.zarr has no array 'raw'; it has (the only one)",
    ),
    "a file of functions that is not there": ({"function": "no.py:f"}, 1, "there is no file"),
    "a function that is not there": (
        {"function": "filters.py:sharpen"},
        1,
        "filters.py has no function 'sharpen'",
    ),
    "no function": ({"function": "filters.py:number"}, 1, "has no function 'number'"),
    "a module that is not there": ({"function": "no_such_module:f"}, 1, "No module named"),
    "a file that does not compile": ({"function": "broken.py:f"}, 1, "SyntaxError"),
    "a file that fails": ({"function": "failing.py:f"}, 1, "ZeroDivisionError"),
    "an init that fails": ({"queue": {"init": "1 / 0"}}, 1, "ZeroDivisionError"),
    "a halo of too many axes": ({"halo": [1, 1, 1]}, 1, "halo"),
    "no dtype": ({"dtype": None}, 1, "give dtype="),
    "chunks that do not divide": ({"chunks": 5}, 1, "does not divide the cell"),
    "too little memory": ({"max_memory": 1000}, 1, "the run would take about"),
    "a fill value": ({"dtype": "float32", "fill_value": 1e300}, 1, "is no value of dtype"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(run, write, what):
    changes, code, message = MISTAKES[what]
    write(**changes)
    Path("broken.py").write_text("def f(:\n")
    Path("failing.py").write_text("1 / 0\n")
    refused = run("run", "spec.yaml", "--no-progress")
    assert refused.exit_code == code, refused.output
    assert message in refused.stderr
    assert "Traceback" not in refused.output
    assert not Path("out.zarr").exists()
    if code == 2:
        assert run("plan", "spec.yaml").exit_code == 2


def test_mistakes_on_the_command_line(run, write):
    write()
    for arguments, message in (
        (["--set", "halo"], "--set halo: give KEY=VALUE"),
        (["--set", "halo={"], "--set halo={: '{' is no YAML"),
        (["--set", "halo.x=1"], "--set halo.x=1: halo has no entries"),
        (["--set", "inputs.0=b"], "inputs has no entries"),
        (["--set", "haloes=1"], "haloes: no such entry; did you mean halo?"),
        (["--jobs", "3"], "No such option"),
    ):
        refused = run("run", "spec.yaml", "--no-progress", *arguments)
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr
    assert run("run", "no.yaml").exit_code == 2
    assert run("run").exit_code == 2


@pytest.mark.parametrize("content", ["", "- a\n", "text", "{", "a: [", "\x00"])
def test_what_is_no_spec(run, content):
    Path("spec.yaml").write_text(content)
    refused = run("run", "spec.yaml")
    assert refused.exit_code == 2, refused.output
    assert "spec.yaml" in refused.stderr
    Path("spec.yaml").write_bytes(b"\xff\xfe\xfd")
    assert run("plan", "spec.yaml").exit_code == 2


def test_a_spec_cannot_make_objects(run, write):
    Path("spec.yaml").write_text("!!python/object/apply:os.mkdir [owned]\n")
    assert run("run", "spec.yaml").exit_code == 2
    write()
    assert (
        run("run", "spec.yaml", "--set", "params=!!python/object/apply:os.mkdir [owned]").exit_code
        == 2
    )
    assert not Path("owned").exists()


# ---------------------------------------------------------------- plan


def test_a_plan_says_what_a_run_would_do(run, write):
    write()
    before = sorted(Path().rglob("*"))
    planned = run("plan", "spec.yaml", "--set", "queue.num_workers=3")
    assert planned.exit_code == 0, planned.output
    facts = dict(line.split(maxsplit=1) for line in planned.stdout.splitlines())
    assert facts["shape"] == "(40, 30) float32, 4.69 kiB"
    assert facts["cells"] == "6 of (16, 16), (3, 2) in the grid"
    assert facts["function"] == "smooth"
    assert "times the inputs because of the halo" in facts["read"]
    assert facts["written"] == "4.69 kiB before compression, to out.zarr"
    # Twice as many threads as workers: some wait for the disk.
    assert facts["memory"].startswith("the run ")
    assert "6 threads" in facts["memory"]
    assert facts["calls"] == "6, one per cell"
    small = run("plan", "spec.yaml", "--set", "max_memory=1000")
    assert "TOO MUCH" in small.stdout
    together = run("plan", "spec.yaml", "--set", "cells_per_call=2")
    facts = dict(line.split(maxsplit=1) for line in together.stdout.splitlines())
    assert facts["calls"] == "2, of (2, 2) cells each"
    made = {path for path in Path().rglob("*") if "__pycache__" not in path.parts} - set(before)
    assert not made


def test_a_plan_of_a_million_cells_looks_at_a_few(run, write, monkeypatch):
    from cellimg_dask.loading.loader import CellLoader

    planned = []
    plan = CellLoader.plan
    monkeypatch.setattr(
        CellLoader, "plan", lambda loader, index: (planned.append(index), plan(loader, index))[1]
    )
    zarr.create_array("big.zarr", shape=(6400, 6400, 6400), chunks=(64,) * 3, dtype="u1")
    write(function="filters.py:picky", inputs="big.zarr", halo=8, cell_shape=None)
    shown = run("plan", "spec.yaml")
    assert shown.exit_code == 0, shown.output
    assert "1,000,000 of (64, 64, 64)" in shown.stdout
    # 80 voxels are read for 64 along each axis.
    assert "1.95 times the inputs" in shown.stdout
    assert 0 < len(planned) < 10
    assert not Path("out.zarr").exists()


def test_a_plan_imports_no_more_than_it_needs(run, write, imported):
    write()
    # Most of its time is that of imports.
    modules = imported("plan", "spec.yaml")
    assert {"zarr", "pydantic", "yaml"} <= modules
    assert not modules & {
        "dask",
        "distributed",
        "h5py",
        "http.client",
        "imageio",
        "matplotlib",
        "skimage",
        "tensorstore",
        "tifffile",
        "tqdm",
    }


def test_a_plan_shows_the_job_script_of_a_cluster(run, write):
    # Not imported here: that would take Ctrl-C away from the tests after this one.
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("dask-jobqueue is not installed")
    before = signal.getsignal(signal.SIGINT)
    slurm = {"jobs": 2, "cores": 4, "memory": "8GB", "walltime": "00:10:00", "queue": "short"}
    write(queue={"slurm": slurm})
    planned = run("plan", "spec.yaml")
    assert planned.exit_code == 0, planned.output
    assert "#SBATCH -p short" in planned.stdout
    assert "#SBATCH --cpus-per-task=4" in planned.stdout
    assert "each worker of the cluster" in planned.stdout
    assert "; 7,629 MiB are allowed" in planned.stdout
    assert "4 threads" in planned.stdout
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- status


def test_status_of_what_was_harmed(run, write):
    assert run("run", write(), "--no-progress").exit_code == 0
    assert run("status", "out.zarr").stdout.startswith("done     6 of 6\nmissing  0 of 6\n")
    Path("out.zarr.run/done/000000/1.json").unlink()
    chunk = Path("out.zarr/c/1/1")
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    shown = run("status", "out.zarr")
    assert shown.exit_code == 3
    assert "done     4 of 6" in shown.stdout
    assert "missing  1 of 6" in shown.stdout
    assert "damaged  1 of 6" in shown.stdout
    quick = run("status", "out.zarr", "--quick")
    assert "damaged  0 of 6" in quick.stdout
    assert "2 cells computed, 4 done before" in run("run", "spec.yaml", "--no-progress").stdout
    assert run("status", "out.zarr/").exit_code == 0


def test_status_of_ome_zarr(run, write):
    image = ci.map_cells(np.negative, np.ones((8, 8), "f4"), cell_shape=4)
    ci.write_ome_zarr(image, "out.ome.zarr", progress=False)
    shown = run("status", "out.ome.zarr")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("0:\n  done     4 of 4\n")
    assert "1:\n  done     1 of 1\n" in shown.stdout
    Path("out.ome.zarr/1/c/0/0").unlink()
    harmed = run("status", "out.ome.zarr/")
    assert harmed.exit_code == 3
    assert "1:\n  done     0 of 1\n  missing  0 of 1\n  damaged  1 of 1\n" in harmed.stdout


def test_status_of_what_no_run_made(run, write):
    write()
    for path in ("in.zarr", "nothing", "spec.yaml"):
        refused = run("status", path)
        assert refused.exit_code == 1
        assert "was not made by a run" in refused.stderr


# ---------------------------------------------------------------- Ctrl-C


SLOW = """
import time

def slow(a):
    with open("begun", "a") as file:
        file.write("x")
    time.sleep(0.03)
    return a + 1.0
"""


def test_ctrl_c_says_how_to_carry_on_and_the_second_run_does(run, write, image):
    write(function="slow file.py:slow", halo=0, dtype="float64", cell_shape=[2, 6])
    Path("slow file.py").write_text(SLOW)
    begun = Path("begun")
    begun.touch()
    command = [sys.executable, "-m", "cellimg_dask", "run", "spec.yaml", "--overwrite"]
    with subprocess.Popen(
        [*command, "--set", "params={}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        tick = threading.Event()
        for _ in range(4000):
            if len(begun.read_text()) >= 5 or process.poll() is not None:
                break
            tick.wait(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted; what is done is kept. To carry on:" in err
    assert err.splitlines()[-1] == "  cellimg run spec.yaml --set 'params={}'"
    assert "Traceback" not in err
    shown = run("status", "out.zarr")
    assert shown.exit_code == 3
    done = int(shown.stdout.split()[1])
    assert 0 < done < 100
    before = len(begun.read_text())
    again = run("run", "spec.yaml", "--no-progress", "--set", "params={}")
    assert again.exit_code == 0, again.output
    assert f"{100 - done} cells computed, {done} done before" in again.stdout
    assert len(begun.read_text()) - before == 100 - done
    assert np.array_equal(result(), image + 1.0)
