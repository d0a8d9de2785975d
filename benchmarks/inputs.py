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
    if size <= TILE:
        return rng.random((size,) * 3, np.float32)
    return _repeat(rng.random((TILE,) * 3, np.float32), size)


def write_smooth_zarr(path: Path, size: int, chunk: int) -> float:
    """Write smooth float32 noise as zarr with default compression; return bytes / stored bytes."""
    import zarr
    from scipy.ndimage import gaussian_filter

    edge = min(size, TILE)
    rng = np.random.default_rng(7)
    tile = gaussian_filter(rng.standard_normal((edge,) * 3, np.float32), SIGMA, mode="wrap")
    tile = np.round(tile / tile.std(), 1)
    array = zarr.create_array(path, shape=(size,) * 3, chunks=(chunk,) * 3, dtype=np.float32)
    array[:] = tile if edge == size else _repeat(tile, size)
    return float(array.nbytes / array.nbytes_stored())


def _repeat(tile: np.ndarray, size: int) -> np.ndarray:
    # As np.tile, without its temporary arrays: they would count as peak memory.
    times, rest = divmod(size, TILE)
    assert rest == 0, f"size {size} must be a multiple of {TILE}"
    image = np.empty((size,) * 3, tile.dtype)
    image.reshape(times, TILE, times, TILE, times, TILE)[...] = tile[None, :, None, :, None, :]
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
