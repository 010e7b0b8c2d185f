"""A worker of a mesh: takes its place and its part of the model, runs its part of each batch, agrees on the update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch

from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.errors import Diverged
from tricorn.mp.buffers import Buffers
from tricorn.mp.choose import choose
from tricorn.mp.cut import SHARED, Link, fineness
from tricorn.mp.mesh import Mesh, chunks_of
from tricorn.mp.part import Part
from tricorn.mp.partition import Stage, blocks_of, tied
from tricorn.mp.ping import slowest_link, slowness_of_each
from tricorn.mp.pipeline import Pipeline
from tricorn.mp.schedule import microbatches_of, split
from tricorn.plan import Schedule
from tricorn.state.beside import WholeTables
from tricorn.state.flat import device_of, model_without_rows
from tricorn.state.gradient import check_finite, clip_factor, learning_rate, rows, seed_dropout
from tricorn.state.memory import give_back
from tricorn.state.shards import Piece
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch, Beside, Context, Outcome, Seat, Wishes, even_share

if TYPE_CHECKING:
    from tricorn.mp.tensor import Splits
    from tricorn.mp.tensor.team import Team

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Groups(NamedTuple):
    """The workers that this one talks to: everyone, and those along each axis of the mesh."""

    everyone: Group
    line: Group
    shards: Group
    copies: Group


class MeshTrainer:
    """One place of ``mp/mesh.py``; fulfils ``tricorn.strategy.Trainer``.

    Where the model is cut is no part of the state: a checkpoint has the user's names only, and any plan can take it up.
    The cuts in force stay as long as one worker lives that knows them. What is ``beside`` is trained with the rest, to
    the same steps.
    """

    def __init__(self, context: Context, beside: Beside | None = None) -> None:
        self._context = context
        self._job, self._plan = context.job, context.plan
        self._mesh = Mesh.of(context.plan)
        self._place = self._mesh.place(context.rank)
        self._beside = beside or WholeTables(context.job)
        self.part: str | None = f"rows{context.rank}" if self._beside.alone else self._mesh.part(context.rank)
        self._chunks = chunks_of(context.plan)
        self._microbatches = microbatches_of(context.plan, -(-context.job.batch_size // self._mesh.replicas))
        self._device = device_of(context.job)
        self._peers = [Peers(context, f"mp-{axis}") for axis in Groups._fields]
        self._groups: Groups | None = None
        self._cuts: tuple[int, ...] | None = None
        self._recompute = bool(context.plan.recompute)
        self._schedule: Schedule = context.plan.schedule or "1f1b"
        self._splits: Splits | None = None
        self._teams: list[Team] = []  # of each stage's layers that are split
        self.computed = 0.0
        self._state: Part | None = None  # None until it is whole
        self._pipeline: Pipeline | None = None

    @property
    def bytes_sent(self) -> int:
        return sum(peers.bytes_sent for peers in self._peers) + self._beside.bytes_sent

    @property
    def foresees(self) -> bool:
        return self._beside.foresees

    def foresee(self, step: int, batch: Batch) -> None:
        self._beside.foresee(step, self._inputs(batch))

    def held(self) -> int | None:
        return None if self._state is None else self._state.step

    def join(self, seat: Seat) -> None:
        """Take the seat. Besides PeerLost, raises PlanError if the model cannot be cut, and CheckpointDamaged."""
        self._pipeline = None
        held, self._state = self._state, None
        if seat.source == "keep" or (seat.source == "peer" and held is not None and held.step == seat.step):
            self._state = held
        groups = self._groups = self._meet(seat)
        known, self._cuts = self._cuts, self._agree_on_cuts(groups)
        if self._state is None:
            state = self._build(self._cuts, groups.shards)
            give_back()
        else:
            assert self._cuts == known, "what is kept is cut as before"
            state = self._state
            self._split(state.stages, groups.shards)
        self._beside.join(seat, self._mesh.copies(self._context.rank), state.module)
        if seat.checkpoint is not None:
            state.load(open_checkpoint(self._job, seat.checkpoint, seat.step))
        elif seat.source == "peer":
            source = self._mesh.place(seat.peer).replica
            state.copy(groups.copies, source, seat.step, [self._beside.carried()])
        state.gather(groups.copies)
        assert state.step == seat.step, f"holds step {state.step} where the seat says {seat.source} {seat.step}"
        self._state = state
        self._pipeline = Pipeline(
            self._job, state.stages, groups.line, schedule=self._schedule,
            microbatches=self._microbatches, recompute=self._recompute,
        )  # fmt: skip

    def share(self, samples: int) -> tuple[int, int]:
        # The first stage needs the inputs and the last the targets.
        start, stop = even_share(samples, self._place.replica, self._mesh.replicas)
        wanted = self._place.stage in (0, self._mesh.stages - 1) or self._beside.reads
        return (start, stop) if wanted else (start, start)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        """Run one global batch. Raises Diverged on every worker; whatever is raised, the state is as it was."""
        state, groups = self._state, self._groups
        assert state is not None
        assert groups is not None
        assert step == state.step
        if self._mesh.tensor > 1:  # shards of a layer drop the same
            seed_dropout(self._job, step, self._mesh.shards(self._context.rank)[0])
        buffers = Buffers(state.module)
        try:
            self._beside.fetch(step, self._inputs(batch))
            loss_sum, count = self._compute(state, groups, batch, samples)
            square = self._beside.hand_over(count)
            outcome, square = self._agree(state, groups.everyone, loss_sum, count, square, batch, wishes)
            check_finite(step, outcome)
            buffers.spread(groups.copies, self._first_replica(samples))
        except BaseException as error:
            if not isinstance(error, Diverged):  # of which all know
                for peers in self._peers:
                    peers.give_up()
            state.grads_N.zero_()
            self._beside.abandon()
            buffers.restore()
            raise
        mean, scale = 1 / max(outcome.count, 1), 1.0
        if self._job.clip_norm is not None:
            scale = clip_factor(self._job, square * mean**2)
        state.grads_N.mul_(mean * scale)
        state.update(lr=learning_rate(self._job, step))
        self._beside.commit(outcome.count, scale, float(self._job.schedule(step)) if self._job.schedule else 1.0)
        state.gather(groups.copies)
        return outcome

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        assert self._pipeline is not None
        mine = self._samples(samples)
        with self._beside.judging(self._inputs(batch)):
            if mine:
                self._pipeline.evaluate(batch, mine, judge if self._place.shard == 0 else _look_away)

    def pieces(self) -> Sequence[Piece]:
        assert self._state is not None
        return [*self._state.pieces(), *self._beside.pieces()]

    def interrupt(self) -> None:
        for peers in self._peers:
            peers.interrupt()
        self._beside.interrupt()

    def close(self) -> None:
        self._pipeline = None
        for peers in self._peers:
            peers.leave()
        self._beside.close()

    def _meet(self, seat: Seat) -> Groups:
        """Connect to the others: along an axis that has all workers, in the group of all."""
        rank, everyone = self._context.rank, self._peers[0].join(seat)
        axes = (self._mesh.line(rank), self._mesh.shards(rank), self._mesh.copies(rank))
        along = [
            everyone if len(ranks) == everyone.size else peers.join(seat, ranks)
            for peers, ranks in zip(self._peers[1:], axes, strict=True)
        ]
        return Groups(everyone, *along)

    def _agree_on_cuts(self, groups: Groups) -> tuple[int, ...]:
        """The cuts that the first rank knows that knows any; in a new run rank 0 measures and decides."""
        everyone, stages = groups.everyone, self._mesh.stages * self._chunks
        knows = torch.zeros(everyone.size)
        knows[everyone.rank] = self._cuts is not None
        everyone.all_reduce_now(knows)
        source = int(knows.argmax())
        if not knows.any():
            link = slowest_link(groups.line, everyone)
            slow = [] if link == SHARED else slowness_of_each(everyone, self._device)
            if source == everyone.rank:
                self._cuts = self._choose(stages, link, slow)
        how = (int(self._recompute), SCHEDULES.index(self._schedule), self._microbatches)
        told = torch.tensor([*how, *(self._cuts or [0] * (stages - 1))], dtype=torch.int64)
        everyone.broadcast(told, source)
        recompute, schedule, self._microbatches, *cuts = told.tolist()
        self._recompute, self._schedule = bool(recompute), SCHEDULES[schedule]
        return tuple(cuts)

    def _choose(self, stages: int, link: Link = SHARED, slow: Sequence[float] = ()) -> tuple[int, ...]:
        """Measure, and find the best cuts; how to run them, and whether memory asks for computing activations again."""
        share = -(-self._job.batch_size // self._mesh.replicas)
        start, stop = split(share, self._microbatches)[-1]
        samples = stop - start
        stage_of = [self._mesh.place(rank).stage for rank in range(self._mesh.size)]
        # Of each stage: this worker measures what the blocks take, and each waits for its slowest replica.
        times = [each / slow[self._context.rank] for each in slow]
        slowness = [
            max(each for each, at in zip(times, stage_of, strict=True) if at == stage)
            for stage in (range(self._mesh.stages) if times else ())
        ]
        choice = choose(self._job, self._plan, stages, samples, self._microbatches, self._device, link, slowness)
        self._recompute, self._schedule = choice.recompute, choice.schedule
        if choice.bytes:
            needs = {f"worker-{rank}": float(choice.bytes[stage]) for rank, stage in enumerate(stage_of)}
            self._context.measured(0, "needs", needs)
        return choice.cuts

    def _build(self, cuts: tuple[int, ...], shards: Group) -> Part:
        """Make this worker's part of the model, with the weights of the seed."""
        model = model_without_rows(self._job)
        found = blocks_of(self._job, model, len(cuts) + 1, fineness(self._plan))
        shared = tied(model, found, cuts)
        if self._mesh.tensor > 1:
            from tricorn.mp.tensor import find_for

            self._splits = find_for(self._job, model, self._mesh.tensor)
        self._beside.attach(model)
        ranges = list(pairwise((0, *cuts, len(found))))[self._place.stage :: self._mesh.stages]
        stages = [Stage(model, found, start, stop, self._device) for start, stop in ranges]
        self._split(stages, shards)
        in_line = {name: tuple(sorted({stage % self._mesh.stages for stage in at})) for name, at in shared.items()}
        here = {name: at for name, at in in_line.items() if len(at) > 1 and self._place.stage in at}
        return Part(stages, self._job.optimizer, self._device, self._mesh, self._context.rank, here)

    def _split(self, stages: Sequence[Stage], shards: Group) -> None:
        """Keep this shard's part of the layers, or let what is kept already talk to these shards."""
        if self._splits is not None:
            from tricorn.mp.tensor import apply

            self._teams = [apply(stage, self._splits, shards) for stage in stages]

    def _inputs(self, batch: Batch) -> list[Any]:
        """What the model is called with, microbatch by microbatch, as far as this worker has it."""
        if not batch.samples:
            return []
        return [rows(batch.inputs, start, stop) for start, stop in split(batch.samples, self._microbatches)]

    def _samples(self, samples: int) -> int:
        """How many of a global batch's samples fall to this worker's replica."""
        start, stop = even_share(samples, self._place.replica, self._mesh.replicas)
        return stop - start

    def _first_replica(self, samples: int) -> int:
        """The first that any of a global batch's samples fall to."""
        return next(r for r in range(self._mesh.replicas) if even_share(samples, r, self._mesh.replicas)[1] > 0)

    def _compute(self, state: Part, groups: Groups, batch: Batch, samples: int) -> tuple[float, int]:
        """Add up the gradient over stages that share weights and over replicas; what this worker has to tell of loss
        and count.
        """
        assert self._pipeline is not None
        mine = self._samples(samples)
        began, waited = time.perf_counter(), self._waited()
        loss_sum, count = self._pipeline.train(batch, mine) if mine else (0.0, 0)
        self.computed += time.perf_counter() - began - (self._waited() - waited)
        state.sum_tied(groups.line)
        state.sum_copies(groups.copies)
        return (loss_sum, count) if self._place.shard == 0 else (0.0, 0)

    def _waited(self) -> float:
        """Seconds for which computing has waited for other workers."""
        assert self._pipeline is not None
        return self._pipeline.waited + sum(team.waited for team in self._teams)

    def _agree(
        self, state: Part, everyone: Group, loss_sum: float, count: int, square: float, batch: Batch, wishes: Wishes
    ) -> tuple[Outcome, float]:
        """What all together say of the step, and the squared norm of the summed gradient.

        ``square`` is that of what is beside, of which shards each tell the whole.
        """
        if self._place.shard > 0:
            square = 0.0
        if self._job.clip_norm is not None:
            square += state.told_square()
        samples = batch.samples if self._place.stage == self._place.shard == 0 else 0
        status = torch.tensor([loss_sum, count, samples, *wishes, square], dtype=torch.float64)
        everyone.all_reduce_now(status)
        *agreed, square = status.tolist()
        return Outcome.of(agreed), square


def _look_away(output: Any, batch: Batch) -> None:
    """Another shard judges the same."""
