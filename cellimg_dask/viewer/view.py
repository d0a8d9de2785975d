"""`view`: images in neuroglancer, in a browser, while they are being computed."""

from __future__ import annotations

import html
import logging
import secrets
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cellimg_dask.geometry import Space, as_int
from cellimg_dask.viewer.browser import Browser
from cellimg_dask.viewer.contrast import find_contrast
from cellimg_dask.viewer.layers import Layer, as_layers
from cellimg_dask.viewer.serving import Server, serve
from cellimg_dask.viewer.units import factor_of, voxels_at

if TYPE_CHECKING:
    from cellimg_dask.viewer.landmarks import Landmarks
    from cellimg_dask.viewer.painting import Brush

__all__ = ["View", "view"]

_logger = logging.getLogger("cellimg_dask")

_LAYOUTS = ("4panel", "4panel-alt", "xy", "xz", "yz", "xy-3d", "xz-3d", "yz-3d", "3d")
_FIRST_PIXELS = 400
"""How wide a panel is taken to be before anybody has opened it."""


class View:
    """Images shown in neuroglancer; made by `view`. It ends by `close`, or as a context manager.

    Notes
    -----
    Thread-safe. Ends with the process.
    """

    def __init__(
        self,
        layers: Any,
        *,
        host: str,
        port: int,
        layout: str,
        work: bool,
        prefetch: bool,
        **options: Any,
    ) -> None:
        # neuroglancer takes a second to import, and not everybody has it.
        try:
            from cellimg_dask.viewer.frame import Frame, FrameViewer
        except ImportError as error:
            raise ImportError(
                "to see images neuroglancer is needed: pip install 'cellimg-dask[view]'"
            ) from error
        self._lock = threading.RLock()
        self._given: dict[str, Layer] = {}
        self._work = bool(work)
        self._watches: dict[str, list[Callable[[Any], object]]] = {}
        self._editions: dict[str, int] = {}
        self._shown: dict[str, int] = {}
        self._seen = threading.Condition(self._lock)
        # A page that cannot fetch again what has changed gets a new address of it instead.
        self._by_address = False
        self._browser: Browser | None = None
        self._brush: Brush | None = None
        self._landmarks: list[Landmarks] = []
        self._closed = False
        given = as_layers(layers)
        self.server: Server = serve({}, host=host, **options)
        """The server of the layers' data."""
        try:
            self._frame = Frame(secrets.token_urlsafe(16), host, port, self._answer)
        except BaseException:
            self.server.close()
            raise
        self.viewer: Any = FrameViewer(self._frame)
        """The ``neuroglancer.Viewer``, for all that is not offered here."""
        try:
            placed = [layer.space for layer in given.values()]
            for name, layer in given.items():
                self._prepare(name, layer, placed)
            self._begin(layout, prefetch)
        except BaseException:
            self.close()
            raise
        _views.add(self)

    # ------------------------------------------------------------------ what it is

    @property
    def url(self) -> str:
        """Address of the page. Whoever knows it can see all layers, and paint."""
        return str(self.viewer.get_viewer_url())

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by name, as they were given."""
        return dict(self._given)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed

    @property
    def num_open(self) -> int:
        """How many pages show the view, `screenshot`'s own included."""
        return self._frame.num_open

    def __repr__(self) -> str:
        names = ", ".join(self._given) or "no layers"
        return f"<View {'closed' if self._closed else self.url}: {names}>"

    def _repr_html_(self) -> str:
        if self._closed:
            return html.escape(repr(self))
        url = html.escape(self.url, quote=True)
        return (
            f'<p><a href="{url}" target="_blank">{url}</a></p>'
            f'<iframe src="{url}" width="100%" height="600" style="border:0" '
            f'allow="clipboard-write"></iframe>'
        )

    # ------------------------------------------------------------------ layers

    def add(self, name: str, image: Any) -> None:
        """Show another image, above the others; arguments as for an entry of `view`'s layers."""
        self._check_open()
        (layer,) = as_layers({name: image}).values()
        if name in self._given:
            raise ValueError(f"there is a layer {name!r} already; remove it first")
        self._prepare(name, layer, [each.space for each in self.server.layers.values()])
        with self.viewer.txn() as state:
            if len(self._given) == 1:
                self._look_at_center(state)
            self._append(state, name)
        self._find_contrast(name)

    def remove(self, name: str) -> None:
        """Show a layer no more."""
        self._layer(name)
        with self._lock:
            if self._brush is not None and self._brush.name == name:
                self._brush.close()
            del self._given[name], self.server.layers[name]
            self._watches.pop(name, None)
            self._editions.pop(name, None)
        with self.viewer.txn() as state:
            for each in (name, _work_name(name)):
                if each in state.layers:
                    del state.layers[each]
        self._tell()

    def show(
        self,
        name: str,
        *,
        visible: bool | None = None,
        opacity: float | None = None,
        contrast: tuple[float, float] | None = None,
        color: str | tuple[float, float, float] | None = None,
    ) -> None:
        """Change how a layer looks; as for `Layer`.

        Raises
        ------
        KeyError
            If there is no such layer.
        """
        from cellimg_dask.viewer import scene

        layer = self._layer(name)
        # Checked as those of a layer are.
        looks = Layer(np.zeros(1, np.uint8), opacity=opacity, contrast=contrast, color=color)
        with self.viewer.txn() as state:
            managed = state.layers[name]
            if visible is not None:
                managed.visible = bool(visible)
            if layer.kind == "labels":
                if contrast is not None:
                    raise ValueError(f"layer {name!r} shows labels, which have no contrast")
                if looks.opacity is not None:
                    managed.layer.selected_alpha = looks.opacity
                if looks.color is not None:
                    managed.layer.segment_default_color = looks.color
                return
            if looks.opacity is not None:
                managed.layer.opacity = looks.opacity
            controls = dict(managed.layer.shader_controls.to_json())
            if looks.contrast is not None:
                controls |= scene.contrast_controls(looks.contrast)
            if looks.color is not None:
                controls["color"] = looks.color
                managed.layer.blend = "additive"
            managed.layer.shader_controls = controls

    def selected(self, name: str) -> list[int]:
        """Return the labels that are selected in a layer of labels, in ascending order."""
        self._labels(name)
        return sorted(int(label) for label in self.viewer.state.layers[name].segments)

    def select(self, name: str, labels: Iterable[int]) -> None:
        """Select labels, and no others; with none selected all are shown."""
        self._labels(name)
        wanted = [int(label) for label in labels]
        with self.viewer.txn() as state:
            state.layers[name].segments = wanted

    # ------------------------------------------------------------------ where to look

    @property
    def position(self) -> tuple[float, ...]:
        """Voxel of the first layer that is in the middle, in the order of its axes."""
        return self.position_in(next(iter(self._given)))

    @position.setter
    def position(self, voxel: Sequence[float]) -> None:
        self.move_to(voxel)

    def position_in(self, name: str, *, in_units: bool = False) -> tuple[float, ...]:
        """Return which voxel of a layer is in the middle, or where that is in its units."""
        from cellimg_dask.viewer import scene

        space = self._shown_layer(name).space
        state = self.viewer.state
        shown = state.dimensions
        at = np.asarray([state.position], float)
        voxel = voxels_at(space, shown.names, shown.scales, at)[0]
        if in_units:
            voxel = np.add(space.translation, np.multiply(space.scale, voxel))
        # Without what rounding has left of the way there and back.
        return tuple(round(float(part), 9) for part in voxel)

    def move_to(
        self, position: Sequence[float], *, layer: str | None = None, in_units: bool = False
    ) -> None:
        """Have a place in the middle.

        Parameters
        ----------
        position : floats
            A voxel of a layer, in the order of its axes.
        layer : str, optional
            Default: the first.
        in_units : bool
            Whether the position is in the layer's units instead.
        """
        from cellimg_dask.viewer import scene

        name = next(iter(self._given)) if layer is None else layer
        space = self._shown_layer(name).space
        place = [float(part) for part in position]
        if len(place) != space.ndim:
            raise ValueError(
                f"position must have {space.ndim} numbers, one for each axis of {name!r}, "
                f"got {len(place)}"
            )
        if in_units:
            place = list(np.divide(np.subtract(place, space.translation), space.scale))
        with self.viewer.txn() as state:
            before = state.position
            state.position = scene.place_in(state.dimensions, space, place, before)

    def zoom(self, voxels_per_pixel: float) -> None:
        """Have so many voxels of the first layer's finest axis in a pixel of the screen."""
        number = float(voxels_per_pixel)
        if not number > 0:
            raise ValueError(f"voxels_per_pixel must be positive, got {voxels_per_pixel}")
        from cellimg_dask.viewer import scene

        space = self._shown_layer(next(iter(self._given))).space
        with self.viewer.txn() as state:
            shown = state.dimensions
            canonical = min(float(scale) for scale in shown.scales[:3])
            finest = min(
                scale * factor_of(unit)[0]
                for name, unit, scale in zip(
                    space.named.axes or (), space.units, space.scale, strict=True
                )
                if name in shown.names[:3]
            )
            state.cross_section_scale = number * finest / canonical

    def show_oblique(self, orientation: Sequence[float]) -> None:
        """Turn the planes.

        Parameters
        ----------
        orientation : 3 or 4 floats
            The direction that the first panel looks along, in the order of the axes of the first
            layer that are shown (z, y, x); or a quaternion (x, y, z, w), as neuroglancer has it.
            ``(1, 0, 0)`` turns back.
        """
        from cellimg_dask.viewer import scene

        numbers = [float(part) for part in orientation]
        if len(numbers) not in (3, 4) or not np.isfinite(numbers).all() or not any(numbers):
            raise ValueError(
                f"orientation must be a direction of 3 numbers or a quaternion of 4, "
                f"got {orientation!r}"
            )
        if len(numbers) == 3:
            quaternion = scene.normal_to_quaternion(numbers[::-1])
        else:
            quaternion = list(np.divide(numbers, np.linalg.norm(numbers)))
        with self.viewer.txn() as state:
            state.cross_section_orientation = quaternion

    def layout(self, name: str) -> None:
        """Choose the panels: "4panel", "xy", "xz", "yz", "xy-3d", "3d" and so on."""
        with self.viewer.txn() as state:
            state.layout = _checked_layout(name)

    # ------------------------------------------------------------------ pictures

    def wait(self, timeout: float | None = 60) -> None:
        """Wait until all that is visible is there, as it is after the last change.

        Where no browser shows the view, one without a window is started for it.

        Raises
        ------
        TimeoutError
            If it takes longer, for instance because a cell cannot be computed.
        """
        self._picture(None, timeout)

    def screenshot(
        self,
        path: str | Path | None = None,
        *,
        size: tuple[int, int] | None = None,
        controls: bool = False,
        timeout: float | None = 60,
    ) -> bytes:
        """Return a picture of the view as PNG, when all that is visible is there.

        Parameters
        ----------
        path : path, optional
            Where it is written to as well.
        size : (width, height), optional
            In pixels. Default: as the browser has it; (1200, 800) where there is none.
        controls : bool
            Whether the panels' borders stay.
        timeout : float, optional
            Seconds.

        Raises
        ------
        TimeoutError
            If it takes longer, for instance because a cell cannot be computed.
        FileNotFoundError
            If no browser shows the view, and none is installed.
        """
        wanted = None
        if size is not None:
            wanted = as_int(size[0], "size[0]", minimum=1), as_int(size[1], "size[1]", minimum=1)
        picture = self._picture(wanted, timeout, controls)
        if path is not None:
            Path(path).write_bytes(picture)
        return picture

    def _picture(
        self, size: tuple[int, int] | None, timeout: float | None, controls: bool = True
    ) -> bytes:
        self._check_open()
        if not self.num_open and (self._browser is None or not self._browser.is_running):
            self._close_browser()
            # Its own frame takes some room.
            width, height = size or (1200, 800)
            self._browser = Browser(self.url, (max(width, 500), max(height, 500) + 150))
            size = size or (width, height)
        from cellimg_dask.viewer.shooting import shoot

        def is_current() -> bool:
            editions = self._editions.items()
            return self._by_address or all(
                self._shown.get(name, -1) >= edition for name, edition in editions
            )

        return shoot(self.viewer, self._seen, is_current, size, controls, timeout)

    # ------------------------------------------------------------------ painting, landmarks

    def paint(
        self,
        layer: Any,
        *,
        size: float | None = None,
        value: Any = 1,
        shape: str = "disc",
    ) -> Brush:
        """Paint into a layer: hold P and drag.

        With the left button it paints, with the right one it erases; the brackets change the
        size, Ctrl+Z takes a stroke back and Ctrl+Shift+Z brings it again.

        Parameters
        ----------
        layer : str or Source
            A layer that is a `Source`, or the source.
        size : float, optional
            Diameter, in the layer's units. Default: 10 voxels.
        value : scalar
            What is painted.
        shape : {"disc", "ball"}
            Whether the plane that is shown is painted, or what lies around it as well.

        Returns
        -------
        Brush
            With which a program paints as well. It ends when another one is made.

        Raises
        ------
        TypeError
            If the layer cannot be changed.
        """
        from cellimg_dask.viewer.painting import Brush

        self._check_open()
        name = self._name_of(layer)
        brush = Brush(
            self._given[name].given,
            size=size,
            value=value,
            shape=shape,
            name=name,
            space=self._shown_layer(name).space,
            on_change=self._tell,
        )
        with self._lock:
            before, self._brush = self._brush, brush
        if before is not None:
            before.close()
        self._tell()
        return brush

    def landmarks(self, fixed: str, moving: str, **options: Any) -> Landmarks:
        """Place pairs of points; see `Landmarks`."""
        from cellimg_dask.viewer.landmarks import Landmarks

        self._check_open()
        made = Landmarks(self, fixed, moving, **options)
        self._landmarks.append(made)
        return made

    def _name_of(self, layer: Any) -> str:
        if isinstance(layer, str):
            self._layer(layer)
            return layer
        for name, known in self._given.items():
            if known.given is layer or known is layer:
                return name
        raise KeyError(f"no layer of this view shows {layer!r}")

    # ------------------------------------------------------------------ what the page says

    def _answer(self, message: dict[str, Any]) -> Any:
        kind = message.get("kind")
        if kind == "shown":
            with self._seen:
                for name, edition in message["layers"].items():
                    self._shown[name] = max(self._shown.get(name, -1), int(edition))
                self._seen.notify_all()
            return None
        if kind == "cannot refresh":
            _logger.warning("the viewer's page is another than expected; changes reload a layer")
            self._by_address = True
            return None
        brush = self._brush
        if brush is None:
            raise ValueError("nothing is painted: view.paint(layer)")
        return brush.answer(message)

    def _tell(self) -> None:
        """Tell the pages what there is."""
        if self._closed:
            return
        with self._lock:
            base = self.server.url
            brush = self._brush
            from cellimg_dask.viewer import scene

            layers = {
                name: {
                    "edition": edition,
                    "prefix": scene.source_url(base, name).removeprefix("zarr3://"),
                }
                for name, edition in self._editions.items()
            }
            facts = None if brush is None or brush.closed else brush.facts()
            self._frame.tell(layers=layers, brush=facts)

    # ------------------------------------------------------------------ changes

    def _watch(self, name: str, shown: Layer) -> list[Callable[[Any], object]]:
        itself = weakref.ref(self)

        def changed(change: Any) -> None:
            view = itself()
            if view is not None:
                view._changed(name)

        return [image.on_dirty(changed) for image in shown.images]

    def _changed(self, name: str) -> None:
        """Have the pages fetch a layer again; what comes meanwhile is told with it."""
        with self._lock:
            if self._closed or name not in self._editions:
                return
            self._editions[name] += 1
            edition = self._editions[name]
        self._tell()
        if self._by_address:
            from cellimg_dask.viewer import scene

            url = scene.source_url(self.server.url, name, edition)

            def readdress(state: Any) -> None:
                if name in state.layers:
                    state.layers[name].layer.source[0].url = url

            self.viewer.retry_txn(readdress, lock=True)

    # ------------------------------------------------------------------ beginning and end

    def _prepare(self, name: str, layer: Layer, placed: Sequence[Space]) -> None:
        from cellimg_dask.viewer import scene

        shown = scene.as_shown(layer, placed)
        scene.dimensions([*(each.space for each in self.server.layers.values()), shown.space])
        with self._lock:
            self._given[name] = layer
            self.server.layers[name] = shown
            self._editions[name] = 0
            self._watches[name] = self._watch(name, shown)
        self._tell()

    def _begin(self, layout: str, prefetch: bool) -> None:
        with self.viewer.txn() as state:
            self._look_at_center(state)
            for name in self._given:
                self._append(state, name)
            state.layout = _checked_layout(layout)
            state.prefetch = bool(prefetch)
            state.show_slices = True
            state.title = ", ".join(self._given)
        for name in self._given:
            self._find_contrast(name)

    def _look_at_center(self, state: Any) -> None:
        from cellimg_dask.viewer import scene

        shown = list(self.server.layers.values())
        if not shown:
            return
        state.dimensions = scene.dimensions(each.space for each in shown)
        center = [(extent - 1) // 2 for extent in shown[0].shape]
        state.position = scene.place_in(state.dimensions, shown[0].space, center)
        state.cross_section_scale = scene.first_scale(shown, state.dimensions, _FIRST_PIXELS)
        state.projection_scale = 2 * _FIRST_PIXELS * state.cross_section_scale

    def _append(self, state: Any, name: str) -> None:
        from cellimg_dask.viewer import scene

        shown = self._shown_layer(name)
        url = scene.source_url(self.server.url, name)
        if shown.kind == "labels":
            state.layers.append(name=name, layer=scene.labels_layer(shown, url))
        else:
            state.layers.append(name=name, layer=scene.image_layer(shown, url))
        state.layers[name].visible = shown.visible
        if self._work:
            url = scene.source_url(f"{self.server.url}/@work", name)
            state.layers.append(name=_work_name(name), layer=scene.work_layer(url))

    def _find_contrast(self, name: str) -> None:
        shown = self._shown_layer(name)
        if shown.kind == "image" and shown.contrast is None:
            find_contrast(shown.images[-1], lambda found: self._set_contrast(name, found))

    def _set_contrast(self, name: str, contrast: tuple[float, float]) -> None:
        """Show the range of values that was found meanwhile, unless somebody has chosen one."""
        from cellimg_dask.viewer import scene

        def change(state: Any) -> None:
            if name not in state.layers:
                return
            layer = state.layers[name].layer
            controls = dict(layer.shader_controls.to_json())
            if "normalized" not in controls:
                layer.shader_controls = controls | scene.contrast_controls(contrast)

        if not self._closed:
            self.viewer.retry_txn(change, lock=True)

    def close(self) -> None:
        """End the view, its servers and what was started for pictures."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._watches.clear()
            self._seen.notify_all()
        if self._brush is not None:
            self._brush.close()
        for landmarks in self._landmarks:
            landmarks.close()
        self._close_browser()
        self._frame.stop()
        self.server.close()

    def _close_browser(self) -> None:
        browser, self._browser = self._browser, None
        if browser is not None:
            browser.close()

    def __enter__(self) -> View:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the view is closed")

    def _layer(self, name: str) -> Layer:
        self._check_open()
        try:
            return self._given[name]
        except KeyError:
            there = ", ".join(map(repr, self._given)) or "none"
            raise KeyError(f"there is no layer {name!r}; there is {there}") from None

    def _shown_layer(self, name: str) -> Layer:
        self._layer(name)
        return self.server.layers[name]

    def _labels(self, name: str) -> Layer:
        layer = self._layer(name)
        if layer.kind != "labels":
            raise ValueError(
                f'layer {name!r} shows values; to select labels give Layer(image, kind="labels")'
            )
        return layer


def view(
    layers: Any = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    layout: str = "4panel",
    work: bool = False,
    prefetch: bool = False,
    **options: Any,
) -> View:
    """Show images in neuroglancer, in a browser: ``view.url`` is the page.

    What is visible is computed, and nothing else; what changes is shown as it changes. In Jupyter
    the view shows itself. Nothing is asked of the net.

    Parameters
    ----------
    layers : mapping of str to image
        As for `serve`: lazy images, sources, arrays, pyramids, sequences of levels, `Layer`. The
        first lies below. One of which nobody has said where its voxels lie, is laid upon the
        first.
    host : str
        Address to listen at. Default: that which only this machine can reach.
    port : int
        Of the page. Default: one that is free.
    layout : str
        "4panel", "xy", "xz", "yz", "xy-3d", "3d" and so on.
    work : bool
        Whether layers show which cells are being computed.
    prefetch : bool
        Whether neighbours of what is visible are computed as well, when there is nothing else.
    **options
        Further arguments of `serve`, for the server of the data.

    Returns
    -------
    View

    Raises
    ------
    ImportError
        If neuroglancer is not installed.
    OSError
        If the address or the port cannot be had.
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> negative = ci.map_cells(np.negative, np.arange(60.0).reshape(3, 4, 5), cell_shape=2)
    >>> with view({"negative": negative}) as shown:
    ...     shown.move_to((2, 0, 1))
    ...     shown.position
    (2.0, 0.0, 1.0)
    """
    return View(
        layers, host=host, port=port, layout=layout, work=work, prefetch=prefetch, **options
    )


def _checked_layout(name: Any) -> str:
    if name not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {name!r}")
    return str(name)


def _work_name(name: str) -> str:
    return f"work on {name}"


_views: weakref.WeakSet[View] = weakref.WeakSet()
