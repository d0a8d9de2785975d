"""Measure how long a reader of the server waits, for images of few and of very many cells.

Cells are 64³ voxels of a byte, and the block function next to nothing. Readers are another process
on the same machine, with a connection each. The table shows the median, the smallest and the
largest of the repetitions; each of them is the median of many requests.
"""

from __future__ import annotations

import sys

from benchmarks.program import run_program
from benchmarks.serve_rows import ROWS

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.serve", __doc__, ROWS, None))
