"""A cell with the arrays of one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from numpy.typing import NDArray

from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.geometry import Roi

__all__ = ["Block"]


class Block:
    """What a fill function is given: a cell, the arrays to read and the array to write.

    All shapes and indices are in NumPy axis order and in voxels of the output image.
    """

    __slots__ = ("_data", "_plan", "inputs", "params")

    def __init__(
        self,
        plan: CellPlan,
        data: NDArray[Any],
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
    ) -> None:
        self._plan = plan
        self._data = data
        self.inputs = inputs
        """Read-only arrays, each with its halo."""
        self.params = params
        """Keyword parameters of the image."""

    @property
    def data(self) -> NDArray[Any]:
        """The array to write: the cell's true shape, native byte order, zeros at first."""
        return self._data

    @data.setter
    def data(self, value: object) -> NoReturn:
        raise AttributeError(
            "block.data cannot be replaced; write into it: block.data[...] = result"
        )

    @property
    def index(self) -> int:
        """Flat index of the cell, C order."""
        return self._plan.index

    @property
    def position(self) -> tuple[int, ...]:
        """Index of the cell along each axis of the grid."""
        return self._plan.position

    @property
    def roi(self) -> Roi:
        """The cell's box, without halo."""
        return Roi(self._plan.start, self._plan.stop)

    @property
    def read_roi(self) -> Roi:
        """The cell's box grown by the halo; it may leave the image."""
        return self._plan.read_roi

    @property
    def min(self) -> tuple[int, ...]:
        """First voxel of the cell along each axis."""
        return self._plan.start

    @property
    def max(self) -> tuple[int, ...]:
        """Last voxel of the cell along each axis, inclusive."""
        return tuple(high - 1 for high in self._plan.stop)

    @property
    def dim(self) -> tuple[int, ...]:
        """Shape of the cell, as the original names it."""
        return self._plan.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the cell."""
        return self._plan.shape

    @property
    def halo(self) -> tuple[slice, ...]:
        """Slices that crop a result of the input's size to the cell; right for width 0 too."""
        return self._plan.crop

    def __repr__(self) -> str:
        shapes = ", ".join(str(array.shape) for array in self.inputs)
        return f"Block(position={self.position}, shape={self.shape}, inputs=[{shapes}])"
