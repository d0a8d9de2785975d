"""Numbers of bytes for people to read."""

from __future__ import annotations

__all__ = ["format_bytes"]

_UNITS = ("PiB", "TiB", "GiB", "MiB", "kiB")


def format_bytes(number: int) -> str:
    """Return a number of bytes with a unit, as dask's function of this name does.

    That one would import dask, which takes longer than what most commands do.

    >>> format_bytes(900), format_bytes(1_000), format_bytes(1_000_000)
    ('900 B', '0.98 kiB', '0.95 MiB')
    """
    for power, unit in zip(range(len(_UNITS), 0, -1), _UNITS, strict=True):
        size = 1024**power
        if number >= 0.9 * size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
