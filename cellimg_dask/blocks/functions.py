"""The ways in which a user's function computes a cell, under one protocol."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.task import TaskCancelledError
from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.errors import (
    BlockError,
    CellimgError,
    InitError,
    RemoteError,
    ResultError,
    describe,
)
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.tasks import current_task
from cellimg_dask.blocks.wrappers import bound_function, call, function_name
from cellimg_dask.geometry import CellGrid, Roi

__all__ = [
    "ArrayFunction",
    "BlockCode",
    "BlockFunction",
    "FillFunction",
    "ValueFunction",
    "current_worker",
    "working_as",
]


class BlockFunction(Protocol):
    """Computes a cell from its inputs."""

    name: str
    """How messages and reprs call the function."""
    fresh: bool
    """Whether results are new arrays of the image's dtype that nobody else can hold."""

    def apply(
        self,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
        dtype: np.dtype[Any],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Return the cell's data: its shape, a dtype that fits, perhaps a view.

        A function that writes may use ``out`` (the cell's shape and dtype) and return it.

        Raises
        ------
        BlockError
            If the user's function raises.
        ResultError
            If its result has the wrong shape, dtype or kind.
        """
        ...

    def bound(self, bind: Callable[[Any], Any]) -> BlockFunction:
        """Return the same with ``bind(f)`` in place of the user's function ``f``."""
        ...


def _call(
    plan: CellPlan,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    roi: Roi | None = None,
) -> Any:
    """Run user code; whatever it raises becomes a `BlockError` that names the cell."""
    try:
        return call(function, *args, **kwargs)
    except TaskCancelledError:
        # Nobody waits for the cell.
        raise
    except CellimgError as error:
        if isinstance(error, RemoteError):
            raise BlockError(name, plan.position, roi or plan.roi, str(error)) from error
        # A failure of an image that the function itself reads, or of its init, named already.
        raise
    except (Exception, SystemExit) as error:
        raise BlockError(name, plan.position, roi or plan.roi, describe(error)) from error


class ArrayFunction:
    """A function from arrays to an array; the result is checked and cropped."""

    fresh = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function_name(function)

    def apply(
        self,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
        dtype: np.dtype[Any],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Call ``function(*inputs, **params)``; see `BlockFunction.apply`."""
        result = _call(plan, self.name, self.function, inputs, params)
        if type(result) is not np.ndarray:
            result = self._as_array(plan, result)
        if result.dtype != dtype and not np.can_cast(result.dtype, dtype, "safe"):
            raise ResultError(
                self.name,
                plan.position,
                plan.roi,
                f"returned dtype {result.dtype}, which {dtype} cannot hold; expected {dtype}: "
                f"return result.astype({str(dtype)!r}) or give dtype={str(result.dtype)!r}",
            )
        array: NDArray[Any] = result
        shape = array.shape
        if shape == plan.full_shape:
            return array if shape == plan.shape else array[plan.crop]
        if shape == plan.shape:
            return array
        with_halo = (
            f" or, with its halo, {plan.full_shape}" if plan.full_shape != plan.shape else ""
        )
        raise ResultError(
            self.name,
            plan.position,
            plan.roi,
            f"returned shape {shape}, expected {plan.shape}{with_halo} for inputs of shape "
            f"{', '.join(str(array.shape) for array in inputs) or 'none'}; drop_axis=, new_axis= "
            f"and shrink= declare a result of another shape",
        )

    def bound(self, bind: Callable[[Any], Any]) -> ArrayFunction:
        """Return the same with another function; see `BlockFunction.bound`."""
        return ArrayFunction(bind(self.function))

    def _as_array(self, plan: CellPlan, result: Any) -> NDArray[Any]:
        if isinstance(result, np.ma.MaskedArray):
            raise ResultError(
                self.name,
                plan.position,
                plan.roi,
                "returned a masked array, whose mask would be lost; return result.filled(value)",
            )
        if not hasattr(result, "__array__") or not hasattr(result, "shape"):
            hint = (
                "; a function that writes into a block belongs in fill_cells"
                if result is None
                else "; return a NumPy array"
            )
            raise ResultError(
                self.name,
                plan.position,
                plan.roi,
                f"returned {type(result).__name__}, expected an array of shape {plan.shape}{hint}",
            )
        return np.asarray(result)


class FillFunction:
    """A function of a `Block` that writes into ``block.data`` and returns nothing.

    With a ``grid`` messages name the cells of that one, which stand for those of the image. With
    ``in_place`` the function writes every voxel, into whatever memory it is given.
    """

    fresh = True

    def __init__(
        self,
        function: Callable[[Block], None],
        grid: CellGrid | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self.function = function
        self.grid = grid
        self.in_place = in_place
        self.name = function_name(function)

    def apply(
        self,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
        dtype: np.dtype[Any],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Call ``function(block)``; see `BlockFunction.apply`."""
        if self.in_place:
            out = np.empty(plan.shape, dtype) if out is None else out
        elif out is None or not out.flags.carray:
            # Reshaping block.data has to give a view, as it does for any new array.
            out = np.zeros(plan.shape, dtype)
        else:
            out[...] = np.zeros((), dtype)
        roi = plan.roi if self.grid is None else self.grid.roi(plan.position)
        block = Block(plan, out, inputs, params)
        result = _call(plan, self.name, self.function, (block,), {}, roi)
        if result is not None:
            raise ResultError(
                self.name,
                plan.position,
                roi,
                f"returned {type(result).__name__}, expected None: a fill function writes into "
                f"block.data; a function that returns an array belongs in map_cells",
            )
        return out

    def bound(self, bind: Callable[[Any], Any]) -> FillFunction:
        """Return the same with another function; see `BlockFunction.bound`."""
        return FillFunction(bound_function(self.function, bind), self.grid, in_place=self.in_place)


class ValueFunction:
    """A function of a `Block` that returns any object, the value of the block.

    The image has one voxel, and the plan one cell, for each block of ``grid``.
    """

    fresh = True

    def __init__(self, function: Callable[[Block], Any], grid: CellGrid) -> None:
        self.function = function
        self.grid = grid
        """Blocks in voxels of what is read, for messages."""
        self.name = function_name(function)

    def apply(
        self,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
        dtype: np.dtype[Any],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Call ``function(block)``; see `BlockFunction.apply`."""
        if out is None:
            out = np.empty(plan.shape, dtype)
        block = Block(plan, out, inputs, params)
        roi = self.grid.roi(plan.position)
        out[(0,) * out.ndim] = _call(plan, self.name, self.function, (block,), {}, roi)
        return out

    def bound(self, bind: Callable[[Any], Any]) -> ValueFunction:
        """Return the same with another function; see `BlockFunction.bound`."""
        return ValueFunction(bound_function(self.function, bind), self.grid)


class BlockCode:
    """Code that fills a block, as the original's worker code: the name ``block`` is the block.

    Names that the code or ``init`` binds live on from block to block in one namespace for each
    worker thread (or process); ``init`` runs once in it, before the first block. On a
    `BlockQueue` the namespace begins with the names that the queue's own ``init`` bound.

    Parameters
    ----------
    code : str
        Statements, for instance ``"block.data[...] = g(block.inputs[0])[block.halo]"``.
    init : str, optional
        Statements run once per worker, for instance imports or loading a model.

    Raises
    ------
    SyntaxError
        If either does not compile.
    InitError
        On reading, if ``init`` raises; no block of that worker runs, the next one tries again.

    Examples
    --------
    >>> double = BlockCode("block.data[...] = factor * block.inputs[0]", init="factor = 2")
    """

    def __init__(self, code: str, init: str | None = None) -> None:
        for what, text in (("code", code), ("init", init)):
            if not isinstance(text, str) and not (what == "init" and text is None):
                raise TypeError(f"BlockCode {what} must be a string, got {type(text).__name__}")
        self.code = code
        """What runs for each block."""
        self.init = init
        """What runs once per worker."""
        self._compiled_init = _compile(init or "", "<BlockCode init>")
        self._compiled = _compile(code, "<BlockCode>")

    def __call__(self, block: Block) -> None:
        """Run the code on ``block``."""
        namespace = self._namespace()
        # The code may read an image that the same code fills, on this very thread.
        outer = namespace.get("block"), namespace.get("task")
        namespace["block"], namespace["task"] = block, current_task()
        try:
            exec(self._compiled, namespace)
        finally:
            namespace["block"], namespace["task"] = outer

    def _namespace(self) -> dict[str, Any]:
        worker = _thread.worker
        key = (self.code, self.init, worker)
        namespace = _thread.namespaces.get(key)
        if namespace is None:
            namespace = {"__name__": "__block_code__"}
            if worker is not None:
                namespace.update(worker.namespace)
            try:
                exec(self._compiled_init, namespace)
            except (Exception, SystemExit) as error:
                raise InitError(
                    f"init of BlockCode failed with {type(error).__name__}: {error}; "
                    f"no block ran:\n{self.init}"
                ) from error
            _thread.namespaces[key] = namespace
        return namespace

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockCode) and (self.code, self.init) == (other.code, other.init)

    def __hash__(self) -> int:
        return hash((BlockCode, self.code, self.init))

    def __reduce__(self) -> tuple[type[BlockCode], tuple[str, str | None]]:
        return BlockCode, (self.code, self.init)

    def __repr__(self) -> str:
        return f"BlockCode({self.code!r}, init={self.init!r})"

    def __dask_tokenize__(self) -> tuple[str, str, str | None]:
        return "BlockCode", self.code, self.init


class Prepared(Protocol):
    """A worker whose ``init`` has run."""

    namespace: dict[str, Any]


class _Thread(threading.local):
    """What block functions find in the thread that runs them."""

    def __init__(self) -> None:
        # Equal code shares one namespace, also after unpickling.
        self.namespaces: dict[tuple[str, str | None, Prepared | None], dict[str, Any]] = {}
        self.worker: Prepared | None = None


_thread = _Thread()


def current_worker() -> Prepared | None:
    """Return the queue's worker that this thread is at the moment."""
    return _thread.worker


class working_as:  # noqa: N801 - a context manager, used like a function
    """Be a worker of a queue for a while."""

    __slots__ = ("_before", "_worker")

    def __init__(self, worker: Prepared) -> None:
        self._worker = worker

    def __enter__(self) -> None:
        self._before = _thread.worker
        _thread.worker = self._worker

    def __exit__(self, *exc: object) -> None:
        _thread.worker = self._before


@functools.lru_cache(maxsize=256)
def _compile(text: str, filename: str) -> CodeType:
    return compile(text, filename, "exec")
