"""``cellimg share`` and ``cellimg shared``: arrays in shared memory for other processes."""

from __future__ import annotations

import re
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellimg_dask.cli.files import Stored, open_file
from cellimg_dask.cli.sizes import format_bytes

if TYPE_CHECKING:
    from cellimg_dask.image.shared import SharedArray

__all__ = ["share", "shared"]

_LOOK_EVERY_S = 0.5


@click.command()
@click.argument("image", type=click.Path(exists=True, path_type=Path))
@click.option("--name", help="Name of the shared array.  [default: that of the file]")
@click.option("--array", "part", help="Which array of the file; cellimg info lists them.")
@click.option(
    "--replace", is_flag=True, help="Take the name if its owner has ended without removing it."
)
def share(image: Path, name: str | None, part: str | None, replace: bool) -> None:
    """Put IMAGE into shared memory for other Pythons to look at, until Ctrl-C.

    IMAGE is a TIFF, PNG, JPEG, .npy or HDF5 file, or a folder with a zarr array or group. It is
    read piece by piece. The lines that are shown open it in any Python of this machine that has
    NumPy, without a copy: all see what one writes.
    """
    import cellimg_dask as ci

    with _ending() as ended:
        with open_file(image) as arrays:
            stored = _chosen(image, arrays, part)
            chosen = name or _name_of(image)
            axes = stored.axes if stored.axes and len({*stored.axes}) == len(stored.axes) else None
            try:
                made = ci.shared.put(chosen, stored.read(), axes, replace=replace, progress=chosen)
            except FileExistsError as error:
                raise click.ClickException(
                    f"{error}. Give another one: --name NAME, or free it: cellimg shared rm "
                    f"{chosen}"
                ) from error
            except (MemoryError, ValueError, TypeError) as error:
                raise click.ClickException(f"{image} cannot be shared: {error}") from error
        with made:
            ended.is_awaited = True
            _tell(made, image, stored)
            while not ended.wait(_LOOK_EVERY_S):
                if made.is_removed:
                    click.echo("It was removed by another process.")
                    return
        click.echo("Removed.")


@click.group()
def shared() -> None:
    """List and remove what is in shared memory."""


@shared.command("ls")
def list_shared() -> None:
    """List the shared arrays of this machine, with who owns them."""
    import cellimg_dask as ci

    found = ci.shared.list()
    if not found:
        click.echo("Nothing is shared.")
        return
    rows = [("name", "shape", "dtype", "axes", "size", "owner", "alive")]
    for info in found:
        alive = {True: "yes", False: "no", None: "unknown"}[info.is_alive]
        rows.append(
            (
                info.name,
                "damaged" if info.shape is None else str(info.shape),
                "" if info.dtype is None else str(info.dtype),
                ", ".join(info.axes or ()),
                format_bytes(info.nbytes),
                "" if info.owner is None else str(info.owner),
                alive if info.is_ready or info.problem else f"{alive}, filling it",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@shared.command("rm")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--dead", is_flag=True, help="Remove all whose owner has ended.")
def remove_shared(names: Sequence[str], dead: bool) -> None:
    """Remove shared arrays; who has one open keeps what is in it."""
    import cellimg_dask as ci

    if not names and not dead:
        raise click.UsageError("give the names of what to remove, or --dead")
    failed = False
    for name in names:
        try:
            ci.shared.remove(name)
        except (OSError, ValueError) as error:
            click.echo(f"Error: {error}", err=True)
            failed = True
        else:
            click.echo(f"removed {name}")
    for name in ci.shared.cleanup() if dead else ():
        click.echo(f"removed {name}")
    if failed:
        raise click.exceptions.Exit(1)


# ---------------------------------------------------------------------- what to share


def _chosen(image: Path, arrays: Sequence[Stored], part: str | None) -> Stored:
    if part is None:
        # HDF5 often holds numbers and names beside the image.
        return next((array for array in arrays if len(array.shape) > 1), arrays[0])
    for array in arrays:
        if array.name == part:
            return array
    names = ", ".join(array.name for array in arrays if array.name) or "one, which has no name"
    raise click.ClickException(f"{image} has no array {part!r}; it has: {names}")


def _name_of(image: Path) -> str:
    stem = image.resolve().name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem).lstrip("-")[:30] or "image"


# ---------------------------------------------------------------------- what to say


def _tell(made: SharedArray, image: Path, stored: Stored) -> None:
    label = f"{image.name}/{stored.name}" if stored.name else image.name
    axes = "" if made.axes is None else f", axes {', '.join(made.axes)}"
    numpy = made.numpy_line()
    click.echo(
        f"{label} is shared as {made.name}: {made.shape}, {made.dtype}{axes}, "
        f"{format_bytes(made.nbytes)}\n"
        f"\n"
        f"In any Python with NumPy:\n"
        f"  {numpy}\n"
        f"In one that has cellimg_dask:\n"
        f'  import cellimg_dask as ci; a = ci.shared.open("{made.name}")\n'
        f"Or begin one that has it:\n"
        f"  python -i -c {shlex.quote(numpy)}\n"
        f"\n"
        f"Ctrl-C removes it."
    )


@contextmanager
def _ending() -> Iterator[_Ended]:
    """Give an event that is set when this process is told to end, by Ctrl-C or otherwise."""
    ended = _Ended()
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # What is ignored stays so, as by nohup.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, ended.tell)
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(threading.Event):
    """Set by signals; before somebody waits for it they are an exception, as Ctrl-C is."""

    is_awaited = False

    def tell(self, number: int, frame: Any) -> None:
        if not self.is_awaited:
            raise KeyboardInterrupt
        self.set()
