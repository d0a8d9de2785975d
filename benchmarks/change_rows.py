"""The rows of the table of requests and changes: what is measured for each, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.harness import MIB, MeasurementError
from benchmarks.lab import Case, Lab, Line, column, ratios

GROWTH = 1.3
"""What grows by less from the smallest to the largest counts as flat."""


def _cached(lab: Lab) -> tuple[int, ...]:
    return (64, 256) if lab.quick else (256, 4096, 65536)


def requests(lab: Lab) -> Iterator[Line]:
    counts = _cached(lab)
    cases: dict[str, Case] = {
        f"requests, {count:,} cells": ("warm_requests", {"cells": count}) for count in counts
    }
    results = lab.measure(cases)
    for asked, title in (("one", "1 cell"), ("many", "64 cells")):
        for count, name in zip(counts, results, strict=True):
            what = f"warm request of {title}, {count:,} cached"
            yield Line("a", what, "µs", column(results[name], f"{asked}_us"))
        first, last = (
            column(results[name], f"{asked}_us") for name in list(results)[:: len(counts) - 1]
        )
        yield Line("a", f"  {counts[-1]:,} / {counts[0]:,}", "×", ratios(last, first), GROWTH)
        name = list(results)[-1]
        yield Line("a", f"  image[…] of {title}", "µs", column(results[name], f"{asked}_read_us"))


def edits(lab: Lab) -> Iterator[Line]:
    counts = _cached(lab)
    cases: dict[str, Case] = {
        f"edits, {count:,} cells": ("one_voxel", {"cells": count}) for count in counts
    }
    results = lab.measure(cases)
    for number, title in (
        ("edit_us", "a voxel, edit of a source with two stages"),
        ("seen_us", "  until the new value of the second stage is there"),
        ("computing_us", "  of which the block functions take"),
    ):
        for count, name in zip(counts, results, strict=True):
            yield Line("b", f"{title}, {count:,} cached", "µs", column(results[name], number))
        first, last = (column(results[name], number) for name in list(results)[:: len(counts) - 1])
        goal = None if number == "computing_us" else GROWTH
        yield Line("b", f"  {counts[-1]:,} / {counts[0]:,}", "×", ratios(last, first), goal)


def dependents(lab: Lab) -> Iterator[Line]:
    counts = (1, 10) if lab.quick else (1, 10, 100, 1000)
    for form, title in (("beside", "images of one source"), ("chain", "images in a chain")):
        cases: dict[str, Case] = {
            f"{count} {title}": ("dependents", {"count": count, "form": form}) for count in counts
        }
        results = lab.measure(cases)
        each = {}
        for count, name in zip(counts, results, strict=True):
            microseconds = column(results[name], "edit_us")
            each[count] = [value / count for value in microseconds]
            yield Line("c", f"edit above {count:,} {title}", "µs", microseconds)
        # The cost of the edit itself is in the first ones.
        few, many = counts[-2:]
        yield Line("c", f"  per image, {few:,}", "µs", each[few])
        yield Line("c", f"  per image, {many:,}", "µs", each[many])
        yield Line("c", f"  {many:,} / {few:,}", "×", ratios(each[many], each[few]), GROWTH)


def under_load(lab: Lab) -> Iterator[Line]:
    seconds = 1.0 if lab.quick else 60.0
    case: Case = ("readers_and_editors", {"seconds": seconds})
    (results,) = lab.measure({f"8 threads read, 2 edit, {seconds:g} s": case}, repeats=1).values()
    if any(column(results, "stale")) or any(column(results, "errors")):
        raise MeasurementError(f"a read was stale, or raised: {results}")
    for number, what, unit in (
        ("edits", "edits", ""),
        ("reads", "regions read, all of one edition", ""),
        ("stale", "  of which stale", ""),
        ("errors", "  exceptions", ""),
    ):
        yield Line("d", f"{seconds:g} s: {what}", unit, column(results, number))
    for part in (1, 2, 3, 4):
        grown = [value / MIB for value in column(results, f"grown_{part}")]
        yield Line("d", f"  memory beyond the first second, after {part}/4", "MiB", grown)


def write_back(lab: Lab) -> Iterator[Line]:
    size = 1_000_000 if lab.quick else 20_000_000
    cases: dict[str, Case] = {
        method: ("write_back", {"method": method, "voxels": size}) for method in ("zarr", "source")
    }
    results = lab.measure(cases, repeats=3)
    titles = {"zarr": "zarr-python, chunk by chunk", "source": "Source.empty, cell by cell"}
    for method, title in titles.items():
        what = f"{size:,} float32, cache of two cells: {title}"
        yield Line("e", what, "s", column(results[method], "seconds"))
    quotient = ratios(column(results["source"], "seconds"), column(results["zarr"], "seconds"))
    yield Line("e", "  Source / zarr-python", "×", quotient, 1.2)
    grown = [value / MIB for value in column(results["source"], "grown")]
    yield Line("e", "  memory of the Source", "MiB", grown)


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {
    "a": requests,
    "b": edits,
    "c": dependents,
    "d": under_load,
    "e": write_back,
}
