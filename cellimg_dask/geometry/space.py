"""Where the voxels of an image lie: names, units, distances and origin of its axes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cellimg_dask.geometry.integers import as_int

__all__ = ["Space"]

_DEFAULT_AXES = ("t", "c", "z", "y", "x")
_TIME_AXES = ("t", "time")
_CHANNEL_AXES = ("c", "channel", "s")

_SHORT_UNITS = {
    "pm": "picometer",
    "nm": "nanometer",
    "um": "micrometer",
    "µm": "micrometer",  # The micro sign, and below the Greek letter.
    "μm": "micrometer",
    "micron": "micrometer",
    "microns": "micrometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "Å": "angstrom",
    "\u212b": "angstrom",
    "ns": "nanosecond",
    "us": "microsecond",
    "µs": "microsecond",
    "μs": "microsecond",
    "ms": "millisecond",
    "s": "second",
    "sec": "second",
    "min": "minute",
    "h": "hour",
}


@dataclass(frozen=True, slots=True)
class Space:
    """Where the voxels of an image lie.

    Made by `Space.of`, which checks and fills in what is left out. The centre of the voxel
    ``index`` lies at ``translation + scale * index``, in ``units``.

    Examples
    --------
    >>> space = Space.of(3, "zyx", units="um", scale=(2, 0.5, 0.5))
    >>> space.units
    ('micrometer', 'micrometer', 'micrometer')
    >>> space.shrunk((1, 2, 2)).translation
    (0.0, 0.25, 0.25)
    >>> print(space)
    z 2 micrometer, y 0.5 micrometer, x 0.5 micrometer
    """

    axes: tuple[str, ...] | None
    """Names of the axes; None where nobody has said them."""
    units: tuple[str | None, ...]
    """Unit of each axis as OME-Zarr spells it, ``"micrometer"``; None where unknown."""
    scale: tuple[float, ...]
    """Distance between neighbouring voxels along each axis, in its unit."""
    translation: tuple[float, ...]
    """Where the centre of the first voxel lies, in the unit of each axis."""

    @classmethod
    def of(
        cls,
        ndim: int,
        axes: Any = None,
        units: Any = None,
        scale: Any = 1.0,
        translation: Any = 0.0,
    ) -> Space:
        """Return the space of an image of ``ndim`` axes.

        Parameters
        ----------
        ndim : int
            Number of axes.
        axes : str or names, optional
            ``"zyx"``, or a name for each axis; all different.
        units : str or per-axis str or None, optional
            Short forms such as ``"um"`` and ``"nm"`` are understood. One unit for all axes leaves
            out those of time and channels (t, c, s): it is meant for space; else a unit for each.
            A mapping gives it to axes by name.
        scale, translation : float, per-axis floats, or mapping of axis name to float
            Scales are positive.

        Raises
        ------
        TypeError, ValueError
            If a value does not fit.
        """
        ndim = as_int(ndim, "ndim", minimum=0)
        names = _names(axes, ndim)
        return cls(
            names,
            _units(units, ndim, names),
            _numbers(scale, "scale", ndim, names, 1.0, positive=True),
            _numbers(translation, "translation", ndim, names, 0.0, positive=False),
        )

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.scale)

    @property
    def named(self) -> Space:
        """The same with names: where nobody has said them, the last of t, c, z, y and x.

        With more than five axes those in front are ``dim_0``, ``dim_1`` and so on.
        """
        if self.axes is not None:
            return self
        extra = max(0, self.ndim - len(_DEFAULT_AXES))
        front = tuple(f"dim_{axis}" for axis in range(extra))
        back = _DEFAULT_AXES[len(_DEFAULT_AXES) - (self.ndim - extra) :]
        return Space(front + back, self.units, self.scale, self.translation)

    @property
    def channel_axis(self) -> int | None:
        """The axis of channels: that called c or channel, else s, the samples of a picture."""
        names = self.axes or ()
        return next((names.index(name) for name in _CHANNEL_AXES if name in names), None)

    @property
    def spatial(self) -> tuple[bool, ...]:
        """Whether each axis is one of space: not called t, time, c, channel or s."""
        return tuple(name not in (*_TIME_AXES, *_CHANNEL_AXES) for name in self.named.axes or ())

    @property
    def is_plain(self) -> bool:
        """Whether nothing is known: no names, no units, voxels of 1 from the origin."""
        return self == Space.of(self.ndim)

    def __str__(self) -> str:
        parts = []
        for axis, (unit, scale, first) in enumerate(
            zip(self.units, self.scale, self.translation, strict=True)
        ):
            words = [] if self.axes is None else [self.axes[axis]]
            words += [f"{scale:g}"] + ([] if unit is None else [unit])
            words += [f"from {first:g}"] if first else []
            parts.append(" ".join(words))
        return ", ".join(parts)

    def replace(
        self, axes: Any = None, units: Any = None, scale: Any = None, translation: Any = None
    ) -> Space:
        """Return the space with some of its parts replaced; arguments as for `of`."""
        return Space.of(
            self.ndim,
            self.axes if axes is None else axes,
            self.units if units is None else units,
            self.scale if scale is None else scale,
            self.translation if translation is None else translation,
        )

    def shrunk(self, factors: Sequence[int]) -> Space:
        """Return the space of an image whose voxels are made of ``factors`` voxels per axis.

        Their centres lie in the middle of those that they are made of.
        """
        steps = tuple(zip(self.scale, self.translation, factors, strict=True))
        return Space(
            self.axes,
            self.units,
            tuple(scale * factor for scale, _, factor in steps),
            tuple(shift + scale * (factor - 1) / 2 for scale, shift, factor in steps),
        )

    def taking(self, axes: Iterable[int]) -> Space:
        """Return the space of just these axes, in this order."""
        kept = list(axes)
        return Space(
            None if self.axes is None else tuple(self.axes[axis] for axis in kept),
            tuple(self.units[axis] for axis in kept),
            tuple(self.scale[axis] for axis in kept),
            tuple(self.translation[axis] for axis in kept),
        )

    def without(self, axes: Collection[int]) -> Space:
        """Return the space without some axes."""
        return self.taking(axis for axis in range(self.ndim) if axis not in axes)

    def with_axis(self, place: int) -> Space:
        """Return the space with an axis more, of which nothing is known, at a place.

        Where the others have names it is called ``dim_0``, or the next number that is free.
        """
        names = self.axes
        if names is not None:
            number = 0
            while f"dim_{number}" in names:
                number += 1
            names = (*names[:place], f"dim_{number}", *names[place:])
        return Space(
            names,
            (*self.units[:place], None, *self.units[place:]),
            (*self.scale[:place], 1.0, *self.scale[place:]),
            (*self.translation[:place], 0.0, *self.translation[place:]),
        )


def _names(axes: Any, ndim: int) -> tuple[str, ...] | None:
    if axes is None:
        return None
    if isinstance(axes, (Mapping, Set)) or not isinstance(axes, Iterable):
        raise TypeError(f'axes must be letters such as "zyx", or names in order, got {axes!r}')
    names = tuple(axes)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f'axes must be letters such as "zyx", or names, got {axes!r}')
    if len(names) != ndim:
        raise ValueError(f"axes must name each of {ndim} axes, got {len(names)}: {axes!r}")
    if len(set(names)) != ndim:
        raise ValueError(f"axes must have different names, got {axes!r}")
    return names


def _units(units: Any, ndim: int, names: tuple[str, ...] | None) -> tuple[str | None, ...]:
    if units is None:
        return (None,) * ndim
    if isinstance(units, str):
        given: list[Any] = [
            None if names is not None and names[axis] in (*_TIME_AXES, *_CHANNEL_AXES) else units
            for axis in range(ndim)
        ]
    else:
        given = _per_axis(units, "units", ndim, names, None)
    for axis, unit in enumerate(given):
        if unit is not None and (not isinstance(unit, str) or not unit):
            raise TypeError(f'units[{axis}] must be a text such as "um", or None, got {unit!r}')
    return tuple(None if unit is None else _SHORT_UNITS.get(unit, unit) for unit in given)


def _numbers(
    value: Any,
    what: str,
    ndim: int,
    names: tuple[str, ...] | None,
    default: float,
    *,
    positive: bool,
) -> tuple[float, ...]:
    if isinstance(value, str):
        raise TypeError(f"{what} must be a number for each axis, got {value!r}")
    single = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    given = [value] * ndim if single else _per_axis(value, what, ndim, names, default)
    for axis, number in enumerate(given):
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"{what}[{axis}] must be a number, got {number!r}")
        if not math.isfinite(float(number)) or (positive and float(number) <= 0):
            wanted = "positive and finite" if positive else "finite"
            raise ValueError(f"{what}[{axis}] must be {wanted}, got {number}")
    return tuple(map(float, given))


def _per_axis(
    value: Any, what: str, ndim: int, names: tuple[str, ...] | None, default: Any
) -> list[Any]:
    if isinstance(value, Mapping):
        if names is None:
            raise ValueError(f"{what} names axes, and the axes have no names: give axes= as well")
        for name in value:
            if name not in names:
                raise ValueError(f"{what} names axis {name!r}; there is {', '.join(names)}")
        return [value.get(name, default) for name in names]
    if isinstance(value, Set) or not isinstance(value, Iterable):
        raise TypeError(f"{what} must be in the order of axes, got {value!r}")
    given = list(value)
    if len(given) != ndim:
        raise ValueError(
            f"{what} must have one value for each of {ndim} axes, got {len(given)}: {value!r}"
        )
    return given
