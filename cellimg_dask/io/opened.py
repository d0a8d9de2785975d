"""What the formats have in common: an image that was found in a file, and lists of such."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import numpy as np

from cellimg_dask.geometry import Space
from cellimg_dask.io.channels import Channel
from cellimg_dask.io.location import Location, UnreadableError

__all__ = ["Found", "ListedArray", "choose", "joined"]


@dataclass(frozen=True)
class ListedArray:
    """An array in a file, as `list_images` tells it: nothing of it was read."""

    kind: str
    """The format, for instance ``"TIFF"`` or ``"zarr v3"``."""
    name: str
    """Where in the file it is, for ``open_image(…, name=…)``; empty where that is not needed."""
    shape: tuple[int, ...]
    """Extent along each axis, in voxels and NumPy order."""
    dtype: np.dtype[Any]
    """Data type, as it is stored."""
    axes: tuple[str, ...] | None
    """Axis names in lower case where the file gives them."""
    chunks: tuple[int, ...] | None
    """Shape of a chunk, tile, page or strip; None where there are none."""
    shards: tuple[int, ...] | None
    """Shape of the shards that zarr puts chunks together in."""
    compression: str
    """Names of what compresses it, or ``"none"``."""
    num_levels: int = 1
    """In how many sizes it is there under this name."""
    _measure: Callable[[], int | None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def stored_bytes(self) -> int | None:
        """Bytes that it takes in the file or folder; None where that cannot be told."""
        return self._measure()


class Found:
    """An image that was found in a file, in one or several sizes.

    Parameters
    ----------
    location : Location
        Of the file or folder.
    name : str
        Where in it the image is.
    kind : str
        The format.
    levels : sequence of str
        What to call the arrays of the levels, finest first.
    open_level : callable
        From the number of a level to its array.
    space_of_level : callable
        From the number of a level to its space; may open arrays.
    attributes : mapping
        What the file says of the image, as it is there.
    labels : sequence of str
        Label images that belong to it.
    open_label : callable
        From such a name to what was found.
    channels : sequence of Channel
        What is said of channels.
    is_labels : bool
        Whether the voxels are numbers of objects.
    close : callable
        Closes what is open.

    Notes
    -----
    Thread-safe: a level is opened once.
    """

    def __init__(
        self,
        location: Location,
        name: str,
        kind: str,
        levels: Sequence[str],
        open_level: Callable[[int], Any],
        space_of_level: Callable[[Found, int], Space],
        *,
        attributes: Mapping[str, Any] | None = None,
        labels: Sequence[str] = (),
        open_label: Callable[[str], Found] | None = None,
        channels: Sequence[Channel] = (),
        is_labels: bool = False,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.location = location
        self.name = name
        self.kind = kind
        self.levels = tuple(levels)
        self.attributes: Mapping[str, Any] = attributes or {}
        self.labels = tuple(labels)
        self.open_label = open_label
        self.channels = tuple(channels)
        self.is_labels = is_labels
        self.is_closed = False
        self.token = uuid4().hex
        """A name for what was opened just now: whether the file changes later cannot be seen."""
        self._open_level = open_level
        self._space_of_level = space_of_level
        self._close = close
        self._lock = threading.RLock()
        self._arrays: dict[int, Any] = {}
        self._spaces: dict[int, Space] = {}

    def array(self, level: int) -> Any:
        """Return the array of a level."""
        with self._lock:
            if self.is_closed:
                raise ValueError(f"the image of {self.location.url} is closed; open it again")
            if level not in self._arrays:
                self._arrays[level] = self._open_level(level)
            return self._arrays[level]

    def space(self, level: int) -> Space:
        """Return where the voxels of a level lie."""
        with self._lock:
            if level not in self._spaces:
                self._spaces[level] = self._space_of_level(self, level)
            return self._spaces[level]

    def close(self) -> None:
        """Close what is open; reading is an error then."""
        with self._lock:
            if not self.is_closed:
                self.is_closed = True
                self._arrays.clear()
                if self._close is not None:
                    self._close()


def choose(location: Location, name: str | None, names: Sequence[str], what: str) -> str:
    """Return which of several images of a file is meant.

    Raises
    ------
    ValueError
        If none is, or there is no such one; the message lists them.
    """
    if name is not None and name in names:
        return name
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if not names:
        hint = (
            ""
            if location.is_local
            else ", or the server does not tell what is in a folder: say which one is meant, name=…"
        )
        raise UnreadableError(f"{location.url} ({what}) holds no array{hint}")
    if name is not None:
        raise UnreadableError(f"{location.url} ({what}) has no image {name!r}; it has: {listed}")
    if len(names) > 1:
        raise UnreadableError(
            f"{location.url} ({what}) holds {len(names)} images: {listed}; say which one is "
            f"meant: name={names[0]!r}"
        )
    return names[0]


def joined(*parts: str) -> str:
    """Return names joined by ``/``, without the empty ones."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))
