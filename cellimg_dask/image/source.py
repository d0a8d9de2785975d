"""Inputs that change."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

from cellimg_dask.blocks.errors import CycleError, SaveError, SourceChangedError
from cellimg_dask.geometry import CellGrid, Roi, Space, as_ints, even_cell_shape
from cellimg_dask.image.describe import size_text
from cellimg_dask.image.gridded import Gridded
from cellimg_dask.image.indexing import VoxelChange, assign, take
from cellimg_dask.image.space_of import Placed, checked_space
from cellimg_dask.loading.node import SourceNode
from cellimg_dask.loading.readers import check_array, native
from cellimg_dask.loading.source import MemoryReader, SourceReader, StoredReader
from cellimg_dask.loading.stored import Saver, StoredCells, Version
from cellimg_dask.loading.watch import Change, deliver
from cellimg_dask.state.cache import CellCache, get_cache
from cellimg_dask.state.flights import CircularWaitError, Turn
from cellimg_dask.state.living import Living
from cellimg_dask.state.pages import Pages

__all__ = ["Edit", "Source", "unsaved_bytes"]

_DEFAULT_VOXELS_LOG2 = 18

_logger = logging.getLogger("cellimg_dask")


class Source(Gridded, Placed):
    """An input of images that can be changed; what rests on a change is computed anew.

    It is changed by `edit` only, a whole edit at a time. Whoever reads an image, or has taken a
    snapshot, goes on to see what there was; nobody ever sees half an edit.

    Parameters
    ----------
    array : array-like
        A NumPy array is copied, and its cells are copied when they are written. A store (zarr,
        HDF5, memory map; anything that takes boxes) is read cell by cell and written to.
    cell_shape : int or ints, optional
        Unit in which data are copied, kept and stored; for a store a multiple of its chunks.
        Default: the chunks (shards) of a store, else about 260,000 voxels.
    cache : "shared" or CellCache
        Keeps cells of a store; the bytes of cells that are not saved count there as well.
    save : "at once" or "later"
        Whether an edit returns when the store has it, or cells are written when they become many
        and by `persist` and `close`.
    space : Space, optional
        Where the voxels lie. Default: what the array says of itself.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    Thread-safe. Edits of one source follow one another.

    Examples
    --------
    >>> import cellimg_dask as ci
    >>> source = Source(np.zeros((4, 6)), cell_shape=2)
    >>> doubled = ci.map_cells(np.multiply, source, 2.0 * np.ones((4, 6)))
    >>> doubled[0, :3]
    array([0., 0., 0.])
    >>> with source.edit() as a:
    ...     a[0, 1] = 5
    ...     a[2:, ::3] = 1
    >>> doubled[0, :3]
    array([ 0., 10.,  0.])
    """

    _noun = "a source"

    def __init__(
        self,
        array: Any,
        cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        cache: CellCache | Literal["shared"] = "shared",
        save: Literal["at once", "later"] = "at once",
        space: Space | None = None,
    ) -> None:
        if isinstance(array, (list, tuple, int, float)):
            array = np.asarray(array)
        check_array(array)
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                "a source cannot be a masked array, its mask would be lost; "
                "give array.filled(value)"
            )
        if save not in ("at once", "later"):
            raise ValueError(f'save must be "at once" or "later", got {save!r}')
        if cache != "shared" and not isinstance(cache, CellCache):
            raise TypeError(f'cache must be "shared" or a CellCache, got {cache!r}')
        dtype = native(getattr(array.dtype, "numpy_dtype", array.dtype))
        if dtype.hasobject:
            raise TypeError(f"dtype {dtype} cannot be kept in cells; give one of fixed size")
        shape = tuple(int(extent) for extent in array.shape)
        in_memory = isinstance(array, np.ndarray) and not isinstance(array, np.memmap)
        chunks = None if in_memory else _chunks_of(array)
        grid = CellGrid(shape, _cell_shape(cell_shape, shape, chunks))
        self._saver: Saver | None = None
        self._saves_at_once = save == "at once"
        self._turn = Turn()
        self._closed = False
        reader: SourceReader
        if in_memory:
            base = np.array(array, dtype, order="C", copy=True, subok=False)
            base.flags.writeable = False
            reader = MemoryReader(grid, base, Pages())
        else:
            _check_writable(array)
            keep = get_cache() if isinstance(cache, str) else cache
            cells = StoredCells(array, grid, keep)
            largest = int(np.prod(grid.cell_shape)) * dtype.itemsize
            self._saver = Saver(cells, max(largest, keep.max_bytes // 2))
            reader = StoredReader(cells, Pages())
            _savers.add(self._saver)
            weakref.finalize(self, _save_the_rest, self._saver).atexit = False
        self.node = SourceNode(reader, grid)
        """The source over all its changes."""
        self._space = checked_space(space, array)

    @property
    def space(self) -> Space:
        """Where the voxels lie."""
        return self._space

    @classmethod
    def empty(
        cls,
        shape: SupportsIndex | Iterable[SupportsIndex],
        dtype: DTypeLike,
        cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        store: str | os.PathLike[str],
        fill_value: Any = 0,
        cache: CellCache | Literal["shared"] = "shared",
        save: Literal["at once", "later"] = "later",
        space: Space | None = None,
    ) -> Source:
        """Return a source in a new zarr array, which may be larger than memory.

        Parameters
        ----------
        shape, dtype
            Of the array.
        cell_shape : int or ints, optional
            Of a cell, which is a chunk of the store. Default: about 260,000 voxels.
        store : path
            Where; opened again by ``Source(zarr.open_array(store))``.
        fill_value : scalar
            Value of what has not been written.
        cache, save, space
            As for `Source`, but saving later by default.

        Raises
        ------
        FileExistsError
            If there is something already.
        """
        import zarr

        extents = as_ints(shape, "shape", minimum=0)
        cells = _cell_shape(cell_shape, extents, None)
        where = os.fspath(store)
        if os.path.exists(where):  # noqa: PTH110 - stays what the user gave
            raise FileExistsError(
                f"{where} exists already; to go on with it: Source(zarr.open_array({where!r}))"
            )
        array = zarr.create_array(
            where, shape=extents, dtype=np.dtype(dtype), chunks=cells, fill_value=fill_value
        )
        return cls(array, cells, cache=cache, save=save, space=space)

    # ------------------------------------------------------------------ what it is

    @property
    def _reader(self) -> SourceReader:
        reader: SourceReader = self.node.now
        return reader

    @property
    def grid(self) -> CellGrid:
        """Grid of cells."""
        return self._reader.grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type, in native byte order."""
        return self._reader.dtype

    def __repr__(self) -> str:
        text = (
            f"<Source of shape {self.shape}, {self.dtype}, {size_text(self.nbytes)}, "
            f"in {self.grid.num_cells:,} cells of {self.cell_shape}"
        )
        if self._saver is not None and self.num_unsaved:
            text += f", {self.num_unsaved:,} not saved"
        return text + ">"

    # ------------------------------------------------------------------ reading

    def __getitem__(self, key: Any) -> Any:
        """Return what NumPy would for any index, as a copy."""
        while True:
            reader = self._reader
            try:
                return take(reader.grid, reader.dtype, reader.tile, key)
            except SourceChangedError:
                # Somebody edits it meanwhile, and its store holds one version only.
                if self._reader is reader:
                    raise

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a source may change; only a copy of it can be an array")
        whole: NDArray[Any] = self[...]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    # ------------------------------------------------------------------ changing

    @contextmanager
    def edit(self) -> Iterator[Edit]:
        """Change the source: all that is written inside takes place together at the end.

        An exception inside discards all of it. Edits of one source by several threads come one
        after the other. Inside, the `Edit` shows what was written; everything else shows what
        there was before.

        Raises
        ------
        CycleError
            If this thread, or somebody who waits for it, is just editing the source.
        SaveError
            If there is no room for unsaved cells because the store cannot be written; then
            nothing of the edit takes place. Or, where cells are saved at once, if they could not
            be: then the edit has taken place and is kept in memory until `persist` succeeds.
        """
        self._check_open()
        try:
            inside = self._turn.take()
        except CircularWaitError:
            raise CycleError(
                "edit", (), Roi((), ()), "the source is being edited by this very computation"
            ) from None
        saved: list[int] = []
        try:
            with inside:
                edit = Edit(self._reader)
                try:
                    yield edit
                finally:
                    edit._open = False
                saved = self._commit(edit)
        finally:
            self._turn.leave()
            # After that, so that callbacks may edit this source as well.
            deliver()
        if self._saver is not None and saved:
            if self._saves_at_once:
                self._saver.save(saved)
            else:
                self._saver.write_early()

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write as an edit of its own."""
        with self.edit() as array:
            array[key] = value

    def _commit(self, edit: Edit) -> list[int]:
        self._check_open()
        if not edit._written:
            return []
        cells = edit._cells
        for cell in cells.values():
            cell.flags.writeable = False
        saver = self._saver
        if saver is None:
            self.node.change(self._reader.replaced(cells), edit._written)
        else:
            versions = {index: Version(cell) for index, cell in cells.items()}
            saver.make_room(sum(version.nbytes for version in versions.values()))
            edition = self._reader.replaced(versions)
            self.node.change(edition, edit._written, lambda: saver.add(versions))
        return list(cells)

    def on_dirty(self, callback: Callable[[Change], object]) -> Callable[[Change], object]:
        """Have ``callback(change)`` called after each edit, with the cells it wrote to.

        Returns
        -------
        callable
            The callback, which is dropped when nobody else holds it any more.
        """
        self.node.watchers.add(callback)
        return callback

    # ------------------------------------------------------------------ the store

    @property
    def num_unsaved(self) -> int:
        """How many cells were changed and are not in the store yet."""
        return 0 if self._saver is None else len(self._saver)

    def persist(self) -> None:
        """Save all changed cells; returns when they are in the store.

        Raises
        ------
        SaveError
            If a cell cannot be written. All that are not saved are kept in memory, and tried
            again the next time.
        """
        if self._saver is not None:
            self._saver.save()

    def close(self) -> None:
        """Save all changed cells and allow no more edits; reading goes on.

        Raises
        ------
        SaveError
            As by `persist`; then the source is not closed.
        """
        self.persist()
        self._closed = True

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a source belongs to the process in which it is changed and cannot be pickled; an "
            "image made from it can, as it is at that moment"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the source is closed; it can be read but not changed")


class Edit(NDArrayOperatorsMixin):
    """The array that an edit writes to; takes any index that NumPy takes."""

    def __init__(self, reader: SourceReader) -> None:
        self._reader = reader
        self._cells: dict[int, NDArray[Any]] = {}
        self._written: list[VoxelChange] = []
        self._open = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis, in voxels."""
        return self._reader.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type."""
        return self._reader.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """Return a copy of what is there, with what was written."""
        self._check_open()
        return take(self._reader.grid, self.dtype, self._tile, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write; values are cast as NumPy casts them on assignment."""
        self._check_open()
        part = assign(self._reader.grid, self.dtype, self._writable, key, value)
        if part is not None:
            self._written.append(part)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        whole: NDArray[Any] = self[...]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        arrays = [np.asarray(each) if isinstance(each, Edit) else each for each in inputs]
        out = kwargs.pop("out", ())
        if not out:
            return getattr(ufunc, method)(*arrays, **kwargs)
        if method != "__call__" or len(out) != 1 or not isinstance(out[0], Edit):
            return NotImplemented
        result = np.array(out[0])
        getattr(ufunc, method)(*arrays, out=(result,), **kwargs)
        out[0][...] = result
        return out[0]

    def _tile(self, index: int) -> NDArray[Any]:
        cell = self._cells.get(index)
        return self._reader.tile(index) if cell is None else cell

    def _writable(self, index: int, is_all: bool) -> NDArray[Any]:
        cell = self._cells.get(index)
        if cell is None:
            if is_all:
                grid = self._reader.grid
                cell = np.empty(grid.roi(grid.position(index)).shape, self.dtype)
            else:
                cell = np.array(self._reader.tile(index), order="C", copy=True)
            self._cells[index] = cell
        return cell

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("the edit is over; begin another one: with source.edit() as array: …")


def _chunks_of(array: Any) -> tuple[int, ...] | None:
    for name in ("shards", "chunks"):
        sizes = getattr(array, name, None)
        if isinstance(sizes, tuple) and all(isinstance(n, (int, np.integer)) for n in sizes):
            return tuple(int(n) for n in sizes)
    layout = getattr(array, "chunk_layout", None)
    if layout is not None:
        return tuple(int(n) for n in layout.write_chunk.shape)
    return None


def _cell_shape(
    given: Any, shape: tuple[int, ...], chunks: tuple[int, ...] | None
) -> tuple[int, ...]:
    if given is None:
        if chunks is not None:
            return tuple(max(1, n) for n in chunks)
        return even_cell_shape(len(shape), _DEFAULT_VOXELS_LOG2)
    cells = as_ints(given, "cell_shape", ndim=len(shape), minimum=1)
    for axis, (cell, chunk) in enumerate(zip(cells, chunks or cells, strict=True)):
        if cell % chunk and cell < shape[axis]:
            raise ValueError(
                f"cell_shape[{axis}] = {cell} is not a multiple of the store's chunks, which "
                f"have {chunk} voxels on axis {axis}: two cells would share a chunk"
            )
    return cells


def _check_writable(array: Any) -> None:
    name = type(array).__name__
    is_read_only = (
        getattr(array, "read_only", False)
        or getattr(array, "readonly", False)
        or (isinstance(array, np.memmap) and not array.flags.writeable)
        or getattr(getattr(array, "file", None), "mode", "r+") == "r"
    )
    if is_read_only:
        how = "readonly=False" if hasattr(array, "readonly") else "mode='r+'"
        raise ValueError(f"the {name} is open for reading only; open it with {how}")
    if not hasattr(array, "__setitem__"):
        raise TypeError(
            f"a {name} cannot be written to; give a NumPy array or a store, or make the changes "
            f"where it comes from and call image.invalidate(roi)"
        )


_savers: Living[Saver] = Living()


def unsaved_bytes() -> int:
    """Return the bytes of all cells of sources that are not in their stores yet."""
    return sum(saver.bytes for saver in _savers.all())


def _save_the_rest(saver: Saver) -> None:
    try:
        saver.save()
    except SaveError:
        _logger.exception("%d changed cells of a source are lost", len(saver))


def _at_exit() -> None:
    for saver in _savers.all():
        _save_the_rest(saver)


# zarr writes by way of an executor. Executors are shut down before what `atexit` knows is called,
# by what their module registers when it is imported; what is registered later is called earlier.
importlib.import_module("concurrent.futures.thread")
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
