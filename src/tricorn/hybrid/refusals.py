"""What a hybrid cannot do, one sentence each, beyond what its dense family says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.errors import PlanError
from tricorn.hybrid.tables import spread_tables
from tricorn.ps import unfit_encoding
from tricorn.state.flat import model_without_rows, trained_parameters
from tricorn.state.rows import row_tables
from tricorn.strategy import family

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job
    from tricorn.plan import Plan


def why_not(job: Job, plan: Plan) -> str | None:
    """What would have to change, None if the job can run. Builds the model."""
    model = model_without_rows(job)
    reason = _served(job, plan, model) if plan.served else _spread(job, plan, model)
    if reason is not None:
        return reason
    return family(plan).why_not(job, plan)


def _served(job: Job, plan: Plan, model: nn.Module) -> str | None:
    """Why the tables cannot be on servers while the rest is not."""
    rows = row_tables(job, model)
    tables = {table.parameter for table in rows}
    dense = {name for name, _ in trained_parameters(model)} - tables
    if not tables:
        return (
            "the model has no table that servers could hold; declare embeddings (tables={...}), or use "
            f"--strategy {plan.dense}"
        )
    if not dense:
        return f"all that it trains are tables, which leaves nothing to {plan.dense}; use --strategy ps"
    if plan.embeddings != "whole":
        return f"embeddings is {plan.embeddings}, and the tables are on servers; leave one of the two out"
    if plan.local_steps > 1:
        return f"local_steps is {plan.local_steps}, and tables on servers are updated in every step; leave it out"
    if wrong := unfit_encoding("none", plan.compress_tables, [table.name for table in rows]):
        return f"{wrong[0]}; {wrong[1]}"
    return None


def _spread(job: Job, plan: Plan, model: nn.Module) -> str | None:
    """Why the embeddings cannot be spread over the workers."""
    what = f"embeddings is {plan.embeddings}"
    try:
        tables = spread_tables(job, model)
    except PlanError as error:
        return f"{error}; {error.remedy}"
    if not tables:
        return f"{what}, and the model has no nn.Embedding or nn.EmbeddingBag; leave it out"
    if not {name for name, _ in trained_parameters(model)} - {table.parameter for table in tables}:
        return f"{what}, and the model has no other trained parameters; use --strategy ps"
    if plan.dense == "mp" and plan.replicas == 1:
        return f"{what}, and they are spread over replicas, of which there is one; give --replicas 2"
    if plan.local_steps > 1:
        return f"{what} and local_steps is {plan.local_steps}, but rows are updated in every step; leave one out"
    return None
