"""Properties of objects by their names in scikit-image, as columns of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.ops.moments import (
    axis_lengths,
    eigenvalues,
    hu_moments,
    inertia_tensors,
    normalized,
    orientations,
    scaled,
    shifted,
)
from cellimg_dask.ops.objects import Intensities, Objects, Wants, pairs

__all__ = ["MASK_PROPERTIES", "PROPERTIES", "Measured", "as_columns", "check_property", "wants_of"]

Columns = dict[str, Any]


class Measured:
    """The properties of some objects, each computed when it is asked for.

    Every property is an array whose first axis is that of the objects; those of intensities have
    a last axis of channels, if the image has one.

    Parameters
    ----------
    objects : Objects
        With what the properties need.
    shape : ints
        Of the label image.
    spacing : floats
        Extent of a voxel along each axis.
    channels : int or None
        How many the image has; None: it has no such axis.
    sums : dtype
        Of sums of intensities; those of integers wrap as NumPy's.
    """

    def __init__(
        self,
        objects: Objects,
        shape: Sequence[int],
        spacing: Sequence[float],
        channels: int | None,
        sums: np.dtype[Any],
    ) -> None:
        self._objects = objects
        self._shape = shape
        self._steps = tuple(spacing)
        self._spacing = np.array(self._steps, np.float64)
        self._channels = channels
        self._sums = sums
        self._known: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._known:
            with np.errstate(all="ignore"):
                self._known[name] = _COMPUTED[name].compute(self)
        return self._known[name]

    # ------------------------------------------------------------------ boxes and numbers

    def _label(self) -> NDArray[Any]:
        return self._objects.label

    def _num_pixels(self) -> NDArray[Any]:
        return self._objects.count

    def _area(self) -> NDArray[Any]:
        return np.asarray(self._objects.count * np.prod(self._spacing))

    def _bbox(self) -> NDArray[Any]:
        return np.concatenate([self._objects.start, self._objects.stop], axis=1)

    def _slice(self) -> NDArray[Any]:
        result = np.empty(len(self._objects), object)
        ends = zip(self._objects.start.tolist(), self._objects.stop.tolist(), strict=True)
        for number, (start, stop) in enumerate(ends):
            result[number] = tuple(map(slice, start, stop))
        return result

    def _area_bbox(self) -> NDArray[Any]:
        extents = (self._objects.stop - self._objects.start).astype(np.float64)
        return np.asarray(extents.prod(axis=1) * np.prod(self._spacing))

    def _extent(self) -> NDArray[Any]:
        return np.asarray(self["area"] / self["area_bbox"])

    def _equivalent_diameter_area(self) -> NDArray[Any]:
        ndim = self._objects.ndim
        return np.asarray((2 * ndim * self["area"] / np.pi) ** (1 / ndim))

    def _touches_border(self) -> NDArray[Any]:
        start, stop = self._objects.start, self._objects.stop
        return np.asarray(np.any((start == 0) | (stop == np.asarray(self._shape)), axis=1))

    # ------------------------------------------------------------------ centroids and shape

    def _centroid(self) -> NDArray[Any]:
        return np.asarray((self._objects.start + self._objects.centre) * self._spacing)

    def _centroid_local(self) -> NDArray[Any]:
        return np.asarray(self._objects.centre * self._spacing)

    def _second_central(self) -> NDArray[np.float64]:
        """Return the central moments of order 2 of each pair of axes, rounded once."""
        objects = self._objects
        assert objects.second is not None
        count, first, second = objects.count, objects.first, objects.second
        largest = float(count.max(initial=0)) * np.abs(second.astype(np.float64)).max(initial=0)
        if largest > 2.0**62:
            count, first, second = (part.astype(object) for part in (count, first, second))
        result = np.empty((len(objects), objects.ndim, objects.ndim))
        for column, (a, b) in enumerate(pairs(objects.ndim)):
            # Nothing cancels in integers.
            exact = count * second[:, column] - first[:, a] * first[:, b]
            result[:, a, b] = result[:, b, a] = (exact / count).astype(np.float64)
        return result

    def _inertia_tensor(self) -> NDArray[Any]:
        second = self._second_central() * self._spacing * self._spacing[:, None]
        return inertia_tensors(self._objects.count, second)

    def _inertia_tensor_eigvals(self) -> NDArray[Any]:
        return eigenvalues(self["inertia_tensor"])

    def _axis_major_length(self) -> NDArray[Any]:
        return axis_lengths(self["inertia_tensor_eigvals"])[0]

    def _axis_minor_length(self) -> NDArray[Any]:
        return axis_lengths(self["inertia_tensor_eigvals"])[1]

    def _eccentricity(self) -> NDArray[Any]:
        major, minor = self["inertia_tensor_eigvals"].T
        return np.where(major == 0, 0.0, np.sqrt(1 - minor / np.where(major == 0, 1, major)))

    def _orientation(self) -> NDArray[Any]:
        return orientations(self["inertia_tensor"])

    # ------------------------------------------------------------------ moments

    def _moments(self) -> NDArray[Any]:
        assert self._objects.raw is not None
        return scaled(self._objects.raw, self._steps)

    def _moments_central(self) -> NDArray[Any]:
        objects = self._objects
        assert objects.central is not None
        result = objects.central.copy()
        result[_zero(objects.ndim)] = objects.count
        # Those of order 1 and 2 are known without what rounding left.
        second = self._second_central()
        for axis in range(objects.ndim):
            result[_powers(objects.ndim, axis)] = 0
        for a, b in pairs(objects.ndim):
            result[_powers(objects.ndim, a, b)] = second[:, a, b]
        return scaled(result, self._steps)

    def _moments_normalized(self) -> NDArray[Any]:
        return normalized(self["moments_central"], self._steps)

    def _moments_hu(self) -> NDArray[Any]:
        return hu_moments(self["moments_normalized"])

    # ------------------------------------------------------------------ intensities

    @property
    def _intensities(self) -> Intensities:
        assert self._objects.intensities is not None
        return self._objects.intensities

    def _of_channels(self, values: NDArray[Any] | None) -> NDArray[Any]:
        assert values is not None
        return values if self._channels is not None else values[..., 0]

    def _intensity_sum(self) -> NDArray[Any]:
        total = self._of_channels(self._intensities.sum)
        if total.dtype.hasobject:
            total = (total & (2**64 - 1)).astype(np.uint64)
        return total.astype(self._sums)

    def _intensity_mean(self) -> NDArray[Any]:
        assert self._intensities.sum is not None
        mean = self._intensities.sum / self._objects.count[:, None]
        return self._of_channels(mean.astype(np.float64))

    def _intensity_min(self) -> NDArray[Any]:
        return self._of_channels(self._intensities.min).astype(np.float64)

    def _intensity_max(self) -> NDArray[Any]:
        return self._of_channels(self._intensities.max).astype(np.float64)

    def _intensity_std(self) -> NDArray[Any]:
        assert self._intensities.spread is not None
        var = self._intensities.spread / self._objects.count[:, None]
        # Rounded, some are a little below 0.
        return self._of_channels(np.sqrt(np.where(var < 0, 0, var)))

    def _weighted(
        self, change: Callable[[NDArray[Any]], NDArray[Any]], *, raw: bool = False
    ) -> NDArray[Any]:
        """Do something with the weighted moments of each channel."""
        moments = self._intensities.raw if raw else self._intensities.central
        assert moments is not None
        channels = [change(moments[:, channel]) for channel in range(moments.shape[1])]
        return self._of_channels(np.stack(channels, axis=-1))

    def _off_centre(self, moments: NDArray[Any]) -> NDArray[Any]:
        """Return how far the weighted centroid is from that of the voxels."""
        ndim = self._objects.ndim
        total = moments[_zero(ndim)]
        return np.stack([moments[_powers(ndim, a)] / total for a in range(ndim)], axis=1)

    def _centroid_weighted_local(self) -> NDArray[Any]:
        centre = self._objects.centre
        return self._weighted(lambda m: (centre + self._off_centre(m)) * self._spacing)

    def _centroid_weighted(self) -> NDArray[Any]:
        centre = self._objects.start + self._objects.centre
        return self._weighted(lambda m: (centre + self._off_centre(m)) * self._spacing)

    def _moments_weighted(self) -> NDArray[Any]:
        return self._weighted(lambda m: scaled(m, self._steps), raw=True)

    def _weighted_central(self, moments: NDArray[Any]) -> NDArray[Any]:
        return scaled(shifted(moments, -self._off_centre(moments)), self._steps)

    def _moments_weighted_central(self) -> NDArray[Any]:
        return self._weighted(self._weighted_central)

    def _moments_weighted_normalized(self) -> NDArray[Any]:
        return self._weighted(lambda m: normalized(self._weighted_central(m), self._steps))

    def _moments_weighted_hu(self) -> NDArray[Any]:
        return self._weighted(
            lambda m: hu_moments(normalized(self._weighted_central(m), self._steps))
        )


def _zero(ndim: int) -> Any:
    """Return the index of the moments of order 0."""
    return (slice(None), *(0,) * ndim)


def _powers(ndim: int, *axes: int) -> Any:
    """Return the index of the moments with these axes to the power of how often they come."""
    return (slice(None), *(axes.count(axis) for axis in range(ndim)))


# ---------------------------------------------------------------- names


_NOTHING_MORE = Wants()


@dataclass(frozen=True, slots=True)
class _Property:
    """A property that follows from what can be merged."""

    compute: Callable[[Measured], NDArray[Any]]
    wants: Wants = _NOTHING_MORE
    axes: tuple[int, ...] = ()
    """Numbers of axes for which it is defined; none: all."""
    even: bool = False
    """Whether voxels have to have the extent 1 along all axes."""


_SECOND, _CENTRAL = Wants(second=True), Wants(second=True, central=True)
_WEIGHTED, _BALANCE = Wants(weighted_central=3), Wants(weighted_central=1)
_FLAT = (2,)
_COMPUTED: Mapping[str, _Property] = {
    "label": _Property(Measured._label),
    "num_pixels": _Property(Measured._num_pixels),
    "area": _Property(Measured._area),
    "bbox": _Property(Measured._bbox),
    "slice": _Property(Measured._slice),
    "area_bbox": _Property(Measured._area_bbox),
    "extent": _Property(Measured._extent),
    "equivalent_diameter_area": _Property(Measured._equivalent_diameter_area),
    "touches_border": _Property(Measured._touches_border),
    "centroid": _Property(Measured._centroid),
    "centroid_local": _Property(Measured._centroid_local),
    "inertia_tensor": _Property(Measured._inertia_tensor, _SECOND),
    "inertia_tensor_eigvals": _Property(Measured._inertia_tensor_eigvals, _SECOND),
    "axis_major_length": _Property(Measured._axis_major_length, _SECOND, (2, 3)),
    "axis_minor_length": _Property(Measured._axis_minor_length, _SECOND, (2, 3)),
    "eccentricity": _Property(Measured._eccentricity, _SECOND, _FLAT),
    "orientation": _Property(Measured._orientation, _SECOND, _FLAT),
    "moments": _Property(Measured._moments, Wants(raw=True)),
    "moments_central": _Property(Measured._moments_central, _CENTRAL),
    "moments_normalized": _Property(Measured._moments_normalized, _CENTRAL),
    "moments_hu": _Property(Measured._moments_hu, _CENTRAL, _FLAT, even=True),
    "intensity_sum": _Property(Measured._intensity_sum, Wants(sums=True)),
    "intensity_mean": _Property(Measured._intensity_mean, Wants(sums=True)),
    "intensity_min": _Property(Measured._intensity_min, Wants(extremes=True)),
    "intensity_max": _Property(Measured._intensity_max, Wants(extremes=True)),
    "intensity_std": _Property(Measured._intensity_std, Wants(spread=True)),
    "centroid_weighted": _Property(Measured._centroid_weighted, Wants(weighted_central=1)),
    "centroid_weighted_local": _Property(
        Measured._centroid_weighted_local, Wants(weighted_central=1)
    ),
    "moments_weighted": _Property(Measured._moments_weighted, Wants(weighted_raw=True)),
    "moments_weighted_central": _Property(Measured._moments_weighted_central, _WEIGHTED),
    "moments_weighted_normalized": _Property(Measured._moments_weighted_normalized, _WEIGHTED),
    "moments_weighted_hu": _Property(Measured._moments_weighted_hu, _WEIGHTED, _FLAT, even=True),
}
PROPERTIES = frozenset(_COMPUTED)
"""Those that follow from what is collected cell by cell."""


@dataclass(frozen=True, slots=True)
class MaskProperty:
    """A property that scikit-image computes from the mask of one object."""

    dtype: str
    """Of its column."""
    axes: tuple[int, ...] = ()
    """Numbers of axes for which it is defined; none: all."""
    cubic: bool = False
    """Whether voxels have to have the same extent along all axes."""
    intensities: bool = False
    """Whether it needs the image."""
    by_channel: bool = False
    """Whether there is one for each channel."""


MASK_PROPERTIES: Mapping[str, MaskProperty] = {
    "area_convex": MaskProperty("f8"),
    "area_filled": MaskProperty("f8"),
    "coords": MaskProperty("O"),
    "coords_scaled": MaskProperty("O"),
    "euler_number": MaskProperty("Int64", (2, 3)),
    "feret_diameter_max": MaskProperty("f8", (2, 3)),
    "image": MaskProperty("O"),
    "image_convex": MaskProperty("O"),
    "image_filled": MaskProperty("O"),
    "image_intensity": MaskProperty("O", intensities=True),
    "intensity_median": MaskProperty("f8", intensities=True, by_channel=True),
    "perimeter": MaskProperty("f8", _FLAT, cubic=True),
    "perimeter_crofton": MaskProperty("f8", _FLAT, cubic=True),
    "solidity": MaskProperty("f8"),
}
"""Those for which the whole object has to be in one block."""


def check_property(name: Any, spacing: Sequence[float], *, has_image: bool) -> None:
    """Refuse a property that is not known, or not defined for such an image.

    Raises
    ------
    TypeError, ValueError
        The message says what there is.
    """
    if not isinstance(name, str):
        raise TypeError(f"properties are names, got {name!r}; callables are extra_properties")
    known = _COMPUTED.get(name) or MASK_PROPERTIES.get(name)
    if known is None:
        raise ValueError(f"unknown property {name!r}{_hint(name)}")
    if known.axes and len(spacing) not in known.axes:
        axes = " or ".join(map(str, known.axes))
        raise ValueError(f"{name} is for label images of {axes} axes, got {len(spacing)}")
    if getattr(known, "even", False) and any(step != 1 for step in spacing):
        raise ValueError(f"{name} is for a spacing of 1 only, got {tuple(spacing)}")
    if getattr(known, "cubic", False) and len(set(spacing)) > 1:
        raise ValueError(f"{name} is for the same spacing along all axes, got {tuple(spacing)}")
    needs = known.intensities if isinstance(known, MaskProperty) else known.wants.intensities
    if needs and not has_image:
        raise ValueError(f"{name} needs the image: region_table(labels, image, …)")


def _hint(name: str) -> str:
    """Return what may have been meant: also the words in another order, as older names have."""
    names = sorted({*_COMPUTED, *MASK_PROPERTIES})
    words = set(name.lower().split("_"))
    same = [known for known in names if set(known.split("_")) == words]
    near = same or [known for known in names if words < set(known.split("_"))][:3]
    near = near or get_close_matches(name, names, 3, 0.6)
    if near:
        return f"; is {' or '.join(map(repr, near))} meant?"
    return f"; there are {', '.join(names)}"


def wants_of(names: Sequence[str]) -> Wants:
    """Return what has to be collected for some properties."""
    wanted = [_COMPUTED[name].wants for name in names if name in _COMPUTED]
    orders = [w.weighted_central for w in wanted if w.weighted_central is not None]
    return Wants(
        second=any(wants.second for wants in wanted),
        raw=any(wants.raw for wants in wanted),
        central=any(wants.central for wants in wanted),
        sums=any(wants.sums for wants in wanted),
        extremes=any(wants.extremes for wants in wanted),
        spread=any(wants.spread for wants in wanted),
        weighted_raw=any(wants.weighted_raw for wants in wanted),
        weighted_central=max(orders, default=None),
    )


def as_columns(name: str, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the columns of a property, as scikit-image names them."""
    for index in np.ndindex(*values.shape[1:]):
        yield "-".join(map(str, (name, *index))), values[(slice(None), *index)]
