"""A shard that has everything, and takes notes of what could not be done with parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tricorn.mp.tensor.cut import Blocks, length_of
from tricorn.mp.tensor.team import Team

_NOTED = "tricorn_noted"


class Rehearsal(Team):
    """A shard that has everything, and takes notes."""

    def __init__(self, shards: int, *, large: int, sizes: Mapping[str, int], gathered: set[str]) -> None:
        self.shard, self.shards = None, shards
        self.gathered_outputs = frozenset(gathered)
        self.stops: dict[str, str] = {}
        self.arranged: dict[str, tuple[int, ...]] = {}
        self.to_sum: list[int] = []  # bytes of each value that shards would sum, forward or backward
        self.to_gather: list[int] = []
        self._large, self._sizes = large, sizes

    def is_large(self, name: str) -> bool:
        return self._sizes[name] >= self._large

    def shared(self, whole: Tensor) -> Tensor:
        if whole.requires_grad and vars(whole).get(_NOTED) != whole._version:
            self.to_sum.append(whole.nbytes)
            if not whole.is_leaf:  # whose gradients are added up before they are summed
                vars(whole)[_NOTED] = whole._version
        return whole

    def slice(self, whole: Tensor, dim: int, blocks: Blocks) -> Tensor:
        self.to_gather += [whole.nbytes] * whole.requires_grad
        return whole

    def gathered(self, part: Tensor, dim: int, blocks: Blocks) -> Tensor:
        self.to_gather.append(part.nbytes)
        return part.clone()

    def _all_reduce(self, tensor: Tensor) -> None:
        self.to_sum.append(tensor.nbytes)

    def stopped(self, origins: frozenset[str], why: str, *, sliced: bool = False) -> None:
        for name in origins:
            if why and not (sliced and self.is_large(name)):
                self.stops.setdefault(name, f"what it makes goes into {why}")

    def regroup(self, origins: frozenset[str], blocks: Blocks, sizes: Sequence[int]) -> bool:
        # A fused projection viewed as [3, heads, width]: the heads are to be divided, not the three.
        if len(blocks) > 1 or len(sizes) < 3 or sizes[0] not in (2, 3):
            return False
        length = blocks[0].length // sizes[0]
        if sizes[1] > length:
            return False
        self.rearrange(origins, blocks, (length,) * sizes[0])
        return True

    def rearrange(self, origins: frozenset[str], blocks: Blocks, lengths: Sequence[int]) -> None:
        if length_of(blocks) == sum(lengths):
            self.arranged |= dict.fromkeys(origins, tuple(lengths))
