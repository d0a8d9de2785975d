"""The images and tables that the stages of a spec describe."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

import cellimg_dask as ci
from cellimg_dask.bare.naming import is_file_name, split_name
from cellimg_dask.batch.named import above, load_function
from cellimg_dask.batch.queue_spec import EnvSpec, QueueSpec, SlurmSpec
from cellimg_dask.batch.spec import (
    ImageStage,
    InputSpec,
    LabelsStage,
    PointsStage,
    Spec,
    Stage,
    TableStage,
)
from cellimg_dask.blocks.errors import ParameterError
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.cli.files import open_file
from cellimg_dask.cli.require import require
from cellimg_dask.cli.spec_file import place_of
from cellimg_dask.image.space_of import space_of
from cellimg_dask.queues.environments import Env
from cellimg_dask.schemas.block_schema import BlockSchema
from cellimg_dask.schemas.describe import describe
from cellimg_dask.schemas.description import read_description

__all__ = ["Stages", "slurm_cluster"]


class Stages:
    """Makes what the stages describe, lazily; a context manager, in which files are open.

    Parameters
    ----------
    spec : Spec
        The stages.
    folder : Path
        Where its paths begin.
    start : bool
        Whether workers are started that blocks will run on.
    lazy : bool
        Whether a stage reads the cells of those before it as they are computed, and not what
        they have written.
    """

    def __init__(self, spec: Spec, folder: Path, *, start: bool = True, lazy: bool = False) -> None:
        self._spec = spec
        self._folder = folder
        self._start = start
        self._lazy = lazy
        self._stack = ExitStack()
        self._made: dict[str, Any] = {}
        self._stored: set[str] = set()
        self._functions: dict[tuple[str, bool], Callable[..., Any]] = {}
        self._params: dict[int, tuple[dict[str, Any], dict[str, str]]] = {}
        self._queues: list[tuple[QueueSpec, ci.BlockQueue | None]] = []

    def __enter__(self) -> Stages:
        if self._spec.cache_bytes is not None:
            ci.set_cache(self._spec.cache_bytes)
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def make(self, name: str) -> Any:
        """Return what a stage makes: a lazy image, or a data frame of dask's."""
        if name not in self._made:
            stage = self._spec.stages[name]
            self._made[name] = _MAKERS[type(stage)](self, stage)
        return self._made[name]

    def use_stored(self, name: str) -> None:
        """From now on read what a stage has written."""
        self._stored.add(name)

    def mistakes(self, name: str) -> dict[str, str]:
        """Return what is wrong with the parameters of a stage: the entry, and what is expected."""
        stage = self._spec.stages[name]
        if not isinstance(stage, (ImageStage, LabelsStage, PointsStage)):
            return {}
        prefix = f"stages.{name}.params." if name else "params."
        _, found = self._checked_params(stage)
        return {f"{prefix}{entry}": text for entry, text in found.items()}

    def _checked_params(
        self, stage: ImageStage | LabelsStage | PointsStage
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return parameters as the function takes them, and what is wrong with them."""
        if id(stage) not in self._params:
            self._params[id(stage)] = stage.params, {}
            schema = self._schema(stage)
            if schema is not None:
                try:
                    self._params[id(stage)] = schema.checked(stage.params), {}
                except ParameterError as error:
                    self._params[id(stage)] = stage.params, error.mistakes
        return self._params[id(stage)]

    def _schema(self, stage: ImageStage | LabelsStage | PointsStage) -> BlockSchema | None:
        """Return what the function of a stage takes, as far as that is known."""
        if isinstance(stage, PointsStage) and stage.detector is not None:
            return describe(_detector(stage.detector), inputs=1, strict=False)
        if stage.function is None:
            return None
        function = self._function(stage)
        env = stage.queue.env
        if isinstance(function, BlockSchema):
            return function
        if env is not None and env.is_made and not self._start:
            return None  # It would have to be made, only to be asked.
        try:
            signature = describe(
                function,
                None if env is None else _environment(env, self._folder),
                inputs=len(stage.inputs),
                before=int(getattr(stage, "load_model", None) is not None),
                strict=False,
            )
        except TypeError:
            return None  # Python cannot tell its signature.
        return signature

    def _image(self, stage: ImageStage) -> ci.CellImg:
        inputs = [self._input(item) for item in stage.inputs]
        common = {"halo": stage.halo} | self._common(stage)
        if stage.code is not None:
            assert stage.dtype is not None
            shape = inputs[0].shape
            cells: Any = stage.cell_shape
            if cells is None:
                cells = getattr(inputs[0].array, "cell_shape", None)
            if cells is None:
                cells = getattr(inputs[0].array, "chunks", None) or shape
            return ci.fill_cells(
                ci.BlockCode(stage.code),
                ci.CellGrid(shape, cells),
                *inputs,
                dtype=stage.dtype,
                **common,
            )
        return ci.map_cells(
            self._function(stage),
            *inputs,
            dtype=stage.dtype,
            cell_shape=stage.cell_shape,
            **common,
        )

    def _labels(self, stage: LabelsStage) -> ci.CellImg:
        inputs = [self._input(item) for item in stage.inputs]
        if stage.threshold is None:
            from cellimg_dask.ops.segment import segment

            more: dict[str, Any] = self._common(stage) | stage.for_a_network
            if stage.load_model is not None:
                more["load_model"] = self._named(stage.load_model, stage)
            plain = stage.load_model is None and not stage.for_a_network
            make: Any = ci.map_labels if plain else segment
            labels: ci.CellImg = make(
                self._function(stage),
                *inputs,
                halo=stage.halo,
                link=stage.link or ("iou", 0.5),
                consecutive=stage.consecutive,
                cell_shape=stage.cell_shape,
                **more,
            )
            return labels
        from scipy.ndimage import generate_binary_structure

        queue = self._queue(stage.queue)
        mask = ci.map_cells(
            above,
            *inputs,
            dtype=bool,
            cell_shape=stage.cell_shape,
            params={"threshold": stage.threshold},
            queue=queue,
        )
        return ci.label(
            mask,
            generate_binary_structure(mask.ndim, stage.connectivity or 1),
            consecutive=stage.consecutive,
            queue=queue,
        )

    def _points(self, stage: PointsStage) -> Any:
        inputs = [self._input(item) for item in stage.inputs]
        columns: dict[str, Any] = {
            "axes": stage.axes,
            "voxel_size": stage.voxel_size,
            "cell_shape": stage.cell_shape,
        }
        if stage.detector is not None:
            detect: Any = _detector(stage.detector)
            return detect(*inputs, queue=self._queue(stage.queue), **columns, **stage.params)
        from cellimg_dask.ops.points import map_points

        return map_points(
            self._function(stage),
            *inputs,
            halo=stage.halo,
            columns=stage.columns,
            merge=stage.merge or "own",
            **columns,
            **self._common(stage),
        )

    def _table(self, stage: TableStage) -> Any:
        from cellimg_dask.ops.tables import region_table

        extra = [
            self._named(given, stage)
            if isinstance(given, str)
            else (self._named(given[0], stage), given[1])
            for given in stage.extra_properties
        ]
        return region_table(
            self._input(stage.labels),
            None if stage.image is None else self._input(stage.image),
            stage.properties,
            spacing=stage.spacing,
            max_extent=stage.max_extent,
            extra_properties=extra,
            npartitions=stage.npartitions,
            cell_shape=stage.cell_shape,
            queue=self._queue(stage.queue),
        )

    def _common(self, stage: ImageStage | LabelsStage | PointsStage) -> dict[str, Any]:
        return {
            "boundary": stage.boundary,
            "params": self._checked_params(stage)[0],
            "queue": self._queue(stage.queue),
            "version": stage.version,
        }

    def _function(self, stage: ImageStage | LabelsStage | PointsStage) -> Callable[..., Any]:
        assert stage.function is not None
        if stage.is_described:
            return read_description(self._folder / stage.function)
        return self._named(stage.function, stage)

    def _named(self, name: str, stage: Stage) -> Callable[..., Any]:
        elsewhere = stage.queue.env is not None
        key = name, elsewhere
        if key not in self._functions:
            if elsewhere:
                # It need not be possible to import it here.
                place, attribute = split_name(name)
                whole = str(self._folder.absolute() / place) if is_file_name(place) else place
                self._functions[key] = NamedFunction(f"{whole}:{attribute}")
            else:
                # A file is run once, whoever names it.
                self._functions[key] = load_function(name, self._folder)
        return self._functions[key]

    def _input(self, item: InputSpec) -> ci.Input:
        array, version = self._array(item)
        return ci.Input(
            array,
            halo=item.halo,
            boundary=item.boundary,
            version=item.version or version,
            space=_space(array, item),
        )

    def _array(self, item: InputSpec) -> tuple[Any, str | None]:
        """Return what an input names, and a version where it cannot be compared."""
        if self._spec.is_stage(item):
            import zarr

            above = self._spec.stages[item.path]
            if above.target is None or self._lazy:
                return self.make(item.path), None
            if item.path in self._stored:
                return ci.open_image(place_of(above.target, self._folder)), None
            # It is only to be planned, and would be there.
            lazy = self.make(item.path)
            chunks = tuple(map(min, lazy.cell_shape, (max(n, 1) for n in lazy.shape)))
            there = zarr.create_array({}, shape=lazy.shape, dtype=lazy.dtype, chunks=chunks)
            return there, None
        path = self._folder / item.path
        arrays = self._stack.enter_context(open_file(path))
        found = [stored for stored in arrays if not item.name or stored.name == item.name]
        if not found:
            names = ", ".join(stored.name or "(the only one)" for stored in arrays)
            raise click.UsageError(f"{path} has no array {item.name!r}; it has {names}")
        # The files of zarr are compared one by one, and arrays by their values.
        version = None
        if path.is_file() and found[0].kind != "npy":
            facts = path.stat()
            version = f"{facts.st_size} {facts.st_mtime_ns}"
        return found[0].read(), version

    def _queue(self, wanted: QueueSpec) -> ci.BlockQueue | None:
        """Return the queue that is described, the same one for all stages."""
        if not self._start:
            return None
        for described, queue in self._queues:
            if described == wanted:
                return queue
        queue = self._stack.enter_context(_queue(wanted, self._folder))
        self._queues.append((wanted, queue))
        return queue


_MAKERS: dict[type[Stage], Callable[[Stages, Any], Any]] = {
    ImageStage: Stages._image,
    LabelsStage: Stages._labels,
    PointsStage: Stages._points,
    TableStage: Stages._table,
}


def _space(array: Any, item: InputSpec) -> ci.Space:
    """Return where the voxels of an input lie: what the spec says, else what the file does."""
    found = space_of(array)
    try:
        return found.replace(item.axes, item.units, item.scale, item.translation)
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"{item.path}: {error}") from error


def _detector(name: str) -> Callable[..., Any]:
    from cellimg_dask.ops.detect import blob_dog, blob_log

    detectors: dict[str, Callable[..., Any]] = {"blob_log": blob_log, "blob_dog": blob_dog}
    return detectors[name]


def _environment(spec: EnvSpec, folder: Path) -> Env:
    """Return the environment that a spec describes."""
    if spec.venv is not None:
        return Env.venv(folder / spec.venv, variables=spec.variables)
    arguments = getattr(spec, spec.kind).model_dump(exclude_defaults=True)
    if "file" in arguments:
        arguments["file"] = folder / arguments["file"]
    env: Env = getattr(Env, spec.kind)(**arguments, variables=spec.variables)
    return env


@contextmanager
def _queue(wanted: QueueSpec, folder: Path) -> Iterator[ci.BlockQueue | None]:
    with ExitStack() as stack:
        backend: Any = wanted.backend
        extra: dict[str, Any] = {"block_timeout_s": wanted.block_timeout_s}
        if wanted.slurm is not None:
            backend = stack.enter_context(slurm_cluster(wanted.slurm, start=True))
        if wanted.has_cluster:
            extra |= {
                "resources": wanted.resources,
                "timeout_s": wanted.timeout_s,
                "insecure": wanted.insecure,
            }
        elif wanted in (type(wanted)(), type(wanted)(backend="threads")):
            yield None
            return
        if wanted.env is not None:
            extra["env"] = _environment(wanted.env, folder)
        yield stack.enter_context(ci.BlockQueue(wanted.num_workers, wanted.init, backend, **extra))


@contextmanager
def slurm_cluster(spec: SlurmSpec, *, start: bool) -> Iterator[Any]:
    """Describe a cluster that SLURM runs, and start its jobs if that is wanted."""
    handler = signal.getsignal(signal.SIGINT)
    dask_jobqueue: Any = require("dask_jobqueue", "cluster")
    # Importing it makes Ctrl-C end the process, without a word on how to carry on.
    signal.signal(signal.SIGINT, handler)
    # Several runs on one machine do not fight for the port of the dashboard.
    options = {"scheduler_options": {"dashboard_address": ":0"}, **spec.options}
    with dask_jobqueue.SLURMCluster(
        cores=spec.cores,
        memory=spec.memory,
        processes=spec.processes,
        walltime=spec.walltime,
        queue=spec.queue,
        **options,
    ) as cluster:
        if start:
            cluster.scale(jobs=spec.jobs)
        yield cluster
