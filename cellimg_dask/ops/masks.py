"""Properties for which scikit-image is given the whole object, in the cell where it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.blocks.wrappers import Wrapper
from cellimg_dask.ops.objects import Objects, Wants, measure, select
from cellimg_dask.ops.properties import MASK_PROPERTIES

__all__ = ["Extra", "Masks", "MeasureMasks", "merge_masks", "select_masks"]


@dataclass(frozen=True)
class Extra:
    """A function of the user's, from the mask of an object, and perhaps its image, to a result."""

    function: Callable[..., Any]
    dtype: np.dtype[Any]
    """Of the result; with a shape, if that is an array."""
    needs_image: bool
    """Whether the function is given the image as well."""

    @property
    def name(self) -> str:
        """Of the column."""
        return str(self.function.__name__)


def needs_image(function: Callable[..., Any]) -> bool:
    """Whether a function of masks is given the image as well: it has two arguments."""
    wanted = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    if isinstance(function, NamedFunction):
        given = function.__signature__.parameters.values()
    else:
        given = signature(function).parameters.values()
    return sum(p.kind in wanted and p.default is Parameter.empty for p in given) > 1


@dataclass(frozen=True, eq=False)
class Masks:
    """What was measured of objects that seem to be whole."""

    label: NDArray[Any]
    start: NDArray[np.int64]
    """``(objects, axes)``: first voxel of the box that was measured."""
    stop: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]
    """Of each property, an array whose first axis is that of the objects."""

    def of(self, objects: Objects) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return which of the objects were measured as a whole, and where they are here."""
        place = np.searchsorted(objects.label, self.label)
        place = place.clip(0, max(len(objects) - 1, 0))
        if not len(objects):
            return place[:0], place[:0]
        # What another cell has of an object has another box.
        same = (
            (objects.label[place] == self.label)
            & (objects.start[place] == self.start).all(axis=1)
            & (objects.stop[place] == self.stop).all(axis=1)
        )
        return place[same], np.flatnonzero(same)


def select_masks(masks: Masks, which: NDArray[Any]) -> Masks:
    """Return some of the objects, in their order."""
    columns = {name: column[which] for name, column in masks.columns.items()}
    return Masks(masks.label[which], masks.start[which], masks.stop[which], columns)


def merge_masks(parts: Sequence[Masks]) -> Masks:
    """Return the objects of several blocks, one after the other."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].columns
    return Masks(
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.stop for part in parts]),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in names},
    )


@dataclass(frozen=True)
class MeasureMasks(Wrapper):
    """Measures the objects that begin in a cell and do not exceed a box."""

    properties: tuple[str, ...]
    extras: tuple[Extra, ...]
    box: tuple[int, ...]
    """Largest extent of an object along each axis."""
    cell_shape: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int | None

    before = 1
    """Voxels that the blocks have before the cell: objects that begin there are left out."""

    @property
    def __name__(self) -> str:
        return "region_table"

    def bound(self, bind: Callable[[Any], Any]) -> Self:
        """Return the same with other functions; see `Wrapper.bound`."""
        extras = tuple(replace(extra, function=bind(extra.function)) for extra in self.extras)
        return replace(self, extras=extras)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of what a property is for one object."""
        channels = () if self.channels is None else (self.channels,)
        for extra in self.extras:
            if extra.name == name:
                return (*extra.dtype.shape, *(channels if extra.needs_image else ()))
        return channels if MASK_PROPERTIES[name].by_channel else ()

    def nothing(self, objects: Objects) -> Masks:
        """Return that nothing was measured of no objects."""
        return Masks(objects.label, objects.start, objects.stop, self._columns([], np.zeros(0)))

    def __call__(self, block: Block) -> Masks:
        """Return what is measured of the objects that begin in the cell."""
        labels, *image = block.inputs
        begin = np.array(block.position) * self.cell_shape
        origin = np.maximum(begin - self.before, 0)
        found = measure(labels, None, origin, Wants())
        whole = np.all(
            (found.start >= begin)
            & (found.start < begin + self.cell_shape)
            & (found.stop - found.start <= self.box),
            axis=1,
        )
        found = select(found, whole)
        if not len(found):
            return self.nothing(found)
        from skimage.measure import regionprops

        # Labels as scikit-image likes them: it makes a list as long as the largest.
        number = np.searchsorted(found.label, labels).clip(0, len(found) - 1)
        same = found.label[number] == labels
        regions = regionprops(
            np.where(same, number + 1, 0),
            image[0] if image else None,
            extra_properties=[extra.function for extra in self.extras],
            spacing=self.spacing,
        )
        return Masks(found.label, found.start, found.stop, self._columns(regions, origin))

    def _columns(self, regions: Sequence[Any], origin: NDArray[Any]) -> dict[str, NDArray[Any]]:
        columns = {}
        for name in self.properties:
            if name.startswith("coords"):
                found = [region.coords + origin for region in regions]
                scale = np.array(self.spacing)
                values = [c * scale for c in found] if name == "coords_scaled" else found
            else:
                values = [region[name] for region in regions]
            kind = MASK_PROPERTIES[name].dtype
            # pandas' integers, of which some may be missing, have a name in capitals.
            dtype = np.dtype(np.int64 if kind == "Int64" else kind)
            columns[name] = _stacked(values, dtype, self.shape_of(name), name)
        for extra in self.extras:
            values = [region[extra.name] for region in regions]
            shape = self.shape_of(extra.name)
            columns[extra.name] = _stacked(values, extra.dtype.base, shape, extra.name)
        return columns


def _stacked(
    values: Sequence[Any], dtype: np.dtype[Any], shape: tuple[int, ...], name: str
) -> NDArray[Any]:
    result = np.empty((len(values), *shape), dtype)
    for number, value in enumerate(values):
        if dtype.hasobject and not shape:
            result[number] = value
            continue
        array = np.asarray(value)
        if array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise TypeError(
                f"{name} returned shape {array.shape}, dtype {array.dtype}, expected {shape}, "
                f"{dtype}; say what it returns: extra_properties=[({name}, dtype)], where "
                f"np.dtype(('f8', (3,))) are three numbers and object is anything"
            )
        result[number] = array
    return result
