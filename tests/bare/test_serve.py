"""What a worker answers, whatever it is asked."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support import begin

from cellimg_dask.bare.serve import Reply, Runtime, Server
from cellimg_dask.bare.wire import Message, Wire


class Says(Runtime):
    """Answers what it is given."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def do_say(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        return {"outputs": self._answer}, []

    def do_live(self, request: Message, attached: list[bytes], server: Server) -> Reply:
        return {}, []


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("answer", [object(), nested(100_000), {"x": {1j: 2}}])
def test_what_cannot_be_said_is_a_failure_and_not_the_end(answer: Any) -> None:
    here, there = os.pipe(), os.pipe()
    caller, worker = Wire(here[0], there[1]), Wire(there[0], here[1])
    serving = begin(lambda: Server(worker, Says(answer)).run())
    kinds = []
    for number, kind in enumerate(["SAY", "LIVE"]):
        caller.send({"requestType": kind, "task": number})
        received = caller.receive(10)
        assert received is not None
        assert received[0]["task"] == number
        kinds.append(received[0]["responseType"])
    caller.close()
    serving.result(10)
    worker.close()
    assert kinds == ["FAILURE", "COMPLETION"]
