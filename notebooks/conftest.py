"""What notebooks need that is not everywhere, when they run as tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import pythons


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip notebooks that need what is not here, and say why."""
    if item.path.name in ("viewer.ipynb", "paint_in_viewer.ipynb", "warp.ipynb"):
        _need_a_browser()
    if item.path.name == "environments.ipynb":
        _need_an_environment(item)


def _need_a_browser() -> None:
    from cellimg_dask.viewer.browser import find_browser

    pytest.importorskip("neuroglancer", reason="neuroglancer is not installed")
    if find_browser() is None:
        pytest.skip("no Chromium here to draw what the viewer shows: apt install chromium")


def _need_an_environment(item: pytest.Item) -> None:
    # It looks for other Pythons where a shell would.
    patch = pytest.MonkeyPatch()
    item.addfinalizer(patch.undo)
    folders = [str(Path(python).parent) for _, python in sorted(pythons.installed().items())]
    patch.setenv("PATH", os.pathsep.join([*folders, os.environ["PATH"]]))
    if (item.path.parent / "old-numpy" / "made").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            # Small, and in pure Python: whether pip reaches an index is known in a second.
            pythons.make_environment(Path(folder), pythons.oldest()[0], ["lazy-loader"])
        except pythons.NoEnvironmentError as error:
            pytest.skip(f"no other environment can be made here: {error}")
