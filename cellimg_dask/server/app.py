"""The server's side of HTTP, as an ASGI app: from an address to a document or a cell."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any, Literal

from cellimg_dask.geometry import as_int
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.server.answers import (
    BYTES,
    JSON,
    NO_STORE,
    NOT_FOUND,
    RANGES,
    REVALIDATE,
    Answer,
    Headers,
    Send,
    matches,
    no_such_bytes,
    parse_range,
    plain,
    ranged,
)
from cellimg_dask.server.chunks import ServedArray, position_of
from cellimg_dask.server.documents import Codec, as_bytes, root_documents
from cellimg_dask.server.layers import Layer, Layers
from cellimg_dask.server.page import PAGE
from cellimg_dask.server.served import Document, ServedLayer
from cellimg_dask.server.waiting import Receive, Waiting
from cellimg_dask.server.work import Work

__all__ = ["ServerApp", "checked_token"]

_EDITION = re.compile(r"@edition-[A-Za-z0-9._-]+")
_TOKEN = re.compile(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*")


class ServerApp:
    """An ASGI app that serves images as virtual OME-Zarr; made by ``asgi_app``.

    Notes
    -----
    Requests are answered on the thread of the event loop; cells are computed elsewhere. Layers
    may be changed by any thread.
    """

    def __init__(
        self,
        layers: Any,
        *,
        token: str | None = None,
        compression: Codec | None = None,
        max_requests: int = 10_000,
        allow_origin: str | None = "*",
        hosts: Collection[str] | None = None,
    ) -> None:
        self.token = checked_token(token)
        """First part of all addresses; None: there is none."""
        if compression not in (None, "zstd", "gzip"):
            raise ValueError(f'compression must be "zstd", "gzip" or None, got {compression!r}')
        self.compression = compression
        """How chunks are compressed."""
        self.max_requests = as_int(max_requests, "max_requests", minimum=1)
        """How many chunks may be waited for at a time."""
        self.layers = layers if isinstance(layers, Layers) else Layers(layers)
        """The layers by name; changes are seen at once."""
        self.work = Work()
        """What the server has to do, and what went wrong."""
        self._token_bytes = b"" if token is None else token.encode()
        self._served: dict[str, ServedLayer] = {}
        self._known: Mapping[str, Layer] = self.layers.all
        self._root: tuple[tuple[ServedLayer, ...], dict[str, dict[str, Document]]] = ((), {})
        self.waiting = Waiting(self.work, self.max_requests)
        """The cells that are waited for."""
        self._common: Headers = [(b"x-content-type-options", b"nosniff")]
        if allow_origin is not None:
            self._common += [
                (b"access-control-allow-origin", allow_origin.encode("ascii")),
                (
                    b"access-control-expose-headers",
                    b"ETag, Content-Length, Content-Range, Accept-Ranges, Retry-After",
                ),
                # Pages of other origins may embed it: neuroglancer runs isolated from them.
                (b"cross-origin-resource-policy", b"cross-origin"),
            ]
            if allow_origin != "*":
                self._common.append((b"vary", b"origin"))
        self._allow_origin = allow_origin
        self._hosts = None if hosts is None else frozenset(hosts)

    def close(self) -> None:
        """End all requests with an error, and take no more for cells."""
        self.waiting.close()

    # ------------------------------------------------------------------ ASGI

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        kind = scope["type"]
        if kind == "http":
            method: str = scope["method"]
            if self._hosts is not None and not self._is_meant(scope):
                strange = plain(421, "there is no such host here\n")
                await strange.send(send, self._common, head=method == "HEAD")
            elif method in ("GET", "HEAD"):
                answer = await self._answer(scope, receive)
                if answer is not None:
                    await answer.send(send, self._common, head=method == "HEAD")
            elif method == "OPTIONS":
                await self._preflight(scope).send(send, self._common, head=True)
            else:
                allowed = [(b"allow", b"GET, HEAD, OPTIONS")]
                refused = plain(405, "only GET, HEAD and OPTIONS\n", allowed)
                await refused.send(send, self._common, head=False)
        elif kind == "lifespan":
            await self._live(receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    def _is_meant(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether a request names this host: a web page may give our address to its own name."""
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:
            return False
        name = given[0].decode("latin-1").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        return self._hosts is not None and name in self._hosts

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.waiting.closed = False
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _preflight(self, scope: MutableMapping[str, Any]) -> Answer:
        # The same for all addresses: it says nothing of what there is.
        headers: Headers = [(b"allow", b"GET, HEAD, OPTIONS")]
        if self._allow_origin is not None:
            headers += [
                (b"access-control-allow-methods", b"GET, HEAD, OPTIONS"),
                (b"access-control-max-age", b"86400"),
            ]
            for name, value in scope["headers"]:
                if name == b"access-control-request-headers":
                    headers.append((b"access-control-allow-headers", value))
                elif name == b"access-control-request-private-network":
                    headers.append((b"access-control-allow-private-network", b"true"))
        return Answer(204, headers)

    # ------------------------------------------------------------------ addresses

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive) -> Answer | None:
        """Return the answer; None where nobody waits for it any more."""
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root):
            path = path[len(root) :]
        parts = path.split("/")[1:]
        if self.token is not None:
            given = parts[0].encode("utf-8", "replace") if parts else b""
            if not hmac.compare_digest(given, self._token_bytes):
                return NOT_FOUND
            del parts[0]
        if self._known is not self.layers.all:
            # What is served no more is not held any longer.
            self._known = self.layers.all
            self._served = {
                name: served
                for name, served in self._served.items()
                if self._known.get(name) is served.layer
            }
            self._root = (), {}
        # Any edition: what there is now.
        if parts and parts[0].startswith("@e") and _EDITION.fullmatch(parts[0]):
            del parts[0]
        if not parts or parts == [""]:
            return self._front(scope)
        first = parts[0]
        if not first.startswith("@"):
            return await self._of_layers(scope, receive, parts, "0.5")
        if first == "@0.4":
            return await self._of_layers(scope, receive, parts[1:], "0.4")
        if first == "@work" and len(parts) > 2:
            return self._of_work(parts[1], parts[2:])
        if parts == ["@status"]:
            return self._page(scope)
        if parts == ["@status.json"]:
            return Answer(200, [JSON, NO_STORE], as_bytes(self._status()))
        return NOT_FOUND

    def _front(self, scope: MutableMapping[str, Any]) -> Answer:
        if any(name == b"accept" and b"text/html" in value for name, value in scope["headers"]):
            return self._page(scope)
        return self._root_document("0.5", "zarr.json", scope)

    def _page(self, scope: MutableMapping[str, Any]) -> Answer:
        root: str = scope.get("root_path", "")
        base = root if self.token is None else f"{root}/{self.token}"
        return Answer(
            200,
            [
                (b"content-type", b"text/html; charset=utf-8"),
                (
                    b"content-security-policy",
                    (
                        b"default-src 'none'; script-src 'unsafe-inline'; "
                        b"style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
                    ),
                ),
                (b"referrer-policy", b"no-referrer"),
                NO_STORE,
            ],
            PAGE.replace("@BASE@", base).encode(),
        )

    async def _of_layers(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        parts: list[str],
        version: Literal["0.4", "0.5"],
    ) -> Answer | None:
        if len(parts) < 2:
            return self._root_document(version, "/".join(parts), scope)
        served = self._layer(parts[0])
        if served is None:
            return NOT_FOUND
        if version == "0.5":
            chunk = parts[3:] if len(parts) > 2 and parts[2] == "c" else None
        else:
            chunk = parts[2:]
            if not served.arrays[0].shape and chunk == ["0"]:
                # The only chunk of an array without axes.
                chunk = []
        if chunk is not None and (array := served.level(parts[1])) is not None:
            index = position_of(chunk, array.grid.grid_shape)
            if index is not None and array.grid.num_cells:
                return await self._chunk(scope, receive, served, array, index)
        document = served.documents[version].get("/".join(parts[1:]))
        return NOT_FOUND if document is None else document.answer(scope["headers"])

    def _layer(self, name: str) -> ServedLayer | None:
        layer = self.layers.get(name)
        if layer is None:
            return None
        served = self._served.get(name)
        if served is None or served.layer is not layer:
            served = self._served[name] = ServedLayer(name, layer, self.compression)
        return served

    def _root_document(
        self, version: Literal["0.4", "0.5"], path: str, scope: MutableMapping[str, Any]
    ) -> Answer:
        layers = tuple(filter(None, [self._layer(name) for name in self.layers]))
        known, documents = self._root
        if known != layers or not documents:
            documents = {
                each: {
                    key: Document(document)
                    for key, document in root_documents(
                        {served.name: served.described[each] for served in layers}, each
                    ).items()
                }
                for each in ("0.4", "0.5")
            }
            self._root = layers, documents
        document = documents[version].get(path)
        return NOT_FOUND if document is None else document.answer(scope["headers"])

    # ------------------------------------------------------------------ chunks

    async def _chunk(
        self,
        scope: MutableMapping[str, Any],
        receive: Receive,
        served: ServedLayer,
        array: ServedArray,
        index: int,
    ) -> Answer | None:
        known = wanted = if_range = None
        for name, value in scope["headers"]:
            if name == b"if-none-match":
                known = value
            elif name == b"range":
                wanted = value
            elif name == b"if-range":
                if_range = value
        loader = array.image.loader
        tag = array.tag(loader, index)
        if tag is not None and known is not None and matches(tag, known):
            return Answer(304, [(b"etag", tag), REVALIDATE, RANGES])
        cell = array.held(loader, index)
        if cell is None:
            if scope["method"] == "HEAD":
                return self._head(array, tag)
            if wanted is not None and if_range is None and array.codec is None:
                found = parse_range(wanted, array.nbytes)
                if found is not None and found[0] >= found[1]:
                    return no_such_bytes(array.nbytes)
            computed = await self.waiting.compute(receive, served.name, array, index)
            if computed is None or isinstance(computed, Answer):
                return computed
            cell, began = computed
            if tag is not None and not _same_version(array, loader, began, index, tag):
                tag = None
        voxels = array.body(cell)
        if voxels is None:
            # What is not there is fill.
            return NOT_FOUND
        body: bytes | memoryview = voxels
        if array.codec is not None:
            if self.waiting.closed:
                # Its threads have ended.
                body = array.encode(voxels)
            else:
                loop = asyncio.get_running_loop()
                body = await loop.run_in_executor(self.waiting.threads(), array.encode, voxels)
        headers = [BYTES, RANGES]
        headers += [NO_STORE] if tag is None else [(b"etag", tag), REVALIDATE]
        self.work.num_chunks += 1
        self.work.num_bytes += len(body)
        return ranged(body, headers, wanted, if_range)

    def _head(self, array: ServedArray, tag: bytes | None) -> Answer:
        """Say that a chunk is there, without computing it."""
        headers = [BYTES, RANGES]
        headers += [NO_STORE] if tag is None else [(b"etag", tag), REVALIDATE]
        return Answer(200, headers, length=array.nbytes if array.codec is None else -1)

    # ------------------------------------------------------------------ work

    def _of_work(self, name: str, parts: list[str]) -> Answer:
        served = self._layer(name)
        if served is None:
            return NOT_FOUND
        if len(parts) > 1 and parts[1] == "c":
            array = served.level(parts[0])
            body = None if array is None else self.work.chunk(array, parts[2:])
            return NOT_FOUND if body is None else Answer(200, [BYTES, NO_STORE], body)
        document = served.work_documents.get("/".join(parts))
        return NOT_FOUND if document is None else Answer(200, [JSON, NO_STORE], document.body)

    def _status(self) -> dict[str, Any]:
        names = list(self.layers)
        layers = [served for name in names if (served := self._layer(name)) is not None]
        return self.work.status(
            [(served.name, served.layer, served.arrays) for served in layers],
            len(self.waiting.tasks),
        )


def checked_token(token: str | None) -> str | None:
    """Return a token that can be part of an address."""
    if token is not None and (not isinstance(token, str) or not _TOKEN.fullmatch(token)):
        raise ValueError(
            f"a token is made of letters, digits and -._~ and does not begin with a dot, "
            f"got {token!r}"
        )
    return token


def _same_version(
    array: ServedArray, before: CellLoader, began: CellLoader, index: int, tag: bytes
) -> bool:
    """Whether a cell that was computed meanwhile is surely of the version ``tag``."""
    now = array.image.loader
    if now is before and now is began:
        return True
    return array.tag(began, index) == tag == array.tag(now, index)
