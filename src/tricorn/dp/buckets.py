"""Sum a gradient over a group in flat buckets, while backward is still computing the rest of it.

Buckets are cut from the end of the flat gradient, so parameters lie there in the order, backwards, in which a backward
was seen to fill them; until one was seen, in the module's order.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tricorn.dp.watching import watch
from tricorn.errors import PlanError
from tricorn.state.flat import trained_parameters

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle
    from tricorn.state.flat import Entry, FlatState

BUCKET_BYTES = 1024 * 1024  # large enough that the transfer, not the latency, takes the time
FIRST_PART = 4  # the first bucket is that much smaller, so that communication begins early
SIZES = (BUCKET_BYTES // 4, BUCKET_BYTES, 4 * BUCKET_BYTES, 16 * BUCKET_BYTES)  # tried at the start of a run
ROUNDS = 5  # steps with each


class Bucket(NamedTuple):
    """Elements [start, stop) of the flat gradient, and the numbers of the parameters that lie there."""

    start: int
    stop: int
    parameters: tuple[int, ...]


def cut(entries: Sequence[Entry], itemsize: int, size: int) -> list[Bucket]:
    """Cut a layout into buckets of whole parameters, from its end; each is closed once it has ``size`` bytes."""
    buckets: list[Bucket] = []
    held: list[int] = []
    for number in reversed(range(len(entries))):
        held.append(number)
        start, stop = entries[number].start, entries[held[0]].stop
        if (stop - start) * itemsize >= (size if buckets else size // FIRST_PART) or number == 0:
            buckets.append(Bucket(start, stop, tuple(held)))
            held = []
    return buckets


class Trial:
    """Which size makes steps shortest: each is used in turn, and that with the lowest median stays. Pure.

    A step's seconds may be told after the next has begun.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._used = 0
        self.seconds: dict[int, list[float]] = {size: [] for size in sizes}

    def next(self) -> int:
        """The size for the step that begins."""
        self._used += 1
        return self._sizes[(self._used - 1) % len(self._sizes)]

    def observe(self, seconds: float) -> None:
        """How long the oldest step took of those not told yet."""
        told = sum(map(len, self.seconds.values()))
        self.seconds[self._sizes[told % len(self._sizes)]].append(seconds)

    def best(self) -> int | None:
        """The size to stay with, None if that is not known yet."""
        if any(len(seconds) < ROUNDS for seconds in self.seconds.values()):
            return None
        return min(self._sizes, key=lambda size: statistics.median(self.seconds[size]))


class GradientSum:
    """Replaces the gradient in a state by its sum over a group.

    Call ``begin``, then one backward or none, then ``finish``. Buckets leave in the same order on every rank,
    whatever part of the model its share of the batch has used.
    """

    def __init__(self, state: FlatState) -> None:
        self._state = state
        self._original = [entry.name for entry in state.entries]
        self._group: Group | None = None
        self._missing: list[set[int]] = []
        self._handles: list[Handle] = []
        self._filled: list[str] = []  # in the order of the last backward
        self._arrange()
        for _, parameter in trained_parameters(state.module):
            watch(parameter, self._fill)

    def agree(self, group: Group, source: int, *, filled: bool) -> None:
        """Lay the parameters out as rank ``source`` has them, or as its last backward has ``filled`` them."""
        names = [entry.name for entry in self._state.entries]
        if filled:
            seen = dict.fromkeys(reversed(self._filled))
            names = [name for name in names if name not in seen] + list(seen)
        order = torch.tensor([self._original.index(name) for name in names], dtype=torch.int64)
        group.broadcast(order, source)
        names = [self._original[number] for number in order.tolist()]
        if names != [entry.name for entry in self._state.entries]:
            self._state.arrange(names)
            self._arrange()

    def resize(self, size: int) -> None:
        """Use buckets of that many bytes from the next step on."""
        self._buckets = cut(self._state.entries, self._state.grads_N.itemsize, size)
        self._places = {number: place for place, bucket in enumerate(self._buckets) for number in bucket.parameters}

    def begin(self, group: Group, count: int) -> None:
        """Watch the backward that follows, and send each bucket as soon as it and all before it are full.

        ``count`` is what this rank's part of the gradient is a sum over.
        """
        self._group = group
        self._missing = [set(bucket.parameters) for bucket in self._buckets]
        self._handles, self._filled = [], []

    def finish(self, status: Tensor) -> None:
        """Send what backward has not filled, and ``status`` behind it; return when all are sums over the group."""
        assert self._group is not None
        while len(self._handles) < len(self._buckets):
            self._launch(self._group)
        self._handles.append(self._reduce(self._group, status))
        for handle in self._handles:
            handle.wait()
        self._group = None

    def abandon(self) -> None:
        """Fail the step for the whole group; return when no thread touches the gradient any more, and clear it."""
        if self._group is not None:
            self._group.interrupt()
        for handle in self._handles:
            with contextlib.suppress(Exception):  # the step has failed already
                handle.wait()
        self._group = None
        self._state.grads_N.zero_()

    def _arrange(self) -> None:
        trained = dict(trained_parameters(self._state.module))
        self._numbers: dict[Tensor, int] = {
            trained[entry.name]: number for number, entry in enumerate(self._state.entries)
        }
        self.resize(BUCKET_BYTES)

    def _fill(self, parameter: Tensor) -> None:
        if self._group is None:
            return
        number = self._numbers[parameter]
        place, name = self._places[number], self._state.entries[number].name
        if place < len(self._handles):
            raise PlanError(
                f"parameter {name!r} got a second gradient after its first was sent, from "
                "a backward within the backward; call torch.utils.checkpoint with use_reentrant=False"
            )
        self._filled.append(name)
        self._missing[place].discard(number)
        while len(self._handles) < len(self._buckets) and not self._missing[len(self._handles)]:
            self._launch(self._group)

    def _launch(self, group: Group) -> None:
        bucket = self._buckets[len(self._handles)]
        self._handles.append(group.all_reduce(self._state.grads_N[bucket.start : bucket.stop]))

    def _reduce(self, group: Group, tensor: Tensor) -> Handle:
        return group.all_reduce(tensor)


class Tuner:
    """Settles order and size of the buckets in the first steps of a membership epoch, alike on all ranks."""

    def __init__(self, gradient: GradientSum, group: Group, size: int) -> None:
        """``size``: bytes of the gradient."""
        self._gradient = gradient
        self._group = group
        self._begun = self._told = 0
        larger = [tried for tried in SIZES if tried >= size]
        self._trial = Trial([*(tried for tried in SIZES if tried < size), *larger[:1]]) if size > SIZES[0] else None

    def begin(self, source: int) -> None:
        """A step begins; ``source`` is a rank that had samples in the one before."""
        if self._begun == 1:
            self._gradient.agree(self._group, source, filled=True)
        if self._begun and self._trial is not None:
            self._gradient.resize(self._trial.next())
        self._begun += 1

    def observe(self, seconds: float) -> dict[str, float]:
        """How long the oldest step took that was not told yet; once sizes are settled, the milliseconds of each."""
        self._told += 1
        if self._trial is None or self._told == 1:  # the first step of all is slow whatever the size is
            return {}
        self._trial.observe(seconds)
        if (best := self._trial.best()) is None:
            return {}
        found = {f"{size} bytes": 1e3 * statistics.median(took) for size, took in self._trial.seconds.items()}
        self._trial = None
        self._gradient.resize(best)
        return found | {"chosen bytes": float(best)}
