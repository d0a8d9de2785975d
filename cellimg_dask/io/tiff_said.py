"""What TIFF files say beside their voxels: sizes and channels, as OME and ImageJ write them.

Sources: the OME data model of 2016, and ImageJ's own tags of TIFF as tifffile gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cellimg_dask.io.channels import Channel
from cellimg_dask.io.optional import optional

__all__ = ["imagej_channels", "imagej_sizes", "ome_channels", "ome_sizes"]


def _pixels(xml: str, number: int) -> Mapping[str, Any]:
    """Return what OME-XML says of the voxels of an image."""
    tifffile = optional("tifffile", "reading OME-TIFF")
    try:
        images = tifffile.xml2dict(xml)["OME"]["Image"]
        pixels = (images if isinstance(images, list) else [images])[number]["Pixels"]
    except Exception:
        # tifffile has shown that it can do without; then nothing is said.
        return {}
    return pixels if isinstance(pixels, Mapping) else {}


def ome_sizes(xml: str, number: int) -> dict[str, tuple[float, str | None]]:
    """Return size and unit of a step along axes, as OME-XML says them."""
    pixels = _pixels(xml, number)
    found: dict[str, tuple[float, str | None]] = {}
    for letter in "xyz":
        size = pixels.get(f"PhysicalSize{letter.upper()}")
        if isinstance(size, (int, float)) and size > 0:
            unit = pixels.get(f"PhysicalSize{letter.upper()}Unit", "µm")
            if unit not in ("pixel", "reference frame"):
                found[letter] = float(size), str(unit)
    step = pixels.get("TimeIncrement")
    if isinstance(step, (int, float)) and step > 0:
        found["t"] = float(step), str(pixels.get("TimeIncrementUnit", "s"))
    return found


def ome_channels(xml: str, number: int) -> tuple[Channel, ...]:
    """Return label and colour of each channel; none where nothing is said."""
    channels = _pixels(xml, number).get("Channel", ())
    found = []
    for each in channels if isinstance(channels, (list, tuple)) else [channels]:
        said = each if isinstance(each, Mapping) else {}
        color = said.get("Color", -1)
        # Red, green, blue, opacity in a signed number; -1, white, where nobody has chosen.
        is_color = isinstance(color, int) and color != -1
        found.append(
            Channel(
                str(said.get("Name", "")),
                f"#{(color & 0xFFFFFFFF) >> 8:06x}" if is_color else None,
            )
        )
    return tuple(found) if any(channel != Channel() for channel in found) else ()


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
    try:
        number = int(said.get("channels", 1))
        # Of each channel the colours of 256 steps; and the lowest and the highest value.
        tables = [np.asarray(table) for table in said.get("LUTs", ())]
        ranges = np.asarray(said.get("Ranges", ()), float).reshape(-1, 2)
        colors = [f"#{bytes(table[:3, -1].astype(np.uint8)).hex()}" for table in tables]
        return tuple(
            Channel(
                "",
                colors[index] if len(colors) == number else None,
                ranges[index].tolist() if len(ranges) == number else None,
            )
            for index in range(number if number in (len(colors), len(ranges)) else 0)
        )
    except (IndexError, TypeError, ValueError):
        # Written by somebody else than ImageJ.
        return ()
