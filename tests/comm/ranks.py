"""The ranks of one group as threads of the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener

SECRET = b"s" * 32


class Ranks:
    """Each with a thread of its own; ``hosts`` says which host each is on."""

    def __init__(self, hosts: Sequence[int], channel: str = "test") -> None:
        size = len(hosts)
        self.hosts = [[rank for rank in range(size) if hosts[rank] == host] for host in range(size)]
        self.listeners = [PeerListener(SECRET) for _ in range(size)]
        self.pool = ThreadPoolExecutor(size, thread_name_prefix="rank")
        addresses = [listener.address for listener in self.listeners]

        def join(rank: int) -> Group:
            return Group(
                rank=rank, addresses=addresses, listener=self.listeners[rank], secret=SECRET, epoch=1, channel=channel,
                host=str(hosts[rank]),
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
