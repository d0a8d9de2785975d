"""The rows of the table of objects: what is measured for each, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from benchmarks.harness import MeasurementError
from benchmarks.lab import Case, Lab, Line, Results, column, ratios

TITLES = {
    "scipy": "scipy.ndimage.label, whole image",
    "cc3d": "cc3d, whole image",
    "cells": "cellimg label",
    "cells_past": "cellimg label, result not kept",
    "dask_image": "dask-image label",
}
PACKAGES = {"cc3d": "cc3d", "dask_image": "dask_image"}


def large_cells(lab: Lab) -> Iterator[Line]:
    yield from _components(lab, "a", 64 if lab.quick else 512, 16 if lab.quick else 64)


def many_cells(lab: Lab) -> Iterator[Line]:
    yield from _components(lab, "b", 64 if lab.quick else 512, 8 if lab.quick else 32)


def _components(lab: Lab, row: str, size: int, cell: int) -> Iterator[Line]:
    methods = [name for name in ("scipy", "cc3d", "cells", "cells_past") if _is_there(name)]
    results = _measured(lab, methods, size, cell)
    cells = (size // cell) ** 3
    yield Line(row, f"components of {size}³ in {cells:,} cells of {cell}³", "", ())
    for method in methods:
        yield Line(row, TITLES[method], "s", column(results[method], "seconds"))
    for method in ("cells", "cells_past"):
        quotients = ratios(column(results[method], "seconds"), column(results["scipy"], "seconds"))
        # For cells of a usual size; tiny ones are what an overhead per cell is seen by.
        goal = 2.0 if (row, method) == ("a", "cells") else None
        yield Line(row, f"  {TITLES[method]} / SciPy", "×", quotients, goal)
    for method in methods:
        peak = column(results[method], "peak_mib")
        yield Line(row, f"  {TITLES[method]}: memory beyond mask and result", "MiB", peak)
    (graph,) = lab.measure(
        {f"graph of {cells:,} cells": ("label_graph", {"size": size, "cell": cell})}, repeats=1
    ).values()
    yield Line(row, "  tasks per cell", "", column(graph, "tasks_per_cell"), 4.0)
    yield Line(row, "  building the graph", "ms", column(graph, "build_ms"))


def beside_dask_image(lab: Lab) -> Iterator[Line]:
    if not _is_there("dask_image"):
        yield Line("c", "dask-image is not installed", "", ())
        return
    for size in (32,) if lab.quick else (128, 256):
        cell = 16 if lab.quick else 64
        results = _measured(lab, ["cells", "dask_image"], size, cell, repeats=1)
        yield Line("c", f"{size}³ in {(size // cell) ** 3} cells of {cell}³", "", ())
        yield Line("c", "  dask-image: tasks per cell", "", column(results["dask_image"], "tasks"))
        yield Line(
            "c", "  dask-image: building the graph", "s", column(results["dask_image"], "build")
        )
        for method in ("dask_image", "cells"):
            yield Line("c", f"  {TITLES[method]}", "s", column(results[method], "seconds"))
            yield Line("c", "    memory", "MiB", column(results[method], "peak_mib"))


def bounded(lab: Lab) -> Iterator[Line]:
    cell, sizes = (8, (32, 64)) if lab.quick else (64, (512, 1024))
    cases: dict[str, Case] = {
        f"{size}³ into zarr": (
            "label_into_zarr",
            {"size": size, "cell": cell, "cache_mib": 1 if lab.quick else 256},
        )
        for size in sizes
    }
    results = lab.measure(cases, repeats=1)
    for size, name in zip(sizes, results, strict=True):
        cells = (size // cell) ** 3
        yield Line(
            "d", f"lazy mask to zarr, {cells:,} cells", "s", column(results[name], "seconds")
        )
        yield Line("d", "  memory beyond the imports", "MiB", column(results[name], "peak_mib"))
    small, large = (column(results[name], "peak_mib") for name in results)
    yield Line("d", "  8 × the cells / 1 ×", "×", ratios(large, small), 1.5)


def _measured(
    lab: Lab, methods: list[str], size: int, cell: int, repeats: int | None = None
) -> Results:
    cases: dict[str, Case] = {
        f"{method}, {size}³ in {cell}³": (
            "components",
            {"method": method, "size": size, "cell": cell},
        )
        for method in methods
    }
    results = lab.measure(cases, repeats)
    found = {n for name in results for n in column(results[name], "objects")}
    if len(found) != 1:
        raise MeasurementError(f"not all methods find the same number of objects: {results}")
    return dict(zip(methods, results.values(), strict=True))


def _is_there(method: str) -> bool:
    return method not in PACKAGES or find_spec(PACKAGES[method]) is not None


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {
    "a": large_cells,
    "b": many_cells,
    "c": beside_dask_image,
    "d": bounded,
}
