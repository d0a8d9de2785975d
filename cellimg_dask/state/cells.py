"""Sets of cells, and their unions.

None of them lists the cells before it is asked to: a grid may have billions of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import CellGrid, Roi, TileGrid

__all__ = [
    "CellList",
    "CellMask",
    "CellProduct",
    "CellTest",
    "CellUnion",
    "Cells",
    "Runs",
    "boxes_of",
    "distinct",
    "listed",
    "no_cells",
    "positions_of",
    "runs_of",
    "settled",
    "union",
]

Runs: TypeAlias = list[tuple[int, int]]
"""Increasing half-open intervals that do not touch."""

_SMALL = 1 << 16
"""Sets of so few cells are listed where that makes one of several."""
_DENSE = 1 << 22
"""A mask may have so many elements where a list would do as well."""
_LARGEST = 1 << 26
"""A mask may have so many elements where there is no other way than asking cell by cell."""


class CellProduct(Collection[int]):
    """Flat indices of the cells whose position along each axis is in that axis' list.

    The positions along an axis increase.
    """

    def __init__(self, grid: CellGrid | TileGrid, positions: Sequence[Sequence[int]]) -> None:
        self.grid = grid
        self.positions = tuple(positions)
        self._known = tuple(
            steps if isinstance(steps, range) else frozenset(steps) for steps in self.positions
        )

    def __len__(self) -> int:
        return prod(map(len, self.positions))

    def __iter__(self) -> Iterator[int]:
        axes = [
            [p * stride for p in steps]
            for steps, stride in zip(self.positions, self.grid.strides, strict=True)
        ]
        return map(sum, product(*axes))

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        for stride, known in zip(self.grid.strides, self._known, strict=True):
            step, index = divmod(index, stride)
            if step not in known:
                return False
        return True


class CellMask(Collection[int]):
    """Flat indices of the cells that a mask over groups of positions names.

    Parameters
    ----------
    grid : CellGrid
        Grid of the cells.
    edges : sequence of int64 arrays
        Per axis the increasing positions that cut it into pieces; what lies outside is no part.
    labels : sequence of int64 arrays
        Per axis and piece the number of the group it belongs to; -1: none.
    mask : bool array
        Per axis as long as there are groups.
    """

    def __init__(
        self,
        grid: CellGrid,
        edges: Sequence[NDArray[np.int64]],
        labels: Sequence[NDArray[np.int64]],
        mask: NDArray[np.bool_],
    ) -> None:
        self.grid = grid
        self.edges = tuple(edges)
        self.labels = tuple(labels)
        self.mask = mask
        self._axes = [
            (stride, cuts.tolist(), [-1, *groups.tolist(), -1])
            for stride, cuts, groups in zip(grid.strides, edges, labels, strict=True)
        ]

    def __len__(self) -> int:
        count: NDArray[np.int64] = self.mask.astype(np.int64)
        for cuts, groups in zip(self.edges, self.labels, strict=True):
            sizes = np.zeros(count.shape[0], np.int64)
            taken = groups >= 0
            np.add.at(sizes, groups[taken], np.diff(cuts)[taken])
            count = np.tensordot(sizes, count, axes=1)
        return int(count)

    def __iter__(self) -> Iterator[int]:
        groups = self._groups()
        for place in np.argwhere(self.mask).tolist():
            axes = [group[number].tolist() for group, number in zip(groups, place, strict=True)]
            yield from map(sum, product(*axes))

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        place = []
        for stride, cuts, groups in self._axes:
            step, index = divmod(index, stride)
            group = groups[bisect_right(cuts, step)]
            if group < 0:
                return False
            place.append(group)
        return bool(self.mask[tuple(place)])

    def _groups(self) -> list[list[NDArray[np.int64]]]:
        """Return per axis and group what its positions add to the flat index."""
        found = []
        for stride, cuts, groups in zip(self.grid.strides, self.edges, self.labels, strict=True):
            own = np.repeat(groups, np.diff(cuts))
            steps = np.arange(cuts[0], cuts[-1]) * stride
            order = np.argsort(own, kind="stable")
            bounds = np.searchsorted(own[order], np.arange(groups.max() + 2))
            found.append([steps[order[low:high]] for low, high in pairwise(bounds)])
        return found


class CellList(Collection[int]):
    """Flat indices of cells as an increasing int64 array, each once."""

    def __init__(self, grid: CellGrid, indices: NDArray[np.int64]) -> None:
        self.grid = grid
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        place = self.indices.searchsorted(index)
        return bool(place < len(self.indices) and self.indices[place] == index)


class CellTest(Collection[int]):
    """Flat indices of the cells that pass a test; only membership is cheap.

    Parameters
    ----------
    grid : CellGrid
        Grid of the cells.
    test : callable
        From a cell to whether it passes, or to cells of other tests: it passes if one of them
        does.

    Notes
    -----
    Answers are remembered for as long as the test is. Thread-safe as far as ``test`` is; two
    threads may ask it the same.
    """

    def __init__(
        self, grid: CellGrid, test: Callable[[int], bool | Iterable[tuple[CellTest, int]]]
    ) -> None:
        self.grid = grid
        self._test = test
        self._known: dict[int, bool] = {}

    def __len__(self) -> int:
        return self.grid.num_cells

    def __iter__(self) -> Iterator[int]:
        return filter(self.__contains__, range(self.grid.num_cells))

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        known = self._known.get(index)
        if known is None:
            known = self._known[index] = self._answer(index)
        return known

    def _answer(self, index: int) -> bool:
        # Without recursion: a chain may be deeper than Python's stack.
        stack: list[tuple[CellTest, int, Iterator[tuple[CellTest, int]]]] = []
        questions = iter([(self, index)])
        while True:
            for test, number in questions:
                answer = test._known.get(number)
                if answer is None:
                    told = test._test(number)
                    if not isinstance(told, bool):
                        stack.append((test, number, questions))
                        questions = iter(told)
                        break
                    answer = test._known[number] = told
                if answer:
                    for test, number, _ in stack:
                        test._known[number] = True
                    return True
            else:
                if not stack:
                    return False
                test, number, questions = stack.pop()
                test._known[number] = False


class CellUnion(Collection[int]):
    """Flat indices of the cells that are in some of the parts, each once.

    At most the last part is a `CellTest`; the others share no cell.
    """

    def __init__(
        self, grid: CellGrid, parts: Sequence[CellProduct | CellMask | CellList | CellTest]
    ) -> None:
        self.grid = grid
        self.parts = tuple(parts)

    def __len__(self) -> int:
        if isinstance(self.parts[-1], CellTest):
            return self.grid.num_cells
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[int]:
        *others, last = self.parts
        for part in others:
            yield from part
        for index in last:
            if not isinstance(last, CellTest) or not any(index in part for part in others):
                yield index

    def __contains__(self, index: object) -> bool:
        return any(index in part for part in self.parts)


Cells: TypeAlias = CellProduct | CellMask | CellList | CellTest | CellUnion
"""Any set of cells of one grid."""


def distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers increasing, each once."""
    # `numpy.unique` hashes, which is many times slower for numbers of a regular pattern.
    numbers = np.sort(numbers, axis=None)
    new = np.empty(len(numbers), np.bool_)
    new[:1] = True
    np.not_equal(numbers[1:], numbers[:-1], out=new[1:])
    return numbers[new]


def no_cells(grid: CellGrid) -> CellList:
    """Return the empty set."""
    return CellList(grid, np.empty(0, np.int64))


def runs_of(positions: Sequence[int] | NDArray[np.int64]) -> Runs:
    """Return increasing positions as runs."""
    if isinstance(positions, range):
        return [(positions.start, positions.stop)] if positions else []
    steps = np.asarray(positions, np.int64)
    if not steps.size:
        return []
    breaks = np.flatnonzero(np.diff(steps) > 1)
    starts, stops = np.append(0, breaks + 1), np.append(breaks, steps.size - 1)
    return list(zip(steps[starts].tolist(), (steps[stops] + 1).tolist(), strict=True))


def positions_of(runs: Runs) -> Sequence[int]:
    """Return the positions in runs."""
    if len(runs) == 1:
        return range(*runs[0])
    return [position for run in runs for position in range(*run)]


def settled(
    grid: CellGrid,
    edges: Sequence[NDArray[np.int64]],
    labels: Sequence[NDArray[np.int64]],
    mask: NDArray[np.bool_],
) -> CellProduct | CellMask | CellList:
    """Return a mask over groups, as `CellMask` has it, with as few groups as can be."""
    edges, labels = list(edges), list(labels)
    for axis in range(mask.ndim):
        rows = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
        packed = np.packbits(rows, axis=1)
        used = np.logical_or.reduce(packed, axis=1)
        numbers: dict[bytes, int] = {}
        first: list[int] = []
        # One more, which the label -1 finds.
        renamed = np.full(len(rows) + 1, -1, np.int64)
        for old, row in enumerate(packed):
            if used[old]:
                new = numbers.setdefault(row.tobytes(), len(numbers))
                if new == len(first):
                    first.append(old)
                renamed[old] = new
        if not first:
            return no_cells(grid)
        if len(first) < len(rows):
            mask = mask.take(first, axis)
        groups = renamed[labels[axis]]
        changes = np.flatnonzero(groups[1:] != groups[:-1]) + 1
        groups = groups[np.append(0, changes)]
        cuts = edges[axis][np.concatenate(([0], changes, [-1]))]
        low, high = int(groups[0] < 0), len(groups) - int(groups[-1] < 0)
        edges[axis], labels[axis] = cuts[low : high + 1], groups[low:high]
    if not mask.any():
        return no_cells(grid)
    if mask.size == 1:
        return CellProduct(
            grid,
            [
                positions_of(_taken(cuts, groups))
                for cuts, groups in zip(edges, labels, strict=True)
            ],
        )
    return CellMask(grid, edges, labels, mask)


def listed(grid: CellGrid, indices: NDArray[np.int64]) -> CellProduct | CellMask | CellList:
    """Return increasing flat indices as a set, as a mask where that is not much larger."""
    if not indices.size or not grid.ndim:
        return CellList(grid, indices)
    axes = [np.unique(steps, return_inverse=True) for steps in _unravelled(grid, indices)]
    shape = [len(steps) for steps, _ in axes]
    if prod(shape) > max(_SMALL, 16 * len(indices)):
        return CellList(grid, indices)
    mask = np.zeros(shape, np.bool_)
    mask[tuple(places for _, places in axes)] = True
    edges, labels = [], []
    for steps, _ in axes:
        cuts = distinct(np.concatenate((steps, steps + 1)))
        places = np.searchsorted(steps, cuts[:-1])
        there = steps[np.minimum(places, len(steps) - 1)] == cuts[:-1]
        edges.append(cuts)
        labels.append(np.where(there, places, -1))
    return settled(grid, edges, labels, mask)


def union(grid: CellGrid, parts: Iterable[Cells]) -> Cells:
    """Return the cells that are in some of the parts, exactly.

    Never more than one mask or product, one list and one test together.
    """
    flat: list[CellProduct | CellMask | CellList | CellTest] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, CellUnion) else (part,))
    flat = [part for part in flat if len(part)]
    if len(flat) == 1:
        return flat[0]
    for part in flat:
        if not isinstance(part, CellTest) and len(part) == grid.num_cells:
            return part
    wide: list[CellProduct | CellMask] = []
    narrow: list[CellProduct | CellMask | CellList] = []
    tests: list[CellTest] = []
    for part in flat:
        if isinstance(part, CellTest):
            if part not in tests:
                tests.append(part)
        elif isinstance(part, CellList):
            narrow.append(part)
        else:
            wide.append(part)
    wide = _distinct(wide)
    if len(wide) > 8 and sum(map(len, wide)) <= _SMALL:
        narrow.extend(wide)
        wide = []
    whole: CellProduct | CellMask | None = None
    for part in wide:
        merged = part if whole is None else _merged(grid, whole, part)
        if merged is not None:
            whole = merged
        elif len(part) <= _DENSE:
            narrow.append(part)
        else:
            tests.append(CellTest(grid, part.__contains__))
    explicit: list[CellProduct | CellMask | CellList] = []
    if narrow:
        indices = distinct(np.concatenate([_indices(part) for part in narrow]))
        if whole is not None:
            indices = indices[~_among(whole, indices)]
            if indices.size and len(whole) <= _SMALL:
                indices = distinct(np.concatenate((indices, _indices(whole))))
                whole = None
        if indices.size:
            found = listed(grid, indices)
            explicit.append(found)
    if whole is not None:
        explicit.insert(0, whole)
    if explicit and sum(map(len, explicit)) == grid.num_cells:
        tests = []
    if not tests and len(explicit) == 1:
        return explicit[0]
    if not tests and not explicit:
        return no_cells(grid)
    if not tests:
        return CellUnion(grid, explicit)
    test = tests[0]
    if len(tests) > 1:
        asked = tuple(tests)
        test = CellTest(grid, lambda index: [(other, index) for other in asked])
    return CellUnion(grid, [*explicit, test]) if explicit else test


def boxes_of(cells: Cells) -> Iterator[Roi]:
    """Yield boxes that share no voxel and together are the voxels of the cells.

    Cells side by side come as one box as far as runs along the axes tell. A `CellTest` is asked
    for every cell.
    """
    grid = cells.grid
    assert isinstance(grid, CellGrid)
    if isinstance(cells, CellUnion):
        *others, last = cells.parts
        for part in others:
            yield from boxes_of(part)
        if not isinstance(last, CellTest):
            yield from boxes_of(last)
            return
        left = (index for index in last if not any(index in part for part in others))
        cells = CellList(grid, np.fromiter(left, np.int64))
    elif isinstance(cells, CellTest):
        cells = CellList(grid, np.fromiter(cells, np.int64))
    if isinstance(cells, CellProduct):
        boxes: Iterable[Sequence[tuple[int, int]]] = product(*map(runs_of, cells.positions))
    elif isinstance(cells, CellMask):
        boxes = _mask_boxes(cells.edges, cells.labels, cells.mask)
    else:
        boxes = _list_boxes(grid, cells.indices)
    for box in boxes:
        sides = zip(box, grid.cell_shape, grid.shape, strict=True)
        bounds = [(low * size, min(high * size, extent)) for (low, high), size, extent in sides]
        yield Roi(tuple(low for low, _ in bounds), tuple(high for _, high in bounds))


def _distinct(parts: list[CellProduct | CellMask]) -> list[CellProduct | CellMask]:
    """Return the parts but products that lie in other products."""
    if len(parts) < 2:
        return parts
    kept: list[CellProduct | CellMask] = []
    # From the largest on, so that what contains a part is there before it.
    for part in sorted(parts, key=len, reverse=True):
        if not any(_lies_in(part, other) for other in kept):
            kept.append(part)
    return kept


def _lies_in(part: CellProduct | CellMask, other: CellProduct | CellMask) -> bool:
    if part is other:
        return True
    if not isinstance(part, CellProduct) or not isinstance(other, CellProduct):
        return False
    for steps, known, wide in zip(part.positions, other._known, other.positions, strict=True):
        if isinstance(steps, range) and isinstance(wide, range):
            if steps.start < wide.start or steps.stop > wide.stop:
                return False
        elif steps is not wide and not all(step in known for step in steps):
            return False
    return True


def _merged(
    grid: CellGrid, one: CellProduct | CellMask, two: CellProduct | CellMask
) -> CellProduct | CellMask | None:
    """Return the union as one set; None: the mask would be too large."""
    edges, labels, ones, twos = [], [], [], []
    sides = [_as_mask(grid, cells) for cells in (one, two)]
    for axis in range(grid.ndim):
        cuts = distinct(np.concatenate([side.edges[axis] for side in sides]))
        own, its = (
            np.concatenate(([-1], side.labels[axis], [-1]))[
                np.searchsorted(side.edges[axis], cuts[:-1], "right")
            ]
            for side in sides
        )
        base = int(its.max()) + 2
        pairs, groups = np.unique((own + 1) * base + its + 1, return_inverse=True)
        edges.append(cuts)
        labels.append(groups)
        ones.append(pairs // base - 1)
        twos.append(pairs % base - 1)
    if prod(map(len, ones)) > _LARGEST:
        return None
    # What is outside has the label -1, which finds the element that is put behind.
    first, second = (np.pad(side.mask, [(0, 1)] * grid.ndim) for side in sides)
    found = settled(grid, edges, labels, first[np.ix_(*ones)] | second[np.ix_(*twos)])
    assert not isinstance(found, CellList)
    return found


def _as_mask(grid: CellGrid, cells: CellProduct | CellMask) -> CellMask:
    if isinstance(cells, CellMask):
        return cells
    edges, labels = [], []
    for steps in cells.positions:
        edges.append(np.array(runs_of(steps), np.int64).ravel())
        labels.append(np.resize(np.array([0, -1], np.int64), len(edges[-1]) - 1))
    return CellMask(grid, edges, labels, np.ones((1,) * grid.ndim, np.bool_))


def _indices(cells: CellProduct | CellMask | CellList) -> NDArray[np.int64]:
    """Return the cells as an array, in no order."""
    if isinstance(cells, CellList):
        return cells.indices
    if isinstance(cells, CellProduct):
        return _sums([np.asarray(steps, np.int64) for steps in cells.positions], cells.grid.strides)
    groups = cells._groups()
    ones = (1,) * cells.mask.ndim
    return np.concatenate(
        [
            _sums([group[number] for group, number in zip(groups, place, strict=True)], ones)
            for place in np.argwhere(cells.mask).tolist()
        ]
    )


def _sums(axes: Sequence[NDArray[np.int64]], strides: Sequence[int]) -> NDArray[np.int64]:
    total = np.zeros(1, np.int64)
    for steps, stride in zip(axes, strides, strict=True):
        total = np.add.outer(total, steps * stride).ravel()
    return total


def _among(cells: CellProduct | CellMask, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the indices are in the set."""
    assert isinstance(cells.grid, CellGrid)
    mask = _as_mask(cells.grid, cells)
    places = tuple(
        np.concatenate(([-1], groups, [-1]))[np.searchsorted(cuts, steps, "right")]
        for steps, cuts, groups in zip(
            _unravelled(mask.grid, indices), mask.edges, mask.labels, strict=True
        )
    )
    found: NDArray[np.bool_] = np.pad(mask.mask, [(0, 1)] * mask.mask.ndim)[places]
    return found


def _unravelled(grid: CellGrid, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    axes = []
    for stride in grid.strides:
        steps, indices = np.divmod(indices, stride)
        axes.append(steps)
    return axes


def _taken(cuts: NDArray[np.int64], groups: NDArray[np.int64]) -> Runs:
    """Return the pieces that belong to a group, where there is but one."""
    own = np.flatnonzero(groups >= 0)
    return list(zip(cuts[own].tolist(), cuts[own + 1].tolist(), strict=True))


def _mask_boxes(
    edges: Sequence[NDArray[np.int64]], labels: Sequence[NDArray[np.int64]], mask: Any
) -> Iterator[tuple[tuple[int, int], ...]]:
    if not edges:
        if mask:
            yield ()
        return
    cuts, groups = edges[0].tolist(), labels[0].tolist()
    place = 0
    while place < len(groups):
        group, begin = groups[place], cuts[place]
        place += 1
        if group < 0:
            continue
        part = mask[group]
        while (
            place < len(groups) and groups[place] >= 0 and np.array_equal(mask[groups[place]], part)
        ):
            place += 1
        for rest in _mask_boxes(edges[1:], labels[1:], part):
            yield ((begin, cuts[place]), *rest)


def _list_boxes(grid: CellGrid, indices: NDArray[np.int64]) -> Iterable[Sequence[tuple[int, int]]]:
    if not grid.ndim:
        return [()] * len(indices)
    lows = np.stack(_unravelled(grid, indices))
    highs = lows + 1
    for axis in reversed(range(grid.ndim)):
        others = [bounds[n] for bounds in (lows, highs) for n in range(grid.ndim) if n != axis]
        order = np.lexsort((lows[axis], *others))
        lows, highs = lows[:, order], highs[:, order]
        same = highs[axis, :-1] == lows[axis, 1:]
        for n in range(grid.ndim):
            if n != axis:
                same &= (lows[n, :-1] == lows[n, 1:]) & (highs[n, :-1] == highs[n, 1:])
        begins = np.append(True, ~same)[: lows.shape[1]]
        ends = np.append(~same, True)[: lows.shape[1]]
        joined = highs[axis][ends]
        lows, highs = lows[:, begins], highs[:, begins]
        highs[axis] = joined
    bounds = np.stack((lows, highs), axis=-1).transpose(1, 0, 2)
    return (tuple(tuple(side) for side in box) for box in bounds.tolist())
