"""The benchmarks run, and print every row, whatever the numbers are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="peak memory is read from the resource module")
pytest.importorskip("scipy")
pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "core": "abcdefgh",
    "queue": "abcde",
    "change": "abcde",
    "objects": "abcd",
    "env": "abc",
    "serve": "abcd",
}
WITH_GOALS = {
    "core": "abcdefgh",
    "queue": "abde",
    "change": "abce",
    "objects": "abd",
    "env": "bc",
    "serve": "ac",
}


def run_benchmark(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{program}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def quick_run(
    program: str, values: Path, only: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Check what every quick run prints and writes; return the lines that were written, by row."""
    wanted = ROWS[program] if only is None else only
    done = run_benchmark(program, "--quick", "--json", str(values), "--only", ",".join(wanted))
    assert done.returncode == 0, done.stderr

    heading, *table, facts = done.stdout.splitlines()
    assert heading.split() == ["row", "measured", "median", "min", "–", "max", "goal"]
    printed = [line[0] for line in table if line[:1].strip()]
    assert "".join(printed) == wanted
    assert "reached" not in done.stdout
    for name in ("cores", "Python", "numpy", "dask", "distributed", "zarr"):
        assert f"{name} " in facts

    lines = json.loads(values.read_text())["lines"]
    assert all(len(line["values"]) == 1 for line in lines)
    rows = {row: [line for line in lines if line["row"] == row] for row in wanted}
    assert sum(map(len, rows.values())) == len(lines)
    judged = {line["row"] for line in lines if line["goal"] is not None}
    assert judged == set(WITH_GOALS[program]) & set(wanted)
    return rows


def test_a_quick_run_prints_every_row_and_judges_nothing(tmp_path: Path) -> None:
    written = quick_run("core", tmp_path / "values.json")
    counted = {line["what"]: line["median"] for line in written["h"]}
    # What does not depend on time holds in a quick run too.
    assert [n for what, n in counted.items() if what.startswith("tasks per cell")] == [1, 1, 1]
    assert [n for what, n in counted.items() if what.startswith("calls of the")] == [0, 0]


def test_a_quick_run_of_the_queues_sends_a_parameter_once(tmp_path: Path) -> None:
    # The other rows start the same clusters again and again.
    written = quick_run("queue", tmp_path / "values.json", only="d")
    # A parameter travels once to the scheduler, and at most once to each worker.
    travels = [line for line in written["d"] if line["unit"] == "×"]
    assert len(travels) == 4
    assert all(line["reached"] for line in travels)


def test_a_quick_run_of_changes_finds_nothing_stale(tmp_path: Path) -> None:
    written = quick_run("change", tmp_path / "values.json")
    counted = {line["what"].split(": ")[-1].strip(): line["median"] for line in written["d"]}
    assert counted["of which stale"] == counted["exceptions"] == 0
    assert counted["edits"] > 0


@pytest.mark.parametrize("program", ROWS)
def test_an_unknown_row_is_refused_with_the_rows_there_are(program: str) -> None:
    done = run_benchmark(program, "--only", "a,z")
    assert done.returncode == 2
    assert "no row z" in done.stderr
    assert ",".join(ROWS[program]) in done.stderr


def test_a_quick_run_of_objects_counts_few_tasks(tmp_path: Path) -> None:
    written = quick_run("objects", tmp_path / "values.json")
    for row in "ab":
        (tasks,) = [n for n in written[row] if n["what"] == "tasks per cell"]
        assert tasks["reached"]


def test_a_quick_run_of_other_environments(tmp_path: Path) -> None:
    quick_run("env", tmp_path / "values.json")


def test_a_quick_run_of_the_server_computes_a_cell_once_for_all(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    written = quick_run("serve", tmp_path / "values.json")
    assert written["c"][0]["median"] == 1
