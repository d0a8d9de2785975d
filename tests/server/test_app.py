"""What the ASGI app answers, and what it computes for that."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
import zlib

import numpy as np
import pytest
from support import PATIENCE_S

import cellimg_dask as ci
from cellimg_dask.loading.crew import get_crew
from cellimg_dask.server import versions as versions_module
from cellimg_dask.server import waiting as waiting_module
from cellimg_dask.server.gate import Gate
from cellimg_dask.server.layers import Layer
from cellimg_dask.server.serving import asgi_app
from cellimg_dask.server.versions import CellVersions


def counted(shape=(6, 6), cells=2, **more):
    calls: list[tuple[int, ...]] = []

    def f(block):
        calls.append(block.position)
        block.data[...] = block.index + 1

    return ci.fill_cells(f, ci.CellGrid(shape, cells), dtype="u1", **more), calls


@pytest.fixture
def threads_hang():
    """Let blocks hang until the end of the test: ``threads_hang.wait()`` in a block."""
    event = threading.Event()
    yield event
    event.set()


# ------------------------------------------------------------------- what is computed


def test_a_chunk_computes_its_cell_and_no_other(ask):
    image, calls = counted()
    app = asgi_app({"it": image})
    assert ask(app, "/it/0/c/1/2").body == bytes([6] * 4)
    assert calls == [(1, 2)]
    assert ask(app, "/@0.4/it/0/1/2").body == bytes([6] * 4)
    assert ask(app, "/@edition-9/it/0/c/1/2").body == bytes([6] * 4)
    assert calls == [(1, 2)]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/zarr.json",
        "/it/zarr.json",
        "/it/0/zarr.json",
        "/@0.4/.zgroup",
        "/@0.4/.zmetadata",
        "/@0.4/it/.zattrs",
        "/@0.4/it/0/.zarray",
        "/@status",
        "/@status.json",
        "/@work/it/zarr.json",
        "/@work/it/0/zarr.json",
    ],
)
def test_metadata_and_heads_compute_nothing(ask, path):
    image, calls = counted()
    app = asgi_app({"it": image})
    whole = ask(app, path)
    assert whole.status == 200
    head = ask(app, path, "HEAD")
    assert head.status == 200
    assert head.body == b""
    if "status" not in path:
        assert head.headers == whole.headers
    assert not calls


def test_the_head_of_a_chunk_says_how_long_it_is_and_computes_nothing(ask):
    image, calls = counted((5, 5))
    app = asgi_app({"it": image})
    head = ask(app, "/it/0/c/2/2", "HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "4")
    assert ask(app, "/it/0/c/2/3", "HEAD").status == 404
    assert not calls
    whole = ask(app, "/it/0/c/2/2")
    assert whole.headers == head.headers


def test_the_head_of_a_compressed_chunk_leaves_out_what_it_cannot_know(ask):
    image, calls = counted()
    head = ask(asgi_app({"it": image}, compression="gzip"), "/it/0/c/0/0", "HEAD")
    assert head.status == 200
    assert "content-length" not in head.headers
    assert not calls


def test_a_chunk_at_the_edge_is_padded_with_the_fill_value(ask):
    image, _ = counted((5, 3))
    app = asgi_app({"it": Layer(image, fill_value=9)})
    assert ask(app, "/it/0/c/2/1").body == bytes([6, 9, 9, 9])
    assert json.loads(ask(app, "/it/0/zarr.json").body)["fill_value"] == 9


@pytest.mark.parametrize(("dtype", "value", "sent"), [("f4", -0.0, True), ("f4", 0.0, False)])
def test_only_the_very_bytes_of_the_fill_value_are_left_out(ask, dtype, value, sent):
    app = asgi_app({"it": ci.map_cells(np.copy, np.full((3, 3), value, dtype), dtype=dtype)})
    assert ask(app, "/it/0/c/0/0").status == (200 if sent else 404)


@pytest.mark.parametrize("place", [0, 3, 7, 8, 12, 16])
def test_a_single_voxel_that_is_not_fill_is_found(ask, place):
    array = np.zeros(17, "u1")
    array[place] = 1
    app = asgi_app({"it": array})
    assert ask(app, "/it/0/c/0").body == array.tobytes()


def test_thirty_two_that_ask_for_one_cold_cell_have_it_computed_once(ask_in_loop):
    image, calls = counted()
    app = asgi_app({"it": image})

    async def all_at_once():
        return await asyncio.gather(*(ask_in_loop(app, "/it/0/c/0/1") for _ in range(32)))

    replies = asyncio.run(all_at_once())
    assert {reply.body for reply in replies} == {bytes([2] * 4)}
    assert calls == [(0, 1)]


def test_who_asks_last_is_served_first(ask_in_loop, threads_hang):
    began = threading.Event()
    order: list[int] = []

    def f(block):
        if block.index == 0:
            began.set()
            threads_hang.wait(PATIENCE_S)
        else:
            order.append(block.index)
        block.data[...] = 1

    with ci.BlockQueue(1) as queue:
        app = asgi_app({"it": ci.fill_cells(f, ci.CellGrid((8,), 1), dtype="u1", queue=queue)})

        async def ask_in_turn():
            first = asyncio.create_task(ask_in_loop(app, "/it/0/c/0"))
            await asyncio.to_thread(began.wait, PATIENCE_S)
            others = []
            for index in (1, 2, 3, 4):
                others.append(asyncio.create_task(ask_in_loop(app, f"/it/0/c/{index}")))
                # So that it is asked for before the next one.
                while not app.work._asked[app._served["it"].arrays[0], index]:
                    await asyncio.sleep(0)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            threads_hang.set()
            await asyncio.gather(first, *others)

        asyncio.run(ask_in_turn())
    assert order == [4, 3, 2, 1]


def test_a_cell_whose_reader_has_gone_is_not_computed(ask_in_loop, threads_hang):
    began = threading.Event()
    computed: list[int] = []

    def f(block):
        computed.append(block.index)
        began.set()
        threads_hang.wait(PATIENCE_S)
        block.data[...] = 1

    with ci.BlockQueue(1) as queue:
        image = ci.fill_cells(f, ci.CellGrid((50,), 1), dtype="u1", queue=queue)
        app = asgi_app({"it": image})

        async def go_half_way():
            gone = asyncio.Event()
            first = asyncio.create_task(ask_in_loop(app, "/it/0/c/0"))
            await asyncio.to_thread(began.wait, PATIENCE_S)
            others = [
                asyncio.create_task(ask_in_loop(app, f"/it/0/c/{index}", gone=gone))
                for index in range(1, 50)
            ]
            while len(app.waiting.tasks) < 50:
                await asyncio.sleep(0)
            gone.set()
            assert await asyncio.gather(*others) == [None] * 49
            threads_hang.set()
            return await first

        assert asyncio.run(go_half_way()).status == 200
        assert app.work.num_cancelled == 49
        assert not app.work._asked
        # The queue's thread would take those next.
        assert image[0] == 1
    assert computed == [0]


def test_too_many_requests_are_refused(ask_in_loop, threads_hang):
    def f(block):
        threads_hang.wait(PATIENCE_S)
        block.data[...] = 1

    app = asgi_app({"it": ci.fill_cells(f, ci.CellGrid((8,), 1), dtype="u1")}, max_requests=2)

    async def one_too_many():
        first = [asyncio.create_task(ask_in_loop(app, f"/it/0/c/{n}")) for n in (0, 1)]
        while len(app.waiting.tasks) < 2:
            await asyncio.sleep(0)
        third = await ask_in_loop(app, "/it/0/c/2")
        threads_hang.set()
        return third, await asyncio.gather(*first)

    third, first = asyncio.run(one_too_many())
    assert (third.status, third.headers["retry-after"]) == (503, "1")
    assert [reply.status for reply in first] == [200, 200]


def test_closing_ends_requests_and_takes_no_more(ask, ask_in_loop, threads_hang):
    image, _ = counted()
    assert image[0, 0] == 1

    def f(a):
        threads_hang.wait(PATIENCE_S)
        return a

    app = asgi_app({"it": image, "hangs": ci.map_cells(f, np.ones(3), dtype=float)})

    async def close_half_way():
        asked = asyncio.create_task(ask_in_loop(app, "/hangs/0/c/0"))
        while not app.waiting.tasks:
            await asyncio.sleep(0)
        app.close()
        return await asked

    assert asyncio.run(close_half_way()).status == 503
    assert ask(app, "/it/0/c/1/1").status == 503
    # What is there is still told.
    assert ask(app, "/it/0/c/0/0").status == 200


def test_a_closed_app_begins_no_threads(ask):
    image, _ = counted()
    app = asgi_app({"it": image}, compression="gzip")
    whole = ask(app, "/it/0/c/0/1")
    app.close()
    assert ask(app, "/it/0/c/0/1").body == whole.body
    assert app.waiting._pool is None


# ------------------------------------------------------------------- what goes wrong


def test_closing_does_not_wait_for_an_array_that_hangs(ask_in_loop, threads_hang):
    began = threading.Event()

    class Hanging:
        shape, dtype, ndim = (4,), np.dtype("u1"), 1

        def __getitem__(self, key):
            began.set()
            threads_hang.wait(PATIENCE_S)
            return np.ones(4, "u1")[key]

    app = asgi_app({"it": Hanging()})

    async def close_half_way():
        asked = asyncio.create_task(ask_in_loop(app, "/it/0/c/0"))
        await asyncio.to_thread(began.wait, PATIENCE_S)
        app.close()
        return await asked

    assert asyncio.run(close_half_way()).status == 503


def test_a_block_that_raises_is_told_and_tried_again(ask):
    image, _ = counted()
    broken = [True]

    def f(a):
        if broken:
            raise ValueError("no <light>")
        return a + 1

    app = asgi_app({"it": ci.map_cells(f, image, dtype="u1"), "other": image})
    reply = ask(app, "/it/0/c/1/0")
    assert reply.status == 500
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-store"
    text = reply.body.decode()
    for part in ("BlockError", "f at cell (1, 0)", "2:4, 0:2", "ValueError: no <light>"):
        assert part in text
    assert "Traceback" not in text
    assert "File" not in text
    assert ask(app, "/other/0/c/1/0").status == 200
    broken.clear()
    assert ask(app, "/it/0/c/1/0").body == bytes([5] * 4)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError("much")])
def test_a_block_that_ends_its_thread_does_not_end_the_server(ask_in_loop, error):
    def f(a):
        raise error

    app = asgi_app({"bad": ci.map_cells(f, np.ones(3), dtype=float), "good": np.ones(3)})

    async def one_after_the_other():
        bad = await ask_in_loop(app, "/bad/0/c/0")
        return bad, await ask_in_loop(app, "/good/0/c/0")

    bad, good = asyncio.run(one_after_the_other())
    assert bad.status == 500
    assert type(error).__name__.encode() in bad.body
    assert good.status == 200


def test_an_input_that_cannot_be_read_is_told(ask):
    class Broken:
        shape, dtype, ndim = (4,), np.dtype("u1"), 1

        def __getitem__(self, key):
            raise OSError("the disk is gone")

    app = asgi_app({"it": Broken()})
    reply = ask(app, "/it/0/c/0")
    assert reply.status == 500
    assert b"the disk is gone" in reply.body


def test_when_all_threads_hang_what_is_there_is_still_served(ask_in_loop, threads_hang):
    there, _ = counted()
    assert there[0, 0] == 1

    def f(block):
        threads_hang.wait(PATIENCE_S)
        block.data[...] = 1

    threads = get_crew().num_threads
    hanging = ci.fill_cells(f, ci.CellGrid((4 * threads,), 1), dtype="u1")
    source = ci.Source(np.ones(3, "u1"))
    app = asgi_app({"there": there, "hangs": hanging, "raw": source})

    async def ask_around():
        stuck = [asyncio.create_task(ask_in_loop(app, f"/hangs/0/c/{n}")) for n in range(threads)]
        while hanging.loader.num_loading() < threads:
            await asyncio.sleep(0.001)
        # Data that are looked at do not wait for threads that compute either.
        paths = ["/there/0/c/0/0", "/there/zarr.json", "/@status.json", "/raw/0/c/0"]
        replies = [await ask_in_loop(app, path) for path in paths]
        head = await ask_in_loop(app, "/hangs/0/c/1", "HEAD")
        waits = asyncio.create_task(ask_in_loop(app, "/there/0/c/2/2"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waits.done()
        threads_hang.set()
        await asyncio.gather(*stuck)
        return [reply.status for reply in (*replies, head, await waits)]

    assert asyncio.run(ask_around()) == [200] * 6


# ------------------------------------------------------------------- addresses


BAD_PATHS = [
    "",
    "/",
    "/secret/..",
    "/secret/../secret/it/zarr.json",
    "/secret/../../etc/passwd",
    "//secret/it/zarr.json",
    "/secret//it/zarr.json",
    "/secret/it//zarr.json",
    "/secret/it/../it/zarr.json",
    "/secret/it/0/c/../c/0/0",
    "/secret/nothing/zarr.json",
    "/secret/it/1/zarr.json",
    "/secret/it/00/zarr.json",
    "/secret/it/-1/c/0/0",
    "/secret/it/0/c/0",
    "/secret/it/0/c/0/0/0",
    "/secret/it/0/c/00/0",
    "/secret/it/0/c/-1/0",
    "/secret/it/0/c/+1/0",
    "/secret/it/0/c/1.0/0",
    "/secret/it/0/c/３/0",
    "/secret/it/0/c/1_0/0",
    "/secret/it/0/c/3/0",
    "/secret/it/0/c/0/99999999999999999999999",
    "/secret/it/0/c/0/" + "9" * 10_000,
    "/secret/it/0/c//0",
    "/secret/it/0/c/0/0/",
    "/secret/it/0/d/0/0",
    "/secret/it",
    "/secret/it/",
    "/secret/it/0",
    "/secret/@0.4/it/0/c/0/0",
    "/secret/@0.4/it/zarr.json",
    "/secret/@0.3/it/.zattrs",
    "/secret/@work/it/0/c/9/9",
    "/secret/@work/it/0/c/x",
    "/secret/@work/it",
    "/secret/@work/other/zarr.json",
    "/secret/@edition-/it/zarr.json",
    "/secret/@edition-1/@edition-2/it/zarr.json",
    "/secret/@other",
    "/secret/@status.json/x",
    "/secreT/it/zarr.json",
    "/secret2/it/zarr.json",
    "/secre/it/zarr.json",
    "/\udce4/it/zarr.json",
    "/it/zarr.json",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=range(len(BAD_PATHS)))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_does_not_exist_is_not_found_and_nothing_is_said_of_it(ask, path, method):
    image, calls = counted()
    reply = ask(asgi_app({"it": image}, token="secret"), path, method)
    same = ask(asgi_app({"it": image}, token="secret"), "/other", method)
    assert reply == same
    assert reply.status == 404
    assert not calls


def test_the_token_opens_everything_behind_it(ask):
    image, _ = counted()
    app = asgi_app({"it": image}, token="secret")
    for path in ("/secret", "/secret/", "/secret/it/zarr.json", "/secret/it/0/c/0/0"):
        assert ask(app, path).status == 200
    assert ask(app, "/mounted/secret/it/zarr.json", root_path="/mounted").status == 200


@pytest.mark.parametrize("token", ["", "a/b", "ä", ".", "..", "@x", "a b", b"x", 3])
def test_a_token_that_cannot_be_a_part_of_an_address_is_refused(token):
    with pytest.raises((TypeError, ValueError), match="token"):
        asgi_app({"it": np.ones(3)}, token=token)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/secret/it/zarr.json", "/nothing"])
def test_other_methods_are_refused_wherever(ask, method, path):
    reply = ask(asgi_app({"it": np.ones(3)}, token="secret"), path, method)
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_pages_of_other_origins_may_read_and_are_told_so_everywhere(ask):
    app = asgi_app({"it": np.ones(3)}, token="secret")
    replies = [
        ask(app, "/secret/zarr.json"),
        ask(app, "/secret/it/0/c/0"),
        ask(app, "/secret/it/0/c/1"),
        ask(app, "/wrong"),
        ask(app, "/secret/zarr.json", "POST"),
    ]
    for path in ("/secret/it/0/c/0", "/wrong"):
        asked = {
            "origin": "https://example.org",
            "access_control_request_method": "GET",
            "access_control_request_headers": "range,if-none-match",
            "access_control_request_private_network": "true",
        }
        flight = ask(app, path, "OPTIONS", **asked)
        assert flight.status == 204
        assert flight.headers["access-control-allow-headers"] == "range,if-none-match"
        assert flight.headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS"
        assert flight.headers["access-control-allow-private-network"] == "true"
        replies.append(flight)
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == "*"
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert "ETag" in replies[0].headers["access-control-expose-headers"]


def test_origins_can_be_named_or_shut_out(ask):
    one = asgi_app({"it": np.ones(3)}, allow_origin="https://example.org")
    assert ask(one, "/zarr.json").headers["access-control-allow-origin"] == "https://example.org"
    assert ask(one, "/zarr.json").headers["vary"] == "origin"
    none = asgi_app({"it": np.ones(3)}, allow_origin=None)
    for method in ("GET", "OPTIONS"):
        headers = ask(none, "/zarr.json", method, origin="https://example.org").headers
        assert not any(name.startswith("access-control") for name in headers)


def test_a_browser_gets_the_page_and_a_program_the_group(ask):
    app = asgi_app({"it": np.ones(3)}, token="secret")
    page = ask(app, "/a/secret", root_path="/a", accept="text/html,application/xhtml+xml")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert b'const base = "/a/secret";' in page.body
    assert b"http" not in page.body.lower().replace(b"<!doctype html>", b"")
    assert ask(app, "/secret/@status").body.startswith(b"<!doctype html>")
    group = json.loads(ask(app, "/secret/", accept="*/*").body)
    assert group["node_type"] == "group"
    assert set(group["consolidated_metadata"]["metadata"]) == {"it", "it/0"}


def test_layers_come_and_go_while_they_are_served(ask):
    image, _ = counted()
    app = asgi_app({"a": image})
    assert ask(app, "/b/0/c/0").status == 404
    app.layers["b"] = np.full(3, 2, "u1")
    assert ask(app, "/b/0/c/0").body == bytes([2] * 3)
    before = ask(app, "/b/0/c/0").headers["etag"]
    app.layers["b"] = np.full(3, 3, "u1")
    assert ask(app, "/b/0/c/0").body == bytes([3] * 3)
    assert ask(app, "/b/0/c/0", if_none_match=before).status == 200
    assert set(json.loads(ask(app, "/zarr.json").body)["consolidated_metadata"]["metadata"]) == {
        "a",
        "a/0",
        "b",
        "b/0",
    }
    del app.layers["b"]
    assert ask(app, "/b/0/c/0").status == 404
    assert set(app.layers) == {"a"}
    assert "b" not in json.loads(ask(app, "/zarr.json").body)["consolidated_metadata"]["metadata"]


def test_layers_that_are_gone_are_not_held(ask):
    app = asgi_app({})
    gone = []
    for number in range(5):
        for name in ("same", f"other {number}"):
            image, _ = counted()
            gone.append(weakref.ref(image))
            app.layers[name] = image
            assert ask(app, f"/{name}/0/c/0/0").status == 200
        del app.layers[name], image
    app.layers.clear()
    assert ask(app, "/zarr.json").status == 200
    gc.collect()
    assert all(each() is None for each in gone)
    assert len(gone) == 10


def test_an_app_can_be_mounted_in_another(numbers):
    pytest.importorskip("starlette")
    pytest.importorskip("httpx")
    import httpx
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.routing import Mount

    inner = asgi_app({"it": numbers})
    outer = Starlette(
        routes=[Mount("/images", inner)], middleware=[Middleware(GZipMiddleware, minimum_size=1)]
    )

    async def read():
        transport = httpx.ASGITransport(app=outer)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            chunk = await client.get("/images/it/0/c/0/1")
            page = await client.get("/images/", headers={"accept": "text/html"})
            return chunk, page, await client.get("/it/zarr.json")

    chunk, page, nothing = asyncio.run(read())
    assert chunk.content == numbers[:2, 2:4].tobytes()
    assert chunk.headers["content-encoding"] == "gzip"
    assert 'const base = "/images";' in page.text
    assert nothing.status_code == 404


def test_a_websocket_is_closed_and_a_life_begins_and_ends(ask):
    image, _ = counted()
    app = asgi_app({"it": image})

    async def talk(scope, messages):
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return [message["type"] for message in sent]

    assert asyncio.run(talk({"type": "websocket"}, [{"type": "websocket.connect"}])) == [
        "websocket.close"
    ]
    steps = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    assert asyncio.run(talk({"type": "lifespan"}, steps)) == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert ask(app, "/it/0/c/0/0").status == 503


# ------------------------------------------------------------------- parts and versions


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=1-2", 206, slice(1, 3)),
        ("Bytes = 1-", 206, slice(1, None)),
        ("bytes=-3", 206, slice(-3, None)),
        ("bytes=-99", 206, slice(None)),
        ("bytes=2-99", 206, slice(2, None)),
        ("bytes=8-", 416, None),
        ("bytes=99-100", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=0-0,2-3", 200, slice(None)),
        ("bytes=3-1", 200, slice(None)),
        ("bytes=-", 200, slice(None)),
        ("bytes=a-b", 200, slice(None)),
        ("bytes=0x1-2", 200, slice(None)),
        ("bytes=1-2-3", 200, slice(None)),
        ("bytes=" + "9" * 30 + "-", 200, slice(None)),
        ("lines=0-1", 200, slice(None)),
        ("bytes", 200, slice(None)),
        ("", 200, slice(None)),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_parts_of_a_chunk(ask, numbers, header, status, part, warm):
    app = asgi_app({"it": numbers})
    whole = numbers[:2, :2].tobytes() if warm else None
    reply = ask(app, "/it/0/c/0/0", range=header)
    assert reply.status == status
    if part is None:
        assert reply.headers["content-range"] == "bytes */8"
        assert numbers.stats().loads == (1 if warm else 0)
        return
    whole = numbers[:2, :2].tobytes()
    assert reply.body == whole[part]
    if status == 206:
        low, high, _ = part.indices(8)
        assert reply.headers["content-range"] == f"bytes {low}-{high - 1}/8"
    assert reply.headers["accept-ranges"] == "bytes"


def test_a_part_of_a_document_and_of_a_compressed_chunk(ask, numbers):
    app = asgi_app({"it": numbers}, compression="gzip")
    for path in ("/it/zarr.json", "/it/0/c/0/0"):
        whole = ask(app, path)
        part = ask(app, path, range="bytes=3-9")
        assert (part.status, part.body) == (206, whole.body[3:10])
    assert zlib.decompress(whole.body, 31) == numbers[:2, :2].tobytes()


def test_a_part_is_sent_only_if_it_is_still_the_same(ask, numbers):
    app = asgi_app({"it": numbers})
    tag = ask(app, "/it/0/c/0/0").headers["etag"]
    for if_range, status in [(tag, 206), ('"other"', 200), ("W/" + tag, 200), ("x" * 99, 200)]:
        assert ask(app, "/it/0/c/0/0", range="bytes=0-1", if_range=if_range).status == status


def test_what_a_reader_has_is_not_sent_again(ask, numbers):
    app = asgi_app({"it": numbers})
    for path in ("/it/0/c/0/1", "/it/zarr.json", "/@0.4/it/0/.zarray"):
        tag = ask(app, path).headers["etag"]
        assert ask(app, path).headers["cache-control"] == "no-cache"
        for known in (tag, f'"a", W/{tag}', "*", f'{tag}, "b"'):
            reply = ask(app, path, if_none_match=known)
            assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", tag)
            assert ask(app, path, "HEAD", if_none_match=known).status == 304
        for known in ('"a"', tag.strip('"'), "W/*"):
            assert ask(app, path, if_none_match=known).status == 200


def test_what_a_reader_has_is_not_computed_again(ask):
    image, calls = counted()
    app = asgi_app({"it": image})
    tag = ask(app, "/it/0/c/1/1").headers["etag"]
    ci.get_cache().clear()
    assert ask(app, "/it/0/c/1/1", if_none_match=tag).status == 304
    assert len(calls) == 1


def test_an_edit_changes_the_versions_of_the_cells_that_it_reaches_and_of_no_others(ask):
    source = ci.Source(np.ones((8, 8), "u1"), cell_shape=2)
    image = ci.map_cells(np.copy, source, halo=1, dtype="u1")
    app = asgi_app({"source": source, "it": image, "quarter": ci.pyramid(image, 2)})
    paths = [
        f"/{name}/0/c/{y}/{x}" for name in ("source", "it") for y in range(4) for x in range(4)
    ]
    paths += [f"/quarter/1/c/{y}/{x}" for y in range(2) for x in range(2)]
    for edit in range(70):
        tags = {path: ask(app, path).headers["etag"] for path in paths} if edit % 23 == 0 else {}
        with source.edit() as a:
            a[2 + edit % 2, 3] = edit + 2
        if tags:
            changed = {
                path for path in paths if ask(app, path, if_none_match=tags[path]).status == 200
            }
            row = {"1", "2"} if edit % 2 else {"0", "1"}
            assert changed == {
                "/source/0/c/1/1",
                *(f"/it/0/c/{y}/{x}" for y in row for x in "12"),
                # Level 1 reads what has not changed at its other voxels.
                *(f"/quarter/1/c/{int(y) // 2}/{x}" for y in row for x in "01"),
            }
            assert ask(app, "/it/0/c/1/1").body == image[2:4, 2:4].tobytes()


def test_edits_that_nobody_asked_about_for_long_are_not_missed(ask):
    source = ci.Source(np.ones((400,), "u1"), cell_shape=2)
    app = asgi_app({"it": source})
    tags = [ask(app, f"/it/0/c/{n}").headers["etag"] for n in range(200)]
    for n in range(150):
        source[2 * n] = 7
    same = [ask(app, f"/it/0/c/{n}", if_none_match=tags[n]).status == 304 for n in range(200)]
    assert same == [False] * 150 + [True] * 50


def test_parameters_that_come_back_bring_their_versions_back(ask):
    image = ci.map_cells(np.full_like, np.ones(4, "u1"), params={"fill_value": 1}, dtype="u1")
    app = asgi_app({"it": image, "below": ci.map_cells(np.negative, image)})
    for path in ("/it/0/c/0", "/below/0/c/0"):
        first = ask(app, path)
        image.set_params(fill_value=2)
        second = ask(app, path, if_none_match=first.headers["etag"])
        assert second.status == 200
        assert second.body != first.body
        image.set_params(fill_value=1)
        assert ask(app, path, if_none_match=first.headers["etag"]).status == 304
        assert ask(app, path, if_none_match=second.headers["etag"]).body == first.body


def test_a_frozen_image_shows_what_it_shows_and_is_not_kept(ask):
    image, calls = counted()
    app = asgi_app({"it": image})
    tag = ask(app, "/it/0/c/0/0").headers["etag"]
    image.freeze(fill_value=8)
    image.invalidate()
    for path, value in [("/it/0/c/0/0", 1), ("/it/0/c/1/1", 8)]:
        reply = ask(app, path, if_none_match=tag)
        assert reply.body == bytes([value] * 4)
        assert reply.headers["cache-control"] == "no-store"
        assert "etag" not in reply.headers
    assert len(calls) == 1
    image.thaw()
    assert ask(app, "/it/0/c/0/0", if_none_match=tag).status == 200
    assert len(calls) == 2


def test_what_changes_while_it_is_computed_has_no_version_or_the_right_one(ask_in_loop):
    source = ci.Source(np.ones(4, "u1"))
    began, goes_on = threading.Event(), threading.Event()

    def f(a):
        began.set()
        goes_on.wait(PATIENCE_S)
        return a.copy()

    app = asgi_app({"it": ci.map_cells(f, source, dtype="u1")})

    async def change_half_way():
        asked = asyncio.create_task(ask_in_loop(app, "/it/0/c/0"))
        await asyncio.to_thread(began.wait, PATIENCE_S)
        source[0] = 5
        goes_on.set()
        first = await asked
        tag = first.headers.get("etag", '"none"')
        return first, await ask_in_loop(app, "/it/0/c/0", if_none_match=tag)

    first, second = asyncio.run(change_half_way())
    # The old cell may be told to whoever asked before, but never under the new version's name.
    assert second.status == 200
    assert second.body == bytes([5, 1, 1, 1])
    assert second.headers["etag"] != first.headers.get("etag")


def test_where_each_request_takes_a_thread_few_are_made_at_a_time(ask_in_loop, monkeypatch):
    image, _ = counted((20,), 1)
    app = asgi_app({"it": image})
    app.waiting._gate = Gate(2)
    app._layer("it").arrays[0].elsewhere = True
    order: list[int] = []
    at_once: list[int] = []
    turns: list[asyncio.Event] = []
    load = waiting_module._load

    async def load_slowly(array, index):
        order.append(index)
        at_once.append(len(turns))
        turn = asyncio.Event()
        turns.append(turn)
        await turn.wait()
        turns.remove(turn)
        return await load(array, index)

    monkeypatch.setattr(waiting_module, "_load", load_slowly)

    async def ask_all():
        gone = asyncio.Event()
        asked = [
            asyncio.create_task(
                ask_in_loop(app, f"/it/0/c/{n}", gone=gone if n in (4, 17, 19) else None)
            )
            for n in range(20)
        ]
        while len(app.waiting.tasks) < 20:
            await asyncio.sleep(0)
        gone.set()
        while not all(task.done() for task in asked):
            for turn in turns:
                turn.set()
            await asyncio.sleep(0)
        return [task.result() for task in asked]

    replies = asyncio.run(ask_all())
    assert [n for n in range(20) if replies[n] is None] == [4, 17, 19]
    assert [reply.body for reply in replies if reply] == [
        bytes([n + 1]) for n in range(20) if n not in (4, 17, 19)
    ]
    assert max(at_once) == 1
    assert order == [0, 1, 18, 16, *range(15, 4, -1), 3, 2]
    assert app.waiting._gate._free == 2


def test_what_was_computed_with_other_parameters_is_not_told_under_the_name_of_these(
    ask, monkeypatch
):
    image = ci.map_cells(np.full_like, np.ones(4, "u1"), params={"fill_value": 1}, dtype="u1")
    app = asgi_app({"it": image})
    load = waiting_module._load

    async def load_of_others(array, index):
        image.set_params(fill_value=2)
        found = await load(array, index)
        image.set_params(fill_value=1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(waiting_module, "_load", load_of_others)
        first = ask(app, "/it/0/c/0")
    assert first.body == bytes([2] * 4)
    assert "etag" not in first.headers
    assert first.headers["cache-control"] == "no-store"
    second = ask(app, "/it/0/c/0")
    assert second.body == bytes([1] * 4)
    assert "etag" in second.headers


def test_a_cell_has_no_version_while_a_change_takes_place():
    image, _ = counted()
    versions = CellVersions(image)
    loader = image.loader
    before = [versions.of(loader, index) for index in range(9)]
    # As a change begins: its number is not in force yet.
    loader.history.add(loader.edition + 1, [3, 4])
    during = [versions.of(loader, index) for index in range(9)]
    assert [n for n in range(9) if during[n] is None] == [3, 4]
    assert [during[n] for n in (0, 8)] == [before[n] for n in (0, 8)]


def test_versions_of_many_large_changes_change_too_often_and_never_too_seldom(monkeypatch):
    monkeypatch.setattr(versions_module, "_LISTED", 2)
    monkeypatch.setattr(versions_module, "_MOST_LARGE", 3)
    monkeypatch.setattr(versions_module, "_MOST_LISTED", 4)
    source = ci.Source(np.zeros(40, "u1"), cell_shape=1)
    image = ci.map_cells(np.copy, source, dtype="u1")
    versions = CellVersions(image)
    rng = np.random.default_rng(3)
    kept = 0
    changes = [0] * 40
    named: dict[tuple[int, str | None], int] = {}
    for _ in range(60):
        before = [versions.of(image.loader, index) for index in range(40)]
        low = int(rng.integers(40))
        high = low + int(rng.integers(1, 6))
        source[low:high] = int(rng.integers(255))
        after = [versions.of(image.loader, index) for index in range(40)]
        assert None not in after
        same = [a == b for a, b in zip(before, after, strict=True)]
        assert not any(same[low:high])
        kept += sum(same)
        for index in range(40):
            changes[index] += low <= index < high
            # A name never stands for two contents.
            assert named.setdefault((index, after[index]), changes[index]) == changes[index]
    assert kept > 600
