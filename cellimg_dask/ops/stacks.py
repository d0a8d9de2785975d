"""Stacks cut into overlapped blocks, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.named import as_function
from cellimg_dask.blocks.wrappers import FunctionWrapper
from cellimg_dask.geometry import (
    AxisSplit,
    CellGrid,
    Halo,
    HaloLike,
    StackSplit,
    as_ints,
    as_overlap,
)
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.input import as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.placed import Placed, Position
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["map_stack", "merge_stack", "split_stack", "stack_shape"]

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
    split = _Cut(max_pixels, overlap, side).split(extents)
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


def map_stack(
    f: Callable[..., Any] | str,
    *arrays: Any,
    max_pixels: PerAxis,
    overlap: HaloLike | None = None,
    side: str = "after",
    params: Mapping[str, Any] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> CellImg:
    """Return lazily what ``f`` makes of each block of `split_stack`: arrays, tables, any object.

    It is given to `merge_stack` or `merge_blobs`, which ask for some blocks at a time. Where
    ``f`` gives an array of the block's size, or of one that is smaller by a factor, `map_cells`
    with ``cell_shape=max_pixels`` and the overlap as (before, after) pairs of its halo reads the
    same blocks, and gives the merged image itself.

    Parameters
    ----------
    f : callable or str
        Called as ``f(*blocks, **params)`` with one read-only array per input, from several
        threads at once.
    *arrays : array-like or Input
        As in `map_cells`, shapes equal or broadcast as in NumPy.
    max_pixels, overlap, side
        As in `split_stack`, for all axes of the arrays.
    params, cache, queue, version
        As in `map_cells`.

    Returns
    -------
    CellImg
        Of dtype object and the shape of the grid of blocks; ``image[...]`` computes all of them.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    Blocks are enlarged in two worker threads:

    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> image = np.arange(10)
    >>> with ci.BlockQueue(2) as queue:
    ...     blocks = map_stack(
    ...         np.repeat, image, max_pixels=4, overlap=1, params={"repeats": 2}, queue=queue
    ...     )
    ...     merged = merge_stack(blocks, 4, overlap=1, scale=2)
    >>> blocks.shape, np.array_equal(merged, image.repeat(2))
    ((3,), True)
    """
    f = as_function(f)
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}; the function comes first")
    if not arrays:
        raise TypeError("map_stack needs at least one array")
    items = [as_input(value) for value in arrays]
    shape = np.broadcast_shapes(*(item.shape for item in items if item.index_map is None))
    split = _Cut(max_pixels, overlap, side).split(shape)
    grid = CellGrid(shape, tuple(axis.size for axis in split.axes))
    halo = Halo(tuple(axis.before for axis in split.axes), tuple(axis.after for axis in split.axes))
    return cell_values(
        _OfBlock(f),
        grid,
        *items,
        halo=halo,
        params=params,
        cache=cache,
        queue=queue,
        version=version,
    )


@dataclass(frozen=True)
class _OfBlock(FunctionWrapper):
    """Calls the user's function with the arrays of a block."""

    def __call__(self, block: Block) -> Any:
        result = self.function(*block.inputs, **block.params)
        if isinstance(result, np.ndarray):
            # The input's memory is used again, or changes when the input does.
            shared = any(np.may_share_memory(result, array) for array in block.inputs)
            result = result.copy() if shared else result.view()
            result.flags.writeable = False
        return result


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
    blocks : object array, nested lists, mapping, or CellImg of `map_stack`
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
    _, split, trailing = _layout_of_grid(placed, _Cut(max_pixels, overlap, side, scale, shrink))
    return split.shape + (trailing or ())


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
    blocks : object array, nested lists, mapping, iterator of pairs, or CellImg of `map_stack`
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

    See Also
    --------
    map_stack : Blocks that are computed by the workers of a `BlockQueue`.
    map_cells : Split, compute and merge in one, lazily, where blocks keep their size or shrink.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(20).reshape(4, 5)
    >>> slices, _ = split_stack(image.shape, (2, 3), overlap=1)
    >>> blocks = [[np.negative(image[s]) for s in row] for row in slices]
    >>> np.array_equal(merge_stack(blocks, (2, 3), overlap=1), -image)
    True
    """
    if out is not None and not (hasattr(out, "shape") and hasattr(out, "__setitem__")):
        raise TypeError(f"out must have shape and __setitem__, got {type(out).__name__}")
    placed = Placed.of(blocks, "blocks")
    cut = _Cut(max_pixels, overlap, side, scale, shrink)
    placed, split, trailing = _layout(placed, cut, shape, out)
    kind = None if dtype is None else np.dtype(dtype)
    if out is not None:
        if kind is not None:
            raise TypeError("dtype is for a new array; out has its own")
        kind, trailing = _checked_out(out, split, trailing)
    elif kind is None:
        kind = _common_dtype(placed)
    merged = out
    seen = np.zeros(split.grid_shape, bool)
    for place, given in placed.items:
        _check_place(place, split, seen)
        block = _resolved(given, place)
        if trailing is None:
            trailing = block.shape[len(place) :]
        _check_block(block, place, split, trailing)
        whole = tuple(slice(0, n) for n in trailing)
        core = np.asarray(block[split.crop(place) + whole])
        if merged is None:
            kind = core.dtype.newbyteorder("=") if kind is None else kind
            merged = np.empty(split.shape + trailing, kind)
        if kind is not None and not np.can_cast(core.dtype, kind, "safe"):
            way_out = "; give dtype=…" if out is None else ""
            raise ValueError(
                f"the block at {place} has dtype {core.dtype}, which {kind} cannot hold{way_out}"
            )
        merged[split.core(place) + whole] = core
        seen[place] = True
    if not seen.all():
        missing = tuple(int(i) for i in np.argwhere(~seen)[0])
        raise ValueError(
            f"the block at {missing} is missing: {int(seen.sum())} of {seen.size} came, for a grid "
            f"of {split.grid_shape}"
        )
    if merged is None:
        if kind is None:
            raise ValueError("the stack is empty and no block says its dtype; give dtype=")
        merged = np.empty(split.shape + (trailing or ()), kind)
    return merged


class _Cut(NamedTuple):
    """How a stack was split and its blocks scaled, as the user says it."""

    max_pixels: PerAxis
    overlap: HaloLike | None
    side: str
    scale: PerAxis = 1
    shrink: PerAxis = 1

    def axes(self, ndim: int) -> list[AxisSplit]:
        """Return the axes of a stack, all of extent 0."""
        sizes = as_ints(self.max_pixels, "max_pixels", ndim=ndim, minimum=1)
        halo = as_overlap(self.overlap, ndim, self.side)
        scales = as_ints(self.scale, "scale", ndim=ndim, minimum=1)
        steps = as_ints(self.shrink, "shrink", ndim=ndim, minimum=1)
        for axis, (scale, step) in enumerate(zip(scales, steps, strict=True)):
            if scale > 1 and step > 1:
                raise ValueError(
                    f"scale[{axis}] = {scale} and shrink[{axis}] = {step}: an axis is either "
                    f"enlarged or shrunk"
                )
        rows = zip(sizes, halo.before, halo.after, scales, steps, strict=True)
        return [AxisSplit(0, *row) for row in rows]

    def split(self, extents: Sequence[int]) -> StackSplit:
        """Return how a stack of these extents is cut."""
        axes = zip(self.axes(len(extents)), extents, strict=True)
        split = StackSplit(tuple(replace(axis, extent=n) for axis, n in axes))
        for number, axis in enumerate(split.axes):
            axis.check_phase(number)
        return split


def _layout(
    placed: Placed, cut: _Cut, shape: Iterable[SupportsIndex] | None, out: Any
) -> tuple[Placed, StackSplit, tuple[int, ...] | None]:
    """Return blocks to go through, how the stack is cut, and the axes behind if known."""
    if shape is not None:
        split = cut.split(as_ints(shape, "shape", minimum=0))
        grid_shape = placed.grid_shape
        # Lists cannot say how many blocks there are behind an axis of none.
        any_blocks = prod(split.grid_shape) or prod(grid_shape or (0,))
        if any_blocks and grid_shape not in (None, split.grid_shape):
            raise ValueError(
                f"blocks has a grid of {grid_shape}, expected {split.grid_shape} for a stack of "
                f"{tuple(axis.extent for axis in split.axes)}"
            )
        return placed, split, None
    if placed.grid_shape is not None:
        return _layout_of_grid(placed, cut)
    placed, first = placed.peeked()
    if out is None or first is None:
        raise ValueError(
            "the shape of the stack is not known, since there are no blocks or they come one by "
            "one; give the shape that was split: shape=…"
        )
    ndim = len(first[0])
    if len(out.shape) < ndim:
        raise ValueError(f"out has {len(out.shape)} axes, the blocks' positions have {ndim}")
    extents = []
    for number, (axis, length) in enumerate(zip(cut.axes(ndim), out.shape[:ndim], strict=True)):
        if length % axis.scale:
            raise ValueError(
                f"out has {length} voxels along axis {number}, which is no multiple of "
                f"scale[{number}] = {axis.scale}"
            )
        if axis.shrink > 1 and axis.size % axis.shrink:
            raise ValueError(
                f"the shape of the stack is not known from out, since max_pixels[{number}] = "
                f"{axis.size} is no multiple of shrink[{number}] = {axis.shrink}; give shape=…"
            )
        extents.append(length // axis.scale * axis.shrink)
    return placed, cut.split(extents), None


def _layout_of_grid(placed: Placed, cut: _Cut) -> tuple[Placed, StackSplit, tuple[int, ...] | None]:
    """Find out from the last block how a stack is cut: no other one says it for sure."""
    assert placed.grid_shape is not None
    if not prod(placed.grid_shape):
        raise ValueError(
            f"the shape of the stack is not known from a grid of {placed.grid_shape}, which has no "
            f"blocks; give the shape that was split: shape=…"
        )
    ndim = len(placed.grid_shape)
    last = tuple(count - 1 for count in placed.grid_shape)
    assert placed.get is not None
    block = _resolved(placed.get(last), last)
    if len(block.shape) < ndim:
        raise ValueError(
            f"the block at {last} has shape {tuple(block.shape)}, expected at least {ndim} axes as "
            f"the grid has{_ONE_ARRAY if not block.shape else ''}"
        )
    extents = []
    for number, (axis, position, length) in enumerate(
        zip(cut.axes(ndim), last, block.shape[:ndim], strict=True)
    ):
        # Blocks in front may be clipped as well, so that just the last one's end is the stack's.
        start, _ = replace(axis, extent=(position + 1) * axis.size).read(position)
        extent = start + -(-length * axis.shrink // axis.scale)
        nominal = (position + 1) * axis.size
        extent = min(extent, nominal) if axis.shrink > 1 else extent
        found = replace(axis, extent=extent)
        found.check_phase(number)
        if not position * axis.size < extent <= nominal or found.block_length(position) != length:
            low, high = (
                replace(axis, extent=n).block_length(position)
                for n in (position * axis.size + 1, nominal)
            )
            raise ValueError(
                f"the block at {last}, the last one, has {length} voxels along axis {number}, "
                f"expected {low} to {high}"
                + (f" in steps of {axis.scale}" if axis.scale > 1 else "")
                + _ADVICE
            )
        extents.append(extent)
    return placed, cut.split(extents), block.shape[ndim:]


_ADVICE = "; max_pixels, overlap, side, scale and shrink must be those of the split"
_ONE_ARRAY = (
    "; numpy.array(list, dtype=object) makes arrays of one shape into an array of their numbers: "
    "give the list itself"
)


def _resolved(given: Any, place: Position) -> Any:
    """Return a block as something with a shape, computing or awaiting it if need be."""
    if not isinstance(getattr(given, "shape", None), tuple):
        # A value of dask.delayed has any attribute, a future of dask or Python has a result.
        for name in ("compute", "result"):
            if callable(getattr(type(given), name, None)):
                given = getattr(given, name)()
                break
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(
            f"the block at {place} is a masked array, whose mask would be lost; "
            f"give block.filled(value)"
        )
    if given is None or isinstance(given, (str, bytes)):
        raise TypeError(f"the block at {place} is {given!r}, expected an array")
    if not isinstance(getattr(given, "shape", None), tuple):
        given = np.asarray(given)
    return given


def _check_place(place: Position, split: StackSplit, seen: NDArray[np.bool_]) -> None:
    if len(place) != len(split.axes):
        raise ValueError(f"position {place} of a block has {len(place)} axes, not {seen.ndim}")
    if any(i >= n for i, n in zip(place, split.grid_shape, strict=True)):
        raise ValueError(f"position {place} of a block lies outside the grid {split.grid_shape}")
    if seen[place]:
        raise ValueError(f"the block at {place} came twice")


def _check_block(block: Any, place: Position, split: StackSplit, trailing: tuple[int, ...]) -> None:
    expected = split.block_shape(place) + trailing
    if tuple(block.shape) != expected:
        raise ValueError(
            f"the block at {place} has shape {tuple(block.shape)}, expected {expected}"
            f"{_ADVICE if block.shape else _ONE_ARRAY}"
        )


def _checked_out(
    out: Any, split: StackSplit, trailing: tuple[int, ...] | None
) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """Return the dtype of ``out``, if it has one, and its axes behind, once its shape is right."""
    shape = tuple(int(n) for n in out.shape)
    if trailing is None:
        trailing = shape[len(split.axes) :]
    if shape != split.shape + trailing:
        raise ValueError(f"out has shape {shape}, expected {split.shape + trailing}")
    return _dtype_of(out), trailing


def _dtype_of(array: Any) -> np.dtype[Any] | None:
    # tensorstore's own dtypes know their NumPy counterpart.
    dtype = getattr(array, "dtype", None)
    dtype = getattr(dtype, "numpy_dtype", dtype)
    return dtype if isinstance(dtype, np.dtype) else None


def _common_dtype(placed: Placed) -> np.dtype[Any] | None:
    """Return a dtype for all blocks of which it is known without computing one."""
    dtypes = {dtype for dtype in map(_dtype_of, placed.at_hand) if dtype is not None}
    return np.result_type(*dtypes).newbyteorder("=") if dtypes else None


def _object_array(shape: tuple[int, ...], entries: Iterable[Any]) -> NDArray[np.object_]:
    array = np.empty(prod(shape), dtype=object)
    for number, entry in enumerate(entries):
        array[number] = entry
    return array.reshape(shape)
