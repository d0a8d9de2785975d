"""Each flaw known of Lazyflow's graphs, requests and caches, once.

The names say what happens there; the tests show that here it does not.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi

import cellimg_dask as ci

PATIENCE_S = 20


def plus(a: np.ndarray, b: np.ndarray, factor: int = 1) -> np.ndarray:
    return a + factor * b


# ----------------------------------------------------------------------------- the graph


def test_ten_diamonds_give_1024_notifications_there():
    source = ci.Source(np.zeros(64, int), cell_shape=4)
    image: Any = source
    images = []
    for _ in range(10):
        left = ci.map_cells(
            ndi.maximum_filter1d, image, halo=[(1, 0)], dtype=int, params={"size": 1}
        )
        right = ci.map_cells(np.negative, image, dtype=int)
        image = ci.map_cells(plus, left, right, dtype=int)
        images += [left, right, image]
    image[:]
    told: Counter[int] = Counter()
    watches = [
        img.on_dirty(lambda change, number=number: told.update([number]))
        for number, img in enumerate(images)
    ]
    source[30] = 1
    assert len(watches) == 30
    assert told == dict.fromkeys(range(30), 1)


def test_a_diamond_is_set_up_twice_there_and_once_with_mixed_settings():
    """Whoever is told of a new parameter never sees one side of a diamond old and one new."""
    source = ci.map_cells(
        plus, np.ones(8, int), np.ones(8, int), dtype=int, cell_shape=4, params={"factor": 1}
    )
    left = ci.map_cells(np.negative, source)
    right = ci.map_cells(np.positive, source)
    both = ci.map_cells(plus, left, right, dtype=int)
    seen: list[tuple[str, list[int]]] = []
    watches = [
        img.on_dirty(
            lambda change, name=name: seen.append(
                (name, [int(each[0]) for each in (source, left, right, both)])
            )
        )
        for name, img in (("source", source), ("left", left), ("right", right), ("both", both))
    ]
    assert len(watches) == 4
    both[:]
    source.set_params(factor=4)
    assert seen == [(name, [5, -5, 5, 0]) for name in ("source", "left", "right", "both")]


def test_a_value_set_inside_a_computation_hangs_there(pool):
    source = ci.Source(np.zeros(8, int), cell_shape=4)

    def edits(block: np.ndarray) -> np.ndarray:
        source[0] += 1
        return block + 1

    image = ci.map_cells(edits, source, dtype=int)
    # It is computed from what there was when it was asked for, and is outdated at once.
    np.testing.assert_array_equal(pool.submit(lambda: image[:]).result(PATIENCE_S), 1)
    assert source[0] == 2
    np.testing.assert_array_equal(pool.submit(image.load, 0).result(PATIENCE_S), [3, 1, 1, 1])


def test_an_edit_in_a_block_that_waits_for_the_edit_is_told_and_hangs_nobody(pool):
    source = ci.Source(np.zeros(8, int), cell_shape=2)

    def edits(block: np.ndarray) -> np.ndarray:
        source[0] = 1
        return block

    image = ci.map_cells(edits, np.zeros(8, int), dtype=int, cell_shape=2)

    def edit_and_read() -> None:
        with source.edit() as array:
            array[1] = 5
            image[:]

    with pytest.raises(ci.CycleError, match="being edited"):
        pool.submit(edit_and_read).result(PATIENCE_S)
    np.testing.assert_array_equal(source[:], 0)
    source[1] = 5
    np.testing.assert_array_equal(source[:2], [0, 5])


def test_an_array_changed_in_place_and_set_again_computes_nothing_there():
    array = np.zeros(8, int)
    source = ci.Source(array, cell_shape=4)
    image = ci.map_cells(np.negative, source)
    image[:]
    with source.edit() as edit:
        np.add(edit, 1, out=edit)
    np.testing.assert_array_equal(image[:], -1)
    array[...] = 7
    with source.edit() as edit:
        edit[...] = array
    np.testing.assert_array_equal(image[:], -7)
    # What the source was made from, and what was written, are the user's again.
    array[...] = 9
    np.testing.assert_array_equal(source[:], 7)
    np.testing.assert_array_equal(image[:], -7)


def test_a_region_that_is_dirtied_while_it_is_computed_stays_stale_there(pool):
    source = ci.Source(np.zeros(8, int), cell_shape=4)
    begun, go_on = threading.Event(), threading.Event()

    def slow(block: np.ndarray) -> np.ndarray:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return -block

    image = ci.map_cells(slow, source, dtype=int)
    later = ci.map_cells(np.negative, image)
    reading = pool.submit(later.load, 0)
    assert begun.wait(PATIENCE_S)
    source[1] = 5
    go_on.set()
    # Who asked before gets what there was, and nobody gets that any more.
    np.testing.assert_array_equal(reading.result(PATIENCE_S), 0)
    np.testing.assert_array_equal(later.load(0), [0, 5, 0, 0])
    np.testing.assert_array_equal(image.load(0), [0, -5, 0, 0])


def test_a_frozen_cache_gives_zeros_and_one_bounding_box_there():
    source = ci.Source(np.arange(40), cell_shape=4)
    image = ci.map_cells(np.negative, source)
    image[:]
    image.freeze()
    told: list[set[int]] = []
    watch = image.on_dirty(lambda change: told.append(set(change.cells)))
    assert watch
    source[1] = 100
    source[38] = 100
    np.testing.assert_array_equal(image[:], -np.arange(40))
    image.thaw()
    assert told == [{0, 9}]
