"""The rows of the table of queues: what is measured for each, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.harness import CORES
from benchmarks.lab import Case, Lab, Line, Results, column, ratios

TINY = {
    "none": "no queue",
    "threads": "BlockQueue threads",
    "processes": "BlockQueue processes",
    "distributed": "BlockQueue distributed",
    "dask threads": "map_blocks, threads",
    "dask processes": "map_blocks, processes",
    "dask distributed": "map_blocks, distributed",
}
BESIDE = {
    "threads": "dask threads",
    "processes": "dask processes",
    "distributed": "dask distributed",
}
"""map_blocks on the same scheduler."""
FORMS = {"keys": "a key per cell", "batches": "in batches", "map": "client.map, one by one"}


def tiny(lab: Lab) -> Iterator[Line]:
    rows, columns = (5, 10) if lab.quick else (100, 100)
    # Repeated within a process where that is quick.
    quick = ("none", "threads", "processes")
    results = _by_method(
        lab,
        "throughput",
        {
            method: {"rows": rows, "columns": columns, "times": 3 if method in quick else 1}
            for method in TINY
        },
    )
    blocks = f"{rows * columns:,} blocks of 16×16 uint8"
    for method, title in TINY.items():
        yield Line("a", f"{blocks}: {title}", "per s", column(results[method], "per_s"))
    for method, title in TINY.items():
        overhead = column(results[method], "overhead_us")
        # As in the table of the cells, where nothing is between the loader and the function.
        goal = 25 if method == "none" else None
        yield Line("a", f"overhead per block: {title}", "µs", overhead, goal)
    for method, beside in BESIDE.items():
        above, below = (column(results[name], "per_s") for name in (beside, method))
        name = f"  time of {TINY[method]} / {TINY[beside]}"
        yield Line("a", name, "×", ratios(above, below), goal=1)


def large(lab: Lab) -> Iterator[Line]:
    mib, count, times = (1, 4, 1) if lab.quick else (64, 8, 3)
    titles = {
        "processes": "BlockQueue processes",
        "executor": "ProcessPoolExecutor, pickled",
        "dask processes": "map_blocks, processes",
        "two copies": f"np.copyto in and out, {CORES} threads",
    }
    arguments = {
        method: {
            "mib": mib,
            # Seconds per block are known after a few.
            "count": count // 2 if method == "dask processes" else count,
            "times": 1 if method == "dask processes" else times,
        }
        for method in titles
    }
    results = _by_method(lab, "large_blocks", arguments)
    for method, title in titles.items():
        yield Line("b", f"copy of {mib} MiB: {title}", "ms", column(results[method], "ms"))
    own = column(results["processes"], "ms")
    for method in ("executor", "dask processes", "two copies"):
        quotient = ratios(own, column(results[method], "ms"))
        goal = None if method == "two copies" else 1
        yield Line("b", f"  BlockQueue / {titles[method]}", "×", quotient, goal)


def client_memory(lab: Lab) -> Iterator[Line]:
    results = _on_cluster(lab)
    held = "held on the workers"
    titles = {
        "keys": f"{FORMS['keys']}, {held}",
        "map": f"{FORMS['map']}, {held}",
        "batches": FORMS["batches"],
        "kept": f"{FORMS['batches']}, kept in the client's cache",
    }
    for form, title in titles.items():
        count = max(found for known, found in results if known == form)
        measured = results[form, count]
        name = f"client beyond the output, {count:,} cells: {title}"
        yield Line("c", name, "MiB", column(measured, "left_mib"))
        yield Line("c", "  at its peak", "MiB", column(measured, "peak_mib"))
        yield Line("c", "  per cell", "bytes", column(measured, "left_each"))


def scheduling(lab: Lab) -> Iterator[Line]:
    results = _on_cluster(lab)

    def lines(what: str, unit: str, value: str) -> Iterator[Line]:
        for form, title in FORMS.items():
            for count in _counts(lab):
                if (form, count) in results:
                    values = column(results[form, count], value)
                    yield Line("d", f"{what}, {count:,}: {title}", unit, values)

    for line in lines("trivial cells", "per s", "per_s"):
        if line.what.endswith(FORMS["batches"]):
            line = Line("d", line.what, line.unit, line.values, goal=20_000, at_least=True)
        yield line
    yield from lines("seconds in submitting", "s", "submit_s")
    yield from lines("sent by the client", "kB", "sent_kb")
    yield from lines("  per cell", "bytes", "sent_each")
    yield from lines("scheduler to workers, per cell", "bytes", "to_workers_each")
    yield from lines("client's processor time per cell", "µs", "client_us")
    yield from lines("scheduler's processor time per cell", "µs", "scheduler_us")
    count = min(_counts(lab))
    for form in ("keys", "batches"):
        measured = results[form, count]
        cells = min(count, 1000)
        name = f"a parameter of 1 MiB for {cells:,} cells, {FORMS[form]}: sent by the client"
        yield Line("d", name, "×", column(measured, "params_sent"), goal=1.1)
        name = f"  by the scheduler to {CORES} workers"
        yield Line("d", name, "×", column(measured, "params_to_workers"), goal=1.1 * CORES)


def python_work(lab: Lab) -> Iterator[Line]:
    titles = {
        "threads": "BlockQueue threads",
        "processes": "BlockQueue processes",
        "dask threads": "map_blocks, threads",
        "dask processes": "map_blocks, processes",
        "executor": "ProcessPoolExecutor",
        "halves": "two processes, one call each",
    }
    works_ms = [1, 2] if lab.quick else [1, 10]
    arguments = {"works_ms": works_ms, "total_ms": 10 if lab.quick else 1000}
    results = _by_method(lab, "python_work", dict.fromkeys(titles, arguments))
    for work_ms in works_ms:
        for method, title in titles.items():
            name = f"efficiency on {CORES} workers, {work_ms} ms of Python: {title}"
            values = column(results[method], f"{work_ms} ms: efficiency")
            yield Line("e", name, "", values)
        for method, title in titles.items():
            name = f"  overhead per block: {title}"
            yield Line("e", name, "µs", column(results[method], f"{work_ms} ms: overhead_us"))
        # Whether the two cores do twice the work of one at all is the machine's matter.
        above, below = (
            column(results[method], f"{work_ms} ms: efficiency")
            for method in ("processes", "halves")
        )
        name = "  BlockQueue processes / two processes, one call each"
        yield Line("e", name, "×", ratios(above, below), goal=0.9, at_least=True)


def _by_method(lab: Lab, case: str, arguments: dict[str, dict[str, object]]) -> Results:
    cases: dict[str, Case] = {
        f"{case}: {method}": (case, {"method": method, **others})
        for method, others in arguments.items()
    }
    return dict(zip(arguments, lab.measure(cases).values(), strict=True))


def _counts(lab: Lab) -> list[int]:
    return [200] if lab.quick else [10_000, 100_000]


def _on_cluster(lab: Lab) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Return what was measured of trivial cells, by form and count."""
    few, *many = _counts(lab)
    groups: list[tuple[dict[str, list[str]], int, int | None]]
    if lab.quick:
        # All in one process: most of their time goes into starting a cluster.
        groups = [({"all": [*FORMS, "kept"]}, few, None)]
    else:
        groups = [({form: [form] for form in FORMS}, few, None)]
        for count in many:
            groups.append(({form: [form] for form in ("batches", "kept")}, count, None))
            # This takes minutes, and client.map longer still.
            groups.append(({"keys": ["keys"]}, count, 1))

    def measure() -> Results:
        found: Results = {}
        for processes, count, repeats in groups:
            cases: dict[str, Case] = {
                f"cluster: {name} {count}": ("on_cluster", {"forms": forms, "count": count})
                for name, forms in processes.items()
            }
            found |= lab.measure(cases, repeats)
        return found

    measured = lab.once("cluster", measure)
    return {
        (form, count): [result[form] for result in measured[f"cluster: {name} {count}"]]
        for processes, count, _ in groups
        for name, forms in processes.items()
        for form in forms
    }


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {
    "a": tiny,
    "b": large,
    "c": client_memory,
    "d": scheduling,
    "e": python_work,
}
"""By the letter that ``--only`` takes."""
