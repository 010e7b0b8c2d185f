"""Whether another plan would now be clearly faster than the one that a run has, by what the run has measured. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tricorn.plan import Plan
from tricorn.planner.correct import Run, learned, uncut
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.search import predicted, question, search

FEWEST_STEPS, FEWEST_SECONDS = 40, 3.0  # before which a run has not said enough
CLEARLY = 0.9  # of what a step takes: the other plan's whole interval must lie below
CHANGE_SECONDS = 10.0  # that saving, ending, starting and loading take, and then some
KEPT = ("memory", "threads")  # fields of a plan that are not the planner's to change


@dataclass(frozen=True)
class Outlook:
    """What a run's plan was predicted to cost, and on what ground.

    ``verdicts``: question -> why the plan cannot run. ``key``: under which the job's profile is kept.
    """

    prediction: Prediction
    ground: Ground
    verdicts: Mapping[str, str | None]
    key: str = ""

    @property
    def plan(self) -> Plan:
        return self.prediction.plan

    def as_dict(self) -> dict[str, Any]:
        """What was predicted, and for which machines, as plain values."""
        return {**self.prediction.as_dict(), "machines": msgspec.to_builtins(self.ground.cluster.hosts)}

    def why_not(self, plans: Sequence[Plan]) -> list[str | None]:
        """What is known of each plan; what is not known is no rival."""
        return [self.verdicts.get(question(plan), "it was never asked") for plan in plans]

    def after(self, measured: Mapping[str, float], steps: float) -> Ground:
        """The ground with what the run has measured of its own plan."""
        return taught(self.ground, [(self.plan, measured, steps)])


def taught(ground: Ground, runs: Sequence[tuple[Plan, Mapping[str, float], float]]) -> Ground:
    """The ground with what runs of these plans have measured in so many steps."""
    plain = replace(ground, seen={})
    known = [
        Run(found, measured, steps)
        for plan, measured, steps in runs
        if not isinstance(found := predicted(plan, plain), str)
    ]
    return replace(ground, seen=learned(ground.seen, known, ground))


class Watch:
    """Looks now and then at what a run measures, and names a better plan once. Plans ``left`` before are none."""

    def __init__(self, outlook: Outlook, left: Collection[Plan] = ()) -> None:
        self._outlook = outlook
        self._passed = {uncut(plan) for plan in (outlook.plan, *left)}
        self._due = float(FEWEST_STEPS)
        self._likely: Plan | None = None
        self.better: Prediction | None = None

    def look(self, measured: Mapping[str, float], steps: float, left: int) -> bool:
        """Whether a better plan is known for the first time, of a run with so many steps left.

        Twice in a row, half as many steps apart, another plan must be faster by more than both are in doubt, and by
        more than it takes to change over.
        """
        here = measured.get("step", 0.0)
        if self.better or steps < self._due or steps * here < FEWEST_SECONDS or left * here < CHANGE_SECONDS:
            return False
        self._due = 1.5 * steps
        given = {field: value for field in KEPT if (value := getattr(self._outlook.plan, field)) is not None}
        found = search(self._outlook.after(measured, steps), self._outlook.why_not, given, approximate=False).chosen
        now = here * self._outlook.prediction.penalty
        if (
            found is None
            or uncut(found.plan) in self._passed
            or found.high * found.penalty > CLEARLY * now
            or (here - found.seconds) * left < CHANGE_SECONDS
        ):
            self._likely = None
            return False
        confirmed, self._likely = self._likely == found.plan, found.plan
        self.better = found if confirmed else None
        return confirmed
