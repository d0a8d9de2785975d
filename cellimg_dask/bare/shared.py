"""Arrays in shared memory by name: put, open, list, remove.

Needs NumPy only, so that Pythons without this package can use it; there, and here, another process
opens by the name alone what one has put.
"""

from __future__ import annotations

import builtins
from typing import Any

from .boxes import copy_boxes
from .look import SharedInfo, header_of, look
from .registry import noted_names
from .segments import Segment
from .shared_array import (
    SharedArray,
    make_shared,
    open_shared,
    owned_here,
    put_shared,
    remove_shared,
)

__all__ = ["SharedArray", "SharedInfo", "cleanup", "empty", "list", "open", "put", "remove"]


def put(name: str, array: Any, axes: Any = None, *, replace: bool = False) -> SharedArray:
    """Copy an array into shared memory, where other processes open it by its name.

    It lasts until it is closed here, removed, or this process ends, however that ends.

    Parameters
    ----------
    name : str
        Letters, digits, ``_``, ``-`` and ``.``; at most 30 on macOS.
    array : array-like
        What `numpy.asarray` takes, or what has ``shape``, ``dtype`` and ``__getitem__``, which is
        read piece by piece.
    axes : str or sequence of str, optional
        A name for each axis, such as ``"zyx"``.
    replace : bool
        Whether to remove one that has the name, if it is this process's or its owner has ended.

    Raises
    ------
    FileExistsError
        If the name is taken.
    MemoryError
        If there is not so much shared memory.
    TypeError, ValueError
        If the name cannot be one, or the values cannot be shared.
    """
    return put_shared(SharedArray, name, array, axes, replace, _copy)


def empty(
    name: str, shape: Any, dtype: Any, axes: Any = None, *, order: str = "C", replace: bool = False
) -> SharedArray:
    """Return a shared array of zeros, to be filled in place; see `put`."""
    return make_shared(SharedArray, name, shape, dtype, axes, order, replace)


def open(name: str, readonly: bool = False) -> SharedArray:
    """Open a shared array that any process of this machine has made, without a copy.

    Raises
    ------
    FileNotFoundError
        If there is none of this name.
    ValueError
        If it is no shared array, or a damaged one, or one that is still being filled.
    """
    return open_shared(SharedArray, name, readonly)


def list() -> builtins.list[SharedInfo]:
    """Return what there is of shared arrays of this user on this machine, by name."""
    found = (look(name) for name in noted_names())
    return [info for info in found if info is not None]


def remove(name: str) -> None:
    """Remove a shared array, whoever owns it; who has it open keeps what is in it.

    Raises
    ------
    FileNotFoundError
        If there is none of this name.
    ValueError
        If this is shared memory of another program.
    """
    if look(name) is None:
        segment = Segment.attach(name, readonly=True)
        try:
            # Says what is wrong.
            header_of(segment)
        finally:
            segment.close()
    remove_shared(name)


def cleanup(dead_owners: bool = True, *, own: bool = False) -> builtins.list[str]:
    """Remove shared arrays that nobody else will remove.

    Parameters
    ----------
    dead_owners : bool
        Whether to remove those whose owner has ended without removing them, as where it was
        killed together with the process that multiprocessing has for this.
    own : bool
        Whether to remove those of this process.

    Returns
    -------
    list of str
        The names of those that were removed.
    """
    removed = []
    for shared in owned_here() if own else ():
        removed.append(shared.name)
        shared.close()
    for info in list() if dead_owners else ():
        if info.is_alive is False and remove_shared(info.name):
            removed.append(info.name)
    return sorted(removed)


def _copy(shared: SharedArray, array: Any) -> None:
    copy_boxes(shared.array, array)
