"""``cellimg demo``: a two-stage filter on a real image, computed lazily, checked and drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.cli.files import Stored, open_file, reason
from cellimg_dask.cli.pipeline import LUMINANCE, Pipeline, luminance
from cellimg_dask.cli.require import require
from cellimg_dask.cli.sizes import format_bytes
from cellimg_dask.io.channels import SAMPLES

__all__ = ["demo"]

_SAMPLE_IMAGE = "retina.jpg"
_MARKER = "cellimg-demo.json"
_RESULT = "detail.zarr"
_PREVIEW = "preview.png"
# A file for each cell: beyond this the demo would mostly make files.
_MOST_CELLS = 20_000
_PREVIEW_EDGE = 2000


@click.command()
@click.argument("image", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    default="demo-output",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the result and the picture go.",
)
@click.option(
    "--cell",
    type=click.IntRange(min=1),
    metavar="N",
    help="Edge of a cell in voxels.  [default: 128, or 64 where there are more than two axes; "
    "doubled for large images]",
)
@click.option(
    "--view", "look", is_flag=True, help="Then look at both stages in the browser, lazily."
)
@click.option("--no-browser", is_flag=True, help="With --view: only print the address.")
@click.pass_context
def demo(
    context: click.Context,
    image: Path | None,
    out: Path,
    cell: int | None,
    *,
    look: bool,
    no_browser: bool,
) -> None:
    """Filter IMAGE lazily in two stages and compare with SciPy on the whole image.

    IMAGE is a TIFF (stacks too), PNG, JPEG, .npy or HDF5 file or a folder with a zarr array or
    group, of which the first array is taken; by default it is a photograph of a retina that comes
    with scikit-image.

    One region is read first, which computes only the cells that it needs; then the rest, into a
    zarr array in the folder --out, beside a picture of it all. The exit code is 1 if the result
    differs from SciPy's. With --view the same stages, not computed yet, are shown in the browser
    until that is interrupted: what is looked at is computed.
    """
    for module in ("scipy.ndimage", "matplotlib", "imageio"):
        require(module, "demo")
    if look:
        require("neuroglancer", "view")
        require("uvicorn", "view")
    with _opened(image) as (label, stored):
        task = _plan(label, stored, cell)
        _prepare(out, image)
        try:
            equal = _run(task, out)
            if look and equal:
                _look(task, open_browser=not no_browser)
        except ci.CellimgError as error:
            raise click.ClickException(str(error)) from error
    if not equal:
        context.exit(1)


# ---------------------------------------------------------------------- input and output


@contextmanager
def _opened(image: Path | None) -> Iterator[tuple[str, Stored]]:
    """Give the array to filter and what to call it."""
    if image is not None:
        with open_file(image) as arrays:
            # HDF5 often holds numbers and names beside the image.
            main = next((array for array in arrays if len(array.shape) > 1), arrays[0])
            yield f"{image.name}/{main.name}" if main.name else image.name, main
        return
    from importlib.resources import as_file, files

    require("skimage", "demo")
    # Straight from the package's folder: skimage.data would download what it lacks.
    sample = files("skimage") / "data" / _SAMPLE_IMAGE
    if not sample.is_file():
        raise click.ClickException(
            f"this scikit-image comes without {_SAMPLE_IMAGE}; give an image: cellimg demo IMAGE"
        )
    with as_file(sample) as path, open_file(path) as arrays:
        yield f"{_SAMPLE_IMAGE} of scikit-image", arrays[0]


def _prepare(out: Path, image: Path | None) -> None:
    """Make the output folder ready, touching nothing that somebody else made."""
    if image is not None and image.resolve().is_relative_to(out.resolve()):
        raise click.ClickException(
            f"{image} lies in the output folder {out}, where it would be replaced; give another "
            f"folder: --out FOLDER"
        )
    if out.exists():
        if not out.is_dir():
            raise click.ClickException(f"--out {out} is a file; give a folder")
        if any(out.iterdir()) and not (out / _MARKER).is_file():
            raise click.ClickException(
                f"--out {out} holds files that this demo did not make; give a new folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).write_text(
            json.dumps({"made_by": "cellimg demo", "replaces": [_RESULT, _PREVIEW]}) + "\n"
        )
        if (out / _RESULT).exists():
            shutil.rmtree(out / _RESULT)
        (out / _PREVIEW).unlink(missing_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error}") from error


# ---------------------------------------------------------------------- what to do


@dataclass(frozen=True)
class _Task:
    label: str
    """What to call the image."""
    stored: Stored
    colour: int | None
    """Axis of colour samples of the stored array."""
    names: tuple[str, ...]
    """Names of the other axes, empty where unknown."""
    pipeline: Pipeline
    cells: tuple[int, ...]

    @property
    def plane(self) -> tuple[int, int]:
        """The two axes that the picture shows: the last ones in space."""
        rows, columns = [axis for axis, name in enumerate(self.names) if not _apart(name)][-2:]
        return rows, columns


def _apart(name: str) -> bool:
    """Whether neighbours along an axis have nothing to do with each other."""
    return name in ("c", "t")


def _plan(label: str, stored: Stored, cell: int | None) -> _Task:
    if stored.dtype.kind not in "buif":
        raise click.ClickException(
            f"{label} has dtype {stored.dtype}; the demo takes integers, floats and booleans"
        )
    axes = stored.axes or ("",) * len(stored.shape)
    colour = axes.index(SAMPLES) if SAMPLES in axes else None
    shape = tuple(n for axis, n in enumerate(stored.shape) if axis != colour)
    names = tuple(name for axis, name in enumerate(axes) if axis != colour)
    if sum(not _apart(name) for name in names) < 2 or 0 in stored.shape:
        raise click.ClickException(
            f"{label} has shape {stored.shape}; the demo needs two or more axes in space and at "
            f"least one voxel"
        )
    return _Task(
        label,
        stored,
        colour,
        names,
        Pipeline(
            tuple(0.0 if _apart(name) else 1.5 for name in names),
            tuple(0.0 if _apart(name) else 4.0 for name in names),
        ),
        _cell_shape(shape, names, cell),
    )


def _cell_shape(shape: Sequence[int], names: Sequence[str], cell: int | None) -> tuple[int, ...]:
    """Return the cell shape that was asked for, or one that gives a moderate number of cells."""

    def cut(edge: int) -> ci.CellGrid:
        return ci.CellGrid(
            shape,
            [1 if _apart(name) else min(edge, n) for n, name in zip(shape, names, strict=True)],
        )

    edge = cell or (128 if sum(not _apart(name) for name in names) == 2 else 64)
    while cut(edge).num_cells > (_MOST_CELLS if cell else 4096) and edge < max(shape):
        edge *= 2
    if cell and edge > cell:
        raise click.ClickException(
            f"--cell {cell} makes {cut(cell).num_cells:,} cells, and the demo writes a file for "
            f"each; --cell {edge} makes {cut(edge).num_cells:,}"
        )
    return cut(edge).cell_shape


def _region(grid: ci.CellGrid) -> ci.Roi:
    """Return a box of a cell's size that lies across cell borders, off the middle."""
    start = [
        min(max(1, round(0.3 * n / c)) * c - c // 2, n - c)
        for n, c in zip(grid.shape, grid.cell_shape, strict=True)
    ]
    return ci.Roi(
        tuple(start), tuple(low + c for low, c in zip(start, grid.cell_shape, strict=True))
    )


def _view(grid: ci.CellGrid, plane: tuple[int, int], region: ci.Roi) -> ci.Roi:
    """Return the plane through the region that the picture shows, cut where it is very large."""
    start, stop = [], []
    for axis, (n, low, high) in enumerate(zip(grid.shape, region.start, region.stop, strict=True)):
        middle = (low + high) // 2
        if axis in plane:
            first = min(max(middle - _PREVIEW_EDGE // 2, 0), max(n - _PREVIEW_EDGE, 0))
            start.append(first)
            stop.append(min(first + _PREVIEW_EDGE, n))
        else:
            start.append(middle)
            stop.append(middle + 1)
    return ci.Roi(tuple(start), tuple(stop))


# ---------------------------------------------------------------------- the run


def _run(task: _Task, out: Path) -> bool:
    """Do it all and say so; return whether the result is right."""
    stored, pipeline = task.stored, task.pipeline
    try:
        source = stored.read()
    except Exception as error:
        raise click.ClickException(f"cannot decode {task.label}: {reason(error)}") from error
    cache = ci.CellCache(ci.get_cache().max_bytes)
    gray, first, second = _stages(task, source, cache)
    lazy = [image for image in (gray, first, second) if isinstance(image, ci.CellImg)]
    _say_plan(task, second.grid)

    region = _region(second.grid)
    view = _view(second.grid, task.plane, region)
    began = perf_counter()
    block = second[region]
    seconds = perf_counter() - began
    bounds = ", ".join(f"{a}:{b}" for a, b in zip(region.start, region.stop, strict=True))
    _say("\nRegion", f" [{bounds}] read in {_duration(seconds)}; this took")
    taken = {}
    for image in lazy:
        count = f"{image.stats().loads:,} of {_cells_text(image.grid.num_cells)}"
        _say("", f"  {count} of {_name(image)}")
        taken[f"{_name(image)}: {count}"] = _held(image, view)

    began = perf_counter()
    written = _write(second, task.names, out / _RESULT)
    seconds = perf_counter() - began
    _say(
        "Written",
        f"{out / _RESULT}: zarr v3, float32, one chunk per cell, in {_duration(seconds)}",
    )

    # SciPy on the whole image holds several copies of it: no more than half of the memory.
    fits = 6 * second.nbytes <= 2 * ci.get_cache().max_bytes
    checked = ci.Roi.of_shape(second.shape) if fits else region
    plain = _without_cells(task, source) if fits else gray
    reference = pipeline.whole_of(plain, checked)
    result = np.asarray(written[checked.slices])
    equal = np.array_equal(result, reference, equal_nan=True) and np.array_equal(
        block, np.asarray(written[region.slices]), equal_nan=True
    )
    _say(
        "Check",
        f"{'equal to' if equal else 'DIFFERENT FROM'} SciPy on the "
        f"{'whole image' if fits else 'region (the whole image takes too much memory here)'}"
        f"{', bit for bit' if equal else ''}; largest difference "
        f"{_largest_difference(result, reference):g}",
    )

    if fits:
        _say_times(pipeline, plain, task.cells, reference)
    _say_statistics(lazy, cache)
    _draw(task, source, gray, (first, second), taken, region, view, out / _PREVIEW)
    _say("Picture", str(out / _PREVIEW))
    return equal


def _look(task: _Task, *, open_browser: bool) -> None:
    """Show the image and both stages in the browser, none of which has been computed."""
    from cellimg_dask.cli.seeing import look_at

    cache = ci.CellCache(ci.get_cache().max_bytes)
    gray, first, second = _stages(task, task.stored.read(), cache)
    layers = {"image": gray, _name(first): first, _name(second): second}
    look_at(layers, open_browser=open_browser)


def _stages(task: _Task, source: Any, cache: ci.CellCache) -> tuple[Any, ci.CellImg, ci.CellImg]:
    """Return the image of one channel, and both stages of the filter, lazily."""
    gray = source
    if task.colour is not None:
        gray = ci.map_cells(
            luminance,
            source,
            dtype=np.float32,
            drop_axis=task.colour,
            cell_shape=task.cells,
            params={"axis": task.colour},
            cache=cache,
        )
    return gray, *task.pipeline.lazy(gray, task.cells, cache)


def _held(image: ci.CellImg, view: ci.Roi) -> NDArray[np.bool_]:
    """Return which cells of the view are in memory, as an array over them."""
    cells = image.grid.cells_in(view)
    held = [image.peek(cell.index) is not None for cell in cells]
    return np.array(held).reshape([len(steps) for steps in cells.ranges])


def _write(image: ci.CellImg, names: Sequence[str], path: Path) -> Any:
    """Write the image slab by slab and return the zarr array."""
    import zarr

    grid = image.grid
    slabs = _slabs(grid)
    try:
        array = zarr.create_array(
            path,
            shape=grid.shape,
            chunks=grid.cell_shape,
            dtype=image.dtype,
            zarr_format=3,
            dimension_names=names if all(names) else None,
            attributes={"made_by": "cellimg demo"},
        )
        with click.progressbar(length=grid.num_cells, label="The rest") as bar:
            for number in range(slabs.num_cells):
                slab = slabs.cell(number).roi
                array[slab.slices] = image[slab]
                bar.update(len(grid.cells_in(slab)))
    except ci.CellimgError:
        raise
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error}") from error
    return array


def _slabs(grid: ci.CellGrid, max_bytes: int = 64 << 20) -> ci.CellGrid:
    """Return a coarser grid: rows of cells, as many as fit into ``max_bytes`` of float32."""
    extent = list(grid.cell_shape)
    for axis in range(grid.ndim - 1, 0, -1):
        fit = max(1, min(grid.grid_shape[axis], max_bytes // (4 * prod(extent))))
        extent[axis] *= fit
        if fit < grid.grid_shape[axis]:
            break
    return ci.CellGrid(grid.shape, extent)


def _without_cells(task: _Task, source: Any) -> NDArray[Any]:
    """Return the whole image of one channel by plain NumPy."""
    whole = np.asarray(source[...])
    return whole if task.colour is None else luminance(whole, task.colour)


def _largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    return float(np.max(gap, initial=0, where=~np.isnan(gap)))


# ---------------------------------------------------------------------- the picture


def _draw(
    task: _Task,
    source: Any,
    gray: Any,
    stages: tuple[ci.CellImg, ci.CellImg],
    taken: dict[str, NDArray[np.bool_]],
    region: ci.Roi,
    view: ci.Roi,
    path: Path,
) -> None:
    from cellimg_dask.cli.preview import Picture, draw

    rows, columns = task.plane
    flat = tuple(axis for axis in range(view.ndim) if axis not in task.plane)

    def shown(image: Any) -> NDArray[Any]:
        return np.squeeze(np.asarray(image[view.slices]), flat)

    shape = task.stored.shape
    if task.colour == view.ndim and shape[-1] > 2 and task.stored.dtype == np.uint8:
        picture = np.squeeze(np.asarray(source[(*view.slices, slice(0, 3))]), flat)
    else:
        picture = shown(gray)
    first, second = map(shown, stages)
    grid = stages[1].grid
    reference = np.squeeze(task.pipeline.whole_of(gray, view), flat)
    _, cut = task.pipeline.lazy(gray, task.cells, ci.CellCache(0), halo=False)
    try:
        draw(
            Picture(
                title=f"{task.label}: {_cells_text(grid.num_cells)} of {_times(task.cells)}",
                image=picture,
                first=first,
                second=second,
                with_halo=second - reference,
                without_halo=shown(cut) - reference,
                origin=(view.start[rows], view.start[columns]),
                cell=(task.cells[rows], task.cells[columns]),
                region=(
                    region.start[rows],
                    region.start[columns],
                    region.stop[rows],
                    region.stop[columns],
                ),
                taken={name: np.squeeze(cells, flat) for name, cells in taken.items()},
                halos=(
                    max(task.pipeline.halo(task.pipeline.narrow)),
                    max(task.pipeline.halo(task.pipeline.wide)),
                ),
            ),
            path,
        )
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error}") from error


# ---------------------------------------------------------------------- words


def _say_plan(task: _Task, grid: ci.CellGrid) -> None:
    stored, pipeline = task.stored, task.pipeline
    _say("Image", f"{task.label}: {stored.kind}, {_times(stored.shape)}, {stored.dtype}")
    if task.colour is not None and stored.shape[task.colour] > 2:
        red, green, blue = LUMINANCE
        _say("", f"colour becomes one channel: {red} red + {green} green + {blue} blue")
    elif task.colour is not None:
        _say("", "its first sample is taken, alpha is left out")
    alone = [name for name in task.names if _apart(name)]
    if alone:
        _say("", f"each position along {' and '.join(alone)} is filtered for itself")
    _say(
        "Cells",
        f"{_times(grid.grid_shape)} = {_cells_text(grid.num_cells)} of {_times(task.cells)}",
    )
    for number, text, sigma in (
        (1, "smooth = a Gaussian, sigma", pipeline.narrow),
        (2, "detail = stage 1 minus a Gaussian of it, sigma", pipeline.wide),
    ):
        _say(f"Stage {number}", f"{text} {max(sigma):g}: halo {max(pipeline.halo(sigma))}")


def _say_times(
    pipeline: Pipeline, image: NDArray[Any], cells: tuple[int, ...], reference: NDArray[np.float32]
) -> None:
    from cellimg_dask.cli.timing import compare

    timings = compare(pipeline, image, cells, reference)
    rounds = max(timing.rounds for timing in timings)
    _say("Times", f"from memory to memory, {f'median of {rounds}' if rounds > 1 else 'one run'}")
    for timing in timings:
        seconds = "" if timing.seconds is None else _duration(timing.seconds)
        note = timing.note and f" ({timing.note})"
        _say("", f"{seconds:>8}  {timing.way}{note}")
    read = prod(
        min(c + 2 * h, n) / c
        for c, h, n in zip(cells, pipeline.halo(pipeline.wide), image.shape, strict=True)
    )
    _say(
        "", f"With its halo a cell of stage 2 reads {read:.1f} times its own voxels, one piece only"
    )
    _say("", "once. Cells pay where a part is enough or the whole does not fit into memory.")


def _say_statistics(images: Sequence[ci.CellImg], cache: ci.CellCache) -> None:
    _say(
        "Cache",
        f"{format_bytes(cache.bytes)} held, at most {format_bytes(cache.max_bytes)} allowed",
    )
    for image in images:
        stats = image.stats()
        _say(
            "",
            f"{_name(image)}: {stats.loads:,} loads, {stats.hits:,} hits, "
            f"{stats.joins:,} joined a running load, {stats.evictions:,} evicted",
        )


def _say(word: str, text: str) -> None:
    click.echo(f"{word:<9}{text}")


def _name(image: ci.CellImg) -> str:
    return image.loader.function.name


def _cells_text(count: int) -> str:
    return f"{count:,} cell{'' if count == 1 else 's'}"


def _times(numbers: Sequence[int]) -> str:
    return " × ".join(f"{n:,}" for n in numbers)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
