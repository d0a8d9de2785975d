"""The table of futures that a client holds."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.queues.held import Held, handle, is_dead


class FakeClient:
    """Counts the handles of each key, as distributed's client does."""

    def __init__(self) -> None:
        self.handles: dict[str, int] = {}


class FakeFuture:
    def __init__(self, key: str, client: FakeClient) -> None:
        self.key, self.client, self.status = key, client, "finished"
        self.released = False
        client.handles[key] = client.handles.get(key, 0) + 1

    def release(self) -> None:
        if not self.released:
            self.released = True
            self.client.handles[self.key] -= 1


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def wanted(client: FakeClient) -> set[str]:
    return {key for key, count in client.handles.items() if count}


def keep(held: Held, client: FakeClient, image: int, index: int, nbytes: int = 1) -> FakeFuture:
    future = FakeFuture(f"{image}-{index}", client)
    held.keep(image, index, future, nbytes, held.generation(image))
    return future


def indices_held(held: Held, image: int, indices: Collection[int] = range(20)) -> set[int]:
    found, dead = held.take(image, indices)
    for future in (*found.values(), *dead):
        future.release()
    return set(found)


def test_a_handle_of_its_own_for_whoever_takes(client: FakeClient) -> None:
    held = Held(10)
    kept = keep(held, client, 0, 1)
    taken, dead = held.take(0, [0, 1, 2])
    assert dead == []
    assert list(taken) == [1]
    assert taken[1] is not kept
    assert client.handles == {"0-1": 2}
    held.forget(0)
    assert client.handles == {"0-1": 1}


def test_the_one_unused_for_longest_goes_first(client: FakeClient) -> None:
    held = Held(3)
    for index in range(3):
        keep(held, client, 0, index)
    assert indices_held(held, 0, [0]) == {0}
    keep(held, client, 0, 3)
    assert wanted(client) == {"0-0", "0-2", "0-3"}
    assert (len(held), held.bytes) == (3, 3)


def test_a_large_result_makes_room_for_itself(client: FakeClient) -> None:
    held = Held(5)
    for index in range(5):
        keep(held, client, index % 2, index)
    keep(held, client, 0, 10, nbytes=4)
    assert wanted(client) == {"0-4", "0-10"}
    assert held.bytes == 5


def test_what_exceeds_the_bound_alone_is_released_and_drives_nothing_out(
    client: FakeClient,
) -> None:
    held = Held(5)
    keep(held, client, 0, 0)
    keep(held, client, 0, 1, nbytes=6)
    assert wanted(client) == {"0-0"}


def test_a_bound_of_nothing_holds_nothing(client: FakeClient) -> None:
    held = Held(0)
    keep(held, client, 0, 0)
    assert wanted(client) == set()


def test_the_first_of_two_futures_of_a_cell_is_held(client: FakeClient) -> None:
    held = Held(5)
    first = keep(held, client, 0, 0)
    second = keep(held, client, 0, 0)
    assert (first.released, second.released, held.bytes) == (False, True, 1)


def test_what_was_submitted_before_cells_were_forgotten_is_not_kept(client: FakeClient) -> None:
    held = Held(5)
    before = held.generation(0)
    held.forget(0, [7])
    future = FakeFuture("old", client)
    held.keep(0, 1, future, 1, before)
    assert wanted(client) == set()
    keep(held, client, 1, 1)
    assert wanted(client) == {"1-1"}, "another image has generations of its own"


class Asked(Collection[int]):
    """Cells that can be asked for membership only, as those under an index map."""

    def __contains__(self, index: object) -> bool:
        assert isinstance(index, int)
        return index % 2 == 0

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("there are too many to go through")


@pytest.mark.parametrize("cells", [[0, 2, 50], set(range(0, 1000, 2)), Asked()])
def test_forgetting_some_cells_of_one_image(client: FakeClient, cells: Any) -> None:
    held = Held(100)
    for index in range(4):
        keep(held, client, 0, index)
        keep(held, client, 1, index)
    held.forget(0, cells)
    assert indices_held(held, 0) == {1, 3}
    assert indices_held(held, 1) == {0, 1, 2, 3}
    held.forget(0)
    held.forget(5)
    assert wanted(client) == {"1-0", "1-1", "1-2", "1-3"}


def test_whether_a_cell_is_outdated_is_asked_without_a_lock(client: FakeClient) -> None:
    held = Held(100)
    keep(held, client, 0, 0)
    keep(held, client, 0, 1)

    class Reads(Asked):
        def __contains__(self, index: object) -> bool:
            # The user's index map may read an image, even this one.
            thread = threading.Thread(target=indices_held, args=(held, 0))
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
            return index == 0

    held.forget(0, Reads())
    assert indices_held(held, 0) == {1}


@pytest.mark.parametrize("status", ["error", "cancelled"])
def test_what_failed_meanwhile_is_handed_out_to_be_released(
    client: FakeClient, status: str
) -> None:
    held = Held(100)
    dead = keep(held, client, 0, 0)
    keep(held, client, 0, 1)
    dead.status = status
    found, gone = held.take(0, [0, 1])
    assert list(found) == [1]
    assert gone == [dead]
    assert held.take(0, [0]) == ({}, [])
    assert held.bytes == 1


@pytest.mark.parametrize("status", ["finished", "pending", "lost"])
def test_what_may_still_come_is_not_dead(client: FakeClient, status: str) -> None:
    future = FakeFuture("a", client)
    future.status = status
    assert not is_dead(future)
    assert handle(future).key == "a"


def test_an_image_that_is_collected_inside_the_table_waits_for_no_lock(
    client: FakeClient,
) -> None:
    held = Held(100)
    keep(held, client, 0, 0)
    keep(held, client, 1, 0)
    with held._lock:  # As the collector may run anywhere, also here.
        held.abandon(0)
    assert wanted(client) == {"0-0", "1-0"}
    keep(held, client, 1, 1)
    assert wanted(client) == {"1-0", "1-1"}
    held.abandon(1)
    assert wanted(client) == set()


def test_a_closed_table_keeps_nothing(client: FakeClient) -> None:
    held = Held(100)
    keep(held, client, 0, 0)
    held.close()
    keep(held, client, 0, 1)
    assert wanted(client) == set()
    assert (len(held), held.bytes) == (0, 0)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("keep"), st.integers(0, 2), st.integers(0, 5), st.integers(0, 12)),
            st.tuples(st.just("take"), st.integers(0, 2), st.integers(0, 5)),
            st.tuples(st.just("forget"), st.integers(0, 2), st.sets(st.integers(0, 5))),
            st.tuples(st.just("all"), st.integers(0, 2)),
        ),
        max_size=60,
    )
)
def test_it_is_a_list_by_last_use_under_a_bound(steps: list[Any]) -> None:
    client = FakeClient()
    held, model = Held(10), dict[tuple[int, int], int]()
    for what, image, *rest in steps:
        if what == "keep":
            index, nbytes = rest
            keep(held, client, image, index, nbytes)
            if nbytes <= 10:
                model.setdefault((image, index), nbytes)
            while sum(model.values()) > 10:
                del model[next(iter(model))]
        elif what == "take":
            (index,) = rest
            assert indices_held(held, image, [index]) == {index} & {
                i for n, i in model if n == image
            }
            if (image, index) in model:
                model[image, index] = model.pop((image, index))
        else:
            for index in rest[0] if rest else range(6):
                model.pop((image, index), None)
            held.forget(image, *rest)
        assert wanted(client) == {f"{n}-{i}" for n, i in model}
        assert held.bytes == sum(model.values()) <= 10
        assert set(client.handles.values()) <= {0, 1}
