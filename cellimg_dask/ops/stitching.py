"""What is done for each block, and each node of the tree, when labels are stitched.

Values that travel: each can be pickled, compared, and says what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.errors import ResultError
from cellimg_dask.blocks.wrappers import FunctionWrapper, call
from cellimg_dask.geometry import CellGrid, Halo, Roi
from cellimg_dask.ops.linking import Down, Joined, Linking
from cellimg_dask.ops.overlap import SideBySide

__all__ = [
    "CutBands",
    "FindComponents",
    "FindObjects",
    "JoinBlocks",
    "JoinNodes",
    "ListCut",
    "LookUpIds",
    "NodeAbove",
    "NodeOfCell",
    "Resolve",
    "Then",
]


@dataclass(frozen=True)
class Then:
    """One map after the other."""

    first: Callable[[Roi], Roi]
    second: Callable[[Roi], Roi]

    def __call__(self, roi: Roi) -> Roi:
        """Return what the second makes of what the first returns."""
        return self.second(self.first(roi))


@dataclass(frozen=True)
class NodeAbove:
    """From a node, or a block, to the node above it."""

    size: int

    def __call__(self, roi: Roi) -> Roi:
        """Return the box of one node."""
        start = tuple(low // self.size for low in roi.start)
        return Roi(start, tuple(low + 1 for low in start))


@dataclass(frozen=True)
class NodeOfCell:
    """From a cell, in voxels, to the node above its block."""

    grid: CellGrid
    size: int

    def __call__(self, roi: Roi) -> Roi:
        """Return the box of one node."""
        start = tuple(
            low // (size * self.size)
            for low, size in zip(roi.start, self.grid.cell_shape, strict=True)
        )
        return Roi(start, tuple(low + 1 for low in start))


@dataclass(frozen=True)
class FindComponents:
    """Labels the connected components of a block."""

    structure: NDArray[np.bool_]
    layout: SideBySide

    __name__ = "label"

    def __call__(self, block: Block) -> None:
        """Write the labels into the block's place."""
        from scipy.ndimage import label

        (mask,) = block.inputs
        if mask.dtype.kind not in "biu" and mask.dtype.char not in "fd":
            # SciPy has no code for half precision, long and complex numbers.
            mask = mask != 0
        if mask.ndim:
            place = block.data[self.layout.inside(block.position)]
            label(mask, self.structure, output=place)
        else:
            block.data[...] = mask != 0


@dataclass(frozen=True)
class FindObjects(FunctionWrapper):
    """Puts what the user's function found in a block into its place."""

    layout: SideBySide
    modes: frozenset[str]
    """What lies beyond the borders of the inputs."""

    def __call__(self, block: Block) -> None:
        """Call the function, check what it returns, and write it."""
        position = block.position
        inside = self.layout.inside(position)
        result = call(self.function, *block.inputs, **block.params)
        if isinstance(result, tuple) and any(isinstance(part, np.ndarray) for part in result):
            self._refuse(
                position,
                f"a tuple of {len(result)}, expected an array of labels; of scipy.ndimage.label "
                f"these are the first of two: return label(…)[0]",
            )
        if isinstance(result, np.ma.MaskedArray):
            self._refuse(
                position,
                "a masked array, whose mask would be lost; return result.filled(0)",
            )
        labels = np.asarray(result)
        # Blocks end at the border of the image, unless something is put beyond it.
        clipped = block.data[inside].shape
        expected = clipped if "none" in self.modes else block.data.shape
        if labels.dtype.kind not in "iub":
            self._refuse(position, f"labels of {labels.dtype}, expected integers")
        padded = bool(self.modes - {"none"}) and labels.shape == block.data.shape
        if labels.shape != expected and not padded:
            self._refuse(
                position,
                f"labels of shape {labels.shape}, expected {expected}, the halo included: "
                f"neighbours are linked by what both label there",
            )
        if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
            self._refuse(position, f"the label {labels.min()}, expected 0 and above")
        if labels.size and labels.max() > labels.size:
            labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape) + (
                0 if (labels == 0).any() else 1
            )
        block.data[inside] = labels[inside] if padded else labels

    def _refuse(self, position: tuple[int, ...], what: str) -> None:
        roi = self.layout.grid.roi(position)
        raise ResultError(self.__name__, position, roi, f"returned {what}")


@dataclass(frozen=True)
class CutBands:
    """Cuts what the neighbours need from the labels of a block."""

    linking: Linking

    def __call__(self, block: Block) -> Any:
        """Return the bands of the block."""
        return self.linking.bands(block.inputs[0], block.position)


@dataclass(frozen=True)
class JoinBlocks:
    """Joins what is linked in a group of blocks: a node next to the leaves."""

    linking: Linking
    size: int

    def __call__(self, block: Block) -> Joined:
        """Return what the node knows."""
        grid = CellGrid(self.linking.layout.grid.grid_shape, (self.size,) * len(block.position))
        group = grid.roi(block.position)
        near = group.grow(Halo.of(1, grid.ndim)).clip(grid.shape)
        return self.linking.join_blocks(block.inputs[0], near, group)


@dataclass(frozen=True)
class JoinNodes:
    """Joins what is linked in the nodes below, ``level`` steps above those next to the leaves."""

    linking: Linking
    size: int
    level: int

    def __call__(self, block: Block) -> Joined:
        """Return what the node knows."""
        shape = self.linking.layout.grid.grid_shape
        grid = CellGrid(shape, (self.size ** (self.level + 1),) * len(shape))
        return self.linking.join_nodes(block.inputs[0], grid.roi(block.position))


@dataclass(frozen=True)
class Resolve:
    """Tells a node the final ids of what it passed on."""

    linking: Linking
    size: int

    def __call__(self, block: Block) -> Down:
        """Return what the node is told."""
        node: Joined = block.inputs[0].item()
        above: Down | None = block.inputs[1].item() if len(block.inputs) > 1 else None
        return self.linking.resolve(node, above, _place(block.position, self.size))


@dataclass(frozen=True)
class LookUpIds:
    """Gives the labels of a cell their final ids."""

    linking: Linking
    size: int

    def __call__(self, block: Block) -> None:
        """Write the ids."""
        labels, told = block.inputs
        in_core = self.linking.in_core(labels)
        position = tuple(
            low // size
            for low, size in zip(block.min, self.linking.layout.grid.cell_shape, strict=True)
        )
        ids = self.linking.final_ids(told.item(), _place(position, self.size), position, in_core)
        # No label lies outside; to clip is several times as fast as to look.
        if block.data.flags.c_contiguous:
            np.take(ids, labels, out=block.data, mode="clip")
            return
        if block.data.ndim == 1:
            block.data[...] = np.take(ids, labels, mode="clip")
            return
        # A part of a larger array is written plane by plane, by way of the processor's cache.
        for plane, given in zip(block.data, labels, strict=True):
            plane[...] = np.take(ids, given, mode="clip")


@dataclass(frozen=True)
class ListCut:
    """The ids of the objects of a block that it may not have seen whole."""

    linking: Linking
    size: int

    def __call__(self, block: Block) -> Any:
        """Return the ids, in no order."""
        bands, told = (given.item() for given in block.inputs)
        if bands.is_cut is None:
            return np.empty(0, np.uint64)
        place = _place(block.position, self.size)
        ids = self.linking.final_ids(told, place, block.position, bands.in_core)
        return ids[bands.is_cut]


def _place(position: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return which child of the node above a node, or a block, is."""
    return tuple(p % size for p in position)
