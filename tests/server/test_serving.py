"""A running server: its thread, its socket, and what strangers send to it."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PATIENCE_S, in_time, until

import cellimg_dask as ci
from cellimg_dask.loading.crew import get_crew
from cellimg_dask.server import listening
from cellimg_dask.server.layers import Layer
from cellimg_dask.server.serving import serve

pytest.importorskip("uvicorn")


def exchange(server: Any, data: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    parts = []
    # A server that closes while more is on its way may take back what it has said.
    with (
        socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as stream,
        contextlib.suppress(ConnectionError),
    ):
        stream.sendall(data)
        while part := stream.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


def raw_get(server: Any, target: str, headers: str = "") -> bytes:
    return exchange(
        server, f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n".encode()
    )


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# ------------------------------------------------------------------- begin and end


def test_a_server_begins_and_ends_with_its_thread_and_socket(numbers, footprint, get):
    with serve({"it": numbers}) as first:
        assert get(first, "it/0/c/0/0").status == 200
        url = first.url
    before = footprint()
    with serve({"it": numbers}) as server:
        assert server.port > 0
        assert server.token != first.token
        assert len(server.token) >= 20
        assert server.url == f"http://127.0.0.1:{server.port}/{server.token}"
        assert not server.closed
        assert server.url in repr(server)
        assert "it" in repr(server)
        with urllib.request.urlopen(f"{server.url}/it/0/c/0/1", timeout=60) as reply:
            assert reply.read() == numbers[:2, 2:4].tobytes()
    assert server.closed
    server.close()
    assert "closed" in repr(server)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((server.host, server.port)).close()
    assert url not in repr(server)
    until(lambda: footprint()["descriptors"] <= before["descriptors"])
    assert footprint()["threads"] == before["threads"]


def test_a_port_that_is_taken_is_said_at_once(serving, numbers):
    first = serving({"it": numbers})
    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{first.port}: .*port=0 finds a free one"):
        serving({"it": numbers}, port=first.port)
    with serve({"it": numbers}) as second:
        port = second.port
    # Connections that are over do not keep it.
    assert serving({"it": numbers}, port=port).port == port


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"host": "0.0.0.0"}, PermissionError, "0.0.0.0 can be reached by other machines"),
        ({"host": "0.0.0.0", "token": None}, PermissionError, "insecure=True"),
        ({"host": "::"}, PermissionError, "other machines"),
        ({"host": "example.org"}, PermissionError, "other machines"),
        ({"host": ""}, TypeError, "host"),
        ({"host": "no.such.host.invalid", "token": "a"}, OSError, "no address"),
        ({"port": -1}, ValueError, "port"),
        ({"port": 65536}, ValueError, "port"),
        ({"port": "80"}, TypeError, "port"),
        ({"token": "a/b"}, ValueError, "token"),
        ({"compression": "lz4"}, ValueError, "compression"),
        ({"max_requests": 0}, ValueError, "max_requests"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_listens(numbers, more, error, match):
    threads = threading.active_count()
    with pytest.raises(error, match=match):
        serve({"it": numbers}, **more)
    assert threading.active_count() == threads


@pytest.mark.parametrize("more", [{"token": "chosen"}, {"token": None, "insecure": True}])
def test_other_machines_may_read_if_that_is_said(serving, numbers, more):
    server = serving({"it": numbers}, host="0.0.0.0", **more)
    path = f"/{server.token}/zarr.json" if server.token else "/zarr.json"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    assert connection.getresponse().status == 200
    connection.close()
    assert "0.0.0.0" not in server.url


def test_without_a_token_everybody_on_this_machine_may_read(serving, numbers):
    server = serving({"it": numbers}, token=None)
    assert server.url == f"http://127.0.0.1:{server.port}"
    with urllib.request.urlopen(f"{server.url}/it/zarr.json", timeout=60) as reply:
        assert reply.status == 200


def test_without_a_token_no_web_page_may_read(serving, numbers):
    server = serving({"it": numbers}, token=None)

    def ask(host, more=""):
        ask = f"GET /it/0/c/0/0 HTTP/1.1\r\nconnection: close\r\n{host}{more}\r\n"
        return exchange(server, ask.encode())

    # Not by a name that somebody else has given to this address,
    for host in ("host: evil.example\r\n", "", "host: localhost\r\nhost: evil.example\r\n"):
        assert status_of(ask(host)) == 421
    for host in ("localhost", "LocalHost:8080", f"127.0.0.1:{server.port}", "[::1]:80"):
        reply = ask(f"host: {host}\r\n", "origin: http://evil.example\r\n")
        assert status_of(reply) == 200
        # nor by this one, unless it is allowed.
        assert b"access-control" not in reply.lower()
    allowed = serving({"it": numbers}, token=None, allow_origin="http://localhost:8080")
    assert b"origin: http://localhost:8080" in exchange(
        allowed, b"GET /zarr.json HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )
    with_token = serving({"it": numbers})
    assert b"access-control-allow-origin: *" in raw_get(
        with_token, f"/{with_token.token}/zarr.json"
    )


def test_a_notebook_shows_a_link_and_escapes_names(serving, numbers):
    server = serving({"<b>": numbers})
    shown = server._repr_html_()
    assert f'href="{server.url}/"' in shown
    assert "<b>" not in shown
    server.close()
    assert "href" not in server._repr_html_()


def test_layers_can_be_changed_while_it_runs(serving, numbers, get):
    server = serving({})
    server.layers["it"] = numbers
    assert get(server, "it/0/c/2/3").status == 200
    del server.layers["it"]
    assert get(server, "it/0/c/2/3").status == 404


def test_logging_and_signals_stay_as_they_are_and_requests_are_not_logged(serving, caplog, get):
    import logging
    import signal

    # What importing uvicorn does is its own affair.
    import uvicorn.config  # noqa: F401

    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.access", "")]
        return [
            *((each.level, list(each.handlers), each.propagate) for each in loggers),
            *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)),
        ]

    with caplog.at_level(logging.INFO):
        before = state()
        server = serving({"it": np.ones(3)})
        assert get(server, "it/0/c/0").status == 200
        assert state() == before
        server.close()
        assert state() == before
    assert server.token not in caplog.text


PROGRAM = """
import os, sys, threading, time, urllib.error, urllib.request
import numpy as np
import cellimg_dask as ci
from cellimg_dask.server.serving import serve

began = threading.Event()
def f(a):
    began.set()
    while not server.closed:
        time.sleep(0.005)
    return a
server = serve({"it": np.ones(3, "u1"), "hangs": ci.map_cells(f, np.ones(3), dtype=float)})
child = os.fork()
if child == 0:
    ended = server.closed
    server.close()
    os._exit(0 if ended else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert urllib.request.urlopen(server.url + "/it/0/c/0", timeout=30).read() == bytes([1] * 3)
def ask():
    try:
        urllib.request.urlopen(server.url + "/hangs/0/c/0", timeout=30)
    except urllib.error.HTTPError as error:
        assert error.code == 503
asked = threading.Thread(target=ask, daemon=True)
asked.start()
assert began.wait(30)
if sys.argv[1:] == ["close"]:
    server.close()
    asked.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("how", [["close"], []], ids=["closed", "left open"])
def test_a_server_lives_through_a_fork_and_ends_with_the_interpreter(how):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, *how],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_ends_requests_that_wait(serving):
    goes_on = threading.Event()

    def f(a):
        goes_on.wait(PATIENCE_S)
        return a

    server = serving({"it": ci.map_cells(f, np.ones(4), dtype=float, cell_shape=1)})
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(raw_get, server, f"/{server.token}/it/0/c/{index}") for index in range(4)
        ]
        until(lambda: len(server.app.waiting.tasks) == 4)
        in_time(server.close)
        assert [status_of(each.result(PATIENCE_S)) for each in asked] == [503] * 4
    goes_on.set()


def test_closing_does_not_wait_for_readers_that_do_not_read(serving, monkeypatch):
    monkeypatch.setattr(listening, "_GRACE_S", 0.05)
    image = ci.map_cells(np.copy, np.ones(1 << 24, "u1"), dtype="u1", cell_shape=1 << 24)
    server = serving({"it": image})
    with socket.create_connection((server.host, server.port)) as stream:
        request = f"GET /{server.token}/it/0/c/0 HTTP/1.1\r\nhost: x\r\n\r\n"
        stream.sendall(request.encode() * 3)
        until(lambda: server.app.work.num_chunks)
        in_time(server.close)


# ------------------------------------------------------------------- many, and strangers


def test_thirty_two_readers_of_one_cold_cell_have_it_computed_once(serving):
    calls = []
    all_ask = threading.Barrier(32)

    def f(a):
        calls.append(1)
        return a + 1

    server = serving({"it": ci.map_cells(f, np.ones((64, 64)), dtype=float)})

    def read() -> bytes:
        all_ask.wait(PATIENCE_S)
        with urllib.request.urlopen(f"{server.url}/it/0/c/0/0", timeout=60) as reply:
            return reply.read()

    with ThreadPoolExecutor(32) as pool:
        bodies = {each.result() for each in [pool.submit(read) for _ in range(32)]}
    assert bodies == {np.full((64, 64), 2.0).tobytes()}
    assert len(calls) == 1


def test_a_thousand_requests_cancelled_half_way_leave_nothing(serving, get):
    goes_on = threading.Event()
    computed: list[int] = []

    def f(block):
        computed.append(block.index)
        goes_on.wait(PATIENCE_S)
        block.data[...] = 1

    image = ci.fill_cells(f, ci.CellGrid((1001,), 1), dtype="u1")
    server = serving({"it": image})
    assert get(server, "it/zarr.json").status == 200
    before, threads = descriptors(), threading.active_count()
    num_threads = get_crew().num_threads
    for part in range(5):
        streams = []
        for index in range(200 * part, 200 * part + 200):
            stream = socket.create_connection((server.host, server.port))
            stream.sendall(
                f"GET /{server.token}/it/0/c/{index} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
            )
            streams.append(stream)
        until(lambda: len(server.app.waiting.tasks) == 200)
        for stream in streams:
            stream.close()
        until(lambda: not server.app.waiting.tasks)
    assert server.app.work.num_cancelled == 1000
    goes_on.set()
    assert get(server, "it/0/c/1000").body == bytes([1])
    # Those that had begun, at most one per thread each time, and this one.
    assert len(computed) <= num_threads + 1
    assert not server.app.work._asked
    until(lambda: descriptors() <= before)
    assert threading.active_count() <= threads + num_threads
    assert image.stats().errors == 0


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/{token}/../{token}/it/zarr.json",
        "/{token}/%2e%2e/{token}/it/zarr.json",
        "/{token}/it/..%2f..%2f..%2fetc/passwd",
        "/{token}/it%2fzarr.json/",
        "//{token}/it/zarr.json",
        "/{token}/it/0/c/%00/0",
        "/{token}/it/0/c/0%2f%2f0",
        "/{token}/%ff%fe/zarr.json",
        "/wrong/it/zarr.json",
        "/{token}x/it/zarr.json",
    ],
)
def test_addresses_of_strangers_are_not_found(serving, numbers, path):
    server = serving({"it": numbers})
    reply = raw_get(server, path.replace("{token}", server.token))
    assert status_of(reply) == 404
    assert reply.endswith(b"not found\n")
    assert numbers.stats().loads == 0


HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"a: " + b"b" * 200_000, 431),
        (HEAD + b"".join(b"h%d: %s\r\n" % (n, b"v" * 500) for n in range(400)), 431),
        (b"GET /" + b"a" * 200_000, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01" * 20, 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET /a b c HTTP/1.1\r\n\r\n", 400),
        (HEAD + b"content-length: -5\r\n\r\n", 400),
        (HEAD + b"x: a\x00b\r\n\r\n", 400),
    ],
    ids=range(8),
)
def test_what_is_no_request_is_refused_and_the_connection_closed(serving, get, data, status):
    server = serving({"it": np.ones(3, "u1")})
    reply = exchange(server, data)
    assert not reply or status_of(reply) == status
    assert get(server, "it/0/c/0").status == 200


def test_small_answers_are_sent_at_once(serving, get):
    server = serving({"it": np.ones(3, "u1")})
    assert get(server, "it/zarr.json").status == 200
    (connection,) = server._listening._server.server_state.connections
    stream = connection.transport.get_extra_info("socket")
    assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_long_token_and_a_large_body_do_no_harm(serving, get):
    server = serving({"it": np.ones(3, "u1")})
    assert status_of(raw_get(server, "/" + "a" * 40_000)) == 404
    post = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 300000\r\n\r\n"
    reply = exchange(server, post + b"b" * 300_000)
    assert not reply or status_of(reply) == 405
    assert get(server, "it/0/c/0").status == 200


def test_requests_that_come_at_once_on_one_connection_are_answered_in_order(serving, numbers):
    server = serving({"it": numbers})
    paths = ["it/0/c/0/0", "it/0/c/9/9", "it/0/c/0/1", "it/zarr.json"]
    data = "".join(f"GET /{server.token}/{path} HTTP/1.1\r\nhost: x\r\n\r\n" for path in paths)
    last = f"GET /{server.token}/it/0/c/1/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    replies = exchange(server, (data + last).encode()).split(b"HTTP/1.1 ")[1:]
    assert [int(reply[:3]) for reply in replies] == [200, 404, 200, 200, 200]
    assert replies[-1].endswith(numbers[2:4, 2:4].tobytes())


def test_many_requests_may_come_at_once(serving, numbers):
    server = serving({"it": numbers})
    ask = f"GET /{server.token}/it/0/c/0/0 HTTP/1.1\r\nhost: x\r\nx: {'y' * 500}\r\n"
    data = (ask + "\r\n") * 1000 + ask + "connection: close\r\n\r\n"
    assert exchange(server, data.encode()).count(b"HTTP/1.1 200 OK") == 1001


@pytest.mark.parametrize("plain", [False, True])
def test_who_does_not_say_what_it_wants_is_not_waited_for(serving, get, monkeypatch, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    monkeypatch.setattr(listening, "_HEAD_S", 0.3)
    goes_on = threading.Event()

    def f(block):
        goes_on.wait(PATIENCE_S)
        block.data[...] = 1

    server = serving({"slow": ci.fill_cells(f, ci.CellGrid((2,), 1), dtype="u1")})
    ask = f"GET /{server.token}/slow/0/c/0 HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    with socket.create_connection((server.host, server.port), timeout=PATIENCE_S) as slow:
        # A reader that waits for its cell is not meant, also where it has begun to ask for more.
        slow.sendall(ask + b"GET /")
        for data in (b"", b"GET / HTTP/1.1\r\nhost: x\r\n"):
            reply = exchange(server, data)
            assert reply == b"" or status_of(reply) == 408
        goes_on.set()
        assert status_of(slow.recv(1 << 16)) == 200
    assert get(server, "slow/0/c/0").status == 200


@pytest.mark.parametrize("plain", [False, True])
def test_strangers_cannot_take_all_descriptors(serving, get, monkeypatch, plain):
    if plain:
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    monkeypatch.setattr(listening, "most_connections", lambda: 5)
    server = serving({"it": np.ones(3, "u1")})
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.create_connection((server.host, server.port)))
        until(lambda: len(server._listening._server.server_state.connections) == 5)
        for _ in range(20):
            reply = exchange(server, b"")
            assert reply == b"" or status_of(reply) == 503
    until(lambda: not server._listening._server.server_state.connections)
    assert get(server, "it/0/c/0").status == 200


def test_that_nobody_can_be_accepted_is_not_told_again_and_again(caplog):
    told = []

    class Loop:
        default_exception_handler = told.append

    for message in (
        "socket.accept() out of system resource",
        "Exception in callback BaseSelectorEventLoop._start_serving(<function Server>)",
    ):
        listening._note(Loop, {"message": message})
    assert not told
    assert not caplog.records
    listening._note(Loop, {"message": "something else"})
    assert told == [{"message": "something else"}]
    assert listening.most_connections() >= 16


def test_silent_connections_are_asked_whether_they_are_there(serving, get):
    server = serving({"it": np.ones(3, "u1")})
    assert get(server, "it/0/c/0").status == 200
    (connection,) = server._listening._server.server_state.connections
    stream = connection.transport.get_extra_info("socket")
    assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_strangers_cannot_fill_the_screen(serving, get, capfd, caplog):
    server = serving({"it": np.ones(3, "u1")})
    exchange(server, b"\x00\x01junk\r\n\r\n")
    raw_get(server, "/", "upgrade: websocket\r\nconnection: upgrade\r\n")
    assert get(server, "it/0/c/0").status == 200
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert capfd.readouterr() == ("", "")


def test_it_answers_without_httptools_as_well(serving, numbers, get, monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("httptools", "uvicorn.protocols.http.httptools")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httptools", None)
    server = serving({"it": Layer(numbers), "bad": np.zeros(3)})
    assert get(server, "it/0/c/0/1").body == numbers[:2, 2:4].tobytes()
    assert get(server, "it/0/c/0/1", range="bytes=1-2").status == 206
    assert get(server, "bad/0/c/0").status == 404
    reply = exchange(server, HEAD + b"a: " + b"b" * 200_000)
    assert not reply or status_of(reply) == 400
