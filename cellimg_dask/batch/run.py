"""`run`: a whole image into a zarr array, or a table into parquet, to be trusted and carried on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from cellimg_dask.batch.apart import check_apart
from cellimg_dask.batch.filling import Filling, alone
from cellimg_dask.batch.folder import is_url
from cellimg_dask.batch.parquet import TableLayout
from cellimg_dask.batch.report import RunReport
from cellimg_dask.batch.target import Layout
from cellimg_dask.batch.work import TableKeys
from cellimg_dask.geometry import as_int
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.loading.content import ContentKeys
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.readers import ChunkedReader
from cellimg_dask.queues.block_queue import BlockQueue

__all__ = ["forget_files", "image_and_table", "place_of_target", "run"]


def run(
    img: Any,
    target: str | os.PathLike[str],
    *,
    queue: BlockQueue | None = None,
    resume: bool = True,
    overwrite: bool = False,
    retries: int = 2,
    progress: bool | str = True,
    chunks: Any = None,
    sharded: bool | None = None,
    compressor: str | None = "zstd",
    level: int | None = None,
    fill_value: Any = 0,
    zarr_format: Literal[2, 3] = 3,
    verify: Literal["checksums", "sizes"] = "checksums",
    cells_per_call: int | Sequence[int] | Literal["auto"] | None = None,
    max_memory: int | None = None,
    timeout_s: float = 600.0,
) -> RunReport:
    """Compute a whole image into a zarr array, cell by cell, and mark what is done.

    May be killed at any moment. The next run with the same target computes what is missing,
    damaged, or made by another computation, and nothing else.

    Where all cells of an image have to be known before the first cell of ``img`` can be, as with
    the labels that are stitched, that image is computed and stored first, in the same way, in
    ``<target>.run/pass1.zarr``. It stays, so that after a change only what was touched is computed
    again; once the target is done it may be deleted.

    Parameters
    ----------
    img : CellImg or dask data frame
        The image, or the table that `map_points` or `region_table` returned.
    target : path or URL
        A zarr array, for a table a folder of parquet files, one for each cell, that pandas and
        dask read as one. It is created if it is not there: a local folder or whatever fsspec and
        zarr can write. Markers, lock and report lie beside it, in ``<target>.run``.
    queue : BlockQueue, optional
        Where blocks run; default: the image's own queue, else threads.
    resume : bool
        Whether a target that exists is carried on; else it is refused.
    overwrite : bool
        Whether a target that exists is removed first.
    retries : int
        How often a cell that fails is tried again.
    progress : bool or str
        Whether a bar with rate and time left is shown on standard error; a text stands before it.
    chunks : int or ints, optional
        Shape of the chunks, which divide the cells; default: one chunk per cell.
    sharded : bool, optional
        Whether the chunks of a cell are stored as one shard; default: where a cell has several.
    compressor : {"zstd", "blosc", "gzip", None}
        How chunks are compressed; those of parquet cannot be by blosc.
    level : int, optional
        Level of the compressor; default: 1 for zstd, 5 for the others.
    fill_value : scalar
        Value of voxels that are not stored; a chunk that holds nothing else is left out.
    zarr_format : {3, 2}
        Version of zarr; 2 for programs that do not read 3.
    verify : {"checksums", "sizes"}
        How stored cells are checked before they count as done: all bytes are read, or only the
        sizes of the files are compared.
    cells_per_call : int, ints, "auto" or None
        How many neighbouring cells along each axis are computed by one call, so that the halo is
        read and computed once for all of them; ``"auto"`` within the memory. For local functions
        of arrays, which give the same result for any size of block.
    max_memory : int, optional
        Bytes that the run may take, on a cluster each of its workers; default: the memory of
        this machine or container, or the limit of the worker.
    timeout_s : float
        How long the run goes on without a cell being done: longer than a cell may take.

    Returns
    -------
    RunReport
        Also saved beside the target. Cells that fail are in it; they do not end the run.

    Raises
    ------
    FileExistsError
        If the target exists and is not to be carried on, is something else, or is in use.
    ValueError
        If an argument is wrong, or the target is a store that the image is computed from.
    MemoryError
        If the projected memory exceeds ``max_memory``, or the limit of a worker of a cluster.
    NoWorkersError
        If no cell was done for ``timeout_s``, or the scheduler of a cluster is lost; the next run
        goes on from there. A queue on this machine is closed then: its processes are killed, but
        a thread cannot be, so a block that never ends stays in this process until Python ends.
    TypeError
        If an input or the function has no content that can be compared: give ``version=``.

    Examples
    --------
    >>> import tempfile, numpy as np, zarr, cellimg_dask as ci
    >>> img = ci.map_cells(np.negative, np.arange(6), cell_shape=2)
    >>> folder = tempfile.mkdtemp()
    >>> ci.run(img, f"{folder}/out.zarr", progress=False).computed
    3
    >>> ci.run(img, f"{folder}/out.zarr", progress=False).skipped
    3
    >>> zarr.open_array(f"{folder}/out.zarr")[:]
    array([ 0, -1, -2, -3, -4, -5])
    """
    if verify not in ("checksums", "sizes"):
        raise ValueError(f'verify must be "checksums" or "sizes", got {verify!r}')
    if not isinstance(progress, (bool, str)):
        raise TypeError(f"progress must be a bool, or a text for the bar, got {progress!r}")
    if max_memory is not None:
        max_memory = as_int(max_memory, "max_memory", minimum=1)
    image, table = image_and_table(img)
    loader = alone(image.loader.pinned(), queue)
    layout: Layout | TableLayout
    if table is None:
        layout = Layout.of(
            loader.grid,
            loader.dtype,
            chunks=chunks,
            sharded=sharded,
            compressor=compressor,
            level=level,
            fill_value=fill_value,
            zarr_format=zarr_format,
            axes=image.axes,
        )
    else:
        version = None if zarr_format == 3 else zarr_format
        for name, value in (("chunks", chunks), ("sharded", sharded), ("zarr_format", version)):
            if value is not None:
                raise ValueError(f"{name} is for images; a table has one part per cell")
        layout = TableLayout.of(loader.grid, table.make, table.meta, compressor, level)
    where = place_of_target(target)
    check_apart([loader], where)
    forget_files(loader)
    filling = Filling(
        queue,
        as_int(retries, "retries", minimum=0),
        verify == "checksums",
        max_memory,
        timeout_s,
        progress is not False,
    )
    keys = ContentKeys(loader)
    return filling.fill(
        loader,
        TableKeys(keys, layout.content()) if isinstance(layout, TableLayout) else keys,
        layout,
        where,
        resume=resume,
        overwrite=overwrite,
        cells_per_call=cells_per_call,
        name=progress if isinstance(progress, str) else None,
    )


def image_and_table(img: Any) -> tuple[CellImg, Any]:
    """Return the image to be computed, and of a table what is made of its cells, else None."""
    if isinstance(img, CellImg):
        return img, None
    # A data frame that is read from the cells of an image, and nothing else, knows them.
    cells: Any = getattr(getattr(img, "expr", None), "cells", None)
    image = getattr(cells, "image", None)
    if isinstance(image, CellImg):
        return image, cells
    if type(img).__module__.startswith("dask.dataframe"):
        raise TypeError(
            "img is a data frame that dask has computed from others: run the one that map_points "
            "or region_table returned, and go on from there, or use its to_parquet"
        )
    raise TypeError(
        f"img must be a CellImg, or a data frame of map_points or region_table, got "
        f"{type(img).__name__}"
    )


def place_of_target(target: str | os.PathLike[str]) -> str:
    """Return where a target is: an absolute path, or a URL as it is."""
    where = os.fspath(target)
    if not isinstance(where, str):
        raise TypeError(f"target must be a path or an URL, got {type(target).__name__}")
    if where.startswith("file://"):
        # Of a package that knows HTTP and TLS, too.
        from urllib.request import url2pathname

        where = url2pathname(urlsplit(where).path)
    # A string stays one.
    return where if is_url(where) else os.path.abspath(os.path.expanduser(where))  # noqa: PTH100, PTH111


def forget_files(loader: CellLoader) -> None:
    """Forget what was read of stores: they may have changed since, and keys tell what they hold."""
    outdated: set[CellLoader] = set()
    for image in loader.ancestry():
        stores = [reader for reader in image.readers if isinstance(reader, ChunkedReader)]
        for reader in stores:
            reader.forget(None)
        if stores or not outdated.isdisjoint(image.upstream()):
            outdated.add(image)
            image.shelf.invalidate(None)
