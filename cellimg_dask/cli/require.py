"""Importing the packages of the extras, with a message that says which extra has them."""

from __future__ import annotations

from typing import Any

import click

from cellimg_dask.io.optional import optional

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
        return optional(module, "this", extra)
    except ImportError as error:
        raise click.ClickException(str(error)) from error
