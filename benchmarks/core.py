"""Measure the rows of the design's table that concern cells, and print them beside the goals.

Every measurement runs in a fresh process, in turns with those that it is compared with; the
table shows the median, the smallest and the largest. Ratios are taken within a round. Whole runs
are compared voxel by voxel with the bare loop.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.harness import MeasurementError, machine
from benchmarks.lab import Lab, Line, number
from benchmarks.rows import ROWS


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    began = perf_counter()
    facts = machine()
    lab = Lab(options.repeats, quick=options.quick)
    lines: list[Line] = []
    try:
        for row in options.only:
            lines.extend(ROWS[row](lab))
    except MeasurementError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        lab.close()
    if lab.stored_ratio is not None:
        facts["zarr input"] = f"{lab.stored_ratio:.1f}:1"
    facts["repetitions"] = lab.repeats
    facts["minutes"] = round((perf_counter() - began) / 60, 1)
    print(table(lines, judged=not options.quick))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(lines, facts), indent=1) + "\n")
    return 0


def table(lines: Sequence[Line], *, judged: bool) -> str:
    """Return the lines under their headings, in columns."""
    texts = [["row", "measured", "median", "min – max", "goal", ""]]
    before = None
    for line in lines:
        if line.row != before:
            texts.append([""] * 6)
        texts.append(
            [
                line.row if line.row != before else "",
                line.what,
                f"{number(line.median)} {line.unit}".rstrip() if line.values else "",
                f"{number(min(line.values))} – {number(max(line.values))}" if line.values else "",
                "" if line.goal is None else f"≤ {number(line.goal)}",
                _verdict(line, judged=judged),
            ]
        )
        before = line.row
    widths = [max(map(len, texts_of)) for texts_of in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    )


def _verdict(line: Line, *, judged: bool) -> str:
    if line.reached is None:
        return ""
    if not judged:
        return "not judged"
    return "reached" if line.reached else "not reached"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument(
        "--only", type=_rows, default=list(ROWS), help=f"rows, of {','.join(ROWS)}; default: all"
    )
    parser.add_argument("--repeats", type=int, help="of each measurement; default: 5")
    parser.add_argument("--quick", action="store_true", help="tiny, once, nothing is judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there too")
    options = parser.parse_args(arguments)
    if options.repeats is None:
        options.repeats = 1 if options.quick else 5
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    return options


def _rows(text: str) -> list[str]:
    rows = text.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no row {', '.join(unknown)}; there are {','.join(ROWS)}")
    return rows


def _as_json(lines: Sequence[Line], facts: dict[str, object]) -> dict[str, object]:
    return {
        "facts": facts,
        "lines": [
            {
                "row": line.row,
                "what": line.what.strip(),
                "unit": line.unit,
                "median": line.median,
                "values": list(line.values),
                "goal": line.goal,
                "reached": line.reached,
            }
            for line in lines
            if line.values
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
