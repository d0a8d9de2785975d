"""Small image files of every kind that the command line reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `cellimg` with some arguments in an empty folder, and show a traceback if it crashed."""
    from cellimg_dask.cli import main

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def imported():
    """Return the modules that a Python imports which runs `cellimg` with some arguments."""
    code = (
        "import sys\n"
        "from cellimg_dask.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('imported', *sys.modules)\n"
    )

    def imported(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        heading, *modules = done.stdout.splitlines()[-1].split()
        assert heading == "imported"
        return set(modules)

    return imported


@pytest.fixture
def stack() -> NDArray[np.uint16]:
    """A volume with a ramp and spots, so that every filter has something to do."""
    z, y, x = np.ogrid[:6, :40, :50]
    ramp = 20 * z + 3 * y + 2 * x
    return (ramp + 900 * ((7 * z + 5 * y + 3 * x) % 23 == 0)).astype(np.uint16)


@pytest.fixture
def colours(stack) -> NDArray[np.uint8]:
    """A picture of red, green and blue."""
    return np.stack([stack[0] // 8, stack[1] // 9, stack[2] // 10], axis=-1).astype(np.uint8)


@pytest.fixture
def files(tmp_path, stack, colours) -> dict[str, Path]:
    """One file of each kind, by kind."""
    folder = tmp_path / "files"
    folder.mkdir()
    at = {
        name: folder / name
        for name in (
            "gray.png",
            "colour.png",
            "colour.jpg",
            "stack.tif",
            "tiled-rgb.tif",
            "planar-rgb.tif",
            "channels.ome.tif",
            "two-series.tif",
            "stack.npy",
            "empty.npy",
            "complex.npy",
            "v2.zarr",
            "sharded.zarr",
            "ome.zarr",
            "bare-group.zarr",
            "measured.h5",
        )
    }
    iio.imwrite(at["gray.png"], stack[0].astype(np.uint8))
    iio.imwrite(at["colour.png"], colours)
    iio.imwrite(at["colour.jpg"], colours)
    tifffile.imwrite(at["stack.tif"], stack, metadata={"axes": "ZYX"}, compression="zlib")
    tifffile.imwrite(at["tiled-rgb.tif"], colours, photometric="rgb", tile=(16, 16))
    tifffile.imwrite(
        at["planar-rgb.tif"],
        np.moveaxis(colours, -1, 0),
        photometric="rgb",
        planarconfig="separate",
    )
    tifffile.imwrite(
        at["channels.ome.tif"], np.stack([stack, stack[::-1]]), metadata={"axes": "CZYX"}
    )
    with tifffile.TiffWriter(at["two-series.tif"]) as two:
        two.write(stack[0])
        two.write(stack[:, :20, :30], metadata={"axes": "ZYX"})
    np.save(at["stack.npy"], stack)
    np.save(at["empty.npy"], stack[:0])
    np.save(at["complex.npy"], stack[0] * 1j)

    zarr.create_array(at["v2.zarr"], data=stack, chunks=(2, 16, 16), zarr_format=2)
    zarr.create_array(
        at["sharded.zarr"],
        data=stack,
        chunks=(2, 16, 16),
        shards=(4, 32, 32),
        dimension_names=("z", "y", "x"),
    )
    group = zarr.create_group(at["ome.zarr"])
    # Listed alphabetically the labels would come first.
    group.create_array("a_label", data=stack[:, ::4, ::4] % 7)
    group.create_array("full", data=stack, chunks=(2, 16, 16))
    group.create_array("half", data=stack[::2, ::2, ::2])
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": name, "type": "space"} for name in "zyx"],
                "datasets": [{"path": "full"}, {"path": "half"}],
            }
        ],
    }
    zarr.create_group(at["bare-group.zarr"])
    with h5py.File(at["measured.h5"], "w") as file:
        file["exposure"] = 0.25
        file.create_dataset("raw/volume", data=stack, chunks=(1, 20, 25), compression="gzip")
    return at
