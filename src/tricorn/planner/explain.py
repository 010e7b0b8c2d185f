"""Why a plan, in plain words. Pure: every number is one of the predictions'."""

from __future__ import annotations

from collections import Counter

from tricorn.plan import Plan
from tricorn.planner.ground import Ground
from tricorn.planner.load import BUSY
from tricorn.planner.prediction import Prediction
from tricorn.planner.search import Planning, exact

WORDS = {
    "compute": "computing", "update": "updating", "data": "making batches", "exchange": "exchanging",
    "wire": "on the links", "waiting": "waiting for others",
}  # fmt: skip
_NAMED = (
    "zero", "compress", "compress_tables", "local_steps", "balance", "sparse_consistency", "embeddings", "replicas",
    "tensor", "schedule", "microbatches",
)  # fmt: skip
MOST_NAMED = 6  # hosts
SHOWN = 0.02  # of a step: terms below are not worth a word
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def named(plan: Plan) -> str:
    """A plan in few words: what it is, and what differs from the plainest of its kind."""
    parts = [plan.strategy if plan.synchronous else f"{plan.strategy} {plan.consistency}"]
    parts.append(f"{plan.workers} worker{'s' * (plan.workers > 1)}")
    if plan.servers:
        parts.append(f"{plan.servers} server{'s' * (plan.servers > 1)}")
    for field in _NAMED:
        value = getattr(plan, field)
        if value != getattr(Plan(strategy=plan.strategy), field):
            parts.append(field.replace("_", " ") if value is True else f"{field.replace('_', ' ')} {value}")
    if plan.hosts:
        more = " ..." * (len(plan.hosts) > MOST_NAMED)
        parts.append(f"on host{'s' * (len(plan.hosts) > 1)} {' '.join(map(str, plan.hosts[:MOST_NAMED]))}{more}")
    return ", ".join(parts)


def explain(planning: Planning, ground: Ground) -> list[str]:
    """Sentences: what is chosen, what its step consists of, what was not chosen and what would make the difference."""
    chosen = planning.chosen
    if chosen is None:
        return ["No plan can run this job here."]
    steps = ground.profile.steps
    said = [
        f"{named(chosen.plan)}: {seconds(chosen.seconds)} a step, {seconds(chosen.low)} to {seconds(chosen.high)}, and "
        f"{seconds(chosen.seconds * steps)} an epoch of {steps:,} steps.",
        f"Of a step, {_terms(chosen)}.",
    ]
    if chosen.plan.cuts:
        begin = [f"{ground.profile.layers[cut].name!r}" for cut in chosen.plan.cuts]
        said.append(f"The model is cut before {', '.join(begin)}.")
    if chosen.plan.hosts:
        said.append(_homes(chosen.plan, ground))
    role, most = chosen.fullest
    memory = min(ground.host(host).memory for hosts in ground.places(chosen.plan) for host in hosts)
    said.append(f"The fullest role ({role}) needs {size(most)} of the {size(memory)} that a machine has.")
    idle, more = _idle(ground, chosen.plan), _busier(planning, chosen, ground)
    said += [_beside(chosen, other) for other in _others(planning, chosen) if other is not more]
    if any(idle):
        why = "no other plan that can run here has work for more." if more is None else _beside(chosen, more)
        said.append(f"{_unused(idle, ground)} unused: {why}")
    faster = next((p for p in planning.ranked if not exact(p.plan) and p.score < chosen.score), None)
    if faster is not None and exact(chosen.plan):
        said.append(
            f"{named(faster.plan)} would be faster to the same quality, {seconds(faster.seconds)} a step with "
            f"{faster.penalty:.2f} times the steps, but its updates are not those of one process; --approximate "
            "allows that."
        )
    if chosen.notes:
        said.append(f"It goes beyond what was measured here: {'; '.join(chosen.notes)}.")
    if planning.tried:
        said.append(f"Tried for some steps where they would run: {'; '.join(map(named, planning.tried))}.")
    said = [*disturbed(ground.busy), *said]
    for reason, count in Counter(rejected.reason for rejected in planning.rejected).most_common(3):
        said.append(f"{count} plan{'s are' if count > 1 else ' is'} out of the question: {reason.rstrip('.')}.")
    return said


def _homes(plan: Plan, ground: Ground) -> str:
    """Which hosts its roles are on."""
    where = dict(zip(("Workers", "servers"), ground.places(plan), strict=True))
    said = []
    for roles, hosts in where.items():
        names = [*dict.fromkeys(f"{ground.host(host).name!r}" for host in hosts)]
        rest = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
        if names:
            said.append(f"{roles} are on {_listed([*names[:MOST_NAMED], *rest])}")
    return f"{', '.join(said)}."


def disturbed(busy: float) -> list[str]:
    """A sentence if others took so much of the machine, while it was measured, that it counts."""
    if busy <= BUSY:
        return []
    return [
        f"Other programs took {busy:.0%} of this machine while it was measured, and times are too long for that; "
        "they are measured again when it is quiet."
    ]


def _others(planning: Planning, chosen: Prediction) -> list[Prediction]:
    """The best of one worker, and of each other family."""
    alone = next((p for p in planning.ranked if p.plan.workers == 1 and p.plan.strategy == "dp"), None)
    families = {chosen.plan.strategy: chosen}
    for prediction in planning.ranked:
        if exact(prediction.plan):
            families.setdefault(prediction.plan.strategy, prediction)
    found = [alone] if alone is not None and alone is not chosen else []
    return found + [
        prediction for prediction in families.values() if prediction is not chosen and prediction is not alone
    ]


def _idle(ground: Ground, plan: Plan) -> tuple[int, int]:
    """How many machines the plan has no work for, and how many cores."""
    workers, servers = ground.places(plan)
    busy = Counter(servers)
    for host in workers:
        busy[host] += ground.threads(plan, host)
    free = [int(host.cores) - busy[index] for index, host in enumerate(ground.cluster.hosts)]
    return len(free) - len(busy), sum(max(0, cores) for cores in free)


def _unused(idle: tuple[int, int], ground: Ground) -> str:
    hosts = ground.cluster.hosts
    few, many, what = (idle[0], len(hosts), "machines") if idle[0] else (idle[1], int(ground.cluster.cores), "cores")
    return f"{few} of the {many} {what} {'stays' if few == 1 else 'stay'}"


def _busier(planning: Planning, chosen: Prediction, ground: Ground) -> Prediction | None:
    """The best plan that leaves less idle, and that may be chosen."""
    idle = _idle(ground, chosen.plan)
    if not any(idle):
        return None
    able = (p for p in planning.ranked if exact(p.plan) or not exact(chosen.plan))
    return next((p for p in able if _idle(ground, p.plan) < idle), None)


def _beside(chosen: Prediction, other: Prediction) -> str:
    """How another plan differs, and by what most."""
    if other.seconds > chosen.seconds:
        term = max(other.terms, key=lambda t: other.terms[t] - chosen.terms[t])
        return (
            f"{named(other.plan)} would take {seconds(other.seconds)} a step: {WORDS[term]} takes "
            f"{seconds(other.terms[term])} there, and {seconds(chosen.terms[term])} here."
        )
    worse = []
    if other.penalty > chosen.penalty:
        worse.append(f"it would need {other.penalty:.2f} times the steps, and {chosen.penalty:.2f} here")
    if other.lost > chosen.lost:
        worse.append(f"failures would take {_share(other)} of its time, and {_share(chosen)} here")
    but = ", ".join(worse) if other.score > chosen.score else ""
    return f"{named(other.plan)} would take {seconds(other.seconds)} a step, " + (
        f"but {but}." if but else "which is as good; the simpler one is taken."
    )


def _share(prediction: Prediction) -> str:
    """Of its time that is lost; with failures faster than recoveries it is all of it."""
    return f"{min(1.0, prediction.lost):.2%}"


def _terms(prediction: Prediction) -> str:
    shown = sorted(prediction.terms.items(), key=lambda item: -item[1])
    parts = [f"{seconds(value)} {WORDS[term]}" for term, value in shown if value >= SHOWN * prediction.seconds]
    verb = "is" if len(parts) == 1 else "are"
    return f"{_listed(parts)} {verb} what takes the time" if len(parts) == 1 else _listed(parts)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def seconds(value: float) -> str:
    """Three digits and a unit."""
    unit, name = next(((unit, name) for unit, name in UNITS if value >= unit), UNITS[-1])
    return f"{value / unit:.3g} {name}" if value < 1000 else f"{value:,.0f} s"


def size(value: float) -> str:
    """Bytes: three digits and a unit."""
    unit, name = next(((unit, name) for unit, name in SIZES if value >= unit), SIZES[-1])
    return f"{value / unit:.3g} {name}"
