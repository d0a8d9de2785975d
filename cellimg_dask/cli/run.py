"""``cellimg run``, ``plan`` and ``status``: runs over whole images, described in a file."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cellimg_dask.cli.spec_file import place_of, read_spec, refuse, write_resolved

if TYPE_CHECKING:
    import cellimg_dask as ci
    from cellimg_dask.batch.queue_spec import SlurmSpec
    from cellimg_dask.batch.spec import Spec
    from cellimg_dask.cli.stages import Stages

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
@click.option(
    "--stage",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="Run only this stage, and those that it reads.",
)
@click.option("--overwrite", is_flag=True, help="Replace the targets of all stages that run.")
@click.option("--no-progress", is_flag=True, help="Show no bar.")
def run(
    spec: Path,
    changes: tuple[str, ...],
    target: str | None,
    wanted: tuple[str, ...],
    overwrite: bool,
    no_progress: bool,
) -> None:
    """Compute the images and tables that SPEC describes into zarr arrays and parquet.

    SPEC is a YAML file. Run it again to carry on: what is done is not done again. Exit codes: 0
    done, 1 error, 2 wrong usage or spec, 3 some cells failed, 4 the target is in use, 130
    interrupted.
    """
    described = read_spec(spec, changes, target)
    names = _names(described, wanted)
    from cellimg_dask.cli.stages import Stages

    with _telling() as now, Stages(described, spec.parent) as stages:
        _check_params(spec, names, stages, now)
        for name in names:
            now(name)
            stage = described.stages[name]
            if stage.target is None:
                continue
            report = _run_stage(
                described, stages, name, spec.parent, overwrite=overwrite, progress=not no_progress
            )
            click.echo(f"{name}: {report}" if name else report)
            if not report.ok:
                left = names[names.index(name) + 1 :]
                if left:
                    click.echo(f"not begun: {', '.join(left)}, which come after {name}", err=True)
                sys.exit(FAILED)
            stages.use_stored(name)


def _check_params(path: Path, names: list[str], stages: Stages, now: Callable[[str], None]) -> None:
    """Refuse parameters that functions do not take, before anything runs."""
    mistakes: dict[str, str] = {}
    for name in names:
        now(name)
        mistakes |= stages.mistakes(name)
    now("")
    refuse(path, mistakes)


def _run_stage(
    spec: Spec, stages: Stages, name: str, folder: Path, *, overwrite: bool, progress: bool
) -> ci.RunReport | ci.OmeZarrReport:
    import cellimg_dask as ci

    stage = spec.stages[name]
    assert stage.target is not None
    image = stages.make(name)
    write_resolved(spec, name, folder, replace=False)
    where, arguments = place_of(stage.target, folder), stage.run_arguments()
    report: ci.RunReport | ci.OmeZarrReport
    if stage.is_ome_zarr:
        report = ci.write_ome_zarr(
            image, where, overwrite=overwrite, progress=progress, **arguments
        )
    else:
        shown = (name or True) if progress else False
        report = ci.run(image, where, overwrite=overwrite, progress=shown, **arguments)
    write_resolved(spec, name, folder, replace=True)
    return report


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Say what went wrong, and where; give what is told of each stage that begins."""
    import cellimg_dask as ci

    where = ""

    def now(name: str) -> None:
        nonlocal where
        where = f"stage {name}: " if name else ""

    try:
        yield now
    except ci.TargetInUseError as error:
        _end(f"{where}{error}", IN_USE)
    except KeyboardInterrupt:
        # Not with --overwrite, which would begin anew.
        again = ["cellimg", *(word for word in sys.argv[1:] if word != "--overwrite")]
        _end(
            f"{where}interrupted; what is done is kept. To carry on:\n  {shlex.join(again)}",
            INTERRUPTED,
        )
    except click.UsageError as error:
        raise click.UsageError(f"{where}{error.message}") from error
    except click.ClickException as error:
        raise click.ClickException(f"{where}{error.message}") from error
    except _ERRORS as error:
        raise click.ClickException(f"{where}{type(error).__name__}: {error}") from error


def _names(spec: Spec, wanted: tuple[str, ...]) -> list[str]:
    """Return the stages that are to run, in order."""
    for name in wanted:
        if not name or name not in spec.stages:
            there = ", ".join(filter(None, spec.stages)) or "none"
            raise click.UsageError(f"--stage {name}: there is no such stage; there are {there}")
    return spec.needed_for(list(wanted)) if wanted else list(spec.stages)


@click.command()
@_SPEC
@_SET
def plan(spec: Path, changes: tuple[str, ...]) -> None:
    """Say what a run of SPEC would do; computes nothing and writes nothing."""
    described = read_spec(spec, changes)
    from cellimg_dask.cli.stages import Stages, slurm_cluster

    with _telling() as now, Stages(described, spec.parent, start=False) as stages:
        _check_params(spec, list(described.stages), stages, now)
        for name in described.stages:
            now(name)
            for title, facts in _plans(described, name, stages):
                if title:
                    click.echo(f"{title}:")
                width = max(map(len, facts))
                for fact, value in facts.items():
                    click.echo(f"{'  ' if title else ''}{fact:<{width}}  {value}")
        clusters: list[SlurmSpec] = []
        for stage in described.stages.values():
            if stage.queue.slurm is not None and stage.queue.slurm not in clusters:
                clusters.append(stage.queue.slurm)
        for slurm in clusters:
            with slurm_cluster(slurm, start=False) as cluster:
                click.echo(f"\n{cluster.job_script()}")


def _plans(spec: Spec, name: str, stages: Stages) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield title and facts of what a stage computes, one after the other."""
    from cellimg_dask.batch.manifest import Manifest, run_folder
    from cellimg_dask.batch.passes import needed_whole, values_from_voxels
    from cellimg_dask.batch.run import image_and_table
    from cellimg_dask.cli.projection import projected

    stage = spec.stages[name]
    image, table = image_and_table(stages.make(name))
    loader = image.loader
    target = stage.target
    if target is None:
        readers = ", ".join(other for other in spec.stages if name in spec.read_by(other))
        yield name, {"read by": f"{readers}, and not written", "function": loader.function.name}
        return
    together = getattr(stage, "cells_per_call", None)
    manifest = Manifest(target, f"{run_folder(target)}/0" if stage.is_ome_zarr else None)
    for number, first in enumerate(needed_whole(loader), 1):
        where = manifest.pass_of(number)
        yield f"{name} (pass {number})".strip(), projected(stage, first, where, None)
    if table is None:
        facts = projected(stage, loader, target, together)
        if stage.is_ome_zarr:
            from cellimg_dask.io.write_ome_zarr import levels_of

            given = stage.run_arguments()
            levels = levels_of(image, None, *(given[n] for n in ("levels", "factors", "method")))
            facts["levels"] = ", ".join(str(level.shape) for level in levels)
        yield name, facts
        return
    columns = ", ".join(f"{key} {kind}" for key, kind in table.meta.dtypes.items())
    parts = f"a part for each of {loader.grid.num_cells:,} cells, to {target}"
    for reading in values_from_voxels(loader):
        facts = projected(stage, reading, target, None) | {"written": parts}
        del facts["shape"]
        yield name, {"columns": columns} | facts


@click.command()
@click.argument("target")
@click.option("--quick", is_flag=True, help="Compare the sizes of files and not their bytes.")
def status(target: str, quick: bool) -> None:
    """Say which cells of TARGET are done, missing or damaged, and what failed last.

    TARGET is that of a run, an OME-Zarr image that was written by this library, or a spec, for all
    that it writes. Exit code 0 if every cell is done, else 3.
    """
    from cellimg_dask.io.ome_group import written_arrays

    if target.endswith((".yaml", ".yml")) and Path(target).is_file():
        path = Path(target)
        spec = read_spec(path)
        targets = {
            name: place_of(stage.target, path.parent)
            for name, stage in spec.stages.items()
            if stage.target is not None
        }
    else:
        targets = {"": target}
    complete = True
    for name, where in targets.items():
        if name:
            click.echo(f"{name}:")
        indent = "  " if name else ""
        arrays = written_arrays(where)
        for array, beside in arrays.items():
            click.echo(f"{indent}{array.removeprefix(where).lstrip('/')}:")
            complete &= _shown_status(array, beside, indent + "  ", quick=quick, may_lack=True)
        if not arrays:
            complete &= _shown_status(where, None, indent, quick=quick, may_lack=bool(name))
    if not complete:
        sys.exit(FAILED)


def _shown_status(
    where: str, beside: str | None, indent: str, *, quick: bool, may_lack: bool
) -> bool:
    """Show the state of a target; return whether all of it is done."""
    import json
    from itertools import count

    from cellimg_dask.batch.manifest import Manifest
    from cellimg_dask.batch.target import open_target

    manifest = Manifest(where, beside)
    try:
        stored = open_target(manifest.folder, where)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot read {where}: {error}") from error
    if stored is None:
        if not may_lack:
            raise click.ClickException(f"{where} was not made by a run of this library")
        click.echo(f"{indent}not begun")
        return False
    cells = stored.grid.num_cells
    marked = set(manifest.marked())
    counts = Counter(
        manifest.state(index, None, stored, checksums=not quick) if index in marked else "missing"
        for index in range(cells)
    )
    for name in ("done", "missing", "damaged"):
        click.echo(f"{indent}{name:<8} {counts[name]:,} of {cells:,}")
    report = manifest.folder.read("report.json")
    failed = json.loads(report)["failed"] if report else []
    click.echo(f"{indent}{'failed':<8} {len(failed):,} in the last run")
    for entry in failed[:10]:
        click.echo(f"{indent}  {tuple(entry['position'])}: {entry['error']}")
    if counts["done"] == cells:
        return True
    for number in count(1):
        first = Manifest(manifest.pass_of(number))
        there = open_target(first.folder, first.where)
        if there is None:
            return False
        done = len(set(first.marked()))
        click.echo(f"{indent}{f'pass {number}':<8} {done:,} of {there.grid.num_cells:,} done")
    return False


def _end(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)
