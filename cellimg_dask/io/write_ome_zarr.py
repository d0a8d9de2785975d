"""`write_ome_zarr`: images with their levels and labels into OME-Zarr, to be carried on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal, SupportsIndex

from cellimg_dask.batch.apart import check_apart
from cellimg_dask.batch.filling import Filling, alone, prepare, reader_of
from cellimg_dask.batch.passes import reading_instead
from cellimg_dask.batch.report import RunReport
from cellimg_dask.batch.run import forget_files, place_of_target
from cellimg_dask.batch.target import Layout
from cellimg_dask.geometry import Space, as_int
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.input import as_input
from cellimg_dask.image.space_of import space_of
from cellimg_dask.io.channels import SAMPLES, Channel, channels_of, omero_of, picture_channels
from cellimg_dask.io.ome import OmeVersion, axis_type
from cellimg_dask.io.ome_group import OmeGroup
from cellimg_dask.io.stored_image import said_of_channels
from cellimg_dask.loading.content import ContentKeys
from cellimg_dask.loading.loader import CellLoader, pinned_together
from cellimg_dask.loading.node import defining
from cellimg_dask.loading.readers import Reader
from cellimg_dask.ops.label_image import LabelImg
from cellimg_dask.ops.pyramid import Factors, Pyramid, as_image, pyramid
from cellimg_dask.ops.transpose import transpose
from cellimg_dask.queues.block_queue import BlockQueue

__all__ = ["OmeZarrReport", "levels_of", "write_ome_zarr"]

_ORDER = ("time", "channel", None, "space")


@dataclass
class OmeZarrReport:
    """What `write_ome_zarr` did: the report of each array."""

    path: str
    """Path or URL of the group."""
    arrays: dict[str, RunReport] = field(default_factory=dict)
    """By the place of the array in the group: ``"0"``, ``"1"``, ``"labels/nuclei/0"``."""
    seconds: float = 0.0
    """Wall time."""

    @property
    def ok(self) -> bool:
        """Whether every cell of every level is done."""
        return all(report.ok for report in self.arrays.values())

    @property
    def computed(self) -> int:
        """Cells that were computed and committed."""
        return sum(report.computed for report in self.arrays.values())

    @property
    def skipped(self) -> int:
        """Cells that were done before."""
        return sum(report.skipped for report in self.arrays.values())

    @property
    def failed(self) -> dict[tuple[str, tuple[int, ...]], BaseException]:
        """Array and position of each cell that could not be computed, and its error.

        Coarser levels are not begun where a finer one has such cells.
        """
        return {
            (name, position): error
            for name, report in self.arrays.items()
            for position, error in report.failed.items()
        }

    def __str__(self) -> str:
        first = (
            f"{self.computed:,} cells computed, {self.skipped:,} done before, "
            f"{len(self.failed):,} failed in {self.seconds:.1f} s; {self.path}"
        )
        lines = [first]
        for name, report in self.arrays.items():
            first, _, rest = str(report).partition("\n")
            lines.append(f"  {name}: {first.partition('; ')[0]}")
            lines += [rest] if rest else []
        return "\n".join(lines)


def write_ome_zarr(
    img: Any,
    path: str | os.PathLike[str],
    *,
    labels: Mapping[str, Any] | None = None,
    levels: SupportsIndex | None = None,
    factors: Factors | None = None,
    method: Literal["mean", "mode", "nearest"] | None = None,
    channels: Sequence[Channel | str] | None = None,
    name: str | None = None,
    version: OmeVersion | None = None,
    queue: BlockQueue | None = None,
    resume: bool = True,
    overwrite: bool = False,
    retries: int = 2,
    progress: bool = True,
    chunks: Any = None,
    sharded: bool | None = None,
    compressor: str | None = "zstd",
    level: int | None = None,
    fill_value: Any = 0,
    verify: Literal["checksums", "sizes"] = "checksums",
    cells_per_call: int | Sequence[int] | Literal["auto"] | None = None,
    max_memory: int | None = None,
    timeout_s: float = 600.0,
) -> OmeZarrReport:
    """Compute an image and its coarser levels into OME-Zarr, cell by cell.

    As with `run` it may be killed at any moment: the next call with the same path computes what
    is missing, damaged, or made by another computation, and nothing else. Each level is made from
    the one below as it was written, so nothing is computed twice. All arrays and their metadata
    are there before the first cell is computed, so that a viewer can look on.

    Parameters
    ----------
    img : CellImg, array-like, Pyramid, sequence of these, or None
        The image; None adds labels to one that is there, whoever wrote it. Axes, units, scale and
        translation are those of its `Space`; axes that nobody has named are the last of t, c, z,
        y and x. They are written in the order of OME-Zarr, time, channels, space; red, green and
        blue, an axis "s", become channels. A `Pyramid`, or a sequence of images of which the
        finest comes first, gives all levels.
    path : path or URL
        Of the group, by custom with the ending ``.ome.zarr``. Markers, locks and reports lie
        beside it, in ``<path>.run``.
    labels : mapping of str to image, optional
        Labels of objects, by names; each like ``img``. They are written to the group ``labels``.
    levels : int, optional
        How many, that of the image included; default: until no axis that becomes shorter is
        longer than the longest edge of a cell.
    factors : optional
        As in `pyramid`; default: 2 along axes in space, 1 along t and c.
    method : {"mean", "mode", "nearest"}, optional
        As in `pyramid`, for ``img``; default: ``"mode"`` for a `LabelImg`, else ``"mean"``.
    channels : sequence of Channel or str, optional
        Labels, colours and contrasts of the channels, or their labels. Default: what the file says
        of which ``img`` was opened; an empty sequence: what is noted already stays. Of an image
        of floats they are noted if all contrasts are known.
    name : str, optional
        Of the image; default: that of the path without its endings.
    version : {"0.5", "0.4"}
        Of OME-Zarr: 0.5 is written in zarr 3, 0.4 in zarr 2. Default: 0.5, for labels alone that
        of the image.
    cells_per_call
        As in `run`, for the finest level of ``img``.
    queue, resume, overwrite, retries, progress, chunks, sharded, compressor, level, fill_value, \
verify, max_memory, timeout_s
        As in `run`.

    Returns
    -------
    OmeZarrReport

    Raises
    ------
    FileExistsError
        If something else is at the path, or it is not to be carried on.
    FileNotFoundError
        If there is no image that labels could be added to.
    TypeError, ValueError
        If an argument is wrong, the group holds what an image is computed from and is to be
        replaced, or OME-Zarr has no such image: it has two to five axes, two or three of them in
        space.
    MemoryError, NoWorkersError
        As in `run`.

    Examples
    --------
    >>> import tempfile, numpy as np, zarr, cellimg_dask as ci
    >>> space = ci.Space.of(2, "yx", "um", scale=0.5)
    >>> image = ci.map_cells(np.negative, ci.Input(np.ones((6, 9)), space=space), cell_shape=4)
    >>> path = tempfile.mkdtemp() + "/negative.ome.zarr"
    >>> write_ome_zarr(image, path, progress=False).computed
    9
    >>> [array.shape for _, array in sorted(zarr.open_group(path, mode="r").arrays())]
    [(6, 9), (3, 5), (2, 3)]
    """
    began = perf_counter()
    if version not in (None, "0.4", "0.5"):
        raise ValueError(f'version must be "0.5" or "0.4", got {version!r}')
    if not isinstance(progress, bool):
        raise TypeError(f"progress must be a bool, got {progress!r}")
    if verify not in ("checksums", "sizes"):
        raise ValueError(f'verify must be "checksums" or "sizes", got {verify!r}')
    where = place_of_target(path)
    if name is None:
        name = where.rstrip("/").rpartition("/")[2].partition(".")[0] or "image"
    group = OmeGroup(where, "0.5" if version is None and img is not None else version)
    storing = {
        "chunks": chunks,
        "sharded": sharded,
        "compressor": compressor,
        "level": level,
        "fill_value": fill_value,
        "zarr_format": 2 if group.version == "0.4" else 3,
    }
    images = []
    if img is not None:
        choice = (levels, factors, method)
        images.append(_Image.of("", name, img, None, choice, storing, channels))
    elif channels is not None:
        raise TypeError("channels are those of an image, and img is None")
    elif not labels:
        raise TypeError("there is nothing to write: img is None, and there are no labels")
    else:
        group.check_image()
    for called, value in _named(labels):
        choice = (levels, factors, None)
        images.append(_Image.of(f"labels/{called}", called, value, "labels", choice, storing))
    filling = Filling(
        queue,
        as_int(retries, "retries", minimum=0),
        checksums=verify == "checksums",
        max_memory=None if max_memory is None else as_int(max_memory, "max_memory", minimum=1),
        timeout_s=timeout_s,
        progress=progress,
    )
    replaces_all = overwrite and img is not None
    for image in images:
        for place in [where] if replaces_all else [f"{where}/{place}" for place in image.places]:
            check_apart(image.levels, place)
    report = OmeZarrReport(where)
    with group.lock():
        group.check(images, resume=resume, overwrite=overwrite)
        for image in images:
            image.prepare(group, resume=resume, overwrite=overwrite)
        group.describe(images)
        for image in images:
            image.fill(filling, group, report, None if image.path else cells_per_call)
    report.seconds = perf_counter() - began
    return report


@dataclass(frozen=True)
class _Image:
    """An image of the group, with its levels."""

    path: str
    """From the group; empty for the image itself."""
    name: str
    is_labels: bool
    levels: tuple[CellLoader, ...]
    spaces: tuple[Space, ...]
    layouts: tuple[Layout, ...]
    omero: Mapping[str, Any] | None

    @classmethod
    def of(
        cls,
        path: str,
        name: str,
        value: Any,
        kind: Literal["labels"] | None,
        choice: tuple[Any, Any, Any],
        storing: Mapping[str, Any],
        channels: Sequence[Channel | str] | None = None,
    ) -> _Image:
        """Return an image, checked."""
        images = levels_of(value, kind, *choice)
        what = path or "the image"
        for image in images:
            _check_axes(image.space.named, what)
        for number, (finer, image) in enumerate(pairwise(images), 1):
            _check_level(finer, image, f"level {number} of {what}")
        if kind == "labels" and images[0].dtype.kind not in "iu":
            raise TypeError(f"{what}: labels must be integers, got {images[0].dtype}")
        # All of one moment.
        with defining():
            loaders = tuple(pinned_together([image.loader for image in images]))
        for loader in loaders:
            forget_files(loader)
        spaces = tuple(image.space.named for image in images)
        layouts = tuple(
            Layout.of(image.grid, image.dtype, axes=spaces[0].axes, **storing) for image in images
        )
        is_labels = kind == "labels" or isinstance(_finest(value), LabelImg)
        if is_labels and channels:
            raise ValueError("channels are of images, and img is labels of objects; leave them out")
        omero = None if is_labels else _omero(images[0], _said(value), channels)
        return cls(path, name, is_labels, loaders, spaces, layouts, omero)

    @property
    def places(self) -> list[str]:
        """Where the levels are, from the group."""
        front = f"{self.path}/" if self.path else ""
        return [f"{front}{number}" for number in range(len(self.levels))]

    def prepare(self, group: OmeGroup, *, resume: bool, overwrite: bool) -> None:
        """Create the arrays that are not there yet."""
        for place, layout in zip(self.places, self.layouts, strict=True):
            where = f"{group.where}/{place}"
            prepare(layout, where, group.beside(place), resume=resume, overwrite=overwrite)

    def fill(
        self, filling: Filling, group: OmeGroup, report: OmeZarrReport, cells_per_call: Any
    ) -> None:
        """Compute and store the levels, each from the one below as it was stored."""
        stored: dict[CellLoader, Reader] = {}
        for number, (place, loader) in enumerate(zip(self.places, self.levels, strict=True)):
            where = f"{group.where}/{place}"
            report.arrays[place] = done = filling.fill(
                alone(reading_instead(loader, stored), filling.queue),
                ContentKeys(loader),
                self.layouts[number],
                where,
                beside=group.beside(place),
                cells_per_call=None if number else cells_per_call,
                name=f"{self.name} {number}",
            )
            if not done.ok:
                return
            stored[loader] = reader_of(where)


def levels_of(
    value: Any, kind: str | None, levels: Any, factors: Any, method: Any
) -> Sequence[CellImg]:
    """Return the levels of an image as it was given."""
    if isinstance(value, (Pyramid, list, tuple)):
        for what, given in (("levels", levels), ("factors", factors), ("method", method)):
            if given is not None and kind is None:
                raise TypeError(f"{what} is for a single image; the levels are given")
        if not len(value):
            raise ValueError("an image needs at least one level, got none")
        return [_in_order(as_image(image)) for image in value]
    if kind is None and isinstance(value, LabelImg):
        kind = "labels"
    how: Literal["image", "labels"] = "labels" if kind else "image"
    base = _in_order(as_image(value))
    made: Pyramid = pyramid(base, levels, how, factors=factors, method=method)
    return list(made) if levels is not None else made.levels[: _enough(made)]


def _in_order(image: CellImg) -> CellImg:
    """Return an image with its axes in the order of OME-Zarr: time, channels, space.

    Red, green and blue of a picture are its channels, if it has no others.
    """
    names = image.space.axes
    if names is None:
        return image
    if SAMPLES in names and "c" not in names:
        names = tuple("c" if name == SAMPLES else name for name in names)
        image = image.with_space(axes=names)
    places = [_ORDER.index(axis_type(name)) for name in names]
    return transpose(image, sorted(range(len(names)), key=places.__getitem__))


def _finest(value: Any) -> Any:
    return value[0] if isinstance(value, (Pyramid, list, tuple)) else value


def _omero(
    image: CellImg, said: tuple[Channel, ...], given: Sequence[Channel | str] | None
) -> Mapping[str, Any] | None:
    """Return what is noted of the channels of an image: nothing where nobody has said anything."""
    space = image.space.named
    if given is None:
        axis = space.channel_axis
        given = said if axis is not None and len(said) == image.shape[axis] else ()
    looks = channels_of(space, image.shape, image.dtype, given=given, said=said)
    return omero_of(looks, image.dtype)


def _said(value: Any) -> tuple[Channel, ...]:
    """Return how the channels of an image look by what the file says, or as a picture."""
    first = _finest(value)
    given = first if isinstance(first, CellImg) else as_input(first)
    array = given if isinstance(given, CellImg) else given.array
    return said_of_channels(value) or picture_channels(space_of(given), array.shape, array.dtype)


def _enough(made: Pyramid) -> int:
    """Return how many levels there are until the image is small.

    Cells may be flat, those of a stack of planes for instance.
    """
    longest = max(made[0].cell_shape, default=1)
    for number, (image, scale) in enumerate(zip(made, made.scales, strict=True)):
        coarser = made.scales[min(number + 1, len(made) - 1)]
        shrinks = [a != b for a, b in zip(scale, coarser, strict=True)]
        if all(n <= longest for n, becomes in zip(image.shape, shrinks, strict=True) if becomes):
            return number + 1
    return len(made)


def _check_axes(space: Space, what: str) -> None:
    """Refuse axes that OME-Zarr does not know."""
    names = space.axes or ()
    kinds = [axis_type(name) for name in names]
    in_space, single = kinds.count("space"), max(kinds.count("time"), kinds.count("channel"))
    if not 2 <= len(names) <= 5 or not 2 <= in_space <= 3 or single > 1:
        raise ValueError(
            f"{what} has axes {', '.join(names) or 'none'}; OME-Zarr has two to five: at most one "
            f"of time, at most one of channels, two or three in space. Name them by "
            f"with_space(axes=…), or write a zarr array by run"
        )


def _check_level(finer: CellImg, image: CellImg, what: str) -> None:
    """Refuse what OME-Zarr's readers do not take for the same image in a smaller size."""
    if image.dtype != finer.dtype:
        raise TypeError(f"{what} has dtype {image.dtype}, the finer one {finer.dtype}")
    names = [space.axes for space in (finer.space, image.space) if space.axes is not None]
    if image.ndim != finer.ndim or len(set(names)) > 1:
        raise ValueError(
            f"{what} has axes {', '.join(image.space.named.axes or ())}, the finer one "
            f"{', '.join(finer.space.named.axes or ())}"
        )
    if any(less > size for less, size in zip(image.shape, finer.shape, strict=True)):
        raise ValueError(
            f"{what} has shape {image.shape}, which is larger than {finer.shape}: the finest "
            f"level comes first"
        )


def _named(labels: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must map names to images, got {type(labels).__name__}")
    for name, value in labels.items():
        if not isinstance(name, str) or not name or "/" in name or name.startswith((".", "__")):
            raise ValueError(f"labels must have names that can be those of folders, got {name!r}")
        yield name, value
