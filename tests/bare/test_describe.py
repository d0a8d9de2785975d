"""What signatures say, asked in another Python: its prints, its failures, its end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cellimg_dask.bare.describe import describe as signature
from cellimg_dask.schemas.describe import describe

TEXT = """
from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Literal, Optional
import numpy as np
import beside

if TYPE_CHECKING:
    from collections.abc import Sequence
    from numpy.typing import NDArray

print("a print that is no answer", end="")
sys.stdout.write("another")
os.write(1, b"and one below Python")


class Bounds:
    gt, le = 0, 1


class Typing:
    'As Annotated looks to who has none.'


def smooth(
    image: NDArray[np.uint16],
    sigma: float | Sequence[float] = 1,
    mode: Literal["reflect", "wrap"] = "reflect",
    size: Optional[tuple[int, int]] = None,
    kernel: NDArray[np.float32] | None = None,
    *,
    share: Annotated[float, Bounds()] = 0.5,
    start: int = beside.start,
    task=None,
) -> NDArray[np.float32]:
    '''Smooth.'''


class Filters:
    @staticmethod
    def described(image: Annotated[np.ndarray, {"axes": "zyx", "halo": [1, 2, 3]}], n: int): ...


def odd(image, how: complex): ...

value = 3
"""


class Here:
    """An environment of this same Python, or of another."""

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python

    def command(self) -> list[str]:
        return [self.python]

    def variables(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("start = 7\n")
    path = tmp_path / "described_elsewhere.py"
    path.write_text(TEXT)
    return path


def test_another_python_says_what_this_one_says(file, capfd):
    elsewhere = describe(f"{file}:smooth", env=Here())
    assert capfd.readouterr() == ("", "")
    here = describe(f"{file}:smooth")
    assert elsewhere == here
    properties = elsewhere.parameters["properties"]
    assert properties == {
        "sigma": {
            "anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}],
            "default": 1,
        },
        "mode": {"enum": ["reflect", "wrap"], "default": "reflect"},
        "size": {
            "anyOf": [
                {
                    "type": "array",
                    "prefixItems": [{"type": "integer"}, {"type": "integer"}],
                    "items": False,
                    "minItems": 2,
                },
                {"type": "null"},
            ],
            "default": None,
        },
        "kernel": {
            "anyOf": [{"type": "array", "x-array": {"dtype": "float32"}}, {"type": "null"}],
            "default": None,
        },
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 0.5},
        "start": {"type": "integer", "default": 7},
    }
    assert elsewhere.inputs[0].dtype == ("uint16",)
    assert elsewhere.outputs[0].dtype == ("float32",)
    assert elsewhere.validate({"sigma": [1, 2]})["sigma"] == [1.0, 2.0]


def test_nothing_is_imported_here(file):
    # Its module cannot be imported in this process.
    sys.modules["beside"] = None  # type: ignore[assignment]
    schema = describe(f"{file}:Filters.described", env=Here())
    assert schema.inputs[0].halo == ((1, 1), (2, 2), (3, 3))
    assert schema.parameters["required"] == ["n"]


def test_a_module_is_looked_for_in_the_working_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    schema = describe("described_elsewhere:smooth", env=Here())
    assert next(iter(schema.parameters["properties"])) == "sigma"


FAILURES: list[tuple[str, type[Exception], str]] = [
    ("{file}:smoth", AttributeError, "did you mean 'smooth'"),
    ("{file}:value", TypeError, "an int, which cannot be called"),
    ("{file}:odd", TypeError, "odd: parameter how is of type complex, which JSON cannot say"),
    ("no_such_module_anywhere:f", ImportError, "No module named 'no_such_module_anywhere'"),
]


@pytest.mark.parametrize(("name", "error", "message"), FAILURES)
def test_what_goes_wrong_there_is_told_here(file, name, error, message):
    with pytest.raises(error, match=message):
        describe(name.format(file=file), env=Here())


def test_a_module_that_ends_its_python_is_told(file):
    file.write_text("import os, sys\nsys.stderr.write('last words\\n')\nos._exit(7)")
    with pytest.raises(RuntimeError, match=r"(?s)ended with exit code 7 and .*last words"):
        describe(f"{file}:f", env=Here())
    file.write_text("raise SystemExit(3)")
    with pytest.raises(ImportError, match="SystemExit: 3"):
        describe(f"{file}:f", env=Here())
    file.write_text("def f(:")
    with pytest.raises(SyntaxError):
        describe(f"{file}:f", env=Here())


def test_a_module_that_waits_is_told(file):
    file.write_text("import threading\nthreading.Event().wait()")
    with pytest.raises(TimeoutError, match="within 1"):
        describe(f"{file}:f", env=Here(), timeout_s=1)


def test_a_function_of_this_process_is_not_in_another():
    with pytest.raises(TypeError, match="is not in env: name it"):
        describe(len, env=Here())


def test_it_is_json(file):
    def f(image: Any, a: float = 1.5, *more: int, b: list[str] = [], **rest: bool) -> None:  # noqa: B006
        """Do nothing."""

    said = signature(f)
    assert json.loads(json.dumps(said)) == said
    assert [entry["kind"] for entry in said["parameters"]] == [
        "positional_or_keyword",
        "positional_or_keyword",
        "var_positional",
        "keyword_only",
        "var_keyword",
    ]
    assert said["parameters"][1] == {
        "name": "a",
        "kind": "positional_or_keyword",
        "annotated": True,
        "schema": {"type": "number"},
        "unsaid": [],
        "default": "1.5",
        "value": 1.5,
    }
    assert said["returns"] == [{"type": "null"}]
    assert said["doc"] == "Do nothing."
