"""Sum gradients over a group so that each worker gets only its own part, while backward computes the rest."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tricorn.dp.watching import watch
from tricorn.errors import PlanError

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle
    from tricorn.dp.shard_units import Unit

UNDER_WAY = 16 << 20  # bytes of gradients on their way to be summed that backward may run ahead of


class Sending(NamedTuple):
    unit: Unit
    sum_n: Tensor
    handle: Handle


class ShardSum:
    """Adds to each unit's ``grad_s`` the gradient's sum over a group.

    Call ``begin``; then, as often as on every other rank, backwards and ``flush``; then ``finish``. Units leave in
    the same order on every rank. A gradient is here whole from when autograd has made it until it is summed.
    """

    def __init__(self, units: Sequence[Unit], done: Callable[[Unit], None]) -> None:
        """``done`` is told when all gradients of a unit are there in a backward, so its weights have served."""
        self._units = units
        self._done = done
        self._group: Group | None = None
        self._missing: list[set[int]] = []
        self._launched = 0
        self._sending: deque[Sending] = deque()
        self._open = False  # whether the backward that follows is the last before a flush
        self._waits = False
        self.waited = 0.0  # seconds for peers in the midst of backward, altogether
        self._places: dict[Tensor, tuple[int, int]] = {}
        for place, unit in enumerate(units):
            for number, parameter in enumerate(unit.parameters):
                parameter.grad = None
                self._places[parameter] = place, number
                watch(parameter, self._fill)

    def begin(self, group: Group, *, waits: bool) -> None:
        """``waits``: backward may wait for sums, as no peer waits for this worker in the midst of its own."""
        self._group, self._waits = group, waits
        self._start()

    def last(self) -> None:
        """The backward that follows is the last one before ``flush``: what is full may leave."""
        self._start()
        self._open = True

    def flush(self) -> None:
        """Send what backward has not filled."""
        while self._launched < len(self._units):
            self._launch()
        self._start()

    def finish(self, status: Tensor) -> None:
        """Return when all sums are there, that of ``status`` too."""
        assert self._group is not None
        handle = self._group.all_reduce(status)
        while self._sending:
            self._receive()
        handle.wait()
        self._group = None

    def abandon(self) -> None:
        """Fail the step for the whole group; return when no thread touches a gradient any more, and clear all."""
        if self._group is not None:
            self._group.interrupt()
        while self._sending:
            with contextlib.suppress(Exception):  # the step has failed already
                self._sending.popleft().handle.wait()
        self._group = None
        for unit in self._units:
            unit.grad_s.zero_()
            for parameter in unit.parameters:
                parameter.grad = None

    def _start(self) -> None:
        self._missing = [set(range(len(unit.parameters))) for unit in self._units]
        self._launched, self._open = 0, False

    def _fill(self, parameter: Tensor) -> None:
        place, number = self._places[parameter]
        unit = self._units[place]
        if place < self._launched:
            raise PlanError(
                f"parameter {unit.entries[number].name!r} got a second gradient after its first was sent, from "
                "a backward within the backward; call torch.utils.checkpoint with use_reentrant=False"
            )
        self._missing[place].discard(number)
        if not self._missing[place]:
            self._done(unit)
        while self._open and self._launched < len(self._units) and not self._missing[self._launched]:
            self._launch()

    def _launch(self) -> None:
        assert self._group is not None
        unit = self._units[self._launched]
        self._launched += 1
        room = UNDER_WAY - unit.size * unit.own_s.itemsize
        # Otherwise to wait could be for ever: a peer may be gathering weights first, for which it needs this worker.
        began = time.perf_counter()
        while self._sending and (self._sending[0].handle.done or (self._waits and self._bytes_sending() > room)):
            self._receive()
        self.waited += time.perf_counter() - began
        sum_n = _taken(unit)
        self._sending.append(Sending(unit, sum_n, self._group.reduce_scatter(sum_n, unit.bounds)))

    def _bytes_sending(self) -> int:
        return sum(sending.sum_n.nbytes for sending in self._sending)

    def _receive(self) -> None:
        unit, sum_n, handle = self._sending.popleft()
        handle.wait()
        unit.grad_s += sum_n[unit.start : unit.stop]


def _taken(unit: Unit) -> Tensor:
    """The gradients of a unit end to end, zero where there is none, each taken from its parameter."""
    if len(unit.parameters) == 1 and (only := unit.parameters[0].grad) is not None and not only.is_sparse:
        unit.parameters[0].grad = None
        return only.flatten()  # a large one is here once
    whole_n = unit.own_s.new_empty(unit.size)
    for entry, parameter in zip(unit.entries, unit.parameters, strict=True):
        part, grad = whole_n[entry.start : entry.stop], parameter.grad
        if grad is None:
            part.zero_()
        else:
            part.view(entry.shape).copy_(grad.to_dense() if grad.is_sparse else grad)
        parameter.grad = None
    return whole_n
