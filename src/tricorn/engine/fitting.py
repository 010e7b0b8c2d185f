"""Whether a plan's state has room in the memory of its workers, found out before any of them begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from tricorn.errors import PlanError
from tricorn.state.flat import model_without_rows
from tricorn.state.footprint import COPIED, FIRST_STEP
from tricorn.state.memory import limit_bytes, own_bytes, sharing

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.plan import Plan


def too_large(job: Job, plan: Plan) -> PlanError | None:
    """Why a worker's memory cannot hold what data parallel keeps there, and what would fit; None if it can.

    Model parallel finds out itself where it is cut (mp/choose.py). Parameter servers have their own memory.
    """
    limit = limit_bytes()
    if plan.strategy != "dp" or plan.embeddings != "whole" or limit is None:
        return None
    from tricorn.dp.memory import worker_bytes

    baseline = own_bytes() + FIRST_STEP + COPIED
    model = model_without_rows(job)
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    others = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - weights
    needed = baseline + worker_bytes(plan, weights, others, job.optimizer, sharing())
    if needed <= limit:
        return None
    del model
    remedies = []
    sharded = msgspec.structs.replace(plan, zero=3)
    if plan.workers > 1 and baseline + worker_bytes(sharded, weights, others, job.optimizer) <= limit:
        remedies.append("--zero 3")
    if workers := _pipeline(job):
        remedies.append(f"--strategy mp --workers {workers}")
    if not remedies:
        remedies.append("--strategy ps with enough --servers")
    slots = len(job.optimizer.slots)
    return PlanError(
        f"dp cannot run this job in the memory there is: each worker needs {_mb(needed)} at least, and may have "
        f"{_mb(limit)}; the model has {_mb(weights)}, with its gradient, {slots} times as much of the optimizer's "
        f"state, and a copy of what is saved, and a worker without any model {_mb(baseline)}",
        remedy=f"Use {', or '.join(remedies)}, or give each worker more memory.",
    )


def _pipeline(job: Job) -> int | None:
    """The fewest workers in line that have room for the model, None if it cannot be cut so that it fits."""
    from tricorn.mp.choose import fewest_workers

    try:
        return fewest_workers(job)
    except PlanError:
        return None


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
