"""How cells are stored and marked: in which order, and with what in hand."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.batch.work import Committer
from cellimg_dask.loading.together import Together


class Recorder:
    """Target, manifest and permit in one, which notes what is done with it."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.broken: set[int] = set()
        self.unable: set[int] = set()

    @contextmanager
    def writing(self):
        self.steps.append("may write")
        yield
        self.steps.append("no more")

    def state(self, index, key, target, *, checksums):
        return "missing"

    def withdraw(self, index):
        self.steps.append(("withdrawn", index))

    def begin(self, index, data):
        if index in self.unable:
            raise OSError("cannot begin")
        self.steps.append(("begun", index, data.tolist()))

        def wait() -> None:
            self.steps.append(("on disk", index))
            if index in self.broken:
                raise OSError("disk full")

        return wait

    def checksums(self, index):
        return {str(index): [7, "sum"]}

    def commit(self, index, key, objects):
        self.steps.append(("marked", index, key, objects))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def committer(recorder: Any):
    img = ci.map_cells(np.negative, np.arange(6), cell_shape=2, dtype=int)
    together = Together(img.loader, (2,))
    return Committer(img.loader, together, recorder, recorder, recorder, 0)


def test_one_cell_is_withdrawn_written_and_then_marked(committer, recorder):
    (outcome,) = committer.commit([(2, "k")])
    assert (outcome.index, outcome.error, outcome.nbytes) == (2, None, 7)
    assert recorder.steps == [
        "may write",
        ("withdrawn", 2),
        ("begun", 2, [-4, -5]),
        ("on disk", 2),
        ("marked", 2, "k", {"2": [7, "sum"]}),
        "no more",
    ]


def test_cells_of_one_call_are_written_at_the_same_time_and_each_marked_when_it_is_there(
    committer, recorder
):
    assert [outcome.index for outcome in committer.commit([(0, "a"), (1, "b")])] == [0, 1]
    assert [step[:2] for step in recorder.steps[1:-1]] == [
        ("withdrawn", 0),
        ("begun", 0),
        ("withdrawn", 1),
        ("begun", 1),
        ("on disk", 0),
        ("marked", 0),
        ("on disk", 1),
        ("marked", 1),
    ]


def test_what_was_begun_is_waited_for_whatever_happens_to_another_cell(committer, recorder):
    recorder.broken = {0}
    with pytest.raises(OSError, match="disk full"):
        list(committer.commit([(0, "a"), (1, "b")]))
    assert ("marked", 1, "b", {"1": [7, "sum"]}) in recorder.steps
    assert not any(step[:2] == ("marked", 0) for step in recorder.steps)


def test_what_was_begun_is_waited_for_if_another_cell_cannot_even_begin(committer, recorder):
    recorder.unable = {1}
    with pytest.raises(OSError, match="cannot begin"):
        list(committer.commit([(0, "a"), (1, "b")]))
    assert ("on disk", 0) in recorder.steps


def test_results_are_stored_in_the_dtype_of_the_image_without_a_copy_of_the_input(recorder):
    image = np.arange(4, dtype="i2")
    img = ci.map_cells(lambda block: block, image, cell_shape=2, dtype="i4", version="1")
    data = img.loader.compute_in_passing(1)
    assert data.dtype == "i4"
    same = ci.map_cells(lambda block: block, image, cell_shape=2, dtype="i2", version="1")
    assert np.shares_memory(same.loader.compute_in_passing(1), image)
    assert not np.shares_memory(same.loader.compute_owned(1), image)


def test_a_queue_may_use_a_buffer_again_so_its_results_are_copied():
    buffer = np.empty(2, "i8")

    def reuse(block: np.ndarray) -> np.ndarray:
        buffer[...] = block
        return buffer

    with ci.BlockQueue(1) as queue:
        img = ci.map_cells(reuse, np.arange(4), cell_shape=2, dtype="i8", queue=queue)
        first = img.loader.compute_in_passing(0)
        img.loader.compute_in_passing(1)
        assert first.tolist() == [0, 1]
