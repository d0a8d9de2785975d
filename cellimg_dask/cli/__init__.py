"""The command line: ``cellimg demo``, ``info``, ``view``, ``run``, ``share`` and others.

Floor 6: it may use everything. What a command needs is imported when that command runs, so that
``cellimg --help`` is quick and the packages of the extras stay optional.
"""

from __future__ import annotations

import click

from cellimg_dask.cli.demo import demo
from cellimg_dask.cli.info import info
from cellimg_dask.cli.run import plan, run, status
from cellimg_dask.cli.seeing import serve, view
from cellimg_dask.cli.share import share, shared
from cellimg_dask.cli.worker import worker

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cellimg-dask", prog_name="cellimg")
def main() -> None:
    """Run NumPy functions block by block over images larger than memory, lazily."""


for command in (demo, info, view, serve, run, plan, status, share, shared, worker):
    main.add_command(command)
