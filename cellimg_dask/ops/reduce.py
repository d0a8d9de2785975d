"""What is computed from all cells of an image: partial results, put together in a tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.named import as_function
from cellimg_dask.blocks.wrappers import FunctionWrapper, call
from cellimg_dask.geometry import CellGrid, HaloLike
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import grid_of
from cellimg_dask.image.described import checked_call
from cellimg_dask.image.input import as_input
from cellimg_dask.image.values import cell_values
from cellimg_dask.ops.trees import group_shape
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["Reduced", "combine_values", "reduce_cells"]


def reduce_cells(
    f: Callable[..., Any] | str,
    combine: Callable[[list[Any]], Any] | str,
    *inputs: Any,
    halo: HaloLike | None = None,
    boundary: str = "none",
    fill_value: Any = 0,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    params: Mapping[str, Any] | None = None,
    finish: Callable[[Any], Any] | str | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> Reduced:
    """Return what ``combine`` makes of ``f(*arrays, **params)`` of all cells, lazily.

    Results are put together in a tree, about 64 at a time, and all of them are kept in the cache:
    after a change only the cells that it touched are computed again, and what was made from them.

    Parameters
    ----------
    f : callable, str or BlockSchema
        From one read-only array per input, halo included, to any object.
    combine : callable or str
        From a list of partial results to one of their kind. It is given what ``f`` returned, or
        what it returned itself, of neighbouring cells, in C order. Which cells, and the order,
        depend on the grid only, so the result is the same on every scheduler. It must not change
        what it is given. Of an image without cells it is given an empty list.
    *inputs : array-like or Input
        As in `map_cells`.
    halo : int, per-axis ints, or per-axis (before, after) pairs, optional
        Extra voxels that ``f`` is given. Default: the schema's, else none.
    boundary, fill_value, cell_shape, params
        As in `map_cells`.
    finish : callable or str, optional
        From the one object that is left to the result.
    cache, queue, version
        As in `map_cells`; ``combine`` and ``finish`` run where ``f`` runs.

    Returns
    -------
    Reduced
        ``.result()`` or ``.compute()`` gives the object.

    Raises
    ------
    ParameterError
        If ``params`` are not what ``f`` takes.
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    The brightest voxel:

    >>> import numpy as np
    >>> image = np.array([[1, 7, 2, 4], [3, 0, 5, 6]])
    >>> brightest = reduce_cells(np.max, max, image, cell_shape=(2, 3))
    >>> int(brightest.result())
    7
    """
    f, combine = as_function(f), as_function(combine)
    finish = as_function(finish)
    for what, function in (("f", f), ("combine", combine), ("finish", finish)):
        if not (callable(function) or (what == "finish" and function is None)):
            raise TypeError(f"{what} must be callable, got {type(function).__name__}")
    if not inputs:
        raise TypeError("reduce_cells needs at least one input")
    call = checked_call(f, map(as_input, inputs), params, halo=halo)
    items = call.items
    cells = cell_values(
        OfArrays(call.function),
        grid_of(cell_shape, items),
        *items,
        halo=0 if call.halo is None else call.halo,
        boundary=boundary,
        fill_value=fill_value,
        params=call.params,
        cache=cache,
        queue=queue,
        version=version,
    )
    return combine_values(cells, combine, finish, cache=cache, queue=queue, version=version)


def combine_values(
    cells: CellImg,
    combine: Callable[[list[Any]], Any],
    finish: Callable[[Any], Any] | None = None,
    *,
    cache: CellCache | str | None,
    queue: BlockQueue | None,
    version: str | None = None,
) -> Reduced:
    """Return what ``combine`` makes of all values of an image of values; see `reduce_cells`."""

    def values(f: Callable[[Block], Any], grid: CellGrid, *inputs: CellImg) -> CellImg:
        return cell_values(f, grid, *inputs, cache=cache, queue=queue, version=version)

    one = CellGrid((1,) * cells.ndim, 1)
    if cells.size == 0:
        root = values(_OfNothing(combine), one)
    else:
        root = values(_OfValues(combine), CellGrid(cells.shape, group_shape(cells.shape)), cells)
    while root.size > 1:
        root = values(_OfValues(combine), CellGrid(root.shape, group_shape(root.shape)), root)
    return Reduced(cells, root if finish is None else values(_OfOne(finish), one, root))


class Reduced:
    """One object that is computed from all cells of an image; made by `reduce_cells`.

    It follows the changes of what it rests on. It is a dask collection: ``dask.compute(a, b)``
    computes several at once, and on a cluster each cell is a task.

    Notes
    -----
    Thread-safe, as far as the functions are.
    """

    def __init__(self, cells: CellImg, image: CellImg) -> None:
        self.cells = cells
        """The partial results: one voxel for each cell, of dtype object."""
        self.image = image
        """The result as an image of one voxel: to be read by other images, or watched."""

    def result(self) -> Any:
        """Compute and return the object, through the cache and the queue.

        It is the very object that the cache keeps: copy it before you change it.

        Raises
        ------
        BlockError
            If a function raises; the message names it and the cell.
        """
        return self.image._retrying(lambda loader: loader.prepare()[-1]).item()

    def to_delayed(self) -> Any:
        """Return the object, as it would be computed now, as a `dask.delayed.Delayed`."""
        from cellimg_dask.ops.delayed import to_delayed

        return to_delayed(self.image.loader)

    def compute(self, **kwargs: Any) -> Any:
        """Compute the object with a dask scheduler; see `dask.compute`."""
        return self.to_delayed().compute(**kwargs)

    def persist(self, **kwargs: Any) -> Any:
        """Compute the object and keep it in dask's memory; see `dask.persist`."""
        return self.to_delayed().persist(**kwargs)

    def visualize(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the task graph; see `dask.visualize`."""
        return self.to_delayed().visualize(*args, **kwargs)

    def __repr__(self) -> str:
        count = self.cells.size
        return f"<{type(self).__name__}: {self.image.loader.function.name} of {count:,} cells>"

    def __dask_graph__(self) -> Any:
        return self.to_delayed().__dask_graph__()

    def __dask_keys__(self) -> Any:
        return self.to_delayed().__dask_keys__()

    def __dask_layers__(self) -> Any:
        return self.to_delayed().__dask_layers__()

    def __dask_tokenize__(self) -> Any:
        return self.image.__dask_tokenize__()

    def __dask_postcompute__(self) -> Any:
        return self.to_delayed().__dask_postcompute__()

    def __dask_postpersist__(self) -> Any:
        return self.to_delayed().__dask_postpersist__()

    @staticmethod
    def __dask_optimize__(graph: Any, keys: Any, **kwargs: Any) -> Any:
        from dask.delayed import Delayed

        return Delayed.__dask_optimize__(graph, keys, **kwargs)

    @staticmethod
    def __dask_scheduler__(graph: Any, keys: Any, **kwargs: Any) -> Any:
        from dask.threaded import get

        return get(graph, keys, **kwargs)


# ---------------------------------------------------------------- functions of blocks


class OfArrays(FunctionWrapper):
    """Calls a function with the arrays of a block."""

    def __call__(self, block: Block) -> Any:
        return call(self.function, *block.inputs, **block.params)


class _OfNothing(FunctionWrapper):
    def __call__(self, block: Block) -> Any:
        return call(self.function, [])


class _OfValues(FunctionWrapper):
    def __call__(self, block: Block) -> Any:
        return call(self.function, list(block.inputs[0].flat))


class _OfOne(FunctionWrapper):
    def __call__(self, block: Block) -> Any:
        return call(self.function, block.inputs[0].item())
