"""A picture of what a page shows, when all of it is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["shoot"]


def shoot(
    viewer: Any,
    changed: threading.Condition,
    is_current: Callable[[], bool],
    size: tuple[int, int] | None,
    controls: bool,
    timeout: float | None,
) -> bytes:
    """Return a picture of a page as PNG.

    Parameters
    ----------
    viewer : neuroglancer.Viewer
        Of the page.
    changed : threading.Condition
        Notified when ``is_current`` may have become true.
    is_current : callable
        Whether the page has been told of all changes, and has fetched what they changed.
    size : (int, int), optional
        Width and height in pixels.
    controls : bool
        Whether buttons and borders are shown.
    timeout : float, optional
        Seconds.

    Raises
    ------
    TimeoutError
        If it takes longer.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    seen: list[Any] = []

    def left() -> float | None:
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    with changed:
        if not changed.wait_for(is_current, left()):
            raise TimeoutError(f"no page has shown the last change within {timeout:g} s")
    before = viewer.config_state.state
    with viewer.config_state.txn() as state:
        if not controls:
            state.show_ui_controls = False
            state.show_panel_borders = False
        if size is not None:
            state.viewer_size = size
    # The page may draw itself before it has taken its new shape; so the second picture counts.
    skip = 0 if controls else 1
    try:
        while True:
            done = threading.Event()
            found: list[Any] = []

            def arrived(reply: Any, found: list[Any] = found, done: Any = done) -> None:
                found.append(reply.screenshot)
                done.set()

            viewer.async_screenshot(arrived, statistics_callback=seen.append)
            if not done.wait(left()):
                raise TimeoutError(_why(seen, timeout))
            picture = found[0]
            if size is None or (picture.width, picture.height) == size:
                if not skip:
                    return bytes(picture.image)
                skip -= 1
    finally:
        if size is not None or not controls:
            with viewer.config_state.txn() as state:
                state.show_ui_controls = before.show_ui_controls
                state.show_panel_borders = before.show_panel_borders
                state.viewer_size = before.viewer_size


def _why(seen: list[Any], timeout: float | None) -> str:
    if not seen:
        return f"no page has drawn the view within {timeout:g} s; is it open and visible?"
    total = seen[-1].total
    return (
        f"{total.visible_chunks_gpu_memory} of {total.visible_chunks_total} visible chunks were "
        f"there within {timeout:g} s, {total.visible_chunks_downloading} were being fetched; "
        f"the page <url>/@status of the server says what failed"
    )
