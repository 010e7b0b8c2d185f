"""Parameter server: servers hold the weights and apply the updates, workers compute gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.strategy import Context, Strategy, Trainer


class ParameterServer:
    """Fulfils ``tricorn.strategy.Strategy``."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        from tricorn.state.flat import build_model
        from tricorn.state.inspect import batch_statistics

        model = build_model(job)
        if not any(p.requires_grad for p in model.parameters()):
            return "the model has no trainable parameter; set requires_grad on those that shall be trained"
        layers = batch_statistics(model)
        if layers and plan.workers > 1:
            return (
                f"layer {layers[0]!r} keeps statistics of the batch, and each of the {plan.workers} workers sees only "
                "its share of it; use GroupNorm or LayerNorm, or one worker"
            )
        if layers and not plan.synchronous:
            return (
                f"layer {layers[0]!r} keeps statistics of the batch, which an asynchronous run does not save; use "
                "GroupNorm or LayerNorm, or consistency bsp"
            )
        return None

    def trainer(self, context: Context) -> Trainer:
        """A worker's half, with the model built from the job's seed; a LeasedTrainer where the plan is asynchronous."""
        from tricorn.ps.trainer import AsyncTrainer, BspTrainer

        return BspTrainer(context) if context.plan.synchronous else AsyncTrainer(context)


strategy: Strategy = ParameterServer()
