"""Collectives and point-to-point messages between the workers of one membership epoch, over a mesh of TCP connections.

Sums are taken in rank order, so every rank gets the same bits, and the same bits each time. Tensors on a GPU go
through CPU memory.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tricorn.comm import sockets
from tricorn.comm.exchange import Transfer, exchange
from tricorn.comm.lane import Handle, Lane
from tricorn.errors import PeerLost

if TYPE_CHECKING:
    from tricorn.comm.listener import PeerListener

# Up to here everyone sends all to everyone: one latency. Beyond, each rank sums one chunk and sends the sum: two
# latencies, but only 2 (size - 1) / size times the tensor to send instead of size - 1 times.
SMALL = 32 * 1024


class Group:
    """The workers that share a step. ``addresses`` is where each rank listens, this one's ``listener`` included.

    The constructor connects to every other rank; it raises PeerLost when one has not come after ``timeout``
    seconds, AuthenticationError when one does not know the run's secret. Every rank must call the same collectives
    in the same order. Collectives and ``send`` are called by one thread, ``interrupt`` by any.

    A call waits for its peers as long as it takes; a peer's death, or ``interrupt``, makes it raise PeerLost. The
    group is of no use then, and tells the others so by hanging up.
    """

    def __init__(
        self,
        *,
        rank: int,
        addresses: Sequence[sockets.Address],
        listener: PeerListener,
        secret: bytes,
        epoch: int,
        channel: str,
        timeout: float = 10.0,
    ) -> None:
        self.rank = rank
        self.size = len(addresses)
        self.bytes_sent = 0  # payload
        self._mutex = threading.Lock()  # of bytes_sent and of the end
        self._lost = ""
        self._collective: dict[int, socket.socket] = {}
        self._direct: dict[int, socket.socket] = {}
        self._lane = Lane(f"tricorn-{channel}")
        self._senders = {peer: Lane(f"tricorn-{channel}-to-{peer}") for peer in range(self.size) if peer != rank}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        try:
            # A connection of its own for each kind, so that a message never stands in the way of a collective.
            for kind, mesh in (("collective", self._collective), ("direct", self._direct)):
                claim = {"epoch": epoch, "channel": f"{channel}/{kind}", "rank": rank}
                for peer in range(rank):
                    mesh[peer] = sockets.connect(addresses[peer], secret, claim, timeout=timeout)
            for kind, mesh in (("collective", self._collective), ("direct", self._direct)):
                for peer in range(rank + 1, self.size):
                    mesh[peer] = listener.take(epoch, f"{channel}/{kind}", peer, timeout)
            for sock in self._sockets():
                sock.setblocking(False)
        except BaseException:
            self.close()
            raise

    def all_reduce(self, tensor: Tensor) -> Handle:
        """Begin to replace the tensor (contiguous) by its sum over all ranks; leave it alone until waited for."""
        flat = _flat(tensor)
        return self._lane.start(lambda: self._guarded(self._all_reduce, flat))

    def all_reduce_now(self, tensor: Tensor) -> None:
        """Replace the tensor (contiguous) by its sum over all ranks."""
        flat = _flat(tensor)
        self._lane.run(lambda: self._guarded(self._all_reduce, flat))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace the tensor (contiguous) by that of rank ``source``."""
        flat = _flat(tensor)
        self._lane.run(lambda: self._guarded(lambda local: self._broadcast(local, source), flat))

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.all_reduce_now(torch.zeros(1))

    def send(self, tensor: Tensor, peer: int) -> Handle:
        """Begin to send the tensor (contiguous); leave it alone until waited for. In order for each peer."""
        flat, sock = _flat(tensor), self._direct[peer]
        return self._senders[peer].start(
            lambda: self._guarded(lambda local: self._exchange([(sock, _bytes(local))], []), flat)
        )

    def receive(self, tensor: Tensor, peer: int) -> None:
        """Fill the tensor (contiguous) with the next that ``peer`` sent, of the same size and dtype."""
        sock = self._direct[peer]
        self._guarded(lambda local: self._exchange([], [(sock, _bytes(local))]), _flat(tensor))

    def interrupt(self) -> None:
        """Make every call, blocked or yet to come, here and at the peers, raise PeerLost. From any thread."""
        self._hang_up("the group was interrupted")

    def close(self) -> None:
        """End the connections and threads, unfinished work included. May be called again."""
        self._hang_up("the group is closed")
        for lane in (self._lane, *self._senders.values()):
            lane.close()
        with self._mutex:
            for sock in self._sockets():
                sock.close()

    def _sockets(self) -> list[socket.socket]:
        return [*self._collective.values(), *self._direct.values()]

    def _hang_up(self, why: str) -> None:
        with self._mutex:
            if self._lost:
                return
            self._lost = why
            for sock in self._sockets():
                # Wakes whoever is blocked on it, which closing would not.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _guarded(self, work: Callable[[Tensor], None], flat: Tensor) -> None:
        """Do the work on the tensor, by way of CPU memory. Once any work has failed, the streams are out of step."""
        if self._lost:
            raise PeerLost(self._lost)
        try:
            local = flat.cpu()
            work(local)
            if not flat.is_cpu:
                flat.copy_(local)
        except PeerLost as error:
            self._hang_up(str(error))
            # If this side hung up first, its reason says more than the connection that broke.
            raise PeerLost(self._lost) from None
        except BaseException as error:
            self._hang_up(f"the group has failed: {error}")
            raise

    def _all_reduce(self, flat: Tensor) -> None:
        if self.size == 1:
            return
        if flat.nbytes <= SMALL:
            arrived = self._arrivals(flat)
            self._exchange(
                [(sock, _bytes(flat)) for sock in self._collective.values()],
                [(sock, _bytes(arrived[peer])) for peer, sock in self._collective.items()],
            )
            self._sum(flat, arrived)
            return
        chunks = flat.tensor_split(self.size)
        own = chunks[self.rank]
        arrived = self._arrivals(own)
        self._exchange(
            [(sock, _bytes(chunks[peer])) for peer, sock in self._collective.items()],
            [(sock, _bytes(arrived[peer])) for peer, sock in self._collective.items()],
        )
        self._sum(own, arrived)
        self._exchange(
            [(sock, _bytes(own)) for sock in self._collective.values()],
            [(sock, _bytes(chunks[peer])) for peer, sock in self._collective.items()],
        )

    def _broadcast(self, flat: Tensor, source: int) -> None:
        if self.rank == source:
            self._exchange([(sock, _bytes(flat)) for sock in self._collective.values()], [])
        else:
            self._exchange([], [(self._collective[source], _bytes(flat))])

    def _exchange(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> None:
        exchange(sends, receives)
        with self._mutex:
            self.bytes_sent += sum(len(view) for _, view in sends)

    def _arrivals(self, like: Tensor) -> Tensor:
        """A row for what each rank sends, in memory that is kept from one call to the next."""
        if self._scratch.nbytes < self.size * like.nbytes:
            self._scratch = torch.empty(self.size * like.nbytes, dtype=torch.uint8)
        return self._scratch[: self.size * like.nbytes].view(like.dtype).view(self.size, -1)

    def _sum(self, own: Tensor, arrived: Tensor) -> None:
        """Replace ``own`` by the sum over all ranks, taken in rank order."""
        parts = [own if peer == self.rank else arrived[peer] for peer in range(self.size)]
        total = parts[0]
        for part in parts[1:]:
            total += part
        if total is not own:
            own.copy_(total)


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor can be sent")
    return tensor.detach().view(-1)


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
