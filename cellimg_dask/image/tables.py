"""Tables as text and as HTML."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

__all__ = ["as_columns", "as_html_table"]


def as_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return a line per row with its columns aligned, those in ``right`` at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if number in right else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def as_html_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    foot: Sequence[str],
    right: Collection[int] = (),
) -> str:
    """Return a table with a line above and one below, columns in ``right`` at the right."""

    def line(tag: str, row: Sequence[str]) -> str:
        cells = (
            f"<{tag} style='text-align:{'right' if number in right else 'left'}'>"
            f"{escape(text)}</{tag}>"
            for number, text in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody>"
        f"<tfoot>{line('th', foot)}</tfoot></table>"
    )
