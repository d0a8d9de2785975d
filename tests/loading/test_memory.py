"""What a run will take, in bytes, before it runs."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

import cellimg_dask as ci
from cellimg_dask.loading.memory import Room, project


def image(shape=(64, 64), cells=16, halo=0, dtype="f4", boundary="none", cache="shared"):
    return ci.map_cells(
        np.negative,
        np.zeros(shape, dtype),
        cell_shape=cells,
        halo=halo,
        boundary=boundary,
        dtype=dtype,
        cache=cache,
    )


def test_a_block_is_what_is_read_and_what_is_made():
    projected = project(image().loader, 3)
    assert projected.block == 2 * 16 * 16 * 4
    assert projected.worker == 2 * projected.block
    assert projected.total == 3 * projected.worker
    assert project(image().loader, 3, factor=5).worker == 5 * projected.block


def test_the_halo_is_that_of_a_cell_in_the_middle():
    assert project(image(halo=3).loader, 1).block == (22 * 22 + 16 * 16) * 4
    # Wider than the image: clipped, or filled up.
    assert project(image(halo=99).loader, 1).block == (64 * 64 + 16 * 16) * 4
    filled = project(image(halo=99, boundary="reflect").loader, 1)
    assert filled.block == ((16 + 198) ** 2 + 16 * 16) * 4


def test_all_inputs_and_their_dtypes_count():
    img = ci.map_cells(
        np.add, np.zeros((8, 8), "u1"), ci.Input(np.zeros((8, 8), "f8"), halo=1), cell_shape=4
    )
    # A cell of 4 by 4, in a corner of the image, where the second input has 5 by 5.
    assert project(img.loader, 1).block == 16 * 1 + 25 * 8 + 16 * 8


def test_small_images_and_none():
    assert project(image((3, 5)).loader, 1).block == 2 * 15 * 4
    assert project(image((0, 5)).loader, 4).total == 0
    assert project(image((), cells=()).loader, 1).block == 8


def test_caches_count_once_and_no_more_than_they_can_hold(tmp_path):
    stored = zarr.create_array(tmp_path / "in.zarr", shape=(64, 64), chunks=(8, 8), dtype="u2")
    cache = ci.CellCache(1 << 20)
    first = ci.map_cells(np.negative, stored, cell_shape=16, cache=cache)
    assert project(first.loader, 1).cache == stored.nbytes
    last = ci.map_cells(np.negative, first, cell_shape=16, cache=cache)
    assert project(last.loader, 1).cache == 2 * stored.nbytes
    cache.resize(1000)
    assert project(last.loader, 1).cache == 1000
    # A result that nobody keeps takes nothing.
    assert project(image().loader, 1).cache == 0


def test_what_cannot_fit_is_refused_with_numbers_before_anything_is_made(tmp_path):
    target = tmp_path / "out.zarr"
    img = image((512, 512), cells=256)
    need = project(img.loader, 4).total
    # While two wait for the disk, two others compute.
    with ci.BlockQueue(2) as queue:
        with pytest.raises(MemoryError) as refused:
            ci.run(img, target, queue=queue, max_memory=need - 1, progress=False)
        text = str(refused.value)
        assert f"{need >> 20} MiB: 4 threads × 1.0 MiB (a block of 0.5 MiB" in text
        assert "and 4 MiB are allowed" in text
        assert "smaller cells" in text
        assert not target.exists()
        assert ci.run(img, target, queue=queue, max_memory=need, progress=False).ok


@pytest.mark.parametrize("bad", [0, -1, 1.5])
def test_the_bound_is_a_positive_integer(tmp_path, bad):
    with pytest.raises((TypeError, ValueError), match="max_memory"):
        ci.run(image(), tmp_path / "out.zarr", max_memory=bad, progress=False)


def test_a_worker_of_a_cluster_has_its_own_limit_threads_and_cache(tmp_path):
    stored = zarr.create_array(tmp_path / "in.zarr", shape=(64, 64), chunks=(8, 8), dtype="u2")
    img = ci.map_cells(np.negative, stored, cell_shape=16, cache=ci.CellCache(1 << 20))
    blocks = project(img.loader, 3).total - stored.nbytes
    assert Room(3, blocks + stored.nbytes).has_room(img.loader)
    assert not Room(3, blocks + stored.nbytes - 1).has_room(img.loader)
    # Its cache is made smaller on the way.
    assert Room(3, blocks + 1000, 1000).has_room(img.loader)
    small = Room(3, blocks + 999, 1000, "a worker of the cluster")
    with pytest.raises(MemoryError, match=r"a worker of the cluster would take about .* 3 threads"):
        small.check(img.loader)
    small_too = Room(4, blocks + 1000, 1000)
    assert not small_too.has_room(img.loader)
