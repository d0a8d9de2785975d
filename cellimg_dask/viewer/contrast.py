"""Which values of an image to show black and white, when nobody has said it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Roi
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.request import Request
from cellimg_dask.server.layers import Layer

__all__ = ["Contrasts", "find_contrast", "range_of"]

_logger = logging.getLogger("cellimg_dask")


def range_of(values: NDArray[Any]) -> tuple[float, float] | None:
    """Return the range of values without the rarest; None where there is none.

    Examples
    --------
    >>> range_of(np.arange(1001))
    (1.0, 999.0)
    >>> range_of(np.zeros(9)) is None
    True
    """
    flat = values.reshape(-1)
    # Enough to know, and quick for cells of any size.
    flat = flat[:: max(1, flat.size // 1_000_000)]
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return None
    low, high = (float(value) for value in np.quantile(flat, (0.001, 0.999)))
    return (low, high) if low < high else None


def find_contrast(
    image: CellImg,
    found: Callable[[tuple[float, float]], object],
    at: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Have the range of values in the middle of an image told, when it is known.

    The cell in the middle is what is seen first, so that nothing is computed for this only.

    Parameters
    ----------
    image : CellImg
        What is shown.
    found : callable
        Called with the lowest and the highest value.
    at : mapping of axis to index
        Where the image is looked at instead: in one channel.
    """
    grid = image.grid
    if not grid.num_cells:
        return
    middle = [(extent - 1) // 2 for extent in grid.shape]
    for axis, index in at.items():
        middle[axis] = index
    cell = grid.roi(tuple(n // size for n, size in zip(middle, grid.cell_shape, strict=True)))
    start, stop = list(cell.start), list(cell.stop)
    for axis, index in at.items():
        start[axis], stop[axis] = index, index + 1

    def done(request: Request) -> None:
        try:
            known = range_of(request.result())
            if known is not None:
                found(known)
        except Exception as error:
            # Whoever looks at the cell is told of it as well.
            _logger.debug("the range of values is not known: %s", error)

    image.request(Roi(tuple(start), tuple(stop))).add_done_callback(done)


class Contrasts:
    """Finds the ranges of values in which images are shown; of what is hidden once it is seen.

    Parameters
    ----------
    viewer : neuroglancer.Viewer
        That shows them.
    layers : mapping of str to Layer
        As they are shown, by name; may change.
    scene : module
        `cellimg_dask.viewer.scene`, which not everybody can import.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, viewer: Any, layers: Mapping[str, Layer], scene: Any) -> None:
        self._viewer = viewer
        self._layers = layers
        self._scene = scene
        self._lock = threading.Lock()
        self._closed = False
        self.unseen: dict[str, tuple[str, int]] = {}
        """Name in the viewer of what was not seen yet -> its layer, and the number of a channel."""
        viewer.shared_state.add_changed_callback(self._look_later)

    def find(self, name: str) -> None:
        """Find what nobody has said of a layer, and of each of its channels."""
        layer = self._layers[name]
        if layer.kind != "image":
            return
        looks = layer.channels or (layer,)
        with self._lock:
            for number, shown in enumerate(self._scene.names_of(name, layer)):
                if looks[number].contrast is None:
                    self.unseen[shown] = (name, number)
        self._look()

    def forget(self, names: Iterable[str]) -> None:
        """Find nothing for what is in the viewer no more."""
        with self._lock:
            for name in names:
                self.unseen.pop(name, None)

    def close(self) -> None:
        """Find nothing any more."""
        with self._lock:
            self._closed = True
        self._viewer.shared_state.remove_changed_callback(self._look_later)

    def _look_later(self) -> None:
        # The state is locked while it says that it has changed.
        if self.unseen:
            self._viewer.defer_callback(self._look)

    def _look(self) -> None:
        shown = self._viewer.state.layers
        with self._lock:
            if self._closed:
                return
            seen = [name for name in self.unseen if name in shown and shown[name].visible]
            wanted = {each: self.unseen.pop(each) for each in seen}
        for each, (name, number) in wanted.items():
            layer = self._layers.get(name)
            # Unless it was removed meanwhile.
            if layer is not None:
                axis, image = layer.channel_axis, layer.images[-1]
                at = {}
                if axis is not None and layer.channels:
                    # A level may have put channels together.
                    at[axis] = number * image.shape[axis] // layer.shape[axis]
                find_contrast(image, partial(self._show, name, layer, each), at)

    def _show(self, name: str, layer: Layer, shown: str, contrast: tuple[float, float]) -> None:
        # Another may be called so meanwhile.
        if not self._closed and self._layers.get(name) is layer:
            self._viewer.retry_txn(
                lambda state: self._scene.set_contrast(state, shown, contrast), lock=True
            )
