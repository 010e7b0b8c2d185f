"""A worker of data parallel training that holds a whole replica of the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tricorn.comm.group import Group
from tricorn.dp.buckets import GradientSum
from tricorn.errors import Diverged
from tricorn.state.flat import FlatState, build_model, device_of
from tricorn.state.gradient import forward, forward_backward, squared_norm
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes


class ReplicaTrainer:
    """Fulfils ``tricorn.strategy.Trainer``. All replicas stay equal bit for bit.

    An update is applied only when everything of its step is agreed; a step that fails leaves the state as it was.
    """

    part = "model"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._job = context.job
        self._group: Group | None = None
        self._sent_before = 0  # by the groups of earlier epochs
        self._whole = False
        self._build()

    @property
    def bytes_sent(self) -> int:
        return self._sent_before + (self._group.bytes_sent if self._group else 0)

    def held(self) -> int | None:
        return self._state.step if self._whole else None

    def join(self, seat: Seat) -> None:
        self.close()
        context = self._context
        context.listener.announce(seat.epoch)
        self._group = Group(
            rank=context.rank,
            addresses=seat.workers,
            listener=context.listener,
            secret=context.secret,
            epoch=seat.epoch,
            channel="dp",
        )
        if context.listener.over(seat.epoch):  # an interrupt that came before there was a group
            self._group.interrupt()
        match seat.source:
            case "initial":
                if self._state.step or not self._whole:
                    self._build()
                self._whole = True
            case "checkpoint":
                assert seat.checkpoint is not None
                self._whole = False
                self._state.load(CheckpointReader(seat.checkpoint, seat.step))
                self._whole = True
            case "peer":
                self._copy(self._group, seat)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"

    def share(self, samples: int) -> tuple[int, int]:
        rank, workers = self._context.rank, self._context.plan.workers
        return samples * rank // workers, samples * (rank + 1) // workers

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        state, group = self._state, self._group
        assert group is not None
        assert step == self.held()
        lr = self._job.optimizer.lr * (self._job.schedule(step) if self._job.schedule else 1.0)
        buffers = [buffer.clone() for buffer in state.module.buffers()]
        try:
            outcome = self._agree(group, batch, wishes)
            assert outcome.samples == samples
            if not math.isfinite(outcome.loss_sum):
                mean = outcome.loss_sum / max(outcome.count, 1)
                raise Diverged(f"the loss of step {step} is {mean}")
        except BaseException:
            self._sum.abandon()
            for buffer, before in zip(state.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise
        state.grads_N.div_(max(outcome.count, 1))
        if self._job.clip_norm is not None:
            norm = math.sqrt(squared_norm(state.grads_N))
            state.grads_N.mul_(min(1.0, self._job.clip_norm / (norm + 1e-6)))
        state.update(lr=lr)
        return outcome

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        if not batch.samples:
            return
        model = self._state.module.eval()
        try:
            with torch.no_grad():
                judge(forward(self._job, model, batch), batch)
        finally:
            model.train()

    def pieces(self) -> Sequence[Piece]:
        return self._state.pieces() if self._context.rank == 0 else []

    def interrupt(self) -> None:
        # In this order: a group that is being built sees one of the two.
        self._context.listener.interrupt()
        if group := self._group:
            group.interrupt()

    def close(self) -> None:
        if group := self._group:
            group.close()
            self._sent_before += group.bytes_sent
            self._group = None

    def _build(self) -> None:
        self._state = FlatState(build_model(self._job), self._job.optimizer, device_of(self._job))
        self._sum = GradientSum(self._state)
        self._whole = False  # until it is said that the initial weights are those to go on from

    def _agree(self, group: Group, batch: Batch, wishes: Wishes) -> Outcome:
        """Sum gradients, loss and wishes over all workers."""
        self._sum.begin(group)
        loss_sum = forward_backward(self._job, self._state.module, batch) if batch.samples else 0.0
        status = torch.tensor([loss_sum, batch.count, batch.samples, *wishes], dtype=torch.float64)
        self._sum.finish(status)
        loss_sum, count, samples, *agreed = status.tolist()
        return Outcome(loss_sum, int(count), int(samples), Wishes(*map(int, agreed)))

    def _copy(self, group: Group, seat: Seat) -> None:
        """Take the state from the peer that has it; those that have it too take part, so that no one needs to know."""
        self._whole = False
        for tensor in (*self._state.tensors().values(), *self._state.module.buffers()):
            sent = tensor.contiguous()
            group.broadcast(sent, seat.peer)
            tensor.copy_(sent)
        self._state.grads_N.zero_()
        self._state.step = seat.step
        self._whole = True
