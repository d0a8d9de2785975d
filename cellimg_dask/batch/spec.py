"""The description of a run in a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cellimg_dask.blocks.functions import BlockCode
from cellimg_dask.geometry import BOUNDARIES, CellGrid, as_ints
from cellimg_dask.image.cellimg import CellImg
from cellimg_dask.image.define import fill_cells, map_cells
from cellimg_dask.image.input import Input
from cellimg_dask.queues.block_queue import BlockQueue

__all__ = ["InputSpec", "QueueSpec", "RunSpec", "SlurmSpec", "entries", "meaning"]

Boundary = Literal["none", "constant", "reflect", "symmetric", "edge", "wrap"]
assert set(Boundary.__args__) == set(BOUNDARIES)  # type: ignore[attr-defined]

Width = Annotated[int, Field(ge=0)]
Halo = Width | list[Width | tuple[Width, Width]]
Positive = Annotated[int, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class InputSpec(_Model):
    """An array that blocks read."""

    path: str
    """File or store: zarr, HDF5, TIFF, PNG, .npy; relative to the spec's folder."""
    name: str = ""
    """Which array of the file, where it has several."""
    halo: Halo | None = None
    """Its own halo; default: the run's."""
    boundary: Boundary | None = None
    """Its own boundary; default: the run's."""
    version: str | None = None
    """Stands for its content; default: size and time of change of the files."""


class SlurmSpec(_Model):
    """A cluster that SLURM starts, through dask-jobqueue."""

    jobs: Positive
    """Number of jobs."""
    cores: Positive
    """Threads of a job."""
    memory: str
    """Memory of a job, such as ``64GB``."""
    processes: Positive = 1
    """Worker processes of a job."""
    walltime: str = "01:00:00"
    """How long a job may take."""
    queue: str | None = None
    """Partition."""
    options: dict[str, Any] = {}
    """Other arguments of ``dask_jobqueue.SLURMCluster``."""


class QueueSpec(_Model):
    """Where blocks run."""

    backend: str = "threads"
    """``threads``, ``processes``, or the address of a dask scheduler."""
    num_workers: Positive | None = None
    """Threads or processes; on a cluster how many to wait for."""
    init: str | None = None
    """Code that prepares each worker."""
    resources: dict[str, float] | None = None
    """On a cluster: what a cell needs."""
    timeout_s: float = Field(default=60.0, gt=0)
    """On a cluster: how long to wait for workers."""
    insecure: bool = False
    """Whether a scheduler without TLS on another host is accepted."""
    slurm: SlurmSpec | None = None
    """A cluster to start, instead of a backend."""


class RunSpec(_Model):
    """A run over a whole image."""

    inputs: list[InputSpec]
    """Arrays that blocks read: a path, or a list of paths or of entries with a path each."""
    target: str
    """Path or URL of the zarr array to write."""
    function: str | None = None
    """``module:name`` or ``file.py:name`` of a function from arrays to an array."""
    code: str | None = None
    """Code that fills ``block.data``, instead of a function."""
    params: dict[str, Any] = {}
    """Keyword parameters."""
    version: str | None = None
    """Stands for the function; default: its compiled code."""
    dtype: str | None = None
    """Of the result."""
    halo: Halo = 0
    """Voxels that a block reads around its cell: a number, or one or [before, after] per axis."""
    boundary: Boundary = "none"
    """What lies beyond the image."""
    cell_shape: Positive | list[Positive] | None = None
    """Shape of a cell, a number or one for each axis, from 1; default: the first input's chunks."""
    chunks: Positive | list[Positive] | None = None
    """Shape of the target's chunks, a number or one for each axis, from 1; default: cells."""
    sharded: bool | None = None
    """Whether the chunks of a cell are one object."""
    compressor: Literal["zstd", "blosc", "gzip", "none"] = "zstd"
    """How the target is compressed."""
    level: int | None = None
    """How hard the compressor tries."""
    fill_value: float | int | bool = 0
    """Value of voxels that are not stored."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a cell that fails is tried again."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """How stored cells are checked before they count as done."""
    cells_per_call: Positive | list[Positive] | Literal["auto"] | None = None
    """How many neighbouring cells are computed by one call: auto, or a number for each axis."""
    max_memory: Positive | None = None
    """Bytes that the run may take."""
    cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bound of the cache of chunks and of cells upstream."""
    timeout_s: float = Field(default=600.0, gt=0)
    """On a cluster: how long the run goes on without a cell being done."""
    queue: QueueSpec = QueueSpec()
    """Where blocks run."""

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_input(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in items]

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and ":" not in value:
            raise ValueError(f"{value!r} must be module:name or file.py:name")
        return value

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
    def _one_function(self) -> RunSpec:
        if (self.function is None) == (self.code is None):
            raise ValueError("give either function or code")
        if self.code is not None and self.dtype is None:
            raise ValueError("code says nothing of the dtype of its result: give dtype")
        if not self.inputs:
            raise ValueError("inputs is empty")
        return self

    def image(
        self,
        open_array: Callable[[InputSpec], tuple[Any, str | None]],
        folder: Path,
        queue: BlockQueue | None,
    ) -> CellImg:
        """Return the lazy image that the run computes.

        Parameters
        ----------
        open_array : callable
            From an input to its array, and a version where the array cannot be compared.
        folder : Path
            Where the file of the function is looked for.
        queue : BlockQueue, optional
            Where blocks run.
        """
        inputs = []
        for item in self.inputs:
            array, version = open_array(item)
            inputs.append(
                Input(
                    array,
                    halo=item.halo,
                    boundary=item.boundary,
                    version=item.version or version,
                )
            )
        common: dict[str, Any] = {
            "halo": self.halo,
            "boundary": self.boundary,
            "params": self.params,
            "queue": queue,
            "version": self.version,
        }
        if self.code is not None:
            shape = inputs[0].shape
            cells: Any = self.cell_shape
            if cells is None:
                cells = getattr(inputs[0].array, "chunks", None) or shape
            grid = CellGrid(shape, as_ints(cells, "cell_shape", ndim=len(shape), minimum=1))
            assert self.dtype is not None
            return fill_cells(BlockCode(self.code), grid, *inputs, dtype=self.dtype, **common)
        assert self.function is not None
        return map_cells(
            _function(self.function, folder),
            *inputs,
            dtype=self.dtype,
            cell_shape=self.cell_shape,
            **common,
        )

    def run_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `run`."""
        return {
            "chunks": self.chunks,
            "sharded": self.sharded,
            "compressor": None if self.compressor == "none" else self.compressor,
            "level": self.level,
            "fill_value": self.fill_value,
            "retries": self.retries,
            "verify": self.verify,
            "cells_per_call": self.cells_per_call,
            "max_memory": self.max_memory,
            "timeout_s": self.timeout_s,
        }


_MODELS = (RunSpec, InputSpec, QueueSpec, SlurmSpec)


def entries() -> list[str]:
    """Return the names of all entries that a spec can have."""
    return [name for model in _MODELS for name in model.model_fields]


def meaning(entry: str) -> str:
    """Return what an entry says."""
    text = next(m.model_fields[entry].description for m in _MODELS if entry in m.model_fields)
    assert text is not None
    return text[0].lower() + text[1:].rstrip(".")


def _function(name: str, folder: Path) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        module = _load_file((folder / module_name).resolve())
    else:
        module = importlib.import_module(module_name)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise AttributeError(f"{module_name} has no function {attribute!r}")
    function: Callable[..., Any] = found
    return function


def _load_file(path: Path) -> Any:
    """Run a file and return its module.

    Workers, which cannot import it, get it by value; also other files beside it that it imports.
    """
    import cloudpickle

    # A name of its own: the file may be called as a module of Python's, signal.py for instance.
    spec = importlib.util.spec_from_file_location(f"cellimg_spec.{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look their module up.
    sys.modules[module.__name__] = module
    folder = str(path.parent)
    if folder not in sys.path:
        # At the end, so that what is installed goes first, whatever the files are called.
        sys.path.append(folder)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(folder) and "." not in name:
            cloudpickle.register_pickle_by_value(sys.modules[name])
    return module
