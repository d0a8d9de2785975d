"""The one path from a cell to its data.

Everything that needs a cell goes through `CellLoader`: direct reading, the dask array, later
batch runs and the server. Plan, read the inputs, call, check, publish.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from heapq import heappop, heappush
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellimgError, CycleError, ReadError
from cellimg_dask.blocks.functions import BlockFunction
from cellimg_dask.blocks.plan import Box, CellPlan, Planner
from cellimg_dask.blocks.worker import BlockJob
from cellimg_dask.geometry import CellGrid, Roi, tiles
from cellimg_dask.loading.crew import Crew, get_crew
from cellimg_dask.loading.deep import PILLAR_DISTANCE, supported
from cellimg_dask.loading.lasting import Lasting
from cellimg_dask.loading.readers import (
    AbsentReader,
    ArrayReader,
    ChunkedReader,
    Reader,
    TiledReader,
    native,
    read_windows,
)
from cellimg_dask.loading.running import Queue
from cellimg_dask.state.cache import CellCache, Shelf
from cellimg_dask.state.dirty import (
    CellProduct,
    CellTest,
    affected_cells,
    cells_meeting,
    merge_regions,
    region_of,
    region_read,
    touched_region,
)
from cellimg_dask.state.flights import CircularWaitError, Flight, inside

__all__ = ["CellLoader", "ImageReader"]

# Up to so many cells, a read first collects what is cached under one lock.
_GATHER_AT_ONCE = 4096


class CellLoader:
    """Computes and keeps the cells of one image.

    Parameters
    ----------
    function : BlockFunction
        Computes a cell.
    planner : Planner
        Says what to read for a cell.
    readers : sequence of Reader
        One per input of the planner.
    dtype : dtype
        Of the result, in native byte order.
    params : mapping
        Keyword parameters for the function.
    cache : CellCache
        Keeps the cells.
    queue : Queue, optional
        Where block functions run, or cells are computed; default: on the threads of the process.
    version : str, optional
        Stands for the function in keys on disk.

    Notes
    -----
    Thread-safe, as far as the block function is.
    """

    def __init__(
        self,
        function: BlockFunction,
        planner: Planner,
        readers: Sequence[Reader],
        dtype: np.dtype[Any],
        params: Mapping[str, Any],
        cache: CellCache,
        queue: Queue | None = None,
        version: str | None = None,
    ) -> None:
        self.function = function
        self.planner = planner
        self.readers = tuple(readers)
        self.dtype = native(dtype)
        self.params = dict(params)
        self.queue = queue
        self.job = BlockJob(function, planner, self.params, self.dtype, version)
        self.shelf: Shelf = cache.shelf(self)
        blocks = None if queue is None else queue.blocks
        if blocks is None:
            self._apply = self.job.apply
        else:
            self._apply = partial(blocks.apply, self.job)
        self._fresh = function.fresh or (blocks is not None and blocks.copies)
        self._runs_here = blocks is None
        self._cells = None if queue is None else queue.cells
        self._dependents: weakref.WeakSet[CellLoader] = weakref.WeakSet()
        self._dependents_lock = threading.Lock()
        self.depth: int = 1 + max((loader.depth for loader in self.upstream()), default=0)
        """Length of the longest chain of images that ends here."""
        self.edition = 0
        """How often the image was invalidated."""
        self.token: tuple[int, str] | None = None
        """The edition for which dask's name was made, and that name."""
        for reader in self.readers:
            if isinstance(reader, ImageReader):
                reader.loader._add_dependent(self)

    @property
    def grid(self) -> CellGrid:
        """Grid of the image."""
        return self.planner.grid

    def crew(self) -> Crew:
        """Return the threads that read regions."""
        if self.queue is None or self.queue.blocks is None:
            return get_crew()
        return self.queue.blocks.crew

    @cached_property
    def lasting(self) -> Lasting:
        """The image's cells on the disk."""
        return Lasting(self)

    def upstream(self) -> list[CellLoader]:
        """Return the loaders that this one reads from directly."""
        return [reader.loader for reader in self.readers if isinstance(reader, ImageReader)]

    def reads_from(self, array: NDArray[Any]) -> bool:
        """Whether some image of the chain reads memory that may be ``array``'s."""
        return any(
            isinstance(reader, ArrayReader) and np.may_share_memory(reader.array, array)
            for loader in self.ancestry()
            for reader in loader.readers
        )

    def ancestry(self) -> list[CellLoader]:
        """Return all loaders that this one rests on, and itself, each after its own upstream."""
        # Without recursion: a chain may be deeper than Python's stack.
        order: dict[CellLoader, None] = {}
        stack = [self]
        while stack:
            missing = [loader for loader in stack[-1].upstream() if loader not in order]
            if missing:
                stack.extend(missing)
            else:
                order[stack.pop()] = None
        return list(order)

    def load(self, index: int, readers: Sequence[Reader] | None = None) -> NDArray[Any]:
        """Return the whole cell ``index``, read-only; computed at most once while it is held.

        Parameters
        ----------
        index : int
            Flat index of a cell that exists.
        readers : sequence of Reader, optional
            Where to read the inputs from if the cell has to be computed; default: its own.

        Raises
        ------
        BlockError
            If the block function raises or its result does not fit.
        ReadError
            If an input cannot be read.
        CycleError
            If the cell needs itself.
        """
        try:
            if self._cells is not None:
                return self._load_elsewhere(index)
            if readers is None:
                return self.shelf.get(index, self.compute_owned)
            return self.shelf.get(index, lambda wanted: self.compute_owned(wanted, readers))
        except CircularWaitError:
            raise self._cycle(index) from None

    def read(self, start: Sequence[int], stop: Sequence[int], out: NDArray[Any]) -> None:
        """Fill ``out`` with the region ``start`` to ``stop``, which lies in the image.

        A region of more than half the cache's bound goes past the cache: cells that are held
        are used, others are computed straight into ``out`` and not kept.
        """
        count, parts = tiles(self.grid, start, stop)
        if count <= _GATHER_AT_ONCE:
            listed = list(parts)
            held = self.shelf.get_many([part[0] for part in listed])
            missing = []
            for value, part in zip(held, listed, strict=True):
                if value is None:
                    missing.append(part)
                else:
                    _, source, target = part
                    out[target] = value[source]
            if not missing:
                return
            count, parts = len(missing), iter(missing)
        keep = 2 * out.size * self.dtype.itemsize <= self.shelf.cache.max_bytes
        if self._cells is not None:
            places = {index: (source, target) for index, source, target in parts}
            with closing(self._fetch(list(places), keep=keep)) as cells:
                for index, value in cells:
                    source, target = places.pop(index)
                    out[target] = value[source]
            return

        def through_cache(part: tuple[int, tuple[slice, ...], tuple[slice, ...]]) -> None:
            index, source, target = part
            out[target] = self.load(index)[source]

        def past_cache(part: tuple[int, tuple[slice, ...], tuple[slice, ...]]) -> None:
            index, source, target = part
            # The ellipsis makes it a view also where there are no axes.
            view: NDArray[Any] = out[(*target, ...)]  # type: ignore[arg-type]
            self._compute_into(index, source, view)

        self.crew().run(parts, through_cache if keep else past_cache, count)

    def _load_elsewhere(self, index: int) -> NDArray[Any]:
        held = self.shelf.peek(index)
        if held is None:
            ((_, held),) = self._fetch([index], keep=True)
        return held

    def _fetch(
        self, indices: list[int], *, keep: bool
    ) -> Generator[tuple[int, NDArray[Any]], None, None]:
        """Yield cells that are computed elsewhere, as they come; with ``keep`` from the cache."""
        assert self._cells is not None
        edition = self.edition
        disk = self.shelf.cache.disk
        keys: dict[int, str | None] = {}
        missing = []
        for index in indices:
            if disk is None:
                missing.append(index)
                continue
            keys[index], found = self.lasting.find(disk, index)
            if found is None:
                missing.append(index)
            else:
                yield index, self._publish(index, found, 0.0, edition) if keep else found
        for index, value, seconds in self._cells.fetch(self, missing):
            if disk is not None:
                self.lasting.keep(disk, index, keys[index], value)
            if keep:
                yield index, self._publish(index, value, seconds, edition)
            else:
                self.shelf.record(seconds)
                yield index, value

    def _publish(
        self, index: int, value: NDArray[Any], seconds: float, edition: int
    ) -> NDArray[Any]:
        def arrived(_: int) -> NDArray[Any]:
            # `invalidate` counts before it forgets: whoever still sees the old number here is
            # under way early enough to be forgotten.
            if self.edition != edition:
                raise _OutdatedError
            return value

        try:
            return self.shelf.get(index, arrived, seconds)
        except _OutdatedError:
            return value

    def invalidate(self, roi: Roi) -> None:
        """Forget the cells that read a voxel of the region, and what was made from them.

        Safe at any time. Chunks that these cells read are decoded again. Images come in
        the order of the chain: a load downstream that begins meanwhile and still reads an old
        cell is forgotten when its image's turn comes, and an image that is defined meanwhile is
        found because only then the images downstream are listed.
        """
        if roi.size == 0:
            return
        region = region_of(roi)
        cells: list[CellProduct | CellTest] = [cells_meeting(self.grid, region)]
        for number, item in enumerate(self.planner.inputs):
            source = item.region_under(region)
            if source is not None:
                cells.append(affected_cells(self.planner, number, source))
        for number, reader in enumerate(self.readers):
            if isinstance(reader, ChunkedReader):
                for part in cells:
                    reader.forget(region_read(self.planner, number, part))
        # What changed of each image, in the order of the longest way from the first.
        waiting: list[tuple[int, int, CellLoader]] = [(self.depth, 0, self)]
        reached: dict[CellLoader, list[CellProduct | CellTest]] = {self: cells}
        while waiting:
            _, _, loader = heappop(waiting)
            # Counted before, for what arrives from elsewhere meanwhile, and after, so that no
            # name that was made meanwhile stays.
            loader.edition += 1
            for part in reached[loader]:
                loader.shelf.invalidate(part)
                if loader._cells is not None:
                    loader._cells.forget(loader, part)
            loader.edition += 1
            changed = merge_regions([touched_region(part) for part in reached[loader]])
            for below in loader.dependents:
                if below not in reached:
                    reached[below] = []
                    heappush(waiting, (below.depth, len(reached), below))
                for number, reader in enumerate(below.readers):
                    if isinstance(reader, ImageReader) and reader.loader is loader:
                        reached[below] += [
                            affected_cells(below.planner, number, part) for part in changed
                        ]

    @property
    def dependents(self) -> list[CellLoader]:
        """Loaders of the images that read this one."""
        with self._dependents_lock:
            return list(self._dependents)

    def _add_dependent(self, loader: CellLoader) -> None:
        with self._dependents_lock:
            self._dependents.add(loader)

    def plan(self, index: int) -> CellPlan:
        """Return the plan of a cell; an index map that fails is a `ReadError`."""
        try:
            return self.planner.plan(index)
        except CellimgError:
            raise
        except Exception as error:
            position = self.grid.position(index)
            raise ReadError(
                self.function.name,
                position,
                self.grid.roi(position),
                f"planning what to read failed: {type(error).__name__}: {error}",
            ) from error

    def compute_owned(self, index: int, readers: Sequence[Reader] | None = None) -> NDArray[Any]:
        """Compute a cell, past the cache, into an array that nobody else holds.

        With a disk behind the cache it may be found there instead.
        """
        disk = self.shelf.cache.disk
        if disk is None or readers is not None:
            return self._compute_owned(index, self.readers if readers is None else readers)
        compute = partial(self._compute_owned, readers=self.readers)
        return self.lasting.load(disk, index, compute)

    def compute_in_passing(self, index: int) -> NDArray[Any]:
        """Compute a cell, past the cache, for who is done with it before this thread goes on.

        It may be a view of an input, or a buffer that the function will use again.
        """
        if self.shelf.cache.disk is not None or not self._runs_here:
            return self.compute_owned(index)
        result = self._compute(self.plan(index), self.readers, None)
        return np.asarray(result, self.dtype)

    def read_ahead(self, index: int) -> None:
        """Have the chunks of stores that a cell reads decoded, if the cache has room for them."""
        plan = self.plan(index)
        for number, reader in enumerate(self.readers):
            if isinstance(reader, ChunkedReader):
                for box in plan.boxes(number):
                    reader.read_ahead(box)

    def _compute_owned(self, index: int, readers: Sequence[Reader]) -> NDArray[Any]:
        plan = self.plan(index)
        result = self._compute(plan, readers, None)
        if self._fresh:
            return result
        # A copy: the function may have returned a view of its input, or a buffer that it will
        # use again.
        return result.astype(self.dtype, order="C", copy=True)

    def _compute(
        self, plan: CellPlan, readers: Sequence[Reader], out: NDArray[Any] | None
    ) -> NDArray[Any]:
        """Run the block function on a cell.

        Returns
        -------
        ndarray
            ``out`` if given, else an array that may be a view, even of an input, and may have
            another dtype that the image's can hold.
        """
        if self.depth > PILLAR_DISTANCE:
            with supported(self, plan):
                inputs = self._read_all(plan, readers)
        else:
            inputs = self._read_all(plan, readers)
        result = self._apply(plan, inputs, out)
        if out is not None and result is not out:
            out[...] = result
            return out
        return result

    def _compute_into(self, index: int, source: tuple[slice, ...], target: NDArray[Any]) -> None:
        """Compute a cell past the cache, and put the ``source`` part of it into ``target``."""
        held = self.shelf.peek(index)
        if held is not None:
            target[...] = held[source]
            return
        flight = Flight(self.shelf, index)
        if flight.begun_by_itself():
            raise self._cycle(index)
        plan = self.plan(index)
        began = perf_counter()
        try:
            with inside(flight):
                if self.shelf.cache.disk is not None:
                    target[...] = self.compute_owned(index)[source]
                elif target.shape == plan.shape:
                    self._compute(plan, self.readers, target)
                else:
                    target[...] = self._compute(plan, self.readers, None)[source]
        except Exception:
            self.shelf.record(0.0, failed=True)
            raise
        finally:
            flight.landed = True
        self.shelf.record(perf_counter() - began)

    def _read_all(self, plan: CellPlan, readers: Sequence[Reader]) -> tuple[NDArray[Any], ...]:
        return tuple([self._read(plan, number, reader) for number, reader in enumerate(readers)])

    def _read(self, plan: CellPlan, number: int, reader: Reader) -> NDArray[Any]:
        item = self.planner.inputs[number]
        try:
            return read_windows(reader, plan.windows[number], item.fill_value)
        except CellimgError:
            # A cell of the image upstream failed, and says so itself.
            raise
        except Exception as error:
            raise ReadError(
                self.function.name,
                plan.position,
                plan.roi,
                f"reading {', '.join(map(_text, plan.boxes(number)))} of input {number} failed: "
                f"{type(error).__name__}: {error}",
            ) from error

    def without_readers(self, numbers: Sequence[int]) -> CellLoader:
        """Return a copy that keeps only the shape of some inputs, to be sent elsewhere."""
        readers = [
            AbsentReader(reader.grid, reader.dtype)
            if number in numbers and isinstance(reader, TiledReader)
            else reader
            for number, reader in enumerate(self.readers)
        ]
        return CellLoader(
            self.function,
            self.planner,
            readers,
            self.dtype,
            self.params,
            self.shelf.cache,
            self.queue,
            self.job.version,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Cells stay behind. A queue becomes "run here, after init" where it arrives.
        return CellLoader, (
            self.function,
            self.planner,
            self.readers,
            self.dtype,
            self.params,
            self.shelf.cache,
            self.queue,
            self.job.version,
        )

    def _cycle(self, index: int) -> CycleError:
        position = self.grid.position(index)
        return CycleError(
            self.function.name,
            position,
            self.grid.roi(position),
            "the cell needs itself: the block function, or an input, reads this image or one "
            "made from it",
        )


class _OutdatedError(Exception):
    """What arrived was asked for before the image changed."""


def _text(box: Box) -> str:
    return f"[{', '.join(f'{part.start}:{part.stop}' for part in box)}]"


class ImageReader(TiledReader):
    """Reads another image, cell by cell through its loader."""

    def __init__(self, loader: CellLoader) -> None:
        self.loader = loader
        super().__init__(loader.grid, loader.dtype, loader.load)

    def _join(self, low: Sequence[int], high: Sequence[int], block: NDArray[Any]) -> None:
        self.loader.read(low, high, block)

    def __reduce__(self) -> tuple[type[ImageReader], tuple[CellLoader]]:
        return ImageReader, (self.loader,)
