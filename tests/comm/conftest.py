"""Groups whose ranks are threads of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from comm.ranks import Ranks

# The host of each rank: all on hosts of their own, all on one, or spread over two.
LAYOUTS = {"apart": [0, 1, 2, 3], "together": [0, 0, 0, 0], "spread": [0, 1, 0, 0]}


class Mesh(Ranks):
    """Every rank of one group, in one of the layouts."""

    def __init__(self, size: int, name: str) -> None:
        super().__init__(LAYOUTS[name][:size])
        self.name = name


@pytest.fixture(params=LAYOUTS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Mesh]]:
    """The mesh of so many ranks, the same whenever a test asks for it again; over each kind of transport."""
    made: dict[int, Mesh] = {}

    def of(size: int) -> Mesh:
        if size not in made:
            made[size] = Mesh(size, request.param)
        return made[size]

    yield of
    for each in made.values():
        each.close()
