"""``cellimg worker``: functions for programs in any language."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click

__all__ = ["worker"]


@click.command()
@click.option("--once", is_flag=True, help="End with the first task: status 0 if it completed.")
@click.option("--init", metavar="CODE", help="Python code that runs first.")
@click.option(
    "--env",
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="A virtual environment that runs the tasks. It needs NumPy only.",
)
def worker(once: bool, init: str | None, env: Path | None) -> None:
    """Run functions for another program, which may be in any language.

    It writes requests to this command's standard input, a line of JSON each, and reads responses
    from its standard output; arrays are in shared memory. What functions print goes to standard
    error. The protocol is that of Appose and a little more: see docs/worker.md.

    The worker ends with its standard input. Exit codes: 0 done, 1 the task of --once did not
    complete, 130 interrupted.
    """
    if env is not None:
        _elsewhere(env, {"once": once, "init": init})
    # Until the worker itself takes care of it: quietly.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cellimg_dask.bare.lines import work

    _call_bare_as_elsewhere()
    sys.exit(work(once=once, init=init))


def _elsewhere(path: Path, options: dict[str, object]) -> None:
    """Become the Python of another environment that does the same."""
    from cellimg_dask.queues.env_program import bare_options
    from cellimg_dask.queues.environments import Env

    if path.is_file() and (path.parents[1] / "pyvenv.cfg").exists():
        # Its Python.
        path = path.parents[1]
    try:
        env = Env.venv(path)
        command = [*env.command(), *bare_options("lines"), json.dumps(options)]
        variables = dict(env.variables())
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if os.name == "nt":
        # There the caller would see this process end.
        sys.exit(subprocess.run(command, env=variables, check=False).returncode)
    os.execvpe(command[0], command, variables)


def _call_bare_as_elsewhere() -> None:
    """Have functions find ``cellimg_worker`` here as in other environments."""
    bare = "cellimg_dask.bare"
    for name, module in list(sys.modules.items()):
        if name == bare or name.startswith(f"{bare}."):
            sys.modules.setdefault(name.replace(bare, "cellimg_worker", 1), module)
