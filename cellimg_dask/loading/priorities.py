"""What goes first."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["BACKGROUND", "INTERACTIVE", "priority"]

INTERACTIVE = 0
"""Priority of what somebody waits for."""
BACKGROUND = 10
"""Priority of what is computed in advance; lower numbers go first."""

priority: ContextVar[int] = ContextVar("cellimg_priority", default=INTERACTIVE)
"""Priority of what this thread, or a helper of its crew, asks for."""
