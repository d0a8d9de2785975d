"""Cells that are found on the disk, by content key, before they are computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.blocks.content import NoContentError
from cellimg_dask.loading.content import ContentKeys, Image
from cellimg_dask.state.disk import DiskCells

__all__ = ["Lasting"]


class Lasting:
    """The cells of one image on the disk.

    An image whose function or inputs cannot be compared is not kept there; ``refused`` says why.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, image: Image) -> None:
        self._keys: ContentKeys | None = None
        self.refused: str | None = None
        """Why nothing of the image is kept on the disk."""
        try:
            self._keys = ContentKeys(image)
        except NoContentError as error:
            self.refused = str(error)

    def find(self, disk: DiskCells, index: int) -> tuple[str | None, NDArray[Any] | None]:
        """Return the key of a cell, if it has one, and the cell, if it is on the disk."""
        key = self._key(index)
        return key, None if key is None else disk.get(key)

    def keep(self, disk: DiskCells, index: int, key: str | None, value: NDArray[Any]) -> None:
        """Keep a cell, unless its inputs changed since its key was made."""
        if key is None or key != self._key(index):
            return
        try:
            disk.put(key, value)
        except OSError as error:
            # What was computed is right all the same.
            warnings.warn(
                f"cells cannot be kept in {disk.folder}: {error}", RuntimeWarning, stacklevel=2
            )

    def load(
        self, disk: DiskCells, index: int, compute: Callable[[int], NDArray[Any]]
    ) -> NDArray[Any]:
        """Return a cell from the disk, or compute and keep it."""
        key, value = self.find(disk, index)
        if value is None:
            value = compute(index)
            self.keep(disk, index, key, value)
        return value

    def _key(self, index: int) -> str | None:
        if self._keys is None:
            return None
        try:
            return self._keys.key_now(index)
        except NoContentError as error:
            self.refused = str(error)
            self._keys = None
            return None
