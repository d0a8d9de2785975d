"""Opening image files for looking at them: what is in there, and arrays that read on demand.

Nothing here writes: stores are opened with mode ``"r"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from cellimg_dask.cli.require import require

__all__ = ["SAMPLES", "Stored", "open_file", "reason"]

SAMPLES = "s"
"""Name of an axis of colour samples (red, green, blue), as TIFF calls it."""

_MAGIC = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"\x93NUMPY": "npy",
    b"\x89HDF\r\n\x1a\n": "HDF5",
}
_KINDS = "TIFF, PNG, JPEG, .npy, HDF5, or a folder with a zarr array or group"


@dataclass(frozen=True)
class Stored:
    """An array in a file, not read yet."""

    kind: str
    """The format, for instance ``TIFF``."""
    name: str
    """Where in the file it is; empty where the file holds just one array."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[str, ...] | None
    """Axis names in lower case where the file gives them."""
    chunks: tuple[int, ...] | None
    shards: tuple[int, ...] | None
    compression: str
    stored_bytes: int
    """Bytes on disk."""
    read: Callable[[], Any]
    """Gives an array-like that reads regions; it lives as long as the file is open."""


@contextmanager
def open_file(path: Path) -> Iterator[list[Stored]]:
    """Open a file or store, give its arrays, the main one first, and close it again.

    Raises
    ------
    click.ClickException
        If the file cannot be read, is of no known format, or holds no array.
    """
    kind = _kind(path)
    with ExitStack() as stack:
        try:
            arrays = _OPENERS[kind](path, kind, stack)
        except click.ClickException:
            raise
        except Exception as error:
            raise click.ClickException(f"cannot read {path} as {kind}: {reason(error)}") from error
        if not arrays:
            raise click.ClickException(f"{path} ({kind}) holds no array")
        yield arrays


def reason(error: Exception) -> str:
    """Return what went wrong in words; where a library wrapped the cause, the cause."""
    root = error.__cause__ or error
    return f"{type(root).__name__}: {root}"


def _kind(path: Path) -> str:
    """Tell the format by what the file begins with, or by the files in a folder."""
    if path.is_dir():
        if any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
            return "zarr"
        n5 = "; N5 cannot be read yet" if (path / "attributes.json").is_file() else ""
        raise click.ClickException(
            f"{path} is a folder without zarr.json, .zarray or .zgroup{n5}; give {_KINDS}"
        )
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}") from error
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return kind
    raise click.ClickException(f"{path} is of no known format; give {_KINDS}")


def _open_tiff(path: Path, kind: str, stack: ExitStack) -> list[Stored]:
    tifffile = require("tifffile", "formats")
    import zarr

    file = stack.enter_context(tifffile.TiffFile(path))
    # Making the store reads no pixels, and its chunks are the file's strips or tiles.
    arrays = [
        zarr.open_array(stack.enter_context(series.aszarr(level=0)), mode="r")
        for series in file.series
    ]
    return [
        Stored(
            kind,
            f"series {number}" if len(arrays) > 1 else "",
            tuple(array.shape),
            np.dtype(array.dtype),
            tuple(series.axes.lower()),
            tuple(array.chunks),
            None,
            _lower_name(series.keyframe.compression),
            _tiff_bytes(series) if len(arrays) > 1 else path.stat().st_size,
            _giving(array),
        )
        for number, (series, array) in enumerate(zip(file.series, arrays, strict=True))
    ]


def _giving(array: Any) -> Callable[[], Any]:
    return lambda: array


def _tiff_bytes(series: Any) -> int:
    if series.dataoffset is not None:
        return int(series.nbytes)
    return sum(sum(page.databytecounts) for page in series.pages if page is not None)


def _open_picture(path: Path, kind: str, stack: ExitStack) -> list[Stored]:
    iio = require("imageio.v3", "formats")
    # Properties come from the header; a palette counts as its colours.
    properties = iio.improps(path, plugin="pillow", index=0)
    axes = ("y", "x") if len(properties.shape) == 2 else ("y", "x", SAMPLES)
    return [
        Stored(
            kind,
            "",
            tuple(properties.shape),
            np.dtype(properties.dtype),
            axes,
            None,
            None,
            {"PNG": "deflate", "JPEG": "jpeg"}[kind],
            path.stat().st_size,
            lambda: iio.imread(path, plugin="pillow", index=0),
        )
    ]


def _open_npy(path: Path, kind: str, stack: ExitStack) -> list[Stored]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        # An empty array cannot be mapped.
        array = np.load(path, allow_pickle=False)
    size = path.stat().st_size
    return [
        Stored(kind, "", array.shape, array.dtype, None, None, None, "none", size, _giving(array))
    ]


def _open_hdf5(path: Path, kind: str, stack: ExitStack) -> list[Stored]:
    h5py = require("h5py", "formats")
    file = stack.enter_context(h5py.File(path, "r"))
    found: list[Stored] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            labels = tuple(dim.label.lower() for dim in item.dims)
            found.append(
                Stored(
                    kind,
                    name,
                    item.shape,
                    item.dtype,
                    labels if labels and all(labels) else None,
                    item.chunks,
                    None,
                    item.compression or "none",
                    item.id.get_storage_size(),
                    _giving(item),
                )
            )

    file.visititems(visit)
    return found


def _open_zarr(path: Path, kind: str, stack: ExitStack) -> list[Stored]:
    import zarr

    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        return [_zarr_stored(node, "", path, None)]
    with warnings.catch_warnings():
        # Other files may lie between the arrays, as OME-XML does.
        warnings.simplefilter("ignore", UserWarning)
        members = dict(node.members(max_depth=None))
    axes: dict[str, tuple[str, ...]] = {}
    for prefix, group in {"": node, **members}.items():
        if isinstance(group, zarr.Group):
            axes.update(_multiscale_axes(prefix, dict(group.attrs)))
    arrays = {name: item for name, item in members.items() if isinstance(item, zarr.Array)}
    # The first level of a pyramid is the image itself.
    names = [*(name for name in axes if name in arrays), *sorted(arrays)]
    return [
        _zarr_stored(arrays[name], name, path / name, axes.get(name))
        for name in dict.fromkeys(names)
    ]


def _multiscale_axes(prefix: str, attributes: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the levels of an OME-Zarr image, full resolution first, with their axis names."""
    metadata = attributes.get("ome", attributes)
    levels = {}
    for scales in metadata.get("multiscales", ()) if isinstance(metadata, dict) else ():
        names = tuple(
            str(axis["name"] if isinstance(axis, dict) else axis).lower()
            for axis in scales.get("axes", ())
        )
        for level in scales.get("datasets", ()):
            levels["/".join(filter(None, (prefix, level["path"])))] = names
    return levels


def _zarr_stored(array: Any, name: str, folder: Path, axes: Sequence[str] | None) -> Stored:
    version = array.metadata.zarr_format
    given = getattr(array.metadata, "dimension_names", None) or ()
    if not axes and given and all(given):
        axes = [str(label).lower() for label in given]
    codecs = [_codec_name(codec) for codec in (*array.filters, *array.compressors)]
    return Stored(
        f"zarr v{version}",
        name,
        tuple(array.shape),
        np.dtype(array.dtype),
        tuple(axes) if axes and len(axes) == len(array.shape) else None,
        tuple(array.chunks),
        None if array.shards is None else tuple(array.shards),
        ", ".join(codecs) or "none",
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        _giving(array),
    )


def _codec_name(codec: Any) -> str:
    name = str(getattr(codec, "codec_id", None) or type(codec).__name__.removesuffix("Codec"))
    inner = getattr(codec, "cname", None)
    return name.lower() + (f" ({_lower_name(inner)})" if inner is not None else "")


def _lower_name(item: Any) -> str:
    """Return the name of an enumeration's member, or the text of anything else."""
    return str(getattr(item, "name", item)).lower()


_OPENERS: dict[str, Callable[[Path, str, ExitStack], list[Stored]]] = {
    "TIFF": _open_tiff,
    "PNG": _open_picture,
    "JPEG": _open_picture,
    "npy": _open_npy,
    "HDF5": _open_hdf5,
    "zarr": _open_zarr,
}
