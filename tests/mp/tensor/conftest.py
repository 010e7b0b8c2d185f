"""Shards that are threads of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener

SECRET = b"s" * 32


class Shards:
    """So many ranks of one host, each with a thread of its own."""

    def __init__(self, size: int) -> None:
        self.listeners = [PeerListener(SECRET) for _ in range(size)]
        self.pool = ThreadPoolExecutor(size, thread_name_prefix="shard")
        addresses = [listener.address for listener in self.listeners]

        def join(rank: int) -> Group:
            return Group(
                rank=rank, addresses=addresses, listener=self.listeners[rank], secret=SECRET, epoch=1, channel="tensor",
                host="here",
            )  # fmt: skip

        self.groups = list(self.pool.map(join, range(size)))

    def each(self, function: Callable[[Group], Any]) -> list[Any]:
        """What the function returns for each rank, all called at once."""

        def run(group: Group) -> Any:
            try:
                return function(group)
            except BaseException:
                group.interrupt()
                raise

        futures = [self.pool.submit(run, group) for group in self.groups]
        errors = [error for future in futures if (error := future.exception(60)) is not None]
        for error in sorted(errors, key=lambda each: type(each).__name__ == "PeerLost"):
            raise error
        return [future.result() for future in futures]

    def close(self) -> None:
        for group in self.groups:
            group.close()
        for listener in self.listeners:
            listener.close()
        self.pool.shutdown()


@pytest.fixture(scope="session")
def shards() -> Iterator[Callable[[int], Shards]]:
    """The ranks of a group of 2, 3 or 4, the same in all tests, with every thread of theirs running."""
    made = {size: Shards(size) for size in (2, 3, 4)}
    for size, each in made.items():
        each.each(lambda group, size=size: group.all_gather(torch.zeros(size), range(size + 1)).wait())
    yield made.__getitem__
    for each in made.values():
        each.close()
