"""What is made once in each process and used by many blocks, such as the model of a segmenter."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cellimg_dask.blocks.errors import InitError, describe

__all__ = ["Holder", "hold"]

_KEPT_ELSEWHERE = 4
"""So many that came from another process are kept, since each block may bring its own copy."""


@dataclass(frozen=True, eq=False)
class Holder:
    """Makes something when it is first needed, once per process; made by `hold`.

    What was made is never pickled: where the holder arrives it is made again. It is let go of with
    the last holder in this process; in others, to which holders are sent, the latest few are kept.

    Notes
    -----
    Thread-safe.
    """

    make: Callable[[], Any] | None
    """Makes it; None: there is only the lock."""

    @property
    def lock(self) -> threading.RLock:
        """One for all blocks in this process that use the same."""
        return _states[self].lock

    def get(self) -> Any:
        """Return what was made, None if there is nothing to make.

        Raises
        ------
        InitError
            If making it fails; the next call tries again.
        """
        state = _states[self]
        if self.make is None or state.made:
            return state.value
        failures = state.failures
        with state.making:
            if state.failures > failures:
                # It failed while this thread waited for it.
                raise InitError(state.error)
            if not state.made:
                try:
                    state.value = self.make()
                except (Exception, SystemExit) as error:
                    state.failures += 1
                    state.error = (
                        f"load_model failed with {describe(error)}; no block was segmented"
                    )
                    raise InitError(state.error) from error
                state.made = True
        return state.value

    def __reduce__(self) -> tuple[Callable[..., Holder], tuple[Any, ...]]:
        return _arrive, (_states[self].token, self.make)


class _State:
    """What a holder has in this process, and neither its pickle nor its content."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.lock = threading.RLock()
        self.making = threading.Lock()
        self.made = False
        self.failures = 0
        self.error = ""
        self.value: Any = None


_states: weakref.WeakKeyDictionary[Holder, _State] = weakref.WeakKeyDictionary()
_holders: weakref.WeakValueDictionary[str, Holder] = weakref.WeakValueDictionary()
_tokens: weakref.WeakKeyDictionary[Callable[[], Any], str] = weakref.WeakKeyDictionary()
_arrived: OrderedDict[str, Holder] = OrderedDict()
_lock = threading.Lock()


def hold(make: Callable[[], Any] | None) -> Holder:
    """Return a holder, the same for the same function object as long as one is used."""
    token = uuid.uuid4().hex
    with _lock:
        if make is not None:
            # What is neither hashable nor weakly referenced gets a holder of its own.
            with suppress(TypeError):
                token = _tokens.setdefault(make, token)
        return _holder(token, make)


def _holder(token: str, make: Callable[[], Any] | None) -> Holder:
    holder = _holders.get(token)
    if holder is None:
        holder = Holder(make)
        _states[holder] = _State(token)
        _holders[token] = holder
    return holder


def _arrive(token: str, make: Callable[[], Any] | None) -> Holder:
    with _lock:
        known = token in _holders and token not in _arrived
        holder = _holder(token, make)
        if not known:
            _arrived[token] = holder
            _arrived.move_to_end(token)
            while len(_arrived) > _KEPT_ELSEWHERE:
                _arrived.popitem(last=False)
        return holder
