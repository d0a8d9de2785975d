"""What neuroglancer is told of layers: where they lie, how they look, where their data are.

This module imports neuroglancer; it is imported where a view is made.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import neuroglancer
import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Space
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import map_cells
from cellimg_dask.io.channels import Channel
from cellimg_dask.server.layers import Layer
from cellimg_dask.server.work import CACHED, COMPUTING, FAILED, WAITING
from cellimg_dask.viewer.units import factor_of

__all__ = [
    "append",
    "as_shown",
    "contrast_controls",
    "dimensions",
    "look_at_center",
    "look_of_image",
    "look_of_labels",
    "names_of",
    "normal_to_quaternion",
    "place_in",
    "put_in_panels",
    "set_contrast",
    "source_url",
    "work_name",
]

_FIRST_PIXELS = 400
"""How wide a panel is taken to be before anybody has opened it."""

_SHOWN_DTYPES = {
    "image": ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "f4"),
    "labels": ("u1", "u2", "u4", "u8"),
}


# ------------------------------------------------------------------ what is shown of a layer


def as_shown(layer: Layer, placed: Sequence[Space] = ()) -> Layer:
    """Return a layer as neuroglancer can show it.

    It knows neither double precision nor truth values, and labels without a sign only. An image
    of which nobody has said where it lies, is laid upon the first that has such axes.

    Parameters
    ----------
    layer : Layer
        What the user gave.
    placed : sequence of Space
        Where other layers lie.
    """
    shown = copy.copy(layer)
    shown.images = tuple(_converted(image, layer.kind) for image in layer.images)
    if layer.dtype.kind == "c":
        shown.fill_value = _magnitude(np.asarray(layer.fill_value))[()]
    if layer.space.is_plain:
        upon = next(filter(None, (_part_for(layer.space, space) for space in placed)), None)
        if upon is not None:
            shown.spaces = tuple(_laid_upon(upon, own) for own in layer.spaces)
    # Units that the viewer cannot read would keep it from showing the image.
    shown.spaces = tuple(_with_channels(_readable(space)) for space in shown.spaces)
    return shown


def _converted(image: CellImg, kind: str) -> CellImg:
    dtype = image.dtype
    if dtype.str[1:] in _SHOWN_DTYPES[kind]:
        return image
    if dtype.kind == "b":
        wanted = "u1"
    elif kind == "labels" or dtype.kind == "u":
        wanted = f"u{dtype.itemsize}"
    else:
        wanted = "f4"
    function = _magnitude if dtype.kind == "c" else _cast
    params = {"dtype": wanted} if function is _cast else None
    return map_cells(function, image, dtype=wanted, params=params)


def _cast(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        return data.astype(dtype)


def _magnitude(data: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(np.abs(data), np.float32)


def _part_for(plain: Space, space: Space) -> Space | None:
    """Return the part of a space in which an image may lie of which nothing is known."""
    if space.is_plain:
        return None
    own, names = plain.named.axes or (), space.named.axes or ()
    if set(own) <= set(names):
        kept = [names.index(name) for name in own]
        if kept == sorted(kept):
            return space.without([axis for axis in range(space.ndim) if axis not in kept])
    return space if space.ndim == plain.ndim else None


def _laid_upon(space: Space, own: Space) -> Space:
    """Return where the voxels of a level lie that counts in voxels of an image."""
    steps = zip(space.scale, space.translation, own.scale, own.translation, strict=True)
    return Space(
        space.axes,
        space.units,
        tuple(map(math.prod, zip(space.scale, own.scale, strict=True))),
        tuple(shift + scale * inner for scale, shift, _, inner in steps),
    )


def _with_channels(space: Space) -> Space:
    """Return a space whose axis of channels is called as the viewer knows it."""
    axis, axes = space.channel_axis, space.axes or ()
    named = tuple("c" if number == axis else name for number, name in enumerate(axes))
    return Space(named or None, space.units, space.scale, space.translation)


def _readable(space: Space) -> Space:
    units = tuple(unit if factor_of(unit)[1] else None for unit in space.units)
    return Space(space.axes, units, space.scale, space.translation)


# ------------------------------------------------------------------ where


def dimensions(spaces: Iterable[Space]) -> neuroglancer.CoordinateSpace:
    """Return the viewer's dimensions: x, y and z first, as it is used to, in the finest steps."""
    steps: dict[str, float] = {}
    units: dict[str, str] = {}
    for space in spaces:
        named = space.named
        for name, unit, scale in zip(named.axes or (), named.units, named.scale, strict=True):
            if name == "c":
                # Of each layer's own.
                continue
            factor, base = factor_of(unit)
            if units.setdefault(name, base) != base:
                raise ValueError(
                    f"axis {name!r} is measured in {units[name] or 'voxels'} by one layer and in "
                    f"{base or 'voxels'} by another; say where they lie: image.with_space(units=…)"
                )
            steps[name] = min(steps.get(name, math.inf), scale * factor)
    names: list[str] = [name for name in ("x", "y", "z") if name in steps]
    # Without these names the last axis runs to the right, and the one before it down.
    names += [name for name in reversed(steps) if name not in (*names, "t")]
    names += [name for name in ("t",) if name in steps]
    return neuroglancer.CoordinateSpace(
        names=names, scales=[steps[name] for name in names], units=[units[name] for name in names]
    )


def place_in(
    shown: neuroglancer.CoordinateSpace, space: Space, voxel: Sequence[float], before: Any = None
) -> list[float]:
    """Return where a voxel of an image lies in the viewer's coordinates.

    Dimensions that the image does not have stay as they are ``before``.
    """
    named = space.named
    found = dict.fromkeys(shown.names, 0.0)
    if before is not None and len(before) == len(shown.names):
        found = dict(zip(shown.names, map(float, before), strict=True))
    steps = dict(zip(shown.names, shown.scales, strict=True))
    values = zip(named.axes or (), named.units, named.scale, named.translation, voxel, strict=True)
    for name, unit, scale, shift, index in values:
        if name in steps:
            found[name] = (shift + scale * float(index)) * factor_of(unit)[0] / float(steps[name])
    return [found[name] for name in shown.names]


def normal_to_quaternion(normal: Sequence[float]) -> list[float]:
    """Return the turn that takes the third axis to a direction (x, y, z), as (x, y, z, w)."""
    x, y, z = np.asarray(normal, float) / np.linalg.norm(normal)
    if z < -1 + 1e-12:
        return [1.0, 0.0, 0.0, 0.0]
    quaternion = np.array([-y, x, 0.0, 1.0 + z])
    return [float(part) for part in quaternion / np.linalg.norm(quaternion)]


def first_scale(layers: Iterable[Layer], shown: neuroglancer.CoordinateSpace, pixels: int) -> float:
    """Return how many steps of the viewer a pixel has at first: so that the whole is seen.

    But not so many that voxels finer than a pixel would have to be computed.
    """
    wanted, finest = 0.0, math.inf
    canonical = min((float(scale) for scale in shown.scales[:3]), default=1.0)
    for layer in layers:
        named = layer.spaces[0].named
        coarse = layer.spaces[-1].named
        sizes = zip(
            named.axes or (), named.units, named.scale, coarse.scale, layer.shape, strict=True
        )
        for name, unit, scale, coarsest, extent in sizes:
            if name in shown.names[:2]:
                factor = factor_of(unit)[0] / canonical
                wanted = max(wanted, extent * scale * factor / pixels)
                finest = min(finest, coarsest * factor)
    return min(wanted, finest) or 1.0


def look_at_center(state: neuroglancer.ViewerState, shown: Sequence[Layer]) -> None:
    """Have the middle of the first layer in the middle, and all of it seen."""
    if not shown:
        return
    state.dimensions = dimensions(each.space for each in shown)
    center = [(extent - 1) // 2 for extent in shown[0].shape]
    state.position = place_in(state.dimensions, shown[0].space, center)
    state.cross_section_scale = first_scale(shown, state.dimensions, _FIRST_PIXELS)
    state.projection_scale = 2 * _FIRST_PIXELS * state.cross_section_scale


# ------------------------------------------------------------------ how


def append(
    state: neuroglancer.ViewerState, name: str, shown: Layer, base: str, *, work: bool
) -> None:
    """Put a layer above the others, and one that shows the work on it."""
    url = source_url(base, name)
    added = [*names_of(name, shown), *([work_name(name)] if work else [])]
    if shown.kind == "labels":
        state.layers.append(name=name, layer=labels_layer(shown, url))
        state.layers[name].visible = shown.visible
    else:
        channels = shown.channels or (Channel("", shown.color, shown.contrast),)
        for number, (each, channel) in enumerate(zip(names_of(name, shown), channels, strict=True)):
            state.layers.append(name=each, layer=image_layer(shown, url, channel, number))
            state.layers[each].visible = shown.visible and channel.visible
    if work:
        url = source_url(f"{base}/@work", name)
        state.layers.append(name=work_name(name), layer=work_layer(url))
    put_in_panels(state, added)


def put_in_panels(state: neuroglancer.ViewerState, names: Sequence[str]) -> None:
    """Have layers shown by the first of several groups of panels.

    The page takes away what is in none of them.
    """
    layout = state.layout
    while isinstance(layout, neuroglancer.StackLayout) and len(layout):
        layout = layout[0]
    if isinstance(layout, neuroglancer.LayerGroupViewer):
        layout.layers.extend(name for name in names if name not in layout.layers)


def names_of(name: str, layer: Layer) -> list[str]:
    """Return what a layer is called in the viewer: one name, or one for each channel."""
    if len(layer.channels) < 2:
        return [name]
    labels = [channel.label.strip() or str(number) for number, channel in enumerate(layer.channels)]
    # Again where a label is called as another one has become: "a", "a" and "a 1".
    while len(set(labels)) < len(labels):
        times = Counter(labels)
        labels = [
            f"{label} {number}" if times[label] > 1 else label
            for number, label in enumerate(labels)
        ]
    return [f"{name} {label}" for label in labels]


def work_name(name: str) -> str:
    """Return what the layer is called that shows the work on another."""
    return f"work on {name}"


def set_contrast(state: neuroglancer.ViewerState, name: str, contrast: tuple[float, float]) -> None:
    """Show a range of values that was found, unless somebody has chosen one meanwhile."""
    if name not in state.layers:
        return
    layer = state.layers[name].layer
    controls = dict(layer.shader_controls.to_json())
    if "normalized" not in controls:
        layer.shader_controls = {**controls, **contrast_controls(contrast)}


def source_url(base: str, name: str, edition: int | None = None) -> str:
    """Return the address of a layer's data, for neuroglancer."""
    marked = "" if edition is None else f"/@edition-{edition}"
    return f"zarr3://{base}{marked}/{quote(name)}/"


_SHADER = """#uicontrol invlerp normalized
#uicontrol vec3 color color(default="%s")
void main() {
  emitRGB(color * normalized());
}
"""


def image_layer(layer: Layer, url: str, channel: Channel, number: int) -> neuroglancer.ImageLayer:
    """Return a layer of measured values, or of those of one channel."""
    made = neuroglancer.ImageLayer(source=url, shader=_SHADER % (channel.color or "white"))
    made.opacity = 1.0 if layer.opacity is None else layer.opacity
    if channel.color is not None:
        # Colours add up, as light does.
        made.blend = "additive"
    if channel.contrast is not None:
        made.shader_controls = contrast_controls(channel.contrast)
    axis = layer.channel_axis
    if layer.channels and axis is not None:
        # neuroglancer reads the axis "c" as one of each layer's own, which it calls so.
        space = layer.space
        factor, base = factor_of(space.units[axis])
        made.local_dimensions = neuroglancer.CoordinateSpace(
            names=["c'"], scales=[space.scale[axis] * factor], units=[base]
        )
        made.local_position = [space.translation[axis] / space.scale[axis] + number]
    return made


def contrast_controls(contrast: tuple[float, float]) -> Mapping[str, Any]:
    """Return the shader's control that shows values between two as black to white."""
    low, high = contrast
    return {"normalized": {"range": [low, high], "window": [min(contrast), max(contrast)]}}


def labels_layer(layer: Layer, url: str) -> neuroglancer.SegmentationLayer:
    """Return a layer of numbers of objects."""
    made = neuroglancer.SegmentationLayer(source=url)
    look_of_labels(made, layer)
    return made


def look_of_image(shown: neuroglancer.ImageLayer, looks: Layer) -> None:
    """Have measured values look as is said; what nobody has said stays."""
    if looks.opacity is not None:
        shown.opacity = looks.opacity
    controls = dict(shown.shader_controls.to_json())
    if looks.contrast is not None:
        controls.update(contrast_controls(looks.contrast))
    if looks.color is not None:
        controls["color"] = looks.color
        shown.blend = "additive"
    shown.shader_controls = controls


def look_of_labels(shown: neuroglancer.SegmentationLayer, looks: Layer) -> None:
    """Have labels look as is said; what nobody has said stays."""
    if looks.opacity is not None:
        shown.selected_alpha = looks.opacity
    if looks.color is not None:
        shown.segment_default_color = looks.color


_WORK_COLORS = {CACHED: "#2a6", COMPUTING: "#fc0", FAILED: "#e22", WAITING: "#38f"}


def work_layer(url: str) -> neuroglancer.SegmentationLayer:
    """Return a layer that shows which cells are there, computed, waited for, failed."""
    made = neuroglancer.SegmentationLayer(source=url)
    made.selected_alpha = 0.3
    made.segment_colors = {state: _long(color) for state, color in _WORK_COLORS.items()}
    made.pick = False
    return made


def _long(color: str) -> str:
    return "#" + "".join(2 * digit for digit in color[1:])
