"""Images and sources over all their editions, and how a change of one reaches the others."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from typing import Any
from uuid import uuid4

from numpy.typing import NDArray

from cellimg_dask.blocks.content import NoContentError, digest, value_content
from cellimg_dask.blocks.plan import Region
from cellimg_dask.geometry import CellGrid, Roi, tiles
from cellimg_dask.loading.loader import CellLoader, ImageReader, Place, Signature
from cellimg_dask.loading.readers import ChunkedReader, Reader
from cellimg_dask.loading.watch import Change, Watchers, deliver, post
from cellimg_dask.state.cells import CellProduct, Cells, no_cells, union
from cellimg_dask.state.dirty import (
    Points,
    VoxelMask,
    affected_cells,
    cells_meeting,
    region_of,
    region_read,
)
from cellimg_dask.state.history import clock
from cellimg_dask.state.living import Living

__all__ = ["ImageNode", "Node", "SourceNode", "defining", "living_images"]

# Held by whoever changes something or defines an image: an image is either there before a
# change, or made from what is there after it.
_changes = threading.RLock()
_changing = threading.local()
_numbers = count()

_REMEMBERED_PLACES = 16

living_images: Living[ImageNode] = Living()
"""All images of the process."""


class Node:
    """Something that images read and that can change.

    Its present edition is swapped as a whole: `now` gives the old one until the clock shows
    the number of the change, and the new one from then on, to everybody and for all nodes that
    the change reaches at the same moment.
    """

    depth: int
    """Length of the longest chain of images that ends here."""

    def __init__(self, edition: Any) -> None:
        self._editions: tuple[int, Any, Any] = (0, None, edition)
        self._dependents: weakref.WeakSet[ImageNode] = weakref.WeakSet()
        self.watchers = Watchers()
        """Who is told of changes."""

    @property
    def now(self) -> Any:
        """The present edition."""
        number, old, new = self._editions
        return new if clock.number >= number else old

    @property
    def dependents(self) -> list[ImageNode]:
        """The images that read this directly, in no order."""
        with _changes:
            return list(self._dependents)

    def reader(self) -> Reader:
        """Return a reader of the present edition."""
        return _as_reader(self.now)

    def _prepare(self, number: int, edition: Any) -> None:
        self._editions = (number, self.now, edition)

    def _settle(self) -> None:
        # What was before is not kept alive.
        self._editions = (0, None, self._editions[2])


class SourceNode(Node):
    """Data that can change; an edition is a `Reader` of them as they were."""

    depth = 0

    def __init__(self, edition: Reader, grid: CellGrid) -> None:
        super().__init__(edition)
        self._grid = grid

    def change(
        self,
        edition: Reader,
        parts: Sequence[Region | VoxelMask | Points],
        along: Callable[[], None] | None = None,
    ) -> None:
        """Put another edition in place, in which the voxels of ``parts`` differ.

        ``along`` is called when the change has taken place, perhaps more than once. Watchers are
        told with the next `deliver`.
        """
        with _change() as change:
            change.begin(self, edition, parts, along)


class ImageNode(Node):
    """An image; an edition is a `CellLoader`.

    Parameters
    ----------
    loader : CellLoader
        The first edition.
    inputs : sequence of Node or None, optional
        Per reader of the loader, what it belongs to, if that can change. Default: it is a
        snapshot, and nothing changes.
    """

    def __init__(self, loader: CellLoader, inputs: Sequence[Node | None] | None) -> None:
        super().__init__(loader)
        self.number = next(_numbers)
        """In the order in which images are made."""
        self.is_snapshot = inputs is None
        """Whether it never changes."""
        self.inputs = tuple(inputs or ())
        """Per reader what it belongs to, if that can change."""
        self.depth = loader.depth
        self.grid = loader.grid
        """Its cells, the same in all editions."""
        self.frozen: Frozen | None = None
        """What is shown while the image is frozen."""
        self._places = OrderedDict({loader.signature: loader.place})
        self._first_params = loader.params
        for above in self.inputs:
            if above is not None:
                above._dependents.add(self)
        living_images.add(self)

    def place(self, signature: Signature) -> Place:
        """Return where cells are kept that belong to ``signature``."""
        place = self._places.get(signature)
        if place is None:
            shelf = self.now.shelf
            place = self._places[signature] = Place(shelf.cache, beside=shelf)
        self._places.move_to_end(signature)
        if len(self._places) > _REMEMBERED_PLACES:
            self._places.popitem(last=False)
        return place

    def forget(self, cells: Cells, number: int) -> None:
        """Forget cells for the change ``number``, of all parameters."""
        loader: CellLoader = self.now
        loader.history.add(number, cells)
        frozen = self.frozen
        for place in self._places.values():
            if frozen is not None and place is frozen.loader.place:
                # What is shown goes on to be shown.
                frozen.put_aside(cells, number)
            else:
                place.shelf.invalidate(cells, number)
            loader.forget_elsewhere(place.shelf, cells)

    def invalidate(self, roi: Roi, under: Sequence[Region | None] | None = None) -> None:
        """Forget the cells that read a voxel of the region, and what was made from them.

        Safe at any time. Chunks that these cells read are decoded again.

        Parameters
        ----------
        roi : Roi
            The region of this image.
        under : sequence of Region or None, optional
            Per input what lies under it; None: not known. Default: as the input is linked.
        """
        self._check_changeable()
        if roi.size == 0:
            return
        with _delivering(), _change() as change:
            loader: CellLoader = self.now
            region = region_of(roi)
            cells: list[Cells] = [cells_meeting(loader.grid, region)]
            for number, item in enumerate(loader.planner.inputs):
                source = item.region_under(region) if under is None else under[number]
                if source is not None:
                    cells.append(affected_cells(loader.planner, number, source))
            for number, reader in enumerate(loader.readers):
                if isinstance(reader, ChunkedReader):
                    for part in cells:
                        reader.forget(region_read(loader.planner, number, part))
            change.reach(self, cells)

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Replace some parameters of the function.

        Nothing is forgotten: cells of other parameters are kept in another place, here and
        downstream.
        """
        self._check_changeable()
        with _delivering(), _change() as change:
            change.params[self] = {**self.now.params, **params}
            grid = self.now.grid
            change.reach(self, [CellProduct(grid, [range(n) for n in grid.grid_shape])])

    def own_signature(self, params: Mapping[str, Any]) -> Signature:
        """Return what parameters add to the signature."""
        try:
            first, key = _params_key(self._first_params), _params_key(params)
        except NoContentError:
            # Which cannot be compared are never found again, unless they are the very same.
            if params is self._first_params:
                return frozenset()
            return frozenset([(self.now.history, uuid4().hex)])
        return frozenset() if key == first else frozenset([(self.now.history, key)])

    def freeze(self, fill_value: Any) -> None:
        """Go on to show the cells that are in memory, and ``fill_value`` for all others."""
        with _changes:
            if self.frozen is not None:
                raise ValueError("the image is frozen already")
            self.frozen = Frozen(self.now, fill_value)

    def thaw(self) -> None:
        """Show what there is now, and tell what changed meanwhile."""
        with _delivering(), _changes:
            frozen, self.frozen = self.frozen, None
            if frozen is None:
                raise ValueError("the image is not frozen")
            if self.watchers and next(iter(frozen.changed), None) is not None:
                post(self.watchers, Change(clock.number, frozen.changed))

    def _check_changeable(self) -> None:
        if self.is_snapshot:
            raise TypeError("a snapshot never changes; change the image that it was taken of")


class Frozen:
    """What a frozen image shows.

    Parameters
    ----------
    loader : CellLoader
        The edition; its cells that are in memory are shown.
    fill_value : scalar
        Shown in place of the others.
    """

    def __init__(self, loader: CellLoader, fill_value: Any) -> None:
        self.loader = loader
        self.fill_value = fill_value
        self.changed: Cells = no_cells(loader.grid)
        """What has changed since."""
        # What of it is not shown from its shelf any more, where there may be newer cells.
        self._aside: Cells = no_cells(loader.grid)

    def put_aside(self, cells: Cells, number: int) -> None:
        """Keep what is shown of cells that are forgotten for the change ``number``."""
        loader = self.loader
        loader.shelf.invalidate(cells, number, loader.aside(), self._aside)
        # Before the change takes place, and so before there are newer cells.
        self._aside = union(loader.grid, [self._aside, cells])

    def read(self, start: Sequence[int], stop: Sequence[int], out: NDArray[Any]) -> None:
        """Fill ``out`` with what is shown of a region."""
        for index, source, target in tiles(self.loader.grid, start, stop)[1]:
            held = self.loader.shelf.peek(index)
            # Asked afterwards: what has been put aside meanwhile is there.
            if held is None or index in self._aside:
                held = self.loader.aside().peek(index)
            out[target] = self.fill_value if held is None else held[source]


@contextmanager
def defining() -> Iterator[None]:
    """Let nothing change while an image is made from the present editions of others."""
    with _changes:
        yield


class _Change:
    """A change on its way down."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._source: SourceNode | None = None
        self._edition: Any = None
        self._along: Callable[[], None] | None = None
        self.params: dict[ImageNode, Mapping[str, Any]] = {}
        """Images that get other parameters, and which."""
        self._cells: dict[Node, Cells] = {}
        self._reached: dict[ImageNode, list[Cells]] = {}
        self._waiting: list[tuple[int, int, ImageNode]] = []
        self._told: set[Node] = set()

    def begin(
        self,
        source: SourceNode,
        edition: Reader,
        parts: Sequence[Region | VoxelMask | Points],
        along: Callable[[], None] | None,
    ) -> None:
        """Change voxels of a source."""
        self._source, self._edition, self._along = source, edition, along
        self._cells[source] = union(source._grid, [cells_meeting(source._grid, p) for p in parts])
        for below, number in _readers_of(source):
            below_planner = below.now.planner
            self.reach(below, [affected_cells(below_planner, number, part) for part in parts])

    def reach(self, node: ImageNode, cells: Sequence[Cells]) -> None:
        """Note that cells of an image change, perhaps none: it is made anew in any case."""
        if node not in self._reached:
            self._reached[node] = []
            heappush(self._waiting, (node.depth, node.number, node))
        self._reached[node] += cells

    def spread(self) -> None:
        """Find out what changes of the images downstream; nothing is changed yet.

        Each image comes once, after everything that it reads from.
        """
        while self._waiting:
            _, _, node = heappop(self._waiting)
            cells = self._cells[node] = union(node.now.grid, self._reached[node])
            for below, number in _readers_of(node):
                self.reach(below, [affected_cells(below.now.planner, number, cells)])

    def take_place(self) -> None:
        """Make the new editions, and let everybody see them at the same moment."""
        try:
            self._make()
        except BaseException:
            # Interrupted half way. What was done may be done again, and must not be left so.
            self._make()
            raise

    def _make(self) -> None:
        made: dict[Node, Any] = {}
        if self._source is not None:
            made[self._source] = self._edition
        for node, cells in self._cells.items():
            if isinstance(node, ImageNode):
                # With other parameters cells are kept in another place, and none is forgotten.
                if len(cells) and not self.params:
                    node.forget(cells, self.number)
                made[node] = self._renewed(node, made)
        for node, edition in made.items():
            node._prepare(self.number, edition)
        clock.number = self.number
        # Not before: who reads what was there until now could find that it is gone already.
        if self._along is not None:
            self._along()
        for node in made:
            node._settle()
            self._tell(node)

    def _renewed(self, node: ImageNode, made: Mapping[Node, Any]) -> CellLoader:
        loader: CellLoader = node.now
        readers = [
            reader if above is None else _as_reader(made.get(above, above.now))
            for above, reader in zip(node.inputs, loader.readers, strict=True)
        ]
        params = self.params.get(node, loader.params)
        signature = loader.signature
        if self.params:
            above = [r.loader.signature for r in readers if isinstance(r, ImageReader)]
            signature = node.own_signature(params).union(*above)
        return loader.renewed(readers, params, signature, node.place(signature))

    def _tell(self, node: Node) -> None:
        if node in self._told:
            return
        self._told.add(node)
        cells = self._cells[node]
        if isinstance(node, ImageNode) and node.frozen is not None:
            node.frozen.changed = union(node.now.grid, [node.frozen.changed, cells])
        elif node.watchers and next(iter(cells), None) is not None:
            post(node.watchers, Change(self.number, cells))


@contextmanager
def _change() -> Iterator[_Change]:
    """Prepare a change, which takes place at the end."""
    with _changes:
        if getattr(_changing, "now", False):
            raise RuntimeError("an index_map must not change what it is asked about")
        _changing.now = True
        try:
            change = _Change(clock.number + 1)
            yield change
            change.spread()
            change.take_place()
        finally:
            _changing.now = False


@contextmanager
def _delivering() -> Iterator[None]:
    """Tell watchers at the end, when nothing is held that they might need."""
    try:
        yield
    finally:
        deliver()


def _readers_of(node: Node) -> Iterator[tuple[ImageNode, int]]:
    """Yield the images that read ``node``, and as which input."""
    for below in node.dependents:
        for number, above in enumerate(below.inputs):
            if above is node:
                yield below, number


def _as_reader(edition: CellLoader | Reader) -> Reader:
    return ImageReader(edition) if isinstance(edition, CellLoader) else edition


def _params_key(params: Mapping[str, Any]) -> str:
    return digest({name: value_content(value, name) for name, value in params.items()})


def _after_fork_in_child() -> None:
    # Another thread may have been at it when this process was forked.
    global _changes
    _changes = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
