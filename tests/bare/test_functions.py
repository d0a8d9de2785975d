"""Functions made from their descriptions, here and in another Python."""

from __future__ import annotations

import functools
import json
import linecache
import os
import subprocess
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellimg_dask.bare.functions import Functions, InitError, bind, wants_task
from cellimg_dask.bare.naming import import_file, split_name


class Block:
    """What code is given."""

    def __init__(self, *inputs: Any) -> None:
        self.inputs = inputs
        self.data = np.zeros(3, int)


def raises(kind: type[BaseException], says: str) -> Any:
    return pytest.raises(kind, match=f"(?s){says}")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module; return what describes functions in it, by its folder."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(text: str, name: str = "bare_user_module") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        if name.startswith("bare_"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return str(tmp_path)

    return write


def test_a_function_of_a_package() -> None:
    functions = Functions()
    assert functions.load({"name": "numpy:negative"}) is np.negative
    assert functions.load({"name": "numpy.linalg:norm"}) is np.linalg.norm


def test_a_function_of_a_module_in_a_folder_that_is_searched_last(module: Any) -> None:
    folder = module("class A:\n    @staticmethod\n    def f(x):\n        return x + 1\n")
    module("wrong = 1", "json")
    function = Functions().load({"name": "bare_user_module:A.f", "folders": [folder]})
    assert function(1) == 2
    assert sys.path[-1] == folder
    assert Functions().load({"name": "json:loads", "folders": [folder]}) is json.loads


def test_a_file_runs_once_until_it_changes_and_imports_what_stands_beside_it(module: Any) -> None:
    module("shift = 10", "bare_beside")
    folder = module(
        "import dataclasses\nimport bare_beside\n"
        "@dataclasses.dataclass\nclass Held:\n    value: 'int' = 0\n"
        "def f(x): return x + bare_beside.shift + Held(5).value\n",
        "signal",
    )
    spec = {"file": f"{folder}/signal.py", "name": "f"}
    one = Functions().load(spec)
    assert one(1) == 16
    assert Functions().load(spec) is one
    functions = Functions()
    partial = {"partial": spec, "args": [1]}
    assert functions.load(partial)() == 16
    (Path(folder) / "signal.py").write_text("def f(x): return x + 100")
    assert functions.load(partial)() == 101
    assert one(1) == 16
    import signal

    assert hasattr(signal, "SIGINT")


def test_source_is_run_once_and_sees_what_init_bound() -> None:
    functions = Functions({"code": "shift = 5"})
    text = (
        "count = 0\n"
        "def g(x): return x + shift\n"
        "def f(x):\n    global count\n    count += 1\n    return g(x) + count\n"
    )
    assert functions.load({"source": text, "name": "f"})(1) == 7
    assert functions.load({"source": text, "name": "f"})(1) == 8
    assert functions.load({"source": text, "name": "g"})(1) == 6
    assert Functions({"code": "shift = 0"}).load({"source": text, "name": "f"})(1) == 2


def test_code_keeps_its_names_from_block_to_block_and_lets_go_of_blocks() -> None:
    functions = Functions({"code": "scale = 3"})
    code = "n = n + 1\nblock.data[...] = scale * block.inputs[0] + n"
    fill = functions.load({"code": code, "init": "n = 10"})
    block = Block(np.arange(3))
    fill(block)
    fill(block)
    assert block.data.tolist() == [12, 15, 18]
    assert "block" not in functions.space(code, "n = 10")
    assert wants_task(fill)
    seen: list[Any] = []
    functions.load({"code": "block.append(task)", "init": None})(seen, task="running")
    assert seen == ["running"]


def test_code_may_be_run_while_it_runs() -> None:
    functions = Functions()
    fill = functions.load({"code": "block[0](block[1])\nblock.append(1)", "init": None})
    inner: list[Any] = [lambda given: None, None]
    outer = [lambda given: fill(given), inner]
    fill(outer)
    assert inner[2:] == outer[2:] == [1]


def test_arguments_given_already() -> None:
    functions = Functions()
    spec = {"partial": {"name": "numpy:add"}, "args": [np.arange(3)], "kwargs": {"dtype": "f4"}}
    add = functions.load(spec)
    assert add(1).tolist() == [1, 2, 3]
    assert add(1).dtype == np.float32
    assert functions.load({**spec, "args": [np.arange(3)]}) is add
    assert functions.load({**spec, "args": [np.arange(3.0)]}) is not add
    assert functions.load({**spec, "args": [[0, 1, 2]]}) is not add


def test_a_model_is_loaded_once_for_all_functions_that_use_it() -> None:
    functions = Functions({"code": "calls = []"})
    text = (
        "def load():\n    calls.append(1)\n    return len(calls)\n"
        "def f(model, a, task=None): return model * a\n"
        "def g(model, a): return model + a\n"
    )
    model = {"source": text, "name": "load"}
    f = functions.load({"model": model, "function": {"source": text, "name": "f"}})
    g = functions.load({"model": model, "function": {"source": text, "name": "g"}})
    assert functions.namespace["calls"] == []
    assert (f(5), f(6), g(1)) == (5, 6, 2)
    assert wants_task(f)
    assert not wants_task(g)


def test_a_model_that_cannot_be_loaded_is_tried_again() -> None:
    functions = Functions({"code": "tries = []"})
    text = (
        "def load():\n    tries.append(1)\n    if len(tries) == 1: raise OSError('no weights')\n"
        "def f(model): return len(tries)\n"
    )
    parts = [{"source": text, "name": name} for name in ("load", "f")]
    f = functions.load({"model": parts[0], "function": parts[1]})
    with pytest.raises(InitError, match="load_model failed with OSError: no weights"):
        f()
    assert f() == 2


# ------------------------------------------------------------------------------ init


def test_what_init_returns_and_declares_global(module: Any) -> None:
    folder = module(
        "def init():\n    global a\n    a = 1\n    return {'b': 2}\n"
        "def f(): return a, b, c\n"
        "a, b, c = 7, 8, 9\n"
    )
    functions = Functions({"name": "bare_user_module:init", "folders": [folder]})
    assert functions.namespace == {"a": 1, "b": 2}
    spec = {"name": "bare_user_module:f", "folders": [folder]}
    assert functions.load(spec)() == (1, 2, 9)
    import bare_user_module  # type: ignore[import-not-found]

    assert bare_user_module.b == 8
    assert bare_user_module.f() == (1, 8, 9)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ({"code": "x = 1 / 0"}, "ZeroDivisionError: division by zero; no block runs.*:\nx = 1"),
        ({"code": "import sys; sys.exit(3)"}, "SystemExit: 3"),
        ({"code": "x ="}, "SyntaxError"),
        ({"name": "no_such_module_at_all:init"}, "No module named 'no_such_module_at_all'"),
    ],
)
def test_init_that_fails(init: Any, says: str) -> None:
    with raises(InitError, says):
        Functions(init)


def test_init_of_code_that_fails_is_tried_again() -> None:
    functions = Functions({"code": "tries = []"})
    fill = functions.load({"code": "block.append(tries)", "init": "tries.append(1); tries[1]"})
    with pytest.raises(InitError, match=r"(?s)init of BlockCode failed with IndexError.*tries"):
        fill([])
    found: list[Any] = []
    fill(found)
    assert found == [[1, 1]]


def test_names_are_bound_where_they_are_used_and_nowhere_else() -> None:
    def f(x: int, *, y: int = 1) -> Any:
        return x + y + np.inf

    assert bind(f, {"other": 1}) is f
    bound = bind(f, {"np": Block})
    Block.inf = 100  # type: ignore[attr-defined]
    assert bound(1) == 102
    assert f(1) == np.inf
    assert bind(functools.partial(f, y=2), {"np": Block})(1) == 103
    assert bind(np.add, {"np": 1}) is np.add


# ------------------------------------------------------------------------------ task


def test_what_nobody_holds_is_forgotten() -> None:
    functions = Functions()
    array = np.zeros(1000)
    text = f"""
import numpy as np
table = np.zeros(1000)
padding = {"x" * (2 << 20)!r}
def f(a): return table
"""
    source = {"source": text, "name": "f"}
    partial = {"partial": source, "args": [array]}
    held, other = functions.hold(source), functions.hold(partial)
    assert functions.hold(source) is held
    # The module, its lines for tracebacks, and all arrays.
    table = held.function(0)
    name = held.function.__module__
    filename = held.function.__code__.co_filename
    seen = weakref.ref(table), weakref.ref(array)
    assert name in sys.modules
    assert filename in linecache.cache
    del table, array, partial, other
    functions.clean_up()
    assert seen[1]() is None
    assert held.function(0) is seen[0]()
    del held
    functions.clean_up()
    assert seen[0]() is None
    assert name not in sys.modules
    assert filename not in linecache.cache


def test_who_wants_the_task() -> None:
    def with_task(a: Any, task: Any) -> None: ...
    def only_by_name(a: Any, *, task: Any = None) -> None: ...
    def without(a: Any, **others: Any) -> None: ...
    def by_place(task: Any, /) -> None: ...

    class Callable:
        def __call__(self, a: Any, task: Any) -> None: ...

    assert wants_task(with_task)
    assert wants_task(only_by_name)
    assert wants_task(functools.partial(with_task, 1))
    assert wants_task(Callable())
    assert wants_task(bind(with_task, {}))
    assert not wants_task(without)
    assert not wants_task(by_place)
    assert not wants_task(functools.partial(with_task, 1, 2))
    assert not wants_task(functools.partial(with_task, task=2))
    assert not wants_task(np.add)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        (
            {"name": "no_such_module_at_all:f"},
            ModuleNotFoundError,
            r"No module named 'no_such_module_at_all' in Python 3.* at .*python.*; install",
        ),
        ({"name": "json.decoders:f"}, ModuleNotFoundError, "'json.decoders'.*'json' is there, at"),
        (
            {"name": "json:laods"},
            AttributeError,
            r"no function 'laods'; did .*'loads'.*\(it is",
        ),
        (
            {"name": "json:JSONEncoder.encod"},
            AttributeError,
            "'JSONEncoder.encod'; .*encode",
        ),
        (
            {"name": "math:pi"},
            TypeError,
            "'pi': that is a float, which cannot be called",
        ),
        ({"name": "math"}, ValueError, "expected \"module:function\", got 'math'"),
        ({"file": "/no/such/place/f.py", "name": "f"}, FileNotFoundError, "no file /no/such/place"),
        ({"source": "def f(:", "name": "f"}, SyntaxError, ""),
        ({"source": "def f(): 0", "name": "g"}, AttributeError, "the source has no function 'g'"),
        ({"code": "x =", "init": None}, SyntaxError, ""),
        ({"code": "x = 1", "init": "y ="}, SyntaxError, ""),
        ({"code": 5}, TypeError, "'code' of a function must be text, got int"),
        ({"nome": "a:b"}, ValueError, r"described by .*, got \['nome'\]"),
    ],
)
def test_what_cannot_be_loaded_says_why(spec: Any, kind: type[Exception], says: str) -> None:
    with raises(kind, says):
        Functions().load(spec)


def test_modules_and_files_that_fail_say_where(module: Any) -> None:
    folder = module("import no_such_module_at_all\n")
    with raises(ModuleNotFoundError, "'bare_user_module' imports 'no_such_module_at_all'"):
        Functions().load({"name": "bare_user_module:f", "folders": [folder]})
    file = {"file": f"{folder}/bare_user_module.py", "name": "f"}
    with raises(ModuleNotFoundError, ".py imports 'no_such_module_at_all', which is not"):
        Functions().load(file)
    module("1 / 0")
    with raises(ImportError, "importing 'bare_user_module' failed with ZeroDivision"):
        Functions().load({"name": "bare_user_module:f"})
    with raises(ImportError, "running .*bare_user_module.py failed with ZeroDivision"):
        Functions().load(file)
    module("from . import other")
    with raises(ImportError, "package is named by its package: 'package.module:function'"):
        Functions().load(file)
    module("def f(): return 1")
    assert Functions().load(file)() == 1
    with raises(FileNotFoundError, "has 'bare_user_module.py'"):
        Functions().load({"file": f"{folder}/bare_user_modul.py", "name": "f"})


def test_tracebacks_show_lines_of_source_and_code() -> None:
    functions = Functions()
    text = "def f():\n    return first_thing + 1  # in source\n"
    with pytest.raises(NameError) as caught:
        functions.load({"source": text, "name": "f"})()
    assert "return first_thing + 1  # in source" in "".join(
        traceback.format_exception(caught.value)
    )
    with pytest.raises(NameError) as caught:
        functions.load({"code": "\nother_thing + 1", "init": None})(None)
    assert "other_thing + 1" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b:f", ("a.b", "f")),
        ("a:C.f", ("a", "C.f")),
        ("some where/a-b.py:f", ("some where/a-b.py", "f")),
        ("C:\\where\\a.py:f", ("C:\\where\\a.py", "f")),
    ],
)
def test_names_of_functions(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("numpy.negative", "no colon.*did you mean 'numpy:negative'"),
        ("a.py", 'no colon.*function"$'),
        ("C:/where/a.py", "no colon"),
        ("a.py::f", "did you mean 'a.py:f'"),
        ("a:f()", "did you mean 'a:f'"),
        ("where/a:f", "no module and no file.*did you mean 'where/a.py:f'"),
        (":f", "names no module"),
        ("a:", "where the name of a function is expected"),
        ("", "no colon"),
        ("f", "no colon"),
    ],
)
def test_names_of_another_form_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_name(name)


# ------------------------------------------------------------------------------ elsewhere

PROGRAM = """
import json, sys, types
package = types.ModuleType("cellimg_worker")
package.__path__ = [sys.argv[1]]
sys.modules["cellimg_worker"] = package
from cellimg_worker.functions import Functions, wants_task
for line in sys.stdin:
    init, spec, args = json.loads(line)
    try:
        function = Functions(init).load(spec)
        print(json.dumps([function(*args), wants_task(function)]), flush=True)
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
"""


PYTHONS = [sys.executable, *filter(None, os.getenv("CELLIMG_TEST_PYTHONS", "").split(os.pathsep))]
"""Others, with NumPy, may be named."""


@pytest.mark.parametrize("python", PYTHONS)
def test_in_a_python_without_the_library(python: str, module: Any) -> None:
    folder = module(
        "def f(x: 'int | None', task=None): return [x, shift]\ndef g(x): return [x]\n", "bare_env"
    )
    asked = [
        ({"code": "shift = 3"}, {"name": "bare_env:f", "folders": [folder]}, [4]),
        (None, {"file": f"{folder}/bare_env.py", "name": "g"}, [4]),
        ({"code": "k = 2"}, {"source": "def f(a): return k * a", "name": "f"}, [4]),
        (None, {"code": "block.append(1)", "init": None}, [[]]),
        (None, {"partial": {"name": "bare_env:g"}, "kwargs": {"x": 3}}, []),
        (None, {"name": "bare_env:h"}, []),
        (None, {"name": "no_such_module_at_all:f"}, []),
        ({"code": "1/0"}, {"name": "bare_env:f"}, []),
    ]
    package = Path(bind.__code__.co_filename).parent
    done = subprocess.run(
        [python, "-I", "-c", PROGRAM, str(package)],
        input="".join(json.dumps(line) + "\n" for line in asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[:5] == [[[4, 3], True], [[4], False], [8, False], [None, True], [[3], False]]
    assert [name for name, _ in found[5:]] == ["AttributeError", "ModuleNotFoundError", "InitError"]
    assert "did you mean 'f' or 'g'" in found[5][1] or "bare_env.py" in found[5][1]
    assert f"at {python}" in found[6][1]


def test_an_edit_of_the_same_size_in_the_same_second_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path, beside = tmp_path / "edited.py", tmp_path / "beside_edited.py"
    for number in (1, 2):
        path.write_text(f"import beside_edited\n\n\ndef f():\n    return {number}\n")
        beside.write_text(f"value = {number}\n")
        for each in (path, beside):
            os.utime(each, ns=(0, 10**18 + number))
        sys.modules.pop("beside_edited", None)
        module = import_file(str(path))
        assert (module.f(), module.beside_edited.value) == (number, number)
    assert sys.dont_write_bytecode is False
    sys.modules.pop("beside_edited")
