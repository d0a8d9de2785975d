"""Make docs/images/view.png: a volume and objects found in it, in the viewer.

    python docs/make_view_picture.py FOLDER

``FOLDER`` holds ``brain_signal.tif``, a crop of a mouse brain with labelled cells: test data of
brainglobe/cellfinder (tests/data/integration/detection/crop_planes/ch0), BSD 3-Clause,
Copyright (c) 2020 Adam Tyson, University College London. Chromium has to be installed.
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


def bright(data: np.ndarray) -> np.ndarray:
    """What is brighter than its surroundings, larger than noise."""
    values = data.astype(np.float32)
    found = ndimage.gaussian_filter(values, (0.6, 1.2, 1.2))
    return found - ndimage.gaussian_filter(values, (2, 6, 6)) > 260


def main() -> None:
    folder = Path(sys.argv[1])
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
        shown.screenshot(
            Path(__file__).parent / "images" / "view.png", size=(1200, 800), timeout=120
        )
    print(f"{cells.num_objects()} objects, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
