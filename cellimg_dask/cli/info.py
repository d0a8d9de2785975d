"""``cellimg info``: what a file holds, or what a block function takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cellimg_dask.cli.files import Stored, open_file
from cellimg_dask.cli.functions import hint_for, is_function, show_function
from cellimg_dask.cli.sizes import format_bytes
from cellimg_dask.io.channels import SAMPLES

__all__ = ["info"]

_HALO = 8


@click.command()
@click.argument("what")
@click.option("--json", "as_json", is_flag=True, help="Of a function: print the description.")
@click.option(
    "--env",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Of a function: the virtual environment in which it is imported.",
)
def info(what: str, as_json: bool, env: Path | None) -> None:
    """Show what a file holds, or what a block function takes and gives.

    WHAT is an image: a TIFF, PNG, JPEG, .npy or HDF5 file, a folder with a zarr array or group
    (version 2 or 3), or an N5 folder. Every array in it is listed, and how map_cells would cut it
    into cells. Nothing is decoded and nothing on disk is changed.

    Or it is a function, as module:function or file.py:function, which is imported, or the
    description of one in a YAML or JSON file. With --json it is printed as such a description.
    """
    path = Path(what)
    if is_function(what):
        show_function(what, env, as_json=as_json)
        return
    for given, option in ((as_json, "--json"), (env is not None, "--env")):
        if given:
            raise click.UsageError(f"{option} is for functions, and {what} is none")
    if not path.exists():
        raise click.BadParameter(f"Path {what!r} does not exist.{hint_for(what)}")
    if path.suffix == ".py":
        raise click.UsageError(f"{what} is a file of functions; name one of them{hint_for(what)}")
    with open_file(path) as arrays:
        click.echo(f"{path}: {arrays[0].kind}, {_count(len(arrays), 'array')}")
        for stored in arrays:
            if stored.name:
                click.echo(f"\n{stored.name}")
            facts = _facts(stored)
            width = max(map(len, facts))
            for name, value in facts.items():
                click.echo(f"  {name:<{width}}  {value}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _facts(stored: Stored) -> dict[str, str]:
    voxels = 1
    for extent in stored.shape:
        voxels *= extent
    facts = {"shape": str(stored.shape)}
    if stored.axes is not None:
        samples = f" ({SAMPLES}: colour samples)" if SAMPLES in stored.axes else ""
        facts["axes"] = ", ".join(stored.axes) + samples
    facts["dtype"] = str(stored.dtype)
    facts["size"] = (
        f"{format_bytes(voxels * stored.dtype.itemsize)}, "
        f"{format_bytes(stored.listed.stored_bytes or 0)} on disk"
    )
    facts["chunks"] = str(stored.listed.chunks) if stored.listed.chunks else "none"
    if stored.listed.shards:
        facts["shards"] = str(stored.listed.shards)
    if stored.listed.num_levels > 1:
        facts["levels"] = str(stored.listed.num_levels)
    facts["compression"] = stored.listed.compression
    return facts | _cells(stored)


class _Outline:
    """An input of which only the outside is known."""

    def __init__(self, stored: Stored) -> None:
        self.shape = stored.shape
        self.dtype = stored.dtype
        self.chunks = stored.listed.chunks

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("only the outline is here")


def _cells(stored: Stored) -> dict[str, str]:
    """Say which grid `map_cells` chooses, and what one block takes."""
    import cellimg_dask as ci

    try:
        grid = ci.map_cells(abs, _Outline(stored), dtype=stored.dtype).grid
    except (TypeError, ValueError) as error:
        return {"default cells": f"none: {error}"}
    cell = tuple(min(c, n) for c, n in zip(grid.cell_shape, grid.shape, strict=True))
    written = read = stored.dtype.itemsize
    for c, n in zip(cell, grid.shape, strict=True):
        written *= c
        read *= min(c + 2 * _HALO, n)
    return {
        "default cells": f"{grid.num_cells:,} of {cell}, {grid.grid_shape} in the grid",
        "one block": f"{format_bytes(written)} to read and as much to write; "
        f"with a halo of {_HALO} on all axes {format_bytes(read)} to read",
    }
