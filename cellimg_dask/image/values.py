"""Images of values: any Python object for each cell of a grid.

They are cells like all others: computed once, kept, sent to workers, outdated by a change of what
they read. Tables, partial sums and lists of points are made so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.functions import BlockCode, ValueFunction
from cellimg_dask.blocks.named import as_function
from cellimg_dask.blocks.plan import AxisLink
from cellimg_dask.geometry import CellGrid, Halo, HaloLike, check_boundary
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import make_image
from cellimg_dask.image.input import as_input, follow, inherited_halo
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["cell_values"]


def cell_values(
    f: Callable[[Block], Any] | str,
    grid: CellGrid,
    *inputs: Any,
    halo: HaloLike = 0,
    boundary: str = "none",
    fill_value: Any = 0,
    params: Mapping[str, Any] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> CellImg:
    """Return the lazy image of ``f(block)`` for each cell of ``grid``: one voxel, any object.

    Parameters
    ----------
    f : callable or str
        Given a `Block`, of which ``inputs``, ``params``, ``position`` and ``index`` say what the
        cell reads and which one of ``grid`` it is. Its ``roi`` is that of the one voxel.
    grid : CellGrid
        Which parts of the inputs there are.
    *inputs : array-like or Input
        As in `fill_cells`. An ``index_map`` is given a region of positions in ``grid``.
    halo : int, per-axis ints, or per-axis (before, after) pairs
        In voxels of the inputs.
    boundary, fill_value, params, cache, queue, version
        As in `fill_cells`.

    Returns
    -------
    CellImg
        Of shape ``grid.grid_shape``, dtype object, one voxel per cell.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(10)
    >>> ends = cell_values(lambda block: (block.inputs[0][0], len(block.inputs[0])),
    ...                    CellGrid((10,), 4), image)
    >>> [(int(first), length) for first, length in ends]
    [(0, 4), (4, 4), (8, 2)]
    """
    check_boundary(boundary)
    f = as_function(f)
    if isinstance(f, BlockCode):
        raise TypeError(
            "BlockCode returns nothing; give a function of a Block that returns a value"
        )
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if not isinstance(grid, CellGrid):
        raise TypeError(
            f"grid must be a CellGrid, got {type(grid).__name__}; "
            f"make one by CellGrid(shape, cell_shape)"
        )
    items = [as_input(value) for value in inputs]
    links = [AxisLink(axis, factor) for axis, factor in enumerate(grid.cell_shape)]
    wide = Halo.of(halo, grid.ndim)
    plans = []
    for number, item in enumerate(items):
        own: Sequence[AxisLink] | None = None
        inherited = halo
        if item.index_map is None:
            own, _ = follow(item.shape, grid.shape, links, number)
            inherited = inherited_halo(wide, item.shape, grid.shape)
        plans.append(item.plan(number, own, inherited, boundary, fill_value))
    return make_image(
        ValueFunction(f, grid),
        CellGrid(grid.grid_shape, (1,) * grid.ndim),
        items,
        plans,
        np.dtype(object),
        params,
        cache,
        queue,
        version,
    )
