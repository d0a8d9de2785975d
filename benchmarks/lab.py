"""Repeats measurements, interleaved, and keeps what several rows share."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

from benchmarks.harness import MeasurementError, OneProcess, in_fresh_process

_AT_A_TIME = 2

Case = tuple[str, dict[str, Any]]
Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    row: str
    """Letter of the row that it belongs to."""
    what: str
    """What was measured."""
    unit: str
    """Unit of the values."""
    values: Sequence[float]
    """One per repetition; none: the line is a remark."""
    goal: float | None = None
    """The median should not be above this; with ``at_least`` not below."""
    at_least: bool = False
    """Whether more is better."""

    @property
    def median(self) -> float:
        """The middle value."""
        return median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.at_least else self.median <= self.goal

    @property
    def sign(self) -> str:
        """On which side of the goal the median should be."""
        return "≥" if self.at_least else "≤"


class Lab:
    """Runs the measurements of one call of the program.

    Parameters
    ----------
    repeats : int
        How often each measurement is repeated.
    quick : bool
        Whether everything is tiny and only has to run; two processes then run at a time.
    """

    def __init__(self, repeats: int, *, quick: bool) -> None:
        self.repeats = repeats
        self.quick = quick
        self._folder = tempfile.TemporaryDirectory(prefix="cellimg-benchmark-")
        self._once: dict[str, Results] = {}
        self._processes: SimpleQueue[OneProcess] = SimpleQueue()
        for _ in range(_AT_A_TIME if quick else 0):
            self._processes.put(OneProcess())
        self.stored_ratio: float | None = None
        """Bytes over stored bytes of the zarr input, once it was written."""

    def close(self) -> None:
        """Remove the inputs, and end the processes of a quick run."""
        while not self._processes.empty():
            self._processes.get().close()
        self._folder.cleanup()

    def measure(self, cases: dict[str, Case], repeats: int | None = None) -> Results:
        """Run each case ``repeats`` times, in turns, each time in a fresh process.

        Every round begins with another case, so that none always follows the same one.
        """
        rounds = self.repeats if repeats is None else min(repeats, self.repeats)
        names = list(cases)
        order = [
            (turn, names[(turn + shift) % len(names)])
            for turn in range(rounds)
            for shift in range(len(names))
        ]

        def one(job: tuple[int, str]) -> dict[str, Any]:
            turn, name = job
            print(f"… {name} ({turn + 1} of {rounds})", file=sys.stderr, flush=True)
            return self._measured(*cases[name])

        with ThreadPoolExecutor(_AT_A_TIME if self.quick else 1) as pool:
            done = list(pool.map(one, order))
        results: Results = {name: [] for name in names}
        for (_, name), result in zip(order, done, strict=True):
            results[name].append(result)
        return results

    def _measured(self, case: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if not self.quick:
            return in_fresh_process(case, arguments)
        process = self._processes.get()
        try:
            return process.measure(case, arguments)
        finally:
            self._processes.put(process)

    def once(self, name: str, measure: Callable[[], Results]) -> Results:
        """Return what was measured under this name, which several rows share."""
        if name not in self._once:
            self._once[name] = measure()
        return self._once[name]

    def runs(self, function: str, source: str) -> Results:
        """Compute a whole image with each method; checked to be equal voxel by voxel."""
        return self.once(f"{function}, {source}", lambda: self._runs(function, source))

    def _runs(self, function: str, source: str) -> Results:
        arguments: dict[str, Any] = {
            "function": function,
            "cell": 16 if self.quick else 64,
            "size": 64 if self.quick else 512,
        }
        if source == "zarr":
            arguments |= {"zarr": self.zarr_folder(), "cache_mib": 256}
        methods = ["bare", "cells", "cells_kept", "map_overlap"]
        if source == "zarr":
            methods.remove("cells_kept")
        results = self.measure(
            {
                f"{function}, {source}: {method}": ("run", {"method": method, **arguments})
                for method in methods
            }
        )
        results = dict(zip(methods, results.values(), strict=True))
        (expected,) = {result["digest"] for result in results["bare"]}
        for method in methods:
            if any(result["digest"] != expected for result in results[method]):
                raise MeasurementError(f"{function}, {source}: {method} differs from the bare loop")
        return results

    def zarr_folder(self) -> str:
        """Return the folder of the zarr inputs, written when first asked for."""
        folder = Path(self._folder.name, "inputs")
        if self.stored_ratio is None:
            size, chunk = (64, 16) if self.quick else (512, 64)
            written = self._measured(
                "write_inputs", {"zarr": str(folder), "size": size, "chunk": chunk}
            )
            self.stored_ratio = written["ratio"]
        return str(folder)


def column(results: list[dict[str, Any]], name: str) -> list[float]:
    """Return one number of each repetition."""
    return [result[name] for result in results]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the quotients of values that were measured in the same round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def number(value: float) -> str:
    """Return three digits, or all of those before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
