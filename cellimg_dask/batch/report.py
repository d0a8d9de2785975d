"""What a run did."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RunReport"]


@dataclass
class RunReport:
    """What a run did; also saved as ``report.json`` in the folder beside the target."""

    target: str
    """Path or URL of the array."""
    num_cells: int
    """Cells of the image."""
    computed: int = 0
    """Cells that were computed and committed."""
    skipped: int = 0
    """Cells that were done before."""
    redone: dict[str, int] = field(default_factory=dict)
    """Why cells with a marker were computed again: ``"other"`` (another computation made them)
    and ``"damaged"``, with their number."""
    failed: dict[tuple[int, ...], BaseException] = field(default_factory=dict)
    """Position of each cell that could not be computed, and its error."""
    seconds: float = 0.0
    """Wall time."""
    bytes_written: int = 0
    """Stored bytes, compressed."""
    peak_memory: int = 0
    """Most bytes that this process had in memory."""
    passes: list[RunReport] = field(default_factory=list)
    """Of images that had to be there as a whole first. What failed there is in ``failed``, too;
    then no cell of the target was computed."""

    @property
    def ok(self) -> bool:
        """Whether every cell is done."""
        return not self.failed and self.computed + self.skipped == self.num_cells

    def as_dict(self) -> dict[str, Any]:
        """Return the report in JSON's types."""
        return {
            "target": self.target,
            "num_cells": self.num_cells,
            "computed": self.computed,
            "skipped": self.skipped,
            "redone": dict(self.redone),
            "failed": [
                {"position": list(position), "error": f"{type(error).__name__}: {error}"}
                for position, error in sorted(self.failed.items())
            ],
            "seconds": round(self.seconds, 3),
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory,
            "passes": [done.as_dict() for done in self.passes],
        }

    def as_json(self) -> bytes:
        """Return the report as JSON text."""
        return json.dumps(self.as_dict(), indent=1).encode()

    def __str__(self) -> str:
        first = (
            f"{self.computed:,} cells computed, {self.skipped:,} done before, "
            f"{len(self.failed):,} failed of {self.num_cells:,} in {self.seconds:.1f} s; "
            f"{self.bytes_written / (1 << 20):.1f} MiB written to {self.target}"
        )
        lines = [first]
        for done in self.passes:
            lines.append(f"  for which {str(done).partition(chr(10))[0]}")
        for position, error in sorted(self.failed.items())[:10]:
            lines.append(f"  {position}: {type(error).__name__}: {error}")
        if len(self.failed) > 10:
            lines.append(f"  and {len(self.failed) - 10:,} more")
        return "\n".join(lines)
