"""The group of an OME-Zarr image on the disk: its metadata, and what was noted of writing it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cellimg_dask.batch.folder import is_url, open_folder
from cellimg_dask.batch.lock import RunLock
from cellimg_dask.batch.manifest import run_folder
from cellimg_dask.geometry import Space
from cellimg_dask.io.ome import OmeVersion, image_attributes, label_attributes

__all__ = ["OmeGroup", "Part", "written_arrays"]

_MARK = "ome-zarr.json"
_SCHEMA = 1


class Part(Protocol):
    """An image of a group: the image itself, or its labels of a name."""

    @property
    def path(self) -> str:
        """From the group; empty for the image itself."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def is_labels(self) -> bool:
        """Whether voxels are numbers of objects."""

    @property
    def omero(self) -> Mapping[str, Any] | None:
        """What is said of its channels."""

    @property
    def places(self) -> list[str]:
        """Where the levels are, from the group."""

    @property
    def spaces(self) -> tuple[Space, ...]:
        """Where the voxels of each level lie."""


def written_arrays(path: str) -> dict[str, str]:
    """Return where the arrays that were written to a group are, and the folder of their markers.

    Empty where `write_ome_zarr` has written nothing.
    """
    beside = run_folder(path)
    mark = open_folder(beside).read(_MARK)
    images = {} if mark is None else json.loads(mark)["images"]
    names = [name for names in images.values() for name in names]
    return {f"{path.rstrip('/')}/{name}": f"{beside}/{name}" for name in names}


class OmeGroup:
    """The group on the disk, and what was noted of it."""

    def __init__(self, where: str, version: OmeVersion | None) -> None:
        self.where = where
        self._folder = open_folder(where)
        self._notes = open_folder(run_folder(where))
        self.version: OmeVersion = self._version_there() if version is None else version
        """Of OME-Zarr; where none is asked for that of the image which is there."""

    def beside(self, place: str) -> str:
        """Return where the markers of an array are."""
        return f"{run_folder(self.where)}/{place}"

    def lock(self) -> RunLock:
        """Return what is held while the group is written: one at a time may replace it."""
        return RunLock(self._notes, self.where)

    def check(self, images: Sequence[Part], *, resume: bool, overwrite: bool) -> None:
        """Refuse what is not to be carried on, and note that the group is ours."""
        mark = self._notes.read(_MARK)
        is_free = self._is_free()
        # Notes that stayed when the group was removed say nothing of the next one.
        noted = {} if mark is None or is_free else json.loads(mark)
        only_labels = all(image.path for image in images)
        if only_labels:
            self.check_image()
        elif mark is None and not is_free and not (overwrite and self._is_image()):
            raise FileExistsError(
                f"{self.where} exists and was not written by write_ome_zarr; give another path"
                + ("" if not self._is_image() else ", or overwrite=True to replace the image")
            )
        if noted and not overwrite:
            if not resume and any(image.path in noted["images"] for image in images):
                raise FileExistsError(
                    f"{self.where} exists; resume=True carries it on, overwrite=True replaces it"
                )
            if noted["version"] != self.version:
                raise FileExistsError(
                    f"{self.where} is OME-Zarr {noted['version']}, asked for was {self.version}: "
                    f"give another path, or overwrite=True to replace it"
                )
            for image in images:
                there = noted["images"].get(image.path)
                if there is not None and there != image.places:
                    raise FileExistsError(
                        f"{image.path or 'the image'} in {self.where} has {len(there)} levels, "
                        f"asked for were {len(image.places)}: give another path, or overwrite=True "
                        f"to replace it"
                    )
        before = noted.get("images", {})
        replaced = before if overwrite else {}
        if only_labels:
            replaced = {x.path: replaced[x.path] for x in images if x.path in replaced}
        if overwrite:
            self._remove(replaced, () if only_labels else ("", "labels"))
        kept = {path: places for path, places in before.items() if path not in replaced}
        known = kept | {image.path: image.places for image in images}
        content = {"schema": _SCHEMA, "version": self.version, "images": known}
        self._notes.write(_MARK, json.dumps(content).encode())
        if not is_url(self.where):
            # Of writers that were killed.
            for path in {"", "labels", *known}:
                for left in Path(self.where, path).glob(".*.part"):
                    left.unlink(missing_ok=True)

    def check_image(self) -> None:
        """Refuse a group without an image that labels could be added to."""
        there = self._version_there() if self._is_image() else None
        if there is None:
            raise FileNotFoundError(
                f"{self.where} is no image in OME-Zarr that labels could be added to; give the "
                f"image as well"
            )
        if there != self.version:
            raise FileExistsError(
                f"{self.where} is OME-Zarr {there}, asked for was {self.version}: leave version out"
            )

    def describe(self, images: Sequence[Part]) -> None:
        """Write the metadata, leaving what others have added to it."""
        for image in images:
            self._write_group(
                image.path,
                image_attributes(
                    image.spaces,
                    [place.rpartition("/")[2] for place in image.places],
                    image.name,
                    self.version,
                    is_labels=image.is_labels,
                    omero=image.omero,
                ),
            )
        new = [image.name for image in images if image.path]
        if new:
            known = _labels_in(self._attributes("labels"))
            names = [*known, *(name for name in new if name not in known)]
            self._write_group("labels", label_attributes(names, self.version))

    def _is_free(self) -> bool:
        return next(self._folder.names(""), None) is None and not os.path.isfile(self.where)  # noqa: PTH113

    def _version_there(self) -> OmeVersion:
        return "0.4" if self._folder.read(".zattrs") is not None else "0.5"

    def _is_image(self) -> bool:
        attributes = self._attributes("")
        return "multiscales" in {**attributes, **attributes.get("ome", {})}

    def _attributes(self, path: str) -> dict[str, Any]:
        front = f"{path}/" if path else ""
        for name in ("zarr.json", ".zattrs"):
            content = self._folder.read(front + name)
            if content is not None:
                found: dict[str, Any] = json.loads(content)
                return found.get("attributes", {}) if name == "zarr.json" else found
        return {}

    def _write_group(self, path: str, attributes: dict[str, Any]) -> None:
        front = f"{path}/" if path else ""
        merged = _merged(self._attributes(path), attributes)
        if self.version == "0.4":
            self._put(f"{front}.zgroup", {"zarr_format": 2})
            self._put(f"{front}.zattrs", merged)
        else:
            content = {"zarr_format": 3, "node_type": "group", "attributes": merged}
            self._put(f"{front}zarr.json", content)

    def _put(self, name: str, content: dict[str, Any]) -> None:
        self._folder.write(name, json.dumps(content, indent=1).encode())

    def _remove(self, images: Mapping[str, Sequence[str]], groups: Sequence[str]) -> None:
        """Remove what was written, markers first, so that they never vouch for something else."""
        for place in (place for places in images.values() for place in places):
            for folder, under in ((self._notes, place), (self._folder, place)):
                for name in list(folder.names(under)):
                    folder.remove(name)
        for path in {*groups, *images}:
            for name in ("zarr.json", ".zgroup", ".zattrs"):
                self._folder.remove(f"{path}/{name}" if path else name)


def _merged(there: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with what is new in it, and all else that others have put there.

    Colours of channels and of labels stand beside what is written here, in the same objects.
    """
    merged = dict(there)
    for key, value in new.items():
        known = merged.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            merged[key] = _merged(known, value)
        else:
            merged[key] = value
    return merged


def _labels_in(attributes: Mapping[str, Any]) -> list[str]:
    found = {**attributes, **attributes.get("ome", {})}.get("labels", [])
    return [name for name in found if isinstance(name, str)]
