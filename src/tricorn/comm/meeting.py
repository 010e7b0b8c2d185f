"""How the ranks of a group find out where the others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import torch

from tricorn.comm.mesh import Mesh
from tricorn.documents import UNREADABLE
from tricorn.errors import ProtocolError

CARD = 1024  # bytes

T = TypeVar("T")


def show(mesh: Mesh, what: T, timeout: float) -> list[T]:
    """What each rank has to show, small and all of one type. Raises PeerLost when one does not come in time,
    ProtocolError when it cannot be read.
    """
    encoded = msgspec.json.encode(what)
    assert len(encoded) <= CARD, "more than what is exchanged"
    own = torch.frombuffer(bytearray(encoded.ljust(CARD)), dtype=torch.uint8)
    shown = [torch.empty_like(own) for _ in range(mesh.size)]
    mesh.swap([own] * mesh.size, shown, timeout)
    shown[mesh.rank] = own
    try:
        return [msgspec.json.decode(card.numpy().tobytes(), type=type(what)) for card in shown]
    except UNREADABLE as error:
        raise ProtocolError(f"what a rank shows of itself cannot be read: {error}") from None


def by_host(hosts: Sequence[str]) -> list[list[int]]:
    """The ranks of each host, given the host of each rank: ascending, in the order of the first of each."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return [*ranks.values()]
