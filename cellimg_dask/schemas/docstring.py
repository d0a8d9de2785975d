"""What a docstring in NumPy's style says of parameters and results."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["DocEntry", "parsed_docstring"]

_ARRAYS = re.compile(r"array|image|volume|stack|mask|labels", re.IGNORECASE)


@dataclass(frozen=True)
class DocEntry:
    """What stands of one parameter."""

    kind: str
    """Behind the colon; may be empty."""
    text: str
    """Below."""

    @property
    def is_array(self) -> bool:
        """Whether the text behind the colon speaks of an array, or of nothing."""
        return not self.kind or _ARRAYS.search(self.kind) is not None


def parsed_docstring(text: str) -> tuple[str, dict[str, DocEntry], list[DocEntry]]:
    """Return the first sentence, the parameters by name, and the results, of a docstring.

    Parameters
    ----------
    text : str
        As `inspect.getdoc` gives it.
    """
    lines = text.splitlines()
    summary: list[str] = []
    for line in lines:
        if not line.strip():
            break
        summary.append(line.strip())
    parameters: dict[str, DocEntry] = {}
    for heading in ("Parameters", "Other Parameters"):
        for names, entry in _entries(lines, heading):
            parameters |= {name.strip().lstrip("*"): entry for name in names.split(",")}
    results = [
        DocEntry(entry.kind or names, entry.text) for names, entry in _entries(lines, "Returns")
    ]
    return " ".join(summary), parameters, results


def _entries(lines: list[str], heading: str) -> list[tuple[str, DocEntry]]:
    """Return names and what stands of them, for each entry of a section."""
    found: list[tuple[str, str, list[str]]] = []
    for line in _section(lines, heading):
        if line and not line[0].isspace():
            names, _, kind = line.partition(":")
            found.append((names.strip(), kind.strip(), []))
        elif found:
            found[-1][2].append(line.strip())
    return [(names, DocEntry(kind, " ".join(filter(None, below)))) for names, kind, below in found]


def _section(lines: list[str], heading: str) -> list[str]:
    for number in range(len(lines) - 1):
        if lines[number] == heading and _is_rule(lines[number + 1]):
            section = lines[number + 2 :]
            for end in range(len(section) - 1):
                if section[end].strip() and _is_rule(section[end + 1]):
                    return section[:end]
            return section
    return []


def _is_rule(line: str) -> bool:
    return len(line) >= 3 and set(line) == {"-"}
