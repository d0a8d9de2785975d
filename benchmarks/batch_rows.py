"""The rows of the table of batch runs: what is measured for each, and the goal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence

from benchmarks.harness import MeasurementError
from benchmarks.lab import Case, Lab, Line, Results, column, ratios

WRITERS = {
    "codec": "codec alone, 2 threads",
    "files": "codec and plain files",
    "tensorstore": "tensorstore, a cell at a time",
    "run": "ci.run, function = its input",
    "to_zarr": "da.to_zarr",
    "store": "da.store",
}
FORMS = {"chunks": "a chunk of 64³ per cell", "shards": "a shard of 8 chunks per cell"}
FILTERS = {
    "bare": "bare loop",
    "cells": "cellimg",
    "together": 'cellimg, cells_per_call="auto"',
    "virtual_chunked": "tensorstore.virtual_chunked",
    "map_overlap": "map_overlap",
    "cluster": "cellimg, LocalCluster of 2 processes",
}


def writing(lab: Lab) -> Iterator[Line]:
    for form, title in FORMS.items():
        with tempfile.TemporaryDirectory(prefix="cellimg-benchmark-") as folder:
            shared = {"form": form, "scale": "quick" if lab.quick else "full", "folder": folder}
            cases: dict[str, Case] = {
                f"writing {form}: {method}": ("write", {"method": method, **shared})
                for method in WRITERS
            }
            results = dict(zip(WRITERS, lab.measure(cases).values(), strict=True))
        yield from _lines("a", f"1 GiB, {title}", results, WRITERS, "codec", {"run": 1.2})


def store_to_store(lab: Lab) -> Iterator[Line]:
    methods = ("bare", "cells", "virtual_chunked", "map_overlap")
    yield from _filter_lines(lab, "b", "zarr", "zarr", methods, {"cells": 0.75})


def together(lab: Lab) -> Iterator[Line]:
    for source, target in (("zarr", "zarr"), ("numpy", "zarr"), ("numpy", "numpy")):
        methods = ("bare", "cells", "together")
        yield from _filter_lines(lab, "c", source, target, methods, {"together": 0.7})


def on_cluster(lab: Lab) -> Iterator[Line]:
    yield from _filter_lines(lab, "d", "zarr", "zarr", ("bare", "cluster"), {"cluster": 1.2})


def _filter_lines(
    lab: Lab,
    row: str,
    source: str,
    target: str,
    methods: Sequence[str],
    goals: dict[str, float],
) -> Iterator[Line]:
    size, cell = (64, 16) if lab.quick else (512, 64)
    with tempfile.TemporaryDirectory(prefix="cellimg-benchmark-") as folder:
        shared = {
            "source": source,
            "target": target,
            "size": size,
            "cell": cell,
            "inputs": lab.zarr_folder(),
            "outputs": folder,
        }
        cases: dict[str, Case] = {
            f"{row}, {source} → {target}: {method}": ("filter", {"method": method, **shared})
            for method in methods
        }
        results = dict(zip(methods, lab.measure(cases).values(), strict=True))
    (expected,) = {result["digest"] for result in results["bare"]}
    for method in methods:
        if any(result["digest"] != expected for result in results[method]):
            raise MeasurementError(f"{source} → {target}: {method} differs from the bare loop")
    names = {"numpy": "NumPy", "zarr": "zarr"}
    kind = f"gaussian, {names[source]} → {names[target]}"
    yield from _lines(row, kind, results, FILTERS, "bare", goals)


def _lines(
    row: str,
    kind: str,
    results: Results,
    titles: dict[str, str],
    base: str,
    goals: dict[str, float],
) -> Iterator[Line]:
    for method, found in results.items():
        yield Line(row, f"{kind}: {titles[method]}", "s", column(found, "seconds"))
    for method, found in results.items():
        if method != base:
            quotient = ratios(column(found, "seconds"), column(results[base], "seconds"))
            name = f"  {titles[method]} / {titles[base]}"
            yield Line(row, name, "×", quotient, goals.get(method))
    for method, found in results.items():
        # What others on the machine take away does not count here.
        if method not in (base, "cluster"):
            quotient = ratios(column(found, "cpu_s"), column(results[base], "cpu_s"))
            yield Line(row, f"  {titles[method]} / {titles[base]}, CPU time", "×", quotient)
    for method, found in results.items():
        if method != "cluster":
            yield Line(row, f"  peak memory: {titles[method]}", "MiB", column(found, "peak_mib"))


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {
    "a": writing,
    "b": store_to_store,
    "c": together,
    "d": on_cluster,
}
"""By the letter that ``--only`` takes."""
