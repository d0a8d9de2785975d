"""Where the points of one image lie in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Affine",
    "Bounded",
    "Floats",
    "InUnits",
    "Transform",
    "as_numbers",
    "as_transform",
    "checked_points",
    "in_units",
]

Floats: TypeAlias = NDArray[np.float64]

Transform: TypeAlias = Callable[[Floats], ArrayLike]
"""From points, an array of shape (n, axes of the output), to points of shape (n, axes of the
input)."""


@runtime_checkable
class Bounded(Protocol):
    """A transform that says where a box comes to lie, without going through its points."""

    def __call__(self, points: Floats, /) -> ArrayLike:
        """Return where points lie in the input."""
        ...

    def bounds(self, low: Floats, high: Floats, /) -> tuple[ArrayLike, ArrayLike]:
        """Return two corners of a box that holds all points of the box ``low`` to ``high``."""
        ...


@dataclass(frozen=True, eq=False)
class Affine:
    """The transform ``matrix @ point + offset``.

    Parameters
    ----------
    matrix : array-like
        Shape (axes of the input, axes of the output). A matrix of shape (3, 2) is a plane in a
        volume, at any angle.
    offset : float or array-like
        One number for each axis of the input.

    Raises
    ------
    TypeError, ValueError
        If the numbers are none, or do not fit together.

    Examples
    --------
    >>> turn = Affine([[0, -1], [1, 0]], offset=(7, 0))
    >>> turn(np.array([[2.0, 3.0]]))
    array([[4., 2.]])
    """

    matrix: Any
    offset: Any = 0.0

    def __post_init__(self) -> None:
        matrix = as_numbers(self.matrix, "matrix")
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(
                f"matrix must have the shape (axes of the input, axes of the output), got "
                f"{matrix.shape}"
            )
        offset = as_numbers(self.offset, "offset")
        if offset.shape not in ((), (len(matrix),)):
            raise ValueError(
                f"offset must be one number, or one for each of the {len(matrix)} rows of matrix, "
                f"got shape {offset.shape}"
            )
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "offset", _fixed(np.broadcast_to(offset, len(matrix))))

    @property
    def num_axes_in(self) -> int:
        """Number of axes of the points that it is given."""
        return int(self.matrix.shape[1])

    @property
    def num_axes_out(self) -> int:
        """Number of axes of the points that it returns."""
        return int(self.matrix.shape[0])

    def __call__(self, points: Floats) -> Floats:
        """Return where points lie: from shape (n, axes) to (n, axes)."""
        points = checked_points(points, self.num_axes_in)
        found = np.empty((len(points), self.num_axes_out))
        # Term by term, so that a point has one result, whatever others it comes with.
        for row, (factors, shift) in enumerate(zip(self.matrix, self.offset, strict=True)):
            values = points[:, 0] * factors[0]
            for axis in range(1, len(factors)):
                values += points[:, axis] * factors[axis]
            found[:, row] = values + shift
        return found

    def bounds(self, low: Floats, high: Floats) -> tuple[Floats, Floats]:
        """Return where a box comes to lie: exactly, since rounding keeps the order of numbers."""
        ends = []
        for first, last in ((low, high), (high, low)):
            # For each row its own corner, where each term is least, then greatest.
            corners = np.where(self.matrix >= 0, first, last)
            ends.append(self(corners).diagonal())
        return ends[0], ends[1]


@dataclass(frozen=True, eq=False)
class InUnits:
    """A transform between places in units, as one between voxels."""

    transform: Transform
    """From places in the output to places in the input."""
    scale: tuple[float, ...]
    """Distance of neighbouring voxels of the output."""
    translation: tuple[float, ...]
    """Where the first voxel of the output lies."""
    input_scale: tuple[float, ...]
    """Distance of neighbouring voxels of the input."""
    input_translation: tuple[float, ...]
    """Where the first voxel of the input lies."""

    def __call__(self, points: Floats) -> Any:
        """Return where voxels of the output lie in the input, in its voxels."""
        return self._to_voxels(self.transform(self._to_units(points)))

    def _to_units(self, points: Floats) -> Floats:
        return points * self.scale + self.translation

    def _to_voxels(self, places: ArrayLike) -> Any:
        found = np.asarray(places)
        if found.ndim == 0 or found.shape[-1] != len(self.input_scale):
            # Who looks at it says what is wrong.
            return found
        return (found - self.input_translation) / self.input_scale


@dataclass(frozen=True, eq=False)
class BoundedInUnits(InUnits):
    """The same of a transform that says where a box comes to lie."""

    def bounds(self, low: Floats, high: Floats) -> tuple[Any, Any]:
        """Return where a box comes to lie."""
        assert isinstance(self.transform, Bounded)
        first, last = self.transform.bounds(self._to_units(low), self._to_units(high))
        return self._to_voxels(first), self._to_voxels(last)


def in_units(
    transform: Transform,
    scale: Sequence[float],
    translation: Sequence[float],
    input_scale: Sequence[float],
    input_translation: Sequence[float],
) -> Transform:
    """Return a transform between places in units as one between voxels."""
    kind = BoundedInUnits if isinstance(transform, Bounded) else InUnits
    return kind(
        transform, tuple(scale), tuple(translation), tuple(input_scale), tuple(input_translation)
    )


def as_transform(value: Any, num_axes: int) -> Transform:
    """Return what a user gives as a transform into an image of ``num_axes`` axes.

    Raises
    ------
    TypeError, ValueError
        If it is neither callable nor an affine matrix, or leads into an image of other axes.
    """
    if not callable(value):
        matrix = as_numbers(value, "transform")
        n = num_axes
        if matrix.shape == (n + 1, n + 1):
            if not np.array_equal(matrix[n], [0] * n + [1]):
                raise ValueError(
                    f"the last row of a matrix of shape {matrix.shape} must be 0, …, 0, 1, got "
                    f"{matrix[n].tolist()}"
                )
            matrix = matrix[:n]
        if matrix.shape != (n, n + 1):
            raise ValueError(
                f"a matrix for an image of {n} axes must have the shape {(n, n + 1)} or "
                f"{(n + 1, n + 1)}, the last column being the offset, got {matrix.shape}; without "
                f"an offset, or from another number of axes, give Affine(matrix, offset)"
            )
        return Affine(matrix[:, :n], matrix[:, n])
    leads_to = getattr(value, "num_axes_out", num_axes)
    if leads_to != num_axes:
        raise ValueError(
            f"the transform leads to points of {leads_to} axes, and the image has {num_axes}; "
            f"axes of which it says nothing, such as channels, are named by kept_axes=…"
        )
    transform: Transform = value
    return transform


def as_numbers(value: Any, what: str) -> Floats:
    """Return real, finite numbers as a read-only array of float64."""
    try:
        given = np.asarray(value)
    except ValueError:
        given = np.empty(0, object)
    if given.dtype.kind not in "biuf":
        raise TypeError(f"{what} must be real numbers in rows of equal length, got {value!r}")
    numbers = given.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} must be finite, got {value!r}")
    return _fixed(numbers)


def _fixed(numbers: Floats) -> Floats:
    own = np.array(numbers)
    own.flags.writeable = False
    return own


def checked_points(points: Any, num_axes: int) -> Floats:
    """Return points as float64; `ValueError` if they have not as many axes."""
    given: Floats = np.asarray(points, np.float64)
    if given.ndim != 2 or given.shape[1] != num_axes:
        raise ValueError(f"points must have the shape (n, {num_axes}), got {given.shape}")
    return given
