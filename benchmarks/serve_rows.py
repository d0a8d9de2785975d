"""The rows of the table of the server: what is measured for each, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.harness import MeasurementError
from benchmarks.lab import Case, Lab, Line, column, ratios

FLAT = 1.3
"""What grows by less from the smallest to the largest counts as flat."""


def _edges(lab: Lab) -> tuple[int, ...]:
    return (4, 2000) if lab.quick else (8, 64, 2000)


def _served(lab: Lab, clients: int) -> dict[int, list[dict[str, float]]]:
    requests = 20 if lab.quick else 400
    cases: dict[str, Case] = {
        f"{clients} clients, {edge**3:,} cells": (
            "served",
            {"edge": edge, "clients": clients, "requests": requests},
        )
        for edge in _edges(lab)
    }
    results = lab.measure(cases)
    return dict(zip(_edges(lab), results.values(), strict=True))


def one_client(lab: Lab) -> Iterator[Line]:
    found = _served(lab, 1)
    for number, title, goal in (
        ("metadata_ms", "metadata", None),
        ("warm_ms", "chunk that is there", 1.0),
        ("cold_ms", "chunk that is computed", None),
    ):
        for edge, results in found.items():
            what = f"{title}, 1 client, {edge**3:,} cells"
            yield Line("a", what, "ms", column(results, number), goal)
        first, last = (column(found[edge], number) for edge in (min(found), max(found)))
        goal = FLAT if number == "warm_ms" else None
        yield Line(
            "a", f"  {max(found) ** 3:,} / {min(found) ** 3:,}", "×", ratios(last, first), goal
        )


def many_clients(lab: Lab) -> Iterator[Line]:
    found = _served(lab, 32)
    for number, title, unit in (
        ("metadata_ms", "metadata", "ms"),
        ("warm_ms", "chunk that is there", "ms"),
        ("warm_per_s", "  chunks per second", ""),
        ("cold_ms", "chunk that is computed", "ms"),
        ("cold_per_s", "  chunks per second", ""),
    ):
        for edge, results in found.items():
            what = f"{title}, 32 clients, {edge**3:,} cells"
            yield Line("b", what, unit, column(results, number))


def one_cell(lab: Lab) -> Iterator[Line]:
    cells = 3 if lab.quick else 50
    case: Case = ("one_cell", {"clients": 32, "cells": cells})
    (results,) = lab.measure({"32 clients ask for the same": case}).values()
    if any(column(results, "wrong")):
        raise MeasurementError(f"readers were told different things: {results}")
    what = f"computations of a cold cell that 32 clients ask for at once, {cells} cells"
    yield Line("c", what, "", column(results, "computations"), 1)
    yield Line("c", "  until the last one has it", "ms", column(results, "ms"))


def in_process(lab: Lab) -> Iterator[Line]:
    cases: dict[str, Case] = {
        f"in process, {edge**3:,} cells": ("in_process", {"edge": edge}) for edge in _edges(lab)
    }
    results = lab.measure(cases)
    for number, title in (
        ("tensorstore_warm_ms", "tensorstore.virtual_chunked in process: cell that is there"),
        ("tensorstore_cold_ms", "tensorstore.virtual_chunked in process: cell that is computed"),
        ("image_warm_ms", "image[…] in process: cell that is there"),
        ("image_cold_ms", "image[…] in process: cell that is computed"),
    ):
        for edge, found in zip(_edges(lab), results.values(), strict=True):
            yield Line("d", f"{title}, {edge**3:,} cells", "ms", column(found, number))


ROWS: dict[str, Callable[[Lab], Iterator[Line]]] = {
    "a": one_client,
    "b": many_clients,
    "c": one_cell,
    "d": in_process,
}
