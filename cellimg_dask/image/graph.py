"""What an image rests on: all images, sources and arrays upstream."""

from __future__ import annotations

import math
import mmap
import os
import reprlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellimg_dask.bare.shared_array import SharedArray
from cellimg_dask.blocks.plan import InputPlan
from cellimg_dask.image.describe import halo_text
from cellimg_dask.image.drawing import CACHED, DIRTY, UNSAVED, Card, draw
from cellimg_dask.image.tables import as_columns
from cellimg_dask.loading.file_array import FileArray
from cellimg_dask.loading.loader import CellLoader, ImageReader
from cellimg_dask.loading.node import ImageNode
from cellimg_dask.loading.readers import (
    ArrayReader,
    ChunkedReader,
    Reader,
    SharedReader,
    stored_array,
)
from cellimg_dask.loading.source import MemoryReader, StoredReader

__all__ = ["Graph", "GraphNode", "Link", "graph_of"]

_MOST_LINES = 60
_LONGEST_NAME = 40
_IN_MEMORY = "NumPy array"


@dataclass(frozen=True, slots=True)
class Link:
    """How an image reads one of its inputs."""

    number: int
    """Of the input, in the graph."""
    halo: str
    """Voxels beyond the cell, and what lies beyond the border, as text."""


@dataclass(frozen=True, slots=True)
class GraphNode:
    """An image, or something that images read, as it was when the graph was made."""

    number: int
    """In the graph; whatever is read has a smaller number than who reads it."""
    name: str
    """Of the function, with its parameters; of an input, what it is."""
    kind: Literal["image", "source", "array"]
    """Whether it is computed, can be edited, or neither."""
    shape: tuple[int, ...]
    """Extent along each axis, in voxels."""
    dtype: np.dtype[Any]
    """Data type."""
    reads: tuple[Link, ...] = ()
    """What it reads directly, in the order of the function's arguments."""
    num_cells: int | None = None
    """Cells of an image or source, or chunks of a store; None: it has none."""
    cell_shape: tuple[int, ...] | None = None
    """Nominal shape of a cell or chunk; None: they differ."""
    cached: int | None = None
    """Cells (chunks) in the cache; None: all of it is in memory, or nothing is kept."""
    dirty: int = 0
    """Cells that were forgotten for a change and have not been computed since."""
    unsaved: int = 0
    """Changed cells of a source that its store does not have yet."""
    is_in_memory: bool = False
    """Whether it is an array in memory."""
    mark: str = ""
    """``frozen``, ``snapshot`` or nothing."""

    @property
    def cells_text(self) -> str:
        """The grid in words."""
        if self.num_cells is None:
            return ""
        what = "chunk" if self.kind == "array" else "cell"
        plural = "" if self.num_cells == 1 else "s"
        of = "" if not self.cell_shape else f" of {self.cell_shape}"
        return f"{self.num_cells:,} {what}{plural}{of}"

    @property
    def reads_text(self) -> str:
        """What it reads, and how, in words."""
        halos = {link.halo for link in self.reads}
        numbers = [f"#{link.number}" for link in self.reads]
        if len(halos) == 1:
            return ": ".join([", ".join(numbers), *halos])
        return "; ".join(f"#{link.number}: {link.halo}" for link in self.reads)


class Graph:
    """The images upstream of one image, and what they rest on, as they were at that moment.

    Shown as text, and in notebooks as a picture.
    """

    def __init__(self, nodes: tuple[GraphNode, ...]) -> None:
        self.nodes = nodes
        """Each after all that it reads; the image itself comes last."""

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[GraphNode]:
        return iter(self.nodes)

    def __repr__(self) -> str:
        images = sum(node.kind == "image" for node in self.nodes)
        inputs = len(self.nodes) - images
        title = f"Graph of {_number(images, 'image')}"
        if inputs:
            title += f" on {_number(inputs, 'input')}"
        head = ["#", "what", "shape", "dtype", "cells", "cached", "dirty", "unsaved", "reads"]
        rows = [head, *map(_row, self.nodes)]
        empty = [not any(column[1:]) for column in zip(*rows, strict=True)]
        keep = [number for number, none in enumerate(empty) if not none]
        lines = as_columns(
            [[row[number] for number in keep] for row in rows],
            right=[place for place, number in enumerate(keep) if number in (0, 5, 6, 7)],
        )
        left_out = len(lines) - 1 - _MOST_LINES
        if left_out > 0:
            half = _MOST_LINES // 2
            lines[1 + half : 1 + half + left_out] = [f"… {left_out:,} more …"]
        return "\n".join([title, *lines])

    def _repr_svg_(self) -> str:
        return draw([_card(node) for node in self.nodes])

    def _repr_html_(self) -> str:
        return f"<div style='max-height:60em;overflow:auto'>{self._repr_svg_()}</div>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file.

        Parameters
        ----------
        path : path
            Ends with ``.svg``.

        Raises
        ------
        ValueError
            If it ends otherwise.
        """
        where = Path(path)
        if where.suffix.lower() != ".svg":
            raise ValueError(f"the picture is SVG; give a name that ends with .svg, got {path!r}")
        where.write_text(self._repr_svg_(), encoding="utf-8")


def graph_of(node: ImageNode) -> Graph:
    """Return what the present edition of an image rests on."""
    loader: CellLoader = node.now
    order, nodes = _walk(loader, node)
    numbers: dict[Hashable, int] = {}
    found: list[GraphNode] = []
    for above in order:
        links = []
        for reader, plan in zip(above.readers, above.planner.inputs, strict=True):
            key = _key(reader)
            if key not in numbers:
                numbers[key] = len(numbers) + 1
                found.append(_of_reader(numbers[key], reader))
            links.append(Link(numbers[key], _halo(plan)))
        numbers[above] = len(numbers) + 1
        found.append(_of_loader(numbers[above], above, nodes.get(above), tuple(links)))
    return Graph(tuple(found))


def _walk(
    loader: CellLoader, node: ImageNode
) -> tuple[list[CellLoader], dict[CellLoader, ImageNode]]:
    """Return all loaders, each after what it reads, and to which image they belong if known."""
    # An edition is followed by its loaders, so that all of it is of one moment; which images
    # these belong to never changes.
    order = loader.ancestry()
    nodes = {loader: node}
    for below in reversed(order):
        known = nodes.get(below)
        if known is None or known.is_snapshot:
            continue
        for reader, above in zip(below.readers, known.inputs, strict=True):
            if isinstance(reader, ImageReader) and isinstance(above, ImageNode):
                nodes[reader.loader] = above
    return order, nodes


def _key(reader: Reader) -> Hashable:
    """Return what is the same for readers of the same thing."""
    if isinstance(reader, ImageReader):
        return reader.loader
    if isinstance(reader, SharedReader):
        return reader.shared.token
    if isinstance(reader, ArrayReader):
        array = reader.array
        place = array.__array_interface__["data"][0]
        return (place, array.shape, array.strides, array.dtype.str)
    if isinstance(reader, (MemoryReader, StoredReader)):
        return reader.token
    if isinstance(reader, ChunkedReader):
        return reader.shelf
    return id(getattr(reader, "array", reader))


def _of_loader(
    number: int, loader: CellLoader, node: ImageNode | None, links: tuple[Link, ...]
) -> GraphNode:
    mark = ""
    if node is not None:
        mark = "frozen" if node.frozen is not None else "snapshot" if node.is_snapshot else ""
    return GraphNode(
        number,
        name_of(loader.function.name, loader.params),
        "image",
        loader.grid.shape,
        loader.dtype,
        links,
        loader.grid.num_cells,
        loader.grid.cell_shape,
        len(loader.held()),
        loader.num_outdated(),
        mark=mark,
    )


def _of_reader(number: int, reader: Reader) -> GraphNode:
    what = _what(reader)
    shape, dtype = reader.shape, reader.dtype
    if isinstance(reader, (MemoryReader, StoredReader)):
        known = GraphNode(
            number,
            what,
            "source",
            shape,
            dtype,
            num_cells=reader.grid.num_cells,
            cell_shape=reader.grid.cell_shape,
            is_in_memory=isinstance(reader, MemoryReader),
        )
        if isinstance(reader, MemoryReader):
            return known
        held = len(reader.cells.shelf.held())
        return replace(known, cached=held, unsaved=reader.num_unsaved)
    if isinstance(reader, ChunkedReader):
        return GraphNode(
            number,
            what,
            "array",
            shape,
            dtype,
            num_cells=math.prod(reader.grid.grid_shape),
            cell_shape=getattr(reader.grid, "cell_shape", None),
            cached=len(reader.shelf.held()),
        )
    in_memory = what == _IN_MEMORY or isinstance(reader, SharedReader)
    return GraphNode(number, what, "array", shape, dtype, is_in_memory=in_memory)


def name_of(function: str, params: Mapping[str, Any]) -> str:
    """Return a short name of a function with its parameters."""
    # Where a function was defined says little; "<locals>" may come several times.
    short = function.rpartition("<locals>.")[2]
    given = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in params.items())
    text = " ".join(f"{short}({given})".split() if given else short.split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _what(reader: Reader) -> str:
    if isinstance(reader, MemoryReader):
        return "Source"
    if isinstance(reader, StoredReader):
        return f"Source in {_array_name(reader.cells.array)}"
    if isinstance(reader, ChunkedReader):
        return _array_name(stored_array(reader))
    if isinstance(reader, SharedReader):
        return _array_name(reader.shared)
    if isinstance(reader, ArrayReader):
        is_file = isinstance(reader.array.base, (np.memmap, mmap.mmap))
        return "memory map" if is_file else _IN_MEMORY
    return _array_name(getattr(reader, "array", reader))


def _array_name(array: Any) -> str:
    library = type(array).__module__.partition(".")[0]
    kinds = {
        "numpy": "memory map" if isinstance(array, np.memmap) else _IN_MEMORY,
        "zarr": "zarr array",
        "h5py": "HDF5 dataset",
        "dask": "dask array",
        "tensorstore": "tensorstore",
    }
    name = kinds.get(library, type(array).__name__)
    if isinstance(array, FileArray):
        name = array.label
    if isinstance(array, SharedArray):
        name = f"shared array {array.name}"
    root = getattr(getattr(array, "store", None), "root", None)
    if library == "zarr" and root is not None:
        # The last name of the path, and where the array is in the store.
        name += f" {'/'.join(filter(None, [Path(root).name, array.path]))}"
    return name_of(name, {})


def _halo(plan: InputPlan) -> str:
    if not plan.shape:
        text = "whole"
    elif any(plan.halo.before) or any(plan.halo.after):
        text = f"halo {halo_text(plan.halo)}, {plan.boundary}"
    else:
        text = "halo 0"
    return text if plan.index_map is None else f"{text}, index_map"


def _row(node: GraphNode) -> list[str]:
    name = f"{node.name} [{node.mark}]" if node.mark else node.name
    cached = "" if node.cached is None else f"{node.cached:,}"
    return [
        str(node.number),
        name,
        f"{node.shape}",
        f"{node.dtype}",
        node.cells_text,
        "in memory" if node.is_in_memory else cached,
        f"{node.dirty:,}" if node.kind == "image" else "",
        f"{node.unsaved:,}" if node.kind == "source" and not node.is_in_memory else "",
        node.reads_text,
    ]


_LOOKS = {
    "image": ("#ffffff", "#52606d"),
    "source": ("#eaf6ea", "#3f8f4f"),
    "array": ("#f1f3f5", "#9aa5b1"),
}
_FROZEN = ("#e8f3fb", "#2f80c0")


def _card(node: GraphNode) -> Card:
    halos = list(dict.fromkeys(link.halo for link in node.reads))
    lines = [f"{node.shape} {node.dtype}", node.cells_text]
    lines.append(node.reads_text if len(halos) > 1 else "".join(halos))
    told = [] if node.cached is None else [f"{node.cached:,} cached"]
    told += [
        f"{n:,} {what}" for n, what in ((node.dirty, "dirty"), (node.unsaved, "not saved")) if n
    ]
    lines.append("in memory" if node.is_in_memory else ", ".join(told))
    bar = None
    if node.cached is not None and node.num_cells:
        # Of a cell that is not saved the cache may hold what it was before.
        colours = [(UNSAVED, node.unsaved), (CACHED, node.cached), (DIRTY, node.dirty)]
        bar = [(colour, count / node.num_cells) for colour, count in colours]
    fill, stroke = _FROZEN if node.mark == "frozen" else _LOOKS[node.kind]
    return Card(
        f"#{node.number} {node.name}" + (f" [{node.mark}]" if node.mark else ""),
        [line for line in lines if line],
        [link.number - 1 for link in node.reads],
        fill,
        stroke,
        node.mark == "snapshot",
        bar,
    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
