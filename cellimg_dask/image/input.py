"""What an image reads: arrays, and how a cell's region maps to theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellimg_dask.blocks.plan import AxisLink, InputPlan
from cellimg_dask.geometry import Halo, HaloLike, Roi, Space, check_boundary
from cellimg_dask.image.labelled import without_labels
from cellimg_dask.image.space_of import checked_space
from cellimg_dask.loading.readers import check_array

__all__ = ["Input", "as_input", "checked_fill", "follow", "inherited_halo"]


@dataclass(frozen=True, eq=False)
class Input:
    """An input with a halo, boundary or mapping of its own.

    Parameters
    ----------
    array : array-like
        Anything with ``shape``, ``dtype`` and ``__getitem__``.
    halo : int, per-axis ints or (before, after) pairs, optional
        In voxels and axes of this input; default: the image's halo.
    boundary : str, optional
        What lies beyond this input's border; default: the image's.
    fill_value : scalar, optional
        For ``boundary="constant"``; default: the image's.
    index_map : callable, optional
        From the output cell's `Roi` to the `Roi` of this input, both without halo. Default: the
        input has the image's shape, or one that NumPy would broadcast to it. After a change it is
        asked for each cell; one with an attribute ``is_nested = True``, which promises that the
        result for a region holds all voxels that matter to its parts, only where the change may be.
    version : str, optional
        Stands for the content of the array in keys on disk. Needed only for arrays that cannot
        be compared (`content_key` says so): another version, another content.
    space : Space, optional
        Where the voxels lie. Default: what the array says of itself.

    Examples
    --------
    A time series next to one reference volume:

    >>> import numpy as np
    >>> reference = np.zeros((8, 8))
    >>> Input(reference, halo=1, index_map=lambda roi: Roi(roi.start[1:], roi.stop[1:])).halo
    1
    """

    array: Any
    halo: HaloLike | None = None
    boundary: str | None = None
    fill_value: Any = None
    index_map: Callable[[Roi], Roi] | None = None
    version: str | None = None
    space: Space | None = None

    def __post_init__(self) -> None:
        check_array(self.array)
        object.__setattr__(self, "space", checked_space(self.space, self.array))
        object.__setattr__(self, "array", without_labels(self.array))
        if self.boundary is not None:
            check_boundary(self.boundary)
        if self.index_map is not None and not callable(self.index_map):
            raise TypeError(
                f"index_map must be a callable from Roi to Roi, got {type(self.index_map).__name__}"
            )
        if self.version is not None and not isinstance(self.version, str):
            raise TypeError(f"version must be a string, got {type(self.version).__name__}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(int(n) for n in self.array.shape)

    def plan(
        self,
        number: int,
        links: Sequence[AxisLink] | None,
        halo: HaloLike,
        boundary: str,
        fill_value: Any,
    ) -> InputPlan:
        """Return how this input is read, with the image's settings where it has none."""
        shape = self.shape
        try:
            own = Halo.of(halo if self.halo is None else self.halo, len(shape))
        except (TypeError, ValueError) as error:
            hint = (
                ""
                if self.halo is not None
                else f"; give input {number} its own: Input(array, halo=…)"
            )
            raise type(error)(f"halo of input {number}: {error}{hint}") from None
        mode = check_boundary(boundary if self.boundary is None else self.boundary)
        fill = 0
        if mode == "constant":
            value = fill_value if self.fill_value is None else self.fill_value
            fill = checked_fill(value, np.dtype(_numpy_dtype(self.array)), f"input {number}")
        return InputPlan(
            shape,
            own,
            mode,
            None if self.index_map is not None else tuple(links or ()),
            self.index_map,
            fill,
            self.version,
        )


def as_input(value: Any) -> Input:
    """Return ``value`` as an `Input`."""
    return value if isinstance(value, Input) else Input(value)


def follow(
    shape: tuple[int, ...], target: tuple[int, ...], links: Sequence[AxisLink], number: int
) -> tuple[tuple[AxisLink, ...], tuple[bool, ...]]:
    """Link the axes of an input to those of ``target``, as NumPy broadcasts.

    Parameters
    ----------
    shape : ints
        Shape of the input.
    target : ints
        The shape that all inputs broadcast to.
    links : sequence of AxisLink
        How each axis of ``target`` follows the output cell.
    number : int
        The input's number, for messages.

    Returns
    -------
    links : tuple of AxisLink
        One for each axis of the input.
    stretched : tuple of bool
        Whether that axis has length 1 and stands for a longer one: it is read without halo.

    Raises
    ------
    ValueError
        If the shapes do not broadcast.
    """
    skip = len(target) - len(shape)
    fits = skip >= 0 and all(
        n in (m, 1) for n, m in zip(shape, target[max(skip, 0) :], strict=False)
    )
    if not fits:
        raise ValueError(
            f"input {number} has shape {shape}, expected {target} or a shape that NumPy "
            f"broadcasts to it; if it relates to the image in another way say how: "
            f"Input(array, index_map=lambda roi: …)"
        )
    stretched = tuple(n == 1 != m for n, m in zip(shape, target[skip:], strict=True))
    return (
        tuple(
            AxisLink(None) if wide else link
            for wide, link in zip(stretched, links[skip:], strict=True)
        ),
        stretched,
    )


def inherited_halo(halo: Halo, shape: tuple[int, ...], target: tuple[int, ...]) -> Halo:
    """Return the image's halo for an input that broadcasts to ``target``.

    An axis of length 1 that stands for a longer one is read without halo.
    """
    skip = len(target) - len(shape)
    wide = [n == 1 != m for n, m in zip(shape, target[skip:], strict=True)]

    def kept(side: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(0 if one else n for one, n in zip(wide, side[skip:], strict=True))

    return Halo(kept(halo.before), kept(halo.after))


def checked_fill(value: Any, dtype: np.dtype[Any], holder: str) -> Any:
    """Return ``value`` as a scalar of ``dtype``.

    Raises
    ------
    ValueError
        If ``dtype`` cannot hold it.
    """
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error")
            given = np.asarray(value)
            fill = given.astype(dtype)[()]
            # A float may be rounded, but neither made infinite nor made from something else.
            same = given.ndim == 0 and (
                bool(fill == given)
                or (given.dtype.kind in "fc" and bool(np.isnan(given)) and bool(np.isnan(fill)))
                or (
                    given.dtype.kind in "biufc"
                    and dtype.kind in "fc"
                    and bool(np.isfinite(fill)) == bool(np.isfinite(given))
                )
            )
    except (TypeError, ValueError, OverflowError, Warning):
        same = False
    if not same:
        raise ValueError(
            f"fill_value {value!r} cannot be held by {holder} of dtype {dtype}; "
            f"give one that can, or another dtype"
        )
    return fill


def _numpy_dtype(array: Any) -> Any:
    return getattr(array.dtype, "numpy_dtype", array.dtype)
