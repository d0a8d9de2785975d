"""What a queue allows its blocks, and whom it tells what they say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cellimg_dask.bare.task import Task
from cellimg_dask.bare.wire import Message
from cellimg_dask.geometry import as_int
from cellimg_dask.loading.running import wanted

__all__ = ["BlockUpdate", "Rules"]

_log = logging.getLogger("cellimg_dask")


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """What a block says of how far it is, by ``task.update``."""

    function: str
    """Name of the block function."""
    position: tuple[int, ...]
    """Position of the cell in its grid."""
    message: str | None = None
    """For people."""
    current: float | None = None
    """So much is done."""
    maximum: float | None = None
    """Of so much."""
    info: dict[str, Any] | None = None
    """Anything else."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What blocks of a queue are allowed, and who hears of them.

    Raises
    ------
    TypeError, ValueError
        If one of them is wrong.
    """

    block_timeout_s: float | None = None
    """How long a block may take."""
    crash_retries: int = 2
    """How often a block is given to a new worker because the one before died of it."""
    on_update: Callable[[BlockUpdate], None] | None = None
    """Told of what blocks say."""

    def __post_init__(self) -> None:
        limit = self.block_timeout_s
        if limit is not None:
            if isinstance(limit, bool) or not isinstance(limit, Real):
                raise TypeError(f"block_timeout_s must be seconds, got {limit!r}")
            if not limit > 0:
                raise ValueError(f"block_timeout_s must be more than 0 seconds, got {limit!r}")
        retries = as_int(self.crash_retries, "crash_retries", minimum=0)
        object.__setattr__(self, "crash_retries", retries)
        if self.on_update is not None and not callable(self.on_update):
            raise TypeError(f"on_update must be callable, got {type(self.on_update).__name__}")

    def teller(self, function: str, position: tuple[int, ...]) -> Callable[[Message], None] | None:
        """Return what takes the updates of a block; None if nobody listens."""
        listener = self.on_update
        if listener is None:
            return None

        def tell(said: Message) -> None:
            names = ("message", "current", "maximum", "info")
            update = BlockUpdate(function, position, *map(said.get, names))
            try:
                listener(update)
            except Exception:
                # Whoever listens cannot spoil the block.
                _log.exception("on_update failed for %s", update)

        return tell

    def task(self, function: str, position: tuple[int, ...]) -> Task:
        """Return the task of a block that runs in this process."""
        still_wanted = wanted.get()
        return Task(
            self.teller(function, position) or (lambda said: None),
            lambda: still_wanted is not None and not still_wanted(),
        )
