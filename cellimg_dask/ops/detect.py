"""Blobs in an image: scikit-image's detectors cell by cell, with the result of the whole image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import CellGrid, Roi, as_int, as_ints
from cellimg_dask.image.define import grid_of
from cellimg_dask.image.input import as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.frames import frame_of
from cellimg_dask.ops.overlaps import prune_overlapping
from cellimg_dask.ops.point_table import Found, PointTable
from cellimg_dask.ops.scale_space import (
    DifferenceOfGaussians,
    LaplacianOfGaussian,
    ScaleSpace,
    kernel_radius,
)
from cellimg_dask.ops.trees import fan
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache, get_cache

if TYPE_CHECKING:
    import dask.dataframe as dd

__all__ = ["blob_dog", "blob_log"]


def blob_log(
    image: Any,
    min_sigma: float | Sequence[float] = 1,
    max_sigma: float | Sequence[float] = 50,
    num_sigma: int = 10,
    threshold: float | None = 0.2,
    overlap: float = 0.5,
    log_scale: bool = False,
    *,
    threshold_rel: float | None = None,
    exclude_border: int | tuple[int, ...] | bool = False,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    axes: Iterable[str] | None = None,
    voxel_size: float | Sequence[float] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> dd.DataFrame:
    """Find blobs by the Laplacian of Gaussian, with the result of `skimage.feature.blob_log`.

    The same blobs, as a set, as scikit-image finds in the whole image: the halo is as wide as the
    kernel of ``max_sigma``, and what concerns the whole image (the relative threshold, and
    blobs that overlap) is settled once, between all cells. Nothing is computed before data are
    asked for, and then for all cells.

    Parameters
    ----------
    image : array-like or Input
        Real numbers, bright blobs on dark ground. As in scikit-image integers are scaled by
        the range of their dtype: 255 of ``uint8`` is 1.
    min_sigma, max_sigma : float or floats
        The smallest and the largest standard deviation looked for, in voxels; one for all axes, or
        one per axis. The radius of a blob is about ``sqrt(axes)`` sigmas. A cell reads about
        ``4 * max_sigma`` voxels around it.
    num_sigma : int
        Number of sizes from the smallest to the largest.
    threshold : float or None
        Blobs of lower response are left out. None: that is for ``threshold_rel`` to say.
    overlap : float
        Of two blobs that overlap by a greater part the smaller one is left out.
    log_scale : bool
        Whether the sizes are evenly spaced in their logarithm.
    threshold_rel : float, optional
        As ``threshold``, as a part of the greatest response in the whole image; the higher of the
        two counts.
    exclude_border : int, tuple of ints or False
        Blobs so near to the border of the image, in voxels, are left out.
    cell_shape : int or ints, optional
        Cell shape in voxels, better larger than the halo; default as in `map_cells`.
    axes, voxel_size
        As in `map_points`.
    cache, queue
        As in `map_cells`.

    Returns
    -------
    dask.dataframe.DataFrame
        One partition per cell: coordinates in voxels, then ``"sigma"``, or where sigmas were given
        per axis ``"sigma-0"`` and so on; all float64. Within a cell the highest response comes
        first.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.ndimage import gaussian_filter
    >>> image = np.zeros((60, 80))
    >>> image[20, 31] = image[40, 32] = 100
    >>> image = gaussian_filter(image, 2)
    >>> blobs = blob_log(image, 1, 3, 5, threshold=0.1, cell_shape=32, axes="yx")
    >>> blobs.compute(scheduler="sync").reset_index(drop=True)
          y     x  sigma
    0  20.0  31.0    2.0
    1  40.0  32.0    2.0
    """
    low, high, per_axis = _sigmas(image, min_sigma, max_sigma)
    count = as_int(num_sigma, "num_sigma", minimum=1)
    space = LaplacianOfGaussian(low, high, count, bool(log_scale))
    return _blobs(
        image,
        space,
        per_axis,
        _Threshold(_number(threshold, "threshold"), _number(threshold_rel, "threshold_rel")),
        overlap,
        exclude_border,
        cell_shape,
        (axes, voxel_size),
        (cache, queue),
    )


def blob_dog(
    image: Any,
    min_sigma: float | Sequence[float] = 1,
    max_sigma: float | Sequence[float] = 50,
    sigma_ratio: float = 1.6,
    threshold: float | None = 0.5,
    overlap: float = 0.5,
    *,
    threshold_rel: float | None = None,
    exclude_border: int | tuple[int, ...] | bool = False,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    axes: Iterable[str] | None = None,
    voxel_size: float | Sequence[float] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
) -> dd.DataFrame:
    """Find blobs by differences of Gaussians, with the result of `skimage.feature.blob_dog`.

    Parameters
    ----------
    image, min_sigma, max_sigma, threshold, overlap, threshold_rel, exclude_border
        As in `blob_log`.
    sigma_ratio : float
        Of each size to the one before, above 1. The last filter may be wider than ``max_sigma``
        by up to this factor.
    cell_shape, axes, voxel_size, cache, queue
        As in `blob_log`.

    Returns
    -------
    dask.dataframe.DataFrame
        As from `blob_log`.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.ndimage import gaussian_filter
    >>> image = np.zeros((60, 80))
    >>> image[20, 31] = 100
    >>> blobs = blob_dog(gaussian_filter(image, 2), 1, 4, threshold=0.1, cell_shape=32)
    >>> blobs.compute(scheduler="sync")
       axis-0  axis-1  sigma
    0    20.0    31.0    1.6
    """
    low, high, per_axis = _sigmas(image, min_sigma, max_sigma)
    if not isinstance(sigma_ratio, Real) or not 1 < float(sigma_ratio) < np.inf:
        raise ValueError(f"sigma_ratio must be a number above 1, got {sigma_ratio!r}")
    return _blobs(
        image,
        DifferenceOfGaussians(low, high, float(sigma_ratio)),
        per_axis,
        _Threshold(_number(threshold, "threshold"), _number(threshold_rel, "threshold_rel")),
        overlap,
        exclude_border,
        cell_shape,
        (axes, voxel_size),
        (cache, queue),
    )


def _blobs(
    image: Any,
    space: ScaleSpace,
    per_axis: bool,
    threshold: _Threshold,
    overlap: Any,
    exclude_border: Any,
    cell_shape: Any,
    columns: tuple[Any, Any],
    running: tuple[Any, Any],
) -> dd.DataFrame:
    if isinstance(overlap, bool) or not isinstance(overlap, Real):
        raise TypeError(f"overlap must be a number, got {overlap!r}")
    item = as_input(image)
    if item.halo is not None or item.boundary is not None or item.index_map is not None:
        raise ValueError(
            "the image of a blob detector has the halo and the boundary that the detector needs, "
            "and no index_map; give the array"
        )
    grid = grid_of(cell_shape, [item])
    ndim, (cache, queue), (axes, voxel_size) = grid.ndim, running, columns
    plain = PointTable.of(ndim, axes, None, voxel_size)
    names = [f"sigma-{suffix}" for suffix in plain.suffixes] if per_axis else ["sigma"]
    table = PointTable.of(ndim, axes, names, voxel_size)

    # One more for the neighbours of which a peak is the highest.
    halo = tuple(radius + 1 for radius in kernel_radius(space))
    border = _border(exclude_border, ndim)
    # Each table is read for all cells, so it is always kept.
    keep = get_cache() if cache is None else cache
    find = _FindPeaks(space, grid, halo, threshold, border)
    values = cell_values(find, grid, item, halo=halo, cache=keep, queue=queue)
    if grid.num_cells:
        together = _Together(space.name, threshold)
        while values.size > 1:
            groups = CellGrid(values.shape, (fan(ndim),) * ndim)
            values = cell_values(together, groups, values, cache=keep)
        prune = _Prune(space, grid, threshold, per_axis, float(overlap))
        values = cell_values(prune, CellGrid((1,) * ndim, (1,) * ndim), values, cache=keep)
        one_each = CellGrid(grid.grid_shape, (1,) * ndim)
        pick = _Pick(space.name, one_each, tuple(names))
        values = cell_values(pick, one_each, values, cache=cache)
    return frame_of(values, table.meta(), table.frame)


class _Peaks(NamedTuple):
    """Maxima of the response in a part of the image."""

    places: NDArray[np.intp]
    """Of shape (peaks, axes + 1): voxels of the image, and the number of the scale."""
    values: NDArray[np.floating]
    """Response at each of them."""
    low: np.floating
    """The lowest response in the part, at whatever place."""
    high: np.floating
    """The highest response in the part."""

    def over(self, threshold: _Threshold) -> _Peaks:
        """Return the peaks that the threshold for the whole image may leave."""
        relative = threshold.relative
        if relative is None or relative < 0:
            return self
        # The highest response of all is no lower than the highest here.
        wanted = np.greater(self.values, relative * self.high)
        return _Peaks(self.places[wanted], self.values[wanted], self.low, self.high)


@dataclass(frozen=True)
class _Threshold:
    """What a response has to exceed."""

    absolute: float | None
    relative: float | None

    def of(self, low: np.floating, high: np.floating) -> Any:
        """Return the threshold for an image with responses from ``low`` to ``high``."""
        threshold = low if self.absolute is None else self.absolute
        return threshold if self.relative is None else max(threshold, self.relative * high)


@dataclass(frozen=True)
class _FindPeaks:
    """Returns the peaks in a cell that may exceed the threshold, which is not known yet."""

    space: ScaleSpace
    grid: CellGrid
    before: tuple[int, ...]
    """Halo at the low sides."""
    threshold: _Threshold
    border: tuple[int, ...]
    """Width at the border of the image where no blobs are wanted."""

    @property
    def __name__(self) -> str:
        """How messages call it."""
        return self.space.name

    def __call__(self, block: Block) -> _Peaks:
        """Return the peaks of a cell."""
        from scipy.ndimage import maximum_filter

        image = _as_floats(block.inputs[0])
        core = self.grid.roi(block.position)
        origin = [max(a - wide, 0) for a, wide in zip(core.start, self.before, strict=True)]
        core = core.shift([-a for a in origin])
        # With the neighbours that a peak is compared with.
        rim = Roi(tuple(a - 1 for a in core.start), tuple(b + 1 for b in core.stop))
        rim = rim.clip(image.shape)
        inner = core.shift([-a for a in rim.start]).slices
        lows, highs, found = [], [], []
        responses = (response[rim.slices] for response in self.space.responses(image))
        scales = _with_neighbours(
            (response[inner], maximum_filter(response, 3, mode="nearest")[inner])
            for response in responses
        )
        for scale, (response, highest) in enumerate(scales):
            lows.append(response.min())
            highs.append(response.max())
            is_peak = response == highest
            if self.threshold.absolute is not None:
                is_peak &= response > self.threshold.absolute
            places = np.argwhere(is_peak)
            number = np.full((len(places), 1), scale)
            found.append((np.hstack([places, number]), response[is_peak]))
        places = np.concatenate([part for part, _ in found])
        values = np.concatenate([part for _, part in found])
        places[:, :-1] += np.add(origin, core.start)
        inside = self._inside(places)
        found_here = _Peaks(places[inside], values[inside], min(lows), max(highs))
        return found_here.over(self.threshold)

    def _inside(self, places: NDArray[np.intp]) -> NDArray[np.bool_]:
        low, high = np.array(self.border), np.subtract(self.grid.shape, self.border)
        inside = (places[:, :-1] >= low) & (places[:, :-1] < high)
        return np.asarray(inside.all(axis=1))


def _with_neighbours(scales: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    """Yield each response with the maximum around it, the scales before and after included."""
    window: list[tuple[Any, Any]] = []
    for scale in scales:
        window = [*window[-2:], scale]
        if len(window) > 1:
            yield window[-2][0], np.maximum.reduce([highest for _, highest in window])
    if window:
        yield window[-1][0], np.maximum.reduce([highest for _, highest in window[-2:]])


def _as_floats(array: NDArray[Any]) -> NDArray[np.floating]:
    from skimage.util import img_as_float

    dtype = np.float32 if array.dtype.itemsize <= 4 and array.dtype.kind == "f" else np.float64
    image: NDArray[np.floating] = img_as_float(array).astype(dtype, copy=False)
    return image


@dataclass(frozen=True)
class _Together:
    """Returns the peaks of some cells as one table."""

    name: str
    threshold: _Threshold

    @property
    def __name__(self) -> str:
        """How messages call it."""
        return self.name

    def __call__(self, block: Block) -> _Peaks:
        """Return the peaks."""
        places, values, lows, highs = zip(*block.inputs[0].flat, strict=True)
        together = _Peaks(np.concatenate(places), np.concatenate(values), min(lows), max(highs))
        return together.over(self.threshold)


class _Kept(NamedTuple):
    """The blobs of the image, cell by cell in C order."""

    points: NDArray[np.float64]
    """Of shape (blobs, axes), in voxels of the image."""
    sigmas: NDArray[np.float64]
    """Of shape (blobs, 1) or (blobs, axes)."""
    ends: NDArray[np.intp]
    """For each cell one past its last blob."""


@dataclass(frozen=True)
class _Prune:
    """Leaves out what does not exceed the threshold, and the smaller one of blobs that overlap."""

    space: ScaleSpace
    grid: CellGrid
    threshold: _Threshold
    per_axis: bool
    overlap: float

    @property
    def __name__(self) -> str:
        """How messages call it."""
        return self.space.name

    def __call__(self, block: Block) -> _Kept:
        """Return the blobs of the whole image."""
        places, values, low, high = block.inputs[0].item()
        sizes = self.space.sigmas(values.dtype)
        if low == high and self.grid.shape + sizes.shape[:1] != (1,) * (self.grid.ndim + 1):
            # Everywhere the same, so that nothing stands out, unless there is but one voxel.
            places, values = places[:0], values[:0]
        above = values > self.threshold.of(low, high)
        places, values = places[above], values[above]
        places = places[np.lexsort((*places.T[::-1], -values))]
        sigmas = sizes[places[:, -1]]
        if not self.per_axis:
            sigmas = sigmas[:, :1]
        blobs = np.hstack([places[:, :-1].astype(values.dtype), sigmas])
        rows = prune_overlapping(blobs, self.overlap, sigmas.shape[1])
        cells = (places[rows, :-1] // self.grid.cell_shape) @ np.array(self.grid.strides, np.intp)
        rows = rows[np.argsort(cells, kind="stable")]
        ends = np.cumsum(np.bincount(cells, minlength=self.grid.num_cells))
        return _Kept(places[rows, :-1].astype(np.float64), sigmas[rows].astype(np.float64), ends)


@dataclass(frozen=True)
class _Pick:
    """Returns the blobs of a cell."""

    name: str
    grid: CellGrid
    """One voxel per cell."""
    columns: tuple[str, ...]
    """Names of the sigmas."""

    @property
    def __name__(self) -> str:
        """How messages call it."""
        return self.name

    def __call__(self, block: Block) -> Found:
        """Return the blobs."""
        points, sigmas, ends = block.inputs[0].item()
        cell = self.grid.index(block.position)
        mine = slice(ends[cell - 1] if cell else 0, ends[cell])
        return Found(points[mine], dict(zip(self.columns, sigmas[mine].T, strict=True)))


def _sigmas(image: Any, low: Any, high: Any) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Return the sigmas per axis, and whether they were given so."""
    array = as_input(image).array
    kind = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    if kind.kind not in "biuf":
        raise TypeError(f"blobs are found in images of real numbers, got dtype {kind}")
    ndim = len(array.shape)
    if ndim == 0:
        raise ValueError("an image without axes has no blobs")
    found = []
    for name, value in (("min_sigma", low), ("max_sigma", high)):
        sizes: tuple[Any, ...] = (value,) * ndim if np.isscalar(value) else tuple(value)
        if len(sizes) != ndim:
            raise ValueError(f"{name} must have one value for each of {ndim} axes, got {value!r}")
        for size in sizes:
            if isinstance(size, (bool, str)) or not 0 < float(size) < np.inf:
                raise ValueError(f"{name} must be a positive number of voxels, got {value!r}")
        found.append(tuple(map(float, sizes)))
    return found[0], found[1], not (np.isscalar(low) and np.isscalar(high))


def _number(value: Any, what: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{what} must be a number or None, got {value!r}")
    return value if value is None else float(value)


def _border(value: Any, ndim: int) -> tuple[int, ...]:
    if value is False:
        return (0,) * ndim
    if value is True:
        raise ValueError("exclude_border cannot be True: say how many voxels")
    return as_ints(value, "exclude_border", ndim=ndim, minimum=0)
