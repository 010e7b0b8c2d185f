"""Collectives and point-to-point messages between the workers of one membership epoch.

Ranks of one host exchange tensors through shared memory, ranks of different hosts over TCP. Sums are taken in rank
order within a host and then over hosts, so every rank gets the same bits, and the same bits each time. Tensors on a GPU
go through CPU memory.
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
from tricorn.comm.lane import Handle, Lane
from tricorn.comm.meeting import by_host, show
from tricorn.comm.mesh import Mesh
from tricorn.comm.segment import here
from tricorn.comm.tiers import Tiers
from tricorn.comm.transport import Transport
from tricorn.errors import PeerLost

if TYPE_CHECKING:
    from tricorn.comm.listener import PeerListener
    from tricorn.comm.within import Within


class Group:
    """The workers that share a step. ``addresses`` is where each rank listens, this one's ``listener`` included.

    The constructor connects to every other rank; it raises PeerLost when one has not come after ``timeout``
    seconds, AuthenticationError when one does not know the run's secret. Every rank must call the same collectives
    in the same order. Collectives and ``send`` are called by one thread, ``interrupt`` by any. Ranks that give the same
    ``host`` share memory; it is found out if it is not given.

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
        host: str | None = None,
    ) -> None:
        self.rank = rank
        self.size = len(addresses)
        self._mutex = threading.Lock()  # of the end
        self._lost = ""
        self._within: Within | None = None
        self._collective: dict[int, socket.socket] = {}
        self._direct: dict[int, socket.socket] = {}
        self._lane = Lane(f"tricorn-{channel}")
        self._senders = {peer: Lane(f"tricorn-{channel}-to-{peer}") for peer in range(self.size) if peer != rank}
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
            self._way = self._meet(host or here(), f"tricorn-{channel}", timeout)
        except BaseException:
            self.close()
            raise

    @property
    def over(self) -> bool:
        """Whether the group has failed, was interrupted, or is closed."""
        return bool(self._lost)

    @property
    def bytes_sent(self) -> int:
        """Payload for other ranks, by whatever way it went."""
        return self._way.bytes_sent

    @property
    def bytes_between(self) -> int:
        """The part of ``bytes_sent`` that went to other hosts."""
        return self._way.bytes_between

    def all_reduce(self, tensor: Tensor) -> Handle:
        """Begin to replace the tensor (contiguous) by its sum over all ranks; leave it alone until waited for."""
        flat = _flat(tensor)
        return self._lane.start(lambda: self._guarded(self._way.all_reduce, flat))

    def all_reduce_now(self, tensor: Tensor) -> None:
        """Replace the tensor (contiguous) by its sum over all ranks."""
        flat = _flat(tensor)
        self._lane.run(lambda: self._guarded(self._way.all_reduce, flat))

    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int]) -> Handle:
        """Begin to sum over all ranks, to each rank its part: ``flat[bounds[rank] : bounds[rank + 1]]``.

        ``flat`` is contiguous, [N]; ``bounds`` are ``size + 1`` cuts of it, ascending from 0 to N, the same on every
        rank. What is outside of this rank's part may be overwritten. Leave it alone until waited for.
        """
        flat, bounds = _flat(flat), self._cuts(flat, bounds)
        return self._lane.start(lambda: self._guarded(lambda local: self._way.reduce_scatter(local, bounds), flat))

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> Handle:
        """Begin to fill in each rank's part, cut as in ``reduce_scatter``, on all ranks."""
        flat, bounds = _flat(flat), self._cuts(flat, bounds)
        return self._lane.start(lambda: self._guarded(lambda local: self._way.all_gather(local, bounds), flat))

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Handle:
        """Begin to send ``sends[r]`` to each rank r and to fill ``receives[r]`` with what r sent to this one.

        All contiguous; sizes may differ, but the two ends of each transfer must agree. Leave them alone until waited
        for. Raises ValueError unless there is one of each for every rank.
        """
        if not len(sends) == len(receives) == self.size:
            raise ValueError(f"{len(sends)} to send and {len(receives)} to receive, in a group of {self.size}")
        flats = [_flat(tensor) for tensor in (*sends, *receives)]
        return self._lane.start(
            lambda: self._guarded(lambda *all_: self._way.all_to_all(all_[: self.size], all_[self.size :]), *flats)
        )

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace the tensor (contiguous) by that of rank ``source``."""
        flat = _flat(tensor)
        self._lane.run(lambda: self._guarded(lambda local: self._way.broadcast(local, source), flat))

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.all_reduce_now(torch.zeros(1))

    def expose(self, elements: int, dtype: torch.dtype) -> list[Tensor] | None:
        """Memory of so many elements for each rank, by rank, that all ranks see: zero at first; None unless all are of
        one host. It is there as long as the tensors are. Nothing but a collective orders what is read and written.
        """
        if self.size == 1:
            return [torch.zeros(elements, dtype=dtype)]
        if self._within is not self._way:
            return None
        within, exposed = self._within, []
        self._lane.run(lambda: self._guarded(lambda: exposed.extend(within.expose(elements, dtype))))
        return exposed

    def note_read(self, payload: int) -> None:
        """Count bytes of this rank's that others have read out of exposed memory."""
        if self._within is not None:
            self._within.note_read(payload)

    def send(self, tensor: Tensor, peer: int) -> Handle:
        """Begin to send the tensor (contiguous); leave it alone until waited for. In order for each peer."""
        flat, lane = _flat(tensor), self._senders[peer]

        def send() -> None:
            self._guarded(lambda local: self._way.send(local, peer), flat)

        # To hand it to another thread, beside one that computes, takes longer than to copy it.
        if lane.idle and flat.is_cpu and flat.nbytes <= self._way.room(peer):
            return Handle().run(send)
        return lane.start(send)

    def receive(self, tensor: Tensor, peer: int) -> None:
        """Fill the tensor (contiguous) with the next that ``peer`` sent, of the same size and dtype."""
        self._guarded(lambda local: self._way.receive(local, peer), _flat(tensor))

    def interrupt(self) -> None:
        """Make every call, blocked or yet to come, here and at the peers, raise PeerLost. From any thread."""
        self._hang_up("the group was interrupted")

    def close(self) -> None:
        """End the connections and threads, unfinished work included. May be called again."""
        self._hang_up("the group is closed")
        for lane in (self._lane, *self._senders.values()):
            lane.close()
        if self._within is not None:
            self._within.close()
        with self._mutex:
            for sock in self._sockets():
                sock.close()

    def _meet(self, host: str, label: str, timeout: float) -> Transport:
        """Find out where the others are, and choose the way that tensors go."""
        hosts = by_host(show(self._among(range(self.size)), host, timeout))
        local = next(ranks for ranks in hosts if self.rank in ranks)
        if len(hosts) == self.size:
            return Mesh(self.rank, self._collective, self._direct)
        inner: Transport = Mesh(0, {}, {})
        if len(local) > 1:
            from tricorn.comm.within import Within  # brings numba, which a group over connections does without

            inner = self._within = Within(self._among(local), label, timeout, local)
        if len(hosts) == 1:
            return inner
        firsts = [ranks[0] for ranks in hosts]
        leaders = self._among(firsts) if self.rank in firsts else None
        far = {peer: sock for peer, sock in self._collective.items() if peer not in local}
        return Tiers(self.rank, hosts, inner=inner, leaders=leaders, remote=Mesh(self.rank, far, self._direct))

    def _among(self, ranks: Sequence[int]) -> Mesh:
        """The collective connections between some ranks, numbered in their order."""
        others = {number: self._collective[rank] for number, rank in enumerate(ranks) if rank != self.rank}
        return Mesh(ranks.index(self.rank), others, {})

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
        if self._within is not None:
            self._within.interrupt(why)

    def _cuts(self, flat: Tensor, bounds: Sequence[int]) -> list[int]:
        cuts = [int(bound) for bound in bounds]
        if len(cuts) != self.size + 1 or cuts != sorted(cuts) or (cuts[0], cuts[-1]) != (0, flat.numel()):
            raise ValueError(f"{cuts} are not {self.size + 1} ascending cuts of {flat.numel()} elements")
        return cuts

    def _guarded(self, work: Callable[..., None], *flats: Tensor) -> None:
        """Do the work on the tensors, by way of CPU memory. Once any work has failed, the streams are out of step."""
        if self._lost:
            raise PeerLost(self._lost)
        try:
            local = [flat.cpu() for flat in flats]
            work(*local)
            for flat, result in zip(flats, local, strict=True):
                if not flat.is_cpu:
                    flat.copy_(result)
        except PeerLost as error:
            self._hang_up(str(error))
            # If this side hung up first, its reason says more than the connection that broke.
            raise PeerLost(self._lost) from None
        except BaseException as error:
            self._hang_up(f"the group has failed: {error}")
            raise


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor can be sent")
    return tensor.detach().view(-1)
