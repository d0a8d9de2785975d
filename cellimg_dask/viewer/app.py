"""The server's side of HTTP, as an ASGI app: from an address to a document or a cell."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any, Literal

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import describe
from cellimg_dask.geometry import as_int
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.viewer.answers import (
    NOT_FOUND,
    Answer,
    Headers,
    Send,
    matches,
    parse_range,
    plain,
    ranged,
)
from cellimg_dask.viewer.chunks import ServedArray, position_of
from cellimg_dask.viewer.documents import Codec, as_bytes, image_documents, root_documents
from cellimg_dask.viewer.gate import Gate
from cellimg_dask.viewer.layers import Layer, Layers
from cellimg_dask.viewer.page import PAGE
from cellimg_dask.viewer.work import Work

__all__ = ["ServerApp", "checked_token"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_EDITION = re.compile(r"@edition-[A-Za-z0-9._-]+")
_TOKEN = re.compile(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*")
_JSON = (b"content-type", b"application/json")
_BYTES = (b"content-type", b"application/octet-stream")
_REVALIDATE = (b"cache-control", b"no-cache")
_NO_STORE = (b"cache-control", b"no-store")
_RANGES = (b"accept-ranges", b"bytes")

_ELSEWHERE = 64
"""Cells that workers elsewhere are asked for at a time; each takes a thread here."""
_READERS = 8
"""Cells of arrays that are read at a time, also while all threads compute."""

# Requests of all servers: whoever asks last is served first.
_priorities = count(-1, -1)


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
        self._served: dict[str, _ServedLayer] = {}
        self._root: tuple[tuple[_ServedLayer, ...], dict[str, dict[str, _Document]]] = ((), {})
        self._tasks: set[asyncio.Task[Any]] = set()
        # Where each request takes a thread.
        self._gate = Gate(_ELSEWHERE)
        self._reading = Gate(_READERS)
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
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

    def close(self) -> None:
        """End all requests with an error, and take no more for cells."""
        self._closed = True
        for task in list(self._tasks):
            # The loop may have ended.
            with suppress(RuntimeError):
                task.get_loop().call_soon_threadsafe(task.cancel)
        pool, self._pool = self._pool, None
        if pool is not None:
            # What hangs is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    def _threads(self) -> ThreadPoolExecutor:
        """Return the threads that read arrays and compress."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_READERS)
        return self._pool

    # ------------------------------------------------------------------ ASGI

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        kind = scope["type"]
        if kind == "http":
            method: str = scope["method"]
            if method in ("GET", "HEAD"):
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

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._closed = False
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
            return Answer(200, [_JSON, _NO_STORE], as_bytes(self._status()))
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
                _NO_STORE,
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

    def _layer(self, name: str) -> _ServedLayer | None:
        layer = self.layers.get(name)
        if layer is None:
            self._served.pop(name, None)
            return None
        served = self._served.get(name)
        if served is None or served.layer is not layer:
            served = self._served[name] = _ServedLayer(name, layer, self.compression)
        return served

    def _root_document(
        self, version: Literal["0.4", "0.5"], path: str, scope: MutableMapping[str, Any]
    ) -> Answer:
        layers = tuple(filter(None, [self._layer(name) for name in self.layers]))
        known, documents = self._root
        if known != layers or not documents:
            documents = {
                each: {
                    key: _Document(document)
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
        served: _ServedLayer,
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
            return Answer(304, [(b"etag", tag), _REVALIDATE, _RANGES])
        cell = array.held(loader, index)
        if cell is None:
            if scope["method"] == "HEAD":
                return self._head(array, tag)
            if wanted is not None and if_range is None and array.codec is None:
                found = parse_range(wanted, array.nbytes)
                if found is not None and found[0] >= found[1]:
                    return ranged(memoryview(bytes(array.nbytes)), [], wanted, None)
            computed = await self._compute(receive, served, array, index)
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
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(self._threads(), array.encode, voxels)
        headers = [_BYTES, _RANGES]
        headers += [_NO_STORE] if tag is None else [(b"etag", tag), _REVALIDATE]
        self.work.num_chunks += 1
        self.work.num_bytes += len(body)
        return ranged(body, headers, wanted, if_range)

    def _head(self, array: ServedArray, tag: bytes | None) -> Answer:
        """Say that a chunk is there, without computing it."""
        headers = [_BYTES, _RANGES]
        headers += [_NO_STORE] if tag is None else [(b"etag", tag), _REVALIDATE]
        return Answer(200, headers, length=array.nbytes if array.codec is None else -1)

    async def _compute(
        self, receive: Receive, served: _ServedLayer, array: ServedArray, index: int
    ) -> tuple[NDArray[Any], CellLoader] | Answer | None:
        """Compute a cell; return it and the edition it was asked of, or why there is none.

        None where whoever asked has gone; then nobody computes it, unless it has begun.
        """
        if self._closed:
            return plain(503, "the server is closing\n")
        if len(self._tasks) >= self.max_requests:
            self.work.num_refused += 1
            return plain(503, "too many requests\n", [(b"retry-after", b"1")])
        loop = asyncio.get_running_loop()
        loading = loop.create_task(self._load(array, index))
        gone = loop.create_task(_until_gone(receive))
        # Until it has let go of its request.
        self._tasks.add(loading)
        loading.add_done_callback(self._tasks.discard)
        self.work.begin(array, index)
        try:
            await asyncio.wait((loading, gone), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                self.work.num_cancelled += 1
                return None
            return self._outcome(loading, served, array, index)
        finally:
            # They cancel what they wait for.
            gone.cancel()
            loading.cancel()
            self.work.end(array, index)

    def _outcome(
        self,
        loading: asyncio.Task[tuple[NDArray[Any], CellLoader]],
        served: _ServedLayer,
        array: ServedArray,
        index: int,
    ) -> tuple[NDArray[Any], CellLoader] | Answer:
        if loading.cancelled():
            return plain(503, "the server is closing\n")
        error = loading.exception()
        if error is None:
            self.work.succeeded(array, index)
            return loading.result()
        if isinstance(error, CancelledError):
            return plain(503, "the computation was cancelled\n")
        text = describe(error)
        self.work.failed(served.name, array, index, text)
        return plain(500, text + "\n")

    async def _load(self, array: ServedArray, index: int) -> tuple[NDArray[Any], CellLoader]:
        if array.only_reads:
            loop = asyncio.get_running_loop()
            async with self._reading:
                return await loop.run_in_executor(self._threads(), _read, array, index)
        if array.elsewhere:
            async with self._gate:
                return await _load(array, index)
        return await _load(array, index)

    # ------------------------------------------------------------------ work

    def _of_work(self, name: str, parts: list[str]) -> Answer:
        served = self._layer(name)
        if served is None:
            return NOT_FOUND
        if len(parts) > 1 and parts[1] == "c":
            array = served.level(parts[0])
            body = None if array is None else self.work.chunk(array, parts[2:])
            return NOT_FOUND if body is None else Answer(200, [_BYTES, _NO_STORE], body)
        document = served.work_documents.get("/".join(parts))
        return NOT_FOUND if document is None else Answer(200, [_JSON, _NO_STORE], document.body)

    def _status(self) -> dict[str, Any]:
        names = list(self.layers)
        layers = [served for name in names if (served := self._layer(name)) is not None]
        return self.work.status(
            [(served.name, served.layer, served.arrays) for served in layers], len(self._tasks)
        )


class _Document:
    """A document as it is sent."""

    def __init__(self, document: Any) -> None:
        self.body = as_bytes(document)
        self._tag = b'"d-%s"' % hashlib.sha256(self.body).hexdigest()[:24].encode()

    def answer(self, headers: Headers) -> Answer:
        """Return the document, or that it is still the same."""
        own: Headers = [_JSON, (b"etag", self._tag), _REVALIDATE, _RANGES]
        asked = dict(headers)
        known = asked.get(b"if-none-match")
        if known is not None and matches(self._tag, known):
            return Answer(304, own[1:])
        return ranged(self.body, own, asked.get(b"range"), asked.get(b"if-range"))


class _ServedLayer:
    """A layer with all that is said of it."""

    def __init__(self, name: str, layer: Layer, codec: Codec | None) -> None:
        self.name = name
        self.layer = layer
        self.arrays = [ServedArray(image, layer.fill_value, codec) for image in layer.images]
        self.described: dict[str, dict[str, Any]] = {}
        self.documents: dict[str, dict[str, _Document]] = {}
        for version in ("0.4", "0.5"):
            self.described[version] = image_documents(
                name,
                [array.grid for array in self.arrays],
                layer.spaces,
                layer.dtype,
                layer.fill_value,
                codec,
                version,
                is_labels=layer.kind == "labels",
            )
            self.documents[version] = {
                path: _Document(document) for path, document in self.described[version].items()
            }
        self.work_documents = {
            path: _Document(document)
            for path, document in Work.documents(name, layer.spaces, self.arrays).items()
        }

    def level(self, part: str) -> ServedArray | None:
        """Return the array of a level by its name."""
        known = len(self.arrays)
        number = position_of([part], [known])
        return None if number is None else self.arrays[number]


def checked_token(token: str | None) -> str | None:
    """Return a token that can be part of an address."""
    if token is not None and (not isinstance(token, str) or not _TOKEN.fullmatch(token)):
        raise ValueError(
            f"a token is made of letters, digits and -._~ and does not begin with a dot, "
            f"got {token!r}"
        )
    return token


def _read(array: ServedArray, index: int) -> tuple[NDArray[Any], CellLoader]:
    """Return a cell of an array, read on this thread, and the edition that it is of."""
    # Whoever looks at data does not wait for threads that compute.
    loader = array.image.loader
    return array.image.load(index), loader


async def _load(array: ServedArray, index: int) -> tuple[NDArray[Any], CellLoader]:
    """Compute a cell; return it, and the edition that it is of."""
    image = array.image
    while True:
        loader = image.loader
        request = image.request(array.roi(index), priority=next(_priorities))
        if image.loader is loader:
            break
    try:
        return await request, loader
    except asyncio.CancelledError:
        raise
    except BaseException as raised:
        # With function, cell and cause, where it is a block's.
        error = request.error or raised
        if not isinstance(error, Exception):
            # A block that ends its thread does not end this one.
            error = RuntimeError(describe(error))
    try:
        raise error
    finally:
        # The error holds this frame.
        del error


def _same_version(
    array: ServedArray, before: CellLoader, began: CellLoader, index: int, tag: bytes
) -> bool:
    """Whether a cell that was computed meanwhile is surely of the version ``tag``."""
    now = array.image.loader
    if now is before and now is began:
        return True
    return array.tag(began, index) == tag == array.tag(now, index)


async def _until_gone(receive: Receive) -> None:
    """Return when whoever asked has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
