"""``cellimg serve`` and ``cellimg view``, and specs that write OME-Zarr."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import yaml
import yaozarrs
import zarr
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.viewer.browser import find_browser

FUNCTIONS = """
from scipy import ndimage


def smooth(a):
    return ndimage.gaussian_filter(a.astype("f4"), 1)


def objects(a):
    return ndimage.label(a > 100)[0]
"""
IMAGE = np.random.default_rng(4).integers(0, 200, (20, 30), "u1")


@pytest.fixture
def folder(run) -> Path:
    """The current folder, with an image, functions and a spec."""
    tifffile.imwrite("in.tif", IMAGE, tile=(16, 16))
    Path("filters.py").write_text(FUNCTIONS)
    image = {"path": "in.tif", "axes": "yx", "units": "um", "scale": [2, 0.5]}
    stages = {
        "smooth": {
            "inputs": [image],
            "function": "filters.py:smooth",
            "halo": 4,
            "dtype": "float32",
            "cell_shape": 8,
            "target": "smooth.ome.zarr",
            "ome_zarr": {"levels": 2},
        },
        "objects": {
            "kind": "labels",
            "inputs": "smooth",
            "function": "filters.py:objects",
            "halo": 4,
            "target": "objects.ome.zarr",
        },
    }
    Path("spec.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return Path.cwd()


def serving(*arguments: str) -> contextlib.AbstractContextManager[dict[str, str]]:
    """Start ``cellimg serve``, and give the address of each layer."""
    return running("status", "serve", *arguments)


@contextlib.contextmanager
def running(last: str, *arguments: str) -> Iterator[dict[str, str]]:
    """Start ``cellimg``, give what it printed up to a line, and end it as Ctrl-C does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cellimg_dask", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        addresses = {}
        for line in process.stdout:
            name, _, address = line.rstrip("\n").partition("  ")
            addresses[name] = address
            if name == last:
                break
        assert last in addresses, process.stderr.read()
        yield addresses
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_a_file_and_a_store_are_served(folder):
    zarr.create_array("other.zarr", data=IMAGE.astype("i4"), chunks=(8, 8))
    with serving("in.tif", "second=other.zarr", "--labels", "second") as addresses:
        assert list(addresses) == ["in", "second", "status"]
        found = zarr.open_group(addresses["in"], mode="r")
        np.testing.assert_array_equal(found["0"][:], IMAGE)
        labels = zarr.open_group(addresses["second"], mode="r")
        np.testing.assert_array_equal(labels["0"][:], IMAGE)
        assert "image-label" in labels.attrs["ome"]
        host, token = addresses["in"].split("/")[2:4]
        assert len(token) > 16
        with pytest.raises(HTTPError, match="40"):
            urlopen(f"http://{host}/in/zarr.json")
        with urlopen(addresses["status"] + ".json") as answer:
            assert {layer["name"] for layer in json.load(answer)["layers"]} == {"in", "second"}


@pytest.mark.parametrize("said", [(), ("--labels", "it cells")])
def test_the_labels_of_a_store_are_served(folder, said):
    labels = ci.map_cells(np.copy, (IMAGE > 100).astype("i4"), dtype="i4", cell_shape=16)
    ci.write_ome_zarr(
        ci.map_cells(np.copy, IMAGE, dtype="u1", cell_shape=16),
        "it.ome.zarr",
        labels={"cells": labels},
        progress=False,
    )
    with serving("it.ome.zarr", *said) as addresses:
        assert list(addresses) == ["it", "it cells", "status"]
        found = zarr.open_group(addresses["it cells"], mode="r")
        np.testing.assert_array_equal(found["0"][:], IMAGE > 100)
        assert "image-label" in found.attrs["ome"]


def test_a_spec_is_computed_while_it_is_looked_at(folder):
    expected = ndimage.gaussian_filter(IMAGE.astype("f4"), 1)
    with serving("spec.yaml", "--no-token") as addresses:
        smooth = zarr.open_group(addresses["smooth"], mode="r")
        np.testing.assert_allclose(smooth["0"][:8, :8], expected[:8, :8], rtol=1e-5)
        with urlopen(addresses["status"] + ".json") as answer:
            status = {layer["name"]: layer for layer in json.load(answer)["layers"]}
        assert status["smooth"]["levels"][0]["cached"] == 1
        objects = zarr.open_group(addresses["objects"], mode="r")
        assert (objects["0"][:] > 0).sum() == (expected > 100).sum()
    assert not list(Path().glob("*.zarr"))


def test_a_spec_writes_ome_zarr(run, folder):
    done = run("run", "spec.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    assert "16 cells computed" in done.stdout
    for name in ("smooth.ome.zarr", "objects.ome.zarr"):
        yaozarrs.validate_zarr_store(name)
    smooth = ci.open_image("smooth.ome.zarr")
    assert [level.shape for level in smooth.levels] == [(20, 30), (10, 15)]
    assert smooth.space == ci.Space.of(2, "yx", "um", scale=(2, 0.5))
    np.testing.assert_allclose(smooth, ndimage.gaussian_filter(IMAGE.astype("f4"), 1), rtol=1e-5)
    assert ci.open_image("objects.ome.zarr").space == smooth.space
    assert run("status", "spec.yaml").exit_code == 0
    again = run("run", "spec.yaml", "--no-progress")
    assert "0 cells computed" in again.stdout
    plan = run("plan", "spec.yaml")
    assert plan.exit_code == 0
    assert re.search(r"levels +\(20, 30\), \(10, 15\)\n", plan.stdout)
    assert "objects.ome.zarr.run/0/pass1.zarr" in plan.stdout


def test_a_spec_names_channels(run, folder):
    np.save("cells.npy", np.zeros((2, 6, 6), "u1"))
    stage = {
        "inputs": {"path": "cells.npy", "axes": "cyx"},
        "function": "numpy:invert",
        "dtype": "u1",
        "target": "out.ome.zarr",
        "ome_zarr": {"channels": ["DAPI", "GFP"], "levels": 2},
    }
    Path("channels.yaml").write_text(yaml.safe_dump(stage))
    done = run("run", "channels.yaml", "--no-progress")
    assert done.exit_code == 0, done.output
    with ci.open_image("out.ome.zarr") as image:
        assert [channel.label for channel in image.channels] == ["DAPI", "GFP"]
        assert [level.shape for level in image.levels] == [(2, 6, 6), (2, 3, 3)]


def test_channels_and_labels_of_the_same_name(folder):
    stack = ci.Source(np.zeros((2, 6, 6), "u1"), space=ci.Space.of(3, "cyx"))
    labels = dict.fromkeys(("nuclei", "1", "other"), np.ones((6, 6), "u1"))
    ci.write_ome_zarr(
        stack, "cells.ome.zarr", channels=["nuclei", "actin"], labels=labels, progress=False
    )
    with running("look", "view", "cells.ome.zarr", "--no-browser") as addresses:
        for name in ("cells", "cells%20labels%20nuclei", "cells%20labels%201", "cells%20other"):
            with urlopen(f"{addresses['data']}/{name}/zarr.json") as answer:
                assert b"multiscales" in answer.read()


def test_a_file_is_viewed(run, folder):
    with running("look", "view", "in.tif", "--no-browser") as addresses:
        address, _, hint = addresses["look"].partition("  ")
        assert hint == "(until Ctrl-C)"
        with urlopen(address) as answer:
            assert b"neuroglancer" in answer.read()
        # Whoever tunnels needs this port as well.
        with urlopen(f"{addresses['data']}/in/zarr.json") as answer:
            assert b"multiscales" in answer.read()
    if find_browser() is None:
        pytest.skip("no Chromium here for the picture: apt install chromium")
    done = run("view", "in.tif", "--screenshot", "in.png")
    assert done.exit_code == 0, done.output
    assert len(np.unique(iio.imread("in.png"))) > 50


def test_the_demo_is_viewed(folder):
    demo = running("look", "demo", "in.tif", "--cell", "8", "--view", "--no-browser")
    with demo as addresses, urlopen(addresses["look"].partition("  ")[0]) as answer:
        assert b"neuroglancer" in answer.read()
    assert Path("demo-output/preview.png").is_file()


@pytest.mark.parametrize("command", [("serve", "in.tif"), ("view", "in.tif"), ("demo", "--view")])
def test_without_a_server_the_extra_is_named(run, folder, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = run(*command)
    assert refused.exit_code == 1, refused.output
    assert "pip install 'cellimg-dask[view]'" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ome_zarr": {"levels": 2}, "target": "a.zarr"}, "targets that end with .ome.zarr"),
        ({"ome_zarr": {"levels": 0}, "target": "a.ome.zarr"}, "ome_zarr.levels"),
        ({"inputs": [{"path": "in.tif", "scale": [1, 2, 3]}]}, "in.tif: scale must have one value"),
    ],
)
def test_specs_that_cannot_be_written(run, folder, changes, message):
    spec = {"inputs": "in.tif", "function": "filters.py:smooth", "dtype": "float32"}
    spec = spec | {"target": "a.zarr", **changes}
    Path("one.yaml").write_text(yaml.safe_dump(spec))
    refused = run("run", "one.yaml")
    assert refused.exit_code == 2
    assert message in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nothing.tif",), 1, "nothing.tif"),
        (("in.tif", "in.tif"), 2, "two layers are called in; give another name: NAME=in.tif"),
        (("in.tif", "--labels", "x"), 2, "--labels x: the layers are in"),
        (("a=spec.yaml",), 2, "called as its stages are"),
        (("in.tif", "--token", "x", "--no-token"), 2, "contradict"),
        (("in.tif", "--host", "0.0.0.0"), 1, "can be reached by other machines"),
        (("in.tif", "--host", "0.0.0.0"), 1, "choose a token yourself: --token NAME"),
        (("in.tif", "--token", "a/b"), 1, "a token is made of"),
        (("smooth=filters.py",), 1, "filters.py"),
        ((), 2, "Missing argument"),
    ],
)
def test_what_cannot_be_served(run, folder, arguments, code, message):
    refused = run("serve", *arguments)
    assert refused.exit_code == code, refused.output
    assert message in refused.stderr
