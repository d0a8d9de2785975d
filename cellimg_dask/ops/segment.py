"""Instance segmenters such as StarDist and Cellpose, run block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.blocks.named import as_function
from cellimg_dask.blocks.wrappers import FunctionWrapper, ModelFunction, call
from cellimg_dask.geometry import HaloLike, as_ints
from cellimg_dask.image.define import as_axes
from cellimg_dask.image.described import checked_call
from cellimg_dask.image.input import as_input
from cellimg_dask.ops.holders import Holder, hold
from cellimg_dask.ops.label_image import LabelImg
from cellimg_dask.ops.labels import Link, map_labels
from cellimg_dask.ops.normalize import limits_of, scaled
from cellimg_dask.queues.block_queue import BlockQueue
from cellimg_dask.state.cache import CellCache

__all__ = ["segment"]


def segment(
    predict: Callable[..., Any] | str,
    *images: Any,
    halo: HaloLike | None = None,
    load_model: Callable[[], Any] | str | None = None,
    normalize: tuple[float, float] | None = None,
    channel_axis: SupportsIndex | None = None,
    multiple_of: SupportsIndex | Iterable[SupportsIndex] = 1,
    lock: bool | None = None,
    link: Link = ("iou", 0.5),
    consecutive: bool = False,
    boundary: str = "none",
    fill_value: Any = 0,
    cell_shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    params: Mapping[str, Any] | None = None,
    cache: CellCache | str | None = "shared",
    queue: BlockQueue | None = None,
    version: str | None = None,
) -> LabelImg:
    """Return the objects that an instance segmenter finds block by block, each with one id.

    `map_labels` for networks such as StarDist and Cellpose: intensities are normalised by
    percentiles of the whole image, and the model is loaded once per process.

    Parameters
    ----------
    predict : callable, str or BlockSchema
        From arrays, halo included, to labels of the same size without the axis of channels, 0 for
        background; or to a tuple that begins with the labels, as StarDist and Cellpose return.
        Called as ``predict(*arrays, **params)``, or ``predict(model, *arrays, **params)`` where
        there is a ``load_model``. The arrays are its own, to be written to as well.
    *images : array-like or Input
        As in `map_labels`; channels may be one axis of an image, or several images.
    halo : int, per-axis ints, or per-axis (before, after) pairs
        Extra voxels that a block reads, in axes of the labels. Recommended: the extent of the
        largest object, plus how far the network looks. It may be left out for a schema that says
        it.
    load_model : callable or str, optional
        Makes the model, called without arguments before the first block, once in each process.
    normalize : (float, float), optional
        Percentiles, such as ``(1, 99.8)``, of the whole image, for each channel its own. Blocks
        are float32 then, with these at 0 and 1, as csbdeep's ``normalize`` gives. Default: blocks
        are as in the image.
    channel_axis : int, optional
        Axis of the images that labels lack. Every block has all of it.
    multiple_of : int or per-axis ints
        Blocks are mirrored at their ends up to a multiple of this, and the labels are cut again:
        for networks that need a certain size or at least one. With the size of a whole block,
        halo included, all blocks are of one shape.
    lock : bool, optional
        Whether there is one call at a time in a process. Default: if there is a ``load_model``.
    link, consecutive, boundary, fill_value, cell_shape, params, cache, queue, version
        As in `map_labels`.

    Returns
    -------
    LabelImg
        uint64. The first read computes the labels of all blocks.

    Raises
    ------
    InitError
        On reading, if ``load_model`` raises.
    ParameterError
        If ``params`` are not what ``predict`` takes.
    ResultError
        On reading, if ``predict`` returns labels of another shape or no integers.
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    An object is found as in the whole image if the block of a cell that has a part of it shows it
    whole, with all that the network looks at to find it. If it is larger than that, blocks may
    disagree on it; `LabelImg.cut_objects` lists the objects that reach the end of a block.

    A model is never sent to another process. Each process of a queue has one, in its own memory;
    on a GPU that several processes cannot share, use threads or a queue with one worker. A model
    may also be loaded by the ``init`` of a queue, under a name that ``predict`` uses.

    The percentiles depend on every voxel: after an edit of the image all blocks are outdated.

    Examples
    --------
    StarDist, with the ``stardist`` package and its weights installed::

        def load():
            from stardist.models import StarDist2D
            return StarDist2D.from_pretrained("2D_versatile_fluo")

        def predict(model, block):
            return model.predict_instances(block)

        labels = ci.segment(
            predict, image, load_model=load, normalize=(1, 99.8), halo=128, cell_shape=1024
        )

    A segmenter that needs no model:

    >>> import numpy as np
    >>> from scipy import ndimage
    >>> image = np.array([3, 9, 8, 9, 3, 2, 9, 9], "u1")
    >>> def predict(block):
    ...     return ndimage.label(block > 0.5)
    >>> labels = segment(predict, image, normalize=(0, 100), halo=3, cell_shape=3)
    >>> labels.num_objects()
    2
    """
    predict = as_function(predict)
    load_model = as_function(load_model)
    for what, function in (("predict", predict), ("load_model", load_model)):
        if not (callable(function) or (function is None and what == "load_model")):
            raise TypeError(f"{what} must be callable, got {type(function).__name__}")
    if not images:
        raise TypeError("segment needs at least one image")
    call = checked_call(
        predict,
        map(as_input, images),
        params,
        halo=halo,
        dtype_read=None if normalize is None else "float32",
        before=0 if load_model is None else 1,
    )
    if call.halo is None:
        raise TypeError("segment needs halo=…: blocks are linked by the voxels that both label")
    items = call.items
    plain = tuple(number for number, item in enumerate(items) if item.index_map is None)
    ndim = max((len(items[number].shape) for number in plain), default=0)
    dropped = () if channel_axis is None else as_axes(channel_axis, ndim, "channel_axis")
    multiples = as_ints(multiple_of, "multiple_of", ndim=ndim - len(dropped), minimum=1)
    limits: list[Any] = []
    if normalize is not None:
        for number, item in enumerate(items):
            own = [axis - ndim + len(item.shape) for axis in dropped]
            channels = own[0] if own and own[0] >= 0 and number in plain else None
            limits.extend(limits_of(item, normalize, channels, cache=cache, queue=queue))
    one_at_a_time = load_model is not None if lock is None else bool(lock)
    return map_labels(
        Segmenter(
            call.function,
            hold(load_model) if load_model is not None or one_at_a_time else None,
            load_model is not None,
            one_at_a_time,
            len(items),
            plain,
            dropped,
            multiples,
        ),
        *items,
        *limits,
        halo=call.halo,
        link=link,
        consecutive=consecutive,
        boundary=boundary,
        fill_value=fill_value,
        cell_shape=cell_shape,
        params=call.params,
        drop_axis=dropped,
        cache=cache,
        queue=queue,
        version=version,
    )


@dataclass(frozen=True)
class Segmenter(FunctionWrapper):
    """Gives blocks to a segmenter as it wants them, and takes its labels."""

    holder: Holder | None
    """Of its model and the lock."""
    has_model: bool
    one_at_a_time: bool
    num_images: int
    """So many of the arrays are blocks; what is to be 0 and 1 in each follows, if anything."""
    plain: tuple[int, ...]
    """Which of them follow the labels; others have a geometry of their own."""
    dropped: tuple[int, ...]
    """The axis of channels, if there is one, in the image with the most axes."""
    multiples: tuple[int, ...]
    """Of which extents of blocks are to be multiples."""

    def __call__(self, *arrays: NDArray[Any], **params: Any) -> NDArray[Any]:
        """Return the labels of a block."""
        given, limits = arrays[: self.num_images], arrays[self.num_images :]
        if limits:
            ends = zip(given, limits[::2], limits[1::2], strict=True)
            blocks = [scaled(array, low, high) for array, low, high in ends]
        else:
            blocks = [array.copy() for array in given]
        whole = np.broadcast_shapes(*(blocks[number].shape for number in self.plain))
        extents = [n for axis, n in enumerate(whole) if axis not in self.dropped]
        missing = [-n % step for n, step in zip(extents, self.multiples, strict=True)]
        if any(missing):
            for number in self.plain:
                blocks[number] = self._enlarged(blocks[number], missing, whole)
        model: tuple[Any, ...] = ()
        if self.has_model:
            assert self.holder is not None
            model = (self.holder.get(),)
        with self._turn():
            result = call(self.function, *model, *blocks, **params)
        labels = np.asarray(result[0] if isinstance(result, tuple) else result)
        padded = tuple(n + more for n, more in zip(extents, missing, strict=True))
        if labels.size == np.prod(padded) and _without_ones(labels.shape) == _without_ones(padded):
            # Cellpose squeezes its masks.
            labels = labels.reshape(padded)
        if labels.shape == padded:
            labels = labels[tuple(slice(0, n) for n in extents)]
        return labels

    def bound(self, bind: Callable[[Any], Any]) -> Self:
        """Return the same with other functions; see `Wrapper.bound`."""
        if self.has_model:
            assert self.holder is not None
            assert self.holder.make is not None
            pair = ModelFunction(self.holder.make, self.function)
            other = bind(pair)
            if other is not pair:
                # The model stays where it is made, in a process that does one thing at a time.
                return replace(
                    self, function=other, holder=None, has_model=False, one_at_a_time=False
                )
        return super().bound(bind)

    def _turn(self) -> Any:
        if self.one_at_a_time:
            assert self.holder is not None
            return self.holder.lock
        return nullcontext()

    def _enlarged(
        self, block: NDArray[Any], missing: list[int], whole: tuple[int, ...]
    ) -> NDArray[Any]:
        more = list(missing)
        for axis in self.dropped:
            more.insert(axis, 0)
        skip = len(whole) - block.ndim
        widths = [
            (0, 0 if extent == 1 != full else width)
            for extent, full, width in zip(block.shape, whole[skip:], more[skip:], strict=True)
        ]
        return np.pad(block, widths, mode="reflect")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(extent for extent in shape if extent != 1)
