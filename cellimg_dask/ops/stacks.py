"""Stacks cut into overlapped blocks, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellimg_dask.geometry import AxisSplit, Halo, HaloLike, StackSplit, as_ints, as_overlap
from cellimg_dask.ops.placed import Placed, Position

__all__ = ["merge_stack", "split_stack", "stack_shape"]

PerAxis: TypeAlias = SupportsIndex | Iterable[SupportsIndex]


def split_stack(
    shape: Iterable[SupportsIndex],
    max_pixels: PerAxis,
    overlap: HaloLike | None = None,
    side: str = "after",
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Cut a stack into blocks that overlap.

    Along each axis of ``n`` voxels block ``i`` has the core ``[i * m, (i + 1) * m)``, ``m`` being
    ``max_pixels``, and reads the overlap besides, as far as the stack reaches. By default the
    overlap lies behind the core only: ``[i * m, min(i * m + m + overlap, n))``.

    Parameters
    ----------
    shape : ints
        Shape of the stack in voxels, any number of axes; an axis of 0 has no blocks. Axes behind
        those that are cut (channels) may be left out.
    max_pixels : int or per-axis ints
        Length of a core along each axis, at least 1; the last one may be shorter.
    overlap : int, per-axis ints or (before, after) pairs, Halo or None
        Voxels that a block reads beyond its core; any width, also more than a block.
    side : {"after", "before", "both"}
        Where a width given as one integer lies; pairs and a `Halo` say so themselves.

    Returns
    -------
    slices : object array of shape ``grid_shape``
        For each block the tuple of slices that reads it.
    offsets : int64 array of shape ``grid_shape + (ndim,)``
        The first voxel that each block reads: what is to be added to coordinates within it.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> slices, offsets = split_stack((10, 4), (4, 9), overlap=(3, 0))
    >>> [rows for rows, columns in slices[:, 0]]
    [slice(0, 7, None), slice(4, 10, None), slice(8, 10, None)]
    >>> offsets[:, 0].tolist()
    [[0, 0], [4, 0], [8, 0]]
    """
    extents = as_ints(shape, "shape", minimum=0)
    split = _split(extents, max_pixels, overlap, side)
    reads = [[axis.read(i) for i in range(axis.num_blocks)] for axis in split.axes]
    parts = [[slice(low, high) for low, high in spans] for spans in reads]
    slices = _object_array(split.grid_shape, product(*parts))
    offsets = np.empty((*split.grid_shape, len(extents)), np.int64)
    for number, spans in enumerate(reads):
        column = np.array([low for low, _ in spans], np.int64)
        offsets[..., number] = column.reshape(
            [-1 if axis == number else 1 for axis in range(len(extents))]
        )
    return slices, offsets


def stack_shape(
    blocks: Any,
    max_pixels: PerAxis,
    overlap: HaloLike | None = None,
    side: str = "after",
    *,
    scale: PerAxis = 1,
    shrink: PerAxis = 1,
) -> tuple[int, ...]:
    """Return the shape of what `merge_stack` makes of blocks, of which it looks at the last.

    Parameters
    ----------
    blocks : object array, nested lists or mapping
        See `merge_stack`.
    max_pixels, overlap, side
        As the stack was split.
    scale, shrink : int or per-axis ints
        As the blocks were scaled.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, there are no blocks, or the last block does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(9)
    >>> slices, _ = split_stack(image.shape, 4, overlap=6)
    >>> stack_shape([image[s] for s in slices], 4, overlap=6)
    (9,)
    """
    placed = Placed.of(blocks, "blocks")
    if placed.grid_shape is None:
        raise TypeError(
            "the shape cannot be known from blocks that come one by one; give a grid of them"
        )
    split, trailing, _ = _split_of_grid(placed, max_pixels, overlap, side, scale, shrink)
    return split.shape + trailing


def merge_stack(
    blocks: Any,
    max_pixels: PerAxis,
    overlap: HaloLike | None = None,
    side: str = "after",
    *,
    shape: Iterable[SupportsIndex] | None = None,
    scale: PerAxis = 1,
    shrink: PerAxis = 1,
    out: Any = None,
    dtype: DTypeLike | None = None,
) -> Any:
    """Put blocks of `split_stack` together again.

    Each voxel is taken from the block whose core holds it. Blocks are looked up one at a time,
    and of those that are lazy just the core is read.

    Parameters
    ----------
    blocks : object array, nested lists, mapping, or iterator of pairs
        Arrays in a grid as `split_stack` gives it; or from positions to arrays; or (position,
        array) pairs in any order, for instance
        ``zip(numpy.ndindex(slices.shape), pool.map(f, slices.flat))``. An array is anything with
        ``shape`` and ``__getitem__``, also lazy, or a dask value or a future of one. Axes beyond
        those of the grid (channels) are taken whole.
    max_pixels, overlap, side
        As the stack was split.
    shape : ints, optional
        The shape that was split; needed for pairs without ``out`` and where there are no blocks.
    scale : int or per-axis ints
        How much larger along each axis every block was made.
    shrink : int or per-axis ints
        Factor by which every block was made smaller along each axis, ``n`` voxels being
        ``ceil(n / factor)`` then, as by ``[::factor]``. All blocks must begin at multiples of it,
        else their voxels are not those of the whole, which is an error.
    out : array, optional
        Where to merge into: a NumPy array, memory map, zarr array, anything with ``shape`` and
        ``__setitem__``. Default: a new NumPy array.
    dtype : dtype, optional
        Of a new array; default: one that holds all blocks of a grid, or the first of pairs.

    Returns
    -------
    array
        The merged stack, or ``out``.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or a block is missing, comes twice, or has another shape or a
        dtype that the result cannot hold; its position is named. ``out`` then holds what was
        merged before.

    Notes
    -----
    On the workers of a `BlockQueue`, `map_cells` is split, computed and merged in one: with
    ``cell_shape=max_pixels`` and a halo of (before, after) pairs each call reads just the block
    that `split_stack` describes, and the image is what `merge_stack` would give, lazily.
    `map_cells` shrinks too; an `Input` with an ``index_map`` serves for blocks that are enlarged.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(20).reshape(4, 5)
    >>> slices, _ = split_stack(image.shape, (2, 3), overlap=1)
    >>> blocks = [[np.negative(image[s]) for s in row] for row in slices]
    >>> np.array_equal(merge_stack(blocks, (2, 3), overlap=1), -image)
    True

    The same in two worker threads:

    >>> import cellimg_dask as ci
    >>> pairs = [(0, 1), (0, 1)]  # the overlap of 1 behind each block
    >>> with ci.BlockQueue(2) as queue:
    ...     lazy = ci.map_cells(np.negative, image, cell_shape=(2, 3), halo=pairs, queue=queue)
    ...     np.array_equal(lazy, -image)
    True

    Blocks twice as large as what they read, of which the core comes first here:

    >>> def enlarge(block):
    ...     large = block.inputs[0].repeat(2, axis=0).repeat(2, axis=1)
    ...     block.data[...] = large[: block.shape[0], : block.shape[1]]
    >>> def half(roi):
    ...     return ci.Roi([n // 2 for n in roi.start], [n // 2 for n in roi.stop])
    >>> source = ci.Input(image, halo=pairs, index_map=half)
    >>> with ci.BlockQueue(2) as queue:
    ...     lazy = ci.fill_cells(
    ...         enlarge, ci.CellGrid((8, 10), (4, 6)), source, dtype=int, queue=queue
    ...     )
    ...     np.array_equal(lazy, image.repeat(2, axis=0).repeat(2, axis=1))
    True
    """
    placed = Placed.of(blocks, "blocks")
    last: tuple[Position, Any] | None = None
    first: tuple[Position, Any] | None = None
    trailing: tuple[int, ...] | None = None
    if shape is not None:
        extents = as_ints(shape, "shape", minimum=0)
        split = _split(extents, max_pixels, overlap, side, scale, shrink)
    elif placed.grid_shape is not None:
        split, trailing, last = _split_of_grid(placed, max_pixels, overlap, side, scale, shrink)
    else:
        placed, first = placed.peeked()
        if out is None or first is None:
            raise ValueError(
                "the shape of the stack is not known: there are no blocks, or they come one by "
                "one; give the shape that was split, shape=…"
            )
        split = _split_of_out(out, len(first[0]), max_pixels, overlap, side, scale, shrink)
    if placed.grid_shape not in (None, split.grid_shape):
        raise ValueError(
            f"blocks has a grid of {placed.grid_shape}, expected {split.grid_shape} for a stack "
            f"cut as given"
        )
    for number, axis in enumerate(split.axes):
        axis.check_phase(number)

    kind = None if dtype is None else np.dtype(dtype)
    if out is not None:
        if dtype is not None:
            raise TypeError("dtype is for a new array; out has its own")
        if not hasattr(out, "shape") or not hasattr(out, "__setitem__"):
            raise TypeError(f"out must have shape and __setitem__, got {type(out).__name__}")
        _check_out(out, split, trailing)
        kind = _dtype_of(out)
    elif kind is None and placed.get is not None:
        kind = _common_dtype(placed, split, last)
    merged = out
    seen = np.zeros(split.grid_shape, bool)
    for place, given in placed.items:
        # The last block of a grid was looked at already, which may have been costly.
        block = last[1] if last is not None and place == last[0] else _resolved(given)
        _check_place(place, split, seen)
        block_shape = _shape_of(block, place)
        if trailing is None:
            trailing = block_shape[len(split.axes) :]
        expected = split.block_shape(place) + trailing
        if block_shape != expected:
            raise ValueError(
                f"the block at {place} has shape {block_shape}, expected {expected}"
                f"{_how(split)}"
            )
        core = np.asarray(block[(*split.crop(place), ...)])
        if merged is None:
            kind = kind or core.dtype.newbyteorder("=")
            merged = np.empty(split.shape + trailing, kind)
        if kind is not None and core.dtype != kind and not np.can_cast(core.dtype, kind, "safe"):
            raise ValueError(
                f"the block at {place} has dtype {core.dtype}, which "
                f"{'out of ' if out is not None else ''}{kind} cannot hold"
                f"{'' if out is not None else '; give dtype=…'}"
            )
        merged[(*split.core(place), *[slice(None)] * len(trailing))] = core
        seen[place] = True
    if not seen.all():
        missing = tuple(int(i) for i in np.argwhere(~seen)[0])
        raise ValueError(
            f"the block at {missing} is missing: {seen.sum()} of {seen.size} blocks of a grid of "
            f"{split.grid_shape} came"
        )
    if merged is None:
        if kind is None:
            raise ValueError("the stack is empty, and no block says what dtype it has; give dtype=")
        merged = np.empty(split.shape + (trailing or ()), kind)
    return merged
