"""Images of tables as dask data frames: one partition and one task per cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cellimg_dask.image.cellimg import CellImg

if TYPE_CHECKING:
    import dask.dataframe as dd
    import pandas as pd

__all__ = ["frame_of", "latest"]


def frame_of(
    image: CellImg, meta: pd.DataFrame, make: Callable[[Any], pd.DataFrame]
) -> dd.DataFrame:
    """Return an image of tables as a data frame, one partition per cell.

    Parameters
    ----------
    image : CellImg
        Of dtype object, one voxel per cell.
    meta : pandas.DataFrame
        A table without rows.
    make : callable
        Makes a table with the columns, dtypes and kind of index of ``meta`` of the value of a cell.
        Whoever gets it may write into it, so it shares nothing with the value.

    Returns
    -------
    dask.dataframe.DataFrame
        The image as it is now; `latest` gives it over later changes. Partitions are in C order of
        the cells. Building it costs the same for any number of cells and calls nothing of the
        user's.
    """
    from cellimg_dask.ops.from_cells import Cells, FromCells, new_collection

    unknown = [
        name
        for name, dtype in meta.dtypes.items()
        if dtype == "category" and not len(dtype.categories)
    ]
    if unknown:
        # Each cell has those that occur in it, which is not the same as that there are none.
        from dask.dataframe.utils import clear_known_categories

        meta = clear_known_categories(meta, cols=unknown)
    return new_collection(FromCells(Cells.of(image, meta, make)))


def latest(frame: Any) -> Any:
    """Return a data frame over what the images that it comes from are now.

    A data frame that `map_points` and the like return is that of the moment when it was made.
    After an edit of a `Source`, or `CellImg.invalidate`, this gives the same over what is there
    now; cells that the change does not touch are not computed again.

    Parameters
    ----------
    frame : dask data frame, series or scalar
        One that such a function returned, or anything derived from it.

    Returns
    -------
    The same kind
        The argument itself where nothing has changed.

    Raises
    ------
    TypeError
        If it is no collection of `dask.dataframe`.
    ValueError
        If it came from another process, where its images are not known.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> from cellimg_dask.ops.points import map_points
    >>> source = ci.Source(np.array([0, 0, 9, 0, 0, 0]), cell_shape=3)
    >>> bright = map_points(lambda a: np.argwhere(a > 5), source)
    >>> bright.compute()["axis-0"].tolist()
    [2.0]
    >>> with source.edit() as values:
    ...     values[4] = 8
    >>> latest(bright).compute()["axis-0"].tolist()
    [2.0, 4.0]
    """
    from cellimg_dask.ops.from_cells import Cells, FromCells, new_collection

    expression: Any = getattr(frame, "expr", None)
    if not hasattr(expression, "find_operations"):
        raise TypeError(f"latest needs a dask data frame, got {type(frame).__name__}")
    changed = expression
    for leaf in expression.find_operations(FromCells):
        cells = leaf.operand("cells")
        if cells.image is None:
            raise ValueError("the data frame came from another process: its images are not here")
        now = leaf.substitute_parameters({"cells": Cells.of(cells.image, cells.meta, cells.make)})
        if now._name != leaf._name:
            changed = changed.substitute(leaf, now)
    return frame if changed is expression else new_collection(changed)
