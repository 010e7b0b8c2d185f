"""A stage's worker: takes its part of the model, runs its part of each batch, and agrees on the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.mp.measure import choose_cuts
from tricorn.mp.partition import Stage, blocks
from tricorn.mp.pipeline import Pipeline
from tricorn.mp.schedule import microbatches_of, split
from tricorn.state.flat import FlatState, build_model, device_of
from tricorn.state.gradient import check_finite, clip_factor, learning_rate, squared_norm
from tricorn.state.shards import Piece
from tricorn.state.whole_rows import open_checkpoint
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
        self._peers = Peers(context, "mp")
        self._cuts: tuple[int, ...] | None = None
        self._stage: Stage | None = None
        self._state: FlatState | None = None
        self._pipeline: Pipeline | None = None

    @property
    def bytes_sent(self) -> int:
        return self._peers.bytes_sent

    def held(self) -> int | None:
        return None if self._state is None else self._state.step

    def join(self, seat: Seat) -> None:
        """Take the seat. Besides PeerLost, raises PlanError if the model cannot be cut, and CheckpointDamaged."""
        self._pipeline = None
        if seat.source != "keep":
            # Nothing is held until the new state is whole: the old one may be cut elsewhere.
            self._stage = self._state = None
        group = self._peers.join(seat)
        known, self._cuts = self._cuts, self._agree_on_cuts(group)
        if seat.source == "keep":
            assert self._cuts == known, "stages that are all kept are cut alike"
        else:
            self._build(self._cuts, seat)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"
        assert self._stage is not None
        self._pipeline = Pipeline(self._job, self._stage, group, self._microbatches)

    def share(self, samples: int) -> tuple[int, int]:
        # The first stage needs the inputs and the last the targets.
        return (0, samples) if self._context.rank in (0, self._stages - 1) else (0, 0)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        """Run one global batch. Raises Diverged on every stage; whatever is raised, the state is as it was."""
        state, pipeline = self._state, self._pipeline
        assert state is not None
        assert pipeline is not None
        assert step == state.step
        buffers = [buffer.clone() for buffer in state.module.buffers()]
        try:
            loss_sum, count = pipeline.train(batch, samples)
            outcome, square = self._agree(loss_sum, count, batch, wishes)
            check_finite(step, outcome)
        except BaseException:
            state.grads_N.zero_()
            for buffer, before in zip(state.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
            raise
        state.grads_N.div_(max(outcome.count, 1))
        if self._job.clip_norm is not None:
            state.grads_N.mul_(clip_factor(self._job, square))
        state.update(lr=learning_rate(self._job, step))
        return outcome

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        assert self._pipeline is not None
        self._pipeline.evaluate(batch, samples, judge)

    def pieces(self) -> Sequence[Piece]:
        assert self._state is not None
        return self._state.pieces()

    def interrupt(self) -> None:
        self._peers.interrupt()

    def close(self) -> None:
        self._pipeline = None
        self._peers.leave()

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
            state.load(open_checkpoint(self._job, seat.checkpoint, seat.step))
        self._state = state

    def _agree(self, loss_sum: float, count: int, batch: Batch, wishes: Wishes) -> tuple[Outcome, float]:
        """What the stages together say of the step, and the squared norm of the mean gradient over all of them."""
        assert self._state is not None
        square = 0.0
        if self._job.clip_norm is not None:
            square = squared_norm(self._state.grads_N)
        samples = batch.samples if self._context.rank == 0 else 0
        status = torch.tensor([loss_sum, count, samples, *wishes, square], dtype=torch.float64)
        self._peers.group.all_reduce_now(status)
        *agreed, square = status.tolist()
        outcome = Outcome.of(agreed)
        return outcome, square / max(outcome.count, 1) ** 2
