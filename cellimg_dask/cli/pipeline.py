"""The filter of the demo: as lazy images, by SciPy in one piece, and by dask's map_overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cellimg_dask as ci

__all__ = ["LUMINANCE", "Pipeline", "detail", "luminance", "smooth"]

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue (Rec. 709)."""


def luminance(image: NDArray[Any], axis: int) -> NDArray[np.float32]:
    """Return red, green and blue along ``axis`` as one channel; alpha is left out."""
    samples = np.moveaxis(image, axis, 0).astype(np.float32)
    gray: NDArray[np.float32] = samples[0]
    if len(samples) >= 3:
        weights = np.array(LUMINANCE, np.float32)
        gray = weights[0] * samples[0] + weights[1] * samples[1] + weights[2] * samples[2]
    return gray


def smooth(image: NDArray[Any], sigma: Sequence[float]) -> NDArray[np.float32]:
    """Return the image after a Gaussian filter."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(image.astype(np.float32, copy=False), sigma))


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
