"""What all images of the process hold and have computed."""

from __future__ import annotations

import gc
import os
import pickle
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import zarr

import cellimg_dask as ci
from cellimg_dask.image.stats import ImageStats, StatsTable


def shifted(array, offset=0):
    return array + offset


def image_of(array, **kwargs) -> ci.CellImg:
    return ci.map_cells(shifted, array, **{"dtype": "f8", "cell_shape": 2} | kwargs)


@pytest.fixture(autouse=True)
def _no_images_of_others():
    gc.collect()
    names = [row.function for row in ci.stats()]
    assert not [name for name in names if name.startswith("shifted")]


HEAD = ["function", "shape", "cells", "cached", "dirty", "hits", "misses", "joins", "loads"]
HEAD += ["seconds", "bytes", "evictions", "errors"]


def own() -> list[ImageStats]:
    return [row for row in ci.stats() if row.function.startswith("shifted")]


def test_a_row_says_what_the_image_says():
    image = image_of(np.zeros((4, 6)), params={"offset": 1})
    image[:2]
    image[:2, :2]
    (row,) = own()
    counted = image.stats()
    assert (row.function, row.shape, row.cells) == ("shifted(offset=1)", (4, 6), 6)
    assert (row.cached, row.dirty) == (3, 0)
    assert (row.hits, row.misses, row.loads) == (1, 3, 3)
    for name in ("hits", "misses", "joins", "loads", "load_seconds", "bytes", "evictions"):
        assert getattr(row, name) == getattr(counted, name)
    assert row.bytes == 3 * 32


def test_errors_are_counted():
    def shifted_wrongly(array):
        raise ValueError

    image = ci.map_cells(shifted_wrongly, np.zeros(4), dtype="f8")
    for _ in range(2):
        with pytest.raises(ci.BlockError):
            image[...]
    (row,) = own()
    assert (row.errors, row.loads, row.misses) == (2, 0, 2)


def test_dirty_cells():
    source = ci.Source(np.zeros(8), cell_shape=2)
    image = image_of(source)
    image[...]
    source[3] = 1
    (row,) = own()
    assert (row.cached, row.dirty) == (3, 1)


def test_the_largest_come_first_and_the_total_is_the_sum():
    small, large = image_of(np.zeros(4)), image_of(np.zeros(40))
    middle = image_of(np.zeros(40))
    small[...], large[...], middle[:20]
    table = ci.stats()
    assert [row.bytes for row in table] == sorted((row.bytes for row in table), reverse=True)
    assert [row.bytes for row in own()] == [320, 160, 32]
    for name in ("cells", "cached", "loads", "bytes", "load_seconds"):
        assert getattr(table.total, name) == pytest.approx(sum(getattr(r, name) for r in table))
    assert table.total.bytes <= table.cache_bytes == ci.get_cache().bytes
    assert table.cache_max_bytes == ci.get_cache().max_bytes
    assert table[0] is next(iter(table))
    assert table[:2] == tuple(table)[:2]
    assert len(table) == len(list(table))


def test_images_that_are_gone_are_not_there():
    image = image_of(np.zeros(4))
    assert len(own()) == 1
    del image
    gc.collect()
    assert own() == []


def test_images_that_only_others_hold_are_there():
    image = image_of(image_of(image_of(np.zeros(4))))
    image[...]
    gc.collect()
    assert [row.loads for row in own()] == [2, 2, 2]


def test_an_image_and_its_snapshots_have_one_row():
    source = ci.Source(np.zeros(8), cell_shape=2)
    image = image_of(image_of(source))
    image[...]
    snapshots = [image.snapshot()]
    source[0] = 1
    snapshots.append(image.snapshot())
    snapshots[0][:2]
    image[:2]
    assert [(row.cached, row.dirty, row.bytes) for row in own()] == [(4, 0, 5 * 16)] * 2


def test_a_snapshot_whose_image_is_gone_has_its_rows():
    image = image_of(image_of(ci.Source(np.zeros(8), cell_shape=2)))
    image[...]
    snapshot = image.snapshot()
    del image
    gc.collect()
    assert [row.cached for row in own()] == [4, 4]
    assert snapshot.graph().nodes[-1].cached == 4


def test_an_unpickled_image_has_rows_of_its_own_upstream_as_well():
    image = image_of(image_of(np.zeros(8)))
    image[...]
    other = pickle.loads(pickle.dumps(image))
    other[:2]
    assert [row.loads for row in own()] == [4, 4, 1, 1]


def test_a_private_cache_is_not_the_shared_one():
    image = image_of(np.zeros(8), cache=ci.CellCache(1000))
    before = ci.stats().cache_bytes
    image[...]
    assert [row.bytes for row in own()] == [64]
    assert ci.stats().cache_bytes == before


def test_a_chain_of_a_thousand_images():
    image = image_of(np.zeros(2))
    for _ in range(999):
        image = image_of(image)
    assert len(own()) == 1000
    copy = pickle.loads(pickle.dumps(image_of(np.zeros(2))))
    assert len(own()) == 1001
    assert copy.shape == (2,)


def test_unsaved_bytes_of_sources(tmp_path):
    before = ci.stats().unsaved_bytes
    store = zarr.create_array(tmp_path / "mask.zarr", shape=(8, 8), chunks=(2, 2), dtype="u1")
    source = ci.Source(store, 4, save="later")
    source[0, 0] = 1
    source[7, 7] = 1
    table = ci.stats()
    assert table.unsaved_bytes == before + 32
    assert "not saved" in repr(table)
    source.close()
    assert ci.stats().unsaved_bytes == before


def row(name: str, **counts: float) -> ImageStats:
    zeros = dict.fromkeys([f for f in ImageStats.__slots__ if f not in ("function", "shape")], 0)
    return ImageStats(**{"function": name, "shape": (4, 6), **zeros, **counts})  # type: ignore[arg-type]


def test_the_text():
    rows = [row("small", loads=1), row("<large>", bytes=2048, loads=12345, load_seconds=1.5)]
    table = StatsTable(rows, 3 << 10, 1 << 20, 0)
    lines = repr(table).splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        HEAD,
        ["<large>", "(4, 6)", "0", "0", "0", "0", "0", "0", "12,345", "1.500", "2.0 KiB", "0", "0"],
        ["small", "(4, 6)", "0", "0", "0", "0", "0", "0", "1", "0.000", "0 bytes", "0", "0"],
        ["2 images", "0", "0", "0", "0", "0", "0", "12,346", "1.500", "2.0 KiB", "0", "0"],
        ["shared cache: 3.0 KiB of 1.0 MiB"],
    ]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_the_table_in_a_notebook():
    html = StatsTable([row("<large>", bytes=2048)], 0, 1 << 20, 512)._repr_html_()
    assert html.count("<tr>") == 3
    assert "&lt;large&gt;" in html
    assert "<large>" not in html
    assert "sources have 512 bytes that are not saved" in html


def test_of_very_many_images_the_largest_are_shown():
    table = StatsTable([row(f"number {n}", bytes=n) for n in range(200)], 0, 0, 0)
    lines = repr(table).splitlines()
    assert lines[1].startswith("number 199")
    assert lines[-3].startswith("… 150 more …")
    assert lines[-2].startswith("200 images")
    assert table._repr_html_().count("<tr>") == 53


def test_without_images():
    table = StatsTable([], 0, 1 << 20, 0)
    assert repr(table).splitlines()[1].startswith("0 images")
    assert table.total.loads == 0
    assert "0 images" in table._repr_html_()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_with_what_it_inherits():
    program = """
        import os
        import numpy as np
        import cellimg_dask as ci
        from cellimg_dask.loading.node import living_images

        image = ci.map_cells(np.negative, np.zeros(4), cell_shape=2)
        # As if another thread was just at it.
        living_images._lock.acquire()
        image[...]
        child = os.fork()
        if child == 0:
            another = ci.map_cells(np.negative, image)
            another[:2]
            print([(row.cached, row.loads) for row in ci.stats()], flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[(1, 3), (1, 1)]\n"
