"""Environments that exist, and those that are made; of other Pythons scripts play the part."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import sysconfig
import threading
import types
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellimg_dask.blocks.errors import CellimgError, EnvError
from cellimg_dask.queues import env_builds
from cellimg_dask.queues.env_facts import known_facts
from cellimg_dask.queues.environments import Env

PACKAGES = Path(np.__file__).parents[1]


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    known_facts.clear()


def with_numpy(folder: Path) -> None:
    """Let a venv of this very Python use this one's NumPy."""
    place = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (place / "numpy.pth").write_text(f"{PACKAGES}\n")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A venv with NumPy."""
    folder = tmp_path / "made"
    venv.create(folder, symlinks=True)
    with_numpy(folder)
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------------------ those that exist


def test_the_current_one() -> None:
    env = Env.current(variables={"CELLIMG_TEST": "1"})
    assert env.command() == [sys.executable]
    assert env.variables({"OTHER": "2"}) == os.environ | {"CELLIMG_TEST": "1", "OTHER": "2"}
    facts = env.facts()
    assert facts.version == sys.version_info[:3]
    assert facts.numpy == np.__version__
    assert len(env.token) == 32
    assert repr(env) == "Env.current(variables={'CELLIMG_TEST': '1'})"


def test_a_venv_by_its_folder_and_by_its_python(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = Env.venv(made)
    python = str(made / "bin" / "python")
    assert env.command() == [python]
    assert env.facts().executable == python
    monkeypatch.chdir(made.parent)
    same = [Env.venv("made"), Env.venv("./made/../made/"), Env.venv(python)]
    assert {env, *same, pickle.loads(pickle.dumps(env))} == {env}
    assert env != Env.venv(made, variables={"A": "b"})
    assert repr(env) == f"Env.venv({python!r})"
    code = "import sys, os; print(sys.prefix, os.environ['VIRTUAL_ENV'], os.environ.get('A'))"
    done = subprocess.run(
        [*env.command(), "-c", code],
        env=Env.venv(made, variables={"A": "b"}).variables(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(made), str(made), "b"]


def test_its_token_tells_what_is_installed(made: Path) -> None:
    before = Env.venv(made).token
    assert Env.venv(made).token == before
    known_facts.clear()
    (next((made / "lib").glob("*/site-packages")) / "some-1.0.dist-info").mkdir()
    after = Env.venv(made)
    assert after.token != before
    assert "some-1.0" in after.facts().installed
    assert after.token != Env.venv(made, variables={"A": "b"}).token


def test_what_is_missing_may_be_mended(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    venv.create(folder, symlinks=True)
    env = Env.venv(folder)
    with pytest.raises(EnvError, match=r"has no NumPy, .*bare/bin/python -m pip install 'numpy>="):
        env.command()
    with_numpy(folder)
    assert env.command()


def test_a_conda_environment_that_exists(tmp_path: Path) -> None:
    (tmp_path / "conda-meta").mkdir()
    script(tmp_path / "bin" / "python", "")
    variables = Env.venv(tmp_path).variables()
    assert variables["CONDA_PREFIX"] == str(tmp_path)
    assert variables["PATH"].startswith(f"{tmp_path}/bin{os.pathsep}")


def test_variables_of_this_python_are_left_out(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {
        "VIRTUAL_ENV": str(tmp_path / "other"),
        "PATH": f"{tmp_path}/other/bin:/usr/bin:/bin",
        "PYTHONPATH": "/nowhere",
        "PYTHONHOME": "/nowhere",
        "PYTHONSTARTUP": "/nowhere",
        "PYTHONUSERBASE": "/nowhere",
        "PYTHONWARNINGS": "error",
        "PYTHONUTF8": "1",
        "CONDA_PREFIX": "/nowhere",
        "CONDA_DEFAULT_ENV": "base",
        "_CONDA_ROOT": "/nowhere",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "NUMEXPR_MAX_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": str(tmp_path),
    }
    monkeypatch.setattr(os, "environ", dict(given))
    assert Env.venv(made, variables={"OMP_NUM_THREADS": "3"}).variables({"X": "y"}) == {
        "VIRTUAL_ENV": str(made),
        "PATH": f"{made}/bin:/usr/bin:/bin",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "3",
        "X": "y",
    }


def test_a_folder_of_modules_in_the_way_is_not_looked_at(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Env.venv(made).facts().numpy == np.__version__


SAYS = "echo 'cellimg environment: {}'"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            SAYS.format('{"version": [3, 8, 18], "executable": "/old"}'),
            "has Python 3.8.18, at /old; blocks need Python 3.9 or later",
        ),
        (
            SAYS.format('{"version": [3, 9, 1], "executable": "/o", "numpy": "1.19.5"}'),
            "has NumPy 1.19.5, which is too old: /o -m pip install 'numpy>=1.20'",
        ),
        (
            SAYS.format('{"version": [2, 7, 18], "executable": "/o", "numpy_error": "no"}'),
            "has Python 2.7.18",
        ),
        ("echo hello; echo 'not found' >&2; exit 3", r"no Python that works.*code 3:\s+not found"),
        ("exit 0", "no Python that works"),
    ],
)
def test_pythons_that_will_not_do(tmp_path: Path, text: str, says: str) -> None:
    env = Env.venv(script(tmp_path / "bin" / "python", text))
    with pytest.raises(EnvError, match=f"(?s){says}") as caught:
        env.command()
    assert isinstance(caught.value, CellimgError)
    assert isinstance(caught.value, RuntimeError)
    assert str(caught.value).startswith(f"Env.venv('{tmp_path}/bin/python')")


def test_a_python_that_does_not_start(tmp_path: Path) -> None:
    env = Env.venv(script(tmp_path / "bin" / "python", ""))
    (tmp_path / "bin" / "python").write_bytes(b"\0")
    with pytest.raises(EnvError, match=r"does not start: .*/bin/python: Exec format error"):
        env.command()
    (tmp_path / "bin" / "python").unlink()
    with pytest.raises(EnvError, match="does not start"):
        env.command()


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no environment .*nowhere; make one with python"):
        Env.venv(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no Python environment: it has no bin/python"):
        Env.venv(tmp_path)
    (tmp_path / "text").write_text("")
    with pytest.raises(ValueError, match="neither the folder of an environment nor a Python"):
        Env.venv(tmp_path / "text")


# ------------------------------------------------------------------------------ those that are made


class Builder:
    """Makes an environment as Appose would, and remembers how it was told to."""

    def __init__(self, kind: str, log: list[dict[str, Any]], work: Callable[[Any], None]) -> None:
        self.told: dict[str, Any] = {"kind": kind}
        self._log, self._work = log, work

    def __getattr__(self, name: str) -> Any:
        def tell(*args: Any, **kwargs: Any) -> Builder:
            self.told[name] = kwargs or (args[0] if len(args) == 1 else args)
            return self

        return tell

    def build(self) -> Any:
        self._log.append(self.told)
        folder = Path(self.told["base"])
        # Whatever was left behind is gone.
        venv.create(folder, symlinks=True, clear=False)
        self.told["subscribe_error"]("Installed 1 package")
        self.told["subscribe_progress"]("Downloading", 1, 2)
        self._work(folder)
        launch = [] if self.told["kind"] == "uv" else [str(folder / "launch"), "run"]
        if launch:
            script(Path(launch[0]), f'shift; name=$1; shift; exec {folder}/bin/$name "$@"')
        return types.SimpleNamespace(
            bin_paths=lambda: [str(folder / "bin")], launch_args=lambda: launch
        )


@pytest.fixture
def appose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in place of Appose; its ``builds`` says what was made."""
    monkeypatch.setenv("APPOSE_ENVS_DIR", str(tmp_path / "envs"))
    for tool in ("uv", "micromamba", "pixi"):
        script(tmp_path / "tools" / tool, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}")
    module: Any = types.ModuleType("appose")
    module.builds = []
    module.work = with_numpy
    for kind in ("uv", "mamba", "pixi"):
        setattr(
            module, kind, lambda kind=kind: Builder(kind, module.builds, lambda f: module.work(f))
        )
    monkeypatch.setitem(sys.modules, "appose", module)
    monkeypatch.setitem(sys.modules, "appose.tool", types.ModuleType("appose.tool"))
    for name, place in (("uv", ".uv"), ("mamba", ".mamba"), ("pixi", ".pixi")):
        tool: Any = types.ModuleType(f"appose.tool.{name}")
        command = tmp_path / "envs" / place / "bin" / ("micromamba" if name == "mamba" else name)
        wanted = types.SimpleNamespace(rootdir=str(tmp_path / "envs"), command=str(command))
        setattr(tool, name.capitalize(), lambda wanted=wanted: wanted)
        monkeypatch.setitem(sys.modules, tool.__name__, tool)
    return module


def test_uv_is_told_what_to_make_once(
    appose: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = Env.uv("3.10", ["scipy==1.13", "NumPy<2"], variables={"UV_OFFLINE": "1"})
    (python,) = env.command()
    (told,) = appose.builds
    folder = Path(python).parents[1]
    assert folder.parent == tmp_path / "envs"
    assert folder.name.startswith("cellimg-uv-")
    assert told["python"] == "3.10"
    assert told["content"] == "scipy==1.13\nNumPy<2\n"
    assert told["scheme"] == "requirements.txt"
    assert told["env"] == {"UV_OFFLINE": "1"}
    assert env.variables()["VIRTUAL_ENV"] == str(folder)
    assert env.variables()["PATH"].startswith(f"{folder}/bin{os.pathsep}")
    shown = capsys.readouterr()
    assert "Installed 1 package" in shown.err
    assert "Downloading 50%" in shown.err
    assert not shown.out
    known_facts.clear()
    assert pickle.loads(pickle.dumps(env)).command() == [python]
    assert len(appose.builds) == 1
    assert (tmp_path / "envs/.uv/bin/uv").resolve() == (tmp_path / "tools/uv").resolve()
    # Another description, another environment; variables make no other one.
    assert Env.uv("3.10", ["scipy==1.14", "NumPy<2"], quiet=True).command() != [python]
    assert not capsys.readouterr().err
    assert Env.uv("3.10", ["scipy==1.13", "NumPy<2"]).command() == [python]
    assert len(appose.builds) == 2


def test_numpy_and_this_python_are_the_default(appose: Any) -> None:
    env = Env.uv(pip=["numpy-stl", "torch"])
    assert env.pip == ("numpy-stl", "torch", "numpy")
    assert env.python == "{}.{}".format(*sys.version_info)
    assert env == Env.uv(env.python, env.pip, quiet=True, download=True)
    assert len({env.token, Env.uv("3.9", env.pip).token}) == 2
    env.command()
    # Found for sure, whatever uv finds.
    assert appose.builds[0]["python"] == sys.executable
    assert repr(env) == f"Env.uv(python={env.python!r}, pip=['numpy-stl', 'torch', 'numpy'])"


def test_what_was_left_half_made_is_made_anew(appose: Any) -> None:
    env = Env.uv(quiet=True)
    folder = Path(env.command()[0]).parents[1]
    (folder / env_builds._DONE).unlink()
    (folder / "left").touch()
    known_facts.clear()
    assert env.command() == [str(folder / "bin" / "python")]
    assert not (folder / "left").exists()
    assert len(appose.builds) == 2
    (folder / env_builds._DONE).write_text("{")
    env.command()
    env.variables()
    assert len(appose.builds) == 3


def test_those_who_want_it_at_the_same_time_wait_for_one(
    appose: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        begun.set()
        assert go.wait(60)
        with_numpy(folder)

    appose.work = slowly
    waiting = threading.Semaphore(0)
    lock = env_builds._lock

    def noted(descriptor: int, *, wait: bool) -> bool:
        if wait:
            waiting.release()
        return lock(descriptor, wait=wait)

    env_builds._lock = noted
    try:
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(Env.uv().command)
            assert begun.wait(60)
            others = [pool.submit(Env.uv().command) for _ in range(2)]
            for _ in others:
                assert waiting.acquire(timeout=60)
            go.set()
            assert {tuple(f.result(60)) for f in [first, *others]} == {tuple(first.result())}
    finally:
        env_builds._lock = lock
        go.set()
    assert len(appose.builds) == 1
    assert "another process is making it" in capsys.readouterr().err


def test_a_failure_says_what_the_tool_said_and_leaves_nothing(appose: Any, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise RuntimeError("uv build failed") from OSError("no solution: scipy==99")

    appose.work = fails
    env = Env.uv(pip=["scipy==99"], quiet=True)
    with pytest.raises(EnvError, match=r"(?s)Env.uv.*could not be made: OSError: no solution") as e:
        env.command()
    assert "Installed 1 package" in str(e.value)
    assert not list((tmp_path / "envs").glob("cellimg-uv-*/*"))
    appose.work = with_numpy
    assert env.command()


def test_an_interrupt_stays_one(appose: Any) -> None:
    def interrupted(folder: Path) -> None:
        raise RuntimeError("uv build interrupted") from KeyboardInterrupt()

    appose.work = interrupted
    with pytest.raises(KeyboardInterrupt):
        Env.uv(quiet=True).command()


def test_conda_and_pixi_start_by_their_launchers(appose: Any, tmp_path: Path) -> None:
    conda = Env.conda(packages=["python=3.10", "conda-forge::scipy"], pip=["stardist"], quiet=True)
    command = conda.command()
    assert command[1:] == ["run", "python"]
    told = appose.builds[-1]
    assert told["content"].splitlines() == [
        "channels:",
        '  - "conda-forge"',
        "dependencies:",
        '  - "python=3.10"',
        '  - "conda-forge::scipy"',
        '  - "numpy"',
        '  - "pip"',
        "  - pip:",
        '      - "stardist"',
    ]
    assert (tmp_path / "envs/.mamba/bin/micromamba").exists()
    pixi = Env.pixi(packages=["scipy"], channels=["a", "b"], quiet=True)
    assert pixi.command()[1:] == ["run", "python"]
    told = appose.builds[-1]
    assert told["conda"] == ("scipy", "python", "numpy")
    assert told["channels"] == ("a", "b")
    assert told["pypi"] == "appose"
    assert "VIRTUAL_ENV" not in pixi.variables()


def test_files_travel_with_what_they_say(appose: Any, tmp_path: Path) -> None:
    (tmp_path / "environment.yml").write_text("dependencies: [numpy]\n")
    (tmp_path / "pixi.toml").write_text("[workspace]\n")
    conda = Env.conda(tmp_path / "environment.yml", quiet=True)
    pixi = Env.pixi(tmp_path / "pixi.toml", quiet=True)
    also = Env.pixi(tmp_path / "environment.yml", quiet=True)
    for path in tmp_path.glob("*.*"):
        path.unlink()
    for env, content, scheme in (
        (conda, "dependencies: [numpy]\n", "environment.yml"),
        (pixi, "[workspace]\n", "pixi.toml"),
        (also, "dependencies: [numpy]\n", "environment.yml"),
    ):
        pickle.loads(pickle.dumps(env)).command()
        assert appose.builds[-1]["content"] == content
        assert appose.builds[-1]["scheme"] == scheme
    assert len({conda.token, pixi.token, also.token}) == 3
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Env.conda("no/environment.yml")
    (tmp_path / "pixi.toml").touch()
    with pytest.raises(TypeError, match="a file, or packages and pip, not both"):
        Env.pixi(tmp_path / "pixi.toml", pip=["scipy"])


def test_without_appose_or_tools(
    appose: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(EnvError, match=r"uv, which is not on PATH: pip install .cellimg-dask\[env"):
        Env.uv(quiet=True).command()
    with pytest.raises(EnvError, match=r"micromamba, which is not on PATH.*Env.conda\(…, download"):
        Env.conda(quiet=True).command()
    with pytest.raises(EnvError, match="pixi, which is not on PATH: install pixi"):
        Env.pixi(quiet=True).command()
    assert not appose.builds
    assert Env.pixi(quiet=True, download=True).variables()["PATH"]
    assert len(appose.builds) == 1

    # As a package it is found wherever its program is.
    found = script(tmp_path / "elsewhere" / "uv", "exit 0")
    package: Any = types.ModuleType("uv")
    package.find_uv_bin = lambda: str(found)
    monkeypatch.setitem(sys.modules, "uv", package)
    place = tmp_path / "envs/.uv/bin/uv"
    place.parent.mkdir(parents=True)
    place.symlink_to("/nowhere/uv")
    Env.uv(quiet=True).variables()
    assert place.resolve() == found.resolve()

    monkeypatch.setitem(sys.modules, "appose", None)
    with pytest.raises(EnvError, match=r"Appose, which is not installed: pip install"):
        Env.uv("3.9", quiet=True).command()
    # What was made before needs it no more.
    assert Env.uv(quiet=True).variables()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Env.uv(pip="scipy"), "pip must be a list of strings, such as .*got 'scipy'"),
        (lambda: Env.uv(pip=[3]), "an item of pip must be a string"),
        (lambda: Env.uv(3.1), r"python must be a string, such as .3.10., got 3.1"),
        (lambda: Env.conda(packages=3), "packages must be a list"),
        (
            lambda: Env.current(variables={"A": 1}),
            "map names to strings, got 'A': 1",
        ),
        (lambda: Env.current(variables=["A"]), "variables must map names to strings, got list"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call()


def test_an_environment_that_uv_makes_for_real(tmp_path: Path) -> None:
    pytest.importorskip("appose")
    if env_builds._tool("uv") is None:
        pytest.skip("uv is not installed")
    code = (
        "from cellimg_dask.queues.environments import Env; "
        "facts = Env.uv(quiet=True).facts(); print(facts.executable, *facts.installed)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        # Appose looks at it once.
        env=os.environ
        | {"APPOSE_ENVS_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if done.returncode and ("fetch" in done.stderr or "error sending request" in done.stderr):
        pytest.skip("PyPI cannot be reached")
    executable, *installed = done.stdout.split()
    assert Path(executable).is_relative_to(tmp_path), done.stderr
    assert [name.partition("-")[0] for name in installed] == ["numpy"]
