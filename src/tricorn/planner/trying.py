"""Try the plans that seem best where they would run, until no other seems nearly as good. Pure, but for what tries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from tricorn.errors import TricornError
from tricorn.plan import Plan
from tricorn.planner.correct import way
from tricorn.planner.explain import named
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.replan import taught
from tricorn.planner.search import Planning, WhyNot, exact, search

SECONDS = 45.0  # for all trials
WORTH, MOST_WORTH = 20.0, 400.0  # steps of a run that one of a trial counts for, and all: nothing else was going on
FEWEST_STEPS = 3
IN_VAIN = 2  # trials without enough steps, after which there are no more: the job has too few, or they take too long
RIVAL = 1.25  # times the best: predictions of what was not tried may be as far off
CLOSE = 1.15  # times the best: what two trials of one plan may differ by
ROUNDS = 3  # trials of the best and of each of those that are so close


class Tried(NamedTuple):
    """What a trial found: seconds of a step by term (report/compare.py), of so many steps."""

    measured: Mapping[str, float]
    steps: float


NOTHING = Tried({}, 0.0)
Trial = Callable[[Plan], Tried]


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
    found: list[tuple[Plan, Mapping[str, float], float]] = []
    until, in_vain = now() + SECONDS, 0

    def why(plans: Sequence[Plan]) -> list[str | None]:
        return [failed.get(plan) or reason for plan, reason in zip(plans, why_not(plans), strict=True)]

    while True:
        known = taught(ground, found)
        planning = search(known, why, given, approximate=approximate)
        following = _next(planning, tried, approximate=approximate)
        if following is None or now() > until or in_vain == IN_VAIN:
            return msgspec.structs.replace(planning, tried=tuple(dict.fromkeys(plan for plan, *_ in found))), known
        told(f"trying {named(following.plan)}")
        tried.append(following.plan)
        try:
            measured, steps = trial(following.plan)
        except TricornError as error:
            failed[following.plan] = f"it was tried, and failed: {error}"
        else:
            if steps < FEWEST_STEPS:
                in_vain += 1
            else:
                found.append((following.plan, measured, min(WORTH * steps, MOST_WORTH)))


def _next(planning: Planning, tried: Sequence[Plan], *, approximate: bool) -> Prediction | None:
    """What to try now: the chosen plan; then the best that come near it; then a second time the chosen one, which may
    only have been lucky, and those between which a trial may be wrong; then the best of each way to exchange; and a
    third time those that are close.
    """
    chosen = planning.chosen
    if chosen is None or chosen.plan not in tried:
        return chosen
    left = [each for each in planning.ranked if each.plan not in tried and (approximate or exact(each.plan))]
    if left and left[0].score <= RIVAL * chosen.score:
        return left[0]
    close = [each for each in planning.ranked if each.plan in tried and each.score <= CLOSE * chosen.score]
    least = min(close, key=lambda each: tried.count(each.plan))
    times = tried.count(least.plan) if len(planning.ranked) > 1 else ROUNDS
    ways = {way(plan) for plan in tried}
    other = next((each for each in left if way(each.plan) not in ways), None)
    if times > 1 and other is not None:
        return other
    return least if times < ROUNDS else None
