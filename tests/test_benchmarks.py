"""The benchmarks run, and print every row, whatever the numbers are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="peak memory is read from the resource module")
pytest.importorskip("scipy")
pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[1]
ROWS = "abcdefgh"


def run_core(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.core", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_quick_run_prints_every_row_and_judges_nothing(tmp_path: Path) -> None:
    values = tmp_path / "values.json"
    done = run_core("--quick", "--json", str(values))
    assert done.returncode == 0, done.stderr

    heading, *lines, facts = done.stdout.splitlines()
    assert heading.split() == ["row", "measured", "median", "min", "–", "max", "goal"]
    printed = [line[0] for line in lines if line[:1].strip()]
    assert "".join(printed) == ROWS
    assert "reached" not in done.stdout
    for name in ("cores", "Python", "numpy", "dask", "zarr"):
        assert f"{name} " in facts

    written = json.loads(values.read_text())
    assert {line["row"] for line in written["lines"]} == set(ROWS)
    judged = {line["row"] for line in written["lines"] if line["goal"] is not None}
    assert judged == set(ROWS)
    assert all(len(line["values"]) == 1 for line in written["lines"])
    counted = {line["what"]: line["median"] for line in written["lines"] if line["row"] == "h"}
    # What does not depend on time holds in a quick run too.
    assert [n for what, n in counted.items() if what.startswith("tasks per cell")] == [1, 1, 1]
    assert [n for what, n in counted.items() if what.startswith("calls of the")] == [0, 0]


def test_an_unknown_row_is_refused_with_the_rows_there_are() -> None:
    done = run_core("--only", "a,z")
    assert done.returncode == 2
    assert "no row z" in done.stderr
    assert ",".join(ROWS) in done.stderr
