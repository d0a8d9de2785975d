"""What a block function says of the arrays that it takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

__all__ = ["Array"]

_ABSTRACT = (
    "number",
    "integer",
    "signedinteger",
    "unsignedinteger",
    "inexact",
    "floating",
    "complexfloating",
)
"""Kinds of dtypes, by the names of NumPy's abstract scalar types."""


@dataclass(frozen=True)
class Array:
    """What a block function says of an array: an annotation of a parameter or of the result.

    ``Annotated[NDArray[np.uint16], Array(axes="zyx", role="image", halo=(1, 8, 8))]``. All of it
    is optional.

    Parameters
    ----------
    axes : str or names, optional
        One letter or name for each axis, for instance ``"zyx"``.
    role : str, optional
        What the values are: ``"image"``, ``"labels"``, ``"mask"``, ``"points"`` or a word of your
        own.
    halo : int, per-axis ints, or per-axis (before, after) pairs, optional
        Voxels that a block needs around its cell, in axes of this array. Default: that of the
        first input which has one.
    dtype : dtype or dtypes, optional
        What is accepted, or returned: dtypes, or kinds of them by the names of NumPy's abstract
        types such as ``"floating"``. Byte order does not matter. Default: what the annotation
        says, else any.
    name : str
        Default: the parameter's; of outputs ``"result"``, or ``"result-0"`` and so on.
    optional : bool
        Whether the array may be left out.
    variadic : bool
        Whether any number of arrays is taken, from none on.
    description : str
        In a sentence; default: what the docstring says.

    Raises
    ------
    TypeError, ValueError
        If something is wrong, or does not fit together.

    Examples
    --------
    >>> from typing import Annotated
    >>> from numpy.typing import NDArray
    >>> def smooth(
    ...     image: Annotated[NDArray[np.uint16], Array(axes="zyx", halo=(1, 8, 8))],
    ...     sigma: float = 2,
    ... ) -> NDArray[np.float32]: ...
    >>> Array(dtype=np.uint16, halo=(1, (2, 3))).halo
    ((1, 1), (2, 3))
    """

    axes: Any = None
    """A string of letters, a tuple of names, or None."""
    role: str | None = None
    """As given."""
    halo: Any = None
    """One width for all axes, a tuple of (before, after) for each, or None."""
    dtype: Any = ()
    """A tuple of the names of what is accepted; empty: anything."""
    name: str = ""
    """As given."""
    optional: bool = False
    """As given."""
    variadic: bool = False
    """As given."""
    description: str = ""
    """As given."""

    def __post_init__(self) -> None:
        values = {
            "axes": _axes(self.axes),
            "halo": _halo(self.halo),
            "dtype": _dtypes(self.dtype),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name in ("role", "name", "description"):
            text = getattr(self, name)
            if not isinstance(text, str) and not (name == "role" and text is None):
                raise TypeError(f"{name} must be a string, got {text!r}")
        for name in ("optional", "variadic"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.optional and self.variadic:
            raise ValueError("variadic means from no array on: leave optional out")
        per_axis = isinstance(self.halo, tuple) and self.axes is not None
        if per_axis and len(self.halo) != len(self.axes):
            raise ValueError(
                f"halo {self.halo} is for {len(self.halo)} axes, but axes are {self.axes!r}"
            )

    def accepts(self, dtype: Any) -> bool:
        """Whether an array of this dtype is one."""
        given = np.dtype(dtype)
        return not self.dtype or any(
            np.issubdtype(given, getattr(np, name))
            if name in _ABSTRACT
            else given.newbyteorder("=") == np.dtype(name)
            for name in self.dtype
        )

    @property
    def concrete(self) -> Any:
        """The one dtype that it has, None if there may be several."""
        if len(self.dtype) == 1 and self.dtype[0] not in _ABSTRACT:
            return np.dtype(self.dtype[0])
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return what there is to say, in JSON's types."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        if isinstance(self.axes, tuple):
            content["axes"] = list(self.axes)
        if isinstance(self.halo, tuple):
            content["halo"] = [list(pair) for pair in self.halo]
        content["dtype"] = self.dtype[0] if len(self.dtype) == 1 else list(self.dtype)
        order = ("name", "dtype", "axes", "role", "halo", "optional", "variadic", "description")
        # A halo of 0 says something, too.
        nothing: tuple[Any, ...] = (None, "", [])
        return {
            key: content[key]
            for key in order
            if content[key] is not False and content[key] not in nothing
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Array:
        """Return what `to_dict` has written, or a person; keys are those of the parameters.

        Raises
        ------
        TypeError, ValueError
            If something is wrong with it.
        """
        known = [item.name for item in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(f"an array has no {key!r}; it has {', '.join(known)}")
        return cls(**content)


def _axes(axes: Any) -> Any:
    if axes is None:
        return None
    if not isinstance(axes, str):
        if not isinstance(axes, Iterable):
            raise TypeError(f'axes must be letters such as "zyx", or names, got {axes!r}')
        axes = tuple(axes)
        for name in axes:
            if not isinstance(name, str) or not name:
                raise TypeError(f"axes must be names, got {name!r}")
        if all(len(name) == 1 for name in axes):
            axes = "".join(axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axes names an axis twice: {axes!r}")
    return axes


def _width(value: Any) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if value >= 0:
            return int(value)
        raise ValueError(f"halo has a width of {value}; widths are 0 or more")
    raise TypeError(f"halo must be an int, ints, or (before, after) pairs, got {value!r}")


def _halo(halo: Any) -> Any:
    if halo is None:
        return None
    if not isinstance(halo, Iterable):
        return _width(halo)
    pairs = []
    for part in halo:
        both = tuple(part) if isinstance(part, Iterable) else (part, part)
        if len(both) != 2:
            raise ValueError(f"halo has {part!r} for an axis; give a width or (before, after)")
        pairs.append((_width(both[0]), _width(both[1])))
    return tuple(pairs)


def _dtypes(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    several = given if isinstance(given, (list, tuple, set, frozenset)) else [given]
    names = [_dtype_name(item) for item in several]
    return tuple(dict.fromkeys(names)) if "generic" not in names else ()


def _dtype_name(given: Any) -> str:
    name = given if isinstance(given, str) else getattr(given, "__name__", "")
    if name in _ABSTRACT or name == "generic":
        return name
    try:
        dtype = np.dtype(given)
    except TypeError:
        raise ValueError(f"{given!r} is no dtype that NumPy knows, and no kind of them") from None
    if dtype.hasobject or dtype.itemsize == 0 or dtype.names is not None or dtype.shape:
        raise ValueError(f"dtype {dtype} cannot be said by a name; give numbers or booleans")
    return str(dtype.newbyteorder("="))
