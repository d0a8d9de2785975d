"""The command itself: help, version, and how little it imports."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "info" in result.output


@pytest.mark.parametrize("command", ["demo", "info"])
def test_each_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "zarr" in result.output


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


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from cellimg_dask.cli import main\n"
        "main(['demo', '--help'], standalone_mode=False)\n"
        "heavy = {'dask', 'scipy', 'skimage', 'matplotlib', 'zarr', 'tifffile', 'h5py', "
        "'imageio', 'tensorstore', 'distributed'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
