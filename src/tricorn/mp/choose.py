"""Where a job's model is cut, and in which order its stages work: measured, within each worker's memory, and as the
plan says where it says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch

from tricorn.errors import PlanError
from tricorn.mp.cut import SHARED, Fits, Link, balanced, fineness, minimax
from tricorn.mp.measure import Cost, example, measure, update_seconds
from tricorn.mp.memory import Held, stage_bytes
from tricorn.mp.partition import Block, blocks_of, legal_cuts, wrong_cuts
from tricorn.mp.schedule import gathered, order
from tricorn.mp.simulate import Work, crowded, most_in_flight, simulate
from tricorn.plan import Plan, Schedule
from tricorn.state import cores
from tricorn.state.flat import build_model
from tricorn.state.footprint import COPIED, FIRST_STEP
from tricorn.state.memory import limit_bytes, own_bytes, resident_bytes, sharing
from tricorn.state.rows import row_tables

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job

_MANY = 8  # workers, and microbatches, for which a model is looked at without a plan
# Of the cuts with the fastest slowest stages, how many are simulated: when a step begins and ends, other stages count.
_TRIED = 64
# Of what is slower than the fastest by no more than this, the simplest is taken: measured seconds are no better.
WORTH = 0.97


class Choice(NamedTuple):
    """The ``cuts``, whether stages ``recompute``, the ``schedule``, and each worker's peak of resident bytes."""

    cuts: tuple[int, ...]
    recompute: bool
    schedule: Schedule
    bytes: tuple[int, ...]


def choose(
    job: Job, plan: Plan, stages: int, samples: int, microbatches: int, device: torch.device, link: Link = SHARED,
    slowness: Sequence[float] = (),
) -> Choice:  # fmt: skip
    """The cuts into so many stages, chunks counted, that make a step with ``microbatches`` of ``samples`` fastest.

    The order of work is the plan's; where it says none, the faster of ``1f1b`` and ``zero-bubble``. Each worker keeps
    to its memory, ``plan.memory`` or what the machine lets it have; where that is not enough, activations are computed
    again unless the plan says not to. ``slowness``: how many times as long as this worker each in line takes, where
    they are not alike. A single stage is not measured. Raises PlanError if the model cannot be cut so
    often, if ``plan.cuts`` are none of its cuts, or if nothing fits; and whatever the user's code raises.
    """
    ranks = plan.stages
    schedules: tuple[Schedule, ...] = ("interleaved",) if stages > ranks else ("1f1b", "zero-bubble")
    schedules = (plan.schedule,) if plan.schedule else schedules
    if stages == 1:
        return Choice((), bool(plan.recompute), schedules[0], ())
    baseline, resident = own_bytes() + FIRST_STEP + COPIED, resident_bytes() + FIRST_STEP
    model = build_model(job)
    elsewhere = _elsewhere(job, plan, model)
    found = blocks_of(job, model, stages, fineness(plan))
    if plan.cuts is not None and (reason := wrong_cuts(found, plan.cuts, stages)):
        raise PlanError(reason)
    batch = example(job, samples)
    costs = measure(job, found, batch, device)
    held = [_held(block, elsewhere) for block in found]
    room = _Room(job, plan, microbatches, baseline, held, costs)
    cuts = _legal(found, costs, stages) if plan.cuts is None else list(plan.cuts)
    pace = _Pace(job, slowness or [1.0] * ranks, stages // ranks, microbatches, held, costs, link, device)
    for recompute in (False, True) if plan.recompute is None else (plan.recompute,):
        steps = [
            (pace.step(chosen, schedule), chosen, schedule)
            for schedule in schedules
            for chosen in pace.promising(cuts, room.fits(ranks, stages, recompute, schedule))
        ]
        if steps:
            best = {schedule: min(step for step in steps if step[2] == schedule) for *_, schedule in steps}
            fastest = min(seconds for seconds, *_ in best.values())
            _, chosen, schedule = next(step for step in best.values() if step[0] * WORTH <= fastest)
            needs = tuple(count - baseline + resident for count in room.needs(chosen, ranks, recompute, schedule))
            return Choice(chosen, recompute, schedule, needs)
    raise room.refusal(cuts, ranks, stages, schedules[0])


def fewest_workers(job: Job) -> int | None:
    """The fewest workers in line in whose memory the model trains, None if there are none. Raises as ``choose``."""
    plan = Plan(strategy="mp", workers=1)
    baseline = own_bytes() + FIRST_STEP + COPIED
    found = blocks_of(job, build_model(job), _MANY)
    microbatches = min(_MANY, job.batch_size)
    costs = measure(job, found, example(job, -(-job.batch_size // microbatches)), torch.device("cpu"))
    room = _Room(job, plan, microbatches, baseline, [_held(block, frozenset()) for block in found], costs)
    return room.enough(_legal(found, costs, 1), 1, 1, "1f1b", recompute=True)


def _legal(found: Sequence[Block], costs: Sequence[Cost], stages: int) -> list[int]:
    """Raises PlanError where too few are left of what can travel."""
    cuts = legal_cuts(found)
    hindered = [(found[c - 1].name, why) for c in cuts if (why := costs[c - 1].obstacle)]
    cuts = [c for c in cuts if costs[c - 1].obstacle is None]
    if hindered and len(cuts) < stages - 1:
        name, why = hindered[0]
        raise PlanError(
            f"{name} hands on {why}, which cannot travel from stage to stage; let it return a tensor or a tuple of "
            f"tensors, or use at most {len(cuts) + 1} workers"
        )
    return cuts


def _elsewhere(job: Job, plan: Plan, model: nn.Module) -> frozenset[int]:
    """The ids of tables that servers hold, or all workers together: they have no gradient here."""
    if not plan.served and plan.embeddings == "whole":
        return frozenset()
    tables = [model.get_parameter(table.parameter).requires_grad_(False) for table in row_tables(job, model)]
    return frozenset(map(id, tables))


def _held(block: Block, elsewhere: frozenset[int]) -> Held:
    here = [p for p in block.module.parameters() if id(p) not in elsewhere]
    weights = {id(p): p.nbytes for p in here if p.requires_grad}
    frozen = {id(p): p.nbytes for p in here if not p.requires_grad}
    return Held(weights=weights, others=frozen | {id(b): b.nbytes for b in block.module.buffers()})


class _Pace:
    """How fast steps are."""

    def __init__(
        self, job: Job, slowness: Sequence[float], chunks: int, microbatches: int, held: Sequence[Held],
        costs: Sequence[Cost], link: Link, device: torch.device,
    ) -> None:  # fmt: skip
        self._ranks, self._microbatches = len(slowness), microbatches
        self._costs, self._link = costs, link
        self._handed_on = [cost.handed_on for cost in costs]
        rate = update_seconds(job, device)
        self._updates = [rate * sum(block.weights.values()) for block in held]
        # Of one host's cores, those that fall to this line of workers.
        self._cores = cores.usable() * self._ranks / max(sharing(), self._ranks)
        self._slowness = [*slowness] * chunks
        if link != SHARED:
            # Hosts share no cores. Slowness was tried while all computed, what blocks take while the others waited.
            self._cores, crowd = inf, max(1.0, sharing() / cores.usable())
            self._slowness = [crowd * each for each in self._slowness]

    def promising(self, cuts: Sequence[int], fits: Fits) -> list[tuple[int, ...]]:
        """Cuts whose slowest stage is fast, an update counted."""
        seconds = [
            cost.seconds + update / self._microbatches for cost, update in zip(self._costs, self._updates, strict=True)
        ]
        return balanced(seconds, self._slowness, cuts, self._handed_on, self._link, fits, keep=_TRIED)

    def step(self, cuts: Sequence[int], schedule: Schedule) -> float:
        """Seconds of a step."""
        edges = list(pairwise((0, *cuts, len(self._costs))))
        works = [self._work(*edge, slowness) for edge, slowness in zip(edges, self._slowness, strict=True)]
        chunks = len(works) // self._ranks
        together = [self._together(start, stop) for start, stop in edges]
        orders = [
            gathered(order(schedule, rank, self._ranks, self._microbatches, chunks), together[rank :: self._ranks])
            for rank in range(self._ranks)
        ]
        updates = [
            slowness * sum(self._updates[start:stop])
            for (start, stop), slowness in zip(edges, self._slowness, strict=True)
        ]
        update = max(sum(updates[rank :: self._ranks]) for rank in range(self._ranks))
        if self._cores < self._ranks:
            return crowded(orders, works, self._cores) + max(update, sum(updates) / self._cores)
        hop = self._link.latency + self._link.wire * max(self._handed_on[cut - 1] for cut in cuts)
        return simulate(orders, works, hop).seconds + update

    def _together(self, start: int, stop: int) -> int:
        """For how many microbatches at a time a stage computes most of its weight gradients."""
        return max(self._costs[start:stop], key=lambda cost: cost.weight_gradient).together

    def _work(self, start: int, stop: int, slowness: float) -> Work:
        """Of a stage of these blocks, on a worker that takes so many times as long.

        What it takes from its neighbours and gives to them, it copies.
        """
        crossing = (self._handed_on[start - 1] if start else 0) + (
            self._handed_on[stop - 1] if stop < len(self._costs) else 0
        )
        copying = self._link.copy * crossing / 2
        forward, inputs, weights = (
            sum(column) for column in zip(*(cost[:3] for cost in self._costs[start:stop]), strict=True)
        )
        return Work(*(slowness * seconds for seconds in (forward + copying, inputs + copying, weights)))


class _Room:
    """What stages need, beside what a worker may have."""

    def __init__(
        self, job: Job, plan: Plan, microbatches: int, baseline: int, held: Sequence[Held], costs: Sequence[Cost]
    ) -> None:
        self._plan, self._microbatches, self._baseline = plan, microbatches, baseline
        self._blocks = len(costs)
        self._needed = stage_bytes(
            held, costs, job.optimizer, spread=plan.replicas if plan.zero else 1, split=plan.tensor
        )
        limits = [value for value in (plan.memory, limit_bytes()) if value is not None]
        self._limit = min(limits, default=None)

    def needs(self, cuts: Sequence[int], ranks: int, recompute: bool, schedule: Schedule) -> tuple[int, ...]:
        """The most bytes of each worker."""
        of = self.of(ranks, len(cuts) + 1, recompute, schedule)
        stages = [of(stage, *edge) for stage, edge in enumerate(pairwise((0, *cuts, self._blocks)))]
        return tuple(self._baseline + sum(stages[rank::ranks]) for rank in range(ranks))

    def fits(self, ranks: int, stages: int, recompute: bool, schedule: Schedule) -> Fits:
        """Whether a stage has room. Chunks of one worker have equal parts of it."""
        of, limit = self.of(ranks, stages, recompute, schedule), self._limit

        def fits(stage: int, start: int, stop: int) -> bool:
            return limit is None or of(stage, start, stop) * (stages // ranks) <= limit - self._baseline

        return fits

    def of(self, ranks: int, stages: int, recompute: bool, schedule: Schedule) -> Callable[[int, int, int], int]:
        """The bytes of (stage, start, stop) beside the baseline."""
        chunks = stages // ranks
        flying = [most_in_flight(order(schedule, r, ranks, self._microbatches, chunks)) for r in range(ranks)]

        def needed(stage: int, start: int, stop: int) -> int:
            return self._needed(start, stop, -(-flying[stage % ranks] // chunks), recompute)

        return needed

    def refusal(self, cuts: Sequence[int], ranks: int, stages: int, schedule: Schedule) -> PlanError:
        """No cut fits: what is lacking of the cut that needs least, and what would help."""
        assert self._limit is not None
        recompute = self._plan.recompute is not False
        ((_, best),) = minimax(self.of(ranks, stages, recompute, schedule), stages, cuts, self._blocks)
        needs = self.needs(best, ranks, recompute, schedule)
        fullest = max(range(ranks), key=needs.__getitem__)
        remedies = ["give each more memory", "smaller microbatches (--microbatches)"]
        if self._plan.cuts is not None:
            remedies.insert(0, "leave its cuts out of the plan")
        if not recompute:
            remedies.insert(0, "compute activations again (recompute)")
        if more := self.enough(cuts, ranks, stages // ranks, schedule, recompute=recompute):
            remedies.insert(0, f"use --workers {more * self._plan.replicas * self._plan.tensor}")
        return PlanError(
            f"the model does not fit {ranks} stages: stage {fullest} needs {_mb(needs[fullest])}, "
            f"{_mb(self._baseline)} of them before there is a model, and a worker may have {_mb(self._limit)}; "
            + ", or ".join(remedies)
        )

    def enough(
        self, cuts: Sequence[int], ranks: int, chunks: int, schedule: Schedule, *, recompute: bool
    ) -> int | None:
        """How many workers in line, more than ``ranks``, have room; None if there are not enough cuts for any."""
        for more in range(ranks + 1, (len(cuts) + 1) // chunks + 1):
            stages = more * chunks
            ((_, best),) = minimax(self.of(more, stages, recompute, schedule), stages, cuts, self._blocks)
            if self._limit is not None and max(self.needs(best, more, recompute, schedule)) <= self._limit:
                return more
        return None


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
