"""Messages between a process and a worker, over two descriptors that nobody else has.

A message is a line of JSON. Where its entry ``attached`` lists lengths, as many bytes follow the
line, one part after the other.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

__all__ = ["Message", "Wire"]

Message = dict[str, Any]
"""What a line says."""

_AT_ONCE = 1 << 16
_LAUNCH = b'{"responseType":"LAUNCH"}'

_encoder = json.JSONEncoder(separators=(",", ":"))


def _as_text_of(make: Any) -> Callable[[Message], str]:
    """Return what makes text of a message."""
    if make is None:
        return _encoder.encode
    # The encoder makes one of these for each message, which takes as long as to use it.
    quick = make(
        None,
        _encoder.default,
        json.encoder.encode_basestring_ascii,
        None,
        ":",
        ",",
        False,
        False,
        True,
    )
    return lambda message: "".join(quick(message, 0))


_as_text = _as_text_of(getattr(json.encoder, "c_make_encoder", None))


class Wire:
    """Two descriptors, read and written without a buffer of Python's.

    Such a buffer has a lock, which a thread may hold while the process is forked.

    Notes
    -----
    Any thread may send; one at a time receives.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source = source
        self._sink = sink
        self._sending = threading.Lock()
        self._read = bytearray()
        self._poll: Any = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(source, select.POLLIN)

    def send(self, message: Message, *attached: Any) -> None:
        """Send a message; `OSError` if the other end is gone.

        Parameters
        ----------
        message : dict
            Of JSON's types.
        *attached : bytes-like
            Sent as they are.
        """
        if attached:
            message = dict(message, attached=[len(part) for part in attached])
        line = _as_text(message).encode() + b"\n"
        with self._sending:
            self._write(line)
            for part in attached:
                self._write(part)

    def receive(self, wait_s: float | None = None) -> tuple[Message, list[bytes]] | None:
        """Wait for a message, and return it with what is attached; blank lines are none.

        Parameters
        ----------
        wait_s : float, optional
            How long; None is returned if nothing comes. Default: as long as it takes.

        Raises
        ------
        EOFError
            If the other end is gone.
        ValueError
            If a line is no JSON object.
        """
        deadline = None if wait_s is None else monotonic() + wait_s
        line = b""
        while not line:
            end = self._read.find(b"\n")
            while end < 0:
                if deadline is not None and not self._ready(max(0.0, deadline - monotonic())):
                    return None
                before = len(self._read)
                self._more_of_a_line()
                end = self._read.find(b"\n", before)
            line = bytes(self._read[:end]).strip()
            del self._read[: end + 1]
        try:
            # Of bytes the encoding would be guessed first.
            message = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a line is no JSON ({error}): {_shown(line)}") from None
        if not isinstance(message, dict):
            raise ValueError(f"expected a JSON object in a line, got {_shown(line)}")
        return message, [self._exactly(length) for length in message.get("attached", ())]

    def is_heard(self) -> bool:
        """Whether somebody may still read what is sent; True where nobody can tell."""
        if self._poll is None:
            return True
        poll = select.poll()
        # Errors are told unasked.
        poll.register(self._sink, 0)
        return not poll.poll(0)

    def send_launch(self) -> None:
        """Say that messages begin here; `OSError` if the other end is gone."""
        # Perhaps in the middle of a line.
        with self._sending:
            self._write(b"\n" + _LAUNCH + b"\n")

    def wait_for_launch(self) -> None:
        """Skip whatever a process printed before it took the descriptors.

        Raises
        ------
        EOFError
            If the other end is gone.
        """
        line = b""
        while line != _LAUNCH:
            end = self._read.find(b"\n")
            if end < 0:
                self._more(_AT_ONCE)
            else:
                line = bytes(self._read[:end])
                del self._read[: end + 1]

    def _ready(self, wait_s: float) -> bool:
        # Where nobody can tell, reading waits.
        return self._poll is None or bool(self._poll.poll(wait_s * 1000))

    def _more_of_a_line(self) -> None:
        try:
            self._more(_AT_ONCE)
        except EOFError:
            # The last line may lack its end.
            if not self._read.strip():
                raise
            self._read += b"\n"

    def _more(self, most: int) -> None:
        data = os.read(self._source, most)
        if not data:
            raise EOFError
        self._read += data

    def _exactly(self, length: int) -> bytes:
        while len(self._read) < length:
            self._more(max(_AT_ONCE, length - len(self._read)))
        part = bytes(self._read[:length])
        del self._read[:length]
        return part

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._sink, left) :]

    def abandon(self) -> None:
        """Turn both ends away from what this process, which was forked, was not meant to have."""
        # Another thread may have been sending.
        self._sending = threading.Lock()
        nothing = os.open(os.devnull, os.O_RDWR)
        for end in (self._source, self._sink):
            # Their numbers stay taken.
            os.dup2(nothing, end, inheritable=False)
        os.close(nothing)

    def close(self) -> None:
        """Close both ends; `OSError` from then on."""
        for end in (self._source, self._sink):
            if end >= 0:
                with suppress(OSError):
                    os.close(end)
        self._source = self._sink = -1


def _shown(line: bytes) -> str:
    text = line[:100].decode(errors="replace")
    return text if len(line) <= 100 else f"{text}…"
