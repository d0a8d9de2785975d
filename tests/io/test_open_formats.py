"""What N5, HDF5 and TIFF files say of their images is understood, whoever wrote them."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import tensorstore
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import add_attributes, fingerprint, write_n5

import cellimg_dask as ci
from cellimg_dask.io import tiff
from cellimg_dask.io.listing import list_images
from cellimg_dask.io.open_image import open_image
from cellimg_dask.loading.content import ContentKeys

# ---------------------------------------------------------------------- N5


def test_axes_of_n5_are_turned_round(files, volume):
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": str(files["bare.n5"])}}
    stored = tensorstore.open(spec, read=True).result()
    image = open_image(files["bare.n5"])
    assert stored.shape == image.shape[::-1]
    # The element at x, y, z of N5 is the one at z, y, x here.
    for x, y, z in [(0, 0, 0), (49, 0, 0), (0, 39, 0), (0, 0, 5), (17, 23, 4)]:
        assert stored[x, y, z].read().result() == image[z, y, x] == volume[z, y, x]
    said = json.loads((files["bare.n5"] / "attributes.json").read_text())
    assert said["dimensions"] == [50, 40, 6]
    assert image.cell_shape == tuple(said["blockSize"][::-1])


@pytest.mark.parametrize("compression", ["raw", "gzip", "bzip2", "xz", "zstd"])
def test_codecs_of_n5(tmp_path, volume, compression):
    write_n5(tmp_path / "a.n5", volume, compression=compression)
    image = open_image(tmp_path / "a.n5")
    np.testing.assert_array_equal(image, volume)
    (listed,) = list_images(tmp_path / "a.n5")
    assert listed.compression == ("none" if compression == "raw" else compression)


def test_the_first_version_of_n5_named_its_compression_otherwise(tmp_path, volume):
    write_n5(tmp_path / "a.n5", volume)
    file = tmp_path / "a.n5" / "attributes.json"
    said = json.loads(file.read_text())
    said["compressionType"] = said.pop("compression")["type"]
    file.write_text(json.dumps(said))
    np.testing.assert_array_equal(open_image(tmp_path / "a.n5"), volume)


def test_chunks_that_are_not_there_are_zero(tmp_path, volume):
    write_n5(tmp_path / "a.n5", volume + 1, block=(2, 16, 16))
    (tmp_path / "a.n5" / "0" / "0" / "0").unlink()
    image = open_image(tmp_path / "a.n5")
    assert not image[:2, :16, :16].any()
    assert image[2:].all()


def test_pyramid_of_the_n5_viewer(files):
    image = open_image(files["pyramid.n5"])
    assert image.name == "raw"
    assert image.scale == (40.0, 4.0, 4.0)
    assert image.units == ("nanometer",) * 3
    assert image.levels[1].space == image.space.shrunk((1, 2, 2))
    assert open_image(files["pyramid.n5"] / "raw" / "s0").scale == (1.0, 1.0, 1.0)
    assert open_image(files["pyramid.n5"], name="raw/s1").space == image.levels[1].space
    assert open_image(files["pyramid.n5"] / "raw").levels[1].shape == (6, 20, 25)


@pytest.mark.parametrize("key", ["downsamplingFactors", "scales"])
def test_factors_said_by_the_group(tmp_path, volume, key):
    for level in range(2):
        write_n5(tmp_path / "a.n5" / f"s{level}", volume[:, :: 2**level, :: 2**level])
    factors = {key: [[1, 1, 1], [2, 2, 1]], "resolution": [0.5, 0.5, 3], "units": ["um"] * 3}
    add_attributes(tmp_path / "a.n5", n5="2.0.0", **factors)
    image = open_image(tmp_path / "a.n5")
    assert image.space == ci.Space.of(3, units="um", scale=(3, 0.5, 0.5))
    assert image.levels[1].space == image.space.shrunk((1, 2, 2))


def test_pyramid_without_a_word(tmp_path, volume):
    for level in range(2):
        write_n5(tmp_path / "a.n5" / f"s{level}", volume[:, :: 2**level, :: 2**level])
    image = open_image(tmp_path / "a.n5")
    assert image.space.is_plain
    assert image.levels[1].space == image.space.shrunk((1, 2, 2))


@pytest.mark.parametrize("place", ["group", "dataset"])
@pytest.mark.parametrize("turned", [False, True])
def test_transforms_of_cosem(tmp_path, volume, place, turned):
    datasets = []
    order = slice(None, None, -1 if turned else 1)
    for level in range(2):
        write_n5(tmp_path / "a.n5" / "em" / f"s{level}", volume[:, :: 2**level, :: 2**level])
        transform = {
            "axes": ["z", "y", "x"][order],
            "units": ["um", "nm", "nm"][order],
            "scale": [5.24, 4.0 * 2**level, 3.0 * 2**level][order],
            "translate": [1.0, 2.0 * level, 1.5 * level][order],
        }
        datasets.append({"path": f"s{level}", "transform": transform})
        if place == "dataset":
            add_attributes(tmp_path / "a.n5" / "em" / f"s{level}", transform=transform)
    if place == "group":
        add_attributes(tmp_path / "a.n5" / "em", multiscales=[{"name": "em", "datasets": datasets}])
    image = open_image(tmp_path / "a.n5")
    units = ("um", "nm", "nm")
    assert image.space == ci.Space.of(3, "zyx", units, (5.24, 4, 3), (1, 0, 0))
    assert image.levels[1].space == ci.Space.of(3, "zyx", units, (5.24, 8, 6), (1, 2, 1.5))


def test_series_of_big_data_viewer_in_n5(tmp_path, volume):
    root = tmp_path / "a.n5"
    for time in range(2):
        folder = root / "setup0" / f"timepoint{time}"
        write_n5(folder / "s0", volume + time)
        write_n5(folder / "s1", (volume + time)[:, ::2, ::2], downsamplingFactors=[2, 2, 1])
        add_attributes(folder, multiScale=True, resolution=[0.5, 0.5, 2.0])
    add_attributes(root / "setup0", downsamplingFactors=[[1, 1, 1], [2, 2, 1]], dataType="uint16")
    with pytest.raises(ValueError, match="setup0/timepoint0, setup0/timepoint1"):
        open_image(root)
    image = open_image(root, name="setup0/timepoint1")
    np.testing.assert_array_equal(image, volume + 1)
    assert image.scale == (2.0, 0.5, 0.5)
    assert image.levels[1].scale == (2.0, 1.0, 1.0)


def test_what_is_in_an_n5_container_is_listed(tmp_path, volume):
    root = tmp_path / "a.n5"
    for name in ("b", "a/raw", "a/labels"):
        write_n5(root / name, volume)
    add_attributes(root, n5="2.5.0")
    before = fingerprint(root)
    with pytest.raises(ValueError, match=r"a/labels, a/raw, b; .*name='a/labels'"):
        open_image(root)
    with pytest.raises(ValueError, match=r"no image 'c'.*a/labels, a/raw, b"):
        open_image(root, name="c")
    with pytest.raises(ValueError, match=r"a/labels, a/raw; .*name='a/labels'"):
        open_image(root, name="a")
    assert [item.name for item in list_images(root)] == ["a/labels", "a/raw", "b"]
    assert fingerprint(root) == before


def test_n5_that_was_read_before_a_fork(files, volume):
    """tensorstore would end the process that was forked."""
    image = open_image(files["bare.n5"])
    np.testing.assert_array_equal(image, volume)
    array = pickle.loads(pickle.dumps(image.array))
    array._opened_in = -1
    with pytest.raises(OSError, match=r"before this process was forked.*spawn"):
        array[0:1, 0:1, 0:1]


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"dimensions": "50"}, "dimensions"),
        ({"dimensions": [50, 40]}, "blockSize"),
        ({"blockSize": [0, 1, 1]}, "blockSize"),
        ({"blockSize": None}, "blockSize"),
        ({"dataType": "object"}, "data type 'object'"),
        ({"compression": {"type": "magic"}}, "cannot read"),
    ],
)
def test_wrong_attributes_of_n5_are_named(tmp_path, volume, said, wrong):
    write_n5(tmp_path / "a.n5", volume)
    add_attributes(tmp_path / "a.n5", **said)
    with pytest.raises(ValueError, match=wrong) as caught:
        open_image(tmp_path / "a.n5")
    assert str(tmp_path / "a.n5") in str(caught.value)


def test_corrupt_attributes_of_n5(tmp_path, volume):
    write_n5(tmp_path / "a.n5", volume)
    (tmp_path / "a.n5" / "attributes.json").write_text('{"dimensions": [')
    with pytest.raises(ValueError, match=r"attributes\.json is not JSON"):
        open_image(tmp_path / "a.n5")


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    dtype=st.sampled_from(["uint8", "int16", "uint32", "float32", "float64", "int64"]),
)
def test_any_slice_of_any_n5(tmp_path_factory, shape, data, dtype):
    block = tuple(data.draw(st.integers(1, 6)) for _ in shape)
    key = tuple(data.draw(st.one_of(st.slices(n), st.integers(-n, n - 1))) for n in shape)
    array = (np.arange(np.prod(shape)) * 7 % 101).astype(dtype).reshape(shape)
    path = tmp_path_factory.mktemp("drawn") / "a.n5"
    write_n5(path, array, block=block)
    image = open_image(path)
    assert image.cell_shape == block
    np.testing.assert_array_equal(image, array)
    np.testing.assert_array_equal(image[key], array[key])


# ---------------------------------------------------------------------- HDF5


def test_the_only_image_beside_numbers_and_names(files, volume):
    image = open_image(files["image.h5"])
    assert image.name == "raw/volume"
    assert isinstance(image.array, h5py.Dataset)
    assert image.cell_shape == (1, 20, 25)
    assert image.scale == (2.0, 0.5, 0.25)
    assert image.units == ("micrometer",) * 3
    image.close()
    with open_image(files["image.h5"] / "raw" / "volume") as inside:
        assert inside.name == "raw/volume"
        np.testing.assert_array_equal(inside, volume)
    with open_image(files["image.h5"], name="exposure") as number:
        assert number[()] == 0.25


def test_several_data_sets_are_listed(tmp_path, volume):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["b/raw"] = volume
        file["a"] = volume[0]
    with pytest.raises(ValueError, match=r"a, b/raw; .*name='a'"):
        open_image(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"no image 'c'; it has: a, b/raw"):
        open_image(tmp_path / "a.h5", name="c")
    with open_image(tmp_path / "a.h5", name="/b/raw") as image:
        np.testing.assert_array_equal(image, volume)


def test_a_file_without_data_sets(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("empty")
    with pytest.raises(ValueError, match="holds no array"):
        open_image(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="holds no array"):
        list_images(tmp_path / "a.h5")


def test_links_of_hdf5(tmp_path, volume):
    with h5py.File(tmp_path / "far.h5", "w") as file:
        file["scan/data"] = volume
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["t0"] = h5py.ExternalLink("far.h5", "/scan")
        file["latest"] = h5py.SoftLink("/t0/data")
        file["lost"] = h5py.SoftLink("/nowhere")
        file["gone"] = h5py.ExternalLink("gone.h5", "/data")
    assert [item.name for item in list_images(tmp_path / "a.h5")] == ["t0/data"]
    for name in (None, "t0/data", "latest"):
        with open_image(tmp_path / "a.h5", name=name) as image:
            np.testing.assert_array_equal(image, volume)
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)), volume)
    for name in ("lost", "gone"):
        with pytest.raises(ValueError, match=f"no image '{name}'; it has: t0/data"):
            open_image(tmp_path / "a.h5", name=name)


def test_keys_follow_the_files_that_values_lie_in(tmp_path, volume, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File("far.h5", "w") as file:
        file["data"] = volume
    for number in range(2):
        with h5py.File(f"part{number}.h5", "w") as file:
            file["data"] = volume[number]
    every = h5py.VirtualLayout(volume.shape, volume.dtype)
    every[...] = h5py.VirtualSource("far.h5", "data", volume.shape)
    parts = h5py.VirtualLayout((2, *volume.shape[1:]), volume.dtype)
    for number in range(2):
        parts[number] = h5py.VirtualSource(f"part{number}.h5", "data", volume.shape[1:])
    with h5py.File("a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("far.h5", "/data")
        file.create_virtual_dataset("virtual", every)
        file.create_virtual_dataset("parts", parts)
        raw = [("raw.bin", 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("raw", data=volume, external=raw)
        file["t00000/s00/0/cells"] = h5py.ExternalLink("far.h5", "/data")
    holders = {
        "link": "far.h5",
        "virtual": "far.h5",
        "parts": "part1.h5",
        "raw": "raw.bin",
        "t00000/s00": "far.h5",
    }

    def key(name):
        with open_image("a.h5", name=name) as image:
            return ContentKeys(ci.map_cells(np.negative, image).loader).key(0)

    for time, (name, holder) in enumerate(holders.items()):
        before = key(name)
        assert key(name) == before
        os.utime(holder, ns=(time, time))
        assert key(name) != before, name


def test_a_file_that_is_being_written_is_named(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = np.zeros((2, 3))

    def locked(*args):
        raise BlockingIOError(11, "unable to lock file")

    monkeypatch.setattr(h5py, "File", locked)
    with pytest.raises(ValueError, match=r"a\.h5 is open for writing in another program"):
        open_image(tmp_path / "a.h5")


def test_axis_tags_of_ilastik(tmp_path, volume):
    tags = {
        "axes": [
            {"key": "z", "typeFlags": 2, "resolution": 3.5, "description": ""},
            {"key": "y", "typeFlags": 2, "resolution": 0, "description": ""},
            {"key": "x", "typeFlags": 2, "resolution": 0, "description": ""},
        ]
    }
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["exported_data"] = volume
        file["exported_data"].attrs["axistags"] = json.dumps(tags)
    with open_image(tmp_path / "a.h5") as image:
        assert image.axes == ("z", "y", "x")
        assert image.scale == (3.5, 1.0, 1.0)
        assert "axistags" in image.attrs
    assert list_images(tmp_path / "a.h5")[0].axes == ("z", "y", "x")


@pytest.mark.parametrize("tags", ["no JSON", "[]", '{"axes": 3}', '{"axes": [{"key": "z"}]}', 3.5])
def test_axis_tags_that_are_none(tmp_path, volume, tags):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["exported_data"] = volume
        file["exported_data"].attrs["axistags"] = tags
    with open_image(tmp_path / "a.h5") as image:
        assert image.space.is_plain


def test_labels_and_scales_of_dimensions(tmp_path, volume):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        item = file.create_dataset("image", data=volume)
        for dim, name in zip(item.dims, ("time", "lat", "lon"), strict=True):
            dim.label = name
        places = file.create_dataset("places", data=5 + 0.5 * np.arange(40))
        places.attrs["units"] = "mm"
        places.make_scale()
        item.dims[1].attach_scale(places)
    with open_image(tmp_path / "a.h5", name="image") as image:
        assert image.axes == ("time", "lat", "lon")
        assert image.scale == (1.0, 0.5, 1.0)
        assert image.translation == (0.0, 5.0, 0.0)
        assert image.units == (None, "millimeter", None)


@pytest.mark.parametrize(
    ("axes", "sizes", "expected"),
    [
        (None, [2, 1, 0.5], (1, 2, 1, 0.5)),
        ("zyxc", [2, 1, 0.5], (2, 1, 0.5, 1)),
        ("cyxz", [1, 0.5], (1, 1, 0.5, 1)),
    ],
)
def test_element_sizes(tmp_path, axes, sizes, expected):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        item = file.create_dataset("image", data=np.zeros((2, 3, 4, 5)))
        item.attrs["element_size_um"] = sizes
        for dim, name in zip(item.dims, axes or "", strict=False):
            dim.label = name
    with open_image(tmp_path / "a.h5") as image:
        assert image.scale == expected
        count = len(sizes)
        assert sum(unit == "micrometer" for unit in image.units) == count


def test_resolution_and_offset_as_cremi_says_them(tmp_path, volume):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        item = file.create_dataset("volumes/raw", data=volume)
        item.attrs.update({"resolution": (40.0, 4.0, 4.0), "offset": (80.0, 0.0, 8.0)})
    with open_image(tmp_path / "a.h5") as image:
        assert image.scale == (40.0, 4.0, 4.0)
        assert image.translation == (80.0, 0.0, 8.0)


def test_pyramids_of_big_data_viewer(tmp_path, volume):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for setup in range(2):
            for level in range(2):
                step = 2**level
                name = f"t00000/s{setup:02}/{level}/cells"
                data = (volume + setup)[:, ::step, ::step]
                file.create_dataset(name, data=data, chunks=(2, 16, 16))
            file[f"s{setup:02}/resolutions"] = np.array([[1.0, 1, 1], [2, 2, 1]])
            file[f"s{setup:02}/subdivisions"] = np.array([[16, 16, 2], [16, 16, 2]])
    with pytest.raises(ValueError, match="t00000/s00, t00000/s01"):
        open_image(tmp_path / "a.h5")
    with open_image(tmp_path / "a.h5", name="t00000/s01") as image:
        np.testing.assert_array_equal(image, volume + 1)
        np.testing.assert_array_equal(image.levels[1], (volume + 1)[:, ::2, ::2])
        assert image.levels[1].space == image.space.shrunk((1, 2, 2))


def test_signed_numbers_of_big_data_viewer_are_unsigned(tmp_path, volume):
    high = volume + 40000
    name = "t00000/s00/0/cells"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset(name, data=high.view(np.int16), chunks=(2, 16, 16))
    with open_image(tmp_path / "a.h5") as image:
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image, high)
        np.testing.assert_array_equal(ci.map_cells(np.copy, image, dtype="u2"), high)
        again = pickle.loads(pickle.dumps(ci.map_cells(np.negative, image)))
        np.testing.assert_array_equal(again, np.negative(high))
    assert list_images(tmp_path / "a.h5")[0].dtype == np.uint16


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_file_of_big_data_viewer_that_was_replaced(tmp_path, volume, is_linked):
    """The key would be that of the new file, and the voxels those of the old one."""
    name, path, out = "t00000/s00/0/cells", tmp_path / "a.h5", tmp_path / "out.zarr"

    def put(file, values):
        with h5py.File(tmp_path / file, "w") as opened:
            opened.create_dataset(name, data=values.astype("i2"), chunks=(2, 16, 16))

    if is_linked:
        with h5py.File(path, "w") as file:
            file[name] = h5py.ExternalLink("far.h5", name)
    held = tmp_path / ("far.h5" if is_linked else "a.h5")
    put(held, volume)
    with open_image(path) as image:
        negative = ci.map_cells(np.negative, image, version="1")
        assert ci.run(negative, out, progress=False).ok
        put("new.h5", volume + 1)
        (tmp_path / "new.h5").replace(held)
        report = ci.run(negative, out, progress=False, retries=0)
        assert report.computed == 0
        errors = [str(error) for error in report.failed.values()]
        assert errors
        assert all("has changed since it was opened" in error for error in errors)
    with open_image(path) as image:
        report = ci.run(ci.map_cells(np.negative, image, version="1"), out, progress=False)
    assert report.computed == report.num_cells
    np.testing.assert_array_equal(
        zarr.open_array(out, mode="r")[:], np.negative(volume.astype("u2") + 1)
    )


# ---------------------------------------------------------------------- TIFF


def test_sizes_and_units_of_ome(files):
    with open_image(files["image.ome.tif"]) as image:
        assert image.axes == ("z", "y", "x")
        assert image.scale == (2.0, 0.25, 0.5)
        assert image.units == ("millimeter", "micrometer", "nanometer")
        assert image.cell_shape == (1, 16, 32)
        assert "<OME" in image.attrs["ome_xml"]


def test_sizes_of_imagej(files):
    with open_image(files["imagej.tif"]) as image:
        assert image.axes == ("z", "y", "x")
        assert image.scale == (3.5, 0.5, 0.25)
        assert image.units == ("micrometer",) * 3
        assert image.attrs["imagej"]["spacing"] == 3.5


def test_times_of_imagej(tmp_path, volume):
    metadata = {"axes": "TZYX", "finterval": 2.5, "spacing": 2, "unit": "\\u00B5m"}
    data = volume.reshape(2, 3, 40, 50)
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata=metadata, resolution=(1, 1))
    with open_image(tmp_path / "a.tif") as image:
        assert image.axes == ("t", "z", "y", "x")
        assert image.scale == (2.5, 2.0, 1.0, 1.0)
        assert image.units == ("second", "micrometer", "micrometer", "micrometer")
        np.testing.assert_array_equal(image, data)


def test_pages_of_which_nobody_said_anything(files):
    with open_image(files["plain.tif"]) as image:
        assert image.space.is_plain
        assert image.space.named.axes == ("z", "y", "x")


def test_levels_of_tiff(files):
    with open_image(files["pyramid.ome.tif"]) as image:
        assert [level.shape for level in image.levels] == [(6, 40, 50), (6, 20, 25), (6, 10, 13)]
        assert image.scale == (1.0, 0.25, 0.5)
        assert image.levels[2].space == image.space.shrunk((1, 4, 4))


def test_series_of_tiff(tmp_path, volume):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        writer.write(volume, metadata={"axes": "ZYX", "PhysicalSizeX": 2.0, "Name": "first"})
        writer.write(volume[0], metadata={"axes": "YX", "PhysicalSizeX": 3.0, "Name": "second"})
    for name in ("series 1", "1", "second"):
        with open_image(tmp_path / "a.ome.tif", name=name) as image:
            assert image.name == "series 1"
            assert image.scale == (1.0, 3.0)
            np.testing.assert_array_equal(image, volume[0])
    with open_image(tmp_path / "a.ome.tif") as image:
        assert image.scale == (1.0, 1.0, 2.0)
        assert image.name == "series 0"
    with pytest.raises(ValueError, match="no image 'third'; it has: series 0, series 1"):
        open_image(tmp_path / "a.ome.tif", name="third")
    assert [item.name for item in list_images(tmp_path / "a.ome.tif")] == ["series 0", "series 1"]


def test_ome_images_in_several_files(tmp_path, volume):
    """As Bio-Formats writes them: each names all."""
    names, ids = ["a & b.ome.tif", "c.ome.tif"], ["urn:uuid:0", "urn:uuid:1"]
    planes = "".join(
        f'<TiffData IFD="{z}" FirstC="{c}" FirstZ="{z}" FirstT="0" PlaneCount="1">'
        f'<UUID FileName="{names[c].replace("&", "&amp;")}">{ids[c]}</UUID></TiffData>'
        for c in range(2)
        for z in range(2)
    )

    def write(c, data):
        xml = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="{ids[c]}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
            f'Type="uint16" SizeX="{volume.shape[2]}" SizeY="{volume.shape[1]}" SizeZ="2" '
            f'SizeC="2" SizeT="1">{planes}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            tmp_path / names[c],
            data,
            description=xml.encode(),
            metadata=None,
            photometric="minisblack",
        )

    def key():
        with open_image(tmp_path / names[0]) as image:
            return ContentKeys(ci.map_cells(np.negative, image).loader).key(0)

    data = volume[:4].reshape(2, 2, *volume.shape[1:])
    write(0, data[0])
    write(1, data[1])
    for name in names:
        with open_image(tmp_path / name) as image:
            assert image.axes == ("c", "z", "y", "x")
            np.testing.assert_array_equal(image, data)
    before = key()
    assert key() == before
    os.utime(tmp_path / names[1], ns=(1, 1))
    assert key() != before
    (tmp_path / names[1]).unlink()
    with pytest.warns(UserWarning, match=r"c\.ome\.tif cannot be found: .* zeros"):
        assert not np.asarray(open_image(tmp_path / names[0]))[1].any()
    # A file that was renamed, and is one all by itself.
    tifffile.imwrite(tmp_path / "one.ome.tif", volume, photometric="minisblack")
    (tmp_path / "one.ome.tif").rename(tmp_path / "renamed.ome.tif")
    with open_image(tmp_path / "renamed.ome.tif") as image:
        np.testing.assert_array_equal(image, volume)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_pages_of_small_strips_are_read_by_the_page(tmp_path, volume, compression):
    path = tmp_path / "a.tif"
    metadata = {"axes": "ZYX"}
    tifffile.imwrite(path, volume, rowsperstrip=3, compression=compression, metadata=metadata)
    with open_image(path) as image:
        assert image.cell_shape == (1, 40, 50)
        np.testing.assert_array_equal(image, volume)


def test_large_pages_are_read_by_several_strips(tmp_path, volume, monkeypatch):
    monkeypatch.setattr(tiff, "_LARGEST_PAGE_BYTES", 100)
    monkeypatch.setattr(tiff, "_STRIPS_BYTES", 1000)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume, rowsperstrip=3, compression="zlib", metadata={"axes": "ZYX"})
    with open_image(path) as image:
        # A strip has 300 bytes.
        assert image.cell_shape == (1, 9, 50)
        np.testing.assert_array_equal(image, volume)
        np.testing.assert_array_equal(ci.map_cells(np.negative, image), np.negative(volume))


def test_colours_of_tiff(tmp_path, volume):
    data = np.stack([volume[0] % 256] * 3, axis=-1).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", tile=(16, 16))
    with open_image(tmp_path / "a.tif") as image:
        assert image.axes == ("y", "x", "s")
        np.testing.assert_array_equal(image, data)


@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(["u1", ">u2", "<f4", "<i2"]))
def test_any_slice_of_any_tiff(tmp_path_factory, data, dtype):
    shape = tuple(data.draw(st.integers(1, 40)) for _ in range(3))
    more = data.draw(
        st.sampled_from([{}, {"tile": (16, 32)}, {"compression": "zlib"}, {"rowsperstrip": 3}])
    )
    array = (np.arange(np.prod(shape)) * 7 % 101).astype(dtype).reshape(shape)
    path = tmp_path_factory.mktemp("drawn") / "a.tif"
    order = ">" if dtype.startswith(">") else "<"
    tifffile.imwrite(
        path, array, photometric="minisblack", metadata={"axes": "ZYX"}, byteorder=order, **more
    )
    key = tuple(data.draw(st.one_of(st.slices(n), st.integers(-n, n - 1))) for n in shape)
    with open_image(path) as image:
        assert image.dtype.isnative
        # Axes of length 1 may be left out by the file.
        np.testing.assert_array_equal(np.asarray(image).reshape(shape), array)
        if image.shape == shape:
            np.testing.assert_array_equal(image[key], array[key])


def test_a_tiff_that_went_away_is_a_read_error(tmp_path, files):
    path = tmp_path / "a.tif"
    shutil.copy(files["image.ome.tif"], path)
    with open_image(path) as image:
        path.write_bytes(b"")
        with pytest.raises(ci.ReadError, match=r"a\.tif at cell \(0, 0, 0\)"):
            image[...]


def test_nothing_about_a_picture_is_hidden(files, volume):
    with open_image(files["picture.png"]) as image:
        assert image.axes == ("y", "x")
        with pytest.raises(ValueError, match="holds one array without a name"):
            open_image(files["picture.png"], name="a")
