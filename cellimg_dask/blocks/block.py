"""A cell with the arrays of one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.bare import block as bare
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.geometry import Roi

__all__ = ["Block"]


class Block(bare.Block):
    """What a fill function is given: a cell, the arrays to read and the array to write.

    All shapes and indices are in NumPy axis order and in voxels of the output image.
    """

    __slots__ = ()

    _plan: CellPlan

    def __init__(
        self,
        plan: CellPlan,
        data: NDArray[Any],
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
    ) -> None:
        super().__init__(plan, data, inputs, params)

    @property
    def roi(self) -> Roi:
        """The cell's box, without halo."""
        return self._plan.roi

    @property
    def read_roi(self) -> Roi:
        """The cell's box grown by the halo; it may leave the image."""
        return self._plan.read_roi
