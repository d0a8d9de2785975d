"""What OME-Zarr says of an image, as the JSON objects that stand in its metadata.

Source: the OME-NGFF specification, versions 0.4 and 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from cellimg_dask.geometry import Space

__all__ = ["OmeVersion", "axis_type", "image_attributes", "label_attributes", "multiscales"]

OmeVersion: TypeAlias = Literal["0.4", "0.5"]

_TYPES = {"t": "time", "time": "time", "c": "channel", "channel": "channel"}


def axis_type(name: str) -> str | None:
    """Return the type of an axis by its name; None for one that nobody named."""
    if name.startswith("dim_"):
        return None
    return _TYPES.get(name, "space")


def multiscales(spaces: Sequence[Space], paths: Sequence[str], name: str) -> dict[str, Any]:
    """Return the description of an image at one or several scales.

    Parameters
    ----------
    spaces : sequence of Space
        Of each level, the finest first. Names of axes and units are those of the first.
    paths : sequence of str
        Where the array of each level is, from the group.
    name : str
        Of the image.
    """
    first = spaces[0].named
    axes = []
    for axis, unit in zip(first.axes or (), first.units, strict=True):
        entry = {"name": axis}
        kind = axis_type(axis)
        if kind is not None:
            entry["type"] = kind
        if unit is not None:
            entry["unit"] = unit
        axes.append(entry)
    datasets = [
        {
            "path": path,
            "coordinateTransformations": [
                {"type": "scale", "scale": list(space.scale)},
                {"type": "translation", "translation": list(space.translation)},
            ],
        }
        for space, path in zip(spaces, paths, strict=True)
    ]
    return {"name": name, "axes": axes, "datasets": datasets}


def image_attributes(
    spaces: Sequence[Space],
    paths: Sequence[str],
    name: str,
    version: OmeVersion = "0.5",
    *,
    is_labels: bool = False,
    omero: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the attributes of the group of an image, or of one of labels; see `multiscales`.

    What is said of its channels, ``omero``, is given as it is to stand there.
    """
    scales = multiscales(spaces, paths, name)
    # An image of labels says so, even where there is nothing more to say.
    more: dict[str, Any] = {"image-label": {}} if is_labels else {}
    if omero is not None:
        more["omero"] = dict(omero)
    if version == "0.4":
        more = {key: {"version": version, **value} for key, value in more.items()}
        return {"multiscales": [{"version": version, **scales}], **more}
    return {"ome": {"version": version, "multiscales": [scales], **more}}


def label_attributes(names: Sequence[str], version: OmeVersion = "0.5") -> dict[str, Any]:
    """Return the attributes of the group ``labels``, which lists those of an image."""
    if version == "0.4":
        return {"labels": list(names)}
    return {"ome": {"version": version, "labels": list(names)}}
