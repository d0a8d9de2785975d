"""`cellimg demo` from the file to the picture, against SciPy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import skimage
import tifffile
import zarr
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.cli.pipeline import Pipeline
from cellimg_dask.cli.timing import Timing

PNG = b"\x89PNG\r\n\x1a\n"


def oracle(image, sigmas=(1.5, 4.0)):
    """Compute the demo's two stages in one piece, by SciPy alone."""
    narrow, wide = sigmas
    smooth = ndimage.gaussian_filter(image.astype(np.float32), narrow)
    return smooth - ndimage.gaussian_filter(smooth, wide)


def gray(colours):
    red, green, blue = np.moveaxis(colours[..., :3].astype(np.float32), -1, 0)
    return np.float32(0.2126) * red + np.float32(0.7152) * green + np.float32(0.0722) * blue


def result_of(folder="demo-output"):
    return zarr.open_array(Path(folder) / "detail.zarr", mode="r")


def test_the_default_image_end_to_end(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the demo must not download anything")

    monkeypatch.setattr("skimage.data._fetchers._fetch", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    done = run("demo")
    assert done.exit_code == 0, done.output

    sample = iio.imread(Path(skimage.__path__[0]) / "data" / "retina.jpg")
    expected = oracle(gray(sample))
    written = result_of()
    np.testing.assert_array_equal(written[...], expected)
    assert written.metadata.zarr_format == 3
    assert written.chunks == (128, 128)
    assert written.metadata.dimension_names == ("y", "x")

    assert Path("demo-output/preview.png").read_bytes().startswith(PNG)
    picture = iio.imread("demo-output/preview.png")
    assert picture.shape[1] == 1300
    assert picture.std() > 10

    assert "colour becomes one channel: 0.2126 red + 0.7152 green + 0.0722 blue" in done.output
    for said in (
        "36 of 144 cells of luminance",
        "16 of 144 cells of smooth",
        "4 of 144 cells of detail",
        "equal to SciPy on the whole image, bit for bit; largest difference 0",
        "The rest",
        "map_overlap",
        "detail: 144 loads",
        "demo-output/preview.png",
    ):
        assert said in done.output, done.output
    # Each cell of each stage was computed once, region and rest together.
    assert re.findall(r"(\w+): (\d+) loads", done.output) == [
        ("luminance", "144"),
        ("smooth", "144"),
        ("detail", "144"),
    ]


@pytest.mark.parametrize(
    "name",
    ["stack.tif", "stack.npy", "v2.zarr", "sharded.zarr", "ome.zarr", "measured.h5"],
)
def test_a_volume_of_any_kind_equals_scipy(run, files, stack, name):
    done = run("demo", files[name], "--cell", 16)
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(result_of()[...], oracle(stack))
    assert result_of().chunks == (6, 16, 16)


@pytest.mark.parametrize("name", ["colour.png", "tiled-rgb.tif", "planar-rgb.tif"])
def test_colour_becomes_one_channel_and_says_so(run, files, colours, name):
    done = run("demo", files[name], "--cell", 16, "--out", "there")
    assert done.exit_code == 0, done.output
    assert "one channel" in done.output
    np.testing.assert_array_equal(result_of("there")[...], oracle(gray(colours)))


def test_alpha_is_left_out(run, tmp_path, stack):
    picture = np.stack([stack[0] % 256, stack[1] % 256], axis=-1).astype(np.uint8)
    iio.imwrite(tmp_path / "la.png", picture)
    done = run("demo", tmp_path / "la.png", "--cell", 16)
    assert done.exit_code == 0, done.output
    assert "alpha is left out" in done.output
    np.testing.assert_array_equal(result_of()[...], oracle(picture[..., 0]))


def test_channels_are_filtered_one_by_one(run, files, stack):
    done = run("demo", files["channels.ome.tif"], "--cell", 16)
    assert done.exit_code == 0, done.output
    assert "each position along c is filtered for itself" in done.output
    expected = np.stack([oracle(stack), oracle(stack[::-1])])
    np.testing.assert_array_equal(result_of()[...], expected)
    assert result_of().chunks == (1, 6, 16, 16)


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "float64", ">u2"])
def test_any_real_dtype(run, tmp_path, stack, dtype):
    image = (stack[0] % 120).astype(dtype)
    np.save(tmp_path / "image.npy", image)
    done = run("demo", tmp_path / "image.npy", "--cell", 32)
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(result_of()[...], oracle(image))


def test_not_a_number_stays_where_scipy_has_it(run, tmp_path, stack):
    image = stack[0].astype(np.float32)
    image[3, 4] = np.nan
    np.save(tmp_path / "image.npy", image)
    done = run("demo", tmp_path / "image.npy", "--cell", 16)
    assert done.exit_code == 0, done.output
    expected = oracle(image)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(result_of()[...], expected)


def test_a_different_result_is_said_and_fails(run, files, monkeypatch):
    right = Pipeline.whole_of

    def wrong(self, image, roi):
        result = right(self, image, roi)
        result[0, 0, 0] += 2
        return result

    monkeypatch.setattr(Pipeline, "whole_of", wrong)
    done = run("demo", files["stack.npy"], "--cell", 16)
    assert done.exit_code == 1
    assert "DIFFERENT FROM SciPy on the whole image; largest difference 2" in done.output


def test_an_image_too_large_for_scipy_is_checked_in_the_region(run, files, stack):
    ci.set_cache(stack.size * 4)
    done = run("demo", files["stack.npy"], "--cell", 16)
    assert done.exit_code == 0, done.output
    assert "equal to SciPy on the region" in done.output
    assert "Times" not in done.output
    np.testing.assert_array_equal(result_of()[...], oracle(stack))


# ---------------------------------------------------------------------- the output folder


def test_its_own_output_is_replaced_and_nothing_else(run, files):
    assert run("demo", files["stack.npy"], "--cell", 16).exit_code == 0
    Path("demo-output/notes.txt").write_text("mine")
    assert run("demo", files["gray.png"], "--cell", 16).exit_code == 0
    assert result_of().shape == (40, 50)
    assert Path("demo-output/notes.txt").read_text() == "mine"


def test_the_output_of_an_interrupted_run_is_replaced(run, files):
    assert run("demo", files["stack.npy"], "--cell", 16).exit_code == 0
    Path("demo-output/preview.png").unlink()
    Path("demo-output/detail.zarr/zarr.json").unlink()
    assert run("demo", files["stack.npy"], "--cell", 16).exit_code == 0
    assert result_of().shape == (6, 40, 50)


def test_a_folder_of_somebody_else_is_left_alone(run, files):
    Path("mine").mkdir()
    Path("mine/detail.zarr").write_text("precious")
    done = run("demo", files["gray.png"], "--out", "mine")
    assert done.exit_code == 1
    assert "did not make" in done.output
    assert [item.name for item in Path("mine").iterdir()] == ["detail.zarr"]
    assert Path("mine/detail.zarr").read_text() == "precious"


def test_an_empty_folder_is_taken_and_a_file_is_not(run, files):
    Path("empty").mkdir()
    assert run("demo", files["gray.png"], "--cell", 16, "--out", "empty").exit_code == 0
    Path("file").write_text("")
    done = run("demo", files["gray.png"], "--out", "file")
    assert done.exit_code == 1
    assert "is a file" in done.output


def test_an_image_inside_the_output_folder_is_refused(run, files):
    assert run("demo", files["stack.npy"], "--cell", 16).exit_code == 0
    done = run("demo", "demo-output/detail.zarr")
    assert done.exit_code == 1
    assert "lies in the output folder" in done.output
    assert result_of().shape == (6, 40, 50)


def test_a_bad_image_leaves_an_earlier_result(run, files):
    assert run("demo", files["stack.npy"], "--cell", 16).exit_code == 0
    assert run("demo", files["complex.npy"]).exit_code == 1
    assert result_of().shape == (6, 40, 50)


# ---------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.npy", "at least one voxel"),
        ("complex.npy", "dtype complex128"),
        ("bare-group.zarr", "holds no array"),
    ],
)
def test_an_image_that_cannot_be_filtered(run, files, name, said):
    done = run("demo", files[name])
    assert done.exit_code == 1
    assert said in done.output
    assert not Path("demo-output").exists()


def test_one_axis_is_too_few(run, tmp_path):
    np.save(tmp_path / "line.npy", np.arange(9))
    done = run("demo", tmp_path / "line.npy")
    assert done.exit_code == 1
    assert "two or more axes" in done.output


def test_a_cell_that_makes_too_many_files_is_refused_with_one_that_does_not(run, tmp_path):
    np.save(tmp_path / "plane.npy", np.zeros((400, 400), np.uint8))
    done = run("demo", tmp_path / "plane.npy", "--cell", 1)
    assert done.exit_code == 1
    assert "--cell 1 makes 160,000 cells" in done.output
    assert "--cell 4 makes 10,000" in done.output


@pytest.mark.parametrize("cell", ["0", "-3", "1.5", "large"])
def test_a_cell_must_be_a_positive_integer(run, cell):
    done = run("demo", f"--cell={cell}")
    assert done.exit_code == 2
    assert "--cell" in done.output


def test_a_damaged_chunk_is_an_error_that_names_the_cell(run, files):
    (files["ome.zarr"] / "full/c/0/0/0").write_bytes(b"not zstd")
    done = run("demo", files["ome.zarr"], "--cell", 16)
    assert done.exit_code == 1
    assert re.search(r"Error: smooth at cell \(0, \d, \d\) \[", done.output)
    assert "of input 0 failed" in done.output


@pytest.mark.parametrize("module", ["scipy.ndimage", "matplotlib", "imageio", "skimage"])
def test_a_missing_extra_is_named(run, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    done = run("demo")
    assert done.exit_code == 1
    assert "pip install 'cellimg-dask[demo]'" in done.output


def test_the_picture_leaves_pyplot_alone(run, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run("demo", files["gray.png"], "--cell", 16).exit_code == 0


def test_the_real_volume(run, shared_data, monkeypatch):
    monkeypatch.setattr("cellimg_dask.cli.timing.compare", lambda *args: [Timing("-", 1.0, 1)])
    done = run("demo", shared_data / "brain_signal.tif", "--cell", 128)
    assert done.exit_code == 0, done.output
    volume = tifffile.imread(shared_data / "brain_signal.tif")
    np.testing.assert_array_equal(result_of()[...], oracle(volume))
