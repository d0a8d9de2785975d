"""What a fresh process runs: ``python -m benchmarks.cases CASE ARGUMENTS``.

Each case warms up on a small image, measures once, and gives numbers, printed as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

from benchmarks.harness import use_two_cores

# Imported one by one: what a case does not need would only make its process start late.
MODULES = {
    "run": "whole",
    "write_inputs": "whole",
    "overhead": "whole",
    "warm_plane": "reading",
    "warm_many": "reading",
    "first_read": "reading",
    "graph": "graphs",
    "graph_of_array": "graphs",
    "throughput": "queues",
    "large_blocks": "queues",
    "python_work": "queues",
    "on_cluster": "clusters",
    "with_faults": "faults",
    "killed_client": "faults",
    "write": "batch_writing",
    "filter": "batch_filtering",
    "warm_requests": "changing",
    "one_voxel": "changing",
    "dependents": "changing",
    "readers_and_editors": "changing",
    "write_back": "changing",
}

if __name__ == "__main__":
    use_two_cores()
    _, case, arguments = sys.argv
    measure = getattr(import_module(f"benchmarks.{MODULES[case]}"), case)
    print(json.dumps(measure(**json.loads(arguments))))
