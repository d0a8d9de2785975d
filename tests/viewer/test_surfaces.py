from __future__ import annotations

import http.client
import json
import sys
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from support import until

import cellimg_dask as ci
from cellimg_dask.ops.meshes import mesh
from cellimg_dask.server.layers import Layer
from cellimg_dask.viewer.surfaces import Surfaces
from cellimg_dask.viewer.view import View, view


def balls() -> np.ndarray:
    z, y, x = np.ogrid[:24, :24, :40]
    labels = np.zeros((24, 24, 40), "u4")
    labels[(z - 12) ** 2 + (y - 12) ** 2 + (x - 10) ** 2 < 30] = 7
    labels[(z - 12) ** 2 + (y - 12) ** 2 + (x - 33) ** 2 < 12] = 9
    return labels


def get(shown: View, path: str) -> tuple[int, bytes]:
    parts = urlsplit(shown.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request("GET", parts.path + path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_selected_labels_have_surfaces_under_an_address() -> None:
    space = ci.Space.of(3, "zyx", units="um", scale=(2, 1, 1))
    source = ci.Source(balls(), cell_shape=8, space=space)
    with view({"labels": Layer(source, kind="labels")}) as shown:
        shown.meshes("labels", [7])
        assert shown.selected("labels") == [7]
        layer = shown.viewer.state.layers["labels"]
        assert layer.source[1].url == f"precomputed://{shown.url}mesh/labels/0"
        transform = layer.source[1].transform.output_dimensions
        assert transform.names == ("x", "y", "z")
        assert transform.units == ("m",) * 3
        assert get(shown, "mesh/labels/0/info") == (200, b'{"@type": "neuroglancer_legacy_mesh"}')
        assert json.loads(get(shown, "mesh/labels/0/7:0")[1]) == {"fragments": ["7"]}
        expected = mesh(source, 7).to_neuroglancer()
        assert get(shown, "mesh/labels/0/7") == (200, expected)
        assert json.loads(get(shown, "mesh/labels/0/8:0")[1]) == {"fragments": []}
        for wrong in ("labels/0/8", "labels/0/x", "labels/0/" + "9" * 5000, "other/0/info", ""):
            assert get(shown, f"mesh/{wrong}")[0] == 404

        # When labels have changed it is another address, and another surface.
        source[12, 12, 10:30] = 7
        until(lambda: shown.viewer.state.layers["labels"].source[1].url.endswith("/1"))
        status, changed = get(shown, "mesh/labels/1/7")
        assert status == 200
        assert changed == mesh(source, 7).to_neuroglancer() != expected


def test_a_label_that_was_pointed_at_is_not_looked_for() -> None:
    source = ci.Source(balls(), cell_shape=8)
    image = ci.map_cells(np.copy, source, dtype="u4")
    with view({"labels": Layer(image, kind="labels", contrast=(0, 1))}) as shown:
        shown.meshes(image)
        space = {"names": ["x", "y", "z"], "scales": [1, 1, 1]}
        shown._answer({"kind": "picked", "place": [33.2, 12, 12], "space": space})
        # Outside there is nothing to note.
        shown._answer({"kind": "picked", "place": [33, 12, 99], "space": space})
        assert image.stats().loads == 1
        expected = mesh(source, 9, seeds=(12, 12, 33)).to_neuroglancer()
        assert get(shown, "mesh/labels/0/9")[1] == expected
        assert image.stats().loads < image.grid.num_cells
        source[12, 12, 33] = 1
        # The seed has another label now.
        assert get(shown, "mesh/labels/0/9")[1] == mesh(source, 9).to_neuroglancer()


def test_without_units_numbers_stay_as_they_are() -> None:
    surfaces = Surfaces(Layer(balls(), kind="labels"))
    transform = surfaces.source("http://here/v/x/", "a b").transform.output_dimensions
    assert surfaces.source("http://here/v/x/", "a b").url == (
        "precomputed://http://here/v/x/mesh/a%20b/0"
    )
    assert transform.units == ("",) * 3
    assert transform.scales.tolist() == [1, 1, 1]


def test_a_label_is_not_looked_for_in_millions_of_cells(caplog: Any) -> None:
    def fill(block: Any) -> None:
        raise AssertionError("nothing is to be computed")

    huge = ci.fill_cells(fill, ci.CellGrid((10_000,) * 3, 10), dtype="u4")
    with view({"labels": Layer(huge, kind="labels")}) as shown:
        shown.meshes("labels")
        status, body = get(shown, "mesh/labels/0/5:0")
        assert status == 500
        assert b"select it by a double click" in body
        assert "double click" in caplog.text


def test_what_has_no_surfaces() -> None:
    flat = Layer(np.zeros((4, 4), "u1"), kind="labels")
    with view({"image": np.zeros((4, 4, 4), "u1"), "flat": flat}) as shown:
        with pytest.raises(ValueError, match='give Layer\\(image, kind="labels"\\)'):
            shown.meshes("image")
        with pytest.raises(ValueError, match="labels in 3 axes, these have 2"):
            shown.meshes("flat")


def test_what_goes_wrong_is_not_a_label_that_is_missing(caplog: Any) -> None:
    def wrong(block: np.ndarray) -> np.ndarray:
        return block[:1]

    image = ci.map_cells(wrong, balls(), dtype="u4", cell_shape=8)
    with view({"labels": Layer(image, kind="labels")}) as shown:
        with pytest.raises(ValueError, match="step_size"):
            shown.meshes("labels", step_size=0)
        shown.meshes("labels", [7])
        status, body = get(shown, "mesh/labels/0/7:0")
        assert status == 500
        assert b"wrong" in body
        assert get(shown, "mesh/labels/0/0")[0] == 404


def test_surfaces_need_no_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    surfaces = Surfaces(Layer(balls(), kind="labels"))
    assert surfaces.answer("0/9") == mesh(balls(), 9).to_neuroglancer()
    assert surfaces.answer("0/8") is None
