"""How a dimension of a tensor is divided among shards. Pure arithmetic, no tensors.

A dimension is a row of blocks, each of which is cut among the shards by itself: a fused query-key-value projection has
three, whose heads fall to the same shards. A cut is made between units, which stay whole: the columns of one head,
say. It says in which proportion a length falls to the shards, so one cut serves for a layer's features, for the heads
that they are viewed as, and for the pixels of the channels that they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import gcd, prod
from typing import NamedTuple


class Cut:
    """``units`` that fall to ``shards`` in order, as evenly as they can; the first shards have one more.

    A cut of which it is still to be found out how fine it can be is ``free``: it becomes coarser, or one with another
    free cut, as what the model does with its values demands.
    """

    def __init__(self, units: int, shards: int, *, free: bool = False) -> None:
        self._units = units
        self.shards = shards
        self._free = free
        self._one_with: Cut | None = None

    @property
    def units(self) -> int:
        return self._root()._units

    def serves(self, length: int) -> bool:
        """Whether a block of that length can be cut so. A free cut becomes coarser for it if it can."""
        root = self._root()
        units = gcd(root._units, length)
        if units == root._units:
            return True
        if not root._free or units < self.shards:
            return False
        root._units = units
        return True

    def matches(self, other: Cut) -> bool:
        """Whether both always fall to the shards alike. Free cuts become one if they can."""
        mine, others = self._root(), other._root()
        if mine is others:
            return True
        if not (mine._free and others._free):
            return False
        units = gcd(mine._units, others._units)
        if units < self.shards:
            return False
        others._one_with, mine._units = mine, units
        return True

    def edges(self, length: int) -> tuple[int, ...]:
        """Where each shard's part of a block of that length begins, and the end of the last."""
        return _edges(length, self.units, self.shards)

    def _root(self) -> Cut:
        cut = self
        while cut._one_with is not None:
            cut = cut._one_with
        return cut


@cache
def _edges(length: int, units: int, shards: int) -> tuple[int, ...]:
    share, more = divmod(units, shards)
    counts = (share + (shard < more) for shard in range(shards))
    return tuple(length // units * edge for edge in accumulate(counts, initial=0))


@cache
def settled(units: int, shards: int) -> Cut:
    """The cut between so many units; always the same one, so that it matches itself."""
    return Cut(units, shards)


class Block(NamedTuple):
    length: int
    cut: Cut


Blocks = tuple[Block, ...]


def length_of(blocks: Blocks) -> int:
    """Of the whole dimension."""
    return sum(block.length for block in blocks)


def ranges_of(blocks: Blocks, shard: int) -> tuple[tuple[int, int], ...]:
    """The indices [start, stop) of the dimension that fall to a shard."""
    starts = accumulate((block.length for block in blocks[:-1]), initial=0)
    edges = [block.cut.edges(block.length) for block in blocks]
    return tuple((start + edge[shard], start + edge[shard + 1]) for start, edge in zip(starts, edges, strict=True))


def same(left: Blocks, right: Blocks) -> bool:
    """Whether two dimensions fall to the shards alike."""
    return left == right or (
        [block.length for block in left] == [block.length for block in right]
        and all(a.cut.matches(b.cut) for a, b in zip(left, right, strict=True))
    )


@lru_cache(4096)
def viewed(shape: tuple[int, ...], dim: int, blocks: Blocks, new_shape: tuple[int, ...]) -> tuple[int, Blocks] | None:
    """Where the divided dimension of a tensor of that shape is when it is viewed in the new shape; None if nowhere."""
    old, new = _group(shape, new_shape, dim)
    before, after = prod(shape[old.start : dim]), prod(shape[dim + 1 : old.stop])
    flat = [Block(block.length * after, block.cut) for block in blocks] * before
    for place in new:
        repeats, inner = prod(new_shape[new.start : place]), prod(new_shape[place + 1 : new.stop])
        if len(flat) % repeats or any(block.length % inner for block in flat):
            continue
        count = len(flat) // repeats
        found = tuple(Block(block.length // inner, block.cut) for block in flat[:count])
        others = [flat[start : start + count] for start in range(count, len(flat), count)]
        if all(same(tuple(flat[:count]), tuple(other)) for other in others) and all(
            block.cut.serves(block.length) for block in found
        ):
            return place, found
    return None


def _group(shape: Sequence[int], new_shape: Sequence[int], dim: int) -> tuple[range, range]:
    """The fewest neighbouring dimensions around ``dim`` that a view makes other dimensions of, and those."""
    old_start = new_start = old_stop = new_stop = 0
    while True:
        old_stop, new_stop = old_stop + 1, new_stop + 1
        left, right = shape[old_start], new_shape[new_start] if new_start < len(new_shape) else 1
        while left != right:
            if left < right:
                left, old_stop = left * shape[old_stop], old_stop + 1
            else:
                right, new_stop = right * new_shape[new_stop], new_stop + 1
        if dim < old_stop:
            return range(old_start, old_stop), range(new_start, min(new_stop, len(new_shape)))
        old_start, new_start = old_stop, new_stop


def pieces(blocks: Blocks, lengths: Sequence[int]) -> list[Blocks] | None:
    """The blocks of each of consecutive parts of a dimension; None if a part ends within a block."""
    rest, found = list(blocks), []
    for length in lengths:
        part: list[Block] = []
        while length > 0 and rest and rest[0].length <= length:
            part.append(rest.pop(0))
            length -= part[-1].length
        if length:
            return None
        found.append(tuple(part))
    return found
