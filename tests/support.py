"""What several test modules use: calls in the background, waiting, comparing labels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATIENCE_S = 60
"""What takes longer hangs."""


def begin(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call something on a thread of its own."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            result = function(*args)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=call, name="test", daemon=True).start()
    return future


def in_time(function: Callable[..., Any], *args: Any) -> Any:
    """Call something that fails the test where it would hang."""
    return begin(function, *args).result(PATIENCE_S)


def until(condition: Callable[[], object]) -> None:
    """Wait for what nothing announces."""
    tick = threading.Event()
    for _ in range(PATIENCE_S * 200):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("it did not come about")


def same_objects(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether two images of labels show the same objects, whatever they call them."""
    if found.shape != expected.shape or not np.array_equal(found == 0, expected == 0):
        return False
    left, mine = np.unique(found, return_inverse=True)
    right, its = np.unique(expected, return_inverse=True)
    pairs = np.unique(mine.reshape(-1) * (right.size + 1) + its.reshape(-1))
    return pairs.size == left.size == right.size
