"""Fixtures for all tests."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import cellimg_dask as ci

settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real volume, where it is present."""
    folder = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout: the real volume is not here")
    return folder.resolve()


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator that gives the same numbers in each run."""
    return np.random.default_rng(20261121)


@pytest.fixture(autouse=True)
def _own_budget():
    """Give each test an empty shared cache of 256 MiB."""
    cache = ci.get_cache()
    cache.clear()
    before = cache.max_bytes
    ci.set_cache(256 << 20)
    yield
    cache.clear()
    cache.resize(before)


@pytest.fixture(autouse=True)
def _no_leaks():
    """Fail a test that leaves threads (but for the library's own crew) or descriptors behind."""
    threads = set(threading.enumerate())
    yield
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in threads and thread.is_alive() and not _belongs_to_a_pool(thread)
    ]
    assert not left, f"threads left running: {left}"


def _belongs_to_a_pool(thread: threading.Thread) -> bool:
    # Pools of the process: the library's crew, dask's, zarr's event loop, distributed's and
    # tqdm's helpers. They are shared and stay.
    names = (
        "cellimg",
        "ThreadPoolExecutor",
        "zarr",
        "Dask",
        "Profile",
        "IO loop",
        "Tornado",
        "asyncio",
        "tqdm",
        "TCP-Executor",
        "AsyncProcess",
        "Watch",
        "QueueManager",
        "Tcp",
        "ExecutorManager",
        "Comm",
        "Timer",
    )
    return thread.daemon or thread.name.startswith(names)
