"""`serve`: a server on a thread of its own."""

from __future__ import annotations

import atexit
import html
import os
import secrets
import socket
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cellimg_dask.geometry import as_int
from cellimg_dask.queues.connect import is_local
from cellimg_dask.server.documents import Codec
from cellimg_dask.server.layers import Layers

if TYPE_CHECKING:
    from cellimg_dask.server.app import ServerApp
    from cellimg_dask.server.listening import Listening

__all__ = ["Server", "asgi_app", "serve"]


class Server:
    """A running server; made by `serve`. It ends by `close`, or as a context manager.

    Notes
    -----
    Thread-safe. It ends with the process; in a process that was forked off this one it is closed.
    """

    def __init__(self, app: ServerApp, host: str, listening: Listening) -> None:
        self.app = app
        """The ASGI app."""
        self.host = host
        """Name or address under which it can be reached."""
        self.port: int = listening.port
        """Where it listens."""
        self._listening: Listening | None = listening
        _servers.add(self)

    @property
    def layers(self) -> Layers:
        """The layers by name; they may be added, replaced and removed at any time."""
        return self.app.layers

    @property
    def token(self) -> str | None:
        """Secret part of the address."""
        return self.app.token

    @property
    def url(self) -> str:
        """Address of everything; ``<url>/<name>`` is that of a layer. Without a slash at the end.

        Whoever knows it can read all layers.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        token = "" if self.token is None else f"/{self.token}"
        return f"http://{host}:{self.port}{token}"

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._listening is None

    def close(self) -> None:
        """End all requests, and the thread."""
        listening, self._listening = self._listening, None
        if listening is not None:
            self.app.close()
            listening.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(self.layers) or "no layers"
        return f"<Server {'closed' if self.closed else self.url}: {names}>"

    def _repr_html_(self) -> str:
        if self.closed:
            return html.escape(repr(self))
        url = html.escape(f"{self.url}/", quote=True)
        rows = "".join(
            f"<li>{html.escape(name)}: {html.escape(repr(layer))}</li>"
            for name, layer in self.layers.items()
        )
        return f'<p><a href="{url}" target="_blank">{url}</a></p><ul>{rows}</ul>'

    def _after_fork(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.after_fork()


def serve(
    layers: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = "random",
    insecure: bool = False,
    compression: Codec | None = None,
    max_requests: int = 10_000,
    allow_origin: str | None = "default",
) -> Server:
    """Serve images over HTTP, as OME-Zarr that is computed while it is read.

    ``<url>/<name>`` is an image as OME-Zarr 0.5 in zarr 3, ``<url>/@0.4/<name>`` the same as
    OME-Zarr 0.4 in zarr 2, for any reader of these: zarr, dask, tensorstore, neuroglancer,
    napari. Each chunk is a cell: whoever reads it has that cell computed, and no other. The page
    at ``<url>/`` shows what there is and what is being computed.

    Parameters
    ----------
    layers : mapping of str to image
        Lazy images, sources, NumPy, zarr or dask arrays, what `open_image` gives, a `pyramid`, a
        sequence of levels, or a `Layer` of these. A single image is called "image".
    host : str
        Address to listen at. Default: that which only this machine can reach.
    port : int
        Default: one that is free.
    token : str or None
        First part of all addresses, without which there is nothing. Default: a new random one.
        None: no secret; then requests must also name this host, by one of its own names.
    insecure : bool
        Whether other machines may read although nothing was said of a token. What is sent is not
        encrypted in any case.
    compression : {"zstd", "gzip"}, optional
        How chunks are compressed. Default: not at all.
    max_requests : int
        So many chunks may be waited for at a time; further requests are refused (503).
    allow_origin : str or None
        Which web pages may read: ``"*"`` all that know the address, an origin such as
        ``"http://localhost:8080"``, or None. Default: all where there is a token; without one
        any page that somebody here opens could read, so none.

    Returns
    -------
    Server

    Raises
    ------
    PermissionError
        If other machines could read and nobody said that they may.
    OSError
        If the address or the port cannot be had.
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> import zarr
    >>> negative = ci.map_cells(np.negative, np.arange(12).reshape(3, 4), cell_shape=2)
    >>> with serve({"negative": negative}) as server:
    ...     array = zarr.open_array(f"{server.url}/negative/0", mode="r")
    ...     array[2, 1:3]
    array([ -9, -10])
    >>> negative.stats().loads
    2
    """
    from cellimg_dask.server.app import ServerApp
    from cellimg_dask.server.listening import listen

    number = as_int(port, "port", minimum=0)
    if number > 65535:
        raise ValueError(f"port must be 0..65535, got {number}")
    if not isinstance(host, str) or not host:
        raise TypeError(f"host must be a name or an address, got {host!r}")
    _check_host(host, token, insecure=insecure)
    secret = secrets.token_urlsafe(16).lstrip("-_") if token == "random" else token
    if allow_origin == "default":
        allow_origin = None if secret is None else "*"
    is_open = secret is None and _is_here(host)
    app = ServerApp(
        layers,
        token=secret,
        compression=compression,
        max_requests=max_requests,
        allow_origin=allow_origin,
        hosts={"localhost", "127.0.0.1", "::1", host.lower()} if is_open else None,
    )
    listening = listen(app, host, number)
    return Server(app, _reachable(host), listening)


def asgi_app(
    layers: Any,
    *,
    token: str | None = None,
    compression: Codec | None = None,
    max_requests: int = 10_000,
    allow_origin: str | None = "*",
) -> ServerApp:
    r"""Return an ASGI app that serves images as virtual OME-Zarr, to be mounted in another.

    Below where it is mounted, and below the token if there is one, ``<name>/`` is the image of
    that name as OME-Zarr 0.5 in zarr 3, ``@0.4/<name>/`` the same as OME-Zarr 0.4 in zarr 2. A
    chunk is a cell: whoever reads it has that cell computed, and no other. `serve` runs it.

    Parameters
    ----------
    layers : mapping of str to image
        As in `serve`.
    token : str, optional
        First part of all addresses; without it there is nothing. Default: none.
    compression : {"zstd", "gzip"}, optional
        How chunks are compressed. Default: not at all.
    max_requests : int
        So many chunks may be waited for at a time; further requests are refused (503).
    allow_origin : str or None
        Which web pages may read: ``"*"`` all of them, an origin, or None.

    Returns
    -------
    ServerApp
        With ``layers``, which may be changed, and ``close()``.

    Examples
    --------
    >>> import asyncio
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> app = asgi_app({"raw": np.arange(6, dtype="u1")})
    >>> async def get(path):
    ...     sent = []
    ...     async def send(message):
    ...         sent.append(message)
    ...     async def receive():
    ...         await asyncio.sleep(60)
    ...     await app({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
    ...     return sent[0]["status"], bytes(sent[1]["body"])
    >>> asyncio.run(get("/raw/0/c/0"))
    (200, b'\x00\x01\x02\x03\x04\x05')
    >>> asyncio.run(get("/raw/0/c/1"))
    (404, b'not found\n')
    """
    # What HTTP needs is imported where it is used.
    from cellimg_dask.server.app import ServerApp

    return ServerApp(
        layers,
        token=token,
        compression=compression,
        max_requests=max_requests,
        allow_origin=allow_origin,
    )


def _check_host(host: str, token: str | None, *, insecure: bool) -> None:
    if _is_here(host) or insecure or token not in (None, "random"):
        return
    raise PermissionError(
        f"{host} can be reached by other machines, and what is sent is not encrypted: whoever "
        f"finds the address reads all layers. Let it listen on 127.0.0.1 (reached from elsewhere "
        f"by ssh -L), choose a token=, or, in a network that you trust, say insecure=True"
    )


def _is_here(host: str) -> bool:
    return is_local(f"tcp://[{host}]" if ":" in host else f"tcp://{host}")


def _reachable(host: str) -> str:
    """Return the name under which this machine can be reached where it listens everywhere."""
    if host == "0.0.0.0":
        return socket.gethostname()
    return socket.gethostname() if host == "::" else host


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _at_exit() -> None:
    for server in list(_servers):
        server.close()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server._after_fork()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
