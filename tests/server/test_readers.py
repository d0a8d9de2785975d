"""What the readers of others see of what is served."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.server.layers import Layer
from cellimg_dask.server.serving import Server, serve

zarr = pytest.importorskip("zarr")
pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")
tensorstore = pytest.importorskip("tensorstore")

DTYPES = ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
OTHERS = ["M8[ns]", "m8[s]", "S5", "U3"]
SHAPES = {1: (7,), 2: (5, 7), 3: (3, 5, 4), 4: (2, 3, 5, 4), 5: (2, 1, 3, 3, 5)}
AXES = "tczyx"


def voxels(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(5)
    if np.dtype(dtype).kind in "SU":
        return np.array(["a", "bcd", "", "äö"][: 3 if dtype[0] == "S" else 4]).astype(dtype)[
            rng.integers(0, 3, shape)
        ]
    bits = rng.integers(0, 100, shape)
    if dtype[0] == "c":
        return (bits + 1j * bits[::-1]).astype(dtype)
    return bits.astype(dtype) if dtype != "?" else bits > 50


def lazily(array: np.ndarray, cells: int = 2) -> ci.CellImg:
    return ci.map_cells(np.copy, array, dtype=array.dtype, cell_shape=cells)


WHOLE = {f"dtype {np.dtype(d)}": voxels(d, (5, 7)) for d in DTYPES} | {
    f"{n}D": voxels("u2", shape) for n, shape in SHAPES.items()
}


@pytest.fixture(scope="module", autouse=True)
def _kept_by_tensorstore() -> None:
    """Have tensorstore open what it keeps for reading over HTTP until the process ends."""
    with serve({"it": lazily(np.ones((32, 32), "u1"))}) as server:
        array = tensorstore.open({"driver": "zarr3", "kvstore": f"{server.url}/it/0/"}).result()
        array.read().result()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    layers: dict[str, object] = {name: lazily(array) for name, array in WHOLE.items()}
    for name, array in WHOLE.items():
        if name.endswith("D"):
            n = array.ndim
            layers[name] = lazily(array).with_space(axes=AXES[-n:], units="um", scale=0.5)
    layers["levels"] = ci.pyramid(layers["3D"], 2)
    layers["labels"] = Layer(lazily(WHOLE["3D"]), kind="labels")
    layers["big-endian"] = WHOLE["2D"].astype(">u2")
    with serve(layers) as server:
        yield server


@pytest.fixture(scope="module", params=["zstd", "gzip"])
def compressed(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve({"2D": lazily(WHOLE["2D"])}, compression=request.param) as server:
        yield server


@pytest.mark.parametrize("prefix", ["", "@0.4/", "@edition-12/"])
@pytest.mark.parametrize("name", WHOLE)
def test_zarr_reads_the_image(server, name, prefix):
    array = zarr.open_array(f"{server.url}/{prefix}{name}/0", mode="r")
    assert array.dtype == WHOLE[name].dtype
    assert array.chunks == tuple(min(2, n) for n in array.shape)
    np.testing.assert_array_equal(array[...], WHOLE[name])


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("name", WHOLE)
def test_tensorstore_reads_the_image(server, name, version):
    driver, prefix = ("zarr3", "") if version == "0.5" else ("zarr", "@0.4/")
    address = f"{server.url}/{prefix}{name}/0/".replace(" ", "%20")
    array = tensorstore.open({"driver": driver, "kvstore": address}).result()
    np.testing.assert_array_equal(array.read().result(), WHOLE[name])
    if version == "0.5" and name.endswith("D"):
        assert array.domain.labels == tuple(AXES[-WHOLE[name].ndim :])


@pytest.mark.parametrize("prefix", ["", "@0.4/"])
def test_compressed_chunks_are_read_by_zarr_and_tensorstore(compressed, prefix):
    address = f"{compressed.url}/{prefix}2D/0"
    np.testing.assert_array_equal(zarr.open_array(address, mode="r")[...], WHOLE["2D"])
    driver = "zarr" if prefix else "zarr3"
    array = tensorstore.open({"driver": driver, "kvstore": address + "/"}).result()
    np.testing.assert_array_equal(array.read().result(), WHOLE["2D"])


@pytest.mark.parametrize("prefix", ["", "@0.4/"])
def test_dask_and_groups_know_what_there_is_without_a_listing(server, prefix):
    import dask.array

    root = zarr.open_group(f"{server.url}/{prefix}", mode="r")
    assert set(root) == set(server.layers)
    assert {*root["levels"]} == {"0", "1"}
    lazy = dask.array.from_zarr(f"{server.url}/{prefix}levels", component="1")
    assert lazy.chunks == server.layers["levels"].images[1].chunks
    np.testing.assert_array_equal(lazy.compute(), np.asarray(server.layers["levels"].images[1]))
    np.testing.assert_array_equal(root["big-endian/0"][...], WHOLE["2D"])


@pytest.mark.parametrize("prefix", ["", "@0.4/"])
@pytest.mark.parametrize("name", ["2D", "3D", "4D", "5D", "levels", "labels"])
def test_the_validator_of_yaozarrs_agrees(server, name, prefix):
    yaozarrs = pytest.importorskip("yaozarrs")
    yaozarrs.validate_zarr_store(f"{server.url}/{prefix}{name}")


@pytest.mark.parametrize("prefix", ["", "@0.4/"])
def test_ome_zarr_reads_axes_scales_and_levels(server, prefix):
    io = pytest.importorskip("ome_zarr.io")
    reader = pytest.importorskip("ome_zarr.reader")
    location = io.parse_url(f"{server.url}/{prefix}levels")
    (node,) = reader.Reader(location)()
    assert [axis["name"] for axis in node.metadata["axes"]] == ["z", "y", "x"]
    assert {axis["unit"] for axis in node.metadata["axes"]} == {"micrometer"}
    images = server.layers["levels"].images
    for image, array, transforms in zip(
        images, node.data, node.metadata["coordinateTransformations"], strict=True
    ):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(image))
        assert transforms[0]["scale"] == list(image.scale)
        assert transforms[1]["translation"] == list(image.translation)


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
@pytest.mark.filterwarnings("ignore::zarr.core.dtype.common.UnstableSpecificationWarning")
def test_texts_and_times_are_read_by_zarr(serving, dtype):
    array = voxels(dtype, (5, 7))
    server = serving({"it": lazily(array)})
    for prefix in ("", "@0.4/"):
        found = zarr.open_array(f"{server.url}/{prefix}it/0", mode="r")
        np.testing.assert_array_equal(found[...], array)


@pytest.mark.parametrize("fill", [np.nan, 7.5, -np.inf])
def test_a_chunk_of_fill_is_left_out_and_filled_in_by_readers(serving, get, fill):
    array = np.full((4, 5), fill, "f4")
    array[0, 0] = 3
    server = serving({"it": Layer(lazily(array), fill_value=fill)})
    assert [get(server, f"it/0/c/{key}").status for key in ("0/0", "0/1", "1/2")] == [200, 404, 404]
    for driver, prefix in (("zarr3", ""), ("zarr", "@0.4/")):
        address = f"{server.url}/{prefix}it/0"
        np.testing.assert_array_equal(zarr.open_array(address, mode="r")[...], array)
        opened = tensorstore.open({"driver": driver, "kvstore": address + "/"}).result()
        np.testing.assert_array_equal(opened.read().result(), array)


def test_an_image_without_axes_and_one_without_voxels_are_read(serving):
    point = ci.fill_cells(lambda block: block.data.fill(3), ci.CellGrid((), ()), dtype="u1")
    empty = lazily(np.zeros((0, 4)))
    server = serving({"point": point, "empty": empty})
    for prefix in ("", "@0.4/"):
        assert zarr.open_array(f"{server.url}/{prefix}point/0", mode="r")[...] == 3
        assert zarr.open_array(f"{server.url}/{prefix}empty/0", mode="r")[...].shape == (0, 4)


def test_an_array_that_is_smaller_than_a_default_cell_is_one_chunk_of_its_size(serving, get):
    server = serving({"it": np.ones((3, 4), "u1")})
    assert get(server, "it/0/c/0/0").body == bytes([1] * 12)
