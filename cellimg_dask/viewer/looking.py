"""What a view shows of its layers: where one looks, how they look, which labels are selected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cellimg_dask.geometry import as_int
from cellimg_dask.server.layers import Layer
from cellimg_dask.viewer.units import factor_of, voxels_at

__all__ = ["Looking", "checked_layout"]

_LAYOUTS = ("4panel", "4panel-alt", "xy", "xz", "yz", "xy-3d", "xz-3d", "yz-3d", "3d")


class Looking:
    """The part of a view that moves and changes looks.

    Notes
    -----
    Thread-safe.
    """

    viewer: Any
    """The ``neuroglancer.Viewer``, for all that is not offered here."""
    server: Any
    """The server of the layers' data."""
    _given: dict[str, Layer]
    _scene: Any
    _work: bool

    def _check_open(self) -> None:
        raise NotImplementedError

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by name, as they were given."""
        return dict(self._given)

    # ------------------------------------------------------------------ where to look

    @property
    def position(self) -> tuple[float, ...]:
        """Voxel of the first layer that is in the middle, in the order of its axes."""
        return self.position_in(self._first())

    @position.setter
    def position(self, voxel: Sequence[float]) -> None:
        self.move_to(voxel)

    def position_in(self, name: str, *, in_units: bool = False) -> tuple[float, ...]:
        """Return which voxel of a layer is in the middle, or where that is in its units."""
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
        name = self._first() if layer is None else layer
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
            state.position = self._scene.place_in(state.dimensions, space, place, before)

    def zoom(self, voxels_per_pixel: float) -> None:
        """Have so many voxels of the first layer's finest axis in a pixel of the screen."""
        number = float(voxels_per_pixel)
        if not number > 0:
            raise ValueError(f"voxels_per_pixel must be positive, got {voxels_per_pixel}")

        space = self._shown_layer(self._first()).space
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
        numbers = [float(part) for part in orientation]
        if len(numbers) not in (3, 4) or not np.isfinite(numbers).all() or not any(numbers):
            raise ValueError(
                f"orientation must be a direction of 3 numbers or a quaternion of 4, "
                f"got {orientation!r}"
            )
        if len(numbers) == 3:
            quaternion = self._scene.normal_to_quaternion(numbers[::-1])
        else:
            quaternion = list(np.divide(numbers, np.linalg.norm(numbers)))
        with self.viewer.txn() as state:
            state.cross_section_orientation = quaternion

    def layout(self, name: str) -> None:
        """Choose the panels: "4panel", "xy", "xz", "yz", "xy-3d", "3d" and so on."""
        with self.viewer.txn() as state:
            state.layout = checked_layout(name)

    # ------------------------------------------------------------------ looks

    def show(
        self,
        name: str,
        *,
        visible: bool | None = None,
        opacity: float | None = None,
        contrast: tuple[float, float] | None = None,
        color: str | tuple[float, float, float] | None = None,
        channel: int | str | None = None,
    ) -> None:
        """Change how a layer looks; as for `Layer`.

        Parameters
        ----------
        name : str
            Of the layer.
        visible, opacity, contrast, color
            What is left out stays.
        channel : int or str, optional
            Number or label of the channel that is to look so. Default: all.

        Raises
        ------
        KeyError
            If there is no such layer, or no such channel.
        TypeError, ValueError
            If a value is wrong.
        """
        layer = self._layer(name)
        # Checked as those of a layer are.
        looks = Layer(np.zeros(1, np.uint8), opacity=opacity, contrast=contrast, color=color)
        if layer.kind == "labels" and contrast is not None:
            raise ValueError(f"layer {name!r} shows labels, which have no contrast")
        wanted = self.names_in_viewer(name, channel)
        with self.viewer.txn() as state:
            # Channels that were closed in the page are left out, if others are there.
            for each in [each for each in wanted if each in state.layers] or wanted:
                managed = self._managed(state, each)
                if visible is not None:
                    managed.visible = bool(visible)
                if layer.kind == "labels":
                    self._scene.look_of_labels(managed.layer, looks)
                else:
                    self._scene.look_of_image(managed.layer, looks)

    def names_in_viewer(self, name: str, channel: int | str | None = None) -> list[str]:
        """Return what a layer is called in neuroglancer, where each channel has its own.

        Parameters
        ----------
        name : str
            Of the layer.
        channel : int or str, optional
            Number or label of a channel. Default: all.

        Raises
        ------
        KeyError
            If there is no such layer, or no such channel.
        """
        names: list[str] = self._scene.names_of(name, self._layer(name))
        if channel is None:
            return names
        number, layer = self._number_of(name, channel), self._layer(name)
        if layer.channel_axis is None or len(names) != layer.shape[layer.channel_axis]:
            raise KeyError(f"layer {name!r} shows one channel at a time; leave out channel")
        return [names[number]]

    def _number_of(self, name: str, channel: int | str | None) -> int:
        """Return the number of a channel, given that or its label; by default of the first."""
        if channel is None:
            return 0
        layer = self._layer(name)
        labels = [each.label for each in layer.channels]
        if isinstance(channel, str) and channel in labels:
            if labels.count(channel) > 1:
                raise KeyError(
                    f"layer {name!r} has {labels.count(channel)} channels called {channel!r}; "
                    f"give the number of one, from 0"
                )
            return labels.index(channel)
        count = 0 if layer.channel_axis is None else layer.shape[layer.channel_axis]
        number = -1 if isinstance(channel, str) else as_int(channel, "channel")
        if number not in range(count):
            there = [label for label in labels if label]
            known = f", called {', '.join(there)}" if there else ""
            raise KeyError(f"layer {name!r} has no channel {channel!r}: it has {count}{known}")
        return number

    def selected(self, name: str) -> list[int]:
        """Return the labels that are selected in a layer of labels, in ascending order."""
        self._labels(name)
        return sorted(int(label) for label in self._managed(self.viewer.state, name).segments)

    def select(self, name: str, labels: Iterable[int]) -> None:
        """Select labels, and no others; with none selected all are shown."""
        self._labels(name)
        wanted = [int(label) for label in labels]
        with self.viewer.txn() as state:
            self._managed(state, name).segments = wanted

    def _first(self) -> str:
        self._check_open()
        for name in self._given:
            return name
        raise ValueError("the view has no layers yet: view.add(name, image)")

    def _layer(self, name: str) -> Layer:
        self._check_open()
        try:
            return self._given[name]
        except KeyError:
            there = ", ".join(map(repr, self._given)) or "none"
            raise KeyError(f"there is no layer {name!r}; there is {there}") from None

    def _shown_of(self, name: str, layer: Layer) -> list[str]:
        """Return what is called so in the viewer on account of a layer."""
        work = [self._scene.work_name(name)] if self._work else []
        return [*self._scene.names_of(name, layer), *work]

    def _managed(self, state: Any, name: str) -> Any:
        """Return a layer of neuroglancer's; whoever looks at the page may have closed it."""
        if name not in state.layers:
            raise KeyError(
                f"{name!r} was closed in the viewer's page; remove the layer and add it again"
            )
        return state.layers[name]

    def _shown_layer(self, name: str) -> Layer:
        self._layer(name)
        shown: Layer = self.server.layers[name]
        return shown

    def _labels(self, name: str) -> Layer:
        layer = self._layer(name)
        if layer.kind != "labels":
            raise ValueError(
                f'layer {name!r} shows values; to select labels give Layer(image, kind="labels")'
            )
        return layer


def checked_layout(name: Any) -> str:
    """Return the name of an arrangement of panels, if there is such a one."""
    if name not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {name!r}")
    return str(name)
