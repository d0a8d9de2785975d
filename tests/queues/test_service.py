"""A worker process that does not keep to what was agreed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import pytest

from cellimg_dask.bare.wire import Message
from cellimg_dask.queues.service import DiedError, Service

WORKER = """
import json, os, sys
print('{"responseType":"LAUNCH"}', flush=True)
json.loads(sys.stdin.readline())
print('{"task": 0, "responseType": "COMPLETION"}', flush=True)
sys.stdin.readline()
os.write(1, b'{"task": 1, "responseType": "COMPL')
os._exit(3)
"""


class Breaks:
    """Ends in the middle of a message."""

    advice = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", WORKER]

    def variables(self) -> Mapping[str, str] | None:
        return None

    def greeting(self) -> tuple[Message, tuple[bytes, ...]]:
        return {"requestType": "INIT"}, ()

    def error(self, response: Message, attached: list[bytes], asked: str) -> BaseException:
        return RuntimeError(json.dumps(response))


def test_a_worker_that_dies_in_the_middle_of_a_message() -> None:
    service = Service(Breaks())
    service.ensure()
    with pytest.raises(DiedError, match="exit status 3") as caught:
        service.ask({"requestType": "EXECUTE"})
    assert caught.value.exit_code == 3
    service.end()
