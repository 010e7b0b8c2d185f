"""The plan of a run whose person left it open."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tricorn import planner
from tricorn.errors import JobFailed, PlanError
from tricorn.plan import Plan
from tricorn.planner.explain import disturbed, named, seconds
from tricorn.planner.options import STRATEGIES, settled
from tricorn.planner.replan import Outlook

if TYPE_CHECKING:
    from tricorn.job import Job


def choose(
    job: Job | tuple[str, str],
    given: Mapping[str, Any],
    told: Callable[[str], None] | None = None,
    planning: Callable[..., planner.Planned] = planner.plan,
) -> tuple[Plan, Outlook | None]:
    """The best plan with what is given, and what it should cost; ``told`` hears how it is found.

    It is for this machine, unless ``planning``, called as ``tricorn.planner.plan``, is for others. What cannot be
    measured, for the job fails or nothing that was given goes with what can be planned, is trained by
    data parallel, or by the first strategy that has all that was given. Raises PlanError for values of wrong types,
    UsageError for a job that cannot be loaded.
    """
    told = told or _say
    plain = [settled(strategy, given) for strategy in STRATEGIES]
    possible = [plan for plan in plain if not plan.mistakes()]
    if not possible:
        return min(plain, key=lambda plan: len(plan.mistakes())), None  # the run says what is wrong with it
    try:
        found = planning(job, given, told=told)
        chosen = found.chosen
    except (JobFailed, PlanError) as error:
        told(f"{possible[0].strategy}, for nothing can be predicted: {error}")
        return possible[0], None
    told(f"{named(chosen.plan)}, at {seconds(chosen.seconds)} a step; `tricorn plan` says why")
    for sentence in disturbed(found.ground.busy):
        told(sentence)
    return chosen.plan, found.outlook


def outlook(job: Job | tuple[str, str], plan: Plan, *, thorough: bool) -> Outlook | None:
    """What a plan that a person chose should cost, if that is known.

    ``thorough``: measure what is not, and ask which other plans there are.
    """
    if thorough and not plan.mistakes():
        try:
            planner.plan(job, told=_say)
        except (JobFailed, PlanError) as error:
            _say(f"nothing can be predicted: {error}")
    return planner.foreseen(job, plan)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
