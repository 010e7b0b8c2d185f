"""One batch through the stages: values go forward, gradients come back, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tricorn.errors import PlanError
from tricorn.mp.deferred import Deferral
from tricorn.mp.passage import Passage, mapped
from tricorn.mp.schedule import Action, Parcel, arrivals, needed, order, split, target
from tricorn.mp.wire import Kind, Wire, kind_of
from tricorn.state import gradient

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.job import Job
    from tricorn.mp.partition import Stage
    from tricorn.plan import Schedule
    from tricorn.strategy import Batch

Turns = tuple[list[Action], dict[int, list[Parcel]]]


class Pipeline:
    """This rank's stages, and its place in line.

    ``chunks`` are its stages: one, or several with the schedule ``interleaved``, which then are c * p + rank of
    the line's p ranks. ``recompute`` keeps of a forward only what the stage was given. The parameters have a ``grad``
    to add to. ``batch`` is the whole batch on the first and last stage, else empty. Every rank is called with the same
    number of ``samples``, of which there is at least one.

    Raises PlanError if the schedule cannot have so many chunks.
    """

    def __init__(
        self,
        job: Job,
        chunks: Sequence[Stage],
        line: Group,
        *,
        schedule: Schedule,
        microbatches: int,
        recompute: bool = False,
    ) -> None:
        if len(chunks) > 1 and (schedule != "interleaved" or line.size == 1):
            raise PlanError(
                f"{len(chunks)} chunks a worker need schedule interleaved and at least 2 stages; set chunks to 1"
            )
        self._job, self._chunks, self._line = job, chunks, line
        self._schedule, self._microbatches, self._recompute = schedule, microbatches, recompute
        self._device = chunks[0].device
        self._wire = Wire(line, self._device)
        self._deferral = Deferral()
        for chunk in chunks:
            self._deferral.install(chunk)

    @property
    def waited(self) -> float:
        """Seconds for which computing has waited for other stages."""
        return self._wire.waited

    def train(self, batch: Batch, samples: int) -> tuple[float, int]:
        """Add the gradient sums of the batch to the stages' ``grad``; returns loss sum and count, on the last stage."""
        ranges = split(samples, self._microbatches)
        actions, coming = self._turns(len(ranges), training=True)
        self._wire.expect(coming)
        self._deferral.begin()
        step = _Step(batch, ranges, torch.zeros((), dtype=torch.float64, device=self._device))
        for action, following in zip(actions, [*actions[1:], None], strict=True):
            # What is backward at once need not be computed again.
            again = self._recompute and (following is None or following[1:] != action[1:])
            self._carry_out(action, step, again)
        self._deferral.finish()
        self._wire.flush()
        return step.total.item(), step.count

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        """Run forward only, and judge each microbatch's output on the last stage."""
        ranges = split(samples, self._microbatches)
        actions, coming = self._turns(len(ranges), training=False)
        self._wire.expect(coming)
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                for action in actions:
                    made = self._stage_on(action.chunk, self._given(action, batch, ranges))
                    if self._chunks[action.chunk].last:
                        judge(made, gradient.portion(self._job, batch, *ranges[action.microbatch]))
                    else:
                        self._send(action, made)
        finally:
            for chunk in self._chunks:
                chunk.train()
        self._wire.flush()

    def _turns(self, microbatches: int, *, training: bool) -> Turns:
        return _turns(self._schedule, self._line.rank, self._line.size, microbatches, len(self._chunks), training)

    def _carry_out(self, action: Action, step: _Step, again: bool) -> None:
        key = action.chunk, action.microbatch
        if action.kind == "F":
            step.flying[key] = self._forward(action, step, again)
        if action.kind in "BI":
            self._backward(action, step.flying[key])
        if action.kind in "BW":
            step.flying.pop(key).passage.finish()

    def _forward(self, action: Action, step: _Step, again: bool) -> _Flying:
        stage = self._chunks[action.chunk]
        batch, ranges = step.batch, step.ranges
        micro = gradient.portion(self._job, batch, *ranges[action.microbatch]) if stage.last else None

        def run(given: Any) -> Any:
            made = self._stage_on(action.chunk, given)
            if micro is None:
                return made
            # The mean over nothing is not a number: where nothing counts there is no loss.
            return gradient.loss_sum(self._job, made, micro) if micro.count else None

        given = self._given(action, batch, ranges)
        each = _Flying(Passage(run, stage, self._deferral, again=again))
        if not stage.first:
            each.given = kind_of(given)
        made = each.passage.forward(given)
        if micro is None:
            self._send(action, made)
        else:
            step.total += 0 if made is None else made.detach()
            step.count += micro.count
        return each

    def _stage_on(self, chunk: int, given: Any) -> Any:
        with gradient.autocast(self._job, self._device):
            return self._chunks[chunk](given)

    def _backward(self, action: Action, each: _Flying) -> None:
        parcel = needed(action, self._line.rank, self._line.size, len(self._chunks))
        gradients = () if parcel is None else self._wire.receive(parcel)
        each.passage.backward(gradients, hurried=action.kind == "I")
        back = target(action, self._line.rank, self._line.size, len(self._chunks))
        if back is not None:
            assert each.given is not None
            self._wire.send_gradients(each.passage.gradients, each.given, back)

    def _given(self, action: Action, batch: Batch, ranges: Sequence[tuple[int, int]]) -> Any:
        parcel = needed(action, self._line.rank, self._line.size, len(self._chunks))
        if parcel is not None:
            return self._wire.receive(parcel)
        start, stop = ranges[action.microbatch]
        inputs = gradient.placed(self._job, gradient.rows(batch.inputs, start, stop), self._device)
        # .data: to autograd, a layer that works in place on one microbatch would change all slices of the batch.
        return mapped(lambda tensor: tensor.data, inputs)

    def _send(self, action: Action, made: Any) -> None:
        parcel = target(action, self._line.rank, self._line.size, len(self._chunks))
        assert parcel is not None
        self._wire.send(made, parcel)


@lru_cache(maxsize=64)
def _turns(schedule: Schedule, rank: int, stages: int, microbatches: int, chunks: int, training: bool) -> Turns:
    """What a rank does, and what comes to it from each of the others."""
    orders = [order(schedule, each, stages, microbatches, chunks) for each in range(stages)]
    if not training:
        orders = [[action for action in actions if action.kind == "F"] for actions in orders]
    return orders[rank], arrivals(orders, rank, chunks)


class _Flying:
    """A microbatch between its forward and its backward."""

    def __init__(self, passage: Passage) -> None:
        self.passage = passage
        self.given: Kind | None = None


@dataclass
class _Step:
    """One batch on its way, the sum of its losses, and what counts of it."""

    batch: Batch
    ranges: Sequence[tuple[int, int]]
    total: Tensor
    count: int = 0
    flying: dict[tuple[int, int], _Flying] = field(default_factory=dict)
