"""Resolution pyramids: an image at ever coarser scales, each lazily from the one below."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import as_int, as_ints
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import map_cells
from cellimg_dask.image.input import as_input
from cellimg_dask.image.tables import as_columns
from cellimg_dask.ops.downsample import downsample_mean, downsample_mode, downsample_nearest
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["Pyramid", "as_image", "original", "pyramid"]

Factors: TypeAlias = (
    SupportsIndex | Iterable[SupportsIndex] | Iterable[SupportsIndex | Iterable[SupportsIndex]]
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pyramid:
    """An image at several scales, the finest first; made by `pyramid`.

    ``len``, indexing and iteration give the levels.
    """

    levels: tuple[CellImg, ...]
    """The images; level 0 is the image itself."""
    scales: tuple[tuple[int, ...], ...]
    """Per level and axis, the distance of two voxels, in voxels of level 0. In units of the image
    it is the level's ``scale``."""
    translations: tuple[tuple[float, ...], ...]
    """Per level and axis, where the centre of the first voxel lies, in voxels of level 0 from the
    centre of its first voxel."""
    method: str
    """How a voxel is made of those below: ``"mean"``, ``"mode"`` or ``"nearest"``."""

    def __len__(self) -> int:
        return len(self.levels)

    def __iter__(self) -> Iterator[CellImg]:
        return iter(self.levels)

    @overload
    def __getitem__(self, level: SupportsIndex) -> CellImg: ...

    @overload
    def __getitem__(self, level: slice) -> tuple[CellImg, ...]: ...

    def __getitem__(self, level: SupportsIndex | slice) -> CellImg | tuple[CellImg, ...]:
        """Return a level, or several."""
        return self.levels[level]

    def __repr__(self) -> str:
        head = [("level", "shape", "cells", "scale", "translation")]
        rows = [
            (str(number), str(image.shape), f"{image.grid.num_cells:,}", str(scale), str(shift))
            for number, (image, scale, shift) in enumerate(
                zip(self.levels, self.scales, self.translations, strict=True)
            )
        ]
        title = f"Pyramid of {self.levels[0].dtype} by {self.method}"
        return "\n".join([title, *as_columns([*head, *rows], right=(2,))])


def pyramid(
    img: Any,
    levels: SupportsIndex | None = None,
    kind: Literal["image", "labels"] = "image",
    *,
    factors: Factors | None = None,
    method: Literal["mean", "mode", "nearest"] | None = None,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> Pyramid:
    """Return an image at ever coarser scales, each level lazily from the one below.

    An axis of ``n`` voxels becomes ``ceil(n / factor)``; where the last window of an axis is cut
    off by the border, its voxel is made of those that exist. Every level equals the one that the
    whole level below would give, voxel for voxel. A change of ``img`` outdates the cells that lie
    above it, and no others.

    Parameters
    ----------
    img : array-like or Input
        What `map_cells` takes: a lazy image, `Source`, NumPy, zarr, dask array and so on. Of any
        number of axes.
    levels : int, optional
        How many, that of the image included. Default: until all axes that become shorter fit
        into one cell; or as many as ``factors`` are given for.
    kind : {"image", "labels"}
        Whether voxels are measured values, of which means are taken, or numbers of objects.
    factors : int, per-axis ints, or a sequence of these per level, optional
        How many voxels of the level below make one voxel; 1 for axes that are not to be made
        smaller. Default: 2, and 1 along axes of time and of channels (t, c, s); of axes without
        names the last three are those of space. Items that are sequences are those of a level,
        for instance ``[(1, 2, 2), (2, 2, 2)]`` for voxels that are thicker than wide. A factor
        above the length of an axis counts as that length, so an axis of 1 stays what it is.
    method : {"mean", "mode", "nearest"}, optional
        Default: ``"mean"`` for images, ``"mode"`` for labels.

        - ``"mean"``: of integers the exact mean, rounded to the nearest integer, halves to the
          even one; of booleans, whether more than half are True; of floats the sum, in their own
          precision (half precision: in single), divided by the number. NaN spreads, as in
          `numpy.mean`.
        - ``"mode"``: the most frequent value. Of equally frequent ones the smallest, but 0, the
          background, only if there is no other, so that thin objects last.
        - ``"nearest"``: the first voxel of the window; for any dtype.
    cell_shape : int or ints, optional
        Cell shape of the levels; a lazy image keeps its own as level 0. Default: that of level 0,
        which for arrays is chosen as in `map_cells`.
    cache, queue
        As in `map_cells`, for all levels but the first: an array is read where it is.

    Returns
    -------
    Pyramid
        The levels, all of the image's dtype in native byte order, with their scales and
        translations in voxels; the levels' own are in units. The centre of a voxel lies in the
        middle of its window, ``(factor - 1) / 2`` voxels of the level below from the first one,
        also at the border; with ``"nearest"`` on the first voxel.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong, or a dtype has no mean or mode.

    Examples
    --------
    >>> from cellimg_dask import Input, Space
    >>> image = np.arange(35, dtype="u1").reshape(5, 7)
    >>> levels = pyramid(Input(image, space=Space.of(2, "yx", "um", scale=(2.0, 0.5))), 3)
    >>> levels
    Pyramid of uint8 by mean
    level  shape   cells  scale   translation
    0      (5, 7)      1  (1, 1)  (0.0, 0.0)
    1      (3, 4)      1  (2, 2)  (0.5, 0.5)
    2      (2, 2)      1  (4, 4)  (1.5, 1.5)
    >>> levels[1][:, 2:]
    array([[ 8, 10],
           [22, 24],
           [32, 34]], dtype=uint8)
    >>> levels[2].translation
    (3.0, 0.75)
    """
    used = _method(kind, method)
    number = None if levels is None else as_int(levels, "levels", minimum=1)
    base = as_image(img, cell_shape)
    _check_dtype(base.dtype, used)
    cells = base.cell_shape
    if cell_shape is not None:
        cells = as_ints(cell_shape, "cell_shape", ndim=base.ndim, minimum=1)
    if factors is None:
        factors = tuple(2 if is_spatial else 1 for is_spatial in base.space.spatial)
    steps = _steps(factors, number, base.shape, cells)
    images = [base]
    scales: list[tuple[int, ...]] = [(1,) * base.ndim]
    translations = [(0.0,) * base.ndim]
    # How much of the way from its first voxel to its last the place of a window lies.
    place = 0.0 if used == "nearest" else 0.5
    for step in steps:
        below = zip(translations[-1], scales[-1], step, strict=True)
        translations.append(tuple(shift + scale * (f - 1) * place for shift, scale, f in below))
        scales.append(tuple(scale * f for scale, f in zip(scales[-1], step, strict=True)))
        coarser = map_cells(
            functools.partial(_METHODS[used], factors=step),
            images[-1],
            dtype=base.dtype,
            cell_shape=cells,
            shrink=step,
            cache=cache,
            queue=queue,
        )
        if used == "nearest":
            coarser = coarser.with_space(translation=base.translation)
        images.append(coarser)
    return Pyramid(tuple(images), tuple(scales), tuple(translations), used)


_METHODS: dict[str, Callable[..., NDArray[Any]]] = {
    "mean": downsample_mean,
    "mode": downsample_mode,
    "nearest": downsample_nearest,
}


def original(block: NDArray[Any]) -> NDArray[Any]:
    """Return the block itself: level 0 of an array."""
    return block


def _method(kind: str, method: str | None) -> str:
    if kind not in ("image", "labels"):
        raise ValueError(f'kind must be "image" or "labels", got {kind!r}')
    if method is None:
        return "mean" if kind == "image" else "mode"
    if method not in _METHODS:
        raise ValueError(f'method must be "mean", "mode" or "nearest", got {method!r}')
    if kind == "labels" and method == "mean":
        raise ValueError(
            'the mean of labels is the label of something else; use method="mode" or "nearest"'
        )
    return method


def as_image(
    img: Any, cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None
) -> CellImg:
    """Return what may be an input of an image as an image: level 0, with the same voxels."""
    if isinstance(img, CellImg):
        return img
    array = as_input(img).array
    dtype = getattr(array.dtype, "numpy_dtype", array.dtype)
    # What an array gives out is not kept a second time; chunks of stores are, once decoded.
    return map_cells(original, img, dtype=dtype, cell_shape=cell_shape, cache=None)


def _check_dtype(dtype: np.dtype[Any], method: str) -> None:
    if dtype.kind not in {"mean": "biufc", "mode": "biuf"}.get(method, dtype.kind):
        raise TypeError(f'there is no {method} of dtype {dtype}; method="nearest" takes any dtype')


def _steps(
    factors: Factors, number: int | None, shape: tuple[int, ...], cells: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Return the factors of each level but the first, none above the length of its axis."""
    ndim = len(shape)
    given: Any = _listed(factors, "factors")
    per_level = None
    if isinstance(given, list) and any(_is_several(item) for item in given):
        per_level = [
            as_ints(_listed(item, f"factors[{level}]"), f"factors[{level}]", ndim=ndim, minimum=1)
            for level, item in enumerate(given)
        ]
        if number not in (None, len(given) + 1):
            raise ValueError(
                f"levels = {number}, and factors for {len(given)} levels above the first; "
                f"expected {len(given) + 1} levels, or leave levels out"
            )
        number = len(given) + 1
    else:
        same = as_ints(given, "factors", ndim=ndim, minimum=1)
    steps: list[tuple[int, ...]] = []
    while number is None or len(steps) < number - 1:
        wanted = same if per_level is None else per_level[len(steps)]
        step = tuple(min(f, max(n, 1)) for f, n in zip(wanted, shape, strict=True))
        if number is None and all(
            f == 1 or n <= cell for f, n, cell in zip(step, shape, cells, strict=True)
        ):
            break
        steps.append(step)
        shape = tuple(-(-n // f) for n, f in zip(shape, step, strict=True))
    return steps


def _is_several(value: object) -> bool:
    # A 0-d array says that it is iterable and is not.
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def _listed(value: Any, what: str) -> Any:
    """Return a sequence of values as a list, and a single value as it is."""
    if isinstance(value, (Mapping, Set, str)):
        raise TypeError(f"{what} must be a number, or numbers in the order of axes, got {value!r}")
    return list(value) if _is_several(value) else value
