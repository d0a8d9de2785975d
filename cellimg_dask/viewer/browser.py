"""A browser without a window, for pictures of a view that no other browser shows."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from contextlib import suppress

__all__ = ["Browser"]

_NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
)
# Drawn in software, so that it works without a graphics card; and nothing is asked of the net.
_FLAGS = (
    "--headless=new",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    """Return the path of a Chromium, or of a browser made from it; None where there is none."""
    for name in _NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


class Browser:
    """A browser process that shows one page.

    Raises
    ------
    FileNotFoundError
        If no Chromium, Chrome or Edge is installed.
    """

    def __init__(self, url: str, size: tuple[int, int]) -> None:
        program = find_browser()
        if program is None:
            raise FileNotFoundError(
                "no browser shows the view, and there is no Chromium, Chrome or Edge to draw it "
                "with; open view.url in a browser, or install Chromium"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="cellimg-browser-")
        self._process = subprocess.Popen(
            [
                program,
                *_FLAGS,
                # Its sandbox does not work for root; it shows nothing but our own page.
                *(["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []),
                f"--user-data-dir={self._folder.name}",
                f"--window-size={size[0]},{size[1]}",
                url,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Its processes form a group, and end together.
            start_new_session=True,
        )

        # Also when Python ends before somebody closes it.
        self._end = weakref.finalize(self, _end, self._process, self._folder)

    @property
    def is_running(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the browser and remove its files."""
        self._end()


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(40):
        # Its last processes may still be writing.
        with suppress(OSError):
            folder.cleanup()
            return
        time.sleep(0.05)
