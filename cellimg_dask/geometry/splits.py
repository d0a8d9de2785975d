"""Stacks cut into blocks that overlap: what each block reads, and what is its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from cellimg_dask.geometry.halo import Halo, HaloLike

__all__ = ["SIDES", "AxisSplit", "StackSplit", "as_overlap"]

SIDES = ("after", "before", "both")
"""Where an overlap given as one width lies."""


@dataclass(frozen=True, slots=True)
class AxisSplit:
    """One axis cut into blocks, and what remains of it when every block is scaled.

    The core of block ``i`` is ``[i * size, (i + 1) * size)``; it reads ``before`` voxels more in
    front and ``after`` more behind, as far as the axis reaches. Either ``scale`` or ``shrink``
    is 1. Nothing is checked here but the phase, by `check_phase`.

    Examples
    --------
    >>> axis = AxisSplit(extent=10, size=4, after=3)
    >>> [axis.read(i) for i in range(axis.num_blocks)]
    [(0, 7), (4, 10), (8, 10)]
    """

    extent: int
    """Voxels along the axis."""
    size: int
    """Nominal length of a core, at least 1."""
    before: int = 0
    """Overlap in front of a core."""
    after: int = 0
    """Overlap behind a core."""
    scale: int = 1
    """Result voxels per voxel."""
    shrink: int = 1
    """Voxels per result voxel, counted from the start of a block."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.extent // self.size)

    @property
    def length(self) -> int:
        """Extent of the scaled axis."""
        return -(-self.extent * self.scale // self.shrink)

    def read(self, i: int) -> tuple[int, int]:
        """Return what block ``i`` reads, in voxels of the axis."""
        low = i * self.size
        return max(low - self.before, 0), min(low + self.size + self.after, self.extent)

    def scaled(self, i: int) -> tuple[int, int]:
        """Return where block ``i`` lies once it is scaled, in voxels of the scaled axis."""
        low, high = self.read(i)
        return low * self.scale // self.shrink, -(-high * self.scale // self.shrink)

    def block_length(self, i: int) -> int:
        """Return the length of block ``i`` once it is scaled."""
        low, high = self.scaled(i)
        return high - low

    def core(self, i: int) -> tuple[int, int]:
        """Return what belongs to block ``i`` alone, in voxels of the scaled axis."""
        low, high = i * self.size, min((i + 1) * self.size, self.extent)
        return -(-low * self.scale // self.shrink), -(-high * self.scale // self.shrink)

    def check_phase(self, axis: int) -> None:
        """Check that shrinking each block gives parts of the whole axis shrunk.

        Raises
        ------
        ValueError
            If a block begins or ends between the voxels of the result; ``axis`` is named.
        """
        step = self.shrink
        if step == 1 or (self.size % step == 0 and self.before % step == 0):
            return
        advice = (
            f"; let max_pixels[{axis}] and the overlap before it be multiples of {step}, or "
            f"shrink what was merged"
        )
        for i in range(self.num_blocks):
            low, _ = self.read(i)
            if low % step:
                raise ValueError(
                    f"shrink[{axis}] = {step}, but block {i} begins at voxel {low} of axis {axis}, "
                    f"so its voxels are not those of the whole{advice}"
                )
        for i in range(self.num_blocks):
            _, high = self.read(i)
            needed = min(self.core(i)[1] * step, self.extent)
            if high < needed:
                raise ValueError(
                    f"shrink[{axis}] = {step}, but block {i} ends at voxel {high} of axis {axis} "
                    f"and its last voxel is made of those up to {needed}{advice}"
                )


@dataclass(frozen=True, slots=True)
class StackSplit:
    """A stack cut into overlapped blocks along each axis."""

    axes: tuple[AxisSplit, ...]
    """How each axis is cut."""

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(axis.num_blocks for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scaled stack."""
        return tuple(axis.length for axis in self.axes)

    def positions(self) -> Iterator[tuple[int, ...]]:
        """Positions of the blocks, in C order."""
        return product(*map(range, self.grid_shape))

    def block_shape(self, position: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a scaled block."""
        return tuple(axis.block_length(i) for axis, i in zip(self.axes, position, strict=True))

    def core(self, position: Sequence[int]) -> tuple[slice, ...]:
        """Return the core of a block as slices of the scaled stack."""
        spans = [axis.core(i) for axis, i in zip(self.axes, position, strict=True)]
        return tuple(slice(low, high) for low, high in spans)

    def crop(self, position: Sequence[int]) -> tuple[slice, ...]:
        """Return the core of a block as slices of the scaled block."""
        starts = [axis.scaled(i)[0] for axis, i in zip(self.axes, position, strict=True)]
        return tuple(
            slice(core.start - low, core.stop - low)
            for core, low in zip(self.core(position), starts, strict=True)
        )


def as_overlap(overlap: HaloLike | None, ndim: int, side: str = "after") -> Halo:
    """Read an overlap as users give it, for a stack of ``ndim`` axes.

    Parameters
    ----------
    overlap : int, per-axis ints or (before, after) pairs, Halo or None
        None is no overlap; ints and pairs may be mixed.
    ndim : int
        Number of axes.
    side : {"after", "before", "both"}
        Where a width given as one integer lies; pairs and a `Halo` say so themselves.

    Raises
    ------
    TypeError, ValueError
        If the number of axes is wrong, or a width is negative or no integer.

    Examples
    --------
    >>> as_overlap([2, (1, 0)], ndim=2)
    Halo(before=(0, 1), after=(2, 0))
    """
    if not isinstance(side, str) or side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(map(repr, SIDES))}, got {side!r}")
    if overlap is None:
        overlap = 0
    elif _is_several(overlap) and not isinstance(overlap, (str, bytes, dict)):
        overlap = list(overlap)  # type: ignore[arg-type]
    try:
        halo = Halo.of(overlap, ndim)
    except (TypeError, ValueError) as error:
        raise type(error)(f"overlap is read like a halo: {error}") from None
    if isinstance(overlap, Halo) or side == "both":
        return halo
    items = overlap if isinstance(overlap, list) else [overlap] * ndim
    said = [_is_several(item) for item in items]
    keep_before, keep_after = side == "before", side == "after"
    return Halo(
        tuple(
            width if pair or keep_before else 0
            for width, pair in zip(halo.before, said, strict=True)
        ),
        tuple(
            width if pair or keep_after else 0 for width, pair in zip(halo.after, said, strict=True)
        ),
    )


def _is_several(value: object) -> bool:
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0
