"""Segmenters by blocks against the same segmenter on the whole image."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import cloudpickle
import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import local_maxima
from skimage.segmentation import watershed
from support import same_objects

import cellimg_dask as ci
from cellimg_dask.ops import holders
from cellimg_dask.ops.holders import hold
from cellimg_dask.ops.normalize import normalize
from cellimg_dask.ops.segment import segment


def scaled_whole(image: NDArray[Any], low: float, high: float, axis: Any = None) -> NDArray[Any]:
    """Return what csbdeep's ``normalize`` gives for the whole image."""
    ends = [np.percentile(image, p, axis=axis, keepdims=True) for p in (low, high)]
    zero, one = (np.asarray(end).astype("f4") for end in ends)
    return (image.astype("f4") - zero) / (one - zero + np.float32(1e-20))


# ---------------------------------------------------------------- a classical segmenter

SIGMA = 1.5
REACH = int(4 * SIGMA + 0.5) + 1
"""How far it looks beyond what is above the level: the Gaussian, and a voxel of background."""


def cells_of(image: NDArray[Any], level: float) -> tuple[NDArray[Any], dict[str, Any]]:
    """Smooth, threshold, and cut what touches by its distance to the background.

    Maxima of rounded distances, plateaus as one, depend on nothing but what is connected above the
    level: each such clump is divided by itself. Only where the watershed has to choose between
    equal values, its order comes from the whole array; the intensity leaves no equal ones.
    """
    smooth = ndimage.gaussian_filter(image.astype(np.float32), SIGMA)
    mask = smooth > level
    distance = ndimage.distance_transform_edt(mask)
    peaks = local_maxima(np.round(distance / 2)) & mask
    markers, count = ndimage.label(peaks, np.ones((3,) * image.ndim))
    return watershed(-distance - smooth / 100, markers, mask=mask), {"count": count}


def halo_that_holds_all(image: NDArray[Any], level: float) -> list[int]:
    """Return a halo with which each block shows whole what it has a part of in its cell.

    A clump that has a voxel in the cell goes on for less than its extent beyond it.
    """
    mask = ndimage.gaussian_filter(image.astype(np.float32), SIGMA) > level
    clumps, _ = ndimage.label(mask, np.ones((3,) * image.ndim))
    extents = [[s.stop - s.start for s in box] for box in ndimage.find_objects(clumps)]
    return [int(most) - 1 + REACH for most in np.max(extents, axis=0)]


def nuclei(shape: tuple[int, ...], count: int, radius: float, seed: int = 0) -> NDArray[Any]:
    """Return a picture of round nuclei of many sizes, some of which touch, with noise."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape)
    for centre in rng.uniform(0, shape, (count, len(shape))):
        size = rng.uniform(0.6, 1) * radius
        start = np.maximum(np.floor(centre - radius), 0).astype(int)
        box = tuple(slice(a, int(c + radius) + 2) for a, c in zip(start, centre, strict=True))
        away = np.zeros(image[box].shape)
        for axis, (first, middle) in enumerate(zip(start, centre, strict=True)):
            along = np.arange(first, first + away.shape[axis]) - middle
            away += np.square(along).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        image[box] = np.maximum(image[box], rng.uniform(0.7, 1) * (away <= size**2))
    noisy = 20 + 180 * ndimage.gaussian_filter(image, 1) + rng.normal(0, 6, shape)
    return np.clip(noisy, 0, 255).astype("u1")


def photo(name: str) -> NDArray[Any]:
    image = np.asarray(iio.imread(files("skimage") / "data" / name))
    return image if image.ndim == 2 else image.max(-1)


def brain(folder: Path) -> NDArray[Any]:
    return np.asarray(tifffile.imread(folder / "brain_signal.tif"))[4:24, 180:280, 80:220]


FLAT = nuclei((150, 170), 90, 8)
DEEP = nuclei((30, 56, 60), 50, 6, seed=1)
PICTURES: dict[str, tuple[Callable[[Any], NDArray[Any]], float]] = {
    # Percentiles 1 and 99.8 are 0 and 1, and objects are above this level.
    "nuclei": (lambda _: FLAT, 0.35),
    "nuclei 3D": (lambda _: DEEP, 0.35),
    "cell": (lambda _: photo("cell.png"), 0.6),
    "coins": (lambda _: photo("coins.png"), 0.6),
    "galaxies": (lambda _: photo("hubble_deep_field.jpg")[:400, :500], 0.5),
    "brain": (brain, 0.45),
}
# Cells as parts of the image along its last axes.
GRIDS = [(0.5, 0.5), (0.34, 1.0), (1.0, 0.3), (0.45, 0.6), (0.7, 0.24)]


@pytest.mark.parametrize("name", PICTURES)
def test_blocks_that_show_whole_what_they_have_a_part_of_equal_the_whole(
    name: str, request: pytest.FixtureRequest
) -> None:
    read, level = PICTURES[name]
    image = read(request.getfixturevalue("shared_data") if name == "brain" else None)
    whole = scaled_whole(image, 1, 99.8)
    expected, details = cells_of(whole, level)
    assert details["count"] > (0 if name == "cell" else 15)
    halo = halo_that_holds_all(whole, level)
    for last in GRIDS:
        parts = (0.6,) * (image.ndim - 2) + last
        cells = [int(n * part) + 1 for n, part in zip(image.shape, parts, strict=True)]
        labels = segment(
            cells_of,
            image,
            halo=halo,
            normalize=(1, 99.8),
            params={"level": level},
            cell_shape=cells,
            cache=ci.CellCache(1 << 26),
        )
        assert same_objects(labels[...], expected), cells
        assert labels.num_objects() == details["count"], cells
        assert not labels.cut_objects().size, cells


@pytest.mark.parametrize(("image", "halo"), [(FLAT, 5), (FLAT, 9), (DEEP, 4), (DEEP, 7)])
def test_what_differs_where_the_halo_is_too_narrow_is_listed(
    image: NDArray[Any], halo: int
) -> None:
    whole, level = scaled_whole(image, 1, 99.8), 0.35
    expected, _ = cells_of(whole, level)
    labels = segment(
        cells_of,
        image,
        halo=halo,
        normalize=(1, 99.8),
        params={"level": level},
        cell_shape=(40,) * image.ndim,
    )
    found = labels[...]
    cut = labels.cut_objects()
    assert cut.size
    # What blocks cut, and what touches it, which the cut may have divided in another way.
    clumps, count = ndimage.label(
        ndimage.gaussian_filter(whole, SIGMA) > level, np.ones((3,) * image.ndim)
    )
    listed = np.zeros(count + 1, bool)
    listed[clumps[np.isin(found, cut)]] = True
    others = ~listed[clumps]
    assert same_objects(np.where(others, found, 0), np.where(others, expected, 0))
    assert not same_objects(found, expected)


# ---------------------------------------------------------------- normalisation


def test_percentiles_of_blocks_are_not_those_of_the_image() -> None:
    rng = np.random.default_rng(4)
    # On the left nothing but background; on the right nuclei, of which some are dark.
    image = np.hstack([np.full((96, 96), 20.0), nuclei((96, 96), 30, 7, seed=2)])
    image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype("u1")
    expected, details = cells_of(scaled_whole(image, 1, 99.8), 0.35)

    def by_itself(block: NDArray[Any], level: float) -> Any:
        return cells_of(scaled_whole(block, 1, 99.8), level)

    settings: dict[str, Any] = {"halo": 40, "cell_shape": 48, "params": {"level": 0.35}}
    found = segment(cells_of, image, normalize=(1, 99.8), **settings)
    assert same_objects(found[...], expected)
    assert not found[:, :80].any()
    assert found.num_objects() == details["count"]
    # The noise of an empty block becomes objects.
    local = segment(by_itself, image, **settings)
    assert np.unique(local[:, :80]).size > 5


@given(st.data())
@settings(max_examples=40)
def test_normalised_images_equal_the_whole(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.integers(1, (0, 60, 15, 8, 5)[ndim])) for _ in range(ndim))
    cells = tuple(data.draw(st.integers(1, 9)) for _ in range(ndim))
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "i2", ">u2", "i4", "u8", "f4", ">f4", "f8"])))
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from([0, 1, 3, 50, 99.8, 100])] * 2)))
    axis = data.draw(st.none() | st.integers(-ndim, ndim - 1))
    clip = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 1 << 16))
    values = np.random.default_rng(seed).integers(0, 300, shape)
    image = values.astype(dtype)
    if low == high:
        with pytest.raises(ValueError, match="lower one first"):
            normalize(image, low, high)
        return
    others = None if axis is None else tuple(a for a in range(ndim) if a != axis % ndim)
    with np.errstate(all="ignore"):
        expected = scaled_whole(image, low, high, others)
        found = normalize(image, low, high, channel_axis=axis, clip=clip, cell_shape=cells)[...]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.clip(expected, 0, 1) if clip else expected)


def test_an_image_of_one_value_becomes_zero() -> None:
    found = normalize(np.full((5, 6), 7, "u2"), cell_shape=4)[...]
    np.testing.assert_array_equal(found, np.zeros((5, 6), "f4"))


def test_percentiles_are_found_once_and_follow_edits() -> None:
    reads = []

    def noise(block: ci.Block) -> None:
        reads.append(block.index)
        block.data[...] = np.random.default_rng(block.index).random(block.shape)

    image = ci.fill_cells(noise, ci.CellGrid((40, 40), (10, 10)), dtype="f4")
    lazy = normalize(image)
    assert not reads
    np.testing.assert_array_equal(lazy[...], scaled_whole(image[...], 1, 99.8))
    assert sorted(reads) == list(range(16))

    source = ci.Source(np.arange(100, dtype="u1").reshape(10, 10), cell_shape=4)
    labels = segment(lambda block: block > 0.5, source, halo=1, normalize=(0, 100))
    np.testing.assert_array_equal(labels[...] > 0, source[...] > 49)
    source[0, 0] = 200
    assert (labels[...] > 0).sum() == 1


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_normalised_each_by_itself(axis: int) -> None:
    one, two = FLAT[:60, :70], FLAT[60:120, 80:150].astype("u2") * 9
    image = np.stack([one, two, one[::-1]], axis)
    others = tuple(a for a in range(3) if a != axis % 3)
    whole = scaled_whole(image, 1, 99, others)

    def predict(block: NDArray[Any]) -> Any:
        assert block.dtype == np.float32
        assert block.shape[axis] == 3
        return cells_of(np.moveaxis(block, axis, 0)[1], 0.4)

    expected, _ = predict(whole)
    labels = segment(
        predict, image, halo=48, normalize=(1, 99), channel_axis=axis, cell_shape=(30, 35)
    )
    assert labels.shape == (60, 70)
    assert same_objects(labels[...], expected)


def test_channels_may_be_several_images() -> None:
    nuclear, membrane = FLAT, FLAT[::-1].astype("f4") * 100
    whole = [scaled_whole(image, 1, 99) for image in (nuclear, membrane)]

    def predict(a: NDArray[Any], b: NDArray[Any]) -> Any:
        return cells_of(np.maximum(a, b), 0.6)

    halo = halo_that_holds_all(np.maximum(*whole), 0.6)
    labels = segment(predict, nuclear, membrane, halo=halo, normalize=(1, 99), cell_shape=70)
    assert same_objects(labels[...], predict(*whole)[0])


def test_an_image_of_another_geometry_is_given_as_it_is_mapped() -> None:
    weights = np.linspace(1, 2, FLAT.shape[0]).astype("f4")
    rows = ci.Input(weights, halo=[9], index_map=lambda roi: ci.Roi(roi.start[:1], roi.stop[:1]))

    def predict(block: NDArray[Any], weight: NDArray[Any]) -> Any:
        assert block.shape[0] % 4 == 0
        return ndimage.label(block[: weight.size] * weight[:, np.newaxis] > 100)[0]

    expected, _ = ndimage.label(FLAT * weights[:, np.newaxis] > 100)
    padded = ci.Input(FLAT, boundary="none")
    labels = segment(
        lambda block, weight: np.pad(
            predict(block, weight), [(0, block.shape[0] - weight.size), (0, 0)]
        ),
        padded,
        rows,
        halo=9,
        multiple_of=(4, 1),
        link="components",
        cell_shape=50,
    )
    assert same_objects(labels[...], expected)


# ---------------------------------------------------------------- blocks as networks want them


@given(st.data())
@settings(max_examples=60)
def test_blocks_have_the_size_that_is_asked_for(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.integers(1, 14)) for _ in range(ndim))
    cells = tuple(data.draw(st.integers(1, 8)) for _ in range(ndim))
    halo = data.draw(st.integers(1, 3))
    steps = tuple(data.draw(st.integers(1, 9)) for _ in range(ndim))
    boundary = data.draw(st.sampled_from(["none", "reflect", "constant"]))
    channels = data.draw(st.booleans())
    image = np.arange(1, np.prod(shape) + 1).reshape(shape)
    if channels:
        image = np.stack([image, -image], -1)

    def predict(block: NDArray[Any]) -> Any:
        extents = block.shape[:ndim]
        assert all(n % step == 0 for n, step in zip(extents, steps, strict=True))
        block += 1  # Its own.
        # What it is given is a part of the image, and what is beyond is mirrored.
        return (block[..., 0] if channels else block) - 1

    labels = segment(
        predict,
        image,
        halo=halo,
        multiple_of=steps,
        channel_axis=-1 if channels else None,
        boundary=boundary,
        cell_shape=cells,
    )
    expected = image[..., 0] if channels else image
    assert same_objects(labels[...], expected)


def test_all_blocks_are_of_one_shape_if_that_is_asked_for() -> None:
    shapes = set()

    def predict(block: NDArray[Any]) -> Any:
        shapes.add(block.shape)
        return ndimage.label(block)

    mask = np.random.default_rng(0).random((50, 61)) < 0.2
    labels = segment(predict, mask, halo=5, cell_shape=20, multiple_of=30, link="components")
    assert same_objects(labels[...], ndimage.label(mask)[0])
    assert shapes == {(30, 30)}


def test_labels_that_lost_an_axis_of_length_one_have_it_again() -> None:
    image = np.arange(1, 12).reshape(1, 11)
    labels = segment(lambda block: block.squeeze(), image, halo=[0, 2], cell_shape=(1, 4))
    assert same_objects(labels[...], image)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (lambda block: block[1:], "labels of shape"),
        (lambda block: (block / 2, {}), "expected integers"),
        (lambda block: None, "expected integers"),
        (lambda block: -block, "the label"),
    ],
)
def test_bad_results(result: Callable[..., Any], error: str) -> None:
    image = np.ones((8, 9), int)
    with pytest.raises(ci.ResultError, match=error):
        segment(result, image, halo=1, cell_shape=4)[...]


@pytest.mark.parametrize(
    ("change", "kind", "error"),
    [
        ({"predict": "stardist"}, ValueError, "'stardist' has no colon"),
        ({"predict": 1}, TypeError, "predict must be callable"),
        ({"load_model": "2D_versatile_fluo"}, ValueError, "fluo' has no colon"),
        ({"load_model": 1}, TypeError, "load_model must be callable"),
        ({"normalize": True}, TypeError, "two numbers"),
        ({"normalize": (99.8, 1)}, ValueError, "lower one first"),
        ({"normalize": (1, 101)}, ValueError, "from 0 to 100"),
        ({"channel_axis": 2}, ValueError, "channel_axis 2"),
        ({"multiple_of": 0}, ValueError, "multiple_of"),
        ({"halo": 0}, ValueError, "halo of at least 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], kind: type[Exception], error: str) -> None:
    arguments: dict[str, Any] = {"predict": cells_of, "halo": 2, "params": {"level": 1}}
    arguments |= {"cell_shape": 4} | change
    with pytest.raises(kind, match=error):
        segment(arguments.pop("predict"), np.zeros((8, 9)), **arguments)


def test_there_has_to_be_an_image() -> None:
    with pytest.raises(TypeError, match="at least one image"):
        segment(cells_of, halo=2)


# ---------------------------------------------------------------- models


class Network:
    """A model that holds what cannot be pickled, as networks do."""

    def __init__(self, level: float) -> None:
        self.level = level
        self.handle = threading.Lock()

    def predict_instances(self, block: NDArray[Any]) -> Any:
        return cells_of(block, self.level)


def load_network() -> Network:
    return Network(0.35)


def run_network(model: Network, block: NDArray[Any]) -> Any:
    return model.predict_instances(block)


SETTINGS: dict[str, Any] = {"halo": 30, "cell_shape": 50, "normalize": (1, 99.8)}


@pytest.mark.parametrize("backend", [None, "threads", "processes"])
def test_a_model_that_cannot_be_pickled_runs_everywhere(backend: str | None) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(load_network())
    expected = segment(cells_of, FLAT, params={"level": 0.35}, **SETTINGS)[...]
    if backend is None:
        labels = segment(run_network, FLAT, load_model=load_network, **SETTINGS)
        np.testing.assert_array_equal(labels[...], expected)
        np.testing.assert_array_equal(labels.to_dask().compute(scheduler="threads"), expected)
        return
    with ci.BlockQueue(2, backend=backend) as queue:
        labels = segment(run_network, FLAT, load_model=load_network, queue=queue, **SETTINGS)
        np.testing.assert_array_equal(labels[...], expected)


def test_a_model_may_be_what_init_left_on_the_worker() -> None:
    def init() -> dict[str, Any]:
        return {"model": load_network()}

    def predict(block: NDArray[Any]) -> Any:
        return model.predict_instances(block)  # type: ignore[name-defined]  # noqa: F821

    expected = segment(cells_of, FLAT, params={"level": 0.35}, **SETTINGS)[...]
    with ci.BlockQueue(2, init=init) as queue:
        labels = segment(predict, FLAT, queue=queue, **SETTINGS)
        np.testing.assert_array_equal(labels[...], expected)


def test_a_model_is_loaded_once_and_let_go_with_the_last_image() -> None:
    models: list[Any] = []

    def load() -> Network:
        model = Network(0.35)
        models.append(weakref.ref(model))
        return model

    first = segment(run_network, FLAT, load_model=load, cache=None, **SETTINGS)
    second = segment(run_network, FLAT[::-1], load_model=load, cache=None, **SETTINGS)
    assert not models
    first[...]
    second[...]
    assert len(models) == 1
    del first
    gc.collect()
    assert models[0]() is not None
    del second
    gc.collect()
    assert models[0]() is None
    ci.get_cache().clear()
    # Another function, another model: what was trained meanwhile is loaded.
    segment(run_network, FLAT, load_model=lambda: load(), cache=None, **SETTINGS)[...]
    assert len(models) == 2


@pytest.mark.parametrize("lock", [None, True, False])
def test_a_model_has_one_call_at_a_time_unless_it_bears_more(lock: bool | None) -> None:
    inside = threading.Semaphore(0)
    running = []
    most = []

    def predict(model: None, block: NDArray[Any]) -> NDArray[Any]:
        running.append(1)
        most.append(len(running))
        if lock is False and len(most) <= 2:
            # Both of them have to be here at the same time.
            inside.release()
            assert both.wait(60)
        running.pop()
        return np.ones(block.shape, int)

    both = threading.Event()

    def watch() -> None:
        for _ in range(2):
            assert inside.acquire(timeout=60)
        both.set()

    watcher = threading.Thread(target=watch)
    if lock is False:
        watcher.start()
    image = np.zeros((40, 40))
    with ci.BlockQueue(2) as queue:
        labels = segment(
            predict, image, load_model=lambda: None, lock=lock, halo=2, cell_shape=5, queue=queue
        )
        assert labels.num_objects() == 1
    if lock is False:
        watcher.join()
        assert max(most) == 2
    else:
        assert max(most) == 1


def test_a_model_that_cannot_be_loaded_is_an_error_and_tried_again() -> None:
    tries: list[int] = []

    def load() -> Network:
        tries.append(1)
        if len(tries) == 1:
            raise FileNotFoundError("no weights here")
        return Network(0.35)

    labels = segment(run_network, FLAT, load_model=load, halo=30, cell_shape=200)
    with pytest.raises(ci.InitError, match="load_model failed with FileNotFoundError: no weights"):
        labels[...]
    assert labels.num_objects() > 0
    assert len(tries) == 2


def test_what_is_held_stays_behind_when_it_is_sent() -> None:
    holder = hold(load_network)
    assert hold(load_network) is holder
    assert holder.get() is holder.get()
    sent = cloudpickle.dumps(holder)
    assert pickle.loads(sent) is holder
    token = holders._states[holder].token
    del holder
    gc.collect()
    assert token not in holders._holders
    # As in another process: the copies of all blocks share one, of the latest few.
    arrived = pickle.loads(sent)
    assert pickle.loads(sent) is arrived
    model = arrived.get()
    again = weakref.ref(arrived)
    del arrived
    gc.collect()
    assert pickle.loads(sent).get() is model
    for _ in range(holders._KEPT_ELSEWHERE):
        other = cloudpickle.dumps(hold(lambda: None))
        gc.collect()
        pickle.loads(other)
    gc.collect()
    assert again() is None
    holders._arrived.clear()


def test_a_run_is_carried_on_with_the_same_model(tmp_path: Path) -> None:
    def define() -> ci.LabelImg:
        # New functions of the same content, as in a script that is started again.
        def load() -> Network:
            return Network(0.35)

        cache = ci.CellCache(1 << 26)
        return segment(run_network, FLAT, load_model=load, cache=cache, **SETTINGS)

    target = tmp_path / "blocks.zarr"
    labels = define()
    report = ci.run(labels.blocks, target, progress=False)
    assert report.computed == labels.grid.num_cells
    again = define()
    report = ci.run(again.blocks, target, progress=False)
    assert (report.computed, report.skipped) == (0, again.grid.num_cells)
    stored = ci.stitch(zarr.open_array(target), again.grid, SETTINGS["halo"])
    np.testing.assert_array_equal(stored[...], labels[...])
