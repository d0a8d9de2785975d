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
    held.keep(image, future, {index: None}, nbytes, held.generation(image))
    return future


def keep_batch(
    held: Held, client: FakeClient, image: int, indices: Collection[int], nbytes: int = 1
) -> FakeFuture:
    future = FakeFuture(f"{image}-{sorted(indices)}", client)
    places = {index: f"at {index}" for index in indices}
    held.keep(image, future, places, nbytes, held.generation(image))
    return future


def indices_held(held: Held, image: int, indices: Collection[int] = range(20)) -> set[int]:
    taken, dead = held.take(image, indices, held.generation(image))
    for future in (*(found.future for found in taken), *dead):
        future.release()
    return {index for found in taken for index in found.places}


def test_a_handle_of_its_own_for_whoever_takes(client: FakeClient) -> None:
    held = Held(10)
    kept = keep(held, client, 0, 1)
    taken, dead = held.take(0, [0, 1, 2], held.generation(0))
    assert dead == []
    ((future, places),) = taken
    assert places == {1: None}
    assert future is not kept
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


def test_the_last_of_two_futures_of_a_cell_is_held(client: FakeClient) -> None:
    held = Held(5)
    first = keep(held, client, 0, 0)
    second = keep(held, client, 0, 0, nbytes=2)
    assert (first.released, second.released, held.bytes) == (True, False, 2)


def test_cells_of_a_batch_are_found_with_their_places(client: FakeClient) -> None:
    held = Held(20)
    keep_batch(held, client, 0, [3, 5, 7], nbytes=9)
    keep(held, client, 0, 4)
    taken, dead = held.take(0, range(3, 7), held.generation(0))
    assert dead == []
    assert {found.future.key: found.places for found in taken} == {
        "0-[3, 5, 7]": {3: "at 3", 5: "at 5"},
        "0-4": {4: None},
    }
    assert client.handles == {"0-[3, 5, 7]": 2, "0-4": 2}
    assert (len(held), held.bytes) == (4, 10)


def test_a_batch_goes_as_a_whole_when_there_is_no_room(client: FakeClient) -> None:
    held = Held(10)
    keep_batch(held, client, 0, [1, 2], nbytes=6)
    keep(held, client, 0, 3, nbytes=5)
    assert wanted(client) == {"0-3"}
    assert (len(held), held.bytes) == (1, 5)


def test_a_batch_is_released_with_its_last_cell(client: FakeClient) -> None:
    held = Held(10)
    batch = keep_batch(held, client, 0, [1, 2, 3], nbytes=6)
    held.forget(0, [1])
    # Computed alone meanwhile.
    keep(held, client, 0, 2)
    assert indices_held(held, 0) == {2, 3}
    assert (batch.released, held.bytes) == (False, 7)
    held.forget(0, [3, 9])
    assert (batch.released, held.bytes) == (True, 1)
    assert wanted(client) == {"0-2"}


def test_what_was_submitted_before_cells_were_forgotten_is_not_kept(client: FakeClient) -> None:
    held = Held(5)
    before = held.generation(0)
    held.forget(0, [7])
    future = FakeFuture("old", client)
    held.keep(0, future, {1: None}, 1, before)
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
    found, gone = held.take(0, [0, 1], held.generation(0))
    assert [taken.places for taken in found] == [{1: None}]
    assert gone == [dead]
    assert held.take(0, [0], held.generation(0)) == ([], [])
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
            st.tuples(
                st.just("keep"),
                st.integers(0, 2),
                st.sets(st.integers(0, 5), min_size=1),
                st.integers(0, 12),
            ),
            st.tuples(st.just("take"), st.integers(0, 2), st.integers(0, 5)),
            st.tuples(st.just("forget"), st.integers(0, 2), st.sets(st.integers(0, 5))),
            st.tuples(st.just("all"), st.integers(0, 2)),
        ),
        max_size=60,
    )
)
def test_it_is_a_list_by_last_use_under_a_bound(steps: list[Any]) -> None:
    client, held = FakeClient(), Held(10)
    # Results by last use: image, bytes, and the cells that are found in it.
    model: dict[FakeFuture, tuple[int, int, set[int]]] = {}

    def remove(image: int, indices: Collection[int]) -> None:
        for future, (owner, _, cells) in list(model.items()):
            if owner == image:
                cells.difference_update(indices)
                if not cells:
                    del model[future]

    for what, image, *rest in steps:
        if what == "keep":
            cells, nbytes = rest
            future = keep_batch(held, client, image, cells, nbytes)
            if nbytes <= 10:
                remove(image, cells)
                model[future] = image, nbytes, set(cells)
            while sum(nbytes for _, nbytes, _ in model.values()) > 10:
                del model[next(iter(model))]
        elif what == "take":
            (index,) = rest
            found = [f for f, (n, _, cells) in model.items() if n == image and index in cells]
            assert indices_held(held, image, [index]) == ({index} if found else set())
            for future in found:
                model[future] = model.pop(future)
        else:
            indices = rest[0] if rest else range(6)
            remove(image, indices)
            held.forget(image, *rest)
        for image in range(3):
            cells_of = [cells for n, _, cells in model.values() if n == image]
            assert set(held._cells.get(image, ())) == set().union(*cells_of)
        assert wanted(client) == {future.key for future in model}
        assert held.bytes == sum(nbytes for _, nbytes, _ in model.values()) <= 10
        assert len(held) == sum(len(cells) for _, _, cells in model.values())


def test_nothing_is_found_for_whoever_asks_with_an_older_generation(client: FakeClient) -> None:
    """He asks for cells of before a change, and what is held may have been computed since."""
    held = Held(10)
    before = held.generation(0)
    held.forget(0, [5])
    keep(held, client, 0, 1)
    assert held.take(0, [1], before) == ([], [])
    taken, _ = held.take(0, [1], held.generation(0))
    assert [found.places for found in taken] == [{1: None}]
