"""Functions that say what they take, in `map_cells` and the like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.bare.arrays import Array
from cellimg_dask.blocks.errors import ParameterError
from cellimg_dask.schemas.describe import describe

IMAGE = np.random.default_rng(0).integers(0, 1000, (20, 30)).astype("u2")
Image = Annotated[NDArray[np.uint16], Array(axes="yx", role="image", halo=(5, (6, 7)))]


def smooth(image: Image, sigma: float = 1.0) -> NDArray[np.float32]:
    assert type(sigma) is float
    return ndimage.gaussian_filter(image.astype("f4"), sigma, truncate=4)


def add(
    first: Image,
    second: Annotated[NDArray[np.floating[Any]], Array(axes="yx", halo=1)],
    *more: NDArray[np.integer[Any]],
    factor: int = 1,
) -> NDArray[np.float64]:
    return first[5:-5, 6:-7] + factor * second[1:-1, 1:-1] + sum(a[5:-5, 6:-7] for a in more)


def halos(image: ci.CellImg) -> list[Any]:
    return [(plan.halo.before, plan.halo.after) for plan in image.loader.planner.inputs]


def test_halo_and_dtype_come_from_the_schema():
    lazy = ci.map_cells(describe(smooth), IMAGE, cell_shape=8, params={"sigma": 1})
    assert lazy.dtype == "f4"
    assert halos(lazy) == [((5, 6), (5, 7))]
    np.testing.assert_array_equal(lazy[...], smooth(IMAGE, 1.0))
    assert lazy.loader.function.name == "smooth"


def test_what_is_given_goes_first():
    lazy = ci.map_cells(describe(smooth), IMAGE, halo=9, dtype="f8", cell_shape=8)
    assert lazy.dtype == "f8"
    assert halos(lazy) == [((9, 9), (9, 9))]
    item = ci.Input(IMAGE, halo=2)
    assert halos(ci.map_cells(describe(smooth), item, cell_shape=8)) == [((2, 2), (2, 2))]


def test_the_image_knows_the_function_itself():
    described = ci.map_cells(describe(smooth), IMAGE, params={"sigma": 1}, cell_shape=8)
    # So that its keys are those of the function, however it was given.
    assert described.loader.function.function is smooth
    assert described.loader.params == {"sigma": 1.0}


def test_every_input_has_its_own_halo_and_its_own_checks():
    flat = np.linspace(0, 1, IMAGE.size, dtype="f4").reshape(IMAGE.shape)
    schema = describe(add)
    lazy = ci.map_cells(
        schema, IMAGE, flat, IMAGE, params={"factor": 2}, cell_shape=8, boundary="reflect"
    )
    assert halos(lazy) == [((5, 6), (5, 7)), ((1, 1), (1, 1)), ((5, 6), (5, 7))]
    np.testing.assert_allclose(lazy[...], 2.0 * IMAGE + 2 * flat)
    with pytest.raises(TypeError, match=r"add takes first, second, more …; got 1 inputs"):
        ci.map_cells(schema, IMAGE)
    with pytest.raises(
        TypeError, match=r"input 1 \(second\) of add is of dtype uint16, expected floating"
    ):
        ci.map_cells(schema, IMAGE, IMAGE)
    with pytest.raises(
        ValueError, match=r"input 0 \(first\) of add has 1 axes \(shape \(30,\)\), expected 2: yx"
    ):
        ci.map_cells(schema, IMAGE[0], flat)


def test_params_are_checked_when_the_image_is_defined():
    with pytest.raises(ParameterError, match="sigma: expected a number, got '1'"):
        ci.map_cells(describe(smooth), IMAGE, params={"sigma": "1"})


@pytest.fixture
def described(tmp_path: Path) -> Any:
    """Write functions and a description of one of them."""

    def described(name: str, text: str, **more: Any) -> Any:
        (tmp_path / "functions_here.py").write_text(text)
        content = {"function": f"functions_here.py:{name}", "inputs": [{"name": "image"}]} | more
        path = tmp_path / "it.json"
        path.write_text(json.dumps(content))
        return describe(path)

    return described


def test_a_function_of_a_block_is_described_in_a_file(described):
    schema = described(
        "fill",
        "def fill(block): block.data[...] = block.params['factor'] * block.inputs[0][block.halo]",
        inputs=[{"name": "image", "halo": 1, "dtype": "uint16"}],
        outputs=[{"name": "result", "dtype": "int64"}],
        parameters={"properties": {"factor": {"type": "integer", "default": 3}}},
    )
    lazy = ci.fill_cells(schema, ci.CellGrid(IMAGE.shape, 8), IMAGE)
    assert lazy.dtype == "i8"
    assert halos(lazy) == [((1, 1), (1, 1))]
    np.testing.assert_array_equal(lazy[...], IMAGE * 3)
    with pytest.raises(ParameterError, match=r"factor: expected an integer, got 1\.5"):
        ci.fill_cells(schema, ci.CellGrid(IMAGE.shape, 8), IMAGE, params={"factor": 1.5})


OBJECTS = """
import numpy as np
from scipy import ndimage

def objects(image, above): return ndimage.label(image > above)[0]
def predict(model, image, above): return ndimage.label(image > above / model)[0]
def points(image, above): return np.argwhere(image > above)
def largest(image, above): return int(image.max()) + above
"""
ABOVE = {"properties": {"above": {"type": "number"}}, "required": ["above"]}


def test_labels_points_and_reductions_take_schemas(described):
    mask = np.zeros((12, 12), "u2")
    mask[2:5, 3:9] = 500
    wide = [{"name": "image", "dtype": ["uint16", "float32"], "halo": 4, "axes": "yx"}]
    schema = described("objects", OBJECTS, inputs=wide, parameters=ABOVE)
    labels = ci.map_labels(schema, mask, params={"above": 1}, cell_shape=6, consecutive=True)
    np.testing.assert_array_equal(labels[...], mask > 0)
    with pytest.raises(ParameterError, match="above: is missing: expected a number"):
        ci.map_labels(schema, mask, cell_shape=6)
    bare = described("objects", OBJECTS, parameters=ABOVE)
    with pytest.raises(TypeError, match="map_labels needs halo"):
        ci.map_labels(bare, mask, params={"above": 1})
    with pytest.raises(TypeError, match="segment needs halo"):
        ci.segment(bare, mask, params={"above": 1})
    predict = described("predict", OBJECTS, inputs=wide, parameters=ABOVE)
    for settings in ({"normalize": (0, 100)}, {}):
        found = ci.segment(
            predict, mask, load_model=lambda: 2.0, params={"above": 1}, cell_shape=6, **settings
        )
        assert found.num_objects() == 1
    points = ci.map_points(
        described("points", OBJECTS, inputs=wide, parameters=ABOVE),
        mask,
        params={"above": 1},
        cell_shape=6,
    )
    assert len(points.compute(scheduler="sync")) == 18
    largest = described("largest", OBJECTS, parameters=ABOVE)
    assert ci.reduce_cells(largest, max, mask, params={"above": 1}, cell_shape=6).result() == 501


def test_a_default_of_the_description_reaches_a_function_that_has_none(described):
    schema = described(
        "times",
        "def times(image, factor): return image * factor",
        outputs=[{"dtype": "uint16"}],
        parameters={"properties": {"factor": {"type": "integer", "default": 2}}},
    )
    np.testing.assert_array_equal(ci.map_cells(schema, IMAGE)[...], IMAGE * 2)
