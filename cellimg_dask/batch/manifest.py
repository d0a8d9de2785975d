"""Which cells of a target are done: a marker for each, written after its data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from cellimg_dask.batch.folder import Folder, open_folder

__all__ = ["Manifest", "State", "Stored", "run_folder"]

State = Literal["done", "missing", "other", "damaged"]
"""Of a cell: committed and whole; without a marker; made by another computation; changed since."""

_SCHEMA = 1


def run_folder(where: str) -> str:
    """Return where a target's markers, lock, report and spec lie: beside it."""
    return f"{where.rstrip('/')}.run"


class Stored(Protocol):
    """Where the data of cells are."""

    def checksums(self, index: int) -> dict[str, Any]:
        """Return size and checksum of each stored object of a cell; None where there is none."""
        ...

    def sizes(self, index: int) -> dict[str, int | None]:
        """Return the size of each stored object of a cell; None where there is none."""
        ...


class Manifest:
    """The markers of a target's cells.

    A marker holds the content key of the cell and a checksum of each stored object. It is
    written when the data are on the disk, so a cell with a marker is whole, whatever was killed
    when. Markers decide and not chunks: a chunk of nothing but the fill value need not exist.

    Thread-safe. It pickles as its path.

    Parameters
    ----------
    where : str
        Path or URL of the target.
    beside : str, optional
        The folder for markers, lock and report; default: `run_folder`.
    """

    def __init__(self, where: str, beside: str | None = None) -> None:
        self.where = where
        self.beside = run_folder(where) if beside is None else beside
        self.folder: Folder = open_folder(self.beside)

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.where, self.beside)

    def pass_of(self, number: int) -> str:
        """Return where the run stores an image that it needs first, counted from 1."""
        return f"{self.beside}/pass{number}.zarr"

    def commit(self, index: int, key: str, objects: dict[str, Any]) -> None:
        """Mark a cell as done; its data must be on the disk."""
        content = {"schema": _SCHEMA, "key": key, "objects": objects}
        self.folder.write(_name(index), json.dumps(content).encode())

    def withdraw(self, index: int) -> None:
        """Remove a cell's marker, before its data change."""
        self.folder.remove(_name(index))

    def marked(self) -> Iterator[int]:
        """Return the cells that have a marker, in no order."""
        for name in self.folder.names("done"):
            stem = name.rpartition("/")[2].removesuffix(".json")
            if stem.isdigit():
                yield int(stem)

    def state(self, index: int, key: str | None, target: Stored, *, checksums: bool) -> State:
        """Return the state of a cell.

        Parameters
        ----------
        key : str or None
            What its key has to be; None: any.
        target : Stored
            Where its data are.
        checksums : bool
            Whether the stored bytes are compared, and not only their number.
        """
        content = self.folder.read(_name(index))
        if content is None:
            return "missing"
        try:
            marker = json.loads(content)
            found, objects, schema = marker["key"], marker["objects"], marker["schema"]
            sizes = {name: None if entry is None else entry[0] for name, entry in objects.items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            # Not written by this library, or damaged itself.
            return "damaged"
        if schema != _SCHEMA or (key is not None and found != key):
            return "other"
        same = target.checksums(index) == objects if checksums else target.sizes(index) == sizes
        return "done" if same else "damaged"


def _name(index: int) -> str:
    # A folder for each thousand: file systems dislike a million entries in one.
    return f"done/{index // 1000:06d}/{index}.json"
