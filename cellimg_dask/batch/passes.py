"""What has to be known of whole images before the first cell of an image can be computed.

The id of a label may come from anywhere, so a cell of stitched labels reads its block and a value
that was made from all blocks. A run computes and stores such blocks first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.errors import CellError
from cellimg_dask.loading.loader import CellLoader, ImageReader
from cellimg_dask.loading.readers import ArrayReader, Reader

__all__ = ["needed_whole", "reading_instead", "runs_here", "values_from_voxels", "with_values"]


def needed_whole(loader: CellLoader) -> list[CellLoader]:
    """Return the images upstream that would be computed twice, each after its own upstream.

    An image reads cells of them and, besides, a value that was made from all their cells.
    """
    rests_on: dict[CellLoader, set[CellLoader]] = {}
    in_a_value: dict[CellLoader, set[CellLoader]] = {}
    found: set[CellLoader] = set()
    order = loader.ancestry()
    for image in order:
        values = [above for above in image.upstream() if above.dtype.hasobject]
        voxels = {above for above in image.upstream() if not above.dtype.hasobject}
        whole = set().union(*(in_a_value[above] for above in values))
        found |= voxels & whole
        if image.dtype.hasobject:
            rests_on[image] = voxels.union(*(rests_on[above] for above in values))
            in_a_value[image] = rests_on[image] if image.grid.num_cells == 1 else whole
    return [image for image in order if image in found]


def reading_instead(loader: CellLoader, readers: Mapping[CellLoader, Reader]) -> CellLoader:
    """Return a loader of the same cells that reads some images upstream by other readers."""
    copies: dict[CellLoader, CellLoader] = {}
    for image in loader.ancestry():
        instead: list[Reader] = []
        for reader in image.readers:
            if isinstance(reader, ImageReader):
                above = reader.loader
                if above in readers:
                    reader = readers[above]
                elif copies[above] is not above:
                    reader = ImageReader(copies[above])
            instead.append(reader)
        same = all(new is old for new, old in zip(instead, image.readers, strict=True))
        copies[image] = image if same else image.reading(instead)
    return copies[loader]


def values_from_voxels(loader: CellLoader) -> list[CellLoader]:
    """Return the images of values that are made from voxels and go into the values of an image.

    That is the work; what is made from them are small things.
    """
    found: dict[CellLoader, None] = {}
    todo = [loader] if loader.dtype.hasobject else []
    while todo:
        image = todo.pop()
        above = image.upstream()
        if len(above) < len(image.readers) or not all(each.dtype.hasobject for each in above):
            found[image] = None
        todo += [each for each in above if each.dtype.hasobject and each not in found]
    return list(found)


def runs_here(loader: CellLoader) -> bool:
    """Whether the cells of an image are put together from values by whoever began the run.

    What they are made from is computed on the workers all the same.
    """
    return loader.dtype.hasobject and any(above.dtype.hasobject for above in loader.upstream())


def with_values(loader: CellLoader) -> tuple[CellLoader, Sequence[Any]]:
    """Compute the values upstream that all cells need, and return the loader that has them.

    Whoever uses it holds the values, too, so that no cache forgets them. On a cluster, where each
    worker would compute them anew, they are computed as tasks of their own and travel with the
    loader.
    """
    queue: Any = loader.queue
    if queue is None or queue.cells is None:
        # If something fails its cells will say so.
        held: list[Any] = []
        with suppress(CellError):
            for above in loader.upstream():
                held += above.prepare()
        return loader, held
    if runs_here(loader):
        return _on_queue(loader, queue), ()
    values: dict[CellLoader, Reader] = {}
    for image in loader.ancestry():
        if not image.dtype.hasobject:
            for above in image.upstream():
                if above.dtype.hasobject and above not in values:
                    computing = _on_queue(reading_instead(above, values), queue)
                    try:
                        values[above] = ArrayReader(_all_cells(computing))
                    except CellError:
                        return loader, ()
    return reading_instead(loader, values), ()


def _all_cells(loader: CellLoader) -> NDArray[Any]:
    values = np.empty(loader.grid.shape, loader.dtype)
    loader.read((0,) * values.ndim, values.shape, values)
    return values


def _on_queue(loader: CellLoader, queue: Any) -> CellLoader:
    """Return the loader, computing on a queue whatever upstream has none."""
    copies: dict[CellLoader, CellLoader] = {}
    for image in loader.ancestry():
        readers = [
            ImageReader(copies[reader.loader]) if isinstance(reader, ImageReader) else reader
            for reader in image.readers
        ]
        copies[image] = CellLoader(
            image.function,
            image.planner,
            readers,
            image.dtype,
            image.params,
            image.shelf.cache,
            queue if image.queue is None else image.queue,
            image.job.version,
        )
    return copies[loader]
