"""What the programs have in common: their arguments, the table, the values as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.harness import MeasurementError, machine
from benchmarks.lab import Lab, Line, number

Rows = Mapping[str, Callable[[Lab], Iterator[Line]]]
"""What measures each row, by the letter that ``--only`` takes."""


def run_program(name: str, about: str | None, rows: Rows, arguments: Sequence[str] | None) -> int:
    """Measure rows, print them, and return the exit status."""
    options = _options(name, about, rows, arguments)
    began = perf_counter()
    facts = machine()
    lab = Lab(options.repeats, quick=options.quick)
    lines: list[Line] = []
    try:
        for row in options.only:
            lines.extend(rows[row](lab))
    except MeasurementError as error:
        # What was measured before may have taken long.
        print(table(lines, judged=not options.quick))
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
                "" if line.goal is None else f"{line.sign} {number(line.goal)}",
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


def _options(
    name: str, about: str | None, rows: Rows, arguments: Sequence[str] | None
) -> argparse.Namespace:
    def chosen(text: str) -> list[str]:
        letters = text.split(",")
        unknown = [letter for letter in letters if letter not in rows]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"no row {', '.join(unknown)}; there are {','.join(rows)}"
            )
        return letters

    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    parser.add_argument(
        "--only", type=chosen, default=list(rows), help=f"rows, of {','.join(rows)}; default: all"
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
