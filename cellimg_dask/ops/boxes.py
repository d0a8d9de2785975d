"""Where the objects of a label image are, without a table of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellimg_dask.blocks.block import Block
from cellimg_dask.geometry import Roi
from cellimg_dask.image.define import grid_of
from cellimg_dask.image.input import as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.objects import Objects, Wants, measure, merge
from cellimg_dask.ops.reduce import combine_values

__all__ = ["boxes_of", "find_objects"]


def find_objects(labels: Any) -> Objects:
    """Return all objects of an image with their boxes; all cells are read."""
    given = as_input(labels)
    grid = grid_of(None, [given])
    dtype = np.dtype(getattr(given.array.dtype, "numpy_dtype", given.array.dtype))
    cells = cell_values(_Find(grid.cell_shape), grid, given)
    found = combine_values(cells, _Merge(grid.ndim, dtype), cache="shared", queue=None)
    objects: Objects = found.result()
    return objects


def boxes_of(objects: Objects, labels: Iterable[int]) -> dict[int, Roi]:
    """Return the boxes of some objects; what is no object is left out."""
    wanted = set(labels)
    # As Python's: in one array with other integers, labels of 64 bits would become floats.
    rows = {
        label: row for row, label in enumerate(map(int, objects.label.tolist())) if label in wanted
    }
    return {
        label: Roi(tuple(objects.start[row].tolist()), tuple(objects.stop[row].tolist()))
        for label, row in rows.items()
    }


class _Named:
    @property
    def __name__(self) -> str:
        return "boxes of objects"


@dataclass(frozen=True)
class _Find(_Named):
    cell_shape: tuple[int, ...]

    def __call__(self, block: Block) -> Objects:
        origin = tuple(p * n for p, n in zip(block.position, self.cell_shape, strict=True))
        return measure(block.inputs[0], None, origin, Wants())


@dataclass(frozen=True)
class _Merge(_Named):
    ndim: int
    dtype: np.dtype[Any]

    def __call__(self, parts: list[Objects]) -> Objects:
        some = [part for part in parts if len(part)]
        if some:
            return merge(some)
        empty = (0,) * self.ndim
        return measure(np.zeros(empty, self.dtype), None, empty, Wants())
