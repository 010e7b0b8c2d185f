"""Workers that make several updates each by itself before they meet: local SGD, and DiLoCo.

A round is the steps between two meetings; it ends with every ``plan.local_steps``-th step of an epoch and with the
epoch. At its end the workers agree on how far they went from the weights they began with, weighted by how much each
has counted, and an outer optimizer takes that for a gradient: plain steps of 1 make it the average of the workers
(McMahan et al. 2017; Stich 2019), Nesterov's momentum makes it DiLoCo (Douillard et al. 2023).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.data.order import steps_per_epoch
from tricorn.optim import SGD
from tricorn.state.flat import FlatState
from tricorn.state.gradient import (
    check_finite,
    clip_factor,
    forward_backward,
    judge_share,
    learning_rate,
    squared_norm,
)
from tricorn.state.shards import CheckpointReader
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes, even_share

OUTER = {"average": SGD(lr=1.0), "nesterov": SGD(lr=0.7, momentum=0.9, nesterov=True)}  # DiLoCo, section 3.1


def round_ends(step: int, steps_per_epoch: int, local_steps: int) -> bool:
    """Whether a step, counted from 0, is the last of its round."""
    done = step % steps_per_epoch + 1
    return done % local_steps == 0 or done == steps_per_epoch


class RoundTrainer(ABC):
    """Fulfils ``tricorn.strategy.Trainer`` but for how workers meet. After that all hold the same weights bit for bit.

    A round that fails leaves the state as it was at its beginning. The job's optimizer has a state of its own on
    each worker; a worker that joins begins with that of the peer it copies from, and rank 0's goes into checkpoints.
    Buffers are rank 0's.
    """

    part: str | None = "model"

    def __init__(self, context: Context, channel: str) -> None:
        self._context = context
        self._job = context.job
        self._steps_per_epoch = steps_per_epoch(len(self._job.train), self._job.batch_size)
        self._peers = Peers(context, channel)
        self.computed = 0.0
        self._untouched: bool  # whether these are still the weights of the seed
        self._held: int | None  # the step of which what is kept is the state, once that is settled
        self._build()

    @property
    def bytes_sent(self) -> int:
        return self._peers.bytes_sent

    def held(self) -> int | None:
        return self._held

    def join(self, seat: Seat) -> None:
        group = self._peers.join(seat)
        self._rewind()
        match seat.source:
            case "initial":
                if not self._untouched:
                    self._build()
                self._keep()
            case "checkpoint":
                self._held, self._untouched = None, False
                assert seat.checkpoint is not None
                self._load(open_checkpoint(self._job, seat.checkpoint, seat.step))
                self._keep()
            case "peer":
                self._copy(group, seat)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"

    def share(self, samples: int) -> tuple[int, int]:
        return even_share(samples, self._context.rank, self._context.plan.workers)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        assert step == self._state.step
        try:
            alone = self._learn(step, batch, wishes)
            if round_ends(step, self._steps_per_epoch, self._context.plan.local_steps):
                return self._end_round(step, batch.count)
            self._between(step, batch.count)
            return alone
        except BaseException:
            self._peers.give_up()
            self._abandon()
            self._rewind()
            raise

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        judge_share(self._job, self._state.module, batch, judge)

    def interrupt(self) -> None:
        self._peers.interrupt()

    def close(self) -> None:
        self._peers.leave()

    @abstractmethod
    def _build_state(self) -> FlatState:
        """The model with its initial weights, and all that depends on it."""

    @abstractmethod
    def _load(self, reader: CheckpointReader) -> None:
        """Take the state from a checkpoint."""

    @abstractmethod
    def _meet(self, group: Group, step: int, count: int) -> Outcome:
        """Agree on the round that ends with the ``count`` of this step's share, and make its outer update.

        ``grads_N`` has how far this worker went, times what it has counted in the round.
        """

    @abstractmethod
    def _between(self, step: int, count: int) -> None:
        """After a step, with the ``count`` of this worker's share, that does not end its round."""

    @abstractmethod
    def _abandon(self) -> None:
        """The round has failed."""

    def _replicated(self) -> list[Tensor]:
        """What a worker that joins copies from its peer."""
        return self._changing()

    def _gradient(self, step: int, batch: Batch) -> tuple[float, Sequence[Tensor]]:
        """Put the gradient sum into ``grads_N``; returns the loss sum, and gradient sums that lie elsewhere."""
        return forward_backward(self._job, self._state.module, batch), ()

    def _build(self) -> None:
        self._untouched = True
        self._held = None
        self._state = self._build_state()
        self._kept = [tensor.clone() for tensor in self._changing()]
        self._round = [0.0] * (3 + len(Wishes()))  # as Outcome.of takes it: this worker's part of the round

    def _changing(self) -> list[Tensor]:
        """What the steps of a round change, the weights first."""
        return [*self._state.tensors().values(), *self._state.module.buffers()]

    def _keep(self) -> None:
        """A round begins here."""
        for kept, tensor in zip(self._kept, self._changing(), strict=True):
            kept.copy_(tensor)
        self._held = self._state.step
        self._round = [0.0] * len(self._round)

    def _rewind(self) -> None:
        """Go back to where the round began."""
        if self._held is not None:
            for kept, tensor in zip(self._kept, self._changing(), strict=True):
                tensor.copy_(kept)
            self._state.step = self._held
        self._state.grads_N.zero_()
        self._round = [0.0] * len(self._round)

    def _learn(self, step: int, batch: Batch, wishes: Wishes) -> Outcome:
        """One update from this worker's share alone; none from a share without anything to count."""
        state, began = self._state, time.perf_counter()
        loss_sum, elsewhere = self._gradient(step, batch)
        alone = Outcome(loss_sum, batch.count, batch.samples, wishes, agreed=False)
        check_finite(step, alone)
        if batch.count:
            state.grads_N.div_(batch.count)
            if self._job.clip_norm is not None:
                norm = sum(squared_norm(sums.view(-1)) for sums in elsewhere) / batch.count**2
                factor = clip_factor(self._job, squared_norm(state.grads_N) + norm)
                for gradient in (state.grads_N, *elsewhere):
                    gradient.mul_(factor)
            state.update(lr=learning_rate(self._job, step))
        else:
            state.step += 1
        part = (loss_sum, batch.count, batch.samples, *wishes)
        self._round = [before + now for before, now in zip(self._round, part, strict=True)]
        self.computed += time.perf_counter() - began
        return alone

    def _end_round(self, step: int, count: int) -> Outcome:
        state, group = self._state, self._peers.group
        torch.sub(self._kept[0], state.weights_N, out=state.grads_N).mul_(int(self._round[1]))
        outcome = self._meet(group, step, count)
        for buffer in state.module.buffers():
            sent = buffer.contiguous()
            group.broadcast(sent, 0)
            buffer.copy_(sent)
        state.grads_N.zero_()
        self._untouched = False
        self._keep()
        return outcome

    def _copy(self, group: Group, seat: Seat) -> None:
        """Take the state from the peer that has it; those that have it too take part, so that no one needs to know.

        They keep their own: the state of the job's optimizer is not the same on all.
        """
        has_it = self._held == seat.step
        if not has_it:
            self._held, self._untouched = None, False
        for tensor in self._replicated():
            sent = tensor.clone(memory_format=torch.contiguous_format)
            group.broadcast(sent, seat.peer)
            if not has_it:
                tensor.copy_(sent)
        self._state.step = seat.step
        self._keep()
