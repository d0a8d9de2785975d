"""Measure what batch runs cost, into zarr and beside others, and print it beside the goals.

Every measurement runs in a fresh process, in turns with those that it is compared with; the
table shows the median, the smallest and the largest. Ratios are taken within a round. What was
written is compared with the data, filtered images voxel by voxel with the bare loop. Inputs and
outputs lie in the temporary folder, which should be on a disk. All of it takes about 20 minutes.
"""

from __future__ import annotations

import sys

from benchmarks.batch_rows import ROWS
from benchmarks.program import run_program

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.batch", __doc__, ROWS, None))
