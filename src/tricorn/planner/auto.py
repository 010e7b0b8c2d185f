"""The plan of a run whose person left it open."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from tricorn import planner
from tricorn.errors import JobFailed, PlanError
from tricorn.plan import Plan, StrategyName
from tricorn.planner.explain import named, seconds
from tricorn.planner.prediction import Prediction

if TYPE_CHECKING:
    from tricorn.job import Job


def settled(strategy: object, given: Mapping[str, Any]) -> Plan:
    """The plainest plan of a strategy, with what is given. Raises PlanError for values of wrong types."""
    defaults = {"strategy": strategy, "servers": 1 if str(strategy).startswith("ps") else 0}
    try:
        return msgspec.convert({**defaults, **given}, Plan)
    except msgspec.ValidationError as error:
        raise PlanError(f"an option of the plan: {error}", remedy="See tricorn.Plan for what there is.") from None


def choose(
    job: Job | tuple[str, str], given: Mapping[str, Any], told: Callable[[str], None] | None = None
) -> tuple[Plan, Prediction | None]:
    """The best plan with what is given, for this machine, and what it should cost; ``told`` hears how it is found.

    What cannot be measured, for the job fails or nothing that was given goes with what can be planned, is trained by
    data parallel, or by the first strategy that has all that was given. Raises PlanError for options that no strategy
    has together, UsageError for a job that cannot be loaded.
    """
    told = told or _say
    plain = [settled(strategy, given) for strategy in _STRATEGIES]
    possible = [plan for plan in plain if not plan.mistakes()]
    if not possible:
        return plain[0], None  # the run says what is wrong with it
    try:
        found = planner.plan(job, given, told=told)
        chosen = found.chosen
    except (JobFailed, PlanError) as error:
        told(f"{possible[0].strategy}, for nothing can be predicted: {error}")
        return possible[0], None
    told(f"{named(chosen.plan)}, at {seconds(chosen.seconds)} a step; `tricorn plan` says why")
    return chosen.plan, chosen


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_STRATEGIES: tuple[StrategyName, ...] = ("dp", "ps", "mp", "ps+dp", "ps+mp")
