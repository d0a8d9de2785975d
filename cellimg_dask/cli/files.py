"""Image files for the command line: what is in there, and images that read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from cellimg_dask.io.listing import list_images
from cellimg_dask.io.open_image import open_image
from cellimg_dask.io.opened import ListedArray
from cellimg_dask.io.stored_image import StoredImage
from cellimg_dask.loading.file_array import FileArray

__all__ = ["Stored", "open_file", "reason"]


@dataclass(frozen=True)
class Stored:
    """An array in a file, not read yet."""

    listed: ListedArray
    """What is known of the array."""
    read: Callable[[], Any]
    """Opens the array, which reads regions as long as the file is open."""

    @property
    def kind(self) -> str:
        """The format, for instance ``TIFF``."""
        return self.listed.kind

    @property
    def name(self) -> str:
        """Where in the file it is; empty where the file holds just one array."""
        return self.listed.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis."""
        return self.listed.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type."""
        return self.listed.dtype

    @property
    def axes(self) -> tuple[str, ...] | None:
        """Axis names in lower case where the file gives them."""
        return self.listed.axes


@contextmanager
def open_file(path: Path) -> Iterator[list[Stored]]:
    """List the arrays of a file or store, the main one first; close what was read at the end.

    Raises
    ------
    click.ClickException
        If the file cannot be read, is of no known format, or holds no array.
    """
    with ExitStack() as stack:
        try:
            listed = list_images(path)
        except ImportError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"cannot read {path}: {reason(error)}") from error
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        yield [Stored(item, partial(_read, path, item.name, stack)) for item in listed]


def _read(path: Path, name: str, stack: ExitStack) -> StoredImage:
    image = stack.enter_context(open_image(path, name=name or None))
    if isinstance(image.array, FileArray):
        # What is decoded as a whole fails here if it is damaged.
        image.array.memory()
    return image


def reason(error: Exception) -> str:
    """Return what went wrong in words; where a library wrapped the cause, the cause."""
    root = error.__cause__ or error
    return f"{type(root).__name__}: {root}"
