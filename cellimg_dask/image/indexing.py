"""Reading and writing by any NumPy index an array that lies in cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.plan import Box, Region
from cellimg_dask.geometry import CellGrid, Roi
from cellimg_dask.state.dirty import Points, VoxelMask

__all__ = ["VoxelChange", "assign", "take", "take_boxes"]

VoxelChange: TypeAlias = Region | VoxelMask | Points
"""The voxels that were written."""

Tile: TypeAlias = Callable[[int], NDArray[Any]]
"""From the index of a cell to its array."""

Writable: TypeAlias = Callable[[int, bool], NDArray[Any]]
"""From the index of a cell, and whether all of it is written, to an array to write into."""


class _Steps(NamedTuple):
    """What an index takes along one axis."""

    chosen: range
    """Coordinates, ascending."""
    reversed: bool
    """Whether they were asked for in descending order."""
    dropped: bool
    """Whether the axis was indexed by an integer."""


class _Part(NamedTuple):
    """What an index takes of one cell."""

    cell: int
    local: tuple[Any, ...]
    """Where in the cell; ends with an ellipsis, which makes a view also without axes."""
    target: tuple[Any, ...]
    """Where in all that the index takes; likewise."""
    is_all: bool
    """Whether it takes the whole cell."""


def take(grid: CellGrid, dtype: np.dtype[Any], tile: Tile, key: Any) -> Any:
    """Return ``array[key]`` as a copy, as NumPy does, for the array whose cells ``tile`` gives."""
    axes = _basic(key, grid.shape)
    if axes is not None:
        out = np.empty([len(axis.chosen) for axis in axes], dtype)
        for part in _parts(grid, axes):
            out[part.target] = tile(part.cell)[part.local]
        return _as_result(out[_as_asked(axes)], key)
    coords = _coordinates(key, grid.shape)
    found = np.empty(coords[0].size, dtype)
    for index, local, chosen in _by_cell(grid, coords):
        found[chosen] = tile(index)[local]
    found = found.reshape(coords[0].shape)
    return found if isinstance(coords[0], np.ndarray) else found[()]


def take_boxes(
    grid: CellGrid, dtype: np.dtype[Any], read: Callable[[Box], NDArray[Any]], key: Any
) -> Any:
    """Return ``array[key]`` as NumPy does, for the array whose boxes ``read`` gives, as new arrays.

    What is one box is read at once, anything else cell by cell.
    """
    axes = _basic(key, grid.shape)
    if axes is None or any(axis.chosen.step != 1 for axis in axes):
        return take(grid, dtype, lambda index: read(grid.roi(grid.position(index)).slices), key)
    box = tuple(slice(axis.chosen.start, axis.chosen.stop) for axis in axes)
    if any(part.start >= part.stop for part in box):
        block = np.empty([len(axis.chosen) for axis in axes], dtype)
    else:
        block = read(box)
    return _as_result(block[_as_asked(axes)], key)


def assign(
    grid: CellGrid, dtype: np.dtype[Any], cell: Writable, key: Any, value: Any
) -> VoxelChange | None:
    """Do ``array[key] = value`` as NumPy does, and return the voxels that were written, if any.

    Where that fails, nothing has been written.
    """
    value = np.asarray(value, dtype)
    axes = _basic(key, grid.shape)
    if axes is not None:
        shape = [len(axis.chosen) for axis in axes if not axis.dropped]
        given = _broadcast(value, tuple(shape))[_as_stored(axes)]
        for part in _parts(grid, axes):
            if not part.is_all:
                # A store may fail to give what is there already.
                cell(part.cell, False)
        for part in _parts(grid, axes):
            cell(part.cell, part.is_all)[part.local] = given[part.target]
        if not all(axis.chosen for axis in axes):
            return None
        return tuple(
            ((axis.chosen[0], axis.chosen[-1] + 1),)
            if axis.chosen.step == 1
            else tuple((number, number + 1) for number in axis.chosen)
            for axis in axes
        )
    mask = _whole_mask(key, grid.shape)
    if mask is not None and value.size == 1:
        return _assign_by_mask(grid, cell, mask, value.reshape(()))
    coords = _coordinates(key, grid.shape)
    if coords[0].size == 0:
        return None
    values = _broadcast(value, coords[0].shape).ravel()
    parts = list(_by_cell(grid, coords))
    for index, _, _ in parts:
        cell(index, False)
    for index, local, chosen in parts:
        cell(index, False)[local] = values[chosen]
    return Points(np.stack([axis.ravel() for axis in coords], axis=1))


def _basic(key: Any, shape: tuple[int, ...]) -> list[_Steps] | None:
    """Read an index of integers, slices and an ellipsis, or a Roi; None: it is another one."""
    if isinstance(key, Roi):
        key = key.slices
    items = key if isinstance(key, tuple) else (key,)
    kinds = [
        item is Ellipsis
        or (isinstance(item, (slice, int, np.integer)) and not isinstance(item, (bool, np.bool_)))
        for item in items
    ]
    if not all(kinds) or sum(item is Ellipsis for item in items) > 1:
        return None
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    missing = len(shape) - (len(items) - len(places))
    if missing < 0:
        raise IndexError(
            f"too many indices: the array has {len(shape)} axes, "
            f"{len(items) - len(places)} were given"
        )
    at = places[0] if places else len(items)
    items = (*items[:at], *(slice(None),) * missing, *items[at + bool(places) :])
    axes = []
    for axis, (item, extent) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            steps = range(*item.indices(extent))
            backwards = steps.step < 0
            axes.append(_Steps(steps[::-1] if backwards else steps, backwards, False))
        else:
            if not -extent <= item < extent:
                raise IndexError(
                    f"index {item} on axis {axis} is out of bounds; allowed is "
                    f"{-extent}..{extent - 1}"
                )
            number = int(item) % extent
            axes.append(_Steps(range(number, number + 1), False, True))
    return axes


def _as_asked(axes: list[_Steps]) -> tuple[Any, ...]:
    """Return the index that drops and turns round axes as was asked."""
    return (
        *(0 if axis.dropped else slice(None, None, -1 if axis.reversed else 1) for axis in axes),
        ...,
    )


def _as_stored(axes: list[_Steps]) -> tuple[Any, ...]:
    """Return the index that brings back the axes that `_as_asked` drops and turns round."""
    return (
        *(
            np.newaxis if axis.dropped else slice(None, None, -1 if axis.reversed else 1)
            for axis in axes
        ),
        ...,
    )


def _parts(grid: CellGrid, axes: list[_Steps]) -> Iterator[_Part]:
    cuts = [
        list(_cuts(axis.chosen, size, extent))
        for axis, size, extent in zip(axes, grid.cell_shape, grid.shape, strict=True)
    ]
    for combination in product(*cuts):
        yield _Part(
            sum(
                position * stride
                for (position, _, _, _), stride in zip(combination, grid.strides, strict=True)
            ),
            (*(local for _, local, _, _ in combination), ...),
            (*(target for _, _, target, _ in combination), ...),
            all(is_all for _, _, _, is_all in combination),
        )


def _cuts(steps: range, size: int, extent: int) -> Iterator[tuple[int, slice, slice, bool]]:
    """Cut coordinates by the cells of an axis."""
    if not steps:
        return
    for position in range(steps[0] // size, steps[-1] // size + 1):
        low, high = position * size, min((position + 1) * size, extent)
        first = max(0, -(-(low - steps.start) // steps.step))
        last = min(len(steps), -(-(high - steps.start) // steps.step))
        if first < last:
            chosen = steps[first:last]
            local = slice(chosen[0] - low, chosen[-1] - low + 1, steps.step)
            yield position, local, slice(first, last), len(chosen) == high - low


def _as_result(asked: NDArray[Any], key: Any) -> Any:
    """Return a scalar where NumPy gives one."""
    keeps_array = asked.ndim or isinstance(key, Roi) or key is Ellipsis
    if keeps_array or (isinstance(key, tuple) and any(item is Ellipsis for item in key)):
        return asked
    return asked[()]


def _whole_mask(key: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    if isinstance(key, tuple) and len(key) == 1:
        (key,) = key
    if isinstance(key, (tuple, slice, int)) or key is None or key is Ellipsis:
        return None
    mask = np.asarray(key)
    return mask if mask.dtype == bool and mask.shape == shape and mask.ndim else None


def _assign_by_mask(
    grid: CellGrid, cell: Writable, mask: NDArray[np.bool_], value: NDArray[Any]
) -> VoxelChange | None:
    """Write one value where a mask of the array's shape is true."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        (hit,) = np.nonzero(mask.any(axis=others))
        if not hit.size:
            return None
        box.append(_Steps(range(int(hit[0]), int(hit[-1]) + 1), False, False))
    origin = tuple(axis.chosen.start for axis in box)
    # A copy: it is needed until the change takes place.
    inner = mask[tuple(slice(axis.chosen.start, axis.chosen.stop) for axis in box)].copy()
    parts = [part for part in _parts(grid, box) if inner[part.target].any()]
    full = [part.is_all and bool(inner[part.target].all()) for part in parts]
    for part, is_all in zip(parts, full, strict=True):
        if not is_all:
            cell(part.cell, False)
    for part, is_all in zip(parts, full, strict=True):
        view = cell(part.cell, is_all)[part.local]
        view[inner[part.target]] = value
    return VoxelMask(origin, inner)


def _coordinates(key: Any, shape: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Return the coordinates that an index takes, along each axis and in the result's shape."""
    if not shape:
        raise IndexError(f"index {key!r}: an array without axes takes () and '...'")
    # NumPy itself says what the index means, on arrays that take no memory.
    return [
        np.broadcast_to(
            np.arange(extent).reshape([-1 if other == axis else 1 for other in range(len(shape))]),
            shape,
        )[key].astype(np.int64, copy=False)
        for axis, extent in enumerate(shape)
    ]


def _by_cell(
    grid: CellGrid, coords: list[NDArray[np.int64]]
) -> Iterator[tuple[int, tuple[NDArray[np.int64], ...], NDArray[np.int64]]]:
    """Yield cell, coordinates in it, and which of the points they are; in the points' order."""
    flat = [axis.ravel() for axis in coords]
    if not flat[0].size:
        return
    cells = sum(
        axis // size * stride
        for axis, size, stride in zip(flat, grid.cell_shape, grid.strides, strict=True)
    )
    order = np.argsort(cells, kind="stable")
    indices, starts = np.unique(np.asarray(cells)[order], return_index=True)
    for index, chosen in zip(indices, np.split(order, starts[1:]), strict=True):
        local = tuple(axis[chosen] % size for axis, size in zip(flat, grid.cell_shape, strict=True))
        yield int(index), local, chosen


def _broadcast(value: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    # NumPy's assignment ignores leading axes of length 1.
    while value.ndim > len(shape) and value.shape[0] == 1:
        value = value[0]
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        raise ValueError(
            f"a value of shape {value.shape} cannot be written to a region of shape {shape}"
        ) from None
