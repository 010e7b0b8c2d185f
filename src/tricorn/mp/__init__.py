"""Model parallel: the model is cut into stages and layers into shards, one in each worker; replicas share batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.strategy import Beside, Context, Trainer


class ModelParallel:
    """Fulfils ``tricorn.strategy.Strategy``. Imports late: whoever only plans must not wait for PyTorch."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        from tricorn.mp.refusals import why_not

        return why_not(job, plan)

    def trainer(self, context: Context, beside: Beside | None = None) -> Trainer:
        """A worker's half: its place in the mesh, with its part of the model; it trains all but what is ``beside``."""
        from tricorn.mp.trainer import MeshTrainer

        return MeshTrainer(context, beside)


strategy = ModelParallel()
