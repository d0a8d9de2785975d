"""Arrays in files: what they can say of themselves beyond shape and dtype."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import SourceChangedError
from cellimg_dask.blocks.plan import Box

__all__ = ["FileArray", "StandsFor", "check_unchanged", "file_state", "is_xarray", "unwrapped"]


class FileArray:
    """An array in a file that no library gives an array for that can be sent and compared.

    Reading gives a new array each time, so that it can be kept without a copy. Pickling takes
    the place of the file and not its data.
    """

    shape: tuple[int, ...]
    """Extent along each axis, in voxels."""
    dtype: np.dtype[Any]
    """Data type, as it is stored."""
    chunks: tuple[int, ...] | None
    """Shape of what is read at once; None where any region is as good."""
    label: str
    """What to call it in a few words, for instance ``"TIFF stack.tif"``."""

    def __getitem__(self, box: Any) -> NDArray[Any]:
        """Return a box: a slice of step 1 for each axis."""
        raise NotImplementedError

    def content(self, boxes: Sequence[Box]) -> Any:
        """Return what tells the content of boxes from another one, None where nothing does.

        Of JSON's types.
        """
        return None

    def memory(self) -> NDArray[Any] | None:
        """Return the whole array where it lies in memory or is mapped into it."""
        return None


class StandsFor:
    """Something that knows more of an array than the array itself, and is read as that array."""

    @property
    def array(self) -> Any:
        """The array that is read."""
        raise NotImplementedError


def unwrapped(value: Any) -> Any:
    """Return the array that is read where ``value`` is given."""
    while isinstance(value, StandsFor):
        value = value.array
    return value


def is_xarray(array: Any) -> bool:
    """Whether an array is one of xarray's, which is not imported to find out."""
    return type(array).__module__.partition(".")[0] == "xarray"


def file_state(path: str | os.PathLike[str]) -> list[int] | None:
    """Return size and time of change of a file; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - the quickest, and there may be thousands
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns]


def check_unchanged(place: str | os.PathLike[str], before: Any, now: Any) -> None:
    """Refuse what was opened as one thing and is another by now: what is read would be neither.

    Raises
    ------
    SourceChangedError
        If the two differ.
    """
    if before != now:
        raise SourceChangedError(f"{place} has changed since it was opened: open it again")
