"""Running an ASGI app with uvicorn, on a thread, without touching anything else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Listening", "listen"]

_MAX_HEAD_BYTES = 64 << 10
_KEEP_ALIVE_S = 60
_GRACE_S = 2
_START_S = 30


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
        listener.bind(address)
        listener.listen(2048)
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
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    return Server(config)


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition() and loop.time() < deadline:
        await asyncio.sleep(0.005)


def _protocol() -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, with a bound on heads and no log of requests."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        # It has such a bound of its own.
        from uvicorn.protocols.http.h11_impl import H11Protocol

        class PlainProtocol(H11Protocol):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.access_log = False

        plain: type[asyncio.Protocol] = PlainProtocol
        return plain

    class Protocol(HttpToolsProtocol):  # type: ignore[misc]
        _in_head = True
        _head_bytes = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # The address holds the token.
            self.access_log = False

        def on_message_begin(self) -> None:
            self._in_head, self._head_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self._in_head and not self.transport.is_closing():
                self._head_bytes += len(data)
                if self._head_bytes > _MAX_HEAD_BYTES:
                    self.transport.write(
                        b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                        b"connection: close\r\ncontent-length: 0\r\n\r\n"
                    )
                    self.transport.close()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_head, self._head_bytes = True, 0

    protocol: type[asyncio.Protocol] = Protocol
    return protocol
