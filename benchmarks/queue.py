"""Measure what block queues cost, on threads, processes and a dask cluster of this machine.

Every measurement runs in a fresh process, in turns with those that it is compared with; the
table shows the median, the smallest and the largest. Ratios are taken within a round. Every
result is compared with NumPy. Bytes that the client sends are those that it writes to its stream
to the scheduler. All of it takes about half an hour.
"""

from __future__ import annotations

import sys

from benchmarks.program import run_program
from benchmarks.queue_rows import ROWS

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.queue", __doc__, ROWS, None))
