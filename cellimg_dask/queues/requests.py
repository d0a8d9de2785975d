"""What a client has asked a cluster for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distributed.scheduler import KilledWorker

from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.queues.held import Taken, release

__all__ = ["Batch", "Image", "Other", "Portion", "Request", "release_all"]


class Image:
    """What the client knows of an image, or an old edition of one, on the cluster."""

    def __init__(self, number: int, edition: int) -> None:
        self.number = number
        self.edition = edition
        """The latest edition that cells were asked of."""
        self.definition: list[Any] = []
        """Future of the image's definition, if it was sent."""
        self.seconds: float | None = None
        """What a cell takes, as measured in batches."""


class Portion(NamedTuple):
    """Cells to be asked for together."""

    cells: list[int]
    """Those that get tasks of their own."""
    batches: Sequence[list[int]] = ()
    """Those that share tasks."""
    is_probe: bool = False
    """Whether they are to show what a cell takes."""


class Batch(NamedTuple):
    """Cells whose results come together."""

    cells: list[int]
    """Those that are wanted of it."""
    taken: Taken
    """The result, and where cells are in it."""
    is_new: bool = False
    """Whether it is computed for this request, and may end early."""


@dataclass(frozen=True)
class Other:
    """A cell upstream that is computed for a request."""

    loader: CellLoader
    index: int
    number: int
    """Of the image."""
    generation: int
    future: Any


class Request:
    """Cells that were submitted together, and the handles that keep them wanted."""

    def __init__(self, image: Image, generation: int) -> None:
        self.image = image
        """To which the cells belong."""
        self.generation = generation
        """Of the image's held cells, when this was submitted."""
        self.cells: dict[int, Any] = {}
        """Futures of cells with a task of their own."""
        self.batches: deque[Batch] = deque()
        """Cells that share a task."""
        self.is_probe = False
        """Whether the batches are to show what a cell takes."""
        self.put_off: list[int] = []
        """Cells of which a batch took too long to do them, too."""
        self.others: list[Other] = []
        self.uses: list[Any] = []
        """Handles of what the tasks need and is there already, or was sent before."""
        self.suspects: dict[int, KilledWorker] = {}
        """Cells that the scheduler blames for the death of workers."""

    def cells_left(self) -> list[int]:
        """Return the cells of which nothing is known yet."""
        single = [index for index in self.cells if index not in self.suspects]
        return single + [index for batch in self.batches for index in batch.cells]

    def release(self) -> None:
        """Let go of what was not handed on; what nobody wants is cancelled."""
        release(self.cells.values())
        release(batch.taken.future for batch in self.batches)
        release(other.future for other in self.others)
        release(self.uses)
        self.cells, self.batches, self.others, self.uses = {}, deque(), [], []


def release_all(requests: deque[Request]) -> None:
    """Let go of all requests, and forget them."""
    while requests:
        requests.popleft().release()
