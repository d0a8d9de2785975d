"""Where a file or a store is, on this machine or elsewhere, and reading small files there."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cellimg_dask.io.optional import optional

__all__ = ["Location", "UnreadableError", "locate"]

# What file systems raise for something that is not there.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, KeyError)


class UnreadableError(ValueError):
    """A file or folder holds no image, or none that is meant; the message says it all."""


class Location:
    """A path of this machine, or a URL that fsspec reaches.

    Pickled as its URL. Nothing is opened before something is read.
    """

    def __init__(self, url: str, options: Mapping[str, Any], *, is_local: bool) -> None:
        self.url = url
        """Absolute path of this machine, or URL."""
        self.options = dict(options)
        """For the file system."""
        self.is_local = is_local
        self._found: tuple[Any, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _located, (self.url, self.options, self.is_local)

    def __repr__(self) -> str:
        return f"Location({self.url!r})"

    @property
    def path(self) -> Path:
        """The path of this machine."""
        assert self.is_local
        return Path(self.url)

    @property
    def last_name(self) -> str:
        """The last part of the path."""
        place = self.url if self.is_local else urlsplit(self.url.split("::")[-1]).path
        return place.replace(os.sep, "/").rstrip("/").rpartition("/")[2] or self.url

    def below(self, name: str) -> Location:
        """Return the place of something in this folder; a file name or several with ``/``."""
        if not name:
            return self
        if self.is_local:
            return Location(str(self.path / name), self.options, is_local=True)
        first, *rest = self.url.split("::")
        if "://" not in first:
            # An archive, by its protocol only.
            first += "://"
        joined = first + name if first.endswith("/") else f"{first}/{name}"
        return Location("::".join([joined, *rest]), self.options, is_local=False)

    def filesystem(self) -> tuple[Any, str]:
        """Return the file system of fsspec, and the path there."""
        if self._found is None:
            fsspec = optional("fsspec", f"reading {self.url}")
            self._found = fsspec.core.url_to_fs(self.url, **self.options)
        return self._found

    def _there(self, name: str) -> tuple[Any, str]:
        system, path = self.filesystem()
        if not name:
            return system, path
        return system, name if not path else f"{path.rstrip('/')}/{name}"

    def read(self, name: str = "", stop: int | None = None) -> bytes | None:
        """Return the bytes of a file, here or below, up to ``stop``; None where there is none."""
        if self.is_local:
            try:
                with (self.path / name).open("rb") as file:
                    return file.read(-1 if stop is None else stop)
            except _ABSENT:
                return None
        system, path = self._there(name)
        try:
            found: bytes = system.cat_file(path, start=None if stop is None else 0, end=stop)
        except _ABSENT:
            return None
        except ValueError:
            if stop is None:
                raise
            # Some servers do not give parts, and some refuse a part that is longer than the file.
            return self.read(name)
        except (OSError, ImportError):
            raise
        except Exception as error:
            # What a server answers: that one may not, that it has broken down.
            raise OSError(
                f"cannot read {self.below(name).url}: {type(error).__name__}: {error}"
            ) from error
        return found[:stop]

    def read_part(self, start: int, stop: int) -> bytes:
        """Return some bytes of this file, fewer where it ends before."""
        if self.is_local:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        system, path = self.filesystem()
        found: bytes = system.cat_file(path, start=start, end=stop)
        # Some servers give the whole whatever part one asks for.
        return found if len(found) <= stop - start else found[start:stop]

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of files below, of those that are there."""
        if self.is_local:
            each = {name: self.read(name) for name in names}
            return {name: data for name, data in each.items() if data is not None}
        system, _ = self.filesystem()
        paths = {self._there(name)[1]: name for name in names}
        found = {}
        for path, data in system.cat(list(paths), on_error="return").items():
            if not isinstance(data, Exception):
                found[paths[path]] = data
            elif not isinstance(data, _ABSENT):
                raise data
        return found

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object that a JSON file holds; None where there is no such file.

        Raises
        ------
        ValueError
            If it holds anything else.
        """
        data = self.read(name)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except ValueError as error:
            raise UnreadableError(f"{self.below(name).url} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise UnreadableError(
                f"{self.below(name).url} must hold an object of JSON, it holds a "
                f"{type(found).__name__}"
            )
        return found

    def has(self, name: str) -> bool:
        """Whether there is a file in this folder."""
        if self.is_local:
            return (self.path / name).is_file()
        return self.read(name, 1) is not None

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted; none where they are not told."""
        if self.is_local:
            if not self.path.is_dir():
                return []
            return sorted(item.name for item in self.path.iterdir() if item.is_dir())
        system, path = self.filesystem()
        try:
            found = system.ls(path, detail=True)
        except Exception:
            # HTTP servers need not list anything; the object stores that do not, say so variously.
            return []
        names = (item["name"].rstrip("/") for item in found if item["type"] == "directory")
        return sorted({name.rpartition("/")[2] for name in names} - {""})

    def names(self) -> list[str]:
        """Return the names of the files and folders in this archive, sorted."""
        system, path = self.filesystem()
        found = system.ls(path, detail=False)
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found} - {""})

    def nbytes(self, name: str = "") -> int | None:
        """Return the bytes of a file or of all files below a folder; None where unknown."""
        if self.is_local:
            place = self.path / name
            if place.is_file():
                return place.stat().st_size
            return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        system, path = self._there(name)
        try:
            return int(system.size(path)) if system.isfile(path) else int(system.du(path))
        except Exception:
            return None

    def open(self) -> Any:
        """Return an open file that can be sought in."""
        if self.is_local:
            return self.path.open("rb")
        system, path = self.filesystem()
        file = system.open(path, "rb")
        if isinstance(file, io.BytesIO):
            # In memory, and one for everybody with one position.
            return io.BufferedReader(io.BytesIO(file.getvalue()))
        if file.seekable():
            # Without a way to write.
            return io.BufferedReader(file)
        # A server that gives no parts.
        with file:
            return io.BufferedReader(io.BytesIO(file.read()))


def locate(place: Any, options: Mapping[str, Any] | None = None) -> Location:
    """Return where something is.

    Parameters
    ----------
    place : str or path
        A path, made absolute, ``~`` being one's home, or a URL such as ``"https://…"``,
        ``"s3://…"``, ``"memory://…"``, ``"file://…"`` or ``"zip::https://…"``.
    options : mapping, optional
        For the file system of fsspec.
    """
    is_path = isinstance(place, os.PathLike)
    place = os.fspath(place) if is_path else place
    if not isinstance(place, str):
        hint = "; an array needs no opening" if hasattr(place, "shape") else ""
        raise TypeError(f"expected a path or a URL, got {type(place).__name__}{hint}")
    if not place:
        raise ValueError("expected a path or a URL, got an empty text")
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"storage_options must be a mapping, got {type(options).__name__}")
    if place.startswith("file://"):
        place = unquote(urlsplit(place).path)
    # Names of files may hold two colons.
    chained = "::" in place and not is_path and not os.path.lexists(place)
    if "://" in place or chained:
        return Location(place, options or {}, is_local=False)
    place = os.path.abspath(os.path.expanduser(place))  # noqa: PTH100, PTH111
    return Location(place, options or {}, is_local=True)


def _located(url: str, options: Mapping[str, Any], is_local: bool) -> Location:
    return Location(url, options, is_local=is_local)
