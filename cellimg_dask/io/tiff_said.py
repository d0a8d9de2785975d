"""What TIFF files say beside their voxels: sizes and channels, as OME and ImageJ write them.

Sources: the OME data model of 2016, and ImageJ's own tags of TIFF as tifffile gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from cellimg_dask.io.channels import Channel, contrast_of, light_of

__all__ = ["imagej_channels", "imagej_sizes", "ome_channels", "ome_sizes"]


def _parts(parent: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    # Whatever the version is that the name begins with.
    return [part for part in parent if part.tag.rpartition("}")[2] == tag]


def _pixels(xml: str, number: int) -> ElementTree.Element:
    """Return what OME-XML says of the voxels of an image."""
    try:
        return _parts(_parts(ElementTree.fromstring(xml), "Image")[number], "Pixels")[0]
    except (ElementTree.ParseError, IndexError, ValueError):
        # tifffile has shown that it can do without; then nothing is said.
        return ElementTree.Element("Pixels")


def _length(said: str | None) -> float | None:
    """Return a size that is said, if it makes sense."""
    try:
        size = float(said or "")
    except ValueError:
        return None
    return size if size > 0 and math.isfinite(size) else None


def ome_sizes(xml: str, number: int) -> dict[str, tuple[float, str | None]]:
    """Return size and unit of a step along axes, as OME-XML says them."""
    pixels = _pixels(xml, number)
    found: dict[str, tuple[float, str | None]] = {}
    for letter in "xyz":
        size = _length(pixels.get(f"PhysicalSize{letter.upper()}"))
        unit = pixels.get(f"PhysicalSize{letter.upper()}Unit", "µm")
        if size is not None and unit not in ("pixel", "reference frame"):
            found[letter] = size, unit
    step = _length(pixels.get("TimeIncrement"))
    if step is not None:
        found["t"] = step, pixels.get("TimeIncrementUnit", "s")
    return found


def ome_channels(xml: str, number: int) -> tuple[Channel, ...]:
    """Return label and colour of each channel; none where nothing is said."""
    channels = _parts(_pixels(xml, number), "Channel")
    colors = [_ome_color(each.get("Color")) for each in channels]
    if set(colors) <= {None, "#ffffff"}:
        # White stands there as well where nobody has chosen.
        colors = [None] * len(channels)
    found = tuple(
        Channel(each.get("Name", ""), color) for each, color in zip(channels, colors, strict=True)
    )
    return found if any(channel != Channel() for channel in found) else ()


def _ome_color(said: str | None) -> str | None:
    """Return a colour: red, green, blue, opacity in a signed number."""
    try:
        return light_of(f"{(int(said or '') & 0xFFFFFFFF) >> 8:06x}")
    except ValueError:
        return None


def imagej_sizes(file: Any) -> dict[str, tuple[float, str | None]]:
    """Return size and unit of a step along axes, as ImageJ has written them."""
    said = file.imagej_metadata or {}
    unit = str(said.get("unit", "")).replace("\\u00B5", "µ")
    if unit in ("", "pixel", "pixels"):
        unit = ""
    tags = file.pages[0].tags
    found: dict[str, tuple[float, str | None]] = {}
    for letter in "xy":
        tag = tags.get(f"{letter.upper()}Resolution")
        pair = None if tag is None else tag.value
        if isinstance(pair, tuple) and len(pair) == 2 and pair[0] > 0 and pair[1] > 0 and unit:
            # Pixels per unit.
            found[letter] = pair[1] / pair[0], said.get(f"{letter}unit", unit)
    spacing = said.get("spacing")
    if isinstance(spacing, (int, float)) and spacing and unit:
        found["z"] = abs(float(spacing)), said.get("zunit", unit)
    interval = said.get("finterval")
    if isinstance(interval, (int, float)) and interval > 0:
        found["t"] = float(interval), str(said.get("tunit", "s"))
    return found


def imagej_channels(file: Any) -> tuple[Channel, ...]:
    """Return colour and contrast of each channel; none where nothing is said."""
    said = file.imagej_metadata or {}
    number = said.get("channels", 1)
    if not isinstance(number, int):
        # Written by somebody else than ImageJ.
        return ()
    parts = (said.get("LUTs"), said.get("Ranges"))
    tables, ends = (part if isinstance(part, Sequence) else () for part in parts)
    lights = [_light(table) for table in tables] if len(tables) == number else [(None, 1)] * number
    pairs = [ends[at : at + 2] for at in range(0, len(ends), 2)]
    if len(pairs) != number:
        pairs = [()] * number
    found = tuple(
        Channel("", color, contrast_of(pair[::step]))
        for (color, step), pair in zip(lights, pairs, strict=True)
    )
    return found if any(channel != Channel() for channel in found) else ()


def _light(table: Any) -> tuple[str | None, int]:
    """Return the colour that a table of 256 ends with, or begins with where it is inverted.

    And in which order the lowest and the highest value are then to be taken.
    """
    table = np.asarray(table)
    if table.ndim != 2 or len(table) < 3 or not table.size:
        return None, 1
    first, last = (light_of(table[:3, end].astype(np.uint8).tobytes().hex()) for end in (0, -1))
    return (first, -1) if last is None else (last, 1)
