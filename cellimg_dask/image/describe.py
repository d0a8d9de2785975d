"""What an image says of itself, as text and as HTML."""

from __future__ import annotations

from html import escape

from cellimg_dask.geometry import Halo, Space
from cellimg_dask.loading.loader import CellLoader

__all__ = ["as_html", "as_text", "halo_text", "size_text"]


def size_text(nbytes: float) -> str:
    """Return a number of bytes as people write it."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while nbytes >= 1024 and len(units) > 1:
        nbytes /= 1024
        units.pop(0)
    return f"{nbytes:.0f} bytes" if units[0] == "bytes" else f"{nbytes:.1f} {units[0]}"


def halo_text(halo: Halo) -> str:
    """Return a halo as briefly as it can be given."""
    widths = [
        str(a) if a == b else f"({a}, {b})" for a, b in zip(halo.before, halo.after, strict=True)
    ]
    return widths[0] if len(set(widths)) == 1 else f"({', '.join(widths)})"


def _facts(loader: CellLoader, space: Space) -> dict[str, str]:
    grid, stats = loader.grid, loader.shelf.stats()
    voxels = 1
    for extent in grid.shape:
        voxels *= extent
    held = len(loader.held())
    halos = [
        f"{halo_text(item.halo)}, {item.boundary}" for item in loader.planner.inputs if item.shape
    ]
    facts = {
        "shape": f"{grid.shape}",
        "dtype": f"{loader.dtype}",
        "size": size_text(voxels * loader.dtype.itemsize),
        "cells": f"{grid.num_cells:,} of {grid.cell_shape}, {grid.grid_shape} in the grid",
        "function": loader.function.name + (f" with {loader.params}" if loader.params else ""),
        "halo": "; ".join(dict.fromkeys(halos)) or "none",
        "cached": f"{held:,} cells, {size_text(stats.bytes)}",
        "hits / loads": f"{stats.hits:,} / {stats.loads:,}"
        + (f", {stats.errors:,} errors" if stats.errors else ""),
    }
    if not space.is_plain:
        facts["voxels"] = str(space)
    if loader.queue is not None:
        facts["queue"] = repr(loader.queue)
    if loader.shelf.cache.disk is not None:
        refused = loader.lasting.refused
        facts["on disk"] = f"no: {refused}" if refused else str(loader.shelf.cache.disk.folder)
    return facts


def as_text(loader: CellLoader, space: Space) -> str:
    """Return one line for each thing worth knowing."""
    facts = _facts(loader, space)
    width = max(map(len, facts))
    lines = [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(["CellImg", *lines])


def as_html(loader: CellLoader, space: Space) -> str:
    """Return a table with a picture of the grid."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in _facts(loader, space).items()
    )
    return (
        "<table><tr><td><table><thead><tr><th colspan='2' style='text-align:left'>CellImg</th>"
        f"</tr></thead><tbody>{rows}</tbody></table></td><td>{_picture(loader)}</td></tr></table>"
    )


def _picture(loader: CellLoader, edge: int = 160, most_lines: int = 24) -> str:
    """Draw the grid of the last two axes as SVG; cached cells of the middle plane are filled."""
    grid = loader.grid
    if grid.ndim == 0 or grid.num_cells == 0:
        return ""
    rows_, columns = (1, grid.shape[-1]) if grid.ndim == 1 else grid.shape[-2:]
    scale = edge / max(rows_, columns)
    width, height = max(columns * scale, 8.0), max(rows_ * scale, 8.0)
    count = (1, grid.grid_shape[-1]) if grid.ndim == 1 else grid.grid_shape[-2:]
    cell = (rows_, grid.cell_shape[-1]) if grid.ndim == 1 else grid.cell_shape[-2:]
    cell_height = min(cell[0] * height / rows_, height)
    cell_width = min(cell[1] * width / columns, width)
    middle = sum(
        (n // 2) * stride for n, stride in zip(grid.grid_shape[:-2], grid.strides[:-2], strict=True)
    )
    shapes = []
    if count[0] <= most_lines and count[1] <= most_lines:
        for number in range(count[0] * count[1]):
            row, column = divmod(number, count[1])
            colour = "#f2b134" if loader.peek(middle + number) is not None else "#eef2f6"
            x, y = column * cell_width, row * cell_height
            shapes.append(
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{min(cell_width, width - x):.1f}' "
                f"height='{min(cell_height, height - y):.1f}' fill='{colour}' "
                f"stroke='#5b6b7b' stroke-width='0.7'/>"
            )
    else:
        shapes.append(
            f"<rect width='{width:.1f}' height='{height:.1f}' fill='#eef2f6' stroke='#5b6b7b'/>"
            f"<text x='4' y='14' font-size='10'>{count[0]:,} × {count[1]:,} cells</text>"
        )
    return (
        f"<svg width='{width + 2:.0f}' height='{height + 2:.0f}'>"
        f"<g transform='translate(1,1)'>{''.join(shapes)}</g></svg>"
    )
