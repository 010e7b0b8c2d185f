"""A stage's worker: takes its part of the model, runs its part of each batch, and agrees on the update."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from tricorn.comm.group import Group
from tricorn.errors import Diverged
from tricorn.mp.measure import choose_cuts
from tricorn.mp.partition import Stage, blocks
from tricorn.mp.pipeline import Pipeline
from tricorn.mp.schedule import microbatches_of, split
from tricorn.state.flat import FlatState, build_model, device_of
from tricorn.state.gradient import squared_norm
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes


class PipelineTrainer:
    """Holds stage ``rank`` of the model; fulfils ``tricorn.strategy.Trainer``.

    Where the model is cut is no part of the state: a checkpoint has the user's names only, and any number of stages
    can take it up. The cuts in force stay as long as one worker lives that knows them.
    """

    def __init__(self, context: Context) -> None:
        self.part: str | None = f"stage{context.rank}"
        self._context = context
        self._job = context.job
        self._stages = context.plan.workers
        self._microbatches = microbatches_of(context.plan, context.job.batch_size)
        self._device = device_of(context.job)
        self._group: Group | None = None
        self._sent_before = 0  # by the groups of earlier epochs
        self._cuts: tuple[int, ...] | None = None
        self._stage: Stage | None = None
        self._state: FlatState | None = None
        self._pipeline: Pipeline | None = None

    @property
    def bytes_sent(self) -> int:
        return self._sent_before + (self._group.bytes_sent if self._group else 0)

    def held(self) -> int | None:
        return None if self._state is None else self._state.step

    def join(self, seat: Seat) -> None:
        """Take the seat. Besides PeerLost, raises PlanError if the model cannot be cut, and CheckpointDamaged."""
        self.close()
        if seat.source != "keep":
            # Nothing is held until the new state is whole: the old one may be cut elsewhere.
            self._stage = self._state = None
        context = self._context
        context.listener.announce(seat.epoch)
        self._group = Group(
            rank=context.rank,
            addresses=seat.workers,
            listener=context.listener,
            secret=context.secret,
            epoch=seat.epoch,
            channel="mp",
        )
        if context.listener.over(seat.epoch):  # an interrupt that came before there was a group
            self._group.interrupt()
        known, self._cuts = self._cuts, self._agree_on_cuts(self._group)
        if seat.source == "keep":
            assert self._cuts == known, "stages that are all kept are cut alike"
        else:
            self._build(self._cuts, seat)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"
        assert self._stage is not None
        self._pipeline = Pipeline(self._job, self._stage, self._group, self._microbatches)

    def share(self, samples: int) -> tuple[int, int]:
        # The first stage needs the inputs and the last the targets.
        return (0, samples) if self._context.rank in (0, self._stages - 1) else (0, 0)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        """Run one global batch. Raises Diverged on every stage; whatever is raised, the state is as it was."""
        state, pipeline = self._state, self._pipeline
        assert state is not None
        assert pipeline is not None
        assert step == state.step
        lr = self._job.optimizer.lr * (self._job.schedule(step) if self._job.schedule else 1.0)
        # Masks of dropout differ between stages and steps, and are the same when a step is run again.
        torch.manual_seed(zlib.crc32(f"{self._job.seed}/{step}/{self._context.rank}".encode()))
        buffers = [buffer.clone() for buffer in state.module.buffers()]
        try:
            loss_sum, count = pipeline.train(batch, samples)
            outcome, norm = self._agree(loss_sum, count, batch, wishes)
            assert outcome.samples == samples
            if not math.isfinite(outcome.loss_sum):
                mean = outcome.loss_sum / max(outcome.count, 1)
                raise Diverged(f"the loss of step {step} is {mean}")
        except BaseException:
            state.grads_N.zero_()
            for buffer, before in zip(state.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise
        state.grads_N.div_(max(outcome.count, 1))
        if self._job.clip_norm is not None:
            state.grads_N.mul_(min(1.0, self._job.clip_norm / (norm + 1e-6)))
        state.update(lr=lr)
        return outcome

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        assert self._pipeline is not None
        self._pipeline.evaluate(batch, samples, judge)

    def pieces(self) -> Sequence[Piece]:
        assert self._state is not None
        return self._state.pieces()

    def interrupt(self) -> None:
        # In this order: a group that is being built sees one of the two.
        self._context.listener.interrupt()
        if group := self._group:
            group.interrupt()

    def close(self) -> None:
        self._pipeline = None
        if group := self._group:
            group.close()
            self._sent_before += group.bytes_sent
            self._group = None

    def _agree_on_cuts(self, group: Group) -> tuple[int, ...]:
        """The cuts that the first rank knows that knows any; in a new run rank 0 measures and decides."""
        knows = torch.zeros(group.size)
        knows[group.rank] = self._cuts is not None
        group.all_reduce_now(knows)
        source = int(knows.argmax())
        if source == group.rank and self._cuts is None:
            start, stop = split(self._job.batch_size, self._microbatches)[-1]
            self._cuts = choose_cuts(self._job, self._stages, stop - start, self._device)
        cuts = torch.tensor(self._cuts if source == group.rank else [0] * (self._stages - 1), dtype=torch.int64)
        group.broadcast(cuts, source)
        return tuple(cuts.tolist())

    def _build(self, cuts: tuple[int, ...], seat: Seat) -> None:
        """Make this rank's stage, with the weights of the seed or of the seat's checkpoint."""
        model = build_model(self._job)
        found = blocks(model, self._stages)
        start, stop = list(pairwise((0, *cuts, len(found))))[self._context.rank]
        self._stage = Stage(model, found, start, stop, self._device)
        state = FlatState(self._stage, self._job.optimizer, self._device)
        if seat.checkpoint is not None:
            state.load(CheckpointReader(seat.checkpoint, seat.step))
        self._state = state

    def _agree(self, loss_sum: float, count: int, batch: Batch, wishes: Wishes) -> tuple[Outcome, float]:
        """What the stages together say of the step, and the norm of the mean gradient over all of them."""
        assert self._group is not None
        assert self._state is not None
        square = 0.0
        if self._job.clip_norm is not None:
            square = squared_norm(self._state.grads_N)
        samples = batch.samples if self._context.rank == 0 else 0
        status = torch.tensor([loss_sum, count, samples, square, *wishes], dtype=torch.float64)
        self._group.all_reduce_now(status)
        loss_sum, total, samples, square, *agreed = status.tolist()
        outcome = Outcome(loss_sum, int(total), int(samples), Wishes(*map(int, agreed)))
        return outcome, math.sqrt(square) / max(outcome.count, 1)
