"""How the channels of an image look, by what the file, the user or nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.io.channels import Channel
from cellimg_dask.server.layers import Layer


def stack(number: int = 3, axes: str = "cyx", dtype: str = "u2") -> ci.Source:
    shape = [4] * len(axes)
    shape[next(axes.index(name) for name in "cs" if name in axes)] = number
    return ci.Source(np.zeros(shape, dtype), space=ci.Space.of(len(axes), axes))


def colors(layer: Layer) -> list[Any]:
    return [channel.color for channel in layer.channels]


def test_colours_where_nothing_is_said() -> None:
    assert colors(Layer(stack(2))) == ["#ff00ff", "#00ff00"]
    assert colors(Layer(stack(1))) == [None]
    many = colors(Layer(stack(16)))
    assert len(set(many)) == 6
    assert many[:6] == many[6:12]
    layer = Layer(stack(3), color="red", contrast=(1, 2))
    assert colors(layer) == ["red"] * 3
    assert [channel.contrast for channel in layer.channels] == [(1, 2)] * 3


def test_colours_that_are_given_are_not_taken_again() -> None:
    assert colors(Layer(stack(2), channels=["a", Channel(color="magenta")]))[0] == "#00ff00"
    assert colors(Layer(stack(2), channels=[Channel(color=(0, 1, 0)), "b"]))[1] == "#ff00ff"
    given = [Channel(color="cyan"), "", "", "", "", Channel(color="#FFFF00")]
    assert len({*colors(Layer(stack(6), channels=given))}) == 6
    assert colors(Layer(stack(2), channels=[Channel(color="red")] * 2)) == ["red"] * 2


@pytest.mark.parametrize(("dtype", "white"), [("u1", 255), ("u2", 65535), ("f4", 1)])
def test_colours_of_pictures_are_those_of_the_picture(dtype: str, white: float) -> None:
    layer = Layer(stack(4, "yxs", dtype))
    assert layer.channel_axis == 2
    assert colors(layer)[:3] == ["#ff0000", "#00ff00", "#0000ff"]
    assert [each.contrast for each in layer.channels] == [(0, white)] * 4
    assert [each.visible for each in layer.channels] == [True, True, True, False]
    assert [each.label for each in layer.channels] == ["red", "green", "blue", "alpha"]
    # Two samples are no picture, and one of many channels may hold samples.
    assert colors(Layer(stack(2, "yxs"))) == ["#ff00ff", "#00ff00"]
    both = ci.Source(np.zeros((2, 4, 4, 3), "u1"), space=ci.Space.of(4, "cyxs"))
    assert Layer(both).channel_axis == 0


def test_what_is_not_shown_by_channels() -> None:
    assert Layer(stack(17)).channels == ()
    assert len(Layer(stack(17), channels=[""] * 17).channels) == 17
    assert Layer(stack(3), channels=()).channels == ()
    assert Layer(stack(3), kind="labels").channels == ()
    assert Layer(stack(0)).channels == ()
    # Of four unnamed axes the first may be time as well.
    assert Layer(np.zeros((3, 4, 4, 4), "u1")).channels == ()


def test_what_the_user_says() -> None:
    said = ["nuclei", Channel("actin", "#FF8000", (3, 9), visible=False), Channel()]
    layer = Layer(stack(3), channels=said)
    assert [each.label for each in layer.channels] == ["nuclei", "actin", ""]
    assert colors(layer) == ["#00ffff", "#ff8000", "#ff00ff"]
    assert layer.channels[1].contrast == (3, 9)
    assert [each.visible for each in layer.channels] == [True, False, True]
    assert Channel(color=(1, 0.5, 0)).color == "#ff8000"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (["a"], ValueError, "has 3 channels, along axis 0, and 1 are given"),
        ("abc", TypeError, "sequence of Channel or of labels, got 'abc'"),
        ([1, 2, 3], TypeError, "a Channel or its label, got 1"),
        (7, TypeError, "got 7"),
    ],
)
def test_channels_that_do_not_fit(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layer(stack(3), channels=given)


def test_channels_of_what_has_none() -> None:
    with pytest.raises(ValueError, match=r'along an axis "c".*with_space\(axes='):
        Layer(np.zeros((3, 4, 4)), channels=["a", "b", "c"])
    with pytest.raises(ValueError, match="this layer shows labels"):
        Layer(stack(3), kind="labels", channels=["a", "b", "c"])
    with pytest.raises(TypeError, match="label of a channel must be a text, got 3"):
        Channel(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="color"):
        Channel(color="rot")
    for contrast in ((1, 1), (2**60, 2**60 + 1), (0, 10**400)):
        with pytest.raises(ValueError, match="contrast must be two different, finite numbers"):
            Channel(contrast=contrast)


def described(path: Path, channels: Any) -> Path:
    """An image in OME-Zarr that says something of its channels."""
    import zarr

    ci.write_ome_zarr(stack(2), path, progress=False)
    group = zarr.open_group(path)
    group.attrs["ome"] = {**group.attrs["ome"], "omero": {"channels": channels}}
    return path


def test_what_ome_zarr_says(tmp_path: Path) -> None:
    channels = [
        {"label": "DAPI", "color": "0000FF", "window": {"start": 1, "end": 9, "min": 0, "max": 99}},
        {"label": "GFP", "color": "00ff00", "active": False},
    ]
    with ci.open_image(described(tmp_path / "a.ome.zarr", channels)) as image:
        layer = Layer(image)
        assert layer.channels == (
            Channel("DAPI", "#0000ff", (1, 9)),
            Channel("GFP", "#00ff00", None, visible=False),
        )
        # What is said here goes before what the file says.
        first = Layer(image, channels=[Channel(color="red"), "eGFP"]).channels
        assert first[0] == Channel("DAPI", "red", (1, 9))
        assert first[1] == Channel("eGFP", "#00ff00", None, visible=False)


@pytest.mark.parametrize(
    "channels",
    [
        [{}, {"label": 3, "color": "nice", "window": [1, 2], "active": None}],
        [{"color": 255, "window": {"start": "a", "end": 1}}, {"window": {"start": 1, "end": 1}}],
        [{"window": {"start": float("inf"), "end": 0}}, {"window": {}}],
        [{"window": {"start": 10**400, "end": 0}}, {"window": {"start": 2**60, "end": 2**60 + 1}}],
        [{"window": {"start": False, "end": True}}, {"color": "f00"}],
        [{"color": "ff000080"}, {"color": "ff0000\n"}],
        [{"color": "000000"}, {"color": "#"}],
        [["red"], "GFP"],
        {"label": "a mapping"},
        [{"label": "only one"}],
    ],
)
def test_what_makes_no_sense_counts_for_nothing(tmp_path: Path, channels: Any) -> None:
    with ci.open_image(described(tmp_path / "a.ome.zarr", channels)) as image:
        assert Layer(image).channels == (
            Channel("", "#ff00ff"),
            Channel("", "#00ff00"),
        )


def test_what_makes_no_sense_keeps_its_place(tmp_path: Path) -> None:
    with ci.open_image(described(tmp_path / "a.ome.zarr", [None, {"label": "GFP"}])) as image:
        assert image.channels == (Channel(), Channel("GFP"))


LOOKS = [ci.Channel("DAPI", "blue", (5, 70)), ci.Channel("GFP", "#00ff7f", visible=False)]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_channels_are_written(tmp_path: Path, version: Any, dtype: str) -> None:
    yaozarrs = pytest.importorskip("yaozarrs")
    path, looks = tmp_path / "a.ome.zarr", LOOKS
    if dtype == "f4":
        looks = [LOOKS[0], Channel("GFP", "#00ff7f", (0.5, -1), visible=False)]
    source = stack(2, dtype=dtype)
    ci.write_ome_zarr(source, path, channels=looks, version=version, progress=False)
    yaozarrs.validate_zarr_store(str(path))
    # Of more than 8 bits the whole range is one that nobody has chosen.
    contrast = {"u1": (0, 255), "i2": None, "f4": (0.5, -1)}[dtype]
    expected = (
        Channel("DAPI", "#0000ff", (5, 70)),
        Channel("GFP", "#00ff7f", contrast, visible=False),
    )
    with ci.open_image(path) as image:
        assert image.channels == expected
        # From file to file they stay; what is carried on keeps them as well.
        for _ in range(2):
            ci.write_ome_zarr(image, tmp_path / "b.ome.zarr", progress=False)
        ci.write_ome_zarr(source, path, version=version, progress=False)
    for name in ("a", "b"):
        with ci.open_image(tmp_path / f"{name}.ome.zarr") as again:
            assert again.channels == expected


def test_channels_that_are_not_written(tmp_path: Path) -> None:
    def written(image: Any, **options: Any) -> tuple[Channel, ...]:
        path = tmp_path / "a.ome.zarr"
        ci.write_ome_zarr(image, path, progress=False, overwrite=True, **options)
        with ci.open_image(path) as found:
            return found.channels

    # Nobody has said anything; of floats a range is not known.
    assert written(stack(2)) == ()
    assert written(stack(2, dtype="f4"), channels=["a", "b"]) == ()
    assert written(np.zeros((2, 3, 4, 4), "u1"), channels=["a", "b"])[1].label == "b"
    with pytest.raises(ValueError, match="has 2 channels, along axis 0, and 1 are given"):
        written(stack(2), channels=["a"])
    with pytest.raises(ValueError, match="this image has the axes"):
        written(np.zeros((4, 4), "u1"), channels=["a"])
    with pytest.raises(TypeError, match="channels are those of an image"):
        ci.write_ome_zarr(
            None, tmp_path / "a.ome.zarr", labels={"x": stack(2)}, channels=["a", "b"]
        )


def test_labels_have_no_channels_of_a_file(tmp_path: Path) -> None:
    import zarr

    path, labels = tmp_path / "a.ome.zarr", tmp_path / "b.ome.zarr"
    ci.write_ome_zarr(stack(2), path, channels=LOOKS, progress=False)
    with ci.open_image(path) as image:
        ci.write_ome_zarr(image, labels, labels={"x": image}, progress=False)
    assert "omero" in zarr.open_group(labels).attrs["ome"]
    assert "omero" not in zarr.open_group(labels / "labels/x").attrs["ome"]
    with pytest.raises(ValueError, match="channels are of images, and img is labels"):
        ci.write_ome_zarr(ci.label(stack(2)), labels, channels=LOOKS, progress=False)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_channels_are_served(version: str) -> None:
    pytest.importorskip("uvicorn")
    with ci.serve({"cells": Layer(stack(2), channels=LOOKS), "plain": np.zeros((4, 4))}) as server:
        front = "@0.4/" if version == "0.4" else ""
        with ci.open_image(f"{server.url}/{front}cells") as image:
            assert image.channels == (
                Channel("DAPI", "#0000ff", (5, 70)),
                Channel("GFP", "#00ff7f", None, visible=False),
            )
        with ci.open_image(f"{server.url}/{front}plain") as image:
            assert image.channels == ()


def test_what_tiff_says(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    data = np.zeros((2, 5, 6), "u2")
    said = {"Name": ["DAPI", "GFP"], "Color": [0x0000FFFF, -16776961]}
    tifffile.imwrite(tmp_path / "a.ome.tif", data, metadata={"axes": "CYX", "Channel": said})
    with ci.open_image(tmp_path / "a.ome.tif") as image:
        assert Layer(image).channels == (
            Channel("DAPI", "#0000ff"),
            Channel("GFP", "#ff0000"),
        )
    # White is what OME says where nobody has chosen.
    tifffile.imwrite(
        tmp_path / "b.ome.tif", data, metadata={"axes": "CYX", "Channel": {"Color": [-1, -1]}}
    )
    with ci.open_image(tmp_path / "b.ome.tif") as image:
        assert image.channels == ()
        assert colors(Layer(image)) == ["#ff00ff", "#00ff00"]


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["0488", "405, 488"], [None, None], [None, None]),
        (["1e3", "true"], ["true", "red"], [None, None]),
        (["a/b\"<&'", "é😀"], [255, 0], [None, None]),
        # White beside another colour was chosen.
        (["GFP", "light"], [0x00FF00FF, -1], ["#00ff00", "#ffffff"]),
        (["a", "b"], [2**70 + 0xFF0000FF, "1.5"], ["#ff0000", None]),
    ],
)
def test_names_and_colours_in_ome_xml(
    tmp_path: Path, names: list[str], given: list[Any], expected: list[Any]
) -> None:
    tifffile = pytest.importorskip("tifffile")
    said: dict[str, Any] = {"Name": names}
    if given != [None, None]:
        said["Color"] = given
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((2, 5, 6), "u2"), metadata={"axes": "CYX", "Channel": said})
    with ci.open_image(path) as image:
        assert [channel.label for channel in image.channels] == names
        assert [channel.color for channel in image.channels] == expected


def test_sizes_in_ome_xml_that_make_no_sense() -> None:
    from cellimg_dask.io.tiff_said import ome_channels, ome_sizes

    xml = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>
        <Pixels PhysicalSizeX="true" PhysicalSizeY="0,5" PhysicalSizeZ="2" TimeIncrement="inf"/>
        </Image></OME>"""
    assert ome_sizes(xml, 0) == {"z": (2.0, "µm")}
    for other in ("", "<OME/>", "<OME", "<OME><Image/></OME>", xml[:-5]):
        assert ome_sizes(other, 0) == {}
        assert ome_channels(other, 0) == ()
    assert ome_sizes(xml, 1) == {}


def test_what_imagej_says(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    data = np.zeros((3, 2, 5, 6), "u2")
    ramp = np.arange(256, dtype="u1")
    red, yellow = (np.stack([ramp, part, 0 * ramp]) for part in (0 * ramp, ramp))
    metadata = {"axes": "ZCYX", "LUTs": [red, yellow], "Ranges": (5.0, 50.0, 6.0, 60.0)}
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata=metadata)
    with ci.open_image(tmp_path / "a.tif") as image:
        assert Layer(image).channels == (
            Channel("", "#ff0000", (5, 50)),
            Channel("", "#ffff00", (6, 60)),
        )
    tifffile.imwrite(
        tmp_path / "b.tif", data, imagej=True, metadata={"axes": "ZCYX", "Ranges": (5.0, 50.0)}
    )
    with ci.open_image(tmp_path / "b.tif") as image:
        assert image.channels == ()


RAMP = np.arange(256, dtype="u1")
RED, GREY = np.stack([RAMP, 0 * RAMP, 0 * RAMP]), np.stack([RAMP] * 3)
INVERTED = GREY[:, ::-1]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # Of a channel of one value ImageJ writes that twice.
        (
            {"LUTs": [RED, GREY], "Ranges": (5.0, 5.0, 0.0, 9.0)},
            [("#ff0000", None), ("#ffffff", (0, 9))],
        ),
        (
            {"LUTs": [RED, GREY], "Ranges": (float("nan"), 5.0, 0.0, 9.0)},
            [("#ff0000", None), ("#ffffff", (0, 9))],
        ),
        ({"LUTs": [RED, GREY], "Ranges": (5.0, 9.0)}, [("#ff0000", None), ("#ffffff", None)]),
        ({"LUTs": [RED], "Ranges": (0.0, 9.0, 1.0, 3.0)}, [(None, (0, 9)), (None, (1, 3))]),
        (
            {"LUTs": [INVERTED, RED], "Ranges": (0.0, 9.0, 1.0, 3.0)},
            [("#ffffff", (9, 0)), ("#ff0000", (1, 3))],
        ),
    ],
)
def test_what_imagej_says_in_part(tmp_path: Path, said: Any, expected: Any) -> None:
    tifffile = pytest.importorskip("tifffile")
    data = np.zeros((2, 5, 6), "u2")
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata={"axes": "CYX", **said})
    with ci.open_image(tmp_path / "a.tif") as image:
        assert [(each.color, each.contrast) for each in image.channels] == expected


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_pictures_that_are_not_red_green_and_blue(tmp_path: Path, name: str) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("imageio.v3")

    def looks(mode: str) -> list[Any]:
        pillow.new(mode, (6, 5)).save(tmp_path / name)
        with ci.open_image(tmp_path / name) as image:
            found = Layer(image).channels
        return [(each.label, each.color, each.contrast, each.visible) for each in found]

    if name != "a.jpg":
        assert looks("LA") == [("grey", "white", None, True), ("alpha", "white", None, False)]
    if name != "a.png":
        assert looks("CMYK") == [
            ("cyan", "#ff0000", (255, 0), True),
            ("magenta", "#00ff00", (255, 0), True),
            ("yellow", "#0000ff", (255, 0), True),
            ("black", "white", (255, 0), False),
        ]
    assert [label for label, *_ in looks("RGB")] == ["red", "green", "blue"]
    assert looks("L") == []


def test_two_samples_of_tiff_that_are_no_picture(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    data = np.zeros((5, 6, 2), "u1")
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    for kind, labels in (("unspecified", ["", ""]), ("assocalpha", ["grey", "alpha"])):
        tifffile.imwrite(tmp_path / "a.tif", data, extrasamples=[kind], **options)
        with ci.open_image(tmp_path / "a.tif") as image:
            assert [channel.label for channel in Layer(image).channels] == labels


@pytest.mark.parametrize(("axes", "shape"), [("yxs", (20, 30, 3)), ("tyxs", (2, 9, 8, 4))])
def test_pictures_are_written_with_channels_first(
    tmp_path: Path, axes: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    yaozarrs = pytest.importorskip("yaozarrs")
    data = rng.integers(0, 256, shape, "u1")
    calls: list[tuple[int, ...]] = []

    def noted(block: Any) -> None:
        calls.append(block.position)
        block.data[...] = block.inputs[0]

    space = ci.Space.of(len(axes), axes, units={"y": "um", "x": "um"}, scale={"y": 2, "x": 3})
    grid = ci.CellGrid(shape, 8)
    image = ci.fill_cells(noted, grid, ci.Input(data, space=space), dtype="u1", version="1")
    path = tmp_path / "a.ome.zarr"
    report = ci.write_ome_zarr(image, path, levels=2, progress=False)
    assert report.ok
    yaozarrs.validate_zarr_store(str(path))
    # Once each, also for the coarser level.
    assert len(calls) == len(set(calls)) == grid.num_cells
    place = axes.index("y")
    with ci.open_image(path) as found:
        assert found.axes == tuple(axes[:place] + "cyx")
        np.testing.assert_array_equal(found, np.moveaxis(data, -1, place))
        assert found.scale[-2:] == (2, 3)
        assert found.units[-1] == "micrometer"
        labels = ["red", "green", "blue", "alpha"][: shape[-1]]
        assert [each.label for each in found.channels] == labels
        coarse = ci.pyramid(ci.Input(data, space=space), 2)[1]
        np.testing.assert_array_equal(found.levels[1], np.moveaxis(coarse[...], -1, place))
    again = ci.write_ome_zarr(image, path, levels=2, progress=False)
    assert again.computed == 0


def test_axes_are_put_in_the_order_of_ome_zarr(tmp_path: Path) -> None:
    """As ImageJ and many microscopes write them: planes before channels."""
    yaozarrs = pytest.importorskip("yaozarrs")
    tifffile = pytest.importorskip("tifffile")
    data = np.arange(2 * 3 * 2 * 8 * 9, dtype="u2").reshape(2, 3, 2, 8, 9)
    metadata = {"axes": "TZCYX", "spacing": 4, "unit": "um"}
    tifffile.imwrite(
        tmp_path / "a.tif", data, imagej=True, metadata=metadata, resolution=(0.5, 0.5)
    )
    labels = ci.label(ci.Source(data[0] > 50, space=ci.Space.of(4, "zcyx")))
    with ci.open_image(tmp_path / "a.tif") as image:
        path = tmp_path / "a.ome.zarr"
        ci.write_ome_zarr(image, path, labels={"bright": labels}, levels=2, progress=False)
        yaozarrs.validate_zarr_store(str(path))
        with ci.open_image(path) as found:
            assert found.axes == tuple("tczyx")
            np.testing.assert_array_equal(found, data.swapaxes(1, 2))
            assert found.scale == (1, 1, 4, 2, 2)
            assert found.levels[1].shape == (2, 2, 2, 4, 5)
            assert found.labels["bright"].is_labels
            np.testing.assert_array_equal(found.labels["bright"], labels[...].swapaxes(0, 1))
    twice = ci.Source(np.zeros((1, 1, 4, 4)), space=ci.Space.of(4, ("t", "time", "y", "x")))
    with pytest.raises(ValueError, match=r"has axes t, time, y, x; .*at most one of time"):
        ci.write_ome_zarr(twice, tmp_path / "b.ome.zarr", progress=False)


def test_samples_that_lie_first_are_named_only(tmp_path: Path) -> None:
    source = ci.Source(np.zeros((2, 8, 8), "u1"), cell_shape=4, space=ci.Space.of(3, "syx"))
    ci.write_ome_zarr(source, tmp_path / "a.ome.zarr", progress=False)
    with ci.open_image(tmp_path / "a.ome.zarr") as found:
        assert found.axes == ("c", "y", "x")
        assert found.channels == ()
        assert found.chunks == ((2,), (4, 4), (4, 4))


def test_a_picture_of_16_bits_stays_as_it_is(tmp_path: Path) -> None:
    ci.write_ome_zarr(stack(3, "yxs"), tmp_path / "a.ome.zarr", progress=False)
    with ci.open_image(tmp_path / "a.ome.zarr") as found:
        assert [channel.contrast for channel in found.channels] == [(0, 65535)] * 3
