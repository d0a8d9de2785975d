"""The one path from a cell to its data.

Everything that needs a cell goes through `CellLoader`: direct reading, the dask array, later
batch runs and the server. Plan, read the inputs, call, check, publish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from time import perf_counter, time_ns
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellimgError, CycleError, ReadError
from cellimg_dask.blocks.functions import BlockFunction
from cellimg_dask.blocks.plan import Box, CellPlan, Planner
from cellimg_dask.blocks.worker import BlockJob
from cellimg_dask.geometry import CellGrid, tiles
from cellimg_dask.loading.crew import Crew, get_crew
from cellimg_dask.loading.deep import PILLAR_DISTANCE, supported
from cellimg_dask.loading.lasting import Lasting
from cellimg_dask.loading.readers import (
    AbsentReader,
    ArrayReader,
    ChunkedReader,
    PinnedReader,
    Reader,
    TiledReader,
    native,
    pinned,
    read_windows,
)
from cellimg_dask.loading.running import Queue
from cellimg_dask.loading.source import MemoryReader, StoredReader
from cellimg_dask.loading.trees import load_values
from cellimg_dask.state.cache import CellCache, OutdatedError, Shelf
from cellimg_dask.state.disk import DiskCells
from cellimg_dask.state.flights import CircularWaitError, Flight, inside
from cellimg_dask.state.history import History

__all__ = ["CellLoader", "ImageReader", "Place", "Signature", "pinned_together"]

# Up to so many cells, a read first collects what is cached under one lock.
_GATHER_AT_ONCE = 4096


Signature: TypeAlias = frozenset[tuple[History, str]]
"""The images upstream, and this one, whose parameters are not those that they were made with."""


class Place:
    """Where the cells of an image are kept that were computed with the same parameters.

    The cells go when nobody has it any more.
    """

    def __init__(self, cache: CellCache, beside: Shelf | None = None) -> None:
        self.shelf: Shelf = cache.shelf(self, beside=beside)


class CellLoader:
    """Computes and keeps the cells of one edition of an image.

    A loader never changes. When something that the image reads changes, the image gets another
    one (`renewed`), which shares the cells that are the same. So whoever has begun to read
    through a loader reads what there was when it began, all the way up the chain.

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
        self.history = History()
        """The changes of the image."""
        self.edition = 0
        """Number of the last change that this loader knows of."""
        self.signature: Signature = frozenset().union(*(up.signature for up in self.upstream()))
        """Which parameters, upstream as well, are not those of the beginning."""
        self._use(Place(cache))
        self._begin()
        blocks = None if queue is None else queue.blocks
        self._set_apply()
        self._fresh = function.fresh or (blocks is not None and blocks.copies)
        self._runs_here = blocks is None
        self._cells = None if queue is None else queue.cells
        self.depth: int = 1 + max((loader.depth for loader in self.upstream()), default=0)
        """Length of the longest chain of images that ends here."""
        self.isolated = _are_isolated(self.readers)
        """Whether something that it rests on is read as it was, whatever has changed since. If
        not, an older edition computes the same as the latest, and shares all cells with it."""

    def _set_apply(self) -> None:
        blocks = None if self.queue is None else self.queue.blocks
        self._apply = self.job.apply if blocks is None else partial(blocks.apply, self.job)

    def _use(self, place: Place) -> None:
        self.place = place
        """Where cells are kept that are the same in the latest edition."""
        self.shelf = place.shelf

    def _begin(self) -> None:
        self.token: str | None = None
        """Dask's name, once it was made."""
        self._shared: list[CellLoader] | None = None
        self._aside: Shelf | None = None
        self._aside_lock = threading.Lock()

    def reading(self, readers: Sequence[Reader]) -> CellLoader:
        """Return a loader of the same edition, which reads the same from ``readers``."""
        new = object.__new__(CellLoader)
        new.__dict__.update(self.__dict__)
        new.__dict__.pop("lasting", None)
        new.readers = tuple(readers)
        new.isolated = _are_isolated(new.readers)
        new._begin()
        return new

    def renewed(
        self,
        readers: Sequence[Reader],
        params: Mapping[str, Any],
        signature: Signature,
        place: Place,
    ) -> CellLoader:
        """Return the latest edition of the image."""
        new = self.reading(readers)
        new.edition = self.history.last
        new.signature = signature
        new._use(place)
        if params is not self.params:
            new.params = dict(params)
            new.job = BlockJob(
                self.function, self.planner, new.params, self.dtype, self.job.version
            )
            new._set_apply()
        return new

    @property
    def grid(self) -> CellGrid:
        """Grid of the image."""
        return self.planner.grid

    def pinned(self) -> CellLoader:
        """Return a loader that refuses what is written from now on to stores it rests on.

        As far as that can be known; what the present edition has in memory is used.
        """
        return pinned_together([self])[0]

    def crew(self) -> Crew:
        """Return the threads that read regions."""
        if self.queue is None or self.queue.blocks is None:
            return get_crew()
        return self.queue.blocks.crew

    @property
    def _disk(self) -> DiskCells | None:
        # Nothing is pickled there, so that nothing has to be unpickled.
        return None if self.dtype.hasobject else self.shelf.cache.disk

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
                stack.extend(reversed(missing))
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
                try:
                    # What `_get` begins with, without another call: most cells are there.
                    return self.shelf.get(index, self.compute_owned, None, self.edition)
                except OutdatedError:
                    return self._get(index, self.compute_owned)
            return self._get(index, lambda wanted: self.compute_owned(wanted, readers))
        except CircularWaitError:
            raise self._cycle(index) from None

    def read(self, start: Sequence[int], stop: Sequence[int], out: NDArray[Any]) -> None:
        """Fill ``out`` with the region ``start`` to ``stop``, which lies in the image.

        A region of more than half the cache's bound goes past the cache: cells that are held
        are used, others are computed straight into ``out`` and not kept. Python objects always
        go through it, since ``out`` does not show how large they are.
        """
        count, parts = tiles(self.grid, start, stop)
        if count <= _GATHER_AT_ONCE:
            listed = list(parts)
            held = self.gather([part[0] for part in listed])
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
        # Held until the end, however small the cache is.
        shared = self.prepare()
        keep = (
            self.dtype.hasobject or 2 * out.size * self.dtype.itemsize <= self.shelf.cache.max_bytes
        )
        if self._cells is not None:
            places = {index: (source, target) for index, source, target in parts}
            with closing(self._fetch(list(places), keep=keep)) as cells:
                for index, value in cells:
                    source, target = places.pop(index)
                    out[target] = value[source]
            return

        load = self.load_after if self.dtype.hasobject else self.load

        def through_cache(part: tuple[int, tuple[slice, ...], tuple[slice, ...]]) -> None:
            index, source, target = part
            out[target] = load(index)[source]

        def past_cache(part: tuple[int, tuple[slice, ...], tuple[slice, ...]]) -> None:
            index, source, target = part
            # The ellipsis makes it a view also where there are no axes.
            view: NDArray[Any] = out[(*target, ...)]  # type: ignore[arg-type]
            self._compute_into(index, source, view)

        self.crew().run(parts, through_cache if keep else past_cache, count)
        del shared

    def prepare(self) -> list[NDArray[Any]]:
        """Compute what all cells need, before several threads wait for one that computes it.

        These are values of whole images, such as the root of a tree of tables.
        """
        return [image.load_after(0) for image in self._needed_by_all()]

    def parts_to_prepare(self) -> CellLoader | None:
        """Return an image whose cells several threads can compute to the same end, if need be."""
        missing = [image for image in self._needed_by_all() if image.peek(0) is None]
        upstream = {
            above.grid.num_cells: above
            for image in missing
            for above in image.ancestry()
            if above.dtype.hasobject and above.grid.num_cells > 1
        }
        # The largest pieces of which there are enough: what is made from them need not be kept.
        enough = [count for count in upstream if count >= 8 * self.crew().num_threads]
        return upstream[min(enough) if enough else max(upstream)] if upstream else None

    def _needed_by_all(self) -> list[CellLoader]:
        if self._shared is None:
            self._shared = [
                image
                for image in self.ancestry()
                if image.dtype.hasobject and image.grid.num_cells == 1
            ]
        return self._shared

    def load_after(self, index: int) -> NDArray[Any]:
        """Return a cell; if it is made from values, after these, in several threads."""
        return load_values(self, index) if self._is_made_from_values else self.load(index)

    @cached_property
    def _is_made_from_values(self) -> bool:
        return any(
            reader.dtype.hasobject for reader in self.readers if isinstance(reader, ImageReader)
        )

    def gather(self, indices: Iterable[int]) -> list[NDArray[Any] | None]:
        """Return those cells of this edition that are in memory, None for the others."""
        wanted = list(indices)
        try:
            return self.shelf.get_many(wanted, self.edition)
        except OutdatedError:
            return [self.peek(index) for index in wanted]

    def _load_elsewhere(self, index: int) -> NDArray[Any]:
        held = self.peek(index)
        if held is None:
            ((_, held),) = self._fetch([index], keep=True)
        return held

    def _fetch(
        self, indices: list[int], *, keep: bool
    ) -> Generator[tuple[int, NDArray[Any]], None, None]:
        """Yield cells that are computed elsewhere, as they come; with ``keep`` from the cache."""
        assert self._cells is not None
        disk = self._disk
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
                yield index, self._keep(index, found, 0.0) if keep else found
        for index, value, seconds in self._cells.fetch(self, missing):
            if disk is not None:
                self.lasting.keep(disk, index, keys[index], value)
            if keep:
                yield index, self._keep(index, value, seconds)
            else:
                self.shelf.record(seconds)
                yield index, value

    def _keep(self, index: int, value: NDArray[Any], seconds: float) -> NDArray[Any]:
        """Keep a cell that was computed elsewhere, from what there was in this edition."""
        known = self.edition
        while True:
            try:
                return self.shelf.get(index, lambda _: value, seconds, known)
            except OutdatedError:
                known = self.history.last
                if self.has_changed(index):
                    return self.aside().get(index, lambda _: value, seconds)

    def has_changed(self, index: int) -> bool:
        """Whether a cell of the image has changed since this edition, as far as is known."""
        return self.history.last > self.edition and self.history.changed(index, self.edition)

    def peek(self, index: int) -> NDArray[Any] | None:
        """Return a cell of this edition if it is in memory, else None; computes nothing."""
        held = self.shelf.peek(index)
        if self.shelf.edition <= self.edition or not self.isolated or not self.has_changed(index):
            return held
        return None if self._aside is None else self._aside.peek(index)

    def is_loading(self, index: int) -> bool:
        """Whether some thread computes a cell at the moment, of this edition or another."""
        return self.shelf.is_loading(index)

    def num_loading(self) -> int:
        """Return how many cells threads compute at the moment, of this edition or another."""
        return self.shelf.num_loading()

    def forget_elsewhere(self, shelf: Shelf, cells: Collection[int]) -> None:
        """Have those who compute whole cells forget some, that are kept here on ``shelf``."""
        if self._cells is not None:
            self._cells.forget(shelf, cells)

    def held(self) -> list[int]:
        """Return the cells of this edition that the cache holds, in no order."""
        held = self.shelf.held()
        if self.shelf.edition > self.edition:
            held = [index for index in held if not self.has_changed(index)]
        return held if self._aside is None else [*held, *self._aside.held()]

    def num_outdated(self) -> int:
        """Return how many cells were forgotten for a change and have not been loaded since."""
        # Of an older edition none is: nothing of it changes any more.
        return 0 if self.shelf.edition > self.edition else self.shelf.num_outdated()

    def aside(self) -> Shelf:
        """Return the shelf for cells that have changed since this edition."""
        with self._aside_lock:
            if self._aside is None:
                self._aside = self.shelf.cache.shelf(self, beside=self.shelf)
            return self._aside

    def _get(
        self, index: int, load: Callable[[int], NDArray[Any]], seconds: float | None = None
    ) -> NDArray[Any]:
        """Return a cell of this edition from memory, or load it."""
        known = self.edition
        while True:
            try:
                return self.shelf.get(index, load, seconds, known)
            except OutdatedError:
                known = self.history.last
                if self.isolated and self.has_changed(index):
                    return self.aside().get(index, load, seconds)

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
        disk = self._disk
        if disk is None or readers is not None:
            return self._compute_owned(index, self.readers if readers is None else readers)
        compute = partial(self._compute_owned, readers=self.readers)
        return self.lasting.load(disk, index, compute)

    def compute_in_passing(self, index: int) -> NDArray[Any]:
        """Compute a cell, past the cache, for who is done with it before this thread goes on.

        It may be a view of an input, or a buffer that the function will use again.
        """
        if self._disk is not None or not self._runs_here:
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
        held = self.peek(index)
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
                if self._disk is not None:
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


def pinned_together(loaders: Sequence[CellLoader]) -> list[CellLoader]:
    """Return loaders pinned at one moment; see `CellLoader.pinned`.

    What several of them rest on is the same loader for all.
    """
    when = time_ns()
    copies: dict[CellLoader, CellLoader] = {}
    for loader in (above for last in loaders for above in last.ancestry()):
        if loader in copies:
            continue
        readers = [
            ImageReader(copies[reader.loader])
            if isinstance(reader, ImageReader)
            else pinned(reader, when)
            for reader in loader.readers
        ]
        same = all(
            new is old or (isinstance(old, ImageReader) and copies[old.loader] is old.loader)
            for new, old in zip(readers, loader.readers, strict=True)
        )
        if same:
            copies[loader] = loader
        else:
            copies[loader] = loader.reading(readers)
            copies[loader].token = loader.token
    return [copies[loader] for loader in loaders]


def _are_isolated(readers: Sequence[Reader]) -> bool:
    return any(
        reader.loader.isolated
        if isinstance(reader, ImageReader)
        else isinstance(reader, (MemoryReader, StoredReader, PinnedReader))
        for reader in readers
    )


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
