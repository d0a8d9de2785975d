"""Running an ASGI app with uvicorn, on a thread, without touching anything else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Listening", "listen", "most_connections"]

_MAX_HEAD_BYTES = 64 << 10
_KEEP_ALIVE_S = 60
_HEAD_S = 60
"""Whoever has not said by then what it wants, is not waited for."""
_BACKLOG = 2048
_ACCEPTED_AT_ONCE = 32
_DEAD_S = 60, 15, 4
"""When a silent connection is first asked whether it is still there, how often, and how often in
vain."""
_GRACE_S = 2


class Listening:
    """A socket, and the thread that answers on it."""

    def __init__(self, listener: socket.socket, server: Any) -> None:
        self._listener = listener
        self._server = server
        self.port: int = listener.getsockname()[1]
        """Of the socket."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cellimg-server", daemon=True)

    def start(self) -> None:
        """Return when requests are answered."""
        self._thread.start()
        self._begun.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; what is left of requests is given a moment."""
        loop = self._loop
        if loop is not None:
            # It may have ended by itself.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._server.end)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._listener.close()

    def after_fork(self) -> None:
        """Let go of the socket in a process that has no such thread."""
        self._listener.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._begun.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_note)
        self._server.when_started = self._begun.set
        await self._server.serve(sockets=[self._listener])


def listen(app: Any, host: str, port: int) -> Listening:
    """Answer requests with an app, on a thread of its own.

    Raises
    ------
    OSError
        If the address cannot be had.
    """
    server = _server_of(app)
    listener = _bound(host, port)
    listening = Listening(listener, server)
    try:
        listening.start()
    except BaseException:
        listener.close()
        raise
    return listening


def _bound(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise OSError(f"there is no address {host!r}: {error}") from error
    family, _, protocol, _, address = found[0]
    # With the protocol said asyncio knows that it is TCP, and sends small answers at once.
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        # A port in which only connections that are over linger can be had again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Readers that vanished without a word do not stay for ever; connections inherit this.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in zip(("KEEPIDLE", "KEEPINTVL", "KEEPCNT"), _DEAD_S, strict=True):
            if hasattr(socket, f"TCP_{option}"):
                number = getattr(socket, f"TCP_{option}")
                listener.setsockopt(socket.IPPROTO_TCP, number, value)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno,
            f"cannot listen at {host}:{port}: {error.strerror}; port=0 finds a free one",
        ) from error
    return listener


def _server_of(app: Any) -> Any:
    """Return a uvicorn server that installs no signal handlers and sets up no logging."""
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serving needs uvicorn: pip install 'cellimg-dask[view]'") from error

    class Config(uvicorn.Config):  # type: ignore[misc]
        def configure_logging(self) -> None:
            """Leave logging as it is."""

    class Server(uvicorn.Server):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.ending = asyncio.Event()
            self.when_started: Any = None

        def end(self) -> None:
            """Have it end soon."""
            self.should_exit = True
            self.ending.set()

        async def main_loop(self) -> None:
            """Keep the date of responses right, until the end."""
            for server in self.servers:
                for listener in server.sockets:
                    # asyncio has set it to what it accepts at once.
                    listener._sock.listen(_BACKLOG)
            self.when_started()
            while not await self.on_tick(0):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.ending.wait(), 1)

        async def shutdown(self, sockets: Any = None) -> None:
            """Let what is being sent be read for a moment, and end all connections."""
            for listener in self.servers:
                listener.close()
            state = self.server_state
            for connection in list(state.connections):
                connection.shutdown()
            await _until(lambda: not (state.connections or state.tasks), _GRACE_S)
            for connection in list(state.connections):
                connection.transport.abort()
            await _until(lambda: not (state.connections or state.tasks), _GRACE_S)

    config = Config(
        app,
        http=_protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # asyncio takes so many before it looks at any of them, or at how many there are.
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    return Server(config)


def most_connections() -> int:
    """Return how many connections a server takes: others need descriptors as well."""
    try:
        import resource
    except ImportError:
        return 1000
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if limit == resource.RLIM_INFINITY else max(16, limit // 3)


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Take note of an error in a loop, but not again and again that nobody can be accepted."""
    text = f"{context.get('message')}"
    if "accept() out of system resource" in text or "._start_serving" in text:
        logging.getLogger("cellimg_dask").debug("no connection can be accepted: %s", text)
    else:
        loop.default_exception_handler(context)


class _Quiet(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Does not warn of what strangers send: anybody could fill the user's screen with it."""

    @property
    def level(self) -> int:
        """Of the logger."""
        return int(self.logger.level)

    def warning(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Note it for who looks for it."""
        self.debug(msg, *args, **kwargs)


class _Discreet:
    """A protocol of uvicorn that writes down neither addresses nor what strangers send."""

    logger: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The address holds the token.
        self.access_log = False
        self.logger = _Quiet(self.logger)


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition() and loop.time() < deadline:
        await asyncio.sleep(0.005)


def _protocol() -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, with bounds on heads and connections and no log of requests."""
    most = most_connections()
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        # It has such a bound of its own.
        from uvicorn.protocols.http.h11_impl import H11Protocol

        class PlainProtocol(_Discreet, H11Protocol):  # type: ignore[misc]
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                if len(self.connections) > most:
                    transport.close()
                self.loop.call_later(_HEAD_S, self._too_late)

            def _too_late(self) -> None:
                if self.cycle is None:
                    self.transport.close()

        plain: type[asyncio.Protocol] = PlainProtocol
        return plain

    class Protocol(_Discreet, HttpToolsProtocol):  # type: ignore[misc]
        _in_head = False
        _head_bytes = 0
        _num_begun = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                self._refuse(b"503 Service Unavailable")
            else:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._in_head, self._head_bytes = True, 0
            self._num_begun += 1
            self._expect_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._forget_head()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._num_begun = 0
            super().data_received(data)
            # Where requests came at once, these bytes were not all of the last one.
            if self._in_head and self._num_begun < 2 and not self.transport.is_closing():
                self._head_bytes += len(data)
                if self._head_bytes > _MAX_HEAD_BYTES:
                    self._refuse(b"431 Request Header Fields Too Large")

        def _expect_head(self) -> None:
            self._forget_head()
            self._timer = self.loop.call_later(_HEAD_S, self._too_late)

        def _forget_head(self) -> None:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()

        def _too_late(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                # What was asked before is still being answered.
                self._expect_head()
            elif self._in_head:
                self._refuse(b"408 Request Timeout")
            else:
                self.transport.close()

        def _refuse(self, status: bytes) -> None:
            head = b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head % status)
            self.transport.close()

    protocol: type[asyncio.Protocol] = Protocol
    return protocol
