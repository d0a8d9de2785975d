"""Reading an image between its voxels, cell by cell."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import Roi
from cellimg_dask.ops.transforms import Bounded, Floats, Transform

__all__ = ["PREFILTER_HALO", "Field", "Prefilter", "Sample"]

PREFILTER_HALO = {2: 22, 3: 29, 4: 38, 5: 46}
"""Voxels that a spline's coefficients depend on, to one part in 10^16, by its order: the poles of
the filter are at 0.172, 0.268, 0.361 and 0.431, and its response falls off as their powers do."""

_AT_A_TIME = 1 << 16
"""Voxels of a cell that are sampled together, so that coordinates take little memory."""
_REMEMBERED_BOXES = 1 << 16
_REMEMBERED_BYTES = 64 << 20


class _Memory:
    """Boxes that were found, and coordinates that had to be computed for it.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: OrderedDict[Roi, Roi] = OrderedDict()
        self._coordinates: OrderedDict[Roi, list[Floats]] = OrderedDict()
        self._bytes = 0

    def box(self, roi: Roi) -> Roi | None:
        """Return where a cell reads, if it was found before."""
        return self._boxes.get(roi)

    def remember(self, roi: Roi, box: Roi, coordinates: list[Floats] | None) -> None:
        """Keep what was found for a cell."""
        with self._lock:
            self._boxes[roi] = box
            if len(self._boxes) > _REMEMBERED_BOXES:
                self._boxes.popitem(last=False)
            size = sum(part.nbytes for part in coordinates or ())
            if coordinates is not None and roi not in self._coordinates:
                self._coordinates[roi] = coordinates
                self._bytes += size
            while self._bytes > _REMEMBERED_BYTES:
                _, parts = self._coordinates.popitem(last=False)
                self._bytes -= sum(part.nbytes for part in parts)

    def take(self, roi: Roi) -> list[Floats] | None:
        """Return the coordinates of a cell, if they are there, for the last time."""
        with self._lock:
            found = self._coordinates.pop(roi, None)
            self._bytes -= sum(part.nbytes for part in found or ())
            return found


@dataclass(frozen=True, eq=False)
class Field:
    """Where the voxels of a warped image come from.

    Called with a cell's Roi it returns the input's Roi that the cell is sampled from, as an
    ``index_map``.
    """

    transform: Transform
    """From voxels of the output to voxels of the input, of the axes that are mapped."""
    shape: tuple[int, ...]
    """Shape of the input."""
    mapped: tuple[int, ...]
    """Axes of the input that the transform leads to."""
    out_mapped: tuple[int, ...]
    """Axes of the output that it starts from; the others follow each other in order."""
    order: int
    """Of the spline between voxels."""

    @cached_property
    def _memory(self) -> _Memory:
        return _Memory()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_memory"}

    @property
    def is_nested(self) -> bool:
        """Whether the box of a region is quickly found.

        It holds all voxels that matter to the region's parts.
        """
        return isinstance(self.transform, Bounded)

    @property
    def kept(self) -> tuple[int, ...]:
        """Axes of the input that the transform says nothing of."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.mapped)

    def out_kept(self, ndim: int) -> tuple[int, ...]:
        """Return the axes of an output of ``ndim`` axes that it says nothing of."""
        return tuple(axis for axis in range(ndim) if axis not in self.out_mapped)

    def __call__(self, roi: Roi) -> Roi:
        """Return what a cell reads; an empty Roi where it lies outside altogether."""
        found = self._memory.box(roi)
        if found is None:
            start, stop = self._mapped_ends(roi)
            coordinates = None
            if isinstance(self.transform, Bounded):
                low, high = self._bounds(start, stop)
            else:
                coordinates = list(self._computed(start, stop))
                low, high = self._extremes(coordinates)
            found = self._box(roi, low, high)
            self._memory.remember(roi, found, coordinates)
        return found

    def coordinates(self, roi: Roi) -> Iterator[Floats]:
        """Yield the coordinates in the input of a cell's voxels, in C order, some at a time.

        Of shape (axes, voxels). What is not finite is outside.
        """
        known = self._memory.take(roi)
        if known is not None:
            return iter(known)
        start, stop = self._mapped_ends(roi)
        return self._computed(start, stop)

    def _mapped_ends(self, roi: Roi) -> tuple[list[int], list[int]]:
        return (
            [roi.start[axis] for axis in self.out_mapped],
            [roi.stop[axis] for axis in self.out_mapped],
        )

    def inside(self, coordinates: Floats) -> NDArray[np.bool_]:
        """Return which coordinates lie in the input, between the centres of its outer voxels."""
        ends = np.array([self.shape[axis] for axis in self.mapped])[:, None] - 1
        found: NDArray[np.bool_] = np.logical_and.reduce(
            (coordinates >= 0) & (coordinates <= ends), axis=0
        )
        return found

    def _bounds(self, start: list[int], stop: list[int]) -> tuple[Floats, Floats]:
        assert isinstance(self.transform, Bounded)
        first = np.array(start, np.float64)
        low, high = self.transform.bounds(first, np.array(stop, np.float64) - 1)
        return np.asarray(low, np.float64), np.asarray(high, np.float64)

    def _extremes(self, coordinates: list[Floats]) -> tuple[Floats, Floats]:
        """Return the least and greatest of the coordinates that lie in the input."""
        low, high = (np.full(len(self.mapped), end) for end in (np.inf, -np.inf))
        for part in coordinates:
            inside = part[:, self.inside(part)]
            low = np.minimum(low, inside.min(axis=1, initial=np.inf))
            high = np.maximum(high, inside.max(axis=1, initial=-np.inf))
        return low, high

    def _box(self, roi: Roi, low: Floats, high: Floats) -> Roi:
        nothing = Roi((0,) * len(self.shape), (0,) * len(self.shape))
        starts, stops = [0] * len(self.shape), [0] * len(self.shape)
        outer = self.out_kept(roi.ndim)
        for axis, out in zip(self.kept, outer, strict=True):
            starts[axis], stops[axis] = roi.start[out], roi.stop[out]
        for axis, first, last in zip(self.mapped, low.tolist(), high.tolist(), strict=True):
            end = self.shape[axis] - 1
            # Written so that what is not a number leads to all that may be meant.
            if last < 0 or first > end or first > last:
                return nothing
            first, last = max(0.0, first), min(float(end), last)
            if self.order == 0:
                least, most = np.floor(first + 0.5), np.floor(last + 0.5)
            else:
                wide = 0 if self.order == 1 else (self.order + 1) / 2
                least, most = np.floor(first - wide), np.ceil(last + wide)
            starts[axis], stops[axis] = max(0, int(least)), min(end, int(most)) + 1
        return Roi(tuple(starts), tuple(stops))

    def _computed(self, start: list[int], stop: list[int]) -> Iterator[Floats]:
        shape = [high - low for low, high in zip(start, stop, strict=True)]
        size = prod(shape)
        for first in range(0, size, _AT_A_TIME):
            places = np.unravel_index(np.arange(first, min(first + _AT_A_TIME, size)), shape)
            points = np.stack(places, axis=-1).astype(np.float64)
            points += start
            yield self._transformed(points)

    def _transformed(self, points: Floats) -> Floats:
        expected = (len(points), len(self.mapped))
        given = np.asarray(self.transform(points))
        if given.dtype.kind not in "biuf" or given.shape != expected:
            raise ValueError(
                f"the transform was given {points.shape[0]} points in an array of shape "
                f"{points.shape} and must return real numbers of shape {expected}, got "
                f"{given.dtype} of shape {given.shape}"
            )
        found = np.array(given.T, np.float64, order="C")
        found[~np.isfinite(found)] = -np.inf
        return found


@dataclass(frozen=True, eq=False)
class Sample:
    """Fills the cells of a warped image."""

    field: Field
    """Where its voxels come from."""
    fill_value: Any
    """What lies outside."""

    @property
    def __name__(self) -> str:
        """What it is called in messages."""
        return "warp"

    def __call__(self, block: Block) -> None:
        """Fill a cell."""
        field, roi = self.field, Roi(block.roi.start, block.roi.stop)
        box = field(roi)
        if not box.size:
            block.data[...] = self.fill_value
            return
        inner = tuple(range(-len(field.out_mapped), 0))
        # Kept axes first: all their positions are sampled at the same coordinates.
        out = np.moveaxis(block.data, field.out_mapped, inner)
        read = np.moveaxis(block.inputs[0], field.mapped, range(-len(field.mapped), 0))
        kept = out.shape[: -len(inner)]
        read = read.reshape(prod(kept), *read.shape[len(kept) :])
        result = np.empty((prod(kept), prod(out.shape[len(kept) :])), block.data.dtype)
        origin = np.array([box.start[axis] for axis in field.mapped], np.float64)[:, None]
        done = 0
        for coordinates in field.coordinates(roi):
            here = slice(done, done + coordinates.shape[1])
            if field.order == 0:
                inside = field.inside(coordinates)
                coordinates = np.where(inside, np.floor(coordinates + 0.5), -np.inf)
            # Exact: an integer is taken from a float that is not below it, or from what is outside.
            coordinates = coordinates - origin
            for channel, samples in zip(read, result, strict=True):
                samples[here] = sample(channel, coordinates, field.order, self.fill_value, samples)
            done = here.stop
        out[...] = result.reshape(out.shape)


def sample(
    image: NDArray[Any], coordinates: Floats, order: int, fill_value: Any, like: NDArray[Any]
) -> NDArray[Any]:
    """Return an image's values at coordinates: ``map_coordinates`` with mode ``constant``.

    For order 0 the coordinates are integers, and negative where they are outside.
    """
    if order == 0 and np.can_cast(image.dtype, like.dtype, "same_kind"):
        # Not through floats, which do not hold all ids of labels.
        inside = coordinates[0] >= 0
        places = coordinates[:, inside].astype(np.intp)
        found = np.full(coordinates.shape[1], fill_value, like.dtype)
        found[inside] = image[tuple(places)]
        return found
    from scipy.ndimage import map_coordinates

    dtype = np.dtype(np.float32) if like.dtype == np.float16 else like.dtype
    if image.dtype == np.float16:
        image = image.astype(np.float32)
    result: NDArray[Any] = map_coordinates(
        image, coordinates, dtype, order, "constant", fill_value, prefilter=False
    )
    return result


@dataclass(frozen=True)
class Prefilter:
    """Turns a block into the coefficients of its spline."""

    order: int

    @property
    def __name__(self) -> str:
        """What it is called in messages."""
        return "spline_filter"

    def __call__(self, block: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
        """Return the coefficients along some axes."""
        from scipy.ndimage import spline_filter1d

        kind = np.complex128 if block.dtype.kind == "c" else np.float64
        found: NDArray[Any] = block.astype(kind)
        for axis in axes:
            found = spline_filter1d(found, self.order, axis, kind, "mirror")
        return found
