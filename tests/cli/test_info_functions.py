"""`cellimg info` says what block functions take and give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from cellimg_dask.schemas.describe import describe

FUNCTIONS = '''
"""Functions of a user's."""
from __future__ import annotations
from typing import Annotated, Literal
import numpy as np
from numpy.typing import NDArray

print("hello from the module")

def smooth(
    image: Annotated[NDArray[np.uint16], {"axes": "zyx", "role": "image", "halo": (1, 8, (8, 9))}],
    mask: Annotated[NDArray[np.bool_] | None, {"role": "mask"}] = None,
    *others: NDArray[np.floating],
    sigma: float,
    mode: Literal["reflect", "wrap"] = "reflect",
    steps=(1, 2),
) -> NDArray[np.float32]:
    """Return the image without its noise.

    Parameters
    ----------
    image : ndarray
        A volume.
    sigma : float
        In voxels.
    """

def loose(image, **more: int): ...

def odd(image, how: complex): ...

def _hidden(image): ...
'''

TABLE = """\
{reference}: Return the image without its noise.

inputs
  image   array of uint16 with axes zyx  image, halo (1, 8, (8, 9))  A volume.
  mask    array of bool                  mask, may be left out
  others  array of floating              any number

outputs
  result  array of float32

parameters
  sigma  a number                  required           In voxels.
  mode   one of 'reflect', 'wrap'  default 'reflect'
  steps  anything                  default (1, 2)
"""


@pytest.fixture
def file(run, monkeypatch):
    """A file in the working folder."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    path = Path("info_functions.py").absolute()
    path.write_text(FUNCTIONS)
    yield path
    sys.modules.pop("info_functions", None)


def test_a_function_of_a_file_is_shown(run, file):
    result = run("info", "info_functions.py:smooth")
    assert result.exit_code == 0, result.output
    assert result.stdout == TABLE.format(reference=f"{file}:smooth")
    # What the file prints is no part of the answer, which may go to a program.
    assert result.stderr == "hello from the module\n"


def test_a_module_of_the_working_folder_is_found(run, file):
    result = run("info", "info_functions:smooth")
    assert result.stdout == TABLE.format(reference="info_functions:smooth")


def test_a_function_of_any_parameters_is_shown(run, file):
    lines = run("info", f"{file}:loose").stdout.splitlines()
    assert lines[-2:] == ["parameters", "  …  an integer    by any name"]


def test_a_function_is_asked_in_an_environment(run, file):
    # It cannot be imported in this process.
    file.write_text(f"{FUNCTIONS}\nimport sys\nassert sys.argv[0] == '-c'\n")
    result = run("info", f"{file}:smooth", "--env", sys.prefix)
    assert result.stdout == TABLE.format(reference=f"{file}:smooth")
    missing = run("info", f"{file}:smoth", "--env", sys.prefix)
    assert missing.exit_code == 1
    assert "has no function 'smoth'; did you mean 'smooth'?" in missing.stderr
    Path("empty").mkdir()
    assert "is no Python environment" in run("info", f"{file}:smooth", "--env", "empty").stderr


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_description_that_is_printed_is_read_again(run, file, suffix):
    text = run("info", "--json", f"{file}:smooth").stdout
    content = json.loads(text)
    assert content["parameters"]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    content["function"] = "info_functions.py:smooth"
    written = json.dumps(content) if suffix == "json" else yaml.safe_dump(content, sort_keys=False)
    Path(f"it.{suffix}").write_text(written)
    assert describe(f"it.{suffix}") == describe(f"{file}:smooth")
    assert run("info", f"it.{suffix}").stdout == TABLE.format(reference=f"{file}:smooth")
    assert json.loads(run("info", f"it.{suffix}", "--json").stdout) == json.loads(text)


MISTAKES = [
    (["info_functions.py:smoth"], 1, "has no function 'smoth'; did you mean 'smooth'?"),
    (["info_functions.py:odd"], 1, "odd: parameter how is of type complex, which JSON cannot say"),
    (["info_functions.py"], 2, "name one of them: info_functions.py:smooth, info_functions.py:l"),
    (["elsewhere.py:smooth"], 1, "there is no file"),
    (["no_such_module:smooth"], 1, "No module named 'no_such_module'"),
    (["numpy.negative"], 2, "does not exist. If it is a function, write numpy:negative."),
    (["nowhere.yaml"], 2, "Path 'nowhere.yaml' does not exist.\n"),
    (["spec.yaml"], 1, "'stages' belongs to a spec, and this is to be a description"),
    (["bad.yaml"], 1, "bad.yaml: there is no entry 'inptus'; did you mean inputs?"),
    (["words.yaml"], 1, "parameters.properties.sigma has 'minium', which is not known here; did"),
    (["gone.yaml"], 1, "there is no file"),
    (["broken.yaml"], 1, "broken.yaml is no YAML"),
    (["broken.json"], 1, "broken.json is no JSON"),
    (["bad.yaml", "--env", "."], 2, "--env is for a function, and a description is read as it is"),
    (["image.npy", "--json"], 2, "--json is for functions, and image.npy is none"),
    (["image.npy", "--env", "."], 2, "--env is for functions, and image.npy is none"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_mistakes(run, file, arguments, code, message):
    described = {"function": "info_functions.py:smooth", "inputs": ["image"]}
    contents = {
        "spec.yaml": {"stages": {}},
        "bad.yaml": {"function": "f:f", "inptus": []},
        "words.yaml": described
        | {"parameters": {"properties": {"sigma": {"type": "number", "minium": 0}}}},
        "gone.yaml": described | {"function": "gone.py:smooth"},
    }
    for name, content in contents.items():
        Path(name).write_text(yaml.safe_dump(content))
    Path("broken.yaml").write_text("a: [")
    Path("broken.json").write_text("{")
    Path("image.npy").write_bytes(b"")
    result = run("info", *arguments)
    assert message in result.output
    assert result.exit_code == code


def test_only_what_is_needed_is_imported(imported, file):
    assert not {"pydantic", "yaml"} & imported("--help")
    # Descriptions need none of the packages that read images.
    assert not {"tifffile", "h5py", "dask.array"} & imported("info", "numpy:clip")
