"""Crews that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cellimg_dask.loading.crew import Crew


@pytest.fixture
def make_crew() -> Iterator[Callable[[int], Crew]]:
    """Make crews of so many threads."""
    crews: list[Crew] = []

    def make(num_threads: int) -> Crew:
        crews.append(Crew(num_threads))
        return crews[-1]

    yield make
    for crew in crews:
        assert not crew._busy, "somebody is still counted as busy"
        crew.close()
