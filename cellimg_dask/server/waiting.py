"""Cells that readers of a server wait for: computed while they wait, dropped when they go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any, TypeAlias

from numpy.typing import NDArray

from cellimg_dask.blocks.errors import describe
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.server.answers import Answer, plain
from cellimg_dask.server.chunks import ServedArray
from cellimg_dask.server.gate import Gate
from cellimg_dask.server.work import Work

__all__ = ["Receive", "Waiting"]

Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]

_ELSEWHERE = 64
"""Cells that workers elsewhere are asked for at a time; each takes a thread here."""
_READERS = 8
"""Cells of arrays that are read at a time, also while all threads compute."""

# Requests of all servers: whoever asks last is served first.
_priorities = count(-1, -1)


class Waiting:
    """The cells that readers of a server wait for.

    Parameters
    ----------
    work : Work
        Is told of all of them.
    at_most : int
        So many are waited for at a time.
    """

    def __init__(self, work: Work, at_most: int) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        """What is waited for."""
        self.closed = False
        """Whether nothing more is begun."""
        self._work = work
        self._at_most = at_most
        # Where each request takes a thread.
        self._gate = Gate(_ELSEWHERE)
        self._reading = Gate(_READERS)
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End all with an error, and begin no more."""
        self.closed = True
        for task in list(self.tasks):
            # The loop may have ended.
            with suppress(RuntimeError):
                task.get_loop().call_soon_threadsafe(task.cancel)
        pool, self._pool = self._pool, None
        if pool is not None:
            # What hangs is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    def threads(self) -> ThreadPoolExecutor:
        """Return the threads that read arrays and compress."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_READERS)
        return self._pool

    async def compute(
        self, receive: Receive, name: str, array: ServedArray, index: int
    ) -> tuple[NDArray[Any], CellLoader] | Answer | None:
        """Compute a cell; return it and the edition it was asked of, or why there is none.

        None where whoever asked has gone; then nobody computes it, unless it has begun.
        """
        if self.closed:
            return plain(503, "the server is closing\n")
        if len(self.tasks) >= self._at_most:
            self._work.num_refused += 1
            return plain(503, "too many requests\n", [(b"retry-after", b"1")])
        loop = asyncio.get_running_loop()
        loading = loop.create_task(self._load(array, index))
        gone = loop.create_task(_until_gone(receive))
        # Until it has let go of its request.
        self.tasks.add(loading)
        loading.add_done_callback(self.tasks.discard)
        self._work.begin(array, index)
        try:
            await asyncio.wait((loading, gone), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                self._work.num_cancelled += 1
                return None
            return self._outcome(loading, name, array, index)
        finally:
            # They cancel what they wait for.
            gone.cancel()
            loading.cancel()
            self._work.end(array, index)

    def _outcome(
        self,
        loading: asyncio.Task[tuple[NDArray[Any], CellLoader]],
        name: str,
        array: ServedArray,
        index: int,
    ) -> tuple[NDArray[Any], CellLoader] | Answer:
        if loading.cancelled():
            return plain(503, "the server is closing\n")
        error = loading.exception()
        if error is None:
            self._work.succeeded(array, index)
            return loading.result()
        if isinstance(error, CancelledError):
            return plain(503, "the computation was cancelled\n")
        text = describe(error)
        self._work.failed(name, array, index, text)
        return plain(500, text + "\n")

    async def _load(self, array: ServedArray, index: int) -> tuple[NDArray[Any], CellLoader]:
        if array.only_reads:
            loop = asyncio.get_running_loop()
            async with self._reading:
                return await loop.run_in_executor(self.threads(), _read, array, index)
        if array.elsewhere:
            async with self._gate:
                return await _load(array, index)
        return await _load(array, index)


def _read(array: ServedArray, index: int) -> tuple[NDArray[Any], CellLoader]:
    """Return a cell of an array, read on this thread, and the edition that it is of."""
    # Whoever looks at data does not wait for threads that compute.
    loader = array.image.loader
    return array.image.load(index), loader


async def _load(array: ServedArray, index: int) -> tuple[NDArray[Any], CellLoader]:
    """Compute a cell; return it, and the edition that it is of."""
    image = array.image
    while True:
        loader = image.loader
        request = image.request(array.roi(index), priority=next(_priorities))
        if image.loader is loader:
            break
    try:
        return await request, loader
    except asyncio.CancelledError:
        raise
    except BaseException as raised:
        # With function, cell and cause, where it is a block's.
        error = request.error or raised
        if not isinstance(error, Exception):
            # A block that ends its thread does not end this one.
            error = RuntimeError(describe(error))
    try:
        raise error
    finally:
        # The error holds this frame.
        del error


async def _until_gone(receive: Receive) -> None:
    """Return when whoever asked has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
