"""Gradients that travel encoded, by any of the encodings of comm/codecs.py or by PowerSGD; all ranks get the same bits.

What an encoding loses is added to what the same rank encodes next. That memory is of one membership epoch: after a
loss all begin again with nothing kept back, so that no rank adds what another has already counted
(docs/decisions/0007-less-to-send.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tricorn.comm import codecs
from tricorn.comm.lane import Handle, Lane
from tricorn.dp import buckets
from tricorn.dp.powersgd import PowerSum
from tricorn.dp.wire import GroupWire, Wire

if TYPE_CHECKING:
    from tricorn.comm.codecs import Codec
    from tricorn.comm.group import Group
    from tricorn.plan import Compression
    from tricorn.state.flat import Entry, FlatState


class Compressor(Protocol):
    """Sums slices of one flat tensor over all ranks, with less to send. It remembers what it has not sent yet."""

    def sum(self, wire: Wire, flat: Tensor, start: int, step: int) -> None:
        """Replace elements [start, start + len(flat)) by about their sum over all ranks, the same bits on each."""

    def forget(self) -> None:
        """Begin again with nothing kept back."""


class EncodedSum:
    """Each rank sums one part of a slice: parts travel to it encoded, and its sum travels back encoded.

    So an element is encoded twice, with error feedback for each time, and 2 (size - 1) / size encodings of the slice
    are sent by each rank, as of the numbers themselves in an ordinary sum.
    """

    def __init__(self, codec: Codec, elements: int, dtype: torch.dtype) -> None:
        self._codec = codec
        self._parts = codecs.ErrorFeedback(codec, elements, dtype)
        self._sums = codecs.ErrorFeedback(codec, elements, dtype)

    def sum(self, wire: Wire, flat: Tensor, start: int, step: int) -> None:
        cuts = [len(flat) * rank // wire.size for rank in range(wire.size + 1)]
        low, high = cuts[wire.rank], cuts[wire.rank + 1]
        seed = ((step * wire.size + wire.rank) * 2 << 32) + start  # a number for each encoding of the run
        sends = [
            self._parts.encode(flat[cuts[rank] : cuts[rank + 1]], seed + cuts[rank], start + cuts[rank])
            for rank in range(wire.size)
        ]
        receives = [torch.empty(self._codec.size(high - low), dtype=torch.uint8) for _ in sends]
        wire.all_to_all(sends, receives)
        total, part = torch.zeros(high - low, dtype=flat.dtype), torch.empty(high - low, dtype=flat.dtype)
        for data in receives:
            self._codec.decode(data, part)
            total += part
        bounds = [0]
        for rank in range(wire.size):
            bounds.append(bounds[-1] + self._codec.size(cuts[rank + 1] - cuts[rank]))
        gathered = torch.empty(bounds[-1], dtype=torch.uint8)
        gathered[bounds[wire.rank] : bounds[wire.rank + 1]] = self._sums.encode(total, seed + (1 << 32), start + low)
        wire.all_gather(gathered, bounds)
        for rank in range(wire.size):
            self._codec.decode(gathered[bounds[rank] : bounds[rank + 1]], flat[cuts[rank] : cuts[rank + 1]])

    def forget(self) -> None:
        self._parts.forget()
        self._sums.forget()


def compressor(name: Compression, entries: Sequence[Entry], dtype: torch.dtype) -> Compressor:
    """What ``plan.compress`` names, for parameters laid out flat."""
    if name == "powersgd":
        return PowerSum(entries, dtype)
    return EncodedSum(codecs.find(name), entries[-1].stop if entries else 0, dtype)


def warm(name: Compression, dtype: torch.dtype) -> None:
    """Load what ``compressor`` will need, and compile its kernels, in a process that workers are forked from."""
    if name == "powersgd":
        from tricorn.dp import powersgd_kernels as kernels

        ones = torch.ones(1, 1, dtype=dtype).numpy()
        kernels.orthogonalise(ones)
        kernels.product(ones, ones, ones.copy())
        return
    ones_N = torch.ones(8, dtype=dtype)
    codec = codecs.find(name)
    codec.decode(codec.encode(ones_N), ones_N)


def gradient_sum(state: FlatState, compress: Compression) -> buckets.GradientSum:
    """What sums the gradient of a state over a group, as ``plan.compress`` says."""
    if compress == "none":
        return buckets.GradientSum(state)
    return CompressedSum(state, compress)


class CompressedSum(buckets.GradientSum):
    """Sums a gradient with less to send, bucket by bucket, while backward computes the rest of it.

    What is encoded, and what is kept back, is a share of the *mean*: batches have different counts, and a sum kept
    back from a large one must not outweigh a small one. Hence the count is agreed first, while forward runs. A group
    of one sends nothing and loses nothing.
    """

    def __init__(self, state: FlatState, compress: Compression) -> None:
        self._compress: Compression = compress
        super().__init__(state)
        self._known: Group | None = None  # the group that what is kept back belongs to
        self._count = torch.zeros(1, dtype=torch.float64)
        self._lane = Lane("")

    def begin(self, group: Group, count: int) -> None:
        super().begin(group, count)
        if group is not self._known:
            self._compressor.forget()
            self._known = group
        # Collectives follow one another in a thread of their own: a sum takes two, with arithmetic between them.
        self._lane = Lane("tricorn-compress")
        self._count[0] = count
        self._lane.start(partial(GroupWire(group).all_reduce, self._count))

    def finish(self, status: Tensor) -> None:
        try:
            super().finish(status)
        finally:
            self._lane.close()

    def abandon(self) -> None:
        super().abandon()
        self._lane.close()
        self._known = None

    def _arrange(self) -> None:
        super()._arrange()
        self._compressor = compressor(self._compress, self._state.entries, self._state.grads_N.dtype)

    def _launch(self, group: Group) -> None:
        if group.size == 1:
            super()._launch(group)
            return
        bucket = self._buckets[len(self._handles)]
        self._handles.append(self._lane.start(partial(self._sum, GroupWire(group), bucket.start, bucket.stop)))

    def _reduce(self, group: Group, tensor: Tensor) -> Handle:
        return self._lane.start(partial(GroupWire(group).all_reduce, tensor))

    def _sum(self, wire: Wire, start: int, stop: int) -> None:
        flat = self._state.grads_N[start:stop]
        count = max(self._count.item(), 1.0)
        flat.div_(count)
        self._compressor.sum(wire, flat, start, self._state.step)
        flat.mul_(count)
