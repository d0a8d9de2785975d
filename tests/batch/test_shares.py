"""Work divided among workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cellimg_dask.batch.shares import Shares


def test_each_has_a_stretch_and_whoever_is_done_helps():
    shares = Shares(range(8))
    assert shares.take("a", 2) == [0, 1]
    # Half of what a has left.
    assert shares.take("b", 2) == [5, 6]
    assert shares.take("a", 9) == [2, 3, 4]
    assert shares.take("a", 9) == [7]
    assert shares.take("b", 1) == []
    assert len(shares) == 0


def test_what_a_lost_worker_had_is_done_by_others():
    shares = Shares(range(4))
    shares.take("a", 1)
    shares.put_back([0])
    shares.keep(["b"])
    assert sorted(shares.take("b", 9)) == [0, 1, 2, 3]


@given(
    st.integers(0, 50),
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(0, 9), st.sampled_from(["take", "lose", "fail"])
        )
    ),
)
def test_nothing_is_lost_and_nothing_is_done_twice(count, steps):
    shares, done = Shares(range(count)), []
    for worker, number, what in steps:
        if what == "lose":
            shares.keep(set("abc") - {worker})
        elif what == "fail" and done:
            shares.put_back([done.pop()])
        else:
            done += shares.take(worker, number)
        assert len(shares) + len(done) == count
    while shares:
        done += shares.take("d", 3)
    assert sorted(done) == list(range(count))
