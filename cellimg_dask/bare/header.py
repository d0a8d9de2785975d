"""What a shared array says about itself, in the first page of its memory.

Bytes 0-7 hold the magic word, 8-11 the version, 12-15 the length of the description, 16-19 a CRC-32
of all that and of the description, 20-23 whether the values are there, 24-31 when they were last
assigned (nanoseconds since 1970). From byte 32 on comes the description: JSON in UTF-8. Numbers are
little-endian. The values begin at the offset that the description names, which is a page's border.
"""

from __future__ import annotations

import json
import math
import operator
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CHANGED_AT",
    "MAGIC",
    "PAGE",
    "READY_AT",
    "VERSION",
    "Header",
    "checked_axes",
    "checked_shape",
    "dtype_from_json",
    "dtype_to_json",
]

MAGIC = b"cellimg\0"
VERSION = 1
PAGE = 4096

READY_AT = 20
"""Where an unsigned integer of 4 bytes says whether the values are there."""
CHANGED_AT = 24
"""Where an unsigned integer of 8 bytes says when they were assigned."""

_PREFIX = struct.Struct("<8sIIIIQ")
_CHECKED = 16


class Header(NamedTuple):
    """What a shared array says about itself."""

    shape: tuple[int, ...]
    """Extent along each axis."""
    dtype: np.dtype[Any]
    """Of the values, with its byte order."""
    order: str
    """"C" or "F": whether the last or the first axis is contiguous."""
    axes: tuple[str, ...] | None
    """A name for each axis."""
    owner: int
    """Number of the process that removes it."""
    start: str | None
    """When that process began, as its system says."""
    namespace: str | None
    """What the number refers to."""
    token: str
    """Tells it from all others, also from one that has its name later."""
    offset: int = PAGE
    """Bytes before the values."""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pack(self) -> tuple[Header, bytes]:
        """Return the header as it is stored, with the offset that it needs, and its bytes."""
        fitting = self
        while True:
            data = self._described(fitting.offset)
            needed = -(-(_PREFIX.size + len(data)) // PAGE) * PAGE
            if needed <= fitting.offset:
                break
            fitting = fitting._replace(offset=needed)
        start = _PREFIX.pack(MAGIC, VERSION, len(data), 0, 0, 0)
        checksum = zlib.crc32(data, zlib.crc32(start[:_CHECKED]))
        return fitting, _PREFIX.pack(MAGIC, VERSION, len(data), checksum, 0, 0) + data

    def _described(self, offset: int) -> bytes:
        content = {
            "shape": self.shape,
            "dtype": dtype_to_json(self.dtype),
            "order": self.order,
            "axes": self.axes,
            "offset": offset,
            "nbytes": self.nbytes,
            "owner": {"pid": self.owner, "start": self.start, "namespace": self.namespace},
            "token": self.token,
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, memory: Any, name: str) -> Header:
        """Read the header of shared memory.

        Parameters
        ----------
        memory : buffer
            All of the memory, in bytes.
        name : str
            How messages call it.

        Raises
        ------
        ValueError
            If it is no shared array, was made by a newer version, is damaged, or is cut short.
        """
        if len(memory) < _PREFIX.size or bytes(memory[: len(MAGIC)]) != MAGIC:
            raise ValueError(
                f"the shared memory {name!r} is no shared array: it does not begin with a header "
                f"(another program's, or just being made)"
            )
        start = bytes(memory[: _PREFIX.size])
        _, version, length, checksum, _, _ = _PREFIX.unpack(start)
        if version > VERSION:
            raise ValueError(
                f"the shared array {name!r} has a header of version {version}; this "
                f"cellimg_dask reads up to version {VERSION}: use a newer one"
            )
        data = bytes(memory[_PREFIX.size : _PREFIX.size + length])
        if len(data) < length or zlib.crc32(data, zlib.crc32(start[:_CHECKED])) != checksum:
            raise ValueError(f"the header of the shared array {name!r} is damaged")
        try:
            content = json.loads(data)
            owner = content["owner"]
            header = cls(
                tuple(map(int, content["shape"])),
                dtype_from_json(content["dtype"]),
                str(content["order"]),
                None if content["axes"] is None else tuple(map(str, content["axes"])),
                int(owner["pid"]),
                owner["start"],
                owner["namespace"],
                str(content["token"]),
                int(content["offset"]),
            )
            _check(header, _PREFIX.size + length)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the header of the shared array {name!r} cannot be understood: "
                f"{type(error).__name__}: {error}"
            ) from error
        if header.offset + header.nbytes > len(memory):
            raise ValueError(
                f"the shared array {name!r} is cut short: {header.offset + header.nbytes:,} "
                f"bytes are needed, {len(memory):,} are there"
            )
        return header


def _check(header: Header, length: int) -> None:
    checked_shape(header.shape)
    checked_axes(header.axes, len(header.shape))
    if header.order not in ("C", "F"):
        raise ValueError(f"order {header.order!r}")
    if header.offset < length:
        raise ValueError(f"offset {header.offset} within the header")


def dtype_to_json(dtype: np.dtype[Any]) -> Any:
    """Return a dtype as JSON's types: a string, or a list of fields as `numpy.dtype.descr` has.

    Raises
    ------
    ValueError
        If NumPy elsewhere could not make the same of it.
    """
    if dtype.hasobject:
        raise ValueError(
            f"Python objects cannot be shared, dtype {dtype}; share numbers, or strings of a fixed "
            f"length such as dtype 'U20'"
        )
    try:
        found: Any = dtype.str if dtype.names is None else dtype.descr
        same = dtype_from_json(json.loads(json.dumps(found))) == dtype
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"dtype {dtype} has no description that NumPy of another process understands; share "
            f"a view of the bytes: array.view('V{dtype.itemsize}')"
        )
    return found


def dtype_from_json(found: Any) -> np.dtype[Any]:
    """Return the dtype of which `dtype_to_json` made something."""
    return np.lib.format.descr_to_dtype(_with_tuples(found))


def _with_tuples(found: Any) -> Any:
    if isinstance(found, str):
        return found
    fields = []
    for name, kind, *shape in found:
        title = tuple(name) if isinstance(name, list) else name
        fields.append((title, _with_tuples(kind), *map(tuple, shape)))
    return fields


def checked_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape, given as an integer or as integers."""
    if isinstance(shape, (str, bytes)):
        raise TypeError(f"a shape is an integer or a tuple of integers, not {shape!r}")
    try:
        extents = tuple(shape)
    except TypeError:
        extents = (shape,)
    try:
        found = tuple(operator.index(extent) for extent in extents)
    except TypeError:
        raise TypeError(f"a shape is an integer or a tuple of integers, not {shape!r}") from None
    if any(extent < 0 for extent in found):
        raise ValueError(f"a shape has no negative extents: {found}")
    return found


def checked_axes(axes: Sequence[str] | None, ndim: int) -> tuple[str, ...] | None:
    """Return names of axes, one for each."""
    if axes is None:
        return None
    names = tuple(axes)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"axes must be names, such as 'zyx' or ('z', 'y', 'x'), got {axes!r}")
    if len(names) != ndim:
        raise ValueError(f"{len(names)} names of axes for an array of {ndim} axes: {axes!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"axes must have different names, got {axes!r}")
    return names
