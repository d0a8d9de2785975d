"""The rows of the table: what is measured for each, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.harness import CORES, HALO, MIB
from benchmarks.lab import Case, Lab, Line, column, number, ratios

TITLES = {
    "bare": "bare loop",
    "cells": "cellimg, cells not kept",
    "cells_kept": "cellimg, default cache",
    "map_overlap": "map_overlap",
}


def gaussian(lab: Lab) -> Iterator[Line]:
    yield from _run_lines(lab, "a", "gaussian", "numpy", goal=1.05)


def copy(lab: Lab) -> Iterator[Line]:
    yield from _run_lines(lab, "b", "copy", "numpy", goal=1.3)


def from_zarr(lab: Lab) -> Iterator[Line]:
    yield from _run_lines(lab, "c", "gaussian", "zarr", goal=0.38)
    runs = lab.runs("gaussian", "zarr")
    quotient = ratios(column(runs["cells"], "seconds"), column(runs["map_overlap"], "seconds"))
    yield Line("c", "  cellimg / map_overlap", "×", quotient, goal=1.0)


def _run_lines(lab: Lab, row: str, function: str, source: str, goal: float) -> Iterator[Line]:
    runs = lab.runs(function, source)
    bare = column(runs["bare"], "seconds")
    kind = f"{function}, {'NumPy' if source == 'numpy' else source} → NumPy"
    for method, results in runs.items():
        yield Line(row, f"{kind}: {TITLES[method]}", "s", column(results, "seconds"))
    for method, results in runs.items():
        if method != "bare":
            quotient = ratios(column(results, "seconds"), bare)
            name = f"  {TITLES[method]} / bare loop"
            yield Line(row, name, "×", quotient, goal if method == "cells" else None)


def memory(lab: Lab) -> Iterator[Line]:
    # A worker holds the filter's result with its halo; where the input is a store also the padded
    # input, put together from chunks, and a chunk with its decoder's buffer. Twice that, since
    # the memory allocator gives back late, and SciPy works in lines of float64.
    cell = 16 if lab.quick else 64
    padded, chunk = (cell + 2 * HALO) ** 3 * 4, cell**3 * 4
    cache, blocks = 256 * MIB, f"{cell + 2 * HALO}³ + {cell}³"
    bounds = {
        "numpy": (2 * CORES * padded, f"{CORES} workers × {cell + 2 * HALO}³ × 4 bytes × 2"),
        "zarr": (
            cache + 2 * CORES * 2 * (padded + chunk),
            f"{cache // MIB} MiB of chunks + {CORES} workers × 2 × ({blocks}) × 4 bytes × 2",
        ),
    }
    for source, (bound, formula) in bounds.items():
        for method, results in lab.runs("gaussian", source).items():
            name = f"peak beyond input and output, {source}: {TITLES[method]}"
            goal = bound / MIB if method == "cells" else None
            yield Line("d", name, "MiB", column(results, "peak_mib"), goal)
        yield Line("d", f"  goal: {formula}", "", ())


def warm(lab: Lab) -> Iterator[Line]:
    size, cell, times = (64, 8, 10) if lab.quick else (512, 64, 200)
    few, many = (8, 16) if lab.quick else (8, 64)
    plane: dict[str, Case] = {
        f"warm plane {dtype}": (
            "warm_plane",
            {"size": size, "cell": cell, "dtype": dtype, "times": times},
        )
        for dtype in ("float32", "uint8")
    }
    crowd: dict[str, Case] = {
        f"warm, {count**3} cells": ("warm_many", {"cells_per_axis": count, "times": times})
        for count in (few, many)
    }
    results = lab.measure(plane | crowd)
    single, byte, small, large = results.values()
    yield Line("e", "warm cell, img.load(i)", "µs", column(single, "load_us"), goal=2)
    name = f"warm plane of {single[0]['cells']} cells, img[z], {size}²"
    yield Line("e", f"{name} float32", "ms", column(single, "plane_ms"), goal=0.15)
    yield from _beside(single)
    yield Line("e", f"{name} uint8", "ms", column(byte, "plane_ms"), goal=0.15)
    yield from _beside(byte)
    yield Line("e", f"warm cell of {few**3:,}", "µs", column(small, "load_us"), goal=2)
    yield Line("e", f"warm cell of {many**3:,}", "µs", column(large, "load_us"), goal=2)
    yield Line("e", "  all of them in random order", "µs", column(large, "load_any_us"), goal=2)
    yield _flat("  cell, many / few", large, small, "load_us")
    yield Line("e", f"64 tiny cells of {few**3:,}", "µs", column(small, "region_us"))
    yield Line("e", f"64 tiny cells of {many**3:,}", "µs", column(large, "region_us"))
    yield _flat("  64 cells, many / few", large, small, "region_us")


def _beside(results: list[dict[str, float]]) -> Iterator[Line]:
    if "tensorstore_ms" in results[0]:
        yield Line("e", "  tensorstore's pool", "ms", column(results, "tensorstore_ms"))
    yield Line("e", "  NumPy's copy of that plane", "ms", column(results, "numpy_ms"))


def _flat(name: str, large: list[dict[str, float]], small: list[dict[str, float]], of: str) -> Line:
    # Nothing grows with the cells; what is left is the processor's own caches, and noise.
    return Line("e", name, "×", ratios(column(large, of), column(small, of)), goal=1.25)


def overhead(lab: Lab) -> Iterator[Line]:
    names = {
        "cells": "cells not kept",
        "cells_kept": "cells kept in the cache",
        "cells_halo": "cells not kept, halo 1",
        "map_blocks": "dask.threaded, map_blocks",
        "map_overlap": "dask.threaded, map_overlap depth 1",
    }
    grids = {"map_blocks": (50, 100), "map_overlap": (40, 50)}
    cases: dict[str, Case] = {}
    for method in names:
        rows, columns = (5, 10) if lab.quick else grids.get(method, (100, 200))
        times = 1 if method in grids else 3
        arguments = {"method": method, "rows": rows, "columns": columns, "times": times}
        cases[f"overhead: {method}"] = ("overhead", arguments)
    results = lab.measure(cases)
    for (method, name), found, (_, used) in zip(
        names.items(), results.values(), cases.values(), strict=True
    ):
        count = used["rows"] * used["columns"]
        yield Line(
            "f",
            f"overhead per cell, {count:,} cells: {name}",
            "µs",
            column(found, "overhead_us"),
            None if method in grids else 25,
        )
    alone = column(results["overhead: cells"], "function_us")
    yield Line("f", "  the function alone", "µs", alone)


def lazy_grid(lab: Lab) -> Iterator[Line]:
    cell = 8 if lab.quick else 64
    counts = (4, 8, 2000) if lab.quick else (8, 64, 2000)
    results = lab.measure(
        {
            f"first read: {method}, {count**3} cells": (
                "first_read",
                {"method": method, "cells_per_axis": count, "cell": cell},
            )
            for method in ("cells", "cells_dask")
            for count in counts
        }
    )
    for method, title in (("cells", "cellimg"), ("cells_dask", "cellimg through dask")):
        found = {count: results[f"first read: {method}, {count**3} cells"] for count in counts}
        whole = {}
        for count, measured in found.items():
            steps = [column(measured, f"{step}_ms") for step in ("construct", "repr", "read")]
            whole[count] = [sum(values) for values in zip(*steps, strict=True)]
            name = f"{title}, {count**3:,} cells"
            if method == "cells":
                for step, values in zip(
                    ("construct", "repr", f"first {cell}³"), steps, strict=True
                ):
                    yield Line("g", f"{name}: {step}", "ms", values)
            else:
                yield Line("g", f"{name}: all three", "ms", whole[count])
        for count in counts[1:]:
            name = f"  all three, {count**3:,} / {counts[0] ** 3:,} cells"
            # Through dask an axis of thousands of chunks is a tuple of thousands of sizes.
            goal = 1.5 if method == "cells" or count == counts[1] else None
            yield Line("g", name, "×", ratios(whole[count], whole[counts[0]]), goal)
    for count in (4, 5) if lab.quick else (8, 32):
        arguments = {"method": "map_overlap", "cells_per_axis": count, "cell": cell}
        name = f"map_overlap, {count**3:,} cells: all three"
        (once,) = lab.measure({name: ("first_read", arguments)}, repeats=1)[name]
        yield Line("g", name, "ms", [sum(once.values())])


def graph(lab: Lab) -> Iterator[Line]:
    grids = [(5, 5, 5), (8, 8, 8)] if lab.quick else [(10,) * 3, (100, 100, 10), (100,) * 3]
    times = 2 if lab.quick else 20
    cases: dict[str, Case] = {
        f"graph: {grid[0] * grid[1] * grid[2]:,} cells": (
            "graph",
            {"method": "cells", "grid_shape": grid, "times": times},
        )
        for grid in grids
    }
    arguments = {"method": "map_overlap", "grid_shape": grids[0], "times": 1}
    memory: Case = ("graph_of_array", {"size": 64 if lab.quick else 512})
    results = lab.measure(
        {**cases, "graph: map_overlap": ("graph", arguments), "graph: of an array": memory}
    )
    beside, hashed = results.pop("graph: map_overlap"), results.pop("graph: of an array")
    sizes = [name.removeprefix("graph: ") for name in results]
    smallest, largest = next(iter(results.values())), list(results.values())[-1]
    for size, found in zip(sizes, results.values(), strict=True):
        yield Line("h", f"to_dask(), {size}", "ms", column(found, "build_ms"), goal=5)
    yield Line("h", f"  map_overlap, {sizes[0]}", "ms", column(beside, "build_ms"))
    name = f"to_dask(), NumPy input of {number(hashed[0]['mib'])} MiB, hashed for the keys"
    yield Line("h", name, "ms", column(hashed, "build_ms"))
    yield Line("h", "  da.from_array of it", "ms", column(hashed, "from_array_ms"))
    for size, found in zip(sizes, results.values(), strict=True):
        tasks = column(found, "region_tasks")
        yield Line("h", f"tasks per cell, region of 64 of {size}", "", tasks, goal=1)
    yield Line("h", f"  map_overlap, {sizes[0]}", "", column(beside, "region_tasks"))
    yield Line("h", f"tasks per cell, whole of {sizes[0]}", "", column(smallest, "whole_tasks"), 1)
    yield Line("h", f"  map_overlap, {sizes[0]}", "", column(beside, "whole_tasks"))
    for size, found in zip(sizes, results.values(), strict=True):
        yield Line("h", f"pickled graph, {size}", "kB", _kilo(found, "graph_bytes"))
    growth = ratios(_kilo(largest, "graph_bytes"), _kilo(smallest, "graph_bytes"))
    yield Line("h", f"  {sizes[-1]} / {sizes[0]}", "×", growth, goal=1.1)
    yield Line("h", f"  map_overlap, {sizes[0]}", "kB", _kilo(beside, "graph_bytes"))
    for size, found in zip(sizes, results.values(), strict=True):
        yield Line("h", f"sent for a region of 64 of {size}", "kB", _kilo(found, "region_bytes"))
    for size, found in zip(sizes, results.values(), strict=True):
        name = f"sent for all {size} (dask's list of their keys)"
        yield Line("h", name, "kB", _kilo(found, "whole_bytes"))
    for size, found in zip(sizes, results.values(), strict=True):
        yield Line(
            "h", f"calls of the function before compute, {size}", "", column(found, "calls"), 0
        )


def _kilo(results: list[dict[str, float]], name: str) -> list[float]:
    return [value / 1000 for value in column(results, name)]


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {
    "a": gaussian,
    "b": copy,
    "c": from_zarr,
    "d": memory,
    "e": warm,
    "f": overhead,
    "g": lazy_grid,
    "h": graph,
}
"""By the letter that ``--only`` takes."""
