"""``cellimg serve`` and ``cellimg view``: files, stores and specs, seen while they are computed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import click

import cellimg_dask as ci
from cellimg_dask.cli.require import require

__all__ = ["look_at", "serve", "view"]


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what both commands take."""
    for option in (
        click.argument("images", nargs=-1, required=True, metavar="IMAGE..."),
        click.option(
            "--labels",
            "labels",
            multiple=True,
            metavar="NAME",
            help="Show this layer as labels of objects; may be repeated.",
        ),
        click.option(
            "--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one."
        ),
    ):
        command = option(command)
    return command


@click.command()
@_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--token", help="First part of all addresses.  [default: a new random one]")
@click.option(
    "--no-token", is_flag=True, help="Serve whoever can reach the port; on this machine only."
)
@click.option(
    "--compression", type=click.Choice(["zstd", "gzip"]), help="Compress chunks.  [default: no]"
)
def serve(
    images: tuple[str, ...],
    labels: tuple[str, ...],
    port: int,
    host: str,
    token: str | None,
    *,
    no_token: bool,
    compression: Literal["zstd", "gzip"] | None,
) -> None:
    """Serve each IMAGE over HTTP as OME-Zarr, computed cell by cell while it is read.

    IMAGE is a file, store or URL that can be opened (see cellimg info), NAME=FILE to call it
    something else, or a spec, whose images and labels are computed as they are looked at.

    Prints the address of each layer and serves until it is interrupted.
    """
    if no_token and token is not None:
        raise click.UsageError("--token and --no-token contradict one another")
    require("uvicorn", "view")
    with _layers(images, labels) as layers:
        secret = None if no_token else token or "random"
        try:
            server = ci.serve(layers, host=host, port=port, token=secret, compression=compression)
        except PermissionError as error:
            if error.errno is not None:
                # Of the operating system, for instance because of the port.
                raise click.ClickException(str(error)) from error
            raise click.ClickException(
                f"{host} can be reached by other machines, and what is sent is not encrypted: "
                f"whoever finds the address reads all layers. Leave out --host (reached from "
                f"elsewhere by ssh -L), or choose a token yourself: --token NAME"
            ) from error
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        with server:
            for name in server.layers:
                click.echo(f"{name}  {server.url}/{quote(name)}")
            click.echo(f"status  {server.url}/@status")
            _until_interrupted()


@click.command()
@_options
@click.option(
    "--screenshot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Save a picture once all is there, and end; needs chromium.",
)
@click.option("--no-browser", is_flag=True, help="Print the address and open no browser.")
def view(
    images: tuple[str, ...],
    labels: tuple[str, ...],
    port: int,
    screenshot: Path | None,
    *,
    no_browser: bool,
) -> None:
    """Look at each IMAGE in the browser, in neuroglancer, while it is computed.

    IMAGE is as for cellimg serve. Prints the address, opens it, and serves until it is
    interrupted.
    """
    require("neuroglancer", "view")
    require("uvicorn", "view")
    with _layers(images, labels) as layers:
        try:
            viewer = ci.view(layers, port=port)
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        with viewer:
            if screenshot is not None:
                try:
                    viewer.screenshot(screenshot)
                except (OSError, RuntimeError, TimeoutError) as error:
                    raise click.ClickException(str(error)) from error
                click.echo(f"saved {screenshot}")
                return
            _show(viewer, open_browser=not no_browser)


def look_at(layers: Mapping[str, Any], *, open_browser: bool) -> None:
    """Show layers in the browser until that is interrupted."""
    try:
        viewer = ci.view(layers)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    with viewer:
        _show(viewer, open_browser=open_browser)


def _show(viewer: ci.View, *, open_browser: bool) -> None:
    click.echo(f"data  {viewer.server.url}")
    click.echo(f"look  {viewer.url}  (until Ctrl-C)")
    if open_browser:
        viewer.open_browser()
    _until_interrupted()


def _until_interrupted() -> None:
    """Wait for Ctrl-C or the end that a service manager asks for."""
    over = threading.Event()

    def end(number: int, frame: object) -> None:
        over.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # In pieces: on Windows a wait cannot be interrupted.
        while not over.wait(0.5):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _layers(images: Sequence[str], labels: Sequence[str]) -> Iterator[dict[str, ci.Layer]]:
    """Open what is to be shown, by the names of layers."""
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        as_labels = set(labels)
        for given in images:
            for name, image, is_labels in _opened(given, stack):
                if name in found:
                    raise click.UsageError(
                        f"two layers are called {name}; give another name: NAME={given}"
                    )
                found[name] = image
                if is_labels:
                    as_labels.add(name)
        for name in labels:
            if name not in found:
                raise click.UsageError(f"--labels {name}: the layers are {', '.join(found)}")
        layers = {}
        for name, image in found.items():
            try:
                layers[name] = ci.Layer(image, kind="labels" if name in as_labels else None)
            except (TypeError, ValueError) as error:
                raise click.ClickException(f"{name}: {error}") from error
        yield layers


def _opened(given: str, stack: ExitStack) -> Iterator[tuple[str, Any, bool]]:
    """Yield the images behind an argument: name, image, and whether it is known to be labels."""
    name, has_name, path = given.partition("=")
    if not has_name or "/" in name or "." in name:
        name, path = "", given
    if path.endswith((".yaml", ".yml")):
        if name:
            raise click.UsageError(f"{given}: the layers of a spec are called as its stages are")
        for stage, made in _of_spec(Path(path), stack):
            yield stage, made, False
        return
    try:
        image = stack.enter_context(ci.open_image(path))
    except (OSError, ValueError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    name = name or _stem(path)
    yield name, image, False
    axis = image.space.channel_axis
    numbers = range(0 if axis is None else image.shape[axis])
    # Channels are layers of the viewer as well, called by their labels or numbers.
    channels = {*map(str, numbers), *(channel.label.strip() for channel in image.channels)}
    for label, stored in image.labels.items():
        yield f"{name} labels {label}" if label in channels else f"{name} {label}", stored, True


def _stem(path: str) -> str:
    stem = path.rstrip("/").rpartition("/")[2].partition(".")[0]
    return stem or "image"


def _of_spec(path: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    from cellimg_dask.cli.spec_file import read_spec

    spec = read_spec(path)
    from cellimg_dask.cli.stages import Stages

    stages = stack.enter_context(Stages(spec, path.parent, lazy=True))
    try:
        for name, stage in spec.stages.items():
            if stage.makes == "image":
                yield name or _stem(str(path)), stages.make(name)
    except (ci.CellimgError, OSError, TypeError, ValueError) as error:
        raise click.ClickException(f"{path}: {error}") from error
