"""What OME-Zarr and other groups in zarr say of images is understood, also where it is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from image_files import fingerprint, write_ome

import cellimg_dask as ci
from cellimg_dask.io.listing import list_images
from cellimg_dask.io.ome import image_attributes
from cellimg_dask.io.ome_read import multiscale_of
from cellimg_dask.io.open_image import open_image

VERSIONS = ["0.4", "0.5"]


@pytest.mark.parametrize("version", VERSIONS)
def test_both_transformations_in_their_order(files, version):
    image = open_image(files[f"ome-{version}.zarr"])
    assert image.axes == ("z", "y", "x")
    assert image.units == ("micrometer",) * 3
    # The level's first, then the image's: 4 * (1 * i + 0) + 100.
    assert image.scale == (4.0, 0.5, 0.25)
    assert image.translation == (100.0, 20.0, 3.0)
    second = image.levels[2]
    assert second.scale == (4.0, 2.0, 1.0)
    assert second.translation == (100.0, 20.0 + 0.5 * 1.5, 3.0 + 0.25 * 1.5)
    assert second.space == image.space.shrunk((1, 4, 4))


@pytest.mark.parametrize("version", VERSIONS)
def test_labels(files, version, volume):
    image = open_image(files[f"ome-{version}.zarr"])
    assert not image.is_labels
    assert list(image.labels) == ["nuclei"]
    assert len(image.labels) == 1
    nuclei = image.labels["nuclei"]
    assert nuclei.is_labels
    assert nuclei.dtype == np.uint32
    assert nuclei.name == "labels/nuclei"
    assert nuclei.scale == image.scale
    np.testing.assert_array_equal(nuclei, volume // 700)
    assert not nuclei.labels
    with pytest.raises(KeyError):
        image.labels["cells"]
    by_name = open_image(files[f"ome-{version}.zarr"], name="labels/nuclei")
    assert by_name.is_labels
    by_path = open_image(files[f"ome-{version}.zarr"] / "labels" / "nuclei")
    assert by_path.is_labels
    assert open_image(files[f"ome-{version}.zarr"] / "labels").is_labels


def test_what_we_say_is_what_we_read(tmp_path):
    spaces = [
        ci.Space.of(
            3, "tyx", units=("second", "nm", "nm"), scale=(2, 0.1, 0.3), translation=(1, 2, 3)
        )
    ]
    spaces.append(spaces[0].shrunk((1, 2, 3)))
    for version in VERSIONS:
        said = json.loads(json.dumps(image_attributes(spaces, ["0", "1"], "a", version)))
        found = multiscale_of(said)
        assert found is not None
        assert found.paths == ("0", "1")
        assert [found.space(level, 3, "") for level in range(2)] == spaces


@pytest.mark.parametrize("version", VERSIONS)
def test_what_other_libraries_write(tmp_path, volume, version):
    """ome-zarr-py writes, and yaozarrs calls the metadata valid that we read."""
    ome_zarr = pytest.importorskip("ome_zarr.writer")
    from ome_zarr.format import FormatV04, FormatV05

    path = tmp_path / "a.zarr"
    zarr_format = 3 if version == "0.5" else 2
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    ome_zarr.write_image(
        np.asarray(volume),
        group,
        axes=[{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"],
        scale_factors=[],
        fmt=FormatV05() if version == "0.5" else FormatV04(),
    )
    image = open_image(path)
    assert image.axes == ("z", "y", "x")
    np.testing.assert_array_equal(image, volume)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_test_files_are_valid(files, version):
    yaozarrs = pytest.importorskip("yaozarrs")
    yaozarrs.validate_zarr_store(str(files[f"ome-{version}.zarr"]))


# ---------------------------------------------------------------------- tolerance


def opened(tmp_path, data, **scales):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    group.create_array("0", data=data)
    group.create_array("1", data=data[::2, ::2])
    entry = {"datasets": [{"path": "0"}, {"path": "1"}], **scales}
    group.attrs["ome"] = {"multiscales": [entry]}
    return open_image(tmp_path / "a.zarr")


def test_levels_of_which_nothing_is_said_follow_from_shapes(tmp_path):
    image = opened(tmp_path, np.zeros((9, 8)))
    assert image.axes is None
    assert image.scale == (1.0, 1.0)
    assert image.levels[1].shape == (5, 4)
    assert image.levels[1].space == image.space.shrunk((2, 2))


def test_axes_by_name_only_as_in_version_0_3(tmp_path):
    assert opened(tmp_path, np.zeros((4, 4)), axes=["y", "x"]).axes == ("y", "x")


def test_five_axes_without_names_as_in_version_0_1(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=np.zeros((1, 2, 3, 4, 5)))
    group.attrs["multiscales"] = [{"version": "0.1", "datasets": [{"path": "0"}]}]
    assert open_image(tmp_path / "a.zarr").axes == ("t", "c", "z", "y", "x")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"axes": ["y", "y"]}, "axes"),
        ({"axes": ["z", "y", "x"]}, "axes"),
        ({"axes": ["y", ""]}, "axes"),
        ({"coordinateTransformations": [{"type": "scale", "scale": [0, 1]}]}, "not positive"),
        ({"coordinateTransformations": [{"type": "scale", "scale": [1]}]}, "not understood"),
        ({"coordinateTransformations": [{"type": "scale", "scale": ["1", 1]}]}, "not understood"),
        ({"coordinateTransformations": [{"type": "scale", "path": "s"}]}, "not understood"),
        ({"coordinateTransformations": [{"type": "rotation"}]}, "not understood"),
        ({"coordinateTransformations": ["scale"]}, "not understood"),
    ],
)
def test_what_makes_no_sense_is_left_out_with_a_warning(tmp_path, wrong, said):
    with pytest.warns(UserWarning, match=said):
        image = opened(tmp_path, np.zeros((4, 4)), **wrong)
    assert image.scale == (1.0, 1.0)
    assert image.axes is None


@pytest.mark.parametrize(
    "harmless",
    [
        {"coordinateTransformations": []},
        {"coordinateTransformations": None},
        {"coordinateTransformations": [{"type": "identity"}]},
        {"name": None, "metadata": 3},
    ],
)
def test_what_is_of_no_use_is_left_out(tmp_path, harmless):
    assert opened(tmp_path, np.zeros((4, 4)), **harmless).space.is_plain


def test_a_level_that_is_missing_is_named_when_it_is_used(tmp_path, volume):
    group = write_ome(tmp_path / "a.zarr", volume, "0.5", num_levels=2)
    del group["s1"]
    image = open_image(tmp_path / "a.zarr")
    np.testing.assert_array_equal(image, volume)
    with pytest.raises(FileNotFoundError, match="s1"):
        image.levels[1].shape  # noqa: B018


def test_corrupt_metadata_are_named(tmp_path, volume):
    for file, kind in ((".zattrs", "0.4"), ("s0/.zarray", "0.4"), ("zarr.json", "0.5")):
        path = tmp_path / kind / file.replace("/", "_")
        path.parent.mkdir(exist_ok=True)
        write_ome(path, volume, kind)
        (path / file).write_text('{"zarr_format": ')
        before = fingerprint(tmp_path)
        with pytest.raises(ValueError, match=str(path)):
            open_image(path)
        assert fingerprint(tmp_path) == before


def test_an_array_without_its_description_is_not_there(tmp_path, volume):
    path = tmp_path / "a.zarr"
    zarr.create_array(path, data=volume, zarr_format=2)
    (path / ".zarray").unlink()
    before = fingerprint(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=str(path)):
        open_image(path)
    assert fingerprint(tmp_path) == before


# ---------------------------------------------------------------------- other groups


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("names", [None, ["0", "1"]])
def test_series_of_bioformats2raw(tmp_path, volume, version, names):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    said = {"bioformats2raw.layout": 3}
    group.attrs.update({"ome": {"version": version, **said}} if version == "0.5" else said)
    if names is not None:
        inner = group.create_group("OME")
        inner.attrs.update(
            {"ome": {"version": version, "series": names}}
            if version == "0.5"
            else {"series": names}
        )
        (path / "OME" / "METADATA.ome.xml").write_text("<OME/>")
    for number in range(2):
        write_ome(path / str(number), volume + number, version)
    np.testing.assert_array_equal(open_image(path), volume)
    second = open_image(path, name="1")
    np.testing.assert_array_equal(second, volume + 1)
    assert second.axes == ("z", "y", "x")
    assert {listed.name for listed in list_images(path)} == {"0/s0", "1/s0"}


def test_a_plate_lists_its_wells(tmp_path, volume):
    path = tmp_path / "plate.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.attrs["plate"] = {"wells": [{"path": "A/1"}, {"path": "A/2"}]}
    for well in ("A/1", "A/2"):
        group.create_group(well).attrs["well"] = {"images": [{"path": "0"}]}
        write_ome(path / well / "0", volume, "0.4")
    with pytest.raises(ValueError, match="A/1, A/2"):
        open_image(path)
    image = open_image(path, name="A/2")
    assert image.name == "A/2/0"
    np.testing.assert_array_equal(image, volume)
    zarr.open_group(path / "A/1").attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}]}
    with pytest.raises(ValueError, match=r"A/1/0, A/1/1; .*name='A/1/0'"):
        open_image(path, name="A/1")
    np.testing.assert_array_equal(open_image(path, name="A/1/0"), volume)


def test_a_level_by_its_name_knows_where_it_lies(files):
    image = open_image(files["ome-0.5.zarr"])
    level = open_image(files["ome-0.5.zarr"], name="s2")
    assert level.space == image.levels[2].space
    assert len(level.levels) == 1


def test_channels(tmp_path, volume):
    channels = [{"label": "DAPI", "color": "0000FF", "window": {"start": 0, "end": 9}}]
    write_ome(tmp_path / "a.zarr", volume, "0.5", omero={"channels": channels})
    image = open_image(tmp_path / "a.zarr")
    assert image.channels == (ci.Channel("DAPI", "#0000ff", (0, 9)),)
    assert image.attrs["ome"]["omero"]["channels"] == channels


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_arrays_of_xarray(tmp_path, volume, zarr_format):
    xarray = pytest.importorskip("xarray")
    times = 0.5 + 2.0 * np.arange(6)
    data = xarray.DataArray(
        volume,
        dims=("time", "lat", "lon"),
        coords={"time": ("time", times, {"units": "s"}), "lat": 10 + 0.1 * np.arange(40)},
    )
    path = tmp_path / "a.zarr"
    xarray.Dataset({"image": data}).to_zarr(path, zarr_format=zarr_format, consolidated=False)
    before = fingerprint(path)
    image = open_image(path)
    assert image.name == "image"
    assert image.axes == ("time", "lat", "lon")
    assert image.units == ("second", None, None)
    assert image.scale == pytest.approx((2.0, 0.1, 1.0))
    assert image.translation == pytest.approx((0.5, 10.0, 0.0))
    np.testing.assert_array_equal(image, volume)
    assert fingerprint(path) == before


def test_dimension_names(files):
    assert open_image(files["sharded.zarr"]).axes == ("z", "y", "x")
    assert open_image(files["v3.zarr"]).axes is None


def test_attributes_of_segmentation_data_sets(tmp_path, volume):
    array = zarr.create_array(tmp_path / "a.zarr", data=volume)
    array.attrs.update(
        {
            "resolution": [40, 4, 4],
            "offset": [80, 0, 8],
            "units": ["nm"] * 3,
            "axis_names": list("zyx"),
        }
    )
    space = open_image(tmp_path / "a.zarr").space
    assert space == ci.Space.of(3, "zyx", "nm", (40, 4, 4), (80, 0, 8))


def test_listing(files):
    listed = list_images(files["ome-0.4.zarr"])
    levels = ["s0", "s1", "s2"]
    inside = [f"labels/nuclei/{level}" for level in levels]
    assert [item.name for item in listed] == levels + inside
    first = next(item for item in listed if item.name == "s0")
    assert first.kind == "zarr v2"
    assert first.axes == ("z", "y", "x")
    assert first.chunks == (2, 16, 16)
    folder = files["ome-0.4.zarr"] / "s0"
    assert first.stored_bytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


# ---------------------------------------------------------------------- any array

DTYPES = ["u1", "<u2", ">u2", "<i4", ">f4", "<f8", "?", "<c8"]


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple))
    chunks = tuple(draw(st.integers(1, 5)) for _ in shape)
    shards = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    size = int(np.prod(shape))
    data = (np.arange(size) * 7 % 251).astype(dtype).reshape(shape)
    key = tuple(
        draw(st.one_of(st.slices(n), st.integers(-n, n - 1) if n else st.slices(n))) for n in shape
    )
    return data, chunks, shards, key


@given(arrays(), st.sampled_from([2, 3]))
def test_any_slice_of_any_array(tmp_path_factory, drawn, zarr_format):
    data, chunks, sharded, key = drawn
    path = tmp_path_factory.mktemp("drawn") / "a.zarr"
    more = (
        {"shards": tuple(2 * n for n in chunks)}
        if data.ndim and sharded and zarr_format == 3
        else {}
    )
    zarr.create_array(path, data=data, chunks=chunks or (), zarr_format=zarr_format, **more)
    image = open_image(path)
    assert image.shape == data.shape
    assert image.dtype == data.dtype.newbyteorder("=")
    assert image.cell_shape == chunks
    np.testing.assert_array_equal(image, data)
    np.testing.assert_array_equal(image[key], data[key])
    assert np.shape(image[key]) == np.shape(data[key])
