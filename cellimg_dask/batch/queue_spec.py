"""Where blocks run, as a spec describes it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["CondaSpec", "EnvSpec", "Positive", "QueueSpec", "SlurmSpec", "SpecModel", "UvSpec"]

Positive = Annotated[int, Field(ge=1)]
"""An integer from 1."""


class SpecModel(BaseModel):
    """A part of a spec."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SlurmSpec(SpecModel):
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


class UvSpec(SpecModel):
    """An environment that uv makes."""

    python: str | None = None
    """Version of Python, in quotes, such as ``"3.12"``."""
    pip: list[str] = []
    """Packages, such as ``numpy<2``."""
    download: bool = False
    """Whether uv may be downloaded."""

    @field_validator("python", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        if isinstance(value, (int, float)):
            raise ValueError(
                f'write the version in quotes, such as "3.10", as a number 3.1; got {value}'
            )
        return value


class CondaSpec(SpecModel):
    """An environment with packages of conda."""

    file: str | None = None
    """An ``environment.yml``, or for pixi its own, relative to the spec's folder, in place of all
    else."""
    packages: list[str] = []
    """Of conda, such as ``python=3.10``."""
    pip: list[str] = []
    """Packages, such as ``numpy<2``."""
    channels: list[str] | None = None
    """Where packages of conda are from; default: conda-forge."""
    download: bool = False
    """Whether the tool that makes it may be downloaded."""


class EnvSpec(SpecModel):
    """Another Python, by one of these."""

    venv: str | None = None
    """Folder of a virtual environment, relative to the spec's."""
    uv: UvSpec | None = None
    """One that uv makes, with python and pip."""
    conda: CondaSpec | None = None
    """One that micromamba makes, with a file, or with packages and pip."""
    pixi: CondaSpec | None = None
    """One that pixi makes, with a file, or with packages and pip."""
    variables: dict[str, str] = {}
    """Environment variables for its processes."""

    @property
    def kind(self) -> str:
        """Which one it is."""
        return next(name for name in _ENVIRONMENTS if getattr(self, name) is not None)

    @property
    def is_made(self) -> bool:
        """Whether it may have to be made first."""
        return self.venv is None

    def __str__(self) -> str:
        given = getattr(self, self.kind)
        if isinstance(given, str):
            return f"{self.kind} {given}"
        facts = given.model_dump(exclude_defaults=True)
        texts = [f"{k} {', '.join(v) if isinstance(v, list) else v}" for k, v in facts.items()]
        return f"{self.kind} with {'; '.join(texts)}" if texts else self.kind

    @model_validator(mode="after")
    def _one_kind(self) -> EnvSpec:
        if sum(getattr(self, name) is not None for name in _ENVIRONMENTS) != 1:
            raise ValueError(f"give one of {', '.join(_ENVIRONMENTS)}")
        return self


_ENVIRONMENTS = ("venv", "uv", "conda", "pixi")


class QueueSpec(SpecModel):
    """Where blocks run."""

    backend: str = "threads"
    """``threads``, ``processes``, or the address of a dask scheduler."""
    num_workers: Positive | None = None
    """Threads or processes; on a cluster how many to wait for."""
    init: str | None = None
    """Code that prepares each worker."""
    env: EnvSpec | None = None
    """Another Python for functions: venv, uv, conda or pixi."""
    resources: dict[str, float] | None = None
    """On a cluster: what a cell needs."""
    timeout_s: float = Field(default=60.0, gt=0)
    """On a cluster: how long to wait for workers."""
    insecure: bool = False
    """Whether a scheduler without TLS on another host is accepted."""
    slurm: SlurmSpec | None = None
    """A cluster to start, instead of a backend."""

    @field_validator("env", mode="before")
    @classmethod
    def _folder_alone(cls, value: Any) -> Any:
        return {"venv": value} if isinstance(value, str) else value
