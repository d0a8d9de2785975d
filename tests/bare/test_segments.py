"""Shared memory by its name: who makes it, who removes it, and what happens in between."""

from __future__ import annotations

import errno
import gc
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PATIENCE_S

from cellimg_dask.bare import segments
from cellimg_dask.bare.segments import LONGEST_NAME, Segment, remove_name

PATH = Path(segments.__file__)

BARE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("segments", {str(PATH)!r})
segments = importlib.util.module_from_spec(spec)
sys.modules["segments"] = segments
spec.loader.exec_module(segments)
from segments import Segment
"""
"""Loads the module as a worker does, without the package."""

linux = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm to look into")


def exists(name: str) -> bool:
    return Path("/dev/shm", name).exists()


def python(code: str, *arguments: str) -> str:
    """Run code in a process that has nothing to do with this one."""
    done = subprocess.run(
        [sys.executable, "-c", BARE + code, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.fixture
def name() -> str:
    """A name that nobody has."""
    return f"cellimg-test-{secrets.token_hex(4)}"


@pytest.fixture
def segment(name: str) -> Any:
    segment = Segment.create(name, 10_000)
    yield segment
    segment.unlink()
    segment.close()


@linux
def test_a_segment_is_there_until_it_is_removed(name: str) -> None:
    segment = Segment.create(name, 1000)
    assert (segment.name, segment.nbytes, segment.readonly) == (name, 1000, False)
    assert exists(name)
    assert not segment.is_removed
    segment.unlink()
    segment.unlink()
    assert segment.is_removed
    assert not exists(name)
    assert segment.array((1000,), "u1").sum() == 0
    segment.close()
    segment.close()
    assert segment.is_removed


@linux
def test_a_segment_without_a_name_has_one_of_its_own() -> None:
    made = [Segment.create(None, 0) for _ in range(3)]
    assert len({segment.name for segment in made}) == 3
    assert all(segment.name.startswith("cellimg-") for segment in made)
    assert all(len(segment.name) <= 30 for segment in made)
    assert all(segment.nbytes == 1 for segment in made)
    for segment in made:
        segment.close()
        assert exists(segment.name)
        segment.unlink()
        assert not exists(segment.name)


def test_what_one_writes_the_other_sees(segment: Segment) -> None:
    mine = segment.array((100,), np.int32)
    other = Segment.attach(segment.name)
    its = other.array((100,), np.int32)
    mine[3] = 7
    its[4] = 8
    assert (its[3], mine[4]) == (7, 8)
    other.unlink()
    other.close()
    assert not segment.is_removed


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 4, 5), "u2"),
        ((3, 4), ">u2"),
        ((7,), "?"),
        ((), "f8"),
        ((0, 4), "f8"),
        ((5,), [("a", "i2"), ("b", ">f4", (2,))]),
        ((2, 3), "c16"),
        ((2,), "M8[ns]"),
        ((4,), "U3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_kind_lie_in_it(
    segment: Segment, shape: tuple[int, ...], dtype: Any, order: str
) -> None:
    mine = segment.array(shape, dtype, 64, order)
    assert (mine.shape, mine.dtype, mine.flags.writeable) == (shape, np.dtype(dtype), True)
    assert mine.flags.f_contiguous if order == "F" else mine.flags.c_contiguous
    raw = np.arange(mine.nbytes, dtype="u1") % 2
    mine[...] = np.frombuffer(raw.tobytes(), mine.dtype).reshape(shape)
    other = Segment.attach(segment.name, readonly=True)
    its = other.array(shape, dtype, 64, order)
    assert its.tobytes() == mine.tobytes()
    other.close()


def test_what_is_larger_is_refused(segment: Segment) -> None:
    segment.array((10_000,), "u1")
    with pytest.raises(ValueError, match=r"\(10001,\).* does not fit into the 10,000 bytes"):
        segment.array((10_001,), "u1")
    with pytest.raises(ValueError, match="does not fit"):
        segment.array((10_000,), "u1", offset=1)
    with pytest.raises(ValueError, match="Python objects cannot lie in shared memory"):
        segment.array((2,), object)


def test_a_view_outlives_the_handle(segment: Segment) -> None:
    view = segment.array((100,), "u1")
    other = Segment.attach(segment.name)
    its = other.array((50, 2), "u1")[10:, 1]
    other.close()
    segment.close()
    view[21] = 5
    gc.collect()
    assert its[0] == 5
    segment.unlink()
    assert (its[0], view[21]) == (5, 5)
    with pytest.raises(ValueError, match="is closed"):
        segment.array((1,), "u1")
    with pytest.raises(ValueError, match="is closed"):
        other.array((1,), "u1")


@linux
def test_a_mapping_ends_with_its_last_view(segment: Segment) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(segment.name)

    other = Segment.attach(segment.name)
    view = other.array((10,), "u1")[2:]
    assert mapped() == 2
    other.close()
    assert mapped() == 2
    del view
    assert mapped() == 1


@linux
def test_descriptors_are_given_back(
    segment: Segment, footprint: Callable[[], dict[str, Any]]
) -> None:
    before = footprint()
    for _ in range(20):
        other = Segment.attach(segment.name)
        other.array((10,), "u1")
        other.close()
        # This one is left to the interpreter.
        Segment.attach(segment.name).array((10,), "u1")
        with pytest.raises(FileExistsError):
            Segment.create(segment.name, 10)
        with pytest.raises(FileNotFoundError):
            Segment.attach(segment.name + "-not")
    assert footprint() == before


def test_a_reader_cannot_write(segment: Segment) -> None:
    view = Segment.attach(segment.name, readonly=True).array((10,), "u1")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


def test_a_taken_name_stays_its_owners(segment: Segment) -> None:
    segment.array((1,), "u1")[0] = 9
    with pytest.raises(FileExistsError, match=segment.name):
        Segment.create(segment.name, 5)
    assert Segment.attach(segment.name).array((1,), "u1")[0] == 9


def test_a_name_that_is_gone_says_so(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no shared memory of this name.*{name}"):
        Segment.attach(name)
    assert not remove_name(name)


@pytest.mark.parametrize(
    "wrong", ["", "/a", "a/b", "..", ".a", "-a", "a b", "a:b", "ä", "a\n", "x" * 201]
)
def test_a_name_that_cannot_be_one_is_refused(wrong: str) -> None:
    for refused in (Segment.attach, remove_name, lambda name: Segment.create(name, 5)):
        with pytest.raises(ValueError, match="name"):
            refused(wrong)
    with pytest.raises(TypeError, match="a string, not int"):
        Segment.attach(5)  # type: ignore[arg-type]


def test_a_name_fits_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    # macOS has room for 31 characters with the slash.
    monkeypatch.setattr(segments, "LONGEST_NAME", 30)
    Segment.create("x" * 30, 5).unlink()
    with pytest.raises(ValueError, match="at most 30 characters on this system, not 31"):
        Segment.create("x" * 31, 5)
    Segment.create(None, 5).unlink()


@linux
def test_names_as_long_as_they_may_be() -> None:
    segment = Segment.create("x" * LONGEST_NAME, 5)
    segment.unlink()
    assert not exists(segment.name)


def test_more_than_there_is_is_refused_at_once(name: str) -> None:
    for chosen in (name, None):
        with pytest.raises(MemoryError, match="no room for 1,099,511,627,776 bytes"):
            Segment.create(chosen, 1 << 40)
    assert not exists(name)
    with pytest.raises(ValueError, match="not -1"):
        Segment.create(name, -1)


@linux
def test_a_full_device_is_an_error_and_no_crash() -> None:
    code = """
import mmap, os
a = Segment.create("first", 600_000)
try:
    Segment.create("second", 600_000)
except MemoryError as error:
    print(error)
a.array((600_000,), "u1")[:] = 1
print(os.listdir("/dev/shm"))
a.unlink()
"""
    done = subprocess.run(
        [
            *("unshare", "--mount", "--map-root-user", "sh", "-c"),
            'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec "$0" -c "$1"',
            *(sys.executable, BARE + code),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    if done.returncode in (1, 77, 126, 127) and "Traceback" not in done.stderr:
        pytest.skip(f"no small /dev/shm can be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("no room for 600,000 bytes of shared memory; /dev/shm has 4")
    assert second == "['first']"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.ENOMEM])
def test_a_limit_of_the_process_is_want_of_room(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "posix_fallocate", refused, raising=False)
    with pytest.raises(MemoryError, match="no room for 1,000 bytes"):
        Segment.create(name, 1000)
    assert not exists(name)


@linux
def test_room_that_was_promised_and_is_not_there_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # As PyPy does.
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    with pytest.raises(MemoryError, match="no room for 1,000,000 bytes"):
        Segment.create(name, 1_000_000)
    assert not exists(name)


@pytest.mark.parametrize("named", [True, False])
def test_an_interrupt_anywhere_leaves_nothing(
    footprint: Callable[[], dict[str, Any]], capfd: Any, name: str, named: bool
) -> None:
    before = footprint()
    done = False
    for number in range(100):
        left = number
        segment = None

        def trace(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt

        found = sys.gettrace()
        sys.settrace(trace)
        try:
            segment = Segment.create(name if named else None, 1000)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(found)
        if segment is not None:
            segment.unlink()
            segment.close()
            done = left >= 0
            if done:
                break
        assert footprint() == before
    assert done
    assert number > 8
    # The tracker complains of what it does not know.
    resource_tracker.ensure_running()
    assert not capfd.readouterr().err


def test_a_removed_name_may_be_anothers_by_now(name: str) -> None:
    first = Segment.create(name, 10)
    assert remove_name(name)
    assert first.is_removed
    second = Segment.create(name, 10)
    first.unlink()
    assert not second.is_removed
    assert exists(name)
    second.unlink()
    # Closed it knows them apart as well.
    first.close()
    third = Segment.create(name, 10)
    assert first.is_removed
    assert not third.is_removed
    third.close()
    assert not third.is_removed
    third.unlink()
    assert third.is_removed


def test_a_forked_child_does_not_remove_what_its_parent_made(segment: Segment) -> None:
    code = """
import os
segment = Segment.create(sys.argv[1], 100)
child = os.fork()
if not child:
    segment.unlink()
    segment.array((1,), "u1")[0] = 4
    segment.close()
    sys.exit()
os.waitpid(child, 0)
print(segment.is_removed, segment.array((1,), "u1")[0])
segment.unlink()
print(segment.is_removed)
"""
    assert python(code, f"{segment.name}-fork").split() == ["False", "4", "True"]


def test_a_reader_never_knows_the_tracker(segment: Segment) -> None:
    code = """
segment = Segment.attach(sys.argv[1])
segment.array((10,), "u1")[:] += 1
segment.unlink()
print("multiprocessing.resource_tracker" in sys.modules, "multiprocessing" in sys.modules)
"""
    for _ in range(2):
        assert python(code, segment.name).split() == ["False", "False"]
    assert not segment.is_removed
    assert segment.array((1,), "u1")[0] == 2


@linux
@pytest.mark.parametrize("how", ["exit", "killed"])
def test_a_creator_that_ends_takes_its_segment_with_it(
    name: str, how: str, until: Callable[[Callable[[], object]], None]
) -> None:
    code = """
segment = Segment.create(sys.argv[1], 1000)
segment.array((1,), "u1")[0] = 6
print("made", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", BARE + code, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        other = Segment.attach(name)
        assert not other.is_removed
        if how == "killed":
            process.send_signal(signal.SIGKILL)
    until(lambda: other.is_removed)
    assert not exists(name)
    assert other.array((1,), "u1")[0] == 6
    other.close()
