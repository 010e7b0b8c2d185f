"""Try the plans that seem best where they would run, until no other seems nearly as good. Pure, but for what tries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from tricorn.errors import TricornError
from tricorn.plan import Plan
from tricorn.planner.correct import way
from tricorn.planner.explain import named
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.replan import Outlook
from tricorn.planner.search import Planning, WhyNot, exact, search

SECONDS = 30.0  # for all trials
WORTH = 400.0  # steps of a run that a trial counts for: it was made for this, and nothing else was going on
RIVAL = 1.25  # times the best: predictions of what was not tried may be as far off

Trial = Callable[[Plan], Mapping[str, float]]  # seconds of a step by term (report/compare.py); empty if none was made


def try_out(
    ground: Ground, why_not: WhyNot, given: Mapping[str, object], *, approximate: bool, trial: Trial,
    told: Callable[[str], None], now: Callable[[], float] = time.monotonic,
) -> tuple[Planning, Ground]:  # fmt: skip
    """Plans as ``search`` ranks them once all that might be the best and one of each way to exchange were tried, or
    ``SECONDS`` are over.

    What a trial takes corrects the predictions of its plan and of those that are like it, as a run does; a plan that
    fails cannot run. Returns the ground with what was learned, too.
    """
    failed: dict[Plan, str] = {}
    tried: list[Plan] = []
    until = now() + SECONDS

    def why(plans: Sequence[Plan]) -> list[str | None]:
        return [failed.get(plan) or reason for plan, reason in zip(plans, why_not(plans), strict=True)]

    while True:
        planning = search(ground, why, given, approximate=approximate)
        following = _next(planning, tried, approximate=approximate)
        if following is None or now() > until:
            return msgspec.structs.replace(planning, tried=tuple(plan for plan in tried if plan not in failed)), ground
        told(f"trying {named(following.plan)}")
        tried.append(following.plan)
        try:
            measured = trial(following.plan)
        except TricornError as error:
            failed[following.plan] = f"it was tried, and failed: {error}"
        else:
            if measured:
                ground = Outlook(following, ground, {}).after(measured, WORTH)


def _next(planning: Planning, tried: Sequence[Plan], *, approximate: bool) -> Prediction | None:
    """What to try now: the chosen plan; then the best that come near it; then the best of each way to exchange."""
    chosen = planning.chosen
    if chosen is None or chosen.plan not in tried:
        return chosen
    left = [each for each in planning.ranked if each.plan not in tried and (approximate or exact(each.plan))]
    near = (each for each in left if each.score <= RIVAL * chosen.score)
    ways = {way(plan) for plan in tried}
    return next(near, None) or next((each for each in left if way(each.plan) not in ways), None)
