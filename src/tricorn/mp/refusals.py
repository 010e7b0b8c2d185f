"""What a mesh cannot do with a job, one sentence each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.errors import PlanError
from tricorn.mp.cut import fineness
from tricorn.mp.mesh import chunks_of
from tricorn.mp.partition import blocks_of, refusal, wrong_cuts
from tricorn.mp.schedule import microbatches_of, split
from tricorn.state.flat import model_without_rows
from tricorn.state.inspect import batch_statistics
from tricorn.state.rows import needs_server

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job
    from tricorn.plan import Plan


def why_not(job: Job, plan: Plan) -> str | None:
    """What would have to change, None if the job can run. Builds the model."""
    model = model_without_rows(job)
    beside = plan.served or plan.embeddings != "whole"
    return (
        _misfit(job, plan)
        or (None if beside else needs_server(job, model))
        or _uncut(job, plan, model)
        or _statistics(job, plan, model)
        or _unsplit(job, plan, model)
    )


def _misfit(job: Job, plan: Plan) -> str | None:
    """What of the mesh would have nothing to do."""
    if plan.replicas > job.batch_size:
        return (
            f"replicas is {plan.replicas}, and a batch has {job.batch_size} samples for them to share; use at most "
            f"{job.batch_size} replicas, or a larger batch_size"
        )
    if plan.zero and plan.replicas == 1:
        return (
            "zero is 1, which spreads the optimizer's state over the replicas, and there is one; give replicas 2 or "
            "more, or leave zero out"
        )
    if plan.schedule == "interleaved" and plan.stages == 1:
        return "schedule is interleaved, and there is one stage; use at least 2 stages, or another schedule"
    return None


def _uncut(job: Job, plan: Plan, model: nn.Module) -> str | None:
    """Why the model cannot be cut into the stages."""
    stages = plan.stages * chunks_of(plan)
    try:
        found = blocks_of(job, model, stages, fineness(plan))
    except PlanError as error:
        return f"{error}; {error.remedy}" if error.remedy else str(error)
    if reason := refusal(model, found, stages):
        return reason
    return None if plan.cuts is None else wrong_cuts(found, plan.cuts, stages)


def _statistics(job: Job, plan: Plan, model: nn.Module) -> str | None:
    """Why layers with statistics of the batch cannot have those of the whole batch."""
    layers = batch_statistics(model)
    if not layers:
        return None
    what = f"layer {layers[0]!r} keeps statistics of the batch, and"
    if plan.replicas > 1:
        return (
            f"{what} each of {plan.replicas} replicas sees only its share; use GroupNorm or LayerNorm, or one replica"
        )
    microbatches = len(split(job.batch_size, microbatches_of(plan, job.batch_size)))
    if microbatches > 1:
        return (
            f"{what} would see {microbatches} microbatches one by one; use GroupNorm or LayerNorm, or set microbatches "
            "to 1, which leaves the stages nothing to overlap"
        )
    return None


def _unsplit(job: Job, plan: Plan, model: nn.Module) -> str | None:
    """Why no layer can be split into shards."""
    if plan.tensor == 1:
        return None
    from tricorn.mp.tensor import find_for

    return find_for(job, model, plan.tensor).refusal()
