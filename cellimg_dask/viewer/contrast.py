"""Which values of an image to show black and white, when nobody has said it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Roi
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.request import Request

__all__ = ["find_contrast", "range_of"]

_logger = logging.getLogger("cellimg_dask")


def range_of(values: NDArray[Any]) -> tuple[float, float] | None:
    """Return the range of values without the rarest; None where there is none.

    Examples
    --------
    >>> range_of(np.arange(1001))
    (1.0, 999.0)
    >>> range_of(np.zeros(9)) is None
    True
    """
    flat = values.reshape(-1)
    # Enough to know, and quick for cells of any size.
    flat = flat[:: max(1, flat.size // 1_000_000)]
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return None
    low, high = (float(value) for value in np.quantile(flat, (0.001, 0.999)))
    return (low, high) if low < high else None


def find_contrast(
    image: CellImg,
    found: Callable[[tuple[float, float]], object],
    at: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Have the range of values in the middle of an image told, when it is known.

    The cell in the middle is what is seen first, so that nothing is computed for this only.

    Parameters
    ----------
    image : CellImg
        What is shown.
    found : callable
        Called with the lowest and the highest value.
    at : mapping of axis to index
        Where the image is looked at instead: in one channel.
    """
    grid = image.grid
    if not grid.num_cells:
        return
    middle = [(extent - 1) // 2 for extent in grid.shape]
    for axis, index in at.items():
        middle[axis] = index
    cell = grid.roi(tuple(n // size for n, size in zip(middle, grid.cell_shape, strict=True)))
    start, stop = list(cell.start), list(cell.stop)
    for axis, index in at.items():
        start[axis], stop[axis] = index, index + 1

    def done(request: Request) -> None:
        try:
            known = range_of(request.result())
            if known is not None:
                found(known)
        except Exception as error:
            # Whoever looks at the cell is told of it as well.
            _logger.debug("the range of values is not known: %s", error)

    image.request(Roi(tuple(start), tuple(stop))).add_done_callback(done)
