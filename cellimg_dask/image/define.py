"""Defining lazy images: what the user says becomes a loader."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.errors import QueueClosedError
from cellimg_dask.blocks.functions import (
    ArrayFunction,
    BlockCode,
    BlockFunction,
    FillFunction,
)
from cellimg_dask.blocks.named import as_function, importable
from cellimg_dask.blocks.plan import AxisLink, InputPlan, Planner
from cellimg_dask.blocks.wrappers import function_name
from cellimg_dask.geometry import (
    CellGrid,
    Halo,
    HaloLike,
    Space,
    as_int,
    as_ints,
    check_boundary,
    even_cell_shape,
)
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.described import checked_call
from cellimg_dask.image.input import Input, as_input, follow
from cellimg_dask.image.source import Source
from cellimg_dask.image.space_of import space_of
from cellimg_dask.loading.file_array import unwrapped
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.node import ImageNode, defining
from cellimg_dask.loading.readers import Reader, make_reader
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache, get_cache

__all__ = [
    "as_axes",
    "common_shape",
    "common_space",
    "fill_cells",
    "grid_of",
    "make_image",
    "map_cells",
]


def map_cells(
    f: Callable[..., Any] | str,
    *inputs: Any,
    halo: HaloLike | None = None,
    boundary: str = "none",
    fill_value: Any = 0,
    dtype: DTypeLike | None = None,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    params: Mapping[str, Any] | None = None,
    drop_axis: SupportsIndex | Iterable[SupportsIndex] = (),
    new_axis: Mapping[int, int] | None = None,
    shrink: SupportsIndex | Iterable[SupportsIndex] = 1,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> CellImg:
    """Return the lazy image ``f(*inputs)``, computed cell by cell.

    For each cell ``f`` is called as ``f(*arrays, **params)`` with one read-only array per input,
    halo included. It returns an array of the same size, from which the halo is cropped, or just
    the cell. Nothing is called before data are asked for.

    Parameters
    ----------
    f : callable, str or BlockSchema
        From arrays to an array; called from several threads at once. Named as
        ``"module:function"`` or ``"path/to/file.py:function"`` it is imported where it runs. A
        schema, see `describe`, says halo and dtype where these are not given, and what inputs and
        parameters have to be.
    *inputs : array-like or Input
        NumPy, memory-mapped, shared, zarr, h5py, tensorstore or dask arrays, lazy images, anything
        with ``shape``, ``dtype`` and ``__getitem__``. Shapes are equal or broadcast as in NumPy;
        `Input` gives an input its own halo, boundary or mapping.
    halo : int, per-axis ints, or per-axis (before, after) pairs, optional
        Extra voxels that a block reads, in axes of the inputs; any width. Default: none. One width
        for all axes leaves out those of ``drop_axis``. Where ``shrink`` is above 1 it is rounded up
        to a multiple, so that blocks stay in phase.
    boundary : {"none", "constant", "reflect", "symmetric", "edge", "wrap"}
        What lies beyond the image. ``"none"`` clips the halo there, so a local function with
        its own border handling gives the whole-image result; the others mean what
        `numpy.pad` means.
    fill_value : scalar
        For ``boundary="constant"``.
    dtype : dtype, optional
        Of the result; results are cast to it only where that is safe. It may be left out for a
        ufunc, or a function whose return annotation names it.
    cell_shape : int or ints, optional
        Cell shape in voxels of the result. Default: the chunks of the first input that has any
        (cells for a lazy image), else about a million voxels.
    params : mapping, optional
        Keyword arguments for ``f``; the same objects for all cells, so ``f`` must not change them.
        Names that it does not know are an error here, and those that it lacks.
    drop_axis : int or ints
        Axes of the inputs that the result lacks; every cell reads their whole extent.
    new_axis : mapping of int to int, optional
        Axes that the result has in addition: position in the result -> size. Cells span them.
    shrink : int or per-axis ints
        Factor by which ``f`` makes each axis of its input smaller: an axis of ``n`` voxels
        becomes ``ceil(n / factor)``.
    cache : "shared", CellCache or None
        Where cells are kept; None keeps nothing, so an image that reads from this one makes it
        compute a cell again for each neighbour.
    queue : BlockQueue, optional
        Workers that run ``f``; default: the threads of this process.
    version : str, optional
        Stands for ``f`` in keys on disk, in place of its compiled code and what that refers to.

    Returns
    -------
    CellImg

    Raises
    ------
    ParameterError
        If ``params`` are not what ``f`` takes.
    TypeError, ValueError
        If an argument is wrong; the message gives value, axis, what is allowed, and a way out.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(20).reshape(4, 5)
    >>> doubled = map_cells(lambda a: 2 * a, image, dtype=image.dtype, cell_shape=2)
    >>> doubled[1:3, 2]
    array([14, 24])
    """
    check_boundary(boundary)
    f = as_function(f)
    if isinstance(f, BlockCode):
        raise TypeError("BlockCode writes into a block: use fill_cells(code, grid, *inputs, …)")
    if not callable(f):
        hint = "; the function comes first" if any(map(callable, inputs)) else ""
        raise TypeError(f"f must be callable, got {type(f).__name__}{hint}")
    if not inputs:
        raise TypeError("map_cells needs at least one input; fill_cells makes images from none")
    call = checked_call(f, map(as_input, inputs), params, halo=halo, dtype=dtype)
    items, halo = call.items, 0 if call.halo is None else call.halo
    plain = [item for item in items if item.index_map is None]
    if not plain:
        raise ValueError(
            "map_cells takes its shape from the inputs that have no index_map, and every input "
            "has one; use fill_cells with a grid"
        )
    whole = common_shape(plain)
    dropped = as_axes(drop_axis, len(whole), "drop_axis")
    factors = as_ints(shrink, "shrink", ndim=len(whole), minimum=1)
    for axis in dropped:
        if factors[axis] != 1:
            raise ValueError(f"shrink[{axis}] = {factors[axis]} on axis {axis}, which is dropped")
    kept = [axis for axis in range(len(whole)) if axis not in dropped]
    added = _new_axes(new_axis, len(kept))
    rest = iter(kept)
    from_axis = [None if axis in added else next(rest) for axis in range(len(kept) + len(added))]
    shape = tuple(
        added[axis] if source is None else -(-whole[source] // factors[source])
        for axis, source in enumerate(from_axis)
    )
    to_axis = {source: axis for axis, source in enumerate(from_axis) if source is not None}
    links = [AxisLink(to_axis.get(axis), factor) for axis, factor in enumerate(factors)]

    cells = _cell_shape(cell_shape, shape, from_axis, factors, whole, plain)
    main_halo = Halo.of(halo, len(whole))
    plans = []
    for number, item in enumerate(items):
        if item.index_map is None:
            plans.append(_plan_linked(item, number, whole, links, halo, boundary, fill_value))
        else:
            wide: HaloLike = main_halo if len(item.shape) == len(whole) else halo
            plans.append(item.plan(number, None, wide, boundary, fill_value))
    return make_image(
        ArrayFunction(call.function),
        CellGrid(shape, cells),
        items,
        plans,
        _result_dtype(call.function, call.dtype, [_dtype_of(item.array) for item in items]),
        call.params,
        cache,
        queue,
        version,
    ).with_space(_mapped_space(plain, dropped, [factors[axis] for axis in kept], sorted(added)))


def fill_cells(
    f: Callable[[Block], None] | BlockCode | str,
    grid: CellGrid,
    *inputs: Any,
    dtype: DTypeLike | None = None,
    halo: HaloLike | None = None,
    boundary: str = "none",
    fill_value: Any = 0,
    params: Mapping[str, Any] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> CellImg:
    """Return a lazy image whose cells ``f`` fills: ``f(block)`` writes into ``block.data``.

    Parameters
    ----------
    f : callable, BlockCode, str or BlockSchema
        Given a `Block`: ``data`` to write, ``inputs`` to read, ``index``, ``min``, ``max``
        (inclusive), ``dim``, ``halo`` (slices that crop), ``roi``, ``read_roi``, ``position``,
        ``shape``, ``params``. Returns None. Called from several threads at once. May be named
        or described as in `map_cells`.
    grid : CellGrid
        Shape of the image and of its cells.
    *inputs : array-like or Input
        As in `map_cells`; shapes equal the grid's or broadcast to it, else
        ``Input(array, index_map=…)``.
    dtype : dtype
        Of the image; may be left out for a schema that says it.
    halo, boundary, fill_value, params, cache, queue, version
        As in `map_cells`.

    Returns
    -------
    CellImg

    Raises
    ------
    ParameterError
        If ``params`` are not what a schema says.
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> def number(block):
    ...     block.data[...] = block.index
    >>> fill_cells(number, CellGrid((4,), (2,)), dtype="u1")[:]
    array([0, 0, 1, 1], dtype=uint8)
    """
    check_boundary(boundary)
    f = as_function(f)
    if not callable(f):
        raise TypeError(f"f must be callable or a BlockCode, got {type(f).__name__}")
    if not isinstance(grid, CellGrid):
        raise TypeError(
            f"grid must be a CellGrid, got {type(grid).__name__}; "
            f"make one by CellGrid(shape, cell_shape)"
        )
    call = checked_call(f, map(as_input, inputs), params, halo=halo, dtype=dtype, of_block=True)
    items, halo = call.items, 0 if call.halo is None else call.halo
    if call.dtype is None:
        raise TypeError("fill_cells cannot know the dtype: give dtype=…")
    links = [AxisLink(axis) for axis in range(grid.ndim)]
    main_halo = Halo.of(halo, grid.ndim)
    plans = []
    for number, item in enumerate(items):
        if item.index_map is None:
            plans.append(_plan_linked(item, number, grid.shape, links, halo, boundary, fill_value))
        else:
            wide: HaloLike = main_halo if len(item.shape) == grid.ndim else halo
            plans.append(item.plan(number, None, wide, boundary, fill_value))
    checked = _checked_dtype(call.dtype)
    return make_image(
        FillFunction(call.function),
        grid,
        items,
        plans,
        checked,
        call.params,
        cache,
        queue,
        version,
    ).with_space(_filled_space(grid, items))


def _plan_linked(
    item: Input,
    number: int,
    whole: tuple[int, ...],
    links: Sequence[AxisLink],
    halo: HaloLike,
    boundary: str,
    fill_value: Any,
) -> InputPlan:
    """Plan an input whose axes follow the image's."""
    own_links, stretched = follow(item.shape, whole, links, number)
    main, skip = Halo.of(halo, len(whole)), len(whole) - len(item.shape)
    inherited = Halo(main.before[skip:], main.after[skip:])
    plan = item.plan(number, own_links, inherited, boundary, fill_value)
    # An inherited halo is not meant for an axis of length 1 that is broadcast, and one width
    # for all axes not for those that are read whole.
    given = halo if item.halo is None else item.halo
    one_width = not isinstance(given, (Halo, Iterable))
    bare = [
        (wide and item.halo is None) or (link.axis is None and one_width)
        for wide, link in zip(stretched, own_links, strict=True)
    ]

    def widths(side: tuple[int, ...]) -> tuple[int, ...]:
        # Rounded up, so that a block begins where a step of the whole image begins.
        return tuple(
            0 if none else -(-width // link.factor) * link.factor
            for width, link, none in zip(side, own_links, bare, strict=True)
        )

    return replace(plan, halo=Halo(widths(plan.halo.before), widths(plan.halo.after)))


def make_image(
    function: BlockFunction,
    grid: CellGrid,
    items: Sequence[Input],
    plans: Sequence[InputPlan],
    dtype: np.dtype[Any],
    params: Mapping[str, Any] | None,
    cache: CellCache | str | None,
    queue: BlockQueue | None,
    version: str | None,
) -> CellImg:
    """Return a lazy image of checked parts; see `fill_cells` for the rest."""
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping of names, got {type(params).__name__}")
    for name in params or ():
        if not isinstance(name, str):
            raise TypeError(f"params must have strings as names, got {name!r}")
    if cache is None:
        keep = CellCache(0)
    elif isinstance(cache, CellCache):
        keep = cache
    elif cache == "shared":
        keep = get_cache()
    else:
        raise TypeError(f'cache must be "shared", a CellCache or None, got {cache!r}')
    if queue is not None:
        if not isinstance(queue, BlockQueue):
            raise TypeError(
                f"queue must be a BlockQueue, got {type(queue).__name__}; make one by "
                f"BlockQueue(num_workers, backend=…)"
            )
        if queue.closed:
            raise QueueClosedError("the queue is closed; make a new BlockQueue")
        function = queue.ready(function)
    # Decoded chunks need room even where cells are not kept.
    chunks = get_cache() if cache is None else keep
    if version is not None and not isinstance(version, str):
        raise TypeError(f"version must be a string, got {type(version).__name__}")
    planner = Planner(grid, plans)
    with defining():
        inputs = [
            item.array.node if isinstance(item.array, (CellImg, Source)) else None for item in items
        ]
        readers: list[Reader] = [
            make_reader(item.array, chunks) if node is None else node.reader()
            for node, item in zip(inputs, items, strict=True)
        ]
        loader = CellLoader(function, planner, readers, dtype, params or {}, keep, queue, version)
        return CellImg(ImageNode(loader, inputs))


def as_axes(value: Any, ndim: int, what: str) -> tuple[int, ...]:
    """Return axes, negative ones counted from the end, sorted."""
    numbers = (
        as_ints(value, what, ndim=1) if not isinstance(value, Iterable) else as_ints(value, what)
    )
    axes = []
    for axis in numbers:
        if not -ndim <= axis < ndim:
            raise ValueError(f"{what} {axis}: allowed is {-ndim}..{ndim - 1}")
        axes.append(axis % ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{what} names an axis twice: {numbers}")
    return tuple(sorted(axes))


def _new_axes(value: Mapping[int, int] | None, kept: int) -> dict[int, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"new_axis must map the position in the result to the size, for instance {{0: 3}}; "
            f"got {value!r}"
        )
    ndim = kept + len(value)
    sizes = {}
    for axis, size in value.items():
        (place,) = as_axes(as_int(axis, "new_axis"), ndim, "new_axis")
        sizes[place] = as_int(size, f"new_axis[{axis}]", minimum=0)
    if len(sizes) != len(value):
        raise ValueError(f"new_axis names an axis twice: {dict(value)}")
    return sizes


def _cell_shape(
    value: Any,
    shape: tuple[int, ...],
    from_axis: Sequence[int | None],
    factors: tuple[int, ...],
    whole: tuple[int, ...],
    plain: Sequence[Input],
) -> tuple[int, ...]:
    if value is None:
        native = next(filter(None, (_native_cells(item, whole) for item in plain)), None)
        if native is None:
            native = even_cell_shape(len(whole))
        return tuple(
            max(1, shape[axis]) if source is None else max(1, native[source] // factors[source])
            for axis, source in enumerate(from_axis)
        )
    cells = as_ints(value, "cell_shape", ndim=len(shape), minimum=1)
    for axis, source in enumerate(from_axis):
        if source is None and cells[axis] < shape[axis] and isinstance(value, Iterable):
            raise ValueError(
                f"cell_shape[{axis}] = {cells[axis]} on the new axis {axis}: a cell spans a new "
                f"axis, so it must be {shape[axis]}"
            )
    return tuple(
        max(1, shape[axis]) if source is None else size
        for axis, (source, size) in enumerate(zip(from_axis, cells, strict=True))
    )


def grid_of(
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None,
    items: Sequence[Input],
    dropped: Sequence[int] = (),
) -> CellGrid:
    """Return the grid of an image that has the shape of its inputs; see `map_cells`.

    Without the ``dropped`` axes, which count from the front.

    Raises
    ------
    TypeError, ValueError
        If the cell shape is wrong, the inputs do not broadcast, or all have an ``index_map``.
    """
    plain = [item for item in items if item.index_map is None]
    if not plain:
        raise ValueError("the shape comes from the inputs without index_map, and there is none")
    whole = common_shape(plain)
    axes = [axis for axis in range(len(whole)) if axis not in dropped]
    shape = tuple(whole[axis] for axis in axes)
    return CellGrid(shape, _cell_shape(cell_shape, shape, axes, (1,) * len(whole), whole, plain))


def common_shape(items: Sequence[Input]) -> tuple[int, ...]:
    """Return the shape to which inputs broadcast; `ValueError` if they do not."""
    try:
        return np.broadcast_shapes(*(item.shape for item in items))
    except ValueError:
        raise ValueError(
            f"inputs of shapes {', '.join(str(item.shape) for item in items)} do not fit "
            f"together as NumPy broadcasts; if one relates to the image in another way say how: "
            f"Input(array, index_map=lambda roi: …)"
        ) from None


def common_space(items: Iterable[Input], dropped: Sequence[int] = ()) -> Space:
    """Return where the voxels of an image lie that has the shape of its inputs.

    It is what the first input of that shape says that says anything. Without the ``dropped`` axes.
    """
    plain = [item for item in items if item.index_map is None]
    whole = common_shape(plain)
    spaces = [space_of(item) for item in plain if item.shape == whole]
    known = (space for space in spaces if not space.is_plain)
    return next(known, Space.of(len(whole))).without(dropped)


def _mapped_space(
    plain: Sequence[Input], dropped: Sequence[int], factors: Sequence[int], added: Iterable[int]
) -> Space:
    """Return the space of what `map_cells` makes of its inputs."""
    space = common_space(plain, dropped).shrunk(factors)
    for place in added:
        space = space.with_axis(place)
    return space


def _filled_space(grid: CellGrid, items: Iterable[Input]) -> Space:
    """Return the space of an image with a grid of its own."""
    same = [item for item in items if item.index_map is None and item.shape == grid.shape]
    return common_space(same) if same else Space.of(grid.ndim)


def _native_cells(item: Input, whole: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the chunk shape of an input that has the full shape, if it has chunks."""
    array = unwrapped(item.array)
    if item.shape != whole or 0 in whole:
        return None
    if isinstance(array, (CellImg, Source)):
        return array.cell_shape
    chunks = getattr(array, "chunks", None)
    if chunks is None and hasattr(array, "chunk_layout"):
        chunks = array.chunk_layout.read_chunk.shape
    if not isinstance(chunks, (tuple, list)) or len(chunks) != len(whole):
        return None
    sizes = [max(c) if isinstance(c, (tuple, list)) else c for c in chunks]
    if not all(isinstance(c, (int, np.integer)) and c > 0 for c in sizes):
        return None
    return tuple(int(c) for c in sizes)


def _dtype_of(array: Any) -> np.dtype[Any]:
    # tensorstore's own dtypes know their NumPy counterpart.
    dtype: np.dtype[Any] = np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
    return dtype


def _checked_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    result = np.dtype(dtype)
    if result.hasobject or result.itemsize == 0:
        raise ValueError(f"dtype {result} cannot be kept in cells; give one of fixed size")
    return result


def _result_dtype(
    f: Callable[..., Any], dtype: DTypeLike | None, inputs: Sequence[np.dtype[Any]]
) -> np.dtype[Any]:
    """Return the result's dtype without calling anything of the user's."""
    if dtype is not None:
        return _checked_dtype(dtype)
    name, f = function_name(f), importable(f)
    if isinstance(f, np.ufunc) and f.nout == 1 and f.nin == len(inputs):
        return _checked_dtype(f.resolve_dtypes((*inputs, None))[-1])
    annotated = _annotated_dtype(f)
    if annotated is not None:
        return _checked_dtype(annotated)
    given = ", ".join(map(str, inputs))
    raise TypeError(
        f"the dtype that {name} returns for {given} cannot be known without running "
        f"it: give dtype=…, for instance dtype={str(inputs[0])!r}"
    )


def _annotated_dtype(f: Callable[..., Any]) -> np.dtype[Any] | None:
    """Return the dtype in a return annotation such as ``NDArray[np.float32]``, if there is one."""
    try:
        result = typing.get_type_hints(f).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    # Since NumPy 2.5 NDArray is an alias that has to be asked for what it stands for.
    alias = getattr(typing.get_origin(result), "__value__", None)
    if alias is not None:
        result = alias[typing.get_args(result)]
    for argument in typing.get_args(result):
        scalar = typing.get_args(argument)
        if typing.get_origin(argument) is np.dtype and scalar and isinstance(scalar[0], type):
            try:
                found: np.dtype[Any] = np.dtype(scalar[0])
            except TypeError:
                return None
            # An abstract type such as np.floating names no dtype of its own.
            return found if found.type is scalar[0] else None
    return None
