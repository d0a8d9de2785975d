"""What eviction saves on three typical traces, against a plain LRU as the yardstick.

The figures are miss cost over total cost. For LRU they are known to be .058 (pan), 1.0 (looped
play) and .613 (hot set and scan with mixed costs); GreedyDual-Size is known to reach .056, .491
and .520 there. Those traces themselves are not known, so these are recreated: each is typical of
its kind, and its parameters are chosen so that a plain LRU and a textbook GreedyDual-Size, both
written out below, give the known figures to within 2 %. The cache under test then has to be as
good as GreedyDual-Size was, within 5 %.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from cellimg_dask.state.cache import CellCache

_CELL_BYTES = 8


@dataclass
class Trace:
    """Cells asked for one by one, and what loading each of them costs in seconds."""

    asked: Sequence[int]
    costs: Sequence[float]
    capacity: int
    """Number of cells that the cache can hold."""


def pan() -> Trace:
    """A window of 8 × 8 cells that moves by one cell, mostly straight on, over 64 × 64 cells.

    2,000 steps; the direction changes in a tenth of them. Costs are lognormal, sigma 0.8. The
    cache holds 2.7 windows.
    """
    random_ = random.Random(0)
    window, size = 8, 64
    y = x = size // 2
    dy, dx = 0, 1
    asked: list[int] = []
    for _ in range(2000):
        if random_.random() < 0.1:
            dy, dx = random_.choice([(0, 1), (1, 0), (0, -1), (-1, 0)])
        y, x = min(max(y + dy, 0), size - window), min(max(x + dx, 0), size - window)
        asked += [
            row * size + column for row in range(y, y + window) for column in range(x, x + window)
        ]
    return Trace(asked, _lognormal(size * size, 0.8), capacity=175)


def looped_play() -> Trace:
    """A stack of 200 cells played ten times from front to back, the cache holds half.

    Costs are lognormal, sigma 1. LRU has always just dropped what comes next.
    """
    return Trace(list(range(200)) * 10, _lognormal(200, 1.0), capacity=98)


def hot_set_and_scan() -> Trace:
    """Half of 20,000 requests go to 50 hot cells, the others to cells that come once.

    Costs are lognormal, sigma 0.3, and 1.75 times that for a hot cell. The cache
    holds one and a half hot sets.
    """
    random_ = random.Random(0)
    hot, asked, fresh = 50, [], 50
    for _ in range(20_000):
        if random_.random() < 0.5:
            asked.append(random_.randrange(hot))
        else:
            asked.append(fresh)
            fresh += 1
    costs = _lognormal(fresh, 0.3)
    return Trace(asked, [1.75 * cost for cost in costs[:hot]] + costs[hot:], capacity=76)


def _lognormal(count: int, sigma: float) -> list[float]:
    random_ = random.Random(1)
    return [random_.lognormvariate(0, sigma) for _ in range(count)]


def lru_miss_cost(trace: Trace) -> float:
    """Return miss cost over total cost of a cache that drops what was used longest ago."""
    held: OrderedDict[int, None] = OrderedDict()
    missed = 0.0
    for index in trace.asked:
        if index in held:
            held.move_to_end(index)
        else:
            missed += trace.costs[index]
            held[index] = None
            if len(held) > trace.capacity:
                held.popitem(last=False)
    return missed / _total(trace)


def textbook_miss_cost(trace: Trace) -> float:
    """Return miss cost over total cost of GreedyDual-Size as published, without a heap.

    P. Cao and S. Irani, Cost-Aware WWW Proxy Caching Algorithms, 1997. Equals leave in the
    order of their last use.
    """
    held: dict[int, tuple[float, int]] = {}
    floor = missed = 0.0
    for moment, index in enumerate(trace.asked):
        if index not in held:
            missed += trace.costs[index]
            if len(held) == trace.capacity:
                floor, _ = held.pop(min(held, key=held.__getitem__))
        held[index] = floor + trace.costs[index] / _CELL_BYTES, moment
    return missed / _total(trace)


def our_miss_cost(trace: Trace) -> float:
    """Return miss cost over total cost of the cache under test."""
    now = 0.0

    def load(index: int) -> np.ndarray:
        nonlocal now
        now += trace.costs[index]
        return np.zeros(_CELL_BYTES, np.uint8)

    cache = CellCache(trace.capacity * _CELL_BYTES, timer=lambda: now)
    shelf = cache.shelf(cache)
    for index in trace.asked:
        shelf.get(index, load)
    stats = shelf.stats()
    assert stats.load_seconds == pytest.approx(now)
    assert stats.hits + stats.misses == len(trace.asked)
    assert cache.bytes <= cache.max_bytes
    return now / _total(trace)


def _total(trace: Trace) -> float:
    return sum(trace.costs[index] for index in trace.asked)


@pytest.mark.parametrize(
    ("make", "lru", "greedy_dual_size"),
    [(pan, 0.058, 0.056), (looped_play, 1.0, 0.491), (hot_set_and_scan, 0.613, 0.520)],
)
def test_eviction_is_as_good_as_greedy_dual_size_on_the_known_traces(make, lru, greedy_dual_size):
    trace = make()
    assert lru_miss_cost(trace) == pytest.approx(lru, rel=0.02), "not like the known trace"
    assert textbook_miss_cost(trace) == pytest.approx(greedy_dual_size, rel=0.02)
    assert our_miss_cost(trace) <= greedy_dual_size * 1.05
