"""Packages that only some formats need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(module: str, what: str) -> Any:
    """Return a module of the extra ``formats``.

    Parameters
    ----------
    module : str
        Name to import.
    what : str
        What needs it, for the message.

    Raises
    ------
    ImportError
        If it cannot be imported; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{what} needs {package}, which cannot be imported ({error}): "
            f"pip install 'cellimg-dask[formats]'",
            name=package,
        ) from error
