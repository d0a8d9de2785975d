"""Block functions, code strings, what a block shows, and the errors."""

from __future__ import annotations

import gc
import io
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from dask.base import tokenize

import cellimg_dask as ci
from cellimg_dask.blocks.errors import CellError
from cellimg_dask.blocks.functions import ArrayFunction, FillFunction
from cellimg_dask.blocks.plan import AxisLink, CellPlan, InputPlan, Planner
from cellimg_dask.blocks.wrappers import function_name
from cellimg_dask.geometry import CellGrid, Halo, Roi

INT = np.dtype("i4")


def a_plan(index: int = 1) -> CellPlan:
    """A cell 4:8 of an image of 10 voxels that reads 3:10."""
    item = InputPlan((10,), Halo((1,), (2,)), "none", (AxisLink(0),))
    return Planner(CellGrid((10,), (4,)), [item]).plan(index)


BLOCK = np.arange(3, 10, dtype=INT)


def apply(
    function: Callable[..., Any], params: dict[str, Any] | None = None, dtype: Any = INT
) -> np.ndarray:
    return ArrayFunction(function).apply(a_plan(), (BLOCK,), params or {}, np.dtype(dtype), None)


# ---------------------------------------------------------------- functions of arrays


def test_a_result_with_its_halo_is_cropped() -> None:
    np.testing.assert_array_equal(apply(lambda a: a * 2), [8, 10, 12, 14])


def test_a_result_of_just_the_cell_is_taken_as_it_is() -> None:
    np.testing.assert_array_equal(apply(lambda a: a[:4]), [3, 4, 5, 6])


def test_params_are_keyword_arguments() -> None:
    got = apply(lambda a, *, factor: a * factor, {"factor": 3})
    np.testing.assert_array_equal(got, [12, 15, 18, 21])


def test_anything_that_turns_into_an_array_is_a_result() -> None:
    class Wrapped:
        shape = (4,)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.arange(4, dtype=INT)

    class Marked(np.ndarray):
        pass

    np.testing.assert_array_equal(apply(lambda a: Wrapped()), [0, 1, 2, 3])
    assert apply(lambda a: a[:4].view(Marked)).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("function", "dtype", "says"),
    [
        (
            lambda a: None,
            INT,
            r"returned NoneType, expected an array of shape \(4,\); .*fill_cells",
        ),
        (lambda a: [1, 2, 3, 4], INT, r"returned list, expected an array .* return a NumPy array"),
        (lambda a: 7, INT, r"returned int, expected an array of shape \(4,\)"),
        (lambda a: a[:3], INT, r"returned shape \(3,\), expected \(4,\) or, with its halo, \(7,\)"),
        (lambda a: a[:1], INT, r"returned shape \(1,\), expected \(4,\)"),
        (lambda a: a[0], INT, r"returned shape \(\), expected \(4,\)"),
        (lambda a: a[None], INT, r"returned shape \(1, 7\), expected \(4,\).*new_axis="),
        (lambda a: a / 2, INT, r"returned dtype float64, which int32 cannot hold; .*'int32'"),
        (lambda a: a, "u1", r"returned dtype int32, which uint8 cannot hold; .*dtype='int32'"),
        (lambda a: a * 1j, "f8", r"returned dtype complex128, which float64 cannot hold"),
        (lambda a: a > 2, "i1", None),
        (lambda a: a, "f8", None),
        (lambda a: a.astype(">i4"), "i4", None),
    ],
)
def test_the_result_is_checked(function: Callable[..., Any], dtype: Any, says: str | None) -> None:
    if says is None:
        assert apply(function, dtype=dtype).shape == (4,)
        return
    with pytest.raises(ci.ResultError, match=says) as caught:
        apply(function, dtype=dtype)
    assert caught.value.position == (1,)
    assert caught.value.roi == Roi((4,), (8,))
    assert "<lambda> at cell (1,) [4:8]: " in str(caught.value)


def divide(a: np.ndarray) -> np.ndarray:
    raise ZeroDivisionError("by nothing")


@pytest.mark.parametrize("wrap", [ArrayFunction, FillFunction])
def test_what_a_function_raises_is_the_cause(wrap: Any) -> None:
    with pytest.raises(ci.BlockError, match=r"divide at cell \(1,\) \[4:8\]: .*by nothing") as it:
        wrap(divide).apply(a_plan(), (BLOCK,), {}, INT, None)
    assert type(it.value) is ci.BlockError
    assert isinstance(it.value.__cause__, ZeroDivisionError)
    assert (it.value.function, it.value.position, it.value.roi) == (
        "divide",
        (1,),
        Roi((4,), (8,)),
    )


def test_exit_is_contained() -> None:
    with pytest.raises(ci.BlockError, match="SystemExit: 3") as caught:
        apply(lambda a: sys.exit(3))
    assert isinstance(caught.value.__cause__, SystemExit)


def test_an_interrupt_is_not() -> None:
    def interrupted(a: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(interrupted)


def test_an_error_of_an_image_that_the_function_reads_keeps_its_own_cell() -> None:
    inner = ci.BlockError("inner", (9,), Roi((90,), (99,)), "broken")

    def reads(a: np.ndarray) -> np.ndarray:
        raise inner

    with pytest.raises(ci.BlockError) as caught:
        apply(reads)
    assert caught.value is inner


class Callee:
    def __call__(self, a: np.ndarray) -> np.ndarray:
        return a


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (divide, "divide"),
        (partial(partial(divide), 1), "divide"),
        (lambda a: a, "<lambda>"),
        (np.negative, "negative"),
        (Callee(), "Callee"),
        (Callee().__call__, "Callee.__call__"),
        (ci.BlockCode(""), "BlockCode"),
    ],
)
def test_function_names(function: Any, name: str) -> None:
    assert function_name(function).removeprefix("test_function_names.<locals>.") == name


# ---------------------------------------------------------------- functions of a block


def test_a_block_shows_the_members_of_the_design() -> None:
    seen: list[ci.Block] = []

    def look(block: ci.Block) -> None:
        seen.append(block)
        np.testing.assert_array_equal(block.data, np.zeros((2, 4), "u2"))
        block.data[...] = 1

    source = np.arange(8 * 9).reshape(8, 9)
    image = ci.fill_cells(
        look,
        CellGrid((8, 9), (3, 4)),
        source,
        dtype=">u2",
        halo=[(1, 2), (0, 30)],
        boundary="symmetric",
        params={"k": 5},
    )
    image.load((2, 1))
    (block,) = seen
    assert (block.index, block.position) == (7, (2, 1))
    assert (block.min, block.max, block.dim) == ((6, 4), (7, 7), (2, 4))
    assert block.shape == block.data.shape == (2, 4)
    assert block.roi == Roi((6, 4), (8, 8))
    assert block.read_roi == Roi((5, 4), (10, 38))
    assert block.halo == (slice(1, 3), slice(0, 4))
    assert block.params == {"k": 5}
    assert block.data.dtype == np.dtype("u2")
    assert block.data.dtype.isnative
    np.testing.assert_array_equal(
        block.inputs[0], np.pad(source, [(1, 2), (0, 30)], mode="symmetric")[6:11, 4:38]
    )
    assert not block.inputs[0].flags.writeable
    np.testing.assert_array_equal(block.inputs[0][block.halo], source[6:8, 4:8])
    assert repr(block) == "Block(position=(2, 1), shape=(2, 4), inputs=[(5, 34)])"


def test_block_halo_crops_where_the_width_is_zero() -> None:
    def copy(block: ci.Block) -> None:
        block.data[...] = block.inputs[0][block.halo]

    source = np.arange(35).reshape(5, 7)
    for halo in (0, [(0, 2), (2, 0)], [(0, 0), (99, 99)], 3):
        for boundary in ("none", "constant", "reflect", "symmetric", "edge", "wrap"):
            image = ci.fill_cells(
                copy, CellGrid((5, 7), (2, 3)), source, dtype=int, halo=halo, boundary=boundary
            )
            np.testing.assert_array_equal(image[...], source)


def test_block_halo_crops_an_input_that_has_an_index_map() -> None:
    def copy(block: ci.Block) -> None:
        block.data[...] = block.inputs[0][block.halo]

    source = np.arange(35).reshape(5, 7)
    for boundary in ("none", "constant", "reflect"):
        image = ci.fill_cells(
            copy,
            ci.CellGrid((5, 7), (2, 3)),
            ci.Input(source, halo=2, boundary=boundary, index_map=lambda roi: roi),
            dtype=int,
        )
        np.testing.assert_array_equal(image[...], source)


def test_data_cannot_be_replaced() -> None:
    def replace(block: ci.Block) -> None:
        block.data = np.ones(4)

    with pytest.raises(ci.BlockError, match=r"write into it: block\.data\[\.\.\.\] = result"):
        ci.fill_cells(replace, CellGrid((4,), (4,)), dtype=int)[:]


def test_a_fill_function_that_returns_something_is_an_error() -> None:
    with pytest.raises(ci.ResultError, match=r"returned ndarray, expected None: .*map_cells"):
        ci.fill_cells(lambda block: block.data, CellGrid((4,), (4,)), dtype=int)[:]


def test_data_begins_as_zeros_even_where_it_is_the_callers_array() -> None:
    def add(block: ci.Block) -> None:
        block.data[...] += 1

    image = ci.fill_cells(add, CellGrid((6,), (4,)), dtype=int, cache=None)
    out = np.full(6, 99)
    image.read_into(out)
    np.testing.assert_array_equal(out, np.ones(6))


# ---------------------------------------------------------------- code strings


def fill(code: str, init: str | None = None, **settings: Any) -> ci.CellImg:
    source = np.arange(12.0).reshape(3, 4)
    block_code = ci.BlockCode(code, init)
    return ci.fill_cells(block_code, CellGrid((3, 4), 2), source, dtype=float, **settings)


def test_code_fills_a_block() -> None:
    image = fill(
        "block.data[...] = gaussian_filter(block.inputs[0], s, radius=2)[block.halo]",
        init="from scipy.ndimage import gaussian_filter\ns = 1.0",
        halo=2,
    )
    from scipy.ndimage import gaussian_filter

    whole = gaussian_filter(np.arange(12.0).reshape(3, 4), 1.0, radius=2)
    np.testing.assert_array_equal(image[...], whole)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that code strings reach as ``cellimg_journal.pages``."""
    module = types.ModuleType("cellimg_journal")
    module.pages = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cellimg_journal", module)
    return module.pages  # type: ignore[attr-defined, no-any-return]


def test_init_runs_once_in_each_worker_before_its_first_block(journal: list[Any]) -> None:
    code = ci.BlockCode(
        "pages.append(('block', get_ident())); count += 1; block.data[...] = count",
        init="from threading import get_ident\nfrom cellimg_journal import pages\n"
        "pages.append(('init', get_ident())); count = 0",
    )
    image = ci.fill_cells(code, CellGrid((3,), 1), dtype=int, cache=None)
    assert journal == []
    last: list[int] = []

    def work() -> None:
        for index in range(3):
            last.append(int(image.load(index)[0]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    # Names that the code binds live on from block to block, in each thread its own.
    assert last == [1, 2, 3] * 3
    for ident in {who for _, who in journal}:
        assert next(what for what, who in journal if who == ident) == "init"
    assert [what for what, _ in journal].count("init") == 3
    assert [what for what, _ in journal].count("block") == 9


def test_equal_code_shares_a_namespace_also_after_pickling(journal: list[Any]) -> None:
    init = "from cellimg_journal import pages; pages.append('init')"
    code = ci.BlockCode("block.data[...] = 1", init)
    for one in (code, pickle.loads(pickle.dumps(code)), ci.BlockCode(code.code, init)):
        ci.fill_cells(one, CellGrid((1,), 1), dtype=int).load(0)
    assert journal == ["init"]


def test_an_init_that_fails_is_an_error_and_no_block_runs(journal: list[Any]) -> None:
    code = "pages.append('block'); block.data[...] = 1"
    init = "from cellimg_journal import pages\npages.append('init')\nif len(pages) < 3: 1 / 0"
    image = fill(code, init)
    for _ in range(2):
        with pytest.raises(ci.InitError, match=r"ZeroDivisionError: .*no block ran:") as caught:
            image.load(0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert init in str(caught.value)
        assert image.peek(0) is None
    assert journal == ["init", "init"]
    # The worker tries again each time; the third time it works.
    np.testing.assert_array_equal(image.load(0), 1)
    assert journal == ["init", "init", "init", "block"]


def test_an_init_that_exits_is_contained() -> None:
    with pytest.raises(ci.InitError, match="SystemExit: 4"):
        fill("pass", "import sys; sys.exit(4)").load(0)


def test_code_that_fails_names_the_cell() -> None:
    with pytest.raises(ci.BlockError, match=r"BlockCode at cell \(1, 0\).*NameError.*nothing"):
        fill("nothing").load((1, 0))


def test_code_keeps_no_block_alive() -> None:
    image = fill("block.data[...] = 1", cache=None)
    dead = weakref.ref(image.load(0))
    gc.collect()
    assert dead() is None


def test_code_may_read_an_image_that_the_same_code_fills() -> None:
    # The inner call runs in the same thread and namespace, in the middle of the outer one.
    code = ci.BlockCode(
        "up = block.params.get('up')\n"
        "block.data[...] = 1 if up is None else up[block.roi] + 1\n"
        "block.data[...] *= 10"
    )
    grid = CellGrid((2,), 1)
    inner = ci.fill_cells(code, grid, dtype=int)
    outer = ci.fill_cells(code, grid, dtype=int, params={"up": inner})
    np.testing.assert_array_equal(outer.load(0), [110])


def test_code_is_a_value() -> None:
    code = ci.BlockCode("a", "b")
    assert code == pickle.loads(pickle.dumps(code)) == ci.BlockCode("a", init="b")
    assert len({code, ci.BlockCode("a", "b"), ci.BlockCode("a"), ci.BlockCode("b", "b")}) == 3
    assert code != "a"
    assert repr(code) == "BlockCode('a', init='b')"
    assert tokenize(code) == tokenize(ci.BlockCode("a", "b")) != tokenize(ci.BlockCode("a"))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("x = ",), SyntaxError, "invalid syntax"),
        (("x", "for"), SyntaxError, "invalid syntax"),
        ((None,), TypeError, "BlockCode code must be a string, got NoneType"),
        ((divide,), TypeError, "BlockCode code must be a string, got function"),
        (("x", 3), TypeError, "BlockCode init must be a string, got int"),
    ],
)
def test_wrong_code_is_refused_when_it_is_made(
    arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ci.BlockCode(*arguments)


def test_code_belongs_in_fill_cells() -> None:
    with pytest.raises(TypeError, match=r"use fill_cells\(code, grid"):
        ci.map_cells(ci.BlockCode("pass"), np.zeros(3), dtype=float)


# ---------------------------------------------------------------- errors

CELL_ERRORS = [ci.BlockError, ci.ResultError, ci.ReadError, ci.CycleError]
BUILTINS = {
    ci.BlockError: RuntimeError,
    ci.ResultError: ValueError,
    ci.ReadError: OSError,
    ci.CycleError: RuntimeError,
    ci.InitError: RuntimeError,
}


def an_error(kind: type[ci.CellimgError]) -> ci.CellimgError:
    if issubclass(kind, CellError):
        return kind("smooth", (1, 2), Roi((4, 8), (8, 12)), "all is lost")
    return kind("init failed: all is lost")


def raised(error: BaseException, cause: BaseException | None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def pickled(error: BaseException) -> Any:
    """Send an error through pickle alone: tblib, where imported, would add causes by itself."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream)
    pickler.dispatch_table = {}
    pickler.dump(error)
    return pickle.loads(stream.getvalue())


class PeculiarError(Exception):
    """An exception such as many packages have: it can be pickled but not unpickled."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class UnpicklableError(Exception):
    """An exception that holds something that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", BUILTINS)
def test_errors_are_the_packages_and_a_builtin(kind: type[ci.CellimgError]) -> None:
    error = an_error(kind)
    assert isinstance(error, ci.CellimgError)
    assert isinstance(error, BUILTINS[kind])
    assert "all is lost" in str(error)


@pytest.mark.parametrize("kind", CELL_ERRORS)
def test_cell_errors_say_which_function_and_cell(kind: type[CellError]) -> None:
    error = an_error(kind)
    assert str(error) == "smooth at cell (1, 2) [4:8, 8:12]: all is lost"
    assert isinstance(error, CellError)
    assert (error.function, error.position, error.roi, error.detail) == (
        "smooth",
        (1, 2),
        Roi((4, 8), (8, 12)),
        "all is lost",
    )


@pytest.mark.parametrize("kind", [*CELL_ERRORS, ci.InitError, ci.CellimgError])
@pytest.mark.parametrize("cause", [None, KeyError("k"), OSError(2, "no such file", "/a")])
def test_errors_survive_pickling_with_their_cause(
    kind: type[ci.CellimgError], cause: BaseException | None
) -> None:
    error = raised(an_error(kind), cause)
    copy = pickled(error)
    assert type(copy) is kind
    assert str(copy) == str(error)
    if isinstance(error, CellError):
        for name in ("function", "position", "roi", "detail"):
            assert getattr(copy, name) == getattr(error, name)
    assert type(copy.__cause__) is type(cause)
    assert str(copy.__cause__) == str(cause)


@pytest.mark.parametrize("kind", [*CELL_ERRORS, ci.InitError])
def test_a_chain_of_our_own_errors_survives_pickling(kind: type[ci.CellimgError]) -> None:
    inner = raised(an_error(ci.BlockError), ValueError("at the bottom"))
    copy = pickled(raised(an_error(kind), inner))
    assert type(copy.__cause__) is ci.BlockError
    assert repr(copy.__cause__.__cause__) == "ValueError('at the bottom')"


@pytest.mark.parametrize("kind", [*CELL_ERRORS, ci.InitError])
@pytest.mark.parametrize("cause", [PeculiarError("/a", "gone"), UnpicklableError()])
def test_errors_survive_pickling_whatever_the_cause(
    kind: type[ci.CellimgError], cause: Exception
) -> None:
    error = raised(an_error(kind), cause)
    copy = pickled(error)
    assert type(copy) is kind
    assert str(copy) == str(error)
    # The cause itself cannot travel; what it said must.
    assert str(cause) in str(copy.__cause__)


@pytest.mark.parametrize("kind", CELL_ERRORS)
def test_each_waiter_gets_an_error_of_its_own(kind: type[CellError]) -> None:
    error = raised(an_error(kind), ValueError("x"))
    assert isinstance(error, CellError)
    again = error.again()
    assert again is not error
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.__cause__ is error.__cause__
