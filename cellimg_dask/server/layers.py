"""What is shown and served: images by name, at one or several scales."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import numpy as np

from cellimg_dask.geometry import Space
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.input import checked_fill
from cellimg_dask.image.space_of import space_of
from cellimg_dask.io.channels import Channel, channels_of
from cellimg_dask.io.looks import checked_color, checked_contrast, checked_part
from cellimg_dask.io.stored_image import said_of_channels
from cellimg_dask.ops.label_image import LabelImg
from cellimg_dask.ops.pyramid import Pyramid, as_image, pyramid
from cellimg_dask.server.documents import check_dtype

__all__ = ["Layer", "Layers", "as_layer", "as_layers"]

_RESERVED = re.compile(r"@.*|\.+|__.*|zarr\.json|\.z(group|array|attrs|metadata)", re.DOTALL)
_NOT_IN_NAMES = re.compile(r"[/\\?#%\x00-\x1f\x7f\ud800-\udfff]")


class Layer:
    """An image as it is shown and served, with how it is to look at first.

    Parameters
    ----------
    image : array-like, Pyramid or sequence of arrays
        What `map_cells` takes: a lazy image, `Source`, NumPy, zarr, dask array, what `open_image`
        gives. Its cells (or chunks) are what is served. Several are the levels of one image, the
        finest first, for instance a function applied to the image and to smaller copies of it.
    kind : {"image", "labels"}, optional
        Whether voxels are measured values or numbers of objects. Default: labels for what finds
        objects (`map_labels`, `label`, `stitch`), else an image.
    levels : sequence of arrays, or int, optional
        Coarser images, from fine to coarse. A number makes so many levels out of the image, this
        one included, as `pyramid` does: a voxel of the coarsest then needs all that lie under it.
        Default: those that it has, and no others.
    contrast : (low, high), optional
        Values that are shown black and white. Default: the viewer's choice.
    color : str or (red, green, blue), optional
        A name such as ``"red"``, ``"#ff8000"``, or three numbers from 0 to 1.
    opacity : float, optional
        0 to 1.
    visible : bool
        Whether it is shown at first.
    channels : sequence of Channel or str, optional
        How each channel looks, along the axis "c" (or "s", of colours), or what it is called.
        Default: as the file says, else colours one after the other, which are seen together. An
        empty sequence: one channel is seen at a time, as it is of an image of more than 16.
    fill_value : scalar
        A chunk in which all voxels have this value is not sent; readers fill it in. Default: 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> import cellimg_dask as ci
    >>> fine = np.zeros((8, 6), "u1")
    >>> layer = Layer([ci.map_cells(np.invert, part) for part in (fine, fine[::2, ::2])])
    >>> [image.shape for image in layer.images]
    [(8, 6), (4, 3)]
    >>> layer.spaces[1].scale, layer.spaces[1].translation
    ((2.0, 2.0), (0.5, 0.5))
    """

    def __init__(
        self,
        image: Any,
        *,
        kind: Literal["image", "labels"] | None = None,
        levels: Iterable[Any] | int | None = None,
        contrast: tuple[float, float] | None = None,
        color: str | tuple[float, float, float] | None = None,
        opacity: float | None = None,
        visible: bool = True,
        channels: Sequence[Channel | str] | None = None,
        fill_value: Any = None,
    ) -> None:
        if kind not in (None, "image", "labels"):
            raise ValueError(f'kind must be "image" or "labels", got {kind!r}')
        if isinstance(image, Layer):
            raise TypeError("the image is a Layer already; give what that was made of")
        self.given: Any = image
        """What the layer was made of."""
        self.kind: Literal["image", "labels"] = _kind_of(image) if kind is None else kind
        """Whether voxels are measured values or numbers of objects."""
        self.images, self.spaces = _levels(image, levels, self.kind)
        first = self.images[0]
        if self.kind == "labels" and first.dtype.kind not in "biu":
            raise ValueError(f"labels are integers, this image has dtype {first.dtype}")
        check_dtype(first.dtype)
        self.contrast = checked_contrast(contrast)
        """Values that are shown black and white."""
        self.color = checked_color(color)
        """A name, ``#rrggbb``, or None."""
        self.opacity = None if opacity is None else checked_part(opacity, "opacity")
        """0 to 1, or None."""
        self.visible = bool(visible)
        """Whether it is shown at first."""
        if self.kind == "labels" and channels:
            raise ValueError("channels are of images, and this layer shows labels")
        self.channels: tuple[Channel, ...] = ()
        if self.kind == "image":
            self.channels = channels_of(
                self.space,
                self.shape,
                self.dtype,
                given=channels,
                said=said_of_channels(image),
                otherwise=Channel("", self.color, self.contrast),
            )
        """How each channel looks; none where one is seen at a time, or there is no such axis."""
        zero = np.zeros((), first.dtype)[()]
        self.fill_value = (
            zero if fill_value is None else checked_fill(fill_value, first.dtype, "a layer")
        )
        """Value of chunks that are not sent."""

    images: tuple[CellImg, ...]
    """The levels, the finest first."""
    spaces: tuple[Space, ...]
    """Where the voxels of each level lie."""

    @property
    def image(self) -> CellImg:
        """The finest level."""
        return self.images[0]

    @property
    def space(self) -> Space:
        """Where the voxels of the finest level lie."""
        return self.spaces[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the finest level."""
        return self.images[0].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type."""
        return self.images[0].dtype

    @property
    def channel_axis(self) -> int | None:
        """The axis of channels, if there is one."""
        return self.space.channel_axis

    def __repr__(self) -> str:
        several = f", {len(self.images)} levels" if len(self.images) > 1 else ""
        return f"<Layer of {self.kind}, shape {self.shape}, {self.dtype}{several}>"


class Layers(MutableMapping[str, Layer]):
    """Layers by name, in order; they may be added, replaced and removed at any time.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, layers: Any = ()) -> None:
        self._items: dict[str, Layer] = as_layers(layers)
        self._lock = threading.Lock()

    @property
    def all(self) -> Mapping[str, Layer]:
        """All of them as they are now; another object after each change."""
        return self._items

    def __getitem__(self, name: str) -> Layer:
        return self._items[name]

    def __setitem__(self, name: str, image: Any) -> None:
        made = {_checked_name(name): as_layer(image)}
        with self._lock:
            self._items = {**self._items, **made}

    def __delitem__(self, name: str) -> None:
        with self._lock:
            rest = dict(self._items)
            del rest[name]
            self._items = rest

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Layers({self._items!r})"


def as_layer(image: Any) -> Layer:
    """Return an image as a layer."""
    return image if isinstance(image, Layer) else Layer(image)


def as_layers(layers: Any) -> dict[str, Layer]:
    """Return layers by name: a mapping of name to image, or a single image, called "image".

    Raises
    ------
    TypeError, ValueError
        If a name cannot be part of an address, or an image cannot be served.
    """
    if not isinstance(layers, Mapping):
        if isinstance(layers, (list, tuple)) and not layers:
            return {}
        layers = {"image": layers}
    found = {}
    for name, image in layers.items():
        checked = _checked_name(name)
        try:
            found[checked] = as_layer(image)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
    return found


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name of a layer must be a text, got {name!r}")
    if not name or _RESERVED.fullmatch(name) or _NOT_IN_NAMES.search(name):
        raise ValueError(
            f"a layer cannot be called {name!r}: names are parts of addresses: not empty, "
            f"without slashes and ?, #, %, neither dots nor zarr.json and the like, and they do "
            f'not begin with "@" or "__"'
        )
    return name


# ------------------------------------------------------------------- images and their levels


def _kind_of(image: Any) -> Literal["image", "labels"]:
    if isinstance(image, Pyramid):
        found = image.method == "mode" or isinstance(image.levels[0], LabelImg)
    elif isinstance(image, (list, tuple)) and image:
        return _kind_of(image[0])
    else:
        found = isinstance(image, LabelImg) or getattr(image, "is_labels", False) is True
    return "labels" if found else "image"


def _levels(
    image: Any, levels: Any, kind: Literal["image", "labels"]
) -> tuple[tuple[CellImg, ...], tuple[Space, ...]]:
    """Return the levels as lazy images, and where their voxels lie."""
    if isinstance(image, Pyramid):
        own = list(image.levels)
    elif isinstance(image, (list, tuple)):
        own = list(image)
        if not own:
            raise ValueError("an image needs one level at least, got an empty sequence")
        for level, part in enumerate(own):
            if not (hasattr(part, "shape") and hasattr(part, "dtype")):
                raise TypeError(
                    f"levels are arrays, level {level} is a {type(part).__name__}; of a list of "
                    f"numbers make an array: numpy.asarray"
                )
    else:
        stored = getattr(image, "levels", None)
        own = list(stored) if isinstance(stored, tuple) and stored else [image]
        # Of a coarser level, that one and those above it.
        own = own[next((n for n, part in enumerate(own) if part is image), 0) :]
    if isinstance(levels, (int, np.integer)) and not isinstance(levels, bool):
        made = pyramid(as_image(own[0]), levels, kind)
        return made.levels, tuple(part.space for part in made.levels)
    if levels is not None:
        if isinstance(levels, (str, bytes)) or not isinstance(levels, Iterable):
            raise TypeError(f"levels must be arrays from fine to coarse, got {levels!r}")
        own = [own[0], *levels]
    images = tuple(as_image(part) for part in own)
    spaces = [space_of(images[0])]
    for level, part in enumerate(images[1:], 1):
        _check_level(level, part, images[0])
        spaces.append(_space_of_level(part, images[0]))
    return images, tuple(spaces)


def _check_level(level: int, image: CellImg, first: CellImg) -> None:
    if image.ndim != first.ndim:
        raise ValueError(
            f"level {level} has {image.ndim} axes, level 0 has {first.ndim}: levels have the same"
        )
    if image.dtype != first.dtype:
        raise ValueError(
            f"level {level} has dtype {image.dtype}, level 0 has {first.dtype}: levels have the "
            f"same"
        )
    for axis, (extent, full) in enumerate(zip(image.shape, first.shape, strict=True)):
        if extent > full:
            raise ValueError(
                f"level {level} has {extent} voxels along axis {axis}, level 0 has {full}: levels "
                f"are given from fine to coarse"
            )


def _space_of_level(image: CellImg, first: CellImg) -> Space:
    """Return where the voxels of a level lie: as it says itself, else by its shape."""
    base, own = space_of(first), space_of(image)
    said = (own.scale, own.translation)
    unsaid = Space.of(own.ndim)
    if said not in ((base.scale, base.translation), (unsaid.scale, unsaid.translation)):
        return Space(base.axes, base.units, own.scale, own.translation)
    factors = _factors(first.shape, image.shape)
    return Space(
        base.axes,
        base.units,
        tuple(scale * f for scale, f in zip(base.scale, factors, strict=True)),
        tuple(
            shift + scale * (f - 1) / 2
            for shift, scale, f in zip(base.translation, base.scale, factors, strict=True)
        ),
    )


def _factors(shape: Sequence[int], shorter: Sequence[int]) -> list[float]:
    """Return per axis how many voxels make one of a level: the same along all, if that fits."""
    fitting = [
        # ceil(n / f) = m from the first to the last of these.
        range(-(-n // m), -(-n // (m - 1)) if m > 1 else 2 * n) if 0 < m < n else range(0)
        for n, m in zip(shape, shorter, strict=True)
    ]
    votes: Counter[int] = Counter()
    for own in fitting:
        powers = (1 << power for power in range((own.stop or 1).bit_length()))
        votes.update({factor for factor in (own.start, *powers) if factor in own})
    factors = []
    for own, n, m in zip(fitting, shape, shorter, strict=True):
        if not own:
            factors.append(n / m if 0 < m < n else 1.0)
            continue
        common = [factor for factor in votes if factor in own]
        # Among equals one without a rest, then a power of two.
        factors.append(
            float(max(common, key=lambda f: (votes[f], n % f == 0, f & (f - 1) == 0, -f)))
        )
    return factors
