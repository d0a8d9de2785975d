"""What a block is told and can say while it runs, on each backend."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import PATIENCE_S, begin, in_time, until

import cellimg_dask as ci
from cellimg_dask.bare.task import TaskCancelledError

LOCAL = pytest.mark.parametrize("backend", ["threads", "processes"], indirect=True)


def steps(block: ci.Block, task: Any) -> None:
    """Go on until nobody wants it any more."""
    for step in range(100_000):
        task.update("step", step)
        if task.cancelled:
            Path(block.params["mark"]).touch()
            task.raise_if_cancelled()
        threading.Event().wait(0.01)


def reports(a: Any, task: Any = None) -> Any:
    """Say something."""
    task.update("begun", 0, 2)
    task.update(current=2, maximum=2, info={"voxels": a.size})
    return a


@LOCAL
def test_blocks_say_how_far_they_are(make_queue: Callable[..., ci.BlockQueue]) -> None:
    said: list[ci.BlockUpdate] = []
    queue = make_queue(1, on_update=said.append)
    image = ci.map_cells(reports, np.arange(3), dtype=int, cell_shape=2, queue=queue)
    np.testing.assert_array_equal(image[2:], [2])
    assert said == [
        ci.BlockUpdate("reports", (1,), "begun", 0, 2),
        ci.BlockUpdate("reports", (1,), None, 2, 2, {"voxels": 1}),
    ]


@LOCAL
def test_code_has_its_task_too(make_queue: Callable[..., ci.BlockQueue]) -> None:
    said: list[ci.BlockUpdate] = []
    queue = make_queue(1, on_update=said.append)
    code = ci.BlockCode("task.update(current=block.index); block.data[...] = 1")
    ci.fill_cells(code, ci.CellGrid((3,), 1), dtype=int, queue=queue)[...]
    assert sorted(update.current for update in said) == [0, 1, 2]


@LOCAL
def test_a_listener_that_fails_does_no_harm(
    make_queue: Callable[..., ci.BlockQueue], caplog: pytest.LogCaptureFixture
) -> None:
    def listen(update: ci.BlockUpdate) -> None:
        raise ValueError("no space for this line")

    queue = make_queue(1, on_update=listen)
    image = ci.map_cells(reports, np.arange(3), dtype=int, queue=queue)
    with caplog.at_level(logging.ERROR, "cellimg_dask"):
        np.testing.assert_array_equal(in_time(lambda: image[...]), range(3))
    assert len(caplog.records) == 2
    assert "no space for this line" in caplog.text


def test_without_anybody_who_listens(make_queue: Callable[..., ci.BlockQueue]) -> None:
    image = ci.map_cells(reports, np.arange(3), dtype=int, queue=make_queue(1))
    np.testing.assert_array_equal(image[...], range(3))


def test_without_a_queue() -> None:
    image = ci.map_cells(reports, np.arange(3), dtype=int)
    np.testing.assert_array_equal(image[...], range(3))


@LOCAL
def test_a_block_that_nobody_wants_any_more_ends(
    make_queue: Callable[..., ci.BlockQueue], tmp_path: Path
) -> None:
    begun = threading.Event()
    queue = make_queue(1, on_update=lambda update: begun.set())
    mark = tmp_path / "mark"
    grid = ci.CellGrid((2,), 2)
    params = {"mark": str(mark)}
    image = ci.fill_cells(steps, grid, dtype=int, params=params, queue=queue)
    request = image.request(np.s_[:])
    assert begun.wait(PATIENCE_S)
    request.cancel()
    until(mark.exists)
    # The worker goes on with something else.
    other = ci.map_cells(reports, np.arange(3), dtype=int, queue=queue)
    np.testing.assert_array_equal(in_time(lambda: other[...]), range(3))


@LOCAL
def test_a_block_that_somebody_else_wants_goes_on(
    make_queue: Callable[..., ci.BlockQueue], gate: Any
) -> None:
    hold = gate.hold

    def held(a: Any, task: Any) -> Any:
        hold()
        return a + task.cancelled

    queue = make_queue(1)
    image = ci.map_cells(held, np.arange(3), dtype=int, queue=queue)
    first, second = image.request(np.s_[:]), image.request(np.s_[:2])
    gate.wait_for(1)
    first.cancel()
    gate.open()
    np.testing.assert_array_equal(begin(second.result).result(PATIENCE_S), [0, 1])


@LOCAL
def test_a_block_that_ends_unasked_is_not_tried_for_ever(
    make_queue: Callable[..., ci.BlockQueue], log: Any
) -> None:
    add = log.add

    def gives_up(a: Any) -> Any:
        add("tried")
        raise TaskCancelledError

    image = ci.map_cells(gives_up, np.arange(3), dtype=int, queue=make_queue(1))
    with pytest.raises(TaskCancelledError):
        begin(image.request(np.s_[:]).result).result(PATIENCE_S)
    assert 1 < len(log.lines()) < 100


@LOCAL
def test_a_parameter_task_that_is_given_stays(
    make_queue: Callable[..., ci.BlockQueue],
) -> None:
    def add(a: Any, task: int) -> Any:
        return a + task

    image = ci.map_cells(add, np.arange(3), dtype=int, params={"task": 4}, queue=make_queue(1))
    np.testing.assert_array_equal(image[...], [4, 5, 6])
