"""Images in zarr, version 2 and 3: bare arrays, OME-Zarr, groups with named dimensions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cellimg_dask.geometry import Space
from cellimg_dask.image.labelled import even_steps
from cellimg_dask.io.location import Location, UnreadableError
from cellimg_dask.io.ome_read import (
    Multiscale,
    channels_in,
    field_names,
    label_names,
    multiscale_of,
    ome_part,
    series_names,
)
from cellimg_dask.io.opened import Found, ListedArray, choose, joined
from cellimg_dask.io.spaces import attributes_space, shrunk_to, tolerant_space

__all__ = ["find_zarr", "list_zarr"]

_ABSENT = (FileNotFoundError, KeyError)


class _Store:
    """A zarr store that is open for reading."""

    def __init__(self, location: Location) -> None:
        from zarr.storage import LocalStore

        self.location = location
        if location.is_local:
            self.store: Any = LocalStore(location.path, read_only=True)
        else:
            from zarr.storage import FsspecStore

            self.store = FsspecStore.from_url(
                location.url, storage_options=location.options or None, read_only=True
            )

    def node(self, path: str) -> Any:
        """Return the array or group at a path; None where there is none."""
        import zarr

        try:
            return zarr.open(self.store, path=path or None, mode="r")
        except _ABSENT:
            return None
        except (json.JSONDecodeError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableError(
                f"{self.location.below(path).url} cannot be read as zarr: "
                f"{type(error).__name__}: {error}"
            ) from error

    def attributes(self, path: str) -> Mapping[str, Any]:
        """Return the attributes of a group; none where there is no group."""
        node = self.node(path)
        return {} if node is None else dict(node.attrs)


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # Other files may lie between the arrays, as OME-XML does.
        warnings.simplefilter("ignore")
        yield


def find_zarr(location: Location, name: str | None) -> Found:
    """Return the image that is in a zarr array or group, or the one called ``name`` in it."""
    store = _Store(location)
    path = "" if name is None else name.strip("/")
    node = store.node(path)
    if node is None:
        raise _missing(store, path)
    return _found(store, path, node)


def _missing(store: _Store, path: str) -> Exception:
    if not path:
        return FileNotFoundError(f"{store.location.url} holds no zarr array or group")
    names = [listed.name for listed in list_zarr(store.location) if listed.name]
    text = f"{store.location.url} (zarr) has no image {path!r}"
    return UnreadableError(f"{text}; it has: {', '.join(names[:20])}" if names else text)


def _is_array(node: Any) -> bool:
    import zarr

    return isinstance(node, zarr.Array)


def _found(store: _Store, path: str, node: Any) -> Found:
    if _is_array(node):
        return _bare(store, path, node)
    attributes = dict(node.attrs)
    multiscale = multiscale_of(attributes)
    if multiscale is not None:
        return _image(store, path, attributes, multiscale)
    inside = _images_inside(store, path, attributes)
    if inside is None:
        return _one_of_group(store, path, node)
    if len(inside) > 1 and "bioformats2raw.layout" in ome_part(attributes):
        # What one means by this folder is its first image.
        inside = inside[:1]
    # Under the names by which they are found from here.
    below = choose(store.location, None, [joined(path, each) for each in inside], "zarr")
    node = store.node(below)
    if node is None:
        raise _missing(store, below)
    return _found(store, below, node)


def _images_inside(
    store: _Store, path: str, attributes: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """Return the images that a group says are in it; None where it says nothing of it."""
    described = store.attributes(joined(path, "OME")) if _is_layout(attributes) else {}
    series = series_names(attributes, described)
    if series is not None:
        return series or ("0",)
    return field_names(attributes) or label_names(attributes) or None


def _is_layout(attributes: Mapping[str, Any]) -> bool:
    return "bioformats2raw.layout" in ome_part(attributes)


# ---------------------------------------------------------------------- bare arrays


def _bare(store: _Store, path: str, array: Any) -> Found:
    """Return an array that is found by its own path."""
    attributes = dict(array.attrs)

    def space(found: Found, level: int) -> Space:
        above, _, last = path.rpartition("/")
        around = store.attributes(above) if path else {}
        multiscale = multiscale_of(around)
        what = store.location.below(path).url
        if multiscale is not None and last in multiscale.paths:
            number = multiscale.paths.index(last)
            image = _image(store, above, around, multiscale)
            return image.space(number)
        names = _dimensions(array)
        if names is None or not path:
            return attributes_space(array.ndim, names, attributes, what)
        return _labelled_space(store, above, array, names, what)

    return Found(
        store.location,
        path,
        _kind(array),
        [path],
        lambda level: array,
        space,
        attributes=attributes,
        is_labels="image-label" in ome_part(attributes),
    )


def _dimensions(array: Any) -> list[str] | None:
    """Return the names that zarr 3, or xarray in zarr 2, gives to axes; None where not all have."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not isinstance(names, (list, tuple)) or len(names) != array.ndim:
        return None
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        return None
    return list(names)


def _labelled_space(store: _Store, group: str, array: Any, names: list[str], what: str) -> Space:
    """Return the space of an array whose dimensions have names and perhaps coordinates."""
    units: list[str | None] = []
    scale, shift = [], []
    for name, size in zip(names, array.shape, strict=True):
        places = store.node(joined(group, name)) if array.path != name else None
        step, first, unit = 1.0, 0.0, None
        if places is not None and _is_array(places) and places.shape == (size,):
            said = places.attrs.get("units")
            unit = said if isinstance(said, str) and said else None
            step, first = even_steps(np.asarray(places[:]))
        units.append(unit)
        scale.append(step)
        shift.append(first)
    return tolerant_space(array.ndim, names, units, scale, shift, what)


def _one_of_group(store: _Store, path: str, group: Any) -> Found:
    """Return the only image of a group that says nothing of what is in it."""
    names = [joined(path, name) for name in _images_below(store, path, group)]
    if not names:
        choose(store.location.below(path), None, names, "zarr")
    chosen = choose(store.location, None, names, "zarr")
    return _found(store, chosen, store.node(chosen))


def _images_below(store: _Store, path: str, group: Any) -> list[str]:
    """Return the images below a group: each once, not its levels, labels or coordinates."""
    with _no_warnings():
        members = dict(sorted(group.members(max_depth=None)))
    hidden: set[str] = set()
    images: list[str] = []
    for name, item in {"": group, **members}.items():
        if _is_array(item):
            continue
        multiscale = multiscale_of(dict(item.attrs))
        if multiscale is not None:
            hidden.update(joined(name, level) for level in multiscale.paths)
            if name and not _is_label(name):
                images.append(name)
    dimensions = {
        joined(name.rpartition("/")[0], dimension)
        for name, item in members.items()
        if _is_array(item) and item.ndim
        for dimension in _dimensions(item) or ()
    }
    for name, item in members.items():
        coordinates = name in dimensions and item.ndim == 1 if _is_array(item) else True
        if not coordinates and name not in hidden and not _is_scalar(item):
            images.append(name)
    return images


def _is_scalar(array: Any) -> bool:
    # As xarray stores what tells of the coordinates.
    return len(array.shape) == 0


def _is_label(name: str) -> bool:
    return name.rpartition("/")[0].rpartition("/")[2] == "labels"


# ---------------------------------------------------------------------- OME-Zarr


def _image(
    store: _Store, path: str, attributes: Mapping[str, Any], multiscale: Multiscale
) -> Found:
    names = [joined(path, level) for level in multiscale.paths]

    def open_level(level: int) -> Any:
        array = store.node(names[level])
        if array is None or not _is_array(array):
            raise FileNotFoundError(
                f"{store.location.below(names[level]).url}: there is no array, which the image "
                f"{store.location.below(path).url} names as its level {level}"
            )
        return array

    def space(found: Found, level: int) -> Space:
        array = found.array(level)
        what = store.location.below(names[level]).url
        said = multiscale.space(level, array.ndim, what)
        if said is not None:
            return said
        first = found.array(0)
        if first.ndim != array.ndim:
            return Space.of(array.ndim)
        return shrunk_to(found.space(0), first.shape, array.shape)

    def open_label(name: str) -> Found:
        below = joined(path, "labels", name)
        node = store.node(below)
        if node is None:
            raise FileNotFoundError(f"{store.location.below(below).url}: there is no label image")
        found = _found(store, below, node)
        found.is_labels = True
        return found

    is_labels = "image-label" in ome_part(attributes)
    labels = () if is_labels else label_names(store.attributes(joined(path, "labels")))
    first = open_level(0)
    return Found(
        store.location,
        path,
        _kind(first),
        names,
        lambda level: open_level(level) if level else first,
        space,
        attributes=attributes,
        labels=labels,
        open_label=open_label,
        channels=channels_in(attributes),
        is_labels=is_labels,
    )


# ---------------------------------------------------------------------- listing


def list_zarr(location: Location) -> list[ListedArray]:
    """Return the arrays of a zarr store; those of images in several sizes in front."""
    store = _Store(location)
    node = store.node("")
    if node is None:
        raise _missing(store, "")
    if _is_array(node):
        return [_listed(store, node, "", None)]
    with _no_warnings():
        members = dict(node.members(max_depth=None))
    levels: dict[str, tuple[str, ...] | None] = {}
    for prefix, group in {"": node, **dict(sorted(members.items()))}.items():
        multiscale = None if _is_array(group) else multiscale_of(dict(group.attrs))
        if multiscale is not None:
            levels |= {joined(prefix, level): multiscale.axes for level in multiscale.paths}
    arrays = {name: item for name, item in members.items() if _is_array(item)}
    # The first level of a pyramid is the image itself.
    names = [*(name for name in levels if name in arrays), *sorted(arrays)]
    return [_listed(store, arrays[name], name, levels.get(name)) for name in dict.fromkeys(names)]


def _listed(store: _Store, array: Any, name: str, axes: tuple[str, ...] | None) -> ListedArray:
    if axes is None or len(axes) != array.ndim:
        names = _dimensions(array)
        axes = None if names is None else tuple(names)
    codecs = [_codec_name(codec) for codec in (*array.filters, *array.compressors)]
    return ListedArray(
        _kind(array),
        name,
        tuple(array.shape),
        np.dtype(array.dtype),
        None if axes is None else tuple(name.lower() for name in axes),
        tuple(array.chunks),
        None if array.shards is None else tuple(array.shards),
        ", ".join(codecs) or "none",
        1,
        lambda: store.location.nbytes(name),
    )


def _kind(array: Any) -> str:
    return f"zarr v{array.metadata.zarr_format}"


def _codec_name(codec: Any) -> str:
    name = str(getattr(codec, "codec_id", None) or type(codec).__name__.removesuffix("Codec"))
    inner = getattr(codec, "cname", None)
    if inner is None:
        return name.lower()
    return f"{name.lower()} ({str(getattr(inner, 'name', inner)).lower()})"
