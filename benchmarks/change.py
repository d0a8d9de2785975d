"""Measure requests, edits and what they cost the images downstream.

Every measurement runs in a fresh process; the table shows the median, the smallest and the
largest. Row d reads and edits at the same time, from ten threads, and compares every region that
is read with NumPy: a stale voxel or an exception ends the program with an error.
"""

from __future__ import annotations

import sys

from benchmarks.change_rows import ROWS
from benchmarks.program import run_program

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.change", __doc__, ROWS, None))
