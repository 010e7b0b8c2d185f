"""Data parallel: every worker holds the whole model, computes on its share of each batch, and sums gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.dp.replicate import ReplicaTrainer
from tricorn.state.flat import build_model
from tricorn.state.inspect import batch_statistics

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.strategy import Context


class DataParallel:
    """Fulfils ``tricorn.strategy.Strategy``."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        layers = batch_statistics(build_model(job)) if plan.workers > 1 else []
        if not layers:
            return None
        return (
            f"layer {layers[0]!r} keeps statistics of the batch, and each of the {plan.workers} workers sees only its "
            "share of it; use GroupNorm or LayerNorm, or one worker"
        )

    def trainer(self, context: Context) -> ReplicaTrainer:
        """A worker's half, with the model built from the job's seed."""
        return ReplicaTrainer(context)


strategy = DataParallel()
