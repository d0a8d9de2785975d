"""Named shared memory: made and removed by one process, mapped by any other.

Not ``multiprocessing.shared_memory``: that hands a segment to the resource tracker of whoever
attaches to it, which then removes it when the reader ends; makes segments without the room for
them; and unmaps them under arrays that still look at them.
"""

from __future__ import annotations

import errno
import mmap
import operator
import os
import re
import secrets
import shutil
import sys
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

if sys.platform == "win32":
    import _winapi
else:
    import _posixshmem  # type: ignore[import-not-found]

__all__ = ["LONGEST_NAME", "Segment", "checked_name", "place_of", "remove_name"]

LONGEST_NAME = 30 if sys.platform == "darwin" else 200
"""So many characters a name may have."""

# The last one is the process's own limit.
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)

# By whom a name was made known to this process's resource tracker last.
_tracked: dict[str, list[int]] = {}

# Whatever goes into one message to every version of the resource tracker.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def checked_name(name: str) -> str:
    """Return a name if shared memory may have it on this system.

    Raises
    ------
    TypeError, ValueError
        If it is no string, or none that can be a name.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name of shared memory is a string, not {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"no name for shared memory: {name!r}; use letters, digits, '_', '-' and '.', "
            f"and begin with a letter, a digit or '_'"
        )
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"a name of shared memory has at most {LONGEST_NAME} characters on this system, "
            f"not {len(name)}: {name!r}"
        )
    return name


class Segment:
    """A piece of memory with a name, which processes share.

    Made by `create` or `attach`. Lasts until the process that made it removes it or ends, also
    where that is killed; what has been mapped stays mapped as long as an array of it is alive.

    Safe to use from several threads.
    """

    def __init__(
        self, name: str, mapping: mmap.mmap, opened: list[int], readonly: bool, creator: int
    ) -> None:
        self.name = name
        """The name, without a leading slash."""
        self.nbytes = len(mapping)
        """Size in bytes; some systems round up what was asked for."""
        self.readonly = readonly
        """Whether its arrays refuse to be written to."""
        # The arrays hold this array and it the mapping, which is never closed by a call: PyPy
        # would unmap it under their eyes.
        self._bytes: np.ndarray[Any, Any] | None = np.frombuffer(mapping, np.uint8)
        _mapped[id(self._bytes)] = self
        # No descriptor is kept; the mapping has one of its own.
        self._identity = _identity(opened)
        self._opened = opened
        self._creator = creator

    def __repr__(self) -> str:
        state = ", closed" if self._bytes is None else ""
        return f"Segment({self.name!r}, {self.nbytes:,} bytes{state})"

    @classmethod
    def create(cls, name: str | None, nbytes: int) -> Segment:
        """Return a new segment of zeros that really has the room.

        Parameters
        ----------
        name : str, optional
            Its name; without it one that nobody else has.
        nbytes : int
            Its size in bytes; at least 1 is taken.

        Raises
        ------
        FileExistsError
            If the name is taken.
        MemoryError
            If there is not so much shared memory.
        """
        size = operator.index(nbytes)
        if size < 0:
            raise ValueError(f"shared memory has a size of 0 bytes or more, not {size}")
        # Short: macOS allows 31 characters, with the slash.
        chosen = f"cellimg-{secrets.token_hex(8)}" if name is None else checked_name(name)
        try:
            return _create(cls, chosen, max(size, 1), own_name=name is None)
        except FileExistsError as error:
            raise FileExistsError(
                errno.EEXIST, "there is shared memory of this name already", chosen
            ) from error
        except OverflowError as error:
            raise MemoryError(_no_room(size, named=name is not None)) from error
        except OSError as error:
            if error.errno in _NO_ROOM or getattr(error, "winerror", 0) in (8, 1455):
                raise MemoryError(_no_room(size, named=name is not None)) from error
            raise

    @classmethod
    def attach(cls, name: str, readonly: bool = False) -> Segment:
        """Return a segment that another process made, and that stays that process's to remove.

        Raises
        ------
        FileNotFoundError
            If there is none of this name.
        PermissionError
            If it belongs to another user.
        """
        checked_name(name)
        try:
            return _attach(cls, name, readonly)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, "there is no shared memory of this name on this host", name
            ) from error

    @property
    def is_creator(self) -> bool:
        """Whether this process made it and has not removed it."""
        return self._creator == os.getpid()

    @property
    def is_removed(self) -> bool:
        """Whether it has been removed and lives only where it is mapped; False if unknown."""
        if sys.platform == "win32":
            # Windows removes it with the last handle.
            return False
        opened: list[int] = []
        try:
            _open(opened, self.name, os.O_RDONLY)
            return _identity(opened) != self._identity
        except FileNotFoundError:
            return True
        except OSError:
            return False
        finally:
            _close(opened)

    def array(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        offset: int = 0,
        order: Any = "C",
        strides: tuple[int, ...] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Return an array that is a part of the memory.

        Parameters
        ----------
        shape : tuple of int
            Its shape, which may be empty or hold 0.
        dtype : dtype
            Its dtype, in any byte order, without Python objects.
        offset : int
            Bytes before it.
        order : {"C", "F"}
            Which axis is contiguous: the last or the first.
        strides : tuple of int, optional
            Bytes between neighbours along each axis, instead of an order.

        Raises
        ------
        ValueError
            If the segment is closed or smaller, or the dtype holds objects.
        """
        whole = self._bytes
        if whole is None:
            raise ValueError(f"the shared memory {self.name!r} is closed")
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise ValueError(f"Python objects cannot lie in shared memory: dtype {dtype}")
        try:
            return np.ndarray(shape, dtype, whole, offset, strides, order)
        except TypeError as error:
            raise ValueError(
                f"an array of shape {shape} and dtype {dtype} at byte {offset} does not fit into "
                f"the {self.nbytes:,} bytes of the shared memory {self.name!r}: {error}"
            ) from error

    def close(self) -> None:
        """Let go of the memory; it stays mapped as long as an array of it is alive."""
        if self._bytes is not None:
            _mapped.pop(id(self._bytes), None)
        self._bytes = None

    def unlink(self) -> None:
        """Remove the name, and the memory with the last process that has it mapped.

        Does so only in the process that made the segment, and not twice. On Windows the memory
        goes with its last handle.
        """
        # Not in a child, which has what its parent made.
        creator, self._creator = self._creator, 0
        if creator != os.getpid():
            self._creator = creator
            return
        if sys.platform != "win32":
            try:
                # Somebody may have removed it, and another process taken the name.
                if not self.is_removed:
                    remove_name(self.name)
                # So may this one.
                if _tracked.get(self.name) is self._opened:
                    del _tracked[self.name]
                    _untrack(self.name)
            except BaseException:
                self._creator = creator
                raise

    def give_away(self) -> None:
        """Leave it to another process to remove; it outlives this one, but on Windows."""
        if self.is_creator:
            self._creator = 0
            if _tracked.get(self.name) is self._opened:
                del _tracked[self.name]
                _untrack(self.name)


_mapped: WeakValueDictionary[int, Segment] = WeakValueDictionary()
"""Segments that are not closed, by what all their arrays are views of."""


def place_of(array: np.ndarray[Any, Any]) -> tuple[str, int] | None:
    """Return where an array lies that is a view of shared memory which others can attach to.

    Returns
    -------
    (str, int) or None
        Name of the segment, and bytes before the array's first element.
    """
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    segment = _mapped.get(id(root))
    if segment is None or segment._bytes is not root or segment.is_removed:
        return None
    return segment.name, array.ctypes.data - root.ctypes.data


def remove_name(name: str) -> bool:
    """Remove shared memory that any process has made; False if there is none of this name."""
    checked_name(name)
    if sys.platform != "win32":
        try:
            _posixshmem.shm_unlink(f"/{name}")
        except FileNotFoundError:
            return False
        return True
    return False


if sys.platform == "win32":

    def _create(cls: type[Segment], name: str, size: int, own_name: bool) -> Segment:
        handle = _winapi.CreateFileMapping(
            _winapi.INVALID_HANDLE_VALUE,
            _winapi.NULL,
            _winapi.PAGE_READWRITE,
            size >> 32,
            size & 0xFFFFFFFF,
            name,
        )
        try:
            if _winapi.GetLastError() == _winapi.ERROR_ALREADY_EXISTS:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            return cls(name, mmap.mmap(-1, size, tagname=name), [], False, os.getpid())
        finally:
            _winapi.CloseHandle(handle)

    def _attach(cls: type[Segment], name: str, readonly: bool) -> Segment:
        # Otherwise mmap would make one.
        handle = _winapi.OpenFileMapping(_winapi.FILE_MAP_READ, False, name)
        try:
            view = _winapi.MapViewOfFile(handle, _winapi.FILE_MAP_READ, 0, 0, 0)
            try:
                size = _winapi.VirtualQuerySize(view)
            finally:
                _winapi.UnmapViewOfFile(view)
            access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
            mapping = mmap.mmap(-1, size, tagname=name, access=access)
        finally:
            _winapi.CloseHandle(handle)
        return cls(name, mapping, [], readonly, 0)

else:

    def _create(cls: type[Segment], name: str, size: int, own_name: bool) -> Segment:
        opened: list[int] = []
        try:
            _open(opened, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # Its tracker removes it where this process is killed.
            _track(name)
            _tracked[name] = opened
            os.ftruncate(opened[0], size)
            _reserve(opened[0], size)
            segment = cls(name, mmap.mmap(opened[0], size), opened, False, os.getpid())
            _close(opened)
            return segment
        except BaseException:
            # Also where it is interrupted: it takes a while.
            made = bool(opened)
            _close(opened)
            if made or own_name:
                remove_name(name)
            if made:
                _tracked.pop(name, None)
                # Known to the tracker or not: now it is, once.
                with suppress(Exception):
                    _track(name)
                    _untrack(name)
            raise

    def _attach(cls: type[Segment], name: str, readonly: bool) -> Segment:
        opened: list[int] = []
        try:
            _open(opened, name, os.O_RDONLY if readonly else os.O_RDWR)
            size = os.fstat(opened[0]).st_size
            if not size:
                raise ValueError(f"the shared memory {name!r} is empty: it is still being made")
            access = mmap.ACCESS_READ if readonly else mmap.ACCESS_WRITE
            segment = cls(name, mmap.mmap(opened[0], size, access=access), opened, readonly, 0)
            _close(opened)
            return segment
        except BaseException:
            _close(opened)
            raise


def _open(opened: list[int], name: str, flags: int) -> None:
    """Open shared memory, and note the descriptor where no interrupt can come between."""
    opened.extend(map(_posixshmem.shm_open, (f"/{name}",), (flags,), (0o600,)))


def _close(opened: list[int]) -> None:
    for descriptor in opened:
        if descriptor >= 0:
            opened[0] = -1
            os.close(descriptor)


def _identity(opened: list[int]) -> tuple[int, int]:
    """Tell a segment from a later one of the same name, where the system can."""
    if not opened:
        return (0, 0)
    status = os.fstat(opened[0])
    return (status.st_dev, status.st_ino)


def _reserve(descriptor: int, size: int) -> None:
    # Without this a segment larger than what is left is made, and writing to it kills. Where it
    # is missing, as on macOS, the memory is swapped.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        # PyPy does not look at the answer. A block of this count has 512 bytes.
        if sys.platform == "linux" and os.fstat(descriptor).st_blocks * 512 < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _track(name: str) -> None:
    from multiprocessing import resource_tracker

    resource_tracker.register(f"/{name}", "shared_memory")


def _untrack(name: str) -> None:
    from multiprocessing import resource_tracker

    resource_tracker.unregister(f"/{name}", "shared_memory")


def _no_room(nbytes: int, named: bool) -> str:
    free = ""
    if os.path.isdir("/dev/shm"):  # noqa: PTH112 - a question, not a path to work on
        free = f"; /dev/shm has {shutil.disk_usage('/dev/shm').free:,} bytes left"
    instead = (
        "remove what nobody needs (cellimg shared ls)"
        if named
        else "use smaller cells or fewer workers"
    )
    return (
        f"no room for {nbytes:,} bytes of shared memory{free}: {instead}, or give the container "
        f"more (docker run --shm-size)"
    )
