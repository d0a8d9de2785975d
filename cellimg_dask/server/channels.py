"""Channels of an image, each seen in light of a colour of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellimg_dask.geometry import Space
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.io.stored_image import StoredImage
from cellimg_dask.server.looks import checked_color, checked_contrast

__all__ = ["Channel", "channels_of"]

_MOST = 16
"""So many are seen together."""

_TWO = ("#ff00ff", "#00ff00")
_MORE = ("#00ffff", "#ffff00", "#ff00ff", "#ff0000", "#00ff00", "#0000ff")
_RGB = (("red", "#ff0000"), ("green", "#00ff00"), ("blue", "#0000ff"))


@dataclass(frozen=True)
class Channel:
    """How one channel of an image looks at first.

    Parameters
    ----------
    label : str
        What it is called. Default: its number, from 0.
    color : str or (red, green, blue), optional
        A name such as ``"red"``, ``"#ff8000"``, or three numbers from 0 to 1. Colours of channels
        add up, as light does.
    contrast : (low, high), optional
        Values that are shown black and in full colour. Default: found in what is seen first.
    visible : bool
        Whether it is shown at first.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import cellimg_dask as ci
    >>> cells = ci.Source(np.zeros((2, 8, 6), "u2"), space=ci.Space.of(3, "cyx"))
    >>> layer = ci.Layer(cells, channels=["nuclei", Channel("actin", color=(1, 0.5, 0))])
    >>> [channel.color for channel in layer.channels]
    ['#ff00ff', '#ff8000']
    """

    label: str = ""
    color: str | tuple[float, float, float] | None = None
    contrast: tuple[float, float] | None = None
    visible: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise TypeError(f"the label of a channel must be a text, got {self.label!r}")
        object.__setattr__(self, "color", checked_color(self.color))
        object.__setattr__(self, "contrast", checked_contrast(self.contrast))
        object.__setattr__(self, "visible", bool(self.visible))


def channels_of(
    image: Any,
    first: CellImg,
    space: Space,
    otherwise: Channel,
    given: Sequence[Channel | str] | None,
) -> tuple[Channel, ...]:
    """Return how the channels of an image look.

    Parameters
    ----------
    image : array-like or sequence of levels
        As the user gave it; a file may say something of its channels.
    first : CellImg
        The finest level.
    space : Space
        Of that.
    otherwise : Channel
        How all channels look that have no colour or contrast of their own.
    given : sequence of Channel or str, optional
        What the user says of them.

    Raises
    ------
    TypeError, ValueError
        If what is given are no channels, or not those of this image.
    """
    axis = space.channel_axis
    number = 0 if axis is None else first.shape[axis]
    if given is not None:
        _check(given, space, number)
    elif number <= _MOST:
        given = [""] * number
    if axis is None or not given:
        return ()
    is_picture = (space.axes or ())[axis] == "s" and number in (3, 4)
    last = _of_picture(first.dtype) if is_picture else _one_by_one(number)
    found = []
    for own, told, default in zip(given, _said(image, number), last[:number], strict=True):
        label, color, contrast = "", None, None
        visible = told.visible and default.visible
        if isinstance(own, str):
            label = own
        else:
            label, color, contrast, visible = own.label, own.color, own.contrast, own.visible
        found.append(
            Channel(
                label or told.label or default.label,
                color or otherwise.color or told.color or default.color,
                contrast or otherwise.contrast or told.contrast or default.contrast,
                visible,
            )
        )
    return tuple(found)


def _check(given: Any, space: Space, number: int) -> None:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"channels must be a sequence of Channel or of labels, got {given!r}")
    for each in given:
        if not isinstance(each, (Channel, str)):
            raise TypeError(f"a channel must be a Channel or its label, got {each!r}")
    if given and space.channel_axis is None:
        own = "no names of axes" if space.axes is None else f"the axes {space.axes}"
        raise ValueError(
            f'channels lie along an axis "c", and this image has {own}; say which one it is, for '
            f'instance image.with_space(axes="czyx")'
        )
    if given and len(given) != number:
        raise ValueError(
            f"the image has {number} channels, along axis {space.channel_axis}, and {len(given)} "
            f"are given"
        )


# ------------------------------------------------------------------ what nobody has said here


def _of_picture(dtype: np.dtype[Any]) -> list[Channel]:
    """Return how colours are shown as they are; how much is covered is not light."""
    whole = (0.0, float(np.iinfo(dtype).max)) if dtype.kind in "iu" else (0.0, 1.0)
    rgb = [Channel(label, color, whole) for label, color in _RGB]
    return [*rgb, Channel("alpha", None, whole, visible=False)]


def _one_by_one(number: int) -> list[Channel]:
    """Return how channels look of which nothing is known: a single one in grey."""
    if number == 1:
        return [Channel()]
    palette = _TWO if number == 2 else _MORE
    return [Channel(color=palette[index % len(palette)]) for index in range(number)]


def _said(image: Any, number: int) -> list[Channel]:
    """Return what the file says of each channel; nothing where it says nothing sensible."""
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    said = first.channels if isinstance(first, StoredImage) else ()
    if len(said) != number:
        return [Channel()] * number
    return [_of_omero(each) for each in said]


def _of_omero(said: Mapping[str, Any]) -> Channel:
    label, color, active = said.get("label"), said.get("color"), said.get("active")
    window = said.get("window")
    ends = [window.get(end) for end in ("start", "end")] if isinstance(window, Mapping) else []
    finite = [end for end in ends if isinstance(end, (int, float)) and math.isfinite(end)]
    contrast = None
    if len(finite) == 2 and finite[0] != finite[1]:
        contrast = (finite[0], finite[1])
    is_color = isinstance(color, str) and re.fullmatch("#?[0-9a-fA-F]{6}", color)
    return Channel(
        label if isinstance(label, str) else "",
        f"#{str(color).lstrip('#')}" if is_color else None,
        contrast,
        active is not False,
    )
