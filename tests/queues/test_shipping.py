"""Functions of this Python in another one: the same results, or an error that says why not."""

from __future__ import annotations

import base64
import enum
import functools
import io
import json
import logging
import math
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.special

import cellimg_dask as ci
from cellimg_dask.bare import functions as bare_functions
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.queues.places import public_name
from cellimg_dask.queues.shipping import ship

PYTHON = os.getenv("CELLIMG_TEST_PYTHONS", sys.executable).split(os.pathsep)[0]
"""Another one, with NumPy, may be named."""
OFFSET = 3
TABLE = {"low": [1, 2], "high": (3.5, math.inf), 4: {"x"}, b"k": slice(1, None)}
KERNEL = np.array([1.0, 2.0, 1.0])
RECORD = np.zeros(2, [("a", ">i2"), ("b", "f4", (2,))])
KIND = np.dtype([("a", "<i2"), ("b", "<f4", (2,))])
NEGATIVE = np.float32(-0.0)
log = logging.getLogger("shipped")
model = None


class Color(enum.Enum):
    RED = 1


class Held:
    def __init__(self, value: int) -> None:
        self.value = value

    def scaled(self, a: Any) -> Any:
        return self.value * a

    def __call__(self, a: Any) -> Any:
        return self.value * a


HELD = Held(2)
LARGE = np.zeros(1 << 18)

PROGRAM = """
import base64, io, json, sys, types
import numpy as np
package = types.ModuleType("cellimg_worker")
package.__path__ = [sys.argv[1]]
sys.modules["cellimg_worker"] = package
from cellimg_worker.functions import Functions

# Versions of NumPy show scalars in two ways.
np.set_printoptions(legacy="1.13")

def decoded(value):
    if isinstance(value, dict) and "npy" in value:
        return np.load(io.BytesIO(base64.b64decode(value["npy"])))
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value

for line in sys.stdin:
    init, spec, given = decoded(json.loads(line))
    try:
        reply = repr(Functions(init).load(spec)(*given))
    except Exception as error:
        reply = type(error).__name__ + ": " + str(error)
    print(json.dumps(reply), flush=True)
"""


def encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value)
        return {"npy": base64.b64encode(file.getvalue()).decode()}
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    return [encoded(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., str]]:
    """Call what a description says in another process, which has no cellimg_dask."""
    folder = Path(bare_functions.__file__).parent
    with subprocess.Popen(
        # Without the paths of this one.
        [PYTHON, "-I", "-c", PROGRAM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def call(spec: Any, *args: Any, init: Any = None) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            line = json.dumps(encoded([init, spec, args]), allow_nan=False)
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return str(json.loads(process.stdout.readline()))

        yield call
        process.stdin.close()
        process.wait(60)


@pytest.fixture
def same(elsewhere: Callable[..., str]) -> Callable[..., None]:
    """Check that a function that was sent gives what it gives here."""

    def check(function: Any, *args: Any) -> None:
        spec = ship(function)
        assert spec is not None
        with np.printoptions(legacy="1.13"):
            assert elsewhere(spec, *args) == repr(function(*args)), spec

    return check


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Write a module of the user's and import it."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    def write(name: str, text: str) -> Any:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        __import__(name)
        return sys.modules[name]

    return write


def as_in_a_script(*things: Any) -> None:
    for thing in things:
        thing.__module__ = "__main__"


# ------------------------------------------------------------------------------ by name


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (np.negative, "numpy:negative"),
        (np.max, "numpy:max"),
        (np.linalg.norm, "numpy.linalg:norm"),
        (scipy.special.expit, "scipy.special:expit"),
        (scipy.ndimage.gaussian_filter, "scipy.ndimage:gaussian_filter"),
        (max, "builtins:max"),
        (float, "builtins:float"),
        (math.sqrt, "math:sqrt"),
        (operator.add, "_operator:add"),
        (Path, "pathlib:Path"),
        (dict.fromkeys, "builtins:dict.fromkeys"),
        (NamedFunction("no_such_module:A.f"), "no_such_module:A.f"),
        (NamedFunction("numpy:negative"), "numpy:negative"),
    ],
)
def test_what_is_imported_goes_by_its_public_name(function: Any, name: str) -> None:
    assert ship(function) == {"name": name}


def test_functions_of_modules_go_by_name_and_folder(module: Any, same: Any, tmp_path: Path) -> None:
    made = module(
        "ship_plain",
        "def f(a): return a + 1\nclass A:\n    @staticmethod\n"
        "    def g(a): return a + 2\ndouble = lambda a: 2 * a\n",
    )
    folders = {"folders": [str(tmp_path)]}
    assert ship(made.f) == ship(NamedFunction("ship_plain:f")) == {"name": "ship_plain:f"} | folders
    assert ship(made.A.g) == {"name": "ship_plain:A.g"} | folders
    (tmp_path / "ship_package").mkdir()
    (tmp_path / "ship_package" / "__init__.py").write_text("from ship_package.inner import f")
    inner = module("ship_package.inner", "def f(a): return a + 3\n")
    assert ship(inner.f) == {"name": "ship_package:f"} | folders
    for function in (made.f, made.A.g, made.double, inner.f):
        same(function, 5)


def test_functions_of_files_go_by_file(tmp_path: Path, same: Any) -> None:
    path = tmp_path / "ship_file.py"
    path.write_text("def f(a): return a + 1\ndef make(n):\n    return lambda a: a + n + f(a)\n")
    named = NamedFunction(f"{path}:f")
    assert ship(named) == {"file": str(path), "name": "f"} == ship(named.function)
    same(named, 1)
    same(NamedFunction(f"{path}:make").function(3), 1)
    same(functools.partial(NamedFunction(f"{path}:make").function(3)), 1)


def test_functions_of_the_library_stay() -> None:
    assert ship(ci.stitch) is None
    assert ship(functools.partial(ci.merge_blobs, 1)) is None
    assert ship(functools.partial(ci.merge_blobs, (1, 2))) is None
    assert public_name(ci.stitch) is not None


def test_code_and_arguments(same: Any) -> None:
    assert ship(ci.BlockCode("a", init="b")) == {"code": "a", "init": "b"}
    shifted = functools.partial(np.add, np.arange(3))
    assert ship(shifted)["partial"] == {"name": "numpy:add"}  # type: ignore[index]
    same(shifted, 1)
    same(functools.partial(np.sum, axis=(0, 1), keepdims=True), np.ones((2, 2)))
    same(functools.partial(np.multiply, np.float32(2)), np.arange(2, dtype="f4"))
    same(functools.partial(np.full, (2, 1)), 5)
    same(functools.partial(np.clip, a_max=math.inf, a_min=0.5), 0.1)


# ------------------------------------------------------------------------------ as text


def with_globals(a: Any, k: int = OFFSET, *, scale: Any = KERNEL) -> Any:
    """Use everything that can be used."""
    # The same names have other functions.
    text = f"""
  {a} not indented
"""
    found = [a + OFFSET, TABLE, KERNEL.sum(), RECORD.dtype, RECORD.tolist(), KIND, NEGATIVE]
    log.debug("seen")
    return text, found, k, scale.tolist(), helper(a), np.negative(a), log.name, model


def helper(n: int) -> int:
    return 1 if n <= 0 else n * other(n - 1)


def other(n: int) -> int:
    return helper(n)


def annotated(a: ci.Block, b: Held | None = None) -> np.ndarray[Any, np.dtype[Any]]:
    def inner(c: ci.Block) -> Held:
        return c  # type: ignore[return-value]

    x: ci.Block = inner(a)  # type: ignore[assignment]
    return x  # type: ignore[return-value]


def makes(kind: str) -> Callable[..., Any]:
    n, names = 5, ["a", "b"]

    def nested(a: Any) -> Any:
        nonlocal n
        n += 1
        # A comment.
        text = """
no indent here"""
        return a + n, names, kind, text, helper(3)

    def counts(k: int) -> int:
        return 0 if k == 0 else 1 + counts(k - 1)

    def calls(a: Any) -> Any:
        return counts(a), inner_lambda(a)

    inner_lambda = lambda a, by=n: (  # noqa: E731
        a * by,
        n,  # not in one line
    )
    recursive = lambda k: 0 if k == 0 else k + recursive(k - 1)  # noqa: E731
    two = (lambda a: a + 1, lambda a: a + 2)
    found: dict[str, Callable[..., Any]] = {
        "nested": nested,
        "counts": counts,
        "calls": calls,
        "lambda": inner_lambda,
        "recursive": recursive,
        "first": two[0],
        "second": two[1],
    }
    return found[kind]


def imports_inside(a: Any) -> Any:
    from math import floor

    import numpy.linalg as la

    return floor(a), la.norm([a, a]), [x for x in range(int(a)) if x != OFFSET]


as_in_a_script(with_globals, helper, other, annotated, imports_inside, Held, Color)


@pytest.mark.parametrize("function", [with_globals, helper, annotated, imports_inside])
def test_functions_as_text(function: Any, same: Any) -> None:
    # As a test module has it, which is not found by its name elsewhere.
    assert "source" in ship(function)  # type: ignore[operator]
    same(function, 4)


@pytest.mark.parametrize(
    "kind", ["counts", "calls", "lambda", "recursive", "first", "second", "nested"]
)
def test_functions_with_variables_of_others(kind: str, elsewhere: Any) -> None:
    spec = ship(makes(kind))
    assert elsewhere(spec, 3) == repr(makes(kind)(3))


def test_defaults_of_lambdas_are_values(elsewhere: Any) -> None:
    # As people do in loops.
    made = [lambda a, i=i, *, j=[i, i * 2]: (a, i, j) for i in range(3)]
    odd = [lambda a, i=("ä", i), k=lambda b, i=i: b + i: (i, k(a)) for i in range(2)]
    for function in (*made, *odd):
        assert elsewhere(ship(function), 7) == repr(function(7))  # type: ignore[operator]


def test_descriptions_are_the_same_each_time() -> None:
    assert ship(with_globals) == ship(with_globals)
    assert ship(makes("nested")) == ship(makes("nested"))


def test_what_init_binds_goes_before_globals(elsewhere: Any) -> None:
    def uses(a: Any) -> Any:
        return a, model, made_by_init  # type: ignore[name-defined] # noqa: F821

    init = {"code": "model = 'loaded'\nmade_by_init = 7"}
    assert elsewhere(ship(uses), 1, init=init) == "(1, 'loaded', 7)"


def test_globals_that_share_something_still_do(elsewhere: Any) -> None:
    shared: list[int] = []
    pair = {"x": shared}

    def appends(a: int) -> Any:
        shared.append(a)
        return pair

    assert elsewhere(ship(appends), 4) == "{'x': [4]}"


def test_modules_of_the_users_are_found(module: Any, same: Any) -> None:
    ship_beside = module("ship_beside", "def f(a): return a + 1\n")
    f = ship_beside.f

    def uses(a: int) -> Any:
        import ship_beside as again

        return ship_beside.f(a), f(a), again.f(a)

    same(uses, 1)


def test_a_script_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import json, sys\nfrom cellimg_dask.queues.shipping import ship\n"
        "import numpy as np\nfactor = 2\n"
        "def double(a): return factor * np.asarray(a)\n"
        "assert __name__ == '__main__'\n"
        "print(json.dumps(ship(double)))\n"
    )
    paths = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=60, env=paths
    )
    assert not done.stderr
    spec = json.loads(done.stdout)
    assert bare_functions.Functions().load(spec)([1, 2]).tolist() == [2, 4]


# ------------------------------------------------------------------------------ errors


def uses_class(a: Any) -> Any:
    return Held(a)


def uses_color(a: Any) -> Any:
    return Color.RED


def uses_object(a: Any) -> Any:
    return HELD(a)


def uses_large(a: Any) -> Any:
    return LARGE + a


@functools.lru_cache(maxsize=2)
def cached(a: Any) -> Any:
    return a


def decorator(f: Any) -> Any:
    @functools.wraps(f)
    def call(*args: Any) -> Any:
        return f(*args)

    return call


@decorator
def decorated(a: Any) -> Any:
    return a


as_in_a_script(uses_class, uses_color, uses_object, uses_large, cached, decorated)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (HELD.scaled, "Held.scaled is a method of an object of .*Held, which exists in this"),
        (HELD, "an object of .*Held cannot be sent to another Python"),
        (Held, "an object of builtins.type cannot be sent"),
        (uses_class, "uses_class's global Held is the class Held, which cannot be sent"),
        (uses_color, "uses_color's global Color is the class Color"),
        (uses_object, "uses_object's global HELD is a Held, which cannot be sent"),
        (uses_large, "global LARGE is an array of 2.0 MiB, too large to be sent"),
        (cached, "an object of functools._lru_cache_wrapper cannot be sent"),
        (decorated, "decorated's variable f has a decorator, 'decorator'"),
        (np.vectorize(abs), "an object of numpy.vectorize cannot be sent"),
        (eval("lambda a: a"), "the source of <lambda> is not known here"),
        (functools.partial(np.add, HELD), "an argument of .*add is a Held"),
        (functools.partial(np.add, np.array([None])), "argument of .* cannot be sent"),
        (np.random.default_rng(0).normal, "normal is a method|cannot be sent"),
    ],
)
def test_what_cannot_be_sent_says_why(function: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says) as caught:
        ship(function)
    assert "path/to/file.py:function" in str(caught.value) or "params=" in str(caught.value)


def test_a_file_that_was_changed_since(module: Any, tmp_path: Path) -> None:
    made = module("ship_edited", "double = lambda a: 2 * a\n")
    assert "source" in ship(made.double)  # type: ignore[operator]
    (tmp_path / "ship_edited.py").write_text("double = lambda a: 3 * a + 1\n")
    with pytest.raises(TypeError, match="has been changed since"):
        ship(made.double)


def test_variables_without_a_value_and_two_of_a_name(module: Any) -> None:
    def early(a: Any) -> Any:
        return a + later

    with pytest.raises(TypeError, match="'later' of the function around it, which has no value"):
        ship(early)
    later = module("ship_first", "k = 1\nf = lambda a: a + k\n").f
    k = 2

    def both(a: Any) -> Any:
        return later(a) + OFFSET + k

    ship(both)
    second = module("ship_second", "OFFSET = 100\nf = lambda a: a + OFFSET\n").f

    def clash(a: Any) -> Any:
        return second(a) + OFFSET

    with pytest.raises(TypeError, match="'OFFSET' is not the same in them"):
        ship(clash)


def test_modules_that_are_not_in_the_other_python(elsewhere: Any) -> None:
    def uses(a: Any) -> Any:
        return pytest.approx(a)

    spec = ship(uses)
    assert spec is not None
    text = spec["source"].replace("pytest", "no_such_module")
    reply = elsewhere(spec | {"source": text}, 1)
    assert reply.startswith("ModuleNotFoundError: the function imports 'no_such_module', which is")
