"""The page that shows a view: neuroglancer's own, with a script of ours, and what they exchange.

This module imports neuroglancer and tornado; it is imported where a view is made.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.resources
import json
import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import neuroglancer
import tornado.ioloop
import tornado.web
from neuroglancer import viewer_base
from neuroglancer.server import Server as NeuroglancerServer

from cellimg_dask.server.listening import most_connections

__all__ = ["Frame", "FrameViewer"]

_logger = logging.getLogger("cellimg_dask")

_SCRIPT = "@cellimg.js"
_STRANGERS_BYTES = 1 << 16
_ONCE_S = 60
_REST_S = 1.0


class Frame(NeuroglancerServer):  # type: ignore[misc]
    """The server of one view's page.

    neuroglancer has one server for a whole process, which is not stopped with a view, and whose
    page is the same for everybody. So each view has a server of its own.

    Notes
    -----
    Thread-safe. Messages of the page are answered one after the other, on a thread of their own.
    """

    def __init__(
        self, token: str, host: str, port: int, answer: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.answer = answer
        """Called with each message of the page; returns what the page gets as JSON."""
        self.find_mesh: Callable[[str], bytes | None] = lambda path: None
        """Returns what is at an address of meshes."""
        self.facts: dict[str, Any] = {}
        """What pages know: sent to each when it is opened, and again when it changes."""
        self._soon: dict[str, Any] = {}
        self._once: set[str] = set()
        self._pages: set[asyncio.Event] = set()
        self._answering = ThreadPoolExecutor(1, "cellimg-page")
        self._meshing = ThreadPoolExecutor(1, "cellimg-mesh")
        if port:
            _check_free(host, port)
        super().__init__(bind_address=host, bind_port=port, token=token)

    def _attempt_to_start_server(self) -> None:
        super()._attempt_to_start_server()
        here = f"/v/{self.token}/"
        self.app.add_handlers(
            ".*",
            [
                (here, _Html, {"frame": self}),
                (here + _SCRIPT, _Script),
                (here + "@message", _Message, {"frame": self}),
                (here + "@facts", _Facts, {"frame": self}),
                (here + "mesh/(.*)", _Mesh, {"frame": self}),
                ("/once/(.*)", _Once, {"frame": self}),
            ],
        )
        find = self.app.find_handler

        def found(request: Any, **more: Any) -> Any:
            # Pictures are large; what strangers send is not kept until they are told to go away.
            if self.token not in request.path:
                request.connection.set_max_body_size(_STRANGERS_BYTES)
            return find(request, **more)

        self.app.find_handler = found
        self._io_loop = tornado.ioloop.IOLoop.current()
        self.loop.set_exception_handler(self._on_error)
        most, handle = most_connections(), self.http_server.handle_stream

        def handled(stream: Any, address: Any) -> None:
            if len(self.http_server._connections) < most:
                handle(stream, address)
            else:
                stream.close()

        self.http_server.handle_stream = handled
        _frames.add(self)
        if ":" in self._bind_address and self._bind_address != "::":
            self.server_url = f"http://[{self._bind_address}]:{self.port}"

    def address_for_once(self) -> str:
        """Return an address of the page that can be used once, and soon.

        For command lines, which all users of a machine can read.
        """
        nonce = secrets.token_urlsafe(16)
        self._once.add(nonce)
        self.loop.call_soon_threadsafe(
            lambda: self.loop.call_later(_ONCE_S, self._once.discard, nonce)
        )
        return f"{self.server_url}/once/{nonce}"

    def used(self, nonce: str) -> bool:
        """Whether there was such an address; there is no more."""
        known = nonce in self._once
        self._once.discard(nonce)
        return known

    @property
    def num_open(self) -> int:
        """How many pages are open."""
        return len(self._pages)

    def tell(self, **facts: Any) -> None:
        """Tell all pages of a change; changes that follow one another quickly are told as one."""
        self.facts = {**self.facts, **facts}
        self.loop.call_soon_threadsafe(self._wake)

    def soon(self, name: str, call: Callable[[], object]) -> None:
        """Call something in a second, once for all that is asked for under a name until then."""

        def begin() -> None:
            if name not in self._soon:
                self._soon[name] = self.loop.call_later(1.0, run)

        def run() -> None:
            del self._soon[name]
            call()

        self.loop.call_soon_threadsafe(begin)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Rest for a moment where nobody can be accepted; tell other errors."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            _logger.debug("no connection can be accepted: %s", error)
            self._listen(0)
            loop.call_later(_REST_S, self._listen, tornado.ioloop.IOLoop.READ)
        else:
            loop.default_exception_handler(context)

    def _listen(self, events: int) -> None:
        if not self._stop_requested:
            for descriptor in self.http_server._sockets:
                self._io_loop.update_handler(descriptor, events)

    def after_fork(self) -> None:
        """Let go of the sockets in a process that has no such thread."""
        for listener in self.http_server._sockets.values():
            listener.close()

    def _wake(self) -> None:
        for event in self._pages:
            event.set()

    def stop(self) -> None:
        """End the server and its threads."""
        # Somebody who was told of something may end it; no thread waits for itself.
        this = threading.current_thread()
        if this is self._thread:
            self.request_stop()
        else:
            super().stop()
        for threads in (self._answering, self._meshing):
            threads.shutdown(wait=this not in threads._threads, cancel_futures=True)
        self.executor.shutdown(wait=False)


class FrameViewer(neuroglancer.Viewer):  # type: ignore[misc]
    """neuroglancer's viewer, on the server of its own page."""

    def __init__(self, frame: Frame) -> None:
        # Not the constructor of Viewer, which would start the server of the process.
        viewer_base.ViewerBase.__init__(self, token=frame.token)
        self._frame = frame
        frame.viewers[self.token] = self

    def get_viewer_url(self) -> str:
        """Return where the page is."""
        return f"{self._frame.server_url}/v/{self.token}/"

    def defer_callback(self, callback: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call something on the server's thread."""
        self._frame.loop.call_soon_threadsafe(lambda: callback(*args, **kwargs))


class _Html(tornado.web.RequestHandler):
    """The page itself."""

    def initialize(self, frame: Frame) -> None:
        self.frame = frame

    def get(self) -> None:
        from neuroglancer.static import get_default_static_content_source

        html, _ = get_default_static_content_source().get("", "")
        # What is the case before anything is fetched, so that no later change is missed.
        facts = json.dumps(self.frame.facts).replace("<", "\\u003c")
        script = (
            f"<script>window.cellimgFacts = {facts};</script>"
            f'<script defer src="{_SCRIPT}"></script></head>'
        ).encode()
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        # The address holds the token.
        self.set_header("Referrer-Policy", "no-referrer")
        self.finish(html.replace(b"</head>", script, 1))


class _Once(tornado.web.RequestHandler):
    """Where a browser goes that was started with an address for once."""

    def initialize(self, frame: Frame) -> None:
        self.frame = frame

    def get(self, nonce: str) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("Referrer-Policy", "no-referrer")
        if self.frame.used(nonce):
            self.redirect(f"/v/{self.frame.token}/")
        else:
            self.send_error(404)


class _Script(tornado.web.RequestHandler):
    """The script that paints, and that has the page fetch again what has changed."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/javascript; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(importlib.resources.files(__package__).joinpath("frame.js").read_bytes())


class _Message(tornado.web.RequestHandler):
    """What the page says."""

    def initialize(self, frame: Frame) -> None:
        self.frame = frame

    async def post(self) -> None:
        try:
            message = json.loads(self.request.body)
            if not isinstance(message, dict):
                raise ValueError("a message is an object")
            loop = asyncio.get_running_loop()
            reply = await loop.run_in_executor(self.frame._answering, self.frame.answer, message)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            self.set_status(400)
            self.finish({"error": str(error)})
        except Exception as error:
            _logger.exception("a message of the viewer's page could not be answered")
            self.set_status(500)
            self.finish({"error": str(error)})
        else:
            self.finish({} if reply is None else reply)


class _Mesh(tornado.web.RequestHandler):
    """Surfaces of labels."""

    def initialize(self, frame: Frame) -> None:
        self.frame = frame

    async def get(self, path: str) -> None:
        loop = asyncio.get_running_loop()
        # First what the page has said before.
        await loop.run_in_executor(self.frame._answering, lambda: None)
        try:
            found = await loop.run_in_executor(self.frame._meshing, self.frame.find_mesh, path)
        except Exception as error:
            _logger.warning("a surface could not be made: %s", error)
            self.set_status(500)
            self.finish(f"{error}\n")
            return
        if found is None:
            self.set_status(404)
            self.finish("not found\n")
            return
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Cache-Control", "no-store")
        self.finish(found)


class _Facts(tornado.web.RequestHandler):
    """What the page is told, as server-sent events."""

    def initialize(self, frame: Frame) -> None:
        self.frame = frame
        self.news = asyncio.Event()
        self.closed = False

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        self.news.set()
        self.frame._pages.add(self.news)
        told = None
        try:
            while True:
                await self.news.wait()
                self.news.clear()
                if self.closed:
                    return
                facts = self.frame.facts
                if facts is told:
                    # It was told with the change before.
                    continue
                told = facts
                self.write(f"data: {json.dumps(facts)}\n\n")
                await self.flush()
        except tornado.iostream.StreamClosedError:
            return
        finally:
            self.frame._pages.discard(self.news)

    def on_connection_close(self) -> None:
        self.closed = True
        self.news.set()


_frames: weakref.WeakSet[Frame] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for frame in list(_frames):
        frame.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _check_free(host: str, port: int) -> None:
    """Raise if a port is taken; tornado would leave a socket behind."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
