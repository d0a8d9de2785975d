"""`view`: images in neuroglancer, in a browser, while they are being computed."""

from __future__ import annotations

import html
import logging
import secrets
import threading
import time
import webbrowser
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cellimg_dask.geometry import Space, as_int
from cellimg_dask.server.layers import Layer, as_layers
from cellimg_dask.server.serving import Server, serve
from cellimg_dask.viewer.browser import Browser
from cellimg_dask.viewer.contrast import Contrasts
from cellimg_dask.viewer.editions import Editions
from cellimg_dask.viewer.looking import Looking, checked_layout
from cellimg_dask.viewer.surfaces import Surfaces

if TYPE_CHECKING:
    from cellimg_dask.viewer.landmarks import Landmarks
    from cellimg_dask.viewer.painting import Brush

__all__ = ["View", "view"]

_logger = logging.getLogger("cellimg_dask")


class View(Looking):
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
        layout: str | None,
        work: bool,
        prefetch: bool,
        **options: Any,
    ) -> None:
        # neuroglancer takes a second to import, and not everybody has it.
        try:
            from cellimg_dask.viewer import scene
            from cellimg_dask.viewer.frame import Frame, FrameViewer
        except ImportError as error:
            raise ImportError(
                "to see images neuroglancer is needed: pip install 'cellimg-dask[view]'"
            ) from error
        self._scene = scene
        self._lock = threading.RLock()
        self._picturing = threading.Lock()
        self._given: dict[str, Layer] = {}
        self._work = bool(work)
        self._editions = Editions(self._changed)
        # A page that cannot fetch again what has changed gets a new address of it instead.
        self._by_address = False
        self._browser: Browser | None = None
        self._brush: Brush | None = None
        self._landmarks: list[Landmarks] = []
        self._surfaces: dict[str, Surfaces] = {}
        self._closed = False
        given = as_layers(layers)
        # The page is of another origin.
        options.setdefault("allow_origin", "*")
        if options.get("token", "random") is None and options["allow_origin"] == "*":
            raise ValueError(
                "a view needs a token: its page is of another origin than the data, so pages of "
                "all origins may read, and without a token any web page could read all layers. "
                "Leave token out, choose one, or say which pages may read: allow_origin="
            )
        self.server: Server = serve({}, host=host, **options)
        try:
            self._frame = Frame(secrets.token_urlsafe(16), host, port, self._answer)
        except BaseException:
            self.server.close()
            raise
        self._frame.find_mesh = self._find_mesh
        self.viewer: Any = FrameViewer(self._frame)
        self._contrasts = Contrasts(self.viewer, self.server.layers, scene)
        try:
            placed = [layer.space for layer in given.values()]
            for name, layer in given.items():
                self._prepare(name, layer, placed)
            self._begin(layout, prefetch)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ what it is

    @property
    def url(self) -> str:
        """Address of the page. Whoever knows it can see all layers, and paint."""
        return str(self.viewer.get_viewer_url())

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
                self._scene.look_at_center(state, list(self.server.layers.values()))
            self._append(state, name)
        self._contrasts.find(name)

    def remove(self, name: str) -> None:
        """Show a layer no more."""
        shown = self._shown_of(name, self._layer(name))
        with self._lock:
            if self._brush is not None and self._brush.name == name:
                self._brush.close()
            del self._given[name], self.server.layers[name]
            self._editions.forget(name)
            self._editions.forget(self._scene.work_name(name))
            self._surfaces.pop(name, None)
            self._contrasts.forget(shown)
        with self.viewer.txn() as state:
            for each in shown:
                if each in state.layers:
                    del state.layers[each]
        self._tell()

    # ------------------------------------------------------------------ pictures

    def open_browser(self) -> None:
        """Show the page in the user's browser.

        Its address is not seen in the list of processes, as it would be if a browser were given
        `url`.
        """
        self._check_open()
        webbrowser.open_new(self._frame.address_for_once())

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
        from cellimg_dask.viewer.shooting import shoot

        def is_current() -> bool:
            return self._closed or self._by_address or self._editions.are_shown()

        began = time.monotonic()
        # A page draws one picture at a time.
        if not self._picturing.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            raise TimeoutError(f"another picture is still being drawn after {timeout:g} s")
        try:
            self._check_open()
            if not self.num_open and (self._browser is None or not self._browser.is_running):
                self._close_browser()
                # Its own frame takes some room.
                width, height = size or (1200, 800)
                address = self._frame.address_for_once()
                self._browser = Browser(address, (max(width, 500), max(height, 500) + 150))
                size = size or (width, height)
                if self._closed:
                    # Meanwhile.
                    self._close_browser()
            left = (
                None if timeout is None else max(0.0, round(timeout + began - time.monotonic(), 1))
            )
            draw = partial(
                shoot, self.viewer, self._editions.seen, is_current, self._check_open, size
            )
            if self._work and not self._by_address:
                # What has been done is known when all is there.
                draw(True, left)
                for name in self.layers:
                    self._editions.renew(self._scene.work_name(name))
            return draw(controls, left)
        except TimeoutError as error:
            raise TimeoutError(f"{error}{self.server.app.work.last_error()}") from None
        finally:
            self._picturing.release()

    # ------------------------------------------------------------------ painting, landmarks

    def paint(
        self,
        layer: Any,
        *,
        size: float | None = None,
        value: Any = 1,
        shape: str = "disc",
        channel: int | str | None = None,
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
        channel : int or str, optional
            Number or label of the channel that is painted, if there are several. Default: the
            first.

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
            channel=self._number_of(name, channel),
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
        """Place pairs of points; see `Landmarks`.

        The keys are those of the last ones: others, made before, keep their points and end.
        """
        from cellimg_dask.viewer.landmarks import Landmarks

        self._check_open()
        made = Landmarks(self, fixed, moving, **options)
        with self._lock:
            before, self._landmarks = self._landmarks, [made]
        for each in before:
            each.close()
        return made

    def meshes(self, layer: Any, labels: Iterable[int] = (), *, step_size: Any = 1) -> None:
        """Show the surfaces of selected labels in the 3D panel.

        They are computed when they are shown first, and again when the labels have changed. Of a
        label that was selected by a double click only the cells are read that it touches; else
        all cells are looked at.

        Parameters
        ----------
        layer : str or image
            A layer of labels of three axes.
        labels : ints
            Are selected.
        step_size : int or ints
            Every so many voxels are looked at, for fewer triangles.

        Raises
        ------
        ValueError
            If the layer is another.
        """
        name = self._name_of(layer)
        self._labels(name)
        self._managed(self.viewer.state, name)
        surfaces = Surfaces(self._shown_layer(name), step_size)
        self._surfaces[name] = surfaces
        wanted = [int(label) for label in labels]
        with self.viewer.txn() as state:
            sources = state.layers[name].layer.source
            del sources[1:]
            sources.append(surfaces.source(self.url, name))
            if wanted:
                state.layers[name].segments = wanted

    def _find_mesh(self, path: str) -> bytes | None:
        name, _, rest = path.partition("/")
        surfaces = self._surfaces.get(name)
        return None if surfaces is None else surfaces.answer(rest)

    def _renew_meshes(self, name: str) -> None:
        """Have the pages fetch surfaces again, under another address."""
        surfaces = self._surfaces.get(name)
        if surfaces is None or self._closed:
            return
        surfaces.edition += 1

        def renew(state: Any) -> None:
            if name in state.layers and len(state.layers[name].segments):
                state.layers[name].layer.source[1] = surfaces.source(self.url, name)

        self.viewer.retry_txn(renew, lock=True)

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
            self._editions.note_shown(message["layers"])
            return None
        if kind == "cannot refresh":
            _logger.warning("the viewer's page is another than expected; changes reload a layer")
            self._by_address = True
            return None
        if kind == "picked":
            space = message["space"]
            for surfaces in list(self._surfaces.values()):
                surfaces.note(space["names"], space["scales"], message["place"])
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
            numbers = self._editions.numbers()
            layers = {}
            for name, layer in self._given.items():
                work, shown_as = self._scene.work_name(name), self._scene.names_of(name, layer)
                told = [
                    (name, self._scene.source_url(base, name), shown_as),
                    (work, self._scene.source_url(f"{base}/@work", name), [work]),
                ]
                for each, url, shown in told:
                    if each in numbers:
                        layers[each] = {
                            "edition": numbers[each],
                            "prefix": url.removeprefix("zarr3://"),
                            "shown": shown,
                            "changes": each != name,
                        }
            facts = None if brush is None or brush.closed else brush.facts()
            self._frame.tell(layers=layers, brush=facts)

    # ------------------------------------------------------------------ changes

    def _changed(self, name: str, edition: int) -> None:
        """Have the pages fetch a layer again; what comes meanwhile is told with it."""
        self._tell()
        if name in self._surfaces:
            self._frame.soon(name, lambda: self._renew_meshes(name))
        layer = self._given.get(name)
        if self._by_address and layer is not None and not self._closed:
            url = self._scene.source_url(self.server.url, name, edition)
            shown = self._scene.names_of(name, layer)

            def readdress(state: Any) -> None:
                for each in shown:
                    if each in state.layers:
                        state.layers[each].layer.source[0].url = url

            self.viewer.retry_txn(readdress, lock=True)

    # ------------------------------------------------------------------ beginning and end

    def _prepare(self, name: str, layer: Layer, placed: Sequence[Space]) -> None:
        taken = {
            shown: other
            for other, known in self._given.items()
            for shown in self._shown_of(other, known)
        }
        for shown_name in self._shown_of(name, layer):
            if shown_name in taken:
                raise ValueError(
                    f"{shown_name!r} is in the viewer already, on account of layer "
                    f"{taken[shown_name]!r}; call layer {name!r} something else"
                )
        shown = self._scene.as_shown(layer, placed)
        self._scene.dimensions([*(each.space for each in self.server.layers.values()), shown.space])
        with self._lock:
            self._given[name] = layer
            self.server.layers[name] = shown
        self._editions.watch(name, shown.images)
        if self._work:
            self._editions.watch(self._scene.work_name(name), ())
        self._tell()

    def _begin(self, layout: str | None, prefetch: bool) -> None:
        if layout is None:
            axes = (sum(layer.space.spatial) for layer in self.server.layers.values())
            layout = "xy" if max(axes, default=3) < 3 else "4panel"
        with self.viewer.txn() as state:
            self._scene.look_at_center(state, list(self.server.layers.values()))
            for name in self._given:
                self._append(state, name)
            state.layout = checked_layout(layout)
            state.prefetch = bool(prefetch)
            state.show_slices = True
            state.title = ", ".join(self._given)
        for name in self._given:
            self._contrasts.find(name)

    def _append(self, state: Any, name: str) -> None:
        base = self.server.url
        self._scene.append(state, name, self._shown_layer(name), base, work=self._work)

    def close(self) -> None:
        """End the view, its servers and what was started for pictures."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._contrasts.close()
        self._editions.close()
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


def view(
    layers: Any = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    layout: str | None = None,
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
        "4panel", "xy", "xz", "yz", "xy-3d", "3d" and so on. Default: "4panel", or "xy" where no
        layer has three axes in space.
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
