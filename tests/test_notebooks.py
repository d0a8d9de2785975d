"""The notebooks show what they computed; that they run is tested by nbmake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_is_a_quickstart():
    assert "quickstart.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def code_cells(request):
    cells = json.loads(request.param.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_cells_were_executed_in_order_without_errors_or_warnings(code_cells):
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_a_picture_is_shown(code_cells):
    shown = [set(output.get("data", ())) for cell in code_cells for output in cell["outputs"]]
    assert any("image/png" in kinds for kinds in shown)


def test_outputs_hold_no_path_of_a_machine(code_cells):
    text = json.dumps([cell["outputs"] for cell in code_cells])
    assert not re.search(r"/(home|tmp|root|work|Users)/", text)
