"""Packages of the extras, which not everybody has installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(module: str, what: str, extra: str = "formats") -> Any:
    """Return a module of an extra.

    Parameters
    ----------
    module : str
        Name to import.
    what : str
        What needs it, for the message.
    extra : str
        The extra of this package that installs it.

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
            f"pip install 'cellimg-dask[{extra}]'",
            name=package,
        ) from error
