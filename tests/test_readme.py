"""Every python block of README and docs runs, in order, and prints what it says that it prints."""

from __future__ import annotations

import contextlib
import io
import linecache
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
ENVIRONMENTS = README.parent / "docs" / "environments.md"
VIEWING = README.parent / "docs" / "viewing.md"
PAGES = [README, ENVIRONMENTS, VIEWING]


def python_blocks(page: Path = README) -> list[tuple[int, str]]:
    """Return (line number, code) of each block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def promised(code: str) -> list[str]:
    """Return what the comments behind ``print(…)`` say."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)


def run_blocks(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, code in python_blocks(page):
        file = re.match(r"# (\w+\.py)\n", code)
        if file:
            Path(file[1]).write_text(code, encoding="utf-8")
            continue
        printed = io.StringIO()
        # Blank lines in front make a traceback show the line of the page.
        text, name = "\n" * line + code, f"<{page.name} {line}>"
        # Functions are sent to other Pythons as text.
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        with contextlib.redirect_stdout(printed):
            exec(compile(text, name, "exec"), namespace)
        assert printed.getvalue().splitlines() == promised(code), f"block at line {line}"


def test_the_blocks_run_in_order_and_print_what_they_say():
    assert len(python_blocks()) >= 8
    run_blocks(README)


def test_the_blocks_on_environments_run_in_another_one(other_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old-numpy").symlink_to(Path(other_python).parents[1])
    run_blocks(ENVIRONMENTS)


def test_the_blocks_on_viewing_run():
    run_blocks(VIEWING)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_print_says_what_it_prints(page):
    for line, code in python_blocks(page):
        assert len(promised(code)) == code.count("print("), f"block at line {line}"


def test_the_quickstart_has_about_ten_lines():
    _, code = python_blocks()[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/pip install '.[demo]' && .venv/bin/cellimg demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
    ],
)
def test_the_set_up_commands_stand_there(command):
    assert f"\n{command}\n" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_it_links_to_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if not (page.parent / link).is_file()]
    assert not missing
