"""One batch through the stages: values go forward, gradients come back, microbatch by microbatch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tricorn.mp import wire
from tricorn.mp.backward import backward
from tricorn.mp.schedule import one_forward_one_backward, split
from tricorn.state import gradient

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle
    from tricorn.job import Job
    from tricorn.mp.partition import Stage
    from tricorn.strategy import Batch


class Pipeline:
    """This rank's stage between its neighbours. ``batch`` is the whole batch on the first and last stage, else empty.

    Every stage is called with the same number of ``samples``, of which there is at least one.
    """

    def __init__(self, job: Job, stage: Stage, group: Group, microbatches: int) -> None:
        self._job = job
        self._stage = stage
        self._group = group
        self._device = stage.device
        self._microbatches = microbatches

    def train(self, batch: Batch, samples: int) -> tuple[float, int]:
        """Add the gradient sums of the batch to the stage's ``grad``; on the last stage its loss sum and count."""
        ranges = split(samples, self._microbatches)
        flying: deque[tuple[Any, Any]] = deque()  # (what was received, what was made of it), oldest first
        sends: list[Handle] = []
        total, count = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for action, index in one_forward_one_backward(self._group.rank, self._group.size, len(ranges)):
            if action == "F":
                given = self._receive(batch, *ranges[index])
                made = self._forward(given)
                if self._stage.last:
                    micro = gradient.portion(self._job, batch, *ranges[index])
                    made = self._loss(made, micro)
                    count += micro.count
                    if made is not None:
                        total += made.detach()
                else:
                    sends += wire.send(self._group, made, self._group.rank + 1)
                flying.append((given, made))
            else:
                given, made = flying.popleft()
                self._backward(made)
                if not self._stage.first:
                    sends += wire.send_gradients(self._group, given, self._group.rank - 1)
        for handle in sends:
            handle.wait()
        return total.item(), count

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        """Run forward only, and judge each microbatch's output on the last stage."""
        self._stage.eval()
        sends: list[Handle] = []
        try:
            with torch.no_grad():
                for start, stop in split(samples, self._microbatches):
                    made = self._forward(self._receive(batch, start, stop))
                    if self._stage.last:
                        judge(made, gradient.portion(self._job, batch, start, stop))
                    else:
                        sends += wire.send(self._group, made, self._group.rank + 1)
        finally:
            self._stage.train()
        for handle in sends:
            handle.wait()

    def _receive(self, batch: Batch, start: int, stop: int) -> Any:
        if self._stage.first:
            return gradient.placed(self._job, gradient.rows(batch.inputs, start, stop), self._device)
        return wire.receive(self._group, self._group.rank - 1, self._device)

    def _forward(self, given: Any) -> Any:
        if not self._stage.first:
            # A copy, because the user's first layer may work in place, which autograd forbids on what we keep.
            copies = tuple(part.clone() if part.requires_grad else part for part in wire.tensors(given))
            given = copies[0] if isinstance(given, Tensor) else copies
        with gradient.autocast(self._job, self._device):
            return self._stage(given)

    def _loss(self, output: Any, micro: Batch) -> Tensor | None:
        """The loss sum; None where nothing counts, for the mean over nothing is not a number."""
        return gradient.loss_sum(self._job, output, micro) if micro.count else None

    def _backward(self, made: Any) -> None:
        if self._stage.last:
            if made is not None:
                torch.autograd.backward(made)
            return
        wanted = [part for part in wire.tensors(made) if part.requires_grad]
        backward(wanted, wire.receive_gradients(self._group, wanted, self._group.rank + 1))
