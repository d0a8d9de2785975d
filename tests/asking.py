"""A program that asks a worker by lines of JSON, as programs in other languages do."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support import PATIENCE_S

from cellimg_dask.bare.segments import Segment, remove_name

LAST = {"COMPLETION", "CANCELATION", "FAILURE"}


class Asker:
    """Starts a worker and asks it."""

    def __init__(self, command: list[str], **options: Any) -> None:
        # Nobody reads it meanwhile.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            **options,
        )
        self._read = b""
        self._numbers = count()

    def write(self, text: str | bytes) -> None:
        """Send any text."""
        data = text.encode() if isinstance(text, str) else text
        assert self.process.stdin is not None
        while data:
            data = data[self.process.stdin.write(data) :]

    def send(self, kind: str = "EXECUTE", **content: Any) -> str:
        """Send a request and return its task."""
        task = content.pop("task", None) or f"task {next(self._numbers)}"
        self.write(json.dumps({"task": task, "requestType": kind, **content}) + "\n")
        return task

    def line(self) -> str | None:
        """Wait for a line of the answer; None at its end."""
        assert self.process.stdout is not None
        while b"\n" not in self._read:
            ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
            assert ready, "no answer"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                assert not self._read
                return None
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def receive(self) -> dict[str, Any]:
        """Wait for a response."""
        line = self.line()
        assert line is not None, f"the worker has ended: {self.stderr()}"
        # JSON has no NaN.
        response: dict[str, Any] = json.loads(line, parse_constant=_refuse)
        return response

    def last(self) -> dict[str, Any]:
        """Wait for the last response of a task."""
        while (response := self.receive())["responseType"] not in LAST:
            pass
        return response

    def ask(self, kind: str = "EXECUTE", **content: Any) -> dict[str, Any]:
        """Send a request and return the last response to it."""
        task = self.send(kind, **content)
        response = self.last()
        assert response["task"] == task
        return response

    def outputs(self, kind: str = "EXECUTE", **content: Any) -> Any:
        """Send a request, which is to be completed, and return the outputs."""
        response = self.ask(kind, **content)
        assert response["responseType"] == "COMPLETION", response.get("error")
        return response.get("outputs")

    def result(self, script: str | None = None, **content: Any) -> Any:
        """Run a script or call a function, and return its result."""
        if script is not None:
            content["script"] = script
        return self.outputs(**content).get("result")

    def failure(self, kind: str = "EXECUTE", **content: Any) -> str:
        """Send a request that is to fail, and return the message."""
        response = self.ask(kind, **content)
        assert response["responseType"] == "FAILURE", response
        assert response["message"] in response["error"]
        return str(response["message"])

    def end(self) -> int:
        """Close its standard input and return its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(PATIENCE_S)

    def stderr(self) -> str:
        """Return what it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def close(self) -> None:
        """End it, however it is."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._errors):
            assert file is not None
            file.close()


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


class Lender:
    """Makes arrays in shared memory, and takes those that it is given."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def put(self, array: Any, **more: Any) -> dict[str, Any]:
        """Return what a request says of an array that is put into shared memory."""
        array = np.asarray(array)
        segment = Segment.create(None, array.nbytes)
        self._segments.append(segment)
        segment.array(array.shape, array.dtype)[...] = array
        dtype = array.dtype.str if array.dtype.names is None else array.dtype.descr
        return {
            "appose_type": "ndarray",
            "dtype": dtype,
            "shape": list(array.shape),
            "shm": {"appose_type": "shm", "name": segment.name, "rsize": array.nbytes},
            **more,
        }

    def look(self, said: dict[str, Any]) -> NDArray[Any]:
        """Return the values of an array of a request or a response."""
        segment = Segment.attach(said["shm"]["name"])
        dtype = said["dtype"]
        if isinstance(dtype, list):
            dtype = [(field[0], *field[1:]) for field in dtype]
        copy = segment.array(tuple(said["shape"]), dtype, said.get("offset", 0)).copy()
        segment.close()
        return copy

    def take(self, said: dict[str, Any]) -> NDArray[Any]:
        """Return the values of an array of a response, and remove it, as its receiver has to."""
        values = self.look(said)
        assert remove_name(said["shm"]["name"])
        return values

    def remove(self, said: dict[str, Any]) -> None:
        """Remove an array that was put."""
        for segment in self._segments:
            if segment.name == said["shm"]["name"]:
                segment.unlink()

    def close(self) -> None:
        """Remove what was put."""
        for segment in self._segments:
            segment.unlink()
            segment.close()


@contextmanager
def lending() -> Iterator[Lender]:
    """Give somebody who makes arrays, and removes them."""
    lender = Lender()
    try:
        yield lender
    finally:
        lender.close()
