"""A brush that changes a source, in the viewer or by a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.geometry import Space, as_int
from cellimg_dask.image.source import Source
from cellimg_dask.image.space_of import space_of
from cellimg_dask.viewer.history import History, Stroke
from cellimg_dask.viewer.strokes import stroke_masks
from cellimg_dask.viewer.units import factor_of, voxels_at

__all__ = ["Brush"]

_STEP = 1.25
_FARTHEST = 1e100
"""So that squares of lengths are finite."""


class Brush:
    """Paints into a source; made by `View.paint`.

    Each stroke is an edit of the source, or several while it is being drawn: what rests on the
    voxels it changed is computed anew, nothing else. Voxels that have the value already are not
    changed.

    Parameters
    ----------
    source : Source
        What is painted.
    size : float, optional
        Diameter in units of the source's scale. Default: 10 of its smallest voxels.
    value : scalar
        What is painted.
    shape : {"disc", "ball"}
        A disc is as thin as a voxel across the plane that it is drawn in.
    background : scalar
        What erasing paints.
    channel : int
        What is painted in the page, where each channel is seen by itself.
    name : str
        Of the layer.
    space : Space, optional
        Where the voxels lie. Default: the source's.
    on_change : callable, optional
        Called when the brush has another size and so on.

    Raises
    ------
    TypeError, ValueError
        If what is given is no source, or does not fit it.

    Notes
    -----
    Thread-safe.

    Examples
    --------
    >>> import cellimg_dask as ci
    >>> source = ci.Source(np.zeros((5, 8), "u1"))
    >>> brush = Brush(source, size=2, value=7)
    >>> brush.stroke([(1, 1), (1, 6)])
    20
    >>> source[:3]
    array([[0, 7, 7, 7, 7, 7, 7, 0],
           [7, 7, 7, 7, 7, 7, 7, 7],
           [0, 7, 7, 7, 7, 7, 7, 0]], dtype=uint8)
    >>> brush.undo()
    True
    >>> source[...].any()
    np.False_
    """

    def __init__(
        self,
        source: Source,
        *,
        size: float | None = None,
        value: Any = 1,
        shape: str = "disc",
        background: Any = 0,
        channel: int = 0,
        name: str = "",
        space: Space | None = None,
        on_change: Callable[[], object] | None = None,
    ) -> None:
        if not isinstance(source, Source):
            what = f"layer {name!r}, a {type(source).__name__}," if name else type(source).__name__
            raise TypeError(
                f"{what} cannot be painted: only a Source can be changed; make one of the array, "
                f"source = Source(array), and show that"
            )
        if source.ndim == 0:
            raise ValueError("a source without axes cannot be painted")
        self.source = source
        """What is painted."""
        self.name = name
        """Of the layer."""
        self._space = (space_of(source) if space is None else space).named
        self._free = self._space.spatial
        if not any(self._free):
            self._free = (True,) * source.ndim
        self._history = History(source)
        self._on_change = on_change
        self._closed = False
        self._size = self._checked_size(10 * self._finest if size is None else size)
        self._value = self._checked_value(value)
        self._background = self._checked_value(background)
        self._shape = _checked_shape(shape)
        self._erase = False
        self._channel_axis = self._space.channel_axis
        self._channel = self._checked_channel(channel)

    # ------------------------------------------------------------------ what it is

    @property
    def size(self) -> float:
        """Diameter, in units of the source."""
        return self._size

    @size.setter
    def size(self, size: float) -> None:
        self._size = self._checked_size(size)
        self._changed()

    @property
    def value(self) -> Any:
        """What is painted."""
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._value = self._checked_value(value)
        self._changed()

    @property
    def erase(self) -> bool:
        """Whether it paints the background instead."""
        return self._erase

    @erase.setter
    def erase(self, erase: bool) -> None:
        self._erase = bool(erase)
        self._changed()

    @property
    def channel(self) -> int:
        """What is painted in the page, of an image that has channels."""
        return self._channel

    @channel.setter
    def channel(self, channel: int) -> None:
        self._channel = self._checked_channel(channel)

    @property
    def shape(self) -> str:
        """``"disc"`` or ``"ball"``."""
        return self._shape

    @shape.setter
    def shape(self, shape: str) -> None:
        self._shape = _checked_shape(shape)
        self._changed()

    @property
    def closed(self) -> bool:
        """Whether it paints no more."""
        return self._closed

    def __repr__(self) -> str:
        doing = "erases" if self._erase else f"paints {self._value}"
        return f"<Brush on {self.name or self.source!r}: {self._shape} of {self._size:g}, {doing}>"

    def close(self) -> None:
        """End painting; what was painted stays."""
        self._closed = True
        self._changed()

    # ------------------------------------------------------------------ painting

    def stroke(
        self,
        points: Any,
        *,
        erase: bool | None = None,
        normal: Sequence[float] | None = None,
        in_units: bool = False,
    ) -> int:
        """Draw a line through points, as one edit that can be undone.

        Parameters
        ----------
        points : array-like (n, ndim)
            Voxels in the order of the axes; or one point.
        erase : bool, optional
            Default: as the brush does.
        normal : floats, optional
            Of a disc, the direction across its plane, in units. Default: along the first of the
            axes of space, if there are three.
        in_units : bool
            Whether the points are in the source's units instead.

        Returns
        -------
        int
            How many voxels have changed.
        """
        self._check_open()
        voxels = self._points(points)
        if in_units:
            voxels = (voxels - self._space.translation) / np.asarray(self._space.scale)
        stroke = Stroke()
        with self._history.lock:
            number = self._draw(stroke, voxels, self._erase if erase is None else erase, normal)
            self._history.add(stroke)
        return number

    def undo(self) -> bool:
        """Take the last stroke back; False if there is none."""
        self._check_open()
        return self._history.undo()

    def redo(self) -> bool:
        """Draw the stroke again that was taken back last; False if there is none."""
        self._check_open()
        return self._history.redo()

    # ------------------------------------------------------------------ the page

    def facts(self) -> dict[str, Any]:
        """Return what the page has to know."""
        units = {unit for unit, free in zip(self._space.units, self._free, strict=True) if free}
        factor = factor_of(units.pop())[0] if len(units) == 1 else 1.0
        return {
            "layer": self.name,
            "radius": self._size / 2 * factor,
            "erase": self._erase,
            "value": str(self._value),
        }

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what the page asks for: part of a stroke, undo, another size.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it makes no sense.
        """
        self._check_open()
        kind = message["kind"]
        if kind == "undo":
            return {"done": self.undo()}
        if kind == "redo":
            return {"done": self.redo()}
        if kind in ("smaller", "larger"):
            self.size = self._size * (_STEP if kind == "larger" else 1 / _STEP)
            return {"size": self._size}
        if kind != "stroke":
            raise ValueError(f"nothing is known of {kind!r}")
        return {"changed": self._extend(message)}

    def _extend(self, message: dict[str, Any]) -> int:
        """Draw what a stroke in the page has become longer by."""
        names = [str(name) for name in message["space"]["names"]]
        scales = [float(scale) for scale in message["space"]["scales"]]
        points = np.asarray(message["points"], float).reshape(-1, len(names))
        voxels = self._points(voxels_at(self._space, names, scales, points), at_least=0)
        if self._channel_axis is not None:
            # The page's dimensions are those that its layers have in common.
            voxels[:, self._channel_axis] = self._channel
        plane = np.asarray(message["plane"], float).reshape(2, len(names))
        origin = voxels_at(self._space, names, scales, np.zeros((1, len(names))))
        across = voxels_at(self._space, names, scales, plane) - origin
        normal = self._across(across * np.asarray(self._space.scale))
        with self._history.lock:
            stroke = self._history.begun(str(message["stroke"]))
            if stroke.last is not None:
                voxels = np.concatenate([stroke.last[None], voxels])
            number = 0
            if len(voxels):
                number = self._draw(stroke, voxels, bool(message["erase"]), normal)
                stroke.last = voxels[-1]
            if message["end"]:
                self._history.end(stroke)
        return number

    def _across(self, directions: NDArray[np.float64]) -> Sequence[float] | None:
        """Return the direction across a plane, given two directions in it."""
        free = np.flatnonzero(self._free)
        if len(free) != 3:
            return None
        normal = np.zeros(len(self._free))
        normal[free] = np.cross(directions[0][free], directions[1][free])
        return normal.tolist() if normal.any() else None

    def _draw(
        self,
        stroke: Stroke,
        voxels: NDArray[np.float64],
        erase: bool,
        normal: Sequence[float] | None,
    ) -> int:
        masks = stroke_masks(
            voxels,
            self._size / 2,
            self._space.scale,
            self._free,
            self._normal(normal) if self._shape == "disc" else None,
            self.source.grid,
        )
        return self._history.draw(stroke, masks, self._background if erase else self._value)

    # ------------------------------------------------------------------ checks

    @property
    def _finest(self) -> float:
        scales = zip(self._space.scale, self._free, strict=True)
        return min(scale for scale, free in scales if free)

    def _normal(self, normal: Sequence[float] | None) -> NDArray[np.float64] | None:
        free = np.flatnonzero(self._free)
        if normal is None:
            if len(free) < 3:
                return None
            found = np.zeros(len(self._free))
            found[free[0]] = 1.0
            return found
        found = np.asarray(normal, float)
        if found.shape != (len(self._free),) or not np.isfinite(found).all() or not found.any():
            raise ValueError(
                f"normal must be a direction of {len(self._free)} numbers, got {normal!r}"
            )
        return np.asarray(found / np.linalg.norm(found))

    def _points(self, points: Any, at_least: int = 1) -> NDArray[np.float64]:
        found = np.atleast_2d(np.asarray(points, float))
        if found.ndim != 2 or found.shape[1] != self.source.ndim or len(found) < at_least:
            raise ValueError(
                f"points must be an array of shape (n, {self.source.ndim}), got one of shape "
                f"{np.asarray(points).shape}"
            )
        if not (np.abs(found) <= _FARTHEST).all():
            raise ValueError(f"points must be finite, and no further than {_FARTHEST:g} away")
        return found

    def _checked_size(self, size: Any) -> float:
        number = float(size)
        if not (0 < number <= _FARTHEST):
            raise ValueError(f"size must be positive, and at most {_FARTHEST:g}, got {size!r}")
        return number

    def _checked_value(self, value: Any) -> Any:
        dtype = self.source.dtype
        found = np.asarray(value)
        if found.ndim or not np.can_cast(found.dtype, dtype, "same_kind"):
            fits = not found.ndim and found.dtype.kind in "iu" and dtype.kind in "iub"
        else:
            fits = True
        with np.errstate(all="ignore"):
            cast = found.astype(dtype) if fits else None
        if cast is None or (found.dtype.kind in "iub" and dtype.kind in "iu" and cast != found):
            raise ValueError(f"value must be one that {dtype} can hold, got {value!r}")
        return cast[()]

    def _checked_channel(self, channel: Any) -> int:
        axis = self._channel_axis
        count = 1 if axis is None else self.source.shape[axis]
        number = as_int(channel, "channel", minimum=0)
        if number and number >= count:
            raise ValueError(f"channel must be below {count}, got {number}")
        return number

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the brush is closed; make another: view.paint(layer)")

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()


def _checked_shape(shape: Any) -> str:
    if shape not in ("disc", "ball"):
        raise ValueError(f'shape must be "disc" or "ball", got {shape!r}')
    return str(shape)
