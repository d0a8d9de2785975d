"""Each bug and oddity known of the original (imglib2-cache-python and imglib2-cache), once.

The names say what the original does; the tests show that here it is right, or refused. Its disk
tier and the closing of its queue have no counterpart yet.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import dask.array as da
import numpy as np
import pytest

import cellimg_dask as ci

PATIENCE_S = 30


# ------------------------------------------------------------------------------------- grid


def test_an_image_of_no_voxels_has_one_empty_cell_in_the_original():
    grid = ci.CellGrid((0,), (4,))
    assert grid.num_cells == 0
    calls: list[int] = []
    img = ci.fill_cells(lambda block: calls.append(1), grid, dtype="u1")
    assert img[:].shape == (0,)
    assert np.asarray(img).shape == (0,)
    assert img.compute().shape == (0,)
    assert not calls
    with pytest.raises(IndexError, match="no cells"):
        img.load(0)


def test_a_cell_size_of_0_raises_there_and_here():
    with pytest.raises(ValueError, match=r"cell_shape\[1\] must be at least 1, got 0"):
        ci.CellGrid((4, 4), (2, 0))


def test_a_cell_larger_than_the_image_is_one_truncated_cell_there_and_here():
    grid = ci.CellGrid((3, 5), (10, 20))
    assert grid.num_cells == 1
    assert grid.cell(0).shape == (3, 5)
    shapes: list[tuple[int, ...]] = []

    def fill(block: ci.Block) -> None:
        shapes.append(block.data.shape)
        block.data[...] = 1

    np.testing.assert_array_equal(ci.fill_cells(fill, grid, dtype="u1")[...], np.ones((3, 5)))
    assert shapes == [(3, 5)]


@pytest.mark.parametrize("dim", range(1, 20))
@pytest.mark.parametrize("cell", [1, 2, 3, 7, 30])
def test_the_number_of_cells_and_the_truncation_at_the_high_edge_are_the_originals(dim, cell):
    grid = ci.CellGrid((dim,), (cell,))
    assert grid.num_cells == (dim - 1) // cell + 1
    assert [grid.cell(n).shape[0] for n in range(grid.num_cells)] == [
        min(cell, dim - n * cell) for n in range(grid.num_cells)
    ]


def test_the_flat_index_with_x_fastest_is_the_c_order_index_here():
    dims, cell = (7, 5, 9), (2, 3, 4)  # x first, as the original writes them.
    grid = ci.CellGrid(dims[::-1], cell[::-1])
    count = [(d - 1) // c + 1 for d, c in zip(dims, cell, strict=True)]
    for x in range(count[0]):
        for y in range(count[1]):
            for z in range(count[2]):
                there = x + count[0] * (y + count[1] * z)
                assert grid.index((z, y, x)) == there


# ------------------------------------------------------------------------------------- halo


@pytest.mark.parametrize("boundary", ["none", "edge"])
@pytest.mark.parametrize("halo", [0, [(2, 0)], [(0, 2)], [(1, 3)]])
def test_a_halo_of_width_0_at_the_high_side_crops_everything_away(halo, boundary):
    """There ``block.halo`` is ``slice(lower, -0)``, which is empty: the image is silently 0."""
    image = np.arange(1, 11)

    def fill(block: ci.Block) -> None:
        assert all(part.step is None and part.stop >= 0 for part in block.halo)
        block.data[...] = block.inputs[0][block.halo]

    img = ci.fill_cells(fill, ci.CellGrid((10,), 3), image, dtype=int, halo=halo, boundary=boundary)
    np.testing.assert_array_equal(img[:], image)


def test_block_halo_may_be_used_from_code_where_there_is_no_halo():
    image = np.arange(12.0).reshape(3, 4)
    code = ci.BlockCode("block.data[...] = block.inputs[0][block.halo] + 1")
    img = ci.fill_cells(code, ci.CellGrid((3, 4), 2), image, dtype=float)
    np.testing.assert_array_equal(img[...], image + 1)


def test_lengths_and_signs_of_a_halo_are_not_checked():
    image = np.zeros((4, 4))
    with pytest.raises(ValueError, match="halo must have one value for each of 2 axes"):
        ci.map_cells(np.negative, image, halo=[1])
    with pytest.raises(ValueError, match=r"halo\[1\]"):
        ci.map_cells(np.negative, image, halo=[1, -1])
    with pytest.raises(ValueError, match="same length"):
        ci.Halo((1, 1), (1,))
    with pytest.raises(TypeError, match="integer"):
        ci.map_cells(np.negative, image, halo=1.5)


def test_min_max_and_dim_leave_the_halo_out_in_numpy_order():
    seen = {}

    def fill(block: ci.Block) -> None:
        seen[block.index] = (block.min, block.max, block.dim, block.inputs[0].shape)

    image = np.zeros((5, 7))
    ci.fill_cells(
        fill, ci.CellGrid((5, 7), (3, 4)), image, dtype=int, halo=[(1, 2), 1], boundary="constant"
    )[...]
    assert seen == {
        0: ((0, 0), (2, 3), (3, 4), (6, 6)),
        1: ((0, 4), (2, 6), (3, 3), (6, 5)),
        2: ((3, 0), (4, 3), (2, 4), (5, 6)),
        3: ((3, 4), (4, 6), (2, 3), (5, 5)),
    }


def test_block_min_is_not_a_tuple():
    kinds = []

    def fill(block: ci.Block) -> None:
        for value in (block.min, block.max, block.dim, block.position, block.shape):
            kinds.append((type(value), {type(number) for number in value}))
        kinds.append((type(block.index), {int}))
        kinds.append((type(block.halo), {int}))
        block.data[tuple(0 for _ in block.min)] = 1

    ci.fill_cells(fill, ci.CellGrid((2, 2), 2), dtype="u1")[...]
    assert kinds == [(tuple, {int})] * 5 + [(int, {int}), (tuple, {int})]


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [
        ("constant", [0, 0, 1, 2, 3, 4, 0, 0, 0]),
        ("reflect", [3, 2, 1, 2, 3, 4, 3, 2, 1]),
        ("symmetric", [2, 1, 1, 2, 3, 4, 4, 3, 2]),
        ("edge", [1, 1, 1, 2, 3, 4, 4, 4, 4]),
        ("wrap", [3, 4, 1, 2, 3, 4, 1, 2, 3]),
    ],
)
def test_what_lies_beyond_the_border_is_what_the_originals_views_give(boundary, expected):
    """Zero, MirrorSingle, MirrorDouble, Border and Periodic of [1, 2, 3, 4] with halo (2, 3)."""
    seen = []

    def fill(block: ci.Block) -> None:
        seen.append(block.inputs[0].tolist())

    ci.fill_cells(
        fill, ci.CellGrid((4,), 4), np.arange(1, 5), dtype=int, halo=[(2, 3)], boundary=boundary
    )[...]
    assert seen == [expected]


# --------------------------------------------------------------------------------- alignment


def _by_blocks(image: np.ndarray, upstream: int, block: int, halo: int) -> np.ndarray:
    """Sum of each voxel's neighbourhood, through an image of cells of another size."""
    cells = ci.map_cells(lambda a: a.copy(), image, dtype=image.dtype, cell_shape=upstream)

    def fill(b: ci.Block) -> None:
        padded = b.inputs[0]
        out = np.zeros(b.shape, image.dtype)
        for offset in np.ndindex(*(2 * halo + 1,) * image.ndim):
            out += padded[tuple(slice(o, o + n) for o, n in zip(offset, b.shape, strict=True))]
        b.data[...] = out

    grid = ci.CellGrid(image.shape, block)
    return ci.fill_cells(fill, grid, cells, dtype=image.dtype, halo=halo, boundary="constant")[...]


def _whole(image: np.ndarray, halo: int) -> np.ndarray:
    padded = np.pad(image, halo)
    return sum(  # type: ignore[return-value]
        padded[tuple(slice(o, o + n) for o, n in zip(offset, image.shape, strict=True))]
        for offset in np.ndindex(*(2 * halo + 1,) * image.ndim)
    )


@pytest.mark.parametrize(
    ("upstream", "block", "halo"),
    [(3, 6, 0), (3, 3, 3), (3, 6, 3), (4, 3, 1), (5, 2, 0), (2, 7, 4)],
    ids=lambda value: str(value),
)
def test_blocks_that_do_not_coincide_with_the_cells_of_their_input_are_misread(
    upstream, block, halo
):
    """There a block of 6 over cells of 3 is wrong, and a halo of 3 over cells of 3."""
    image = np.arange(11 * 13).reshape(11, 13)
    np.testing.assert_array_equal(_by_blocks(image, upstream, block, halo), _whole(image, halo))


def test_an_output_grid_that_ends_beyond_a_truncated_cell_is_misread():
    """The last cell of the input has 1 voxel; an output cell takes it and five others."""
    image = np.arange(10)
    cells = ci.map_cells(lambda a: a.copy(), image, dtype=int, cell_shape=3)
    assert cells.grid.cell(3).shape == (1,)
    img = ci.map_cells(np.negative, cells, cell_shape=6)
    np.testing.assert_array_equal(img[:], -image)
    # An output larger than its input is refused, unless it is said how the two relate.
    grid = ci.CellGrid((12,), 6)
    with pytest.raises(ValueError, match=r"expected \(12,\)"):
        ci.fill_cells(lambda block: None, grid, cells, dtype=int)

    def fill(block: ci.Block) -> None:
        block.data[...] = block.inputs[0]

    same = ci.Input(cells, index_map=lambda roi: roi, boundary="constant", fill_value=-1)
    beyond = ci.fill_cells(fill, grid, same, dtype=int)
    np.testing.assert_array_equal(beyond[:], [*range(10), -1, -1])


# ------------------------------------------------------------------------------------ inputs


def test_inputs_are_writable_so_a_block_can_corrupt_what_is_upstream():
    image = np.arange(8)
    upstream = ci.map_cells(lambda a: a.copy(), image, dtype=int, cell_shape=4)

    def spoil(block: np.ndarray) -> np.ndarray:
        block[...] = 0
        return block

    for source in (image, upstream, da.from_array(image, chunks=4)):
        for halo, boundary in ((0, "none"), (1, "none"), (1, "wrap")):
            img = ci.map_cells(spoil, source, dtype=int, cell_shape=4, halo=halo, boundary=boundary)
            with pytest.raises(ci.BlockError, match="read-only"):
                img[:]
    np.testing.assert_array_equal(image, np.arange(8))
    np.testing.assert_array_equal(upstream[:], np.arange(8))
    assert image.flags.writeable, "only the views are locked"


def test_what_a_block_returns_is_not_tied_to_its_input():
    """There a block that coincides with a cell shares its memory."""
    image = np.arange(8)
    img = ci.map_cells(lambda a: a, image, dtype=int, cell_shape=4)
    before = img[:]
    image[:] = 0
    np.testing.assert_array_equal(img[:], before)


@pytest.mark.parametrize(
    "name", [">u2", ">i4", ">f8", "<u2", "u1", "u2", "u4", "u8", "?", "c8", "c16", "f2"]
)
def test_arrays_arrive_big_endian_unsigned_as_signed_and_bool_and_complex_fail(name):
    dtype = np.dtype(name)
    rng = np.random.default_rng(3)
    if dtype.kind == "u":
        # Half of the values would be negative if they were taken for signed ones.
        image = rng.integers(0, np.iinfo(dtype).max, (6, 5), dtype.newbyteorder("="), True)
    elif dtype.kind == "c":
        image = rng.random((6, 5)) + 1j * rng.random((6, 5))
    else:
        image = rng.integers(0, 2, (6, 5))
    image = image.astype(dtype)
    native = dtype.newbyteorder("=")
    seen = set()

    def fill(block: ci.Block) -> None:
        for array in (block.data, block.inputs[0]):
            seen.add((array.dtype, array.dtype.isnative))
        block.data[...] = block.inputs[0][block.halo]

    img = ci.fill_cells(fill, ci.CellGrid((6, 5), 4), image, dtype=dtype, halo=1)
    result = img[...]
    assert seen == {(native, True)}
    assert result.dtype == native
    np.testing.assert_array_equal(result, image)


def test_inputs_of_any_number_dtype_and_ndim_need_no_generator():
    volume = np.arange(24, dtype="u1").reshape(2, 3, 4)
    plane = np.arange(12, dtype="f4").reshape(3, 4)
    line = np.arange(4, dtype="i8")
    scalar = np.array(5, dtype="u2")
    table = np.arange(2, dtype="f8")
    seen = set()

    def fill(block: ci.Block) -> None:
        a, b, c, d, e = block.inputs
        seen.add((a.dtype.str, b.dtype.str, c.dtype.str, d.dtype.str, e.dtype.str))
        block.data[...] = a + b + c + d + e[:, None, None]

    first_axis = ci.Input(table, index_map=lambda roi: ci.Roi(roi.start[:1], roi.stop[:1]))
    img = ci.fill_cells(
        fill,
        ci.CellGrid((2, 3, 4), (1, 2, 3)),
        volume,
        plane,
        line,
        scalar,
        first_axis,
        dtype=float,
    )
    np.testing.assert_array_equal(img[...], volume + plane + line + scalar + table[:, None, None])
    assert len(seen) == 1


def test_dask_arrays_cannot_be_wrapped():
    image = np.arange(40.0).reshape(5, 8)
    lazy = da.from_array(image, chunks=(2, 3)) + 1
    img = ci.map_cells(np.negative, lazy, halo=1, cell_shape=3)
    np.testing.assert_array_equal(img[...], -(image + 1))


# ------------------------------------------------------------------------------ user's errors


def test_an_exception_is_printed_and_the_partial_cell_cached_and_never_retried(capfd):
    calls: list[int] = []
    broken = [True]

    def fill(block: ci.Block) -> None:
        calls.append(block.index)
        block.data[:2] = 9
        if broken[0] and block.index == 1:
            raise ZeroDivisionError("in the middle")
        block.data[2:] = 9

    img = ci.fill_cells(fill, ci.CellGrid((12,), 4), dtype="u1")
    for _ in range(2):
        with pytest.raises(ci.BlockError, match="in the middle") as caught:
            img.load(1)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert (caught.value.position, caught.value.roi) == ((1,), ci.Roi((4,), (8,)))
        assert "fill" in caught.value.function
        assert img.peek(1) is None
    assert calls == [1, 1], "each request tries once"
    with pytest.raises(ci.BlockError):
        img[:]
    broken[0] = False
    np.testing.assert_array_equal(img[:], np.full(12, 9))
    assert capfd.readouterr() == ("", "")


def test_a_failing_load_is_retried_without_bound():
    calls: list[int] = []

    def f(block: np.ndarray) -> np.ndarray:
        calls.append(1)
        raise LookupError

    img = ci.map_cells(f, np.arange(4), dtype=int, cell_shape=4)
    for attempt in range(1, 4):
        with pytest.raises(ci.BlockError):
            img[:]
        assert len(calls) == attempt


def test_of_those_who_wait_for_a_failed_load_each_retries_one_after_the_other(pool, waiting):
    calls: list[int] = []
    go_on = threading.Event()

    def f(block: np.ndarray) -> np.ndarray:
        calls.append(1)
        assert go_on.wait(PATIENCE_S)
        raise LookupError("broken")

    img = ci.map_cells(f, np.arange(4), dtype=int, cell_shape=4)
    futures = [pool.submit(img.load, 0) for _ in range(4)]
    waiting(3)
    go_on.set()
    errors = [future.exception(PATIENCE_S) for future in futures]
    assert len(calls) == 1
    assert {type(error) for error in errors} == {ci.BlockError}
    assert len({id(error) for error in errors}) == 4


def test_sys_exit_in_a_block_kills_the_whole_process():
    def fill(block: ci.Block) -> None:
        sys.exit(3)

    grid = ci.CellGrid((4,), 2)
    code = ci.BlockCode("import sys; sys.exit(3)")
    for f in (fill, code):
        img = ci.fill_cells(f, grid, dtype="u1")
        with pytest.raises(ci.BlockError, match="SystemExit: 3") as caught:
            img[:]
        assert isinstance(caught.value.__cause__, SystemExit)
        with pytest.raises(ci.BlockError, match="SystemExit: 3"):
            img.compute(scheduler="threads")
    img = ci.map_cells(sys.exit, np.arange(4), dtype=int, cell_shape=2)
    with pytest.raises(ci.BlockError, match="SystemExit"):
        img[:]


def test_a_process_goes_on_after_sys_exit_in_a_block():
    program = """
import numpy as np, sys
import cellimg_dask as ci

img = ci.map_cells(lambda a: sys.exit(3), np.arange(8), dtype=int, cell_shape=2)
try:
    img[:]
except ci.BlockError:
    print("goes on")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "goes on\n", "")


def test_an_error_in_init_leaks_the_workers_that_were_started_before():
    ran: list[int] = []
    code = ci.BlockCode("ran.append(block.index)", init="raise LookupError('no model')")
    img = ci.fill_cells(code, ci.CellGrid((8,), 2), dtype="u1", params={"ran": ran})
    before = set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(ci.InitError, match="no model") as caught:
            img[:]
        assert isinstance(caught.value.__cause__, LookupError)
    assert not ran, "no block ran uninitialised"
    assert img.stats().bytes == 0
    new = [thread for thread in threading.enumerate() if thread not in before]
    assert all(thread.name.startswith("cellimg") for thread in new), "only the shared crew"


def test_globals_of_a_worker_persist_from_block_to_block_there_and_here():
    code = ci.BlockCode("count += 1; block.data[...] = count", init="count = 100")
    img = ci.fill_cells(code, ci.CellGrid((6,), 2), dtype=int)
    assert [int(img.load(index)[0]) for index in (2, 0, 1)] == [101, 102, 103]
    # Other code has other globals.
    other = ci.BlockCode("block.data[...] = 'count' in globals()")
    assert not ci.fill_cells(other, ci.CellGrid((2,), 2), dtype=bool)[:].any()


# -------------------------------------------------------------------------------------- cache


def test_bounds_count_cells_per_image():
    cache = ci.CellCache(1000)
    small = ci.map_cells(
        lambda a: a.copy(), np.zeros(400, "u1"), dtype="u1", cell_shape=10, cache=cache
    )
    large = ci.map_cells(
        lambda a: a.copy(), np.zeros(4000, "u1"), dtype="u1", cell_shape=400, cache=cache
    )
    for img in (small, large):
        for index in range(img.grid.num_cells):
            img.load(index)
            assert cache.bytes <= 1000
    assert small.stats().bytes + large.stats().bytes == cache.bytes
    assert small.stats().evictions + large.stats().evictions > 0


def test_unbounded_caches_and_buffers_that_nobody_counts_run_out_of_memory():
    """A small view does not keep the large array alive whose bytes are not counted."""
    alive: list[weakref.ref[np.ndarray]] = []

    def f(block: np.ndarray) -> np.ndarray:
        large = np.zeros(100_000)
        alive.append(weakref.ref(large))
        return large[: block.size]

    cache = ci.CellCache(1 << 20)
    img = ci.map_cells(f, np.arange(20), dtype=float, cell_shape=4, cache=cache)
    img[:]
    gc.collect()
    assert len(alive) == 5
    assert all(reference() is None for reference in alive)
    assert cache.bytes == 20 * 8


def test_an_evicted_value_that_is_still_referenced_is_the_same_object_there_and_here():
    img = ci.map_cells(
        lambda a: a.copy(), np.arange(64), dtype=int, cell_shape=8, cache=ci.CellCache(64)
    )
    first = img.load(0)
    for index in range(1, 8):
        img.load(index)
    assert img.load(0) is first
    assert img.stats().loads == 8


def test_invalidate_requires_that_no_get_runs_at_the_same_time(pool):
    """ "May corrupt or deadlock": here readers and changes go on side by side."""
    image = np.zeros(64, int)
    img = ci.map_cells(lambda a: a.copy(), image, dtype=int, cell_shape=4)
    last = ci.map_cells(lambda a: a.copy(), img, dtype=int, cell_shape=8)
    at_once = threading.Barrier(4)

    def read() -> bool:
        at_once.wait(PATIENCE_S)
        before = np.zeros(64, int)
        for _ in range(150):
            now = last[:]
            # Values only grow, and whoever saw a change sees no older state afterwards.
            if (now < before).any():
                return False
            before = now
        return True

    readers = [pool.submit(read) for _ in range(3)]
    at_once.wait(PATIENCE_S)
    for step in range(1, 200):
        place = (step * 13) % 64
        image[place] = step
        img.invalidate(np.s_[place : place + 1])
        assert last[place] == step
    assert all(reader.result(PATIENCE_S) for reader in readers)
    np.testing.assert_array_equal(last[:], image)


def test_there_is_no_prefetch_in_the_python_loader():
    img = ci.map_cells(lambda a: a.copy(), np.arange(8), dtype=int, cell_shape=4)
    img.prefetch(np.s_[4:]).result(PATIENCE_S)
    assert img.peek(0) is None
    assert img.peek(1) is not None


# ----------------------------------------------------------------------------------- examples


def test_simple_example():
    """dims {3, 5}, blocks {2, 3}, two constant inputs of different dtypes: 3 everywhere."""
    one = np.full((5, 3), 1, np.int32)
    two = np.full((5, 3), 2, np.uint16)
    grid = ci.CellGrid((5, 3), (3, 2))
    code = ci.BlockCode("block.data[...] = sum(block.inputs)")
    for img in (
        ci.fill_cells(code, grid, one, two, dtype="i4"),
        ci.map_cells(np.add, one, two, cell_shape=(3, 2)),
    ):
        np.testing.assert_array_equal(img[...], np.full((5, 3), 3))
        assert img.grid.num_cells == 4
