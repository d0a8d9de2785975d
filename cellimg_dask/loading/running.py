"""What the loader asks of a queue: to run blocks, or to compute whole cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Protocol

from numpy.typing import NDArray

from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob
from cellimg_dask.loading.crew import Crew

__all__ = ["BlockRunner", "CellRunner", "Queue", "given_up", "tries_again", "wanted"]

given_up: ContextVar[Future[None] | None] = ContextVar("cellimg_given_up", default=None)
"""Done once nobody wants any more what this thread asks a `CellRunner` for."""

wanted: ContextVar[Callable[[], bool] | None] = ContextVar("cellimg_wanted", default=None)
"""Says whether somebody still wants the cell that this thread computes; None: nobody can tell."""

tries_again: ContextVar[bool] = ContextVar("cellimg_tries_again", default=False)
"""Whether what fails in this thread is tried again by whoever asked, and so by nobody else."""


class BlockRunner(Protocol):
    """Runs block functions somewhere on this machine."""

    copies: bool
    """Whether every result is a new array that nobody else holds."""

    @property
    def crew(self) -> Crew:
        """The threads that plan and read for the workers."""
        ...

    def apply(
        self,
        job: BlockJob,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Run a block function on a worker and wait; see `BlockFunction.apply`."""
        ...


class CellRunner(Protocol):
    """Computes whole cells elsewhere, with what they rest on; ``loader`` is a `CellLoader`."""

    def fetch(
        self, loader: Any, indices: Sequence[int]
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        """Compute cells where they are not held; yield (index, cell, seconds) as they come."""
        ...

    def forget(self, shelf: Any, indices: Any) -> None:
        """Release those among ``indices`` (a sized collection) of an image's cells.

        They are outdated. The image is known by the `Shelf` where its loader keeps them.
        """
        ...


class Queue(Protocol):
    """A `BlockQueue`, as the loader sees it."""

    @property
    def blocks(self) -> BlockRunner | None:
        """Runs block functions, if that is what the queue does."""
        ...

    @property
    def cells(self) -> CellRunner | None:
        """Computes whole cells, if that is what the queue does."""
        ...

    @property
    def token(self) -> object:
        """What results depend on: the ``init``."""
        ...
