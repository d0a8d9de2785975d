"""Cases about the server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import cellimg_dask as ci
from benchmarks.harness import ROOT, typical_seconds
from cellimg_dask.server.serving import Server, serve

CELL = 64


class Readers:
    """Another process, in which each client has a connection of its own."""

    def __init__(self, server: Server, clients: int) -> None:
        self._prefix = f"/{server.token}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.readers", str(server.port), str(clients)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, shares: list[list[str]]) -> dict[str, Any]:
        """Have each client ask for its share, one after the other."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        paths = [[f"{self._prefix}/{path}" for path in share] for share in shares]
        self._process.stdin.write(json.dumps(paths) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def served(edge: int, clients: int, requests: int) -> dict[str, float]:
    """Ask a server for the chunks of an image of ``edge³`` cells."""
    image = _image(edge)
    each = max(2, requests // clients)
    cold = _cells(edge, seed=1)
    with serve({"it": image}) as server:
        readers = Readers(server, clients)
        warm = [_path(next(cold)) for _ in range(8)]
        readers.ask([warm] * clients)
        metadata = readers.ask([["it/0/zarr.json"] * each] * clients)
        there = readers.ask([[warm[n % 8] for n in range(each)]] * clients)
        num_cold = max(1, min(each, (edge**3 - 8) // clients))
        loads = image.stats().loads
        # Those that are there no more than once.
        shares = [[_path(next(cold)) for _ in range(num_cold)] for _ in range(clients)]
        computed = readers.ask(shares)
        assert image.stats().loads - loads == num_cold * clients
        readers.close()
    return {
        "metadata_ms": 1e3 * median(metadata["seconds"]),
        "warm_ms": 1e3 * median(there["seconds"]),
        "warm_per_s": len(there["seconds"]) / there["whole"],
        "cold_ms": 1e3 * median(computed["seconds"]),
        "cold_per_s": len(computed["seconds"]) / computed["whole"],
    }


def one_cell(clients: int, cells: int) -> dict[str, float]:
    """Have all clients ask for the same cold cell at once, for several cells."""
    image = _image(64)
    cold = _cells(64, seed=2)
    seconds, wrong = [], 0
    with serve({"it": image}) as server:
        readers = Readers(server, clients)
        readers.ask([[_path(next(cold))]] * clients)
        loads = image.stats().loads
        for _ in range(cells):
            found = readers.ask([[_path(next(cold))]] * clients)
            seconds.append(found["whole"])
            wrong += len(set(found["sums"])) != 1
        readers.close()
    return {
        "computations": (image.stats().loads - loads) / cells,
        "ms": 1e3 * median(seconds),
        "wrong": wrong,
    }


def in_process(edge: int) -> dict[str, float]:
    """Read cells in this process, through tensorstore and through the image."""
    import tensorstore

    def read(domain: Any, array: np.ndarray, parameters: Any) -> None:
        position = [low // CELL for low in domain.origin]
        array[...] = np.ravel_multi_index(position, (edge,) * 3) % 251 + 1

    virtual = tensorstore.virtual_chunked(
        read,
        dtype=tensorstore.uint8,
        shape=(edge * CELL,) * 3,
        chunk_layout=tensorstore.ChunkLayout(read_chunk_shape=(CELL,) * 3),
        context=tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 30}}),
    )
    numbers = {}
    for name, array in (("tensorstore", virtual), ("image", _image(edge))):
        cells = _cells(edge, seed=3)

        def get(cell: tuple[int, ...], array: Any = array) -> np.ndarray:
            return np.asarray(array[tuple(slice(n * CELL, (n + 1) * CELL) for n in cell)])

        cold = []
        for _ in range(50):
            cell = next(cells)
            began = perf_counter()
            get(cell)
            cold.append(perf_counter() - began)
        numbers[f"{name}_cold_ms"] = 1e3 * median(cold)
        numbers[f"{name}_warm_ms"] = 1e3 * typical_seconds(partial(get, cell), 200)
    return numbers


def _image(edge: int) -> ci.CellImg:
    def number(block: ci.Block) -> None:
        block.data[...] = block.index % 251 + 1

    return ci.fill_cells(number, ci.CellGrid((edge * CELL,) * 3, CELL), dtype="u1")


def _cells(edge: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Yield positions of cells all over the image, each once."""
    rng = np.random.default_rng(seed)
    seen: set[tuple[int, ...]] = set()
    while True:
        cell = tuple(rng.integers(0, edge, 3).tolist())
        if cell not in seen:
            seen.add(cell)
            yield cell


def _path(cell: tuple[int, ...]) -> str:
    return "it/0/c/" + "/".join(map(str, cell))
