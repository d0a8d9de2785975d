"""What notebooks need that is not everywhere, when they run as tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import pythons


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the notebook that makes an environment where none can be made, and say why."""
    if item.path.name != "environments.ipynb":
        return
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
