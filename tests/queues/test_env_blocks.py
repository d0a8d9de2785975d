"""Blocks in another Python: the same results, and whatever goes wrong there stays there."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import scipy.ndimage as ndi
from support import PATIENCE_S, begin, in_time, same_objects, until

import cellimg_dask as ci
from cellimg_dask.queues.env_facts import known_facts
from cellimg_dask.queues.env_here import ArrivedEnv, leave, use
from cellimg_dask.queues.rules import Rules

# What workers do. It needs no more than NumPy, and is not importable here.
FUNCTIONS = """
import os, signal, sys, time
import numpy as np

def double(a):
    return 2 * a

def smooth(a, width=1):
    total = np.zeros(a.shape)
    for axis in range(a.ndim):
        for step in range(-width, width + 1):
            total = total + np.roll(a, step, axis)
    return total

def approximate(a, level=1):
    import pywt

    return pywt.wavedec2(a, "haar", level=level)[0]

def version(a):
    major, minor = np.__version__.split(".")[:2]
    return np.full(a.shape, 100 * int(major) + int(minor))

def python(a):
    return np.full(a.shape, sys.version_info[0] * 100 + sys.version_info[1])

def pid(a):
    return np.full(a.shape, os.getpid())

def noisy(a):
    print("dust", end="")
    print("more")
    os.write(1, b"native dust")
    os.system("echo dust from a shell")
    return a

def crash(a, how="kill"):
    print("the last words", file=sys.stderr)
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)

def crash_at_first(a, mark):
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return a
    os.kill(os.getpid(), signal.SIGKILL)

def hang_at_first(a, mark):
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return a
    time.sleep(1000)

def fail(a, kind="ValueError"):
    raise {"ValueError": ValueError, "KeyError": KeyError, "Own": Own}[kind]("no nuclei here")

class Own(Exception):
    pass

def leave(a):
    sys.exit("tired")

def fork(a):
    child = os.fork()
    if child == 0:
        print("from the child", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    return a

def pooled(a):
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        rows = pool.map(np.negative, list(a.astype(int)))
    return -np.array(rows, int).reshape(a.shape)

def steps(a, task, mark=None):
    for step in range(1000):
        task.update("step", step, 1000)
        if task.cancelled:
            if mark:
                open(mark, "w").close()
            task.raise_if_cancelled()
        time.sleep(0.01)
    return a

def late(a, task, mark, door):
    if os.path.exists(mark):
        return a
    task.update("begun")
    while not task.cancelled:
        time.sleep(0.01)
    open(mark, "w").close()
    while not os.path.exists(door):
        time.sleep(0.01)
    task.raise_if_cancelled()

def reports(a, task=None):
    task.update("begun", 0, 2)
    task.update(current=2, maximum=2, info={"voxels": int(a.size)})
    return a

def bright(a):
    return np.argwhere(a > 250)

def summary(a):
    found = {"sum": int(a.sum()), "of": (a.ndim, {"a", "b"}), "largest": a.max()}
    return {**found, 3: b"bytes", "z": 1j}

def merge(parts):
    out = dict(parts[0])
    for part in parts[1:]:
        out["sum"] += part["sum"]
        out["largest"] = max(out["largest"], part["largest"])
    return out

def variables(block):
    block.data[...] = [
        os.environ.get(name, "/nowhere") != "/nowhere"
        for name in ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    ]

def everything(block):
    assert not block.inputs[0].flags.writeable
    block.data[...] = (
        block.index + 10 * block.position[-1] + 100 * block.min[0] + 1000 * block.max[-1]
        + block.dim[0] + block.inputs[0][block.halo] + block.params["shift"] * block.roi.size
        + sum(block.read_roi.shape) - block.roi.start[0]
    )

def model():
    return {"made": os.getpid(), "threshold": 0.5}

def objects(model, a):
    assert model["made"] == os.getpid()
    a[...] = a
    out = np.zeros(a.shape, "i4")
    flat = (a > model["threshold"]).ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype("i1"), [0]])))
    for number, (first, last) in enumerate(zip(edges[::2], edges[1::2]), 1):
        out.ravel()[first:last] = number
    return out
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of the functions."""
    path = tmp_path_factory.mktemp("functions") / "block_functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.fixture(scope="module")
def env(other_python: str) -> ci.Env:
    """An old Python with an old NumPy."""
    return ci.Env.venv(Path(other_python).parents[1])


@pytest.fixture
def queue(env: ci.Env) -> Iterator[ci.BlockQueue]:
    """Two workers there."""
    with ci.BlockQueue(2, "threshold = 7", env=env) as queue:
        yield queue


@pytest.fixture
def make(env: ci.Env) -> Iterator[Callable[..., ci.BlockQueue]]:
    """Make queues that are closed after the test."""
    made: list[ci.BlockQueue] = []

    def new(num_workers: int = 1, init: Any = None, **options: Any) -> ci.BlockQueue:
        made.append(ci.BlockQueue(num_workers, init, env=env, **options))
        return made[-1]

    yield new
    for queue in made:
        queue.close(0)


@pytest.fixture
def data(rng: np.random.Generator) -> Any:
    """An image."""
    return rng.integers(0, 256, (23, 31), dtype=np.uint8)


# ---------------------------------------------------------------------------- results


def test_it_is_another_python_with_another_numpy(queue: ci.BlockQueue, file: str) -> None:
    def asked(name: str) -> int:
        return int(ci.map_cells(f"{file}:{name}", np.zeros(1), dtype=int, queue=queue)[0])

    major, minor = np.__version__.split(".")[:2]
    assert asked("version") != 100 * int(major) + int(minor)
    assert asked("python") <= sys.version_info[0] * 100 + sys.version_info[1]


# In one test each: to start a Python takes longer than all of them.
def test_arrays_of_any_dtype_go_there_and_back(queue: ci.BlockQueue) -> None:
    record = [("a", ">u2"), ("b", "f4", (2,))]
    same = ci.BlockCode("block.data[...] = block.inputs[0]")
    for dtype in ("?", "u1", "<i8", ">u2", "f2", ">f4", "c8", "M8[us]", "S3", record):
        image = np.zeros(60, dtype)
        image.view("u1")[::3] = 1
        image = image.reshape(4, 15)
        native = image.dtype.newbyteorder("=")
        result = ci.fill_cells(
            same, ci.CellGrid(image.shape, (3, 4)), image, dtype=native, queue=queue
        )[...]
        np.testing.assert_array_equal(result, image, err_msg=str(dtype))


def test_a_package_that_is_not_here(queue: ci.BlockQueue, file: str, shared_data: Any) -> None:
    with pytest.raises(ImportError):
        import pywt  # noqa: F401
    tifffile = pytest.importorskip("tifffile")
    image = tifffile.imread(shared_data / "brain_signal.tif")[4, :240, :240].astype(float)
    there = ci.map_cells(
        f"{file}:approximate", image, dtype=float, shrink=2, cell_shape=(30, 40), queue=queue
    )[...]
    here = image.reshape(120, 2, 120, 2).sum((1, 3)) / 2
    np.testing.assert_allclose(there, here, rtol=1e-14)


def test_images_of_any_shape(queue: ci.BlockQueue, file: str) -> None:
    for shape in ((), (1,), (0,), (3, 0, 2), (1, 1, 1, 1), (5, 4, 3)):
        image = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        lazy = ci.map_cells(f"{file}:double", image, dtype=int, cell_shape=2, queue=queue)
        np.testing.assert_array_equal(lazy[...], 2 * image)


def test_halos_and_borders_are_as_here(queue: ci.BlockQueue, file: str, data: Any) -> None:
    for halo, boundary in product((0, 3, ((2, 4), (0, 5))), ("none", "wrap", "constant")):
        options: dict[str, Any] = {"dtype": float, "cell_shape": (7, 8), "params": {"width": 2}}
        options |= {"halo": halo, "boundary": boundary}
        there = ci.map_cells(f"{file}:smooth", data, queue=queue, **options)[...]
        here = ci.map_cells(f"{file}:smooth", data, **options)[...]
        np.testing.assert_array_equal(there, here, err_msg=f"{halo}, {boundary}")


def test_a_block_knows_there_what_it_knows_here(queue: ci.BlockQueue, file: str, data: Any) -> None:
    grid = ci.CellGrid(data.shape, (6, 9))
    data = data.astype(int)
    options: dict[str, Any] = {"dtype": int, "halo": 2, "params": {"shift": 5}}
    there = ci.fill_cells(f"{file}:everything", grid, data, queue=queue, **options)[...]
    here = ci.fill_cells(f"{file}:everything", grid, data, **options)[...]
    np.testing.assert_array_equal(there, here)


def test_names_that_init_bound(queue: ci.BlockQueue, data: Any) -> None:
    code = ci.BlockCode("block.data[...] = block.inputs[0] > threshold")
    image = ci.fill_cells(code, ci.CellGrid(data.shape, 8), data, dtype=bool, queue=queue)
    np.testing.assert_array_equal(image[...], data > 7)


def test_functions_of_this_module(queue: ci.BlockQueue, data: Any) -> None:
    shift = 3

    def outline(a: Any, size: int) -> Any:
        return np.where(a > size, a, 0) + shift

    there = ci.map_cells(
        outline, data, dtype=np.int64, cell_shape=9, params={"size": 100}, queue=queue
    )
    np.testing.assert_array_equal(there[...], outline(data, 100))


def test_results_of_unknown_size(queue: ci.BlockQueue, file: str, rng: Any) -> None:
    image = rng.integers(0, 256, (60, 60), dtype=np.uint8)
    image[20:40] = 255
    table = ci.map_points(f"{file}:bright", image, cell_shape=20, queue=queue).compute()
    found = table[["axis-0", "axis-1"]].to_numpy()
    assert set(map(tuple, found)) == set(map(tuple, np.argwhere(image > 250)))


def test_plain_values(queue: ci.BlockQueue, file: str, data: Any) -> None:
    options: dict[str, Any] = {"cell_shape": 8}
    there = ci.reduce_cells(f"{file}:summary", f"{file}:merge", data, queue=queue, **options)
    here = ci.reduce_cells(f"{file}:summary", f"{file}:merge", data, **options)
    assert there.compute() == here.compute()
    assert there.compute()["sum"] == data.sum()


def test_labels_are_linked_here_and_models_stay_there(queue: ci.BlockQueue, file: str) -> None:
    image = np.zeros(100, np.float32)
    for first, last in ((3, 9), (18, 23), (37, 42), (55, 61), (98, 100)):
        image[first:last] = 1
    labels = ci.segment(
        f"{file}:objects", image, load_model=f"{file}:model", halo=10, cell_shape=20, queue=queue
    )
    assert same_objects(labels[...], ndi.label(image)[0])


def test_a_run_resumes(env: ci.Env, file: str, data: Any, tmp_path: Path) -> None:
    target = tmp_path / "out.zarr"
    for computed in (12, 0):
        with ci.BlockQueue(2, env=env) as queue:
            image = ci.map_cells(f"{file}:double", data, dtype=np.uint8, cell_shape=8, queue=queue)
            report = ci.run(image, target, progress=False)
        assert (report.computed, report.ok) == (computed, True)
    here = ci.map_cells(f"{file}:double", data, dtype=np.uint8, cell_shape=8)
    # The environment is a part of what a result depends on.
    assert ci.run(here, target, progress=False, resume=True).computed == 12


# ---------------------------------------------------------------------------- faults


def test_what_is_printed_does_not_disturb(
    make: Any, file: str, data: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    queue = make()
    image = ci.map_cells(f"{file}:noisy", data, dtype=np.uint8, cell_shape=16, queue=queue)
    np.testing.assert_array_equal(image[...], data)
    queue.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("native dust") == err.count("dust from a shell") == 4


@pytest.mark.parametrize("size", [7, 200_000])
def test_what_python_prints_when_it_starts_does_not_disturb(
    env: ci.Env, file: str, data: Any, tmp_path: Path, size: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nprint('welcome', flush=True)\nos.write(1, b'x' * {size})\n"
    )
    chatty = ci.Env.venv(env.command()[0], variables={"PYTHONPATH": str(tmp_path)})
    with ci.BlockQueue(1, env=chatty) as queue:
        image = ci.map_cells(f"{file}:double", data, dtype=np.uint8, queue=queue)
        np.testing.assert_array_equal(in_time(lambda: image[...]), 2 * data)


def test_files_of_the_working_directory_hide_nothing(
    env: ci.Env, file: str, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cellimg_worker", "json", "numpy", "select", "types", "wire"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    known_facts.clear()
    with ci.BlockQueue(1, env=env) as queue:
        image = ci.map_cells(f"{file}:double", data, dtype=np.uint8, queue=queue)
        np.testing.assert_array_equal(image[...], 2 * data)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("ValueError", ValueError), ("KeyError", KeyError), ("Own", ci.RemoteError)],
)
def test_an_error_says_where_and_what(
    queue: ci.BlockQueue, file: str, data: Any, kind: str, cause: type[Exception]
) -> None:
    image = ci.map_cells(
        f"{file}:fail", data, dtype=np.uint8, cell_shape=16, params={"kind": kind}, queue=queue
    )
    with pytest.raises(ci.BlockError, match=r"fail at cell \(1, 0\).*no nuclei here") as caught:
        image.load((1, 0))
    assert type(caught.value.__cause__) is cause
    # The line of the user's file.
    assert any("block_functions.py" in note for note in caught.value.__cause__.__notes__)


def test_errors_with_several_parts_are_made_anew(queue: ci.BlockQueue) -> None:
    def fails(a: Any, kind: str) -> Any:
        if kind == "key":
            return {}["nuclei"]
        return np.load("/no/such/file") if kind == "file" else b"\xff".decode()

    def cause(kind: str) -> Any:
        image = ci.map_cells(fails, np.zeros(1), dtype=int, params={"kind": kind}, queue=queue)
        with pytest.raises(ci.BlockError) as caught:
            image[...]
        return caught.value.__cause__

    assert cause("key").args == ("nuclei",)
    missing = cause("file")
    assert isinstance(missing, FileNotFoundError)
    assert str(missing) == "[Errno 2] No such file or directory: '/no/such/file'"
    assert "can't decode byte 0xff" in str(cause("text"))


def test_leaving_python_is_an_error_like_others(queue: ci.BlockQueue, file: str, data: Any) -> None:
    image = ci.map_cells(f"{file}:leave", data, dtype=np.uint8, queue=queue)
    with pytest.raises(ci.BlockError, match=r"SystemExit.*tired"):
        image[...]


def test_wrong_results_are_told_as_here(queue: ci.BlockQueue, data: Any) -> None:
    def flat(a: Any) -> Any:
        return a.ravel()

    with pytest.raises(ci.ResultError, match="returned shape"):
        ci.map_cells(flat, data, dtype=np.uint8, queue=queue)[...]


def test_a_crash_says_what_was_last_written(make: Any, file: str, data: Any) -> None:
    queue = make(crash_retries=0)
    for how, match, code in (("kill", "SIGKILL", -9), ("exit", "exit status 3", 3)):
        image = ci.map_cells(
            f"{file}:crash", data, dtype=np.uint8, params={"how": how}, queue=queue
        )
        with pytest.raises(ci.WorkerDiedError, match=match) as caught:
            image[...]
        assert caught.value.exit_code == code
        assert caught.value.stderr == "the last words"
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.exit_code, again.stderr) == (code, "the last words")
    np.testing.assert_array_equal(
        ci.map_cells(f"{file}:double", data, dtype=np.uint8, queue=queue)[...], 2 * data
    )


def test_a_crash_is_tried_again_so_often(
    make: Any, file: str, data: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    queue = make(crash_retries=2)
    with pytest.raises(ci.WorkerDiedError, match="the last of 3 that tried"):
        ci.map_cells(f"{file}:crash", data, dtype=np.uint8, queue=queue)[...]
    assert capfd.readouterr().err.count("the last words") == 3
    mark = str(tmp_path / "mark")
    image = ci.map_cells(
        f"{file}:crash_at_first", data, dtype=np.uint8, params={"mark": mark}, queue=queue
    )
    np.testing.assert_array_equal(image[...], data)


def test_a_worker_that_dies_while_it_starts_again_is_tried_again(
    make: Any, file: str, data: Any, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    init = f"import os\nif os.path.exists({str(mark)!r}): os.remove({str(mark)!r}); os._exit(3)"
    queue = make(init=init)
    image = ci.map_cells(f"{file}:double", data, dtype=np.uint8, queue=queue, cache=None)
    mark.touch()
    os.kill(queue.blocks.pids[0], signal.SIGKILL)
    np.testing.assert_array_equal(image[...], 2 * data)
    assert not mark.exists()


def test_a_worker_that_never_starts_again_is_an_error(
    make: Any, file: str, data: Any, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    queue = make(init=f"import os\nif os.path.exists({str(mark)!r}): os._exit(3)")
    image = ci.map_cells(f"{file}:double", data, dtype=np.uint8, queue=queue, cache=None)
    mark.touch()
    os.kill(queue.blocks.pids[0], signal.SIGKILL)
    with pytest.raises(ci.InitError, match="exit status 3") as caught:
        in_time(lambda: image[...])
    assert type(caught.value) is ci.InitError


def test_a_block_that_takes_too_long_is_killed(
    make: Any, file: str, data: Any, tmp_path: Path
) -> None:
    queue = make(block_timeout_s=1)
    (pid,) = queue.blocks.pids
    image = ci.map_cells(
        f"{file}:hang_at_first",
        data,
        dtype=np.uint8,
        params={"mark": str(tmp_path / "mark")},
        queue=queue,
    )
    with pytest.raises(ci.BlockTimeoutError, match="took more than 1 s"):
        in_time(lambda: image[...])
    np.testing.assert_array_equal(image[...], data)
    assert queue.blocks.pids != [pid]


@pytest.mark.parametrize("function", ["fork", "pooled"])
def test_a_block_may_fork(queue: ci.BlockQueue, file: str, data: Any, function: str) -> None:
    image = ci.map_cells(f"{file}:{function}", data, dtype=int, cell_shape=16, queue=queue)
    np.testing.assert_array_equal(in_time(lambda: image[...]), data)


@pytest.mark.parametrize(
    "init", ["import no_such_module", "1 / 0", "import sys; sys.exit(3)", "import os; os._exit(4)"]
)
def test_an_init_that_fails_is_an_error_at_once(env: ci.Env, init: str) -> None:
    with pytest.raises(ci.InitError, match=r"no_such_module|division|SystemExit|exit status 4"):
        in_time(lambda: ci.BlockQueue(2, init, env=env))


def test_what_is_not_there_is_said(queue: ci.BlockQueue, data: Any, file: str) -> None:
    for name, match in (("no_such_package:f", "no_such_package"), (f"{file}:doubel", "double")):
        image = ci.map_cells(name, data, dtype=np.uint8, queue=queue)
        with pytest.raises(ci.CellimgError, match=match):
            image[...]


def test_what_cannot_be_sent_is_refused_where_it_is_defined(
    queue: ci.BlockQueue, data: Any
) -> None:
    lock = threading.Lock()

    def locked(a: Any) -> Any:
        with lock:
            return a

    with pytest.raises(TypeError, match="lock"):
        ci.map_cells(locked, data, dtype=np.uint8, queue=queue)


def test_objects_cannot_be_sent(queue: ci.BlockQueue) -> None:
    def count(a: Any) -> Any:
        return np.array([len(str(item)) for item in a])

    objects = np.array([1, "two", None], dtype=object)
    image = ci.map_cells(count, objects, dtype=int, queue=queue)
    with pytest.raises(ci.BlockError, match="Python objects"):
        image[...]


def test_the_caller_s_variables_stay_here(
    env: ci.Env, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "/nowhere")
    with ci.BlockQueue(1, env=env) as queue:
        seen = ci.fill_cells(f"{file}:variables", ci.CellGrid((4,), 4), dtype=bool, queue=queue)[
            ...
        ]
    # Numbers of threads are those of as many workers as there are.
    np.testing.assert_array_equal(seen, [False, False, True, True])


# ---------------------------------------------------------------------------- tasks


def test_blocks_say_how_far_they_are(
    make: Any, file: str, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[ci.BlockUpdate] = []

    def listen(update: ci.BlockUpdate) -> None:
        said.append(update)
        raise ValueError("a listener that fails")

    queue = make(on_update=listen)
    with caplog.at_level(logging.CRITICAL, "cellimg_dask"):
        image = ci.map_cells(f"{file}:reports", data, dtype=np.uint8, queue=queue)
        np.testing.assert_array_equal(in_time(lambda: image[...]), data)
    assert said == [
        ci.BlockUpdate("reports", (0, 0), "begun", 0, 2),
        ci.BlockUpdate("reports", (0, 0), None, 2, 2, {"voxels": data.size}),
    ]


def test_what_a_block_says_after_its_end_is_not_said_of_another(make: Any, data: Any) -> None:
    said: list[ci.BlockUpdate] = []
    queue = make(init="tasks = []", on_update=said.append)
    code = ci.BlockCode("tasks.append(task); tasks[0].update('one'); task.update('two')")
    image = ci.fill_cells(code, ci.CellGrid((3,), 1), dtype=int, queue=queue)
    for index in range(3):
        image.load(index)
    assert [(update.position, update.message) for update in said] == [
        ((0,), "one"), ((0,), "two"), ((1,), "two"), ((2,), "two"),
    ]  # fmt: skip


def test_a_block_that_nobody_wants_any_more_ends(
    make: Any, file: str, data: Any, tmp_path: Path
) -> None:
    begun = threading.Event()
    queue = make(on_update=lambda update: begun.set())
    pids = queue.blocks.pids
    mark = tmp_path / "mark"
    image = ci.map_cells(
        f"{file}:steps", data, dtype=np.uint8, params={"mark": str(mark)}, queue=queue
    )
    request = image.request(np.s_[:])
    assert begun.wait(PATIENCE_S)
    request.cancel()
    until(mark.exists)
    # The worker goes on with something else.
    other = ci.map_cells(f"{file}:double", data, dtype=np.uint8, queue=queue)
    np.testing.assert_array_equal(in_time(lambda: other[...]), 2 * data)
    assert queue.blocks.pids == pids


def test_a_block_that_is_wanted_again_while_it_ends(
    make: Any, file: str, data: Any, tmp_path: Path
) -> None:
    begun = threading.Event()
    queue = make(on_update=lambda update: begun.set())
    mark, door = tmp_path / "mark", tmp_path / "door"
    image = ci.map_cells(
        f"{file}:late",
        data,
        dtype=np.uint8,
        params={"mark": str(mark), "door": str(door)},
        queue=queue,
    )
    first = image.request(np.s_[:])
    assert begun.wait(PATIENCE_S)
    first.cancel()
    until(mark.exists)
    second = image.request(np.s_[:])
    door.touch()
    np.testing.assert_array_equal(begin(second.result).result(PATIENCE_S), data)


# ---------------------------------------------------------------------------- many


def test_workers_that_are_killed_all_the_time(
    make: Any, file: str, shared_data: Any, footprint: Callable[[], dict[str, Any]]
) -> None:
    tifffile = pytest.importorskip("tifffile")
    volume = tifffile.imread(shared_data / "brain_signal.tif")[:8, :200, :200]
    before = set(footprint()["segments"])
    queue = make(2)
    image = ci.map_cells(
        f"{file}:smooth", volume, dtype=float, halo=2, cell_shape=(4, 20, 20), queue=queue,
        cache=None,
    )  # fmt: skip
    number_of_blocks = image.grid.num_cells
    assert number_of_blocks == 200

    out = np.zeros(volume.shape)
    killed = set()
    for index in range(number_of_blocks):
        if index % 20 == 10:
            pid = queue.blocks.pids[-1]
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        out[image.grid.cell(index).roi.slices] = image.load(index)
    # Each was another one, in the place of one before.
    assert len(killed) == 10
    here = ci.map_cells(f"{file}:smooth", volume, dtype=float, halo=2, cell_shape=(4, 20, 20))
    np.testing.assert_array_equal(out, here[...])
    queue.close()
    assert set(footprint()["segments"]) == before


def test_workers_forget_images_that_are_gone(make: Any) -> None:
    queue = make()
    (pid,) = queue.blocks.pids

    def megabytes() -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10

    def shade(a: Any, light: Any) -> Any:
        return a + light[0]

    def once(n: int) -> None:
        field, table = np.full(1 << 20, n), np.full(1 << 16, n)
        for f in (functools.partial(shade, light=field), lambda a: a + table[0]):
            image = ci.map_cells(f, np.zeros(2, int), dtype=int, queue=queue, cache=None)
            assert image[0] == n

    once(0)
    before = megabytes()
    for n in range(1, 21):
        once(n)
    # It would be 8 for each partial alone.
    assert megabytes() < before + 80


def test_two_thousand_tiny_tasks_of_eight_threads(queue: ci.BlockQueue, file: str) -> None:
    images = [
        ci.map_cells(
            f"{file}:double", np.arange(250) + n, dtype=int, cell_shape=1, queue=queue, cache=None
        )
        for n in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:

        def read(n: int) -> bool:
            return all(images[n].load(i)[0] == 2 * (i + n) for i in range(250))

        assert list(pool.map(read, range(8))) == [True] * 8


# ---------------------------------------------------------------------------- elsewhere


def test_a_forked_process_has_workers_of_its_own(env: ci.Env, file: str) -> None:
    code = f"""
import os, sys
import numpy as np
import cellimg_dask as ci
queue = ci.BlockQueue(1, env=ci.Env.venv({str(Path(env.command()[0]).parents[1])!r}))
data = np.arange(10)
image = ci.map_cells({file + ":pid"!r}, data, dtype=int, queue=queue, cache=None)
mine = image[0]
child = os.fork()
if child == 0:
    sys.exit(0 if image[0] not in (mine, os.getpid()) else 1)
assert os.waitpid(child, 0)[1] == 0
assert image[0] == mine
queue.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_processes_of_dask_have_workers_of_their_own(
    queue: ci.BlockQueue, file: str, data: Any
) -> None:
    image = ci.map_cells(f"{file}:double", data, dtype=np.uint8, cell_shape=16, queue=queue)
    lazy = image.to_dask()
    with dask.config.set(scheduler="processes", num_workers=1):
        np.testing.assert_array_equal(lazy.compute(), 2 * data)


@pytest.fixture(scope="module")
def wide_cluster() -> Iterator[Any]:
    """A cluster of two processes with two threads each."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def test_workers_of_a_cluster_have_workers_there(
    wide_cluster: Any, env: ci.Env, file: str, rng: Any
) -> None:
    image = rng.integers(0, 256, (120, 120), dtype=np.uint8)
    with ci.BlockQueue(2, "threshold = 7", wide_cluster, env=env) as queue:
        gathered = ci.map_cells(
            f"{file}:pid", np.zeros(400), dtype=int, cell_shape=1, queue=queue, cache=None
        )
        pids = set(gathered[...].tolist())
        assert 2 <= len(pids) <= 4
        smoothed = ci.map_cells(
            f"{file}:smooth", image, dtype=float, halo=1, cell_shape=6, queue=queue, cache=None
        )
        reader = begin(lambda: smoothed[...])
        os.kill(min(pids), signal.SIGKILL)
        here = ci.map_cells(f"{file}:smooth", image, dtype=float, halo=1, cell_shape=6)[...]
        np.testing.assert_array_equal(reader.result(PATIENCE_S), here)
        code = ci.BlockCode("block.data[...] = block.inputs[0] > threshold")
        mask = ci.fill_cells(code, ci.CellGrid((120, 120), 40), image, dtype=bool, queue=queue)
        np.testing.assert_array_equal(mask.to_dask().compute(), image > 7)
        pids |= set(gathered[...].tolist())
    # They end with the queue.
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_queue_that_is_closed_starts_no_workers_elsewhere(env: ci.Env) -> None:
    arrived = ArrivedEnv("a queue", None, env, Rules())
    use("a queue")
    leave("a queue")
    # A block of a cluster's worker may go on for a while.
    with pytest.raises(ci.QueueClosedError):
        arrived.worker()
    use("a queue")
    assert len(arrived.worker().pids) >= 1
    leave("a queue")


def test_an_init_that_fails_on_a_cluster(wide_cluster: Any, env: ci.Env) -> None:
    with pytest.raises(ci.InitError, match="no_such_module"):
        ci.BlockQueue(1, "import no_such_module", wide_cluster, env=env)
