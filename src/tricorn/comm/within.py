"""The ranks of one host: through shared memory (shared.py), as a group's transport."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tricorn.comm.meeting import show
from tricorn.comm.mesh import Mesh, cut
from tricorn.comm.segment import Segment
from tricorn.comm.shared import SMALL, Shared, new_segment


class Within:
    """Fulfils ``Transport``. ``mesh`` joins the ranks here while they show each other where their memory is.

    Raises PeerLost when one does not in ``timeout`` seconds. ``names`` are the numbers by which errors call the ranks.
    """

    bytes_between = 0

    def __init__(self, mesh: Mesh, label: str, timeout: float, names: Sequence[int]) -> None:
        with contextlib.ExitStack() as undo:
            segment = new_segment(mesh.size, label)
            undo.callback(segment.close)
            tickets = show(mesh, segment.ticket, timeout)
            self._shared = Shared(
                rank=mesh.rank, segment=segment, tickets=tickets, label=label, timeout=math.inf, names=names
            )
            undo.callback(self._shared.close)
            show(mesh, "attached", timeout)  # before that, nobody may let go of its memory
            undo.pop_all()
        self._mesh, self._label, self._timeout = mesh, label, timeout
        self._rank = mesh.rank
        self._others = mesh.size - 1
        self.bytes_sent = 0
        self._counting = threading.Lock()

    def all_reduce(self, flat: Tensor) -> None:
        self._shared.all_reduce(flat)
        share = 2 / (self._others + 1) if flat.nbytes > SMALL else 1
        self._count(round(flat.nbytes * self._others * share))

    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int]) -> None:
        parts = cut(flat, bounds)
        self._shared.reduce_scatter(parts[self._rank], parts)
        self._count(flat.nbytes - parts[self._rank].nbytes)

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        parts = cut(flat, bounds)
        self._shared.all_gather(parts, parts[self._rank])
        self._count(parts[self._rank].nbytes * self._others)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        self._shared.all_to_all(receives, sends)
        self._count(sum(tensor.nbytes for tensor in sends) - sends[self._rank].nbytes)

    def broadcast(self, flat: Tensor, source: int) -> None:
        self._shared.broadcast(flat, source)
        if self._rank == source:
            self._count(flat.nbytes * self._others)

    def room(self, peer: int) -> int:
        return self._shared.room(peer)

    def send(self, flat: Tensor, peer: int) -> None:
        self._shared.send(flat, peer)
        self._count(flat.nbytes)

    def receive(self, flat: Tensor, peer: int) -> None:
        self._shared.receive(flat, peer)

    def expose(self, elements: int, dtype: torch.dtype) -> list[Tensor]:
        """Memory of so many elements for each rank, by rank, that all ranks see; zero at first."""
        with contextlib.ExitStack() as closing:  # descriptors; the memory stays
            own = Segment.create(max(1, elements * dtype.itemsize), self._label)
            closing.callback(own.close)
            segments = []
            for rank, ticket in enumerate(show(self._mesh, own.ticket, self._timeout)):
                segments.append(own if rank == self._rank else Segment.attach(ticket))
                closing.callback(segments[-1].close)
            show(self._mesh, "attached", self._timeout)
        return [torch.frombuffer(each.memory, dtype=dtype, count=elements) for each in segments]

    def note_read(self, payload: int) -> None:
        """Count what others have read out of this rank's exposed memory."""
        self._count(payload)

    def interrupt(self, why: str) -> None:
        """Make every call, blocked or yet to come, here and at the peers, raise PeerLost. From any thread."""
        self._shared.interrupt(why)

    def close(self) -> None:
        self._shared.close()

    def _count(self, payload: int) -> None:
        with self._counting:
            self.bytes_sent += payload


def warm(dtypes: Iterable[torch.dtype]) -> None:
    """Load the compiled code for sums of these dtypes and for messages; processes forked from this one then have it.

    The code is kept on disk; where it is not there yet, or cannot be kept, this compiles it.
    """
    segments = [new_segment(2, "warm") for _ in range(2)]
    tickets = [segment.ticket for segment in segments]
    pair = [Shared(rank=rank, segment=segments[rank], tickets=tickets, label="warm", timeout=60) for rank in range(2)]

    def take_part(shared: Shared) -> None:
        for dtype in dtypes:
            shared.all_reduce(torch.zeros(1, dtype=dtype))
        shared.all_reduce(torch.zeros(SMALL + 1, dtype=torch.uint8))
        message = torch.zeros(1)
        if shared.rank == 0:
            shared.send(message, 1)
        else:
            shared.receive(message, 0)

    other = threading.Thread(target=take_part, args=(pair[1],))
    other.start()
    take_part(pair[0])
    other.join()
    for shared in pair:
        shared.interrupt("warm")
        shared.close()
