"""The graph of an image: what it rests on, as text and as a picture."""

from __future__ import annotations

import gc
import pickle
import re
import xml.etree.ElementTree as ET
from html import unescape
from itertools import pairwise

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cellimg_dask as ci
from cellimg_dask.image.drawing import CACHED, DIRTY, UNSAVED, Card, draw
from cellimg_dask.image.graph import Graph
from cellimg_dask.image.layers import layered


def plus(array, *others, offset=0):
    return array + offset


def mapped(*inputs, **kwargs) -> ci.CellImg:
    return ci.map_cells(plus, *inputs, dtype="f8", **kwargs)


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def svg_of(graph: Graph) -> ET.Element:
    return ET.fromstring(graph._repr_svg_())


def cards_of(svg: ET.Element) -> list[tuple[float, float, float, float]]:
    """Return (left, top, right, bottom) of each box."""
    return [
        (x, y, x + width, y + height)
        for rect in svg.iter("{http://www.w3.org/2000/svg}rect")
        if rect.get("class") == "card"
        for x, y, width, height in [[float(rect.get(k, "")) for k in ("x", "y", "width", "height")]]
    ]


def texts_of(svg: ET.Element) -> list[str]:
    return [text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text")]


# ---------------------------------------------------------------------- what is in it


def test_a_diamond_has_its_top_once_and_is_referred_to_by_number():
    top = mapped(np.zeros((8, 6)), cell_shape=(4, 2), halo=1, boundary="reflect")
    left = mapped(top, params={"offset": 1})
    right = mapped(top, halo=((2, 0), (0, 0)))
    bottom = mapped(left, ci.Input(right, halo=1, boundary="edge"))
    bottom[:4, :2]
    table = [re.split(r"\s{2,}", line) for line in repr(bottom.graph()).splitlines()]
    shape = ["(8, 6)", "float64"]
    cells = [*shape, "6 cells of (4, 2)"]
    assert table == [
        ["Graph of 4 images on 1 input"],
        ["#", "what", "shape", "dtype", "cells", "cached", "dirty", "reads"],
        ["1", "NumPy array", *shape, "in memory"],
        ["2", "plus", *cells, "4", "0", "#1: halo 1, reflect"],
        ["3", "plus(offset=1)", *cells, "1", "0", "#2: halo 0"],
        ["4", "plus", *cells, "4", "0", "#2: halo ((2, 0), 0), none"],
        ["5", "plus", *cells, "1", "0", "#3: halo 0; #4: halo 1, edge"],
    ]


def test_nothing_is_computed():
    def never(array):
        raise AssertionError

    image = ci.map_cells(never, np.zeros(4), dtype="f8")
    graph = image.graph()
    repr(graph), graph._repr_html_(), graph._repr_svg_()
    assert image.stats().loads == image.stats().errors == 0


def test_dirty_cells_are_counted_until_they_are_computed_again():
    source = ci.Source(np.zeros((8, 8)), cell_shape=2)
    first = mapped(source)
    second = mapped(first, halo=1)
    second[...]
    source[0, 0] = 1
    _, one, two = second.graph().nodes
    assert (one.cached, one.dirty) == (15, 1)
    # Of the first one a whole cell changes, with its neighbours' halos.
    assert (two.cached, two.dirty) == (12, 4)
    source[2, 2] = 1
    two = second.graph().nodes[2]
    assert (two.cached, two.dirty) == (7, 9)
    second[:2, :2]
    _, one, two = second.graph().nodes
    assert (one.cached, one.dirty) == (16, 0)
    assert (two.cached, two.dirty) == (8, 8)


def test_a_graph_tells_of_the_moment_when_it_was_made():
    source = ci.Source(np.zeros(4), cell_shape=2)
    image = mapped(source)
    image[...]
    before = image.graph()
    text = repr(before)
    source[0] = 1
    assert repr(before) == text
    assert repr(image.graph()) != text


def test_a_source_in_a_store_tells_what_is_cached_and_not_saved(tmp_path):
    array = zarr.create_array(tmp_path / "mask.zarr", shape=(8, 8), chunks=(2, 2), dtype="u1")
    source = ci.Source(array, 4, save="later")
    image = mapped(source)
    image[:1]
    source[0, :5] = 1
    node = image.graph().nodes[0]
    assert (node.name, node.kind) == ("Source in zarr array mask.zarr", "source")
    assert (node.num_cells, node.cell_shape) == (4, (4, 4))
    assert (node.cached, node.unsaved) == (2, 2)
    line = repr(image.graph()).splitlines()[2]
    assert re.split(r"\s{2,}", line)[-3:] == ["4 cells of (4, 4)", "2", "2"]
    source.persist()
    assert image.graph().nodes[0].unsaved == 0
    source.close()


def test_a_source_in_memory():
    (node, _) = mapped(ci.Source(np.zeros((4, 4)), cell_shape=2)).graph().nodes
    assert (node.name, node.kind, node.cached, node.unsaved) == ("Source", "source", None, 0)
    assert node.is_in_memory


def test_stores_have_chunks(tmp_path):
    store = zarr.create_array(tmp_path / "raw.zarr", shape=(8, 8), chunks=(2, 4), dtype="f4")
    store[...] = 1
    image = mapped(store, cell_shape=4)
    image[0, 0]
    node = image.graph().nodes[0]
    assert (node.name, node.kind, node.unsaved) == ("zarr array raw.zarr", "array", 0)
    assert (node.num_cells, node.cell_shape, node.cached) == (8, (2, 4), 2)
    assert "8 chunks of (2, 4)" in repr(image.graph())


def test_dask_arrays_memory_maps_and_others(tmp_path):
    import dask.array as da

    class Mine:
        shape, dtype = (6,), np.dtype("u1")

        def __getitem__(self, key):
            return np.zeros(6, "u1")[key]

    file = np.memmap(tmp_path / "raw", dtype="u1", mode="w+", shape=(6,))
    # Five in one chunk and one in another.
    dask_array = da.concatenate([da.zeros(5, chunks=5), da.zeros(1)])
    image = mapped(file, dask_array, Mine(), np.float64(3))
    graph = image.graph()
    assert names(graph) == ["memory map", "dask array", "Mine", "NumPy array", "plus"]
    assert [node.is_in_memory for node in graph] == [False, False, False, True, False]
    assert (graph.nodes[1].num_cells, graph.nodes[1].cell_shape) == (2, None)
    assert graph.nodes[4].reads[3].halo == "whole"


def test_one_array_of_two_images_is_one_input_and_two_views_are_two():
    array = np.zeros((6, 6))
    image = mapped(mapped(array), array, array[::-1])
    assert names(image.graph()) == ["NumPy array", "plus", "NumPy array", "plus"]
    assert [link.number for link in image.graph().nodes[-1].reads] == [2, 1, 3]


def test_one_store_of_two_images_is_one_input_also_in_a_snapshot(tmp_path):
    store = zarr.create_array(tmp_path / "raw.zarr", shape=(8,), chunks=(2,), dtype="f4")
    image = mapped(mapped(store), store)
    assert names(image.graph()) == ["zarr array raw.zarr", "plus", "plus"]
    assert names(image.snapshot().graph()) == ["zarr array raw.zarr", "plus", "plus"]


def test_an_index_map_is_named():
    array = ci.Input(np.zeros(4), index_map=lambda roi: roi, halo=2, boundary="wrap")
    image = ci.fill_cells(lambda block: None, ci.CellGrid((4,), 2), array, dtype="u1")
    assert image.graph().nodes[-1].reads[0].halo == "halo 2, wrap, index_map"


# ---------------------------------------------------------------------- kinds of images


def test_frozen_images_and_snapshots_are_marked_wherever_they_stand():
    source = ci.Source(np.zeros(8), cell_shape=2)
    first = mapped(source)
    second = mapped(first)
    first.freeze()
    assert [node.mark for node in second.graph()] == ["", "frozen", ""]
    assert "plus [frozen]" in repr(second.graph())
    assert any("[frozen]" in text for text in texts_of(svg_of(second.graph())))
    first.thaw()
    assert [node.mark for node in second.graph()] == ["", "", ""]
    third = mapped(second.snapshot())
    assert [node.mark for node in third.graph()] == ["", "", "snapshot", ""]
    assert "plus [snapshot]" in repr(third.graph())


def test_a_snapshot_counts_its_own_cells():
    source = ci.Source(np.zeros(8), cell_shape=2)
    image = mapped(source)
    image[...]
    before = image.snapshot()
    source[0] = 1
    source[2] = 1
    image[:2]
    now, then = image.graph().nodes[-1], before.graph().nodes[-1]
    assert (now.cached, now.dirty) == (3, 1)
    assert (then.cached, then.dirty) == (2, 0)
    assert "3 cells," in repr(image)
    assert "2 cells," in repr(before)
    before[:2]
    assert before.graph().nodes[-1].cached == 3
    assert image.graph().nodes[-1].cached == 3


def test_other_parameters_have_other_cells():
    image = mapped(np.zeros(8), cell_shape=2, params={"offset": 1})
    image[...]
    image.set_params(offset=2)
    assert (names(image.graph())[-1], image.graph().nodes[-1].cached) == ("plus(offset=2)", 0)
    image.set_params(offset=1)
    assert image.graph().nodes[-1].cached == 4


def test_images_upstream_that_nobody_else_holds():
    image = mapped(mapped(mapped(np.zeros(4))))
    gc.collect()
    assert names(image.graph()) == ["NumPy array", "plus", "plus", "plus"]


def test_an_unpickled_image():
    source = ci.Source(np.zeros(4), cell_shape=2)
    top = mapped(source)
    image = mapped(top, mapped(top))
    image[...]
    graph = pickle.loads(pickle.dumps(image)).graph()
    assert names(graph) == ["NumPy array", "plus", "plus", "plus"]
    assert [link.number for link in graph.nodes[-1].reads] == [2, 3]
    assert [node.cached for node in graph] == [None, 0, 0, 0]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_images_without_axes_or_voxels(shape):
    graph = mapped(np.zeros(shape)).graph()
    assert len(graph) == 2
    assert f"{shape}" in repr(graph)
    assert len(cards_of(svg_of(graph))) == 2


def test_an_image_without_inputs():
    image = ci.fill_cells(lambda block: None, ci.CellGrid((4,), 2), dtype="u1")
    graph = image.graph()
    assert repr(graph).splitlines() == [
        "Graph of 1 image",
        "#  what      shape  dtype  cells            cached  dirty",
        "1  <lambda>  (4,)   uint8  2 cells of (2,)       0      0",
    ]
    assert len(cards_of(svg_of(graph))) == 1


def test_a_chain_of_a_thousand_images():
    image = mapped(np.zeros(4))
    for _ in range(999):
        image = mapped(image)
    graph = image.graph()
    assert len(graph) == 1001
    assert [[link.number for link in node.reads] for node in graph.nodes[1:]] == [
        [number] for number in range(1, 1001)
    ]
    lines = repr(graph).splitlines()
    assert len(lines) == 63
    assert "… 941 more …" in lines
    assert lines[-1].startswith("1001  plus")
    assert len(cards_of(svg_of(graph))) == 1001


def test_long_odd_names_are_shortened_and_escaped(tmp_path):
    def odd(a, **params):
        return a

    odd.__qualname__ = "<b>&\x00 a'b\"" + 60 * "x"
    image = ci.map_cells(odd, np.zeros(4), dtype="f8", params={"many": np.zeros(10**5)})
    graph = image.graph()
    assert graph.nodes[-1].name == "<b>&? a'b\"" + 29 * "x" + "…"
    assert texts_of(svg_of(graph))[-5].startswith("#2 <b>&? a'b\"xxx")
    graph.save(tmp_path / "odd.svg")
    ET.parse(tmp_path / "odd.svg")


def test_a_local_function_goes_by_its_last_name():
    def inner(array):
        return array

    assert names(ci.map_cells(inner, np.zeros(4), dtype="f8").graph())[-1] == "inner"


# ---------------------------------------------------------------------- the picture


def mesh(reads: list[list[int]]) -> list[Card]:
    lines = ["line"] * 3
    return [
        Card(f"#{number}", lines[: number % 4], above, "#fff", "#000")
        for number, above in enumerate(reads)
    ]


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    """Return what each of some boxes reads, each but the last being read by another."""
    count = draw(st.integers(1, 14))
    reads: list[list[int]] = [[] for _ in range(count)]
    for box in range(1, count):
        reads[box] = draw(st.lists(st.integers(0, box - 1), max_size=3, unique=True))
    for box in range(count - 1):
        if all(box not in above for above in reads[box + 1 :]):
            reads[draw(st.integers(box + 1, count - 1))].append(box)
    return reads


@given(reads=graphs())
@settings(max_examples=80)
def test_boxes_do_not_overlap_and_stand_below_what_they_read(reads):
    svg = ET.fromstring(draw(mesh(reads)))
    boxes = cards_of(svg)
    width, height = float(svg.get("width", "")), float(svg.get("height", ""))
    assert len(boxes) == len(reads)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        for other in range(number):
            a, b, c, d = boxes[other]
            assert right < a or c < left or bottom < b or d < top
        for above in reads[number]:
            assert boxes[above][3] < top


@given(reads=graphs())
@settings(max_examples=80)
def test_lines_pass_between_the_boxes_and_join_what_they_should(reads):
    layers = layered(reads)
    below: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for upper, lower in layers.segments:
        assert lower[1] == upper[1] + 1
        assert upper[0] == lower[0] or layers.row[lower[0]] == lower[1]
        below.setdefault(upper, []).append(lower)
    for box in range(len(reads)):
        found, todo = set(), [(box, layers.row[box])]
        while todo:
            for lower in below.get(todo.pop(), []):
                if lower[0] == box:
                    todo.append(lower)
                else:
                    found.add(lower[0])
        assert found == {other for other, above in enumerate(reads) if box in above}
    for row in layers.rows:
        for left, right in pairwise(row):
            sizes = [1.0 if layers.row[box] == own else 0.0 for box, own in (left, right)]
            assert layers.centre[right] - layers.centre[left] > sum(sizes) / 2


def test_the_order_in_a_row_avoids_a_crossing():
    # 0 and 1 are read crosswise by 3 and 2.
    layers = layered([[], [], [1], [0], [2, 3]])
    tops = [box for box, _ in layers.rows[0]]
    middle = [box for box, _ in layers.rows[1]]
    assert [(2, 3).index(box) for box in middle] == [(1, 0).index(box) for box in tops]


def test_a_long_line_is_drawn_once_for_all_that_it_leads_to():
    # 0 is read by everybody.
    reads = [[], [0], [1, 0], [2, 0], [3, 0]]
    assert len(layered(reads).segments) == 7 + 3


def bars_of(svg: ET.Element) -> dict[str, list[float]]:
    """Return the widths of the coloured parts of all bars."""
    found: dict[str, list[float]] = {CACHED: [], DIRTY: [], UNSAVED: []}
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        if rect.get("fill") in found and rect.get("height") == "7":
            found[rect.get("fill", "")].append(float(rect.get("width", "")))
    return found


def test_bars_show_shares():
    source = ci.Source(np.zeros(8), cell_shape=2)
    image = mapped(source)
    image[:6]
    source[0] = 1
    svg = svg_of(image.graph())
    bars = bars_of(svg)
    (cached,), (dirty,) = bars[CACHED], bars[DIRTY]
    assert cached == pytest.approx(2 * dirty, abs=0.16)
    assert bars[UNSAVED] == [0.0]
    assert "2 cached, 1 dirty" in texts_of(svg)
    assert [text for text in texts_of(svg) if text in ("cached", "dirty", "not saved")] == [
        "cached",
        "dirty",
    ]


def test_a_bar_never_leaves_its_room():
    bar = [(UNSAVED, 0.5), (CACHED, 1.0), (DIRTY, 0.001)]
    bars = bars_of(ET.fromstring(draw([Card("all", [], [], "#fff", "#000", bar=bar)])))
    whole = 2 * bars[UNSAVED][0]
    assert bars[CACHED] == [pytest.approx(whole / 2, abs=0.1)]
    assert bars[DIRTY] == [0.0]


def test_the_picture_in_a_notebook_and_in_a_file(tmp_path):
    graph = mapped(np.zeros(4)).graph()
    assert graph._repr_svg_() in graph._repr_html_()
    graph.save(str(tmp_path / "graph.svg"))
    saved = (tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert saved == graph._repr_svg_()
    assert "NumPy array" in unescape(saved)
    with pytest.raises(ValueError, match=r"ends with \.svg"):
        graph.save(tmp_path / "graph.png")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.svg"]
