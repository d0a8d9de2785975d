"""The command itself: help, version, and how little it imports."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

COMMANDS = {
    "demo": "zarr",
    "info": "zarr",
    "run": "Run it again to carry on",
    "plan": "computes nothing and writes nothing",
    "status": "done, missing or damaged",
    "worker": "which may be in any language",
}


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.output.split("Commands:")[1].splitlines() if line]
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert COMMANDS[command] in " ".join(result.output.split())


def test_the_help_of_a_run_tells_its_exit_codes(run):
    text = " ".join(run("run", "--help").output.split())
    assert (
        "Exit codes: 0 done, 1 error, 2 wrong usage or spec, 3 some cells failed, 4 the target is "
        "in use, 130 interrupted"
    ) in text


def test_version_is_that_of_the_package(run):
    assert run("--version").output.strip() == f"cellimg, version {version('cellimg-dask')}"


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "cellimg_dask", "--version"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.startswith("cellimg, version ")


@pytest.mark.parametrize("command", ["demo", "run", "status", "worker"])
def test_help_imports_nothing_heavy(imported, command):
    heavy = {
        "dask",
        "distributed",
        "fsspec",
        "h5py",
        "imageio",
        "matplotlib",
        "pydantic",
        "scipy",
        "skimage",
        "tensorstore",
        "tifffile",
        "yaml",
        "zarr",
    }
    assert not imported(command, "--help") & heavy
