"""Random graphs of sources and images under random changes, against plain NumPy.

The oracle knows nothing of plans, cells that are affected, or editions. It numbers the voxels of
each input, extends the numbers with `numpy.pad` and cuts out what a cell reads. From that follow
the values, by calling the block function cell by cell; which cells a change affects, because they
read a voxel that was written or that belongs to an affected cell; and which cells are computed
when something is read, because they are wanted and not in memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import begin

import cellimg_dask as ci
from cellimg_dask.geometry import BOUNDARIES

PATIENCE_S = 60
"""What takes longer hangs."""

FILL = 3
"""What lies beyond a constant border."""
COVER = -5
"""What a frozen image shows where it has nothing."""

WEIGHTS = np.random.default_rng(20261121).integers(1, 1000, 1 << 12)

Rng = np.random.Generator
Params = tuple[int, ...]


# --------------------------------------------------------------------------- the oracle


def digest(
    arrays: Sequence[np.ndarray],
    p: int,
    drop: tuple[int, ...],
    steps: tuple[int, ...],
    new: dict[int, int],
) -> np.ndarray:
    """Return the first array made to the result's axes, plus a number made from every voxel."""
    number = 7919 * p
    for array in arrays:
        flat = array.astype(np.int64).ravel()
        number = 31 * number + int(flat @ WEIGHTS[: flat.size]) + flat.size
    first = arrays[0].astype(np.int64)[tuple(slice(None, None, n) for n in steps)]
    first = first.sum(axis=drop) if drop else first
    for axis in sorted(new):
        first = np.expand_dims(first, axis).repeat(new[axis], axis)
    return np.asarray((3 * first + number) % 251)


def positions_read(low: int, high: int, extent: int, boundary: str) -> np.ndarray:
    """Return which voxels of an axis an interval shows; -1: the constant."""
    if boundary == "none":
        return np.arange(extent)[max(low, 0) : max(high, 0)]
    before, after = max(0, -low), max(0, high - extent)
    options: Any = (
        {"mode": "constant", "constant_values": -1}
        if boundary == "constant"
        else {"mode": boundary}
    )
    return np.pad(np.arange(extent), (before, after), **options)[low + before : high + before]


def voxels_read(axes: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the flat numbers of the voxels in a block; -1: the constant."""
    if not shape:
        return np.zeros((), np.int64)
    grids = np.ix_(*axes)
    outside = sum((grid < 0 for grid in grids), np.zeros((), np.int64)) > 0
    inside = [np.maximum(grid, 0) for grid in grids]
    flat = np.ravel_multi_index(np.broadcast_arrays(*inside), shape)
    return np.where(outside, -1, flat)


def bounds_of(shape: tuple[int, ...], size: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Return the bounds along each axis of all cells, in C order."""
    axes = [
        [(low, min(low + n, extent)) for low in range(0, extent, n)]
        for extent, n in zip(shape, size, strict=True)
    ]
    return [list(cell) for cell in product(*axes)]


# ---------------------------------------------------------------------------- the model


@dataclass(eq=False)
class Link:
    """How an image reads an input."""

    above: Thing
    halo: list[tuple[int, int]]
    boundary: str
    place: Callable[[list[tuple[int, int]]], list[tuple[int, int]]]
    """From the bounds of a cell to what it reads of the input, without halo."""
    index_map: Callable[[ci.Roi], ci.Roi] | None = None
    under: Callable[[list[tuple[int, int]]], list[tuple[int, int]]] | None = None
    """From a box of the image to what lies under it."""
    reads: list[np.ndarray] = field(default_factory=list)
    """Per cell the numbers of the voxels in the block."""

    def input(self) -> ci.Input:
        return ci.Input(
            self.above.real,
            halo=self.halo,
            boundary=self.boundary,
            fill_value=FILL if self.boundary == "constant" else None,
            index_map=self.index_map,
        )

    def find_reads(self, cells: list[list[tuple[int, int]]]) -> None:
        for cell in cells:
            axes = [
                positions_read(low - before, high + after, extent, self.boundary)
                for (low, high), (before, after), extent in zip(
                    self.place(cell), self.halo, self.above.shape, strict=True
                )
            ]
            self.reads.append(voxels_read(axes, self.above.shape))


class Thing:
    """A source or an image."""

    real: Any
    """The source or image itself; None when it was dropped."""
    shape: tuple[int, ...]

    def __init__(self, shape: tuple[int, ...], cell_shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.cells = bounds_of(shape, cell_shape)
        numbers = np.zeros(shape, np.int64)
        for number, cell in enumerate(self.cells):
            numbers[tuple(slice(*side) for side in cell)] = number
        self.cell_of = numbers.ravel()
        """Per voxel its cell."""
        self.told: list[ci.Change] = []
        self.changed_while_frozen: set[int] | None = None
        self.callback: Any = None

    def watch(self, log: list[tuple[Thing, ci.Change]]) -> None:
        me = weakref.ref(self)

        def told(change: ci.Change) -> None:
            thing = me()
            assert thing is not None
            log.append((thing, change))

        self.callback = self.real.on_dirty(told)

    def voxels_of(self, cells: set[int]) -> np.ndarray:
        return np.isin(self.cell_of, list(cells))


class Original(Thing):
    """A source."""

    def __init__(self, array: np.ndarray, cell_shape: tuple[int, ...]) -> None:
        super().__init__(array.shape, cell_shape)
        self.array = array.copy()
        self.real = ci.Source(array, cell_shape)
        self.depth = 0


class Derived(Thing):
    """An image."""

    def __init__(
        self,
        shape: tuple[int, ...],
        cell_shape: tuple[int, ...],
        links: list[Link],
        drop: tuple[int, ...],
        steps: tuple[int, ...],
        new: dict[int, int],
        cache: ci.CellCache,
        knows_cells: bool,
    ) -> None:
        super().__init__(shape, cell_shape)
        self.links = links
        self.depth = 1 + max(link.above.depth for link in links)
        self.cell_shape = cell_shape
        self.p = 0
        self.num_calls = 0
        self.computed: list[int] = []
        """Cells that were computed, where the function knows."""
        self.knows_cells = knows_cells
        self.held: dict[frozenset[Any], set[int]] = {}
        self.shown: tuple[set[int], np.ndarray] | None = None
        """While frozen: the cells that were there, and the values."""
        self._how = drop, steps, new
        for link in links:
            link.find_reads(self.cells)
        self.crops = [self._crop(cell) for cell in self.cells]
        lock = threading.Lock()
        computed, counts = self.computed, [0]
        self._counts = counts

        def f(*arrays: np.ndarray, p: int) -> np.ndarray:
            if knows_cells:
                *arrays, number = arrays  # type: ignore[assignment]
            with lock:
                counts[0] += 1
                if knows_cells:
                    computed.append(int(number.ravel()[0]))
            return digest(arrays, p, drop, steps, new)

        inputs = [link.input() for link in links]
        if knows_cells:
            counted = tuple(-(-n // size) for n, size in zip(shape, cell_shape, strict=True))
            numbers = np.arange(len(self.cells)).reshape(counted)

            def position(roi: ci.Roi) -> ci.Roi:
                start = tuple(a // n for a, n in zip(roi.start, cell_shape, strict=True))
                return ci.Roi(start, tuple(a + 1 for a in start))

            inputs.append(ci.Input(numbers, halo=0, boundary="none", index_map=position))
        self.real = ci.map_cells(
            f,
            *inputs,
            dtype=np.int64,
            cell_shape=cell_shape,
            params={"p": 0},
            drop_axis=drop,
            new_axis=new,
            shrink=steps,
            cache=cache,
        )
        assert self.real.shape == shape
        self.node = weakref.ref(self.real.node)

    @property
    def calls(self) -> int:
        return self._counts[0]

    def _crop(self, cell: list[tuple[int, int]]) -> tuple[slice, ...]:
        """Return where the cell lies in what the function makes from its block."""
        drop, steps, new = self._how
        first = self.links[0]
        sides = first.place(cell)
        kept = [axis for axis in range(len(first.above.shape)) if axis not in drop]
        crops = []
        rest = iter(kept)
        for axis, (low, high) in enumerate(cell):
            if axis in new:
                crops.append(slice(0, high - low))
                continue
            source = next(rest)
            start, before = sides[source][0], first.halo[source][0]
            skip = min(before, start) if first.boundary == "none" else before
            skip //= steps[source]
            crops.append(slice(skip, skip + high - low))
        return tuple(crops)

    def signature(self) -> frozenset[Any]:
        above = [link.above for link in self.links]
        own = {(id(self), self.p)} if self.p else set()
        return frozenset(own).union(*(a.signature() for a in above if isinstance(a, Derived)))

    def in_memory(self) -> set[int]:
        return self.held.setdefault(self.signature(), set())

    def cells_reading(self, changed: dict[Thing, np.ndarray]) -> set[int]:
        found = set()
        for link in self.links:
            mask = changed.get(link.above)
            if mask is not None:
                # One more for the constant.
                mask = np.append(mask, False)
                found |= {n for n, read in enumerate(link.reads) if mask[read].any()}
        return found

    def value(self, inputs: list[np.ndarray], p: int) -> np.ndarray:
        """Compute the image cell by cell from whole inputs."""
        extended = [np.append(array.ravel(), np.asarray(FILL, array.dtype)) for array in inputs]
        out = np.empty(self.shape, np.int64)
        for number, (cell, crop) in enumerate(zip(self.cells, self.crops, strict=True)):
            blocks = [
                flat[link.reads[number]] for flat, link in zip(extended, self.links, strict=True)
            ]
            out[tuple(slice(*side) for side in cell)] = digest(blocks, p, *self._how)[crop]
        return out


def random_cells(rng: Rng, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(rng.integers(1, 5)) for _ in shape)


def random_halo(rng: Rng, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    kind = rng.choice(["none", "same", "any", "wide"], p=[0.25, 0.3, 0.35, 0.1])
    if kind == "none":
        return [(0, 0)] * len(shape)
    if kind == "same":
        return [(int(n), int(n)) for n in rng.integers(0, 3, len(shape))]
    widest = [3 if kind == "any" else extent + 3 for extent in shape]
    return [(int(rng.integers(0, n)), int(rng.integers(0, n))) for n in widest]


class Graph:
    """Sources and images, and what is expected of them."""

    def __init__(self, cache: ci.CellCache) -> None:
        self.cache = cache
        self.sources: list[Original] = []
        self.images: list[Derived] = []
        """Each after what it reads, also those that were dropped but are read by others."""

    def add_source(self, rng: Rng) -> Original:
        ndim = int(rng.integers(1, 4))
        shape = tuple(int(n) for n in rng.integers(1, (13, 7, 5)[ndim - 1], ndim))
        if self.sources and rng.random() < 0.4:
            # One that fits with another, or is broadcast.
            other = self.sources[int(rng.integers(len(self.sources)))].shape
            skip = int(rng.integers(0, len(other))) if rng.random() < 0.3 else 0
            shape = tuple(1 if rng.random() < 0.25 else n for n in other[skip:])
        dtype = rng.choice(["int16", "uint8", "float32", ">i4"])
        array = rng.integers(0, 100, shape).astype(dtype)
        self.sources.append(Original(array, random_cells(rng, shape)))
        return self.sources[-1]

    def add_image(self, rng: Rng) -> Derived:
        living = [thing for thing in (*self.sources, *self.images) if thing.real is not None]
        # The later ones more often, so that there are chains.
        shares = np.arange(1, len(living) + 1) / sum(range(1, len(living) + 1))

        def pick() -> Thing:
            return living[int(rng.choice(len(living), p=shares))]

        first = pick()
        whole = first.shape
        steps = tuple(int(n) for n in rng.choice([1, 1, 1, 2], len(whole)))
        drop: tuple[int, ...] = ()
        if len(whole) > 1 and rng.random() < 0.2:
            drop = (int(rng.integers(len(whole))),)
            steps = tuple(1 if axis in drop else n for axis, n in enumerate(steps))
        kept = [axis for axis in range(len(whole)) if axis not in drop]
        new: dict[int, int] = {}
        if len(kept) < 3 and rng.random() < 0.2:
            new = {int(rng.integers(len(kept) + 1)): int(rng.integers(1, 3))}
        rest = iter(kept)
        origin = [None if axis in new else next(rest) for axis in range(len(kept) + len(new))]
        shape = tuple(
            new[axis] if source is None else -(-whole[source] // steps[source])
            for axis, source in enumerate(origin)
        )
        size = tuple(
            shape[axis] if axis in new else n for axis, n in enumerate(random_cells(rng, shape))
        )
        links = [self._follow(rng, first, whole, origin, steps)]
        for _ in range(int(rng.choice([0, 1, 2], p=[0.55, 0.35, 0.1]))):
            above = pick()
            skip = len(whole) - len(above.shape)
            fits = skip >= 0 and all(
                n in (1, m) for n, m in zip(above.shape, whole[max(skip, 0) :], strict=False)
            )
            if fits and rng.random() < 0.7:
                links.append(self._follow(rng, above, whole, origin, steps))
            else:
                links.append(self._mapped(rng, above, len(shape)))
        image = Derived(
            shape, size, links, drop, steps, new, self.cache, knows_cells=rng.random() < 0.5
        )
        self.images.append(image)
        return image

    def _follow(
        self,
        rng: Rng,
        above: Thing,
        whole: tuple[int, ...],
        origin: list[int | None],
        steps: tuple[int, ...],
    ) -> Link:
        skip = len(whole) - len(above.shape)
        to_axis = {source: axis for axis, source in enumerate(origin) if source is not None}
        halo = random_halo(rng, above.shape)
        follows: list[tuple[int | None, int, int]] = []
        for axis, extent in enumerate(above.shape):
            stretched = extent == 1 != whole[axis + skip]
            out = None if stretched else to_axis.get(axis + skip)
            factor = 1 if stretched else steps[axis + skip]
            follows.append((out, factor, extent))
            halo[axis] = (
                -(-halo[axis][0] // factor) * factor,
                -(-halo[axis][1] // factor) * factor,
            )

        def place(box: list[tuple[int, int]]) -> list[tuple[int, int]]:
            return [
                (0, extent)
                if out is None
                else (box[out][0] * factor, min(box[out][1] * factor, extent))
                for out, factor, extent in follows
            ]

        return Link(above, halo, str(rng.choice(BOUNDARIES)), place, under=place)

    def _mapped(self, rng: Rng, above: Thing, ndim: int) -> Link:
        """Read another region, which may lie outside: shifted, turned round, or always the same."""
        kind = rng.choice(["shifted", "reversed", "fixed"])
        axes = [int(rng.integers(ndim)) if ndim else None for _ in above.shape]
        shifts = [int(n) for n in rng.integers(-3, 4, len(above.shape))]
        extents = above.shape

        def place(box: list[tuple[int, int]]) -> list[tuple[int, int]]:
            found = []
            for axis, shift, extent in zip(axes, shifts, extents, strict=True):
                if kind == "fixed" or axis is None:
                    found.append((shift, shift + 2))
                elif kind == "shifted":
                    found.append((box[axis][0] + shift, box[axis][1] + shift))
                else:
                    found.append((extent - box[axis][1], extent - box[axis][0]))
            return found

        def index_map(roi: ci.Roi) -> ci.Roi:
            sides = place(list(zip(roi.start, roi.stop, strict=True)))
            return ci.Roi(tuple(a for a, _ in sides), tuple(b for _, b in sides))

        boundary = str(rng.choice(BOUNDARIES))
        return Link(above, random_halo(rng, above.shape), boundary, place, index_map)

    def values(
        self,
        arrays: list[np.ndarray],
        wanted: Derived,
        known: dict[Thing, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return an image for given contents of the sources."""
        known = {} if known is None else known
        known.update(zip(self.sources, arrays, strict=True))

        def value(thing: Thing) -> np.ndarray:
            if thing not in known:
                assert isinstance(thing, Derived)
                known[thing] = thing.value([value(link.above) for link in thing.links], thing.p)
            return known[thing]

        return value(wanted)


# -------------------------------------------------------------------------- random edits


def random_key(rng: Rng, shape: tuple[int, ...]) -> Any:
    """Return any index that NumPy takes, which may choose nothing."""
    kind = rng.choice(["slices", "slices", "voxel", "mask", "fancy", "mixed", "roi"])
    if kind == "mask":
        return rng.random(shape) < rng.choice([0.05, 0.3, 1])
    if kind == "fancy":
        count = int(rng.integers(1, 5))
        return tuple(rng.integers(-n, n, count) for n in shape)
    if kind == "voxel":
        return tuple(int(rng.integers(-n, n)) for n in shape)
    if kind == "roi":
        low = [int(rng.integers(0, n)) for n in shape]
        high = [int(rng.integers(a, n)) + 1 for a, n in zip(low, shape, strict=True)]
        return ci.Roi(low, high)
    key: list[Any] = []
    for extent in shape:
        low, high = (int(n) for n in rng.integers(-extent - 1, extent + 2, 2))
        step = int(rng.choice([1, 1, 1, 2, 3, -1, -2]))
        key.append(slice(low if rng.random() < 0.7 else None, high if rng.random() < 0.5 else None))
        if step != 1:
            key[-1] = slice(key[-1].start, key[-1].stop, step)
    if kind == "mixed":
        axis = int(rng.integers(len(shape)))
        key[axis] = [
            int(rng.integers(-shape[axis], shape[axis])),
            rng.integers(0, shape[axis], 2).tolist(),
            rng.random(shape[axis]) < 0.5,
        ][int(rng.integers(3))]
    cut = int(rng.integers(0, len(key) + 1))
    if rng.random() < 0.3:
        return (*key[:cut], ...)
    return tuple(key)


def random_edit(
    rng: Rng, array: np.ndarray
) -> tuple[list[tuple[Any, Any]], np.ndarray, np.ndarray]:
    """Return writes, the array after them, and where was written."""
    after, written = array.copy(), np.zeros(array.shape, bool)
    writes = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        key = random_key(rng, array.shape)
        plain = key.slices if isinstance(key, ci.Roi) else key
        value: Any = int(rng.integers(0, 100))
        if rng.random() < 0.5:
            value = rng.integers(0, 100, after[plain].shape)
        after[plain] = value
        written[plain] = True
        writes.append((key, value))
    return writes, after, written


def random_region(rng: Rng, shape: tuple[int, ...]) -> ci.Roi:
    low = [int(rng.integers(0, n)) for n in shape]
    return ci.Roi(low, [int(rng.integers(a, n)) + 1 for a, n in zip(low, shape, strict=True)])


# --------------------------------------------------------------------------- the machine

SEEDS = st.integers(0, 2**32 - 1)
MOST_IMAGES = 7
MOST_PARAMETRISED = 3
"""With two values each, an image remembers the cells of all combinations."""

steps_done = 0


class DiscardError(Exception):
    """Ends an edit that is to be discarded."""


class Machine(RuleBasedStateMachine):
    """Everything that can be done, with a cache in which everything has room."""

    max_bytes = 64 << 20
    exact = True
    """Whether the cells in memory are known."""

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        self.cache = ci.CellCache(self.max_bytes)
        self.graph = Graph(self.cache)
        self.log: list[tuple[Thing, ci.Change]] = []
        self.snapshots: list[tuple[Any, np.ndarray, list[Derived]]] = []
        self.known: dict[Thing, np.ndarray] = {}
        self.unsure: set[tuple[Derived, frozenset[Any]]] = set()
        self.last_number = 0
        rng = np.random.default_rng(seed)
        for _ in range(int(rng.integers(1, 4))):
            self.graph.add_source(rng).watch(self.log)
        for _ in range(int(rng.integers(1, 5))):
            self.graph.add_image(rng).watch(self.log)

    # What is expected.

    def value(self, image: Derived) -> np.ndarray:
        return self.graph.values([s.array for s in self.graph.sources], image, self.known)

    @property
    def living(self) -> list[Derived]:
        return [image for image in self.graph.images if image.real is not None]

    def pick(self, rng: Rng) -> Derived:
        living = self.living
        return living[int(rng.integers(len(living)))]

    def changes(self, changed: dict[Thing, np.ndarray], cells: dict[Thing, set[int]]) -> None:
        """Add what an image downstream has changed of it, in the order of the images."""
        for image in self.graph.images:
            found = image.cells_reading(changed) | cells.get(image, set())
            cells[image] = found
            changed[image] = image.voxels_of(found)

    def check_told(self, cells: dict[Thing, set[int]]) -> None:
        """Compare what watchers were told with what they should have been."""
        expected = {}
        for thing, found in cells.items():
            if thing.changed_while_frozen is not None:
                thing.changed_while_frozen |= found
            elif found:
                expected[thing] = found
        told = dict(self.log)
        assert len(told) == len(self.log), "somebody was told twice"
        assert {thing: set(change.cells) for thing, change in self.log} == expected
        depths = [thing.depth for thing, _ in self.log]  # type: ignore[attr-defined]
        assert depths == sorted(depths)
        assert len({change.number for change in told.values()}) <= 1
        for thing, change in told.items():
            assert change.number > self.last_number
            count = np.zeros(thing.shape, int)
            for roi in change.regions:
                assert roi.size
                count[(*roi.slices, ...)] += 1
            np.testing.assert_array_equal(count.ravel(), thing.voxels_of(expected[thing]))
            listed = list(change.cells)
            assert len(set(listed)) == len(listed)
            assert {n for n in range(len(thing.cells)) if n in change.cells} == expected[thing]
        if told:
            self.last_number = next(iter(told.values())).number
        self.log.clear()

    def forget(self, cells: dict[Thing, set[int]]) -> None:
        for image in self.graph.images:
            for held in image.held.values():
                held -= cells[image]

    def check_memory(self) -> None:
        """Compare what is in memory with what should be, and each cell with its value."""
        for image in self.living:
            peeked = {n: image.real.peek(n) for n in range(len(image.cells))}
            held = {n for n, cell in peeked.items() if cell is not None}
            if (image, image.signature()) in self.unsure:
                self.unsure.discard((image, image.signature()))
                image.held[image.signature()] = held
            if self.exact:
                assert held == image.in_memory()
            value = self.value(image)
            for number in held:
                box = tuple(slice(*side) for side in image.cells[number])
                np.testing.assert_array_equal(peeked[number], value[box])

    def load(self, image: Derived, cells: set[int], expected: dict[Derived, set[int]]) -> None:
        """Note what has to be computed so that cells are there."""
        held = image.in_memory()
        missing = cells - held
        held |= missing
        expected.setdefault(image, set()).update(missing)
        for link in image.links:
            if isinstance(link.above, Derived) and missing:
                read = np.concatenate([link.reads[n].ravel() for n in missing])
                wanted = set(link.above.cell_of[read[read >= 0]].tolist())
                self.load(link.above, wanted, expected)

    def read(self, image: Derived, roi: ci.Roi) -> None:
        if image.shown is not None:
            self.check_frozen(image, roi)
            return
        before = {each: (each.calls, len(each.computed)) for each in self.graph.images}
        sure = self.exact and not any(
            (each, each.signature()) in self.unsure for each in self.graph.images
        )
        found = image.real[roi]
        np.testing.assert_array_equal(found, self.value(image)[(*roi.slices, ...)])
        assert found.dtype == image.real.dtype
        if not self.exact:
            return
        expected: dict[Derived, set[int]] = {}
        wanted = image.cell_of.reshape(image.shape)[(*roi.slices, ...)].ravel()
        self.load(image, set(wanted.tolist()), expected)
        if not sure:
            return
        for each, (calls, listed) in before.items():
            computed = expected.get(each, set())
            assert each.calls - calls == len(computed)
            if each.knows_cells:
                assert sorted(each.computed[listed:]) == sorted(computed)

    def check_frozen(self, image: Derived, roi: ci.Roi) -> None:
        assert image.shown is not None
        held, value = image.shown
        found = np.full(image.shape, COVER)
        found[(*roi.slices, ...)] = image.real[roi]
        inside = np.zeros(image.shape, bool)
        inside[(*roi.slices, ...)] = True
        for number, cell in enumerate(image.cells):
            box = tuple(slice(*side) for side in cell)
            here = inside[box]
            same = np.array_equal(found[box][here], value[box][here])
            covered = (found[box][here] == COVER).all()
            assert same or (covered and (number not in held or not self.exact))

    # What is done.

    @rule(seed=SEEDS)
    def edit(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        source = self.graph.sources[int(rng.integers(len(self.graph.sources)))]
        writes, after, written = random_edit(rng, source.array)
        discarded = rng.random() < 0.15
        try:
            with source.real.edit() as array:
                for key, value in writes:
                    array[key] = value
                np.testing.assert_array_equal(array[...], after)
                np.testing.assert_array_equal(source.real[...], source.array)
                if discarded:
                    raise DiscardError
        except DiscardError:
            assert not self.log
            return
        source.array = after
        self.known.clear()
        cells: dict[Thing, set[int]] = {}
        if written.any():
            cells[source] = set(source.cell_of[written.ravel()].tolist())
            self.changes({source: written.ravel()}, cells)
            self.forget(cells)
        self.check_told(cells)
        self.check_memory()
        np.testing.assert_array_equal(source.real[...], after)

    @rule(seed=SEEDS)
    def read_a_region(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        image = self.pick(rng)
        self.read(image, random_region(rng, image.shape))

    @rule()
    def read_everything(self) -> None:
        for image in reversed(self.living):
            self.read(image, ci.Roi.of_shape(image.shape))

    @rule(seed=SEEDS)
    def read_one_whole(self, seed: int) -> None:
        image = self.pick(np.random.default_rng(seed))
        self.read(image, ci.Roi.of_shape(image.shape))

    @rule(seed=SEEDS)
    def invalidate(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        image = self.pick(rng)
        roi = random_region(rng, image.shape)
        image.real.invalidate(roi)
        region = np.zeros(image.shape, bool)
        region[(*roi.slices, ...)] = True
        own = set(image.cell_of[region.ravel()].tolist())
        for number, link in enumerate(image.links):
            if link.under is not None:
                mask = np.zeros(link.above.shape, bool)
                sides = link.under(list(zip(roi.start, roi.stop, strict=True)))
                mask[(*(slice(*side) for side in sides), ...)] = True
                flat = np.append(mask, False)
                own |= {n for n, read in enumerate(image.links[number].reads) if flat[read].any()}
        cells: dict[Thing, set[int]] = {image: own}
        self.changes({}, cells)
        self.forget(cells)
        self.check_told(cells)
        self.check_memory()

    @rule(seed=SEEDS)
    def set_params(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        image = self.living[int(rng.integers(min(MOST_PARAMETRISED, len(self.living))))]
        if image not in self.graph.images[:MOST_PARAMETRISED]:
            return
        image.p = int(rng.integers(0, 2))
        image.real.set_params(p=image.p)
        assert dict(image.real.params) == {"p": image.p}
        self.known.clear()
        cells: dict[Thing, set[int]] = {image: set(range(len(image.cells)))}
        self.changes({}, cells)
        self.check_told(cells)
        self.check_memory()

    @precondition(lambda self: len(self.graph.images) < MOST_IMAGES)
    @rule(seed=SEEDS)
    def define(self, seed: int) -> None:
        image = self.graph.add_image(np.random.default_rng(seed))
        image.watch(self.log)

    @precondition(lambda self: len(self.graph.images) < MOST_IMAGES)
    @rule(seed=SEEDS)
    def define_source(self, seed: int) -> None:
        if len(self.graph.sources) < 4:
            self.graph.add_source(np.random.default_rng(seed)).watch(self.log)

    @precondition(lambda self: len(self.living) > 2)
    @rule(seed=SEEDS)
    def drop(self, seed: int) -> None:
        image = self.pick(np.random.default_rng(seed))
        image.real = None
        for each in reversed(list(self.graph.images)):
            read = any(link.above is each for other in self.graph.images for link in other.links)
            if each.real is None and not read:
                self.graph.images.remove(each)
                assert each.node() is None
        assert image.node() is None or image in self.graph.images

    @precondition(lambda self: len(self.snapshots) < 4)
    @rule(seed=SEEDS)
    def snapshot(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        image = self.pick(rng)
        taken = image.real.to_dask() if rng.random() < 0.5 else image.real.snapshot()
        self.snapshots.append((taken, self.value(image), list(self.graph.images)))

    @precondition(lambda self: self.snapshots)
    @rule(seed=SEEDS, forget=st.booleans())
    def read_a_snapshot(self, seed: int, forget: bool) -> None:
        rng = np.random.default_rng(seed)
        number = int(rng.integers(len(self.snapshots)))
        taken, expected, images = self.snapshots[number]
        if isinstance(taken, ci.CellImg):
            roi = random_region(rng, taken.shape)
            found = taken[roi]
        else:
            roi = ci.Roi.of_shape(taken.shape)
            found = taken.compute(scheduler="sync" if rng.random() < 0.7 else "threads")
        np.testing.assert_array_equal(found, expected[(*roi.slices, ...)])
        if forget:
            del self.snapshots[number]
        # It may have put cells that are still the same where others find them.
        for image in images:
            self.unsure.update((image, signature) for signature in image.held)
            self.unsure.add((image, image.signature()))
        self.check_memory()

    @rule(seed=SEEDS)
    def freeze_or_thaw(self, seed: int) -> None:
        image = self.pick(np.random.default_rng(seed))
        if image.shown is None:
            image.real.freeze(COVER)
            image.shown = set(image.in_memory()), self.value(image).copy()
            image.changed_while_frozen = set()
            return
        image.real.thaw()
        changed, image.changed_while_frozen, image.shown = image.changed_while_frozen, None, None
        assert [thing for thing, _ in self.log] == ([image] if changed else [])
        assert all(set(change.cells) == changed for _, change in self.log)
        self.log.clear()
        self.check_memory()

    @rule(seed=SEEDS)
    def evict(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        if rng.random() < 0.6:
            # Not so often that nothing is ever there.
            return
        if rng.random() < 0.5:
            self.cache.clear()
        else:
            self.cache.resize(int(rng.integers(0, 1 << 11)))
            self.cache.resize(self.max_bytes)
        for image in self.graph.images:
            self.unsure.update((image, signature) for signature in image.held)
            self.unsure.add((image, image.signature()))
            if image.shown is not None:
                image.shown = set(), image.shown[1]
        self.check_memory()

    @invariant()
    def adds_up(self) -> None:
        global steps_done
        steps_done += 1
        if not hasattr(self, "graph"):
            return
        assert not self.log
        total = self.cache.stats()
        nbytes = 0
        for image in self.graph.images:
            node = image.node()
            assert node is not None
            stats = node.now.shelf.stats()
            assert stats.loads == stats.misses == image.calls
            assert stats.errors == 0
            nbytes += stats.bytes
        assert nbytes <= total.bytes == self.cache.bytes <= self.cache.max_bytes
        if not self.snapshots:
            assert nbytes == total.bytes
        assert total.loads == total.misses
        assert total.loads >= sum(image.calls for image in self.graph.images)


class Cramped(Machine):
    """The same with a cache that holds a few cells only."""

    max_bytes = 600
    exact = False


@pytest.mark.parametrize("machine", [Machine, Cramped])
def test_changes_reach_what_they_affect_and_nothing_else(machine: Any) -> None:
    global steps_done
    steps_done = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60 if machine.exact else 30,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
            report_multiple_bugs=False,
        ),
    )
    assert steps_done >= (1200 if machine.exact else 400)


# ----------------------------------------------------------------------------- threads


READS_PER_EDIT = 2


@dataclass
class Read:
    """What a thread has read, and the versions of the sources that it may have been made from."""

    image: Derived
    roi: ci.Roi
    found: np.ndarray
    since: list[int]
    until: list[int]


class Race:
    """Threads that read while others edit.

    An edit notes the new content of its source before it takes place, and that it has taken place
    afterwards. So a read is right if it equals the content of the image for some version that was
    the last to have taken place when the read began, or was noted before it ended.
    """

    def __init__(self, seed: int, max_bytes: int, num_edits: int, num_reads: int) -> None:
        rng = np.random.default_rng(seed)
        while True:
            self.graph = Graph(ci.CellCache(max_bytes))
            for _ in range(2):
                self.graph.add_source(rng)
            for _ in range(6):
                self.graph.add_image(rng)
            if self.reads_both():
                break
        self.versions = [[source.array] for source in self.graph.sources]
        self.done = [0, 0]
        self.num_edits = num_edits
        self.num_reads = num_reads
        self.reads_ended = threading.Semaphore(0)

    def reads_both(self) -> bool:
        def above(thing: Thing) -> set[Thing]:
            if not isinstance(thing, Derived):
                return {thing}
            return set().union(*(above(link.above) for link in thing.links))

        return any(len(above(image)) == 2 for image in self.graph.images)

    def edit(self, number: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        source, versions = self.graph.sources[number], self.versions[number]
        for _ in range(self.num_edits):
            # Not much faster than the readers, or a read could be of too many versions.
            for _ in range(READS_PER_EDIT):
                assert self.reads_ended.acquire(timeout=PATIENCE_S)
            with source.real.edit() as array:
                writes, after, _ = random_edit(rng, versions[-1])
                for key, value in writes:
                    array[key] = value
                versions.append(after)
            self.done[number] = len(versions) - 1

    def read(self, seed: int) -> list[Read]:
        rng = np.random.default_rng(seed)
        found = []
        images = self.graph.images
        for _ in range(self.num_reads):
            image = images[int(rng.integers(len(images)))]
            roi = random_region(rng, image.shape)
            if rng.random() < 0.3:
                roi = ci.Roi.of_shape(image.shape)
            since = list(self.done)
            kind = rng.random()
            real = image.real
            if kind < 0.1:
                real = real.snapshot()
            elif kind < 0.15:
                real.invalidate(roi)
            block = real[roi]
            until = [len(versions) - 1 for versions in self.versions]
            found.append(Read(image, roi, block, since, until))
            self.reads_ended.release()
        return found

    def check(self, read: Read, known: dict[tuple[int, ...], dict[Thing, np.ndarray]]) -> None:
        spans = [range(a, b + 1) for a, b in zip(read.since, read.until, strict=True)]
        for version in product(*spans):
            arrays = [all_of[n] for all_of, n in zip(self.versions, version, strict=True)]
            value = self.graph.values(arrays, read.image, known.setdefault(version, {}))
            if np.array_equal(value[(*read.roi.slices, ...)], read.found):
                return
        raise AssertionError(f"a read of {read.roi} equals none of the versions {spans}")


@pytest.mark.parametrize("max_bytes", [64 << 20, 600])
@pytest.mark.parametrize("seed", range(4))
def test_each_read_is_of_one_version_while_threads_edit(seed: int, max_bytes: int) -> None:
    race = Race(seed, max_bytes, num_edits=60, num_reads=80)
    readers = [begin(lambda n=n: race.read(100 * seed + n)) for n in range(4)]
    editors = [begin(lambda n=n: race.edit(n, 1000 + 100 * seed + n)) for n in range(2)]
    for editor in editors:
        editor.result(PATIENCE_S)
    reads = [read for reader in readers for read in reader.result(PATIENCE_S)]
    known: dict[tuple[int, ...], dict[Thing, np.ndarray]] = {}
    for read in reads:
        race.check(read, known)
    last = [versions[-1] for versions in race.versions]
    for source, array in zip(race.graph.sources, last, strict=True):
        np.testing.assert_array_equal(source.real[...], array)
    values: dict[Thing, np.ndarray] = {}
    for image in race.graph.images:
        np.testing.assert_array_equal(image.real[...], race.graph.values(last, image, values))
        stats = image.real.stats()
        assert stats.errors == 0
        assert stats.loads == image.calls
