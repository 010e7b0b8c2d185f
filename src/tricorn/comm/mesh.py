"""Collectives and messages over TCP: a connection from each rank to every other.

Sums are taken in rank order, so every rank gets the same bits, and the same bits each time; those of half precision
are taken in float32 and rounded once. Tensors are flat, in CPU memory, and of the same size and dtype on every rank.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tricorn.comm.exchange import Transfer, exchange

# Up to here everyone sends all to everyone: one latency. Beyond, each rank sums one chunk and sends the sum: two
# latencies, but only 2 (size - 1) / size times the tensor to send instead of size - 1 times.
SMALL = 32 * 1024
HALF = (torch.bfloat16, torch.float16)


class Mesh:
    """``collective`` and ``direct`` are this rank's connections to all others, which do not block.

    They are two, so that a message never stands in the way of a collective. One collective at a time; at the same time
    one message to each peer, and one from each.
    """

    def __init__(self, rank: int, collective: Mapping[int, socket.socket], direct: Mapping[int, socket.socket]) -> None:
        self.rank = rank
        self.size = len(collective) + 1
        self.bytes_sent = 0  # payload
        self._collective = collective
        self._direct = direct
        self._counting = threading.Lock()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes_between(self) -> int:
        return self.bytes_sent

    def all_reduce(self, flat: Tensor) -> None:
        if self.size == 1:
            return
        if flat.nbytes <= SMALL:
            arrived = self._arrivals(flat)
            self.swap([flat] * self.size, arrived)
            self._sum(flat, arrived)
            return
        bounds = even_bounds(flat.numel(), self.size)
        self.reduce_scatter(flat, bounds)
        self.all_gather(flat, bounds)

    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int]) -> None:
        chunks = cut(flat, bounds)
        own = chunks[self.rank]
        arrived = self._arrivals(own)
        self.swap(chunks, arrived)
        self._sum(own, arrived)

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        chunks = cut(flat, bounds)
        self.swap([chunks[self.rank]] * self.size, chunks)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        self.swap(sends, receives)
        receives[self.rank].copy_(sends[self.rank])

    def broadcast(self, flat: Tensor, source: int) -> None:
        if self.rank == source:
            self._transfer([(sock, as_bytes(flat)) for sock in self._collective.values()], [])
        else:
            self._transfer([], [(self._collective[source], as_bytes(flat))])

    def room(self, peer: int) -> int:
        return 0

    def send(self, flat: Tensor, peer: int) -> None:
        self._transfer([(self._direct[peer], as_bytes(flat))], [])

    def receive(self, flat: Tensor, peer: int) -> None:
        self._transfer([], [(self._direct[peer], as_bytes(flat))])

    def swap(self, sends: Sequence[Tensor], receives: Sequence[Tensor], timeout: float | None = None) -> None:
        """Send to each rank and receive from each, by rank; those without a connection are left alone.

        Raises PeerLost if it is not done after ``timeout`` seconds.
        """
        self._transfer(
            [(sock, as_bytes(sends[peer])) for peer, sock in self._collective.items()],
            [(sock, as_bytes(receives[peer])) for peer, sock in self._collective.items()],
            timeout,
        )

    def _transfer(self, sends: Sequence[Transfer], receives: Sequence[Transfer], timeout: float | None = None) -> None:
        exchange(sends, receives, timeout)
        with self._counting:
            self.bytes_sent += sum(len(view) for _, view in sends)

    def _arrivals(self, like: Tensor) -> Sequence[Tensor]:
        """Room for what each rank sends, in memory that is kept from one call to the next."""
        if self._scratch.nbytes < self.size * like.nbytes:
            self._scratch = torch.empty(self.size * like.nbytes, dtype=torch.uint8)
        return self._scratch[: self.size * like.nbytes].view(like.dtype).view(self.size, -1).unbind()

    def _sum(self, own: Tensor, arrived: Sequence[Tensor]) -> None:
        """Replace ``own`` by the sum over all ranks, taken in rank order."""
        parts = [own if peer == self.rank else arrived[peer] for peer in range(self.size)]
        total = parts[0].float() if own.dtype in HALF else parts[0]
        for part in parts[1:]:
            total += part
        if total is not own:
            own.copy_(total)


def even_bounds(count: int, parts: int) -> list[int]:
    """Where to cut ``count`` elements into parts that differ by one at most."""
    return [count * part // parts for part in range(parts + 1)]


def cut(flat: Tensor, bounds: Sequence[int]) -> list[Tensor]:
    """The parts of the tensor between neighbouring bounds."""
    return [flat[start:stop] for start, stop in itertools.pairwise(bounds)]


def as_bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
