"""The overlay of work, and the numbers on the page."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest
from support import PATIENCE_S

import cellimg_dask as ci
from cellimg_dask.loading.crew import get_crew
from cellimg_dask.server.serving import asgi_app
from cellimg_dask.server.work import CACHED, COMPUTING, FAILED, UNKNOWN, WAITING


def overlay(reply, shape):
    if reply.status == 404:
        return np.zeros(shape, "u1")
    assert reply.headers["cache-control"] == "no-store"
    return np.frombuffer(reply.body, "u1").reshape(shape)


def test_the_overlay_shows_what_is_there_computed_waited_for_and_failed(ask_in_loop):
    goes_on = threading.Event()
    threads = get_crew().num_threads

    def f(block):
        if block.index == 1:
            raise ValueError("broken")
        if block.index > 2:
            goes_on.wait(PATIENCE_S)
        block.data[...] = 1

    image = ci.fill_cells(f, ci.CellGrid((9, 20), (3, 1)), dtype="u1")
    app = asgi_app({"it": image})

    async def shown():
        return overlay(await ask_in_loop(app, "/@work/it/0/c/0/0"), (3, 20)).reshape(-1).tolist()

    async def watch():
        assert set(await shown()) == {UNKNOWN}
        for index, status in ((0, 200), (1, 500), (2, 200)):
            assert (await ask_in_loop(app, f"/it/0/c/0/{index}")).status == status
        busy = [
            asyncio.create_task(ask_in_loop(app, f"/it/0/c/1/{index}")) for index in range(threads)
        ]
        while image.loader.num_loading() < threads:
            await asyncio.sleep(0.001)
        waits = asyncio.create_task(ask_in_loop(app, "/it/0/c/2/19"))
        while len(app.waiting.tasks) <= threads:
            await asyncio.sleep(0)
        states = await shown()
        status = json.loads((await ask_in_loop(app, "/@status.json")).body)
        goes_on.set()
        await asyncio.gather(*busy, waits)
        return states, status, await shown()

    during, status, after = asyncio.run(watch())
    expected = [UNKNOWN] * 60
    expected[:3] = [CACHED, FAILED, CACHED]
    expected[20 : 20 + threads] = [COMPUTING] * threads
    expected[59] = WAITING
    assert during == expected
    (level,) = status["layers"][0]["levels"]
    counted = [level[key] for key in ("cells", "cached", "computing", "waiting", "failed")]
    assert counted == [60, 2, threads, 1, 1]
    assert status["requests"]["open"] == threads + 1
    assert status["requests"]["errors"] == 1
    assert status["requests"]["chunks"] == 2
    assert status["requests"]["bytes"] == 6
    (error,) = status["errors"]
    assert error["layer"] == "it"
    assert "broken" in error["text"]
    assert error["position"] == [0, 1]
    assert sorted(set(after)) == [UNKNOWN, CACHED, FAILED]
    assert after.count(CACHED) == 3 + threads


def test_a_cell_that_failed_is_unknown_after_a_change_and_cached_when_it_works(ask):
    source = ci.Source(np.zeros(4, "u1"), cell_shape=1)

    def f(a):
        if not a[0]:
            raise ValueError("zero")
        return a.copy()

    app = asgi_app({"it": ci.map_cells(f, source, dtype="u1")})
    states, counts = [], []

    def look():
        states.append(overlay(ask(app, "/@work/it/0/c/0"), (4,))[2])
        (layer,) = json.loads(ask(app, "/@status.json").body)["layers"]
        counts.append(layer["levels"][0]["failed"])

    for value in (0, 0, 7):
        source[2] = value
        look()
        ask(app, "/it/0/c/2")
        look()
    assert states == [UNKNOWN, FAILED, UNKNOWN, FAILED, UNKNOWN, CACHED]
    assert counts == [0, 1, 0, 1, 0, 0]


def test_the_overlay_lies_where_the_image_lies(ask):
    image = ci.map_cells(np.copy, np.ones((7, 9)), dtype=float, cell_shape=(2, 4))
    image = image.with_space(axes="yx", units="um", scale=(3, 0.5), translation=(1, 0))
    app = asgi_app({"it": ci.pyramid(image, 2)})
    group = json.loads(ask(app, "/@work/it/zarr.json").body)
    (scales,) = group["attributes"]["ome"]["multiscales"]
    assert [axis["name"] for axis in scales["axes"]] == ["y", "x"]
    (dataset,) = scales["datasets"]
    assert dataset["coordinateTransformations"] == [
        {"type": "scale", "scale": [6.0, 2.0]},
        {"type": "translation", "translation": [2.5, 0.75]},
    ]
    for level, shape in ((0, [4, 3]), (1, [2, 2])):
        array = json.loads(ask(app, f"/@work/it/{level}/zarr.json").body)
        assert (array["shape"], array["data_type"]) == (shape, "uint8")


@pytest.mark.parametrize("ndim", range(6))
def test_the_overlay_has_chunks_of_few_cells_in_any_number_of_axes(ask, ndim):
    image = ci.fill_cells(
        lambda block: block.data.fill(1), ci.CellGrid((2000,) * ndim, 1), dtype="u1"
    )
    app = asgi_app({"it": image})
    array = json.loads(ask(app, "/@work/it/0/zarr.json").body)
    chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
    assert np.prod(chunk) <= 4096
    last = [1999 // size for size in chunk]
    assert image.load((1999,) * ndim).size == 1
    reply = ask(app, "/@work/it/0/c/" + "/".join(map(str, last)) if ndim else "/@work/it/0/c")
    states = overlay(reply, chunk)
    assert np.count_nonzero(states) == 1
    assert states[tuple(1999 % size for size in chunk)] == CACHED


def test_the_page_needs_nothing_from_elsewhere(ask):
    page = ask(asgi_app({"<b>": np.ones(3)}), "/@status")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'self'" in policy
    assert b"src=" not in page.body
    # Names come with the numbers, and are written as text.
    assert b"<b>" not in page.body
