"""Lazy images on a dask cluster of two processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import scipy.ndimage as ndi
import zarr

import cellimg_dask as ci

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client() -> Iterator[object]:
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
        distributed.Client(cluster) as connected,
    ):
        yield connected


class Logged:
    """A filter that leaves a line for each call in a file, whatever process it runs in."""

    def __init__(self, log: Path, size: int) -> None:
        self.log, self.size = log, size

    def __call__(self, block: ci.Block) -> None:
        # One write of a short line to a file opened for appending is atomic.
        line = f"{os.getpid()} {block.index}\n".encode()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        block.data[...] = ndi.median_filter(block.inputs[0], self.size)[block.halo]

    def cells(self) -> Counter[int]:
        return Counter(int(line.split()[1]) for line in self.log.read_text().splitlines())

    def processes(self) -> set[int]:
        return {int(line.split()[0]) for line in self.log.read_text().splitlines()}


def chain(source: object, folder: Path) -> tuple[ci.CellImg, ci.CellImg, Logged, Logged]:
    first, second = Logged(folder / "first", 3), Logged(folder / "second", 5)
    shape = source.shape  # type: ignore[attr-defined]
    below = ci.fill_cells(first, ci.CellGrid(shape, (8, 9, 10)), source, dtype="f4", halo=1)
    image = ci.fill_cells(second, ci.CellGrid(shape, (7, 12, 16)), below, dtype="f4", halo=2)
    return below, image, first, second


@pytest.fixture
def volume(rng: np.random.Generator) -> np.ndarray:
    return rng.random((20, 23, 31), dtype="f4")


@pytest.mark.parametrize("kind", ["numpy", "zarr", "dask"])
def test_each_cell_of_each_stage_is_computed_once(
    client: object, tmp_path: Path, volume: np.ndarray, kind: str
) -> None:
    source: object = volume
    if kind == "zarr":
        source = zarr.create_array(str(tmp_path / "a.zarr"), data=volume, chunks=(8, 8, 8))
    elif kind == "dask":
        source = da.from_array(volume, chunks=(6, 23, 11))
    below, image, first, second = chain(source, tmp_path)
    got = image.to_dask().compute()
    np.testing.assert_array_equal(got, ndi.median_filter(ndi.median_filter(volume, 3), 5))
    assert first.cells() == dict.fromkeys(range(below.grid.num_cells), 1)
    assert second.cells() == dict.fromkeys(range(image.grid.num_cells), 1)
    here = os.getpid()
    assert here not in first.processes() | second.processes()


def test_a_region_computes_only_what_it_needs_once(
    client: object, tmp_path: Path, volume: np.ndarray
) -> None:
    below, image, first, second = chain(volume, tmp_path)
    expected = ndi.median_filter(ndi.median_filter(volume, 3), 5)
    part = image.to_dask()[8:13, 0:11, 17:30].compute()
    np.testing.assert_array_equal(part, expected[8:13, 0:11, 17:30])
    roi = ci.Roi((8, 0, 17), (13, 11, 30))
    cells = list(image.grid.cells_in(roi))
    assert second.cells() == {cell.index: 1 for cell in cells}
    needed = {
        upper.index
        for cell in cells
        for upper in below.grid.cells_in(cell.roi.grow(ci.Halo.of(2, 3)))
    }
    assert first.cells() == dict.fromkeys(needed, 1)


def test_without_graph_optimisation_it_is_the_same(
    client: object, tmp_path: Path, volume: np.ndarray
) -> None:
    _, image, first, second = chain(volume, tmp_path)
    got = image.to_dask().compute(optimize_graph=False)
    np.testing.assert_array_equal(got, ndi.median_filter(ndi.median_filter(volume, 3), 5))
    assert set(first.cells().values()) == {1}
    assert set(second.cells().values()) == {1}


def test_the_image_as_a_collection(client: object, tmp_path: Path, volume: np.ndarray) -> None:
    _, image, _, second = chain(volume, tmp_path)
    future = client.compute(image)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        future.result(timeout=60), ndi.median_filter(ndi.median_filter(volume, 3), 5)
    )
    assert set(second.cells().values()) == {1}


def test_persisted_cells_are_not_computed_again(
    client: object, tmp_path: Path, volume: np.ndarray
) -> None:
    _, image, _, second = chain(volume, tmp_path)
    kept = image.persist()
    distributed.wait(kept)
    assert float(kept.mean().compute()) == pytest.approx(float(np.asarray(kept).mean()))
    assert set(second.cells().values()) == {1}


def test_a_failing_block_names_its_cell(client: object) -> None:
    def fail(array: np.ndarray) -> np.ndarray:
        raise LookupError("no model")

    image = ci.map_cells(fail, np.zeros((4, 4)), dtype="f8", cell_shape=2)
    with pytest.raises(ci.BlockError, match=r"fail at cell \(0, 1\) \[0:2, 2:4\].*no model") as got:
        image.to_dask()[0, 3].compute()
    assert got.value.position == (0, 1)
    assert isinstance(got.value.__cause__, LookupError)


def test_lambdas_and_code_reach_the_workers(client: object) -> None:
    doubled = ci.map_cells(lambda a: 2 * a, np.arange(12), dtype=int, cell_shape=5)
    code = ci.BlockCode("block.data[...] = add(block.inputs[0])", init="def add(a): return a + 1")
    image = ci.fill_cells(code, ci.CellGrid((12,), 4), doubled, dtype=int)
    np.testing.assert_array_equal(image.compute(), np.arange(12) * 2 + 1)
