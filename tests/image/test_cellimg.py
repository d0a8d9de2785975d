"""The lazy image itself: reading, looking, keeping, describing."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import scipy.ndimage as ndi
from numpy.typing import NDArray

import cellimg_dask as ci


@pytest.fixture
def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.random((40, 53))


def smooth(picture: np.ndarray, **kwargs: object) -> ci.CellImg:
    return ci.map_cells(
        ndi.median_filter,
        picture,
        halo=2,
        dtype="f8",
        cell_shape=(16, 20),
        params={"size": 5},
        **kwargs,
    )


def test_knows_what_an_array_knows(picture: np.ndarray) -> None:
    image = smooth(picture)
    assert (image.shape, image.ndim, image.size, len(image)) == ((40, 53), 2, 2120, 40)
    assert (image.dtype, image.nbytes) == (np.dtype("f8"), 2120 * 8)
    assert image.cell_shape == (16, 20)
    assert image.chunks == ((16, 16, 8), (20, 20, 13))


def test_a_region_computes_only_its_cells(picture: np.ndarray) -> None:
    image = smooth(picture)
    expected = ndi.median_filter(picture, 5)
    np.testing.assert_array_equal(image[3:9, 22:41], expected[3:9, 22:41])
    assert image.stats().loads == 2
    np.testing.assert_array_equal(image[-1], expected[-1])
    assert image.stats().loads == 5
    np.testing.assert_array_equal(image[ci.Roi((16, 20), (32, 40))], expected[16:32, 20:40])
    assert image[5, 6] == expected[5, 6]
    np.testing.assert_array_equal(image[..., 7], expected[:, 7])
    assert image[4:4].shape == (0, 53)


def test_a_region_is_the_callers_own(picture: np.ndarray) -> None:
    image = smooth(picture)
    first = image[0:16, 0:20]
    first[...] = 0
    np.testing.assert_array_equal(image[0:16, 0:20], ndi.median_filter(picture, 5)[:16, :20])


def test_load_and_peek(picture: np.ndarray) -> None:
    image = smooth(picture)
    assert image.peek(4) is None
    cell = image.load((1, 1))
    assert image.peek(4) is cell is image.load(4)
    assert not cell.flags.writeable
    np.testing.assert_array_equal(cell, ndi.median_filter(picture, 5)[16:32, 20:40])
    with pytest.raises(IndexError, match=r"9.*0\.\.8"):
        image.load(9)
    with pytest.raises(IndexError, match=r"-1.*0\.\.8"):
        image.peek(-1)


def test_prefetch_fills_the_cache(picture: np.ndarray) -> None:
    image = smooth(picture)
    assert image.prefetch(np.s_[0:16]).result(timeout=30) is None
    assert [image.peek(index) is not None for index in range(6)] == [True] * 3 + [False] * 3
    assert image.stats().loads == 3
    image.prefetch().result(timeout=30)
    assert image.stats().loads == 9


def test_prefetch_reports_a_failing_cell() -> None:
    def fail(array: np.ndarray) -> np.ndarray:
        raise OSError("gone")

    image = ci.map_cells(fail, np.zeros(4), dtype="f8", cell_shape=2)
    request = image.prefetch()
    with pytest.raises(OSError, match="gone"):
        request.result(timeout=30)
    assert isinstance(request.error, ci.BlockError)


def test_asarray(picture: np.ndarray) -> None:
    image = smooth(picture)
    expected = ndi.median_filter(picture, 5)
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert np.asarray(image, dtype="f4").dtype == "f4"
    with pytest.raises(ValueError, match="copy=False"):
        np.array(image, copy=False)


def test_read_into(picture: np.ndarray) -> None:
    image = smooth(picture)
    expected = ndi.median_filter(picture, 5)
    out = np.empty((40, 53))
    assert image.read_into(out) is out
    np.testing.assert_array_equal(out, expected)
    strided = np.zeros((80, 106))[::2, ::-2]
    image.read_into(strided)
    np.testing.assert_array_equal(strided, expected)
    swapped = np.empty((5, 53), ">f8")
    image.read_into(swapped, np.s_[5:10])
    np.testing.assert_array_equal(swapped, expected[5:10])
    for bad, message in (
        (np.empty((4, 4)), r"\(4, 4\).*\(40, 53\)"),
        (np.empty((40, 53), "f4"), "float32.*cannot hold float64"),
        (np.broadcast_to(np.zeros(1), (40, 53)), "read-only"),
    ):
        with pytest.raises(ValueError, match=message):
            image.read_into(bad)


def test_cache_none_keeps_nothing(picture: np.ndarray) -> None:
    image = smooth(picture, cache=None)
    before = ci.get_cache().bytes
    for _ in range(2):
        np.testing.assert_array_equal(image[:], ndi.median_filter(picture, 5))
    assert image.stats().loads == 18
    assert image.stats().bytes == 0
    assert ci.get_cache().bytes == before


def test_an_own_cache(picture: np.ndarray) -> None:
    mine = ci.CellCache(1 << 20)
    image = smooth(picture, cache=mine)
    image[:]
    assert mine.bytes == image.nbytes
    assert ci.get_cache().bytes == 0


def test_a_read_larger_than_the_cache_goes_past_it(picture: np.ndarray) -> None:
    image = smooth(picture, cache=ci.CellCache(picture.nbytes))
    kept = image.load(0)
    np.testing.assert_array_equal(image[:], ndi.median_filter(picture, 5))
    assert image.stats().bytes == kept.nbytes
    assert image.stats().loads == 9


def test_images_share_one_budget(picture: np.ndarray) -> None:
    ci.set_cache(3 * 16 * 20 * 8)
    one, two = smooth(picture), smooth(picture)
    for index in range(6):
        one.load(index), two.load(index)
        assert ci.get_cache().bytes <= 3 * 16 * 20 * 8
    assert one.stats().bytes + two.stats().bytes == ci.get_cache().bytes


def test_a_collected_image_leaves_the_cache(picture: np.ndarray) -> None:
    image = smooth(picture)
    image[:]
    assert ci.get_cache().bytes > 0
    del image
    assert ci.get_cache().stats().bytes == 0


def test_repr_says_what_matters(picture: np.ndarray) -> None:
    image = smooth(picture)
    image.load(0)
    text = repr(image)
    for part in (
        "(40, 53)",
        "float64",
        "9 of (16, 20)",
        "median_filter",
        "'size': 5",
        "2, none",
        "1 cells, 2.5 KiB",
    ):
        assert part in text, part
    html = image._repr_html_()
    assert html.count("<rect") == 9
    assert html.count("#f2b134") == 1
    assert "median_filter" in html


def test_repr_escapes(picture: np.ndarray) -> None:
    image = ci.map_cells(lambda a: a, picture, dtype="f8")
    assert "<lambda>" in repr(image)
    assert "<lambda>" not in image._repr_html_()


def test_pickles_without_its_cells(picture: np.ndarray) -> None:
    image = smooth(smooth(picture))
    image[:]
    copy = pickle.loads(pickle.dumps(image))
    assert copy.stats().bytes == 0
    np.testing.assert_array_equal(copy[:], image[:])


def test_eight_threads_compute_each_cell_once(picture: np.ndarray) -> None:
    image = smooth(smooth(picture))
    barrier = threading.Barrier(8)
    results = []

    def read() -> None:
        barrier.wait()
        results.append(image[:])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = ndi.median_filter(ndi.median_filter(picture, 5), 5)
    assert len(results) == 8
    for result in results:
        np.testing.assert_array_equal(result, expected)
    assert image.stats().loads == 9


def test_dtype_is_inferred_without_a_call() -> None:
    def halve(array: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise AssertionError("must not be called")

    assert ci.map_cells(halve, np.zeros(3, "u1")).dtype == np.float32
    assert ci.map_cells(np.add, np.zeros(3, "u1"), np.zeros(3, "i2")).dtype == np.int16
    assert ci.map_cells(np.isnan, np.zeros(3)).dtype == np.bool_

    def unknown(array: NDArray[np.floating]) -> NDArray[np.floating]:
        raise AssertionError("must not be called")

    for function in (unknown, lambda a: a):
        with pytest.raises(TypeError, match="give dtype="):
            ci.map_cells(function, np.zeros(3))


def test_iterating_an_image_reads_it_row_by_row(picture: np.ndarray) -> None:
    image = smooth(picture)
    for row, expected in zip(image, ndi.median_filter(picture, 5), strict=True):
        np.testing.assert_array_equal(row, expected)
