"""Groups whose ranks are threads of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener

SECRET = b"s" * 32


class Mesh:
    """Every rank of one group, each with a thread of its own."""

    def __init__(self, size: int) -> None:
        self.listeners = [PeerListener(SECRET) for _ in range(size)]
        self.pool = ThreadPoolExecutor(size, thread_name_prefix="rank")
        addresses = [listener.address for listener in self.listeners]

        def join(rank: int) -> Group:
            return Group(
                rank=rank, addresses=addresses, listener=self.listeners[rank], secret=SECRET, epoch=1, channel="test"
            )

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


@pytest.fixture(autouse=True)
def one_compute_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def mesh() -> Iterator[Callable[[int], Mesh]]:
    """Builds a mesh of so many ranks; nothing of it may be left afterwards."""
    before = set(threading.enumerate())
    made: list[Mesh] = []

    def make(size: int) -> Mesh:
        made.append(Mesh(size))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert set(threading.enumerate()) <= before
    assert all(sock.fileno() == -1 for each in made for group in each.groups for sock in group._sockets())


@pytest.fixture(scope="module")
def meshes() -> Iterator[dict[int, Mesh]]:
    """A mesh of each size from 1 to 4, shared by the tests of a module that leave it whole."""
    made = {size: Mesh(size) for size in (1, 2, 3, 4)}
    yield made
    for each in made.values():
        each.close()
