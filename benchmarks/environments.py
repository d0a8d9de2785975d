"""Blocks in another Python, beside Appose's own worker, copying, and pickles in a pipe."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import cellimg_dask as ci

_ROUNDS = 9
_PIPE = """
import pickle, sys
while True:
    try:
        array = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    pickle.dump(array, sys.stdout.buffer, protocol=5)
    sys.stdout.buffer.flush()
"""


def same(a: Any) -> Any:
    return a


def env_start(method: str) -> dict[str, Any]:
    """Seconds from nothing to the first result of one worker that has imported NumPy."""
    began = perf_counter()
    with ExitStack() as stack:
        if method == "appose":
            service = stack.enter_context(_appose())
            assert service.task("int(numpy.ones(3).sum())").wait_for().outputs["result"] == 3
        else:
            queue = stack.enter_context(ci.BlockQueue(1, env=ci.Env.current()))
            image = ci.map_cells(same, np.arange(10), dtype=int, queue=queue)
            assert image[3] == 3
        seconds = perf_counter() - began
    return {"seconds": seconds}


def tiny_blocks(count: int, appose: bool) -> dict[str, Any]:
    """Microseconds per task that does nothing, of each method, taken in turns."""
    seconds: dict[str, list[float]] = {"block": [], "appose": []}
    with ExitStack() as stack:
        queue = stack.enter_context(ci.BlockQueue(1, env=ci.Env.current()))
        image = ci.map_cells(
            same, np.arange(1000 * count), dtype=int, cell_shape=100, queue=queue, cache=None
        )
        service = stack.enter_context(_appose()) if appose else None

        def blocks() -> None:
            for index in range(count):
                image.load(index)

        def tasks() -> None:
            assert service is not None
            for _ in range(count):
                service.task("1 + 1").wait_for()

        methods: dict[str, Callable[[], None]] = {"block": blocks}
        if appose:
            methods["appose"] = tasks
        for method in methods.values():
            method()
        for _ in range(_ROUNDS):
            for name, method in methods.items():
                began = perf_counter()
                method()
                seconds[name].append((perf_counter() - began) / count)
    return {name: 1e6 * median(values) for name, values in seconds.items() if values}


def one_large_block(mib: int) -> dict[str, Any]:
    """Milliseconds for a block there and back, taken in turns.

    The floor copies it twice, there and back, between memory that was used before.
    """
    data = np.random.default_rng(0).integers(0, 255, mib << 20, dtype=np.uint8)
    between, out = np.zeros_like(data), np.zeros_like(data)
    with ExitStack() as stack:
        queue = stack.enter_context(ci.BlockQueue(1, env=ci.Env.current()))
        shared = stack.enter_context(ci.shared.put(f"cellimg-benchmark-{os.getpid()}", data))
        image, of_shared = (
            ci.map_cells(
                same, array, dtype=np.uint8, cell_shape=data.shape, queue=queue, cache=None
            )
            for array in (data, shared)
        )
        pipe = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", _PIPE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        assert pipe.stdin is not None
        assert pipe.stdout is not None

        def floor() -> None:
            between[...] = data
            out[...] = between

        def block() -> None:
            image.read_into(out)

        def attached() -> None:
            of_shared.read_into(out)

        def pickled() -> None:
            assert pipe.stdin is not None
            assert pipe.stdout is not None
            pickle.dump(data, pipe.stdin, protocol=5)
            pipe.stdin.flush()
            out[...] = pickle.load(pipe.stdout)

        methods = {"floor": floor, "block": block, "attached": attached, "pickle": pickled}
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for turn in range(_ROUNDS + 2):
            for name, method in methods.items():
                out[...] = 0
                began = perf_counter()
                method()
                # The first two find memory that was never used.
                if turn > 1:
                    seconds[name].append(perf_counter() - began)
                assert np.array_equal(out, data)
        pipe.stdin.close()
    return {name: 1e3 * median(values) for name, values in seconds.items()}


def _appose() -> Any:
    import appose

    return appose.custom().base(sys.prefix).build().python().init("import numpy")
