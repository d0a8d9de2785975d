"""Which labels of different blocks are one object: a tree of small tables.

Every block has labels of its own. Two labels of neighbouring blocks are linked by the voxels that
both blocks labelled, and whatever is linked is one object. No table knows all of it: a node of the
tree stands for a box of blocks and joins what is linked within. On the way up it passes on only
what is linked to the outside, so a table grows with the surface of the box. On the way down each
node is told the final ids of what it passed on, and how many objects come before its own.

An id is ``number of the block * stride + label``, and an object's is the smallest of its labels'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations, product
from math import prod
from operator import add, mul, sub
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Roi
from cellimg_dask.ops.overlap import SideBySide

__all__ = ["Bands", "Down", "Joined", "Linking", "needed_steps", "shared_labels"]

Ids: TypeAlias = NDArray[np.uint64]

IN_HALO = np.uint64(1 << 63)
"""Set in the id of a label that has no voxel in its cell, so that it is never the smallest."""


@dataclass(frozen=True, slots=True)
class Bands:
    """What the neighbours of a block have to know of its labels."""

    num_labels: int
    """The largest label."""
    ends: Sequence[tuple[NDArray[Any], NDArray[Any]]]
    """Per axis the labels of the voxels that it shares with the block before, and that behind."""
    in_core: NDArray[np.bool_] | None
    """Per label whether it has voxels in the cell itself; None: it does not matter."""
    is_cut: NDArray[np.bool_] | None
    """Per label whether it has voxels in the cell, and may go on where the block ends."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [*chain.from_iterable(self.ends), self.in_core, self.is_cut]
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True, slots=True)
class Joined:
    """What a node knows after those below it."""

    ids: Ids
    """Linked ids of its children, sorted; each is the smallest that its child knows of."""
    smallest: Ids
    """The smallest id that each is linked to in this node."""
    own: Ids
    """Ids of blocks in this node that are linked to others outside,"""
    own_smallest: Ids
    """their smallest in this node,"""
    other: Ids
    """and the ids outside."""
    counts: NDArray[np.int64]
    """Per child how many objects end in it."""
    num_objects: int
    """How many objects end in this node, those of its children counted."""


@dataclass(frozen=True, slots=True)
class Down:
    """What a node is told by those above it."""

    ids: Ids
    """Linked ids of its children, sorted."""
    final: Ids
    """The ids of their objects."""
    before: NDArray[np.int64]
    """Per child how many objects have smaller numbers than its own."""


@dataclass(frozen=True)
class Linking:
    """How the labels of blocks are linked.

    Parameters
    ----------
    layout : SideBySide
        Of the blocks.
    threshold : float, optional
        Intersection over union of two labels, in the voxels that both blocks have, above which
        they are linked. None: a voxel that both have is enough.
    consecutive : bool
        Whether final ids are 1, 2, 3 …
    whole : bool
        Whether labels are 1, 2, 3 … in each block, and each of them that has no voxel in the cell
        is linked to one that has, as it is with the connected components of a mask.
    steps : tuple of tuples of int, optional
        Sets of axes along which the neighbours lie, together, whose labels have to be compared;
        default: all.
    """

    layout: SideBySide
    threshold: float | None
    consecutive: bool
    whole: bool = False
    steps: tuple[tuple[int, ...], ...] | None = None

    @cached_property
    def stride(self) -> int:
        """More than the labels of a block."""
        return prod(self.layout.blocks.cell_shape) + 1

    def first_id(self, position: tuple[int, ...]) -> int:
        """Return the id that label 0 of a block would have."""
        index: int = sum(map(mul, position, self.layout.grid.strides))
        return index * self.stride

    @cached_property
    def _steps(self) -> list[_Step]:
        """Steps to the neighbours whose labels are compared, both ways."""
        widths = self.layout.widths
        steps = []
        for ways in product((-1, 0, 1), repeat=len(widths)):
            if self.threshold is None and len(set(ways) - {0}) > 1:
                # Two voxels that touch lie both in the block that has the first along every axis.
                continue
            if self.steps is not None and _axes_of(ways) not in self.steps:
                continue
            if any(ways) and all(width for way, width in zip(ways, widths, strict=True) if way):
                steps.append(_Step.of(ways, widths))
        return steps

    def in_core(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """Return per label whether it is in a cell, 0 to the largest; never for 0."""
        count = int(labels.max(initial=0))
        if self.consecutive and not self.whole:
            return _present(labels, count)
        # Those that are missing have no effect on the others' ids.
        found = np.ones(count + 1, np.bool_)
        found[0] = False
        return found

    def bands(self, labels: NDArray[Any], position: tuple[int, ...]) -> Bands:
        """Return the bands of the block at ``position``."""
        layout, count = self.layout, int(labels.max(initial=0))
        if count >= self.stride:
            raise ValueError(
                f"a block has the label {count}, expected at most {self.stride - 1}, the number of "
                f"its voxels: number the objects of each block from 1"
            )
        if labels.dtype.kind == "i" and labels.min(initial=0) < 0:
            raise ValueError(
                f"a block has the label {labels.min()}, expected 0 for background and 1 and above "
                f"for objects"
            )
        dtype = np.uint16 if count < 1 << 16 else np.uint32
        ends = []
        for axis, width in enumerate(layout.widths):
            before: list[slice] = [slice(None)] * labels.ndim
            behind = list(before)
            before[axis] = slice(0, width)
            behind[axis] = slice(labels.shape[axis] - width, None)
            ends.append((labels[tuple(before)].astype(dtype), labels[tuple(behind)].astype(dtype)))
        if self.whole:
            return Bands(count, ends, None, None)
        in_core = _present(labels[layout.core(position)], count)
        is_cut = np.zeros(count + 1, np.bool_)
        grown = layout.grid.roi(position).grow(layout.halo)
        for axis, part in enumerate(layout.inside(position)):
            if grown.start[axis] > 0:
                is_cut[labels.take(part.start, axis)] = True
            if grown.stop[axis] < layout.grid.shape[axis]:
                is_cut[labels.take(part.stop - 1, axis)] = True
        if self.threshold is not None:
            # A part of an instance that only the halo has may be taken for one with its neighbour,
            # and would join these two for everybody.
            own = np.where(in_core, np.arange(count + 1, dtype=dtype), dtype(0))
            ends = [(own[low], own[high]) for low, high in ends]
        return Bands(count, ends, in_core, is_cut & in_core)

    def join_blocks(self, bands: NDArray[np.object_], near: Roi, group: Roi) -> Joined:
        """Join what is linked in a group of neighbouring blocks.

        Parameters
        ----------
        bands : ndarray of Bands
            Those of the group and of all its neighbours.
        near, group : Roi
            The positions of these blocks, and of those of the group.
        """
        inner, outer = _Pairs(), _Pairs()
        for position in _positions(group):
            own = bands[_minus(position, near.start)]
            first = self.first_id(position)
            for step in self._steps:
                beside = tuple(map(add, position, step.ways))
                inside = _holds(group, beside)
                if (inside and not step.is_forward) or not (inside or _holds(near, beside)):
                    # What lies inside is found from the other side.
                    continue
                other = bands[_minus(beside, near.start)]
                mine, its = shared_labels(
                    own.ends[step.axis][step.is_high][step.mine],
                    other.ends[step.axis][not step.is_high][step.its],
                    self.threshold,
                )
                if mine.size:
                    pairs = inner if inside else outer
                    pairs.left.append(_ids(own, mine, first))
                    pairs.right.append(_ids(other, its, self.first_id(beside)))
        left, right = inner.joined()
        own_ids, others = outer.joined()
        ids = np.unique(np.concatenate([left, right, own_ids]))
        counts = np.empty(group.shape, np.int64)
        for position in _positions(group):
            own = bands[_minus(position, near.start)]
            total = own.num_labels if own.in_core is None else int(own.in_core.sum())
            linked = self._of_block(ids, position)
            counts[_minus(position, group.start)] = total - (linked.stop - linked.start)
        return _closed(ids, left, right, own_ids, own_ids, others, counts)

    def join_nodes(self, nodes: NDArray[np.object_], blocks: Roi) -> Joined:
        """Join what is linked in the nodes below, which stand for a box of blocks."""
        children: list[Joined] = nodes.reshape(-1).tolist()
        own, own_smallest, other = (
            np.concatenate([getattr(child, name) for child in children])
            for name in ("own", "own_smallest", "other")
        )
        index = ((other & ~IN_HALO) // np.uint64(self.stride)).astype(np.intp)
        position = np.unravel_index(index, self.layout.grid.grid_shape)
        inside = np.ones(other.shape, np.bool_)
        for at, low, high in zip(position, blocks.start, blocks.stop, strict=True):
            inside &= (at >= low) & (at < high)
        # Each link is known to both its ends, so the other end is found among one's own.
        known, first = np.unique(own, return_index=True)
        right = own_smallest[first][np.searchsorted(known, other[inside])]
        counts = np.array([child.num_objects for child in children], np.int64)
        return _closed(
            np.unique(own_smallest),
            own_smallest[inside],
            right,
            own[~inside],
            own_smallest[~inside],
            other[~inside],
            counts.reshape(nodes.shape),
        )

    def resolve(self, node: Joined, above: Down | None, place: tuple[int, ...]) -> Down:
        """Return what a node tells those below it.

        Parameters
        ----------
        node : Joined
            What it knows itself.
        above : Down, optional
            What it is told; None for the root.
        place : ints
            Which child of the node above it is.
        """
        before = 0 if above is None else int(above.before[place])
        final = node.smallest.copy()
        goes_on = np.isin(node.smallest, node.own_smallest)
        if above is not None and goes_on.any():
            final[goes_on] = above.final[np.searchsorted(above.ids, node.smallest[goes_on])]
        ending = np.unique(node.smallest[~goes_on])
        ending = ending[ending < IN_HALO]
        if self.consecutive:
            numbers = np.searchsorted(ending, node.smallest[~goes_on]) + 1 + before
            final[~goes_on] = np.where(node.smallest[~goes_on] < IN_HALO, numbers, 0)
        behind = before + ending.size + np.cumsum(node.counts, dtype=np.int64)
        return Down(node.ids, final, behind.reshape(node.counts.shape) - node.counts)

    def final_ids(
        self,
        down: Down,
        place: tuple[int, ...],
        position: tuple[int, ...],
        in_core: NDArray[np.bool_],
    ) -> Ids:
        """Return the id of the object of each label of a block, 0 for 0.

        Parameters
        ----------
        down : Down
            What the block is told.
        place : ints
            Which child of the node above it is.
        position : ints
            Of the block.
        in_core : ndarray of bool
            Per label whether it has voxels in the cell.
        """
        first = self.first_id(position)
        linked = self._of_block(down.ids, position)
        labels = (down.ids[linked] - np.uint64(first)).astype(np.intp)
        if self.consecutive:
            alone = in_core.copy()
            alone[labels[labels < alone.size]] = False
            table = np.zeros(in_core.size, np.uint64)
            begin = int(down.before[place]) + 1
            count = int(alone.sum())
            table[alone] = np.arange(begin, begin + count, dtype=np.uint64)
        else:
            table = np.arange(first, first + in_core.size, dtype=np.uint64)
            table[0] = 0
        some = labels < in_core.size
        table[labels[some]] = down.final[linked][some]
        return table

    def _of_block(self, ids: Ids, position: tuple[int, ...]) -> slice:
        """Return where the ids of a block lie that have voxels in its cell, or may have."""
        first = self.first_id(position)
        low, high = np.searchsorted(ids, np.array([first, first + self.stride], np.uint64))
        return slice(int(low), int(high))


@dataclass(frozen=True, slots=True)
class _Step:
    """From a block to a neighbour, and where in their bands the voxels lie that both have."""

    ways: tuple[int, ...]
    """-1, 0 or 1 along each axis."""
    is_forward: bool
    """Whether the neighbour comes later in C order."""
    axis: int
    """Which band of the two."""
    is_high: bool
    """Whether it is the high one of the block, and the neighbour's low one."""
    mine: tuple[slice, ...]
    """Where in the block's band."""
    its: tuple[slice, ...]
    """Where in the neighbour's."""

    @classmethod
    def of(cls, ways: tuple[int, ...], widths: Sequence[int]) -> _Step:
        main = next(axis for axis, way in enumerate(ways) if way)
        mine, its = [slice(None)] * len(ways), [slice(None)] * len(ways)
        for axis, (way, width) in enumerate(zip(ways, widths, strict=True)):
            if way and axis != main:
                ends = slice(-width, None), slice(0, width)
                mine[axis], its[axis] = ends if way > 0 else ends[::-1]
        return cls(ways, ways > (0,) * len(ways), main, ways[main] > 0, tuple(mine), tuple(its))


def _present(labels: NDArray[Any], num_labels: int) -> NDArray[np.bool_]:
    """Return per label, 0 to ``num_labels``, whether it occurs; never for 0."""
    found = np.zeros(num_labels + 1, np.bool_)
    found[labels] = True
    found[0] = False
    return found


def shared_labels(
    first: NDArray[Any], second: NDArray[Any], threshold: float | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of labels that two blocks gave to the same voxels, each once, sorted.

    Parameters
    ----------
    first, second : ndarray of int
        Labels of the same voxels, 0 for none.
    threshold : float, optional
        Only pairs whose intersection over union in these voxels is above it.
    """
    a, b = first.reshape(-1), second.reshape(-1)
    both = (a != 0) & (b != 0)
    if not both.any():
        return _NO_LABELS, _NO_LABELS
    wide = np.int64(int(b.max()) + 1)
    pairs = a[both].astype(np.int64) * wide + b[both]
    # Labels come in runs, and runs are far fewer than voxels.
    begins = np.flatnonzero(np.concatenate(([True], pairs[1:] != pairs[:-1])))
    if threshold is None:
        found = np.unique(pairs[begins])
        return found // wide, found % wide
    lengths = np.diff(begins, append=pairs.size)
    found, where = np.unique(pairs[begins], return_inverse=True)
    common = np.bincount(where, lengths)
    left, right = found // wide, found % wide
    union = np.bincount(a)[left] + np.bincount(b)[right] - common
    # A quotient is rounded like the number that somebody wrote; 0.29 * 100 is less than 29.
    enough = common / union > threshold
    return left[enough], right[enough]


_NO_LABELS = np.empty(0, np.int64)


class _Pairs:
    """Linked ids, gathered part by part."""

    def __init__(self) -> None:
        self.left: list[Ids] = []
        self.right: list[Ids] = []

    def joined(self) -> tuple[Ids, Ids]:
        none = np.empty(0, np.uint64)
        return np.concatenate([none, *self.left]), np.concatenate([none, *self.right])


def _ids(bands: Bands, labels: NDArray[np.int64], first: int) -> Ids:
    ids = labels.astype(np.uint64) + np.uint64(first)
    if bands.in_core is not None:
        ids[~bands.in_core[labels]] |= IN_HALO
    return ids


def _closed(
    ids: Ids,
    left: Ids,
    right: Ids,
    own: Ids,
    own_ids: Ids,
    other: Ids,
    counts: NDArray[np.int64],
) -> Joined:
    """Join ``left`` with ``right``, all among ``ids``; ``own_ids`` are linked to the outside."""
    if not ids.size:
        return Joined(ids, ids, own, ids, other, counts, int(counts.sum()))
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = np.searchsorted(ids, left), np.searchsorted(ids, right)
    graph = coo_array((np.ones(i.size, np.bool_), (i, j)), shape=(ids.size, ids.size))
    _, group = connected_components(graph, directed=False)
    # Ids are sorted, so the first of a group is its smallest.
    _, first = np.unique(group, return_index=True)
    smallest = ids[first][group]
    own_smallest = smallest[np.searchsorted(ids, own_ids)]
    ending = np.setdiff1d(smallest[smallest < IN_HALO], own_smallest)
    return Joined(ids, smallest, own, own_smallest, other, counts, int(counts.sum()) + ending.size)


def needed_steps(structure: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """Return the sets of axes along which cells have to be compared for a structuring element.

    Two voxels that are connected lie both in the block of the cell that is the first along every
    axis. From there the cell of either one lies along axes on which this one comes later.
    """
    # One axis at a time in any case: so every label of a halo is linked to one of a cell.
    found: set[tuple[int, ...]] = {(axis,) for axis in range(structure.ndim)}
    for way in np.argwhere(structure) - 1:
        later = _axes_of(np.maximum(way, 0))
        found.update(chain.from_iterable(combinations(later, n) for n in range(2, len(later) + 1)))
    return tuple(sorted(found))


def _axes_of(ways: Iterable[int]) -> tuple[int, ...]:
    return tuple(axis for axis, way in enumerate(ways) if way)


def _positions(roi: Roi) -> Iterator[tuple[int, ...]]:
    return product(*map(range, roi.start, roi.stop))


def _minus(position: Sequence[int], start: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(sub, position, start))


def _holds(roi: Roi, position: Sequence[int]) -> bool:
    for low, at, high in zip(roi.start, position, roi.stop, strict=True):
        if not low <= at < high:
            return False
    return True
