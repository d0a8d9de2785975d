"""Points of an image, found cell by cell, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.errors import ResultError
from cellimg_dask.blocks.functions import BlockCode
from cellimg_dask.blocks.named import as_function
from cellimg_dask.blocks.wrappers import FunctionWrapper, call
from cellimg_dask.geometry import CellGrid, Halo, HaloLike, check_boundary
from cellimg_dask.image.define import grid_of
from cellimg_dask.image.described import checked_call
from cellimg_dask.image.input import Input, as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.frames import frame_of
from cellimg_dask.ops.point_table import Found, PointTable
from cellimg_dask.ops.seams import Seams, depths
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache, get_cache

if TYPE_CHECKING:
    import dask.dataframe as dd

__all__ = ["map_points"]


def map_points(
    f: Callable[..., Any] | str,
    *inputs: Any,
    halo: HaloLike | None = None,
    columns: Mapping[str, Any] | Iterable[str] | None = None,
    merge: str | tuple[str, float] = "own",
    boundary: str = "none",
    fill_value: Any = 0,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    axes: Iterable[str] | None = None,
    voxel_size: float | Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> dd.DataFrame:
    """Return the points that ``f`` finds, as a dask data frame with one partition per cell.

    For each cell ``f`` is called as ``f(*arrays, **params)`` with one read-only array per input,
    halo included. It returns the coordinates of points relative to the first array: its first
    voxel has coordinates 0, halo included. Nothing is called before data are asked for. The table
    is the whole image's where ``f`` is local and the halo as wide as what it looks at.

    Parameters
    ----------
    f : callable, str or BlockSchema
        From arrays to points; called from several threads at once. It returns

        - an array of shape ``(points, axes + further columns)``, columns in that order, or
        - a `pandas.DataFrame`, a structured array, or a mapping of names to 1-D arrays, with
          exactly the columns that ``axes`` and ``columns`` name, in any order.

        Coordinates are finite; a voxel's centre has whole ones. Values are converted to the
        dtypes of ``columns`` where nothing but the precision of floats is lost.
    *inputs : array-like or Input
        As in `map_cells`. The first has the shape of the image; its axes are those of the points.
    halo : int, per-axis ints, or per-axis (before, after) pairs, optional
        Extra voxels that a block reads; any width. Default: the schema's, else none.
    columns : mapping of names to dtypes, or names, optional
        What ``f`` returns besides the coordinates; names alone mean float64. Any dtype of pandas.
    merge : "own" or ("seam", tol)
        How a point that several blocks see comes to be in the table once. ``"own"``: it belongs to
        the cell in which its coordinates lie, from the first voxel up to, but not including, the
        next cell's (within a millionth of a voxel, so that rounding does not decide). A point
        outside the image belongs to the nearest cell. ``("seam", tol)``: for functions that see
        one object at slightly different places in different blocks, which may lose it or count it
        twice at a face between cells. Points up to ``tol`` voxels outside their cell count as
        well; of points of different cells that are no farther apart than ``tol`` (each with at
        most one of another cell, the nearest) the one deepest in its own cell stays. Where places
        differ by up to ``jitter`` voxels along each axis, ``tol`` should be at least
        ``2 * jitter * sqrt(axes)`` and objects farther apart than twice that.
    boundary : {"none", "constant", "reflect", "symmetric", "edge", "wrap"}
        As in `map_cells`. Except with ``"none"``, points found more than half a voxel (or ``tol``)
        outside the image are those of its continuation, and left out.
    fill_value : scalar
        For ``boundary="constant"``.
    cell_shape : int or ints, optional
        Cell shape in voxels; default as in `map_cells`.
    axes : names, optional
        Names of the coordinates, for instance ``"zyx"``; default ``"axis-0"`` and so on.
    voxel_size : float or floats, optional
        Extent of a voxel along each axis in some unit. The table then also has the columns
        ``"physical-0"`` and so on, or ``"physical-z"`` where axes have names: the coordinates
        times the extents, so that the centre of the first voxel is the origin.
    params : mapping, optional
        Keyword arguments for ``f``.
    cache, queue, version
        As in `map_cells`.

    Returns
    -------
    dask.dataframe.DataFrame
        Coordinates in voxels of the image (float64), then ``columns``, then physical coordinates;
        cells without points have the same columns. The index counts the points of each cell. It
        is the table as of now; `latest` gives it after a change of an input.

    Raises
    ------
    ParameterError
        If ``params`` are not what ``f`` takes.
    TypeError, ValueError
        If an argument is wrong; a halo narrower than ``tol`` is. When it is computed, a
        `ResultError` names the cell for which ``f`` returned something else.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.zeros((6, 8))
    >>> image[1, 3] = image[4, 6] = 1
    >>> def bright(a):
    ...     places = np.argwhere(a > 0)
    ...     return np.column_stack([places, a[a > 0]])
    >>> points = map_points(bright, image, halo=1, columns=["value"], axes="yx", cell_shape=4)
    >>> points.npartitions
    4
    >>> points.compute(scheduler="sync").reset_index(drop=True)
         y    x  value
    0  1.0  3.0    1.0
    1  4.0  6.0    1.0
    """
    check_boundary(boundary)
    f = as_function(f)
    if isinstance(f, BlockCode):
        raise TypeError("BlockCode returns nothing; give a function that returns points")
    if not callable(f):
        hint = "; the function comes first" if any(map(callable, inputs)) else ""
        raise TypeError(f"f must be callable, got {type(f).__name__}{hint}")
    if not inputs:
        raise TypeError("map_points needs at least one input")
    call = checked_call(f, map(as_input, inputs), params, halo=halo)
    items, halo = call.items, 0 if call.halo is None else call.halo
    grid = grid_of(cell_shape, items)
    first, main = items[0], Halo.of(halo, grid.ndim)
    if first.index_map is not None or first.shape != grid.shape:
        raise ValueError(
            f"points are relative to the first input, so it must have the image's shape "
            f"{grid.shape} and no index_map; put another input first"
        )
    items[0] = first = _complete(first, main, boundary, fill_value)
    own = Halo.of(first.halo, grid.ndim)  # type: ignore[arg-type]
    tol = _tolerance(merge)
    for axis, width in enumerate(map(min, own.before, own.after)):
        if tol is not None and width < tol and grid.grid_shape[axis] > 1:
            raise ValueError(
                f'halo {width} on axis {axis} is narrower than the tolerance of ("seam", {tol}): '
                f"a cell must see as far beyond its faces; give halo={int(np.ceil(tol))} or more, "
                f"beside what the function itself looks at"
            )
    table = PointTable.of(grid.ndim, axes, columns, voxel_size)
    finder = _Finder(call.function, grid, own.before, str(first.boundary), table, tol or 0.0)
    cells = cell_values(
        finder,
        grid,
        *items,
        halo=halo,
        boundary=boundary,
        fill_value=fill_value,
        params=call.params,
        # Neighbours read what a cell has found.
        cache=get_cache() if cache is None and tol is not None else cache,
        queue=queue,
        version=version,
    )
    if tol is not None:
        seams = Seams(finder.__name__, grid, tol)
        one_each = CellGrid(grid.grid_shape, (1,) * grid.ndim)
        cells = cell_values(seams, one_each, cells, halo=seams.reach, cache=cache)
    return frame_of(cells, table.meta(), table.frame)


def _complete(item: Input, halo: Halo, boundary: str, fill_value: Any) -> Input:
    """Return an input with the settings of the image where it has none."""
    return replace(
        item,
        halo=halo if item.halo is None else item.halo,
        boundary=boundary if item.boundary is None else item.boundary,
        fill_value=fill_value if item.fill_value is None else item.fill_value,
    )


def _tolerance(merge: Any) -> float | None:
    """Return the tolerance of ``("seam", tol)``, None for ``"own"``."""
    if isinstance(merge, str) and merge == "own":
        return None
    if isinstance(merge, tuple) and len(merge) == 2 and merge[0] == "seam":
        tol = merge[1]
        if isinstance(tol, Real) and not isinstance(tol, bool) and 0 <= float(tol) < np.inf:
            return float(tol)
        raise ValueError(f'("seam", tol) needs a distance of at least 0 in voxels, got {tol!r}')
    raise ValueError(f'merge must be "own" or ("seam", tol), got {merge!r}')


@dataclass(frozen=True)
class _Finder(FunctionWrapper):
    """Calls a function of arrays for a block, and reads what it returns as points."""

    grid: CellGrid
    before: tuple[int, ...]
    """Halo of the first input at the low sides."""
    boundary: str
    """What lies beyond the first input."""
    table: PointTable
    tol: float
    """How far outside the cell points count."""

    def __call__(self, block: Block) -> Found:
        """Return the points of a cell."""
        result = call(self.function, *block.inputs, **block.params)
        roi = self.grid.roi(block.position)
        try:
            points, others = self.table.read(result)
        except ValueError as error:
            raise ResultError(self.__name__, block.position, roi, f"returned {error}") from None
        origin = np.subtract(roi.start, self.before)
        # A halo that is clipped begins with the image.
        points = points + (np.maximum(origin, 0) if self.boundary == "none" else origin)
        keep = depths(points, self.grid, block.position) >= -self.tol
        if self.boundary != "none":
            beyond = max(self.tol, 0.5)
            inside = (points >= -beyond) & (points <= np.array(self.grid.shape) - 1 + beyond)
            keep &= inside.all(axis=1)
        return Found(points, others).take(keep)
