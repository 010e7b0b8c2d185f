"""A whole run of a plan on a described cluster, on a virtual clock.

What each role does takes as long as the cost equations say (``planner/parts.py``), times a noise that is drawn; who
waits for whom is decided by what runs use themselves: the pipeline's orders (``mp/schedule.py``) and the parameter
server's state machines (``ps/consistency.py``).
"""

from __future__ import annotations

from statistics import mean, median, quantiles

import msgspec

from tricorn.errors import PlanError
from tricorn.mp.simulate import Work
from tricorn.plan import Plan
from tricorn.planner.ground import Ground
from tricorn.planner.parts import Parts
from tricorn.planner.prediction import COMPUTE, DATA, Prediction
from tricorn.planner.search import equations, predicted
from tricorn.planner.simulation import agreed, clocked, failures
from tricorn.planner.simulation.noise import Noise
from tricorn.planner.simulation.trace import Trace

__all__ = ["Simulation", "simulate"]

MOST_UPDATES = 200_000  # of asynchronous workers together


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. Seconds are of one update of the model.

    ``waiting``: by role, the share of their time in which they have nothing to do. ``staleness``: how many gradients
    were how many updates old. ``run_seconds``: of the whole job, of which ``failures`` cost ``lost_seconds``.
    ``predicted``: what the equation says a step takes. ``busy``: the share of this machine that others took while it
    was measured.
    """

    plan: Plan
    steps: int  # that were simulated, of each worker
    seed: int
    mean: float
    median: float
    p90: float
    waiting: dict[str, float]
    staleness: dict[str, float]
    run_seconds: float
    failures: int
    lost_seconds: float
    predicted: float
    busy: float = 0.0

    @property
    def difference(self) -> float:
        """By which share a step takes longer than the equation says."""
        return self.mean / self.predicted - 1


def simulate(plan: Plan, ground: Ground, *, steps: int = 200, seed: int = 0, calm: bool = False) -> Simulation:
    """Simulate so many steps of the plan, then failures over the whole job. The same seed gives the same.

    ``calm``: nothing scatters, stalls or fails. Raises PlanError for a plan whose costs are not known.
    """
    prediction = predicted(plan, ground)
    if isinstance(prediction, str):
        raise PlanError(f"the plan cannot be simulated: {prediction}", remedy="Simulate another plan.")
    parts = _taught(equations(plan).parts(plan, ground), equations(plan).predict(plan, ground), prediction)
    noise = Noise(plan, ground, 0.0 if calm else parts.scatter, seed, calm=calm)
    if plan.synchronous:
        trace = agreed.run(plan, parts, noise, max(2, steps))
    else:
        steps = max(4, min(steps, MOST_UPDATES // plan.workers))
        trace = clocked.run(plan, parts, noise, steps)
    seconds = mean(trace.seconds)
    whole = seconds * ground.profile.steps * ground.profile.epochs
    count, lost = (0, 0.0) if calm else failures.over(whole, plan, ground, seed)
    return Simulation(
        plan=plan, steps=steps, seed=seed, mean=seconds, median=median(trace.seconds), p90=_p90(trace),
        waiting=trace.waiting, staleness=trace.staleness, run_seconds=whole + lost, failures=count, lost_seconds=lost,
        predicted=prediction.seconds, busy=ground.busy,
    )  # fmt: skip


def _taught(parts: Parts, plain: Prediction, prediction: Prediction) -> Parts:
    """With what runs have taught of the terms (planner/correct.py)."""
    times = {term: prediction.terms[term] / seconds if seconds else 1.0 for term, seconds in plain.terms.items()}
    computing = times[COMPUTE]
    line = parts.line and msgspec.structs.replace(
        parts.line, works=tuple(Work(*(seconds * computing for seconds in work)) for work in parts.line.works)
    )
    return msgspec.structs.replace(
        parts, computing=tuple(seconds * computing for seconds in parts.computing), line=line,
        loading=parts.loading * times[DATA], after={term: s * times[term] for term, s in parts.after.items()},
    )  # fmt: skip


def _p90(trace: Trace) -> float:
    return quantiles(trace.seconds, n=10)[-1]
