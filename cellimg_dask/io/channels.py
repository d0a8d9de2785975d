"""Channels of an image: what they are called, and the light in which each is seen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cellimg_dask.geometry import Space
from cellimg_dask.io.colors import COLORS
from cellimg_dask.io.looks import checked_color, checked_contrast

__all__ = [
    "SAMPLES",
    "Channel",
    "channel_of_omero",
    "channels_of",
    "channels_of_mode",
    "contrast_of",
    "light_of",
    "omero_of",
    "picture_channels",
    "without_whole_ranges",
]

SAMPLES = "s"
"""What an axis of red, green and blue is called, as TIFF does."""

_MOST = 16
"""So many are seen together."""

_TWO = ("#ff00ff", "#00ff00")
_MORE = ("#00ffff", "#ffff00", "#ff00ff", "#ff0000", "#00ff00", "#0000ff")
_RGB = (("red", "#ff0000"), ("green", "#00ff00"), ("blue", "#0000ff"))


_WHOLE = [
    (float(np.iinfo(f"{kind}{size}").min), float(np.iinfo(f"{kind}{size}").max))
    for kind in "iu"
    for size in (2, 4, 8)
]
"""What is written where nobody has chosen a range. An image of more than 8 bits that fills all of
them is rare, and any other would be seen dark."""


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
    space: Space,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    given: Sequence[Channel | str] | None,
    said: Sequence[Channel] = (),
    otherwise: Channel | None = None,
) -> tuple[Channel, ...]:
    """Return how the channels of an image look.

    Parameters
    ----------
    space, shape, dtype
        Of the image.
    given : sequence of Channel or str, optional
        What the user says; None for all channels, if they are not too many.
    said : sequence of Channel
        What the file says. It counts where the user says nothing.
    otherwise : Channel, optional
        Colour and contrast of channels that the user gave none.

    Raises
    ------
    TypeError, ValueError
        If what is given are no channels, or not those of this image.
    """
    axis = space.channel_axis
    number = 0 if axis is None else shape[axis]
    if given is not None:
        _check(given, space, number)
    elif number <= _MOST:
        given = [""] * number
    if axis is None or not given:
        return ()
    if len(said) != number:
        said = [Channel()] * number
    known = {_digits(own.color) for own in (*given, *said) if isinstance(own, Channel)}
    last = picture_channels(space, shape, dtype) or _one_by_one(number, known)
    base = otherwise or Channel()
    found = []
    for own, told, default in zip(given, said, last, strict=True):
        label, color, contrast = "", None, None
        visible = told.visible and default.visible
        if isinstance(own, str):
            label = own
        else:
            label, color, contrast, visible = own.label, own.color, own.contrast, own.visible
        found.append(
            Channel(
                label or told.label or default.label,
                color or base.color or told.color or default.color,
                contrast or base.contrast or told.contrast or default.contrast,
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
            f'instance image.with_space(axes="czyx"), or Input(array, space=…) of an array'
        )
    if given and len(given) != number:
        raise ValueError(
            f"the image has {number} channels, along axis {space.channel_axis}, and {len(given)} "
            f"are given"
        )


# ------------------------------------------------------------------ what nobody has said here


def picture_channels(
    space: Space, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Channel, ...]:
    """Return red, green and blue as they are; how much is covered is not light.

    Of what is no picture, nothing.
    """
    axis = space.channel_axis
    if axis is None or (space.axes or ())[axis] != SAMPLES or shape[axis] not in (3, 4):
        return ()
    white = _range_of(dtype)
    rgb = [Channel(label, color, white) for label, color in _RGB]
    return (*rgb, Channel("alpha", None, white, visible=False))[: shape[axis]]


def channels_of_mode(mode: str, dtype: np.dtype[Any]) -> tuple[Channel, ...]:
    """Return how the samples of a picture look, if they are not red, green and blue.

    Parameters
    ----------
    mode : str
        ``"LA"`` for brightness and how much is covered, ``"CMYK"`` for inks; of others nothing is
        said.
    dtype
        Of the picture.
    """
    if mode == "LA":
        return Channel("grey", "white"), Channel("alpha", "white", visible=False)
    if mode == "CMYK":
        # Ink takes light away: cyan the red.
        low, high = _range_of(dtype)
        light = [color for _, color in _RGB]
        inks = zip(("cyan", "magenta", "yellow"), light, strict=True)
        coloured = (Channel(label, color, (high, low)) for label, color in inks)
        return (*coloured, Channel("black", "white", (high, low), visible=False))
    return ()


def _range_of(dtype: np.dtype[Any]) -> tuple[float, float]:
    return (0.0, float(np.iinfo(dtype).max)) if dtype.kind in "iu" else (0.0, 1.0)


def _one_by_one(number: int, known: Collection[str]) -> tuple[Channel, ...]:
    """Return how channels look of which nothing is known: a single one in grey.

    Colours that are known of others are taken last.
    """
    if number == 1:
        return (Channel(),)
    own = _TWO if number == 2 else _MORE
    palette = [color for color in own if color[1:] not in known] or own
    return tuple(Channel(color=palette[index % len(palette)]) for index in range(number))


def _digits(color: Any) -> str:
    """Return a colour, which may be a name, in six digits; white where there is none."""
    text = str(color or "white")
    return COLORS.get(text, text.lstrip("#"))


# ------------------------------------------------------------------ metadata


def channel_of_omero(said: Mapping[str, Any]) -> Channel:
    """Return what the metadata ``omero`` say of a channel; what makes no sense is left out."""
    label, color, active = said.get("label"), said.get("color"), said.get("active")
    window = said.get("window")
    ends = [window.get(end) for end in ("start", "end")] if isinstance(window, Mapping) else []
    contrast = contrast_of(ends[::-1] if said.get("inverted") is True else ends)
    return Channel(
        label if isinstance(label, str) else "",
        light_of(color.lstrip("#")) if isinstance(color, str) else None,
        contrast,
        active is not False,
    )


def without_whole_ranges(channels: tuple[Channel, ...]) -> tuple[Channel, ...]:
    """Return channels without ranges that nobody has chosen; a picture keeps its own."""
    if [channel.label for channel in channels[:3]] == [label for label, _ in _RGB]:
        return channels
    return tuple(
        replace(channel, contrast=None) if channel.contrast in _WHOLE else channel
        for channel in channels
    )


def light_of(digits: str) -> str | None:
    """Return a colour that a file says in six digits; None for black, in which nothing is seen."""
    is_light = re.fullmatch("[0-9a-fA-F]{6}", digits) and int(digits, 16)
    return f"#{digits}" if is_light else None


def contrast_of(said: Sequence[Any]) -> tuple[float, float] | None:
    """Return a range of values that a file says; None where it makes no sense."""
    try:
        return checked_contrast(said)
    except (TypeError, ValueError):
        return None


def omero_of(channels: Sequence[Channel], dtype: np.dtype[Any]) -> dict[str, Any] | None:
    """Return the metadata ``omero`` of an image.

    Every channel must have a range of values there. Of integers it may be all; of anything else
    nothing is said where one is not known.
    """
    known = [channel.contrast for channel in channels]
    if not channels or (dtype.kind not in "iu" and None in known):
        return None
    entries = []
    for number, channel in enumerate(channels):
        whole = _range_of(dtype)
        if dtype.kind == "i":
            whole = (float(np.iinfo(dtype).min), whole[1])
        given = channel.contrast or whole
        start, end = sorted(given)
        low, high = whole if dtype.kind in "iu" else (start, end)
        entries.append(
            {
                "label": channel.label or str(number),
                "color": _digits(channel.color).upper(),
                "active": channel.visible,
                "inverted": given[0] > given[1],
                "window": {"start": start, "end": end, "min": low, "max": high},
            }
        )
    return {"channels": entries}
