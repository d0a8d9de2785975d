"""Which names of shared memory there may be.

Linux shows shared memory as files. Elsewhere nothing does, so there an empty file in a folder for
temporary files stands for each name; whoever looks one up sees whether it is still true.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .segments import checked_name

__all__ = ["forget_name", "note_name", "noted_names"]

_SHOWN = Path("/dev/shm")


def note_name(name: str) -> None:
    """Remember a name that this process has made."""
    if not _SHOWN.is_dir():
        # Without a note there is the memory all the same.
        with suppress(OSError):
            folder = _folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / name).touch()


def forget_name(name: str) -> None:
    """Forget a name that is gone."""
    if not _SHOWN.is_dir():
        with suppress(OSError):
            (_folder() / name).unlink()


def noted_names() -> list[str]:
    """Return the names that there may be, sorted; those of other programs too."""
    names = []
    with suppress(OSError):
        for name in os.listdir(_SHOWN if _SHOWN.is_dir() else _folder()):  # noqa: PTH208 - names
            with suppress(ValueError):
                names.append(checked_name(name))
    return sorted(names)


def _folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return Path(tempfile.gettempdir()) / f"cellimg-shared-{user}"
