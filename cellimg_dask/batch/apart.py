"""What an image reads must not be what it is written to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from cellimg_dask.batch.folder import is_url
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.readers import ChunkedReader, stored_array

__all__ = ["check_apart"]


def check_apart(loaders: Iterable[CellLoader], where: str) -> None:
    """Refuse a target that is one of the stores that images are computed from, or holds one.

    Raises
    ------
    ValueError
        If it is: while the one is written, the other would change or be gone.
    """
    target = _target(where)
    for loader in loaders:
        for image in loader.ancestry():
            for reader in image.readers:
                place = _place(reader)
                if place is not None and f"{place}/".startswith(f"{target}/"):
                    raise ValueError(
                        f"{where} cannot be written, because the image is computed from "
                        f"{place}: give another target"
                    )


def _target(where: str) -> str:
    if not is_url(where):
        return os.path.realpath(where)
    import fsspec

    system, path = fsspec.core.url_to_fs(where)
    return str(system.unstrip_protocol(path)).rstrip("/")


def _place(reader: Any) -> str | None:
    """Return the path or URL of the zarr array behind a reader; None for anything else."""
    array: Any = stored_array(reader) if isinstance(reader, ChunkedReader) else None
    if type(array).__module__.partition(".")[0] != "zarr":
        return None
    store = array.store
    if hasattr(store, "root"):
        return os.path.realpath(f"{store.root}/{array.path}")
    if hasattr(store, "fs"):
        return str(store.fs.unstrip_protocol(f"{store.path}/{array.path}")).rstrip("/")
    return None
