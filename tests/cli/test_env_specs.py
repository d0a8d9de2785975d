"""Batch runs whose functions run in another Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

import cellimg_dask as ci

FUNCTIONS = '''
"""Functions for an old Python."""

import sys

import numpy as np
import pywt


def approximate(image: np.ndarray, *, level: int = 1, gain: float = 1.0) -> np.ndarray:
    """Return the coarse part of a Haar transform.

    Parameters
    ----------
    level : int
        How often the image is halved.
    gain : float
        The result is multiplied by this.
    """
    assert not hasattr(np, "trapezoid"), "NumPy is not old"
    return gain * pywt.wavedec2(image, "haar", level=level)[0].repeat(2, 0).repeat(2, 1)


def bright(image, above):
    """Find voxels."""
    return np.argwhere(image > above)
'''


@pytest.fixture
def folder(run: object, other_python: str) -> Path:
    """The working folder, with an image, functions and a spec."""
    folder = Path.cwd()
    (folder / "old.py").write_text(FUNCTIONS)
    np.save(folder / "in.npy", np.arange(40 * 60, dtype="f8").reshape(40, 60) % 17)
    env = {"venv": str(Path(other_python).parents[1])}
    spec = {
        "queue": {"num_workers": 2, "env": env},
        "stages": {
            "coarse": {
                "inputs": "in.npy",
                "function": "old.py:approximate",
                "params": {"gain": 0.5},
                "dtype": "float64",
                "cell_shape": [8, 10],
                "target": "coarse.zarr",
            },
            "spots": {
                "kind": "points",
                "inputs": "coarse",
                "function": "old.py:bright",
                "params": {"above": 11},
                "target": "spots",
            },
        },
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


def test_a_spec_runs_in_another_python_and_resumes(run, folder) -> None:
    done = run("run", "spec.yaml")
    assert done.exit_code == 0, done.output
    image = np.load(folder / "in.npy")
    mean = image.reshape(20, 2, 30, 2).sum((1, 3)) / 4
    coarse = zarr.open_array(folder / "coarse.zarr", mode="r")[:]
    np.testing.assert_allclose(coarse, mean.repeat(2, 0).repeat(2, 1), rtol=1e-14)
    table = ci_table(folder / "spots")
    assert sorted(map(tuple, table)) == sorted(map(tuple, np.argwhere(coarse > 11)))

    again = run("run", "spec.yaml")
    assert again.exit_code == 0, again.output
    assert "coarse: 0 cells" in again.output
    assert "spots: 0 cells" in again.output


def ci_table(path: Path) -> np.ndarray:
    """Return the coordinates of a stored table of points."""
    import pandas

    return pandas.read_parquet(path)[["axis-0", "axis-1"]].to_numpy()


def test_parameters_are_checked_as_the_environment_says(run, folder) -> None:
    done = run("run", "spec.yaml", "--set", "stages.coarse.params.gian=2")
    assert done.exit_code != 0
    assert "stages.coarse.params.gian" in done.output
    assert "did you mean gain" in done.output
    assert not (folder / "coarse.zarr").exists()


def test_a_function_is_described_as_its_environment_sees_it(run, folder, other_python) -> None:
    shown = run("info", "old.py:approximate", "--json", "--env", Path(other_python).parents[1])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.output)
    properties = document["parameters"]["properties"]
    assert {name: entry["type"] for name, entry in properties.items()} == {
        "level": "integer",
        "gain": "number",
    }
    assert properties["level"]["description"] == "How often the image is halved."
    there = ci.describe("old.py:approximate", env=ci.Env.venv(Path(other_python).parents[1]))
    assert there.to_dict() == document
    # Not here, where a package is missing.
    assert run("info", "old.py:approximate").exit_code != 0
