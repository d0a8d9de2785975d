"""What may be a layer, and what is known of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.geometry import Space
from cellimg_dask.server.layers import Layer, Layers, as_layers

IMAGE = np.arange(24, dtype="u2").reshape(4, 6)


def lazily(array, **more):
    return ci.map_cells(np.copy, array, dtype=array.dtype, **more)


def test_a_lazy_image_is_served_as_it_is():
    image = lazily(IMAGE)
    layer = Layer(image)
    assert layer.image is image
    assert (layer.kind, layer.shape, layer.dtype) == ("image", (4, 6), np.dtype("u2"))
    assert layer.fill_value == 0
    assert layer.visible
    assert layer.contrast is layer.color is layer.opacity is None


def test_arrays_of_all_kinds_keep_their_chunks_and_are_not_kept_twice():
    da = pytest.importorskip("dask.array")
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array({}, shape=(4, 6), chunks=(2, 3), dtype="u2")
    stored[...] = IMAGE
    for array, cells in [
        (da.from_array(IMAGE, chunks=(2, 4)), (2, 4)),
        (stored, (2, 3)),
        (ci.Source(IMAGE, cell_shape=(3, 2)), (3, 2)),
        (IMAGE.astype(">u2"), None),
        (ci.Input(IMAGE, space=Space.of(2, "yx")), None),
    ]:
        layer = Layer(array)
        assert layer.given is array
        np.testing.assert_array_equal(np.asarray(layer.image), IMAGE)
        assert layer.dtype == np.dtype("u2")
        assert cells is None or layer.image.cell_shape == cells
        assert not layer.image.loader.held()


def test_an_edit_of_a_source_is_followed():
    source = ci.Source(IMAGE)
    layer = Layer(source)
    source[0, 0] = 99
    assert layer.image[0, 0] == 99


def test_an_opened_image_has_the_levels_of_its_file(tmp_path):
    image = lazily(IMAGE, cell_shape=2).with_space(axes="yx", units="um", scale=0.5)
    ci.write_ome_zarr(image, tmp_path / "it.zarr", levels=3, progress=False)
    ci.write_ome_zarr(ci.label(IMAGE > 3), tmp_path / "labels.zarr", progress=False)
    stored = ci.open_image(tmp_path / "it.zarr")
    layer = Layer(stored)
    assert layer.kind == "image"
    assert layer.image.cell_shape == (2, 2)
    assert layer.spaces == tuple(level.space for level in stored.levels)
    for served, expected in zip(layer.images, ci.pyramid(image, 3), strict=True):
        np.testing.assert_array_equal(np.asarray(served), np.asarray(expected))
    assert len(Layer(stored.levels[1]).images) == 2
    assert len(Layer(stored, levels=()).images) == 1
    assert Layer(ci.open_image(tmp_path / "labels.zarr")).kind == "labels"


def test_labels_are_recognised():
    labels = ci.label(IMAGE > 3)
    assert Layer(labels).kind == "labels"
    assert Layer([labels]).kind == "labels"
    assert Layer(ci.pyramid(labels, 2, "labels")).kind == "labels"
    assert Layer(ci.pyramid(IMAGE, 2, "labels")).kind == "labels"
    assert Layer(ci.pyramid(IMAGE, 2)).kind == "image"
    assert Layer(IMAGE, kind="labels").kind == "labels"
    assert Layer(labels, kind="image").kind == "image"


def test_a_pyramid_has_its_levels_and_where_they_lie():
    image = lazily(IMAGE).with_space(axes="yx", units="um", scale=(2, 0.5), translation=1)
    pyramid = ci.pyramid(image, 3)
    layer = Layer(pyramid)
    assert layer.images == pyramid.levels
    assert layer.spaces == tuple(level.space for level in pyramid)
    assert layer.spaces[1].translation == (2, 1.25)


def test_levels_can_be_had_by_number():
    image = lazily(IMAGE)
    assert len(Layer(image).images) == 1
    layer = Layer(image, levels=3)
    assert [part.shape for part in layer.images] == [(4, 6), (2, 3), (1, 2)]
    assert layer.images[0] is image
    labels = Layer(IMAGE, kind="labels", levels=2)
    np.testing.assert_array_equal(
        np.asarray(labels.images[1]), np.asarray(ci.pyramid(IMAGE, 2, "labels")[1])
    )


def test_levels_that_do_not_say_where_they_lie_are_placed_by_their_shapes():
    base = lazily(IMAGE).with_space(axes="yx", units="um", scale=(4, 0.5), translation=(8, 0))
    half = IMAGE[::2, ::2]
    (_, space) = Layer([base, half]).spaces
    assert space == Space.of(2, "yx", "um", (8, 1), (10, 0.25))
    # As the base is: nobody has said anything of the level.
    (_, space) = Layer(base, levels=[lazily(half).with_space(base.space)]).spaces
    assert space == Space.of(2, "yx", "um", (8, 1), (10, 0.25))
    own = lazily(half).with_space(scale=(7, 3), translation=1)
    (_, space) = Layer(base, levels=[own]).spaces
    assert space == Space.of(2, "yx", "um", (7, 3), 1)


@pytest.mark.parametrize(
    ("extent", "shorter", "factor"),
    [(8, 8, 1), (8, 4, 2), (7, 4, 2), (7, 2, 4), (9, 3, 3), (10, 4, 3), (100, 34, 3), (5, 4, 1.25)],
)
def test_how_many_voxels_make_one_follows_from_the_shapes(extent, shorter, factor):
    layer = Layer([np.zeros(extent), np.zeros(shorter)])
    assert layer.spaces[1].scale == (factor,)
    assert layer.spaces[1].translation == ((factor - 1) / 2,)


@pytest.mark.parametrize(
    ("image", "more", "error", "match"),
    [
        ([], {}, ValueError, "one level at least"),
        ([[1, 2]], {}, TypeError, "numpy.asarray"),
        ("image.zarr", {}, TypeError, "open_image"),
        (5, {}, TypeError, "shape"),
        (Layer(IMAGE), {}, TypeError, "a Layer already"),
        (IMAGE, {"kind": "mask"}, ValueError, "kind"),
        (IMAGE.astype(float), {"kind": "labels"}, ValueError, "labels are integers"),
        (IMAGE, {"levels": "all"}, TypeError, "levels"),
        (IMAGE, {"levels": True}, TypeError, "levels"),
        (IMAGE, {"levels": 0}, ValueError, "levels"),
        (IMAGE, {"levels": [IMAGE[0]]}, ValueError, "level 1 has 1 axes"),
        (IMAGE, {"levels": [IMAGE[::2].astype("f4")]}, ValueError, "level 1 has dtype float32"),
        (IMAGE[::2], {"levels": [IMAGE]}, ValueError, "from fine to coarse"),
        (IMAGE, {"contrast": 5}, TypeError, "contrast"),
        (IMAGE, {"contrast": (1, 2, 3)}, TypeError, "contrast"),
        (IMAGE, {"contrast": (1, "2")}, TypeError, "contrast"),
        (IMAGE, {"contrast": (3, 3)}, ValueError, "contrast"),
        (IMAGE, {"contrast": (0, np.inf)}, ValueError, "contrast"),
        (IMAGE, {"color": "url(x)"}, ValueError, "color"),
        (IMAGE, {"color": "reddish"}, ValueError, "a name that CSS knows"),
        (IMAGE, {"color": (1, 0)}, ValueError, "color"),
        (IMAGE, {"color": (1, 0, 2)}, ValueError, "color"),
        (IMAGE, {"color": 3}, TypeError, "color"),
        (IMAGE, {"opacity": 1.5}, ValueError, "opacity"),
        (IMAGE, {"opacity": "half"}, TypeError, "opacity"),
        (IMAGE, {"fill_value": -1}, ValueError, "fill_value"),
        (np.zeros(3, np.longdouble), {}, ValueError, "cannot be served"),
        (np.zeros(3, "M8"), {}, ValueError, "need to know the unit"),
    ],
)
def test_what_cannot_be_a_layer_is_refused(image, more, error, match):
    with pytest.raises(error, match=match):
        Layer(image, **more)


def test_of_several_factors_that_fit_the_one_of_the_other_axes_is_meant():
    layer = Layer([np.zeros((6, 64, 5, 1)), np.zeros((2, 16, 5, 1))])
    assert layer.spaces[1].scale == (4, 4, 1, 1)
    assert Layer([np.zeros((6, 5)), np.zeros((2, 1))]).spaces[1].scale == (3, 5)
    assert Layer([np.zeros((9, 9)), np.zeros((3, 5))]).spaces[1].scale == (3, 2)
    huge = ci.CellGrid((3 * 10**9,) * 2, 10**5), ci.CellGrid((2, 10**9), 10**5)
    images = [ci.fill_cells(lambda block: None, grid, dtype="u1") for grid in huge]
    assert Layer(images).spaces[1].scale == (15 * 10**8, 3)


def test_looks_are_kept():
    layer = Layer(IMAGE, contrast=(np.int64(1), 5.5), color=(1, 0.5, 0), opacity=0.25, visible=0)
    assert layer.contrast == (1.0, 5.5)
    assert layer.color == "#ff8000"
    assert layer.opacity == 0.25
    assert layer.visible is False
    assert "image" in repr(layer)
    assert "(4, 6)" in repr(layer)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "@a",
        "a/b",
        "a\\b",
        "a?",
        "a#",
        "a%2f",
        "__a",
        "zarr.json",
        ".zattrs",
        "\n",
        "\ud800",
    ],
)
def test_names_that_cannot_be_part_of_an_address_are_refused(name):
    with pytest.raises(ValueError, match="a layer cannot be called"):
        as_layers({name: IMAGE})
    with pytest.raises(ValueError, match="a layer cannot be called"):
        Layers()[name] = IMAGE


def test_layers_are_a_mapping_of_what_was_given():
    layer = Layer(IMAGE)
    layers = Layers({"a b": IMAGE, "ä": layer})
    assert list(layers) == ["a b", "ä"]
    assert layers["ä"] is layer
    layers["c"] = IMAGE
    names = iter(layers)
    del layers["ä"]
    assert list(names) == ["a b", "ä", "c"]
    assert list(layers) == ["a b", "c"]
    assert len(layers) == 2
    assert "Layer" in repr(layers)
    with pytest.raises(KeyError):
        del layers["ä"]
    assert list(as_layers(IMAGE)) == ["image"]
    assert as_layers({}) == {} == as_layers([])
    with pytest.raises(TypeError, match="text"):
        as_layers({3: IMAGE})
    with pytest.raises(TypeError, match="layer 'it': "):
        as_layers({"it": "no image"})


def test_layers_added_by_several_threads_are_all_there(monkeypatch):
    layers = Layers()
    together = threading.Barrier(8)

    def slow(image):
        together.wait(30)
        return Layer(image)

    monkeypatch.setattr("cellimg_dask.server.layers.as_layer", slow)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: layers.__setitem__(f"it {n}", IMAGE), range(8)))
    assert sorted(layers) == [f"it {n}" for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(layers.__delitem__, list(layers)))
    assert not layers
