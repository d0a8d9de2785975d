"""Functions by their names, wherever a function is expected."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.blocks.content import NoContentError, digest, value_content
from cellimg_dask.blocks.named import NamedFunction, as_function, importable

TEXT = """
import numpy as np
from numpy.typing import NDArray
import named_beside

def double(a): return 2 * a
def named(a) -> NDArray[np.float32]: return a.astype("f4")
def scaled(a, factor=2): return factor * a
def shifted(a): return a + shift
def fill(block): block.data[...] = block.inputs[0] + named_beside.one
def number(block): return block.index
def objects(a): return (a > 0).astype(int)
def load(): return 3
def predict(model, a): return (a > model).astype(int)
def points(a): return np.argwhere(a > 5)
def wide(mask): return mask.size
def bright(mask, image): return image[mask].max()
def biggest(values): return max(values)
def fails(a): raise ValueError("not this one")
class Held:
    def __init__(self, value): self.value = value
    @staticmethod
    def negative(a): return -a
def held(a): return Held(int(a.sum()))
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of functions."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "named_beside", raising=False)
    (tmp_path / "named_beside.py").write_text("one = 1\n")
    path = tmp_path / "named_functions.py"
    path.write_text(TEXT)
    return path


@pytest.fixture(params=["threads", "processes"])
def queue(request: pytest.FixtureRequest) -> Any:
    with ci.BlockQueue(1, "shift = 7", request.param) as queue:
        yield queue


# ---------------------------------------------------------------------- what it is


def test_it_is_imported_when_it_is_called() -> None:
    assert NamedFunction("numpy:negative")(3) == -3
    missing = NamedFunction("no_such_module_at_all:f")
    assert missing.__name__ == "f"
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module_at_all' in"):
        missing(1)
    with pytest.raises(AttributeError, match="did you mean 'negative'"):
        NamedFunction("numpy:negativ")(1)


def test_a_relative_file_is_that_of_the_working_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(file.parent)
    named = NamedFunction("named_functions.py:double")
    monkeypatch.chdir("/")
    assert named(4) == 8
    assert named.file == file
    assert pickle.loads(pickle.dumps(named)) == named == NamedFunction(f"{file}:double")
    assert len({named, NamedFunction(f"{file}:double"), NamedFunction(f"{file}:named")}) == 2
    assert NamedFunction(f"{file}:Held.negative")(2) == -2


def test_it_is_found_by_another_process(file: Path) -> None:
    text = pickle.dumps(functools.partial(NamedFunction(f"{file}:scaled"), factor=5)).hex()
    code = f"import pickle; print(pickle.loads(bytes.fromhex('{text}'))(2))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout == "10\n", done.stderr


def test_a_changed_file_is_run_again_for_those_who_name_it_anew(file: Path) -> None:
    before = NamedFunction(f"{file}:double")
    assert before(1) == 2
    file.write_text("def double(a): return 2000 * a")
    assert before(1) == 2
    assert NamedFunction(f"{file}:double")(1) == 2000


def test_what_is_no_name_is_given_back() -> None:
    assert as_function(np.add) is np.add
    assert as_function(None) is None
    assert as_function("numpy:add") == NamedFunction("numpy:add")
    assert importable(as_function("numpy:add")) is np.add
    assert importable(NamedFunction("no_such_module_at_all:add")) is None


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("numpy.negative", ValueError, "did you mean 'numpy:negative'"),
        ("no/such/file.py:f", FileNotFoundError, r"no file .*/no/such/file.py, which 'no"),
        ("", ValueError, 'expected "module:function"'),
        (5, TypeError, "named by a string, got int"),
    ],
)
def test_malformed_names(name: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        NamedFunction(name)


def test_it_says_how_it_is_called(file: Path) -> None:
    def parameters(name: str) -> str:
        return str(inspect.signature(NamedFunction(name)))

    assert parameters(f"{file}:scaled") == "(a, factor=2)"
    file.write_text(
        "import no_such_module_at_all\n"
        "def f(a, b=1, /, c=2, *d, e, f=3, **g): ...\n"
        "class A:\n    def h(self, x): ...\n"
    )
    assert parameters(f"{file}:f").replace("Ellipsis", "1") == "(a, b=1, /, c=1, *d, e, f=1, **g)"
    assert parameters(f"{file}:A.h") == "(self, x)"
    assert parameters(f"{file}:B.h").startswith("(*args")
    assert parameters("no_such_module_at_all:f").startswith("(*args")


# ---------------------------------------------------------------------- as f


def test_everywhere_a_function_is_expected(file: Path) -> None:
    def f(name: str) -> str:
        return f"{file}:{name}"

    image = np.arange(12)
    given = {"cell_shape": 5}
    assert (ci.map_cells(f("double"), image, dtype=int, **given)[:] == 2 * image).all()
    assert ci.map_cells(f("named"), image, **given).dtype == np.float32
    assert ci.map_cells("numpy:negative", image, **given).dtype == image.dtype
    filled = ci.fill_cells(f("fill"), ci.CellGrid((12,), 5), image, dtype=int)
    assert (filled[:] == image + 1).all()
    assert ci.map_labels(f("objects"), image, halo=1, **given).num_objects() == 1
    labels = ci.segment(f("predict"), image, load_model=f("load"), halo=1, **given)
    assert (labels[:] > 0).tolist() == (image > 3).tolist()
    assert len(ci.map_points(f("points"), image, halo=1, axes="x", columns=[], **given)) == 6
    most = ci.reduce_cells("numpy:max", f("biggest"), image, finish="builtins:float", **given)
    assert most.result() == 11.0
    table = ci.region_table(
        (image > 5).astype(int).reshape(1, 12),
        image.reshape(1, 12),
        ["label"],
        extra_properties=[f("wide"), (f("bright"), "i4")],
        max_extent=9,
        **given,
    ).compute()
    assert table[["wide", "bright"]].to_numpy().tolist() == [[6, 11]]
    assert ci.map_stack(f("scaled"), image, max_pixels=6, params={"factor": 3})[1].tolist()[0] == 18


def test_on_a_queue_it_sees_what_init_bound(file: Path, queue: ci.BlockQueue) -> None:
    image = np.arange(6)
    made = ci.map_cells(f"{file}:shifted", image, dtype=int, cell_shape=3, queue=queue)
    assert (made[:] == image + 7).all()
    partial = functools.partial(NamedFunction(f"{file}:scaled"), factor=4)
    assert (ci.map_cells(partial, image, dtype=int, queue=queue)[:] == 4 * image).all()
    found = ci.reduce_cells(f"{file}:held", f"{file}:biggest", image, cell_shape=6, queue=queue)
    assert found.cells[:][0].value == 15


def test_what_is_wrong_with_it_belongs_to_the_block(file: Path, queue: ci.BlockQueue) -> None:
    image = np.arange(6)
    for name, says in [
        ("no_such_module_at_all:f", r"f at cell \(0,\) \[0:6\]: ModuleNotFoundError: No module"),
        (f"{file}:doubel", r"doubel at cell .*AttributeError.* did you mean 'double'"),
        (f"{file}:fails", r"fails at cell .*ValueError: not this one"),
    ]:
        made = ci.map_cells(name, image, dtype=int, queue=queue)
        with pytest.raises(ci.BlockError, match=says):
            made[:]


def test_the_dtype_may_be_unknown_here() -> None:
    with pytest.raises(TypeError, match=r"the dtype that f returns.*give dtype="):
        ci.map_cells("no_such_module_at_all:f", np.arange(3))
    with pytest.raises(ValueError, match="did you mean 'numpy:negative'"):
        ci.map_cells("numpy.negative", np.arange(3))


def test_an_extra_property_that_cannot_be_known(file: Path) -> None:
    labels = np.arange(3)
    with pytest.raises(TypeError, match="cannot be known here, and so not whether it wants"):
        ci.region_table(labels, extra_properties=["no_such_module_at_all:f"], max_extent=2)
    file.write_text("import no_such_module_at_all\ndef f(mask, image): ...")
    with pytest.raises(ValueError, match="extra property f needs the image"):
        ci.region_table(labels, extra_properties=[f"{file}:f"], max_extent=2)


# ---------------------------------------------------------------------- content


def test_its_content_is_that_of_the_function(file: Path) -> None:
    assert value_content(NamedFunction("numpy:negative")) == value_content(np.negative)
    named = NamedFunction(f"{file}:double")
    before = digest(value_content(named))
    assert before == digest(value_content(named.function))
    file.write_text(f"# moved\n{TEXT}")
    assert digest(value_content(NamedFunction(f"{file}:double"))) == before
    file.write_text(TEXT.replace("2 * a", "3 * a"))
    assert digest(value_content(NamedFunction(f"{file}:double"))) != before


def test_the_content_of_what_cannot_be_imported_is_its_file(file: Path, tmp_path: Path) -> None:
    def content(path: Path = file, name: str = "double") -> str:
        return digest(value_content(NamedFunction(f"{path}:{name}")))

    text = f"import no_such_module_at_all\n{TEXT}"
    file.write_text(text)
    seen = {content(), content(name="named")}
    file.write_text(f"{text}\n")
    seen.add(content())
    (file.parent / "named_beside.py").write_text("one = 2\n")
    seen.add(content())
    assert len(seen) == 4
    other = tmp_path / "other"
    other.mkdir()
    for path in (file, file.parent / "named_beside.py"):
        (other / path.name).write_bytes(path.read_bytes())
    assert content(other / file.name) in seen


def test_there_is_no_content_of_a_module_that_is_not_here() -> None:
    with pytest.raises(NoContentError, match="'no_such_module_at_all:f', which cannot be imported"):
        value_content(NamedFunction("no_such_module_at_all:f"))
