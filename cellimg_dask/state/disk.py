"""Computed cells that outlive the process: files in a folder, by content key."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import as_int

__all__ = ["DiskCells"]

_MAGIC = b"cellimg1"
_DIGEST_BYTES = 16
# Room is made for more than the next cell, so that the folder is not listed for each.
_KEPT_SHARE = 0.9
_FORSAKEN_S = 3600.0


class DiskCells:
    """Cells in files, shared by any number of processes.

    A file is one cell: a checksum and NumPy's own format, without pickles. Files appear whole or
    not at all. A file that is damaged is removed and counts as absent. When the folder exceeds
    its bound the files unused for longest go.

    Parameters
    ----------
    folder : path
        Where; made with mode 0700 if it is not there.
    max_bytes : int
        Bound on the bytes of all files.

    Raises
    ------
    PermissionError
        If others can write to the folder: what they put there would be taken for results.

    Notes
    -----
    Thread-safe, and safe between processes.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        """Where the files are."""
        self.max_bytes = as_int(max_bytes, "max_disk_bytes", minimum=0)
        """Bound on the bytes of all files."""
        self._lock = threading.Lock()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.stat()
        if os.name == "posix" and (
            found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022
        ):
            raise PermissionError(
                f"{self.folder} can be written by others, whose files would be taken for results: "
                f"give a folder of your own, with mode 0700"
            )
        for part in self.folder.glob("??/*.part"):
            # Left behind by a process that was killed, unless it is just being written.
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _FORSAKEN_S:
                    part.unlink()
        self._bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> NDArray[Any] | None:
        """Return a cell as a new array, or None if it is not there or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        start = len(_MAGIC) + _DIGEST_BYTES
        payload = memoryview(content)[start:]
        if content[:start] != _MAGIC + _digest(key, payload):
            self._remove(path, len(content))
            return None
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
        with suppress(OSError):
            # What is used stays.
            os.utime(path)
        return array

    def put(self, key: str, array: NDArray[Any]) -> None:
        """Keep a cell; `OSError` if it cannot be written."""
        buffer = io.BytesIO()
        np.lib.format.write_array(
            buffer, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False
        )
        payload = buffer.getbuffer()
        size = len(_MAGIC) + _DIGEST_BYTES + len(payload)
        if size > self.max_bytes:
            return
        self._make_room(size)
        path = self._path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        try:
            with temporary.open("wb") as file:
                file.write(_MAGIC + _digest(key, payload))
                file.write(payload)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        with self._lock:
            self._bytes += size

    def clear(self) -> None:
        """Remove all cells."""
        for path, size, _ in self._files():
            self._remove(path, size)

    @property
    def bytes(self) -> int:
        """Bytes of all files, as far as this process knows."""
        return self._bytes

    def __reduce__(self) -> tuple[type[DiskCells], tuple[str, int]]:
        return DiskCells, (str(self.folder), self.max_bytes)

    def __repr__(self) -> str:
        return f"DiskCells({str(self.folder)!r}, max_bytes={self.max_bytes})"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.cell"

    def _files(self) -> list[tuple[Path, int, int]]:
        """Return path, size and time of last use of each file."""
        found = []
        for path in self.folder.glob("??/*.cell"):
            with suppress(OSError):
                facts = path.stat()
                found.append((path, facts.st_size, facts.st_mtime_ns))
        return found

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._bytes + size <= self.max_bytes:
                return
            # Other processes write and remove as well.
            files = sorted(self._files(), key=lambda file: file[2])
            self._bytes = sum(each for _, each, _ in files)
        for path, each, _ in files:
            if self._bytes + size <= _KEPT_SHARE * self.max_bytes:
                break
            self._remove(path, each)

    def _remove(self, path: Path, size: int) -> None:
        try:
            path.unlink()
        except FileNotFoundError:
            # Another process was quicker.
            return
        with self._lock:
            self._bytes = max(0, self._bytes - size)


def _digest(key: str, payload: memoryview) -> bytes:
    # With the key, so that a file under another's name is not taken for it.
    hashed = hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES)
    hashed.update(payload)
    return hashed.digest()
