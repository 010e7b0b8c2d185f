"""Groups whose ranks are threads of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener

SECRET = b"s" * 32


# The host of each rank: all on hosts of their own, all on one, or spread over two.
LAYOUTS = {"apart": [0, 1, 2, 3], "together": [0, 0, 0, 0], "spread": [0, 1, 0, 0]}


class Mesh:
    """Every rank of one group, each with a thread of its own."""

    def __init__(self, size: int, name: str) -> None:
        self.name, layout = name, LAYOUTS[name]
        self.hosts = [[rank for rank in range(size) if layout[rank] == host] for host in range(size)]
        self.listeners = [PeerListener(SECRET) for _ in range(size)]
        self.pool = ThreadPoolExecutor(size, thread_name_prefix="rank")
        addresses = [listener.address for listener in self.listeners]

        def join(rank: int) -> Group:
            return Group(
                rank=rank, addresses=addresses, listener=self.listeners[rank], secret=SECRET, epoch=1, channel="test",
                host=str(layout[rank]),
            )  # fmt: skip

        self.groups = [future.result(10) for future in [self.pool.submit(join, rank) for rank in range(size)]]

    def start(self, function: Callable[[Group], Any]) -> list[Future[Any]]:
        return [self.pool.submit(function, group) for group in self.groups]

    def each(self, function: Callable[[Group], Any]) -> list[Any]:
        """What the function returns for each rank, all called at once."""
        return [future.result(20) for future in self.start(function)]

    def close(self) -> None:
        for group in self.groups:
            group.close()
        for listener in self.listeners:
            listener.close()
        self.pool.shutdown()


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
