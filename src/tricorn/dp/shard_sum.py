"""Sum gradients over a group so that each worker gets only its own part, while backward computes the rest."""

from __future__ import annotations

import contextlib
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


class Sending(NamedTuple):
    unit: Unit
    sum_n: Tensor
    handle: Handle


class ShardSum:
    """Adds to each unit's ``grad_s`` the gradient's sum over a group.

    Call ``begin``; then, as often as on every other rank, backwards and ``flush``; then ``finish``. Units leave in
    the same order on every rank. A unit's whole gradient is here from its first parameter's until it is summed.
    """

    def __init__(self, units: Sequence[Unit], done: Callable[[Unit], None]) -> None:
        """``done`` is told when all gradients of a unit are there in a backward, so its weights have served."""
        self._units = units
        self._done = done
        self._group: Group | None = None
        self._whole: dict[Unit, Tensor] = {}
        self._missing: list[set[int]] = []
        self._launched = 0
        self._sending: deque[Sending] = deque()
        self._open = False  # whether the backward that follows is the last before a flush
        self._places: dict[Tensor, tuple[int, int]] = {}
        for place, unit in enumerate(units):
            for number, parameter in enumerate(unit.parameters):
                parameter.grad = None
                self._places[parameter] = place, number
                watch(parameter, self._fill)

    def begin(self, group: Group) -> None:
        self._group = group
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
        self._whole.clear()
        for unit in self._units:
            unit.grad_s.zero_()

    def _start(self) -> None:
        self._missing = [set(range(len(unit.parameters))) for unit in self._units]
        self._launched, self._open = 0, False

    def _fill(self, parameter: Tensor) -> None:
        place, number = self._places[parameter]
        unit = self._units[place]
        entry = unit.entries[number]
        if place < self._launched:
            raise PlanError(
                f"parameter {entry.name!r} got a second gradient after its first was sent, from "
                "a backward within the backward; call torch.utils.checkpoint with use_reentrant=False"
            )
        if unit not in self._whole:
            self._whole[unit] = unit.own_s.new_zeros(unit.size)
        assert parameter.grad is not None
        grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        self._whole[unit][entry.start : entry.stop] += grad.flatten()
        parameter.grad = None
        self._missing[place].discard(number)
        if not self._missing[place]:
            self._done(unit)
        while self._open and self._launched < len(self._units) and not self._missing[self._launched]:
            self._launch()

    def _launch(self) -> None:
        assert self._group is not None
        # Waiting here could be for ever: a peer may be gathering weights first, for which it needs this worker.
        while self._sending and self._sending[0].handle.done:
            self._receive()
        unit = self._units[self._launched]
        self._launched += 1
        whole_n = self._whole.pop(unit, None)
        sum_n = unit.own_s.new_zeros(unit.size) if whole_n is None else whole_n
        self._sending.append(Sending(unit, sum_n, self._group.reduce_scatter(sum_n, unit.bounds)))

    def _receive(self) -> None:
        unit, sum_n, handle = self._sending.popleft()
        handle.wait()
        unit.grad_s += sum_n[unit.start : unit.stop]
