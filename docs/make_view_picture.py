"""Make the viewer's pictures: view.png, a volume and objects found in it; channels.png.

    python docs/make_view_picture.py FOLDER

``FOLDER`` holds ``brain_signal.tif`` and ``brain_background.tif``, two channels of a crop of a
mouse brain with labelled cells: test data of brainglobe/cellfinder
(tests/data/integration/detection/crop_planes), BSD 3-Clause, Copyright (c) 2020 Adam Tyson,
University College London. Chromium has to be installed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.server.layers import Layer
from cellimg_dask.viewer.view import view

IMAGES = Path(__file__).parent / "images"


def bright(data: np.ndarray) -> np.ndarray:
    """What is brighter than its surroundings, larger than noise."""
    values = data.astype(np.float32)
    found = ndimage.gaussian_filter(values, (0.6, 1.2, 1.2))
    return found - ndimage.gaussian_filter(values, (2, 6, 6)) > 260


def together(signal: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Two images as channels of one."""
    return np.stack([signal, background])


def show_channels(folder: Path) -> None:
    """The signal of cells over the light that the tissue gives by itself."""
    given = [ci.open_image(folder / f"brain_{name}.tif") for name in ("signal", "background")]
    cells = (2, 10, 128, 128)
    both = ci.map_cells(together, *given, new_axis={0: 2}, cell_shape=cells, dtype="u2")
    both = both.with_space(axes="czyx", units="um", scale=(1, 5, 2, 2))
    looks = [
        ci.Channel("signal", "#ff9020", (100, 1500)),
        ci.Channel("background", "#2060ff", (50, 500)),
    ]
    with view({"brain": Layer(both, channels=looks)}, layout="xy") as shown:
        shown.move_to((0, 15, 225, 215))
        shown.zoom(0.6)
        with shown.viewer.txn() as state:
            state.show_axis_lines = False
            state.show_default_annotations = False
        shown.screenshot(IMAGES / "channels.png", size=(640, 400), timeout=120)


def show_objects(folder: Path) -> None:
    """Cells that were found, in planes and as surfaces."""
    raw = ci.Source(
        tifffile.imread(folder / "brain_signal.tif"),
        cell_shape=(10, 128, 128),
        space=ci.Space.of(3, "zyx", units="um", scale=(5, 2, 2)),
    )
    cells = ci.label(ci.map_cells(bright, raw, halo=(8, 24, 24), dtype=bool))
    began = time.perf_counter()
    layers = {"raw": Layer(raw, contrast=(50, 1500)), "cells": Layer(cells, opacity=0.6)}
    with view(layers) as shown:
        shown.move_to((15, 225, 215))
        shown.zoom(0.6)
        found = np.unique(cells[...])
        shown.meshes("cells", found[found > 0])
        with shown.viewer.txn() as state:
            state.show_axis_lines = False
            state.show_default_annotations = False
            state.cross_section_background_color = "#000000"
            state.projection_scale = 400
            state.projection_orientation = [0.35, 0.15, 0.06, 0.92]
            state.layers["cells"].layer.ignore_null_visible_set = False
        shown.screenshot(IMAGES / "view.png", size=(1200, 800), timeout=120)
    print(f"{cells.num_objects()} objects, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    show_objects(Path(sys.argv[1]))
    show_channels(Path(sys.argv[1]))
