"""What everything says of itself that has a grid of cells and a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellimg_dask.geometry import CellGrid, Roi

__all__ = ["Gridded"]


class Gridded:
    """Shape, size and cells, as NumPy and dask call them."""

    _noun = "an image"

    @property
    def grid(self) -> CellGrid:
        """Grid of cells."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type, in native byte order."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis, in voxels."""
        return self.grid.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of voxels."""
        return Roi.of_shape(self.shape).size

    @property
    def nbytes(self) -> int:
        """Bytes that the whole would take in memory."""
        return self.size * self.dtype.itemsize

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """Nominal shape of a cell."""
        return self.grid.cell_shape

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Cell sizes along each axis, as dask writes chunks."""
        return self.grid.chunks

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"len() of {self._noun} without axes")
        return self.shape[0]
