"""Small files beside a target: in a local folder, or wherever fsspec reaches."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Folder", "LocalFolder", "UrlFolder", "is_url", "open_folder"]


class Folder(Protocol):
    """Named contents. Writing one is all or nothing, whoever reads at the same time."""

    def read(self, name: str) -> bytes | None:
        """Return a content, None where there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Put a content, on the disk when this returns."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Put a content unless there is one; whether it was put."""
        ...

    def remove(self, name: str) -> None:
        """Remove a content, if there is one."""
        ...

    def names(self, under: str) -> Iterator[str]:
        """Return the names of all contents under a folder, in no order."""
        ...

    def sweep(self) -> None:
        """Remove what writers that were killed have left; nobody may be writing."""
        ...


def is_url(target: str) -> bool:
    """Whether a target is an URL and not a path."""
    return "://" in target


def open_folder(target: str) -> Folder:
    """Return the folder at a path or URL; it need not exist."""
    return UrlFolder(target) if is_url(target) else LocalFolder(Path(target))


# Names under which files are written before they get their own: here, by zarr, by tensorstore.
_UNFINISHED = re.compile(r".+\.([0-9a-f]{32}\.part|[0-9a-f]{32}\.partial|__lock)", re.DOTALL)


class LocalFolder:
    """A folder of this machine, or of a disk that it shares."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes | None:
        """Return a content; see `Folder`."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Put a content; see `Folder`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _unfinished(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        """Put a content unless there is one; see `Folder`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _unfinished(path)
        try:
            temporary.write_bytes(content)
            # A link is made whole or not at all, and never over another file.
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Remove a content; see `Folder`."""
        with suppress(FileNotFoundError):
            (self.path / name).unlink()

    def names(self, under: str) -> Iterator[str]:
        """Return names; see `Folder`."""
        for folder, _, files in os.walk(self.path / under):
            inner = Path(folder).relative_to(self.path)
            for file in files:
                if not file.endswith(".part"):
                    yield (inner / file).as_posix()

    def sweep(self) -> None:
        """Remove what was left; see `Folder`."""
        for folder, _, files in os.walk(self.path):
            for file in filter(_UNFINISHED.fullmatch, files):
                Path(folder, file).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    # Hidden from whoever reads all files of the folder. The name tells machine and writer apart:
    # two hosts may share the disk.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


class UrlFolder:
    """A place that fsspec reaches. Object stores put an object whole or not at all."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._fs: Any
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return a content; see `Folder`."""
        try:
            content: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put a content; see `Folder`."""
        self._fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Put a content unless there is one, as far as the store can tell; see `Folder`."""
        if self._fs.exists(self._path(name)):
            return False
        self._fs.pipe_file(self._path(name), content)
        return self.read(name) == content

    def remove(self, name: str) -> None:
        """Remove a content; see `Folder`."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def names(self, under: str) -> Iterator[str]:
        """Return names; see `Folder`."""
        root = self._path("")
        try:
            found = self._fs.find(self._path(under))
        except FileNotFoundError:
            return
        start = len(root.lstrip("/"))
        for path in found:
            yield path.lstrip("/")[start:]

    def sweep(self) -> None:
        """Do nothing: what was not put whole is not there; see `Folder`."""


def sync_folder(path: Path) -> None:
    """Have the entries of a folder on the disk, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
