"""A table of the objects of a label image, with their properties as scikit-image names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.named import as_function
from cellimg_dask.geometry import CellGrid, Halo, Roi, as_int, as_ints
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import grid_of
from cellimg_dask.image.input import Input, as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.frames import frame_of
from cellimg_dask.ops.masks import (
    Extra,
    Masks,
    MeasureMasks,
    merge_masks,
    needs_image,
    select_masks,
)
from cellimg_dask.ops.objects import Objects, Wants, measure, merge, select
from cellimg_dask.ops.properties import (
    MASK_PROPERTIES,
    PROPERTIES,
    Measured,
    as_columns,
    check_property,
    wants_of,
)
from cellimg_dask.ops.trees import group_shape
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache, get_cache

if TYPE_CHECKING:
    import dask.dataframe
    import pandas as pd

__all__ = ["region_table"]

_DEFAULT = ("label", "area", "bbox", "centroid", "touches_border")
_DEFAULT_WITH_IMAGE = ("intensity_mean", "intensity_std", "intensity_min", "intensity_max")


def region_table(
    labels: Any,
    image: Any = None,
    properties: Iterable[str] | None = None,
    *,
    spacing: float | Iterable[float] | None = None,
    max_extent: SupportsIndex | Iterable[SupportsIndex] | None = None,
    extra_properties: Iterable[
        Callable[..., Any] | str | tuple[Callable[..., Any] | str, DTypeLike]
    ] = (),
    npartitions: SupportsIndex = 1,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> dask.dataframe.DataFrame:
    """Return a table of the objects of a label image, one row each, lazily.

    The columns are those of `skimage.measure.regionprops_table` on the whole image, by the same
    names. Objects may be cut by any number of cells, and be in several pieces: what is found in
    one pass over the cells is put together in a tree, and kept in the cache.

    Parameters
    ----------
    labels : array-like
        Integers, with at least one axis; what is not above 0 is background. Whatever `map_cells`
        reads, for instance what `label` and `stitch` return.
    image : array-like, optional
        Real numbers: intensities of the same shape, or with a last axis of channels.
    properties : names, optional
        Default: ``label``, ``area``, ``bbox``, ``centroid``, ``touches_border``, and with an image
        ``intensity_mean``, ``intensity_std``, ``intensity_min``, ``intensity_max``. There are all
        of scikit-image's that follow from boxes, numbers, sums and moments; and two of our own,
        ``touches_border`` and ``intensity_sum``, exact for integers. Those that
        need the object's mask, such as ``solidity``, ``perimeter`` or ``image``, need
        ``max_extent``.
    spacing : float or floats, optional
        Extent of a voxel along each axis; default: 1.
    max_extent : int or ints, optional
        A box in voxels. Objects that fit into it are given to scikit-image as a whole, each in the
        cell where it begins, which is read with that much more around it. Of those that do not,
        properties that need the mask are missing, and the column ``fits`` says so.
    extra_properties : sequence of callables or names, or pairs of one and a dtype
        As scikit-image's: called with an object's mask, or with mask and image if it has two
        arguments. The column has the function's name and the dtype, default float64;
        ``np.dtype(("f8", (3,)))`` makes three columns. Needs ``max_extent``.
    npartitions : int
        How many partitions the data frame has. An object is in the one that its label says, so no
        task holds all objects where there are many.
    cell_shape, cache, queue
        As in `map_cells`.

    Returns
    -------
    dask.dataframe.DataFrame
        Rows in the order of labels, in each partition. ``.compute()`` gives a pandas DataFrame.
        Floats are computed in float64, also of images of float32. The number of coordinates of a
        column comes after a dash, and that of a channel last: ``centroid-0``,
        ``intensity_mean-2``.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.array([[1, 1, 0, 0], [0, 1, 0, 7], [0, 0, 7, 7]])
    >>> table = region_table(labels, properties=["label", "area", "centroid"], cell_shape=2)
    >>> table.compute()
       label  area  centroid-0  centroid-1
    0      1   3.0    0.333333    0.666667
    1      7   3.0    1.666667    2.666667
    """
    item = as_input(labels)
    grid = _grid_of_labels(item, cell_shape)
    steps = _checked_spacing(spacing, grid.ndim)
    picture = None if image is None else _Picture.of(image, grid)
    names = (
        _DEFAULT + (_DEFAULT_WITH_IMAGE if picture else ()) if properties is None else properties
    )
    if isinstance(names, str):
        raise TypeError(f"properties must be a sequence of names, got {names!r}")
    chosen = tuple(names)
    for name in chosen:
        check_property(name, steps, has_image=picture is not None)
    extras = tuple(_extra(given, picture is not None) for given in extra_properties)
    box = (
        None if max_extent is None else as_ints(max_extent, "max_extent", ndim=grid.ndim, minimum=1)
    )
    columns = [*chosen, *(extra.name for extra in extras)]
    if len(set(columns)) != len(columns):
        raise ValueError(f"properties come twice, or extra ones have names of others: {columns}")
    with_masks = tuple(name for name in chosen if name in MASK_PROPERTIES)
    if (with_masks or extras) and box is None:
        raise ValueError(
            f"{(*with_masks, *(extra.name for extra in extras))[0]} needs the whole object: give "
            f"max_extent=…, a box in voxels that the objects of interest fit into"
        )
    parts = as_int(npartitions, "npartitions", minimum=1)
    return _table(item, grid, picture, chosen, extras, steps, box, with_masks, parts, cache, queue)


def _table(
    labels: Input,
    grid: CellGrid,
    picture: _Picture | None,
    chosen: tuple[str, ...],
    extras: tuple[Extra, ...],
    spacing: tuple[float, ...],
    box: tuple[int, ...] | None,
    with_masks: tuple[str, ...],
    npartitions: int,
    cache: CellCache | str | None,
    queue: BlockQueue | None,
) -> dask.dataframe.DataFrame:
    """Return the data frame; the arguments are checked."""
    # What all partitions are picked from has to be kept.
    keep = get_cache() if cache is None and npartitions > 1 else cache

    def values(f: Callable[[Block], Any], cells: CellGrid, *inputs: Any, **more: Any) -> CellImg:
        return cell_values(f, cells, *inputs, cache=keep, queue=queue, **more)

    channels = None if picture is None else picture.channels
    collect = _Collect(
        wants_of(chosen),
        grid.cell_shape,
        _dtype_of(labels.array),
        None if picture is None else picture.dtype,
        channels or 1,
    )
    pictures = [] if picture is None or not collect.wants.intensities else [picture.input(grid, 0)]
    objects = values(collect, grid, labels, *pictures)
    empty: list[Any] = [collect.nothing(grid.ndim)]
    trees = [_trees(objects, _MergeObjects(empty[0]), npartitions, values)]
    masks = None
    if with_masks or extras:
        assert box is not None
        masks = MeasureMasks(with_masks, extras, box, grid.cell_shape, spacing, channels)
        halo = Halo((masks.before,) * grid.ndim, tuple(extent - 1 for extent in box))
        pictures = [] if picture is None else [picture.input(grid, halo)]
        measured = values(masks, grid, labels, *pictures, halo=halo)
        empty.append(masks.nothing(empty[0]))
        trees.append(_trees(measured, _MergeMasks(empty[1]), npartitions, values))
    finish = _Finish(
        chosen,
        extras,
        grid.shape,
        spacing,
        box,
        channels,
        np.dtype("f8") if picture is None else picture.sums,
        masks,
    )
    tables = values(finish, CellGrid(trees[0].shape, 1), *trees)
    return frame_of(tables, finish.frame(*empty), _copied)


def _copied(table: pd.DataFrame) -> pd.DataFrame:
    # Whoever gets it may write into it, and the cache has the other.
    return table.copy()


def _trees(
    cells: CellImg, merge: _MergeObjects | _MergeMasks, count: int, values: Callable[..., CellImg]
) -> CellImg:
    """Return what all cells have, put together in a tree, or in one for each of ``count`` parts.

    A part is a voxel along the first axis.
    """
    ones = (1,) * cells.ndim
    if cells.size == 0:
        return values(merge, CellGrid(ones if count == 1 else (count, *ones), 1))
    root = values(merge, CellGrid(cells.shape, group_shape(cells.shape)), cells)
    if count == 1:
        while root.size > 1:
            root = values(merge, CellGrid(root.shape, group_shape(root.shape)), root)
        return root
    root = values(_Pick(merge, count), CellGrid((count, *root.shape), 1), root)
    while root.size > count:
        size = (1, *group_shape(root.shape[1:]))
        root = values(merge, CellGrid(root.shape, size), root)
    return root


# ---------------------------------------------------------------- functions of blocks


class _Named:
    @property
    def __name__(self) -> str:
        return "region_table"


@dataclass(frozen=True)
class _Collect(_Named):
    """Collects what is known of the objects in a cell."""

    wants: Wants
    cell_shape: tuple[int, ...]
    labels: np.dtype[Any]
    image: np.dtype[Any] | None
    channels: int

    def __call__(self, block: Block) -> Objects:
        labels, *image = block.inputs
        origin = tuple(p * n for p, n in zip(block.position, self.cell_shape, strict=True))
        return measure(labels, image[0] if image else None, origin, self.wants)

    def nothing(self, ndim: int) -> Objects:
        """Return a table without objects."""
        empty = (0,) * ndim
        image = None if self.image is None else np.zeros((*empty, self.channels), self.image)
        return measure(np.zeros(empty, self.labels), image, empty, self.wants)


@dataclass(frozen=True)
class _MergeObjects(_Named):
    nothing: Objects

    def __call__(self, block: Block) -> Objects:
        parts = list(block.inputs[0].flat) if block.inputs else []
        return merge([part for part in parts if len(part)] or [self.nothing])

    def some(self, objects: Objects, which: NDArray[np.bool_]) -> Objects:
        return select(objects, which)


@dataclass(frozen=True)
class _MergeMasks(_Named):
    nothing: Masks

    def __call__(self, block: Block) -> Masks:
        parts = list(block.inputs[0].flat) if block.inputs else []
        return merge_masks([part for part in parts if len(part.label)] or [self.nothing])

    def some(self, masks: Masks, which: NDArray[np.bool_]) -> Masks:
        return select_masks(masks, which)


@dataclass(frozen=True)
class _Pick(_Named):
    """Picks the objects that belong to a partition."""

    merge: _MergeObjects | _MergeMasks
    count: int

    def __call__(self, block: Block) -> Any:
        known = block.inputs[0].item()
        # Labels may be numbered in steps, so that their remainders are not spread evenly.
        mixed = known.label.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        part = (mixed >> np.uint64(32)) % np.uint64(self.count)
        return self.merge.some(known, part == block.position[0])


@dataclass(frozen=True)
class _Finish(_Named):
    """Makes the table of what is known."""

    chosen: tuple[str, ...]
    extras: tuple[Extra, ...]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    box: tuple[int, ...] | None
    channels: int | None
    sums: np.dtype[Any]
    masks: MeasureMasks | None

    def __call__(self, block: Block) -> pd.DataFrame:
        return self.frame(*(known.item() for known in block.inputs))

    def frame(self, objects: Objects, masks: Masks | None = None) -> pd.DataFrame:
        import pandas as pd

        found = Measured(objects, self.shape, self.spacing, self.channels, self.sums)
        columns: dict[str, Any] = {}
        for name in self.chosen:
            if name in PROPERTIES:
                columns.update(as_columns(name, found[name]))
            else:
                columns.update(self._with_masks(name, MASK_PROPERTIES[name].dtype, objects, masks))
        for extra in self.extras:
            kind = extra.dtype.base
            dtype = {"i": f"Int{8 * kind.itemsize}", "u": f"UInt{8 * kind.itemsize}"}.get(
                kind.kind, "boolean" if kind.kind == "b" else kind
            )
            columns.update(self._with_masks(extra.name, dtype, objects, masks))
        if self.box is not None:
            columns["fits"] = np.all(objects.stop - objects.start <= self.box, axis=1)
        return pd.DataFrame(columns)

    def _with_masks(
        self, name: str, dtype: Any, objects: Objects, masks: Masks | None
    ) -> dict[str, Any]:
        """Return the columns of a property, with gaps where the object does not fit."""
        import pandas as pd

        assert masks is not None
        assert self.masks is not None
        rows, places = masks.of(objects)
        found = masks.columns[name][places]
        full = np.zeros((len(objects), *found.shape[1:]), found.dtype)
        missing = np.ones(len(objects), bool)
        full[rows], missing[rows] = found, False
        columns = {}
        for title, values in as_columns(name, full):
            column = pd.Series(values, dtype=object if found.dtype.hasobject else None)
            if isinstance(dtype, str) and dtype[0] in "IUb":
                column = column.astype(dtype)
            elif found.dtype.hasobject:
                column[missing] = None
            columns[title] = column.mask(missing) if missing.any() else column
        return columns


# ---------------------------------------------------------------- arguments


@dataclass(frozen=True)
class _Picture:
    """The image of intensities."""

    item: Input
    channels: int | None
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, image: Any, grid: CellGrid) -> _Picture:
        item = as_input(image)
        if item.shape[: grid.ndim] != grid.shape or len(item.shape) > grid.ndim + 1:
            raise ValueError(
                f"the image has shape {item.shape}, expected {grid.shape}, that of the labels, or "
                f"with an axis of channels behind it"
            )
        dtype = _dtype_of(item.array)
        if dtype.kind not in "biuf":
            raise TypeError(f"the image must be of real numbers, got dtype {dtype}")
        return cls(item, item.shape[-1] if len(item.shape) > grid.ndim else None, dtype)

    @property
    def sums(self) -> np.dtype[Any]:
        """Dtype of sums of intensities."""
        return np.dtype({"f": "f8", "u": "u8"}.get(self.dtype.kind, "i8"))

    def input(self, grid: CellGrid, halo: Halo | int) -> Input:
        """Return the image as an input of values of the cells of ``grid``."""
        if self.channels is None:
            return Input(self.item.array, halo=halo, version=self.item.version)
        wide = Halo.of(halo, grid.ndim)
        return Input(
            self.item.array,
            halo=Halo((*wide.before, 0), (*wide.after, 0)),
            index_map=_AllChannels(grid, self.channels),
            version=self.item.version,
        )


@dataclass(frozen=True)
class _AllChannels:
    """From the position of a cell to its voxels in all channels."""

    grid: CellGrid
    channels: int

    def __call__(self, roi: Roi) -> Roi:
        cell = self.grid.roi(roi.start)
        return Roi((*cell.start, 0), (*cell.stop, self.channels))


def _dtype_of(array: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    return dtype.newbyteorder("=")


def _grid_of_labels(item: Input, cell_shape: Any) -> CellGrid:
    dtype = _dtype_of(item.array)
    if dtype.kind == "b":
        raise TypeError("labels must be integers, got bool; label(mask) finds objects of a mask")
    if dtype.kind not in "iu":
        raise TypeError(
            f"labels must be integers, got dtype {dtype}; give labels.astype('i8') if they are "
            f"whole numbers"
        )
    if not item.shape:
        raise ValueError("labels must have at least one axis")
    return grid_of(cell_shape, [item])


def _checked_spacing(spacing: Any, ndim: int) -> tuple[float, ...]:
    if spacing is None:
        return (1.0,) * ndim
    steps = (
        tuple(map(float, spacing)) if isinstance(spacing, Iterable) else (float(spacing),) * ndim
    )
    if len(steps) != ndim or not all(isfinite(step) and step > 0 for step in steps):
        raise ValueError(
            f"spacing must be a number above 0, or one for each of {ndim} axes, got {spacing!r}"
        )
    return steps


def _extra(given: Any, has_image: bool) -> Extra:
    function, dtype = given if isinstance(given, tuple) else (given, np.float64)
    function = as_function(function)
    if not callable(function) or not hasattr(function, "__name__"):
        raise TypeError(
            f"extra_properties must be functions with a name, or pairs of one and a dtype, got "
            f"{given!r}"
        )
    try:
        takes_image = needs_image(function)
    except AttributeError as error:
        raise TypeError(
            f"{error}, and so not whether it wants the image; name it by its file, as "
            f"'path/to/file.py:{function.__name__}'"
        ) from None
    extra = Extra(function, np.dtype(dtype), takes_image)
    if extra.name in PROPERTIES or extra.name in MASK_PROPERTIES:
        raise ValueError(f"extra property {extra.name} has the name of another; rename it")
    if extra.needs_image and not has_image:
        raise ValueError(
            f"extra property {extra.name} needs the image: region_table(labels, image)"
        )
    return extra
