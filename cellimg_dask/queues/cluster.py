"""Whole cells on the workers of a dask cluster."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from math import ceil, prod
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4

import numpy as np
from dask.task_spec import Task, TaskRef
from distributed import wait
from distributed.scheduler import KilledWorker
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import (
    NoWorkersError,
    QueueClosedError,
    WorkerDiedError,
)
from cellimg_dask.geometry import as_int
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.running import INTERACTIVE, priority
from cellimg_dask.queues.connect import connect, is_local
from cellimg_dask.queues.held import Held
from cellimg_dask.queues.here import Arrived
from cellimg_dask.queues.tasks import CellCall, CellLayer, dask_arrays, stages_of

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
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s!r}")
        self._timeout_s = timeout_s
        self._resources = dict(resources or {})
        self._closed = False
        self._images: weakref.WeakKeyDictionary[CellLoader, _Image] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._numbers = count()
        self.client, self._own_client = connect(backend, timeout_s=timeout_s, insecure=insecure)
        try:
            # Through the scheduler goes what the client may not be able to ask workers for.
            self._direct = is_local(self.client.scheduler.address) or None
            self._wait_for_workers(num_workers)
            if max_bytes is None:
                limits = [info.get("memory_limit") or 0 for info in self._workers().values()]
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
        info = self.client.scheduler_info(n_workers=-1)["workers"]
        return {
            address: worker
            for address, worker in info.items()
            if all(worker["resources"].get(name, 0) >= n for name, n in self._resources.items())
        }

    def _num_threads(self) -> int:
        return max(1, sum(int(worker["nthreads"]) for worker in self._workers().values()))

    def _wait_for_workers(self, num_workers: int) -> None:
        try:
            self.client.wait_for_workers(num_workers, timeout=self._timeout_s)
        except TimeoutError as error:
            raise NoWorkersError(
                f"the cluster has {len(self._workers())} of {num_workers} workers after "
                f"{self._timeout_s:g} s; start more, or give a longer timeout_s"
            ) from error
        if not self._workers():
            raise NoWorkersError(
                f"no worker has the resources {self._resources}; start workers with them, for "
                f"instance dask worker --resources GPU=1"
            )

    def _prepare(self, arrived: Arrived) -> None:
        """Run ``init`` on all workers now; on those that come later their first task does it."""
        # As tasks and not by client.run, which would run it in the worker's event loop.
        futures = [
            self.client.submit(
                _prepare_worker, arrived, workers=[address], key=f"init-{uuid4()}", pure=False
            )
            for address in self._workers()
        ]
        try:
            self._wait_for(futures)
            self.client.gather(futures)
        finally:
            _release(futures)

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
        requests: list[_Request] = []
        try:
            # One request is computed while the results of the one before are fetched.
            while todo or requests:
                while todo and len(requests) < 2:
                    requests.append(self._request(image, loader, todo, threads))
                yield from self._collect(image, loader, requests[0], threads)
                requests.pop(0).release()
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
        self._closed = True
        self.held.clear()
        for image in list(self._images.values()):
            image.release_definitions()
        if self._own_client:
            self.client.close()

    def _image(self, loader: CellLoader) -> _Image:
        with self._lock:
            image = self._images.get(loader)
            if image is None:
                image = self._images[loader] = _Image(next(self._numbers))
                weakref.finalize(loader, _forget_image, self.held, image).atexit = False
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
        futures: dict[int, Any] = {}
        others: dict[Any, tuple[int, int, int]] = {}
        for index in cells:
            future = self.held.take(image.number, index)
            if future is not None:
                futures[index] = future
        missing = [index for index in cells if index not in futures]
        request = _Request(cells, futures)
        request.num_computed = len(missing)
        if not missing:
            return request
        stages = stages_of(loader)
        layer = CellLayer(stages, elsewhere=True)
        name = stages[-1][0]
        loaders = {above: item for above, item, _ in stages}
        images = {above: self._image(item) for above, item in loaders.items()}

        def held(key: Any) -> Any:
            above = loaders[key[0]]
            return self.held.key(images[key[0]].number, above.grid.index(key[1:]))

        keys = {(name, *loader.grid.position(index)): index for index in missing}
        tasks = layer.tasks(keys, held)
        self._use_definitions(images, tasks)
        arrays = dask_arrays(loader)
        if arrays:
            tasks |= _chunk_tasks(loader, tasks)
        # Cells upstream are held as well: the neighbours of these cells need them again.
        for key in tasks:
            if isinstance(key, tuple) and key[0] in loaders and key not in keys:
                above = loaders[key[0]]
                index = above.grid.index(key[1:])
                nbytes = above.grid.cell(index).roi.size * above.dtype.itemsize
                others[key] = images[key[0]].number, index, nbytes
        made = self._get(tasks, [*keys, *others])
        for key, future in zip([*keys, *others], made, strict=True):
            if key in keys:
                futures[keys[key]] = future
            else:
                request.others.append((*others[key], future))
        return request

    def _submit_batches(
        self, image: _Image, loader: CellLoader, batches: list[list[int]]
    ) -> _Request:
        (name, _, _) = stages_of(loader)[-1]
        definition = f"{name}-definition"
        tasks: dict[Any, Any] = CellLayer(stages_of(loader), elsewhere=True).tasks(
            [(name, *loader.grid.position(batches[0][0]))], lambda key: None
        )
        tasks = {definition: tasks[definition]}
        self._use_definitions({name: image}, tasks)
        keys = []
        for batch in batches:
            key = f"{name}-batch-{uuid4()}"
            tasks[key] = Task(key, _run_batch, TaskRef(definition), batch)
            keys.append(key)
        return _Request([], {}, list(zip(batches, self._get(tasks, keys), strict=True)))

    def _use_definitions(self, images: Mapping[str, _Image], tasks: dict[Any, Any]) -> None:
        """Send the definitions of images once, and hold them as long as the image lives."""
        for name, image in images.items():
            key = f"{name}-definition"
            if key not in tasks:
                continue
            with self._lock:
                if key in image.definitions:
                    del tasks[key]
                    continue
                (future,) = self._get({key: tasks.pop(key)}, [key])
                # Others are of the time before the image changed.
                image.release_definitions()
                image.definitions[key] = future

    def _get(self, tasks: dict[Any, Any], keys: list[Any]) -> list[Any]:
        futures: list[Any] = self.client.get(
            tasks,
            keys,
            sync=False,
            resources=self._resources or None,
            priority=_DASK_PRIORITY_OF_INTERACTIVE + INTERACTIVE - priority.get(),
        )
        return futures

    # ------------------------------------------------------------------ results

    def _collect(
        self, image: _Image, loader: CellLoader, request: _Request, threads: int
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        began = perf_counter()
        if request.batches:
            yield from self._collect_batches(image, loader, request)
            return
        self._wait_for(list(request.cells.values()))
        wall = perf_counter() - began
        values = self._gather_cells(image, loader, request)
        if image.seconds is None and request.num_computed >= _FEW_CELLS:
            # Also the scheduler's time; batches will tell more.
            image.cheap = wall * threads < 5 * _WORTH_A_KEY_S * request.num_computed
        each = wall / max(1, len(request.order))
        sizes = loader.dtype.itemsize
        for number, index, nbytes, future in request.others:
            if future.status == "finished":
                self.held.keep(number, index, future, nbytes)
        for index in request.order:
            future = request.cells.pop(index)
            self.held.keep(image.number, index, future, values[index].size * sizes)
        for index in request.order:
            yield index, values.pop(index), each

    def _gather_cells(
        self, image: _Image, loader: CellLoader, request: _Request
    ) -> dict[int, NDArray[Any]]:
        failed = {
            index: future.exception()
            for index, future in request.cells.items()
            if future.status == "error"
        }
        for error in failed.values():
            if not isinstance(error, KilledWorker):
                raise error
        if failed:
            # The scheduler blames every task that was assigned to a worker which died. Alone it
            # shows whose fault it is.
            request.release(failed)
            self._let_errors_go()
            for index in failed:
                request.cells[index] = self._alone(image, loader, index)
        values = self._gather(list(request.cells.values()))
        return dict(zip(request.cells, values, strict=True))

    def _alone(self, image: _Image, loader: CellLoader, index: int) -> Any:
        """Compute a cell while nothing else is under way, and return its future."""
        request = self._submit_cells(image, loader, [index])
        try:
            self._wait_for([request.cells[index]])
            if request.cells[index].status != "error":
                return request.cells.pop(index)
            error = request.cells[index].exception()
        finally:
            request.release()
        if not isinstance(error, KilledWorker):
            raise error
        # An image upstream may have the cell that kills.
        names = {name: above for name, above, _ in stages_of(loader)}
        guilty, position = loader, loader.grid.position(index)
        if isinstance(error.task, tuple) and error.task[0] in names:
            guilty, position = names[error.task[0]], error.task[1:]
        raise WorkerDiedError(
            guilty.function.name,
            position,
            guilty.grid.roi(position),
            f"every worker process that computed this cell died, the last one at "
            f"{error.last_worker.address}; other cells are not affected",
        ) from error

    def _collect_batches(
        self, image: _Image, loader: CellLoader, request: _Request
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        while request.batches:
            batch, future = request.batches[0]
            self._wait_for([future])
            if future.status == "error":
                error = future.exception()
                if not isinstance(error, KilledWorker):
                    raise error
                for index in batch:
                    alone = self._alone(image, loader, index)
                    try:
                        (value,) = self._gather([alone])
                    finally:
                        alone.release()
                    yield index, value, 0.0
                request.batches.pop(0)
                future.release()
                continue
            ((flat, costs, errors),) = self._gather([future])
            request.batches.pop(0)
            future.release()
            end = 0
            for number, (index, cost) in enumerate(zip(batch, costs, strict=True)):
                if number in errors:
                    raise errors[number]
                shape = loader.grid.cell(index).shape
                begin, end = end, end + prod(shape)
                yield index, flat[begin:end].reshape(shape), cost
            seconds = sum(costs)
            image.seconds = seconds / len(batch)
            image.cheap = image.seconds < _WORTH_A_KEY_S

    def _let_errors_go(self) -> None:
        """Wait until released keys are let go, so that asking again computes again."""
        # Handles are released in the client's event loop, in order with what comes after.
        if self.client.status == "running":
            self.client.sync(asyncio.sleep, 0)

    def _gather(self, futures: list[Any]) -> list[Any]:
        try:
            values = self.client.gather(futures, direct=self._direct)
        except Exception as error:
            raise self._trouble(error) from error
        return list(values)

    def _wait_for(self, futures: list[Any]) -> None:
        """Wait until all are done, well or not; raise if nobody is there to do them."""
        lonely_since: float | None = None
        while futures:
            try:
                wait(futures, timeout=_LOOK_EVERY_S)
                return
            except TimeoutError:
                pass
            except Exception as error:
                raise self._trouble(error) from error
            if self._closed:
                raise QueueClosedError("the queue was closed while cells were computed")
            if self.client.status != "running":
                raise self._trouble(None)
            if self._workers():
                lonely_since = None
            elif lonely_since is None:
                lonely_since = monotonic()
            elif monotonic() - lonely_since > self._timeout_s:
                raise NoWorkersError(
                    f"there has been no worker for {self._timeout_s:g} s; start some and read "
                    f"again: what was computed and is still held is not computed again"
                )

    def _trouble(self, error: Exception | None) -> Exception:
        """Return what it means that futures are gone."""
        if self._closed:
            return QueueClosedError("the queue was closed while cells were computed")
        if error is not None and not isinstance(error, (OSError, TimeoutError)):
            name = type(error).__name__
            if "Cancel" not in name:
                return error
        return NoWorkersError(
            f"the connection to the scheduler at {self.client.scheduler.address} is lost, or "
            f"somebody else cancelled these cells"
            + (f": {type(error).__name__}: {error}" if error is not None else "")
        )


class _Image:
    """What the client knows of an image on the cluster."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.definitions: dict[str, Any] = {}
        """Futures of the image's definition, by key."""
        self.seconds: float | None = None
        """What a cell takes, as measured in batches."""
        self.cheap = False
        """Whether cells are worth no keys."""

    def release_definitions(self) -> None:
        while self.definitions:
            _, future = self.definitions.popitem()
            future.release()


class _Request:
    """Cells that were submitted together, and the handles that keep them wanted."""

    def __init__(
        self,
        order: list[int],
        cells: dict[int, Any],
        batches: list[tuple[list[int], Any]] | None = None,
    ) -> None:
        self.order = order
        self.cells = cells
        self.others: list[tuple[int, int, int, Any]] = []
        """(number of the image, index, bytes, future) of cells upstream."""
        self.batches = batches or []
        self.num_computed = 0
        """How many of the cells were not held."""

    def release(self, cells: Iterable[int] | None = None) -> None:
        """Let go of what was not handed on, or of some cells; what nobody wants is cancelled."""
        if cells is None:
            cells = list(self.cells)
            _release([future for _, future in self.batches])
            self.batches = []
        _release([self.cells.pop(index) for index in cells])
        _release([future for *_, future in self.others])
        self.others = []


def _fed(stage: tuple[str, CellLoader, dict[int, Any]]) -> bool:
    """Whether cells of an image depend on other tasks."""
    return bool(stage[2])


def _release(futures: list[Any]) -> None:
    for future in futures:
        future.release()


def _release_all(requests: list[_Request]) -> None:
    for request in requests:
        request.release()


def _forget_image(held: Held, image: _Image) -> None:
    held.forget(image.number)
    image.release_definitions()


def _chunk_tasks(loader: CellLoader, tasks: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the tasks of the dask chunks that cells depend on."""
    wanted = {above for task in tasks.values() for above in task.dependencies} - tasks.keys()
    found: dict[Any, Any] = {}
    for array in dask_arrays(loader):
        mine = {key for key in wanted if isinstance(key, tuple) and key[0] == array.name}
        if mine:
            from dask._task_spec import convert_legacy_graph

            culled = array.__dask_graph__().cull(mine)
            found |= convert_legacy_graph(dict(culled))
    return found


# What runs on the workers.


def _prepare_worker(arrived: Arrived) -> None:
    arrived.worker(again=True)


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
