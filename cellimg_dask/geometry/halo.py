"""How many extra voxels a block reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

from cellimg_dask.geometry.integers import as_int, as_ints

__all__ = ["Halo", "HaloLike"]


@dataclass(frozen=True, slots=True)
class Halo:
    """Extra voxels that a block reads before and after its cell, per axis.

    Raises
    ------
    ValueError
        If the two differ in length or a width is negative.
    TypeError
        If a width is not an integer.

    Examples
    --------
    >>> Halo.of(2, ndim=2)
    Halo(before=(2, 2), after=(2, 2))
    >>> Halo.of([1, (0, 3)], ndim=2)
    Halo(before=(1, 0), after=(1, 3))
    """

    before: tuple[int, ...]
    """Width at the low side of each axis, in voxels."""
    after: tuple[int, ...]
    """Width at the high side of each axis, in voxels."""

    def __post_init__(self) -> None:
        before = as_ints(self.before, "halo before", minimum=0)
        after = as_ints(self.after, "halo after", minimum=0)
        if len(before) != len(after):
            raise ValueError(
                f"halo before and after must have the same length, "
                f"got {len(before)} and {len(after)}"
            )
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)

    @classmethod
    def of(cls, value: HaloLike, ndim: int) -> Halo:
        """Read a halo as users give it, for an image of ``ndim`` axes.

        Parameters
        ----------
        value : int, or per-axis ints, or per-axis (before, after) pairs, or Halo
            Ints and pairs may be mixed.
        ndim : int
            Number of axes.

        Raises
        ------
        ValueError
            If the number of axes is wrong or a width is negative.
        TypeError
            If a width is not an integer.
        """
        if isinstance(value, Halo):
            if value.ndim != ndim:
                raise ValueError(
                    f"halo must have one value for each of {ndim} axes, got {value.ndim}: {value}"
                )
            return value
        if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
            width = as_int(value, "halo", minimum=0)  # type: ignore[arg-type]
            return cls((width,) * ndim, (width,) * ndim)
        if isinstance(value, (str, bytes, dict)):
            raise TypeError(
                f"halo must be an integer, integers per axis or (before, after) pairs per axis, "
                f"got {value!r}"
            )
        widths = [_pair(item, axis) for axis, item in enumerate(value)]
        if len(widths) != ndim:
            raise ValueError(
                f"halo must have one value for each of {ndim} axes, got {len(widths)}: {value!r}"
            )
        return cls(tuple(low for low, _ in widths), tuple(high for _, high in widths))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.before)


HaloLike: TypeAlias = (
    SupportsIndex | Sequence[SupportsIndex | tuple[SupportsIndex, SupportsIndex]] | Halo
)


def _pair(item: object, axis: int) -> tuple[int, int]:
    if isinstance(item, Iterable) and getattr(item, "ndim", 1) != 0:
        pair = as_ints(item, f"halo[{axis}]", minimum=0)
        if len(pair) != 2:
            raise ValueError(
                f"halo[{axis}] must be an integer or a (before, after) pair, got {item!r}"
            )
        return pair[0], pair[1]
    width = as_int(item, f"halo[{axis}]", minimum=0)  # type: ignore[arg-type]
    return width, width
