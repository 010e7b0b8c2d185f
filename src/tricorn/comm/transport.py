"""What carries a group's tensors: connections (mesh.py), shared memory, or one within hosts and the other between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Transport(Protocol):
    """Blocking operations on flat tensors in CPU memory, the same on every rank and in the same order.

    One collective at a time; at the same time one message to each peer and one from each. All raise PeerLost when a
    peer is lost.
    """

    @property
    def bytes_sent(self) -> int:
        """Payload for other ranks, by whatever way it goes."""

    @property
    def bytes_between(self) -> int:
        """As much of it as went over connections."""

    def all_reduce(self, flat: Tensor) -> None: ...

    def reduce_scatter(self, flat: Tensor, bounds: Sequence[int]) -> None: ...

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None: ...

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None: ...

    def broadcast(self, flat: Tensor, source: int) -> None: ...

    def room(self, peer: int) -> int:
        """How many bytes could be sent to that rank now without waiting for anybody; 0 where that is not known."""

    def send(self, flat: Tensor, peer: int) -> None: ...

    def receive(self, flat: Tensor, peer: int) -> None: ...
