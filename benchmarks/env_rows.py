"""The rows of the table of other environments: what is measured for each, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from benchmarks.lab import Case, Lab, Line, column, ratios


def start(lab: Lab) -> Iterator[Line]:
    methods = {"cellimg": "cellimg queue"}
    if find_spec("appose"):
        methods["appose"] = "Appose's own worker"
    cases: dict[str, Case] = {f"start, {name}": ("env_start", {"method": name}) for name in methods}
    results = lab.measure(cases)
    for title, found in zip(methods.values(), results.values(), strict=True):
        yield Line("a", f"{title}: start to the first result", "s", column(found, "seconds"))


def tiny(lab: Lab) -> Iterator[Line]:
    appose = find_spec("appose") is not None
    case: Case = ("tiny_blocks", {"count": 10 if lab.quick else 300, "appose": appose})
    (found,) = lab.measure({"tiny blocks": case}).values()
    yield Line("b", "cellimg: tiny block there and back", "µs", column(found, "block"), 160.0)
    if appose:
        yield Line("b", "Appose's own worker: 1 + 1", "µs", column(found, "appose"))
        yield Line(
            "b", "  cellimg / Appose", "×", ratios(column(found, "block"), column(found, "appose"))
        )


def large(lab: Lab) -> Iterator[Line]:
    mib = 1 if lab.quick else 64
    (found,) = lab.measure({f"{mib} MiB": ("one_large_block", {"mib": mib})}).values()
    floor = column(found, "floor")
    yield Line("c", f"{mib} MiB, copied twice in this process (floor)", "ms", floor)
    titles = {
        "block": "cellimg: block there and back",
        "attached": "cellimg: block of a shared array",
        "pickle": "pickle, pipe",
    }
    for name, title in titles.items():
        yield Line("c", title, "ms", column(found, name))
    yield Line("c", "  cellimg / floor", "×", ratios(column(found, "block"), floor), 3.0)
    yield Line("c", "  of a shared array / floor", "×", ratios(column(found, "attached"), floor))
    yield Line("c", "  pickle / floor", "×", ratios(column(found, "pickle"), floor))


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {"a": start, "b": tiny, "c": large}
