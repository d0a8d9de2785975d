"""Dividing the work of a run among workers, so that each has neighbours."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

__all__ = ["Shares"]

T = TypeVar("T")


class Shares(Generic[T]):
    """Items in an order in which neighbours share what they read, in one stretch per worker.

    A worker that has nothing left gets the second half of the longest stretch, so all end at about
    the same time, however many they are and whenever they came.

    Parameters
    ----------
    items : iterable
        In order.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._unclaimed = deque(items)
        self._claimed: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return len(self._unclaimed) + sum(map(len, self._claimed.values()))

    def take(self, worker: str, count: int) -> list[T]:
        """Return the next items for a worker; fewer at the end of its stretch."""
        mine = self._claimed.setdefault(worker, deque())
        if not mine:
            mine.extend(self._split())
        return [mine.popleft() for _ in range(min(count, len(mine)))]

    def put_back(self, items: Iterable[T]) -> None:
        """Have items done by whoever is next."""
        self._unclaimed.extend(items)

    def keep(self, workers: Collection[str]) -> None:
        """Take back what belongs to workers that are gone."""
        for gone in self._claimed.keys() - set(workers):
            self._unclaimed.extend(self._claimed.pop(gone))

    def _split(self) -> Iterable[T]:
        if self._unclaimed:
            found, self._unclaimed = self._unclaimed, deque()
            return found
        longest = max(self._claimed.values(), key=len)
        taken = [longest.pop() for _ in range((len(longest) + 1) // 2)]
        return reversed(taken)
