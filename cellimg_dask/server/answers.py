"""What HTTP says around a body: ranges, versions, who may read it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

__all__ = [
    "BYTES",
    "JSON",
    "NOT_FOUND",
    "NO_STORE",
    "RANGES",
    "REVALIDATE",
    "Answer",
    "Headers",
    "Send",
    "matches",
    "no_such_bytes",
    "parse_range",
    "plain",
    "ranged",
]

Headers: TypeAlias = list[tuple[bytes, bytes]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
BYTES = (b"content-type", b"application/octet-stream")
REVALIDATE = (b"cache-control", b"no-cache")
NO_STORE = (b"cache-control", b"no-store")
RANGES = (b"accept-ranges", b"bytes")

_RANGE = re.compile(rb"bytes[ \t]*=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE)


class Answer:
    """Status, headers and body of a response."""

    __slots__ = ("body", "headers", "length", "status")

    def __init__(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes | memoryview = b"",
        length: int | None = None,
    ) -> None:
        self.status = status
        self.headers: Headers = list(headers)
        self.body = body
        self.length = len(body) if length is None else length
        """Bytes of the body, also where it is not sent; below 0: not known."""

    async def send(self, send: Send, common: Headers, *, head: bool) -> None:
        """Send it, without the body if only the head was asked for."""
        headers = [*self.headers, *common]
        if self.length >= 0 and self.status not in (204, 304):
            headers.append((b"content-length", b"%d" % self.length))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


def plain(status: int, text: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Answer:
    """Return an answer that is a text and is not kept."""
    body = text.encode("utf-8", "replace")
    own = [(b"content-type", b"text/plain; charset=utf-8"), NO_STORE]
    return Answer(status, [*own, *headers], body)


NOT_FOUND = plain(404, "not found\n")


def ranged(
    body: bytes | memoryview, headers: Headers, wanted: bytes | None, if_range: bytes | None
) -> Answer:
    """Return the answer with a body, or with the part of it that is wanted (RFC 9110, 14).

    ``headers`` may have an ``etag``, with which ``if_range`` is compared.
    """
    if wanted is not None and if_range is not None:
        tag = next((value for name, value in headers if name == b"etag"), None)
        if tag is None or if_range.strip() != tag:
            wanted = None
    if wanted is None:
        return Answer(200, headers, body)
    found = parse_range(wanted, len(body))
    if found is None:
        return Answer(200, headers, body)
    low, high = found
    if low >= high:
        return no_such_bytes(len(body))
    where = (b"content-range", b"bytes %d-%d/%d" % (low, high - 1, len(body)))
    return Answer(206, [*headers, where], memoryview(body)[low:high])


def no_such_bytes(length: int) -> Answer:
    """Return the answer to who asks for none of the bytes that there are."""
    return plain(416, "no such bytes\n", [(b"content-range", b"bytes */%d" % length)])


def parse_range(header: bytes, length: int) -> tuple[int, int] | None:
    """Return the half-open range of bytes that a header asks for.

    Parameters
    ----------
    header : bytes
        Of the request.
    length : int
        Bytes that there are.

    Returns
    -------
    tuple of int or None
        None where the header is to be ignored: other units, several ranges, malformed. An empty
        range where it asks for bytes that do not exist.

    Examples
    --------
    >>> parse_range(b"bytes=2-4", 10), parse_range(b"bytes=-3", 10), parse_range(b"bytes=4-", 10)
    ((2, 5), (7, 10), (4, 10))
    >>> parse_range(b"bytes=10-", 10), parse_range(b"bytes=1-2,4-5", 10)
    ((10, 10), None)
    """
    match = _RANGE.fullmatch(header)
    if match is None:
        return None
    first, last = match.groups()
    if not first:
        if not last:
            return None
        return max(0, length - int(last)), length
    low = int(first)
    if last and int(last) < low:
        return None
    high = min(int(last) + 1, length) if last else length
    return min(low, length), high


def matches(tag: bytes, known: bytes) -> bool:
    """Whether a version is among those that ``If-None-Match`` lists."""
    if tag == known:
        return True
    parts = [part.strip() for part in known.split(b",")]
    return b"*" in parts or any(part.removeprefix(b"W/") == tag for part in parts)
