"""Messages between a process and its worker, over two pipes that nobody else has.

A message is a tuple, pickled, with its length before it. What arrives is trusted: the other end
is the process that was started, or that started this one.
"""

from __future__ import annotations

import pickle
import struct
from contextlib import suppress
from typing import Any, BinaryIO

__all__ = ["Channel"]

_LENGTH = struct.Struct("<Q")


class Channel:
    """Two ends of pipes.

    Notes
    -----
    Not thread-safe: one sends and receives at a time.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink

    def send(self, *message: Any) -> None:
        """Send a message; `OSError` if the other end is gone."""
        body = pickle.dumps(message, protocol=5)
        self._sink.write(_LENGTH.pack(len(body)) + body)
        self._sink.flush()

    def receive(self) -> tuple[Any, ...]:
        """Wait for a message; `EOFError` if the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        message: tuple[Any, ...] = pickle.loads(self._read(length))
        return message

    def _read(self, length: int) -> bytes:
        data = self._source.read(length)
        if len(data) < length:
            raise EOFError
        return data

    def close(self) -> None:
        """Close both ends."""
        for end in (self._sink, self._source):
            # The other end may be gone, and what was not sent with it.
            with suppress(OSError):
                end.close()
