"""Sum a gradient over a group in flat buckets, while backward is still computing the rest of it.

Backward fills the gradient roughly from the last parameter to the first, so buckets are cut in that order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tricorn.errors import PeerLost, PlanError

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle
    from tricorn.state.flat import Entry, FlatState

FIRST_BYTES = 256 * 1024  # small, so that communication begins early
BUCKET_BYTES = 1024 * 1024  # large enough that the transfer, not the latency, takes the time


class Bucket(NamedTuple):
    """Elements [start, stop) of the flat gradient, and the numbers of the parameters that lie there."""

    start: int
    stop: int
    parameters: tuple[int, ...]


def cut(entries: Sequence[Entry], itemsize: int) -> list[Bucket]:
    """Cut a layout into buckets of whole parameters, from its end; each is closed once it is large enough."""
    buckets: list[Bucket] = []
    held: list[int] = []
    for number in reversed(range(len(entries))):
        held.append(number)
        start, stop = entries[number].start, entries[held[0]].stop
        if (stop - start) * itemsize >= (BUCKET_BYTES if buckets else FIRST_BYTES) or number == 0:
            buckets.append(Bucket(start, stop, tuple(held)))
            held = []
    return buckets


class GradientSum:
    """Replaces the gradient in a state by its sum over a group.

    Call ``begin``, then one backward or none, then ``finish``. Buckets leave in the same order on every rank,
    whatever part of the model its share of the batch has used.
    """

    def __init__(self, state: FlatState) -> None:
        self._state = state
        self._buckets = cut(state.entries, state.grads_N.itemsize)
        self._group: Group | None = None
        self._missing: list[set[int]] = []
        self._handles: list[Handle] = []
        trained = [p for p in state.module.parameters() if p.requires_grad]
        for place, bucket in enumerate(self._buckets):
            for number in bucket.parameters:
                register: Callable[..., object] = trained[number].register_post_accumulate_grad_hook
                register(partial(self._filled, place, number))

    def begin(self, group: Group) -> None:
        """Watch the backward that follows, and send each bucket as soon as it and all before it are full."""
        self._group = group
        self._missing = [set(bucket.parameters) for bucket in self._buckets]
        self._handles = []

    def finish(self, status: Tensor) -> None:
        """Send what backward has not filled, and ``status`` behind it; return when all are sums over the group."""
        assert self._group is not None
        while len(self._handles) < len(self._buckets):
            self._launch(self._group)
        self._handles.append(self._group.all_reduce(status))
        for handle in self._handles:
            handle.wait()
        self._group = None

    def abandon(self) -> None:
        """Fail the step for the whole group; return when no thread touches the gradient any more, and clear it."""
        if self._group is not None:
            self._group.interrupt()
        for handle in self._handles:
            with contextlib.suppress(PeerLost):
                handle.wait()
        self._group = None
        self._state.grads_N.zero_()

    def _filled(self, place: int, number: int, parameter: Tensor) -> None:
        if self._group is None:
            return
        if place < len(self._handles):
            raise PlanError(
                f"parameter {self._state.entries[number].name!r} got a second gradient after its first was sent, from "
                "a backward within the backward; call torch.utils.checkpoint with use_reentrant=False"
            )
        self._missing[place].discard(number)
        while len(self._handles) < len(self._buckets) and not self._missing[len(self._handles)]:
            self._launch(self._group)

    def _launch(self, group: Group) -> None:
        bucket = self._buckets[len(self._handles)]
        self._handles.append(group.all_reduce(self._state.grads_N[bucket.start : bucket.stop]))
