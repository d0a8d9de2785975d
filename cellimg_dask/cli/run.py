"""``cellimg run``, ``plan`` and ``status``: runs over whole images, described in a file."""

from __future__ import annotations

import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellimg_dask.cli.files import open_file
from cellimg_dask.cli.require import require
from cellimg_dask.cli.sizes import format_bytes

if TYPE_CHECKING:
    from pydantic import ValidationError

    import cellimg_dask as ci
    from cellimg_dask.batch.spec import InputSpec, RunSpec, SlurmSpec
    from cellimg_dask.loading.loader import CellLoader
    from cellimg_dask.loading.memory import Room

__all__ = ["plan", "run", "status"]

FAILED, IN_USE, INTERRUPTED = 3, 4, 130
"""Exit codes: some cells failed; another run works on the target; Ctrl-C."""

_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What goes wrong in a run or in a file that the spec names; told without a traceback."""

_SPEC = click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_SET = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace an entry of the spec, for instance --set halo=4 --set queue.backend=processes.",
)


@click.command()
@_SPEC
@_SET
@click.option("--target", help="Where to write, in place of the spec's.")
@click.option("--overwrite", is_flag=True, help="Replace a target that exists.")
@click.option("--no-progress", is_flag=True, help="Show no bar.")
def run(
    spec: Path, changes: tuple[str, ...], target: str | None, overwrite: bool, no_progress: bool
) -> None:
    """Compute the image that SPEC describes into a zarr array.

    SPEC is a YAML file. Run it again to carry on: what is done is not done again. Exit codes: 0
    done, 1 error, 2 wrong usage or spec, 3 some cells failed, 4 the target is in use, 130
    interrupted.
    """
    import cellimg_dask as ci

    described = _read_spec(spec, changes, target)
    try:
        with _image(described, spec.parent) as image:
            _write_resolved(described, spec.parent, replace=False)
            report = ci.run(
                image,
                _target(described, spec.parent),
                overwrite=overwrite,
                progress=not no_progress,
                **described.run_arguments(),
            )
            _write_resolved(described, spec.parent, replace=True)
    except ci.TargetInUseError as error:
        _end(str(error), IN_USE)
    except KeyboardInterrupt:
        # Not with --overwrite, which would begin anew.
        again = ["cellimg", *(word for word in sys.argv[1:] if word != "--overwrite")]
        _end(f"interrupted; what is done is kept. To carry on:\n  {shlex.join(again)}", INTERRUPTED)
    except _ERRORS as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    click.echo(report)
    if not report.ok:
        sys.exit(FAILED)


@click.command()
@_SPEC
@_SET
def plan(spec: Path, changes: tuple[str, ...]) -> None:
    """Say what a run of SPEC would do; computes nothing and writes nothing."""
    described = _read_spec(spec, changes, None)
    slurm = described.queue.slurm
    try:
        with _image(described, spec.parent, start=False) as image:
            facts = _projected(described, image)
    except _ERRORS as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
    if slurm is not None:
        with _slurm(slurm, start=False) as cluster:
            click.echo(f"\n{cluster.job_script()}")


@click.command()
@click.argument("target")
@click.option("--quick", is_flag=True, help="Compare the sizes of files and not their bytes.")
def status(target: str, quick: bool) -> None:
    """Say which cells of TARGET are done, missing or damaged, and what failed last.

    Exit code 0 if every cell is done, else 3.
    """
    import json

    from cellimg_dask.batch.manifest import Manifest
    from cellimg_dask.batch.target import Target, stored_grid

    manifest = Manifest(target)
    grid = stored_grid(manifest.folder)
    if grid is None:
        raise click.ClickException(f"{target} was not made by a run of this library")
    try:
        stored = Target(target, grid)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot read {target}: {error}") from error
    marked = set(manifest.marked())
    counts = Counter(
        manifest.state(index, None, stored, checksums=not quick) if index in marked else "missing"
        for index in range(grid.num_cells)
    )
    for name in ("done", "missing", "damaged"):
        click.echo(f"{name:<8} {counts[name]:,} of {grid.num_cells:,}")
    report = manifest.folder.read("report.json")
    failed = json.loads(report)["failed"] if report else []
    click.echo(f"{'failed':<8} {len(failed):,} in the last run")
    for entry in failed[:10]:
        click.echo(f"  {tuple(entry['position'])}: {entry['error']}")
    if counts["done"] != grid.num_cells:
        sys.exit(FAILED)


def _end(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)


def _read_spec(path: Path, changes: tuple[str, ...], target: str | None) -> RunSpec:
    yaml: Any = require("yaml", "batch")
    pydantic: Any = require("pydantic", "batch")
    from cellimg_dask.batch.spec import RunSpec

    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise click.UsageError(f"{path} must hold entries such as target: out.zarr")
    for change in changes:
        name, sign, value = change.partition("=")
        if not sign:
            raise click.UsageError(f"--set {change}: give KEY=VALUE")
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"--set {change}: {parent} has no entries")
        try:
            place[last] = _parsed(value)
        except yaml.YAMLError as error:
            raise click.UsageError(f"--set {change}: {value!r} is no YAML: {error}") from error
    if target is not None:
        # As whoever typed it sees it, and not from the spec's folder.
        content["target"] = _absolute(Path(), target)
    try:
        return RunSpec.model_validate(content)
    except pydantic.ValidationError as error:
        lines = [f"  {name}: {text}" for name, text in _mistakes(error, content)]
        raise click.UsageError("\n".join([f"{path} has mistakes:", *lines])) from error


def _mistakes(error: ValidationError, content: Any) -> list[tuple[str, str]]:
    """Return what is wrong with a spec: the entry, and what is expected of it."""
    from cellimg_dask.batch.spec import entries, meaning

    found: dict[str, str] = {}
    for item in error.errors():
        # Down to the entry, and not into the alternatives for its value.
        place, path = content, []
        for part in item["loc"]:
            if part == 0 and not isinstance(place, list):
                # The only input need not be in a list.
                continue
            try:
                place = place[part]
            except (KeyError, IndexError, TypeError):
                if item["type"] in ("missing", "extra_forbidden"):
                    path.append(str(part))
                break
            path.append(str(part))
        name = ".".join(path) or "spec"
        if item["type"] == "missing":
            found[name] = f"is missing: {meaning(path[-1])}"
        elif item["type"] == "extra_forbidden":
            near = get_close_matches(path[-1], entries(), 1)
            found[name] = "no such entry" + (f"; did you mean {near[0]}?" if near else "")
        elif item["type"] == "value_error":
            found[name] = item["msg"].removeprefix("Value error, ")
        elif path[-1:] == [str(item["loc"][-1])] and "Input should be" in item["msg"]:
            found[name] = f"{item['msg'].replace('Input should', 'must')}, got {place!r}"
        else:
            # None of several alternatives fits.
            found[name] = f"cannot be {place!r}: {meaning(path[0])}"
    return list(found.items())


def _parsed(text: str) -> Any:
    """Return what YAML text says; what looks like a date stays text, as JSON would have it."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is not typed
        """As safe, without dates."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, Loader)


def _target(spec: RunSpec, folder: Path) -> str:
    return spec.target if "://" in spec.target else str(folder / spec.target)


def _write_resolved(spec: RunSpec, folder: Path, *, replace: bool) -> None:
    """Write the spec with all its defaults beside the output, where it can be run as it is."""
    import yaml

    from cellimg_dask.batch.folder import open_folder
    from cellimg_dask.batch.manifest import run_folder

    content = spec.model_dump(mode="json")
    content["target"] = _absolute(folder, spec.target)
    for item in content["inputs"]:
        item["path"] = _absolute(folder, item["path"])
    if spec.function is not None and ".py:" in spec.function:
        content["function"] = _absolute(folder, spec.function)
    text = yaml.safe_dump(content, sort_keys=False)
    beside = open_folder(run_folder(_target(spec, folder)))
    # One that is there may be that of a run which works on the target.
    if replace or beside.read("spec.yaml") is None:
        beside.write("spec.yaml", text.encode())


def _absolute(folder: Path, name: str) -> str:
    return name if "://" in name else str(folder.absolute() / name)


@contextmanager
def _image(spec: RunSpec, folder: Path, *, start: bool = True) -> Iterator[ci.CellImg]:
    """Open what the spec names, and give the image; without ``start`` no workers."""
    import cellimg_dask as ci

    if spec.cache_bytes is not None:
        ci.set_cache(spec.cache_bytes)
    with ExitStack() as stack:

        def open_array(item: InputSpec) -> tuple[Any, str | None]:
            path = folder / item.path
            arrays = stack.enter_context(open_file(path))
            found = [stored for stored in arrays if not item.name or stored.name == item.name]
            if not found:
                names = ", ".join(stored.name or "(the only one)" for stored in arrays)
                raise click.UsageError(f"{path} has no array {item.name!r}; it has {names}")
            # The files of zarr are compared one by one, and arrays by their values.
            version = None
            if path.is_file() and found[0].kind != "npy":
                facts = path.stat()
                version = f"{facts.st_size} {facts.st_mtime_ns}"
            return found[0].read(), version

        queue = stack.enter_context(_queue(spec)) if start else None
        yield spec.image(open_array, folder, queue)


@contextmanager
def _queue(spec: RunSpec) -> Iterator[ci.BlockQueue | None]:
    import cellimg_dask as ci

    wanted = spec.queue
    with ExitStack() as stack:
        backend: Any = wanted.backend
        extra: dict[str, Any] = {}
        if wanted.slurm is not None:
            backend = stack.enter_context(_slurm(wanted.slurm, start=True))
        if wanted.slurm is not None or "://" in wanted.backend:
            extra = {
                "resources": wanted.resources,
                "timeout_s": wanted.timeout_s,
                "insecure": wanted.insecure,
            }
        elif wanted == type(wanted)():
            yield None
            return
        yield stack.enter_context(ci.BlockQueue(wanted.num_workers, wanted.init, backend, **extra))


@contextmanager
def _slurm(spec: SlurmSpec, *, start: bool) -> Iterator[Any]:
    handler = signal.getsignal(signal.SIGINT)
    dask_jobqueue: Any = require("dask_jobqueue", "cluster")
    # Importing it makes Ctrl-C end the process, without a word on how to carry on.
    signal.signal(signal.SIGINT, handler)
    # Several runs on one machine do not fight for the port of the dashboard.
    options = {"scheduler_options": {"dashboard_address": ":0"}, **spec.options}
    with dask_jobqueue.SLURMCluster(
        cores=spec.cores,
        memory=spec.memory,
        processes=spec.processes,
        walltime=spec.walltime,
        queue=spec.queue,
        **options,
    ) as cluster:
        if start:
            cluster.scale(jobs=spec.jobs)
        yield cluster


def _projected(spec: RunSpec, image: ci.CellImg) -> dict[str, str]:
    from cellimg_dask.loading.together import cells_together

    grid, loader = image.grid, image.loader
    rooms = _rooms(spec)
    together = cells_together(loader, spec.cells_per_call, rooms)
    computing = loader if together is None else together.coarse
    calls = computing.grid.num_cells
    read = 0
    if calls:
        middle = computing.plan(
            computing.grid.index(tuple(n // 2 for n in computing.grid.grid_shape))
        )
        read = sum(
            prod(window.length for window in windows) * reader.dtype.itemsize
            for windows, reader in zip(middle.windows, loader.readers, strict=True)
        )
    own = sum(prod(reader.shape) * reader.dtype.itemsize for reader in loader.readers)
    return {
        "shape": f"{image.shape} {image.dtype}, {format_bytes(image.nbytes)}",
        "cells": f"{grid.num_cells:,} of {grid.cell_shape}, {grid.grid_shape} in the grid",
        "function": loader.function.name,
        "read": f"{format_bytes(read * calls)} by all blocks together, "
        f"{read * calls / max(own, 1):.2f} times the inputs because of the halo",
        "written": f"{format_bytes(image.nbytes)} before compression, to {spec.target}",
        "memory": "; ".join(_memory(room, computing) for room in dict.fromkeys(rooms))
        or "not known before there are workers",
        "calls": f"{calls:,}, one per cell"
        if together is None
        else f"{calls:,}, of {together.per_call} cells each",
    }


def _rooms(spec: RunSpec) -> list[Room]:
    """Return where blocks would run, as far as it is known without looking at a cluster."""
    from cellimg_dask.batch.run import threads_for
    from cellimg_dask.loading.crew import usable_cores
    from cellimg_dask.loading.memory import Room
    from cellimg_dask.state.cache import memory_bytes

    queue, slurm = spec.queue, spec.queue.slurm
    if slurm is not None:
        from dask.utils import parse_bytes

        own = parse_bytes(slurm.memory) // slurm.processes
        limit = own if spec.max_memory is None else min(own, spec.max_memory)
        threads = max(1, slurm.cores // slurm.processes)
        worker = Room(threads, limit, own // 4, "each worker of the cluster")
        return [worker] * (slurm.jobs * slurm.processes)
    if "://" in queue.backend:
        return []
    threads = threads_for(queue.num_workers or usable_cores())
    return [Room(threads, memory_bytes() if spec.max_memory is None else spec.max_memory)]


def _memory(room: Room, loader: CellLoader) -> str:
    mib = room.max_bytes / (1 << 20)
    text = f"{room.name} {room.projected(loader)}; {mib:,.0f} MiB are allowed"
    return text if room.has_room(loader) else f"{text}: TOO MUCH, the run will be refused"
