"""`Request`: a region that is computed in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cellimg_dask.blocks.errors import BlockError, CellimgError, SourceChangedError
from cellimg_dask.geometry import Roi, as_int, parse_index
from cellimg_dask.loading.board import CellCounts, Job, JobState, begin, begin_with, must_help
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.node import ImageNode

if TYPE_CHECKING:
    import asyncio

__all__ = ["Request", "request"]

_log = logging.getLogger("cellimg_dask")


class Request:
    """A region that is computed in the background; made by ``image.request(region)``.

    It goes on when the handle is dropped. Cells that several requests want are computed once.
    Requests of a lower priority number go first, among equals the older one; a cell that is
    wanted again more urgently is raised. In asyncio, ``await request`` gives the result.

    Notes
    -----
    Thread-safe, and usable inside block functions and callbacks: there, whoever waits computes
    what is left himself, so that nothing depends on a free thread.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> image = ci.map_cells(np.negative, np.arange(16).reshape(4, 4), cell_shape=2)
    >>> request = image.request(np.s_[0, :3])
    >>> request.result()
    array([ 0, -1, -2])
    >>> request.state, request.progress
    ('done', CellCounts(pending=0, running=0, done=2))
    >>> out = np.zeros((2, 4))
    >>> image.request(np.s_[2:]).write_into(out, np.s_[:]) is out
    True
    """

    def __init__(
        self,
        job: Job,
        roi: Roi,
        dropped: tuple[int, ...],
        again: Callable[[Job], Job | None],
    ) -> None:
        self._job = job
        self._again = again
        self._lock = threading.Lock()
        self.roi = roi
        """The region."""
        self._dropped = dropped
        self._key = tuple(0 if axis in dropped else slice(None) for axis in range(roi.ndim))
        self._raised: tuple[BaseException, TracebackType | None] | None = None

    # ------------------------------------------------------------------ how far it is

    @property
    def state(self) -> JobState:
        """What has become of it; "pending" until the first cell is begun."""
        while self._begun_again(job := self._job):
            pass
        return job.state()

    @property
    def progress(self) -> CellCounts:
        """How many cells are pending, running and done; when it is over, as it ended.

        On a cluster what has not come yet counts as pending.
        """
        return self._job.progress()

    @property
    def error(self) -> BaseException | None:
        """Why it failed: a `BlockError` where a block function raised; None if it has not."""
        return self._job.error

    def __repr__(self) -> str:
        counts = self.progress
        return f"<Request {self.state}, {counts.done} of {sum(counts)} cells>"

    # ------------------------------------------------------------------ waiting

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over: done, failed or cancelled.

        Parameters
        ----------
        timeout : float, optional
            Seconds. Inside a block function a cell that is being computed is finished first.

        Returns
        -------
        bool
            False if it is not over after ``timeout``.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            job = self._job
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not job.wait(left):
                return False
            if not self._begun_again(job):
                return True

    def _begun_again(self, job: Job) -> bool:
        """Whether a job that is over is not the end of it.

        If the store of a source was written to meanwhile, the region is computed again, all of
        it, from what there is now.
        """
        if not isinstance(job.error, SourceChangedError):
            return False
        with self._lock:
            if self._job is job:
                again = self._again(job)
                if again is None:
                    return False
                self._job = again
        return True

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the region and return it, as ``image[region]`` would; None for a prefetch.

        Raises
        ------
        Exception
            What a block function raised, with a note that names function, cell and region; its
            `BlockError` is in ``error``. Other errors, such as a `ReadError`, as they are.
        concurrent.futures.CancelledError
            If the request was cancelled.
        TimeoutError
            If it is not over after ``timeout`` seconds.
        """
        raised = self._outcome(timeout)
        if raised is not None:
            try:
                # Raised again and again, it does not grow.
                raise raised[0].with_traceback(raised[1])
            finally:
                # The error holds this frame.
                del raised, self
        out = self._job.out
        return out if out is None or not self._dropped else out[self._key]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return what `result` would raise, None if nothing.

        Raises
        ------
        concurrent.futures.CancelledError, TimeoutError
            As `result`.
        """
        raised = self._outcome(timeout)
        return None if raised is None else raised[0]

    def _outcome(self, timeout: float | None) -> tuple[BaseException, TracebackType | None] | None:
        if not self.wait(timeout):
            raise TimeoutError(f"{self!r} is not over after {timeout:g} s")
        if self._job.end == "cancelled":
            raise CancelledError("the request was cancelled")
        error = self._job.error
        if error is None:
            return None
        if self._raised is None:
            cause = _original(error)
            self._raised = cause, cause.__traceback__
        return self._raised

    def write_into(self, out: Any, region: Any = ...) -> Any:
        """Wait for the region, write it into an array, and return that array.

        Parameters
        ----------
        out : array
            Writable, of a dtype that holds the image's; a NumPy array, or anything with
            ``shape``, ``dtype`` and ``__setitem__``, such as a zarr array.
        region : Roi or index expression, optional
            Where in ``out``; default: all of it.

        Raises
        ------
        TypeError, ValueError, IndexError
            At once, if ``out`` or ``region`` do not fit.
        Exception
            What `result` raises.
        """
        place = self._place_in(out, region)
        value = self.result()
        if not isinstance(out, np.ndarray):
            value = np.asarray(value).astype(_dtype_of(out), copy=False)
        out[place] = value
        return out

    def _place_in(self, out: Any, region: Any) -> tuple[int | slice, ...]:
        """Check that the result can be written, and return where to."""
        missing = [name for name in ("shape", "dtype", "__setitem__") if not hasattr(out, name)]
        if missing:
            raise TypeError(
                f"out must be an array that can be written, got {type(out).__name__}, which has "
                f"no {' and no '.join(missing)}; give a NumPy or zarr array"
            )
        if self._job.is_prefetch:
            raise ValueError("a prefetch keeps no result; use image.request(region).write_into")
        wanted = tuple(
            extent for axis, extent in enumerate(self.roi.shape) if axis not in self._dropped
        )
        box, dropped = parse_index(region, tuple(int(extent) for extent in out.shape))
        shape = tuple(extent for axis, extent in enumerate(box.shape) if axis not in dropped)
        if shape != wanted:
            where = "out has" if region is ... else "this region of out has"
            raise ValueError(
                f"{where} shape {shape}, expected {wanted}, that of the request; give "
                f"np.empty({wanted}, {str(self._job.loader.dtype)!r}), or a region= of that shape"
            )
        dtype = _dtype_of(out)
        if not np.can_cast(self._job.loader.dtype, dtype, "safe"):
            raise ValueError(
                f"out has dtype {dtype}, which cannot hold {self._job.loader.dtype}; give an array "
                f"of that dtype, or convert result() with astype"
            )
        if not _is_writable(out):
            raise ValueError(f"out, a {type(out).__name__}, is read-only; give a writable array")
        return tuple(
            low if axis in dropped else slice(low, high)
            for axis, (low, high) in enumerate(zip(box.start, box.stop, strict=True))
        )

    def __await__(self) -> Generator[Any, None, Any]:
        if must_help():
            self.wait()
        while self._job.end is None or self._begun_again(self._job):
            job = self._job
            import asyncio

            loop = asyncio.get_running_loop()
            over = loop.create_future()

            def wake(over: asyncio.Future[None] = over) -> None:
                if not over.done():
                    over.set_result(None)

            def tell(
                loop: asyncio.AbstractEventLoop = loop, wake: Callable[[], None] = wake
            ) -> None:
                # The loop may have been closed.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(wake)

            job.when_over(tell)
            try:
                yield from over
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self.result()

    # ------------------------------------------------------------------ steering

    def add_done_callback(self, callback: Callable[[Request], object]) -> None:
        """Call ``callback(request)`` once, when it is over; at once, here, if it is.

        It is called by the thread that ends the request. An exception is logged.
        """
        job = self._job
        job.when_over(partial(self._over, job, callback))

    def _over(self, job: Job, callback: Callable[[Request], object]) -> None:
        if self._begun_again(job):
            self.add_done_callback(callback)
        else:
            _call_back(callback, self)

    def cancel(self) -> CellCounts:
        """Cancel it: drop the cells that nobody has begun, unless another request wants them.

        Those that are being computed end by themselves, and are kept in the cache. Whoever waits
        gets a ``CancelledError``.

        Returns
        -------
        CellCounts
            How many cells were pending and running, and how many are done; of a request that is
            over, only how many are done.
        """
        return self._job.cancel()


def request(node: ImageNode, key: Any, number: Any, cache: str, *, keep: bool = True) -> Request:
    """Request a region; see `CellImg.request`."""
    loader: CellLoader = node.now
    roi, dropped = parse_index(key, loader.grid.shape)
    urgency = as_int(number, "priority")
    if cache not in ("use", "bypass"):
        raise ValueError(f'cache must be "use" or "bypass", got {cache!r}')
    frozen = node.frozen
    if frozen is not None:
        out = np.empty(roi.shape, loader.dtype) if keep else None
        if out is not None:
            frozen.read(roi.start, roi.stop, out)
        return Request(begin_with(loader, roi, out), roi, dropped, lambda job: None)

    def first(present: CellLoader) -> Job:
        return begin(present, roi, urgency, keep=keep, bypass=cache == "bypass")

    def again(job: Job) -> Job | None:
        present: CellLoader = node.now
        return None if present is job.loader else first(present)

    return Request(first(loader), roi, dropped, again)


def _original(error: BaseException) -> BaseException:
    """Return what a block function raised, with a note of where."""
    cause = error.__cause__
    # A crash is no exception of the function; what could not be unpickled is only a text.
    if type(error) is not BlockError or not isinstance(cause, Exception):
        return error
    if isinstance(cause, CellimgError):
        return error
    region = ", ".join(
        f"{low}:{high}" for low, high in zip(error.roi.start, error.roi.stop, strict=True)
    )
    note = f"raised by {error.function} at cell {error.position} [{region}]"
    if note not in getattr(cause, "__notes__", ()):
        # Some exceptions let nothing be changed.
        with suppress(Exception):
            cause.add_note(note)
    return cause


def _call_back(callback: Callable[[Request], object], request: Request) -> None:
    try:
        callback(request)
    except (Exception, SystemExit):
        _log.exception("a callback of %r raised", request)


def _dtype_of(out: Any) -> np.dtype[Any]:
    # tensorstore has dtypes of its own.
    dtype: np.dtype[Any] = np.dtype(getattr(out.dtype, "numpy_dtype", out.dtype))
    return dtype


def _is_writable(out: Any) -> bool:
    if isinstance(out, np.ndarray):
        return out.flags.writeable
    # zarr, tensorstore and HDF5, in this order.
    return (
        getattr(out, "read_only", False) is not True
        and getattr(out, "writable", True) is not False
        and getattr(getattr(out, "file", None), "mode", "r+") != "r"
    )
