"""Images of labels: those of each block, and those of the objects of the whole image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, Halo, Roi, Space, parse_index
from cellimg_dask.image.cellimg import CellImg, check_parameter, image_arrived
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.node import ImageNode, defining
from cellimg_dask.ops.linking import Joined, Linking
from cellimg_dask.ops.overlap import CellOfBlock, SideBySide, WithAxes
from cellimg_dask.ops.stitching import FindObjects

__all__ = ["BlockLabels", "LabelImg"]


class BlockLabels(CellImg):
    """Labels of all blocks, each with its halo, side by side: what `map_labels` stitches.

    Of dtype int32; each block has numbers of its own.
    """

    def __init__(self, node: ImageNode, layout: SideBySide) -> None:
        super().__init__(node)
        self.layout = layout
        """Where each block lies."""

    def set_params(self, **params: Any) -> None:
        """Change parameters of the function; see `CellImg.set_params`."""
        function = self.loader.function
        found = getattr(function, "function", None)
        for name in params:
            if not isinstance(found, FindObjects):
                raise TypeError(f"{function.name} has no parameter {name!r}; it has none")
            check_parameter(found.function, function.name, name)
        super().set_params(**params)

    def snapshot(self) -> BlockLabels:
        """Return the labels as they are now; see `CellImg.snapshot`."""
        return BlockLabels(super().snapshot().node, self.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blocks_arrived, (self.layout, *super().__reduce__())


class LabelImg(CellImg):
    """Labels of objects, each with one id in the whole image; uint64, 0 for background."""

    def __init__(
        self,
        node: ImageNode,
        blocks: Any,
        linking: Linking,
        bands: CellImg,
        root: CellImg,
        cut: CellImg,
        space: Space | None = None,
    ) -> None:
        super().__init__(node, space)
        self.blocks = blocks
        """The labels of each block, as they were before they were stitched."""
        self._linking = linking
        self._bands = bands
        self._root = root
        self._cut = cut

    @property
    def params(self) -> Mapping[str, Any]:
        """Keyword parameters of the function that finds the objects of a block."""
        return self.blocks.params if isinstance(self.blocks, BlockLabels) else super().params

    def set_params(self, **params: Any) -> None:
        """Change parameters of the function that finds the objects of a block.

        All that reads these blocks changes along; see `CellImg.set_params`.

        Raises
        ------
        TypeError
            If the function has no such parameter, or the blocks are not computed here.
        """
        if not isinstance(self.blocks, BlockLabels):
            raise TypeError(
                "labels of blocks that were given as an array have no parameters; set those of "
                "the image that finds them"
            )
        self.blocks.set_params(**params)

    def invalidate(self, roi: Any = ...) -> None:
        """Forget what was found from a region, because an input changed there.

        All blocks that read a voxel of the region are labelled again, those included that have
        it in their halo; an input with an ``index_map`` counts as changed where it was read for
        cells that meet the region. See `CellImg.invalidate`.
        """
        box, _ = parse_index(roi, self.shape)
        if not box.size:
            return
        layout = self._linking.layout
        if not isinstance(self.blocks, BlockLabels):
            near = box.grow(Halo(layout.halo.after, layout.halo.before)).clip(self.shape)
            self._bands.node.invalidate(_positions_of(layout.grid, near))
            super().invalidate(near)
            return
        first = _positions_of(layout.grid, box)
        sizes = layout.blocks.cell_shape
        region = Roi(
            tuple(low * size for low, size in zip(first.start, sizes, strict=True)),
            tuple(
                min(high * size, extent)
                for high, size, extent in zip(first.stop, sizes, self.blocks.shape, strict=True)
            ),
        )
        places = [item.index_map for item in self.blocks.loader.planner.inputs]
        under = [
            place.under(box) if isinstance(place, (CellOfBlock, WithAxes)) else None
            for place in places
        ]
        self.blocks.node.invalidate(region, under)

    def snapshot(self) -> LabelImg:
        """Return the labels as they are now; see `CellImg.snapshot`."""
        # All of one moment.
        with defining():
            blocks = self.blocks.snapshot() if isinstance(self.blocks, CellImg) else self.blocks
            parts = (self._bands.snapshot(), self._root.snapshot(), self._cut.snapshot())
            return LabelImg(super().snapshot().node, blocks, self._linking, *parts, self.space)

    def __reduce__(self) -> tuple[Any, ...]:
        # All of one moment.
        with defining():
            loaders = [part.loader for part in (self, self._bands, self._root, self._cut)]
            blocks = copy(self.blocks) if isinstance(self.blocks, CellImg) else self.blocks
        return _labels_arrived, (blocks, self._linking, self.space, *loaders)

    def num_objects(self) -> int:
        """Return how many objects there are; finds the labels of all blocks if need be."""
        if not self._root.size:
            return 0
        joined: Joined = self._root[...].item()
        return joined.num_objects

    def cut_objects(self) -> NDArray[np.uint64]:
        """Return the ids of objects of which a block may have seen only a part.

        They lie in a cell and reach to where its block ends, within the image: a wider halo might
        show more of them. Connected components are right all the same, and none is listed.

        Returns
        -------
        ndarray of uint64
            Sorted.
        """
        if self._linking.whole:
            return np.empty(0, np.uint64)
        found = self._cut[...].reshape(-1).tolist()
        return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))


def _blocks_arrived(
    layout: SideBySide, arrived: Callable[..., CellImg], args: tuple[Any, ...]
) -> BlockLabels:
    return BlockLabels(arrived(*args).node, layout)


def _labels_arrived(blocks: Any, linking: Linking, space: Space, *loaders: CellLoader) -> LabelImg:
    final, bands, root, cut = map(image_arrived, loaders)
    return LabelImg(final.node, blocks, linking, bands, root, cut, space)


def _positions_of(grid: CellGrid, box: Roi) -> Roi:
    """Return the positions of the cells that meet a box."""
    return Roi(
        tuple(low // size for low, size in zip(box.start, grid.cell_shape, strict=True)),
        tuple(-(-high // size) for high, size in zip(box.stop, grid.cell_shape, strict=True)),
    )
