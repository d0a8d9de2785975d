"""Cells of an image of any size by Cellpose, block by block.

    pip install "cellimg-dask[demo]" cellpose
    python examples/cellpose_2d.py [IMAGE] [--channel-axis -1] [--out labels.zarr]

IMAGE is a TIFF, a .npy file or a zarr array with axes Y and X, and perhaps one of channels; without
one, a section of tissue from inside scikit-image is taken. The weights, 1.2 GB, are downloaded by
Cellpose when they are used for the first time. Ends with exit code 2 where the package or the
weights are missing, and says what to do.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import cellimg_dask as ci

HINT = """\
{error}
The weights of Cellpose are not here and could not be downloaded. Where there is a network, run

    python -c "from cellpose.models import CellposeModel; CellposeModel()"

and copy the folder .cellpose/models from there into your home folder here, or give a file of
weights by --model FILE.
"""


def load(name):
    """Load a model, Cellpose's own by name or from a file, on a GPU if there is one."""
    from cellpose.models import CellposeModel

    return CellposeModel(gpu=True, **({} if name is None else {"pretrained_model": str(name)}))


def predict(model, block, channel_axis, diameter):
    """Return labels, and flows and styles, which are not used here.

    The block has been normalised as a part of the whole image, so Cellpose must not do it again.
    It would drop masks that are larger than a part of the block, too.
    """
    return model.eval(
        block,
        channel_axis=channel_axis,
        diameter=diameter,
        normalize=False,
        max_size_fraction=1.0,
    )


def opened(path):
    """Return an array that reads what is asked for, and not the whole file."""
    if path.suffix in (".tif", ".tiff"):
        import tifffile
        import zarr

        return zarr.open_array(tifffile.imread(path, aszarr=True), mode="r")
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    import zarr

    return zarr.open_array(path, mode="r")


def draw(image, labels, channel_axis, path):
    """Save the corner of the image with the cells in colours."""
    import matplotlib.pyplot as plt
    from skimage.color import label2rgb

    corner = np.s_[:512, :512]
    shown = ci.normalize(image, 1, 99, channel_axis=channel_axis)
    if channel_axis is None:
        grey = shown[corner]
    else:
        grey = np.asarray(np.moveaxis(shown.to_dask(), channel_axis, -1)[corner].mean(-1))
    colours = label2rgb(labels[corner].astype(int), grey.clip(0, 1), alpha=0.3, bg_label=0)
    plt.imsave(path, colours)


def main(arguments=None):
    """Segment an image and store the labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--channel-axis", type=int, help="of the image, if it has one")
    parser.add_argument("--diameter", type=float, help="of cells; Cellpose's default is 30")
    parser.add_argument("--out", type=Path, default=Path("cellpose-labels.zarr"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--model", help="name, or file of weights")
    parser.add_argument("--cell", type=int, default=512, help="edge of a cell")
    # Two cells of 30, and a rest for what the network looks at.
    parser.add_argument("--halo", type=int, default=96, help="what a block sees around its cell")
    given = parser.parse_args(arguments)
    if find_spec("cellpose") is None:
        parser.exit(2, "This example needs one more package: pip install cellpose\n")

    channel_axis = given.channel_axis
    if given.image is None:
        import imageio.v3 as iio

        # Nuclei and fibres are dark in it.
        image, channel_axis = 255 - iio.imread(files("skimage") / "data" / "ihc.png"), -1
    else:
        image = opened(given.image)
    labels = ci.segment(
        predict,
        image,
        load_model=partial(load, given.model),
        params={"channel_axis": channel_axis, "diameter": given.diameter},
        channel_axis=channel_axis,
        normalize=(1, 99),
        halo=given.halo,
        cell_shape=given.cell,
        consecutive=True,
    )
    try:
        count = labels.num_objects()
    except ci.InitError as error:
        parser.exit(2, HINT.format(error=error))
    print(f"{count} cells in {labels.grid.num_cells} blocks of {given.cell} x {given.cell}")
    cut = labels.cut_objects()
    if cut.size:
        print(f"{cut.size} reach the end of a block: a wider --halo may show more of them")
    ci.run(labels, given.out)
    print(f"labels are in {given.out}")
    if given.picture is not None:
        draw(image, labels, channel_axis, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
