"""A worker of data parallel training that holds a whole replica of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.dp.buckets import GradientSum
from tricorn.state.flat import FlatState, build_model, device_of
from tricorn.state.gradient import (
    check_finite,
    clip_factor,
    forward_backward,
    judge_share,
    learning_rate,
    squared_norm,
)
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes, even_share


class ReplicaTrainer:
    """Fulfils ``tricorn.strategy.Trainer``. All replicas stay equal bit for bit.

    An update is applied only when everything of its step is agreed; a step that fails leaves the state as it was.
    """

    part = "model"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._job = context.job
        self._peers = Peers(context, "dp")
        self._whole = False  # whether it is settled that what is here is the state of a step
        self._untouched = True  # whether these are still the weights of the seed
        self._build()

    @property
    def bytes_sent(self) -> int:
        return self._peers.bytes_sent

    def held(self) -> int | None:
        return self._state.step if self._whole else None

    def join(self, seat: Seat) -> None:
        group = self._peers.join(seat)
        match seat.source:
            case "initial":
                if not self._untouched:
                    self._build()
                self._whole = True
            case "checkpoint":
                assert seat.checkpoint is not None
                self._whole = self._untouched = False
                self._state.load(CheckpointReader(seat.checkpoint, seat.step))
                self._whole = True
            case "peer":
                self._copy(group, seat)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"

    def share(self, samples: int) -> tuple[int, int]:
        return even_share(samples, self._context.rank, self._context.plan.workers)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        state, group = self._state, self._peers.group
        assert step == self.held()
        buffers = [buffer.clone() for buffer in state.module.buffers()]
        try:
            outcome = self._agree(group, batch, wishes)
            check_finite(step, outcome)
        except BaseException:
            self._sum.abandon()
            for buffer, before in zip(state.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise
        state.grads_N.div_(max(outcome.count, 1))
        if self._job.clip_norm is not None:
            state.grads_N.mul_(clip_factor(self._job, squared_norm(state.grads_N)))
        self._untouched = False
        state.update(lr=learning_rate(self._job, step))
        return outcome

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        judge_share(self._job, self._state.module, batch, judge)

    def pieces(self) -> Sequence[Piece]:
        return self._state.pieces() if self._context.rank == 0 else []

    def interrupt(self) -> None:
        self._peers.interrupt()

    def close(self) -> None:
        self._peers.leave()

    def _build(self) -> None:
        self._untouched = True
        self._state = FlatState(build_model(self._job), self._job.optimizer, device_of(self._job))
        self._sum = GradientSum(self._state)

    def _agree(self, group: Group, batch: Batch, wishes: Wishes) -> Outcome:
        """Sum gradients, loss and wishes over all workers."""
        self._sum.begin(group)
        loss_sum = forward_backward(self._job, self._state.module, batch) if batch.samples else 0.0
        status = torch.tensor([loss_sum, batch.count, batch.samples, *wishes], dtype=torch.float64)
        self._sum.finish(status)
        return Outcome.of(status.tolist())

    def _copy(self, group: Group, seat: Seat) -> None:
        """Take the state from the peer that has it; those that have it too take part, so that no one needs to know."""
        if self.held() != seat.step:  # else what arrives is what is here, and a broken transfer breaks nothing
            self._whole = self._untouched = False
        for tensor in (*self._state.tensors().values(), *self._state.module.buffers()):
            sent = tensor.contiguous()
            group.broadcast(sent, seat.peer)
            tensor.copy_(sent)
        self._state.grads_N.zero_()
        self._state.step = seat.step
        self._whole = True
