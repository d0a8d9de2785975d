"""An image as another one sees it: sampled wherever a transform leads, lazily."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from cellimg_dask.geometry import CellGrid, Space, as_int, as_ints, even_cell_shape
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import as_axes, fill_cells, grid_of, map_cells
from cellimg_dask.image.input import Input, as_input, checked_fill
from cellimg_dask.image.space_of import space_of
from cellimg_dask.ops.label_image import LabelImg
from cellimg_dask.ops.sampling import PREFILTER_HALO, Field, Prefilter, Sample
from cellimg_dask.ops.transforms import Transform, as_transform, in_units
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["warp"]


def warp(
    img: Any,
    transform: Any,
    *,
    like: Any = None,
    shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    coordinates: str = "voxels",
    order: SupportsIndex | None = None,
    fill_value: Any = 0,
    kept_axes: SupportsIndex | Iterable[SupportsIndex] = (),
    dtype: DTypeLike | None = None,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> CellImg:
    """Return a lazy image whose voxel ``p`` is ``img`` at ``transform(p)``.

    The same as `scipy.ndimage.map_coordinates` on the whole image, mode ``"constant"``. A cell
    reads only the box of the image that its voxels come from, and nothing where that lies outside.

    Parameters
    ----------
    img : array-like or Input
        The image to warp, the moving one: whatever `map_cells` reads.
    transform : ThinPlateSpline, Affine, matrix or callable
        From points in the result to points in ``img``: "where does this voxel come from?". A
        matrix has the shape (n, n + 1) or (n + 1, n + 1) for n axes. A callable is given an array
        of shape (points, axes) and returns one such, with as many rows; it must treat points one
        by one and the same way each time. What it returns that is not finite is outside.
    like : array-like, or pair of shape and Space, optional
        The fixed image: the result has its shape, its cells and its space. Default: ``img``.
    shape : int or ints, optional
        Shape of the result, of the axes that the transform starts from; default: that of ``like``.
    coordinates : {"voxels", "units"}
        What points are. In ``"voxels"``, voxel ``p`` of the result and voxel ``q`` of ``img``,
        whatever their spaces; as in SciPy. In ``"units"``, places as the spaces of ``like`` and
        ``img`` give them, ``translation + scale * p``, each in the units of its own image:
        landmarks in micrometers, images of different voxel sizes.
    order : int, optional
        Of the spline between voxels, 0 to 5; default: 1, and 0 for a `LabelImg`. 0 takes the
        nearest voxel, exactly, also of ids that a float cannot hold. From 2 on the image is
        filtered first, lazily: cell by cell with a halo of 22 to 46 voxels, as float64, to one
        part in 10^12 of what filtering the whole image gives.
    fill_value : scalar
        What lies outside ``img``, that is beyond the centres of its outermost voxels.
    kept_axes : int or ints
        Axes of ``img`` that the transform says nothing of, such as channels: each position is
        warped alike. They keep their places, or come first where the transform leads to another
        number of axes than it starts from.
    dtype : dtype, optional
        Of the result; default: that of ``img``. Integers are rounded.
    cell_shape : int or ints, optional
        Default: the cells of ``like``.
    cache, queue, version
        As in `map_cells`.

    Returns
    -------
    CellImg
        With the space of ``like``.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    See Also
    --------
    ThinPlateSpline : a transform from pairs of landmarks.

    Notes
    -----
    For splines and affine transforms the box of a cell follows from a few points. For a callable
    it is found by transforming all voxels of the cell. One that has a method
    ``bounds(low, high)``, which returns two corners of a box that holds all points of the box
    ``low`` to ``high``, saves that.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(20.0).reshape(4, 5)
    >>> half_a_voxel_right = [[1, 0, 0], [0, 1, 0.5]]
    >>> warp(image, half_a_voxel_right)[0]
    array([0.5, 1.5, 2.5, 3.5, 0. ])
    """
    item = as_input(img)
    if item.halo is not None or item.boundary is not None or item.index_map is not None:
        raise ValueError(
            "the image to warp is read where the transform leads, and has no halo, boundary or "
            "index_map of its own; give the array"
        )
    if coordinates not in ("voxels", "units"):
        raise ValueError(f'coordinates must be "voxels" or "units", got {coordinates!r}')
    kept = as_axes(kept_axes, len(item.shape), "kept_axes")
    mapped = tuple(axis for axis in range(len(item.shape)) if axis not in kept)
    if not mapped:
        raise ValueError("there is no axis to warp: kept_axes names all")
    move = as_transform(transform, len(mapped))
    found, number = _dtype_of(item.array), _order(order, item.array)
    result = found if dtype is None else np.dtype(dtype)
    _check_dtypes(found, result)
    fill = checked_fill(fill_value, result, "the result")

    own = space_of(item)
    result_of = _Frame.of(like, shape, item, own.without(kept), kept, move)
    places = kept if result_of.ndim == len(mapped) else tuple(range(len(kept)))
    grid = CellGrid(
        tuple(_with(result_of.shape, places, [item.shape[axis] for axis in kept])),
        result_of.cell_shape(cell_shape, places, item, kept),
    )
    if coordinates == "units":
        outer, inner = result_of.space, own.without(kept)
        move = in_units(move, outer.scale, outer.translation, inner.scale, inner.translation)
    source = item if number < 2 else _coefficients(item, number, mapped, cache, queue)
    field = Field(
        move,
        item.shape,
        mapped,
        tuple(axis for axis in range(grid.ndim) if axis not in places),
        number,
    )
    return fill_cells(
        Sample(field, fill.item()),
        grid,
        Input(source.array, halo=0, index_map=field, version=source.version),
        dtype=result,
        cache=cache,
        queue=queue,
        version=version,
    ).with_space(_with_kept(result_of.space, own, places, kept))


@dataclass(frozen=True)
class _Frame:
    """What a result is like, along the axes that are warped."""

    shape: tuple[int, ...]
    space: Space
    model: Any
    """An array whose cells the result is to have."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @classmethod
    def of(
        cls, like: Any, shape: Any, item: Input, own: Space, kept: tuple[int, ...], move: Transform
    ) -> _Frame:
        """Read what the user says; ``own`` is the space of the image's axes that are warped."""
        ndim = getattr(move, "num_axes_in", None)
        model = item.array
        if like is None:
            extents = tuple(item.shape[a] for a in range(len(item.shape)) if a not in kept)
            space = own
        elif isinstance(like, tuple) and len(like) == 2 and isinstance(like[1], Space):
            extents, space = as_ints(like[0], "the shape in like", minimum=0), like[1]
            if len(extents) != space.ndim:
                raise ValueError(
                    f"like has a shape of {len(extents)} axes and a space of {space.ndim}"
                )
        else:
            model = as_input(like).array
            extents, space = as_input(like).shape, space_of(like)
        wanted = ndim
        if wanted is None:
            # A callable does not tell: as many as it leads to, where ``like`` may be so.
            fits = space.ndim in (own.ndim, own.ndim + len(kept))
            wanted = own.ndim if fits else space.ndim - len(kept)
        if like is not None and kept and space.ndim == wanted + len(kept) and wanted:
            # It has the axes that are kept as well, in the same places.
            drop = kept if wanted == own.ndim else tuple(range(len(kept)))
            space = space.without(drop)
            extents = tuple(n for axis, n in enumerate(extents) if axis not in drop)
        if shape is not None:
            extents = (
                as_ints(shape, "shape", minimum=0)
                if isinstance(shape, Iterable)
                else as_ints(shape, "shape", ndim=space.ndim if ndim is None else ndim, minimum=0)
            )
            if len(extents) != space.ndim and like is None:
                space = Space.of(len(extents))
        if len(extents) != space.ndim or (ndim is not None and len(extents) != ndim):
            raise ValueError(
                f"the transform starts from points of {ndim or space.ndim} axes, and the result "
                f"has the shape {extents} along the axes that are warped; give like=… or shape=… "
                f"of that many axes, without those of kept_axes"
            )
        if not extents:
            raise ValueError("the result must have an axis at least; give shape=… or like=…")
        return cls(extents, space, model)

    def cell_shape(
        self, given: Any, places: tuple[int, ...], item: Input, kept: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the shape of cells, ``places`` being where the result has the kept axes."""
        whole = self.ndim + len(places)
        if given is not None:
            return as_ints(given, "cell_shape", ndim=whole, minimum=1)
        own = grid_of(None, [Input(item.array)]).cell_shape
        native = own if self.model is item.array else grid_of(None, [Input(self.model)]).cell_shape
        if len(native) == whole:
            return native
        if len(native) != self.ndim:
            native = even_cell_shape(self.ndim)
        return tuple(_with(native, places, [own[axis] for axis in kept]))


def _with(values: Iterable[int], places: Iterable[int], more: Iterable[int]) -> list[int]:
    """Return values with more of them put in, at places in increasing order."""
    found = list(values)
    for place, value in zip(places, more, strict=True):
        found.insert(place, value)
    return found


def _with_kept(space: Space, own: Space, places: tuple[int, ...], kept: tuple[int, ...]) -> Space:
    """Return a space with axes of the image's put in."""
    if not kept:
        return space
    names = None if space.axes is None or own.axes is None else list(space.axes)
    units, scale, shifts = list(space.units), list(space.scale), list(space.translation)
    for place, axis in zip(places, kept, strict=True):
        if names is not None and own.axes is not None:
            names.insert(place, own.axes[axis])
        units.insert(place, own.units[axis])
        scale.insert(place, own.scale[axis])
        shifts.insert(place, own.translation[axis])
    if names is not None and len(set(names)) != len(names):
        names = None
    return Space.of(len(scale), names, units, scale, shifts)


def _order(order: Any, array: Any) -> int:
    if order is None:
        return 0 if isinstance(array, LabelImg) else 1
    number = as_int(order, "order", minimum=0)
    if number > 5:
        raise ValueError(f"order must be from 0 to 5, got {number}")
    return number


def _check_dtypes(found: np.dtype[Any], result: np.dtype[Any]) -> None:
    for dtype, what in ((found, "the image to warp"), (result, "the result")):
        if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
            raise TypeError(f"{what} must be of numbers of at most 64 bits, got dtype {dtype}")
    if found.kind == "c" != result.kind:
        raise TypeError(f"an image of {found} cannot be warped to {result}; take its real part")


def _coefficients(
    item: Input,
    order: int,
    mapped: tuple[int, ...],
    cache: CellCache | str | None,
    queue: BlockQueue | None,
) -> Input:
    """Return the coefficients of the image's spline."""
    wide = PREFILTER_HALO[order]
    return Input(
        map_cells(
            Prefilter(order),
            Input(item.array, version=item.version),
            dtype=np.complex128 if _dtype_of(item.array).kind == "c" else np.float64,
            halo=[wide if axis in mapped else 0 for axis in range(len(item.shape))],
            params={"axes": mapped},
            # Each is read by several cells.
            cache="shared" if cache is None else cache,
            queue=queue,
        )
    )


def _dtype_of(array: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    return dtype
