"""Opening images in files and stores of many formats."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, SupportsIndex

from cellimg_dask.geometry import as_int
from cellimg_dask.io.listing import found_at, reading
from cellimg_dask.io.location import Location, locate
from cellimg_dask.io.stored_image import StoredImage

__all__ = ["open_image"]


def open_image(
    path_or_url: str | os.PathLike[str],
    *,
    name: str | None = None,
    level: SupportsIndex = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> StoredImage:
    """Open an image in a file or store, without reading its voxels and without changing anything.

    Parameters
    ----------
    path_or_url : path or str
        A zarr array or group (version 2 or 3, sharded or not), OME-Zarr (0.1 to 0.5), N5, HDF5,
        TIFF (OME and ImageJ too), ``.npy``, PNG or JPEG; told by what is in it. Also in a zip
        archive, and behind any URL that fsspec knows: ``"https://…"``, ``"s3://…"``,
        ``"zip::https://…"``.
    name : str, optional
        Which image in it: the path of a group, array or dataset, or the number of a series.
        Needed only where there are several.
    level : int
        Of an image in several sizes: 0 is the finest.
    storage_options : mapping, optional
        For the file system of fsspec, such as keys.

    Returns
    -------
    StoredImage
        With axes in NumPy order (z, y, x), units, scale and translation, where the file says them.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is of no known format, damaged, or holds several images of which none was named;
        then the message lists them.
    ImportError
        If the package that reads the format is missing; the message says how to install it.

    Examples
    --------
    >>> import tempfile, zarr
    >>> folder = tempfile.TemporaryDirectory()
    >>> _ = zarr.create_array(folder.name + "/a.zarr", shape=(4, 6), chunks=(2, 3), dtype="u1")
    >>> image = open_image(folder.name + "/a.zarr")
    >>> image.shape, image.cell_shape, image.scale
    ((4, 6), (2, 3), (1.0, 1.0))
    >>> folder.cleanup()
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a text, got {type(name).__name__}")
    location, inside = _inside_of(locate(path_or_url, storage_options))
    found = found_at(location, "/".join(filter(None, (inside, name))) or None)
    number = as_int(level, "level", minimum=0)
    if number >= len(found.levels):
        found.close()
        raise ValueError(
            f"level {number}: {location.url} has {len(found.levels)} levels, allowed is "
            f"0..{len(found.levels) - 1}"
        )
    image = StoredImage(found, number)
    try:
        # What is wrong shows here, and what the image is can be asked for when it is closed.
        reading(found.location, found.kind, lambda: (image.grid, image.dtype, image.space))
    except BaseException:
        found.close()
        raise
    return image


def _inside_of(location: Location) -> tuple[Location, str]:
    """Return the file, and what is meant inside, of a path such as ``file.h5/raw/volume``."""
    if location.is_local and not location.path.exists():
        for above in location.path.parents:
            if above.is_file():
                inside = location.path.relative_to(above).as_posix()
                return Location(str(above), location.options, is_local=True), inside
    return location, ""
