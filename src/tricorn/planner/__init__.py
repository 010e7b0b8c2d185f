"""The planner: measures a job and a machine, predicts what every plan costs, and says which is best and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tricorn.errors import PlanError
from tricorn.plan import Plan
from tricorn.planner import cluster as clusters
from tricorn.planner import store
from tricorn.planner.cluster import Cluster
from tricorn.planner.explain import explain
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction, Rejected
from tricorn.planner.search import Planning, predicted, search
from tricorn.planner.survey import Survey

if TYPE_CHECKING:
    from tricorn.job import Job

__all__ = ["Cluster", "Planned", "Prediction", "Rejected", "foreseen", "plan"]


@dataclass(frozen=True)
class Planned:
    """What planning found. ``ranked``: every plan that can run, best first; ``rejected``: the others, and why."""

    ground: Ground
    planning: Planning

    @property
    def ranked(self) -> tuple[Prediction, ...]:
        return self.planning.ranked

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return self.planning.rejected

    @property
    def chosen(self) -> Prediction:
        """The best. Raises PlanError, with the reasons, if no plan can run the job."""
        if self.planning.chosen is None:
            reasons = list(dict.fromkeys(rejected.reason for rejected in self.rejected))
            raise PlanError(
                "no plan can run this job:\n" + "\n".join(f"  - {reason}" for reason in reasons[:8]),
                remedy="Change one of these, or leave options out.",
            )
        return self.planning.chosen

    @property
    def best(self) -> Plan:
        """The plan to train with."""
        return self.chosen.plan

    @cached_property
    def reasons(self) -> list[str]:
        """Why, in plain words."""
        return explain(self.planning, self.ground)


def plan(
    job: Job | tuple[str, str],
    given: Mapping[str, object] | None = None,
    *,
    cluster: Cluster | str | Path | None = None,
    approximate: bool = False,
    fresh: bool = False,
    told: Callable[[str], None] = lambda text: None,
) -> Planned:
    """Predict every plan for a job, given as itself or as (file, name), and say which is best.

    ``cluster`` is a file that describes other machines; without it the plan is for this one. ``given`` are fields of
    the plan that are settled. ``approximate`` allows plans whose updates are not those of one process: asynchronous,
    compressed, local. What has to be measured, first of all the machine, takes some seconds and is kept on disk;
    ``fresh`` measures anew, and ``told`` hears what is being measured.

    Raises UsageError for a job that cannot be loaded and a cluster file with mistakes.
    """
    where = cluster if isinstance(cluster, Cluster) else clusters.read(Path(cluster)) if cluster else clusters.here()
    with Survey(job, told=told, fresh=fresh) as survey:
        ground = Ground(survey.profile(), survey.links(), where)
        return Planned(ground, search(ground, survey.why_not, given or {}, approximate=approximate))


def foreseen(job: Job | tuple[str, str], plan: Plan) -> Prediction | None:
    """What this plan should cost here, if job and machine have been measured before and it has no mistakes."""
    if plan.mistakes():
        return None
    with Survey(job, told=lambda text: None) as survey:
        known, links = survey.known(), store.load_links()
    if known is None or links is None:
        return None
    found = predicted(plan, Ground(known, links, clusters.here()))
    return found if isinstance(found, Prediction) else None
