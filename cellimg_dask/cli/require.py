"""Importing the packages of the extras, with a message that says which extra has them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """Return an optional module.

    Parameters
    ----------
    module : str
        Name to import.
    extra : str
        The extra of this package that installs it.

    Raises
    ------
    click.ClickException
        If it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise click.ClickException(
            f"this needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'cellimg-dask[{extra}]'"
        ) from error
