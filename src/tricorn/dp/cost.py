"""What data parallel training costs.

Legend: n bytes of all parameters, p workers, h hosts that they are on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.dp.memory import resident_bytes
from tricorn.planner.ground import CODING, ENCODED, combined
from tricorn.planner.parts import LOCAL_PENALTY, Parts, stalls_of, waiting
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground

BUCKET = 1 << 20  # bytes; smaller gradients travel when all is computed


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured."""
    found, moved = _parts(plan, ground)
    n, h = float(ground.profile.weight_bytes), ground.spread(plan)
    mean, busy = sum(found.computing) / plan.workers, max(found.computing)
    idle = waiting(found.computing, ground.jitter(found.scatter), stalls_of(plan, ground), found.meeting)
    exchange, update = found.after[EXCHANGE], found.after[UPDATE]
    way = f"zero{plan.zero}" if plan.zero else "dp"
    rounds = plan.local_steps
    return Prediction(
        plan=plan,
        terms={COMPUTE: mean, IDLE: idle, DATA: found.loading, **found.after},
        scatter=combined((busy, found.scatter), (exchange, moved), (update, 0.1)),
        penalty=LOCAL_PENALTY if rounds > 1 else 1.0,
        memory={"worker": _memory(plan, ground, max(_shares(plan, ground)))},
        sent=_sent(plan, n) / rounds,
        links={ground.host(0).name: _over_link(plan, n, h) / rounds} if h > 1 else {},
        notes=ground.notes(way, plan.workers, n),
    )


def parts(plan: Plan, ground: Ground) -> Parts:
    """What a step consists of. Raises KeyError where nothing like it was measured."""
    return _parts(plan, ground)[0]


def _parts(plan: Plan, ground: Ground) -> tuple[Parts, float]:
    """And the scatter of the exchange."""
    profile, p, rounds = ground.profile, plan.workers, plan.local_steps
    n = float(profile.weight_bytes)
    hosts, shares, times = ground.places(plan)[0], _shares(plan, ground), plan.microbatches or 1
    taken = [ground.on(host, plan, share / times) for host, share in zip(hosts, shares, strict=True)]
    computing = tuple(seconds * times for seconds, _ in taken)
    h = ground.spread(plan)
    if h == 1:
        exchange, moved = ground.exchanging(f"zero{plan.zero}" if plan.zero and p > 1 else "dp", p, n)
        exchange, wire = exchange * ground.slowest(hosts), 0.0
    else:
        exchange, wire, moved = _between_hosts(plan, ground, n, sum(computing) / p)
    part = n / p if plan.zero or h == 1 else n  # workers of one host hold the state once
    update = max(ground.updating(plan, part, host) for host in ground.hosts(plan))
    after = {UPDATE: update, EXCHANGE: exchange / rounds, WIRE: wire / rounds}
    loading = ground.loading(max(shares), max(computing))
    scatter = max(scatter for _, scatter in taken)
    return Parts(computing=computing, scatter=scatter, loading=loading, after=after, meeting=rounds), moved


def _shares(plan: Plan, ground: Ground) -> list[float]:
    """Samples of each worker: alike, or as its host's speed when balanced."""
    hosts = ground.places(plan)[0]
    speeds = [1.0] * plan.workers
    if plan.balance:
        speeds = [1 / ground.on(host, plan, ground.profile.batch_size / plan.workers)[0] for host in hosts]
    whole = sum(speeds)
    return [ground.profile.batch_size * speed / whole for speed in speeds]


def _between_hosts(plan: Plan, ground: Ground, n: float, computing: float) -> tuple[float, float, float]:
    """Seconds that processors exchange for, seconds on the wire that nothing hides, and the scatter of the first."""
    hosts, p = ground.places(plan)[0], plan.workers
    h = ground.spread(plan)
    part = n * ENCODED[plan.compress]
    alone, scatter = ground.exchanging("dp", 1, n)
    software = ground.links.seconds("tcp/all_reduce", 2, part) * (1.5 if plan.zero == 3 else 1.0)
    if p > h:
        software += ground.links.seconds("shared/all_reduce", -(-p // h), n)
    coding = CODING[plan.compress] * ground.links.seconds("copy", 1, n)
    wire = ground.wire(_over_link(plan, n, h), sorted(set(hosts)), 2 * (h - 1))
    buckets = max(1, int(part // BUCKET))
    hidden = 0.0 if plan.local_steps > 1 else min(wire, ground.profile.backward * computing) * (1 - 1 / buckets)
    return (alone + software + coding) * ground.slowest(hosts), wire - hidden, scatter


def _over_link(plan: Plan, n: float, h: int) -> float:
    """Bytes of a step that leave a host, and as many that come: of a sum of gradients, and weights where gathered."""
    if h == 1:
        return 0.0
    halves = {0: 2, 1: 2, 2: 2, 3: 3}[plan.zero]
    return halves * (h - 1) / h * n * ENCODED[plan.compress]


def _sent(plan: Plan, n: float) -> float:
    """Bytes that all workers read of each other's, as runs count them."""
    p = plan.workers
    if p == 1:
        return 0.0
    return (2 if plan.zero < 3 else 3) * (p - 1) * n * ENCODED[plan.compress]


def _memory(plan: Plan, ground: Ground, share: float) -> int:
    """Peak resident bytes of the fullest worker."""
    profile = ground.profile
    kept = (profile.kept_bytes + profile.input_bytes) * share / (plan.microbatches or 1)
    held = resident_bytes(
        plan, profile.weight_bytes, profile.buffer_bytes, profile.slots, largest=profile.largest_bytes, kept=kept,
        hosts=ground.spread(plan),
    )  # fmt: skip
    return int(ground.base("dp") + held)
