"""One run at a time on a target, and no writer that outlives its run."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TypeGuard

from cellimg_dask.batch.folder import Folder, LocalFolder
from cellimg_dask.blocks.errors import CellimgError

__all__ = ["Permit", "RunLock", "TargetInUseError"]

_NAME = "lock.json"
_PERMIT = "permit"
_NOBODY = "0" * 32
_BEAT_S = 5.0
_STALE_S = 60.0
# How long writers of a run that has ended may take for the cell that they are storing.
_WRITERS_S = 60.0
_LOOK_EVERY_S = 0.01


class TargetInUseError(CellimgError, FileExistsError):
    """Another run works on the target."""


class RunLock:
    """Held while a run works on a target; a context manager.

    In a local folder the system's own file lock decides, which ends with the process. Elsewhere
    an entry is renewed every few seconds, and counts as left behind after a minute without.

    Workers may outlive their run: threads and tasks that nobody waits for any more, and workers
    of a cluster whose client was killed. Once this is entered, and again once it is left, none
    of them writes to the target.
    """

    def __init__(self, folder: Folder, where: str) -> None:
        self._folder = folder
        self._where = where
        self._token = uuid.uuid4().hex
        self.permit = Permit(folder, where, self._token)
        """What the run's workers write with."""
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        if _has_file_locks(self._folder):
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
            assert isinstance(self._folder, LocalFolder)
            try:
                # Whoever still stores a cell after that is waited for by the next run.
                with suppress(TargetInUseError):
                    self._admit(self._folder, _NOBODY)
            finally:
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
            self._admit(folder, self._token)
        except BlockingIOError:
            os.close(descriptor)
            raise self._in_use(self._holder()) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _admit(self, folder: LocalFolder, token: str) -> None:
        """Let those write who have a token, and wait until the others have stopped."""
        import fcntl

        descriptor = os.open(folder.path / _PERMIT, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # First the token, so that no writer begins, and then the wait for those that have.
            os.pwrite(descriptor, token.encode(), 0)
            deadline = time.monotonic() + _WRITERS_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TargetInUseError(
                            f"a worker of an earlier run has been storing a cell of {self._where} "
                            f"for {_WRITERS_S:g} s: wait for it, or end it"
                        ) from None
                time.sleep(_LOOK_EVERY_S)
        finally:
            os.close(descriptor)

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
        return _holder(self._folder)

    def _in_use(self, holder: dict[str, object]) -> TargetInUseError:
        return TargetInUseError(
            f"another run works on {self._where} (process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}): wait for it, or give another target"
        )


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to write to a target, for as long as the run lasts. It travels to the workers.

    In a local folder it is sure: a run that begins or ends waits for the cells that are being
    stored at that moment. Elsewhere it is as good as the store: what was begun may be finished.
    """

    folder: Folder
    """Of the run's lock."""
    where: str
    """The target."""
    token: str
    """Tells the run from others."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold this while a cell is stored.

        Raises
        ------
        TargetInUseError
            If the run has ended, or another one has taken over.
        """
        if not _has_file_locks(self.folder):
            self._check(_holder(self.folder).get("token"))
            yield
            return
        import fcntl

        descriptor = os.open(self.folder.path / _PERMIT, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._check(os.read(descriptor, len(_NOBODY)).decode("ascii", "replace"))
            yield
        finally:
            os.close(descriptor)

    def _check(self, found: object) -> None:
        if found != self.token:
            raise TargetInUseError(
                f"the run that this worker belongs to has ended, or another one has taken over "
                f"{self.where}: the worker stores nothing more"
            )


def _has_file_locks(folder: Folder) -> TypeGuard[LocalFolder]:
    return isinstance(folder, LocalFolder) and os.name == "posix"


def _holder(folder: Folder) -> dict[str, object]:
    try:
        found = json.loads(folder.read(_NAME) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
