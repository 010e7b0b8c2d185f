"""What compressing sends through: a few blocking collectives, and a group that has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tricorn.comm.group import Group


class Wire(Protocol):
    """What compressing needs of a group: blocking collectives of tensors on the CPU."""

    rank: int
    size: int

    def all_reduce(self, flat: Tensor) -> None:
        """Replace it by its sum over all ranks, the same bits on each."""

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        """Send ``sends[r]`` to each rank r, fill ``receives[r]`` with what r sent here: bytes, sizes may differ."""

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        """Fill in each rank r's part of the bytes, [bounds[r], bounds[r + 1]), everywhere."""


class GroupWire:
    """A Group as a Wire."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group

    def all_reduce(self, flat: Tensor) -> None:
        self._group.all_reduce_now(flat)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        self._group.all_to_all(sends, receives).wait()

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        self._group.all_gather(flat, bounds).wait()
