"""Messages over pipes: whole, in order, with what is attached; and their ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import PATIENCE_S, begin

from cellimg_dask.bare.wire import Wire


def pair() -> tuple[Wire, Wire]:
    """Two ends."""
    here, there = os.pipe(), os.pipe()
    return Wire(here[0], there[1]), Wire(there[0], here[1])


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    """Two ends, closed after the test."""
    made = pair()
    yield made
    for end in made:
        end.close()


messages = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name != "attached"),
    st.one_of(st.text(), st.integers(), st.none(), st.lists(st.floats(allow_nan=False))),
    max_size=3,
)


@given(st.lists(st.tuples(messages, st.lists(st.binary(max_size=300), max_size=3)), max_size=5))
def test_what_is_sent_arrives(sent: list[tuple[dict[str, Any], list[bytes]]]) -> None:
    one, other = pair()
    for message, parts in sent:
        one.send(message, *parts)
    for message, parts in sent:
        received = other.receive()
        assert received is not None
        if parts:
            assert received[0].pop("attached") == [len(part) for part in parts]
        assert received == (message, parts)
    one.close()
    with pytest.raises(EOFError):
        other.receive()
    other.close()


def test_messages_larger_than_a_pipe(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    text, part = "x" * 3_000_000, bytes(range(256)) * 20_000
    sending = begin(one.send, {"text": text}, part, b"", part)
    received = other.receive(PATIENCE_S)
    sending.result(PATIENCE_S)
    assert received == ({"text": text, "attached": [len(part), 0, len(part)]}, [part, b"", part])


def test_threads_do_not_mix_messages(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    part = b"." * 100_000
    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(one.send, {"number": n}, part) for n in range(40)]
        received = [other.receive(PATIENCE_S) for _ in range(40)]
        for future in sending:
            future.result(PATIENCE_S)
    assert {message["number"] for message, _ in filter(None, received)} == set(range(40))
    assert all(parts == [part] for _, parts in filter(None, received))


def test_waiting_for_nothing(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    assert other.receive(0) is None
    assert other.receive(0.001) is None
    one.send({"a": 1})
    one.send({"b": 2})
    assert other.receive(0) == ({"a": 1}, [])
    assert other.receive(0) == ({"b": 2}, [])
    assert other.receive(0) is None


def test_half_a_message_is_waited_for(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    os.write(one._sink, b'{"a":')
    assert other.receive(0) is None
    os.write(one._sink, b" 1}\n")
    assert other.receive(0) == ({"a": 1}, [])


@pytest.mark.parametrize("line", [b"dust\n", b"[1]\n", b"\xff\xfe\n"])
def test_what_is_no_message_is_an_error_and_the_next_one_is_read(
    ends: tuple[Wire, Wire], line: bytes
) -> None:
    one, other = ends
    os.write(one._sink, line)
    one.send({"a": 1})
    with pytest.raises(ValueError, match=r"JSON|Expecting|decode"):
        other.receive()
    assert other.receive() == ({"a": 1}, [])


def test_blank_lines_say_nothing(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    os.write(one._sink, b"\n  \n")
    one.send({"a": 1})
    assert other.receive() == ({"a": 1}, [])


def test_nobody_at_the_other_end() -> None:
    one, other = pair()
    other.close()
    with pytest.raises(OSError, match=r"pipe|Pipe"):
        one.send({"a": 1})
    one.close()
    with pytest.raises(OSError, match=r"descriptor"):
        one.send({"a": 1})
    # Twice is once.
    one.close()


def test_a_forked_process_lets_go(ends: tuple[Wire, Wire]) -> None:
    one, other = ends
    held = threading.Event()
    released = threading.Event()

    def hold() -> None:
        with one._sending:
            held.set()
            released.wait(PATIENCE_S)

    holder = begin(hold)
    held.wait(PATIENCE_S)
    child = os.fork()
    if child == 0:
        # The thread that held the lock is not here.
        one.abandon()
        one.send({"from": "the child"})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    released.set()
    holder.result(PATIENCE_S)
    one.send({"from": "the parent"})
    assert other.receive(PATIENCE_S) == ({"from": "the parent"}, [])
    assert other.receive(0) is None
