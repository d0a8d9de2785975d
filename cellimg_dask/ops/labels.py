"""Labels of objects that are cut by the borders of cells, and made one again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.functions import BlockCode, FillFunction
from cellimg_dask.blocks.named import as_function
from cellimg_dask.geometry import CellGrid, Halo, HaloLike, Roi, Space, check_boundary
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import as_axes, common_shape, common_space, grid_of, make_image
from cellimg_dask.image.described import checked_call
from cellimg_dask.image.input import Input, as_input, inherited_halo
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.label_image import BlockLabels, LabelImg
from cellimg_dask.ops.linking import Linking, needed_steps
from cellimg_dask.ops.overlap import BlockOfCell, CellOfBlock, SideBySide, WithAxes
from cellimg_dask.ops.stitching import (
    CutBands,
    FindComponents,
    FindObjects,
    JoinBlocks,
    JoinNodes,
    ListCut,
    LookUpIds,
    NodeAbove,
    NodeOfCell,
    Resolve,
    Then,
)
from cellimg_dask.ops.trees import fan
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache, get_cache

__all__ = ["Link", "label", "map_labels", "stitch"]

Link = str | tuple[str, float]
"""``"components"``, or ``("iou", threshold)``."""


def map_labels(
    f: Callable[..., Any] | str,
    *inputs: Any,
    halo: HaloLike | None = None,
    link: Link = ("iou", 0.5),
    consecutive: bool = False,
    boundary: str = "none",
    fill_value: Any = 0,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    params: Mapping[str, Any] | None = None,
    drop_axis: SupportsIndex | Iterable[SupportsIndex] = (),
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> LabelImg:
    """Return the objects that ``f`` finds block by block, each with one id in the whole image.

    Neighbouring blocks overlap by their halos, so both label the voxels there. Labels are linked
    by these voxels and by nothing else: objects that touch at a border stay two.

    Parameters
    ----------
    f : callable, str or BlockSchema
        From arrays, halo included, to integer labels of the same size, 0 for background, or a mask
        for one object; without the axes in ``drop_axis``. It may number objects as it likes, but
        the same for the same arrays: it is called again for blocks that the cache does not hold.
        Called as ``f(*arrays, **params)``.
    *inputs : array-like or Input
        As in `map_cells`; they have the image's shape, or broadcast to it. One with an
        ``index_map`` may have a halo of its own.
    halo : int, per-axis ints, or per-axis (before, after) pairs
        Extra voxels that a block reads, in axes of the labels; at least 1 on one side of each axis
        along which objects are linked. For the result to be that of ``f`` on the whole image, it
        has to hold what an object in the cell needs: the object itself, and what it takes to find
        it. It may be left out for a schema that says it.
    link : "components" or ("iou", threshold)
        ``("iou", t)``: labels are one object if the intersection of what two blocks gave them is
        above ``t`` times the union, in the voxels that both blocks have; for instance segmentation,
        with ``t`` of at least 0.5 no label is linked to two of one neighbour. ``"components"``: if
        they share any voxel.
    consecutive : bool
        Whether ids are 1, 2, 3 … They do not depend on the scheduler in either case, but on the
        shape of the cells.
    drop_axis : int or ints
        Axes of the inputs that the labels lack, such as that of channels; every block reads their
        whole extent, without halo.
    boundary, fill_value, cell_shape, params, cache, queue, version
        As in `map_cells`.

    Returns
    -------
    LabelImg
        uint64. The first read computes the labels of all blocks, since an id may come from
        anywhere.

    Raises
    ------
    ParameterError
        If ``params`` are not what ``f`` takes.
    ResultError
        On reading, if ``f`` returns labels of another shape or no integers.

    Examples
    --------
    >>> import numpy as np, cellimg_dask as ci
    >>> from scipy import ndimage
    >>> image = np.array([0, 1, 1, 1, 0, 0, 1, 1])
    >>> def segment(block):
    ...     return ndimage.label(block)[0]
    >>> ci.map_labels(segment, image, halo=1, cell_shape=3, consecutive=True)[:]
    array([0, 1, 1, 1, 0, 0, 2, 2], dtype=uint64)
    """
    f = as_function(f)
    if isinstance(f, BlockCode):
        raise TypeError("BlockCode returns nothing; give a function that returns labels")
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}; the function comes first")
    if not inputs:
        raise TypeError("map_labels needs at least one input")
    check_boundary(boundary)
    call = checked_call(f, map(as_input, inputs), params, halo=halo)
    if call.halo is None:
        raise TypeError("map_labels needs halo=…: blocks are linked by the voxels that both label")
    items, layout, dropped, space = _laid_out(call.items, cell_shape, call.halo, drop_axis)
    modes = frozenset(item.boundary or boundary for item in items)
    blocks = _block_labels(
        FindObjects(call.function, layout, modes),
        items,
        layout,
        dropped=dropped,
        boundary=boundary,
        fill_value=fill_value,
        params=call.params,
        cache=cache,
        queue=queue,
        version=version,
    )
    labels = stitch(blocks, link=link, consecutive=consecutive, cache=cache, queue=queue)
    return labels.with_space(space)


def label(
    mask: Any,
    structure: ArrayLike | None = None,
    *,
    consecutive: bool = False,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> LabelImg:
    """Return the connected components of a mask, as `scipy.ndimage.label` finds them.

    Exact for every structuring element. The ids are others than SciPy's.

    Parameters
    ----------
    mask : array-like or Input
        Whatever `map_cells` reads, for instance ``image > 10`` of a lazy image; what is not 0
        belongs to an object.
    structure : array-like of bool, optional
        Which neighbours are connected: 3 voxels along each axis, symmetric about the middle.
        Default: those that share a face.
    consecutive : bool
        Whether ids are 1, 2, 3 …
    cell_shape, cache, queue
        As in `map_cells`.

    Returns
    -------
    LabelImg
        uint64, 0 for background.

    Raises
    ------
    ValueError
        If ``structure`` has another shape, or is not symmetric.

    Examples
    --------
    >>> import numpy as np, cellimg_dask as ci
    >>> image = ci.map_cells(np.negative, np.array([-2, -3, 0, -1, 0, -5]), cell_shape=2)
    >>> ci.label(image > 0, consecutive=True)[:]
    array([1, 1, 0, 2, 0, 3], dtype=uint64)
    """
    # What lies beyond the border of the image belongs to no object of it.
    item = replace(as_input(mask), boundary=None)
    dtype = np.dtype(getattr(item.array.dtype, "numpy_dtype", item.array.dtype))
    if dtype.kind not in "biufcO":
        raise TypeError(f"a mask must be of booleans or numbers, got an array of {dtype}")
    element = _structure(structure, len(item.shape))
    ndim = len(item.shape)
    items, layout, _, space = _laid_out((item,), cell_shape, Halo((0,) * ndim, (1,) * ndim))
    f = FindComponents(element, layout)
    blocks = _block_labels(f, items, layout, cache=cache, queue=queue)
    linking = Linking(
        blocks.layout, None, bool(consecutive), whole=True, steps=needed_steps(element)
    )
    return _stitched(as_input(blocks), linking, cache, queue).with_space(space)


def stitch(
    blocks: Any,
    grid: CellGrid | None = None,
    halo: HaloLike | None = None,
    *,
    link: Link = ("iou", 0.5),
    consecutive: bool = False,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> LabelImg:
    """Return the image of labels in which objects that several blocks labelled have one id.

    Parameters
    ----------
    blocks : BlockLabels or array-like
        Labels of all blocks, each with its halo, side by side: the ``blocks`` of an image that
        `map_labels` made, or such an image once it was stored, for instance by `run`.
    grid : CellGrid, optional
        The cells without halo. Needed where ``blocks`` is an array.
    halo : int, per-axis ints, or per-axis (before, after) pairs, optional
        That of each block, also where it reaches beyond the image. Needed for an array.
    link, consecutive, cache, queue
        As in `map_labels`.

    Returns
    -------
    LabelImg
        uint64.

    Raises
    ------
    ValueError
        If the blocks are not of the shape that grid and halo make, or there is no overlap.
    """
    threshold = _threshold(link)
    if isinstance(blocks, BlockLabels):
        if grid is not None or halo is not None:
            raise TypeError("blocks know their grid and halo: leave these out")
        layout = blocks.layout
    elif isinstance(grid, CellGrid) and halo is not None:
        layout = SideBySide(grid, Halo.of(halo, grid.ndim))
    else:
        raise TypeError(
            f"for an array of blocks give grid=CellGrid(shape, cell_shape) and halo=…, got "
            f"{grid!r} and {halo!r}"
        )
    item = as_input(blocks)
    if item.shape != layout.blocks.shape:
        raise ValueError(
            f"blocks has shape {item.shape}, expected {layout.blocks.shape}: the blocks of "
            f"{layout.grid.num_cells} cells of {layout.grid.cell_shape}, each with its halo, side "
            f"by side; labels without overlap cannot be linked, because objects that touch at a "
            f"border would become one"
        )
    dtype = np.dtype(getattr(item.array.dtype, "numpy_dtype", item.array.dtype))
    if dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got an array of {dtype}")
    return _stitched(item, Linking(layout, threshold, bool(consecutive)), cache, queue)


def _laid_out(
    inputs: Iterable[Any],
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None,
    halo: HaloLike,
    drop_axis: SupportsIndex | Iterable[SupportsIndex] = (),
) -> tuple[list[Input], SideBySide, dict[int, tuple[int, ...]], Space]:
    """Return the inputs, where blocks lie, which axes of each labels lack, and their space."""
    items = [as_input(value) for value in inputs]
    for number, item in enumerate(items):
        if item.halo is not None and item.index_map is None:
            raise ValueError(f"input {number} has a halo of its own; all have that of the blocks")
    plain = {number: item for number, item in enumerate(items) if item.index_map is None}
    ndim = len(common_shape(list(plain.values()))) if plain else 0
    dropped = as_axes(drop_axis, ndim, "drop_axis")
    grid = grid_of(cell_shape, items, dropped)
    own = {}
    for number, item in plain.items():
        skip = ndim - len(item.shape)
        own[number] = tuple(axis - skip for axis in dropped if axis >= skip)
    return items, SideBySide(grid, Halo.of(halo, grid.ndim)), own, common_space(items, dropped)


def _block_labels(
    f: FindObjects | FindComponents,
    items: list[Input],
    layout: SideBySide,
    *,
    dropped: Mapping[int, tuple[int, ...]] | None = None,
    boundary: str = "none",
    fill_value: Any = 0,
    params: Mapping[str, Any] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> BlockLabels:
    """Return the labels of all blocks side by side; see `map_labels`."""
    grid = layout.grid
    plans = []
    for number, item in enumerate(items):
        place: Callable[[Roi], Roi]
        if item.index_map is None:
            place, inherited = _followed(item.shape, (dropped or {}).get(number, ()), layout)
        else:
            place = Then(CellOfBlock(layout, grid.shape), item.index_map)
            inherited = layout.halo
        plan = item.plan(number, None, inherited, boundary, fill_value)
        plans.append(replace(plan, links=None, index_map=place))
    image = make_image(
        FillFunction(f, grid),
        layout.blocks,
        items,
        plans,
        np.dtype(np.int32),
        params,
        cache,
        queue,
        version,
    )
    return BlockLabels(image.node, layout)


def _followed(
    shape: tuple[int, ...], dropped: tuple[int, ...], layout: SideBySide
) -> tuple[CellOfBlock | WithAxes, Halo]:
    """Return how an input follows the blocks: its box for each of them, and its halo."""
    rest = tuple(extent for axis, extent in enumerate(shape) if axis not in dropped)
    place = CellOfBlock(layout, rest)
    halo = inherited_halo(layout.halo, rest, layout.grid.shape)
    if not dropped:
        return place, halo
    before, after = list(halo.before), list(halo.after)
    for axis in dropped:
        before.insert(axis, 0)
        after.insert(axis, 0)
    extents = tuple(shape[axis] for axis in dropped)
    return WithAxes(place, dropped, extents), Halo(tuple(before), tuple(after))


def _stitched(
    blocks: Input,
    linking: Linking,
    cache: CellCache | str | None,
    queue: BlockQueue | None,
) -> LabelImg:
    """Return the image of final ids: three tasks per cell, and the nodes of a tree."""
    layout = linking.layout
    grid = layout.grid
    last = prod(grid.grid_shape) * linking.stride
    if last >= 1 << 63:
        raise ValueError(f"{grid.num_cells} cells of {grid.cell_shape} have more labels than ids")
    if grid.num_cells > 1 and not any(
        width for width, steps in zip(layout.widths, grid.grid_shape, strict=True) if steps > 1
    ):
        raise ValueError(
            f"halo {layout.halo} makes no blocks overlap, and labels are linked by the voxels that "
            f"two blocks have: give a halo of at least 1"
        )
    # What belongs to all of them has to be kept, or each cell would compute everything.
    keep = get_cache() if cache is None else cache

    def values(
        f: Callable[[Block], Any], cells: CellGrid, *inputs: Any, **settings: Any
    ) -> CellImg:
        return cell_values(f, cells, *inputs, cache=keep, queue=queue, **settings)

    bands = values(CutBands(linking), layout.blocks, blocks)
    size = fan(grid.ndim)
    nodes = [values(JoinBlocks(linking, size), CellGrid(bands.shape, size), bands, halo=1)]
    while nodes[-1].size > 1:
        level = len(nodes)
        below = CellGrid(nodes[-1].shape, size)
        nodes.append(values(JoinNodes(linking, size, level), below, nodes[-1]))
    down: CellImg | None = None
    for node in reversed(nodes):
        above = () if down is None else (Input(down, index_map=NodeAbove(size)),)
        each = CellGrid(node.shape, (1,) * grid.ndim)
        down = values(Resolve(linking, size), each, node, *above)
    assert down is not None
    told = Input(down, index_map=NodeOfCell(grid, size))
    core = replace(blocks, index_map=BlockOfCell(layout))
    final = make_image(
        FillFunction(LookUpIds(linking, size), in_place=True),
        grid,
        [core, told],
        [item.plan(number, None, 0, "none", 0) for number, item in enumerate((core, told))],
        np.dtype(np.uint64),
        None,
        cache,
        queue,
        None,
    )
    every = CellGrid(bands.shape, (1,) * grid.ndim)
    cut = values(ListCut(linking, size), every, bands, Input(down, index_map=NodeAbove(size)))
    return LabelImg(final.node, blocks.array, linking, bands, nodes[-1], cut)


def _threshold(link: Link) -> float | None:
    if link == "components":
        return None
    if isinstance(link, tuple) and len(link) == 2 and link[0] == "iou":
        value = link[1]
        if isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < 1:
            return float(value)
        raise ValueError(f"the threshold of iou must be at least 0 and below 1, got {value!r}")
    raise ValueError(f'link must be "components" or ("iou", threshold), got {link!r}')


def _structure(structure: ArrayLike | None, ndim: int) -> NDArray[np.bool_]:
    from scipy.ndimage import generate_binary_structure

    if structure is None:
        element: NDArray[np.bool_] = np.asarray(generate_binary_structure(ndim, 1), np.bool_)
        return element
    element = np.asarray(structure) != 0
    if element.shape != (3,) * ndim:
        raise ValueError(
            f"structure must have 3 voxels along each of the {ndim} axes, got shape {element.shape}"
        )
    if not np.array_equal(element, np.flip(element)):
        raise ValueError(
            "structure must be symmetric about its middle: a voxel is connected to another where "
            "that is connected to it"
        )
    return element
