"""Every plan that could be meant, what each would cost, and which is best. Pure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType

import msgspec

from tricorn.plan import Plan
from tricorn.planner.correct import corrected
from tricorn.planner.ground import Ground
from tricorn.planner.parts import lost
from tricorn.planner.prediction import Prediction, Rejected

TIE = 1.03  # plans whose scores differ by less are alike, and the simplest of them is taken
MARGIN = 1.1  # what is needed may be so many times what is predicted
FAMILIES = ("dp", "ps", "mp", "ps+dp", "ps+mp")  # the simplest first

WhyNot = Callable[[Sequence[Plan]], list[str | None]]


class Planning(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: plans that can run, best first, and those that cannot, with the reason.

    ``chosen`` is the first of them, or the first that trains exactly as one process would, if only such were wanted.
    None if none can run.
    """

    ranked: tuple[Prediction, ...]
    rejected: tuple[Rejected, ...]
    chosen: Prediction | None
    tried: tuple[Plan, ...] = ()  # for some steps, where they would run


def exact(plan: Plan) -> bool:
    """Whether the plan's updates are those of one process, up to the order of addition."""
    fresh = plan.sparse_consistency in (None, "bsp")
    whole = {plan.compress, *plan.compress_tables.values()} == {"none"}
    return plan.synchronous and fresh and whole and plan.local_steps == 1


def question(plan: Plan) -> str:
    """Whether it can run is kept under this: the plan as JSON, wherever it is placed."""
    return msgspec.json.encode(msgspec.structs.replace(plan, hosts=None)).decode()


def search(ground: Ground, why_not: WhyNot, given: Mapping[str, object], *, approximate: bool) -> Planning:
    """Predict every candidate and rank them. ``given`` fields of the plan are as they are given.

    Of plans that differ only in how the same workers go about the same thing (``_kind``) the best stands for all.
    Unless ``approximate``, a plan that is not exact is ranked but not chosen.
    """
    able: dict[object, Prediction] = {}
    unable: dict[object, Rejected] = {}
    for plan in candidates(ground, given):
        kind, found = _kind(plan), predicted(plan, ground)
        reason = found if isinstance(found, str) else _lack(found, ground)
        if reason is not None:
            unable.setdefault(kind, Rejected(plan=plan, reason=reason))
        elif not isinstance(found, str) and (kind not in able or found.score < able[kind].score):
            able[kind] = found
    rejected = [each for kind, each in unable.items() if kind not in able]
    ranked: list[Prediction] = []
    for prediction, refusal in zip(able.values(), why_not([each.plan for each in able.values()]), strict=True):
        if refusal is None:
            ranked.append(prediction)
        else:
            rejected.append(Rejected(plan=prediction.plan, reason=refusal))
    ranked.sort(key=lambda prediction: prediction.score)
    wanted = [prediction for prediction in ranked if approximate or exact(prediction.plan)]
    return Planning(ranked=tuple(ranked), rejected=tuple(rejected), chosen=_simplest(wanted))


def predicted(plan: Plan, ground: Ground) -> Prediction | str:
    """What the plan would cost, with what runs have taught, or why that is not known."""
    if not ground.profile.compute:
        return ground.profile.unmeasured or "its computing could not be measured"
    try:
        found: Prediction = equations(plan).predict(plan, ground)
    except KeyError as error:
        return f"nothing like it was measured on this machine ({error.args[0]})"
    except ValueError as error:
        return str(error)
    return corrected(msgspec.structs.replace(found, lost=lost(plan, ground)), ground)


def equations(plan: Plan) -> ModuleType:
    """The module of the strategy's costs: ``predict`` and ``parts``, both of (plan, ground)."""
    folder = "hybrid" if plan.strategy != plan.dense or plan.embeddings != "whole" else plan.strategy
    return importlib.import_module(f"tricorn.{folder}.cost")


def candidates(ground: Ground, given: Mapping[str, object]) -> Iterator[Plan]:
    """Plans worth a thought, each once, with what is given in place of their own."""
    seen: set[bytes] = set()
    for proposed in _proposed(ground, given):
        if any(getattr(proposed, field) != given[field] for field in ("strategy", "workers") if field in given):
            continue
        settled = msgspec.structs.replace(proposed, **given)
        if settled.mistakes():
            continue
        for plan in [settled] if "hosts" in given else ground.placements(settled):
            name = msgspec.json.encode(plan)
            if name not in seen:
                seen.add(name)
                yield plan


def _proposed(ground: Ground, given: Mapping[str, object]) -> Iterator[Plan]:
    memory = given.get("memory")
    room = memory if isinstance(memory, int) else min(host.memory for host in ground.cluster.hosts)
    for folder in ("dp", "ps", "mp", "hybrid"):
        propose = importlib.import_module(f"tricorn.{folder}.candidates").candidates
        for workers in _counts(ground, given):
            yield from propose(workers, ground, room)


def _counts(ground: Ground, given: Mapping[str, object]) -> list[int]:
    """How many workers are worth a thought."""
    if isinstance(workers := given.get("workers"), int):
        return [workers]
    hosts = len(ground.cluster.hosts)
    most = max(hosts, int(sum(max(1.0, host.cores) for host in ground.cluster.hosts)))
    small = set(range(1, min(most, 4) + 1))
    powers = {1 << power for power in range(most.bit_length()) if 1 << power <= most}
    spared = {hosts - servers for servers in (1, 2) if hosts - servers > 1}  # hosts that are left to servers
    return sorted(small | powers | spared | {hosts, most, ground.cluster.fastest})


def _kind(plan: Plan) -> object:
    """Plans of one kind differ only in the number of servers, in hosts, or in microbatches and the order of their work.

    One microbatch is a kind of its own: some models can only be trained so.
    """
    plain = msgspec.structs.replace(plan, servers=min(plan.servers, 1), hosts=None)
    if plan.dense == "mp" and (plan.microbatches or 1) > 1:
        plain = msgspec.structs.replace(plain, microbatches=2, schedule=None, chunks=None)
    return plain


def fits(size: float, memory: float) -> bool:
    """Whether what is predicted to need so many bytes is sure enough to fit."""
    return size * MARGIN <= memory


def _lack(prediction: Prediction, ground: Ground) -> str | None:
    """What the plan has not enough of, in one sentence."""
    workers, servers = ground.places(prediction.plan)
    stages = prediction.plan.stages * prediction.plan.tensor
    needed: dict[int, int] = {}
    for rank, host in enumerate(workers):
        role = f"stage {rank % stages // prediction.plan.tensor}"
        needed[host] = needed.get(host, 0) + prediction.memory.get(role, prediction.memory.get("worker", 0))
    for host in servers:
        needed[host] = needed.get(host, 0) + prediction.memory.get("server", 0)
    for host, size in needed.items():
        its = ground.host(host)
        if not fits(size, its.memory):
            has = f"on {its.name}, which has {its.memory / 1e9:.3g} GB"
            return f"needs {size / 1e9:.3g} GB of memory, and a tenth to spare, {has}"
    limit = prediction.plan.memory
    role, most = prediction.fullest
    if limit is not None and not fits(most, limit):
        return f"its {role} needs {most / 1e9:.3g} GB of memory, and memory is {limit / 1e9:.3g} GB"
    return None


def _simplest(ranked: Sequence[Prediction]) -> Prediction | None:
    """The best; of those that are as good, the one with the fewest processes and parts."""
    if not ranked:
        return None
    alike = [prediction for prediction in ranked if prediction.score <= TIE * ranked[0].score]

    def complexity(prediction: Prediction) -> tuple[int, int, int, float]:
        plan = prediction.plan
        return FAMILIES.index(plan.strategy), plan.zero, plan.workers + plan.servers, prediction.score

    return min(alike, key=complexity)
