"""Where to put the boxes of a graph, so that it can be read.

After Sugiyama, Tagawa and Toda (1981): rows by depth, an order in each row with few crossings,
then places along the row.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

__all__ = ["Element", "Layers", "layered"]

_SWEEPS = 8
_BOX = 1.12
"""Room for a box, whose own width is 1."""
_LINE = 0.16
"""Room for a line that passes between boxes."""
_STRAIGHTNESS = 4.0
"""Weight of such a line beside that of a box, when a row is put in place."""

Element: TypeAlias = tuple[int, int]
"""(box, row): the box itself, or in a later row the line that leaves it."""


@dataclass(frozen=True, slots=True)
class Layers:
    """A layout; lengths are in widths of a box."""

    rows: Sequence[Sequence[Element]]
    """Boxes and passing lines of each row, from left to right."""
    row: Sequence[int]
    """The row of each box."""
    centre: Mapping[Element, float]
    """Where the middle of each is."""
    segments: Sequence[tuple[Element, Element]]
    """Lines between neighbouring rows. One box' line to several others is drawn once."""
    width: float
    """Of the whole."""


def layered(reads: Sequence[Sequence[int]]) -> Layers:
    """Return a layout of boxes of which each reads some with smaller numbers.

    Every box but the last is read by another.
    """
    row = _rows(reads)
    segments = _segments(reads, row)
    elements = {element for segment in segments for element in segment}
    elements.update((box, row[box]) for box in range(len(reads)))
    rows: list[list[Element]] = [[] for _ in range(max(row, default=-1) + 1)]
    for element in sorted(elements):
        rows[element[1]].append(element)
    above: dict[Element, list[Element]] = {element: [] for element in elements}
    below: dict[Element, list[Element]] = {element: [] for element in elements}
    for upper, lower in segments:
        below[upper].append(lower)
        above[lower].append(upper)
    rows = _ordered(rows, above, below)
    centre, width = _placed(rows, row, above, below)
    return Layers(rows, row, centre, segments, width)


def _rows(reads: Sequence[Sequence[int]]) -> list[int]:
    """Return a row per box: as low as it can be, above all that read it."""
    height = [0] * len(reads)
    for box in reversed(range(len(reads))):
        for upper in reads[box]:
            height[upper] = max(height[upper], height[box] + 1)
    return [max(height) - own for own in height]


def _segments(reads: Sequence[Sequence[int]], row: Sequence[int]) -> list[tuple[Element, Element]]:
    segments: dict[tuple[Element, Element], None] = {}
    reached = list(row)
    for box, uppers in enumerate(reads):
        for upper in uppers:
            while reached[upper] < row[box] - 1:
                last = reached[upper]
                segments[(upper, last), (upper, last + 1)] = None
                reached[upper] += 1
            segments[(upper, row[box] - 1), (box, row[box])] = None
    return list(segments)


def _ordered(
    rows: list[list[Element]],
    above: Mapping[Element, Sequence[Element]],
    below: Mapping[Element, Sequence[Element]],
) -> list[list[Element]]:
    """Return the rows, each in an order with few crossings."""
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(_SWEEPS):
        if fewest == 0:
            break
        rows = list(map(list, rows))
        down = sweep % 2 == 0
        others = above if down else below
        numbers = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for number in numbers:
            beside = rows[number - 1 if down else number + 1]
            place = {element: float(n) for n, element in enumerate(beside)}
            own = {element: float(n) for n, element in enumerate(rows[number])}
            wanted = {
                element: _mean([place[other] for other in others[element]], own[element])
                for element in rows[number]
            }
            rows[number].sort(key=wanted.__getitem__)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _crossings(
    rows: Sequence[Sequence[Element]], below: Mapping[Element, Sequence[Element]]
) -> int:
    count = 0
    for row, beneath in pairwise(rows):
        place = {element: number for number, element in enumerate(beneath)}
        seen: list[int] = []
        for element in row:
            ends = [place[other] for other in below[element]]
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _placed(
    rows: Sequence[Sequence[Element]],
    row: Sequence[int],
    above: Mapping[Element, Sequence[Element]],
    below: Mapping[Element, Sequence[Element]],
) -> tuple[dict[Element, float], float]:
    """Return the middle of each element, near those that it is linked to, and the width."""

    def room(element: Element) -> float:
        return _BOX if row[element[0]] == element[1] else _LINE

    centre: dict[Element, float] = {}
    for elements in rows:
        left = -sum(map(room, elements)) / 2
        for element in elements:
            centre[element] = left + room(element) / 2
            left += room(element)
    # The last sweep goes up, so that what is read stands above who reads it.
    for sweep in range(_SWEEPS):
        others = above if sweep % 2 == 0 else below
        for elements in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [
                _mean([centre[other] for other in others[element]], centre[element])
                for element in elements
            ]
            widths = [room(element) for element in elements]
            weights = [1.0 if width == _BOX else _STRAIGHTNESS for width in widths]
            centre.update(zip(elements, _apart(wanted, widths, weights), strict=True))
    low = min((centre[e] - room(e) / 2 for e in centre), default=0.0)
    high = max((centre[e] + room(e) / 2 for e in centre), default=0.0)
    return {element: at - low for element, at in centre.items()}, high - low


def _apart(
    wanted: Sequence[float], widths: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Return places without overlap, in the given order, with least squares to those wanted."""
    # Less what stands to the left, the places must not decrease: pools of adjacent violators.
    offsets, left = [], 0.0
    for width in widths:
        offsets.append(left + width / 2)
        left += width
    pools: list[tuple[float, float, int]] = []
    for want, offset, weight in zip(wanted, offsets, weights, strict=True):
        at, mass, count = want - offset, weight, 1
        while pools and pools[-1][0] > at:
            other, its_mass, its_count = pools.pop()
            at = (other * its_mass + at * mass) / (its_mass + mass)
            mass, count = mass + its_mass, count + its_count
        pools.append((at, mass, count))
    levels = [at for at, _, count in pools for _ in range(count)]
    return [level + offset for level, offset in zip(levels, offsets, strict=True)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
