"""Whole cells on the workers of a dask cluster."""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from itertools import count
from math import ceil, prod
from time import monotonic, perf_counter, sleep
from typing import Any, NoReturn
from uuid import uuid4

import cloudpickle
import numpy as np
from dask.task_spec import Task, TaskRef
from distributed.scheduler import KilledWorker
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import (
    CellimgError,
    InitError,
    NoWorkersError,
    QueueClosedError,
    ReadError,
    WorkerDiedError,
    describe,
)
from cellimg_dask.geometry import as_int
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.running import INTERACTIVE, priority
from cellimg_dask.queues.connect import connect, is_local
from cellimg_dask.queues.held import Held, handle, is_dead, release
from cellimg_dask.queues.here import Arrived
from cellimg_dask.queues.tasks import CellCall, CellLayer, chunk_tasks, fit_cache, stages_of

__all__ = ["ClusterCells"]

# What is asked for together, and so is in this process' memory at a time, twice.
_WAVE_BYTES = 64 << 20
_WAVE_TASKS = 512
# Fewer cells always have tasks of their own.
_FEW_CELLS = 64
# A cell that takes longer is worth the half millisecond and more that a key costs the scheduler.
_WORTH_A_KEY_S = 2e-3
_BATCH_S = 50e-3
_FIRST_BATCH = 8
_LARGEST_BATCH = 1000
# So often a read that waits looks whether there still is somebody to wait for.
_LOOK_EVERY_S = 1.0
# So often a queue that is made looks whether workers have come.
_LOOK_FOR_WORKERS_EVERY_S = 0.1
# What a worker is taken to have that was given no limit.
_MEMORY_WITHOUT_LIMIT = 4 << 30
# distributed: the larger the sooner. Somebody's batch has 0 by default.
_DASK_PRIORITY_OF_INTERACTIVE = 10


class ClusterCells:
    """Computes cells as tasks with a key for each cell; results stay where they were computed.

    Parameters
    ----------
    backend : distributed.Client, Cluster or address
        The cluster.
    arrived : Arrived
        The queue, as it arrives on a worker.
    num_workers : int
        How many workers to wait for.
    max_bytes, resources, timeout_s, insecure
        As in `BlockQueue`.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self,
        backend: Any,
        arrived: Arrived,
        *,
        num_workers: int,
        max_bytes: int | None,
        resources: Mapping[str, float] | None,
        timeout_s: float,
        insecure: bool,
    ) -> None:
        if max_bytes is not None:
            max_bytes = as_int(max_bytes, "max_bytes", minimum=0)
        self._timeout_s = _checked_timeout(timeout_s)
        self.resources = _checked_resources(resources)
        self._closed = False
        self._images: weakref.WeakKeyDictionary[CellLoader, _Image] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._numbers = count()
        self.client, self._own_client = connect(backend, timeout_s=timeout_s, insecure=insecure)
        try:
            # Through the scheduler goes what the client may not be able to ask workers for.
            self._address = self.client.scheduler.address
            self._direct = is_local(self._address) or None
            self._wait_for_workers(num_workers)
            if max_bytes is None:
                limits = [
                    worker.get("memory_limit") or _MEMORY_WITHOUT_LIMIT
                    for worker in self._workers().values()
                ]
                max_bytes = sum(limits) // 4
            self.held = Held(max_bytes)
            self._prepare(arrived)
        except BaseException:
            if self._own_client:
                self.client.close()
            raise

    @property
    def num_workers(self) -> int:
        """How many workers there are at the moment."""
        return len(self._workers())

    def _workers(self) -> dict[str, Any]:
        """Return the workers that have what cells need."""
        if self.client.status != "running":
            return {}
        info = self.client.scheduler_info(n_workers=-1).get("workers", {})
        return {
            address: worker
            for address, worker in info.items()
            if all(worker["resources"].get(name, 0) >= n for name, n in self.resources.items())
        }

    def _num_threads(self) -> int:
        return max(1, sum(int(worker["nthreads"]) for worker in self._workers().values()))

    def _wait_for_workers(self, num_workers: int) -> None:
        deadline = monotonic() + self._timeout_s
        while (found := len(self._workers())) < num_workers:
            if monotonic() > deadline:
                kind = start = ""
                if self.resources:
                    kind = f" with the resources {self.resources}"
                    start = ", for instance dask worker --resources GPU=1"
                raise NoWorkersError(
                    f"the cluster has {found} of {num_workers} workers{kind} after "
                    f"{self._timeout_s:g} s; start more{start}, or give a longer timeout_s"
                )
            sleep(_LOOK_FOR_WORKERS_EVERY_S)

    def _prepare(self, arrived: Arrived) -> None:
        """Run ``init`` on all workers now; on those that come later their first task does it."""
        try:
            packed = cloudpickle.dumps(arrived)
        except Exception as error:
            raise InitError(f"init cannot be sent to the workers: {describe(error)}") from error
        # As tasks and not by client.run, which would run it in the worker's event loop.
        futures = {
            address: self.client.submit(
                _prepare_worker, packed, workers=[address], key=f"init-{uuid4()}", pure=False
            )
            for address in self._workers()
        }

        def died(address: str) -> InitError:
            return InitError(f"the worker at {address} died while init of the queue ran there")

        try:
            gathering = self._gather(futures)
            while not wait([gathering], _LOOK_EVERY_S).done:
                there = self._workers()
                for address, future in futures.items():
                    if address not in there and future.status == "pending":
                        # The task is for this worker only, and would wait for ever.
                        raise died(address)
            for address, future in futures.items():
                if future.status == "error":
                    failure = future.exception()
                    raise died(address) if isinstance(failure, KilledWorker) else failure
        finally:
            release(futures.values())

    # ------------------------------------------------------------------ cells

    def fetch(
        self, loader: CellLoader, indices: Sequence[int]
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        """Compute cells where they are not held; yield (index, cell, seconds) as they come.

        Raises
        ------
        BlockError, ReadError, InitError
            Of a cell.
        NoWorkersError
            If there was no worker for too long.
        QueueClosedError
            If the queue is closed.
        """
        image = self._image(loader)
        todo = deque(indices)
        threads = self._num_threads() if len(todo) > _FEW_CELLS else 1
        requests: deque[_Request] = deque()
        try:
            # One request is computed while the results of the one before are fetched.
            while todo or requests:
                while todo and len(requests) < 2:
                    requests.append(self._request(image, loader, todo, threads))
                yield from self._collect(image, loader, requests[0], threads)
                suspects = requests[0].suspects
                if suspects:
                    # The scheduler blames every task that was assigned to a worker which died.
                    # Alone it shows whose fault it is.
                    todo.extend(index for request in requests for index in request.cells_left())
                    _release_all(requests)
                    self._let_errors_go()
                    for index in suspects:
                        yield from self._alone(loader, index)
                else:
                    requests.popleft().release()
        except Exception:
            _release_all(requests)
            self._let_errors_go()
            raise
        finally:
            _release_all(requests)

    def forget(self, loader: CellLoader, indices: Collection[int]) -> None:
        """Release the cells among ``indices``, because they are outdated."""
        image = self._images.get(loader)
        if image is not None:
            self.held.forget(image.number, indices)

    def close(self) -> None:
        """Release what is held; reads under way end with a `QueueClosedError`."""
        with self._lock:
            self._closed = True
            for image in list(self._images.values()):
                release(image.definition)
                image.definition = []
        self.held.close()
        if self._own_client:
            self.client.close()

    def _image(self, loader: CellLoader) -> _Image:
        with self._lock:
            image = self._images.get(loader)
            if image is None:
                image = self._images[loader] = _Image(next(self._numbers), loader.edition)
                weakref.finalize(loader, _forget_image, self.held, image).atexit = False
        mine = loader.queue is not None and loader.queue.cells is self
        if not mine and image.edition != loader.edition:
            # An image upstream that knows nothing of this queue, and so does not tell what to
            # forget.
            image.edition = loader.edition
            self.held.forget(image.number)
        return image

    def _request(
        self, image: _Image, loader: CellLoader, todo: deque[int], threads: int
    ) -> _Request:
        """Submit the next cells of ``todo``."""
        if self._closed:
            raise QueueClosedError("the queue is closed")
        cell_bytes = max(1, loader.grid.cell(todo[0]).roi.size * loader.dtype.itemsize)
        most = max(1, min(_WAVE_BYTES // cell_bytes, _WAVE_TASKS))
        if len(todo) > _FEW_CELLS and image.cheap and not any(map(_fed, stages_of(loader))):
            if image.seconds is None:
                size = _FIRST_BATCH
            else:
                size = ceil(_BATCH_S / max(image.seconds, 1e-6))
            size = min(size, _LARGEST_BATCH, max(1, _WAVE_BYTES // cell_bytes // threads))
            # All threads have something to do, also at the end.
            size = max(1, min(size, len(todo) // (2 * threads)))
            batches: list[list[int]] = []
            while todo and len(batches) < 2 * threads:
                batches.append([todo.popleft() for _ in range(min(size, len(todo)))])
            return self._submit_batches(image, loader, batches)
        if image.seconds is None:
            # Enough to see whether they are cheap.
            most = min(most, max(4 * threads, _FEW_CELLS))
        cells = [todo.popleft() for _ in range(min(most, len(todo)))]
        return self._submit_cells(image, loader, cells)

    def _submit_cells(self, image: _Image, loader: CellLoader, cells: list[int]) -> _Request:
        # Noted before anything is named or sent: what is outdated from now on is not kept.
        images = {item: self._image(item) for item in loader.ancestry()}
        generations = {item: self.held.generation(images[item].number) for item in images}
        request = _Request(generations[loader])
        request.cells = self._take(image, cells)
        missing = [index for index in cells if index not in request.cells]
        request.num_computed = len(missing)
        if not missing:
            return request
        stages = stages_of(loader)
        loaders = {name: item for name, item, _ in stages}

        def held(key: Any) -> Any:
            above = loaders[key[0]]
            found = list(self._take(images[above], [above.grid.index(key[1:])]).values())
            # Not released before the scheduler knows who needs it.
            request.uses += found
            return found[0].key if found else None

        name = stages[-1][0]
        keys = {(name, *loader.grid.position(index)): index for index in missing}
        tasks = CellLayer(stages, elsewhere=True).tasks(keys, held)
        self._use_definitions(request, {key: images[item] for key, item in loaders.items()}, tasks)
        # Cells upstream are held as well: the neighbours of these cells need them again. From the
        # first image down.
        others = [
            key
            for key in reversed(tasks)
            if isinstance(key, tuple) and key[0] in loaders and key not in keys
        ]
        made = self._get(tasks | chunk_tasks(loader, tasks), [*keys, *others])
        for key, future in zip([*keys, *others], made, strict=True):
            if key in keys:
                request.cells[keys[key]] = future
            else:
                above = loaders[key[0]]
                index = above.grid.index(key[1:])
                number, generation = images[above].number, generations[above]
                request.others.append(_Other(above, index, number, generation, future))
        return request

    def _take(self, image: _Image, indices: Collection[int]) -> dict[int, Any]:
        """Return handles of the cells that are held."""
        found, dead = self.held.take(image.number, indices)
        if dead:
            release(dead)
            self._let_errors_go()
        return found

    def _submit_batches(
        self, image: _Image, loader: CellLoader, batches: list[list[int]]
    ) -> _Request:
        request = _Request()
        stages = stages_of(loader)
        (name, _, _) = stages[-1]
        layer = CellLayer(stages, elsewhere=True)
        definition = f"{name}-definition"
        tasks: dict[Any, Any] = {definition: layer[definition]}
        self._use_definitions(request, {name: image}, tasks)
        keys = []
        for batch in batches:
            key = f"{name}-batch-{uuid4()}"
            tasks[key] = Task(key, _run_batch, TaskRef(definition), batch)
            keys.append(key)
        request.batches = deque(zip(batches, self._get(tasks, keys), strict=True))
        return request

    def _use_definitions(
        self, request: _Request, images: Mapping[str, _Image], tasks: dict[Any, Any]
    ) -> None:
        """Send the definitions of images once, and hold them as long as the image lives."""
        for name, image in images.items():
            key = f"{name}-definition"
            task = tasks.pop(key, None)
            if task is None:
                continue
            with self._lock:
                if self._closed:
                    raise QueueClosedError("the queue is closed")
                if any(map(is_dead, image.definition)):
                    release(image.definition)
                    image.definition = []
                    self._let_errors_go()
                if [future.key for future in image.definition] != [key]:
                    before = image.definition
                    # Whatever asks first: what is asked for later may be urgent.
                    definition = {key: _packed(key, task.value)}
                    image.definition = self._get(definition, [key], INTERACTIVE)
                    # That of the time before the image changed.
                    release(before)
                request.uses += map(handle, image.definition)

    def _get(self, tasks: dict[Any, Any], keys: list[Any], urgency: int | None = None) -> list[Any]:
        try:
            futures: list[Any] = self.client.get(
                tasks,
                keys,
                sync=False,
                resources=self.resources or None,
                priority=_DASK_PRIORITY_OF_INTERACTIVE
                + INTERACTIVE
                - (priority.get() if urgency is None else urgency),
                # Among equals what was asked for first goes first.
                fifo_timeout=0,
            )
        except Exception as error:
            self._fail(error)
        return futures

    # ------------------------------------------------------------------ results

    def _collect(
        self, image: _Image, loader: CellLoader, request: _Request, threads: int
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        """Yield the cells of a request, until one of them is suspected to kill workers."""
        if request.batches:
            yield from self._collect_batches(image, loader, request)
            return
        began = perf_counter()
        values = self._finished(request.cells)
        wall = perf_counter() - began
        if image.seconds is None and request.num_computed >= _FEW_CELLS:
            # Also the time of the scheduler and of the way here; batches will tell more.
            image.cheap = wall * threads < 5 * _WORTH_A_KEY_S * request.num_computed
        self._hold(image, loader, request, values)
        for index, future in request.cells.items():
            if is_dead(future):
                request.suspects[index] = self._killed(loader, index, request, future)
        each = wall / max(1, len(values))
        for index in list(values):
            yield index, values.pop(index), each

    def _hold(
        self, image: _Image, loader: CellLoader, request: _Request, cells: Iterable[int]
    ) -> None:
        """Hold what is there of a request: some of its cells, and cells upstream."""
        others, request.others = request.others, []
        for other in others:
            if other.future.status == "finished":
                nbytes = _num_bytes(other.loader, other.index)
                self.held.keep(other.number, other.index, other.future, nbytes, other.generation)
            else:
                other.future.release()
        for index in cells:
            future = request.cells.pop(index)
            nbytes = _num_bytes(loader, index)
            self.held.keep(image.number, index, future, nbytes, request.generation)

    def _collect_batches(
        self, image: _Image, loader: CellLoader, request: _Request
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        while request.batches:
            batch, future = request.batches[0]
            found = self._finished({0: future})
            if not found:
                killed = self._killed(loader, batch[0], request, future)
                request.suspects = dict.fromkeys(batch, killed)
            request.batches.popleft()
            future.release()
            if not found:
                return
            flat, costs, errors = found.pop(0)
            end = 0
            for number, (index, cost) in enumerate(zip(batch, costs, strict=True)):
                if number in errors:
                    raise errors[number]
                shape = loader.grid.cell(index).shape
                begin, end = end, end + prod(shape)
                yield index, flat[begin:end].reshape(shape), cost
            image.seconds = sum(costs) / len(batch)
            image.cheap = image.seconds < _WORTH_A_KEY_S

    def _alone(self, loader: CellLoader, index: int) -> Iterator[tuple[int, NDArray[Any], float]]:
        """Yield a cell, computed while nothing else is under way.

        Raises
        ------
        WorkerDiedError
            Of the cell, or of one upstream, if its worker dies again.
        """
        image = self._image(loader)
        request = self._submit_cells(image, loader, [index])
        above = [(other.loader, other.index) for other in request.others]
        try:
            yield from self._collect(image, loader, request, 1)
        finally:
            request.release()
        if not request.suspects:
            return
        self._let_errors_go()
        for upstream in above:
            for _ in self._alone(*upstream):
                pass
        killed = request.suspects[index]
        position = loader.grid.position(index)
        raise WorkerDiedError(
            loader.function.name,
            position,
            loader.grid.roi(position),
            f"every worker process that computed this cell died, the last one at "
            f"{killed.last_worker.address}; other cells are not affected",
        ) from killed

    def _killed(
        self, loader: CellLoader, index: int, request: _Request, future: Any
    ) -> KilledWorker:
        """Return the scheduler's word that a worker died; raise if a cell failed otherwise."""
        for needed in request.uses:
            if needed.status == "error" and not isinstance(needed.exception(), KilledWorker):
                # Nothing can be computed where its definition cannot be read.
                raise needed.exception()
        if future.status != "error":
            self._fail(None)
        error = future.exception()
        if isinstance(error, (CellimgError, KilledWorker)):
            if isinstance(error, KilledWorker):
                return error
            raise error
        position = loader.grid.position(index)
        raise ReadError(
            loader.function.name,
            position,
            loader.grid.roi(position),
            f"a task that the cell depends on failed: {describe(error)}",
        ) from error

    def _let_errors_go(self) -> None:
        """Wait until released keys are let go, so that asking again computes again."""
        # Handles are released in the client's event loop, in order with what comes after.
        if self.client.status == "running":
            self.client.sync(asyncio.sleep, 0)

    def _finished(self, futures: Mapping[int, Any]) -> dict[int, Any]:
        """Wait until all have ended, and return the results of those that did not fail."""
        gathering = self._gather(futures)
        lonely_since: float | None = None
        while not wait([gathering], _LOOK_EVERY_S).done:
            lonely_since = self._look(lonely_since)
        error = gathering.exception()
        if error is not None:
            self._fail(error)
        return {index: value for index, value in gathering.result().items() if value is not None}

    def _gather(self, futures: Mapping[Any, Any]) -> Future[dict[Any, Any]]:
        """Begin to fetch results; those that fail become None."""
        if self.client.status != "running":
            self._fail(None)
        # Not from this thread, where it would wait for ever if the last worker is lost.
        return asyncio.run_coroutine_threadsafe(
            self.client.gather(
                dict(futures), errors="skip", direct=self._direct, asynchronous=True
            ),
            self.client.loop.asyncio_loop,
        )

    def _look(self, lonely_since: float | None) -> float | None:
        """Return since when there has been no worker; raise if there is nothing to wait for."""
        if self._closed or self.client.status != "running":
            self._fail(None)
        if self._workers():
            return None
        now = monotonic()
        if lonely_since is not None and now - lonely_since > self._timeout_s:
            raise NoWorkersError(
                f"there has been no worker for {self._timeout_s:g} s; start some and read "
                f"again: what was computed and is still held is not computed again"
            )
        return now if lonely_since is None else lonely_since

    def _fail(self, error: BaseException | None) -> NoReturn:
        """Raise what it means that the cluster gives no answer."""
        if self._closed:
            raise QueueClosedError("the queue was closed while cells were computed") from error
        if (
            error is None
            or self.client.status != "running"
            or isinstance(error, (OSError, CancelledError))
        ):
            raise NoWorkersError(
                f"the connection to the scheduler at {self._address} is lost, or somebody else "
                f"cancelled these cells" + (f": {describe(error)}" if error is not None else "")
            ) from error
        raise error


class _Image:
    """What the client knows of an image on the cluster."""

    def __init__(self, number: int, edition: int) -> None:
        self.number = number
        self.edition = edition
        """That of which cells are held."""
        self.definition: list[Any] = []
        """Future of the image's definition, if it was sent."""
        self.seconds: float | None = None
        """What a cell takes, as measured in batches."""
        self.cheap = False
        """Whether cells are worth no keys."""


@dataclass(frozen=True)
class _Other:
    """A cell upstream that is computed for a request."""

    loader: CellLoader
    index: int
    number: int
    """Of the image."""
    generation: int
    future: Any


class _Request:
    """Cells that were submitted together, and the handles that keep them wanted."""

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        """Of the image's held cells, when this was submitted."""
        self.cells: dict[int, Any] = {}
        """Futures of cells with a task of their own."""
        self.batches: deque[tuple[list[int], Any]] = deque()
        """Cells that share a task, and its future."""
        self.others: list[_Other] = []
        self.uses: list[Any] = []
        """Handles of what the tasks need and is there already, or was sent before."""
        self.suspects: dict[int, KilledWorker] = {}
        """Cells that the scheduler blames for the death of workers."""
        self.num_computed = 0
        """How many of the cells were not held."""

    def cells_left(self) -> list[int]:
        """Return the cells of which nothing is known yet."""
        single = [index for index in self.cells if index not in self.suspects]
        return single + [index for batch, _ in self.batches for index in batch]

    def release(self) -> None:
        """Let go of what was not handed on; what nobody wants is cancelled."""
        release(self.cells.values())
        release(future for _, future in self.batches)
        release(other.future for other in self.others)
        release(self.uses)
        self.cells, self.batches, self.others, self.uses = {}, deque(), [], []


def _checked_timeout(timeout_s: object) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise TypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s!r}")
    return float(timeout_s)


def _checked_resources(resources: object) -> dict[str, float]:
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise TypeError(
            f'resources must map names to numbers, for instance {{"GPU": 1}}; got {resources!r}'
        )
    for name, number in resources.items():
        if not isinstance(name, str) or isinstance(number, bool):
            raise TypeError(f"resources must map names to numbers, got {name!r}: {number!r}")
        if not isinstance(number, (int, float)):
            raise TypeError(f"resources[{name!r}] must be a number, got {number!r}")
        if not number > 0:
            raise ValueError(f"resources[{name!r}] must be above 0, got {number!r}")
    return dict(resources)


def _fed(stage: tuple[str, CellLoader, dict[int, Any]]) -> bool:
    """Whether cells of an image depend on other tasks."""
    return bool(stage[2])


def _num_bytes(loader: CellLoader, index: int) -> int:
    return loader.grid.cell(index).roi.size * loader.dtype.itemsize


def _packed(key: str, call: CellCall) -> Task:
    """Return the task that makes a definition, of which the scheduler understands nothing."""
    name = call.loader.function.name
    try:
        packed = cloudpickle.dumps(call)
    except Exception as error:
        raise CellimgError(
            f"{name} cannot be sent to the workers: {describe(error)}; define it at the top of a "
            f"module, or use BlockCode"
        ) from error
    return Task(key, _unpack, name, packed)


def _release_all(requests: deque[_Request]) -> None:
    while requests:
        requests.popleft().release()


def _forget_image(held: Held, image: _Image) -> None:
    held.abandon(image.number)
    release(image.definition)


# What runs on the workers.


def _prepare_worker(packed: bytes) -> None:
    arrived: Arrived = pickle.loads(packed)
    arrived.worker(again=True)


def _unpack(name: str, packed: bytes) -> CellCall:
    try:
        call: CellCall = pickle.loads(packed)
    except Exception as error:
        raise CellimgError(f"{name} cannot be read by the workers: {describe(error)}") from error
    return call


def _run_batch(
    call: CellCall, indices: list[int]
) -> tuple[NDArray[Any], list[float], dict[int, Exception]]:
    """Compute cells one after the other.

    Returns
    -------
    flat : ndarray
        The voxels of all cells in one axis: one message and not one for each.
    costs : list of float
        Seconds that each took.
    errors : dict
        What was raised, by number in ``indices``; such a cell has no voxels in ``flat``.
    """
    fit_cache()
    voxels: list[NDArray[Any]] = []
    costs: list[float] = []
    errors: dict[int, Exception] = {}
    for number, index in enumerate(indices):
        began = perf_counter()
        try:
            voxels.append(call.past_cache(index).reshape(-1))
        except Exception as error:
            errors[number] = error
        costs.append(perf_counter() - began)
    flat = np.concatenate(voxels) if voxels else np.empty(0, call.loader.dtype)
    return flat, costs, errors
