"""Where a job's model is cut: measured, within the memory of each worker, and as the plan says where it says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from tricorn.errors import PlanError
from tricorn.mp.cut import Fits, Link, balance, minimax
from tricorn.mp.measure import Cost, example, measure
from tricorn.mp.memory import Held, stage_bytes
from tricorn.mp.partition import Block, blocks_of, legal_cuts
from tricorn.mp.schedule import order
from tricorn.mp.simulate import Work, most_in_flight
from tricorn.plan import Plan
from tricorn.state.flat import build_model
from tricorn.state.footprint import COPIED, FIRST_STEP
from tricorn.state.memory import limit_bytes, own_bytes, resident_bytes
from tricorn.state.rows import row_tables

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job

# Seconds a byte through shared memory: each side copies; loopback and real links are slower, and the planner's measured
# figures may be given instead.
SHARED = Link(copy=0.25e-9, wire=0.0)


_MANY = 8  # workers, and microbatches, for which a model is looked at without a plan


class Choice(NamedTuple):
    """The ``cuts``, whether stages ``recompute``, what each of them works, and each worker's peak of resident bytes."""

    cuts: tuple[int, ...]
    recompute: bool
    works: tuple[Work, ...]
    bytes: tuple[int, ...]


def choose(
    job: Job, plan: Plan, stages: int, samples: int, microbatches: int, device: torch.device, link: Link = SHARED
) -> Choice:
    """The cuts into so many stages, chunks counted, that make the slowest fastest with ``microbatches`` of ``samples``.

    Each worker keeps to its memory, ``plan.memory`` or what the machine lets it have; where that is not enough,
    activations are computed again unless the plan says not to. A single stage is not measured. Raises PlanError if the
    model cannot be cut so often, if ``plan.cuts`` are none of its cuts, or if nothing fits; and whatever the user's
    code raises.
    """
    if stages == 1:
        return Choice((), bool(plan.recompute), (), ())
    baseline, resident = own_bytes() + FIRST_STEP + COPIED, resident_bytes() + FIRST_STEP
    model = build_model(job)
    elsewhere = _elsewhere(job, plan, model)
    found = blocks_of(job, model, stages)
    if plan.cuts is not None:
        _validate(plan.cuts, found, stages)
    batch = example(job, samples)
    costs = measure(job, found, batch, device)
    room = _Room(job, plan, microbatches, baseline, [_held(block, elsewhere) for block in found], costs)
    cuts = _legal(found, costs, stages) if plan.cuts is None else list(plan.cuts)
    seconds, handed_on = [cost.seconds for cost in costs], [cost.handed_on for cost in costs]
    ranks = plan.stages
    for recompute in (False, True) if plan.recompute is None else (plan.recompute,):
        chosen = balance(seconds, stages, cuts, handed_on, link, room.fits(ranks, stages, recompute))
        if chosen is not None:
            needs = tuple(count - baseline + resident for count in room.needs(chosen, ranks, recompute))
            return Choice(chosen, recompute, _works(costs, chosen), needs)
    raise room.refusal(cuts, ranks, stages)


def fewest_workers(job: Job) -> int | None:
    """The fewest workers in line in whose memory the model trains, None if there are none. Raises as ``choose``."""
    plan = Plan(strategy="mp", workers=1)
    baseline = own_bytes() + FIRST_STEP + COPIED
    found = blocks_of(job, build_model(job), _MANY)
    microbatches = min(_MANY, job.batch_size)
    costs = measure(job, found, example(job, -(-job.batch_size // microbatches)), torch.device("cpu"))
    room = _Room(job, plan, microbatches, baseline, [_held(block, frozenset()) for block in found], costs)
    return room.enough(_legal(found, costs, 1), 1, 1, recompute=True)


def _validate(cuts: Sequence[int], found: Sequence[Block], stages: int) -> None:
    if len(cuts) != stages - 1:
        raise PlanError(f"cuts are {len(cuts)}, but {stages} stages have {stages - 1}; give that many")
    legal = legal_cuts(found)
    if wrong := [cut for cut in cuts if cut not in legal]:
        names = ", ".join(f"{c} before {found[c].name}" for c in legal)
        raise PlanError(f"the model cannot be cut before block {wrong[0]}; its cuts are {names}")


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


def _works(costs: Sequence[Cost], cuts: Sequence[int]) -> tuple[Work, ...]:
    return tuple(
        Work(*(sum(column) for column in zip(*(cost[:3] for cost in costs[start:stop]), strict=True)))
        for start, stop in pairwise((0, *cuts, len(costs)))
    )


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

    def needs(self, cuts: Sequence[int], ranks: int, recompute: bool) -> tuple[int, ...]:
        """The most bytes of each worker."""
        of = self.of(ranks, len(cuts) + 1, recompute)
        stages = [of(stage, *edge) for stage, edge in enumerate(pairwise((0, *cuts, self._blocks)))]
        return tuple(self._baseline + sum(stages[rank::ranks]) for rank in range(ranks))

    def fits(self, ranks: int, stages: int, recompute: bool) -> Fits:
        """Whether a stage has room. Chunks of one worker have equal parts of it."""
        of, limit = self.of(ranks, stages, recompute), self._limit

        def fits(stage: int, start: int, stop: int) -> bool:
            return limit is None or of(stage, start, stop) * (stages // ranks) <= limit - self._baseline

        return fits

    def of(self, ranks: int, stages: int, recompute: bool) -> Callable[[int, int, int], int]:
        """The bytes of (stage, start, stop) beside the baseline."""
        chunks = stages // ranks
        schedule = self._plan.schedule or ("interleaved" if chunks > 1 else "1f1b")
        flying = [most_in_flight(order(schedule, r, ranks, self._microbatches, chunks)) for r in range(ranks)]

        def needed(stage: int, start: int, stop: int) -> int:
            return self._needed(start, stop, -(-flying[stage % ranks] // chunks), recompute)

        return needed

    def refusal(self, cuts: Sequence[int], ranks: int, stages: int) -> PlanError:
        """No cut fits: what is lacking of the cut that needs least, and what would help."""
        assert self._limit is not None
        recompute = self._plan.recompute is not False
        _, best = minimax(self.of(ranks, stages, recompute), stages, cuts, self._blocks)
        needs = self.needs(best, ranks, recompute)
        fullest = max(range(ranks), key=needs.__getitem__)
        remedies = ["give each more memory", "smaller microbatches (--microbatches)"]
        if not recompute:
            remedies.insert(0, "compute activations again (recompute)")
        if more := self.enough(cuts, ranks, stages // ranks, recompute=recompute):
            remedies.insert(0, f"use --workers {more * self._plan.replicas * self._plan.tensor}")
        return PlanError(
            f"the model does not fit {ranks} stages: stage {fullest} needs {_mb(needs[fullest])}, "
            f"{_mb(self._baseline)} of them before there is a model, and a worker may have {_mb(self._limit)}; "
            + ", or ".join(remedies)
        )

    def enough(self, cuts: Sequence[int], ranks: int, chunks: int, *, recompute: bool) -> int | None:
        """How many workers in line, more than ``ranks``, have room; None if there are not enough cuts for any."""
        for more in range(ranks + 1, (len(cuts) + 1) // chunks + 1):
            stages = more * chunks
            _, best = minimax(self.of(more, stages, recompute), stages, cuts, self._blocks)
            if self._limit is not None and max(self.needs(best, more, recompute)) <= self._limit:
                return more
        return None


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
