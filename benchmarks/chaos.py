"""Show what becomes of batch runs whose workers or client are killed all the time.

Blocks of 50 ms run on a LocalCluster of 3 workers with nannies. A run that ends with an error is
resumed, on the same workers if there are any left. "Begun" counts the calls of the block
function, "after commit" those of blocks that had a marker already; goals: all blocks are
committed, none is computed after its commit, the array is right, no temporary file is left.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.harness import MeasurementError, in_fresh_process, machine

ROWS = [
    ("no fault", 1000.0),
    ("SIGKILL", 4.0),
    ("SIGKILL", 12.0),
    ("SIGKILL", 2.0),
    ("sys.exit in a block", 4.0),
    ("sys.exit in the worker", 4.0),
    ("segfault in a block", 4.0),
    ("segfault in a block", 10.0),
    ("retirement", 10.0),
    ("retirement", 2.0),
]
COLUMNS = ("seconds", "faults", "begun", "committed", "after commit", "right", "left behind")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--blocks", type=int, default=500)
    parser.add_argument("--block-s", type=float, default=0.05, help="seconds of a block")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    size = {"count": options.blocks, "block_s": options.block_s}
    cases = [
        (f"{fault} every {every_s:g} s", "with_faults", {"fault": fault, "every_s": every_s})
        if fault != "no fault"
        else (fault, "with_faults", {"fault": "SIGKILL", "every_s": every_s})
        for fault, every_s in ROWS
    ]
    cases.append(("kill -9 of client and scheduler, 3 times", "killed_client", {"times": 3}))
    width = max(len(name) for name, _, _ in cases)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print("  ".join(["fault".ljust(width), *COLUMNS, "how its runs ended"]))
    status = 0
    for name, case, arguments in cases:
        if options.only not in name:
            continue
        try:
            found = in_fresh_process(case, arguments | size)
        except MeasurementError as error:
            print(name.ljust(width), error, flush=True)
            status = 1
            continue
        found["seconds"] = f"{found['seconds']:.1f}"
        found["right"] = "yes" if found["right"] else "NO"
        values = [str(found[column]).rjust(len(column)) for column in COLUMNS]
        print("  ".join([name.ljust(width), *values, "; ".join(found["ends"])]), flush=True)
        if found["committed"] != options.blocks or found["after commit"] or found["right"] == "NO":
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(_main())
