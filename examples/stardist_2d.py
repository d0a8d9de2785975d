"""Nuclei of an image of any size by StarDist, block by block.

    pip install "cellimg-dask[demo]" stardist tensorflow
    python examples/stardist_2d.py [IMAGE] [--out labels.zarr] [--picture labels.png]

IMAGE is a TIFF, a .npy file or a zarr array with axes Y and X; without one, a picture of nuclei is
made up. The weights are downloaded by StarDist when they are used for the first time. Ends with
exit code 2 where the packages or the weights are missing, and says what to do.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import cellimg_dask as ci

HINT = """\
{error}
The weights of StarDist are not here and could not be downloaded. Where there is a network, run

    python -c "from stardist.models import StarDist2D; StarDist2D.from_pretrained('{model}')"

and copy the folder .keras/models/StarDist2D from there into your home folder here, or give a model
of your own by --model FOLDER.
"""


def load(name):
    """Load a model: StarDist's own by name, or from a folder."""
    from stardist.models import StarDist2D

    folder = Path(name)
    if folder.is_dir():
        return StarDist2D(None, name=folder.name, basedir=folder.parent)
    return StarDist2D.from_pretrained(name)


def predict(model, block):
    """Return labels, and details of each nucleus, which are not used here."""
    return model.predict_instances(block)


def made_up(shape=(1200, 1600), count=2500):
    """Return a picture of nuclei, brighter on one side than on the other."""
    rng = np.random.default_rng(7)
    image = np.zeros(shape)
    rows, columns = np.indices((41, 41)) - 20
    for row, column in rng.uniform(20, np.array(shape) - 21, (count, 2)).astype(int):
        long, short, turn = *rng.uniform(7, 12, 2), rng.uniform(0, np.pi)
        along = rows * np.cos(turn) + columns * np.sin(turn)
        across = columns * np.cos(turn) - rows * np.sin(turn)
        away = (along / long) ** 2 + (across / short) ** 2
        part = image[row - 20 : row + 21, column - 20 : column + 21]
        np.maximum(part, rng.uniform(0.5, 1) * np.exp(-(away**3)), out=part)
    light = np.linspace(0.5, 1, shape[1])
    return (1000 + 9000 * image * light + rng.normal(0, 150, shape)).clip(0, 65535).astype("u2")


def opened(path):
    """Return an array that reads what is asked for, and not the whole file."""
    if path is None:
        return made_up()
    if path.suffix in (".tif", ".tiff"):
        import tifffile
        import zarr

        return zarr.open_array(tifffile.imread(path, aszarr=True), mode="r")
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    import zarr

    return zarr.open_array(path, mode="r")


def draw(image, labels, path):
    """Save the corner of the image with the nuclei in colours."""
    import matplotlib.pyplot as plt
    from skimage.color import label2rgb

    corner = np.s_[:512, :512]
    shown = np.asarray(ci.normalize(image)[corner])
    colours = label2rgb(labels[corner].astype(int), shown.clip(0, 1), alpha=0.3, bg_label=0)
    plt.imsave(path, colours)


def main(arguments=None):
    """Segment an image and store the labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("stardist-labels.zarr"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--model", default="2D_versatile_fluo", help="name, or folder of a model")
    parser.add_argument("--cell", type=int, default=512, help="edge of a cell")
    # The network looks 94 voxels far; nuclei of up to 34 are then found as in the whole image.
    parser.add_argument("--halo", type=int, default=128, help="what a block sees around its cell")
    given = parser.parse_args(arguments)
    missing = [name for name in ("stardist", "tensorflow") if find_spec(name) is None]
    if missing:
        parser.exit(2, f"This example needs more packages: pip install {' '.join(missing)}\n")

    image = opened(given.image)
    labels = ci.segment(
        predict,
        image,
        load_model=partial(load, given.model),
        normalize=(1, 99.8),
        halo=given.halo,
        cell_shape=given.cell,
        multiple_of=16,
        consecutive=True,
    )
    try:
        count = labels.num_objects()
    except ci.InitError as error:
        parser.exit(2, HINT.format(error=error, model=given.model))
    print(f"{count} nuclei in {labels.grid.num_cells} cells of {given.cell} x {given.cell}")
    cut = labels.cut_objects()
    if cut.size:
        print(f"{cut.size} reach the end of a block: a wider --halo may show more of them")
    ci.run(labels, given.out)
    print(f"labels are in {given.out}")
    if given.picture is not None:
        draw(image, labels, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
