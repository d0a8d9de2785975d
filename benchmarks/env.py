"""Measure blocks in another Python: starting it, tiny blocks, and large ones.

Install Appose (the extra ``env``) to see its lines. A large block is compared with copying it
there and back in this process, which is the least that shared memory takes, and with pickles
through a pipe.
"""

from __future__ import annotations

import sys

from benchmarks.env_rows import ROWS
from benchmarks.program import run_program

if __name__ == "__main__":
    sys.exit(run_program("benchmarks.env", __doc__, ROWS, None))
