"""The plan of a cell: what to read for it, and what to keep of the result.

Everything separates over the axes, so a plan is put together from per-axis pieces that are
remembered: a grid of billions of cells has only thousands of positions along an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeAlias

from cellimg_dask.geometry import (
    AxisWindow,
    CellGrid,
    Halo,
    Roi,
    axis_window,
    check_boundary,
)

__all__ = ["AxisLink", "AxisPiece", "Box", "CellPlan", "InputPlan", "Planner", "Region"]

Box: TypeAlias = tuple[slice, ...]
"""Slices of step 1 with explicit bounds, one per axis of an input."""

Region: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""Per axis some half-open intervals; the region is their product."""

_REMEMBERED_PIECES = 1 << 16


@dataclass(frozen=True, slots=True)
class AxisLink:
    """How one axis of an input follows the output cell."""

    axis: int | None
    """The output axis that it follows; None: the whole extent is read for every cell."""
    factor: int = 1
    """Input voxels per output voxel."""


@dataclass(frozen=True, slots=True)
class InputPlan:
    """How one input is read for a cell.

    Either ``links`` says so axis by axis, or ``index_map`` turns the cell's Roi into one of
    the input. The halo is in voxels of the input and comes on top of both.
    """

    shape: tuple[int, ...]
    """Shape of the input."""
    halo: Halo
    """Halo in voxels of the input."""
    boundary: str
    """Name of the boundary mode."""
    links: tuple[AxisLink, ...] | None
    """One per axis of the input, or None where ``index_map`` is given."""
    index_map: Callable[[Roi], Roi] | None = None
    """From the cell's Roi to the input's Roi, both without halo."""
    fill_value: Any = 0
    """What lies beyond the border where ``boundary`` is ``constant``."""
    version: str | None = None
    """What stands for the input's content, where the user says so."""

    def __post_init__(self) -> None:
        check_boundary(self.boundary)
        assert (self.links is None) != (self.index_map is None)
        assert self.halo.ndim == len(self.shape)

    def interval(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """Return the interval read along an input axis for cell bounds ``start, stop``.

        The bounds are those of the output axis that the input axis is linked to; the interval
        includes the halo and may leave the input.
        """
        assert self.links is not None
        link, extent = self.links[axis], self.shape[axis]
        if link.axis is None:
            low, high = 0, extent
        else:
            low, high = start * link.factor, min(stop * link.factor, extent)
        return low - self.halo.before[axis], high + self.halo.after[axis]

    def region_under(self, region: Region) -> Region | None:
        """Return what lies under a region of the output, without halo; None: not known."""
        if self.links is None:
            return None
        return tuple(
            ((0, extent),)
            if link.axis is None
            else tuple(
                (low * link.factor, min(high * link.factor, extent))
                for low, high in region[link.axis]
            )
            for link, extent in zip(self.links, self.shape, strict=True)
        )

    def window(self, axis: int, start: int, stop: int) -> AxisWindow:
        """Plan one axis of the input for cell bounds as in `interval`."""
        low, high = self.interval(axis, start, stop)
        return axis_window(low, high, self.shape[axis], self.boundary)


@dataclass(slots=True)
class AxisPiece:
    """What a position along one output axis contributes to a plan."""

    row: tuple[int, int, int, int, slice]
    """First voxel, one past the last, extent of the cell, extent of a result that still has the
    halo, and the slice that cuts such a result down to the cell."""
    read_start: int
    """First voxel with the halo; may lie outside the image."""
    read_stop: int
    """One past the last voxel with the halo; may lie outside the image."""
    windows: tuple[tuple[int, int, AxisWindow], ...]
    """(input, input axis, window) of the input axes that follow this output axis."""


@dataclass(slots=True)
class CellPlan:
    """What one cell needs; made for a single call."""

    index: int
    """Flat index in the grid."""
    position: tuple[int, ...]
    """Index along each axis of the grid."""
    start: tuple[int, ...]
    """First voxel of the cell."""
    stop: tuple[int, ...]
    """One past the last voxel of the cell."""
    shape: tuple[int, ...]
    """Shape of the cell."""
    windows: tuple[tuple[AxisWindow, ...], ...]
    """Per input and axis, what to read."""
    full_shape: tuple[int, ...]
    """Shape of a result that still has the halo."""
    crop: tuple[slice, ...]
    """Slices that cut ``full_shape`` down to ``shape``."""
    pieces: list[AxisPiece]
    """What the plan was put together from, one per axis."""

    @property
    def roi(self) -> Roi:
        """The cell's box."""
        return Roi(self.start, self.stop)

    @property
    def read_roi(self) -> Roi:
        """The cell's box grown by the halo, in output voxels; it may leave the image."""
        return Roi(
            tuple(piece.read_start for piece in self.pieces),
            tuple(piece.read_stop for piece in self.pieces),
        )

    def boxes(self, number: int) -> list[Box]:
        """Return the boxes of input ``number`` that this cell reads, all inside the input."""
        spans = [[slice(*span) for span in window.spans] for window in self.windows[number]]
        return list(product(*spans))


@dataclass
class Planner:
    """Makes the plans of the cells of one image.

    Thread-safe: the remembered pieces are values that never change, and two threads that make
    the same piece make equal ones.
    """

    grid: CellGrid
    """Grid of the output image."""
    inputs: Sequence[InputPlan]
    """How each input is read."""
    _pieces: list[dict[int, AxisPiece]] = field(init=False, repr=False)
    _fixed: list[tuple[int, int, AxisWindow]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.inputs = tuple(self.inputs)
        self._pieces = [{} for _ in range(self.grid.ndim)]
        # Axes that are read whole for every cell are planned once.
        self._fixed = [
            (number, axis, item.window(axis, 0, 0))
            for number, item in enumerate(self.inputs)
            for axis, link in enumerate(item.links or ())
            if link.axis is None
        ]
        self._followers: list[list[tuple[int, int]]] = [[] for _ in range(self.grid.ndim)]
        for number, item in enumerate(self.inputs):
            for axis, link in enumerate(item.links or ()):
                if link.axis is not None:
                    self._followers[link.axis].append((number, axis))
        self._mapped = [n for n, item in enumerate(self.inputs) if item.index_map is not None]
        self._axes = list(zip(self.grid.strides, self._pieces, strict=True))
        # One input whose axes follow the output's one by one: windows need no sorting.
        self._direct = (
            len(self.inputs) == 1
            and self.inputs[0].links is not None
            and len(self.inputs[0].links) == self.grid.ndim
            and all(link.axis == axis for axis, link in enumerate(self.inputs[0].links))
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"grid": self.grid, "inputs": self.inputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.grid, self.inputs = state["grid"], state["inputs"]
        self.__post_init__()

    def plan(self, index: int) -> CellPlan:
        """Return the plan of the cell with flat index ``index``, which must exist."""
        rest = index
        position: list[int] = []
        pieces: list[AxisPiece] = []
        for stride, known in self._axes:
            step, rest = divmod(rest, stride)
            piece = known.get(step)
            if piece is None:
                piece = self._make_piece(len(position), step)
            position.append(step)
            pieces.append(piece)
        if pieces:
            start, stop, shape, full_shape, crop = zip(*[piece.row for piece in pieces])  # noqa: B905
        else:
            start = stop = shape = full_shape = crop = ()
        if self._direct:
            windows: tuple[tuple[AxisWindow, ...], ...] = (
                tuple([piece.windows[0][2] for piece in pieces]),
            )
        else:
            windows, mapped = self._collect(pieces, start, stop)
            if mapped and len(mapped) == len(self.inputs):
                full_shape, crop = self._crop_mapped(mapped[0], shape, windows[0])
        return CellPlan(
            index, tuple(position), start, stop, shape, windows, full_shape, crop, pieces
        )

    def piece(self, axis: int, step: int) -> AxisPiece:
        """Return what position ``step`` along output ``axis`` contributes to a plan."""
        return self._pieces[axis].get(step) or self._make_piece(axis, step)

    def _collect(
        self, pieces: list[AxisPiece], start: tuple[int, ...], stop: tuple[int, ...]
    ) -> tuple[tuple[tuple[AxisWindow, ...], ...], list[Roi]]:
        """Return the windows of all inputs, and where the index maps lead."""
        found: list[list[AxisWindow | None]] = [[None] * len(item.shape) for item in self.inputs]
        for piece in pieces:
            for number, axis, window in piece.windows:
                found[number][axis] = window
        for number, axis, window in self._fixed:
            found[number][axis] = window
        mapped = []
        for number in self._mapped:
            mapped.append(self._mapped_roi(number, start, stop))
            found[number] = list(self._windows_around(number, mapped[-1]))
        return tuple(tuple(windows) for windows in found), mapped  # type: ignore[arg-type]

    def windows_of(
        self, number: int, start: tuple[int, ...], stop: tuple[int, ...]
    ) -> tuple[AxisWindow, ...]:
        """Return what a region reads of an input with an index map."""
        return self._windows_around(number, self._mapped_roi(number, start, stop))

    def _windows_around(self, number: int, roi: Roi) -> tuple[AxisWindow, ...]:
        item = self.inputs[number]
        grown = roi.grow(item.halo)
        return tuple(
            axis_window(low, high, extent, item.boundary)
            for low, high, extent in zip(grown.start, grown.stop, item.shape, strict=True)
        )

    def _mapped_roi(self, number: int, start: tuple[int, ...], stop: tuple[int, ...]) -> Roi:
        item = self.inputs[number]
        assert item.index_map is not None
        roi = item.index_map(Roi(start, stop))
        if not isinstance(roi, Roi) or roi.ndim != len(item.shape):
            raise TypeError(
                f"index_map of input {number} must return a Roi with {len(item.shape)} axes "
                f"(the input's shape is {item.shape}), got {roi!r}"
            )
        return roi

    def _crop_mapped(
        self,
        roi: Roi,
        shape: tuple[int, ...],
        windows: tuple[AxisWindow, ...],
    ) -> tuple[tuple[int, ...], tuple[slice, ...]]:
        """Return shape and crop of a result as large as the first input, if that fits the cell."""
        item = self.inputs[0]
        if roi.shape != shape:
            return shape, tuple(slice(0, extent) for extent in shape)
        skips = [
            low - min(max(low - before, 0), extent, low) if item.boundary == "none" else before
            for low, before, extent in zip(roi.start, item.halo.before, item.shape, strict=True)
        ]
        return (
            tuple(window.length for window in windows),
            tuple(slice(a, a + extent) for a, extent in zip(skips, shape, strict=True)),
        )

    def _make_piece(self, axis: int, step: int) -> AxisPiece:
        start = step * self.grid.cell_shape[axis]
        stop = min(start + self.grid.cell_shape[axis], self.grid.shape[axis])
        windows = tuple(
            (number, follower, self.inputs[number].window(follower, start, stop))
            for number, follower in self._followers[axis]
        )
        read_start, read_stop, full, skip = start, stop, stop - start, 0
        # The first input that follows this axis says how much halo a result may still have.
        if windows:
            number, follower, window = windows[0]
            item = self.inputs[number]
            assert item.links is not None
            factor = item.links[follower].factor
            low, high = item.interval(follower, start, stop)
            read_start, read_stop = -(-low // factor), -(-high // factor)
            full = -(-window.length // factor)
            seen_from = max(low, 0) if item.boundary == "none" else low
            skip = (start * factor - seen_from) // factor
        extent = stop - start
        piece = AxisPiece(
            (start, stop, extent, full, slice(skip, skip + extent)),
            read_start,
            read_stop,
            windows,
        )
        known = self._pieces[axis]
        if len(known) >= _REMEMBERED_PIECES:
            known.clear()
        known[step] = piece
        return piece
