"""The lazy image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

from cellimg_dask.blocks.errors import SourceChangedError
from cellimg_dask.blocks.functions import ArrayFunction, BlockFunction
from cellimg_dask.geometry import CellGrid, Roi, Space, parse_index
from cellimg_dask.image.describe import as_html, as_text
from cellimg_dask.image.graph import Graph, graph_of
from cellimg_dask.image.gridded import Gridded
from cellimg_dask.image.input import checked_fill
from cellimg_dask.image.request import Request, request
from cellimg_dask.image.space_of import Placed
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.memory import Room
from cellimg_dask.loading.node import ImageNode
from cellimg_dask.loading.priorities import BACKGROUND, INTERACTIVE
from cellimg_dask.loading.together import cells_together
from cellimg_dask.loading.watch import Change
from cellimg_dask.state.cache import CacheStats, memory_bytes

if TYPE_CHECKING:
    from typing import Self

    import dask.array
    import xarray

__all__ = ["CellImg", "check_parameter", "image_arrived"]

T = TypeVar("T")

_DASK_METHODS = frozenset(
    ("rechunk", "store", "to_zarr", "map_blocks", "map_overlap", "blocks", "npartitions", "vindex")
)


class CellImg(Gridded, Placed, NDArrayOperatorsMixin):
    """A lazy image: cells are computed when they are read, once, and kept in a cache.

    Made by `map_cells` and `fill_cells`. Reading (``image[...]``, ``numpy.asarray(image)``)
    computes on a few threads and gives NumPy arrays. NumPy functions and arithmetic on the image
    stay lazy and give dask arrays; the image is itself a dask collection.

    Notes
    -----
    Thread-safe, as far as the block function is.
    """

    def __init__(self, node: ImageNode, space: Space | None = None) -> None:
        self.node = node
        """The image over all changes of what it reads."""
        self._space = Space.of(node.grid.ndim) if space is None else space

    @property
    def loader(self) -> CellLoader:
        """The path from a cell to its data, as they are now."""
        loader: CellLoader = self.node.now
        return loader

    # ------------------------------------------------------------------ what it is

    @property
    def grid(self) -> CellGrid:
        """Grid of cells."""
        return self.node.grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type, in native byte order."""
        return self.loader.dtype

    @property
    def space(self) -> Space:
        """Where the voxels lie: that of what it was made from, or what `with_space` says."""
        return self._space

    def with_space(
        self,
        space: Space | None = None,
        *,
        axes: Any = None,
        units: Any = None,
        scale: Any = None,
        translation: Any = None,
    ) -> Self:
        """Return the same image, cells and all, with something else said of where voxels lie.

        Parameters
        ----------
        space : Space, optional
            Default: the present one.
        axes, units, scale, translation
            What is to be replaced in it; as in `Space.of`.

        Raises
        ------
        TypeError, ValueError
            If a value does not fit the image's axes.

        Examples
        --------
        >>> import cellimg_dask as ci
        >>> image = ci.map_cells(np.negative, np.zeros((4, 6)), cell_shape=2)
        >>> image.with_space(axes="yx", units="um", scale=0.5).units
        ('micrometer', 'micrometer')
        """
        base = self._space if space is None else space
        if not isinstance(base, Space):
            raise TypeError(f"space must be a Space, got {type(base).__name__}; see Space.of")
        if base.ndim != self.ndim:
            raise ValueError(f"a space of {base.ndim} axes for an image of {self.ndim}")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._space = base.replace(axes, units, scale, translation)
        return other

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"the truth of an image of {self.size} voxels is ambiguous; "
                f"use image.to_dask().any() or .all()"
            )
        return bool(self[...].item())

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if not name.startswith("_") and (hasattr(np.ndarray, name) or name in _DASK_METHODS):
            hint = f"; use image.to_dask().{name}, or numpy.asarray(image).{name}"
        raise AttributeError(f"a lazy image has no attribute {name!r}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        return as_text(self.loader, self._space)

    def _repr_html_(self) -> str:
        return as_html(self.loader, self._space)

    # ------------------------------------------------------------------ reading

    def __getitem__(self, key: Any) -> Any:
        """Compute and return a region as a new NumPy array.

        ``key`` is a `Roi`, or integers, slices of step 1 and an ellipsis as in NumPy. Bounds
        outside the image are an `IndexError`.
        """
        roi, dropped = parse_index(key, self.shape)
        out = np.empty(roi.shape, self.dtype)
        self._read(roi, out)
        if not dropped:
            return out
        return out[tuple(0 if axis in dropped else slice(None) for axis in range(self.ndim))]

    def read_into(
        self,
        out: NDArray[Any],
        roi: Any = ...,
        *,
        cells_per_call: int | Sequence[int] | Literal["auto"] | None = None,
    ) -> NDArray[Any]:
        """Compute a region into an existing array and return that array.

        Parameters
        ----------
        out : ndarray
            Writable, of the region's shape and of a dtype that holds the image's.
        roi : Roi or index expression, optional
            The region; default: the whole image.
        cells_per_call : int, ints, "auto" or None
            How many neighbouring cells along each axis are computed by one call, so that the
            halo is read and computed once for all of them; ``"auto"``: as many as is good,
            within the memory. Past the cache: what is there is computed again, and nothing is
            kept. For local functions of arrays, which give the same result for any size of block.

        Raises
        ------
        ValueError
            If ``out`` does not fit.
        """
        box, _ = parse_index(roi, self.shape)
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
        if out.shape != box.shape:
            raise ValueError(f"out has shape {out.shape}, expected {box.shape}")
        if not out.flags.writeable:
            raise ValueError("out is read-only; give a writable array")
        if not np.can_cast(self.dtype, out.dtype, "safe"):
            raise ValueError(f"out has dtype {out.dtype}, which cannot hold {self.dtype}")
        region = out
        if out.dtype != self.dtype or not out.dtype.isnative or self.loader.reads_from(out):
            region = np.empty(box.shape, self.dtype)
        if cells_per_call is None:
            self._read(box, region)
        else:

            def read_together(loader: CellLoader) -> None:
                room = Room(loader.crew().num_threads, memory_bytes())
                together = cells_together(loader, cells_per_call, [room])
                coarse = loader if together is None else together.coarse
                coarse.read(box.start, box.stop, region)

            self._retrying(read_together)
        if region is not out:
            out[...] = region
        return out

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(
                "a lazy image has no memory to share: np.asarray computes it; copy=False cannot"
            )
        data = np.empty(self.shape, self.dtype)
        self._read(Roi.of_shape(self.shape), data)
        return data if dtype is None else data.astype(dtype, copy=False)

    def load(self, index: SupportsIndex | Sequence[SupportsIndex]) -> NDArray[Any]:
        """Return a whole cell, read-only and without a copy, computing it if need be.

        Parameters
        ----------
        index : int or ints
            Flat index or position in the grid.
        """
        number, node = self._cell_index(index), self.node
        if node.frozen is None:
            try:
                cell: NDArray[Any] = node.now.load(number)
            except SourceChangedError:
                return self._retrying(lambda loader: loader.load(number))
            return cell
        roi = self.grid.roi(self.grid.position(number))
        cell = np.empty(roi.shape, self.dtype)
        self._read(roi, cell)
        cell.flags.writeable = False
        return cell

    def peek(self, index: SupportsIndex | Sequence[SupportsIndex]) -> NDArray[Any] | None:
        """Return a cell, read-only, if it is in memory, else None; computes nothing."""
        return self.loader.peek(self._cell_index(index))

    def request(
        self,
        roi: Any = ...,
        priority: SupportsIndex = INTERACTIVE,
        cache: Literal["use", "bypass"] = "use",
    ) -> Request:
        """Begin to compute a region in the background, into an array in memory.

        Parameters
        ----------
        roi : Roi or index expression, optional
            The region, as in ``image[...]``; default: the whole image.
        priority : int
            Lower numbers go first, among equals what was asked for first. 10 is that of
            `prefetch`; above 0 a request makes way for whoever reads.
        cache : {"use", "bypass"}
            Whether cells are looked up in the cache and kept there, or each is computed anew, for
            this request only.

        Returns
        -------
        Request
            To wait for it, cancel it, write it elsewhere, or be called when it is there.
        """
        return request(self.node, roi, priority, cache)

    def prefetch(self, roi: Any = ...) -> Request:
        """Begin to compute a region into the cache, in the background, behind all that is urgent.

        Returns
        -------
        Request
            Done when the cells are there; it keeps no result.
        """
        return request(self.node, roi, BACKGROUND, "use", keep=False)

    def invalidate(self, roi: Any = ...) -> None:
        """Forget what was computed from a region, because an input changed there.

        Safe at any time, also while cells are being computed: a computation that began before
        is never kept. Default: the whole image.
        """
        box, _ = parse_index(roi, self.shape)
        self.node.invalidate(box)

    @property
    def params(self) -> Mapping[str, Any]:
        """Keyword parameters of the function."""
        return MappingProxyType(self.loader.params)

    def set_params(self, **params: Any) -> None:
        """Change parameters of the function, as if the image had been made with them.

        Takes place at once for this image and all that read it; a computation that has begun
        goes on with what it began with. Cells of other parameters are kept as long as the cache
        has room: when a parameter comes back they are found again, also downstream. The halo
        stays what it is, so give one that is wide enough for all parameters to come.

        Parameters
        ----------
        **params
            Those that change; the others stay.

        Raises
        ------
        TypeError
            If the function has no such parameter.

        Examples
        --------
        >>> import cellimg_dask as ci
        >>> image = ci.map_cells(np.full_like, np.zeros(4), dtype=float, params={"fill_value": 1})
        >>> image[:2]
        array([1., 1.])
        >>> image.set_params(fill_value=2)
        >>> image[:2]
        array([2., 2.])
        """
        known = self.loader.params
        for name in params:
            if name not in known:
                _check_parameter(self.loader.function, name)
        self.node.set_params(params)

    def snapshot(self) -> CellImg:
        """Return the image as it is now, whatever changes afterwards.

        It shares the cells that stay the same. A store that is written to later is an error
        where that can be seen (zarr in a local folder, the store of a `Source`), not a wrong
        result.
        """
        return CellImg(ImageNode(self.loader.pinned(), None), self._space)

    def freeze(self, fill_value: Any = 0) -> None:
        """Show what is in memory now and compute nothing, until `thaw`.

        Reading gives the cells that are in the cache, as they are now and as long as it holds
        them, and ``fill_value`` elsewhere. Callbacks of `on_dirty` are put off. Only reading
        this image is affected (``image[...]``, `load`, `read_into`, `request`,
        ``numpy.asarray``); images that read it, `to_dask`, `snapshot` and `run` go on to get true
        values.

        Raises
        ------
        ValueError
            If it is frozen, or ``fill_value`` is no value of the image's dtype.
        """
        self.node.freeze(checked_fill(fill_value, self.dtype, "an image"))

    def thaw(self) -> None:
        """End `freeze`; callbacks of `on_dirty` are told once of all that has changed meanwhile.

        Raises
        ------
        ValueError
            If the image is not frozen.
        """
        self.node.thaw()

    @property
    def is_frozen(self) -> bool:
        """Whether it shows what was in memory when `freeze` was called."""
        return self.node.frozen is not None

    def on_dirty(self, callback: Callable[[Change], object]) -> Callable[[Change], object]:
        """Have ``callback(change)`` called when cells of the image are outdated.

        Once for each edit of a `Source`, or `invalidate`, that reaches the image, with the exact
        cells; after it has taken place, in the thread that made it (or in one that is just
        calling callbacks), images upstream first. The callback may read, request and edit. One
        that raises is logged, to the logger ``cellimg_dask``.

        Returns
        -------
        callable
            The callback, which is dropped when nobody else holds it any more.
        """
        self.node.watchers.add(callback)
        return callback

    def stats(self) -> CacheStats:
        """Return this image's counters: hits, misses, joins, loads and so on."""
        return self.loader.shelf.stats()

    def graph(self) -> Graph:
        """Return what the image rests on: all images upstream, sources and arrays, with counts.

        Text where it is printed, a picture in a notebook, and in a file by ``.save("x.svg")``.
        It tells of this moment and computes nothing.

        Examples
        --------
        >>> import cellimg_dask as ci
        >>> negative = ci.map_cells(np.negative, np.zeros((4, 6)), cell_shape=2)
        >>> negative[:2, :2].shape
        (2, 2)
        >>> negative.graph()
        Graph of 1 image on 1 input
        #  what         shape   dtype    cells              cached     dirty  reads
        1  NumPy array  (4, 6)  float64                     in memory
        2  negative     (4, 6)  float64  6 cells of (2, 2)          1      0  #1: halo 0
        """
        return graph_of(self.node)

    def _read(self, roi: Roi, out: NDArray[Any]) -> None:
        """Read a box into an array of its shape and of the image's dtype."""
        frozen = self.node.frozen
        if frozen is None:
            self._retrying(lambda loader: loader.read(roi.start, roi.stop, out))
        else:
            frozen.read(roi.start, roi.stop, out)

    def _retrying(self, work: Callable[[CellLoader], T]) -> T:
        """Do something with the present edition; once more if its store changes meanwhile."""
        while True:
            loader = self.loader
            try:
                return work(loader)
            except SourceChangedError:
                if self.loader is loader:
                    raise

    def _cell_index(self, index: SupportsIndex | Sequence[SupportsIndex]) -> int:
        grid = self.node.grid
        if type(index) is int and 0 <= index < grid.num_cells:
            return index
        return grid.cell(index).index

    # ------------------------------------------------------------------ dask

    def to_dask(self) -> dask.array.Array:
        """Return the image as a dask array, one chunk and one task per cell.

        Building it costs the same for any number of cells and calls nothing of the user's.
        """
        from cellimg_dask.image.dask_graph import to_dask

        return to_dask(self.loader)

    to_dask_array = to_dask  # The name that dask.array.asarray looks for.

    def to_xarray(self, name: str | None = None) -> xarray.DataArray:
        """Return the image as a lazy array of xarray, with dimensions and coordinates.

        Axes without names get the last of t, c, z, y and x. Coordinates are given where scale,
        translation or unit are known; units are their attribute ``units``.

        Raises
        ------
        ImportError
            If xarray is not installed.
        """
        from cellimg_dask.image.labelled import to_xarray

        return to_xarray(self.to_dask(), self.space, name)

    def compute(self, **kwargs: Any) -> NDArray[Any]:
        """Compute the whole image with a dask scheduler; see `dask.compute`."""
        result: NDArray[Any] = self.to_dask().compute(**kwargs)
        return result

    def persist(self, **kwargs: Any) -> dask.array.Array:
        """Compute all cells and keep them in dask's memory; see `dask.persist`."""
        return self.to_dask().persist(**kwargs)

    def visualize(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the task graph; see `dask.visualize`."""
        return self.to_dask().visualize(*args, **kwargs)

    @property
    def dask(self) -> Any:
        """The task graph."""
        return self.to_dask().dask

    def __dask_graph__(self) -> Any:
        return self.to_dask().__dask_graph__()

    def __dask_keys__(self) -> Any:
        return self.to_dask().__dask_keys__()

    def __dask_layers__(self) -> Any:
        return self.to_dask().__dask_layers__()

    def __dask_tokenize__(self) -> Any:
        from cellimg_dask.queues.tasks import dask_name

        return dask_name(self.loader)

    def __dask_postcompute__(self) -> Any:
        return self.to_dask().__dask_postcompute__()

    def __dask_postpersist__(self) -> Any:
        return self.to_dask().__dask_postpersist__()

    @staticmethod
    def __dask_optimize__(graph: Any, keys: Any, **kwargs: Any) -> Any:
        from dask.array import Array

        return Array.__dask_optimize__(graph, keys, **kwargs)

    @staticmethod
    def __dask_scheduler__(graph: Any, keys: Any, **kwargs: Any) -> Any:
        from dask.threaded import get

        return get(graph, keys, **kwargs)

    # ------------------------------------------------------------------ NumPy

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out", ())
        if any(isinstance(array, np.ndarray) for array in out):
            # Somebody's array is to be written, so there is nothing to be lazy about.
            arrays = [np.asarray(v) if isinstance(v, CellImg) else v for v in inputs]
            return getattr(ufunc, method)(*arrays, **kwargs)
        if method != "__call__":
            raise TypeError(
                f"numpy.{ufunc.__name__}.{method} has no lazy form; use a function such as "
                f"numpy.sum(image), or numpy.asarray(image)"
            )
        lazy = [_lazy(value) for value in inputs]
        return getattr(ufunc, method)(*lazy, **{k: _lazy(v) for k, v in kwargs.items()})

    def __array_function__(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return func(*_lazy(args), **_lazy(kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return image_arrived, (self.loader, self._space)


def image_arrived(loader: CellLoader, space: Space | None = None) -> CellImg:
    """Return an image that was sent here: as it was then, whatever happens to its inputs."""
    return CellImg(ImageNode(loader, [None] * len(loader.readers)), space)


def _check_parameter(function: BlockFunction, name: str) -> None:
    """Refuse a parameter that a function of arrays does not take."""
    if isinstance(function, ArrayFunction):
        check_parameter(function.function, function.name, name)


def check_parameter(function: Callable[..., Any], called: str, name: str) -> None:
    """Refuse a parameter that a function does not take."""
    try:
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):
        # It does not say.
        return
    if name not in takes and all(p.kind is not p.VAR_KEYWORD for p in takes.values()):
        raise TypeError(f"{called} has no parameter {name!r}; it has {', '.join(takes) or 'none'}")


def _lazy(value: Any) -> Any:
    """Return ``value`` with every lazy image in it as a dask array."""
    if isinstance(value, CellImg):
        return value.to_dask()
    if isinstance(value, (tuple, list)):
        return type(value)(_lazy(item) for item in value)
    if isinstance(value, dict):
        return {key: _lazy(item) for key, item in value.items()}
    return value
