"""A worker answers programs in any language: scripts, functions, arrays, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import Asker, Lender, lending
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cellimg_dask.bare import shared
from cellimg_dask.bare.answers import Answer
from cellimg_dask.bare.segments import Segment
from cellimg_dask.bare.values import Attached
from cellimg_dask.queues.env_program import bare_options

Start = Callable[..., Asker]

DTYPES = ["?", "u1", "<u2", ">u2", "<i8", ">f4", "f2", "f8", "c8", ">c16", "M8[ns]", "U3", "S2"]


def command(python: str = sys.executable, **options: Any) -> list[str]:
    return [python, *bare_options("lines"), json.dumps(options)]


@pytest.fixture(scope="module")
def worker() -> Iterator[Asker]:
    """A worker that several tests ask; they leave nothing there that others would see."""
    asker = Asker(command())
    yield asker
    code = asker.end()
    errors = asker.stderr()
    asker.close()
    assert code == 0
    assert "resource_tracker" not in errors


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers."""
    made: list[Asker] = []

    def start(python: str = sys.executable, *, env: Any = None, **options: Any) -> Asker:
        made.append(Asker(command(python, **options), env=env and {**os.environ, **env}))
        return made[-1]

    yield start
    for asker in made:
        asker.close()


@pytest.fixture
def lender() -> Iterator[Lender]:
    with lending() as lender:
        yield lender


@pytest.fixture
def module(tmp_path: Path) -> str:
    """A file with functions, as other programs name it."""
    path = tmp_path / "functions.py"
    path.write_text(
        "import numpy as np\n"
        "print('loaded')\n"
        "loads = 1\n"
        "def add(a, b=1):\n"
        "    return a + b\n"
        "def count():\n"
        "    global loads\n"
        "    loads += 1\n"
        "    return loads\n"
        "def both(a):\n"
        "    return {'low': a.min(axis=0), 'high': a.max(axis=0)}\n"
        "def pair(a):\n"
        "    return a, -a\n"
        "def told(n, task):\n"
        "    for i in np.arange(n):\n"
        "        task.update(f'step {i}', current=i + 1, maximum=n, info={'mean': float('nan')})\n"
        "    return task.cancelled\n"
        "def obedient(task):\n"
        "    task.update('here')\n"
        "    while True:\n"
        "        task.raise_if_cancelled()\n"
        "def fill(block):\n"
        "    a = block.inputs[0][block.halo]\n"
        "    block.data[...] += a * block.params['factor'] + block.min[0]\n"
        "def nothing():\n"
        "    pass\n"
    )
    return str(path)


# ---------------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("script", "outputs"),
    [
        ("1 + 1", {"result": 2}),
        ("x = 1", {}),
        ("None", {}),
        ("", {}),
        ("{'a': 1, 'b': [1, 2]}", {"a": 1, "b": [1, 2]}),
        ("task.outputs['a'] = 1\n2", {"a": 1, "result": 2}),
        ("x, y", {"result": [3, "text"]}),
        ("def f(): return x\nf()", {"result": 3}),
        ("[x for _ in range(2)]", {"result": [3, 3]}),
        ("from numpy import *\nint16(3), float32(0.5), bool_(1)", {"result": [3, 0.5, True]}),
        ("import numpy as np\nnp.str_('s'), np.longdouble(0.5)", {"result": ["s", 0.5]}),
        ("float('nan'), float('inf'), -float('inf')", {"result": ["NaN", "Infinity", "-Infinity"]}),
        ("{1: {2, 2}}, 'é\\u2028', '\\ud800'", {"result": [{"1": [2]}, "é\u2028", "\ud800"]}),
        ("2 ** 100", {"result": 2**100}),
    ],
)
def test_a_script_gives_its_last_value_and_its_outputs(worker, script, outputs):
    assert worker.outputs(script=script, inputs={"x": 3, "y": "text"}) == outputs


def test_a_task_is_launched_and_completed_once(worker):
    task = worker.send(script="task.update('half', 1, 2)\ntask.update(info={'a': [1]})")
    kinds = [worker.receive() for _ in range(4)]
    assert kinds == [
        {"task": task, "responseType": "LAUNCH"},
        {"task": task, "responseType": "UPDATE", "message": "half", "current": 1, "maximum": 2},
        {"task": task, "responseType": "UPDATE", "info": {"a": [1]}},
        {"task": task, "responseType": "COMPLETION", "outputs": {}},
    ]


def test_scripts_see_only_what_others_exported(start):
    worker = start()
    worker.ask(script="x = 1\ntask.export(y=2, f=lambda: y)")
    assert worker.result("'x' in globals(), y") == [False, 2]
    # What goes with a task goes before what was left.
    assert worker.result("y", inputs={"y": 5}) == 5


def test_what_cannot_be_sent_is_kept_and_named(start):
    worker = start()
    kept = worker.result("import collections\ncollections.Counter('abbc')['b'], len")
    assert kept[0] == 2
    assert kept[1]["appose_type"] == "worker_object"
    name = kept[1]["var_name"]
    assert worker.result(f"{name}([1, 2])") == 2
    assert worker.result("f('abc')", inputs={"f": kept[1]}) == 3
    assert "no script has exported 'q'" in worker.failure(
        script="f", inputs={"f": {"appose_type": "worker_object", "var_name": "q"}}
    )


def test_errors_show_the_lines_of_the_script(worker):
    failure = worker.ask(script="def f(x):\n    return 1 / x\nf(0)")
    assert failure["kind"] == "ZeroDivisionError"
    lines = failure["error"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "<script" in lines[1]
    assert "return 1 / x" in failure["error"]
    assert "bare" not in failure["error"]
    failure = worker.ask(script="y = 1\nx = = 1")
    assert failure["kind"] == "SyntaxError"
    assert failure["error"].lstrip().startswith('File "<script')
    assert "line 2\n    x = = 1" in failure["error"]
    assert worker.failure(script="import sys\nsys.exit('gone')") == "gone"
    assert worker.failure(script="task.fail('no cells')\n3") == "no cells"
    assert worker.result("'still here'") == "still here"


def test_init_is_seen_by_scripts_and_functions(start, tmp_path):
    path = tmp_path / "uses.py"
    path.write_text("def f(): return offset + 1")
    worker = start(init="import math\noffset = 41")
    assert worker.result("offset, math.floor(1.5)") == [41, 1]
    assert worker.result(function=f"{path}:f") == 42
    worker.outputs("INIT", init="offset = 1")
    assert worker.result(function=f"{path}:f") == 2
    assert "math" in worker.failure(script="math")
    function = {"source": "def g():\n    return {'offset': 7}\n", "name": "g"}
    worker.outputs("INIT", init=function)
    assert worker.result("offset") == 7


def test_nothing_runs_where_init_failed(start):
    worker = start(init="print('preparing')\n1 / 0")
    for _ in range(2):
        failure = worker.ask(script="1")
        assert failure["kind"] == "InitError"
        assert "division by zero" in failure["error"]
        assert failure["error"].count("Traceback") == 1
        assert "/bare/" not in failure["error"]
    assert "ZeroDivisionError" in worker.stderr()
    assert "No module" in worker.failure("INIT", init="import no_such_module")
    assert "no_such_module" in worker.failure(script="1")
    worker.outputs("INIT", init="x = 3")
    assert worker.result("x") == 3


def test_what_appose_wrote_for_its_workers_runs_first(start, tmp_path):
    path = tmp_path / "init.txt"
    path.write_text("prepared = 5")
    worker = start(env={"APPOSE_INIT_SCRIPT": str(path)})
    assert worker.result("import os\nprepared, 'APPOSE_INIT_SCRIPT' in os.environ") == [5, False]
    assert not path.exists()


# ---------------------------------------------------------------------- functions


def test_functions_by_name_file_and_description(worker, module, lender):
    a = lender.put(np.arange(3.0))
    assert lender.take(worker.result(function=f"{module}:add", args=[a])).tolist() == [1, 2, 3]
    taken = worker.result(function=f"{module}:add", inputs={"a": a, "b": a})
    assert lender.take(taken).tolist() == [0, 2, 4]
    assert worker.result(function="math:hypot", args=[3, 4]) == 5
    source = {"source": "def f(x):\n    return -x", "name": "f"}
    assert worker.result(function=source, args=[3]) == -3
    partial = {"partial": {"file": module, "name": "add"}, "args": [], "kwargs": {"b": 10}}
    assert worker.result(function=partial, args=[3]) == 13
    with_array = {"partial": {"name": "numpy:dot"}, "args": [a], "kwargs": {}}
    assert worker.result(function=with_array, args=[a]) == 5
    assert worker.outputs(function=f"{module}:nothing") == {}
    outputs = worker.outputs(function=f"{module}:both", args=[lender.put([[1, 5], [3, 2]])])
    assert {name: lender.take(said).tolist() for name, said in outputs.items()} == {
        "low": [1, 2],
        "high": [3, 5],
    }


def test_a_function_is_loaded_once(start, module):
    worker = start()
    assert [worker.result(function=f"{module}:count") for _ in range(3)] == [2, 3, 4]
    assert worker.stderr() == "loaded\n"
    model = {"model": {"file": module, "name": "count"}, "function": {"name": "operator:add"}}
    assert [worker.result(function=model, args=[0]) for _ in range(2)] == [5, 5]


def test_a_function_is_given_the_task(worker, module):
    worker.send(function=f"{module}:told", args=[2])
    assert worker.receive()["responseType"] == "LAUNCH"
    for step in range(2):
        update = worker.receive()
        assert update["message"] == f"step {step}"
        assert (update["current"], update["maximum"]) == (step + 1, 2)
        assert update["info"] == {"mean": "NaN"}
    assert worker.last()["outputs"] == {"result": False}
    assert "only the outputs" in worker.failure(
        script="import numpy\ntask.update(info={'a': numpy.ones(2)})"
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"function": "no_such_module:f"}, "No module named 'no_such_module'"),
        ({"function": "/no/such/file.py:f"}, "there is no file /no/such/file.py"),
        ({"function": "math:hypo"}, "did you mean 'hypot'"),
        ({"function": "math.hypot"}, "did you mean 'math:hypot'"),
        ({"function": 5}, "a name such as"),
        ({"function": {"what": 1}}, "described by name"),
        ({"function": "math:hypot", "args": {"a": 1}}, "args is a JSON array, got dict"),
        ({"function": "math:hypot", "inputs": [1]}, "inputs is a JSON object, got list"),
        ({"function": "math:hypot", "script": "1"}, "either a script or a function"),
        ({}, "either a script or a function"),
        ({"script": 5}, "a script is a string"),
        ({"function": "builtins:object"}, "is a builtins.object, which other programs"),
        ({"script": "1", "inputs": {"a": {"appose_type": "tensor"}}}, "'tensor' is no array"),
    ],
)
def test_what_cannot_be_asked_is_explained(worker, request_, message):
    assert message in worker.failure(**request_)


def test_a_function_is_described(worker, module):
    described = worker.outputs("DESCRIBE", function=f"{module}:add")
    assert described["name"] == "add"
    assert [parameter["name"] for parameter in described["parameters"]] == ["a", "b"]
    assert described["parameters"][1]["value"] == 1
    assert "function is missing" in worker.failure("DESCRIBE")


def test_a_function_of_a_block(worker, module, lender):
    image = lender.put(np.arange(12).reshape(3, 4))
    data = lender.put(np.full((2, 2), 99))
    block = {"data": data, "start": [1, 2], "read_start": [1, 1], "read_stop": [4, 5]}
    request = {"function": f"{module}:fill", "args": [image], "inputs": {"factor": 2}}
    assert worker.result(**request, block=block)["shm"] == data["shm"]
    expected = np.arange(12).reshape(3, 4)[:2, 1:3] * 2 + 1
    assert lender.look(data).tolist() == expected.tolist()
    # Without memory for it, a new one.
    new = {"appose_type": "ndarray", "dtype": "int64", "shape": [3, 4]}
    found = lender.take(worker.result(**request, block={"data": new}))
    assert found.tolist() == (np.arange(12).reshape(3, 4) * 2).tolist()
    code = {"code": "block.data[...] = block.inputs[0].sum() + block.index", "init": None}
    found = worker.result(function=code, args=[image], block={"data": new, "index": 1})
    assert (lender.take(found) == 67).all()
    wrong = {"data": new, "start": [1]}
    assert "each of the 2 axes" in worker.failure(**request, block=wrong)
    assert "is an ndarray or a shared" in worker.failure(**request, block={"data": 5})


# ---------------------------------------------------------------------- arrays


@pytest.mark.parametrize("shape", [(3, 2), (), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_type_go_both_ways(worker, lender, dtype, shape):
    array = np.arange(int(np.prod(shape))).astype("i8").astype(dtype).reshape(shape)
    given = lender.put(array)
    found = worker.result(function="numpy:copy", args=[given])
    assert found["dtype"] in (np.dtype(dtype).name, np.dtype(dtype).str)
    assert found["shm"]["rsize"] == array.nbytes
    taken = lender.take(found)
    assert (taken.dtype, taken.shape) == (array.dtype, shape)
    assert taken.tobytes() == array.tobytes()
    # The same into memory of the caller's, also in the other byte order.
    swapped = np.zeros(shape, array.dtype.newbyteorder())
    for target in (lender.put(np.zeros(shape, dtype)), lender.put(swapped)):
        request = {"function": "numpy:copy", "args": [given], "outputs": {"result": target}}
        assert worker.result(**request) == target
        np.testing.assert_array_equal(lender.look(target), array)


def test_fields_go_both_ways(worker, lender):
    array = np.array([(1, [2, 3]), (4, [5, 6])], [("a", "<i4"), ("b", ">f4", (2,))])
    found = lender.take(worker.result(function="numpy:copy", args=[lender.put(array)]))
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


def test_short_names_of_types_and_memory_are_understood(worker, lender):
    given = lender.put(np.array([1, 2, 3], np.uint16))
    name = given["shm"]["name"]
    for memory in (given["shm"], {"name": name}, {"name": f"/{name}"}, name):
        said = {**given, "dtype": "uint16", "shm": memory}
        assert worker.result(function="numpy:sum", args=[said]) == 6
    tail = {**given, "shape": [2], "offset": 2}
    assert worker.result(function="numpy:sum", args=[tail]) == 5
    nothing = {"appose_type": "ndarray", "dtype": "bool", "shape": [0, 3], "shm": None}
    assert worker.result("a.shape, str(a.dtype)", inputs={"a": nothing}) == [[0, 3], "bool"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "image"}, "no dtype of NumPy: 'image'"),
        ({"dtype": None}, "the dtype of an array is a name"),
        ({"dtype": "object"}, "Python objects cannot lie in shared memory"),
        ({"shape": [-1]}, "the shape of an array is a list"),
        ({"shape": 3}, "the shape of an array is a list"),
        ({"shape": [4]}, "which has 24"),
        ({"shape": [2**62]}, "which has 24"),
        ({"offset": 1}, "needs 25 bytes of the shared memory"),
        ({"offset": -8}, "the offset of an array"),
        ({"shm": None}, "shm is missing"),
        ({"shm": {}}, "name is missing"),
        ({"shm": {"name": 5}}, "the name of shared memory is a string"),
        ({"shm": {"name": "no-such-memory"}}, "no-such-memory"),
        ({"shm": {"name": "../../etc/passwd"}}, "no name for shared memory"),
    ],
)
def test_arrays_that_cannot_be_are_explained(worker, lender, change, message):
    given = {**lender.put(np.arange(3)), **change}
    assert message in worker.failure(function="numpy:sum", args=[given])


def test_scripts_get_arrays_as_appose_gives_them(worker, lender):
    given = lender.put(np.arange(4, dtype=np.uint16))
    script = (
        "import numpy as np\n"
        "plain = a.ndarray()\n"
        "plain[0] = 7\n"
        "type(plain) is np.ndarray, int(a.sum()), a.dtype == 'uint16', a.shm.name, "
        "a.shm.rsize, bytes(memory.buf[:2]), memory.size"
    )
    found = worker.result(
        script.replace("bytes(", "list("), inputs={"a": given, "memory": given["shm"]}
    )
    assert found == [True, 13, True, given["shm"]["name"], 8, [7, 0], 8]
    assert lender.look(given)[0] == 7


def test_what_lies_in_the_callers_memory_is_not_copied(worker, lender):
    a = lender.put(np.arange(6.0).reshape(2, 3))
    expected = {**a, "dtype": "float64"}
    assert worker.result("a *= 2\na", inputs={"a": a}) == expected
    assert lender.look(a).tolist() == [[0, 2, 4], [6, 8, 10]]
    row = worker.result("a[:1]", inputs={"a": a})
    assert (row["shape"], row["shm"]["name"]) == ([1, 3], a["shm"]["name"])
    # Other programs read from the begin, row by row.
    for script in ("a[1:]", "a.T", "a[:, :2]"):
        copied = worker.result(script, inputs={"a": a})
        assert copied["shm"]["name"] != a["shm"]["name"]
        values = eval(script, {"a": lender.look(a)})
        assert lender.take(copied).tolist() == values.tolist()
    assert "read-only" in worker.failure(script="a += 1", inputs={"a": {**a, "readonly": True}})


def test_results_go_where_the_caller_wants_them(worker, lender, module):
    a = lender.put(np.arange(3))
    low, high = lender.put(np.zeros(3, int)), lender.put(np.zeros(3, int))
    request = {"function": f"{module}:pair", "args": [a]}
    assert worker.result(**request, outputs={"result": [low, high]}) == [low, high]
    assert (lender.look(low).tolist(), lender.look(high).tolist()) == ([0, 1, 2], [0, -1, -2])
    found = worker.result(**request, outputs={"result": [None, high]})
    assert found[1] == high
    # By reference, where it lay already.
    assert found[0]["shm"] == a["shm"]
    # A swap.
    outputs = worker.outputs(
        script="{'b': a, 'a': b}", inputs={"a": low, "b": high}, outputs={"a": low, "b": high}
    )
    assert outputs == {"a": low, "b": high}
    assert (lender.look(low).tolist(), lender.look(high).tolist()) == ([0, -1, -2], [0, 1, 2])
    number = lender.put(np.zeros((), "f8"))
    assert worker.result("0.5", outputs={"result": number}) == number
    assert lender.look(number) == 0.5


@pytest.mark.parametrize(
    ("script", "outputs", "message"),
    [
        ("a[:2]", {"result": "a"}, "has shape (2,) and dtype int64; the array that was given"),
        ("a.astype('f4')", {"result": "a"}, "dtype float32; the array that was given for it has"),
        ("a", {"mask": "a"}, "outputs has nothing called 'mask'; there is 'result'"),
        ("None", {"result": "a"}, "there is nothing"),
        ("a, a", {"result": ["a"]}, "is a tuple of 2, not a list of 1"),
        ("a", {"result": ["a"]}, "is a Given, not a list of 1"),
        ("a, 1", {"result": {"x": "a"}}, "is a tuple, not a dict"),
        ("a", {"result": 5}, "is asked for in 5"),
        ("None, 1", {"result": ["a", None]}, "an array of Python objects"),
        ("a", ["a"], "outputs is a JSON object, got list"),
    ],
)
def test_results_that_do_not_fit_are_explained(worker, lender, script, outputs, message):
    a = lender.put(np.arange(3))
    said = json.loads(json.dumps(outputs).replace('"a"', json.dumps(a)))
    assert message in worker.failure(script=script, inputs={"a": a}, outputs=said)
    assert lender.look(a).tolist() == [0, 1, 2]


def test_no_array_is_left_by_a_task_that_fails(start, tmp_path):
    log = tmp_path / "log"
    worker = start()
    script = FIRST_MAKES_ONE + "task.outputs['second'] = Last()"
    message = worker.failure(script=script, inputs={"log": str(log), "end": "1 / 0"})
    assert message == "division by zero"
    names = log.read_text().split()
    assert len(names) == 1
    assert not Path("/dev/shm", names[0]).exists()
    for bad in ("np.array([None])", "np.ma.zeros(3)", "{(1, 2): 3}"):
        worker.failure(script=f"import numpy as np\n[np.ones(3), {bad}]")
    assert worker.end() == 0
    assert worker.stderr() == ""


FIRST_MAKES_ONE = """
import os, re, signal
import numpy as np
class Last:
    def __array__(self, *args, **kwargs):
        with open("/proc/self/maps") as maps, open(log, "w") as file:
            file.write(" ".join(set(re.findall("/dev/shm/(cellimg-[0-9a-f]{16})", maps.read()))))
        exec(end)
task.outputs["first"] = np.ones(1000)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_killed_worker_leaves_nothing_and_takes_nothing(start, tmp_path, lender, until):
    log, a = tmp_path / "log", lender.put(np.arange(3))
    worker = start()
    result = worker.result("a + 1", inputs={"a": a})
    script = FIRST_MAKES_ONE + "task.outputs['second'] = Last()"
    end = "os.kill(os.getpid(), signal.SIGKILL)"
    worker.send(script=script, inputs={"log": str(log), "end": end, "a": a})
    assert worker.receive()["responseType"] == "LAUNCH"
    assert worker.line() is None
    assert worker.process.wait() == -signal.SIGKILL
    names = set(log.read_text().split()) - {a["shm"]["name"], result["shm"]["name"]}
    assert len(names) == 1
    until(lambda: not Path("/dev/shm", *names).exists())
    # What it was given, and what it had given.
    assert lender.look(a).tolist() == [0, 1, 2]
    assert lender.take(result).tolist() == [1, 2, 3]


def test_results_outlive_the_worker_that_made_them(start, lender):
    worker = start(once=True)
    result = worker.result(function="numpy:ones", args=[[2, 2]])
    assert worker.process.wait() == 0
    assert worker.stderr() == ""
    assert lender.take(result).tolist() == [[1, 1], [1, 1]]


def test_memory_that_a_script_made_by_itself_is_given_to_the_caller(start, lender):
    worker = start()
    script = (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "memory = SharedMemory(create=True, size=6)\n"
        "memory.buf[:2] = b'ab'\n"
        "task.export(memory=memory)\n"
        "memory, memory"
    )
    first, second = worker.result(script)
    assert first == second
    assert worker.result("memory") == first
    assert worker.end() == 0
    assert worker.stderr() == ""
    said = {"shape": [2], "dtype": "S1", "shm": first}
    assert lender.take(said).tolist() == [b"a", b"b"]


def test_a_name_may_be_given_to_other_memory(worker, tmp_path):
    name = f"cellimg-test-{os.getpid()}"
    for size in (3, 3, 5000):
        memory = Segment.create(name, 8 * size)
        try:
            memory.array((size,), "i8")[...] = size
            said = {"appose_type": "ndarray", "dtype": "int64", "shape": [size], "shm": name}
            assert worker.result(function="numpy:sum", args=[said]) == size * size
        finally:
            memory.unlink()
            memory.close()


def test_memory_that_was_removed_is_let_go_of(lender):
    attached = Attached()
    a, b = lender.put(np.arange(3)), lender.put(np.arange(4))
    assert attached.decode([a, b], {})[0].sum() == 3
    assert len(attached) == 2
    lender.remove(a)
    attached.sweep()
    assert len(attached) == 1


def test_shared_arrays_by_name(worker, lender):
    with shared.put(f"cellimg-test-{os.getpid()}", np.arange(6).reshape(2, 3), "yx") as image:
        said = {"appose_type": "shared", "name": image.name}
        assert worker.result(function="numpy:sum", args=[said]) == 15
        found = worker.result("a += 1\na", inputs={"a": said})
        assert found == {
            **said,
            "dtype": "int64",
            "shape": [2, 3],
            "order": "C",
            "offset": image.offset,
        }
        assert image.array.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert lender.take(worker.result("a[1:]", inputs={"a": said})).tolist() == [[4, 5, 6]]
        into = {"function": "numpy:negative", "args": [said], "outputs": {"result": said}}
        assert worker.result(**into) == said
        assert image.array.tolist() == [[-1, -2, -3], [-4, -5, -6]]
        assert "read-only" in worker.failure(
            script="a += 1", inputs={"a": {**said, "readonly": True}}
        )
    assert image.name in worker.failure(function="numpy:sum", args=[said])


def plain() -> st.SearchStrategy[Any]:
    """Values that stand for themselves."""
    return st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)


def arrays() -> st.SearchStrategy[Any]:
    dtypes = st.sampled_from([np.dtype(name) for name in DTYPES])
    shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    return dtypes.flatmap(lambda dtype: npst.arrays(dtype, shapes))


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            plain() | arrays(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text().filter(lambda key: key != "appose_type"), inner)
            ),
            max_leaves=5,
        ),
        max_size=3,
    )
)
def test_values_come_back_as_they_were(outputs):
    attached, answer = Attached(), None
    try:
        answer = Answer(attached)
        line = json.dumps(answer.encode(outputs, {}), allow_nan=False)
        same(attached.decode(json.loads(line), {}), outputs)
    finally:
        if answer is not None:
            answer.discard()
    attached.sweep()
    assert len(attached) == 0


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, (list, dict)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for key in range(len(expected)) if isinstance(expected, list) else expected:
            same(found[key], expected[key])
    elif isinstance(expected, float) and math.isinf(expected):
        assert float(found) == expected
    else:
        assert type(found) is type(expected)
        assert found == expected


# ---------------------------------------------------------------------- what goes wrong


def test_nothing_that_is_printed_disturbs_the_answers(start):
    worker = start()
    script = (
        "import os, subprocess, sys\n"
        "print('no newline', end='')\n"
        "print('{\"task\": 1}')\n"
        "sys.stdout.write('half a line')\n"
        "os.write(1, b'native')\n"
        "subprocess.run(['echo', 'from a child'])\n"
        "sys.__stdout__.write('more')\n"
        "sys.stdin.read()"
    )
    assert worker.result(script) == ""
    assert worker.result("1 + 1") == 2
    assert worker.end() == 0
    for text in ("no newline", '{"task": 1}', "half a line", "native", "from a child", "more"):
        assert text in worker.stderr()


def test_many_threads_ask_one_worker(worker):
    tasks = {f"{thread}-{number}": thread * number for thread in range(8) for number in range(25)}

    def ask(thread: int) -> None:
        for number in range(25):
            worker.send(task=f"{thread}-{number}", script=f"print('.', end='')\n{thread}*{number}")

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    found = {}
    for _ in range(len(tasks)):
        response = worker.last()
        found[response["task"]] = response["outputs"]["result"]
    for thread in threads:
        thread.join()
    assert found == tasks


def test_cancelling(worker, module):
    late = "while not task.cancel_requested: pass\n'late'"
    first, second, third = (worker.send(script=script) for script in (late, "2", "3"))
    assert worker.receive() == {"task": first, "responseType": "LAUNCH"}
    # One that waits, and one that runs and may go on.
    for task in (second, "no such task", first):
        worker.send("CANCEL", task=task)
    assert worker.receive()["outputs"] == {"result": "late"}
    assert worker.receive() == {"task": second, "responseType": "CANCELATION"}
    assert worker.receive() == {"task": third, "responseType": "LAUNCH"}
    assert worker.receive()["outputs"] == {"result": 3}
    # Of what has ended.
    worker.send("CANCEL", task=third)
    for content in (
        {"script": f"{late}\ntask.cancel()"},
        {"function": f"{module}:obedient"},
        {
            "script": "from concurrent.futures import ThreadPoolExecutor\n"
            f"def wait():\n    {late.splitlines()[0]}\n    task.cancel()\n"
            "with ThreadPoolExecutor() as pool: list(pool.map(lambda _: wait(), range(2)))"
        },
    ):
        task = worker.send(**content)
        assert worker.receive()["responseType"] == "LAUNCH"
        worker.send("CANCEL", task=task)
        assert worker.last() == {"task": task, "responseType": "CANCELATION"}
    assert worker.result("4") == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_forks_within_a_task(worker):
    script = (
        "import os\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print('from the child', end='')\n"
        "    task.update('from the child')\n"
        "os.waitpid(child, 0)[1] if child else 'child'"
    )
    worker.send(script=script)
    assert [worker.receive()["responseType"] for _ in range(2)] == ["LAUNCH", "COMPLETION"]
    script = (
        "import multiprocessing as mp\n"
        "with mp.get_context(how).Pool(2) as pool: found = pool.map(abs, [-1, -2])\n"
        "found"
    )
    for how in ("fork", "spawn"):
        assert worker.result(script, inputs={"how": how}) == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("what", "a line is no JSON (Expecting value"),
        ('{"task": 1', "a line is no JSON"),
        (b"\xff\xfe\xfd", "a line is no JSON"),
        ("[" * 100_000, "a line is no JSON"),
        ("[1, 2]", "expected a JSON object in a line, got [1, 2]"),
        ('"EXECUTE"', "expected a JSON object in a line"),
        ('{"task": [1], "requestType": "EXECUTE", "script": "1"}', "string or a number"),
        ('{"attached": 5}', "not iterable"),
    ],
)
def test_lines_that_are_no_requests_are_answered(worker, line, message):
    worker.write(line if isinstance(line, bytes) else line.encode())
    worker.write("\n\n  \n")
    response = worker.receive()
    assert (response["responseType"], response["task"]) == ("FAILURE", None)
    assert message in response["message"]
    assert len(response["message"]) < 300
    assert worker.result("1") == 1


def test_requests_of_unknown_types_are_answered(worker):
    message = worker.failure("RUN", script="1")
    assert message == ("expected DESCRIBE or EXECUTE or INIT or CANCEL as requestType, got 'RUN'")
    worker.write('{"task": 7, "script": "1"}\r\n')
    response = worker.receive()
    assert (response["task"], response["responseType"]) == (7, "FAILURE")
    assert "got none" in response["message"]


def test_once_says_by_its_status_whether_it_was_done(start):
    worker = start(once=True, init="1 / 0")
    assert "no block runs" in worker.failure(script="1")
    assert worker.process.wait() == 1
    # Nothing was asked.
    assert start(once=True).end() == 1


def test_a_line_that_is_no_request_while_a_task_runs(worker):
    task = worker.send(script="task.update()\nwhile not task.cancelled: pass\ntask.cancel()")
    worker.receive()
    worker.receive()
    worker.write("what\n")
    assert worker.receive()["task"] is None
    worker.send("CANCEL", task=task)
    assert worker.receive() == {"task": task, "responseType": "CANCELATION"}


def test_a_task_without_a_name_and_a_line_without_an_end(start):
    worker = start()
    worker.write('{"requestType": "EXECUTE", "script": "1 + 1"}')
    assert worker.end() == 0
    worker.receive()
    assert worker.receive() == {
        "task": None,
        "responseType": "COMPLETION",
        "outputs": {"result": 2},
    }
    assert worker.line() is None


def test_tasks_go_on_when_no_more_requests_come(start, tmp_path):
    worker, door = start(), tmp_path / "door"
    script = "import os\ntask.update()\nwhile not os.path.exists(door): task.cancelled\n'done'"
    worker.send(script=script, inputs={"door": str(door)})
    worker.send(script="task.cancelled, 2")
    assert [worker.receive()["responseType"] for _ in range(2)] == ["LAUNCH", "UPDATE"]
    worker.process.stdin.close()
    door.touch()
    assert worker.last()["outputs"] == {"result": "done"}
    assert worker.last()["outputs"] == {"result": [False, 2]}
    assert worker.line() is None
    assert worker.process.wait() == 0


def test_a_caller_that_does_not_listen_any_more(start, tmp_path):
    worker = start()
    worker.result("1")
    worker.process.stdout.close()
    worker.send(script="import numpy\nnumpy.ones(1000)")
    assert worker.process.wait() == 0
    assert worker.stderr() == ""


@pytest.mark.parametrize("busy", [True, False])
def test_an_interrupt_ends_it_quietly(start, busy):
    worker = start(init="import threading")
    if busy:
        worker.send(script="task.update()\nthreading.Event().wait()")
        worker.receive()
        worker.receive()
    else:
        worker.result("1")
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait() == 130
    assert worker.line() is None
    assert worker.stderr() == ""


# ---------------------------------------------------------------------- other Pythons


def test_another_python_with_an_old_numpy(other_python, start, lender, module):
    worker = start(other_python, init="import sys, numpy")
    version, numpy = worker.result("list(sys.version_info[:2]), numpy.__version__")
    assert (version, numpy) != (list(sys.version_info[:2]), np.__version__)
    modules = worker.result("sorted({name.partition('.')[0] for name in sys.modules})")
    assert not {"cellimg_dask", "dask", "appose", "cloudpickle"} & set(modules)
    for dtype in DTYPES:
        array = np.arange(3).astype(dtype)
        target = lender.put(np.zeros(3, dtype))
        a = lender.put(array)
        taken = lender.take(worker.result("a.copy()", inputs={"a": a}))
        assert taken.tobytes() == array.tobytes()
        request = {"function": "numpy:copy", "args": [a], "outputs": {"result": target}}
        assert worker.result(**request) == target
        assert lender.look(target).tobytes() == array.tobytes()
    assert worker.result(function=f"{module}:add", args=[1]) == 2
    described = worker.outputs("DESCRIBE", function=f"{module}:add")
    assert [parameter["name"] for parameter in described["parameters"]] == ["a", "b"]
    with shared.put(f"cellimg-other-{os.getpid()}", np.arange(6, dtype=">u2")) as image:
        said = {"appose_type": "shared", "name": image.name}
        assert worker.result("a[...] = a * 2", inputs={"a": said}) is None
        assert image.array.tolist() == [0, 2, 4, 6, 8, 10]
        assert worker.result(function="numpy:sum", args=[said]) == 30
    assert "ZeroDivisionError" in worker.ask(script="1 / 0")["error"]
    assert worker.end() == 0


def test_appose_is_a_client(tmp_path):
    appose = pytest.importorskip("appose")
    # In a process of its own: its threads and its shared memory are its own.
    assert appose.__version__
    script = Path(__file__).with_name("appose_client.py")
    arguments = [sys.executable, str(script), json.dumps(bare_options("lines"))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all as expected"
