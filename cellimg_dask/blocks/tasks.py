"""The task that a block function is given which has a parameter named ``task``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cellimg_dask.bare.task import Task

__all__ = ["current_task", "doing"]

_current: ContextVar[Task | None] = ContextVar("cellimg_task", default=None)


@contextmanager
def doing(task: Task) -> Iterator[None]:
    """Be this task for a while."""
    token = _current.set(task)
    try:
        yield
    finally:
        _current.reset(token)


def current_task() -> Task:
    """Return the task that this block is; outside of one that nobody watches."""
    return _current.get() or Task(lambda said: None, lambda: False)
