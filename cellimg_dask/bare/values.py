"""Values in requests of other programs, and arrays that they have in shared memory.

JSON's types stand for themselves. A dict with ``appose_type`` is something else: ``ndarray``, an
array in shared memory; ``shm``, shared memory; ``shared``, an array that says itself what it is;
``worker_object``, what an earlier script left here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from .places import Segments
from .segments import Segment, place_of
from .shared import SharedArray
from .shared import open as open_shared
from .trees import dtype_from, dtype_name

__all__ = [
    "Attached",
    "Given",
    "Memory",
    "array_type",
    "is_typed",
    "ndarray_type",
    "shared_type",
]


class Given(np.ndarray):
    """An array that a script is given: NumPy's, and what Appose's scripts ask one for."""

    shm: Any = None
    """The shared memory that it lies in."""

    def ndarray(self) -> np.ndarray[Any, Any]:
        """Return the array as NumPy's own type."""
        return self.view(np.ndarray)


class Memory:
    """Shared memory that a script is given: bytes."""

    def __init__(self, segment: Segment, rsize: int) -> None:
        self.name = segment.name
        """Its name, without a leading slash."""
        self.size = segment.nbytes
        """So many bytes it has."""
        self.rsize = rsize
        """So many were asked for."""
        whole: Any = segment.array((self.size,), np.uint8)
        self.buf = memoryview(whole)
        """The bytes."""


class Attached(Segments):
    """Shared memory of other programs, kept as long as they keep it.

    They may give a name to another segment later, and do not say when they remove one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shared: dict[tuple[str, bool], SharedArray] = {}

    def get(self, name: str, nbytes: int = 0) -> Segment:
        """Return the segment that has this name now."""
        if not isinstance(name, str):
            raise TypeError(f"the name of shared memory is a string, got {name!r}")
        # C programs have it there.
        name = name[1:] if name.startswith("/") else name
        known = self._attached.get(name)
        if known is not None and (known.is_removed or known.nbytes < nbytes):
            self._attached.pop(name).close()
        return super().get(name)

    def shared(self, name: str, readonly: bool) -> SharedArray:
        """Return the shared array that has this name now."""
        known = self._shared.get((name, readonly))
        if known is None or known.is_removed:
            known = self._shared[name, readonly] = open_shared(name, readonly)
        return known

    def sweep(self) -> None:
        """Let go of what was removed."""
        for name, segment in list(self._attached.items()):
            if segment.is_removed:
                self._attached.pop(name).close()
        for key, shared in list(self._shared.items()):
            if shared.is_removed:
                self._shared.pop(key).close()

    def decode(self, tree: Any, exports: Mapping[str, Any], scripted: bool = False) -> Any:
        """Return the value that a request holds.

        Parameters
        ----------
        tree : object
            Of JSON's types.
        exports : mapping
            What scripts have left.
        scripted : bool
            Whether arrays are `Given`.

        Raises
        ------
        FileNotFoundError
            If shared memory is not there.
        TypeError, ValueError
            If something cannot be understood, or shared memory is too small for an array.
        """
        if isinstance(tree, list):
            return [self.decode(item, exports, scripted) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if not is_typed(tree):
            return {name: self.decode(item, exports, scripted) for name, item in tree.items()}
        kind = tree["appose_type"]
        if kind == "worker_object":
            if tree.get("var_name") not in exports:
                raise ValueError(f"no script has exported {tree.get('var_name')!r}")
            return exports[tree["var_name"]]
        if kind == "shm":
            segment = self.get(_field(tree, "name"))
            return Memory(segment, int(tree.get("rsize") or segment.nbytes))
        array = self.array(tree)
        if not scripted:
            return array
        given = array.view(Given)
        if kind == "ndarray" and tree.get("shm"):
            given.shm = self.decode(tree["shm"], exports)
        return given

    def array(self, tree: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Return the array that an ``ndarray`` or a ``shared`` is."""
        kind = tree["appose_type"]
        readonly = bool(tree.get("readonly", False))
        if kind == "shared":
            return self.shared(_field(tree, "name"), readonly).array
        if kind != "ndarray":
            raise ValueError(f"an appose_type {kind!r} is no array")
        shape, dtype = array_type(tree)
        size, offset = prod(shape) * dtype.itemsize, tree.get("offset", 0)
        if not _is_size(offset):
            raise ValueError(f"the offset of an array is a number of bytes, got {offset!r}")
        memory = tree.get("shm")
        if memory is None and size:
            raise ValueError("an ndarray lies in shared memory: shm is missing")
        if memory is None:
            return np.empty(shape, dtype)
        name = _field(memory, "name") if isinstance(memory, dict) else memory
        segment = self.get(name, offset + size)
        if offset + size > segment.nbytes:
            raise ValueError(
                f"an array of shape {shape} and dtype {dtype} at byte {offset} needs "
                f"{offset + size:,} bytes of the shared memory {segment.name!r}, which has "
                f"{segment.nbytes:,}"
            )
        array = segment.array(shape, dtype, offset)
        if readonly:
            array.flags.writeable = False
        return array

    def reference(self, array: np.ndarray[Any, Any]) -> Any:
        """Return what says where an array lies that is in a segment of the caller's, or None."""
        place = place_of(array) if array.size else None
        if place is None:
            return None
        for shared in self._shared.values():
            if place == (shared.name, shared.offset) and _is_same(array, shared.array):
                return shared_type(shared)
        # Other programs read from the segment's begin.
        whole = place[1] == 0 and array.flags.c_contiguous
        return ndarray_type(array, place[0]) if whole else None


def is_typed(tree: Any) -> bool:
    """Whether a value stands for something that JSON lacks."""
    return isinstance(tree, dict) and isinstance(tree.get("appose_type"), str)


def array_type(tree: Mapping[str, Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of an ``ndarray``."""
    shape, word = tree.get("shape"), tree.get("dtype")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ValueError(f"the shape of an array is a list of its extents, got {shape!r}")
    if not isinstance(word, (str, list)):
        raise ValueError(f'the dtype of an array is a name such as "float32", got {word!r}')
    try:
        return tuple(shape), dtype_from(word)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"no dtype of NumPy: {word!r} ({error})") from None


def ndarray_type(array: np.ndarray[Any, Any], name: str) -> dict[str, Any]:
    """Return what says that an array lies at the begin of shared memory."""
    return {
        "appose_type": "ndarray",
        "dtype": dtype_word(array.dtype),
        "shape": list(array.shape),
        "shm": {"appose_type": "shm", "name": name, "rsize": array.nbytes},
    }


def shared_type(shared: SharedArray) -> dict[str, Any]:
    """Return what a shared array is, also for programs that cannot read its header."""
    return {
        "appose_type": "shared",
        "name": shared.name,
        "dtype": dtype_word(shared.dtype),
        "shape": list(shared.shape),
        "order": shared.order,
        "offset": shared.offset,
    }


def dtype_word(dtype: np.dtype[Any]) -> Any:
    """Return a dtype as other programs name it: ``float32``, else NumPy's string or fields."""
    if dtype.isnative and dtype.kind in "biufc":
        return dtype.name
    return dtype_name(dtype)


def _is_same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Whether arrays with the same first element are the same."""
    return (one.shape, one.dtype, one.strides) == (other.shape, other.dtype, other.strides)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _field(tree: Mapping[str, Any], name: str) -> Any:
    if name not in tree:
        raise ValueError(f"{name} is missing in {dict(tree)}")
    return tree[name]
