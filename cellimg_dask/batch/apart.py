"""What an image reads must not be what it is written to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from cellimg_dask.batch.folder import is_url
from cellimg_dask.loading.file_array import unwrapped
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.readers import ChunkedReader, stored_array
from cellimg_dask.loading.source import StoredReader

__all__ = ["check_apart"]

_LOOKED_AT = 1000
"""Tasks of a layer of a dask graph that are looked at."""


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
                for array in _stored_arrays(reader):
                    place = _place(array)
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


def _stored_arrays(reader: Any) -> Iterator[Any]:
    """Yield the zarr arrays that a reader reads, those in the graph of a dask array too."""
    if isinstance(reader, StoredReader):
        array = reader.cells.array
    elif isinstance(reader, ChunkedReader):
        array = stored_array(reader)
    else:
        array = getattr(reader, "array", None)
    array = unwrapped(array)
    if _package(array) == "zarr":
        yield array
    elif hasattr(array, "__dask_graph__"):
        graph = array.__dask_graph__()
        for layer in getattr(graph, "layers", {"": graph or {}}).values():
            # The tasks of a layer are alike: those of a large one are not all made or looked at.
            if type(layer).__name__ == "Blockwise":
                yield from _zarr_arrays_in((layer.task, layer.indices, layer.io_deps))
            else:
                yield from _zarr_arrays_in(islice(layer.values(), _LOOKED_AT))


def _zarr_arrays_in(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the zarr arrays among values, and those inside tuples, lists and tasks."""
    todo = list(values)
    # Held, so that no other value has its id.
    seen: dict[int, Any] = {}
    while todo:
        value = unwrapped(todo.pop())
        if id(value) in seen or len(seen) > _LOOKED_AT * 100:
            continue
        seen[id(value)] = value
        if _package(value) == "zarr":
            yield value
        elif isinstance(value, (tuple, list)):
            todo.extend(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif type(value).__module__ in ("dask._task_spec", "dask.blockwise", "functools"):
            # Tasks, what they hold, and values that stand for themselves.
            names = ("func", "args", "kwargs", "keywords", "value", "mapping")
            todo.extend(getattr(value, name, None) for name in names)


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _place(array: Any) -> str | None:
    """Return the path or URL of a zarr array; None where it has none."""
    store = array.store
    if hasattr(store, "root"):
        return os.path.realpath(f"{store.root}/{array.path}")
    if hasattr(store, "fs"):
        return str(store.fs.unstrip_protocol(f"{store.path}/{array.path}")).rstrip("/")
    return None
