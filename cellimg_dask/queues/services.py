"""What ends the processes that a cluster's workers start for another Python."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from distributed import WorkerPlugin

from cellimg_dask.queues.env_here import leave, use

__all__ = ["Services"]


class Services(WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Keeps count of the workers in a process; the processes that they share end with the last.

    Parameters
    ----------
    token : str
        Names the queue.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        # Two queues may be equal.
        self.name = f"cellimg-{token}-{uuid4()}"

    def setup(self, worker: Any) -> None:
        """Count a worker."""
        use(self.token)

    def teardown(self, worker: Any) -> None:
        """End the processes if this was the last."""
        leave(self.token)
