"""Specs whose functions say what they take: checked before anything runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from scipy import ndimage

FUNCTIONS = """
import numpy as np
from scipy import ndimage
from numpy.typing import NDArray
from typing import Literal
from pathlib import Path

def smooth(image, sigma):
    assert type(sigma) is float
    return ndimage.gaussian_filter(image.astype("f4"), sigma)

def typed(image: NDArray[np.uint16], sigma: float = 1, size: tuple[int, ...] = ()):
    assert type(sigma) is float and type(size) is tuple
    return ndimage.gaussian_filter(image.astype("f4"), sigma)

def objects(image, above: float): return ndimage.label(image > above)[0]

def odd(image, how: complex = 1j, sigma: float = 1): return smooth(image, sigma)
"""
SMOOTH = {
    "function": "functions.py:smooth",
    "inputs": [{"name": "image", "dtype": "uint16", "axes": "yx", "halo": 6}],
    "outputs": [{"dtype": "float32"}],
    "parameters": {
        "properties": {"sigma": {"type": "number", "exclusiveMinimum": 0, "default": 1.5}}
    },
}
STAGES = {
    "soft": {"inputs": "in.npy", "function": "about/smooth.yaml", "target": "soft.zarr"},
    "typed": {
        "inputs": "in.npy",
        "function": "functions.py:typed",
        "params": {"sigma": 1, "size": [1, 2]},
        "halo": 5,
        "dtype": "float32",
        "target": "typed.zarr",
    },
    "parts": {
        "kind": "labels",
        "inputs": "soft",
        "function": "functions.py:objects",
        "params": {"above": 500},
        "halo": 8,
        "target": "parts.zarr",
    },
    "spots": {
        "kind": "points",
        "inputs": "in.npy",
        "detector": "blob_log",
        "params": {"max_sigma": 3},
        "target": "spots.parquet",
    },
}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 1000, (40, 30)).astype("u2")


@pytest.fixture
def write(run, image):
    """Write a spec and all that it names into the current folder."""

    def write(name="spec.yaml", **changes):
        np.save("in.npy", image)
        Path("functions.py").write_text(FUNCTIONS)
        Path("about").mkdir(exist_ok=True)
        described = SMOOTH | {"function": "../functions.py:smooth"}
        Path("about/smooth.yaml").write_text(yaml.safe_dump(described))
        Path("smooth.json").write_text(json.dumps(SMOOTH))
        stages = {
            key: stage | changes.get(key, {})
            for key, stage in STAGES.items()
            if changes.get(key, {}) is not None
        }
        whole = {key: value for key, value in changes.items() if key not in STAGES}
        Path(name).write_text(yaml.safe_dump({"stages": stages, **whole}, sort_keys=False))
        return name

    return write


def test_functions_are_given_what_they_take(run, write, image):
    done = run("run", write(spots=None), "--no-progress")
    assert done.exit_code == 0, done.output
    soft = ndimage.gaussian_filter(image.astype("f4"), 1.5)
    np.testing.assert_allclose(zarr.open_array("soft.zarr")[...], soft, rtol=1e-5)
    assert zarr.open_array("soft.zarr").dtype == "f4"
    # What is written beside the target runs by itself.
    resolved = yaml.safe_load(Path("soft.zarr.run/spec.yaml").read_text())
    about = resolved["stages"]["soft"]
    assert about["function"] == str(Path("about/smooth.yaml").absolute())
    assert "halo" not in about
    again = run("run", "soft.zarr.run/spec.yaml", "--no-progress")
    assert again.stdout.count(": 0 cells computed") == 3, again.output


def test_a_description_in_json_and_a_halo_of_the_spec(run, write):
    spec = write(
        spots=None, parts=None, typed=None, soft={"function": "smooth.json", "cell_shape": 10}
    )

    def read(*more):
        planned = run("plan", spec, *more)
        assert planned.exit_code == 0, planned.output
        (line,) = [line for line in planned.stdout.splitlines() if "because of the halo" in line]
        return line.split(", ")[1]

    # A cell in the middle reads 22 x 22 voxels of 10 x 10, with 4 beside it 18 x 18.
    assert read() == "4.84 times the inputs because of the halo"
    assert read("--set", "stages.soft.halo=4") == "3.24 times the inputs because of the halo"


MISTAKES = [
    (
        {"soft": {"params": {"sigma": 0}}},
        "  stages.soft.params.sigma: expected a number above 0, got 0\n",
    ),
    (
        {"soft": {"params": {"sgima": 1}}},
        "  stages.soft.params.sgima: no such parameter; did you mean sigma?\n",
    ),
    (
        {"typed": {"params": {"sigma": "wide", "size": [1, 1.5]}}},
        """  stages.typed.params.sigma: expected a number, got 'wide'
  stages.typed.params.size[1]: expected an integer, got 1.5
""",
    ),
    (
        {"parts": {"params": {}}, "soft": {"params": {"sigma": True}}},
        """  stages.soft.params.sigma: expected a number above 0, got True
  stages.parts.params.above: is missing: expected a number
""",
    ),
    (
        {"parts": {"params": {"above": 1, "image": 1}}},
        "  stages.parts.params.image: is an array that is given after the function, and no p",
    ),
    (
        {"spots": {"params": {"max_sigmas": 3}}},
        "  stages.spots.params.max_sigmas: no such parameter; did you mean max_sigma?\n",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_wrong_parameters_name_the_entry_before_anything_runs(
    run, write, changes, message, command
):
    refused = run(command, write(**changes))
    assert refused.exit_code == 2, refused.output
    assert f"Error: spec.yaml has mistakes:\n{message}" in refused.stderr
    assert not Path("soft.zarr").exists()


def test_a_spec_of_one_stage_names_the_parameter_alone(run, write):
    write()
    Path("one.yaml").write_text(
        yaml.safe_dump(STAGES["soft"] | {"params": {"sigma": -1}, "target": "out.zarr"})
    )
    refused = run("run", "one.yaml")
    assert "  params.sigma: expected a number above 0, got -1\n" in refused.stderr


def test_a_parameter_that_json_cannot_say_is_left_to_the_function(run, write):
    spec = write(typed={"function": "functions.py:odd", "params": {"sigma": 2}}, spots=None)
    done = run("run", spec, "--no-progress")
    assert done.exit_code == 0, done.output


def test_a_damaged_description_is_told(run, write):
    spec = write()
    Path("about/smooth.yaml").write_text("function: functions.py:smooth")
    refused = run("plan", spec)
    assert refused.exit_code == 1
    assert "stage soft: ValueError: about/smooth.yaml: inputs is missing" in refused.stderr
    Path("about/smooth.yaml").unlink()
    assert "there is no file about/smooth.yaml" in run("plan", spec).stderr


def test_an_input_that_the_description_does_not_allow(run, write):
    np.save("floats.npy", np.zeros((8, 8)))
    refused = run("run", write(soft={"inputs": "floats.npy"}), "--no-progress")
    assert refused.exit_code == 1
    assert "input 0 (image) of smooth is of dtype float64, expected uint16" in refused.stderr


# ---------------------------------------------------------------- environments


def test_a_plan_says_in_which_environment_blocks_run(run, write):
    spec = write(
        soft={"queue": {"env": sys.prefix}},
        typed={"queue": {"env": {"uv": {"python": "3.10", "pip": ["numpy<2", "scipy"]}}}},
        parts={"queue": {"env": {"conda": {"packages": ["python=3.9"]}}}},
        spots={"queue": {"env": {"pixi": {"file": "pixi.toml"}}}},
    )
    planned = run("plan", spec)
    assert planned.exit_code == 0, planned.output
    found = [line for line in planned.stdout.splitlines() if "environment" in line]
    texts = [line.split(maxsplit=1)[1] for line in found]
    assert texts[0] == f"venv {sys.prefix}"
    assert texts[1] == "uv with python 3.10; pip numpy<2, scipy"
    assert "conda with packages python=3.9" in texts
    assert "pixi with file pixi.toml" in texts


def test_a_function_of_an_environment_is_asked_there(run, write):
    # It cannot be imported in this process, and need not be.
    spec = write(
        typed={"queue": {"env": sys.prefix}, "params": {"sigma": "x"}},
        soft=None,
        parts=None,
        spots=None,
    )
    Path("functions.py").write_text(f"import sys\nassert sys.argv[0] == '-c'\n{FUNCTIONS}")
    refused = run("run", spec)
    assert "  stages.typed.params.sigma: expected a number, got 'x'\n" in refused.stderr


ENVIRONMENTS = [
    ({}, "env: give one of venv, uv, conda, pixi"),
    ({"venv": "a", "uv": {}}, "env: give one of venv, uv, conda, pixi"),
    ({"uv": {"python": 3.10}}, 'env.uv.python: write the version in quotes, such as "3.10"'),
    ({"uv": {"pipp": []}}, "env.uv.pipp: no such entry; did you mean pip?"),
    ({"conda": {"packages": "numpy"}}, "env.conda.packages: must be a valid list, got 'numpy'"),
    ({"venv": "nowhere"}, "there is no environment"),
]


@pytest.mark.parametrize(("env", "message"), ENVIRONMENTS)
def test_mistakes_in_environments(run, write, env, message):
    refused = run("run", write(queue={"env": env}))
    assert refused.exit_code in (1, 2)
    assert message in refused.stderr


def test_a_resolved_spec_has_whole_paths_of_environments(tmp_path):
    from cellimg_dask.batch.spec import ImageStage, Spec
    from cellimg_dask.cli.spec_file import write_resolved

    queues = [{"env": ".venv"}, {"env": {"conda": {"file": "env.yml"}}}]
    for queue in queues:
        stage = ImageStage.model_validate(
            {"inputs": "in.npy", "function": "m:f", "target": "o.zarr", "queue": queue}
        )
        write_resolved(Spec({"": stage}, None), "", tmp_path, replace=True)
        text = (tmp_path / "o.zarr.run" / "spec.yaml").read_text()
        env = yaml.safe_load(text)["queue"]["env"]
        assert env["venv"] in (None, str(tmp_path / ".venv"))
        if env["conda"] is not None:
            assert env["conda"]["file"] == str(tmp_path / "env.yml")
        content = yaml.safe_load(text)
        del content["cache_bytes"]
        assert ImageStage.model_validate(content).queue.env is not None


# ---------------------------------------------------------------- the reference


def test_the_description_and_the_mistakes_of_the_reference(run):
    text = (Path(__file__).resolve().parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")
    (described,) = re.findall(r"^```yml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (functions,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (mistakes,) = re.findall(r"^```\n(spec.yaml.*?)^```$", text, re.MULTILINE | re.DOTALL)
    Path("smooth.yaml").write_text(described)
    Path("segment.py").write_text(functions)
    np.save("in.npy", np.zeros((20, 20, 20), "u2"))
    stage = {
        "inputs": "in.npy",
        "function": "smooth.yaml",
        "target": "out.zarr",
        "params": {"sigma": [-1, 2, 2], "sgima": 2},
    }
    Path("spec.yaml").write_text(yaml.safe_dump({"stages": {"smooth": stage}}, sort_keys=False))
    refused = run("run", "spec.yaml")
    assert refused.stderr.endswith(f"Error: {mistakes}")
    del stage["params"]
    Path("spec.yaml").write_text(yaml.safe_dump({"stages": {"smooth": stage}}, sort_keys=False))
    done = run("run", "spec.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    assert run("info", "smooth.yaml").exit_code == 0
