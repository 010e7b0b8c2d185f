"""The planner: measures a job and a machine, predicts what every plan costs, and says which is best and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tricorn.errors import PlanError
from tricorn.plan import Plan
from tricorn.planner import cluster as clusters
from tricorn.planner import store, there
from tricorn.planner.cluster import Cluster
from tricorn.planner.explain import explain
from tricorn.planner.ground import Ground
from tricorn.planner.options import decided, refuse_mistakes
from tricorn.planner.prediction import Prediction, Rejected
from tricorn.planner.replan import Outlook
from tricorn.planner.search import Planning, predicted, search
from tricorn.planner.survey import Survey
from tricorn.planner.trying import Trial, try_out

if TYPE_CHECKING:
    from tricorn.engine.hosts import Place
    from tricorn.job import Job

__all__ = ["Cluster", "Outlook", "Planned", "Prediction", "Rejected", "foreseen", "learn", "plan"]


@dataclass(frozen=True)
class Planned:
    """What planning found. ``ranked``: every plan that can run, best first; ``rejected``: the others, and why."""

    ground: Ground
    planning: Planning
    verdicts: Mapping[str, str | None] = field(default_factory=dict)  # question -> what the strategy said of the plan
    key: str = ""  # under which the job's profile is kept

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

    @property
    def outlook(self) -> Outlook:
        """Of a run under the best plan."""
        return Outlook(self.chosen, self.ground, self.verdicts, self.key)

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
    places: Sequence[Place] = (),
    trial: Trial | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> Planned:
    """Predict every plan for a job, given as itself or as (file, name), and say which is best.

    ``cluster`` is a file that describes other machines; ``places`` are hosts that are at hand, and are measured.
    Without either the plan is for this machine. ``given`` are fields of the plan that are settled; ``auto`` leaves the
    strategy open. ``approximate`` allows plans whose updates are not those of one process: asynchronous, compressed,
    local. What has to be measured of job and machine takes some seconds and is kept on disk; ``fresh`` measures anew,
    and ``told`` hears what is being measured. With a ``trial``, which runs a plan for some steps, the plans that seem
    best are tried (planner/trying.py), and what that teaches is kept, but of other hosts.

    Raises UsageError for a job that cannot be loaded and a cluster file with mistakes, PlanError for ``given`` fields
    that no strategy has together, JobFailed for a job that cannot be measured.
    """
    assert not (cluster and places)
    where = clusters.of(cluster)
    given = decided(given or {})
    refuse_mistakes(given)
    with Survey(job, told=told, fresh=fresh) as survey:
        links = survey.links()
        profile = survey.profile()
        if places:
            where, links = there.measured(job, places, profile, links, told)
        ground = Ground(profile, links, where, {} if places else survey.seen)
        if trial is None:
            planning = search(ground, survey.why_not, given, approximate=approximate)
        else:
            planning, ground = try_out(ground, survey.why_not, given, approximate=approximate, trial=trial, told=told)
            if not where.described:
                survey.teach(ground.seen)
        return Planned(ground, planning, survey.verdicts, "" if places else survey.key)


def foreseen(job: Job | tuple[str, str], plan: Plan) -> Outlook | None:
    """What this plan should cost here, if job and machine have been measured before and it has no mistakes."""
    if plan.mistakes() or (links := store.load_links()) is None:
        return None
    with Survey(job, told=_silence) as survey:
        if (known := survey.known()) is None:
            return None
        ground = Ground(known, links, clusters.here(), survey.seen)
        found = predicted(plan, ground)
        if not isinstance(found, Prediction):
            return None
        return Outlook(msgspec.structs.replace(found, plan=plan), ground, survey.verdicts, survey.key)


def learn(outlook: Outlook, measured: Mapping[str, float], steps: float) -> None:
    """Keep what a run has measured in so many steps: the next predictions for the job go by it."""
    kept = store.load_profile(outlook.key)
    if kept is not None and kept.profile == outlook.ground.profile:
        store.save_profile(outlook.key, msgspec.structs.replace(kept, seen=outlook.after(measured, steps).seen))


def _silence(text: str) -> None:
    """For who does not want to hear."""
