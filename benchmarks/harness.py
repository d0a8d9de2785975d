"""One measurement in one fresh process, and what is read off a process."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORES = 2
"""Threads of every run."""
HALO = 8
"""Of the whole runs; voxels on each side."""
TIMEOUT_S = 1200
MIB = 1 << 20


class MeasurementError(RuntimeError):
    """A measurement ended with an error; the message is what its process printed."""


def in_fresh_process(case: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run one of `benchmarks.cases` in a new interpreter and return what it measured."""
    # A new interpreter inherits its parent's peak memory as its own, so this one imports neither
    # NumPy nor anything that does.
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cases", case, json.dumps(arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"{case} {arguments} took more than {TIMEOUT_S} s") from None
    finally:
        if process.poll() is None:
            # With the processes that it has started itself.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        raise MeasurementError(f"{case} {arguments} failed:\n{output}{errors}")
    numbers: dict[str, Any] = json.loads(output.splitlines()[-1])
    return numbers


class OneProcess:
    """A process that runs one case after the other, where only that they run matters.

    What the imports take is spent once.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cases"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def measure(self, case: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run a case and return what it measured."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([case, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise MeasurementError(f"the process ended during {case} {arguments}")
        numbers: dict[str, Any] = json.loads(answer)
        if "error" in numbers:
            raise MeasurementError(f"{case} {arguments} failed:\n{numbers['error']}")
        return numbers

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def use_two_cores() -> None:
    """Keep this process on two cores where it has more, so that machines can be compared."""
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[:CORES])


def memory_now() -> int:
    """Return the resident bytes of this process."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return memory_peak()


def memory_peak() -> int:
    """Return the most bytes that this process ever had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def typical_seconds(action: Callable[[], object], times: int) -> float:
    """Return the median seconds of an action, after a first time that does not count."""
    action()
    seconds = []
    for _ in range(times):
        began = perf_counter()
        action()
        seconds.append(perf_counter() - began)
    return median(seconds)


def machine() -> dict[str, Any]:
    """Return the facts that a reader of the table has to know."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("numpy", "scipy", "dask", "distributed", "zarr", "tensorstore")
    return {
        "cores": usable,
        "load before": round(os.getloadavg()[0], 2),
        "Python": platform.python_version(),
        **{name: version(name) for name in names},
    }
