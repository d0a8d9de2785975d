"""A worker process that does not keep to what was agreed."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from support import in_time

from cellimg_dask.bare.wire import Message
from cellimg_dask.queues.pickled_program import PickledProgram
from cellimg_dask.queues.rules import Rules
from cellimg_dask.queues.service import _THREADS, DiedError, Service, _Stderr
from cellimg_dask.queues.worker_pool import WorkerPool

WORKER = """
import json, os, sys
print('{"responseType":"LAUNCH"}', flush=True)
json.loads(sys.stdin.readline())
print('{"task": 0, "responseType": "COMPLETION"}', flush=True)
sys.stdin.readline()
os.write(1, b'{"task": 1, "responseType": "COMPL')
os._exit(3)
"""


ASKS = """
import sys
print('{"responseType":"LAUNCH"}', flush=True)
sys.stdin.readline()
print('{"task": 0, "responseType": "COMPLETION"}', flush=True)
sys.stdin.readline()
print('{"task": 1, "responseType": "ROOM", "nbytes": 1}', flush=True)
sys.stdin.read()
"""


SAYS = """
import sys
print('{"responseType":"LAUNCH"}', flush=True)
sys.stdin.readline()
print('{"task": 0, "responseType": "COMPLETION"}', flush=True)
sys.stdin.readline()
print('{"task": 1, "responseType": "UPDATE"}')
print('{"task": 1, "responseType": "COMPLETION"}', flush=True)
sys.stdin.read()
"""


class Does:
    """Does what it likes."""

    advice = ""

    def __init__(self, program: str) -> None:
        self._program = program

    def command(self) -> list[str]:
        return [sys.executable, "-c", self._program]

    def explain(self) -> None:
        pass

    def variables(self) -> Mapping[str, str] | None:
        return None

    def greeting(self) -> tuple[Message, tuple[bytes, ...]]:
        return {"requestType": "INIT"}, ()

    def error(self, response: Message, attached: list[bytes], asked: str) -> BaseException:
        return RuntimeError(json.dumps(response))


def test_a_worker_that_dies_in_the_middle_of_a_message() -> None:
    service = Service(Does(WORKER), 1)
    service.ensure()
    with pytest.raises(DiedError, match="exit status 3") as caught:
        service.ask({"requestType": "EXECUTE"})
    assert caught.value.exit_code == 3
    service.end()


def test_an_error_of_whoever_answers_is_not_the_worker_s_death() -> None:
    def full(question: Message) -> Message:
        raise OSError(errno.EMFILE, "too many open files")

    service = Service(Does(ASKS), 1)
    service.ensure()
    with pytest.raises(OSError, match="too many open files"):
        service.ask({"requestType": "EXECUTE"}, on_question=full)
    # What it would say next is not waited for.
    service.end()
    assert service.pid is None


def test_what_came_in_time_counts_though_a_listener_took_longer() -> None:
    service = Service(Does(SAYS), 1)
    service.ensure()
    slow = threading.Event()
    response, _ = service.ask(
        {"requestType": "EXECUTE"}, timeout_s=2, on_update=lambda said: slow.wait(2.1) or None
    )
    assert response["responseType"] == "COMPLETION"
    service.end()


def test_standard_error_is_let_go_though_others_hold_both_ends() -> None:
    stderr = _Stderr()
    with stderr.writer() as sink:
        assert sink is not None
        held = os.dup(sink)
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        # It has all that this process had open.
        os.close(there)
        os.read(here, 1)
        os._exit(0)
    try:
        in_time(stderr.close)
    finally:
        os.close(there)
        os.waitpid(child, 0)
        os.close(here)
        os.close(held)


@pytest.mark.parametrize("num_workers", [1, 2, 1000])
@pytest.mark.parametrize("said", [{}, {"OMP_NUM_THREADS": "5"}, {"OPENBLAS_NUM_THREADS": "3"}])
def test_workers_share_the_cores(
    num_workers: int, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    started: list[Any] = []

    def refuse(*_: Any, env: dict[str, str], **__: Any) -> None:
        started.append(env)
        raise OSError("not today")

    monkeypatch.setattr("cellimg_dask.queues.service.subprocess.Popen", refuse)
    monkeypatch.setattr("cellimg_dask.queues.worker_pool.usable_cores", lambda: 6)
    monkeypatch.setattr(WorkerPool, "_start", lambda self: None)
    pool = WorkerPool(num_workers, PickledProgram(None), Rules())
    with pytest.raises(OSError, match="not today"):
        pool._services[-1]._start()
    pool.close(0)
    share = {1: "6", 2: "3", 1000: "1"}[num_workers]
    expected = said or dict.fromkeys(_THREADS, share)
    assert {name: value for name, value in started[0].items() if name in _THREADS} == expected
