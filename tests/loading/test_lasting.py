"""Computed cells outlive the process, and are never found after something changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import ndimage

import cellimg_dask as ci


@pytest.fixture
def kept(tmp_path: Path):
    """Shared cache with a disk behind it."""
    cache = ci.set_cache(64 << 20, disk=tmp_path / "cells")
    yield cache
    cache.disk = None


@pytest.fixture
def image() -> np.ndarray:
    return np.arange(64 * 48.0).reshape(64, 48)


class Counting:
    """Multiplies, and counts how often."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, block: np.ndarray) -> np.ndarray:
        calls.append(1)
        return block * self.factor


calls: list[int] = []


@pytest.fixture(autouse=True)
def _no_calls_yet():
    calls.clear()


def lazy(source: object, factor: float = 2.0, **how: object) -> ci.CellImg:
    return ci.map_cells(
        Counting(factor),
        source,
        **{"dtype": "f8", "cell_shape": 16, "halo": 1, "version": f"{factor}"} | how,
    )


def computed(make: Callable[[], ci.CellImg], expected: np.ndarray) -> int:
    """Read a whole image with nothing in memory; return how many cells were computed."""
    ci.get_cache().clear()
    calls.clear()
    np.testing.assert_array_equal(make()[...], expected)
    return len(calls)


def test_a_second_image_of_the_same_definition_computes_nothing(kept, image):
    assert computed(lambda: lazy(image), 2 * image) == 12
    assert computed(lambda: lazy(image), 2 * image) == 0
    assert computed(lambda: lazy(image.copy()), 2 * image) == 0


def test_exactly_the_cells_that_read_a_changed_voxel_are_computed(kept, image):
    computed(lambda: lazy(image), 2 * image)
    image[8, 8] = -1
    assert computed(lambda: lazy(image), 2 * image) == 1
    image[15, 15] = -1  # Read by four cells, because of the halo.
    assert computed(lambda: lazy(image), 2 * image) == 4


def test_another_parameter_function_or_version_is_another_cell(kept, image):
    assert computed(lambda: lazy(image), 2 * image) == 12
    assert computed(lambda: lazy(image, 3.0), 3 * image) == 12
    assert computed(lambda: lazy(image, version="two"), 2 * image) == 12
    assert computed(lambda: lazy(image, halo=2), 2 * image) == 12
    assert computed(lambda: lazy(image), 2 * image) == 0


def test_an_array_changed_without_notice_leaves_no_wrong_cell(kept, image):
    img = lazy(image)
    computed(lambda: img, 2 * image)
    before = image.copy()
    image += 1
    ci.get_cache().clear()
    np.testing.assert_array_equal(img[...], 2 * image)  # The same image object, and its keys.
    assert computed(lambda: lazy(before), 2 * before) == 0
    assert computed(lambda: lazy(image), 2 * image) == 0


def test_an_array_that_changes_during_the_computation_is_not_kept(kept, image):
    def spoil(block: np.ndarray) -> np.ndarray:
        result = block + 1
        image[0, 0] += 1
        return result

    img = ci.map_cells(spoil, image, dtype="f8", cell_shape=64, version="1")
    img[...]
    assert not list(kept.disk.folder.rglob("*.cell"))


def test_a_chain_is_found_without_asking_for_the_image_upstream(kept, image):
    def chain() -> ci.CellImg:
        return ci.map_cells(np.negative, lazy(image), cell_shape=16)

    assert computed(chain, -2 * image) == 12
    assert computed(chain, -2 * image) == 0
    image[0, 0] = 9
    assert computed(chain, -2 * image) == 1


def test_a_rewritten_chunk_of_a_store_is_noticed(kept, image, tmp_path):
    stored = zarr.create_array(tmp_path / "in.zarr", shape=image.shape, chunks=(16, 16), dtype="f8")
    stored[...] = image
    opened = lambda: lazy(zarr.open_array(tmp_path / "in.zarr", mode="r"), halo=0)  # noqa: E731
    assert computed(opened, 2 * image) == 12
    assert computed(opened, 2 * image) == 0
    stored[:16, :16] = image[:16, :16] = 5
    assert computed(opened, 2 * image) == 1


def test_a_damaged_file_is_computed_again(kept, image):
    computed(lambda: lazy(image), 2 * image)
    file = next(kept.disk.folder.rglob("*.cell"))
    file.write_bytes(file.read_bytes()[:-1])
    assert computed(lambda: lazy(image), 2 * image) == 1


def test_reads_past_the_memory_use_the_disk_too(kept, image):
    kept.resize(image.nbytes)  # So that the whole is more than half of it.
    assert computed(lambda: lazy(image), 2 * image) == 12
    assert computed(lambda: lazy(image), 2 * image) == 0


def test_what_cannot_be_compared_is_computed_and_said(kept, image):
    class Opaque:
        shape, dtype = image.shape, image.dtype

        def __getitem__(self, key: object) -> np.ndarray:
            return image[key]  # type: ignore[index]

    img = lazy(Opaque())
    np.testing.assert_array_equal(img[...], 2 * image)
    assert "on disk" in repr(img)
    assert "version=" in repr(img)
    assert computed(lambda: lazy(Opaque()), 2 * image) == 12
    versioned = lambda: lazy(ci.Input(Opaque(), version="1"))  # noqa: E731
    assert computed(versioned, 2 * image) == 12
    assert computed(versioned, 2 * image) == 0


def test_a_full_disk_warns_and_the_read_goes_on(kept, image, monkeypatch):
    def full(key: str, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.disk, "put", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        np.testing.assert_array_equal(lazy(image)[...], 2 * image)


def test_another_process_finds_what_this_one_computed(tmp_path):
    program = """
import sys
import numpy as np
import cellimg_dask as ci

def double(block):
    print("computed")
    return 2 * block

ci.set_cache(1 << 20, disk=sys.argv[1])
img = ci.map_cells(double, np.arange(100.0), dtype="f8", cell_shape=10, halo=1)
assert np.array_equal(img[...], 2 * np.arange(100.0))
"""

    def times(text: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", text, str(tmp_path / "cells")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.count("computed")

    assert times(program) == 10
    assert times(program) == 0
    assert times("# A line above.\n" + program) == 0
    edited = program.replace("return 2 * block", "return block + block")
    assert times(edited) == 10
    assert times(program) == 0


PROGRAM = """
import sys
from pathlib import Path

import numpy as np
import zarr
from scipy import ndimage

import cellimg_dask as ci
from filters import smooth

ci.set_cache(64 << 20, disk="cells")
image = ci.map_cells(
    smooth,
    zarr.open_array("in.zarr", mode="r"),
    halo=1,
    dtype="f8",
    cell_shape=16,
    params={"size": int(sys.argv[1]), "model": Path("model.bin")},
)
np.save(sys.argv[2], image[...])
"""

FILTERS = """
import os

from scipy import ndimage


def smooth(block, size, model):
    log()
    return WEIGHT * ndimage.uniform_filter(block, size) + len(model.read_bytes())


def log():
    descriptor = os.open("calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"x\\n")
    os.close(descriptor)


WEIGHT = 2
"""


def test_the_next_process_computes_what_an_edit_touched_and_nothing_else(
    tmp_path: Path, image: np.ndarray
) -> None:
    def begin(size: int = 3, out: str = "out") -> subprocess.Popen[bytes]:
        command = [sys.executable, "program.py", str(size), out]
        return subprocess.Popen(command, cwd=tmp_path)

    def calls_of(*processes: subprocess.Popen[bytes]) -> int:
        log = tmp_path / "calls"
        assert [process.wait(60) for process in processes] == [0] * len(processes)
        number = len(log.read_text().split()) if log.exists() else 0
        log.unlink(missing_ok=True)
        return number

    def whole(size: int = 3, weight: int = 2, model: int = 3) -> np.ndarray:
        return weight * ndimage.uniform_filter(array[...], size) + model

    array = zarr.create_array(tmp_path / "in.zarr", data=image, chunks=(16, 16))
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "filters.py").write_text(FILTERS)
    (tmp_path / "model.bin").write_bytes(b"abc")
    assert calls_of(begin()) == 12
    # Two at once, and nothing to do.
    assert calls_of(begin(), begin(out="other")) == 0
    for name in ("out", "other"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), whole())

    (damaged, *_) = sorted(path for path in (tmp_path / "cells").rglob("*") if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert calls_of(begin()) == 1

    array[20, 20] += 1000
    # Its chunk reaches, with the halo, into all the cells around it.
    assert calls_of(begin()) == 9
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), whole())

    assert calls_of(begin(size=1)) == 12
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), whole(size=1))

    (tmp_path / "filters.py").write_text(FILTERS.replace("WEIGHT = 2", "WEIGHT = 5"))
    assert calls_of(begin()) == 12
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), whole(weight=5))

    (tmp_path / "model.bin").write_bytes(b"abcd")
    # Two at once that have all to do: nothing is torn, nothing is wrong.
    assert 12 <= calls_of(begin(), begin(out="other")) <= 24
    for name in ("out", "other"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), whole(weight=5, model=4))
