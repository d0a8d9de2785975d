"""Who owns something, and whether that process still lives."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

__all__ = ["is_alive", "namespace", "start_of"]

# Of Windows: may be waited for; and the wait took too long.
_SYNCHRONIZE = 0x00100000
_WAIT_TIMEOUT = 0x102


def start_of(pid: int) -> str | None:
    """Return when a process began, so that a later one with its number is told from it.

    Returns
    -------
    str or None
        Whatever the system calls that moment; None if there is no such process, it has ended
        and waits for its parent, or the system does not tell.
    """
    if sys.platform == "win32":
        return None
    if os.path.isdir("/proc/self"):  # noqa: PTH112 - a question, not a path to work on
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
                # The name stands in brackets and may hold anything.
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in ("Z", "X") else fields[19]
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            timeout=10,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
        return told.stdout.strip() or None
    return None


def namespace() -> str | None:
    """Return what numbers of processes refer to; containers that share memory may differ in it."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path, but a name
    return None


def is_alive(pid: int, start: str | None, space: str | None) -> bool | None:
    """Whether a process still lives, given its number, `start_of` it and its `namespace`.

    Returns
    -------
    bool or None
        None if it cannot be seen from here.
    """
    if space != namespace():
        return None
    if sys.platform == "win32":
        return _is_alive_on_windows(pid)
    found = start_of(pid)
    if found is not None and start is not None:
        return found == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Somebody else's by now, or hidden.
        return None
    # It is there, but has no start any more: it has ended, and its parent has not looked.
    return start is None


if sys.platform == "win32":

    def _is_alive_on_windows(pid: int) -> bool:
        import _winapi

        try:
            handle = _winapi.OpenProcess(_SYNCHRONIZE, False, pid)
        except OSError:
            return False
        try:
            return _winapi.WaitForSingleObject(handle, 0) == _WAIT_TIMEOUT
        finally:
            _winapi.CloseHandle(handle)
