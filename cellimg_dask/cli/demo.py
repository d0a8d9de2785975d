"""``cellimg demo``: a two-stage filter on a real image, computed lazily, checked and drawn."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.cli.files import SAMPLES, Stored, open_file
from cellimg_dask.cli.require import require

if TYPE_CHECKING:
    from cellimg_dask.cli.preview import Picture

__all__ = ["demo"]

_SAMPLE_IMAGE = "retina.jpg"
_MARKER = "cellimg-demo.json"
_RESULT = "detail.zarr"
_PREVIEW = "preview.png"
# A file for each cell: beyond this the demo would mostly make files.
_MOST_CELLS = 20_000
_TIMING_SECONDS = 4.0


@click.command()
@click.argument("image", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    default="demo-output",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the result and the preview.",
)
@click.option(
    "--cell",
    type=click.IntRange(min=1),
    help="Edge of a cell in voxels.  [default: 128, or 64 where there are more than two axes; "
    "doubled for large images]",
)
@click.pass_context
def demo(context: click.Context, image: Path | None, out: Path, cell: int | None) -> None:
    """Filter IMAGE lazily in two stages and compare with SciPy on the whole image.

    IMAGE is a TIFF (stacks too), PNG, JPEG, .npy or HDF5 file or a zarr folder; by default a
    photograph of a retina that comes with scikit-image.

    One region is read first, which computes only the cells that it needs; then the rest, into a
    zarr array in the folder --out, beside a picture of all this. The exit code is 1 if the result
    differs from SciPy's.
    """
    for module in ("scipy.ndimage", "matplotlib", "imageio"):
        require(module, "demo")
    with _opened(image) as (label, stored):
        _prepare(out, image)
        try:
            equal = _run(label, stored, out, cell)
        except ci.CellimgError as error:
            raise click.ClickException(str(error)) from error
    if not equal:
        context.exit(1)


# ---------------------------------------------------------------------- in and out


@contextmanager
def _opened(image: Path | None) -> Iterator[tuple[str, Stored]]:
    """Give the array to filter and what to call it."""
    if image is not None:
        with open_file(image) as arrays:
            yield f"{image.name}{'/' if arrays[0].name else ''}{arrays[0].name}", arrays[0]
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
    """Make the output folder ready, touching nothing that another program made."""
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


# ---------------------------------------------------------------------- the filter


def luminance(image: NDArray[Any], axis: int) -> NDArray[np.float32]:
    """Return red, green and blue along ``axis`` as one channel; alpha is left out."""
    samples = np.moveaxis(image, axis, 0).astype(np.float32)
    if len(samples) < 3:
        return samples[0]
    red, green, blue = samples[:3]
    return np.float32(0.2126) * red + np.float32(0.7152) * green + np.float32(0.0722) * blue


def smooth(image: NDArray[Any], sigma: Sequence[float]) -> NDArray[np.float32]:
    """Return the image after a Gaussian filter."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(image, sigma, output=np.float32))


def detail(image: NDArray[np.float32], sigma: Sequence[float]) -> NDArray[np.float32]:
    """Return what rises above, or falls below, a wide Gaussian's background."""
    return image - smooth(image, sigma)


@dataclass(frozen=True)
class Pipeline:
    """Two stages with halos: `smooth`, then `detail`."""

    narrow: tuple[float, ...]
    """Sigma of the first stage per axis, 0 where planes are filtered one by one."""
    wide: tuple[float, ...]
    """Sigma of the second stage's background."""

    @staticmethod
    def halo(sigma: Sequence[float]) -> tuple[int, ...]:
        """Return the radius of SciPy's Gaussian."""
        return tuple(int(4 * width + 0.5) for width in sigma)

    def lazy(
        self, image: Any, cells: tuple[int, ...], cache: ci.CellCache, *, halo: bool = True
    ) -> tuple[ci.CellImg, ci.CellImg]:
        """Return both stages as lazy images; ``halo=False`` is for showing what goes wrong."""

        def stage(f: Callable[..., Any], source: Any, sigma: tuple[float, ...]) -> ci.CellImg:
            return ci.map_cells(
                f,
                source,
                halo=self.halo(sigma) if halo else 0,
                dtype=np.float32,
                cell_shape=cells,
                params={"sigma": sigma},
                cache=cache,
            )

        first = stage(smooth, image, self.narrow)
        return first, stage(detail, first, self.wide)

    def whole(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Compute the second stage by SciPy on an array in one piece."""
        return detail(smooth(image, self.narrow), self.wide)

    def whole_of(self, image: Any, roi: ci.Roi) -> NDArray[np.float32]:
        """Compute a region by SciPy, from all that it depends on, in one piece."""
        reach = [a + b for a, b in zip(self.halo(self.narrow), self.halo(self.wide), strict=True)]
        around = roi.grow(ci.Halo.of(reach, roi.ndim)).clip(image.shape)
        inner = roi.shift([-low for low in around.start])
        return self.whole(np.asarray(image[around.slices]))[inner.slices]

    def overlapped(self, image: NDArray[Any], cells: tuple[int, ...]) -> Any:
        """Return the second stage as dask's map_overlap builds it."""
        import dask.array as da

        stages = ((smooth, self.narrow), (detail, self.wide))
        array = da.from_array(image, chunks=cells)
        for f, sigma in stages:
            array = array.map_overlap(
                f,
                depth=dict(enumerate(self.halo(sigma))),
                boundary="none",
                dtype=np.float32,
                meta=np.empty((0,) * image.ndim, np.float32),
                sigma=sigma,
            )
        return array


# ---------------------------------------------------------------------- the run


def _run(label: str, stored: Stored, out: Path, cell: int | None) -> bool:
    source = _read(stored)
    cache = ci.CellCache(ci.get_cache().max_bytes)
    gray, pipeline, cells = _plan(label, stored, source, cell, cache)
    first, second = pipeline.lazy(gray, cells, cache)
    grid = second.grid
    _say("Cells", f"{grid.num_cells:,} of {_times(cells)}, {_times(grid.grid_shape)} in the grid")
    for number, (image, sigma, what) in enumerate(
        (
            (first, pipeline.narrow, "a Gaussian of sigma"),
            (second, pipeline.wide, "stage 1 minus its background, a Gaussian of sigma"),
        )
    ):
        _say(
            f"Stage {number + 1}",
            f"{image.loader.function.name}: {what} {max(sigma):g}, halo "
            f"{max(pipeline.halo(sigma))}",
        )
    lazy = [gray] if isinstance(gray, ci.CellImg) else []
    lazy += [first, second]

    click.echo()
    region = _region(grid)
    began = perf_counter()
    block = second[region]
    seconds = perf_counter() - began
    _say("Region", f"[{_slices(region)}] read in {_duration(seconds)}; this took")
    for image in lazy:
        _say("", f"{image.stats().loads:>7,} of {image.grid.num_cells:,} cells of {_name(image)}")
    view, plane = _view(grid, stored.axes, region)
    taken = [(_name(image), _computed(image, view), image.stats().loads) for image in lazy]

    began = perf_counter()
    written = _write(second, stored, out / _RESULT)
    seconds = perf_counter() - began
    _say(
        "Written",
        f"{out / _RESULT}: zarr v3, float32, one chunk per cell, in {_duration(seconds)}",
    )

    # SciPy on the whole image holds several copies of it; half of the memory is for them.
    fits = 6 * second.nbytes <= 2 * ci.get_cache().max_bytes
    checked = ci.Roi.of_shape(grid.shape) if fits else region
    array = _in_memory(stored, source) if fits else gray
    reference = pipeline.whole_of(array, checked)
    result = np.asarray(written[checked.slices])
    difference, equal = _difference(result, reference)
    equal = equal and np.array_equal(block, np.asarray(written[region.slices]), equal_nan=True)
    _say(
        "Check",
        f"{'equal to' if equal else 'DIFFERENT FROM'} SciPy on the "
        f"{'whole image' if fits else 'region (the whole image is too large for that here)'}"
        f"{', bit for bit' if equal else ''}; largest difference {difference:g}",
    )

    if fits:
        _time(pipeline, np.asarray(array), cells, reference)
    _say_statistics(lazy, cache)

    _draw(
        out / _PREVIEW,
        label,
        stored,
        source,
        gray,
        pipeline,
        first,
        second,
        taken,
        region,
        view,
        plane,
    )
    _say("Picture", str(out / _PREVIEW))
    return equal


def _read(stored: Stored) -> Any:
    try:
        return stored.read()
    except Exception as error:
        raise click.ClickException(
            f"cannot decode the image: {type(error).__name__}: {error}"
        ) from error


def _plan(
    label: str, stored: Stored, source: Any, cell: int | None, cache: ci.CellCache
) -> tuple[Any, Pipeline, tuple[int, ...]]:
    """Return the image of one channel, the filter for its axes and the cells."""
    if stored.dtype.kind not in "buif":
        raise click.ClickException(f"{label} has dtype {stored.dtype}; the demo takes real numbers")
    size = f"{_times(stored.shape)} {stored.dtype}"
    _say("Image", f"{label}, {stored.kind}, {size}")
    axes = stored.axes or ("",) * len(stored.shape)
    colour = axes.index(SAMPLES) if SAMPLES in axes else None
    shape = tuple(n for axis, n in enumerate(stored.shape) if axis != colour)
    names = tuple(name for axis, name in enumerate(axes) if axis != colour)
    # Neighbours in space are neighbours; neighbouring channels and times are not.
    apart = [name in ("c", "t") for name in names]
    if len(shape) - sum(apart) < 2 or 0 in shape:
        raise click.ClickException(
            f"{label} has shape {stored.shape}; the demo needs two or more axes in space and at "
            f"least one voxel"
        )
    if any(apart):
        kept = ", ".join(name for name, alone in zip(names, apart, strict=True) if alone)
        _say("", f"each position along {kept} is filtered for itself")
    cells = _cells(shape, apart, cell)
    gray: Any = source
    if colour is not None:
        _say("", "colour becomes one channel: 0.2126 red + 0.7152 green + 0.0722 blue")
        gray = ci.map_cells(
            luminance,
            source,
            dtype=np.float32,
            drop_axis=colour,
            cell_shape=cells,
            params={"axis": colour},
            cache=cache,
        )
    return (
        gray,
        Pipeline(
            tuple(0.0 if alone else 1.5 for alone in apart),
            tuple(0.0 if alone else 4.0 for alone in apart),
        ),
        cells,
    )


def _cells(shape: Sequence[int], apart: Sequence[bool], cell: int | None) -> tuple[int, ...]:
    """Return the cell shape: given, or large enough for a grid of moderate size."""

    def cut(edge: int) -> ci.CellGrid:
        return ci.CellGrid(
            shape,
            [1 if alone else min(edge, n) for n, alone in zip(shape, apart, strict=True)],
        )

    edge = cell or (128 if len(shape) - sum(apart) == 2 else 64)
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


def _view(
    grid: ci.CellGrid, axes: Sequence[str] | None, region: ci.Roi, most: int = 2000
) -> tuple[ci.Roi, tuple[int, int]]:
    """Return what the picture shows: one plane through the region, and that plane's axes."""
    names = [name for name in axes or ("",) * grid.ndim if name != SAMPLES]
    plane = tuple(axis for axis, name in enumerate(names) if name not in ("c", "t"))[-2:]
    start, stop = [], []
    for axis, (n, low, high) in enumerate(zip(grid.shape, region.start, region.stop, strict=True)):
        middle = (low + high) // 2
        if axis in plane:
            start.append(min(max(middle - most // 2, 0), max(n - most, 0)))
            stop.append(min(start[-1] + most, n))
        else:
            start.append(middle)
            stop.append(middle + 1)
    return ci.Roi(tuple(start), tuple(stop)), (plane[0], plane[1])


def _computed(image: ci.CellImg, view: ci.Roi) -> NDArray[np.bool_]:
    """Return which cells of the view are in memory, as an array over them."""
    cells = image.grid.cells_in(view)
    held = [image.peek(cell.index) is not None for cell in cells]
    return np.array(held).reshape([len(steps) for steps in cells.ranges])


def _write(image: ci.CellImg, stored: Stored, path: Path) -> Any:
    """Write the image slab by slab and return the zarr array."""
    import zarr

    grid = image.grid
    axes = [name for name in stored.axes or () if name != SAMPLES]
    try:
        array = zarr.create_array(
            path,
            shape=grid.shape,
            chunks=grid.cell_shape,
            dtype=image.dtype,
            dimension_names=axes or None,
            attributes={"made_by": "cellimg demo"},
        )
        slabs = _slabs(grid)
        with click.progressbar(length=grid.num_cells, label="The rest") as bar:
            for number in range(slabs.num_cells):
                slab = slabs.cell(number).roi
                array[slab.slices] = image[slab]
                bar.update(len(grid.cells_in(slab)))
    except OSError as error:
        if isinstance(error, ci.CellimgError):
            raise
        raise click.ClickException(f"cannot write {path}: {error}") from error
    return array


def _slabs(grid: ci.CellGrid, max_bytes: int = 64 << 20) -> ci.CellGrid:
    """Return a coarser grid: rows of cells, as many as fit into ``max_bytes`` of float32."""
    extent = list(grid.cell_shape)
    for axis in range(grid.ndim - 1, 0, -1):
        rest = 4 * int(np.prod(extent))
        fit = max(1, min(grid.grid_shape[axis], max_bytes // rest))
        extent[axis] *= fit
        if fit < grid.grid_shape[axis]:
            break
    return ci.CellGrid(grid.shape, extent)


def _in_memory(stored: Stored, source: Any) -> NDArray[Any]:
    """Return the one-channel image by plain NumPy, without this library."""
    whole = np.asarray(source[...])
    axes = stored.axes or ()
    return luminance(whole, axes.index(SAMPLES)) if SAMPLES in axes else whole


def _difference(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, bool]:
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    return float(np.max(gap, initial=0, where=~np.isnan(gap))), np.array_equal(
        a, b, equal_nan=a.dtype.kind == "f"
    )


# ---------------------------------------------------------------------- times


def _time(
    pipeline: Pipeline,
    image: NDArray[Any],
    cells: tuple[int, ...],
    reference: NDArray[np.float32],
) -> None:
    """Time three ways from an array in memory to an array in memory, taking turns."""
    from cellimg_dask.loading.crew import get_crew

    threads = get_crew().num_threads

    def lazily() -> NDArray[Any]:
        _, last = pipeline.lazy(image, cells, ci.CellCache(ci.get_cache().max_bytes))
        return np.asarray(last)

    def by_map_overlap() -> NDArray[Any]:
        array = pipeline.overlapped(image, cells)
        return np.asarray(array.compute(scheduler="threads", num_workers=threads))

    many = f"{threads} thread{'s' if threads > 1 else ''}"
    ways: dict[str, Callable[[], NDArray[Any]]] = {
        f"cellimg_dask, cell by cell, {many}": lazily,
        f"dask's map_overlap, the same cells, {many}": by_map_overlap,
        "SciPy, the whole image in one piece, 1 thread": lambda: pipeline.whole(image),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    notes: dict[str, str] = {}
    began = perf_counter()
    for _ in range(5):
        for name, way in ways.items():
            start = perf_counter()
            try:
                result = way()
            except ValueError as error:
                # map_overlap refuses a depth beyond the array.
                notes[name] = f"not possible: {error}"
                continue
            taken[name].append(perf_counter() - start)
            if not _difference(result, reference)[1]:
                notes[name] = "another result"
        if perf_counter() - began > _TIMING_SECONDS:
            break
    rounds = max(map(len, taken.values()))
    _say("Times", f"from memory to memory, {f'median of {rounds}' if rounds > 1 else 'one run'}")
    for name, seconds in taken.items():
        time = _duration(statistics.median(seconds)) if seconds else ""
        _say("", f"{time:>9}  {name}" + (f" ({notes[name]})" if name in notes else ""))
    extra = float(
        np.prod(
            [
                min(c + 2 * h, n) / c
                for c, h, n in zip(cells, pipeline.halo(pipeline.wide), image.shape, strict=True)
            ]
        )
    )
    _say("", f"a cell of stage 2 reads {extra:.1f} × its own voxels, because of its halo;")
    _say("", "larger cells read less, and the whole image in one piece nothing twice")


def _say_statistics(images: Sequence[ci.CellImg], cache: ci.CellCache) -> None:
    from dask.utils import format_bytes

    _say(
        "Cache",
        f"{format_bytes(cache.bytes)} held, at most {format_bytes(cache.max_bytes)} allowed",
    )
    for image in images:
        stats = image.stats()
        _say(
            "",
            f"{_name(image)}: {stats.loads:,} loads in {_duration(stats.load_seconds)} of threads' "
            f"time, {stats.hits:,} hits, {stats.joins:,} joined, {stats.evictions:,} evicted",
        )


# ---------------------------------------------------------------------- the picture


def _draw(
    path: Path,
    label: str,
    stored: Stored,
    source: Any,
    gray: Any,
    pipeline: Pipeline,
    first: ci.CellImg,
    second: ci.CellImg,
    taken: Sequence[tuple[str, NDArray[np.bool_], int]],
    region: ci.Roi,
    view: ci.Roi,
    plane: tuple[int, int],
) -> None:
    from cellimg_dask.cli.preview import Picture, draw

    flat = tuple(axis for axis in range(view.ndim) if axis not in plane)

    def shown(image: Any) -> NDArray[Any]:
        data = np.asarray(image[view.slices])
        return data.reshape([n for axis, n in enumerate(data.shape) if axis not in flat])

    colour = shown(gray)
    if (stored.axes or ("",))[-1] == SAMPLES and stored.shape[-1] > 2 and stored.dtype == "u1":
        colour = np.squeeze(np.asarray(source[(*view.slices, slice(0, 3))]), flat)
    _, cut = pipeline.lazy(gray, second.cell_shape, ci.CellCache(0), halo=False)
    reference = pipeline.whole_of(gray, view).reshape(shown(gray).shape)
    picture: Picture = Picture(
        title=f"{label}: two stages, {second.grid.num_cells:,} cells of {_times(second.cell_shape)}",
        image=colour,
        first=shown(first),
        second=shown(second),
        with_halo=shown(second) - reference,
        without_halo=shown(cut) - reference,
        origin=(view.start[plane[0]], view.start[plane[1]]),
        cell=(second.cell_shape[plane[0]], second.cell_shape[plane[1]]),
        region=(
            region.start[plane[0]],
            region.start[plane[1]],
            region.stop[plane[0]],
            region.stop[plane[1]],
        ),
        taken=[
            (f"{name}: {count:,} of {second.grid.num_cells:,} cells", np.squeeze(cells, flat))
            for name, cells, count in taken
        ],
        halos=(max(pipeline.halo(pipeline.narrow)), max(pipeline.halo(pipeline.wide))),
    )
    try:
        draw(picture, path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error}") from error


# ---------------------------------------------------------------------- words


def _say(word: str, text: str) -> None:
    click.echo(f"{word:<9}{text}")


def _name(image: ci.CellImg) -> str:
    return image.loader.function.name


def _times(numbers: Sequence[int]) -> str:
    return " × ".join(f"{n:,}" for n in numbers)


def _slices(roi: ci.Roi) -> str:
    return ", ".join(f"{a}:{b}" for a, b in zip(roi.start, roi.stop, strict=True))


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
