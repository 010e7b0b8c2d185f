"""A job's run on a virtual clock, from what is measured of the job and of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tricorn import planner
from tricorn.errors import PlanError, UsageError
from tricorn.plan import Plan
from tricorn.planner import cluster as clusters
from tricorn.planner.cluster import Cluster
from tricorn.planner.ground import Ground
from tricorn.planner.options import decided
from tricorn.planner.simulation import Simulation
from tricorn.planner.simulation import simulate as on_virtual_clock
from tricorn.planner.survey import Survey

if TYPE_CHECKING:
    from tricorn.job import Job


def simulate(
    job: Job | tuple[str, str],
    plan: Plan | None = None,
    given: Mapping[str, object] | None = None,
    *,
    cluster: Cluster | str | Path | None = None,
    steps: int = 200,
    seed: int = 0,
    told: Callable[[str], None] = lambda text: None,
) -> Simulation:
    """A run of the plan, else of the best one that has what is ``given``, on a described cluster, else on this machine.

    Raises as ``tricorn.plan`` does, UsageError for a plan and something given beside it, and PlanError for a plan with
    mistakes, that cannot run the job, or whose costs are not known.
    """
    where = clusters.of(cluster)
    if plan is None:
        found = planner.plan(job, given, cluster=where, told=told)
        return on_virtual_clock(found.best, found.ground, steps=steps, seed=seed)
    if beside := decided(given or {}):
        raise UsageError(f"a plan is given, and {', '.join(beside)} beside it", remedy="Give one of the two.")
    if mistakes := plan.mistakes():
        raise PlanError("the plan has mistakes:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
    with Survey(job, told=told) as survey:
        links = survey.links()
        ground = Ground(survey.profile(), links, where, survey.seen)
        (refusal,) = survey.why_not([plan])
    if refusal is not None:
        raise PlanError(f"{plan.strategy} cannot run this job: {refusal}", remedy="Simulate another plan.")
    return on_virtual_clock(plan, ground, steps=steps, seed=seed)
