"""`cellimg share` in a process of its own, and what is then seen by others."""

from __future__ import annotations

import importlib
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PATIENCE_S

import cellimg_dask as ci
from cellimg_dask.cli.share import _name_of
from cellimg_dask.image.shared import _numpy_line

Share = Callable[..., Any]


def exists(name: str) -> bool:
    return Path("/dev/shm", name).exists()


@pytest.fixture
def name() -> Iterator[str]:
    """A name that nobody has, and which is free again after the test."""
    name = f"cellimg-test-{secrets.token_hex(4)}"
    yield name
    ci.shared.cleanup(dead_owners=False, own=True)
    assert not exists(name)


class Sharing:
    """A process that shares something."""

    def __init__(self, *arguments: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cellimg_dask", "share", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break

    def line(self, after: str) -> str:
        return self.lines[self.lines.index(after) + 1].strip()

    def end(self, how: int | None = signal.SIGINT) -> tuple[int, str, str]:
        if how is not None:
            self.process.send_signal(how)
        out, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, errors


@pytest.fixture
def share() -> Iterator[Share]:
    started: list[Sharing] = []

    def begin(*arguments: Any) -> Sharing:
        started.append(Sharing(*arguments))
        return started[-1]

    yield begin
    for sharing in started:
        if sharing.process.poll() is None:
            sharing.process.kill()
        sharing.process.communicate()


def test_a_file_is_shared_until_ctrl_c(
    share: Share, files: dict[str, Path], name: str, stack: Any, other_python: str
) -> None:
    sharing = share(files["stack.tif"], "--name", name)
    assert sharing.lines[0] == (
        f"stack.tif is shared as {name}: (6, 40, 50), uint16, axes z, y, x, 23.44 kiB"
    )
    assert exists(name)
    with ci.shared.open(name) as mine:
        np.testing.assert_array_equal(mine.array, stack)
        assert mine.axes == ("z", "y", "x")
        assert mine.owner == sharing.process.pid
        # The lines that it shows, word by word, in Pythons that have nothing to do with it.
        numpy = sharing.line("In any Python with NumPy:")
        code = f"{numpy}; print(a.sum()); a[1, 2, 3] = 7; a[5, 39, 49] = 8"
        for python in (sys.executable, other_python):
            mine[1, 2, 3] = stack[1, 2, 3]
            mine[5, 39, 49] = stack[5, 39, 49]
            out = subprocess.check_output([python, "-W", "error", "-c", code], text=True)
            assert int(out) == stack.sum()
            assert (mine[1, 2, 3], mine[5, 39, 49]) == (7, 8)
        own = sharing.line("In one that has cellimg_dask:")
        out = subprocess.check_output([sys.executable, "-c", f"{own}; print(a)"], text=True)
        assert f"SharedArray {name!r} of shape (6, 40, 50), uint16, axes z, y, x" in out
        # At a prompt, as a person would.
        shell = sharing.line("Or begin one that has it:").replace("python", sys.executable, 1)
        done = subprocess.run(
            shell, shell=True, input="print(a[1, 2, 3])\n", capture_output=True, text=True
        )
        assert done.stdout.split()[-1] == "7"
        assert exists(name)
        code, out, errors = sharing.end()
        assert (code, out.split()[-1]) == (0, "Removed.")
        assert "Traceback" not in errors
        assert mine.is_removed
        assert mine[1, 2, 3] == 7
    assert not exists(name)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "rm"])
def test_it_ends_when_it_is_told_to(
    share: Share, files: dict[str, Path], name: str, how: str, run: Any
) -> None:
    sharing = share(files["gray.png"], "--name", name)
    if how == "rm":
        assert run("shared", "rm", name).output == f"removed {name}\n"
        code, out, _ = sharing.end(None)
        assert out.split("\n")[-2] == "It was removed by another process."
    else:
        code, out, _ = sharing.end(getattr(signal, how))
        assert "Removed." in out
    assert code == 0
    assert not exists(name)


def test_what_kills_it_leaves_nothing(
    share: Share, files: dict[str, Path], name: str, until: Any
) -> None:
    sharing = share(files["stack.npy"], "--name", name)
    with ci.shared.open(name) as mine:
        sharing.end(signal.SIGKILL)
        until(lambda: not exists(name))
        assert mine.array.sum() > 0


@pytest.mark.parametrize(
    ("file", "part", "shape", "dtype", "axes"),
    [
        ("v2.zarr", None, (6, 40, 50), "uint16", None),
        ("sharded.zarr", None, (6, 40, 50), "uint16", ("z", "y", "x")),
        ("ome.zarr", None, (6, 40, 50), "uint16", ("z", "y", "x")),
        ("ome.zarr", "half", (3, 20, 25), "uint16", ("z", "y", "x")),
        ("measured.h5", None, (6, 40, 50), "uint16", None),
        ("measured.h5", "exposure", (), "float64", None),
        ("two-series.tif", "series 1", (6, 20, 30), "uint16", ("z", "y", "x")),
        ("colour.png", None, (40, 50, 3), "uint8", ("y", "x", "s")),
        ("complex.npy", None, (40, 50), "complex128", None),
        ("empty.npy", None, (0, 40, 50), "uint16", None),
    ],
)
def test_files_of_every_kind(
    run: Any,
    files: dict[str, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    part: str | None,
    shape: tuple[int, ...],
    dtype: str,
    axes: Any,
) -> None:
    # The command has the module's name.
    module = importlib.import_module("cellimg_dask.cli.share")
    seen: list[Any] = []

    def look(made: Any, *_: Any) -> None:
        seen.append((made.shape, str(made.dtype), made.axes))
        seen.append(made.numpy_line())
        namespace: dict[str, Any] = {}
        exec(seen[-1], namespace)
        assert namespace["a"].shape == shape
        np.testing.assert_array_equal(namespace["a"], made.array)
        made.close()

    # Removed at once, it need not wait for anybody.
    monkeypatch.setattr(module, "_tell", look)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0)
    result = run("share", files[file], "--name", name, *(["--array", part] if part else []))
    assert result.exit_code == 0
    assert seen[0] == (shape, dtype, axes)
    assert not exists(name)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(5.5),
        np.array([(1, 2.5)], [("a", "u1"), ("b", ">f8")]),
        np.array(["ab", "c"]),
        np.zeros((0, 3)),
        np.array([True, False]),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_the_line_for_numpy_gives_the_same_array(name: str, platform: str, array: Any) -> None:
    with ci.shared.put(name, array) as made:
        line = _numpy_line(made, platform)
        assert "\n" not in line
        namespace: dict[str, Any] = {}
        exec(line, namespace)
        found = namespace["a"]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
        if array.size:
            made[...] = np.zeros((), array.dtype)
            np.testing.assert_array_equal(found, np.zeros_like(array))
            assert found.flags.f_contiguous == array.flags.f_contiguous
        del found, namespace
    assert 'mmap.mmap(-1, 10, "x")' not in line


def test_the_line_for_windows_is_python(name: str) -> None:
    with ci.shared.put(name, [1, 2]) as made:
        line = _numpy_line(made, "win32")
    compile(line, "line", "exec")
    assert f'mmap.mmap(-1, {4096 + 16}, "{name}")' in line


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a/cells.ome.tif", "cells"),
        ("my cells (2).npy", "my_cells__2_"),
        ("-x.npy", "x"),
        ("ä.npy", "_"),
        (".hidden", "image"),
        ("n" * 50, "n" * 30),
    ],
)
def test_a_name_is_made_from_the_file(file: str, expected: str) -> None:
    assert _name_of(Path(file)) == expected


def test_what_cannot_be_shared_is_said(run: Any, files: dict[str, Path], name: str) -> None:
    with ci.shared.put(name, [1]):
        result = run("share", files["gray.png"], "--name", name)
        assert result.exit_code == 1
        assert re.search(rf"of this name already.*--name.*cellimg shared rm {name}", result.output)
    result = run("share", files["gray.png"], "--name", "a/b")
    assert result.exit_code == 1
    assert "no name for shared memory: 'a/b'" in result.output
    result = run("share", files["measured.h5"], "--name", name, "--array", "nothing")
    assert result.exit_code == 1
    assert "has no array 'nothing'; it has: exposure, raw/volume" in result.output
    result = run("share", files["gray.png"], "--name", name, "--array", "nothing")
    assert "it has: one, which has no name" in result.output
    big = files["gray.png"].parent / "big.npy"
    # A sparse file.
    np.lib.format.open_memmap(big, mode="w+", dtype="u1", shape=(1 << 42,))
    result = run("share", big, "--name", name)
    assert result.exit_code == 1
    assert "cannot be shared: no room for 4,398,046," in result.output


# ---------------------------------------------------------------------- shared


def test_what_is_shared_is_listed(run: Any, name: str) -> None:
    with (
        ci.shared.put(f"{name}-a", np.zeros((20, 300), "u2"), "yx"),
        ci.shared.put(f"{name}-b", np.array(5.5)),
    ):
        lines = [line for line in run("shared", "ls").output.splitlines() if name in line]
        assert [line.split() for line in lines] == [
            f"{name}-a (20, 300) uint16 y, x 15.72 kiB {os.getpid()} yes".split(),
            f"{name}-b () float64 4.01 kiB {os.getpid()} yes".split(),
        ]
        segment = ci.shared.open(f"{name}-b")._segment
        segment.array((1,), "u1", 40)[:] = 0
        damaged = [line for line in run("shared", "ls").output.splitlines() if f"{name}-b" in line]
        assert damaged[0].split() == [f"{name}-b", "damaged", "4.01", "kiB", "unknown"]
        assert run("shared", "rm", f"{name}-b").exit_code == 0
    heading = run("shared", "ls").output.split()
    assert heading[0] in ("name", "Nothing")


def test_nothing_shared_is_said(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ci.shared, "list", list)
    assert run("shared", "ls").output == "Nothing is shared.\n"


def test_what_is_shared_is_removed(run: Any, name: str) -> None:
    with ci.shared.put(f"{name}-a", [1]), ci.shared.put(f"{name}-b", [2]):
        result = run("shared", "rm", f"{name}-a", "nobody-has-this", f"{name}-b")
        assert result.exit_code == 1
        assert f"removed {name}-a\n" in result.output
        assert f"removed {name}-b\n" in result.output
        assert "no shared memory of this name" in result.output
    assert not exists(f"{name}-a")
    result = run("shared", "rm")
    assert result.exit_code == 2
    assert "--dead" in result.output


def test_what_the_dead_left_is_removed(run: Any, name: str) -> None:
    code = (
        "import os, sys, cellimg_dask as ci\n"
        "from multiprocessing import resource_tracker as t\n"
        "ci.shared.put(sys.argv[1], [1, 2])\n"
        "os.kill(t._resource_tracker._pid, 9)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, name], timeout=PATIENCE_S)
    assert exists(name)
    with ci.shared.put(f"{name}-mine", [1]):
        listed = run("shared", "ls").output
        assert next(line for line in listed.splitlines() if f"{name} " in line).endswith("no")
        assert f"removed {name}\n" in run("shared", "rm", "--dead").output
        assert exists(f"{name}-mine")
    assert not exists(name)


def test_sharing_imports_what_it_needs_only(imported: Any) -> None:
    assert not imported("shared", "--help") & {"dask", "zarr", "tifffile", "h5py"}
    assert not imported("share", "--help") & {"dask", "zarr", "tifffile", "h5py"}


def test_told_to_end_while_it_reads_it_leaves_nothing(
    run: Any, files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("cellimg_dask.cli.share")

    class Ending:
        shape, dtype = (2, 2), np.dtype("u1")

        def __getitem__(self, key: Any) -> Any:
            assert exists(name)
            os.kill(os.getpid(), signal.SIGTERM)
            return np.zeros((2, 2), "u1")[key]

    chosen = module._chosen

    def ending(*arguments: Any) -> Any:
        return replace(chosen(*arguments), read=Ending)

    monkeypatch.setattr(module, "_chosen", ending)
    before = signal.getsignal(signal.SIGTERM)
    result = run("share", files["gray.png"], "--name", name)
    assert result.exit_code == 1
    assert "Aborted!" in result.output
    assert not exists(name)
    assert signal.getsignal(signal.SIGTERM) is before
