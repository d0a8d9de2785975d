"""Blocks that overlap, laid side by side in one image so that each has voxels of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cellimg_dask.geometry import CellGrid, Halo, Roi

__all__ = ["BlockOfCell", "CellOfBlock", "SideBySide", "WithAxes"]


@dataclass(frozen=True)
class SideBySide:
    """Where the block of each cell lies in the image of all blocks.

    A block is a cell and its halo. At the border of the image, where a block is clipped, its
    place is as large as elsewhere and what lies outside is 0.
    """

    grid: CellGrid
    """The cells, without halo."""
    halo: Halo
    """What a block has in addition."""

    @cached_property
    def blocks(self) -> CellGrid:
        """Grid of the image of all blocks: one cell per block."""
        widths = self.widths
        return CellGrid(
            tuple(
                extent + steps * width
                for extent, steps, width in zip(
                    self.grid.shape, self.grid.grid_shape, widths, strict=True
                )
            ),
            tuple(cell + width for cell, width in zip(self.grid.cell_shape, widths, strict=True)),
        )

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How far neighbours overlap along each axis."""
        return tuple(map(sum, zip(self.halo.before, self.halo.after, strict=True)))

    def core(self, position: tuple[int, ...]) -> tuple[slice, ...]:
        """Return where the cell lies in its block."""
        roi = self.grid.roi(position)
        return tuple(
            slice(before, before + extent)
            for before, extent in zip(self.halo.before, roi.shape, strict=True)
        )

    def inside(self, position: tuple[int, ...]) -> tuple[slice, ...]:
        """Return which part of a block lies in the image."""
        block = self.grid.roi(position).grow(self.halo)
        seen = block.clip(self.grid.shape)
        return seen.shift([-low for low in block.start]).slices


@dataclass(frozen=True)
class CellOfBlock:
    """From a block, in the image of all blocks, to its cell in an input of the given shape.

    The axes of the input are the image's last ones, some perhaps of length 1, as NumPy broadcasts.
    """

    layout: SideBySide
    shape: tuple[int, ...]

    def __call__(self, block: Roi) -> Roi:
        """Return the box of the cell, without halo."""
        layout = self.layout
        position = tuple(
            low // size for low, size in zip(block.start, layout.blocks.cell_shape, strict=True)
        )
        cell = layout.grid.roi(position)
        skip = layout.grid.ndim - len(self.shape)
        wide = [
            one == 1 != extent
            for one, extent in zip(self.shape, layout.grid.shape[skip:], strict=True)
        ]
        return Roi(
            tuple(0 if one else low for one, low in zip(wide, cell.start[skip:], strict=True)),
            tuple(1 if one else high for one, high in zip(wide, cell.stop[skip:], strict=True)),
        )


@dataclass(frozen=True)
class BlockOfCell:
    """From a cell to where it lies in the image of all blocks, without its halo."""

    layout: SideBySide

    def __call__(self, cell: Roi) -> Roi:
        """Return the box of the cell in the image of all blocks."""
        start = tuple(
            low // size * block + before
            for low, size, block, before in zip(
                cell.start,
                self.layout.grid.cell_shape,
                self.layout.blocks.cell_shape,
                self.layout.halo.before,
                strict=True,
            )
        )
        return Roi(start, tuple(map(sum, zip(start, cell.shape, strict=True))))


@dataclass(frozen=True)
class WithAxes:
    """From a box to one that has some axes more, of which all is read."""

    place: Callable[[Roi], Roi]
    """What gives the box without these axes."""
    axes: tuple[int, ...]
    """Where they are, sorted."""
    extents: tuple[int, ...]
    """How long they are."""

    def __call__(self, roi: Roi) -> Roi:
        """Return the box with the axes."""
        box = self.place(roi)
        start, stop = list(box.start), list(box.stop)
        for axis, extent in zip(self.axes, self.extents, strict=True):
            start.insert(axis, 0)
            stop.insert(axis, extent)
        return Roi(tuple(start), tuple(stop))
