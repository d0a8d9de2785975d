"""Pairs of points that show the same place in two images."""

from __future__ import annotations

import csv
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Space
from cellimg_dask.viewer.units import voxels_at

if TYPE_CHECKING:
    from cellimg_dask.viewer.looking import Looking

__all__ = ["Landmarks"]

_Points: TypeAlias = dict[int, NDArray[np.float64]]

_ID = re.compile(r"landmark-([0-9]+)")
_COLORS = {"fixed": "#ff4040", "moving": "#40c0ff"}


class Landmarks:
    """Pairs of points that show the same place in two layers; made by `View.landmarks`.

    In the viewer F places the next point of the fixed layer where the mouse is, and M the next
    of the moving one. Points with the same number are a pair. They are moved and deleted as all
    annotations of neuroglancer: Alt+drag, and the list of the layer "landmarks of …".

    Parameters
    ----------
    view : View
        That shows the layers.
    fixed, moving : str
        Names of two layers: the one that stays as it is, and the one that is to be warped.
    side_by_side : bool
        Whether the layers are shown beside one another, each with panels of its own. All other
        layers stay with the fixed one.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self, view: Looking, fixed: str, moving: str, *, side_by_side: bool = False
    ) -> None:
        if fixed == moving:
            raise ValueError("landmarks are of two different layers")
        self.names = {"fixed": fixed, "moving": moving}
        """The layers' names, by what they are here."""
        self._view = view
        self._spaces: dict[str, Space] = {}
        for side, name in self.names.items():
            # Where the layer is shown, which need not be what its image says.
            view._layer(name)
            self._spaces[side] = view.server.layers[name].space.named
        self._callbacks: list[Callable[[Landmarks], object]] = []
        self._untold = self._telling = False
        self._lock = threading.RLock()
        self._layers = {side: f"landmarks of {name}" for side, name in self.names.items()}
        for name in self._layers.values():
            if any(name in view.names_in_viewer(each) for each in view.layers):
                raise ValueError(f"layer {name!r} is called as that of the landmarks")
        self._closed = False
        self._begin(side_by_side)
        self._known = self._read()
        view.viewer.shared_state.add_changed_callback(self._look_later)

    def __len__(self) -> int:
        """Return the number of pairs."""
        fixed, moving = self._read()
        return len(fixed.keys() & moving.keys())

    def __repr__(self) -> str:
        fixed, moving = self._read()
        names = f"{self.names['fixed']!r} and {self.names['moving']!r}"
        single = len(fixed.keys() ^ moving.keys())
        more = f", {single} points without a partner" if single else ""
        return f"<Landmarks of {names}: {len(self)} pairs{more}>"

    # ------------------------------------------------------------------ reading

    def pairs(self, *, in_units: bool = False) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the points of the moving and of the fixed layer, in the order of their numbers.

        As `ThinPlateSpline` takes them: ``warp(moving, ThinPlateSpline(*landmarks.pairs()),
        like=fixed)``.

        Parameters
        ----------
        in_units : bool
            Whether they are in the units of each layer, and not in its voxels; for ``warp(…,
            coordinates="units")``.

        Returns
        -------
        tuple of two arrays (n, ndim)
            Moving and fixed, axes as those of each layer. A point without a partner is left out.
        """
        found = self._read()
        numbers = sorted(found[0].keys() & found[1].keys())
        arrays = []
        for side, points in zip(self.names, found, strict=True):
            space = self._spaces[side]
            array = np.array([points[number] for number in numbers]).reshape(-1, space.ndim)
            if in_units:
                array = array * space.scale + np.asarray(space.translation)
            arrays.append(array)
        fixed, moving = arrays
        return moving, fixed

    def on_change(self, callback: Callable[[Landmarks], object]) -> Callable[[Landmarks], object]:
        """Have ``callback(landmarks)`` called when a point was placed, moved or deleted.

        It is called by a thread of its own, one call after another, and may read images and take
        pictures. One that raises is logged. Of changes that come while it runs it may be told
        once.

        Returns
        -------
        callable
            The callback, which may be dropped by `off_change`.
        """
        with self._lock:
            self._callbacks.append(callback)
        return callback

    def off_change(self, callback: Callable[[Landmarks], object]) -> None:
        """Have a callback called no more."""
        with self._lock:
            self._callbacks.remove(callback)

    # ------------------------------------------------------------------ changing

    def add(self, fixed: Sequence[float], moving: Sequence[float]) -> int:
        """Add a pair, given in voxels of each layer; returns its number."""
        points = {"fixed": self._checked("fixed", fixed), "moving": self._checked("moving", moving)}
        with self._lock:
            known = self._read()
            number = max([0, *known[0], *known[1]]) + 1
            self._place({side: {number: point} for side, point in points.items()})
        return number

    def remove(self, number: int) -> None:
        """Delete a pair, or the point that has no partner.

        Raises
        ------
        KeyError
            If there is none of this number.
        """
        with self._lock:
            if not any(number in points for points in self._read()):
                raise KeyError(f"there is no landmark {number}")
            with self._view.viewer.txn() as state:
                for name in self._layers.values():
                    layer = state.layers[name].layer
                    layer.annotations = [
                        each for each in layer.annotations if _number_of(each) != number
                    ]

    def clear(self) -> None:
        """Delete all."""
        with self._lock, self._view.viewer.txn() as state:
            for name in self._layers.values():
                state.layers[name].layer.annotations = []

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write all points to a CSV file: number, layer, and voxels along each axis."""
        found = dict(zip(self.names, self._read(), strict=True))
        ndim = max(space.ndim for space in self._spaces.values())
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["number", "layer", *(f"axis_{axis}" for axis in range(ndim))])
            for side, points in found.items():
                for number in sorted(points):
                    writer.writerow([number, side, *map(repr, map(float, points[number]))])

    def load(self, path: str | Path) -> None:
        """Replace all points by those of a file that `save` has written.

        Raises
        ------
        ValueError
            If it is another file.
        """
        found: dict[str, dict[int, NDArray[np.float64]]] = {side: {} for side in self.names}
        # Spreadsheets put a mark before the first column.
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            try:
                head = next(rows, [])
                if head[:2] != ["number", "layer"]:
                    raise ValueError(f"its columns are {', '.join(head)[:200]}")
                for row in rows:
                    if row:
                        self._load_row(row, found)
            except (csv.Error, KeyError, IndexError, ValueError) as error:
                if rows.line_num < 2:
                    raise ValueError(f"{path} has no landmarks: {error}") from error
                where = f"line {rows.line_num} of {path}"
                raise ValueError(f"{where} is no landmark: {error}") from error
        with self._lock:
            self._place(found, replace=True)

    def _load_row(self, row: list[str], found: dict[str, dict[int, NDArray[np.float64]]]) -> None:
        number, side = int(row[0]), row[1]
        if side not in found:
            raise ValueError(f'the layer must be "fixed" or "moving", got {side!r}')
        if number < 1 or number in found[side]:
            raise ValueError(f"numbers begin with 1, and each comes once in a layer; got {number}")
        values = [float(value) for value in row[2:] if value != ""]
        found[side][number] = self._checked(side, values)

    # ------------------------------------------------------------------ the viewer

    def close(self) -> None:
        """Have the keys do nothing; the points stay as they are."""
        if self._closed:
            return
        self._closed = True
        viewer = self._view.viewer
        viewer.shared_state.remove_changed_callback(self._look_later)
        for side in self.names:
            viewer.actions.remove(_action(side), self._handlers[side])

    def _begin(self, side_by_side: bool) -> None:
        import neuroglancer

        viewer = self._view.viewer
        with viewer.txn() as state:
            for side, name in self._layers.items():
                if name not in state.layers:
                    layer = neuroglancer.LocalAnnotationLayer(dimensions=state.dimensions)
                    layer.annotation_color = _COLORS[side]
                    state.layers.append(name=name, layer=layer)
                    self._view._scene.put_in_panels(state, [name])
            if side_by_side:
                name = self.names["moving"]
                moving = self._view._shown_of(name, self._view._layer(name))
                state.layout = _beside_one_another(state, [*moving, self._layers["moving"]])
        self._handlers = {
            "fixed": lambda state: self._placed("fixed", state),
            "moving": lambda state: self._placed("moving", state),
        }
        for side, handler in self._handlers.items():
            viewer.actions.add(_action(side), handler)
        with viewer.config_state.txn() as config:
            config.input_event_bindings.data_view["keyf"] = _action("fixed")
            config.input_event_bindings.data_view["keym"] = _action("moving")

    def _placed(self, side: str, action: Any) -> None:
        """Place the next point of a side where the mouse is."""
        place = action.mouse_position
        if place is None or self._closed:
            return
        with self._lock:
            fixed, moving = self._read()
            own, other = (fixed, moving) if side == "fixed" else (moving, fixed)
            # First what has no partner yet.
            waiting = sorted(other.keys() - own.keys())
            number = waiting[0] if waiting else max([0, *own, *other]) + 1
            shown = action.viewer_state.dimensions
            at = np.asarray([place], float)
            (voxel,) = voxels_at(self._spaces[side], shown.names, shown.scales, at)
            self._place({side: {number: voxel}})

    def _place(
        self, points: Mapping[str, Mapping[int, NDArray[np.float64]]], *, replace: bool = False
    ) -> None:
        import neuroglancer

        from cellimg_dask.viewer import scene

        with self._view.viewer.txn() as state:
            for side, numbered in points.items():
                layer = state.layers[self._layers[side]].layer
                kept = (
                    []
                    if replace
                    else [each for each in layer.annotations if _number_of(each) not in numbered]
                )
                for number, voxel in sorted(numbered.items()):
                    place = scene.place_in(
                        state.dimensions, self._spaces[side], list(voxel), state.position
                    )
                    kept.append(
                        neuroglancer.PointAnnotation(
                            id=f"landmark-{number}", point=place, description=str(number)
                        )
                    )
                layer.annotations = kept

    def _read(self) -> tuple[_Points, _Points]:
        """Return the points of both sides by number, in voxels."""
        state = self._view.viewer.state
        found: list[dict[int, NDArray[np.float64]]] = []
        for side, name in self._layers.items():
            points: dict[int, NDArray[np.float64]] = {}
            found.append(points)
            if name not in state.layers:
                continue
            layer = state.layers[name].layer
            shown = state.dimensions
            unnamed = []
            for each in layer.annotations:
                if each.type != "point":
                    continue
                at = np.asarray([each.point], float)
                (voxel,) = voxels_at(self._spaces[side], shown.names, shown.scales, at)
                number = _number_of(each)
                if number is None:
                    unnamed.append(voxel)
                else:
                    points[number] = voxel
            # Placed with neuroglancer's own tool: in their order, behind all others.
            first = max([0, *points]) + 1
            points.update(enumerate(unnamed, first))
        return found[0], found[1]

    def _look_later(self) -> None:
        # The state is locked while it says that it has changed.
        self._view.viewer.defer_callback(self._look)

    def _look(self) -> None:
        with self._lock:
            if self._closed:
                return
            now = self._read()
            same = all(
                before.keys() == after.keys()
                and all(np.array_equal(before[number], after[number]) for number in before)
                for before, after in zip(self._known, now, strict=True)
            )
            self._known = now
            if same or not self._callbacks:
                return
            self._untold = True
            if not self._telling:
                # Not by this thread, which is the one that answers all pages.
                self._telling = True
                threading.Thread(target=self._tell, name="cellimg-landmarks", daemon=True).start()

    def _tell(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._untold:
                    self._telling = False
                    return
                self._untold = False
                callbacks = list(self._callbacks)
            for callback in callbacks:
                self._call(callback)

    def _call(self, callback: Callable[[Landmarks], object]) -> None:
        try:
            callback(self)
        except Exception:
            import logging

            logging.getLogger("cellimg_dask").exception(
                "%r, called because a landmark has changed, raised", callback
            )

    def _checked(self, side: str, point: Sequence[float]) -> NDArray[np.float64]:
        found = np.asarray(point, float)
        ndim = self._spaces[side].ndim
        if found.shape != (ndim,) or not np.isfinite(found).all():
            raise ValueError(
                f"a point of {self.names[side]!r} must have {ndim} finite numbers, got {point!r}"
            )
        return found


def _number_of(annotation: Any) -> int | None:
    match = _ID.fullmatch(annotation.id or "")
    return None if match is None else int(match[1])


def _action(side: str) -> str:
    return f"cellimg-landmark-{side}"


def _beside_one_another(state: Any, names: Sequence[str]) -> Any:
    """Return panels of some layers on the right, and of all others on the left."""
    import neuroglancer

    others = [each.name for each in state.layers if each.name not in names]
    left = neuroglancer.LayerGroupViewer(layers=others, layout="xy")
    right = neuroglancer.LayerGroupViewer(layers=list(names), layout="xy")
    right.position.link = "unlinked"
    right.cross_section_scale.link = "unlinked"
    right.cross_section_orientation.link = "unlinked"
    return neuroglancer.row_layout([left, right])
