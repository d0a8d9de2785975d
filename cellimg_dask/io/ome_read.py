"""What the metadata of OME-Zarr say of an image, read with tolerance.

Versions 0.1 to 0.5. What is missing is left out, what does not make sense is left out with a
warning: an image that others can read is not refused for its description.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellimg_dask.geometry import Space
from cellimg_dask.io.channels import Channel, channel_of_omero, without_whole_ranges
from cellimg_dask.io.spaces import tolerant_space

__all__ = [
    "Multiscale",
    "channels_in",
    "field_names",
    "label_names",
    "multiscale_of",
    "ome_part",
    "series_names",
]

_OLD_AXES = ("t", "c", "z", "y", "x")


@dataclass(frozen=True)
class Multiscale:
    """An image in several sizes, as OME-Zarr describes it."""

    paths: tuple[str, ...]
    """Of the levels in the group, finest first."""
    axes: tuple[str, ...] | None
    units: tuple[str | None, ...]
    transformations: tuple[tuple[Any, ...], ...]
    """Of each level, from voxels on."""
    common: tuple[Any, ...]
    """Those that follow, of all levels."""

    def space(self, level: int, ndim: int, what: str) -> Space | None:
        """Return where the voxels of a level lie; None where nothing is said of a coarser one.

        Parameters
        ----------
        level : int
            Number of the level, 0 the finest.
        ndim : int
            Axes that its array has.
        what : str
            What to call it in warnings.
        """
        if level and not self.transformations[level]:
            return None
        scale, shift = [1.0] * ndim, [0.0] * ndim
        for step in (*self.transformations[level], *self.common):
            kind = step.get("type") if isinstance(step, Mapping) else None
            numbers: Any = step.get(kind) if isinstance(kind, str) else None
            if kind == "identity":
                continue
            if kind not in ("scale", "translation") or not _are_numbers(numbers, ndim):
                warnings.warn(f"{what}: {step!r} is not understood and left out", stacklevel=3)
                continue
            if kind == "scale":
                scale = [a * b for a, b in zip(scale, numbers, strict=True)]
                shift = [a * b for a, b in zip(shift, numbers, strict=True)]
            else:
                shift = [a + b for a, b in zip(shift, numbers, strict=True)]
        return tolerant_space(ndim, self.axes, self.units, scale, shift, what)


def ome_part(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a group's attributes that is OME-Zarr's: since 0.5 under ``"ome"``."""
    inner = attributes.get("ome")
    return inner if isinstance(inner, Mapping) else attributes


def multiscale_of(attributes: Mapping[str, Any]) -> Multiscale | None:
    """Return the first image in several sizes that a group says it is; None where it is none."""
    for entry in _mappings(ome_part(attributes).get("multiscales")):
        levels = [
            level
            for level in _mappings(entry.get("datasets"))
            if isinstance(level.get("path"), str) and level["path"]
        ]
        if levels:
            axes, units = _axes(entry)
            return Multiscale(
                tuple(level["path"].strip("/") for level in levels),
                axes,
                units,
                tuple(_steps(level) for level in levels),
                _steps(entry),
            )
    return None


def channels_in(attributes: Mapping[str, Any]) -> tuple[Channel, ...]:
    """Return what is said of each channel; none where nothing is said that makes sense."""
    omero = ome_part(attributes).get("omero")
    said = omero.get("channels") if isinstance(omero, Mapping) else None
    # What is no description keeps its place, so that the others keep theirs.
    found = tuple(
        channel_of_omero(item if isinstance(item, Mapping) else {})
        for item in (said if isinstance(said, (list, tuple)) else ())
    )
    found = without_whole_ranges(found)
    return found if any(channel != Channel() for channel in found) else ()


def label_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the label images that a group ``labels`` says it has."""
    return _texts(ome_part(attributes).get("labels"))


def series_names(
    attributes: Mapping[str, Any], described: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """Return the images of a group that bioformats2raw wrote; None where it did not.

    Parameters
    ----------
    attributes : mapping
        Of the group.
    described : mapping
        Attributes of the group ``OME`` in it.
    """
    if "bioformats2raw.layout" not in ome_part(attributes):
        return None
    return _texts(ome_part(described).get("series"))


def field_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the groups in which a plate has its wells, or a well its images."""
    found = ome_part(attributes)
    for key, inner in (("plate", "wells"), ("well", "images")):
        part = found.get(key)
        if isinstance(part, Mapping):
            return _texts([item.get("path") for item in _mappings(part.get(inner))])
    return ()


def _axes(entry: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, tuple[str | None, ...]]:
    given = entry.get("axes")
    if given is None and entry.get("version") in ("0.1", "0.2"):
        return _OLD_AXES, (None,) * 5
    names: list[str] = []
    units: list[str | None] = []
    for axis in given if isinstance(given, Sequence) else ():
        part = axis if isinstance(axis, Mapping) else {"name": axis}
        unit = part.get("unit")
        names.append(str(part.get("name", "")))
        units.append(unit if isinstance(unit, str) and unit else None)
    return tuple(names) or None, tuple(units)


def _steps(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    steps = entry.get("coordinateTransformations")
    return tuple(steps) if isinstance(steps, list) else ()


def _are_numbers(numbers: Any, ndim: int) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) == ndim
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
    )


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        value = [value]
    return (item for item in value if isinstance(item, Mapping)) if _is_list(value) else iter(())


def _texts(value: Any) -> tuple[str, ...]:
    texts = (item.strip("/") for item in value if isinstance(item, str)) if _is_list(value) else ()
    return tuple(filter(None, texts))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
