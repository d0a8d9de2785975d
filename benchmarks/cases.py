"""What a fresh process runs: ``python -m benchmarks.cases CASE ARGUMENTS``.

Without arguments it runs one case after the other, as they are asked for in its input.

Each case warms up on a small image, measures once, and gives numbers, printed as JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from typing import Any

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
    "components": "labelling",
    "label_graph": "labelling",
    "label_into_zarr": "labelling",
    "env_start": "environments",
    "tiny_blocks": "environments",
    "one_large_block": "environments",
    "served": "serving",
    "one_cell": "serving",
    "in_process": "serving",
}


def measured(case: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a case."""
    measure = getattr(import_module(f"benchmarks.{MODULES[case]}"), case)
    numbers: dict[str, Any] = measure(**arguments)
    return numbers


def serve() -> None:
    """Run the cases that are asked for, one in each line."""
    # What a case prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = measured(*json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    use_two_cores()
    if len(sys.argv) == 1:
        serve()
    else:
        _, case, arguments = sys.argv
        print(json.dumps(measured(case, json.loads(arguments))))
