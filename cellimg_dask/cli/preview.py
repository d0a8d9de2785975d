"""The picture of a demo: what was read, both stages, and the check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Picture", "draw"]

_MOST_LINES = 64
_INK = "#22303c"
_REGION = "#ffffff"
_STAGES = ("#4c9be8", "#f2b134", "#e4572e")


@dataclass(frozen=True)
class Picture:
    """What is drawn; arrays are planes of one shape, positions are (row, column) in voxels."""

    title: str
    image: NDArray[Any]
    """The input; with a third axis of red, green, blue where it is in colour."""
    first: NDArray[Any]
    second: NDArray[Any]
    with_halo: NDArray[Any]
    """Result minus reference."""
    without_halo: NDArray[Any]
    """The same for a result that was computed without halo."""
    origin: tuple[int, int]
    """Where the planes begin in the image."""
    cell: tuple[int, int]
    """Cell shape."""
    region: tuple[int, int, int, int]
    """First row and column, one past the last row and column, of the region read first."""
    taken: Mapping[str, NDArray[np.bool_]]
    """Per image, first to last: what to say of it -> which of the cells shown were needed."""
    halos: tuple[int, int]
    """Halo of each stage."""


def draw(picture: Picture, path: Path) -> None:
    """Save the picture as PNG.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows, columns = picture.first.shape
    width = 13.0
    panel = (width - 0.9) / 3
    height = 2 * (min(max(panel * rows / columns, 2.0), 7.0) + 0.45) + 0.6
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(picture.title, fontsize=15, fontweight="bold", color=_INK)
    axes = figure.subplots(2, 3)
    top, left = picture.origin
    extent = (left - 0.5, left + columns - 0.5, top + rows - 0.5, top - 0.5)

    def show(axis: Any, data: NDArray[Any], title: str, **how: Any) -> Any:
        shown = axis.imshow(data, extent=extent, **how)
        axis.set_title(title, fontsize=11, color=_INK)
        axis.set_xticks([])
        axis.set_yticks([])
        return shown

    show(axes[0, 0], picture.image, "input, cut into cells", cmap="gray", **_range(picture.image))
    _draw_grid(axes[0, 0], picture, extent, "#ffffff")
    _draw_region(axes[0, 0], picture)

    _draw_taken(axes[0, 1], picture, extent, show)

    show(
        axes[0, 2],
        picture.first,
        f"stage 1: smooth (halo {picture.halos[0]})",
        cmap="gray",
        **_range(picture.first),
    )
    low, high = np.nanpercentile(picture.second, [1.5, 98.5])
    bound = max(abs(float(low)), abs(float(high)), 1e-30)
    show(
        axes[1, 0],
        picture.second,
        f"stage 2: smooth − background (halo {picture.halos[1]})",
        cmap="RdBu_r",
        vmin=-bound,
        vmax=bound,
    )
    worst = [_largest(picture.without_halo), _largest(picture.with_halo)]
    bound = max(float(np.nanpercentile(np.abs(picture.without_halo), 99)), worst[1], 1e-30)
    for axis, data, title in (
        (axes[1, 1], picture.without_halo, f"error without halo: up to {worst[0]:.3g}"),
        (
            axes[1, 2],
            picture.with_halo,
            f"error with halo: {'0 everywhere' if worst[1] == 0 else f'up to {worst[1]:.3g}'}",
        ),
    ):
        shown = show(axis, data, title, cmap="PuOr", vmin=-bound, vmax=bound)
        _draw_grid(axis, picture, extent, "#c5cdd5")
    # Inside the last panel, which is empty when all is well.
    scale = axes[1, 2].inset_axes((0.12, 0.2, 0.76, 0.035))
    bar = figure.colorbar(shown, cax=scale, orientation="horizontal", extend="both")
    bar.set_label("cell by cell − whole image", color=_INK, fontsize=10.5)
    figure.savefig(path, dpi=100)


def _range(data: NDArray[Any]) -> dict[str, float]:
    if data.ndim == 3 or data.dtype == bool:
        return {}
    low, high = np.nanpercentile(data, [0.5, 99.5])
    return {"vmin": float(low), "vmax": float(high)}


def _largest(data: NDArray[Any]) -> float:
    return float(np.max(np.abs(data), initial=0, where=~np.isnan(data)))


def _edges(first: int, extent: int, cell: int) -> list[int]:
    """Return the cell borders inside ``first .. first + extent``."""
    return list(range(first - first % cell + cell, first + extent, cell))


def _draw_grid(
    axis: Any, picture: Picture, extent: tuple[float, float, float, float], colour: str
) -> None:
    rows = _edges(picture.origin[0], picture.first.shape[0], picture.cell[0])
    columns = _edges(picture.origin[1], picture.first.shape[1], picture.cell[1])
    if len(rows) > _MOST_LINES or len(columns) > _MOST_LINES:
        return
    left, right, bottom, top = extent
    style = {"colors": colour, "linewidth": 0.8, "alpha": 0.55}
    axis.hlines([r - 0.5 for r in rows], left, right, **style)
    axis.vlines([c - 0.5 for c in columns], top, bottom, **style)


def _draw_region(axis: Any, picture: Picture) -> None:
    from matplotlib.patches import Rectangle

    top, left, bottom, right = picture.region
    for colour, width in (("#000000", 3.6), (_REGION, 1.8)):
        axis.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=colour,
                linewidth=width,
            )
        )


def _draw_taken(
    axis: Any, picture: Picture, extent: tuple[float, float, float, float], show: Any
) -> None:
    """Draw which cells of each image the region needed, the last stage on top."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    rows, columns = picture.first.shape
    top, left = picture.origin
    of_row = (np.arange(top, top + rows) // picture.cell[0]) - top // picture.cell[0]
    of_column = (np.arange(left, left + columns) // picture.cell[1]) - left // picture.cell[1]
    shade = np.ones((rows, columns, 3))
    shade[:] = to_rgb("#e9edf1")
    legend = []
    colours = _STAGES[-len(picture.taken) :]
    for (label, cells), colour in zip(picture.taken.items(), colours, strict=True):
        shade[cells[np.ix_(of_row, of_column)]] = to_rgb(colour)
        legend.append(Patch(color=colour, label=label))
    show(axis, shade, "computed for the one region (white frame)", interpolation="nearest")
    _draw_grid(axis, picture, extent, "#7d8b98")
    _draw_region(axis, picture)
    axis.legend(
        handles=legend[::-1], loc="lower right", fontsize=11, framealpha=0.95, edgecolor="none"
    )
