"""Surfaces of labels that are selected, for the 3D panel."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from cellimg_dask.geometry import Roi, as_ints
from cellimg_dask.ops.boxes import boxes_of, find_objects
from cellimg_dask.ops.meshes import NoObjectError, mesh
from cellimg_dask.ops.objects import Objects
from cellimg_dask.server.layers import Layer
from cellimg_dask.viewer.units import factor_of, voxels_at

__all__ = ["Surfaces"]

_MOST_BYTES = 256 << 20
_MOST_KNOWN = 10_000
_MOST_CELLS = 1 << 16
_NOTHING = json.dumps({"fragments": []}).encode()


class Surfaces:
    """Meshes of a layer's labels, computed when they are asked for.

    Parameters
    ----------
    layer : Layer
        As it is shown; of three axes.
    step_size : int or ints
        As for `mesh`.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, layer: Layer, step_size: Any = 1) -> None:
        if len(layer.shape) != 3:
            raise ValueError(f"surfaces are of labels in 3 axes, these have {len(layer.shape)}")
        self.edition = 0
        """Counts the changes of the labels that pages have been told of."""
        self._image = layer.image.with_space(layer.space)
        self._step_size = as_ints(step_size, "step_size", ndim=3, minimum=1)
        self._seeds: dict[int, tuple[int, ...]] = {}
        self._known: OrderedDict[tuple[int, int], bytes | None] = OrderedDict()
        self._objects: tuple[int, Objects] | None = None
        self._lock = threading.Lock()
        # A surface is computed by one thread; the cells that it needs by all.
        self._computing = threading.Lock()

    def source(self, base: str, name: str) -> Any:
        """Return where neuroglancer finds the surfaces, and where these lie."""
        import neuroglancer

        space = self._image.space.named
        axes = space.axes or ()
        order = [axes.index(name) for name in "xyz"] if set(axes) == set("xyz") else [2, 1, 0]
        # Fragments are in nanometers; where there is no unit, in numbers as they are.
        units = [factor_of(space.units[axis])[1] for axis in order]
        scales = [1e-9 if unit else 1.0 for unit in units]

        def dimensions(names: Sequence[str]) -> Any:
            return neuroglancer.CoordinateSpace(names=names, scales=scales, units=units)

        transform = neuroglancer.CoordinateSpaceTransform(
            input_dimensions=dimensions("xyz"),
            output_dimensions=dimensions([axes[axis] for axis in order]),
        )
        url = f"precomputed://{base}mesh/{quote(name)}/{self.edition}"
        return neuroglancer.LayerDataSource(url=url, transform=transform)

    def note(self, names: Sequence[str], scales: Sequence[float], place: Sequence[float]) -> None:
        """Note that somebody has pointed at a label, so that it need not be looked for."""
        at = np.asarray([place], float)
        voxel = np.floor(voxels_at(self._image.space, names, scales, at)[0] + 0.5).astype(int)
        where = tuple(voxel.tolist())
        inside = zip(where, self._image.shape, strict=True)
        if all(0 <= index < extent for index, extent in inside):
            label = int(self._image[where])
            with self._lock:
                self._seeds[label] = where

    def answer(self, path: str) -> bytes | None:
        """Return what is at an address below that of the source; None where nothing is."""
        _, _, rest = path.partition("/")
        if rest == "info":
            return json.dumps({"@type": "neuroglancer_legacy_mesh"}).encode()
        name, _, detail = rest.partition(":")
        if not re.fullmatch("[0-9]{1,20}", name):
            return None
        found = self._surface(int(name))
        if detail == "0":
            return _NOTHING if found is None else json.dumps({"fragments": [name]}).encode()
        return found

    def _surface(self, label: int) -> bytes | None:
        key = self._image.loader.edition, label
        with self._computing:
            with self._lock:
                if key in self._known:
                    self._known.move_to_end(key)
                    return self._known[key]
                seed = self._seeds.get(label)
            found = self._compute(label, seed)
            with self._lock:
                self._known[key] = found
                used = sum(len(each or b"") for each in self._known.values())
                while (used > _MOST_BYTES and len(self._known) > 1) or (
                    len(self._known) > _MOST_KNOWN
                ):
                    used -= len(self._known.popitem(last=False)[1] or b"")
            return found

    def _compute(self, label: int, seed: tuple[int, ...] | None) -> bytes | None:
        if seed is not None and int(self._image[seed]) != label:
            seed = None
        if seed is None and self._image.grid.num_cells > _MOST_CELLS:
            raise ValueError(
                f"to look for label {label} would take all {self._image.grid.num_cells:,} cells; "
                f"select it by a double click on it"
            )
        if label == 0:
            return None
        where: dict[str, Any]
        if seed is None:
            boxes = self._boxes(label)
            if not boxes:
                return None
            where = {"boxes": boxes}
        else:
            where = {"seeds": {label: seed}}
        try:
            made = mesh(self._image, label, step_size=self._step_size, **where)
        except NoObjectError:
            # There is no such label, or no more.
            return None
        return made.to_neuroglancer()

    def _boxes(self, label: int) -> dict[int, Roi]:
        """Return the box of an object, if there is such a one."""
        edition = self._image.loader.edition
        if self._objects is None or self._objects[0] != edition:
            self._objects = edition, find_objects(self._image)
        return boxes_of(self._objects[1], [label])
