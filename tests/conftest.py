"""Fixtures for all tests."""

from __future__ import annotations

import compileall
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import pythons
import support
from hypothesis import HealthCheck, settings
from support import PATIENCE_S

import cellimg_dask as ci
from cellimg_dask.loading.crew import get_crew
from cellimg_dask.state.flights import Flight

settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Make processes cheap to start: the tests start hundreds."""
    if hasattr(config, "workerinput"):
        return
    # Each would compile the library where Python is told to write no bytecode.
    compileall.compile_dir(Path(ci.__file__).parent, quiet=2)
    # Threads of BLAS that have nothing to do spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that wait, for browsers and installers, between those that compute.

    Together they would leave the cores idle, and last they would be waited for.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [path for path in files if path.suffix == ".ipynb" or path.stem == "test_browser"]
    order = [path for path in files if path not in waiting]
    for number, path in enumerate(waiting):
        order.insert(4 * number, path)
    items[:] = [item for path in order for item in files[path]]


@pytest.fixture(scope="session", autouse=True)
def _forked_workers() -> Iterator[None]:
    """Have workers of clusters forked from a process that has imported distributed.

    The library they import themselves, as those that are spawned do.
    """
    if find_spec("distributed") is None:
        yield
        return
    from distributed.utils import get_mp_context

    forked = {
        "distributed.worker.multiprocessing-method": "forkserver",
        "multiprocessing.context": "forkserver",
    }
    with dask.config.set(forked):
        # Says what to import.
        get_mp_context()
        # Now, so that no test is taken for the one that left its pipe open.
        forkserver.ensure_running()
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Have interrupts heard in the tests that send them, also where a shell began us with "&"."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real volume, where it is present."""
    folder = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout: the real volume is not here")
    return folder.resolve()


@pytest.fixture(scope="session")
def environments(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    """Folder where environments that tests make are kept, from one run to the next if it can be."""
    cache = getattr(request.config, "cache", None)
    if cache is not None:
        return Path(cache.mkdir("environments"))
    base: Path = tmp_path_factory.getbasetemp()
    # All processes of a run share the folder above theirs.
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "environments"


@pytest.fixture(scope="session")
def make_environment(environments: Path) -> Callable[..., str]:
    """Make environments: ``make_environment("numpy==1.26.4", python=…)`` gives its Python.

    Each is made once; the test is skipped where pip reaches no index.
    """

    def make(*requirements: str, python: str = sys.executable) -> str:
        try:
            return pythons.make_environment(environments, python, requirements)
        except pythons.NoEnvironmentError as error:
            pytest.skip(f"no other environment can be made here: {error}")

    return make


@pytest.fixture(scope="session")
def other_python(make_environment: Callable[..., str]) -> str:
    """Another Python, the oldest of this machine, with an old NumPy and a package we lack."""
    python, numpy = pythons.oldest()
    return make_environment(f"numpy=={numpy}", "PyWavelets<1.5", python=python)


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator that gives the same numbers in each run."""
    return np.random.default_rng(20261121)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for what nothing announces."""
    return support.until


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads, as many as a test may need."""
    with ThreadPoolExecutor(64) as executor:
        yield executor


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Wait until so many more threads are about to wait for another's load."""
    semaphore = threading.Semaphore(0)
    join = Flight.join

    def counted(flight: Flight, done: threading.Event) -> None:
        semaphore.release()
        join(flight, done)

    def wait_for(times: int) -> None:
        for _ in range(times):
            assert semaphore.acquire(timeout=PATIENCE_S)

    monkeypatch.setattr(Flight, "join", counted)
    return wait_for


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two processes with a thread each."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Any) -> Iterator[Any]:
    """A client of the cluster of a module or a folder, which is nobody's default."""
    distributed = pytest.importorskip("distributed")
    with distributed.Client(cluster, set_as_default=False) as client:
        yield client


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


@pytest.fixture(scope="session", autouse=True)
def _segments() -> Iterator[set[str]]:
    """Names of all shared memory that this process ever makes."""
    made: set[str] = set()
    try:
        import _posixshmem
    except ImportError:
        yield made
        return
    shm_open = _posixshmem.shm_open

    def noted(path: str, flags: int, mode: int = 511) -> int:
        descriptor = shm_open(path, flags, mode=mode)
        if flags & os.O_CREAT:
            made.add(path.lstrip("/"))
        return descriptor

    _posixshmem.shm_open = noted
    yield made
    _posixshmem.shm_open = shm_open


@pytest.fixture
def footprint(_segments: set[str]) -> Callable[[], dict[str, Any]]:
    """Return what this process holds: threads, child processes, descriptors, shared memory."""

    def measure() -> dict[str, Any]:
        return {
            "threads": {t for t in threading.enumerate() if not _belongs_to_a_pool(t)},
            "processes": _children(),
            "segments": _existing(_segments),
            "descriptors": len(_descriptors()),
        }

    # Starts with the first shared memory, and stays.
    resource_tracker.ensure_running()
    return measure


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest, nothing_left: Any) -> Iterator[None]:
    """Fail a test that leaves threads, processes, shared memory or pipes behind."""
    name = "shared_workers"
    shared = name in request.fixturenames and request.getfixturevalue(name) is not None
    # Workers that go on keep what they need; who started them looks when they have ended.
    with nullcontext() if shared else nothing_left():
        yield


@pytest.fixture(scope="session")
def nothing_left(_segments: set[str]) -> Callable[[], Any]:
    """Give a context that fails if threads, processes, shared memory or pipes are left in the end.

    Threads and processes of pools that are shared and stay are let be, and so are sockets.
    """

    @contextmanager
    def watched() -> Iterator[None]:
        resource_tracker.ensure_running()
        threads = set(threading.enumerate())
        processes, segments, pipes = _children(), _existing(_segments), _pipes()
        yield
        left = [
            thread
            for thread in threading.enumerate()
            if thread not in threads and not _belongs_to_a_pool(thread)
        ]
        for thread in left:
            # One that was just told to end is given the time.
            thread.join(5)
        left = [thread for thread in left if thread.is_alive()]
        assert not left, f"threads left running: {left}"
        assert not _existing(_segments) - segments, "shared memory left"
        left_processes = {pid: what for pid, what in _children().items() if pid not in processes}
        assert not left_processes, f"processes left: {left_processes}"
        if _has_cluster():
            # Its workers may have been started again, with new pipes.
            return
        if _pipes() - pipes:
            gc.collect()
        assert not _pipes() - pipes, "pipes left open"

    return watched


def _has_cluster() -> bool:
    spec = sys.modules.get("distributed.deploy.spec")
    return spec is not None and len(spec.SpecCluster._instances) > 0


def _children() -> dict[int, str]:
    """Return the child processes and how they were called, but for multiprocessing's own."""
    found: dict[int, str] = {}
    for thread in _listed("/proc/self/task"):
        # Threads and processes may end meanwhile.
        with suppress(OSError):
            for pid in Path(f"/proc/self/task/{thread}/children").read_text().split():
                with suppress(OSError):
                    called = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                    if "multiprocessing" not in called:
                        found[int(pid)] = called
    return found


def _existing(segments: set[str]) -> set[str]:
    """Return which are there; the others are forgotten."""
    # Threads may make some meanwhile.
    known = segments.copy()
    there = known.intersection(_listed("/dev/shm")) if known else known
    segments -= known - there
    return there


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for number in _listed("/proc/self/fd"):
        # The one that looks is gone.
        with suppress(OSError):
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115 - often
    return found


def _listed(folder: str) -> list[str]:
    # Before and after every test: quicker than what pathlib makes of it.
    return os.listdir(folder) if os.path.isdir(folder) else []  # noqa: PTH208, PTH112


def _pipes() -> set[str]:
    return {what for what in _descriptors().values() if what.startswith("pipe:")}


def _belongs_to_a_pool(thread: threading.Thread) -> bool:
    # The library's own: the crew of the process is shared and stays, those of queues end.
    if thread.name.startswith("cellimg"):
        return thread in get_crew()._threads
    # Pools of the process: dask's, zarr's event loop, distributed's and tqdm's helpers. They are
    # shared and stay.
    names = (
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
