"""`BlockQueue`: workers that run block functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cellimg_dask.blocks.functions import BlockFunction
from cellimg_dask.blocks.worker import Init, check_init
from cellimg_dask.geometry import as_int
from cellimg_dask.loading.crew import usable_cores
from cellimg_dask.loading.running import BlockRunner, CellRunner
from cellimg_dask.queues.here import Arrived
from cellimg_dask.queues.rules import BlockUpdate, Rules
from cellimg_dask.queues.threads import ThreadBlocks

if TYPE_CHECKING:
    from types import TracebackType

    from cellimg_dask.queues.cluster import ClusterCells
    from cellimg_dask.queues.env_blocks import EnvBlocks
    from cellimg_dask.queues.env_here import ArrivedEnv
    from cellimg_dask.queues.environments import Env
    from cellimg_dask.queues.processes import ProcessBlocks

__all__ = ["BlockQueue"]


class BlockQueue:
    """Workers that run the block functions of any number of images.

    Give it to an image: ``map_cells(f, array, queue=queue)``. A context manager; on leaving it
    the queue is closed.

    Parameters
    ----------
    num_workers : int, optional
        Number of threads or processes; default: the usable cores. On a cluster, which has its
        own number of workers: how many to wait for, at least 1.
    init : str or callable, optional
        Prepares each worker before its first block, and again after a restart: code, or a
        callable without arguments. The names that code binds, that a callable declares
        ``global``, or that are in the mapping which it returns are seen by `BlockCode` and by
        plain functions that use them, and are in ``get_worker().namespace``.
    backend : {"threads", "processes"}, distributed.Client, Cluster or address, optional
        Where blocks run: on threads (the default); in processes of their own, which blocks reach
        by shared memory, and in which BLAS and OpenMP take a share of the cores, unless
        ``OMP_NUM_THREADS`` or the like is set; or on the workers of a dask cluster: a
        ``distributed.Client``, a cluster such as ``LocalCluster``, ``SSHCluster`` or
        dask-jobqueue's ``SLURMCluster``, or the address of a scheduler.
    env : Env, optional
        Another Python, in which the user's functions and ``init`` run, in processes; see `Env`.
        What else a block needs is done here, or on the workers of the cluster, each of which has
        as many such processes as threads.
    block_timeout_s : float, optional
        With processes: how long a block may take. After that its process is killed and the block
        is a `BlockTimeoutError`.
    crash_retries : int
        With processes: how often a block is tried again whose process died of it. A batch run
        counts such blocks among its own ``retries`` instead.
    on_update : callable, optional
        On this machine: is given a `BlockUpdate` for each ``task.update(...)`` of a function that
        has a parameter named ``task``. It is called on the thread that computes the block or
        waits for it; if it raises, that is logged.
    max_bytes : int, optional
        On a cluster: bound on the results that stay in the memory of its workers for later
        reads. Default: a quarter of that memory.
    resources : mapping of str to float, optional
        On a cluster: what each cell needs of a worker's abstract resources, ``{"GPU": 1}``.
    timeout_s : float, optional
        On a cluster: how long a read goes on without any worker before it is a
        `NoWorkersError`, and how long to wait for the first workers.
    insecure : bool
        Whether a scheduler without TLS on another host is accepted. Whoever can reach such a
        scheduler can run any code there, and here.

    Raises
    ------
    InitError
        If ``init`` raises on a worker; nothing is left running then.
    NoWorkersError
        If a cluster has fewer workers than asked for after ``timeout_s``.
    PermissionError
        If a scheduler on another host has no TLS.
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    Thread-safe. A block function that itself reads images of the same queue is served by the
    worker that it runs on, so nested reads end. A crash of a worker is a `WorkerDiedError`
    for the cell that it was computing, with processes after ``crash_retries`` more tries. With
    processes, arrays given to a block are memory that is used again afterwards: copy what is to
    be kept.

    Examples
    --------
    >>> import numpy as np
    >>> import cellimg_dask as ci
    >>> code = ci.BlockCode("block.data[...] = scale * block.inputs[0]")
    >>> with ci.BlockQueue(2, init="scale = 3") as queue:
    ...     img = ci.fill_cells(
    ...         code, ci.CellGrid((4,), (2,)), np.arange(4), dtype=int, queue=queue
    ...     )
    ...     img[...]
    array([0, 3, 6, 9])
    """

    def __init__(
        self,
        num_workers: int | None = None,
        init: Init = None,
        backend: Any = None,
        *,
        env: Env | None = None,
        block_timeout_s: float | None = None,
        crash_retries: int = 2,
        on_update: Callable[[BlockUpdate], None] | None = None,
        max_bytes: int | None = None,
        resources: Mapping[str, float] | None = None,
        timeout_s: float = 60.0,
        insecure: bool = False,
    ) -> None:
        self._closed = True  # Until there is something to close.
        check_init(init)
        self.init = init
        """What prepares each worker."""
        self._token: str | None = None
        self._local: ThreadBlocks | ProcessBlocks | EnvBlocks | None = None
        self._cluster: ClusterCells | None = None
        if num_workers is not None:
            num_workers = as_int(num_workers, "num_workers", minimum=1)
        self.env = env
        """The environment in which the user's functions run; None: that of the package."""
        self._rules = Rules(block_timeout_s, crash_retries, on_update)
        self._shipped_init: dict[str, Any] | None = None
        if env is not None:
            _check_env(env)
            from cellimg_dask.queues.shipping import ship_init

            self._shipped_init = ship_init(init)
        if backend is None:
            backend = "threads" if env is None else "processes"
        if isinstance(backend, str) and "://" not in backend:
            if backend not in ("threads", "processes"):
                raise ValueError(
                    f'backend {backend!r}: allowed are "threads", "processes", a '
                    f'distributed.Client, a cluster, or an address such as "tcp://127.0.0.1:8786"'
                )
            for name, value in (("max_bytes", max_bytes), ("resources", resources)):
                if value is not None:
                    raise TypeError(
                        f'{name} is for clusters; backend="{backend}" has no use for it'
                    )
            self.backend = backend
            count = usable_cores() if num_workers is None else num_workers
            self._local = self._open(backend, count)
        else:
            from cellimg_dask.queues.cluster import ClusterCells

            if env is None and block_timeout_s is not None:
                raise TypeError("block_timeout_s is for processes; a cluster's blocks have none")
            if on_update is not None:
                raise TypeError("on_update is for threads and processes of this machine")
            self.backend = "distributed"
            self._cluster = ClusterCells(
                backend,
                self._arrived(),
                num_workers=num_workers or 1,
                max_bytes=max_bytes,
                resources=resources,
                timeout_s=timeout_s,
                insecure=insecure,
            )
            count = self._cluster.num_workers
        self._num_workers = count
        self._closed = False

    def _open(self, backend: str, count: int) -> ThreadBlocks | ProcessBlocks | EnvBlocks:
        """Return workers on this machine."""
        if backend == "threads":
            if self.env is not None:
                raise TypeError('another Python cannot run on threads: backend="processes"')
            if self._rules.block_timeout_s is not None:
                raise TypeError(
                    'a thread cannot be killed: block_timeout_s needs backend="processes"'
                )
            return ThreadBlocks(count, self.init, self._rules)
        if self.env is None:
            from cellimg_dask.queues.processes import ProcessBlocks

            return ProcessBlocks(count, self.init, self._rules)
        from cellimg_dask.queues.env_blocks import EnvBlocks

        return EnvBlocks(count, self._shipped_init, self.env, self._rules)

    @property
    def num_workers(self) -> int:
        """Number of workers; of a cluster at the moment."""
        return self._num_workers if self._cluster is None else self._cluster.num_workers

    @property
    def closed(self) -> bool:
        """Whether the queue was closed."""
        return self._closed

    @property
    def blocks(self) -> BlockRunner | None:
        """What runs block functions for the loader, on threads or processes."""
        return self._local

    @property
    def cells(self) -> CellRunner | None:
        """What computes whole cells for the loader, on a cluster."""
        return self._cluster

    @property
    def token(self) -> str:
        """What results depend on: the same for the same ``init`` and content of ``env``."""
        if self._token is None:
            from dask.base import tokenize

            # Functions of another environment may do something else.
            where = () if self.env is None else (self.env.token,)
            self._token = tokenize("BlockQueue", self.init, *where)
        return self._token

    def ready(self, function: BlockFunction) -> BlockFunction:
        """Return a block function as this queue can run it.

        Raises
        ------
        TypeError
            If it cannot be sent to the environment of this queue.
        """
        if self.env is None:
            return function
        from cellimg_dask.queues.env_blocks import shipped

        return shipped(function)

    def _arrived(self) -> Arrived | ArrivedEnv:
        """Return what becomes of the queue in another process."""
        if self.env is None:
            return Arrived(self.token, self.init)
        from cellimg_dask.queues.env_here import ArrivedEnv

        # What is said there has no way back to a listener here.
        rules = replace(self._rules, on_update=None)
        return ArrivedEnv(self.token, self._shipped_init, self.env, rules)

    def close(self, wait_s: float | None = None) -> None:
        """End the workers; a block that still waits for one gets a `QueueClosedError`.

        Parameters
        ----------
        wait_s : float, optional
            How long blocks that run may go on; default: until they end. After that, processes are
            killed and their blocks get a `QueueClosedError`; a thread cannot be, so there it is a
            `TimeoutError`, and the threads end with their blocks.

        Notes
        -----
        A cluster goes on; what it holds for this queue is released. A client that the queue made
        itself, for an address or a cluster, is closed.
        """
        self._closed = True
        if self._cluster is not None:
            self._cluster.close()
        if self._local is not None and not self._local.close(wait_s):
            raise TimeoutError(f"a block still runs after {wait_s} s; its thread ends with it")

    def __enter__(self) -> BlockQueue:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Closed already perhaps because a block never ends, which would be waited for here.
        if not self._closed:
            self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            try:
                # An error where warnings are errors.
                warnings.warn(
                    f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2
                )
            finally:
                self.close(0 if self.backend == "processes" else None)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        arrived = self._arrived()
        if isinstance(arrived, Arrived):
            return arrived.__reduce__()
        return type(arrived), (arrived.token, self._shipped_init, self.env, arrived.rules)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        env = "" if self.env is None else f", env={self.env!r}"
        return f"BlockQueue({self.num_workers}, backend={self.backend!r}{env}{state})"


def _check_env(env: object) -> None:
    from cellimg_dask.queues.environments import Env

    if not isinstance(env, Env):
        raise TypeError(
            f"env must be an Env, got {type(env).__name__}; for instance Env.venv(path)"
        )
