"""Values in messages: what JSON has, and what of Python's and NumPy's it lacks.

Lists, strings, numbers, True, False and None stand for themselves, and so do dicts with strings as
keys. What else there is, is a dict with one key that begins with ``$``. Arrays are not in the
message; what stands there says where they lie.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["decode", "dtype_from", "dtype_name", "encode", "from_attached", "with_attached"]

Place = Callable[["np.ndarray[Any, Any]"], Any]
Fetch = Callable[[Any], "np.ndarray[Any, Any]"]


def encode(value: Any, place: Place) -> Any:
    """Return a value in JSON's types.

    Parameters
    ----------
    value : object
        None, booleans, numbers (complex ones too), strings, bytes, lists, tuples, dicts with any
        such keys, sets, NumPy scalars and arrays, in each other.
    place : callable
        Puts an array somewhere, and returns in JSON's types where.

    Raises
    ------
    TypeError
        If there is something else in it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of Python objects has no bytes of its own")
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError("a masked array would lose its mask; give array.filled(value)")
        return {"$array": place(np.asarray(value))}
    if isinstance(value, np.generic):
        if value.dtype.hasobject:
            raise TypeError("a NumPy scalar of Python objects has no bytes of its own")
        return {"$scalar": [dtype_name(value.dtype), _text(value.tobytes())]}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [encode(item, place) for item in value]
        if isinstance(value, list):
            return items
        return {"$tuple" if isinstance(value, tuple) else "$set": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not (
            len(value) == 1 and next(iter(value)).startswith("$")
        ):
            return {key: encode(item, place) for key, item in value.items()}
        pairs = [[encode(key, place), encode(item, place)] for key, item in value.items()]
        return {"$dict": pairs}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": _text(value)}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    kind = type(value)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} cannot be sent to another Python; allowed are "
        f"None, booleans, numbers, strings, bytes, lists, tuples, sets, dicts and NumPy arrays"
    )


def with_attached(value: Any) -> tuple[Any, tuple[bytes, ...]]:
    """Return a value in JSON's types, and the bytes of its arrays, to be attached."""
    attached: list[bytes] = []

    def place(array: np.ndarray[Any, Any]) -> Any:
        attached.append(array.tobytes())
        return [len(attached) - 1, array.shape, dtype_name(array.dtype)]

    return encode(value, place), tuple(attached)


def from_attached(tree: Any, attached: list[bytes]) -> Any:
    """Return the value that `with_attached` took apart."""

    def fetch(place: Any) -> np.ndarray[Any, Any]:
        number, shape, dtype = place
        return np.frombuffer(attached[number], dtype_from(dtype)).reshape(shape).copy()

    return decode(tree, fetch)


def decode(tree: Any, fetch: Fetch) -> Any:
    """Return the value that a message holds; ``fetch`` gives the array that lies somewhere."""
    if isinstance(tree, list):
        return [decode(item, fetch) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        (key, content), *_ = tree.items()
        if key.startswith("$"):
            return _special(key, content, fetch)
    return {key: decode(item, fetch) for key, item in tree.items()}


def _special(key: str, content: Any, fetch: Fetch) -> Any:
    if key == "$array":
        return fetch(content)
    if key == "$scalar":
        # Also of no bytes at all, which frombuffer refuses.
        return np.ndarray((), dtype_from(content[0]), b64decode(content[1]))[()]
    if key == "$tuple":
        return tuple(decode(item, fetch) for item in content)
    if key == "$set":
        return {decode(item, fetch) for item in content}
    if key == "$dict":
        return {decode(name, fetch): decode(item, fetch) for name, item in content}
    if key == "$bytes":
        return b64decode(content)
    if key == "$complex":
        return complex(*content)
    raise ValueError(f"a message holds {key}, which this version does not know")


def dtype_name(dtype: np.dtype[Any]) -> Any:
    """Return a dtype in JSON's types."""
    if dtype.names is None and dtype.subdtype is None:
        return dtype.str
    return np.lib.format.dtype_to_descr(dtype)


def dtype_from(name: Any) -> np.dtype[Any]:
    """Return the dtype that `dtype_name` gave."""
    if isinstance(name, str):
        return np.dtype(name)
    return np.lib.format.descr_to_dtype(_as_descr(name))


def _as_descr(name: Any) -> Any:
    """Return lists of fields as NumPy wants them: of tuples, where JSON has lists."""
    if isinstance(name, str):
        return name
    if len(name) == 2 and isinstance(name[1], list) and all(isinstance(n, int) for n in name[1]):
        return _as_descr(name[0]), tuple(name[1])
    return [_as_field(field) for field in name]


def _as_field(field: Any) -> Any:
    title, *rest = field
    name = tuple(title) if isinstance(title, list) else title
    shape = [tuple(extents) for extents in rest[1:]]
    return (name, _as_descr(rest[0]), *shape)


def _text(data: Any) -> str:
    return b64encode(data).decode("ascii")
