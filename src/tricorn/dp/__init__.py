"""Data parallel: every worker computes on its share of each batch, and gradients are summed.

Each holds the whole state (replicate.py), or only a share of it (shard.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.strategy import Beside, Context, Trainer


class DataParallel:
    """Fulfils ``tricorn.strategy.Strategy``. Imports late: whoever only plans must not wait for PyTorch."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        from tricorn.state.flat import model_without_rows
        from tricorn.state.rows import needs_server

        model = model_without_rows(job)
        beside = plan.served or plan.embeddings != "whole"
        return _conflict(plan) or (None if beside else needs_server(job, model)) or _statistics(job, plan, model)

    def trainer(self, context: Context, beside: Beside | None = None) -> Trainer:
        """A worker's half, with the model built from the job's seed; it trains all but what is ``beside``."""
        if context.plan.local_steps > 1:
            from tricorn.dp.local import LocalTrainer

            return LocalTrainer(context)
        if context.plan.zero:
            from tricorn.dp.shard import ShardTrainer

            return ShardTrainer(context, beside)
        from tricorn.dp.replicate import ReplicaTrainer

        return ReplicaTrainer(context, beside)


def _conflict(plan: Plan) -> str | None:
    """Two options that do not go together, if there are any."""
    accumulating = (plan.microbatches or 1) > 1
    for field, chosen, others in (
        (
            "local_steps",
            plan.local_steps > 1,
            {"zero": plan.zero, "balance": plan.balance, "microbatches": accumulating},
        ),
        ("compress", plan.compress != "none", {"zero": plan.zero}),
    ):
        for other in (name for name, too in others.items() if chosen and too):
            values = f"{field} is {getattr(plan, field)} and {other} is {getattr(plan, other)}"
            return f"{values}, which do not go together; leave one of the two out"
    return None


def _statistics(job: Job, plan: Plan, module: nn.Module) -> str | None:
    """Why the model's layers with statistics of the batch cannot have those of the whole batch, if they cannot."""
    from tricorn.dp.batchnorm import global_layers
    from tricorn.state.inspect import batch_statistics

    summed = global_layers(module)
    for name in batch_statistics(module):
        what = f"layer {name!r} keeps statistics of the batch"
        if (plan.microbatches or 1) > 1:
            return f"{what}, and microbatches is {plan.microbatches}; leave it out, or use GroupNorm or LayerNorm"
        if plan.workers == 1:
            continue
        if plan.local_steps > 1:
            return f"{what}, and local_steps is {plan.local_steps}; leave it out, or use GroupNorm or LayerNorm"
        if plan.zero == 3:
            return f"{what}, and with zero=3 weights are gathered in its midst; use zero=2"
        if name not in summed:
            return (
                f"{what}, and each of the {plan.workers} workers sees only its share of it; use BatchNorm1d, 2d or 3d, "
                "GroupNorm or LayerNorm, or one worker"
            )
        if not summed[name].track_running_stats and job.evaluate is not None:
            return (
                f"layer {name!r} judges with the statistics of a batch, of which each of the {plan.workers} workers "
                "sees only its share; let it track running statistics, or use one worker"
            )
    return None


strategy = DataParallel()
