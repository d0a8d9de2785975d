"""Intensities relative to percentiles of the whole image, and not of each block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import CellGrid, Roi
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import as_axes, fill_cells, grid_of, map_cells
from cellimg_dask.image.input import Input, as_input
from cellimg_dask.ops.histograms import quantiles
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["limits_of", "normalize", "scaled"]


def normalize(
    image: Any,
    low: float = 1,
    high: float = 99.8,
    *,
    channel_axis: SupportsIndex | None = None,
    clip: bool = False,
    eps: float = 1e-20,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> CellImg:
    """Return an image with two of its percentiles at 0 and 1, lazily.

    What csbdeep's ``normalize`` gives for the whole image, which is what networks such as StarDist
    are trained on: ``(image - p_low) / (p_high - p_low + eps)``. The percentiles are exact. They
    are computed once, when the first cell is read, and again after an edit of the image.

    Parameters
    ----------
    image : array-like or Input
        Whatever `map_cells` reads, of real numbers or bool.
    low, high : float
        The percentiles, from 0 to 100.
    channel_axis : int, optional
        Axis along which each channel has percentiles of its own; read channel by channel. Default:
        there is one pair for all voxels.
    clip : bool
        Whether values below 0 and above 1 become 0 and 1.
    eps : float
        Keeps an image of one value finite.
    cell_shape, cache, queue
        As in `map_cells`.

    Returns
    -------
    CellImg
        float32, of the image's shape. All not a number, if one voxel is.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.array([[10, 20, 30], [40, 50, 60]], "u2")
    >>> normalize(image, 0, 100, cell_shape=2)[:]
    array([[0. , 0.2, 0.4],
           [0.6, 0.8, 1. ]], dtype=float32)
    """
    item = as_input(image)
    axis = None
    if channel_axis is not None:
        (axis,) = as_axes(channel_axis, len(item.shape), "channel_axis")
    return map_cells(
        scaled,
        item,
        *limits_of(item, (low, high), axis, cache=cache, queue=queue),
        dtype=np.float32,
        cell_shape=cell_shape,
        params={"eps": float(eps), "clip": bool(clip)},
        cache=cache,
        queue=queue,
    )


def limits_of(
    item: Input,
    percentiles: tuple[float, float],
    channel_axis: int | None,
    *,
    cache: CellCache | str | None,
    queue: BlockQueue | None,
) -> tuple[Input, Input]:
    """Return what `scaled` is to make 0, and what 1: lazy images that broadcast to the image.

    They are float32 and have one voxel for each channel.
    """
    low, high = _checked(percentiles)
    array = Input(item.array, version=item.version)
    channels: list[Any] = [array]
    if channel_axis is not None:
        cells = grid_of(None, [array], (channel_axis,))
        channels = [
            fill_cells(
                _copy,
                cells,
                Input(
                    item.array, index_map=_OneChannel(channel_axis, number), version=item.version
                ),
                dtype=getattr(item.array.dtype, "numpy_dtype", item.array.dtype),
                cache=None,
                queue=queue,
            )
            for number in range(item.shape[channel_axis])
        ]
    pairs = [
        quantiles(channel, [low / 100, high / 100], cache=cache, queue=queue).image
        for channel in channels
    ]
    shape = tuple(n if axis == channel_axis else 1 for axis, n in enumerate(item.shape))
    found = [
        fill_cells(
            _Side(side),
            CellGrid(shape, tuple(max(1, n) for n in shape)),
            *(Input(pair, halo=0, index_map=_FirstVoxel(pair.ndim)) for pair in pairs),
            dtype=np.float32,
            cache=cache,
            queue=queue,
        )
        for side in (0, 1)
    ]
    # Where the image goes on beyond its border, so do its percentiles.
    return Input(found[0], boundary="edge"), Input(found[1], boundary="edge")


def scaled(
    array: NDArray[Any],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    *,
    eps: float = 1e-20,
    clip: bool = False,
) -> NDArray[np.float32]:
    """Return a new array in which ``low`` is 0 and ``high`` is 1."""
    values = array.astype(np.float32)
    values -= low
    values /= high - low + np.float32(eps)
    return np.clip(values, 0, 1, out=values) if clip else values


def _checked(percentiles: Any) -> tuple[float, float]:
    try:
        low, high = map(float, percentiles)
    except (TypeError, ValueError):
        raise TypeError(
            f"percentiles must be two numbers such as (1, 99.8), got {percentiles!r}"
        ) from None
    if not 0 <= low < high <= 100:
        raise ValueError(
            f"percentiles must be from 0 to 100, the lower one first, got {percentiles!r}"
        )
    return low, high


def _copy(block: Block) -> None:
    block.data[...] = block.inputs[0].reshape(block.shape)


@dataclass(frozen=True)
class _Side:
    """Puts the lower or the upper percentile of all channels side by side."""

    side: int

    def __call__(self, block: Block) -> None:
        found = [pair.item()[self.side] for pair in block.inputs]
        block.data[...] = np.reshape(found, block.shape)


@dataclass(frozen=True)
class _FirstVoxel:
    """From any cell to the one voxel of an image."""

    ndim: int

    def __call__(self, roi: Roi) -> Roi:
        return Roi((0,) * self.ndim, (1,) * self.ndim)


@dataclass(frozen=True)
class _OneChannel:
    """From a cell without the axis of channels to its box in one channel."""

    axis: int
    number: int

    def __call__(self, roi: Roi) -> Roi:
        start, stop = list(roi.start), list(roi.stop)
        start.insert(self.axis, self.number)
        stop.insert(self.axis, self.number + 1)
        return Roi(tuple(start), tuple(stop))
