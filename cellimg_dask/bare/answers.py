"""What is answered to other programs: values, and arrays in shared memory.

Arrays go where the caller wants them, else into segments which the caller removes. Until the answer
is sent they are this process's: if it is killed before that, its resource tracker removes them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .segments import Segment
from .shared import SharedArray
from .values import Attached, Memory, is_typed, ndarray_type, shared_type

__all__ = ["Answer", "plain"]

Keep = Callable[[Any], str]


class Answer:
    """The outputs of a task.

    Parameters
    ----------
    attached : Attached
        What the caller has in shared memory.
    keep : callable, optional
        Keeps something that cannot be sent, and returns under which name. Without it that is an
        error.
    """

    def __init__(self, attached: Attached, keep: Keep | None = None) -> None:
        self._attached = attached
        self._keep = keep
        self._made: list[Segment] = []
        self._others: list[str] = []
        self._writes: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def encode(self, outputs: dict[Any, Any], targets: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs in JSON's types, with all arrays where they are to be.

        Parameters
        ----------
        outputs : dict
            By name.
        targets : dict
            The caller's arrays for some of them: each an ``ndarray`` or a ``shared``, or a list
            or dict of such, as the output is.

        Raises
        ------
        MemoryError
            If there is not so much shared memory.
        TypeError, ValueError
            If something cannot be sent, or does not fit the caller's array.
        """
        tree: dict[str, Any] = self._tree(outputs, targets, "outputs")
        self._write()
        return tree

    def discard(self) -> None:
        """Remove what was made."""
        for segment in self._made:
            segment.unlink()
            segment.close()
        self._made.clear()

    def hand_over(self) -> list[Segment]:
        """Leave what was made to the caller; what is returned has to be kept for a while."""
        for segment in self._made:
            segment.give_away()
        for name in self._others:
            _give_away(name)
        # Windows removes shared memory with its last handle.
        kept = self._made if sys.platform == "win32" else []
        self._made, self._others = [], []
        return kept

    def _tree(self, value: Any, target: Any, where: str) -> Any:
        """Return a value in JSON's types; ``where`` names it in errors."""
        if is_typed(target):
            return self._into(value, target, where)
        if target is not None:
            _check_target(value, target, where)
        if isinstance(value, dict):
            targets = target or {}
            return {
                _key(key, where): self._tree(item, targets.get(key), f"{where}[{key!r}]")
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            wanted = target or [None] * len(value)
            return [
                self._tree(item, place, f"{where}[{number}]")
                for number, (item, place) in enumerate(zip(value, wanted))
            ]
        return self._single(value, where)

    def _single(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return str(value) if isinstance(value, str) else value
        if isinstance(value, np.generic) and value.dtype.kind in "biufU":
            # Also those of more than 64 bits.
            value = float(value) if value.dtype.kind == "f" else value.item()
        if isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return _float(value)
        if isinstance(value, SharedArray):
            return shared_type(value)
        if isinstance(value, Memory):
            return _shm(value)
        array = _as_array(value)
        if array is not None:
            return self._array(array, where)
        reference = self._by_name(value)
        if reference is not None:
            return reference
        kind = type(value)
        if self._keep is not None:
            return {"appose_type": "worker_object", "var_name": self._keep(value)}
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which other programs do not "
            f"know; allowed are None, booleans, numbers, strings, lists, dicts and NumPy arrays"
        )

    def _array(self, array: np.ndarray[Any, Any], where: str) -> Any:
        _check_array(array, where)
        reference = self._attached.reference(array)
        if reference is not None:
            return reference
        segment = Segment.create(None, array.nbytes)
        self._made.append(segment)
        segment.array(array.shape, array.dtype)[...] = array
        return ndarray_type(array, segment.name)

    def _into(self, value: Any, target: dict[str, Any], where: str) -> Any:
        array = _as_array(value)
        array = np.asarray(value) if array is None else array
        _check_array(array, where)
        place = self._attached.array(target)
        same_type = np.can_cast(array.dtype, place.dtype, "equiv")
        if array.shape != place.shape or not same_type:
            raise ValueError(
                f"{where} has shape {array.shape} and dtype {array.dtype}; the array that was "
                f"given for it has shape {place.shape} and dtype {place.dtype}"
            )
        self._writes.append((place, array))
        return target

    def _write(self) -> None:
        """Fill the caller's arrays, once it is clear that everything fits."""
        places = [place for place, _ in self._writes]
        for number, (place, array) in enumerate(self._writes):
            others = places[:number] + places[number + 1 :]
            if any(np.may_share_memory(array, other) for other in others):
                self._writes[number] = place, array.copy()
        for place, array in self._writes:
            # It may be there already.
            there = array.ctypes.data == place.ctypes.data and array.strides == place.strides
            if not there or array.dtype != place.dtype:
                place[...] = array
        self._writes.clear()

    def _by_name(self, value: Any) -> Any:
        """Return what says where shared memory is that a script has made by other means."""
        if all(hasattr(value, known) for known in ("shm", "dtype", "shape")):
            memory = self._by_name(value.shm)
            return memory and {
                "appose_type": "ndarray",
                "dtype": value.dtype,
                "shape": list(value.shape),
                "shm": memory,
            }
        module = sys.modules.get("multiprocessing.shared_memory")
        if module is None or not isinstance(value, module.SharedMemory):
            return None
        if getattr(value, "_track", True):
            # As Appose has it: the caller removes it.
            self._others.append(value._name)
        return _shm(value)


class _Plain(Answer):
    """What has no arrays, since nobody would remove them."""

    def _array(self, array: np.ndarray[Any, Any], where: str) -> Any:
        raise TypeError(f"{where} is an array; only the outputs of a task may have some")


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values by name in JSON's types; `TypeError` if it lacks some."""
    tree: dict[str, Any] = _Plain(Attached())._tree(values, None, "update")
    return tree


def _shm(memory: Any) -> dict[str, Any]:
    rsize = getattr(memory, "rsize", 0) or memory.size
    return {"appose_type": "shm", "name": memory.name.lstrip("/"), "rsize": rsize}


_given_away: set[str] = set()


def _give_away(name: str) -> None:
    from multiprocessing import resource_tracker

    if sys.platform != "win32" and name not in _given_away:
        # The tracker complains of what it does not know any more.
        _given_away.add(name)
        resource_tracker.unregister(name, "shared_memory")


def _as_array(value: Any) -> np.ndarray[Any, Any] | None:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (np.generic, complex)) or hasattr(value, "__array__"):
        # JSON has no complex numbers and no dates; others are of a library that knows NumPy.
        return np.asarray(value)
    return None


def _check_array(array: np.ndarray[Any, Any], where: str) -> None:
    if array.dtype.hasobject:
        raise TypeError(f"{where} is an array of Python objects, which have no bytes of their own")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{where} is a masked array, which would lose its mask; give array.filled(value)"
        )


def _check_target(value: Any, target: Any, where: str) -> None:
    if isinstance(target, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is a {type(value).__name__}, not a dict as was asked for")
        missing = [name for name in target if name not in value]
        if missing:
            raise ValueError(
                f"{where} has nothing called {', '.join(map(repr, missing))}; there is "
                f"{', '.join(map(repr, value)) or 'nothing'}"
            )
    elif isinstance(target, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(target):
            count = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
            raise ValueError(
                f"{where} is a {type(value).__name__}{count}, not a list of {len(target)} as was "
                f"asked for"
            )
    else:
        raise ValueError(
            f"{where} is asked for in {target!r}; expected an ndarray, a shared array, or a list "
            f"or dict of such"
        )


def _key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return str(key)
    if isinstance(key, (int, float, np.integer)) and not isinstance(key, bool):
        return str(key)
    raise TypeError(f"{where} has a key that is no string: {key!r}")


def _float(value: float) -> float | str:
    """Return a number; JSON has none for these, and programs refuse lines that have some."""
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
