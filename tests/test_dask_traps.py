"""Traps on the same ground in dask, each beside what this library does.

What is said of dask holds for the releases named by ``KNOWN`` and is checked with those only.
"""

from __future__ import annotations

import sys
import threading

import dask
import dask.array as da
import numpy as np
import pytest
import scipy.ndimage as ndi

import cellimg_dask as ci

PATIENCE_S = 30
KNOWN = dask.__version__.startswith("2026.8.") and not da.array_expr_enabled()


def same(block: np.ndarray) -> np.ndarray:
    return block


@pytest.mark.parametrize("boundary", ["none", "constant", "reflect", "symmetric", "edge", "wrap"])
def test_asymmetric_depth_works_only_with_boundary_none(boundary):
    image = np.arange(11)
    if KNOWN and boundary != "none":
        lazy = da.from_array(image, chunks=5)
        mode = {"constant": 0, "symmetric": "reflect", "edge": "nearest", "wrap": "periodic"}
        with pytest.raises(NotImplementedError, match="Asymmetric overlap"):
            da.map_overlap(
                same, lazy, depth={0: (1, 2)}, boundary=mode.get(boundary, boundary), dtype=int
            )

    # Three samples that lie at -1, 0 and 2 of each voxel.
    img = ci.map_cells(
        lambda a: a[:-3] + 10 * a[1:-2] + 100 * a[3:],
        image,
        dtype=int,
        halo=[(1, 2)],
        boundary="edge" if boundary == "none" else boundary,
        cell_shape=5,
    )
    padded = np.pad(image, (1, 2), mode="edge" if boundary == "none" else boundary)
    np.testing.assert_array_equal(img[:], padded[:-3] + 10 * padded[1:-2] + 100 * padded[3:])
    plain = ci.map_cells(same, image, dtype=int, halo=[(1, 2)], boundary=boundary, cell_shape=5)
    np.testing.assert_array_equal(plain[:], image)


def test_reflect_is_numpys_symmetric():
    seen: list[list[int]] = []

    def see(block: np.ndarray) -> np.ndarray:
        seen.append(block.tolist())
        return block

    image = np.arange(1, 5)
    if KNOWN:
        lazy = da.from_array(image, chunks=4)
        da.map_overlap(see, lazy, depth=2, boundary="reflect", meta=np.empty(0, int)).compute(
            scheduler="sync"
        )
        assert seen.pop() == np.pad(image, 2, mode="symmetric").tolist()
    for boundary in ("reflect", "symmetric"):
        ci.map_cells(see, image, dtype=int, halo=2, boundary=boundary)[:]
        assert seen.pop() == np.pad(image, 2, mode=boundary).tolist()
    # Names that only dask has are refused with NumPy's name for the thing.
    for theirs, ours in (("periodic", "wrap"), ("nearest", "edge")):
        with pytest.raises(ValueError, match=f"{theirs!r} of dask .* is {ours!r} here"):
            ci.map_cells(see, image, dtype=int, halo=2, boundary=theirs)
    assert not seen


def test_depth_2_on_chunks_5_5_1_silently_gives_chunks_5_4_2():
    image = np.arange(11)
    lazy = da.from_array(image, chunks=5)
    assert lazy.chunks == ((5, 5, 1),)
    if KNOWN:
        theirs = da.map_overlap(same, lazy, depth=2, boundary="none", meta=np.empty(0, int))
        assert theirs.chunks == ((5, 4, 2),)
    img = ci.map_cells(ndi.maximum_filter1d, lazy, dtype=int, halo=2, params={"size": 5})
    assert img.chunks == img.to_dask().chunks == ((5, 5, 1),)
    np.testing.assert_array_equal(img[:], ndi.maximum_filter1d(image, 5))
    np.testing.assert_array_equal(img.compute(), ndi.maximum_filter1d(image, 5))


@pytest.mark.parametrize("boundary", ["none", "constant", "reflect", "symmetric", "edge", "wrap"])
def test_a_depth_wider_than_the_array_is_a_value_error(boundary):
    image = np.arange(11)
    if KNOWN:
        lazy = da.from_array(image, chunks=5)
        with pytest.raises(ValueError, match="larger than your array"):
            da.map_overlap(same, lazy, depth=12, boundary="reflect", meta=np.empty(0, int))
    seen = []

    def see(block: np.ndarray) -> np.ndarray:
        seen.append(block.tolist())
        return block

    img = ci.map_cells(see, image, dtype=int, halo=26, boundary=boundary, cell_shape=20)
    np.testing.assert_array_equal(img[:], image)
    expected = image if boundary == "none" else np.pad(image, 26, mode=boundary)
    assert seen == [expected.tolist()]


def test_the_function_is_called_while_the_graph_is_built_on_arrays_of_size_0_and_1():
    image = np.arange(11)
    calls: list[tuple[int, ...]] = []

    def count(block: np.ndarray) -> np.ndarray:
        calls.append(block.shape)
        return block

    if KNOWN:
        da.map_overlap(count, da.from_array(image, chunks=5), depth=2, boundary="none")
        assert calls == [(0,), (1,)]
        calls.clear()

    for array in (image, da.from_array(image, chunks=5)):
        img = ci.map_cells(count, array, dtype=int, halo=2, cell_shape=5)
        lazy = (img.to_dask() + 1)[3:7].sum()
        repr(img), img._repr_html_(), repr(lazy), np.mean(img), img.dask, dask.optimize(img)
        assert not calls
        with pytest.raises(TypeError, match="give dtype"):
            ci.map_cells(count, array, halo=2)
        assert not calls, "nor is it tried out to learn its dtype"
        assert lazy.compute() == (image + 1)[3:7].sum()
        assert sorted(calls) == [(7,), (8,)]
        calls.clear()


def test_after_a_change_of_scale_the_trim_is_wrong_without_a_word():
    image = np.arange(12)
    if KNOWN:
        theirs = da.map_overlap(
            lambda a: a[::2],
            da.from_array(image, chunks=6),
            depth=2,
            boundary="none",
            meta=np.empty(0, int),
            chunks=((3, 3),),
        ).compute()
        assert theirs.tolist() == [0, 2, 8, 10]
    for factor in (2, 3, 5):
        for cell in (1, 2, 3, 7):
            for halo in (0, 1, 2, 5):
                img = ci.map_cells(
                    lambda a, step=factor: a[::step],
                    image,
                    dtype=int,
                    halo=halo,
                    cell_shape=cell,
                    shrink=factor,
                )
                np.testing.assert_array_equal(img[:], image[::factor])
                np.testing.assert_array_equal(img.compute(), image[::factor])


def test_after_a_change_of_axes_the_trim_is_wrong_without_a_word():
    image = np.arange(12)
    if KNOWN:
        theirs = da.map_overlap(
            lambda a: np.stack([a] * 8),
            da.from_array(image, chunks=6),
            depth=2,
            boundary="none",
            new_axis=0,
            chunks=((8,), (6, 6)),
            meta=np.empty((0, 0), int),
        )
        assert theirs.shape == (8, 8)
        assert theirs.compute().shape == (8, 12), "it says one thing and is another"
    img = ci.map_cells(
        lambda a: np.stack([a] * 8), image, dtype=int, halo=2, cell_shape=6, new_axis={0: 8}
    )
    assert img.shape == (8, 12)
    np.testing.assert_array_equal(img[...], np.stack([image] * 8))
    np.testing.assert_array_equal(img.compute(), np.stack([image] * 8))
    behind = ci.map_cells(
        lambda a: np.stack([a] * 8, -1), image, dtype=int, halo=2, cell_shape=6, new_axis={-1: 8}
    )
    assert behind.shape == (12, 8)
    np.testing.assert_array_equal(behind[...], np.stack([image] * 8, -1))

    volume = np.arange(4 * 12 * 5).reshape(4, 12, 5)
    maximum = ci.map_cells(
        lambda a: ndi.maximum_filter(a, (1, 3, 5)).max(axis=0),
        volume,
        dtype=int,
        halo=[0, 1, 2],
        cell_shape=3,
        drop_axis=0,
    )
    np.testing.assert_array_equal(maximum[...], ndi.maximum_filter(volume, (1, 3, 5)).max(axis=0))


def test_fusion_renames_keys_so_a_slice_after_a_compute_is_computed_again():
    image = np.arange(16)
    calls: list[int] = []

    def count(block: np.ndarray) -> np.ndarray:
        calls.append(1)
        return -block

    if KNOWN:
        theirs = da.map_blocks(
            count, da.from_array(image, chunks=4), dtype=int, meta=np.empty(0, int)
        )
        theirs.compute()
        theirs[5:7].compute()
        assert len(calls) == 4 + 1
        calls.clear()

    img = ci.map_cells(count, image, dtype=int, cell_shape=4)
    lazy = img.to_dask()
    np.testing.assert_array_equal(lazy.compute(), -image)
    assert len(calls) == 4
    np.testing.assert_array_equal(lazy[5:7].compute(), -image[5:7])
    np.testing.assert_array_equal((lazy + 1)[5:7].compute(), 1 - image[5:7])
    np.testing.assert_array_equal(lazy.rechunk(8)[::3].compute(), -image[::3])
    np.testing.assert_array_equal(
        img.to_dask().blocks[2].compute(optimize_graph=False), -image[8:12]
    )
    np.testing.assert_array_equal(img[:], -image)
    assert len(calls) == 4, "the cache sits inside the cell, where no name matters"


def test_4_concurrent_computes_of_one_block_are_4_loads_with_the_threaded_scheduler(pool, waiting):
    image = np.arange(16)
    if KNOWN:
        together = threading.Barrier(4)  # Broken unless four threads compute the same block.

        def meet(block: np.ndarray) -> np.ndarray:
            together.wait(PATIENCE_S)
            return -block

        theirs = da.map_blocks(
            meet, da.from_array(image, chunks=4), dtype=int, meta=np.empty(0, int)
        )[4:8]
        futures = [
            pool.submit(theirs.compute, scheduler="threads", num_workers=4) for _ in range(4)
        ]
        for future in futures:
            np.testing.assert_array_equal(future.result(PATIENCE_S), -image[4:8])

    go_on = threading.Event()
    calls: list[int] = []

    def slow(block: np.ndarray) -> np.ndarray:
        calls.append(1)
        assert go_on.wait(PATIENCE_S)
        return -block

    lazy = ci.map_cells(slow, image, dtype=int, cell_shape=4).to_dask()[4:8]
    futures = [pool.submit(lazy.compute, scheduler="threads", num_workers=4) for _ in range(4)]
    waiting(3)
    go_on.set()
    for future in futures:
        np.testing.assert_array_equal(future.result(PATIENCE_S), -image[4:8])
    assert len(calls) == 1


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_sys_exit_in_a_task_ends_the_worker(scheduler):
    """Under ``distributed`` it kills one worker after the other: KilledWorker."""
    img = ci.map_cells(lambda a: sys.exit(1), np.arange(8), dtype=int, cell_shape=4)
    with pytest.raises(ci.BlockError, match="SystemExit: 1"):
        img.to_dask().compute(scheduler=scheduler)
    with pytest.raises(ci.BlockError, match="SystemExit: 1"):
        (img.to_dask() + 1)[:3].compute(scheduler=scheduler)
