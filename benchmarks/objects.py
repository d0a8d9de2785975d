"""Measure what it takes to find objects across cells, beside whole-image calls and dask-image.

Every measurement runs in a fresh process; the table shows the median, the smallest and the
largest. All methods have to find the same number of objects, or the program ends with an error.
Install dask-image and connected-components-3d (the extra ``bench``) to see their lines.
"""

from __future__ import annotations

import sys

from benchmarks.object_rows import ROWS
from benchmarks.program import run_program

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.objects", __doc__, ROWS, None))
