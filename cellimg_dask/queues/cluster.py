"""Whole cells on the workers of a dask cluster."""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from itertools import count
from math import ceil
from time import monotonic, perf_counter, sleep
from typing import Any, NoReturn
from uuid import uuid4

import cloudpickle
import distributed
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
from cellimg_dask.loading.priorities import INTERACTIVE, priority
from cellimg_dask.loading.running import given_up
from cellimg_dask.queues.batches import (
    BatchResult,
    batch_key,
    cut,
    places_of,
    run_batch,
    without_error,
)
from cellimg_dask.queues.connect import connect, is_local
from cellimg_dask.queues.env_here import ArrivedEnv
from cellimg_dask.queues.held import Held, Taken, handle, is_dead, release
from cellimg_dask.queues.here import Arrived
from cellimg_dask.queues.requests import Batch, Image, Other, Portion, Request, release_all
from cellimg_dask.queues.services import Services
from cellimg_dask.queues.tasks import CellCall, CellLayer, chunk_tasks, dask_name, stages_of
from cellimg_dask.state.sizes import num_bytes

__all__ = ["ClusterCells"]

# What is asked for together, and so is in this process' memory at a time, twice.
_WAVE_BYTES = 64 << 20
_WAVE_TASKS = 512
# Fewer cells always have tasks of their own.
_FEW_CELLS = 64
# A cell that takes longer is worth the half millisecond and more that a key costs the scheduler.
_WORTH_A_KEY_S = 2e-3
# So many cells show what a cell takes.
_PROBE = 8
_BATCH_S = 50e-3
_LARGEST_BATCH = 2500
# A batch that takes longer leaves the rest of its cells to others.
_LONGEST_BATCH_S = 4 * _BATCH_S
# Under this name the scheduler keeps what cells take.
_METADATA = "cellimg_dask-seconds"
# So often a read that waits looks whether there still is somebody to wait for.
_LOOK_EVERY_S = 1.0
# So often a queue that is made looks whether workers have come.
_LOOK_FOR_WORKERS_EVERY_S = 0.1
# So many workers may die in init before it is blamed, if none has lived through it.
_DEATHS_IN_INIT = 1
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
    arrived : Arrived or ArrivedEnv
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
        arrived: Arrived | ArrivedEnv,
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
        self._services: Services | None = None
        # By the shelf, which all editions of an image share, and by an old edition's loader.
        self._images: weakref.WeakKeyDictionary[object, Image] = weakref.WeakKeyDictionary()
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
                    for worker in self.workers().values()
                ]
                max_bytes = sum(limits) // 4
            self.held = Held(max_bytes)
            if isinstance(arrived, ArrivedEnv):
                # Ends the processes that workers start, and keeps count of those who need them.
                self._services = Services(arrived.token)
                self.client.register_plugin(self._services)
            self._prepare(arrived)
        except BaseException:
            if self._own_client:
                self.client.close()
            raise

    @property
    def num_workers(self) -> int:
        """How many workers there are at the moment."""
        return len(self.workers())

    def workers(self) -> dict[str, Any]:
        """Return the workers that have what cells need."""
        if self.client.status != "running":
            return {}
        try:
            info = self.client.scheduler_info(n_workers=-1).get("workers", {})
        except OSError:
            # It went away this moment.
            return {}
        return {
            address: worker
            for address, worker in info.items()
            if all(worker["resources"].get(name, 0) >= n for name, n in self.resources.items())
        }

    def _num_threads(self) -> int:
        return max(1, sum(int(worker["nthreads"]) for worker in self.workers().values()))

    def _wait_for_workers(self, num_workers: int) -> None:
        deadline = monotonic() + self._timeout_s
        while (found := len(self.workers())) < num_workers:
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

    def _prepare(self, arrived: Arrived | ArrivedEnv) -> None:
        """Run ``init`` on all workers now; on those that come later their first task does it."""
        try:
            packed = cloudpickle.dumps(arrived)
        except Exception as error:
            raise InitError(f"init cannot be sent to the workers: {describe(error)}") from error
        futures: dict[str, Any] = {}
        deaths = 0
        deadline = monotonic() + self._timeout_s
        try:
            while True:
                if self.client.status != "running":
                    self._fail(None)
                there = self.workers()
                for address in there.keys() - futures.keys():
                    # As tasks and not by client.run, which would run it in the event loop.
                    futures[address] = self.client.submit(
                        _prepare_worker, packed, workers=[address], key=f"init-{uuid4()}"
                    )
                for address, future in list(futures.items()):
                    if _has_died(future, address in there):
                        futures.pop(address).release()
                        deaths += 1
                ready = any(future.status == "finished" for future in futures.values())
                pending = [future for future in futures.values() if future.status == "pending"]
                late = monotonic() > deadline
                if ready and (late or not pending):
                    # Who is busy with something else does it before its first task.
                    return
                if not ready and deaths > _DEATHS_IN_INIT:
                    raise InitError("every worker died while init of the queue ran there")
                if not futures and late:
                    raise NoWorkersError(f"there has been no worker for {self._timeout_s:g} s")
                if pending:
                    with self.client.as_current(), suppress(TimeoutError):
                        distributed.wait(pending, _LOOK_EVERY_S, "FIRST_COMPLETED")
                else:
                    sleep(_LOOK_FOR_WORKERS_EVERY_S)
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
        image, _ = self._claim(loader)
        todo = deque(indices)
        portions = self._portions(image, loader, todo)
        requests: deque[Request] = deque()
        try:
            while todo or requests:
                # One request is computed while the results of the one before are fetched.
                while todo and len(requests) < 2 and not (requests and requests[0].is_probe):
                    requests.append(self._request(loader, next(portions)))
                yield from self._collect(loader, requests[0])
                done = requests[0]
                todo.extendleft(reversed(done.put_off))
                if done.suspects:
                    # The scheduler blames every task that was assigned to a worker which died.
                    # Alone it shows whose fault it is.
                    todo.extend(index for request in requests for index in request.cells_left())
                    release_all(requests)
                    self._let_errors_go()
                    for index in done.suspects:
                        yield from self._alone(loader, index)
                else:
                    requests.popleft().release()
        except Exception:
            release_all(requests)
            self._let_errors_go()
            raise
        finally:
            release_all(requests)

    def _portions(self, image: Image, loader: CellLoader, todo: deque[int]) -> Iterator[Portion]:
        """Take off ``todo`` what is asked for together next.

        Whoever asks for the same cells of the same cluster gets the same batches, and so the same
        keys.
        """
        cell_bytes = max(1, _num_bytes(loader, todo[0])) if todo else 1
        most = max(1, min(_WAVE_BYTES // cell_bytes, _WAVE_TASKS))

        def off(count: int) -> list[int]:
            return [todo.popleft() for _ in range(min(count, len(todo)))]

        if len(todo) <= _FEW_CELLS or any(map(_fed, stages_of(loader))):
            while True:
                yield Portion(off(most))
        threads = self._num_threads()
        self._ask_what_a_cell_takes(image, loader)
        if image.seconds is None or image.seconds < _WORTH_A_KEY_S:
            probes = max(1, min(threads, len(todo) // max(_FEW_CELLS, 1)))
            batches = [off(_PROBE) for _ in range(probes)]
            # The other threads have something to do, too.
            others = off(threads - probes)
            yield Portion(others, list(filter(None, batches)), is_probe=image.seconds is None)
        while image.seconds is not None and image.seconds < _WORTH_A_KEY_S:
            size = min(
                _LARGEST_BATCH,
                ceil(_BATCH_S / max(image.seconds, 1e-6)),
                _WAVE_BYTES // cell_bytes // threads,
                # All threads have something to do, also at the end.
                len(todo) // (2 * threads),
            )
            batches = [off(max(1, size)) for _ in range(2 * threads)]
            yield Portion([], list(filter(None, batches)))
        while True:
            yield Portion(off(most))

    def _ask_what_a_cell_takes(self, image: Image, loader: CellLoader) -> None:
        """Learn from the scheduler what somebody else has measured."""
        if image.seconds is None:
            try:
                image.seconds = self.client.get_metadata([_METADATA, dask_name(loader)], None)
            except Exception as error:
                self._fail(error)

    def _tell_what_a_cell_takes(self, image: Image, loader: CellLoader, seconds: float) -> None:
        image.seconds = seconds
        try:
            self.client.set_metadata([_METADATA, dask_name(loader)], seconds)
        except Exception as error:
            self._fail(error)

    def forget(self, shelf: object, indices: Collection[int]) -> None:
        """Release cells of the image that keeps them on ``shelf``, because they are outdated."""
        image = self._images.get(shelf)
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
        if self._services is not None and self.client.status == "running":
            self.client.unregister_worker_plugin(self._services.name)
        if self._own_client:
            self.client.close()

    def _claim(self, loader: CellLoader) -> tuple[Image, int]:
        """Return what belongs to an image, and the generation of its cells that are held.

        An edition from before a change has what belongs to it alone.
        """
        image = self._image(loader.shelf, loader.edition)
        # Noted first: if the image changes from now on, what is held is another generation.
        generation = self.held.generation(image.number)
        if loader.edition < max(loader.shelf.edition, image.edition):
            image = self._image(loader, loader.edition)
            return image, self.held.generation(image.number)
        if loader.edition > image.edition:
            if loader.queue is None or loader.queue.cells is not self:
                # An image upstream that knows nothing of this queue, and so does not tell what
                # to forget.
                for part in loader.history.cells_since(image.edition):
                    self.held.forget(image.number, part)
                generation = self.held.generation(image.number)
            # Not before: another thread would take what is still held for the latest.
            image.edition = loader.edition
        return image, generation

    def _image(self, owner: object, edition: int) -> Image:
        with self._lock:
            image = self._images.get(owner)
            if image is None:
                image = self._images[owner] = Image(next(self._numbers), edition)
                weakref.finalize(owner, _forget_image, self.held, image).atexit = False
            return image

    def _request(self, loader: CellLoader, portion: Portion) -> Request:
        """Submit cells."""
        if self._closed:
            raise QueueClosedError("the queue is closed")
        request = self._submit_cells(loader, portion.cells)
        request.is_probe = portion.is_probe
        if portion.batches:
            self._submit_batches(loader, portion.batches, request)
        return request

    def _submit_cells(self, loader: CellLoader, cells: list[int]) -> Request:
        # Noted before anything is named or sent: what is outdated from now on is not kept.
        claims = {item: self._claim(item) for item in loader.ancestry()}
        request = Request(*claims[loader])
        request.cells, parts = self._take(claims[loader], cells, request)
        missing = [index for index in cells if index not in request.cells]
        if not missing:
            return request
        stages = stages_of(loader)
        loaders = {name: item for name, item, _ in stages}

        def held(key: Any) -> Any:
            above = loaders[key[0]]
            index = above.grid.index(key[1:])
            whole, parts = self._take(claims[above], [index], request)
            # Not released before the scheduler knows who needs it.
            request.uses += whole.values()
            if index in parts:
                return self._cut(key, index, parts[index])
            return whole[index].key if whole else None

        name = stages[-1][0]
        keys: dict[Any, int] = {(name, *loader.grid.position(index)): index for index in missing}
        # What is in the batches that are held is taken out of them, and has a key from now on.
        tasks: dict[Any, Any] = {
            key: self._cut(key, index, parts[index])
            for key, index in keys.items()
            if index in parts
        }
        computed = [key for key in keys if key not in tasks]
        layer = CellLayer(stages, elsewhere=True)
        tasks |= layer.tasks(computed, held)
        for cut_from in {key[0] for key, task in tasks.items() if getattr(task, "func", 0) is cut}:
            tasks[f"{cut_from}-definition"] = layer[f"{cut_from}-definition"]
        self._use_definitions(
            request, {key: claims[item][0] for key, item in loaders.items()}, tasks
        )
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
                upstream, generation = claims[above]
                request.others.append(Other(above, index, upstream.number, generation, future))
        return request

    def _take(
        self, claim: tuple[Image, int], indices: Collection[int], request: Request
    ) -> tuple[dict[int, Any], dict[int, Taken]]:
        """Return handles of the cells that are held, and the batches that others are in."""
        whole: dict[int, Any] = {}
        parts: dict[int, Taken] = {}
        for found in self._taken(claim, indices):
            if None in found.places.values():
                whole.update(dict.fromkeys(found.places, found.future))
            else:
                parts.update(dict.fromkeys(found.places, found))
                request.uses.append(found.future)
        return whole, parts

    @staticmethod
    def _cut(key: tuple[Any, ...], index: int, batch: Taken) -> Task:
        definition = TaskRef(f"{key[0]}-definition")
        return Task(key, cut, TaskRef(batch.future.key), definition, index, batch.places[index])

    def _taken(self, claim: tuple[Image, int], indices: Collection[int]) -> list[Taken]:
        image, generation = claim
        taken, dead = self.held.take(image.number, indices, generation)
        if dead:
            release(dead)
            self._let_errors_go()
        return taken

    def _submit_batches(
        self, loader: CellLoader, batches: Sequence[list[int]], request: Request
    ) -> None:
        stages = stages_of(loader)
        (name, _, _) = stages[-1]
        layer = CellLayer(stages, elsewhere=True)
        definition = f"{name}-definition"
        tasks: dict[Any, Any] = {definition: layer[definition]}
        new = []
        for batch in batches:
            missing = set(batch)
            for found in self._taken((request.image, request.generation), batch):
                missing.difference_update(found.places)
                if None in found.places.values():
                    request.cells.update(dict.fromkeys(found.places, found.future))
                else:
                    request.batches.append(Batch(list(found.places), found))
            if missing:
                cells = [index for index in batch if index in missing]
                key = batch_key(name, cells)
                tasks[key] = Task(key, run_batch, TaskRef(definition), cells, _LONGEST_BATCH_S)
                new.append((key, cells))
        if new:
            self._use_definitions(request, {name: request.image}, tasks)
            futures = self._get(tasks, [key for key, _ in new])
            for future, (_, cells) in zip(futures, new, strict=True):
                places = places_of(loader.grid, cells)
                request.batches.append(Batch(cells, Taken(future, places), is_new=True))

    def _use_definitions(
        self, request: Request, images: Mapping[str, Image], tasks: dict[Any, Any]
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
        self, loader: CellLoader, request: Request
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        """Yield the cells of a request, until one of them is suspected to kill workers."""
        if request.cells:
            began = perf_counter()
            values = self._finished(request.cells)
            each = (perf_counter() - began) / max(1, len(values))
            self._hold(loader, request, values)
            for index, future in request.cells.items():
                if is_dead(future):
                    request.suspects[index] = self._killed(loader, index, request, future)
            for index in list(values):
                yield index, values.pop(index), each
        while request.batches and not request.suspects:
            yield from self._collect_batch(loader, request, request.batches[0])

    def _ask_sizes(self, keys: list[Any]) -> dict[Any, int]:
        """Return how many bytes results of Python objects take, as far as workers say."""
        sizes: dict[Any, int] = {}
        if keys:
            # What is not known is taken to be small; a lost connection shows elsewhere.
            with suppress(Exception):
                for answer in self.client.run(_sizes_here, keys, on_error="ignore").values():
                    sizes.update(answer)
        return sizes

    def _hold(self, loader: CellLoader, request: Request, cells: Collection[int]) -> None:
        """Hold what is there of a request: some of its cells, and cells upstream."""
        others, request.others = request.others, []
        objects = [other.future.key for other in others if other.loader.dtype.hasobject]
        objects += [request.cells[index].key for index in cells if loader.dtype.hasobject]
        sizes = self._ask_sizes(objects)
        for other in others:
            if other.future.status == "finished":
                nbytes = sizes.get(other.future.key) or _num_bytes(other.loader, other.index)
                self.held.keep(
                    other.number, other.future, {other.index: None}, nbytes, other.generation
                )
            else:
                other.future.release()
        for index in cells:
            future = request.cells.pop(index)
            nbytes = sizes.get(future.key) or _num_bytes(loader, index)
            number = request.image.number
            self.held.keep(number, future, {index: None}, nbytes, request.generation)

    def _collect_batch(
        self, loader: CellLoader, request: Request, batch: Batch
    ) -> Iterator[tuple[int, NDArray[Any], float]]:
        future, places = batch.taken
        found = self._finished({0: future})
        request.batches.popleft()
        request.uses.append(future)
        if not found:
            killed = self._killed(loader, batch.cells[0], request, future)
            request.suspects = dict.fromkeys(batch.cells, killed)
            return
        result: BatchResult = found.pop(0)
        if batch.is_new:
            self._hold_batch(loader, request, batch, result)
        for index in batch.cells:
            cell = result.get(places[index])
            if cell is None:
                request.put_off.append(index)
            else:
                yield index, cell, result.seconds
        if request.put_off and not batch.is_new:
            # Lost with its worker, and shorter since it was computed again.
            self.held.lose(request.image.number, request.put_off)
        if result.error is not None:
            raise result.error

    def _hold_batch(
        self, loader: CellLoader, request: Request, batch: Batch, result: BatchResult
    ) -> None:
        """Hold a batch that was computed, and learn from it what a cell takes."""
        future, places = batch.taken
        done = batch.cells[: result.num_cells]
        if not done:
            return
        if result.error is not None:
            # Nobody who asks for the same cells should get an old error.
            key = batch_key(dask_name(loader), done)
            (kept,) = self._get({key: Task(key, without_error, TaskRef(future.key))}, [key])
        else:
            kept = handle(future)
            if request.is_probe or len(done) < len(batch.cells):
                self._tell_what_a_cell_takes(request.image, loader, result.seconds)
        held = {index: places[index] for index in done}
        number = request.image.number
        nbytes = num_bytes(result.flat) if loader.dtype.hasobject else result.flat.nbytes
        self.held.keep(number, kept, held, nbytes, request.generation)
        if result.error is None and result.seconds >= _WORTH_A_KEY_S:
            # So that whoever asks for some of them finds them.
            keyed = self._submit_cells(loader, done)
            self._hold(loader, keyed, done)
            keyed.release()

    def _alone(self, loader: CellLoader, index: int) -> Iterator[tuple[int, NDArray[Any], float]]:
        """Yield a cell, computed while nothing else is under way.

        Raises
        ------
        WorkerDiedError
            Of the cell, or of one upstream, if its worker dies again.
        """
        request = self._submit_cells(loader, [index])
        above = [(other.loader, other.index) for other in request.others]
        try:
            yield from self._collect(loader, request)
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
        self, loader: CellLoader, index: int, request: Request, future: Any
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
        nobody_waits = given_up.get()
        ends: list[Future[Any]] = [gathering] if nobody_waits is None else [gathering, nobody_waits]
        lonely_since: float | None = None
        while not wait(ends, _LOOK_EVERY_S, "FIRST_COMPLETED").done:
            lonely_since = self._look(lonely_since)
        if not gathering.done():
            raise CancelledError("nobody wants these cells any more")
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
        if self.workers():
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


def _has_died(future: Any, is_there: bool) -> bool:
    """Whether a worker died during the only task that it was sent; raise what that one raised."""
    if future.status == "error":
        failure = future.exception()
        if not isinstance(failure, KilledWorker):
            raise failure
        return True
    # The task is for this worker only, and would wait for ever.
    return future.status == "pending" and not is_there


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


def _forget_image(held: Held, image: Image) -> None:
    held.abandon(image.number)
    release(image.definition)


# What runs on the workers.


def _prepare_worker(packed: bytes) -> None:
    arrived: Arrived | ArrivedEnv = pickle.loads(packed)
    arrived.worker(again=True)


def _sizes_here(keys: list[Any], dask_worker: Any) -> dict[Any, int]:
    # What is on the disk stays there.
    here = getattr(dask_worker.data, "fast", dask_worker.data)
    return {key: num_bytes(here[key]) for key in keys if key in here}


def _unpack(name: str, packed: bytes) -> CellCall:
    try:
        call: CellCall = pickle.loads(packed)
    except Exception as error:
        raise CellimgError(f"{name} cannot be read by the workers: {describe(error)}") from error
    return call
