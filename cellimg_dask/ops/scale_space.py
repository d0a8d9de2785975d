"""Responses of blob detectors over a range of sizes, as scikit-image computes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DifferenceOfGaussians", "LaplacianOfGaussian", "ScaleSpace", "kernel_radius"]

Sigmas = tuple[float, ...]
"""One per axis."""


@dataclass(frozen=True)
class LaplacianOfGaussian:
    """The scale-normalised Laplacian of Gaussian, of which blobs are maxima."""

    min_sigma: Sigmas
    max_sigma: Sigmas
    num_sigma: int
    log_scale: bool

    name = "blob_log"

    def sigmas(self, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        """Return the sizes looked for, of shape (scales, axes), for an image of that dtype."""
        low, high = np.array(self.min_sigma, dtype), np.array(self.max_sigma, dtype)
        if self.log_scale:
            return np.logspace(np.log10(low), np.log10(high), self.num_sigma)
        return np.linspace(low, high, self.num_sigma)

    def widest(self, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        """Return the largest sigma of any filter, per axis."""
        widest: NDArray[np.floating] = self.sigmas(dtype).max(axis=0)
        return widest

    def responses(self, image: NDArray[np.floating]) -> Iterator[NDArray[np.floating]]:
        """Yield the response to each size."""
        from scipy.ndimage import gaussian_laplace

        for sigma in self.sigmas(image.dtype):
            # The square of the size makes responses to different sizes comparable.
            yield (-gaussian_laplace(image, sigma) * np.mean(sigma) ** 2).astype(
                image.dtype, copy=False
            )


@dataclass(frozen=True)
class DifferenceOfGaussians:
    """The difference of successively wider Gaussians, which approximates the Laplacian."""

    min_sigma: Sigmas
    max_sigma: Sigmas
    sigma_ratio: float

    name = "blob_dog"

    def _gaussians(self, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        low, high = np.array(self.min_sigma, dtype), np.array(self.max_sigma, dtype)
        steps = int(np.mean(np.log(high / low) / np.log(self.sigma_ratio) + 1))
        return np.array([low * self.sigma_ratio**step for step in range(steps + 1)])

    def sigmas(self, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        """Return the sizes looked for, of shape (scales, axes), for an image of that dtype."""
        return self._gaussians(dtype)[:-1]

    def widest(self, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        """Return the largest sigma of any filter, per axis."""
        widest: NDArray[np.floating] = self._gaussians(dtype).max(axis=0)
        return widest

    def responses(self, image: NDArray[np.floating]) -> Iterator[NDArray[np.floating]]:
        """Yield the response to each size."""
        from skimage.filters import gaussian

        first, *others = self._gaussians(image.dtype)
        before = gaussian(image, sigma=first, mode="reflect")
        for sigma in others:
            after = gaussian(image, sigma=sigma, mode="reflect")
            yield (before - after) * (1 / (self.sigma_ratio - 1))
            before = after


ScaleSpace = LaplacianOfGaussian | DifferenceOfGaussians


def kernel_radius(space: ScaleSpace) -> tuple[int, ...]:
    """Return how far a response looks along each axis, in voxels.

    SciPy cuts Gaussian kernels off at four sigmas, rounded to the nearest voxel.
    """
    kinds: list[np.dtype[np.floating]] = [np.dtype(np.float32), np.dtype(np.float64)]
    reach = [[int(4.0 * float(sigma) + 0.5) for sigma in space.widest(kind)] for kind in kinds]
    return tuple(map(max, *reach))
