"""Views without a browser: what the page is told, and what it says."""

from __future__ import annotations

import contextlib
import errno
import gc
import http.client
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from support import PATIENCE_S, until

import cellimg_dask as ci
from cellimg_dask.server.layers import Layer
from cellimg_dask.viewer.contrast import range_of
from cellimg_dask.viewer.scene import as_shown, dimensions, normal_to_quaternion
from cellimg_dask.viewer.view import View, view

MICRO = 1e-6


def lazy(shape: tuple[int, ...] = (8, 20, 30), dtype: str = "u1", **space: Any) -> ci.CellImg:
    image = ci.map_cells(np.copy, np.zeros(shape, dtype), dtype=dtype, cell_shape=10)
    return image.with_space(**space) if space else image


@pytest.fixture
def shown() -> Iterator[View]:
    layers = {
        "raw": lazy(axes="zyx", units="um", scale=(2, 0.5, 0.5), translation=(100, 0, 0)),
        "labels": Layer(np.zeros((8, 20, 30), "i4"), kind="labels"),
    }
    with view(layers) as made:
        yield made


class Page:
    """What a browser would do."""

    def __init__(self, shown: View) -> None:
        parts = urlsplit(shown.url)
        self.path = parts.path
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        where = path if path.startswith("/") else self.path + path
        self.connection.request("GET" if body is None else "POST", where, body)
        reply = self.connection.getresponse()
        return reply.status, reply.read()

    def tell(self, message: Any) -> tuple[int, Any]:
        status, body = self.ask("@message", json.dumps(message).encode())
        return status, json.loads(body)

    def facts(self) -> Iterator[dict[str, Any]]:
        self.connection.request("GET", self.path + "@facts")
        reply = self.connection.getresponse()
        for line in reply:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


@pytest.fixture
def page() -> Iterator[Callable[[View], Page]]:
    pages: list[Page] = []

    def begin(shown: View) -> Page:
        pages.append(Page(shown))
        return pages[-1]

    yield begin
    for each in pages:
        each.connection.close()


# ------------------------------------------------------------------ what is shown


def test_dimensions_are_metres_and_x_y_z(shown: View) -> None:
    state = shown.viewer.state
    assert state.dimensions.names == ("x", "y", "z")
    assert state.dimensions.units == ("m", "m", "m")
    np.testing.assert_allclose(state.dimensions.scales, (0.5 * MICRO, 0.5 * MICRO, 2 * MICRO))
    assert [layer.name for layer in state.layers] == ["raw", "labels"]
    assert [layer.type for layer in state.layers] == ["image", "segmentation"]
    for name in shown.layers:
        url = state.layers[name].source[0].url
        assert url == f"zarr3://{shown.server.url}/{name}/"
    # It lies where the first lies, since nobody has said where.
    assert shown.server.layers["labels"].space == shown.server.layers["raw"].space
    assert shown.layers["labels"].space.is_plain


@pytest.mark.parametrize(
    ("dtype", "kind", "expected"),
    [
        ("f8", "image", "f4"),
        ("f2", "image", "f4"),
        ("c16", "image", "f4"),
        ("?", "image", "u1"),
        ("i8", "image", "f4"),
        ("u2", "image", "u2"),
        ("i4", "labels", "u4"),
        ("i8", "labels", "u8"),
        ("?", "labels", "u1"),
    ],
)
def test_dtypes_that_the_viewer_does_not_know(dtype: str, kind: Any, expected: str) -> None:
    values = np.arange(24).reshape(4, 6).astype(dtype)
    image = Layer(ci.map_cells(np.copy, values, dtype=dtype, cell_shape=3), kind=kind)
    converted = as_shown(image).image
    assert converted.dtype == expected
    assert converted.cell_shape == (3, 3)
    if dtype == "c16":
        values = np.abs(values)
    np.testing.assert_array_equal(np.asarray(converted), values.astype(expected))


def test_the_fill_value_of_complex_numbers_is_their_magnitude() -> None:
    layer = Layer(np.zeros((4, 6), "c8"), fill_value=3 + 4j)
    assert as_shown(layer).fill_value == 5
    assert layer.fill_value == 3 + 4j
    # Without a warning that something is left out.
    with view({"waves": layer}) as v:
        assert v.server.layers["waves"].dtype == "f4"


def test_images_of_other_axes_are_laid_upon_the_first() -> None:
    raw = lazy((2, 8, 20, 30), axes="czyx", units="um", scale=(1, 2, 0.5, 0.5))
    stack, plane = (
        as_shown(Layer(lazy()), [raw.space]),
        as_shown(Layer(lazy((20, 30))), [raw.space]),
    )
    assert stack.space == raw.space.without([0])
    assert plane.space == raw.space.without([0, 1])
    levels = Layer([lazy((8, 20, 30)), lazy((4, 10, 15))])
    assert as_shown(levels, [raw.space]).spaces[1].scale == (4, 1, 1)
    other = ci.Space.of(2, ("row", "column"), scale=3)
    assert as_shown(Layer(lazy((20, 30))), [other]).space == other
    said = lazy((20, 30), axes="yx", units="mm")
    assert as_shown(Layer(said), [raw.space]).space == said.space


def test_units_that_the_viewer_cannot_read_are_left_out() -> None:
    space = as_shown(Layer(lazy(units=("um", "pixel", None)))).space
    assert space.units == ("micrometer", None, None)
    with pytest.raises(ValueError, match="axis 'x' is measured in m by one layer and in voxels"):
        dimensions([ci.Space.of(1, "x", units="um"), ci.Space.of(1, "x", scale=2)])
    found = dimensions([ci.Space.of(3, "tyx", units=("s", "um", "um"), scale=(5, 1, 1))])
    assert found.names == ("x", "y", "t")
    assert found.units == ("m", "m", "s")
    assert dimensions([ci.Space.of(2, ("row", "column"))]).names == ("column", "row")


def test_contrast_is_found_and_not_forced() -> None:
    values = np.arange(2000, dtype="u2").reshape(40, 50)
    with view({"found": values, "given": Layer(values, contrast=(5, 7)), "flat": 0 * values}) as v:

        def contrast(name: str) -> Any:
            controls = v.viewer.state.layers[name].layer.shader_controls.to_json()
            return controls.get("normalized", {}).get("range")

        until(lambda: contrast("found") is not None)
        low, high = contrast("found")
        assert 0 <= low < 10
        assert 1990 < high <= 1999
        assert contrast("given") == [5, 7]
        assert contrast("flat") is None
    assert range_of(np.array([np.nan, 1, 2, np.inf])) is not None
    assert range_of(np.array([np.nan])) is None


def test_looking_for_the_contrast_computes_what_is_seen_first_only() -> None:
    image = ci.map_cells(np.copy, np.zeros((512, 512), "u1"), dtype="u1", cell_shape=64)
    with view({"image": image}) as v:
        until(lambda: image.stats().loads == 1)
        assert image.peek((3, 3)) is not None
        assert v.position == (255, 255)


def test_work_is_shown_as_layers(page: Any) -> None:
    with view({"image": lazy()}, work=True) as v:
        layer = v.viewer.state.layers["work on image"]
        assert layer.source[0].url == f"zarr3://{v.server.url}/@work/image/"
        assert set(layer.layer.segment_colors) == {1, 2, 3, 4}
        v.remove("image")
        assert [each.name for each in v.viewer.state.layers] == []


# ------------------------------------------------------------------ channels


def cells(cell_shape: Any = (1, 4, 20, 30), **options: Any) -> Layer:
    """Three channels of a volume: a brightness of 0 to 9, 100 to 109, 200 to 209."""
    values = np.zeros((3, 4, 20, 30), "u2")
    values += (100 * np.arange(3)[:, None, None, None] + np.arange(30) % 10).astype("u2")
    space = ci.Space.of(4, "czyx", scale=(1, 2, 0.5, 0.5))
    return Layer(ci.Source(values, cell_shape=cell_shape, space=space), **options)


def test_each_channel_is_a_layer_of_the_viewer(page: Any) -> None:
    layer = cells(channels=["dna", ci.Channel("actin", "red", (3, 4)), ci.Channel(visible=False)])
    with view({"cells": layer, "plain": lazy()}) as v:
        names = ["cells dna", "cells actin", "cells 2"]
        assert v.names_in_viewer("cells") == names
        assert [each.name for each in v.viewer.state.layers] == [*names, "plain"]
        assert list(v.layers) == ["cells", "plain"]
        layers = v.viewer.state.layers
        for number, name in enumerate(names):
            shown = layers[name].layer
            assert shown.source[0].url == f"zarr3://{v.server.url}/cells/"
            assert shown.local_position == [number]
            assert shown.local_dimensions.names == ("c'",)
            assert shown.blend == "additive"
            assert layers[name].visible == (number < 2)
        assert "c" not in v.viewer.state.dimensions.names
        # Each has a contrast of its own; that of what is hidden is looked for once it is seen.
        found = {name: layers[name].layer.shader_controls.to_json() for name in names}
        assert found["cells actin"]["normalized"]["range"] == [3, 4]

        def low(name: str) -> Any:
            controls = v.viewer.state.layers[name].layer.shader_controls.to_json()
            return controls.get("normalized", {}).get("range", [None])[0]

        until(lambda: low("cells dna") is not None)
        assert low("cells dna") < 1
        assert low("cells 2") is None
        assert v.server.layers["cells"].image.peek((2, 0, 0, 0)) is None
        v.show("cells", visible=True, channel=2)
        until(lambda: low("cells 2") is not None)
        assert 200 <= low("cells 2") < 201
        (facts,) = (each for _, each in zip(range(1), page(v).facts(), strict=False))
        assert facts["layers"]["cells"]["shown"] == names
        assert facts["layers"]["plain"]["shown"] == ["plain"]
        v.remove("cells")
        assert [each.name for each in v.viewer.state.layers] == ["plain"]


def test_looks_of_channels() -> None:
    with view({"cells": cells(channels=["dna", "actin", ""]), "plain": lazy()}) as v:
        layers = v.viewer.state.layers

        def controls(name: str) -> Any:
            return v.viewer.state.layers[name].layer.shader_controls.to_json()

        v.show("cells", channel="actin", color="blue", contrast=(1, 2), opacity=0.5)
        assert controls("cells actin")["color"] == "blue"
        assert "color" not in controls("cells dna")
        v.show("cells", channel=0, visible=False)
        layers = v.viewer.state.layers
        assert [layers[each].visible for each in v.names_in_viewer("cells")] == [False, True, True]
        v.show("cells", visible=False, contrast=(5, 6))
        layers = v.viewer.state.layers
        assert not any(layers[each].visible for each in v.names_in_viewer("cells"))
        assert {str(controls(each)["normalized"]) for each in v.names_in_viewer("cells")} == {
            str(controls("cells dna")["normalized"])
        }
        with pytest.raises(KeyError, match="no channel 'er': it has 3, called dna, actin"):
            v.show("cells", channel="er", visible=True)
        with pytest.raises(KeyError, match="no channel 3"):
            v.show("cells", channel=3, visible=True)
        with pytest.raises(KeyError, match="no channel 0: it has 0"):
            v.show("plain", channel=0, visible=True)


def test_one_channel_at_a_time() -> None:
    with view({"cells": cells(channels=())}) as v:
        assert v.names_in_viewer("cells") == ["cells"]
        assert v.viewer.state.layers["cells"].layer.local_position is None
        for number in (0, 1):
            with pytest.raises(KeyError, match="one channel at a time"):
                v.show("cells", channel=number, visible=True)


def test_planes_are_shown_in_one_panel() -> None:
    moving = ci.Source(np.zeros((3, 2, 8, 9), "u1"), space=ci.Space.of(4, "tcyx"))
    for layers, layout in (
        ({"plane": np.zeros((8, 9))}, "xy"),
        ({"film": moving}, "xy"),
        ({"volume": np.zeros((3, 8, 9)), "plane": np.zeros((8, 9))}, "4panel"),
        ({}, "4panel"),
    ):
        with view(layers) as v:
            assert v.viewer.state.layout.type == layout
    with view({"plane": np.zeros((8, 9))}, layout="4panel") as v:
        assert v.viewer.state.layout.type == "4panel"


def test_names_of_channels_are_told_apart() -> None:
    with view({"cells": cells(channels=["a", "a", "b"])}) as v:
        assert v.names_in_viewer("cells") == ["cells a 0", "cells a 1", "cells b"]
        with pytest.raises(
            ValueError, match="'cells b' is in the viewer already, on account of layer 'cells'"
        ):
            v.add("cells b", lazy())
        v.add("other", lazy())
        assert v.names_in_viewer("other") == ["other"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["", "0", "b"], ["0 0", "0 1", "b"]),
        (["a", "a", "a 0"], ["a 0 0", "a 1", "a 0 2"]),
        (["a 1", "a", "a"], ["a 1 0", "a 1 1", "a 2"]),
        ([" ", "a ", "a"], ["0", "a 1", "a 2"]),
    ],
)
def test_names_with_numbers_are_told_apart(labels: list[str], names: list[str]) -> None:
    with view({"cells": cells(channels=labels)}) as v:
        assert [each.name for each in v.viewer.state.layers] == [f"cells {each}" for each in names]


def test_channels_by_number_and_by_label() -> None:
    with view({"cells": cells(channels=["a", "a", "b"])}) as v:
        assert v.names_in_viewer("cells", np.uint8(2)) == v.names_in_viewer("cells", "b")
        for wrong in (True, 1.0, [1]):
            with pytest.raises(TypeError, match="channel must be an integer"):
                v.show("cells", channel=wrong, visible=True)  # type: ignore[arg-type]
        with pytest.raises(KeyError, match="no channel -1: it has 3, called a, a, b"):
            v.show("cells", channel=-1, visible=True)
        for ask in (v.paint, v.names_in_viewer):
            with pytest.raises(KeyError, match="2 channels called 'a'; give the number"):
                ask("cells", channel="a")


def test_channels_may_be_measured_in_different_units() -> None:
    def stack(unit: str | None) -> ci.Source:
        space = ci.Space.of(3, "cyx", units={"c": unit})
        return ci.Source(np.zeros((2, 8, 9), "u1"), space=space)

    with view({"spectra": stack("nm"), "stains": stack(None)}) as v:
        assert v.viewer.state.dimensions.names == ("x", "y")


def test_contrast_of_levels_that_put_channels_together() -> None:
    image = cells().image
    with view({"cells": Layer(ci.pyramid(image, 3, factors=(2, 1, 1, 1)))}) as v:
        assert v.server.layers["cells"].images[-1].shape[0] == 1

        def is_found(name: str) -> bool:
            return "normalized" in v.viewer.state.layers[name].layer.shader_controls.to_json()

        until(lambda: all(map(is_found, v.names_in_viewer("cells"))))


def test_a_contrast_that_is_found_late_is_not_that_of_the_next_layer() -> None:
    begin = threading.Event()

    def slow(block: Any) -> Any:
        assert begin.wait(30)
        return block

    first, second = cells().image, cells(visible=False)
    late = ci.map_cells(slow, first, dtype="u2")
    with view({"cells": late}) as v:
        v.remove("cells")
        v.add("cells", second)
        begin.set()
        late[...]
        for each in v.names_in_viewer("cells"):
            assert v.viewer.state.layers[each].layer.shader_controls.to_json() == {}


def test_layers_that_were_closed_in_the_page() -> None:
    labels = Layer(np.zeros((4, 20, 30), "u1"), kind="labels")
    with view({"cells": cells(channels=["a", "b", "c"]), "labels": labels, "last": lazy()}) as v:
        with v.viewer.txn() as state:
            del state.layers["cells b"], state.layers["labels"]
        v.show("cells", color="red")
        layers = v.viewer.state.layers
        assert layers["cells c"].layer.shader_controls.to_json()["color"] == "red"
        assert "color" not in layers["last"].layer.shader_controls.to_json()
        closed = "was closed in the viewer's page; remove the layer and add it again"
        with pytest.raises(KeyError, match=f"'cells b' {closed}"):
            v.show("cells", channel="b", visible=True)
        for ask in (v.show, v.selected, v.meshes, lambda name: v.select(name, [1])):
            with pytest.raises(KeyError, match=closed):
                ask("labels")
        v.remove("labels")
        v.add("labels", labels)
        v.select("labels", [1])
        assert v.selected("labels") == [1]


def test_a_picture_of_colours_is_shown_as_channels() -> None:
    picture = ci.Source(np.zeros((8, 9, 3), "u1"), space=ci.Space.of(3, "yxs"))
    with view({"picture": picture}) as v:
        assert v.names_in_viewer("picture") == [f"picture {c}" for c in ("red", "green", "blue")]
        assert v.viewer.state.dimensions.names == ("x", "y")
        assert v.server.layers["picture"].space.axes == ("y", "x", "c")


def test_one_channel_is_painted(page: Any) -> None:
    layer = cells(channels=["dna", "actin", "er"])
    with view({"cells": layer}) as v:
        brush = v.paint("cells", channel="actin", value=7, size=0.5)
        assert brush.channel == 1
        space = {"names": ["x", "y", "z"], "scales": [0.5, 0.5, 2], "units": ["", "", ""]}
        message = {
            "kind": "stroke", "stroke": "1", "points": [[3, 4, 2]], "erase": False, "end": True,
            "plane": [[1, 0, 0], [0, 1, 0]], "space": space,
        }  # fmt: skip
        source = layer.given
        before = source[...]
        assert page(v).tell(message) == (200, {"changed": 1})
        assert np.argwhere(source[...] != before).tolist() == [[1, 2, 4, 3]]
        brush.channel = 2
        page(v).tell({**message, "stroke": "2"})
        assert source[2, 2, 4, 3] == 7
        with pytest.raises(ValueError, match="channel must be below 3, got 3"):
            brush.channel = 3
        with pytest.raises(KeyError, match="no channel 'x'"):
            v.paint("cells", channel="x")


# ------------------------------------------------------------------ looking


def test_places_in_voxels_and_units(shown: View) -> None:
    assert shown.position == (3, 9, 14)
    shown.move_to((1, 2, 3))
    np.testing.assert_allclose(shown.viewer.state.position, (3, 2, 51))
    assert shown.position_in("labels") == (1, 2, 3)
    assert shown.position_in("raw", in_units=True) == (102, 1, 1.5)
    shown.move_to((104, 2, 2), in_units=True, layer="labels")
    assert shown.position == (2, 4, 4)
    shown.position = (0, 0, 0)
    assert shown.position == (0, 0, 0)
    with pytest.raises(ValueError, match="position must have 3 numbers"):
        shown.move_to((1, 2))
    with pytest.raises(KeyError, match="no layer 'other'"):
        shown.move_to((1, 2, 3), layer="other")


def test_zoom_and_planes(shown: View) -> None:
    shown.zoom(2)
    assert shown.viewer.state.cross_section_scale == 2
    with pytest.raises(ValueError, match="voxels_per_pixel must be positive"):
        shown.zoom(0)
    shown.show_oblique((0, 0, 0, 2))
    np.testing.assert_allclose(shown.viewer.state.cross_section_orientation, (0, 0, 0, 1))
    shown.show_oblique((0, 1, 0))
    x, y, z, w = shown.viewer.state.cross_section_orientation
    # The viewer's z axis is turned to y.
    np.testing.assert_allclose([2 * (x * z + w * y), 2 * (y * z - w * x)], [0, 1], atol=1e-6)
    for wrong in ((0, 0, 0), (1, 2), (1, np.nan, 0)):
        with pytest.raises(ValueError, match="orientation must be"):
            shown.show_oblique(wrong)
    shown.layout("xy-3d")
    assert shown.viewer.state.to_json()["layout"] == "xy-3d"
    with pytest.raises(ValueError, match="layout must be one of"):
        shown.layout("5panel")
    assert normal_to_quaternion((0, 0, -3)) == [1, 0, 0, 0]


def test_at_first_the_whole_is_seen_but_no_finer_voxels_than_pixels() -> None:
    with view({"small": lazy((4, 100, 100))}) as v:
        assert v.viewer.state.cross_section_scale == 0.25
    huge = ci.fill_cells(lambda block: None, ci.CellGrid((10**5,) * 3, 64), dtype="u1")
    with view({"huge": Layer(huge, contrast=(0, 1))}) as v:
        assert v.viewer.state.cross_section_scale == 1
    levels = [lazy((8, 4000, 4000)), lazy((8, 500, 500))]
    with view({"levels": Layer(levels, contrast=(0, 1))}) as v:
        assert v.viewer.state.cross_section_scale == 8


def test_looks(shown: View) -> None:
    shown.show("raw", opacity=0.25, contrast=(3, 9), color="red", visible=False)
    layer = shown.viewer.state.layers["raw"]
    assert not layer.visible
    assert layer.layer.opacity == 0.25
    controls = layer.layer.shader_controls.to_json()
    assert controls["normalized"]["range"] == [3, 9]
    assert controls["color"] == "red"
    shown.show("labels", opacity=0.75, color="#00ff00")
    labels = shown.viewer.state.layers["labels"].layer
    assert labels.selected_alpha == 0.75
    assert labels.segment_default_color == "#00ff00"
    with pytest.raises(ValueError, match="labels, which have no contrast"):
        shown.show("labels", contrast=(0, 1))
    with pytest.raises(ValueError, match="opacity must be"):
        shown.show("raw", opacity=2)
    with pytest.raises(KeyError, match="no layer 'other'"):
        shown.show("other")


def test_selected_labels(shown: View) -> None:
    assert shown.selected("labels") == []
    shown.select("labels", [9, 2**40])
    assert shown.selected("labels") == [9, 2**40]
    with pytest.raises(ValueError, match='give Layer\\(image, kind="labels"\\)'):
        shown.selected("raw")


def test_layers_come_and_go(shown: View) -> None:
    shown.add("more", lazy())
    assert list(shown.layers) == ["raw", "labels", "more"]
    assert shown.server.layers["more"].space.units == ("micrometer",) * 3
    with pytest.raises(ValueError, match="there is a layer 'more' already"):
        shown.add("more", lazy())
    shown.remove("more")
    assert "more" not in shown.server.layers
    assert [layer.name for layer in shown.viewer.state.layers] == ["raw", "labels"]
    with view() as empty:
        empty.add("first", lazy((4, 6)))
        assert empty.position == (1, 2)


# ------------------------------------------------------------------ the page


def test_the_page_is_neuroglancers_with_a_script_and_asks_nothing_of_the_net(
    shown: View, page: Any
) -> None:
    browser = page(shown)
    status, html = browser.ask("")
    assert status == 200
    assert html.index(b"main.") < html.index(b"@cellimg.js") < html.index(b"</head>")
    facts = re.search(rb"cellimgFacts = (.*?);</script>", html)
    assert facts is not None
    assert json.loads(facts[1])["layers"]["raw"]["edition"] == 0
    status, script = browser.ask("@cellimg.js")
    assert status == 200
    elsewhere = set(re.findall(rb"https?://(?!127.0.0.1:)[^\"'`\s]+", html + script))
    # A name, which nobody asks for.
    assert elsewhere == {b"http://www.w3.org/2000/svg"}
    for wrong in ("/v/other/", "/v/other/@facts", "/v/other/@message", "/v/other/@cellimg.js"):
        assert browser.ask(wrong)[0] == 404
    assert browser.ask("/v/other/@message", b"{}")[0] in (404, 405)


def test_names_of_layers_cannot_end_the_script(page: Any) -> None:
    with view({"a<b": lazy()}) as v:
        _, html = page(v).ask("")
        assert b"a<b" not in html


def test_messages_that_make_no_sense(shown: View, page: Any, caplog: Any) -> None:
    browser = page(shown)
    assert browser.ask("@message", b"{")[0] == 400
    assert browser.ask("@message", b"[1]")[0] == 400
    status, reply = browser.tell({"kind": "undo"})
    assert status == 400
    assert "nothing is painted" in reply["error"]
    shown.add("painted", ci.Source(np.zeros((8, 20, 30), "u1")))
    shown.paint("painted")
    assert browser.tell({"kind": "stroke"})[0] == 400
    assert browser.tell({"kind": "larger"})[0] == 200
    assert not caplog.records


def test_a_change_is_told_once_for_its_layer_only(page: Any) -> None:
    source = ci.Source(np.zeros((20, 30), "u1"), cell_shape=10)
    layers = {"a": ci.map_cells(np.copy, source, dtype="u1"), "b": lazy((20, 30))}
    with view(layers) as v:
        facts = page(v).facts()
        first = next(facts)
        assert {name: fact["edition"] for name, fact in first["layers"].items()} == {"a": 0, "b": 0}
        assert first["layers"]["a"]["prefix"] == f"{v.server.url}/a/"
        until(lambda: v.num_open == 1)
        source[0, 0] = 1
        second = next(facts)
        assert {name: fact["edition"] for name, fact in second["layers"].items()} == {
            "a": 1,
            "b": 0,
        }
        layers["b"].invalidate()
        assert next(facts)["layers"]["b"]["edition"] == 1
        # The state that all pages share is left alone: to set it would draw all layers anew.
        assert "@edition" not in str(v.viewer.state.to_json())
    assert list(facts) == []


def test_a_burst_of_changes_is_told_as_few(page: Any) -> None:
    source = ci.Source(np.zeros((20, 30), "u1"), cell_shape=10)
    with view({"a": source}) as v:
        facts = page(v).facts()
        next(facts)
        for value in range(1, 201):
            source[0, 0] = value
        told = [next(facts)["layers"]["a"]["edition"]]
        while told[-1] < 200:
            told.append(next(facts)["layers"]["a"]["edition"])
        assert told[-1] == 200
        assert told == sorted(set(told))


# ------------------------------------------------------------------ beginning and end


def test_how_it_says_what_it_is(shown: View) -> None:
    assert repr(shown) == f"<View {shown.url}: raw, labels>"
    html = shown._repr_html_()
    assert f'<iframe src="{shown.url}"' in html
    assert f'<a href="{shown.url}"' in html
    assert shown.url.startswith("http://127.0.0.1:")
    shown.close()
    shown.close()
    assert shown.closed
    assert repr(shown) == "<View closed: raw, labels>"
    assert "<iframe" not in shown._repr_html_()
    for use in (
        lambda: shown.paint("labels"),
        lambda: shown.landmarks("raw", "labels"),
        lambda: shown.select("labels", [1]),
        lambda: shown.add("more", lazy()),
    ):
        with pytest.raises(ValueError, match="the view is closed"):
            use()


def test_nothing_is_left(footprint: Any) -> None:
    with view({"image": lazy()}):
        pass
    before = footprint()
    for _ in range(3):
        with view({"image": lazy()}) as v:
            v.viewer.state  # noqa: B018
    assert footprint() == before


def test_a_port_that_is_taken(footprint: Any) -> None:
    with view({"image": lazy()}) as v:
        taken = urlsplit(v.url).port
        gc.collect()
        before = footprint()
        with pytest.raises(OSError, match="in use"):
            view({"image": lazy()}, port=taken)
        gc.collect()
        after = footprint()
        # Others may have had some.
        assert after.pop("descriptors") <= before.pop("descriptors")
        assert after == before


def test_wrong_arguments_leave_nothing_behind(footprint: Any) -> None:
    before = footprint()
    with pytest.raises(ValueError, match="layout must be one of"):
        view({"image": lazy()}, layout="nice")
    with pytest.raises(ValueError, match="measured in"):
        view({"a": lazy(units="um"), "b": lazy(scale=2)})
    with pytest.raises((TypeError, ValueError), match="layer 'a'"):
        view({"a": "image.zarr"})
    with pytest.raises(PermissionError, match="can be reached by other machines"):
        view({"image": lazy()}, host="0.0.0.0")
    assert footprint()["threads"] == before["threads"]


def test_without_neuroglancer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scene", "frame"):
        monkeypatch.delitem(sys.modules, f"cellimg_dask.viewer.{name}", raising=False)
    monkeypatch.delattr("cellimg_dask.viewer.scene", raising=False)
    monkeypatch.delattr("cellimg_dask.viewer.frame", raising=False)
    monkeypatch.setitem(sys.modules, "neuroglancer", None)
    with pytest.raises(ImportError, match="pip install 'cellimg-dask\\[view\\]'"):
        view({"image": lazy()})


def test_strangers_cannot_fill_the_memory(shown: View) -> None:
    parts = urlsplit(shown.url)
    for path in ("/nothing", "/state/wrong", "/v/wrong/@message"):
        with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S) as stream:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 200000000\r\n\r\n"
            stream.sendall(head.encode())
            # Before anything of it was sent.
            assert stream.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_names_that_others_need() -> None:
    with pytest.raises(
        ValueError, match="'work on a' is in the viewer already, on account of layer"
    ):
        view({"a": lazy(), "work on a": lazy()}, work=True)
    with pytest.raises(ValueError, match="call layer 'a' something else"):
        view({"work on a": lazy(), "a": lazy()}, work=True)
    with view({"a": lazy(), "work on a": lazy(), "landmarks of a": lazy()}) as v:
        assert len(v.viewer.state.layers) == 3
        with pytest.raises(ValueError, match="'landmarks of a' is called as"):
            v.landmarks("a", "work on a")


def test_a_page_server_without_descriptors_rests(
    monkeypatch: pytest.MonkeyPatch, shown: View, page: Any, caplog: Any
) -> None:
    events: list[int] = []
    rests, goes_on = threading.Event(), threading.Event()
    frame = shown._frame
    update = frame._io_loop.update_handler

    def noted(descriptor: int, event: int) -> None:
        update(descriptor, event)
        events.append(event)
        (goes_on if event else rests).set()

    monkeypatch.setattr(frame._io_loop, "update_handler", noted)
    monkeypatch.setattr("cellimg_dask.viewer.frame._REST_S", 0.05)
    context = {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")}
    frame.loop.call_soon_threadsafe(frame._on_error, frame.loop, context)
    assert rests.wait(PATIENCE_S)
    assert goes_on.wait(PATIENCE_S)
    assert events == [0, frame._io_loop.READ]
    assert page(shown).ask("")[0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_page_takes_no_more_connections_than_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellimg_dask.viewer.frame.most_connections", lambda: 3)
    with view({"image": lazy()}) as v, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", urlsplit(v.url).port)
        for _ in range(3):
            stack.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
        until(lambda: len(v._frame.http_server._connections) == 3)
        with socket.create_connection(address, timeout=PATIENCE_S) as stream:
            assert stream.recv(1) == b""


def test_an_address_for_once(shown: View, page: Any) -> None:
    asked = page(shown)
    once = urlsplit(shown._frame.address_for_once()).path
    assert shown._frame.token not in once
    asked.connection.request("GET", once)
    reply = asked.connection.getresponse()
    reply.read()
    assert (reply.status, reply.getheader("location")) == (302, urlsplit(shown.url).path)
    assert reply.getheader("referrer-policy") == "no-referrer"
    assert asked.ask(once)[0] == 404
    assert asked.ask("/once/")[0] == 404


def test_no_browser_is_told_the_token_on_its_command_line(
    monkeypatch: pytest.MonkeyPatch, shown: View
) -> None:
    told: list[str] = []

    class Told:
        def __init__(self, url: str, size: Any) -> None:
            told.append(url)

        is_running = True

        def close(self) -> None:
            pass

    monkeypatch.setattr("cellimg_dask.viewer.view.Browser", Told)
    monkeypatch.setattr("webbrowser.open_new", told.append)
    shown.open_browser()
    with pytest.raises(TimeoutError):
        shown.wait(timeout=0.01)
    assert len(told) == 2
    assert not any(shown._frame.token in url or shown.server.token in url for url in told)


def test_waiting_ends_with_the_view(monkeypatch: pytest.MonkeyPatch, pool: Any) -> None:
    started = threading.Event()

    class Blind:
        def __init__(self, url: str, size: Any) -> None:
            started.set()

        is_running = True

        def close(self) -> None:
            pass

    monkeypatch.setattr("cellimg_dask.viewer.view.Browser", Blind)
    with view({"image": lazy()}) as v:
        v._by_address = True
        waits = [pool.submit(v.wait, None), pool.submit(v.wait, None)]
        assert started.wait(PATIENCE_S)
        # One draws, the other waits its turn.
        with pytest.raises(TimeoutError, match="another picture"):
            v.wait(0)
    for each in waits:
        with pytest.raises(ValueError, match="the view is closed"):
            each.result(PATIENCE_S)


@pytest.mark.parametrize("by", ["landmarks", "page"])
def test_a_view_may_be_closed_by_who_was_told_of_something(by: str, page: Any) -> None:
    source = ci.Source(np.zeros((8, 20, 30), "u1"))
    v = view({"a": source, "b": source})
    closed = threading.Event()

    def close(_: Any) -> None:
        v.close()
        closed.set()

    if by == "landmarks":
        marks = v.landmarks("a", "b")
        marks.on_change(close)
        marks.add((1, 1, 1), (1, 1, 1))
    else:
        v.paint("a", size=1)
        callback = source.on_dirty(close)
        plane = [[1, 0, 0], [0, 1, 0]]
        shown = {"names": ["x", "y", "z"], "scales": [1] * 3, "units": [""] * 3}
        message = {"kind": "stroke", "stroke": "a", "points": [[1, 1, 1]], "plane": plane}
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            page(v).tell({**message, "erase": False, "end": True, "space": shown})
        del callback
    assert closed.wait(PATIENCE_S)
    assert v.server.closed
    v._frame._thread.join(PATIENCE_S)
    assert not v._frame._thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_off_does_not_keep_the_ports() -> None:
    with view({"image": lazy()}) as v:
        ports = urlsplit(v.url).port, v.server.port
        read, write = os.pipe()
        ready, is_ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(is_ready, b"x")
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.read(ready, 1)
        for each in (read, ready, is_ready):
            os.close(each)
    try:
        for port in ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_the_page_of_a_view_at_an_address_of_ip_6() -> None:
    try:
        v = view({"image": lazy()}, host="::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with v:
        assert urlsplit(v.url).hostname == "::1"
        assert urlsplit(v._frame.address_for_once()).hostname == "::1"


def test_pictures_without_any_browser(monkeypatch: pytest.MonkeyPatch, shown: View) -> None:
    monkeypatch.setattr("cellimg_dask.viewer.browser.find_browser", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"open view\.url in a browser"):
        shown.screenshot()
    with pytest.raises((TypeError, ValueError), match="size"):
        shown.screenshot(size=(0, 10))


def test_a_view_without_a_token_is_not_open_to_all_pages() -> None:
    with pytest.raises(ValueError, match="a view needs a token"):
        view(lazy(), token=None)
    with view(lazy(), token=None, allow_origin="http://localhost:1") as shown:
        assert shown.server.token is None
    with view(lazy(), token="chosen") as shown:
        assert shown.server.token == "chosen"


def test_of_a_hidden_layer_nothing_is_computed_until_it_is_shown() -> None:
    image = ci.map_cells(np.copy, np.arange(8000).reshape(20, 20, 20), dtype="i8", cell_shape=10)
    with view({"below": lazy(), "hidden": Layer(image, visible=False)}) as shown:
        shown.show("hidden", opacity=0.5)
        assert image.stats().loads == 0
        assert list(shown._contrasts.unseen) == ["hidden"]
        shown.show("hidden", visible=True)
        until(lambda: shown.viewer.state.layers["hidden"].shader_controls.to_json() != {})
        assert image.stats().loads == 1
        assert not shown._contrasts.unseen
        shown.add("other", Layer(image, visible=False))
        shown.remove("other")
        assert not shown._contrasts.unseen


def test_a_view_without_layers_says_so() -> None:
    with view() as shown:
        for ask in (
            lambda: shown.position,
            lambda: shown.zoom(1),
            lambda: shown.move_to((0, 0, 0)),
        ):
            with pytest.raises(ValueError, match="the view has no layers yet"):
                ask()
