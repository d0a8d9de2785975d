"""Tables of the blobs that were found in each block of a stack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellimg_dask.geometry import CellGrid, as_ints
from cellimg_dask.ops.placed import Placed, Position

__all__ = ["deepest", "depths", "merge_blobs", "owned", "prune_blobs"]


def merge_blobs(blob_blocks: Any, offsets: ArrayLike | None = None) -> NDArray[Any]:
    """Stack the tables of all blocks and append to each row the position of its block.

    Parameters
    ----------
    blob_blocks : object array, nested lists, mapping, iterator of pairs, or CellImg of `map_stack`
        For each block of a grid, as in `merge_stack`, an array of shape ``(blobs, columns)`` whose
        first columns are coordinates in axis order, or None for no blobs.
    offsets : int array of shape ``grid_shape + (ndim,)``, optional
        Added to the coordinates, of which there are as many as axes: from `split_stack`, where
        coordinates count from the start of each block; integers become int64 then and floats
        float64. Default: coordinates are those of the stack.

    Returns
    -------
    array of shape (blobs, columns + ndim)
        Block by block in C order (pairs: as they come); the last columns are the block's position
        in the grid, one per axis. Its dtype holds all tables and positions; tables without rows
        count for their columns only. Without any table the columns are coordinates and position.

    Raises
    ------
    TypeError, ValueError
        If a table has another number of columns or of axes; its position is named.

    See Also
    --------
    prune_blobs : Removes what several blocks found.

    Examples
    --------
    >>> import numpy as np
    >>> first, second = np.array([[2.0, 5.0, 1.5]]), np.array([[0.0, 3.0, 1.0], [1.0, 1.0, 2.0]])
    >>> merge_blobs([[first, None, second]], offsets=[[[0, 0], [0, 6], [0, 12]]])
    array([[ 2. ,  5. ,  1.5,  0. ,  0. ],
           [ 0. , 15. ,  1. ,  0. ,  2. ],
           [ 1. , 13. ,  2. ,  0. ,  2. ]])
    """
    placed = Placed.of(blob_blocks, "blob_blocks")
    grid_shape, ndim = placed.grid_shape, len(placed.grid_shape or ())
    starts = None if offsets is None else np.asarray(offsets)
    if starts is not None:
        ndim = ndim if grid_shape is not None else max(starts.ndim - 1, 0)
        expected = (*(starts.shape[:ndim] if grid_shape is None else grid_shape), ndim)
        if starts.shape != expected or starts.dtype.kind not in "iu":
            raise ValueError(
                f"offsets must be integers of shape {expected}, one row per block, got "
                f"{starts.dtype} of shape {starts.shape}"
            )
    tables: list[NDArray[Any]] = []
    places: list[Position] = []
    columns: int | None = None
    for place, given in placed.items:
        ndim = ndim or len(place)
        if len(place) != ndim:
            raise ValueError(f"position {place} of a table has {len(place)} axes, not {ndim}")
        table = None if given is None else np.asarray(given)
        if table is None or table.shape == (0,):
            continue
        if table.ndim != 2 or table.dtype.kind not in "biuf":
            raise ValueError(
                f"the table at {place} has {table.dtype} of shape {table.shape}, expected numbers "
                f"of shape (blobs, columns)"
            )
        if columns is None:
            columns = table.shape[1]
            if columns < ndim:
                raise ValueError(
                    f"the table at {place} has {columns} columns, expected at least {ndim} "
                    f"coordinates"
                )
        if table.shape[1] != columns:
            raise ValueError(
                f"the table at {place} has {table.shape[1]} columns, expected {columns} as the "
                f"first one has"
            )
        if starts is not None:
            table = _shifted(table, starts, place)
        tables.append(table)
        places.append(place)
    if columns is None:
        return np.empty((0, 2 * ndim))
    counts = [len(table) for table in tables]
    tags = np.array(places, np.int64).reshape(len(places), ndim)
    # An empty table is often of another dtype, merely because nobody gave it one.
    kinds = {table.dtype for table in tables if len(table)} or {table.dtype for table in tables}
    dtype = np.result_type(*kinds, np.min_scalar_type(int(tags.max(initial=0))))
    merged = np.empty((sum(counts), columns + ndim), dtype)
    np.concatenate(tables, out=merged[:, :columns], casting="unsafe")
    merged[:, columns:] = np.repeat(tags, counts, axis=0)
    return merged


def prune_blobs(
    blobs: ArrayLike,
    shape: Iterable[SupportsIndex],
    max_pixels: SupportsIndex | Iterable[SupportsIndex],
    tol: float | Iterable[float] | None = None,
) -> NDArray[Any]:
    """Keep each blob once that several overlapped blocks have found.

    By default a blob belongs to the block whose core holds its centre, and what others found of
    it is dropped. This is exact for a detector that puts an object at the same place whichever
    block it is found in. Where places differ a little, an object near a border of cores could be
    in none of them or in two: give ``tol``.

    Parameters
    ----------
    blobs : array of shape (blobs, columns)
        As `merge_blobs` gives it: coordinates in voxels of the stack first, one per axis, and the
        position of the block last.
    shape, max_pixels
        As the stack was split by `split_stack`.
    tol : float or per-axis floats, optional
        Largest distance in voxels between what two blocks find of one object. Blobs of different
        blocks within it are taken for one object, closest first and one of each block, and the
        one deepest in the core of its own block is kept. What lies ``tol`` or more outside of it
        is dropped. With per-axis values, half the axes of an ellipsoid.

    Returns
    -------
    array
        The rows that are kept, unchanged and in their order.

    Raises
    ------
    TypeError, ValueError
        If a table does not fit the stack, or ``tol`` is not positive.

    Notes
    -----
    With places that differ from the true one by at most ``jitter`` along each axis, no object is
    lost or kept twice if ``tol >= 2 * jitter * sqrt(ndim)``, the overlap is at least as wide, and
    objects are farther apart than ``tol`` and twice that jitter. Beyond the border of the stack
    nobody else owns anything, so what was found there belongs to the block next to it.

    Examples
    --------
    Two blocks of 8 found the same object, the second one half a voxel from where the first did:

    >>> import numpy as np
    >>> found = merge_blobs([np.array([[3.0], [8.25]]), np.array([[7.75], [12.0]])])
    >>> prune_blobs(found, (16,), 8, tol=1)
    array([[ 3.  ,  0.  ],
           [ 8.25,  0.  ],
           [12.  ,  1.  ]])
    """
    table = np.asarray(blobs)
    grid = CellGrid(as_ints(shape, "shape", minimum=0), max_pixels)
    ndim = grid.ndim
    if table.ndim != 2 or table.shape[1] < 2 * ndim:
        raise ValueError(
            f"blobs must be of shape (blobs, columns) with at least {2 * ndim} columns, "
            f"coordinates and block of a stack of {ndim} axes; got {table.shape}"
        )
    coords = table[:, :ndim].astype(np.float64)
    tags = table[:, table.shape[1] - ndim :]
    with np.errstate(invalid="ignore"):
        positions = tags.astype(np.int64)
    for row in np.argwhere(~np.isfinite(coords))[:1, 0]:
        raise ValueError(f"blob {row} has coordinates that are not finite: {coords[row].tolist()}")
    wrong = (positions != tags) | (positions < 0) | (positions >= grid.grid_shape)
    for row in np.argwhere(wrong)[:1, 0]:
        raise ValueError(
            f"blob {row} has {tags[row].tolist()} as the position of its block, expected one in a "
            f"grid of {grid.grid_shape} in the last {ndim} columns, as merge_blobs appends it"
        )
    if tol is None:
        return table[owned(coords, positions, grid)]
    radii = np.asarray(tol, np.float64)
    if radii.shape not in ((), (ndim,)) or not (np.isfinite(radii) & (radii > 0)).all():
        raise ValueError(
            f"tol must be a positive number, or one for each of {ndim} axes; got {tol!r}"
        )
    return table[deepest(coords, positions, grid, np.broadcast_to(radii, ndim))]


def owned(
    coords: NDArray[np.float64], positions: NDArray[np.int64], grid: CellGrid
) -> NDArray[np.bool_]:
    """Return which points lie in the half-open core of their own block.

    Parameters
    ----------
    coords : float64 array of shape (points, ndim)
        In voxels; beyond the border of the image they belong to the block next to it.
    positions : int64 array of shape (points, ndim)
        Position of the block that found each.
    grid : CellGrid
        The cores.
    """
    low, high = _faces(positions, grid)
    return np.asarray(np.all((coords >= low) & (coords < high), axis=1))


def depths(
    coords: NDArray[np.float64],
    positions: NDArray[np.int64],
    grid: CellGrid,
    unit: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return how deep points lie in the core of their own block, in ``unit`` along each axis.

    Below 0 outside. The border of the image is no face of a core.
    """
    low, high = _faces(positions, grid)
    gaps = np.minimum(coords - low, high - coords) / unit
    return np.asarray(gaps.min(axis=1, initial=np.inf), np.float64)


def deepest(
    coords: NDArray[np.float64],
    positions: NDArray[np.int64],
    grid: CellGrid,
    tol: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Return which points to keep if those of different blocks within ``tol`` may be one object.

    Parameters
    ----------
    coords, positions, grid
        As in `owned`.
    tol : float64 array of shape (ndim,)
        Distance along each axis, above 0.
    """
    depth = depths(coords, positions, grid, tol)
    # What lies deep outside the core is in that of another block, which looked there as well. It
    # still tells that its block saw that object, and so that another one nearby is not the same.
    keep = depth > -1
    (near,) = np.nonzero((depth > -3) & (depth < 4))
    if not near.size:
        return keep
    from scipy.spatial import cKDTree

    # Two that are just ``tol`` apart are within it, however that is rounded.
    pairs = cKDTree(coords[near] / tol).query_pairs(1 + 1e-9, output_type="ndarray")
    pairs = near[pairs]
    block = positions @ np.array(grid.strides, np.int64)
    pairs = pairs[block[pairs[:, 0]] != block[pairs[:, 1]]]
    gaps = (((coords[pairs[:, 0]] - coords[pairs[:, 1]]) / tol) ** 2).sum(axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0], gaps))]

    # At the same depth, which is on a face, the owner comes first.
    own = owned(coords, positions, grid)
    group_of: dict[int, dict[int, int]] = {}
    for first, second in pairs.tolist():
        one = group_of.setdefault(first, {int(block[first]): first})
        other = group_of.setdefault(second, {int(block[second]): second})
        # Two blobs of one block are two objects, however close.
        if one.keys().isdisjoint(other):
            one.update(other)
            for member in other.values():
                group_of[member] = one
    for member, group in group_of.items():
        best = max(group.values(), key=lambda row: (depth[row], own[row], -row))
        keep[member] &= member == best
    return keep


def _faces(
    positions: NDArray[np.int64], grid: CellGrid
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bounds of the core of each point's block, infinite at the image's border."""
    size, count = np.array(grid.cell_shape), np.array(grid.grid_shape)
    return (
        np.where(positions == 0, -np.inf, positions * size),
        np.where(positions == count - 1, np.inf, (positions + 1) * size),
    )


def _shifted(table: NDArray[Any], starts: NDArray[Any], place: Position) -> NDArray[Any]:
    ndim = starts.shape[-1]
    if any(i >= n for i, n in zip(place, starts.shape[:-1], strict=True)):
        raise ValueError(f"the table at {place} lies outside offsets of shape {starts.shape}")
    # Wide enough for the stack, not just for the block.
    shifted = table.astype(np.result_type(table.dtype, np.int64))
    shifted[:, :ndim] += starts[place].astype(np.int64)
    return shifted
