"""Model parallel: the model is cut into stages, one in each worker, and batches go through them as a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.errors import PlanError
from tricorn.mp.partition import blocks, refusal
from tricorn.mp.schedule import microbatches_of, split
from tricorn.mp.trainer import PipelineTrainer
from tricorn.state.flat import model_without_rows
from tricorn.state.inspect import batch_statistics
from tricorn.state.rows import needs_server

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.strategy import Context


class ModelParallel:
    """Fulfils ``tricorn.strategy.Strategy``."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        model = model_without_rows(job)
        if reason := needs_server(job, model):
            return reason
        try:
            found = blocks(model, plan.workers)
        except PlanError as error:
            return str(error)
        if reason := refusal(model, found, plan.workers):
            return reason
        microbatches = len(split(job.batch_size, microbatches_of(plan, job.batch_size)))
        if microbatches > 1 and (layers := batch_statistics(model)):
            return (
                f"layer {layers[0]!r} keeps statistics of the batch, and would see {microbatches} microbatches one by "
                "one; use GroupNorm or LayerNorm, or set microbatches to 1, which leaves the stages nothing to overlap"
            )
        return None

    def trainer(self, context: Context) -> PipelineTrainer:
        """A worker's half: one stage of the model built from the job's seed."""
        return PipelineTrainer(context)


strategy = ModelParallel()
