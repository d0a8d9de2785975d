"""Floor 0: boxes, halos, grids, overlapped splits and borders. Knows NumPy only."""

from cellimg_dask.geometry.border import BOUNDARIES, AxisWindow, axis_window, check_boundary
from cellimg_dask.geometry.grid import Cell, CellGrid, CellRange, even_cell_shape
from cellimg_dask.geometry.halo import Halo, HaloLike
from cellimg_dask.geometry.integers import as_int, as_ints
from cellimg_dask.geometry.roi import Roi, parse_index
from cellimg_dask.geometry.space import Space
from cellimg_dask.geometry.splits import SIDES, AxisSplit, StackSplit, as_overlap
from cellimg_dask.geometry.tiles import IrregularGrid, TileGrid, tiles

__all__ = [
    "BOUNDARIES",
    "SIDES",
    "AxisSplit",
    "AxisWindow",
    "Cell",
    "CellGrid",
    "CellRange",
    "Halo",
    "HaloLike",
    "IrregularGrid",
    "Roi",
    "Space",
    "StackSplit",
    "TileGrid",
    "as_int",
    "as_ints",
    "as_overlap",
    "axis_window",
    "check_boundary",
    "even_cell_shape",
    "parse_index",
    "tiles",
]
