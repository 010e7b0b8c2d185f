"""What runs teach: by how many times computing, making batches and exchanging took as long as was predicted. Pure.

Computing is kept by crowd (how many workers with how many threads each), exchanging by the plan's way and the numbers
of its roles; and by plan what is left then of its step. What was not seen itself goes by what was seen of its kind;
another way of exchanging by several that were seen, or by what computing and exchanging have in common, as on a machine
that is slower than it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tricorn.plan import Plan
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground

DOUBT = 20.0  # steps that a profile is worth, beside those of runs
LEFT = 100.0  # the same of the terms together: their sum is mostly right once they are
MEMORY = 2000.0  # steps of earlier runs that a later one is weighed against at most
FURTHEST = 50.0  # times: what is further off is some accident
BESIDES = (UPDATE, EXCHANGE, WIRE)  # all that a run can tell from computing and batches only as a whole


class Factor(msgspec.Struct, frozen=True):
    """So many ``times`` what was predicted, and seconds ``beyond`` it, seen in so many ``steps``."""

    times: float
    steps: float
    beyond: float = 0.0


Seen = dict[str, Factor]


class Run(NamedTuple):
    """It ``measured`` seconds of a step by term (report/compare.py) in so many steps.

    ``plain`` is what was predicted of its plan without anything seen.
    """

    plain: Prediction
    measured: Mapping[str, float]
    steps: float


def learned(seen: Mapping[str, Factor], runs: Sequence[Run], ground: Ground) -> Seen:
    """What is known after the runs: of their terms first, and then of what is left of their steps."""
    found = dict(seen)
    for run in runs:
        for key, (seconds, expected) in _told(run, ground).items():
            found[key] = _mixed(found.get(key, Factor(1.0, DOUBT)), seconds, expected, run.steps)
    for plain, measured, steps in runs:
        own, believed = _own(plain.plan), sum(_terms(plain, found, ground).values())
        if "step" in measured and believed > 0:
            found[own] = _mixed(found.get(own, Factor(1.0, LEFT)), measured["step"], believed, steps)
    return found


def _told(run: Run, ground: Ground) -> dict[str, tuple[float, float]]:
    """Seconds that each term took, and those that were expected, under its key."""
    plain, measured, _ = run
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
    elif expected[COMPUTE] > 0:  # who waits for the slowest waits for computing
        told[EXCHANGE] = max(besides - idle * computing / expected[COMPUTE], besides / 4)
    return {
        keys[term]: (seconds, expected[term])
        for term, seconds in told.items()
        if seconds is not None and expected[term] > 0
    }


def _mixed(old: Factor, seconds: float, expected: float, steps: float) -> Factor:
    """What was known, with what so many steps say: the means by steps."""
    times = min(max(seconds / expected, 1 / FURTHEST), FURTHEST)
    before = min(old.steps, MEMORY)
    mean = (before * log(old.times) + steps * log(times)) / (before + steps)
    beyond = (before * old.beyond + steps * (times - 1) * expected) / (before + steps)
    return Factor(exp(mean), before + steps, beyond)


def corrected(prediction: Prediction, ground: Ground) -> Prediction:
    """The prediction, with what runs have taught. Of links between other hosts runs on this machine say nothing."""
    if not ground.seen:
        return prediction
    terms, own = _terms(prediction, ground.seen, ground), ground.seen.get(_own(prediction.plan))
    if own and not _foreign(ground):
        terms = {term: seconds * own.times for term, seconds in terms.items()}
    return msgspec.structs.replace(prediction, terms=terms)


def uncut(plan: Plan) -> Plan:
    """The plan as it is apart from its cuts, which a run without them finds by itself."""
    return msgspec.structs.replace(plan, cuts=None)


def _terms(prediction: Prediction, seen: Mapping[str, Factor], ground: Ground) -> dict[str, float]:
    """Its terms, by what is known of computing, batches and exchanging."""
    keys = _keys(prediction.plan, ground)
    times = {term: _times(seen, key) for term, key in keys.items()}
    by_term = {COMPUTE: times[COMPUTE], IDLE: times[COMPUTE], DATA: times[DATA]} | dict.fromkeys(BESIDES, 1.0)
    if not _foreign(ground):
        by_term |= dict.fromkeys(BESIDES, times[EXCHANGE])
        inseparable = [COMPUTE, IDLE] if _inseparable(prediction.plan) else []
        if any(key.startswith(_kind(keys[EXCHANGE])) for key in seen):
            by_term |= dict.fromkeys(inseparable, times[EXCHANGE])
        else:
            # Another way of exchanging has only in common with this what processors do, of which some is in every step.
            common = _mean(seen, "compute/")
            working = [EXCHANGE, UPDATE, *(inseparable if common is None else [])]
            own = sum(prediction.terms.get(term, 0.0) for term in working)
            most = max(1.0, 1 + _beyond(seen, _family(keys[EXCHANGE])) / own if own else 1.0, common or 1.0)
            by_term |= dict.fromkeys(working, min(times[EXCHANGE], most)) | {WIRE: 1.0}
    return {term: seconds * by_term[term] for term, seconds in prediction.terms.items()}


def _foreign(ground: Ground) -> bool:
    """Whether it is of other machines, of whose links runs here say nothing."""
    return ground.cluster.described and not ground.cluster.present


def _own(plan: Plan) -> str:
    """The key of what is left of a plan's step."""
    return f"step/{msgspec.json.encode(uncut(plan)).decode()}"


def _keys(plan: Plan, ground: Ground) -> dict[str, str]:
    """Under what each term is kept: its kind, and after the last slash what it is of."""
    hosts = ground.places(plan)[0]
    workers, threads = hosts.count(hosts[0]), ground.threads(plan, hosts[0])
    rows = "rows " if plan.served and ground.profile.tables else ""
    size = f"{plan.workers} {plan.servers} {plan.replicas} {plan.tensor} {plan.schedule} {plan.microbatches}"
    where = f" on {hosts[0]}" if hosts[0] and ground.unlike else ""
    return {
        COMPUTE: f"compute/{rows}{workers}x{threads}{where}",
        DATA: "data/",
        EXCHANGE: f"exchange/{way(plan)}/{size}",
    }


def way(plan: Plan) -> str:
    """How it exchanges, after its family: of the same way what is seen of one plan is taken to hold for all."""
    family = "mesh" if _inseparable(plan) else "alone" if plan.workers == 1 else "group"
    kind = f"{plan.strategy} {plan.consistency} {plan.zero} {plan.embeddings} {plan.compress} {plan.local_steps}"
    return f"{family}/{kind}{' split' * (plan.tensor > 1)}"


def _inseparable(plan: Plan) -> bool:
    """Whether computing cannot be told from the rest: workers of a mesh do both by turns."""
    return plan.dense == "mp"


def _kind(key: str) -> str:
    """What keys of the same kind begin with."""
    return key.rpartition("/")[0] + "/"


def _family(key: str) -> str:
    """What keys of the same family of kinds begin with."""
    return _kind(_kind(key)[:-1])


def _times(seen: Mapping[str, Factor], key: str) -> float:
    """The factor of that key, or else the mean of its kind.

    Of exchanging in a way that was not seen: the mean of those of its family if they are several, and else what
    computing and exchanging have in common.
    """
    if key in seen:
        return seen[key].times
    if (mean := _mean(seen, _kind(key))) is not None or not key.startswith("exchange/"):
        return mean or 1.0
    family = _family(key)
    if len({_kind(other) for other in seen if other.startswith(family)}) > 1:
        return _mean(seen, family) or 1.0
    both = [_mean(seen, part) or 1.0 for part in ("compute/", "exchange/")]
    return min(both) if min(both) > 1 else max(both) if max(both) < 1 else 1.0


def _beyond(seen: Mapping[str, Factor], kind: str) -> float:
    """Seconds by which what is of a kind took longer than was predicted, on average by steps."""
    alike = [factor for key, factor in seen.items() if key.startswith(kind)]
    return sum(each.steps * each.beyond for each in alike) / (sum(each.steps for each in alike) or 1.0)


def _mean(seen: Mapping[str, Factor], kind: str) -> float | None:
    """Of all factors of a kind, by steps; None if there is none."""
    alike = [factor for key, factor in seen.items() if key.startswith(kind)]
    steps = sum(factor.steps for factor in alike)
    return exp(sum(factor.steps * log(factor.times) for factor in alike) / steps) if steps else None
