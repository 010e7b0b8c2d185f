"""What runs teach: by how many times computing, making batches and exchanging took as long as was predicted. Pure.

Computing is kept by crowd (how many workers with how many threads each), exchanging by the plan's way and the numbers
of its roles, and the whole step by plan. What was not seen itself goes by what was seen of its kind; another way of
exchanging by several that were seen, or by what computing and exchanging have in common, as on a machine that is slower
than it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from typing import TYPE_CHECKING

import msgspec

from tricorn.plan import Plan
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground

DOUBT = 20.0  # steps that a profile is worth, beside those of runs
MEMORY = 2000.0  # steps of earlier runs that a later one is weighed against at most
FURTHEST = 50.0  # times: what is further off is some accident
BESIDES = (UPDATE, EXCHANGE, WIRE)  # all that a run can tell from computing and batches only as a whole


class Factor(msgspec.Struct, frozen=True):
    """So many ``times`` what was predicted, seen in so many ``steps``."""

    times: float
    steps: float


Seen = dict[str, Factor]


def learned(
    seen: Mapping[str, Factor], plain: Prediction, measured: Mapping[str, float], steps: float, ground: Ground
) -> Seen:
    """What is known once a run has ``measured`` seconds of a step by term (report/compare.py) in so many steps.

    ``plain`` is what was predicted of its plan without anything seen.
    """
    found = dict(seen)
    keys = _keys(plain.plan, ground)
    besides = measured.get("exchange", 0.0) + measured.get("waiting", 0.0)
    told = {DATA: measured.get("data"), COMPUTE: measured.get("compute"), EXCHANGE: besides}
    expected = {term: plain.terms.get(term, 0.0) for term in (DATA, COMPUTE)}
    expected[EXCHANGE] = sum(plain.terms.get(term, 0.0) for term in BESIDES)
    if _inseparable(plain.plan):
        told |= {EXCHANGE: besides + measured.get("compute", 0.0), COMPUTE: None}
    idle, computing = plain.terms.get(IDLE, 0.0), told[COMPUTE]
    if computing is None:  # then it is in the rest
        expected[EXCHANGE] += expected[COMPUTE] + idle
    else:  # who waits for the slowest waits for computing
        told[EXCHANGE] = max(besides - idle * computing / expected[COMPUTE], besides / 4)
    for term, seconds in told.items():
        if seconds is not None and expected[term] > 0:
            found[keys[term]] = _mixed(found.get(keys[term]), seconds / expected[term], steps)
    if "step" in measured:
        found[_own(plain.plan)] = _mixed(found.get(_own(plain.plan)), measured["step"] / plain.seconds, steps)
    return found


def _mixed(old: Factor | None, times: float, steps: float) -> Factor:
    """What was known, with what so many steps say: the mean by steps."""
    times, old = min(max(times, 1 / FURTHEST), FURTHEST), old or Factor(1.0, DOUBT)
    before = min(old.steps, MEMORY)
    mean = (before * log(old.times) + steps * log(times)) / (before + steps)
    return Factor(exp(mean), before + steps)


def corrected(prediction: Prediction, ground: Ground) -> Prediction:
    """The prediction, with what runs have taught. Of links between other hosts runs on this machine say nothing."""
    seen = ground.seen
    if not seen:
        return prediction
    times = {term: _times(seen, key) for term, key in _keys(prediction.plan, ground).items()}
    foreign = ground.cluster.described and not ground.cluster.present
    by_term = {COMPUTE: times[COMPUTE], IDLE: times[COMPUTE], DATA: times[DATA]} | dict.fromkeys(BESIDES, 1.0)
    if not foreign:
        by_term |= dict.fromkeys(BESIDES, times[EXCHANGE])
        if _inseparable(prediction.plan) and any(key.startswith("exchange/mesh/") for key in seen):
            by_term |= dict.fromkeys((COMPUTE, IDLE), times[EXCHANGE])
    terms = {term: seconds * by_term[term] for term, seconds in prediction.terms.items()}
    own = seen.get(_own(prediction.plan))
    if own and not foreign:
        ratio = own.times * prediction.seconds / (sum(terms.values()) or 1.0)
        terms = {term: seconds * ratio for term, seconds in terms.items()}
    return msgspec.structs.replace(prediction, terms=terms)


def _own(plan: Plan) -> str:
    """The key of what a plan's own steps took."""
    return f"step/{msgspec.json.encode(plan).decode()}"


def _keys(plan: Plan, ground: Ground) -> dict[str, str]:
    """Under what each term is kept: its kind, and after the last slash what it is of."""
    workers, threads = ground.places(plan)[0].count(0), ground.threads(plan, 0)
    rows = "rows " if plan.served and ground.profile.tables else ""
    size = f"{plan.workers} {plan.servers} {plan.replicas} {plan.tensor} {plan.schedule} {plan.microbatches}"
    return {COMPUTE: f"compute/{rows}{workers}x{threads}", DATA: "data/", EXCHANGE: f"exchange/{way(plan)}/{size}"}


def way(plan: Plan) -> str:
    """How it exchanges, after its family: of the same way what is seen of one plan is taken to hold for all."""
    family = "mesh" if _inseparable(plan) else "alone" if plan.workers == 1 else "group"
    kind = f"{plan.strategy} {plan.consistency} {plan.zero} {plan.embeddings} {plan.compress} {plan.local_steps}"
    return f"{family}/{kind}{' split' * (plan.tensor > 1)}"


def _inseparable(plan: Plan) -> bool:
    """Whether computing cannot be told from the rest: workers of a mesh do both by turns."""
    return plan.dense == "mp"


def _times(seen: Mapping[str, Factor], key: str) -> float:
    """The factor of that key, or else the mean of its kind.

    Of exchanging in a way that was not seen: the mean of those of its family if they are several, and else what
    computing and exchanging have in common.
    """
    if key in seen:
        return seen[key].times
    kind = key.rpartition("/")[0]
    if (mean := _mean(seen, kind + "/")) is not None or not key.startswith("exchange/"):
        return mean or 1.0
    family = kind.rpartition("/")[0] + "/"
    if len({other.rpartition("/")[0] for other in seen if other.startswith(family)}) > 1:
        return _mean(seen, family) or 1.0
    both = [_mean(seen, part) or 1.0 for part in ("compute/", "exchange/")]
    return min(both) if min(both) > 1 else max(both) if max(both) < 1 else 1.0


def _mean(seen: Mapping[str, Factor], kind: str) -> float | None:
    """Of all factors of a kind, by steps; None if there is none."""
    alike = [factor for key, factor in seen.items() if key.startswith(kind)]
    steps = sum(factor.steps for factor in alike)
    return exp(sum(factor.steps * log(factor.times) for factor in alike) / steps) if steps else None
