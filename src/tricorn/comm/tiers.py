"""Collectives of ranks that are spread over hosts: within each host first, then between hosts by one leader each.

A link between hosts so carries the sum of a host once, however many ranks are there. Sums are taken in rank order
within each host, then over hosts in the order of their leaders, the lowest rank of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tricorn.comm.mesh import Mesh, cut
from tricorn.comm.transport import Transport


class Tiers:
    """``hosts`` are the ranks of each host, ascending, in the order of the first of each.

    ``inner`` joins the ranks of this host, ``leaders`` (None but on a leader) the first ranks of all hosts, and
    ``remote`` this rank with each rank of the other hosts.
    """

    def __init__(
        self, rank: int, hosts: Sequence[Sequence[int]], *, inner: Transport, leaders: Mesh | None, remote: Mesh
    ) -> None:
        self.rank = rank
        self._home = next(number for number, ranks in enumerate(hosts) if rank in ranks)
        self._local = list(hosts[self._home])
        self._hosts = hosts
        self._order = [rank for ranks in hosts for rank in ranks]
        self._inner = inner
        self._leaders = leaders
        self._remote = remote

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent + self.bytes_between

    @property
    def bytes_between(self) -> int:
        return self._remote.bytes_sent + (self._leaders.bytes_sent if self._leaders else 0)

    def all_reduce(self, flat: Tensor) -> None:
        self._inner.all_reduce(flat)
        if self._leaders:
            self._leaders.all_reduce(flat)
        self._inner.broadcast(flat, 0)

    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int]) -> None:
        self._inner.all_reduce(flat)
        parts = cut(flat, bounds)
        nothing = [flat[:0]] * len(self._local)
        sends = nothing
        if self._leaders:
            packed, edges = self._packed(parts)
            self._leaders.reduce_scatter(packed, edges)
            self._unpack(packed, parts)
            sends = [parts[rank] for rank in self._local]
        self._inner.all_to_all(sends, [parts[self.rank], *nothing[1:]])

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        parts = cut(flat, bounds)
        nothing = [flat[:0]] * len(self._local)
        receives = [parts[rank] for rank in self._local] if self._leaders else nothing
        self._inner.all_to_all([parts[self.rank], *nothing[1:]], receives)
        if self._leaders:
            packed, edges = self._packed(parts)
            self._leaders.all_gather(packed, edges)
            self._unpack(packed, parts)
        self._inner.broadcast(flat, 0)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        self._inner.all_to_all([sends[rank] for rank in self._local], [receives[rank] for rank in self._local])
        self._remote.swap(sends, receives)

    def broadcast(self, flat: Tensor, source: int) -> None:
        if source in self._local:
            self._inner.broadcast(flat, self._local.index(source))
        if self._leaders:
            self._leaders.broadcast(flat, next(n for n, ranks in enumerate(self._hosts) if source in ranks))
        if source not in self._local:
            self._inner.broadcast(flat, 0)

    def room(self, peer: int) -> int:
        return self._inner.room(self._local.index(peer)) if peer in self._local else 0

    def send(self, flat: Tensor, peer: int) -> None:
        if peer in self._local:
            self._inner.send(flat, self._local.index(peer))
        else:
            self._remote.send(flat, peer)

    def receive(self, flat: Tensor, peer: int) -> None:
        if peer in self._local:
            self._inner.receive(flat, self._local.index(peer))
        else:
            self._remote.receive(flat, peer)

    def _packed(self, parts: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """The parts of all ranks, those of a host side by side, and where each host's begin and end."""
        sizes = [sum(parts[rank].numel() for rank in ranks) for ranks in self._hosts]
        return torch.cat([parts[rank] for rank in self._order]), [0, *itertools.accumulate(sizes)]

    def _unpack(self, packed: Tensor, parts: Sequence[Tensor]) -> None:
        start = 0
        for rank in self._order:
            stop = start + parts[rank].numel()
            parts[rank].copy_(packed[start:stop])
            start = stop
