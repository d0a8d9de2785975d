"""The bare loop that everything is measured against.

A few threads pull cells, slice the padded region out of the input, call the function and write
into an output made beforehand. Nothing is checked, cached, named or scheduled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np

Slices = tuple[slice, ...]


def bare_loop(
    source: Any,
    function: Callable[[np.ndarray], np.ndarray],
    cell: int,
    halo: int,
    out: np.ndarray,
    num_threads: int = 2,
) -> np.ndarray:
    """Fill ``out`` with ``function`` of ``source``, cell by cell, clipped at the border."""
    jobs = _cells(out.shape, cell, halo)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            padded, crop, target = job
            out[target] = function(source[padded])[crop]

    with ThreadPoolExecutor(num_threads) as pool:
        for running in [pool.submit(work) for _ in range(num_threads)]:
            running.result()
    return out


def _cells(shape: tuple[int, ...], cell: int, halo: int) -> Iterator[tuple[Slices, Slices, Slices]]:
    """Yield (padded region, crop of the result, region of the output) of each cell."""
    for corner in product(*(range(0, extent, cell) for extent in shape)):
        padded, crop, target = [], [], []
        for start, extent in zip(corner, shape, strict=True):
            stop = min(start + cell, extent)
            low = max(start - halo, 0)
            padded.append(slice(low, min(stop + halo, extent)))
            crop.append(slice(start - low, stop - low))
            target.append(slice(start, stop))
        yield tuple(padded), tuple(crop), tuple(target)
