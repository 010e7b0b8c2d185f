"""Which elements of a flattened tensor somebody has, when it was split along any dim. Pure.

A part of a tensor split along one dim is, flattened, several runs of equal length at equal distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tricorn.state.slabs import Slab

WINDOW = 1 << 20  # elements of a tensor that are looked at together


class Runs(NamedTuple):
    """``times`` runs of ``length`` elements, the first from ``start`` on, each ``stride`` after the one before."""

    start: int
    length: int
    stride: int = 0
    times: int = 1

    @property
    def size(self) -> int:
        return self.length * self.times

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + (self.times - 1) * self.stride + self.length

    @property
    def legal(self) -> bool:
        """Whether these are ascending elements, none of them twice."""
        apart = self.stride == 0 if self.times == 1 else self.stride >= self.length
        return min(self.start, self.length) >= 0 and self.times >= 1 and apart

    def of(self, flat: Tensor) -> Tensor:
        """These elements of a flat tensor: a view [times, length]."""
        return flat.as_strided((self.times, self.length), (self.stride, 1), flat.storage_offset() + self.start)

    def windows(self) -> Iterator[Runs]:
        """The same elements, in parts that span no more than a window each, or one run."""
        if self.times == 1:
            for start in range(self.start, self.stop, WINDOW):
                yield Runs(start, min(WINDOW, self.stop - start))
            return
        rows = max(1, WINDOW // self.stride)
        for row in range(0, self.times, rows):
            yield tidy(self._replace(start=self.start + row * self.stride, times=min(rows, self.times - row)))

    def positions(self) -> Tensor:
        """All elements' numbers in the flattened tensor, ascending: int64 [size]."""
        starts = self.start + self.stride * torch.arange(self.times)
        return (starts.unsqueeze(1) + torch.arange(self.length)).flatten()

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where in ``positions`` an element of these runs is asked for, and which of them it is, counted from 0."""
        beyond = positions - self.start
        run = beyond.div(self.stride, rounding_mode="floor") if self.times > 1 else torch.zeros_like(beyond)
        within = beyond - run * self.stride
        found = (run >= 0) & (run < self.times) & (within >= 0) & (within < self.length)
        return found, (run * self.length + within)[found]


class Match(NamedTuple):
    """Elements that are in a whole tensor at ``there`` and in the part of it that somebody has at ``here``."""

    there: Runs
    here: Runs


def matches(slab: Slab | None, start: int, stop: int) -> list[Match]:
    """Where elements [start, stop) of a flattened part lie in the whole, of which None is all."""
    if start >= stop:
        return []
    if slab is None:
        return [Match(Runs(start, stop - start), Runs(start, stop - start))]
    inner = prod(slab.shape[slab.dim + 1 :])
    wide = slab.shape[slab.dim] * inner
    sizes = [(high - low) * inner for low, high in slab.ranges]
    edges = [0, *accumulate(sizes)]
    width = edges[-1]
    found = []
    for rows, left, right in _blocks(start, stop, width):
        for (low, _), edge, size in zip(slab.ranges, edges, sizes, strict=False):
            first, last = max(left, edge), min(right, edge + size)
            if first < last:
                there = rows.start * wide + low * inner + first - edge
                here = rows.start * width + first
                found.append(
                    Match(
                        tidy(Runs(there, last - first, wide, len(rows))),
                        tidy(Runs(here, last - first, width, len(rows))),
                    )
                )
    return found


def _blocks(start: int, stop: int, width: int) -> Iterator[tuple[range, int, int]]:
    """Elements [start, stop) of a table so wide, as rows and the columns of them."""
    first, left = divmod(start, width)
    last, right = divmod(stop, width)
    if first == last:
        yield range(first, first + 1), left, right
        return
    if left:
        yield range(first, first + 1), left, width
        first += 1
    if first < last:
        yield range(first, last), 0, width
    if right:
        yield range(last, last + 1), 0, right


def tidy(runs: Runs) -> Runs:
    """The same elements in the one way they are written: runs without gaps are one."""
    if runs.times == 1 or runs.stride == runs.length:
        return Runs(runs.start, runs.size)
    return runs
