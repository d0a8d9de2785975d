"""The metadata of served images: zarr 3 with OME-Zarr 0.5, and zarr 2 with OME-Zarr 0.4."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from cellimg_dask.geometry import CellGrid, Space
from cellimg_dask.io.channels import Channel, omero_of
from cellimg_dask.io.ome import OmeVersion, image_attributes

__all__ = [
    "Codec",
    "array_v2",
    "array_v3",
    "as_bytes",
    "check_dtype",
    "chunk_shape",
    "group_v3",
    "image_documents",
    "root_documents",
]

Codec: TypeAlias = Literal["zstd", "gzip"]

_LEVELS = {"zstd": 1, "gzip": 1}


def chunk_shape(grid: CellGrid) -> tuple[int, ...]:
    """Return the shape of a chunk: that of a cell, but no longer than the image."""
    sizes = zip(grid.cell_shape, grid.shape, strict=True)
    return tuple(min(size, max(extent, 1)) for size, extent in sizes)


def array_v3(
    grid: CellGrid, dtype: np.dtype[Any], fill_value: Any, codec: Codec | None, space: Space
) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array."""
    bytes_codec: dict[str, Any] = {"name": "bytes"}
    if dtype.itemsize > 1:
        bytes_codec["configuration"] = {"endian": sys.byteorder}
    codecs = [bytes_codec]
    if codec is not None:
        more = {"checksum": False} if codec == "zstd" else {}
        codecs.append({"name": codec, "configuration": {"level": _LEVELS[codec], **more}})
    data_type, fill = _zarr_type(dtype, fill_value, 3)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(grid.shape),
        "data_type": data_type,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(chunk_shape(grid))},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": list(space.named.axes or ()),
    }


def array_v2(
    grid: CellGrid, dtype: np.dtype[Any], fill_value: Any, codec: Codec | None
) -> dict[str, Any]:
    """Return the ``.zarray`` of an array."""
    compressor = None if codec is None else {"id": codec, "level": _LEVELS[codec]}
    data_type, fill = _zarr_type(dtype, fill_value, 2)
    return {
        "zarr_format": 2,
        "shape": list(grid.shape),
        "chunks": list(chunk_shape(grid)),
        "dtype": data_type["name"],
        "compressor": compressor,
        "fill_value": fill,
        "filters": None,
        "order": "C",
        "dimension_separator": "/",
    }


def group_v3(attributes: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``zarr.json`` of a group, which also holds that of its members.

    No folder can be listed over HTTP, so readers learn from it what there is.
    """
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": {
            "kind": "inline",
            "must_understand": False,
            "metadata": dict(members),
        },
    }


def image_documents(
    name: str,
    grids: Sequence[CellGrid],
    spaces: Sequence[Space],
    dtype: np.dtype[Any],
    fill_value: Any,
    codec: Codec | None,
    version: OmeVersion,
    *,
    is_labels: bool,
    channels: Sequence[Channel] = (),
) -> dict[str, Any]:
    """Return all documents of an image, by their path from its group."""
    paths = [str(level) for level in range(len(grids))]
    omero = omero_of(channels, dtype)
    attributes = image_attributes(spaces, paths, name, version, is_labels=is_labels, omero=omero)
    if version == "0.5":
        arrays = {
            path: array_v3(grid, dtype, fill_value, codec, spaces[0])
            for path, grid in zip(paths, grids, strict=True)
        }
        documents = {f"{path}/zarr.json": array for path, array in arrays.items()}
        return {"zarr.json": group_v3(attributes, arrays), **documents}
    documents = {".zgroup": {"zarr_format": 2}, ".zattrs": attributes}
    names = list(spaces[0].named.axes or ())
    for path, grid in zip(paths, grids, strict=True):
        documents[f"{path}/.zarray"] = array_v2(grid, dtype, fill_value, codec)
        documents[f"{path}/.zattrs"] = {"_ARRAY_DIMENSIONS": names}
    return {**documents, ".zmetadata": _consolidated_v2(documents)}


def root_documents(images: Mapping[str, Mapping[str, Any]], version: OmeVersion) -> dict[str, Any]:
    """Return the documents of the group of all images, given those of each."""
    if version == "0.5":
        members: dict[str, Any] = {}
        for name, documents in images.items():
            for path, document in documents.items():
                folder = path.removesuffix("zarr.json").rstrip("/")
                known = {key: document[key] for key in document if key != "consolidated_metadata"}
                members[f"{name}/{folder}" if folder else name] = known
        return {"zarr.json": group_v3({}, members)}
    documents = {
        f"{name}/{path}": document
        for name, parts in images.items()
        for path, document in parts.items()
        if path != ".zmetadata"
    }
    own = {".zgroup": {"zarr_format": 2}, ".zattrs": {}}
    return {**own, ".zmetadata": _consolidated_v2({**own, **documents})}


def as_bytes(document: Any) -> bytes:
    """Return a document as it is sent."""
    return json.dumps(document, indent=1, allow_nan=False).encode()


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse a dtype that zarr cannot name.

    Raises
    ------
    ValueError
        That says so.
    """
    if dtype.kind in "mM" and np.datetime_data(dtype)[0] == "generic":
        raise ValueError(f"images of dtype {dtype} cannot be served: readers need to know the unit")
    try:
        for zarr_format in (3, 2):
            _zarr_type(dtype, np.zeros((), dtype)[()], zarr_format)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"images of dtype {dtype} cannot be served: zarr has no such type; map_cells with "
            f"another dtype="
        ) from error


def _consolidated_v2(documents: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_consolidated_format": 1, "metadata": dict(documents)}


def _zarr_type(
    dtype: np.dtype[Any], fill_value: Any, zarr_format: Literal[2, 3]
) -> tuple[Any, Any]:
    """Return dtype and fill value as zarr writes them."""
    from zarr.dtype import parse_dtype

    with warnings.catch_warnings():
        # Of types that are not part of the specification yet; some reader may know them.
        warnings.simplefilter("ignore")
        kind = parse_dtype(dtype, zarr_format=zarr_format)
        fill = kind.to_json_scalar(fill_value, zarr_format=zarr_format)
        return kind.to_json(zarr_format=zarr_format), fill
