"""What a run would do and take, before it runs."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from cellimg_dask.cli.sizes import format_bytes

if TYPE_CHECKING:
    from cellimg_dask.batch.spec import Stage
    from cellimg_dask.loading.loader import CellLoader
    from cellimg_dask.loading.memory import Room

__all__ = ["projected"]


def projected(stage: Stage, loader: CellLoader, target: str, cells_per_call: Any) -> dict[str, str]:
    """Return what there is to say of computing an image, by catchword.

    Parameters
    ----------
    stage : Stage
        Where and how it runs.
    loader : CellLoader
        Of the image.
    target : str
        Where it is written.
    cells_per_call : int, ints, "auto" or None
        As in `run`.
    """
    from cellimg_dask.loading.together import cells_together

    grid = loader.grid
    nbytes = prod(grid.shape) * loader.dtype.itemsize
    rooms = _rooms(stage)
    together = cells_together(loader, cells_per_call, rooms)
    computing = loader if together is None else together.coarse
    calls = computing.grid.num_cells
    read = 0
    if calls:
        middle = computing.plan(
            computing.grid.index(tuple(n // 2 for n in computing.grid.grid_shape))
        )
        read = sum(
            prod(window.length for window in windows) * reader.dtype.itemsize
            for windows, reader in zip(middle.windows, loader.readers, strict=True)
        )
    own = sum(prod(reader.shape) * reader.dtype.itemsize for reader in loader.readers)
    # Values stand for blocks of a grid of their own.
    blocks = getattr(loader.function, "grid", None) or grid
    env = stage.queue.env
    return {
        "shape": f"{grid.shape} {loader.dtype}, {format_bytes(nbytes)}",
        "cells": f"{grid.num_cells:,} of {blocks.cell_shape}, {grid.grid_shape} in the grid",
        "function": loader.function.name,
        **({} if env is None else {"environment": str(env)}),
        "read": f"{format_bytes(read * calls)} by all blocks together, "
        f"{read * calls / max(own, 1):.2f} times the inputs because of the halo",
        "written": f"{format_bytes(nbytes)} before compression, to {target}",
        "memory": "; ".join(_memory(room, computing) for room in dict.fromkeys(rooms))
        or "not known before there are workers",
        "calls": f"{calls:,}, one per cell"
        if together is None
        else f"{calls:,}, of {together.per_call} cells each",
    }


def _rooms(stage: Stage) -> list[Room]:
    """Return where blocks would run, as far as it is known without looking at a cluster."""
    from cellimg_dask.batch.filling import threads_for
    from cellimg_dask.loading.crew import usable_cores
    from cellimg_dask.loading.memory import Room
    from cellimg_dask.state.cache import memory_bytes

    queue, slurm = stage.queue, stage.queue.slurm
    if slurm is not None:
        from dask.utils import parse_bytes

        own = parse_bytes(slurm.memory) // slurm.processes
        limit = own if stage.max_memory is None else min(own, stage.max_memory)
        threads = max(1, slurm.cores // slurm.processes)
        worker = Room(threads, limit, own // 4, "each worker of the cluster")
        return [worker] * (slurm.jobs * slurm.processes)
    if queue.has_cluster:
        return []
    threads = threads_for(queue.num_workers or usable_cores())
    return [Room(threads, memory_bytes() if stage.max_memory is None else stage.max_memory)]


def _memory(room: Room, loader: CellLoader) -> str:
    mib = room.max_bytes / (1 << 20)
    text = f"{room.name} {room.projected(loader)}; {mib:,.0f} MiB are allowed"
    return text if room.has_room(loader) else f"{text}: TOO MUCH, the run will be refused"
