"""Things at the positions of a grid, in each of the forms in which users have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from math import prod
from typing import Any, TypeAlias

import numpy as np

from cellimg_dask.geometry import as_int, as_ints
from cellimg_dask.image.cellimg import CellImg

__all__ = ["Placed", "Position"]

Position: TypeAlias = tuple[int, ...]

_AT_A_TIME = 32
"""Values of an image that are asked for together."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Things at the positions of a grid.

    They are looked up one at a time, so that they need not all be in memory.
    """

    grid_shape: Position | None
    """Number of things along each axis; None where they come one by one in pairs."""
    items: Iterator[tuple[Position, Any]]
    """Positions and things; a grid's in C order. Can be gone through once."""
    get: Callable[[Position], Any] | None = None
    """Looks up a thing; None where they come one by one in pairs."""
    at_hand: Iterable[Any] = ()
    """All things, where looking at them computes nothing."""

    @classmethod
    def of(cls, things: Any, what: str) -> Placed:
        """Read what a user gives.

        Parameters
        ----------
        things : object array, nested lists, mapping, iterator of pairs, or image of values
            A mapping is from position to thing; pairs are (position, thing), in any order.
        what : str
            Name of the argument, for messages.

        Raises
        ------
        TypeError, ValueError
            If it is none of these, or not a whole grid.
        """
        if isinstance(things, Mapping):
            return cls._of_mapping(things, what)
        if isinstance(things, (list, tuple)):
            things = _as_object_array(things, what)
        if isinstance(things, CellImg) and things.dtype == object:
            return cls._of_image(things)
        if isinstance(things, np.ndarray):
            if things.dtype != object:
                raise TypeError(
                    f"{what} must be an object array with one entry per block, got an array of "
                    f"{things.dtype} and shape {things.shape}; fill one of "
                    f"numpy.empty(grid_shape, dtype=object), or give nested lists"
                )
            return cls._of_grid(things.shape, things.__getitem__, things.flat)
        if hasattr(things, "shape") or not isinstance(things, Iterable):
            raise TypeError(
                f"{what} must be an object array, nested lists, a mapping from position to block, "
                f"or an iterator of (position, block) pairs; got {type(things).__name__}"
            )
        return cls(None, _pairs(things, what))

    @classmethod
    def _of_grid(
        cls, shape: Position, get: Callable[[Position], Any], at_hand: Iterable[Any] = ()
    ) -> Placed:
        known: dict[Position, Any] = {}

        def look_up(place: Position) -> Any:
            # It may be costly, so it is not made again for whoever goes through all.
            known[place] = get(place)
            return known[place]

        items = (
            (place, known.pop(place) if place in known else get(place))
            for place in _positions(shape)
        )
        return cls(shape, items, look_up, at_hand)

    @classmethod
    def _of_image(cls, image: CellImg) -> Placed:
        shape = image.shape

        def items() -> Iterator[tuple[Position, Any]]:
            if not shape:
                yield (), image[()]
                return
            # Some at a time, which several workers may compute.
            step = max(1, _AT_A_TIME // max(1, prod(shape[1:])))
            for start in range(0, shape[0], step):
                part = image[start : min(start + step, shape[0])]
                for place in _positions(part.shape):
                    yield (start + place[0], *place[1:]), part[place]

        return cls(shape, items(), image.__getitem__)

    @classmethod
    def _of_mapping(cls, things: Mapping[Any, Any], what: str) -> Placed:
        keys = {_as_position(key, what): key for key in things}
        lengths = {len(place) for place in keys}
        if len(lengths) > 1:
            raise ValueError(f"{what} has positions of {sorted(lengths)} axes; one is expected")
        if not keys:
            return cls(None, iter(()))
        shape = tuple(max(numbers) + 1 for numbers in zip(*keys, strict=True))
        if len(keys) != prod(shape):
            missing = next(place for place in _positions(shape) if place not in keys)
            raise ValueError(
                f"{what} lacks position {missing}: it has {len(keys)} of {prod(shape)} positions "
                f"of a grid of {shape}"
            )
        return cls._of_grid(shape, lambda place: things[keys[place]])

    def peeked(self) -> tuple[Placed, tuple[Position, Any] | None]:
        """Return the same, and its first item, if there is one."""
        first = next(self.items, None)
        rest = self.items if first is None else chain([first], self.items)
        return replace(self, items=iter(rest)), first


def _positions(shape: Position) -> Iterator[Position]:
    return product(*map(range, shape))


def _pairs(things: Iterable[Any], what: str) -> Iterator[tuple[Position, Any]]:
    for item in things:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(
                f"{what} that come one by one must be (position, block) pairs, got "
                f"{type(item).__name__}; zip(numpy.ndindex(grid_shape), blocks) makes them"
            )
        yield _as_position(item[0], what), item[1]


def _as_position(value: Any, what: str) -> Position:
    if isinstance(value, Iterable):
        return as_ints(value, f"a position of {what}", minimum=0)
    return (as_int(value, f"a position of {what}", minimum=0),)


def _as_object_array(things: list[Any] | tuple[Any, ...], what: str) -> np.ndarray[Any, Any]:
    """Return nested lists as an object array; whatever is no list or tuple is an entry."""
    shape: list[int] = []
    level: list[Any] = [things]
    while level and all(isinstance(item, (list, tuple)) for item in level):
        lengths = {len(item) for item in level}
        if len(lengths) > 1:
            raise ValueError(
                f"{what} must be lists nested like a grid; on axis {len(shape)} they have "
                f"lengths {sorted(lengths)}"
            )
        shape.append(lengths.pop())
        level = [entry for item in level for entry in item]
    if any(isinstance(item, (list, tuple)) for item in level):
        raise ValueError(
            f"{what} must be lists nested like a grid; on axis {len(shape)} some entries are "
            f"lists and some are not; (position, block) pairs come in an iterator or a dict"
        )
    result = np.empty(len(level), dtype=object)
    for number, entry in enumerate(level):
        result[number] = entry
    return result.reshape(shape)
