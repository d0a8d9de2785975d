"""Images and functions that the measurements use; all of them deterministic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import HALO

SIGMA = 2
assert HALO == 4 * SIGMA, "a Gaussian reaches as far as it is truncated, 4 sigma"
TILE = 128


def gaussian(block: np.ndarray) -> np.ndarray:
    # Imported here: most measurements do without SciPy, and starting is most of their time.
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(block, SIGMA, truncate=4)


def copy(block: np.ndarray) -> np.ndarray:
    return np.copy(block)


def plus_one(block: np.ndarray) -> np.ndarray:
    return block + 1


def fill_with_index(block: Any) -> None:
    block.data[...] = block.index % 251


def busy(block: np.ndarray, rounds: int) -> np.ndarray:
    """Return the block plus `busy_sum` of ``rounds``, which is Python's own work."""
    return block + np.uint8(busy_sum(rounds))


def busy_sum(rounds: int) -> int:
    """Return a number below 251 that takes time to find, during which the GIL is held."""
    total = 0
    for number in range(rounds):
        total = (total + number) % 251
    return total


calls: list[tuple[int, ...]] = []
"""Shapes that `counted` was called with."""


def counted(block: np.ndarray) -> np.ndarray:
    calls.append(block.shape)
    return np.copy(block)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"gaussian": gaussian, "copy": copy}


def noise(size: int) -> np.ndarray:
    """Return ``size`` cubed random float32; larger than 128 it repeats a block of 128 cubed."""
    rng = np.random.default_rng(7)
    return _repeat(rng.random((min(size, TILE),) * 3, np.float32), (size,) * 3)


def smooth(shape: tuple[int, ...]) -> np.ndarray:
    """Return smooth float32 noise in steps of 0.1, which compresses about 4:1; it repeats too."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(7)
    edges = tuple(min(extent, TILE) for extent in shape)
    tile = gaussian_filter(rng.standard_normal(edges, np.float32), SIGMA, mode="wrap")
    return _repeat(np.round(tile / tile.std(), 1), shape)


def write_smooth_zarr(path: Path, size: int, chunk: int) -> float:
    """Write `smooth` noise as zarr with default compression; return bytes / stored bytes."""
    import zarr

    image = smooth((size,) * 3)
    array = zarr.create_array(path, shape=image.shape, chunks=(chunk,) * 3, dtype=image.dtype)
    array[:] = image
    return float(array.nbytes / array.nbytes_stored())


def _repeat(tile: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if tile.shape == shape:
        return tile
    # As np.tile, without its temporary arrays: they would count as peak memory.
    image = np.empty(shape, tile.dtype)
    assert all(extent % TILE == 0 for extent in shape), f"{shape} must be multiples of {TILE}"
    split = tuple(n for extent in shape for n in (extent // TILE, TILE))
    image.reshape(split)[...] = tile[None, :, None, :, None, :]
    return image


class Coordinates:
    """A uint8 image of any size whose voxels are made from their coordinates when read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.dtype = np.dtype(np.uint8)
        self.ndim = len(shape)

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        block = np.zeros((1,) * self.ndim, np.uint8)
        for axis, part in enumerate(key):
            line = np.arange(part.start, part.stop) * (2 * axis + 1) % 251
            line = line.astype(np.uint8)
            block = block + line.reshape([-1 if a == axis else 1 for a in range(self.ndim)])
        return block

    def __dask_tokenize__(self) -> Any:
        return "Coordinates", self.shape
