"""Telling the format of a file or folder by what it holds."""

from __future__ import annotations

from cellimg_dask.io.location import Location, UnreadableError

__all__ = ["KNOWN", "MARKS", "recognize"]

KNOWN = "a TIFF, PNG, JPEG, .npy or HDF5 file, a folder with a zarr array or group, or an N5 folder"

_MAGIC = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"\x93NUMPY": "npy",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"PK\x03\x04": "zip",
}
_LONGEST = max(map(len, _MAGIC))
MARKS = {
    "zarr.json": "zarr",
    ".zarray": "zarr",
    ".zgroup": "zarr",
    "attributes.json": "N5",
}
"""Files in a folder that tell its format."""
_FILE_ENDINGS = (
    ".tif",
    ".tiff",
    ".png",
    ".jpg",
    ".jpeg",
    ".npy",
    ".h5",
    ".hdf5",
    ".ilp",
    ".ims",
    ".zip",
    ".ozx",
)


def recognize(location: Location) -> str:
    """Return the format: TIFF, PNG, JPEG, npy, HDF5, zip, zarr or N5.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is of no known format.
    """
    looks_like_file = location.last_name.lower().endswith(_FILE_ENDINGS)
    if location.is_local:
        if location.path.is_dir():
            return _of_folder(location)
        if not location.path.exists():
            raise FileNotFoundError(f"{location.url} does not exist")
        looks_like_file = True
    elif not looks_like_file:
        kind = _marked(location)
        if kind is not None:
            return kind
    start = location.read(stop=_LONGEST)
    if start is None:
        kind = _marked(location) if looks_like_file else None
        if kind is None and location.folders():
            return _of_folder(location)
        if kind is None:
            raise FileNotFoundError(
                f"{location.url} does not exist, or is a folder without zarr.json, .zarray, "
                f".zgroup or attributes.json"
            )
        return kind
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    raise UnreadableError(f"{location.url} is of no known format; give {KNOWN}")


def _marked(location: Location) -> str | None:
    for name, kind in MARKS.items():
        if location.has(name):
            return kind
    return None


def _of_folder(location: Location) -> str:
    kind = _marked(location)
    if kind is not None:
        return kind
    # The groups of an N5 container need no file of their own, its root neither.
    inside = {name: _marked(location.below(name)) for name in location.folders()[:100]}
    if location.last_name.endswith(".n5") or set(inside.values()) - {None} == {"N5"}:
        return "N5"
    found = [name for name, kind in inside.items() if kind is not None]
    hint = f"; in it are {', '.join(found[:5])}: open one of these" if found else ""
    raise UnreadableError(
        f"{location.url} is a folder without zarr.json, .zarray, .zgroup or attributes.json, so "
        f"it is neither zarr nor N5{hint}; give {KNOWN}"
    )
