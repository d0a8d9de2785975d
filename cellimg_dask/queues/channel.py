"""Messages between a process and its worker, over two pipes that nobody else has.

A message is a tuple, pickled, with its length before it. What arrives is trusted: the other end
is the process that was started, or that started this one.
"""

from __future__ import annotations

import os
import pickle
import struct
from contextlib import suppress
from io import FileIO
from typing import Any

__all__ = ["Channel"]

_LENGTH = struct.Struct("<Q")


class Channel:
    """Two ends of pipes, unbuffered.

    A buffer has a lock, which a thread may hold while the process is forked.

    Notes
    -----
    Not thread-safe: one sends and receives at a time.
    """

    def __init__(self, source: FileIO, sink: FileIO) -> None:
        self._source = source
        self._sink = sink

    def send(self, *message: Any) -> None:
        """Send a message; `OSError` if the other end is gone."""
        body = pickle.dumps(message, protocol=5)
        left = memoryview(_LENGTH.pack(len(body)) + body)
        while left:
            left = left[self._sink.write(left) :]

    def receive(self) -> tuple[Any, ...]:
        """Wait for a message; `EOFError` if the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        message: tuple[Any, ...] = pickle.loads(self._read(length))
        return message

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        left = memoryview(data)
        while left:
            count = self._source.readinto(left)
            if not count:
                raise EOFError
            left = left[count:]
        return data

    def abandon(self) -> None:
        """Turn both ends away from the pipes, which this process was not meant to have."""
        # Their numbers stay taken, until the files here are closed.
        nothing = os.open(os.devnull, os.O_RDWR)
        for end in (self._source, self._sink):
            os.dup2(nothing, end.fileno(), inheritable=False)
        os.close(nothing)

    def close(self) -> None:
        """Close both ends."""
        for end in (self._sink, self._source):
            # The other end may be gone, and what was not sent with it.
            with suppress(OSError):
                end.close()
