"""Functions to describe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as at
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import Field

from cellimg_dask.bare.arrays import Array


def smooth(
    image: Annotated[NDArray[np.uint16], Array(axes="zyx", role="image", halo=(1, 8, 8))],
    sigma: Annotated[float, Field(gt=0)] = 2,
    *,
    mode: Literal["reflect", "wrap"] = "reflect",
    size: tuple[int, int, int] | None = None,
    weights: Path | None = None,
) -> Annotated[NDArray[np.float32], Array(axes="zyx", role="image")]:
    """Return the image without its noise.

    Parameters
    ----------
    image : ndarray
        A volume.
    sigma : float
        In voxels.
    mode : str
        What lies beyond
        the border.

    Returns
    -------
    ndarray
        As large.
    """
    return image.astype("f4") * sigma


def merge(
    first: NDArray[np.floating[Any]],
    *others: NDArray[np.floating[Any]],
    weights: list[Annotated[float, at.Ge(0)]],
    kernel: NDArray[np.float32] | None = None,
    options: dict[str, int] = {},  # noqa: B006
    task: Any = None,
) -> tuple[NDArray[np.float64], Annotated[NDArray[np.uint8], Array(role="labels")]]:
    raise NotImplementedError


def plain(image, mask, threshold, n_iter=3, **others: bool):
    """Segment.

    Parameters
    ----------
    image : ndarray of shape (z, y, x)
    mask : array-like of bool
        Where.
    threshold : float
        From 0 on.
    """


@pytest.fixture
def functions() -> dict[str, Any]:
    return {"smooth": smooth, "merge": merge, "plain": plain}
