"""Every python block of the README runs, in order, and prints what it says that it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def python_blocks() -> list[tuple[int, str]]:
    """Return (line number, code) of each block."""
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def promised(code: str) -> list[str]:
    """Return what the comments behind ``print(…)`` say."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)


def test_the_blocks_run_in_order_and_print_what_they_say():
    blocks = python_blocks()
    assert len(blocks) >= 8
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, code in blocks:
        printed = io.StringIO()
        # Blank lines in front make a traceback show the line of the README.
        compiled = compile("\n" * line + code, str(README), "exec")
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
        assert printed.getvalue().splitlines() == promised(code), f"block at line {line}"


def test_every_print_says_what_it_prints():
    for line, code in python_blocks():
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


def test_the_files_that_it_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if not (README.parent / link).is_file()]
    assert not missing
