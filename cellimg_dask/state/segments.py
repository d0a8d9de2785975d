"""Named shared memory: made, filled and removed by one process, seen by others."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

__all__ = [
    "attach_segment",
    "create_segment",
    "detach_segment",
    "is_removed",
    "remove_segment",
]

_tracking = threading.Lock()

# The last one is the process's own limit.
_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


def create_segment(nbytes: int) -> SharedMemory:
    """Return a new segment of at least ``nbytes`` bytes that really has that room.

    Raises
    ------
    MemoryError
        If there is not so much shared memory.
    """
    # Short: macOS allows 31 characters.
    name = f"cellimg-{secrets.token_hex(8)}"
    try:
        segment = SharedMemory(name, create=True, size=max(nbytes, 1))
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _full(nbytes) from error
        raise
    except BaseException:
        # Interrupted. Opened anew it is known to the tracker, made or not.
        with suppress(OSError, ValueError):
            remove_segment(SharedMemory(name))
        raise
    # Without this a segment larger than what is left is made, and writing to it kills.
    descriptor = getattr(segment, "_fd", -1)
    if hasattr(os, "posix_fallocate") and descriptor >= 0:
        try:
            os.posix_fallocate(descriptor, 0, max(nbytes, 1))
        except BaseException as error:
            # Also where it is interrupted: it takes a while.
            remove_segment(segment)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise _full(nbytes) from error
            raise
    return segment


def attach_segment(name: str) -> SharedMemory:
    """Return a segment that another process made, and that stays that process's to remove."""
    # Before Python 3.13 attaching registers the segment with this process's resource tracker,
    # which then removes it when this process ends.
    with _tracking:
        register = resource_tracker.register
        resource_tracker.register = lambda *_: None
        try:
            return SharedMemory(name=name)
        finally:
            resource_tracker.register = register


def is_removed(segment: SharedMemory) -> bool:
    """Whether the process that made a segment has removed it; False where nobody can tell."""
    descriptor = getattr(segment, "_fd", -1)
    return descriptor >= 0 and os.fstat(descriptor).st_nlink == 0


def detach_segment(segment: SharedMemory) -> None:
    """Let go of a segment; its memory stays mapped as long as an array of it is alive."""
    try:
        segment.close()
    except BufferError:
        # Somebody still looks at it. The mapping ends with the last view; what is left of the
        # handle is the descriptor.
        segment._mmap = None  # type: ignore[attr-defined]
        segment._buf = None  # type: ignore[attr-defined]
        segment.close()


def remove_segment(segment: SharedMemory) -> None:
    """Remove a segment that this process made, and let go of it."""
    with suppress(FileNotFoundError):
        segment.unlink()
    detach_segment(segment)


def _full(nbytes: int) -> MemoryError:
    free = ""
    if os.path.isdir("/dev/shm"):  # noqa: PTH112 - a question, not a path to work on
        free = f"; /dev/shm has {shutil.disk_usage('/dev/shm').free:,} bytes left"
    return MemoryError(
        f"no room for {nbytes:,} bytes of shared memory{free}: use smaller cells or fewer "
        f"workers, or give the container more (docker run --shm-size)"
    )
