"""What goes wrong while cells are computed.

Bad arguments are refused with the builtin that NumPy would raise (`TypeError`, `ValueError`,
`IndexError`). The classes here are for failures of a running computation; each is a
`CellimgError` and also a builtin. All of them survive pickling, cause included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cellimg_dask.geometry import Roi

__all__ = ["BlockError", "CellimgError", "CycleError", "InitError", "ReadError", "ResultError"]


class CellimgError(Exception):
    """Base of the errors of a running computation."""


def _rebuild(
    cls: type[CellError], fields: tuple[Any, ...], cause: BaseException | None
) -> CellError:
    error = cls(*fields)
    error.__cause__ = cause
    return error


class CellError(CellimgError):
    """An error that belongs to one cell of one image."""

    def __init__(self, function: str, position: tuple[int, ...], roi: Roi, detail: str) -> None:
        super().__init__(function, position, roi, detail)
        self.function = function
        """Name of the block function."""
        self.position = position
        """Position of the cell in its grid."""
        self.roi = roi
        """The cell's box in the image."""
        self.detail = detail
        """What went wrong."""

    def __str__(self) -> str:
        region = ", ".join(
            f"{low}:{high}" for low, high in zip(self.roi.start, self.roi.stop, strict=True)
        )
        return f"{self.function} at cell {self.position} [{region}]: {self.detail}"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, (type(self), self.args, self.__cause__)

    def again(self) -> CellError:
        """Return an equal error of its own, so that each waiting thread raises another object."""
        return _rebuild(type(self), self.args, self.__cause__)


class BlockError(CellError, RuntimeError):
    """A block function raised; its exception is the ``__cause__``."""


class ResultError(BlockError, ValueError):
    """A block function returned something of the wrong shape, dtype or kind."""


class ReadError(CellError, OSError):
    """Reading an input of a cell failed; the store's exception is the ``__cause__``."""


class CycleError(CellError, RuntimeError):
    """A cell was asked for, directly or through others, while it was being computed."""


class InitError(CellimgError, RuntimeError):
    """The ``init`` of a block function failed; no block ran after it."""
