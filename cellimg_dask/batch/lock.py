"""One run at a time on a target."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType

from cellimg_dask.batch.folder import Folder, LocalFolder
from cellimg_dask.blocks.errors import CellimgError

__all__ = ["RunLock", "TargetInUseError"]

_NAME = "lock.json"
_BEAT_S = 5.0
_STALE_S = 60.0


class TargetInUseError(CellimgError, FileExistsError):
    """Another run works on the target."""


class RunLock:
    """Held while a run works on a target; a context manager.

    In a local folder the system's own file lock decides, which ends with the process. Elsewhere
    an entry is renewed every few seconds, and counts as left behind after a minute without.
    """

    def __init__(self, folder: Folder, where: str) -> None:
        self._folder = folder
        self._where = where
        self._token = uuid.uuid4().hex
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        if isinstance(self._folder, LocalFolder) and os.name == "posix":
            self._lock_file(self._folder)
        else:
            self._take()
            self._beating = threading.Thread(target=self._beat, name="cellimg-lock", daemon=True)
            self._beating.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            # The file stays: to remove it would let two others lock different files.
            os.close(self._descriptor)
            self._descriptor = None
            return
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        if self._holder().get("token") == self._token:
            self._folder.remove(_NAME)

    def _lock_file(self, folder: LocalFolder) -> None:
        import fcntl

        path = folder.path / _NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, 0)
            os.write(descriptor, self._entry())
        except BlockingIOError:
            os.close(descriptor)
            raise self._in_use(self._holder()) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _take(self) -> None:
        if self._folder.create(_NAME, self._entry()):
            return
        holder = self._holder()
        beat = holder.get("beat", 0)
        if isinstance(beat, (int, float)) and time.time() - beat < _STALE_S:
            raise self._in_use(holder)
        self._folder.write(_NAME, self._entry())
        if self._holder().get("token") != self._token:
            raise self._in_use(self._holder())

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            # A store that fails for a moment is no reason to end a run.
            with suppress(OSError):
                self._folder.write(_NAME, self._entry())

    def _entry(self) -> bytes:
        entry = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat": time.time(),
        }
        return json.dumps(entry).encode()

    def _holder(self) -> dict[str, object]:
        try:
            found = json.loads(self._folder.read(_NAME) or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _in_use(self, holder: dict[str, object]) -> TargetInUseError:
        return TargetInUseError(
            f"another run works on {self._where} (process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}): wait for it, or give another target"
        )
