from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.server.serving import Server, serve


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


async def ask_async(
    app: Any,
    path: str,
    method: str = "GET",
    *,
    root_path: str = "",
    gone: asyncio.Event | None = None,
    **headers: str,
) -> Reply | None:
    """Ask an ASGI app; ``gone`` is set when whoever asks goes."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "headers": [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ],
    }
    sent: list[Any] = []
    incoming = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await (asyncio.Event() if gone is None else gone).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return None
    names = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    assert len(names) == len(dict(names)), "a header comes twice"
    body = b"".join(bytes(message["body"]) for message in sent[1:])
    if method != "HEAD" and "content-length" in dict(names):
        assert len(body) == int(dict(names)["content-length"])
    return Reply(sent[0]["status"], dict(names), body)


@pytest.fixture
def ask() -> Callable[..., Reply]:
    """Ask an ASGI app: ``ask(app, path, method, header_name=value)``."""

    def ask_once(app: Any, path: str, method: str = "GET", **more: Any) -> Reply:
        reply = asyncio.run(ask_async(app, path, method, **more))
        assert reply is not None
        return reply

    return ask_once


@pytest.fixture
def ask_in_loop() -> Callable[..., Any]:
    """As ``ask``, to be awaited; None where nobody answered."""
    return ask_async


@pytest.fixture
def get() -> Iterator[Callable[..., Reply]]:
    """Ask a server over a socket: ``get(server, path, method, header_name=value)``."""
    connections: dict[tuple[str, int], http.client.HTTPConnection] = {}

    def get_once(server: Server, path: str, method: str = "GET", **headers: str) -> Reply:
        key = server.host, server.port
        if key not in connections:
            connections[key] = http.client.HTTPConnection(*key, timeout=60)
        connection = connections[key]
        asked = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/{server.token}/{path}", headers=asked)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, found, answer.read())

    yield get_once
    for connection in connections.values():
        connection.close()


@pytest.fixture
def numbers() -> ci.CellImg:
    """An image of 3 × 4 ragged cells; no voxel is 0."""
    image = np.arange(1, 6 * 8).reshape(-1)[: 5 * 7].reshape(5, 7).astype("i2")
    return ci.map_cells(np.copy, image, dtype="i2", cell_shape=2)


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    """Serve layers; all servers are closed in the end."""
    servers: list[Server] = []

    def begin(*args: Any, **kwargs: Any) -> Server:
        servers.append(serve(*args, **kwargs))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()
