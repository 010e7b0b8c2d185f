"""Every plan that could be meant, what each would cost, and which is best. Pure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from tricorn.plan import Plan
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction, Rejected

TIE = 1.03  # plans whose scores differ by less are alike, and the simplest of them is taken
SLOW_LINK = 5_000.0  # Mbit/s below which it can pay to send less
MICROBATCHES = (1, 2, 4, 8, 16)
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


def exact(plan: Plan) -> bool:
    """Whether the plan's updates are those of one process, up to the order of addition."""
    fresh = plan.sparse_consistency in (None, "bsp")
    return plan.synchronous and fresh and plan.compress == "none" and plan.local_steps == 1


def search(ground: Ground, why_not: WhyNot, given: Mapping[str, object], *, approximate: bool) -> Planning:
    """Predict every candidate and rank them. ``given`` fields of the plan are as they are given.

    Unless ``approximate``, a plan that is not exact is ranked but not chosen.
    """
    plans = list(candidates(ground, given))
    ranked: list[Prediction] = []
    rejected: list[Rejected] = []
    for plan, reason in zip(plans, why_not(plans), strict=True):
        found = reason or predicted(plan, ground)
        if isinstance(found, str):
            rejected.append(Rejected(plan=plan, reason=found))
        elif lack := _lack(found, ground):
            rejected.append(Rejected(plan=plan, reason=lack))
        else:
            ranked.append(found)
    ranked.sort(key=lambda prediction: prediction.score)
    able = [prediction for prediction in ranked if approximate or exact(prediction.plan)]
    return Planning(ranked=tuple(ranked), rejected=tuple(rejected), chosen=_simplest(able))


def predicted(plan: Plan, ground: Ground) -> Prediction | str:
    """What the plan would cost, or why that is not known."""
    if not ground.profile.compute:
        return ground.profile.unmeasured or "its computing could not be measured"
    try:
        folder = "hybrid" if plan.strategy != plan.dense or plan.embeddings != "whole" else plan.strategy
        cost = importlib.import_module(f"tricorn.{folder}.cost")
        found: Prediction = cost.predict(plan, ground)
    except ModuleNotFoundError:
        return f"what {plan.strategy} costs is not known"
    except KeyError as error:
        return f"nothing like it was measured on this machine ({error.args[0]})"
    except ValueError as error:
        return str(error)
    return found


def candidates(ground: Ground, given: Mapping[str, object]) -> Iterator[Plan]:
    """Plans worth a thought, each once, with what is given in place of their own."""
    seen: set[bytes] = set()
    for proposed in _proposed(ground, given):
        if any(getattr(proposed, field) != given[field] for field in ("strategy", "workers") if field in given):
            continue
        plan = msgspec.structs.replace(proposed, **given)
        name = msgspec.json.encode(plan)
        if name not in seen and not plan.mistakes():
            seen.add(name)
            yield plan


def _proposed(ground: Ground, given: Mapping[str, object]) -> Iterator[Plan]:
    hosts = ground.cluster.hosts
    slow = len(hosts) > 1 and min(host.mbit or float("inf") for host in hosts) < SLOW_LINK
    tables = bool(ground.profile.tables)
    for workers in _counts(ground, given):
        yield Plan(strategy="dp", workers=workers)
        if workers > 1:
            yield from (Plan(strategy="dp", workers=workers, zero=zero) for zero in _ZEROS)
            if len({(host.speed, host.cores) for host in hosts}) > 1:
                yield Plan(strategy="dp", workers=workers, balance=True)
        if tables and workers > 1:
            yield Plan(strategy="dp", workers=workers, embeddings="rows")
        if workers > 1 and slow:
            yield Plan(strategy="dp", workers=workers, compress="int8")
            yield Plan(strategy="dp", workers=workers, compress="powersgd")
            yield Plan(strategy="dp", workers=workers, local_steps=16)
        for servers in sorted({1, 2, len(hosts)} if len(hosts) > 1 else {1}):
            yield Plan(strategy="ps", workers=workers, servers=servers)
            yield Plan(strategy="ps", workers=workers, servers=servers, consistency="asp")
            if tables:
                yield Plan(strategy="ps+dp", workers=workers, servers=servers)
        if workers > 1:
            for microbatches in MICROBATCHES:
                for replicas in (1, 2) if workers >= 4 and workers % 2 == 0 else (1,):
                    if microbatches * replicas <= ground.profile.batch_size:
                        yield Plan(strategy="mp", workers=workers, microbatches=microbatches, replicas=replicas)


_ZEROS: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


def _counts(ground: Ground, given: Mapping[str, object]) -> list[int]:
    """How many workers are worth a thought."""
    if isinstance(workers := given.get("workers"), int):
        return [workers]
    hosts = len(ground.cluster.hosts)
    most = max(hosts, int(sum(max(1.0, host.cores) for host in ground.cluster.hosts)))
    small = set(range(1, min(most, 4) + 1))
    return sorted(small | {1 << power for power in range(most.bit_length()) if 1 << power <= most} | {hosts, most})


def _lack(prediction: Prediction, ground: Ground) -> str | None:
    """What the plan has not enough of, in one sentence."""
    workers, servers = ground.places(prediction.plan)
    needed: dict[int, int] = {}
    for rank, host in enumerate(workers):
        role = f"stage {rank % prediction.plan.stages}"
        needed[host] = needed.get(host, 0) + prediction.memory.get(role, prediction.memory.get("worker", 0))
    for host in servers:
        needed[host] = needed.get(host, 0) + prediction.memory.get("server", 0)
    for host, size in needed.items():
        its = ground.host(host)
        if size > its.memory:
            return f"needs {size / 1e9:.3g} GB of memory on {its.name}, which has {its.memory / 1e9:.3g} GB"
    limit = prediction.plan.memory
    role, most = prediction.fullest
    if limit is not None and most > limit:
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
