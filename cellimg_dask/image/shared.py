"""Arrays that processes of one machine look at together, by a name: ``ci.shared``.

One process puts an array into shared memory under a name; any other opens it by that name alone,
without a copy, whatever Python, NumPy or environment it has. It lasts until the process that put it
closes it or ends; a reader that ends, or is killed, harms nothing.

>>> import numpy as np
>>> import cellimg_dask as ci
>>> mine = ci.shared.put("doctest-cells", np.zeros((2, 3), "uint16"), "yx")

Elsewhere, in any process of this machine:

>>> theirs = ci.shared.open("doctest-cells")
>>> theirs[0, 1] = 7
>>> mine.array
array([[0, 7, 0],
       [0, 0, 0]], dtype=uint16)
>>> theirs.close()
>>> mine.close()
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cellimg_dask.bare import shared_array as bare
from cellimg_dask.bare.boxes import boxes
from cellimg_dask.bare.look import SharedInfo
from cellimg_dask.bare.shared import cleanup, list, remove  # noqa: A004 - read with the module
from cellimg_dask.blocks.errors import SourceChangedError
from cellimg_dask.geometry import Roi
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.source import Source
from cellimg_dask.loading.crew import get_crew
from cellimg_dask.loading.file_array import is_xarray
from cellimg_dask.loading.readers import quick_source
from cellimg_dask.state.cache import CellCache

__all__ = ["SharedArray", "SharedInfo", "cleanup", "empty", "list", "open", "put", "remove"]

_MOST_STEPS = 50


class SharedArray(bare.SharedArray):
    """An array in shared memory, which processes of this machine open by its name.

    Made by `put` and `empty`, opened by `open`. ``.array`` is the memory as a NumPy array; the
    shared array itself takes NumPy's indices, and can be an input of images. It lasts until the
    process that made it closes it or ends; arrays that were taken from it stay valid all the same.
    Pickled it is its name: whoever unpickles it on the same machine has the same memory.

    Notes
    -----
    Safe to use from several threads as a NumPy array is: nothing keeps one from reading what
    another writes at that moment.

    An image that reads it has views of the memory and does not notice when somebody writes to it:
    call ``image.invalidate(roi)`` then, as for a NumPy array, or write by way of `to_source`.
    """

    def to_source(
        self,
        cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        cache: CellCache | Literal["shared"] = "shared",
        save: Literal["at once", "later"] = "at once",
    ) -> Source:
        """Return a source that works on this memory: edits are seen by all who have it open.

        Images that read it notice its edits, and whoever reads meanwhile goes on to see what
        there was. For that a cell is copied when it is read, and kept within the cache's bound;
        the array as a whole is not copied. Nobody else may write meanwhile: the source would not
        know.

        Parameters
        ----------
        cell_shape, cache, save
            As for `Source`.

        Raises
        ------
        ValueError
            If it was opened for reading only.

        Examples
        --------
        >>> import numpy as np
        >>> import cellimg_dask as ci
        >>> with ci.shared.put("doctest-edits", np.zeros(4)) as mine:
        ...     source = mine.to_source()
        ...     lazy = ci.map_cells(np.negative, source)
        ...     with source.edit() as a:
        ...         a[1] = 5
        ...     lazy[:2], mine[:2]
        (array([-0., -5.]), array([0., 5.]))
        """
        return Source(self, cell_shape, cache=cache, save=save)

    def numpy_line(self) -> str:
        """Return a line of Python that opens it as ``a`` wherever there is NumPy, on this machine.

        For Pythons without this library, by hand: the line holds shape, dtype and place. It
        keeps nothing alive and removes nothing.

        Examples
        --------
        >>> import numpy as np
        >>> import cellimg_dask as ci
        >>> with ci.shared.put("doctest-line", np.zeros((2, 3), "uint16")) as mine:
        ...     exec(mine.numpy_line())
        ...     a[1] = 7
        ...     mine[1]
        array([7, 7, 7], dtype=uint16)
        """
        return _numpy_line(self)


def put(
    name: str,
    array: ArrayLike | Any,
    axes: str | Sequence[str] | None = None,
    *,
    replace: bool = False,
    progress: bool | str = False,
) -> SharedArray:
    """Copy an array into shared memory, where other processes open it by its name.

    It stays until it is closed here or removed, or this process ends, whether or not the result is
    kept.

    Parameters
    ----------
    name : str
        Letters, digits, ``_``, ``-`` and ``.``; at most 30 on macOS.
    array : array-like
        What `numpy.asarray` takes; or a lazy image, a source, a zarr, HDF5, tensorstore or dask
        array, which is computed or read piece by piece, without a second copy in memory. Any
        dtype but Python objects; byte order and Fortran order are kept.
    axes : str or sequence of str, optional
        A name for each axis, such as ``"zyx"``.
    replace : bool
        Whether to remove one that has the name, if it is this process's or its owner has ended.
    progress : bool or str
        Whether to show a bar on standard error, and what to call it.

    Returns
    -------
    SharedArray

    Raises
    ------
    FileExistsError
        If the name is taken.
    MemoryError
        If there is not so much shared memory. Nothing is left then.
    TypeError, ValueError
        If the name cannot be one, or the values cannot be shared.

    Examples
    --------
    >>> with put("doctest-put", [[1, 2], [3, 4]], axes="yx") as shared:
    ...     shared.shape, shared.axes, open("doctest-put")[1].tolist()
    ((2, 2), ('y', 'x'), [3, 4])
    """
    if not isinstance(progress, (bool, str)):
        raise TypeError(f"progress must be a bool, or a text for the bar, got {progress!r}")
    return bare.put_shared(SharedArray, name, array, axes, replace, partial(_fill, progress))


def empty(
    name: str,
    shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike,
    axes: str | Sequence[str] | None = None,
    *,
    order: Literal["C", "F"] = "C",
    replace: bool = False,
) -> SharedArray:
    """Return a shared array to be filled in place, for instance by ``image.read_into``.

    Parameters
    ----------
    name, axes, replace
        As for `put`.
    shape : int or ints
        Its shape.
    dtype : dtype
        Its dtype; any but Python objects.
    order : {"C", "F"}
        Which axis is contiguous: the last or the first.

    Returns
    -------
    SharedArray
        Of zeros.

    Raises
    ------
    FileExistsError, MemoryError, TypeError, ValueError
        As for `put`.

    Examples
    --------
    >>> with empty("doctest-empty", (2, 3), "uint8") as shared:
    ...     shared[1] = 9
    ...     int(shared.array.sum())
    27
    """
    return bare.make_shared(SharedArray, name, shape, dtype, axes, order, replace)


def open(name: str, readonly: bool = False) -> SharedArray:
    """Open a shared array that any process of this machine has put, without a copy.

    Parameters
    ----------
    name : str
        Its name.
    readonly : bool
        Whether its array refuses to be written to.

    Raises
    ------
    FileNotFoundError
        If there is none of this name.
    ValueError
        If it is no shared array, or a damaged one, or one that is still being filled.

    Examples
    --------
    >>> with put("doctest-open", [1, 2]), open("doctest-open", readonly=True) as shared:
    ...     shared.array.flags.writeable
    False
    """
    return bare.open_shared(SharedArray, name, readonly)


# ---------------------------------------------------------------------- values


def _fill(progress: bool | str, shared: bare.SharedArray, array: Any) -> None:
    with _bar(progress, shared) as told:
        target = shared.array
        if is_xarray(array):
            array = array.data
        if isinstance(array, CellImg):
            _compute(target, array, told)
        elif isinstance(array, Source):
            _copy_edition(target, array, told)
        elif hasattr(array, "__dask_graph__"):
            import dask.array as da

            # Where it is computed in other processes they have it by its name.
            da.store(array, shared, lock=False)
            told(shared.nbytes)
        elif isinstance(array, np.ndarray) and array.flags.fnc:
            _copy(target.T, array.T, array.T, told)
        else:
            _copy(target, array, quick_source(array), told)


def _compute(target: np.ndarray[Any, Any], image: CellImg, told: Callable[[int], object]) -> None:
    """Compute an image in steps along its first axis, each many cells long."""
    edges = [0, *np.cumsum(image.chunks[0]).tolist()] if image.ndim else []
    every = -(-len(edges) // _MOST_STEPS)
    cuts = [*edges[:-1:every], *edges[-1:]] if every else []
    if image.dtype != target.dtype or len(cuts) < 2:
        target[...] = image[...]
        told(target.nbytes)
        return
    for start, stop in pairwise(cuts):
        part = target[start:stop]
        first, last = [0] * image.ndim, [*image.shape]
        first[0], last[0] = start, stop
        image.read_into(part, Roi(tuple(first), tuple(last)))
        told(part.nbytes)


def _copy_edition(
    target: np.ndarray[Any, Any], source: Source, told: Callable[[int], object]
) -> None:
    """Copy a source as it is at one moment."""
    while True:
        edition = source.node.now
        try:
            _copy(target, source, _Boxes(edition), told)
            return
        except SourceChangedError:
            # Somebody edits it meanwhile, and its store holds one version only.
            if source.node.now is edition:
                raise


class _Boxes:
    """Reads boxes by their slices."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getitem__(self, box: Any) -> Any:
        return self._reader.read(() if box is ... else box)


def _copy(
    target: np.ndarray[Any, Any], array: Any, source: Any, told: Callable[[int], object]
) -> None:
    """Read boxes of an array and write them, several at once."""

    def copy(box: tuple[slice, ...]) -> None:
        part = target[box or ...]
        part[...] = np.asarray(source[box or ...])
        told(part.nbytes)

    todo = [*boxes(array)]
    get_crew().run(todo, copy, len(todo))


@contextmanager
def _bar(progress: bool | str, shared: bare.SharedArray) -> Iterator[Callable[[int], object]]:
    if progress is False:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    name = progress if isinstance(progress, str) else shared.name
    scale = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=shared.nbytes, desc=name, file=sys.stderr, **scale) as bar:
        yield bar.update


# ---------------------------------------------------------------------- without the library


def _numpy_line(made: SharedArray, platform: str = sys.platform) -> str:
    """Return a line of Python that maps the memory with NumPy, and leaves it to its owner."""
    dtype: Any = f'"{made.dtype}"' if made.dtype.names is None else made.dtype.descr
    order = "" if made.order == "C" else ', order="F"'
    if made.nbytes == 0:
        return f"import numpy; a = numpy.empty({made.shape}, {dtype})"
    if platform.startswith("linux"):
        return (
            f'import numpy; a = numpy.memmap("/dev/shm/{made.name}", {dtype}, "r+", '
            f"{made.offset}, {made.shape}{order})"
        )
    whole = made.offset + made.nbytes
    # Not by multiprocessing, which removes what it has opened.
    if platform == "win32":
        imports, memory = "mmap", f'mmap.mmap(-1, {whole}, "{made.name}")'
    else:
        imports = "_posixshmem, mmap"
        memory = f'mmap.mmap(_posixshmem.shm_open("/{made.name}", 2), {whole})'
    return (
        f"import {imports}, numpy; "
        f"a = numpy.ndarray({made.shape}, {dtype}, {memory}, {made.offset}{order})"
    )
