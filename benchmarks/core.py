"""Measure the rows of the design's table that concern cells, and print them beside the goals.

Every measurement runs in a fresh process, in turns with those that it is compared with; the
table shows the median, the smallest and the largest. Ratios are taken within a round. Whole runs
are compared voxel by voxel with the bare loop.
"""

from __future__ import annotations

import sys

from benchmarks.program import run_program
from benchmarks.rows import ROWS

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.core", __doc__, ROWS, None))
