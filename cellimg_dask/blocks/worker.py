"""What runs blocks: a job to do, and a worker that its queue's ``init`` has prepared."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.functions import bind, names_bound_by
from cellimg_dask.blocks.errors import InitError, describe
from cellimg_dask.blocks.functions import BlockFunction, current_worker, working_as
from cellimg_dask.blocks.plan import CellPlan, Planner

__all__ = ["BlockJob", "Init", "Worker", "check_init", "get_worker"]

Init: TypeAlias = str | Callable[[], Any] | None
"""Code, or a callable without arguments, that prepares a worker."""


@dataclass(frozen=True, eq=False)
class BlockJob:
    """All that the blocks of one image have in common."""

    function: BlockFunction
    """Computes a cell."""
    planner: Planner
    """Says what each cell reads."""
    params: Mapping[str, Any]
    """Keyword parameters for the function."""
    dtype: np.dtype[Any]
    """Of the result, in native byte order."""
    version: str | None = None
    """What stands for the function's content, where the user says so."""

    def apply(
        self, plan: CellPlan, inputs: tuple[NDArray[Any], ...], out: NDArray[Any] | None
    ) -> NDArray[Any]:
        """Compute a cell here; see `BlockFunction.apply`."""
        return self.function.apply(plan, inputs, self.params, self.dtype, out)


class Worker:
    """One worker of a queue, with what ``init`` left there.

    Parameters
    ----------
    init : str or callable or None
        Run at once. The names that code binds are the worker's; of a callable those that it
        declares ``global``, and those in the mapping that it returns, if any.

    Raises
    ------
    InitError
        If ``init`` raises.

    Notes
    -----
    Belongs to one thread, or to the threads of one process where these share it.
    """

    def __init__(self, init: Init = None) -> None:
        self.namespace: dict[str, Any] = {}
        """Names bound by ``init``."""
        self._bound: weakref.WeakKeyDictionary[BlockFunction, BlockFunction] = (
            weakref.WeakKeyDictionary()
        )
        try:
            if init is not None:
                with working_as(self):
                    self.namespace = names_bound_by(init)
        except (Exception, SystemExit) as error:
            raise InitError(
                f"init of the queue failed with {describe(error)}; no block runs on this worker"
                + (f":\n{init}" if isinstance(init, str) else "")
            ) from error

    def apply(
        self,
        job: BlockJob,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Compute a cell as this worker; see `BlockFunction.apply`."""
        with working_as(self):
            return self._binding(job.function).apply(plan, inputs, job.params, job.dtype, out)

    def _binding(self, function: BlockFunction) -> BlockFunction:
        if not self.namespace:
            return function
        bound = self._bound.get(function)
        if bound is None:
            bound = function.bound(lambda user: bind(user, self.namespace))
            self._bound[function] = bound
        return bound


def get_worker() -> Worker:
    """Return the queue's worker that runs this block; its ``namespace`` is what ``init`` bound.

    Raises
    ------
    RuntimeError
        Outside a block that runs on a `BlockQueue`.
    """
    worker = current_worker()
    if not isinstance(worker, Worker):
        raise RuntimeError(
            "no BlockQueue runs this: get_worker() is for block functions of an image that was "
            "given a queue="
        )
    return worker


def check_init(init: object) -> None:
    """Refuse what cannot be an ``init``, and code that does not compile."""
    if init is None:
        return
    if isinstance(init, str):
        compile(init, "<BlockQueue init>", "exec")
    elif not callable(init):
        raise TypeError(
            f"init must be code (str) or a callable without arguments, got {type(init).__name__}"
        )
