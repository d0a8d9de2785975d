"""Filling a target cell by cell, and first what has to be known of whole images."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any

from cellimg_dask.batch.folder import open_folder
from cellimg_dask.batch.lock import RunLock
from cellimg_dask.batch.manifest import Manifest
from cellimg_dask.batch.order import neighbours_together
from cellimg_dask.batch.parquet import TableLayout, TableTarget
from cellimg_dask.batch.passes import (
    needed_whole,
    reading_instead,
    runs_here,
    values_from_voxels,
    with_values,
)
from cellimg_dask.batch.report import RunReport
from cellimg_dask.batch.target import Layout, Target
from cellimg_dask.batch.watch import Watch
from cellimg_dask.batch.work import Committer, Keys, Outcome, with_keys
from cellimg_dask.blocks.errors import NoWorkersError
from cellimg_dask.loading.crew import Crew, usable_cores
from cellimg_dask.loading.loader import CellLoader
from cellimg_dask.loading.memory import Room
from cellimg_dask.loading.priorities import BACKGROUND, priority
from cellimg_dask.loading.readers import Reader, make_reader
from cellimg_dask.loading.together import Together, cells_together
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache, get_cache, memory_bytes

__all__ = ["Filling", "alone", "prepare", "reader_of", "threads_for"]


@dataclass(frozen=True)
class Filling:
    """How a run, and those that it needs first, go about it."""

    queue: BlockQueue | None
    """Where blocks run; None: each image's own."""
    retries: int
    checksums: bool
    max_memory: int | None
    timeout_s: float
    progress: bool

    def fill(
        self,
        loader: CellLoader,
        keys: Keys,
        layout: Layout | TableLayout,
        where: str,
        *,
        resume: bool = True,
        overwrite: bool = False,
        replace: bool = False,
        cells_per_call: Any = None,
        name: str | None = None,
        beside: str | None = None,
    ) -> RunReport:
        """Fill a target; with ``replace`` another array that may be there makes way.

        Markers lie in ``beside``; default: the folder with the target's name and ``.run``.
        """
        began = perf_counter()
        first = needed_whole(loader)
        for image, own in [(image, keys.of(image)) for image in first] or [(loader, keys)]:
            if image.grid.num_cells:
                # Refuses inputs that cannot be compared, before anything is made.
                with_keys(image, own, [0])
        crew = _crew(loader.queue)
        rooms = _rooms(loader.queue, crew, self.max_memory)
        together = cells_together(loader, cells_per_call, rooms)
        for room in set(rooms):
            for image in values_from_voxels(loader):
                room.check(image)
            room.check(loader if together is None else together.coarse)
        manifest = Manifest(where, beside)
        with closing(crew), RunLock(manifest.folder, where) as lock:
            _create(layout, where, manifest, resume=resume, overwrite=overwrite, replace=replace)
            for folder in (manifest.folder, open_folder(where)):
                folder.sweep()
            stored = layout.target(where)
            report = RunReport(where, loader.grid.num_cells)
            todo = _missing(loader, stored, manifest, keys, report, crew, checksums=self.checksums)
            try:
                if not todo:
                    with _bar(report.num_cells, report.skipped, self.progress, name):
                        pass
                if todo and first:
                    loader = self._first(loader, first, keys, report, manifest, overwrite=overwrite)
                if todo and not report.failed:
                    loader, held = with_values(loader)
                    if together is not None:
                        together = Together(loader, together.per_call)
                    committer = Committer(
                        loader, together, stored, manifest, lock.permit, self.retries
                    )
                    self._compute(committer, keys, todo, report, crew, name)
                    del held
            finally:
                report.seconds = perf_counter() - began
                report.peak_memory = _peak_memory()
                manifest.folder.write("report.json", report.as_json())
        return report

    def _first(
        self,
        loader: CellLoader,
        images: Sequence[CellLoader],
        keys: Keys,
        report: RunReport,
        manifest: Manifest,
        *,
        overwrite: bool,
    ) -> CellLoader:
        """Store images of which cells and something of the whole are needed; read them there."""
        stored: dict[CellLoader, Reader] = {}
        for number, image in enumerate(images, 1):
            where = manifest.pass_of(number)
            done = self.fill(
                alone(reading_instead(image, stored), self.queue),
                keys.of(image),
                Layout.of(image.grid, image.dtype),
                where,
                overwrite=overwrite,
                replace=True,
                name=image.function.name,
            )
            report.passes.append(done)
            report.failed |= done.failed
            if not done.ok:
                break
            stored[image] = reader_of(where)
        return reading_instead(loader, stored)

    def _compute(
        self,
        committer: Committer,
        keys: Keys,
        todo: list[int],
        report: RunReport,
        crew: Crew,
        name: str | None,
    ) -> None:
        """Compute and commit cells, and record what became of them."""
        loader, together = committer.loader, committer.together
        with _bar(report.num_cells, report.skipped, self.progress, name) as advance:

            def record(outcome: Outcome) -> None:
                if outcome.error is None:
                    report.computed += 1
                    report.bytes_written += outcome.nbytes
                else:
                    # The error's own position may be that of a cell upstream.
                    position = loader.grid.position(outcome.index)
                    report.failed[position] = outcome.error
                advance()

            order = neighbours_together(loader.grid, todo)
            groups = [[i] for i in order] if together is None else together.groups(order)
            if loader.queue is None or loader.queue.cells is None or runs_here(loader):
                watch = Watch(loader.grid, self.timeout_s)
                _compute_here(committer, groups, keys, crew, watch, record)
            else:
                from cellimg_dask.batch.on_cluster import compute_on_cluster

                cells: Any = loader.queue.cells
                compute_on_cluster(cells, committer, groups, keys, self.timeout_s, record)


def prepare(
    layout: Layout | TableLayout, where: str, beside: str, *, resume: bool, overwrite: bool
) -> None:
    """Create a target without filling it, unless a run has made one like it.

    Raises
    ------
    FileExistsError
        If something is there that is not to be carried on; see `run`.
    """
    manifest = Manifest(where, beside)
    with RunLock(manifest.folder, where):
        _create(layout, where, manifest, resume=resume, overwrite=overwrite, replace=False)


def alone(loader: CellLoader, queue: BlockQueue | None) -> CellLoader:
    """Return the loader with a queue, and without keeping cells that are written anyway."""
    return CellLoader(
        loader.function,
        loader.planner,
        loader.readers,
        loader.dtype,
        loader.params,
        CellCache(0),
        loader.queue if queue is None else queue,
        loader.job.version,
    )


def _crew(queue: Any) -> Crew:
    # A cluster may have no workers just now.
    workers = usable_cores() if queue is None else max(1, queue.num_workers)
    return Crew(threads_for(workers), spare_tiny=False)


def threads_for(num_workers: int) -> int:
    """Return how many threads work on cells: while some wait for the disk, others compute."""
    return 2 * num_workers


def _rooms(queue: Any, crew: Crew, max_memory: int | None) -> list[Room]:
    """Return the processes in which blocks run."""
    if queue is None or queue.cells is None:
        return [Room(crew.num_threads, memory_bytes() if max_memory is None else max_memory)]
    cells: Any = queue.cells
    rooms = []
    for worker in cells.workers().values():
        own = worker.get("memory_limit") or memory_bytes()
        limit = own if max_memory is None else min(own, max_memory)
        # There the cache is bounded by a quarter, see `fit_cache`.
        rooms.append(Room(worker["nthreads"], limit, own // 4, "a worker of the cluster"))
    return rooms


def _create(
    layout: Layout | TableLayout,
    where: str,
    manifest: Manifest,
    *,
    resume: bool,
    overwrite: bool,
    replace: bool,
) -> None:
    there = layout.existing(where, by_a_run=manifest.folder.read("layout.json") is not None)
    if there is not None and not overwrite:
        if not resume:
            raise FileExistsError(
                f"{where} exists; resume=True carries it on, overwrite=True replaces it"
            )
        if manifest.folder.read("layout.json") is None:
            raise FileExistsError(f"{where} was not made by a run: overwrite=True replaces it")
        differences = layout.differences(there)
        if not differences:
            return
        if not replace:
            raise FileExistsError(
                f"{where} is another {layout.noun} ({'; '.join(differences)}): give another "
                f"target, or overwrite=True to replace it"
            )
    # Old markers go before the new array comes, so that they never vouch for it.
    for index in list(manifest.marked()):
        manifest.withdraw(index)
    # Before the array, so that whoever is killed in between is known for a run.
    manifest.folder.write("layout.json", layout.as_json())
    layout.create(where, overwrite=overwrite or there is not None)


def reader_of(where: str) -> Reader:
    """Return a reader of an array that a run has filled."""
    import zarr

    return make_reader(zarr.open_array(where, mode="r"), get_cache())


def _missing(
    loader: CellLoader,
    stored: Target | TableTarget,
    manifest: Manifest,
    keys: Keys,
    report: RunReport,
    crew: Crew,
    *,
    checksums: bool,
) -> list[int]:
    """Return the cells that have to be computed."""
    marked = set(manifest.marked())
    todo = [index for index in range(report.num_cells) if index not in marked]
    lock = threading.Lock()

    def check(index: int) -> None:
        work, _ = with_keys(loader, keys, [index])
        if not work:
            with lock:
                todo.append(index)
            return
        state = manifest.state(*work[0], stored, checksums=checksums)
        with lock:
            if state == "done":
                report.skipped += 1
                return
            if state == "damaged":
                # Workers that look whether somebody was quicker believe it.
                manifest.withdraw(index)
            if state != "missing":
                report.redone[state] = report.redone.get(state, 0) + 1
            todo.append(index)

    known = sorted(index for index in marked if index < report.num_cells)
    crew.run(known, check, len(known))
    return sorted(todo)


def _compute_here(
    committer: Committer,
    groups: Sequence[Sequence[int]],
    keys: Keys,
    crew: Crew,
    watch: Watch,
    record: Callable[[Outcome], None],
) -> None:
    loader = committer.loader

    def work(group: Sequence[int]) -> None:
        with watch.under_way(group):
            cells, failed = with_keys(loader, keys, group)
            for outcome in chain(failed, committer.commit(cells)):
                watch.done(partial(record, outcome))

    def compute() -> None:
        priority.set(BACKGROUND)
        crew.run(groups, work, len(groups))

    try:
        watch.wait_for(compute)
    except (KeyboardInterrupt, NoWorkersError) as error:
        # Threads that are stuck in a block cannot be waited for.
        crew.close(join=False)
        if isinstance(error, NoWorkersError):
            _close_queues(loader)
        raise


def _close_queues(loader: CellLoader) -> None:
    """Close the queues on this machine, one of which is stuck, without waiting for blocks."""
    for queue in {image.queue for image in loader.ancestry()}:
        if isinstance(queue, BlockQueue) and queue.blocks is not None:
            with suppress(TimeoutError):
                queue.close(0)


@contextmanager
def _bar(total: int, done: int, show: bool, name: str | None) -> Iterator[Callable[[], object]]:
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=done, desc=name, unit="cell", file=sys.stderr) as bar:
        yield bar.update


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
