"""What is in an image file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from cellimg_dask.io.hdf5 import find_hdf5, list_hdf5
from cellimg_dask.io.location import Location, UnreadableError, locate
from cellimg_dask.io.n5 import find_n5, list_n5
from cellimg_dask.io.opened import Found, ListedArray
from cellimg_dask.io.plain_files import find_npy, find_picture, list_npy, list_picture
from cellimg_dask.io.recognize import MARKS, recognize
from cellimg_dask.io.tiff import find_tiff, list_tiff
from cellimg_dask.io.zarr_read import find_zarr, list_zarr

__all__ = ["found_at", "list_images", "reading"]

T = TypeVar("T")


def list_images(
    path_or_url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> list[ListedArray]:
    """Return the arrays in a file or store, those of images in several sizes in front.

    Nothing is decoded, and nothing on disk is changed. Arguments and errors are those of
    `open_image`.
    """
    return _listed_at(locate(path_or_url, storage_options))


def found_at(location: Location, name: str | None) -> Found:
    """Return the image at a location; see `open_image`."""
    place, kind, inside = _recognized(location, name)
    return reading(place, kind, lambda: _FINDERS[kind](place, inside))


def _listed_at(location: Location) -> list[ListedArray]:
    location, kind, _ = _recognized(location, None)
    listed = reading(location, kind, lambda: _LISTERS[kind](location))
    if not listed:
        raise UnreadableError(f"{location.url} ({kind}) holds no array")
    return listed


def _recognized(location: Location, name: str | None) -> tuple[Location, str, str | None]:
    """Return where an image is, of which format, and its name from there."""
    kind = recognize(location)
    if kind == "zip":
        # What is in it is reached as by any other URL.
        return _in_archive(Location(f"zip::{location.url}", location.options, is_local=False), name)
    return location, kind, name


def _in_archive(archive: Location, name: str | None) -> tuple[Location, str, str | None]:
    names = archive.names()
    if not any(mark in names for mark in MARKS):
        # As other programs pack a folder: with its name, and what is of no concern.
        names = [each for each in names if not each.startswith((".", "__"))]
        first, _, rest = (name or "").partition("/")
        if first in names or len(names) == 1:
            inner = archive.below(first if first in names else names[0])
            return _recognized(inner, (rest or None) if first in names else name)
    try:
        return archive, recognize(archive), name
    except (UnreadableError, FileNotFoundError):
        listed = ", ".join(names[:20]) or "nothing"
        raise UnreadableError(
            f"{archive.url} is an archive, of: {listed}; say which one is meant: name=…"
        ) from None


def reading(location: Location, kind: str, read: Callable[[], T]) -> T:
    """Return what ``read()`` does; what a library raises says which file it is about."""
    try:
        return read()
    except (ImportError, FileNotFoundError, PermissionError, UnreadableError):
        raise
    except Exception as error:
        root = error.__cause__ or error
        raise UnreadableError(
            f"cannot read {location.url} as {kind}: {type(root).__name__}: {root}"
        ) from error


_FINDERS: dict[str, Callable[[Location, str | None], Found]] = {
    "zarr": find_zarr,
    "N5": find_n5,
    "HDF5": find_hdf5,
    "TIFF": find_tiff,
    "npy": find_npy,
    "PNG": partial(find_picture, kind="PNG"),
    "JPEG": partial(find_picture, kind="JPEG"),
}
_LISTERS: dict[str, Callable[[Location], list[ListedArray]]] = {
    "zarr": list_zarr,
    "N5": list_n5,
    "HDF5": list_hdf5,
    "TIFF": list_tiff,
    "npy": list_npy,
    "PNG": partial(list_picture, kind="PNG"),
    "JPEG": partial(list_picture, kind="JPEG"),
}
