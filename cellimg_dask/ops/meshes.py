"""Meshes of the objects of a lazy label image, from just the cells where they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, SupportsIndex, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, Roi, Space, as_int, as_ints
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.input import as_input
from cellimg_dask.image.space_of import space_of
from cellimg_dask.ops.boxes import boxes_of, find_objects
from cellimg_dask.ops.pyramid import as_image
from cellimg_dask.ops.surfaces import Mesh

__all__ = ["mesh"]

_Position: TypeAlias = tuple[int, ...]

_STEPS = tuple(product((0, 1), repeat=3))
"""From a block to itself and to those behind it, along each axis."""
_AT_ONCE = 8
"""Blocks that are asked for together."""


class NoObjectError(ValueError):
    """There is no voxel of an object where it was looked for."""


@overload
def mesh(
    labels: Any,
    ids: SupportsIndex,
    *,
    boxes: Any = ...,
    seeds: Any = ...,
    step_size: SupportsIndex | Iterable[SupportsIndex] = ...,
) -> Mesh: ...


@overload
def mesh(
    labels: Any,
    ids: Iterable[SupportsIndex],
    *,
    boxes: Any = ...,
    seeds: Any = ...,
    step_size: SupportsIndex | Iterable[SupportsIndex] = ...,
) -> dict[int, Mesh]: ...


def mesh(
    labels: Any,
    ids: SupportsIndex | Iterable[SupportsIndex],
    *,
    boxes: Any = None,
    seeds: Any = None,
    step_size: SupportsIndex | Iterable[SupportsIndex] = 1,
) -> Mesh | dict[int, Mesh]:
    """Return the surfaces of some objects of a label image, by marching cubes.

    The same triangles as `skimage.measure.marching_cubes` finds for the object's mask in the whole
    image, at level 0.5, with a voxel of background around the image so that every surface is
    closed. Cells are gone through a few at a time, so an object may be larger than memory is.
    Without ``boxes`` and ``seeds`` all cells of the image are looked at.

    Parameters
    ----------
    labels : array-like
        Integers, of three axes: whatever `map_cells` reads. A level of a `pyramid` gives a coarser
        mesh, and reads it from there.
    ids : int or ints
        Labels of the objects.
    boxes : Roi, mapping of id to Roi, or pandas.DataFrame, optional
        Where the objects are: only cells that meet its box are read for an object. A data frame
        has the columns ``label`` and ``bbox-0`` to ``bbox-5``, as `region_table` makes it.
    seeds : position, or mapping of id to position, optional
        A voxel of each object, such as one that was clicked on. From its cell on, cells are read
        which the object touches from one that was read. Of an object in several pieces only what
        is connected that way is found.
    step_size : int or per-axis ints
        Every so many voxels are looked at: the mesh has fewer triangles.

    Returns
    -------
    Mesh, or dict of int to Mesh
        One for a single id. Vertices in the units of the image's space, in the order of its axes.

    Raises
    ------
    ValueError
        If there is no voxel of an object where it was looked for.
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((4, 6, 6), "u1")
    >>> labels[1:3, 1:4, 2:5] = 7
    >>> surface = mesh(labels, 7)
    >>> surface.vertices.min(axis=0), surface.vertices.max(axis=0)
    (array([0.5, 0.5, 1.5], dtype=float32), array([2.5, 3.5, 4.5], dtype=float32))
    """
    # As it is now: of two editions the surface would be torn.
    image, space = _checked(labels).snapshot(), space_of(labels)
    steps = as_ints(step_size, "step_size", ndim=3, minimum=1)
    single = not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0
    given: Any = [ids] if single else ids
    wanted = [as_int(label, "ids") for label in given]
    if 0 in wanted:
        raise ValueError("0 is the background, which is no object")
    if boxes is not None and seeds is not None:
        raise ValueError("give boxes or seeds, not both")
    # In phase with the steps, and of whole cells where these divide.
    sizes = tuple(
        max(step, cell // step * step) for cell, step in zip(image.cell_shape, steps, strict=True)
    )
    grid = CellGrid(image.shape, sizes)
    if seeds is not None:
        places = _for_each(seeds, wanted, "seeds")
        found = {label: _flooded(image, grid, label, places[label]) for label in wanted}
    else:
        if boxes is None:
            boxes = _found(image, wanted)
        where = _boxes(boxes, wanted, image.shape)
        found = {label: _in_box(image, grid, label, where[label]) for label in wanted}
    meshes = {
        label: _surface(image, grid, label, blocks, steps, space) for label, blocks in found.items()
    }
    return meshes[wanted[0]] if single else meshes


def _checked(labels: Any) -> CellImg:
    array = as_input(labels).array
    dtype = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    if dtype.kind not in "biu":
        raise TypeError(f"labels must be integers, got dtype {dtype}")
    if len(array.shape) != 3:
        raise ValueError(
            f"a mesh needs labels of three axes, got shape {tuple(array.shape)}; give one time "
            f"point and channel of them, for instance map_cells with drop_axis"
        )
    return as_image(labels)


# ------------------------------------------------------------------------- where the objects are


def _found(image: CellImg, wanted: list[int]) -> dict[int, Roi]:
    boxes = boxes_of(find_objects(image), wanted)
    _check_there(boxes, wanted)
    return boxes


def _check_there(boxes: Mapping[int, Roi], wanted: list[int]) -> None:
    for label in wanted:
        if label not in boxes:
            raise NoObjectError(f"there is no object {label} in the image")


def _boxes(boxes: Any, wanted: list[int], shape: tuple[int, ...]) -> dict[int, Roi]:
    """Return the box of each object, within the image."""
    if hasattr(boxes, "columns"):
        names = ["label", *(f"bbox-{number}" for number in range(6))]
        missing = [name for name in names if name not in boxes.columns]
        if missing:
            raise ValueError(f"boxes has no column {missing[0]!r}; region_table makes them")
        looked_for = set(wanted)
        rows = [row for row, n in enumerate(boxes["label"].tolist()) if n in looked_for]
        # Each by itself: in one array with other integers, ids of 64 bits would become floats.
        columns = [map(int, boxes[name].iloc[rows].tolist()) for name in names]
        boxes = {
            label: Roi(tuple(ends[:3]), tuple(ends[3:]))
            for label, *ends in zip(*columns, strict=True)
        }
        _check_there(boxes, wanted)
    given = _for_each(boxes, wanted, "boxes")
    for label, box in given.items():
        if not isinstance(box, Roi) or box.ndim != 3:
            raise TypeError(f"the box of object {label} must be a Roi of three axes, got {box!r}")
    return {label: box.clip(shape) for label, box in given.items()}


def _for_each(given: Any, wanted: list[int], what: str) -> dict[int, Any]:
    if isinstance(given, Mapping):
        for label in wanted:
            if label not in given:
                raise ValueError(f"{what} has nothing for object {label}")
        return {label: given[label] for label in wanted}
    if len(set(wanted)) > 1:
        raise TypeError(f"{what} must be a mapping from id where several ids are given")
    return dict.fromkeys(wanted, given)


def _in_box(image: CellImg, grid: CellGrid, label: int, box: Roi) -> set[_Position]:
    """Return the blocks that hold some of an object, of those that meet a box."""
    blocks = [cell.position for cell in grid.cells_in(box)] if box.size else []
    found = {position for position, mask in _masks(image, grid, label, blocks) if mask.any()}
    if not found:
        raise NoObjectError(f"there is no voxel of object {label} in {box}")
    return found


def _flooded(image: CellImg, grid: CellGrid, label: int, seed: Any) -> set[_Position]:
    """Return the blocks that hold some of an object, from that of a voxel on."""
    place = as_ints(seed, "a seed", ndim=3)
    for axis, (voxel, extent) in enumerate(zip(place, grid.shape, strict=True)):
        if not 0 <= voxel < extent:
            raise ValueError(
                f"the seed of object {label} is {voxel} on axis {axis}; allowed is 0..{extent - 1}"
            )
    there = int(image[place])
    if there != label:
        raise NoObjectError(f"the seed {place} of object {label} is a voxel of {there}")
    first = tuple(voxel // size for voxel, size in zip(place, grid.cell_shape, strict=True))
    found: set[_Position] = set()
    seen, wave = {first}, [first]
    while wave:
        touched: dict[_Position, None] = {}
        for position, mask in _masks(image, grid, label, wave):
            if mask.any():
                found.add(position)
                touched.update(dict.fromkeys(_touched(grid, position, mask)))
        wave = [position for position in touched if position not in seen]
        seen.update(wave)
    return found


def _touched(grid: CellGrid, position: _Position, mask: NDArray[np.bool_]) -> Iterator[_Position]:
    """Yield the neighbours of a block that voxels of it touch, across edges and corners too."""
    sides = {-1: slice(0, 1), 0: slice(None), 1: slice(-1, None)}
    for step in product((-1, 0, 1), repeat=3):
        other = tuple(at + way for at, way in zip(position, step, strict=True))
        inside = all(0 <= at < n for at, n in zip(other, grid.grid_shape, strict=True))
        if inside and any(step) and mask[tuple(sides[way] for way in step)].any():
            yield other


def _masks(
    image: CellImg, grid: CellGrid, label: int, positions: Collection[_Position]
) -> Iterator[tuple[_Position, NDArray[np.bool_]]]:
    """Yield where the object is in some blocks, which are computed a few at a time."""
    todo = list(positions)
    for start in range(0, len(todo), _AT_ONCE):
        part = todo[start : start + _AT_ONCE]
        requests = [image.request(grid.roi(position)) for position in part]
        try:
            for position, request in zip(part, requests, strict=True):
                yield position, request.result() == label
        finally:
            for request in requests:
                request.cancel()


# ---------------------------------------------------------------------------------- the surface


def _surface(
    image: CellImg,
    grid: CellGrid,
    label: int,
    blocks: set[_Position],
    steps: tuple[int, ...],
    space: Space,
) -> Mesh:
    """Return the mesh of an object that lies in some blocks of ``grid``."""
    # The grid of what is looked at: every so many voxels.
    coarse = CellGrid(
        tuple(-(-n // step) for n, step in zip(grid.shape, steps, strict=True)),
        tuple(size // step for size, step in zip(grid.cell_shape, steps, strict=True)),
    )
    # A cube of marching cubes lies between two voxels along each axis and belongs to the block of
    # the first. So blocks in front of those that hold some of the object take part.
    parts = {
        tuple(at - way for at, way in zip(position, step, strict=True))
        for position in blocks
        for step in _STEPS
    }
    vertices, faces, count = [], [], 0
    for part in sorted(parts):
        corners, triangles = _cubes(image, grid, coarse, label, blocks, part, steps)
        vertices.append(corners)
        faces.append(triangles + count)
        count += len(corners)
    joined = np.concatenate(vertices)
    if not len(joined):
        raise NoObjectError(
            f"no voxel of object {label} is among those that step_size {steps} looks at; give a "
            f"smaller step_size"
        )
    kept, numbers = _together(joined)
    places = joined[kept] * (np.array(steps) * space.scale) + space.translation
    return Mesh(
        places.astype(np.float32),
        numbers[np.concatenate(faces)].astype(np.uint32),
        space.named.axes,  # type: ignore[arg-type]
        space.units,  # type: ignore[arg-type]
    )


def _cubes(
    image: CellImg,
    grid: CellGrid,
    coarse: CellGrid,
    label: int,
    blocks: set[_Position],
    part: _Position,
    steps: tuple[int, ...],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return vertices, in steps, and triangles of the cubes that begin in a block.

    Of a block in front of the image only the last voxels, which are background.
    """
    from skimage.measure import marching_cubes

    first = [-1 if at < 0 else at * size for at, size in zip(part, coarse.cell_shape, strict=True)]
    last = [
        min((at + 1) * size, n)
        for at, size, n in zip(part, coarse.cell_shape, coarse.shape, strict=True)
    ]
    mask = np.zeros([high - low + 1 for low, high in zip(first, last, strict=True)], np.bool_)
    for step in _STEPS:
        position = tuple(at + way for at, way in zip(part, step, strict=True))
        if position not in blocks:
            continue
        start = [at * size for at, size in zip(position, coarse.cell_shape, strict=True)]
        # Of those behind, the first voxels only.
        stop = [low + 1 if way else high for low, high, way in zip(start, last, step, strict=True)]
        region = Roi(
            tuple(low * size for low, size in zip(start, steps, strict=True)),
            tuple((high - 1) * size + 1 for high, size in zip(stop, steps, strict=True)),
        )
        looked_at = image[region][tuple(slice(None, None, size) for size in steps)]
        mask[
            tuple(
                slice(low - origin, high - origin)
                for low, high, origin in zip(start, stop, first, strict=True)
            )
        ] = looked_at == label
    if mask.all() or not mask.any():
        return np.empty((0, 3)), np.empty((0, 3), np.int64)
    vertices, faces, _, _ = marching_cubes(mask, 0.5)
    # Its triangles are seen from outside where the axes are right-handed in reverse order.
    return vertices.astype(np.float64) + first, faces[:, ::-1].astype(np.int64)


def _together(vertices: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which vertices to keep, and for each vertex its number among them.

    Blocks have vertices in common, on edges between voxels: half way, so that they are equal to
    the last bit. Those in the middle of a cube belong to one block, and are kept as they are.
    """
    doubled = 2 * vertices
    whole = np.rint(doubled).astype(np.int64)
    shared = (doubled == whole).all(axis=1) & ((whole % 2).sum(axis=1) == 1)
    keys = -np.arange(1, len(vertices) + 1)
    whole -= whole.min(axis=0)
    # Of the object's extent, not the image's, whose voxels may be too many to be numbered.
    keys[shared] = np.ravel_multi_index(tuple(whole[shared].T), tuple(whole.max(axis=0) + 1))
    _, kept, numbers = np.unique(keys, return_index=True, return_inverse=True)
    return kept, numbers
