"""Examples that need more than a test can have say what it is."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
PACKAGES = {"stardist_2d": "stardist", "cellpose_2d": "cellpose"}


def test_all_examples_are_known():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_what_is_missing_is_told(name, capsys):
    if find_spec(PACKAGES[name]) is not None:
        pytest.skip(f"{PACKAGES[name]} is here, and may begin to download")
    main = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert f"pip install {PACKAGES[name]}" in capsys.readouterr().err
