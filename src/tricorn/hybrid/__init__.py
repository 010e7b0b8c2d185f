"""Tables on servers or spread over the workers, beside a dense part that is data or model parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.strategy import Context, Strategy, Trainer

__all__ = ["Hybrid", "strategy"]


class Hybrid:
    """Fulfils ``tricorn.strategy.Strategy``, with the family of the plan's dense part for all that is no table."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        from tricorn.hybrid.refusals import why_not

        return why_not(job, plan)

    def trainer(self, context: Context) -> Trainer:
        """A worker's half: the dense part's trainer, with the tables beside it."""
        from tricorn.hybrid.served import ServedTables
        from tricorn.hybrid.spread import SpreadTables
        from tricorn.strategy import family

        served = context.plan.served
        return family(context.plan).trainer(context, ServedTables(context) if served else SpreadTables(context))


strategy: Strategy = Hybrid()
