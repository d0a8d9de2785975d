"""Blocks of shared arrays are not copied for workers, which attach to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.bare.segments import Segment, place_of
from cellimg_dask.queues.slots import Room, Slot

PROCESSES = pytest.mark.parametrize("backend", ["processes"], indirect=True)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are copied for each block."""
    found: list[int] = []
    fill = Room.fill

    def counted(room: Room, more: int) -> str:
        found.append(sum(array.nbytes for _, array in room._arrays))
        return fill(room, more)

    monkeypatch.setattr(Room, "fill", counted)
    return found


@pytest.fixture
def volume(rng: np.random.Generator) -> Any:
    """An image of which a block is worth attaching to."""
    return rng.integers(0, 256, (40, 120, 120), dtype=np.uint8)


@pytest.fixture
def share() -> Iterator[Callable[[Any], Any]]:
    """Put arrays into shared memory for a test."""
    made: list[Any] = []

    def put(array: Any) -> Any:
        made.append(ci.shared.put(f"cellimg-test-{len(made)}", array, replace=True))
        return made[-1]

    yield put
    for shared in made:
        shared.close()


def plus_one(a: Any) -> Any:
    assert not a.flags.writeable
    return a + np.uint8(1)


@PROCESSES
@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_are_where_they_are(
    make_queue: Any, share: Any, volume: Any, copied: list[int], order: str
) -> None:
    shared = share(np.asarray(volume, order=order))
    image = ci.map_cells(
        plus_one, shared, dtype=np.uint8, halo=2, cell_shape=(20, 60, 60), queue=make_queue()
    )
    np.testing.assert_array_equal(image[...], volume + np.uint8(1))
    assert len(copied) == 8
    assert sum(copied) == 0
    # What is written there is seen.
    shared[0, 0, 0] = 100
    image.invalidate()
    assert image[0, 0, 0] == 101


@PROCESSES
def test_views_turned_around(make_queue: Any, share: Any, volume: Any, copied: list[int]) -> None:
    shared = share(volume)
    view = shared.array[::-1, ::2, 5:]
    image = ci.map_cells(
        plus_one, view, dtype=np.uint8, cell_shape=(40, 60, 60), queue=make_queue()
    )
    np.testing.assert_array_equal(image[...], volume[::-1, ::2, 5:] + np.uint8(1))
    assert sum(copied) == 0


@PROCESSES
def test_borders_that_are_made_up_are_copied(
    make_queue: Any, share: Any, volume: Any, copied: list[int]
) -> None:
    image = ci.map_cells(
        plus_one, share(volume), dtype=np.uint8, halo=1, boundary="reflect", queue=make_queue()
    )
    np.testing.assert_array_equal(image[...], volume + np.uint8(1))
    assert sum(copied) > 0


@PROCESSES
def test_what_was_removed_is_copied(
    make_queue: Any, share: Any, volume: Any, copied: list[int]
) -> None:
    shared = share(volume)
    image = ci.map_cells(plus_one, shared, dtype=np.uint8, queue=make_queue())
    image[0, 0, 0]
    shared.close()
    image.invalidate()
    np.testing.assert_array_equal(image[...], volume + np.uint8(1))
    assert sum(copied) >= volume.nbytes


def forced(a: Any) -> Any:
    a.flags.writeable = True
    a[...] = 0
    return a


@PROCESSES
def test_nobody_writes_into_what_is_only_read(make_queue: Any, share: Any, volume: Any) -> None:
    shared = share(volume)
    image = ci.map_cells(forced, shared, dtype=np.uint8, queue=make_queue())
    with pytest.raises(ci.BlockError, match="cannot set WRITEABLE flag"):
        image[...]
    np.testing.assert_array_equal(shared.array, volume)


def test_what_just_fits_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    create = Segment.create

    def full(name: str | None, nbytes: int) -> Segment:
        if nbytes > 1000:
            raise MemoryError(f"no room for {nbytes} bytes")
        return create(name, nbytes)

    monkeypatch.setattr(Segment, "create", full)
    slot = Slot()
    assert slot.with_room(1000).nbytes >= 1000
    with pytest.raises(MemoryError, match="no room for 1001 bytes"):
        slot.with_room(1001)
    slot.remove()


def test_where_an_array_lies(share: Any, volume: Any) -> None:
    shared = share(volume)
    name, begin = place_of(shared.array)  # type: ignore[misc]
    assert name == shared.name
    assert place_of(shared.array[1, 2]) == (name, begin + 120 * 120 + 2 * 120)
    assert place_of(shared.array[::-1]) == (name, begin + 39 * 120 * 120)
    assert place_of(shared.array.view("i4")) == (name, begin)
    assert place_of(volume) is None
    assert place_of(shared.array.copy()) is None
    kept = shared.array
    shared.close()
    assert place_of(kept) is None
    np.testing.assert_array_equal(kept, volume)
