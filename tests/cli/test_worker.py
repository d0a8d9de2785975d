"""`cellimg worker`, driven by programs that do not know this library, as docs/worker.md says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import Asker, Lender, lending

DOC = Path(__file__).resolve().parents[2] / "docs" / "worker.md"
MADE = re.compile(r"cellimg-[0-9a-f]{16}")
FILE = re.compile(r"cellimg_file_measure_[0-9a-f]{8}")

pytestmark = pytest.mark.skipif(
    not Path("/dev/shm").is_dir(), reason="the programs look for shared memory in /dev/shm"
)


@pytest.fixture
def start() -> Iterator[Callable[..., Asker]]:
    """Start the command."""
    made: list[Asker] = []

    def start(*arguments: Any, **options: Any) -> Asker:
        command = [sys.executable, "-m", "cellimg_dask", "worker", *map(str, arguments)]
        made.append(Asker(command, **options))
        return made[-1]

    yield start
    for asker in made:
        asker.close()


@pytest.fixture
def lender() -> Iterator[Lender]:
    with lending() as lender:
        yield lender


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run programs that find the command `cellimg` where commands are."""
    bin = tmp_path / "bin"
    bin.mkdir()
    command = bin / "cellimg"
    path = f"{os.pathsep}".join(path for path in sys.path if path)
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" -m cellimg_dask "$@"\n'
    )
    command.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["PATH"] = f"{bin}{os.pathsep}{clean['PATH']}"

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=clean
        )

    return run


def blocks(language: str) -> list[str]:
    """Return the blocks of the document that are written in a language."""
    text = DOC.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def agree(found: str, promised: str) -> None:
    """Compare a response with one of the document, but for what differs from run to run."""
    both = [json.loads(FILE.sub("", MADE.sub("", text))) for text in (found, promised)]
    errors = [response.pop("error", "") for response in both]
    assert both[0] == both[1]
    # There the begin of a traceback is not shown.
    assert errors[0].endswith(errors[1].removeprefix("… "))


def test_the_transcript_is_what_happens(start, tmp_path, lender):
    (tmp_path / "measure.py").write_text(blocks("python")[0])
    image = lender.put(np.arange(1, 7, dtype=np.uint16).reshape(2, 3))
    out = lender.put(np.zeros((2, 3), np.float32))
    worker = start(cwd=tmp_path)
    exchanged = {">": 0, "<": 0}
    for block in blocks("transcript"):
        for line in block.splitlines():
            sign, text = line[0], line[2:]
            for name, array in (("image", image), ("out", out)):
                text = text.replace(f'{{"name":"{name}"}}', f'{{"name":"{array["shm"]["name"]}"}}')
                text = text.replace(f"memory '{name}'", f"memory '{array['shm']['name']}'")
            exchanged[sign] += 1
            if sign == ">":
                worker.write(text + "\n")
                continue
            found = worker.line()
            assert found is not None, worker.stderr()
            agree(found, text)
            said = json.loads(found).get("outputs", {}).get("at")
            if said is not None:
                assert lender.take(said).tolist() == [[1, 2]]
    assert exchanged[">"] >= 8
    assert exchanged["<"] >= 15
    assert lender.look(out).tolist() == [[0.5, 1, 1.5], [2, 2.5, 3]]
    assert worker.end() == 0
    assert worker.line() is None
    assert worker.stderr() == ""


def test_a_shell_is_a_client(shell):
    script = next(block for block in blocks("sh") if "printf" in block)
    name = f"four-{os.getpid()}"
    done = shell(
        "sh", "-euc", re.sub(r"\bfour\b(?=[\"\s]|$)", name, script).replace("$" + name, "$four")
    )
    assert (done.returncode, done.stderr) == (0, "")
    (promised,) = re.findall(r"^prints `([\d ]+)`", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert done.stdout.split() == promised.split()


def test_a_program_without_the_library_is_a_client(shell, tmp_path):
    run_client(shell, tmp_path, sys.executable)


def test_a_program_in_another_python_is_a_client(shell, tmp_path, other_python):
    run_client(shell, tmp_path, other_python)


def run_client(shell: Any, tmp_path: Path, python: str) -> None:
    (client,) = (block for block in blocks("python") if "def ask" in block)
    path = tmp_path / "client.py"
    path.write_text(client + "import sys\nprint('cellimg_dask' in sys.modules)\n")
    done = shell(python, "-I", str(path))
    assert done.returncode == 0, done.stderr
    (promised,) = re.findall(r"^print\(.*\)  # (.*)$", client, re.MULTILINE)
    assert done.stdout.splitlines() == [promised, "False"]


def test_the_documented_service_of_appose(shell, tmp_path):
    pytest.importorskip("appose")
    (code,) = (block for block in blocks("python") if "import appose" in block)
    path = tmp_path / "service.py"
    path.write_text(
        f"{code}\nwith service:\n    print(service.task('6 * 7').wait_for().result())\n"
        "print(service.wait_for())\n"
    )
    done = shell(sys.executable, str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["42", "0"]


def test_once_says_by_its_status_whether_it_was_done(start):
    worker = start("--once", "--init", "x = 5")
    worker.write("\nwhat\n")
    assert worker.receive()["responseType"] == "FAILURE"
    worker.outputs("INIT", init="x = 3")
    assert worker.result("x") == 3
    assert worker.process.wait() == 0
    worker = start("--once", "--init", "x = 5")
    assert worker.failure(script="1 / (x - 5)") == "division by zero"
    assert worker.process.wait() == 1


def test_it_imports_nothing_heavy_and_helps_functions(start):
    worker = start()
    loaded = set(worker.result("import sys\nlist(sys.modules)"))
    assert not {"dask", "zarr", "pydantic", "appose", "scipy", "yaml", "distributed"} & loaded
    same = (
        "import cellimg_worker.{0}, sys\nsys.modules['cellimg_dask.bare.{0}'] is cellimg_worker.{0}"
    )
    assert worker.result(same.format("shared")) is True
    assert worker.result("from cellimg_worker import shared\nshared.__name__").endswith("shared")


def test_another_environment(start, other_python, tmp_path):
    (tmp_path / "here.py").write_text("def f():\n    return 'beside'\n")
    for place in (other_python, Path(other_python).parents[1]):
        worker = start("--env", place, "--init", "import numpy", cwd=tmp_path)
        assert worker.result("import sys\nsys.version") != sys.version
        assert worker.result("numpy.__version__") != np.__version__
        assert worker.result("import sys\n'cellimg_dask' in sys.modules") is False
        assert worker.result(function="here:f") == "beside"
        assert worker.result("from cellimg_worker import shared\nshared.__name__")
        assert worker.end() == 0


def test_no_such_environment(run):
    result = run("worker", "--env", "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_ctrl_c_ends_it_quietly(start):
    worker = start()
    assert worker.result("1") == 1
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait() == 130
    assert worker.stderr() == ""


def test_it_outlives_the_shell_that_started_it(shell, tmp_path):
    for name in ("requests", "answers"):
        os.mkfifo(tmp_path / name)
    # Both ends, so that nobody waits for the other.
    requests = os.open(tmp_path / "requests", os.O_RDWR)
    answers = os.open(tmp_path / "answers", os.O_RDWR)
    done = shell("sh", "-c", "cellimg worker < requests > answers 2> errors & echo $!")
    pid = int(done.stdout)
    with os.fdopen(answers, closefd=False) as lines:
        for n in range(2):
            # The second comes when its parent is gone for long.
            request = {"task": n, "requestType": "EXECUTE", "script": "import os\nos.getppid()"}
            os.write(requests, (json.dumps(request) + "\n").encode())
            assert json.loads(lines.readline())["responseType"] == "LAUNCH"
            assert json.loads(lines.readline())["outputs"]["result"] != os.getpid()
        os.kill(pid, 0)
        os.close(requests)
        os.close(answers)
    assert (tmp_path / "errors").read_text() == ""
