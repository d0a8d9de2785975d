"""Shared arrays between processes that know each other by a name only, of any Python and NumPy."""

from __future__ import annotations

import json
import os
import pickle
import re
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import PATIENCE_S

from cellimg_dask.bare import header, owners, registry, shared, shared_array
from cellimg_dask.bare.header import PAGE, dtype_from_json, dtype_to_json
from cellimg_dask.bare.segments import Segment, remove_name

FOLDER = str(Path(shared.__file__).parent)

BARE = f"""
import os, signal, sys, types
package = types.ModuleType("cellimg_worker")
package.__path__ = [{FOLDER!r}]
sys.modules["cellimg_worker"] = package
from cellimg_worker import shared
import numpy as np
def said():
    return sys.stdin.readline().strip()
def say(*words):
    print(*words, flush=True)
"""
"""What a Python without the package does to have these modules."""

Until = Callable[[Callable[[], object]], None]
Start = Callable[..., "Other"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="looks at what POSIX has")


def exists(name: str) -> bool:
    return Path("/dev/shm", name).exists()


class Other:
    """A process that is no relative of this one, told what to do line by line."""

    def __init__(self, python: str, code: str, *arguments: str, quiet: bool = True) -> None:
        self.process = subprocess.Popen(
            [python, "-W", "error", "-c", BARE + code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # In a session of its own: what is killed is killed alone.
            start_new_session=True,
        )
        self.quiet = quiet

    def say(self, word: str = "") -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        if not line:
            _, errors = self.process.communicate(timeout=PATIENCE_S)
            raise AssertionError(f"it ended: {errors}")
        return line

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        self.end()

    def end(self) -> str:
        """Let it end by itself, and return what it complained of."""
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        if self.quiet and self.process.returncode >= 0:
            assert self.process.returncode == 0, errors
            assert not errors
        return errors


@pytest.fixture
def start() -> Iterator[Callable[..., Other]]:
    """Start processes; what a failed test leaves is ended."""
    started: list[Other] = []

    def make(*arguments: Any, **options: Any) -> Other:
        started.append(Other(*arguments, **options))
        return started[-1]

    yield make
    for other in started:
        if other.process.poll() is None:
            other.process.kill()
        other.process.communicate()


@pytest.fixture(params=["this", "other"])
def python(request: pytest.FixtureRequest) -> str:
    """A Python: this one, or another version with another NumPy."""
    return sys.executable if request.param == "this" else request.getfixturevalue("other_python")


@pytest.fixture
def name() -> Iterator[str]:
    """A name that nobody has, and which is free again after the test."""
    name = f"cellimg-test-{secrets.token_hex(4)}"
    yield name
    shared.cleanup(dead_owners=False, own=True)
    assert not exists(name)


def test_the_other_python_is_another(other_python: str) -> None:
    code = "import sys, numpy; print(sys.version_info[:2] == {}, numpy.__version__)"
    mine = tuple(sys.version_info[:2])
    out = subprocess.check_output([other_python, "-c", code.format(mine)], text=True)
    same, numpy = out.split()
    assert numpy.split(".")[:2] != np.__version__.split(".")[:2]
    assert same == "False" or sys.version_info[:2] == (3, 9)


# ---------------------------------------------------------------------- two processes


def test_writes_are_seen_both_ways(python: str, name: str, start: Start) -> None:
    values = np.arange(24, dtype=">u2").reshape(2, 3, 4)
    code = """
theirs = shared.open(sys.argv[1])
say(theirs.shape, theirs.dtype.str, *theirs.axes, int(theirs.array.sum()), theirs.owner)
theirs[0, 0, 0] = 500
theirs.array[1, 2, 3] += 1
say("written")
said()
say(int(theirs[0, 1, 2]))
theirs.close()
"""
    with shared.put(name, values, "zyx") as mine:
        other = start(python, code, name)
        assert other.hear() == f"(2, 3, 4) >u2 z y x {values.sum()} {os.getpid()}"
        assert other.hear() == "written"
        assert (mine[0, 0, 0], mine.array[1, 2, 3]) == (500, 24)
        mine[0, 1, 2] = 321
        other.say()
        assert other.hear() == "321"
        other.end()
        assert mine[0, 0, 0] == 500
    assert not exists(name)


KINDS = [
    ("?", (3, 5), "C"),
    (">f8", (2, 3), "F"),
    ("c8", (4,), "C"),
    ("u1", (0, 7), "C"),
    ("i8", (), "C"),
    ("M8[us]", (2,), "C"),
    ("<U5", (3,), "C"),
    ("S3", (2, 2), "F"),
    ([("label", "<u4"), ("at", ">f4", (3,)), ("in", [("a", "?"), ("b", "S2")])], (5,), "C"),
]


def example(kind: Any, shape: tuple[int, ...], order: Any) -> np.ndarray[Any, Any]:
    dtype = np.dtype(kind)
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    if dtype.kind == "U":
        return np.array(["ab", "ç", "12345"], dtype).reshape(shape)
    raw = bytes(number % 2 for number in range(count + 1))
    return np.array(np.ndarray(shape, dtype, raw), order=order)


@pytest.mark.parametrize("there", ["they put", "we put"])
def test_every_kind_of_array_arrives_as_it_is(
    python: str, name: str, there: str, start: Start
) -> None:
    arrays = [example(*kind) for kind in KINDS]
    names = [f"{name}-{number}" for number in range(len(KINDS))]
    facts = [
        f"{json.dumps(dtype_to_json(array.dtype))} {array.shape} {array.flags.f_contiguous} "
        f"{array.tobytes().hex()}"
        for array in arrays
    ]
    told = (
        "import json\n"
        "from cellimg_worker.header import dtype_to_json\n"
        "def tell(array):\n"
        "    say(json.dumps(dtype_to_json(array.dtype)), array.shape, array.flags.f_contiguous,"
        " array.tobytes().hex())\n"
    )
    if there == "we put":
        code = told + "for name in sys.argv[1:]:\n    tell(shared.open(name).array)\n"
        made = [shared.put(each, array) for each, array in zip(names, arrays, strict=True)]
        other = start(python, code, *names)
        assert [other.hear() for _ in facts] == facts
        other.end()
        for each in made:
            each.close()
        return
    code = told + (
        "from cellimg_worker.header import dtype_from_json\n"
        "for name in sys.argv[1:]:\n"
        "    dtype, shape, order, data = json.loads(said())\n"
        "    array = np.ndarray(shape, dtype_from_json(dtype), bytes.fromhex(data + '00'))\n"
        "    tell(shared.put(name, np.asarray(array, order=order)).array)\n"
        "said()\n"
    )
    other = start(python, code, *names)
    for array, kind, fact in zip(arrays, KINDS, facts, strict=True):
        order = kind[2]
        words = [dtype_to_json(array.dtype), array.shape, order, array.tobytes().hex()]
        other.say(json.dumps(words))
        assert other.hear() == fact
    for each, array in zip(names, arrays, strict=True):
        with shared.open(each) as mine:
            assert (mine.dtype, mine.shape) == (array.dtype, array.shape)
            assert mine.array.flags.f_contiguous == array.flags.f_contiguous
            assert mine.array.tobytes() == array.tobytes()
            assert not mine.is_owner
    other.say()
    other.end()
    assert not any(map(exists, names))


@pytest.mark.parametrize("how", ["exits", "is killed", "closes"])
def test_a_reader_that_ends_harms_nothing(python: str, name: str, how: str, start: Start) -> None:
    code = """
theirs = shared.open(sys.argv[1])
theirs[0] = 5
view = theirs.array[:2]
if sys.argv[2] == "closes":
    theirs.close()
    view[1] = 6
say("there")
if sys.argv[2] == "is killed":
    said()
"""
    with shared.put(name, np.zeros(1000)) as mine:
        for _ in range(2):
            other = start(python, code, name, how)
            assert other.hear() == "there"
            other.kill() if how == "is killed" else other.end()
            assert exists(name)
            assert mine[0] == 5
            assert not mine.is_removed
        with shared.open(name) as again:
            assert again[0] == 5
    assert not exists(name)


@pytest.mark.parametrize("how", ["exits", "is killed", "closes", "raises"])
def test_an_owner_that_ends_takes_it_along(
    python: str, name: str, how: str, until: Until, start: Start
) -> None:
    code = """
theirs = shared.put(sys.argv[1], np.arange(1000))
say("there")
said()
if sys.argv[2] == "closes":
    theirs.close()
    say("closed")
    said()
if sys.argv[2] == "raises":
    sys.stderr.close()
    raise KeyboardInterrupt
"""
    other = start(python, code, name, how, quiet=how != "raises")
    assert other.hear() == "there"
    mine = shared.open(name)
    assert not mine.is_removed
    if how == "is killed":
        other.kill()
        # Its tracker notices.
        until(lambda: not exists(name))
    else:
        other.say()
        if how == "closes":
            assert other.hear() == "closed"
            assert not exists(name)
            other.say()
        other.end()
    assert not exists(name)
    assert mine.is_removed
    # Who had it keeps it.
    mine[1] = 77
    assert mine.array[:3].tolist() == [0, 77, 2]
    mine.close()
    with pytest.raises(FileNotFoundError, match="no shared memory of this name"):
        shared.open(name)


def test_what_an_owner_and_its_tracker_leave_is_cleaned_up(
    python: str, name: str, start: Start
) -> None:
    code = """
theirs = shared.put(sys.argv[1], np.arange(1000), axes=["t"])
from multiprocessing import resource_tracker
say(resource_tracker._resource_tracker._pid)
said()
"""
    other = start(python, code, name)
    tracker = int(other.hear())
    [before] = [info for info in shared.list() if info.name == name]
    assert (before.is_alive, before.owner) == (True, other.process.pid)
    with pytest.raises(FileExistsError, match=rf"of process {other.process.pid}; remove\(name\)"):
        shared.put(name, [1], replace=True)
    assert name not in shared.cleanup()
    os.kill(tracker, signal.SIGKILL)
    # Not waited for yet, so that there still is a process of this number.
    other.process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.process.pid, os.WEXITED | os.WNOWAIT)
    [after] = [info for info in shared.list() if info.name == name]
    assert (after.is_alive, after.shape, after.axes) == (False, (1000,), ("t",))
    other.kill()
    assert exists(name)
    with shared.open(name) as left:
        assert left.array.sum() == 499500
    with pytest.raises(FileExistsError, match="which has ended; replace=True"):
        shared.put(name, [1])
    assert shared.cleanup(dead_owners=False) == []
    assert name in shared.cleanup(dead_owners=True)
    assert not exists(name)


def test_a_dead_owners_name_can_be_taken(name: str) -> None:
    made = Segment.create(name, 2 * PAGE)
    facts = header.Header((2,), np.dtype("u1"), "C", None, os.getpid(), "long ago", None, "x")
    start = facts._replace(namespace=owners.namespace()).pack()[1]
    made.array((len(start),), "u1")[:] = np.frombuffer(start, "u1")
    with pytest.raises(FileExistsError, match="which has ended"):
        shared.put(name, [1.5])
    with shared.put(name, [1.5], replace=True) as mine:
        assert mine[0] == 1.5
        # Nor does the first harm the second.
        made.unlink()
        assert exists(name)
    made.close()


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_reader_that_has_the_owners_tracker_harms_nothing(
    name: str, how: str, start: Start, until: Until, tmp_path: Path
) -> None:
    # What is made known to it twice, or not any more, would not outlive the reader, or be left.
    (tmp_path / "reading.py").write_text(
        "def read(folder, name):\n"
        "    import sys, types\n"
        "    package = types.ModuleType('cellimg_worker')\n"
        "    package.__path__ = [folder]\n"
        "    sys.modules['cellimg_worker'] = package\n"
        "    from cellimg_worker import shared\n"
        "    with shared.open(name) as theirs:\n"
        "        theirs[0] += 1\n"
    )
    code = """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)
name, how, folder, bare = sys.argv[1:]
sys.path.insert(0, folder)
import reading
if __name__ == "__main__":
    mine = shared.put(name, np.zeros(3))
    for _ in range(2):
        other = multiprocessing.get_context(how).Process(target=reading.read, args=(bare, name))
        other.start()
        other.join()
    say(mine[0], mine.is_removed)
    said()
"""
    other = start(sys.executable, code, name, how, str(tmp_path), FOLDER)
    assert other.hear() == "2.0 False"
    other.kill()
    until(lambda: not exists(name))


def test_a_forked_child_is_no_owner(name: str, start: Start) -> None:
    code = """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)
mine = shared.put(sys.argv[1], np.zeros(3))
child = os.fork()
if not child:
    say(mine.is_owner, shared.open(sys.argv[1]).is_owner)
    mine[0] = 4
    mine.close()
    sys.exit()
os.waitpid(child, 0)
say(mine.is_owner, mine[0], mine.is_removed)

def work(name):
    shared.put(name + "-child", np.ones(3))
    mine = shared.open(name)
    mine[1] = shared.open(name + "-child")[0]

other = multiprocessing.get_context("fork").Process(target=work, args=(sys.argv[1],))
other.start()
other.join()
say(mine[1], os.path.exists("/dev/shm/" + sys.argv[1] + "-child"))
"""
    other = start(sys.executable, code, name)
    assert [other.hear() for _ in range(3)] == ["False False", "True 4.0 False", "1.0 False"]
    other.end()


# ---------------------------------------------------------------------- one process


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_put_is_what_is_opened(name: str, data: st.DataObject) -> None:
    dtype = data.draw(
        hnp.scalar_dtypes().filter(lambda d: d.itemsize > 0)
        | hnp.array_dtypes(hnp.scalar_dtypes().filter(lambda d: d.itemsize > 0))
    )
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))
    array = array.transpose(data.draw(st.permutations(range(array.ndim))))
    if array.ndim and data.draw(st.booleans()):
        array = array[:: data.draw(st.sampled_from([2, -1]))]
    with shared.put(name, array) as mine, shared.open(name, readonly=True) as other:
        for each in (mine, other):
            assert (each.dtype, each.shape, each.nbytes) == (array.dtype, array.shape, array.nbytes)
            assert each.array.tobytes() == array.tobytes()
            assert each.order == ("F" if array.flags.fnc else "C")
        assert mine.array.ctypes.data % PAGE == 0 or not array.nbytes


@given(dtype=hnp.scalar_dtypes() | hnp.array_dtypes(allow_subarrays=True))
def test_a_dtype_in_json_is_the_same(dtype: np.dtype[Any]) -> None:
    again = dtype_from_json(json.loads(json.dumps(dtype_to_json(dtype))))
    assert again == dtype
    assert again.itemsize == dtype.itemsize


def test_a_header_of_several_pages(name: str) -> None:
    dtype = np.dtype([(f"field number {number}", "<f4") for number in range(300)])
    array = np.zeros(5, dtype)
    array["field number 299"] = np.arange(5)
    with shared.put(name, array) as mine, shared.open(name) as other:
        assert mine.offset % PAGE == 0
        assert mine.offset > PAGE
        np.testing.assert_array_equal(other.array, array)
        mapped = np.memmap(
            f"/dev/shm/{name}", dtype, "r+", other.offset, other.shape, order=other.order
        )
        mapped["field number 299"][2] = 9
        assert mine["field number 299"][2] == 9


def test_a_closed_array_can_be_seen_where_it_was_taken(name: str) -> None:
    mine = shared.put(name, np.arange(100_000))
    view, other = mine[10:20], shared.open(name)
    its = other.array[15:]
    for each in (other, mine):
        each.close()
        each.close()
        assert each.closed
        with pytest.raises(ValueError, match="is closed"):
            each[0]
        with pytest.raises(ValueError, match="is closed"):
            np.asarray(each)
        assert "closed" in repr(each)
    view[5] = -3
    assert its[0] == -3
    assert its.sum() > 0
    assert not mine.is_owner


def test_a_reader_for_reading_only_cannot_write(name: str) -> None:
    with shared.put(name, np.arange(5)) as mine, shared.open(name, readonly=True) as other:
        assert other.readonly
        assert not mine.readonly
        with pytest.raises(ValueError, match="read-only"):
            other.array[0] = 1
        with pytest.raises(ValueError, match="opened for reading only"):
            other[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            other.array.flags.writeable = True
        assert mine.array.tolist() == [0, 1, 2, 3, 4]


def test_empty_is_filled_in_place(name: str) -> None:
    with shared.empty(name, (3, 4), "f4", "yx", order="F") as mine, shared.open(name) as other:
        assert not other.array.any()
        assert mine.array.flags.f_contiguous
        mine[1] = [1, 2, 3, 4]
        assert other.array.sum() == 10
    with shared.empty(name, 7, bool) as mine:
        assert mine.shape == (7,)


def test_what_changed_shows(name: str) -> None:
    with shared.put(name, np.arange(5)) as mine, shared.open(name, readonly=True) as other:
        before = other.last_change_ns
        assert before > 1_600_000_000_000_000_000
        mine[2] = 5
        assert other.last_change_ns == mine.last_change_ns > before


def test_it_is_like_an_array(name: str) -> None:
    with shared.put(name, np.arange(6).reshape(2, 3), ("y", "x")) as mine:
        assert (len(mine), mine.ndim, mine.size, mine.nbytes) == (2, 2, 6, 48)
        assert np.mean(mine) == 2.5
        assert np.asarray(mine) is not None
        assert np.shares_memory(np.asarray(mine), mine.array)
        assert not np.shares_memory(np.array(mine), mine.array)
        assert np.asarray(mine, "f4").dtype == "f4"
        assert [row.tolist() for row in mine] == [[0, 1, 2], [3, 4, 5]]
        assert repr(mine) == (
            f"<SharedArray {name!r} of shape (2, 3), int64, axes y, x, of this process>"
        )
        with shared.put(f"{name}-2", mine) as copy:
            assert copy.axes == ("y", "x")
            mine[0, 0] = 9
            assert copy[0, 0] == 0
    with shared.put(name, 5) as mine, pytest.raises(TypeError, match="without axes"):
        len(mine)


class Pieces:
    """Something with chunks that notes what is read of it."""

    def __init__(self, array: np.ndarray[Any, Any], chunks: Any) -> None:
        self._array = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, chunks
        self.largest = 0

    def __getitem__(self, key: Any) -> Any:
        part = self._array[key]
        self.largest = max(self.largest, part.size)
        return part


@pytest.mark.parametrize(
    ("chunks", "largest"),
    [((2, 3), 6), (((2, 5), (4, 4, 1)), 20), (None, 63), ((0, 3), 63), ("auto", 63)],
)
def test_arrays_of_other_kinds_are_read_by_pieces(name: str, chunks: Any, largest: int) -> None:
    array = np.arange(63).reshape(7, 9)
    pieces = Pieces(array, chunks)
    with shared.put(name, pieces) as mine:
        np.testing.assert_array_equal(mine.array, array)
    assert pieces.largest == largest
    with shared.put(name, Pieces(np.array(4.5), ())) as mine:
        assert mine.array == 4.5
    with shared.put(name, Pieces(np.zeros((0, 4)), (2, 2))) as mine:
        assert mine.shape == (0, 4)


def test_large_arrays_without_chunks_are_read_by_slabs(name: str) -> None:
    array = np.broadcast_to(np.arange(5, dtype="u1")[:, None, None], (5, 3000, 4000))
    pieces = Pieces(array, None)
    with shared.put(name, pieces) as mine:
        assert [mine[z].max() for z in range(5)] == [0, 1, 2, 3, 4]
    assert pieces.largest == 12_000_000


# ---------------------------------------------------------------------- pickled


def test_pickled_it_is_its_name(name: str) -> None:
    big = np.zeros(1_000_000)
    with shared.put(name, big) as mine:
        data = pickle.dumps(mine)
        assert len(data) < 500
        first, second = pickle.loads(data), pickle.loads(data)
        assert first is second
        assert not first.is_owner
        mine[5] = 3
        assert first[5] == 3
        # One that was closed is opened anew.
        first.close()
        assert pickle.loads(data)[5] == 3
        with shared.open(name, readonly=True) as reader:
            assert pickle.loads(pickle.dumps(reader)).readonly
    del first, second
    with pytest.raises(FileNotFoundError, match=f"{name!r} is gone: it travels as its name"):
        pickle.loads(data)
    with shared.put(name, big), pytest.raises(FileNotFoundError, match="is gone"):
        # Another one of the same name.
        pickle.loads(data)


def test_on_another_machine_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_array.platform, "node", lambda: "here")
    with shared.put(name, [1]) as mine:
        data = pickle.dumps(mine)
    monkeypatch.setattr(shared_array.platform, "node", lambda: "there")
    with pytest.raises(FileNotFoundError, match="of here cannot be opened on there"):
        pickle.loads(data)


def test_many_threads_attach_once(name: str, pool: Any) -> None:
    with shared.put(name, np.arange(10)) as mine:
        data = pickle.dumps(mine)
        start = threading.Barrier(16)

        def load(_: int) -> Any:
            start.wait(PATIENCE_S)
            return pickle.loads(data)

        assert len(set(map(id, pool.map(load, range(16))))) == 1


# ---------------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda n: shared.put(n, [object()]), ValueError, "Python objects cannot be shared"),
        (lambda n: shared.put(n, [[1, 2], [3]]), ValueError, "inhomogeneous"),
        (lambda n: shared.put(n, np.ma.masked_array([1])), TypeError, "mask would be lost"),
        (lambda n: shared.put(n, [1], "yx"), ValueError, "2 names of axes for an array of 1 axes"),
        (lambda n: shared.put(n, [[1]], "yy"), ValueError, "different names"),
        (lambda n: shared.put(n, [[1]], [1, 2]), TypeError, "axes must be names"),
        (lambda n: shared.put(f"{n}/x", [1]), ValueError, "no name for shared memory"),
        (lambda n: shared.put(7, [1]), TypeError, "is a string"),
        (lambda n: shared.empty(n, (2, -1), "u1"), ValueError, "no negative extents"),
        (lambda n: shared.empty(n, 2.5, "u1"), TypeError, "an integer or a tuple of integers"),
        (lambda n: shared.empty(n, "23", "u1"), TypeError, "an integer or a tuple of integers"),
        (lambda n: shared.empty(n, 2, "u1", order="A"), ValueError, 'order must be "C" or "F"'),
        (lambda n: shared.empty(n, 2, object), ValueError, "Python objects cannot be shared"),
        (lambda n: shared.empty(n, (1 << 40,), "u1"), MemoryError, "no room for 1,099,511,63"),
        (lambda n: shared.empty(n, (1 << 63,), "u1"), MemoryError, "no room for 9,223,372,036"),
        (lambda n: shared.open(n), FileNotFoundError, "no shared memory of this name"),
        (lambda n: shared.remove(n), FileNotFoundError, "no shared memory of this name"),
    ],
)
def test_wrong_input_says_what_is_wrong_and_leaves_nothing(
    name: str, wrong: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        wrong(name)
    assert not exists(name)


def test_what_cannot_be_read_leaves_nothing(name: str) -> None:
    class Broken(Pieces):
        def __getitem__(self, key: Any) -> Any:
            # Nobody can open it meanwhile, but it can be seen.
            with pytest.raises(ValueError, match=f"still being filled by process {os.getpid()}"):
                shared.open(name)
            [info] = [info for info in shared.list() if info.name == name]
            assert not info.is_ready
            raise OSError("cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        shared.put(name, Broken(np.zeros((2, 2)), (1, 1)))
    assert not exists(name)
    assert shared.cleanup(dead_owners=False, own=True) == []


def test_one_that_is_replaced_while_it_is_filled(name: str) -> None:
    class Slow:
        shape, dtype = (3,), np.dtype(int)
        second: Any = None

        def __getitem__(self, key: Any) -> Any:
            Slow.second = shared.put(name, [7], replace=True)
            return np.arange(3)[key]

    with pytest.raises(ValueError, match=r"closed|was removed while it was filled"):
        shared.put(name, Slow())
    # The other one is still this process's.
    with Slow.second as second:
        assert shared.open(name).array[0] == 7
        assert second in shared_array.owned_here()
    assert not exists(name)


def test_a_name_of_ones_own_is_replaced_when_asked(name: str) -> None:
    first = shared.put(name, np.arange(3))
    with pytest.raises(FileExistsError, match=r"of this process; replace=True .* remove\(name\)"):
        shared.put(name, [5])
    second = shared.put(name, first.array + 1, replace=True)
    assert first.closed
    assert second.array.tolist() == [1, 2, 3]
    shared.remove(name)
    assert second.closed
    assert not exists(name)


def test_another_programs_memory_is_let_alone(name: str) -> None:
    segment = Segment.create(name, 10_000)
    for refused in (shared.open, shared.remove):
        with pytest.raises(ValueError, match="is no shared array"):
            refused(name)
    with pytest.raises(FileExistsError, match="another program has shared memory of this name"):
        shared.put(name, [1], replace=True)
    assert name not in [info.name for info in shared.list()]
    assert exists(name)
    segment.unlink()
    with pytest.raises(FileNotFoundError):
        shared.remove(name)


def test_removed_by_another_process(python: str, name: str, start: Start) -> None:
    mine = shared.put(name, np.arange(5))
    other = start(python, "shared.remove(sys.argv[1])\n", name)
    other.end()
    assert not exists(name)
    assert mine.is_removed
    mine[0] = 4
    # Another one may have the name, which the first does not remove.
    second = shared.put(name, [7])
    mine.close()
    assert shared.open(name)[0] == 7
    second.close()
    assert not exists(name)


def damage(name: str, at: int, data: bytes) -> None:
    segment = Segment.attach(name)
    segment.array((len(data),), "u1", at)[:] = np.frombuffer(data, "u1")
    segment.close()


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"celling\0", "is no shared array"),
        (8, struct.pack("<I", 2), "a header of version 2; .* up to version 1: use a newer"),
        (12, struct.pack("<I", 5), "is damaged"),
        (12, struct.pack("<I", 1 << 30), "is damaged"),
        (16, b"\0\0\0\0", "is damaged"),
        (40, b"#", "is damaged"),
    ],
)
def test_a_damaged_header_is_noticed(name: str, at: int, data: bytes, message: str) -> None:
    mine = shared.put(name, np.arange(5))
    damage(name, at, data)
    with pytest.raises(ValueError, match=message):
        shared.open(name)
    found = [info for info in shared.list() if info.name == name]
    if at:
        [info] = found
        assert re.search(message, info.problem)
        assert info.shape is None
        shared.remove(name)
    else:
        assert not found
        mine.close()
    assert not exists(name)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 299), value=st.integers(0, 255))
def test_any_damaged_byte_is_noticed_or_harmless(name: str, at: int, value: int) -> None:
    with shared.put(name, np.arange(5)):
        before = shared.open(name)
        description = struct.unpack_from("<I", Path("/dev/shm", name).read_bytes(), 12)[0]
        old = Path("/dev/shm", name).read_bytes()[at]
        damage(name, at, bytes([value]))
        if value == old or at >= 32 + description or 20 <= at < 32:
            # The state and the time of change are for everybody to write.
            if at >= 32 + description or value == old:
                assert shared.open(name).array.tolist() == [0, 1, 2, 3, 4]
        else:
            with pytest.raises(ValueError, match="shared"):
                shared.open(name)
        before.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [10_000]}, "is cut short: 84,096 bytes are needed"),
        ({"shape": None}, "cannot be understood"),
        ({"shape": [-1]}, "cannot be understood"),
        ({"dtype": "|O"}, "objects"),
        ({"dtype": "nonsense"}, "cannot be understood"),
        ({"order": "A"}, "cannot be understood"),
        ({"offset": -8}, "cannot be understood"),
        ({"owner": 5}, "cannot be understood"),
    ],
)
def test_a_header_that_makes_no_sense_is_an_error(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with shared.put(name, np.arange(5)):
        page = Path("/dev/shm", name).read_bytes()[:PAGE]
        length = struct.unpack_from("<I", page, 12)[0]
        content = json.dumps({**json.loads(page[32 : 32 + length]), **changes}).encode()
        start = page[:12] + struct.pack("<I", len(content))
        checksum = struct.pack("<I", zlib.crc32(content, zlib.crc32(start)))
        damage(name, 0, start + checksum + page[20:32] + content)
        with pytest.raises(ValueError, match=message):
            shared.open(name)


@pytest.mark.parametrize("length", [1, 8, 31, 40, 4095])
def test_memory_too_short_for_a_header(name: str, length: int) -> None:
    with shared.put(name, np.arange(5)):
        page = Path("/dev/shm", name).read_bytes()[:length]
    segment = Segment.create(name, length)
    segment.array((length,), "u1")[:] = np.frombuffer(page, "u1")
    with pytest.raises(ValueError, match=r"no shared array|damaged|cut short"):
        shared.open(name)
    segment.unlink()


def test_a_reused_number_is_not_the_owner() -> None:
    me, space = os.getpid(), owners.namespace()
    start = owners.start_of(me)
    assert owners.is_alive(me, start, space) is True
    assert owners.is_alive(me, "another time", space) is False
    # As seen from another container.
    assert owners.is_alive(me, start, "pid:[1]") is None
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait(PATIENCE_S)
    assert owners.is_alive(done.pid, "5", space) is False
    assert owners.is_alive(done.pid, None, space) is False


def test_without_proc_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    if owners.start_of(os.getpid()) is None:
        pytest.skip("this system does not tell when processes began")
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    space = owners.namespace()
    start = owners.start_of(os.getpid())
    if start is None:
        pytest.skip("there is no ps")
    assert owners.is_alive(os.getpid(), start, space) is True
    assert owners.is_alive(os.getpid(), "Thu Jan  1 00:00:00 1970", space) is False
    # Where nothing tells, a process that is there lives.
    monkeypatch.setenv("PATH", "")
    assert owners.start_of(os.getpid()) is None
    assert owners.is_alive(os.getpid(), None, space) is True


def test_where_memory_is_not_shown_names_are_noted(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_SHOWN", tmp_path / "not there")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert shared.list() == []
    with shared.put(name, [1]), shared.put(f"{name}-b", [2]) as second:
        assert [info.name for info in shared.list()] == [name, f"{name}-b"]
        # One that is gone is not told, whatever the note says.
        remove_name(second.name)
        assert [info.name for info in shared.list()] == [name]
    assert shared.list() == []
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
