"""An array in shared memory that says itself what it is, so that its name is enough."""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from .header import (
    CHANGED_AT,
    MAGIC,
    READY_AT,
    Header,
    checked_axes,
    checked_shape,
    dtype_to_json,
)
from .look import header_of, look
from .owners import namespace, start_of
from .registry import forget_name, note_name
from .segments import Segment, checked_name, remove_name

__all__ = [
    "SharedArray",
    "make_shared",
    "open_shared",
    "owned_here",
    "put_shared",
    "remove_shared",
]

Shared = TypeVar("Shared", bound="SharedArray")


class SharedArray:
    """An array in shared memory, which processes of this machine open by its name.

    Made by `put` and `empty`, opened by `open`. It lasts until the process that made it closes it
    or ends. Pickled it is its name: whoever unpickles it on the same machine has the same memory.

    Notes
    -----
    Thread-safe, as a NumPy array is: who writes what nobody else reads at the moment is up to you.
    """

    def __init__(self, segment: Segment, header: Header) -> None:
        self._segment = segment
        self._header = header
        self._array: np.ndarray[Any, Any] | None = segment.array(
            header.shape, header.dtype, header.offset, header.order
        )
        # Seen and set by all processes.
        self._ready: np.ndarray[Any, Any] | None = segment.array((), "<u4", READY_AT)
        self._changed: np.ndarray[Any, Any] | None = segment.array((), "<u8", CHANGED_AT)

    # ------------------------------------------------------------------ what it is

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The memory as a NumPy array; it stays valid when the shared array is closed."""
        array = self._array
        if array is None:
            raise ValueError(f"the shared array {self.name!r} is closed")
        return array

    @property
    def name(self) -> str:
        """The name by which others open it."""
        return self._segment.name

    @property
    def axes(self) -> tuple[str, ...] | None:
        """A name for each axis, or None."""
        return self._header.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis."""
        return self._header.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type, with the byte order that it was put with."""
        return self._header.dtype

    @property
    def order(self) -> str:
        """Which axis is contiguous: the last for "C", the first for "F"."""
        return self._header.order

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self._header.nbytes

    @property
    def offset(self) -> int:
        """Bytes of the shared memory before the values."""
        return self._header.offset

    @property
    def owner(self) -> int:
        """Number of the process that made it, and removes it when it ends."""
        return self._header.owner

    @property
    def token(self) -> str:
        """Tells it from all others, also from one that has its name later."""
        return self._header.token

    @property
    def is_owner(self) -> bool:
        """Whether closing this one removes the array: it was made here by `put` or `empty`."""
        return self._segment.is_creator

    @property
    def readonly(self) -> bool:
        """Whether it was opened for reading only."""
        return self._segment.readonly

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._array is None

    @property
    def is_removed(self) -> bool:
        """Whether it was removed, so that nobody can open it any more; False if unknown."""
        return self._segment.is_removed

    @property
    def last_change_ns(self) -> int:
        """When values were assigned last by ``shared[...] = values``, in ns since 1970.

        Writing by way of ``.array`` or from another program does not show here.
        """
        changed = self._changed
        if changed is None:
            raise ValueError(f"the shared array {self.name!r} is closed")
        return int(changed)

    @property
    def _is_ready(self) -> bool:
        return self._ready is not None and bool(self._ready)

    def __repr__(self) -> str:
        # Whether it is closed, and by whom it was made, is what one looks for.
        axes = "" if self.axes is None else f", axes {', '.join(self.axes) or 'none'}"
        whose = "this process" if self.is_owner else f"process {self.owner}"
        marks = ", read-only" * self.readonly + ", closed" * self.closed
        return (
            f"<SharedArray {self.name!r} of shape {self.shape}, {self.dtype}{axes}, "
            f"of {whose}{marks}>"
        )

    # ------------------------------------------------------------------ as an array

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a shared array without axes")
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Return what the NumPy array would: a view of the memory for slices."""
        return self.array[key]

    def __setitem__(self, key: Any, values: Any) -> None:
        """Write into the memory, which all who have it see."""
        array = self.array
        if not array.flags.writeable:
            raise ValueError(f"the shared array {self.name!r} was opened for reading only")
        # Before, for those who read meanwhile; and after, for those who read then.
        self._mark_changed()
        array[key] = values
        self._mark_changed()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.array
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"a copy is needed to make {array.dtype} into {np.dtype(dtype)}")
            return array.astype(dtype)
        return array.copy() if copy else array

    def _mark_changed(self) -> None:
        changed = self._changed
        if changed is not None:
            changed[...] = time.time_ns()

    def __dask_tokenize__(self) -> Any:
        return "cellimg shared array", self.name, self.token

    # ------------------------------------------------------------------ its end

    def close(self) -> None:
        """Let go of it; where it was made, remove it.

        Arrays that were taken from it stay valid, here and in other processes.
        """
        if self.is_owner:
            self._segment.unlink()
            forget_name(self.name)
            with _owning:
                if _owned.get(self.name) is self:
                    del _owned[self.name]
        self._array = self._ready = self._changed = None
        self._segment.close()

    def __enter__(self: Shared) -> Shared:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        host = platform.node()
        return _attached, (type(self), self.name, self.token, self.readonly, host)


# ---------------------------------------------------------------------- making and opening


def put_shared(
    cls: type[Shared],
    name: str,
    array: Any,
    axes: Any,
    replace: bool,
    copy: Callable[[SharedArray, Any], object],
) -> Shared:
    """Return a new shared array with the values of another, which ``copy(shared, array)`` copies.

    See `cellimg_dask.bare.shared.put` for the rest.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            "a masked array cannot be shared, its mask would be lost; "
            "share array.filled(value), and the mask by another name"
        )
    if isinstance(array, SharedArray):
        axes = array.axes if axes is None else axes
        array = array.array
    elif not all(hasattr(array, known) for known in ("shape", "dtype", "__getitem__")):
        array = np.asarray(array)
    order = "F" if isinstance(array, np.ndarray) and array.flags.fnc else "C"
    dtype = getattr(array.dtype, "numpy_dtype", array.dtype)
    return make_shared(
        cls, name, array.shape, dtype, axes, order, replace, lambda made: copy(made, array)
    )


def make_shared(
    cls: type[Shared],
    name: str,
    shape: Any,
    dtype: Any,
    axes: Any,
    order: str,
    replace: bool,
    fill: Callable[[SharedArray], object] | None = None,
) -> Shared:
    """Return a new shared array, which others can open once ``fill(shared)`` is done.

    See `cellimg_dask.bare.shared.put` for the rest.
    """
    checked_name(name)
    extents = checked_shape(shape)
    if order not in ("C", "F"):
        raise ValueError(f'order must be "C" or "F", got {order!r}')
    dtype = np.dtype(dtype)
    dtype_to_json(dtype)
    pid = os.getpid()
    header, start = Header(
        extents,
        dtype,
        order,
        checked_axes(axes, len(extents)),
        pid,
        start_of(pid),
        namespace(),
        secrets.token_hex(8),
    ).pack()
    segment = _segment_for(name, header.offset + header.nbytes, replace)
    try:
        note_name(name)
        made = cls(segment, header)
        page = segment.array((len(start),), np.uint8)
        page[len(MAGIC) :] = np.frombuffer(start, np.uint8)[len(MAGIC) :]
        # From now on others know what it is.
        page[: len(MAGIC)] = np.frombuffer(MAGIC, np.uint8)
        _own(made)
        if fill is not None:
            fill(made)
        made._mark_changed()
        ready = made._ready
        if ready is None:
            raise ValueError(f"the shared array {name!r} was removed while it was filled")
        ready[...] = 1
    except BaseException:
        with _owning:
            # Another thread may have put one in its place.
            mine = _owned.get(name)
            if mine is None or mine._segment is segment:
                _owned.pop(name, None)
                forget_name(name)
        segment.unlink()
        segment.close()
        raise
    return made


def open_shared(
    cls: type[Shared],
    name: str,
    readonly: bool = False,
    token: str | None = None,
    unready: bool = False,
) -> Shared:
    """Return a shared array that a process of this machine has made.

    Parameters
    ----------
    cls : type
        Of what is returned.
    name : str
        Its name.
    readonly : bool
        Whether its array refuses to be written to.
    token : str, optional
        Which one it must be; a name may be given to another one.
    unready : bool
        Whether it may be one that is still being filled.
    """
    segment = Segment.attach(name, readonly)
    try:
        header = header_of(segment)
        if token is not None and header.token != token:
            raise FileNotFoundError(
                f"the shared array {name!r} was removed, and another one has its name by now"
            )
        opened = cls(segment, header)
        if not unready and not opened._is_ready:
            raise ValueError(
                f"the shared array {name!r} is still being filled by process {header.owner}; "
                f"open it when that is done"
            )
    except BaseException:
        segment.close()
        raise
    return opened


# ---------------------------------------------------------------------- what this process has


_owning = threading.RLock()
_owned: dict[str, SharedArray] = {}
_ends_in = 0

_attaching = threading.Lock()
_known: weakref.WeakValueDictionary[tuple[Any, ...], SharedArray] = weakref.WeakValueDictionary()


def _own(shared: SharedArray) -> None:
    """Keep a shared array until it is removed, or this process ends."""
    global _ends_in
    from multiprocessing.util import Finalize

    with _owning:
        if _ends_in != os.getpid():
            # Called where any process ends, also one that multiprocessing has forked.
            Finalize(None, _at_exit, exitpriority=0)
            _ends_in = os.getpid()
        _owned[shared.name] = shared


def _mine(name: str) -> SharedArray | None:
    with _owning:
        shared = _owned.get(name)
    return shared if shared is not None and shared.is_owner and not shared.is_removed else None


def owned_here() -> list[SharedArray]:
    """Return the shared arrays that this process has made and not removed."""
    with _owning:
        return [shared for shared in _owned.values() if shared.is_owner]


def remove_shared(name: str) -> bool:
    """Remove a shared array, whoever owns it; False if there is none of this name."""
    mine = _mine(name)
    if mine is not None:
        mine.close()
        return True
    found = remove_name(name)
    forget_name(name)
    return found


def _at_exit() -> None:
    for shared in owned_here():
        shared.close()


def _attached(cls: type[Shared], name: str, token: str, readonly: bool, host: str) -> Shared:
    """Return what was pickled, which this process opens once as long as somebody has it."""
    key = (cls, name, token, readonly)
    with _attaching:
        known = _known.get(key)
        if known is None or known.closed:
            try:
                known = open_shared(cls, name, readonly, token, unready=True)
            except FileNotFoundError as error:
                here = platform.node()
                where = f"of {host} cannot be opened on {here}" if host != here else "is gone"
                raise FileNotFoundError(
                    f"the shared array {name!r} {where}: it travels as its name, so its owner "
                    f"must be alive, on the same machine"
                ) from error
            _known[key] = known
    return known  # type: ignore[return-value]


def _segment_for(name: str, nbytes: int, replace: bool) -> Segment:
    for _ in range(2):
        try:
            return Segment.create(name, nbytes)
        except FileExistsError as error:
            taken = error
        info = look(name)
        if info is None:
            raise FileExistsError(
                taken.errno, "another program has shared memory of this name; take another", name
            ) from taken
        mine = _mine(name) is not None
        if not (replace and (mine or info.is_alive is False)):
            whose = "this process" if mine else f"process {info.owner}"
            if info.owner is None:
                whose = "a process that its header no longer tells"
            way = "replace=True puts another one in its place, "
            if not mine and info.is_alive is False:
                whose += ", which has ended"
            elif not mine:
                way = ""
            raise FileExistsError(
                taken.errno,
                f"there is a shared array of this name already, of {whose}; {way}"
                f"remove(name) removes it",
                name,
            ) from taken
        remove_shared(name)
    raise FileExistsError(taken.errno, "somebody else takes this name again and again", name)
