"""The description of runs in a file: stages, each of which makes an image or a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, field_validator, model_validator

from cellimg_dask.batch.queue_spec import (
    CondaSpec,
    EnvSpec,
    Positive,
    QueueSpec,
    SlurmSpec,
    SpecModel,
    UvSpec,
)
from cellimg_dask.geometry import BOUNDARIES
from cellimg_dask.schemas.description import is_description

__all__ = [
    "KINDS",
    "ImageStage",
    "InputSpec",
    "LabelsStage",
    "PointsStage",
    "Settings",
    "Spec",
    "Stage",
    "TableStage",
    "WholeSpec",
    "entries",
    "meaning",
]

Boundary = Literal["none", "constant", "reflect", "symmetric", "edge", "wrap"]
assert set(Boundary.__args__) == set(BOUNDARIES)  # type: ignore[attr-defined]

Width = Annotated[int, Field(ge=0)]
Halo = Width | list[Width | tuple[Width, Width]]
Size = Annotated[float, Field(gt=0)]


class InputSpec(SpecModel):
    """An array that blocks read."""

    path: str
    """File or store (zarr, HDF5, TIFF, PNG, .npy) relative to the spec's folder, or an earlier
    stage."""
    name: str = ""
    """Which array of the file, where it has several."""
    halo: Halo | None = None
    """Its own halo; default: the stage's."""
    boundary: Boundary | None = None
    """Its own boundary; default: the stage's."""
    version: str | None = None
    """Stands for its content; default: size and time of change of the files."""
    axes: str | list[str] | None = None
    """Names of its axes, such as zyx; default: those that the file says."""
    units: str | list[str | None] | None = None
    """Unit of its axes, such as um."""
    scale: Size | list[Size] | None = None
    """Distance between neighbouring voxels, in the unit, a number or one for each axis."""
    translation: float | list[float] | None = None
    """Where the centre of its first voxel lies, in the unit, a number or one for each axis."""


class OmeZarrSpec(SpecModel):
    """How OME-Zarr is written."""

    levels: Positive | None = None
    """How many, that of the image included; default: until it fits into one cell."""
    factors: Positive | list[Positive] | None = None
    """By how much each level is smaller than the one below; default: 2 along axes in space."""
    method: Literal["mean", "mode", "nearest"] | None = None
    """What a voxel is made of; default: the mean of images, the most frequent of labels."""
    version: Literal["0.4", "0.5"] = "0.5"
    """Of OME-Zarr."""
    name: str | None = None
    """Of the image; default: that of the file."""
    channels: list[str] | None = None
    """What the channels are called."""


class Settings(SpecModel):
    """How stages are run: of the whole spec, or of one stage."""

    retries: Annotated[int, Field(ge=0)] = 2
    """How often a cell that fails is tried again."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """How stored cells are checked before they count as done."""
    max_memory: Positive | None = None
    """Bytes that the run may take."""
    timeout_s: float = Field(default=600.0, gt=0)
    """How long the run goes on without a cell being done."""
    queue: QueueSpec = QueueSpec()
    """Where blocks run."""


class WholeSpec(Settings):
    """What a spec with stages says of all of them."""

    stages: dict[str, dict[str, Any]]
    """The stages by name, in the order in which they run."""
    cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bound of the cache of chunks and of cells upstream."""

    @field_validator("stages")
    @classmethod
    def _names_of_stages(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise ValueError("there is no stage")
        for name in value:
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"{name!r} is no name: use letters, digits, _ and -")
        return value


class Stage(Settings):
    """What stages of all kinds have."""

    input_entries: ClassVar[tuple[str, ...]] = ("inputs",)
    """The entries that say what is read."""
    makes: ClassVar[Literal["image", "table"]] = "image"

    target: str | None = None
    """Path or URL of the zarr array to write; one that ends with .ome.zarr is OME-Zarr."""
    compressor: str = "zstd"
    """How the target is compressed."""
    level: int | None = None
    """How hard the compressor tries."""

    def all_inputs(self) -> list[InputSpec]:
        """Return everything that is read."""
        found: list[InputSpec] = []
        for entry in self.input_entries:
            value = getattr(self, entry)
            found += value if isinstance(value, list) else [value] * (value is not None)
        return found

    @property
    def is_ome_zarr(self) -> bool:
        """Whether the target is an image in OME-Zarr, and not an array or a table."""
        return False

    def run_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `run`."""
        return {
            "compressor": None if self.compressor == "none" else self.compressor,
            "level": self.level,
            "retries": self.retries,
            "verify": self.verify,
            "max_memory": self.max_memory,
            "timeout_s": self.timeout_s,
        }


class _FromBlocks(Stage):
    """A stage that calls a function for each block."""

    inputs: list[InputSpec]
    """Arrays that blocks read: a path or a stage, or a list of these or of entries with a path."""
    function: str | None = None
    """``module:name`` or ``file.py:name`` of a function from arrays to an array, or a file that
    describes one."""
    params: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Keyword parameters."""
    version: str | None = None
    """Stands for the function; default: its compiled code."""
    boundary: Boundary = "none"
    """What lies beyond the image."""
    cell_shape: Positive | list[Positive] | None = None
    """Shape of a cell, a number or one for each axis, from 1; default: the first input's chunks."""

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_input(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        return [_as_entry(item) for item in items]

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        return value if value is not None and is_description(value) else _checked_name(value)

    @property
    def is_described(self) -> bool:
        """Whether the function is described in a file."""
        return self.function is not None and is_description(self.function)

    @model_validator(mode="after")
    def _some_input(self) -> _FromBlocks:
        if not self.inputs:
            raise ValueError("inputs is empty")
        return self


class _Voxels(_FromBlocks):
    """A stage that makes an image."""

    compressor: Literal["zstd", "blosc", "gzip", "none"] = "zstd"
    """How the target is compressed."""
    chunks: Positive | list[Positive] | None = None
    """Shape of the target's chunks, a number or one for each axis, from 1; default: cells."""
    sharded: bool | None = None
    """Whether the chunks of a cell are one object."""
    ome_zarr: OmeZarrSpec = OmeZarrSpec()
    """How OME-Zarr is written: levels, factors, version, name, channels."""

    @property
    def is_ome_zarr(self) -> bool:
        """Whether the target is an image in OME-Zarr; see `Stage`."""
        return self.target is not None and self.target.rstrip("/").endswith(".ome.zarr")

    @model_validator(mode="after")
    def _for_ome_zarr(self) -> _Voxels:
        if self.ome_zarr != OmeZarrSpec() and not self.is_ome_zarr:
            raise ValueError("ome_zarr is for targets that end with .ome.zarr")
        return self

    def run_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `run`, or of `write_ome_zarr`."""
        more = self.ome_zarr.model_dump() if self.is_ome_zarr else {}
        return super().run_arguments() | {"chunks": self.chunks, "sharded": self.sharded} | more


class ImageStage(_Voxels):
    """An image, by `map_cells` or `fill_cells`."""

    kind: Literal["image"] = "image"
    """What it makes: image, labels, points or table."""
    code: str | None = None
    """Code that fills ``block.data``, instead of a function."""
    dtype: str | None = None
    """Of the result."""
    halo: Halo | None = None
    """Voxels that a block reads around its cell: a number, or one or [before, after] per axis;
    default: what a description says, else 0."""
    fill_value: float | int | bool = 0
    """Value of voxels that are not stored."""
    cells_per_call: Positive | list[Positive] | Literal["auto"] | None = None
    """How many neighbouring cells are computed by one call: auto, or a number for each axis."""

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                np.dtype(value)
            except TypeError:
                raise ValueError(f"{value!r} is no dtype that NumPy knows") from None
        return value

    @model_validator(mode="after")
    def _one_function(self) -> ImageStage:
        if (self.function is None) == (self.code is None):
            raise ValueError("give either function or code")
        if self.code is not None and self.dtype is None:
            raise ValueError("code says nothing of the dtype of its result: give dtype")
        return self

    def run_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `run`."""
        own = {"fill_value": self.fill_value, "cells_per_call": self.cells_per_call}
        return super().run_arguments() | own


class LabelsStage(_Voxels):
    """Labels of objects, by `map_labels` or `label`."""

    kind: Literal["labels"]
    """What it makes: image, labels, points or table."""
    threshold: float | int | None = None
    """What voxels of objects exceed, instead of a function; objects are connected components."""
    connectivity: Positive | None = None
    """With threshold: how many axes neighbours may differ in; default: 1."""
    halo: Halo | None = None
    """With function: voxels that a block reads around its cell, at least 1 where cells meet; a
    description may say it."""
    load_model: str | None = None
    """With function: one that makes a model, which function is given before the arrays."""
    normalize: tuple[float, float] | None = None
    """With function: percentiles of the whole image that become 0 and 1."""
    channel_axis: int | None = None
    """With function: axis of the inputs that labels lack."""
    multiple_of: Positive | list[Positive] | None = None
    """With function: blocks are mirrored at their ends up to a multiple of this."""
    link: Literal["components"] | tuple[Literal["iou"], float] | None = None
    """With function: components or [iou, threshold], how blocks agree on objects; default: [iou,
    0.5]."""
    consecutive: bool = False
    """Whether ids are 1, 2, 3 …"""

    @field_validator("load_model")
    @classmethod
    def _names_a_maker(cls, value: str | None) -> str | None:
        return _checked_name(value)

    @property
    def for_a_network(self) -> dict[str, Any]:
        """What only `segment` knows, as far as it was given."""
        names = ("normalize", "channel_axis", "multiple_of")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _one_way(self) -> LabelsStage:
        if (self.function is None) == (self.threshold is None):
            raise ValueError("give either function or threshold")
        if self.function is not None and self.halo is None and not self.is_described:
            raise ValueError("give halo: blocks are linked by the voxels that both label")
        if self.function is not None and self.connectivity is not None:
            raise ValueError("connectivity goes with threshold; a function decides by itself")
        if self.threshold is not None:
            _go_with_a_function(
                self,
                *("halo", "link", "params", "version", "boundary"),
                *("load_model", "normalize", "channel_axis", "multiple_of"),
            )
            if len(self.inputs) > 1:
                raise ValueError("threshold is for one input")
        return self


class _Table(Stage):
    """A stage that makes a table."""

    makes: ClassVar[Literal["image", "table"]] = "table"

    target: str | None = None
    """Path or URL of the folder of parquet files to write."""
    compressor: Literal["zstd", "gzip", "none"] = "zstd"
    """How the target is compressed."""


class PointsStage(_Table, _FromBlocks):
    """A table of points, by `map_points`, `blob_log` or `blob_dog`."""

    kind: Literal["points"]
    """What it makes: image, labels, points or table."""
    detector: Literal["blob_log", "blob_dog"] | None = None
    """A detector of scikit-image's, with its parameters in params, instead of a function."""
    columns: dict[str, str] | list[str] | None = None
    """With function: names of what it returns beside coordinates, with their dtypes if not
    float64."""
    merge: Literal["own"] | tuple[Literal["seam"], float] | None = None
    """With function: own, or [seam, tolerance] where blocks see other centres; default: own."""
    halo: Halo | None = None
    """With function: voxels that a block reads around its cell; default: what a description says,
    else 0."""
    axes: str | list[str] | None = None
    """Names of the coordinates, such as zyx; default: axis-0 and so on."""
    voxel_size: Size | list[Size] | None = None
    """Extent of a voxel, one number or one for each axis, for physical coordinates."""

    @model_validator(mode="after")
    def _one_way(self) -> PointsStage:
        if (self.function is None) == (self.detector is None):
            raise ValueError("give either function or detector")
        if self.detector is not None:
            _go_with_a_function(self, "columns", "merge", "halo", "boundary", "version")
            if len(self.inputs) > 1:
                raise ValueError("detector is for one input")
        return self


class TableStage(_Table):
    """A table of objects with their properties, by `region_table`."""

    input_entries: ClassVar[tuple[str, ...]] = ("labels", "image")

    kind: Literal["table"]
    """What it makes: image, labels, points or table."""
    labels: InputSpec
    """Labels of the objects: a path or a stage, or an entry with a path."""
    image: InputSpec | None = None
    """Intensities: a path or a stage, or an entry with a path."""
    properties: list[str] | None = None
    """Names of properties as scikit-image has them; default: those of `region_table`."""
    spacing: Size | list[Size] | None = None
    """Extent of a voxel, one number or one for each axis."""
    max_extent: Positive | list[Positive] | None = None
    """A box in voxels, for properties that need the mask of an object that fits."""
    extra_properties: list[str | tuple[str, str]] = []  # noqa: RUF012 - pydantic copies it
    """Functions of a mask, or of mask and image, as in function, or pairs of one and a dtype."""
    npartitions: Positive = 1
    """How many files the table has."""
    cell_shape: Positive | list[Positive] | None = None
    """Shape of a cell, a number or one for each axis, from 1; default: the labels' chunks."""

    @field_validator("labels", "image", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return _as_entry(value)


KINDS: dict[str, type[Stage]] = {
    "image": ImageStage,
    "labels": LabelsStage,
    "points": PointsStage,
    "table": TableStage,
}
"""Kinds of stages."""


@dataclass(frozen=True)
class Spec:
    """A checked spec."""

    stages: Mapping[str, Stage]
    """By name, in the order in which they run; the name of the only one may be empty."""
    cache_bytes: int | None
    """Bound of the cache of chunks and of cells upstream."""

    def read_by(self, name: str) -> list[str]:
        """Return the earlier stages that a stage reads."""
        return [item.path for item in self.stages[name].all_inputs() if self.is_stage(item)]

    def is_stage(self, item: InputSpec) -> bool:
        """Whether an input is a stage."""
        return bool(item.path) and item.path in self.stages

    def _entry_of(self, name: str, above: str) -> str:
        stage = self.stages[name]
        for entry in stage.input_entries:
            value = getattr(stage, entry)
            items = value if isinstance(value, list) else [value] * (value is not None)
            if any(item.path == above for item in items):
                return entry
        raise AssertionError(above)

    def needed_for(self, names: list[str]) -> list[str]:
        """Return stages with those that they rest on, in the order in which they run."""
        wanted = set(names)
        for name in reversed(list(self.stages)):
            if name in wanted:
                wanted.update(self.read_by(name))
        return [name for name in self.stages if name in wanted]

    def mistakes(self) -> dict[str, str]:
        """Return what is wrong with how stages fit together: the entry, and what is expected."""
        found: dict[str, str] = {}
        names = list(self.stages)
        read: set[str] = set()
        for number, name in enumerate(names):
            prefix = f"stages.{name}." if name else ""
            for above in self.read_by(name):
                read.add(above)
                entry = f"{prefix}{self._entry_of(name, above)}"
                if names.index(above) >= number:
                    found[entry] = (
                        f"{above} is this stage or a later one; write ./{above} for a file of that "
                        f"name"
                    )
                elif self.stages[above].makes != "image":
                    found[entry] = f"{above} is a table, and no image"
        for name, stage in self.stages.items():
            if stage.target is None and name not in read:
                prefix = f"stages.{name}." if name else ""
                found[f"{prefix}target"] = f"is missing: {meaning('target')}"
        places = [stage.target for stage in self.stages.values() if stage.target is not None]
        for name, stage in self.stages.items():
            if stage.target is not None and places.count(stage.target) > 1:
                found[f"stages.{name}.target"] = f"{stage.target} is another stage's target, too"
        return found


_MODELS: tuple[type[SpecModel], ...] = (
    *KINDS.values(),
    WholeSpec,
    InputSpec,
    QueueSpec,
    SlurmSpec,
    EnvSpec,
    UvSpec,
    CondaSpec,
)


def entries() -> list[str]:
    """Return the names of all entries that a spec can have."""
    return list(dict.fromkeys(name for model in _MODELS for name in model.model_fields))


def meaning(entry: str, model: type[BaseModel] | None = None) -> str:
    """Return what an entry says, in a model or in the first that has it."""
    models = _MODELS if model is None else (model, *_MODELS)
    text = next(m.model_fields[entry].description for m in models if entry in m.model_fields)
    assert text is not None
    text = " ".join(text.split())
    return text[0].lower() + text[1:].rstrip(".")


def _go_with_a_function(stage: Stage, *names: str) -> None:
    fields = type(stage).model_fields
    given = [name for name in names if getattr(stage, name) != fields[name].default]
    if given:
        raise ValueError(f"{', '.join(given)} goes with function")


def _checked_name(value: str | None) -> str | None:
    if value is not None and ":" not in value:
        raise ValueError(f"{value!r} must be module:name or file.py:name")
    return value


def _as_entry(item: Any) -> Any:
    return {"path": item} if isinstance(item, str) else item
