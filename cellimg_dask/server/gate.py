"""A bound on how many do something at once, where the newest goes first."""

from __future__ import annotations

import asyncio
from contextlib import suppress

__all__ = ["Gate"]


class Gate:
    """Lets so many in; of those that wait, the last one to come is the next to enter.

    For one event loop.
    """

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._waiting: list[asyncio.Future[None]] = []

    async def __aenter__(self) -> None:
        await self.enter()

    async def __aexit__(self, *exc: object) -> None:
        self.leave()

    async def enter(self) -> None:
        """Wait until there is room."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(turn)
            else:
                # It was let in and does not come any more.
                self.leave()
            raise

    def leave(self) -> None:
        """Make room."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
