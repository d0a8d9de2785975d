"""What there is of a kind, held weakly."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from cellimg_dask.state.living import Living


class Thing:
    pass


def test_members_are_there_once_and_as_long_as_somebody_holds_them():
    living: Living[Thing] = Living()
    one, two = Thing(), Thing()
    for thing in (one, two, one):
        living.add(thing)
    assert sorted(map(id, living.all())) == sorted([id(one), id(two)])
    del one, thing
    gc.collect()
    assert living.all() == [two]


@pytest.fixture
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching_often")
def test_members_come_and_go_while_they_are_listed():
    living: Living[Thing] = Living()
    things = [Thing() for _ in range(3000)]
    for thing in things:
        living.add(thing)
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            some = [Thing() for _ in range(20)]
            for one in some:
                living.add(one)

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            listed = set(living.all())
            assert listed.issuperset(things)
    finally:
        done.set()
        for thread in threads:
            thread.join()
