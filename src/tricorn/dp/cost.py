"""What data parallel training costs.

Legend: n bytes of all parameters, p workers, h hosts that they are on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.planner.ground import combined
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground

BACKWARD = 2 / 3  # of computing, beside which buckets of the gradient can travel
BUCKET = 1 << 20  # bytes; smaller gradients travel when all is computed
# Of a gradient's bytes, those that travel: what the encodings say of themselves; PowerSGD's rank 4 of square matrices.
ENCODED = {"none": 1.0, "bf16": 0.5, "fp16": 0.5, "int8": 0.26, "topk": 0.02, "powersgd": 0.05}
# Copies of the gradient that encoding and decoding come to.
ENCODING = {"none": 0.0, "bf16": 3.0, "fp16": 3.0, "int8": 6.0, "topk": 12.0, "powersgd": 12.0}
LOCAL_PENALTY = 1.15  # updates to the same loss, beside a run that meets every step (docs/planning.md)


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured."""
    profile, p = ground.profile, plan.workers
    n = float(profile.weight_bytes)
    shares = _shares(plan, ground)
    taken = [ground.on(host, plan, share) for host, share in zip(ground.places(plan)[0], shares, strict=True)]
    busy, scatter = max(taken)
    mean = sum(seconds for seconds, _ in taken) / p
    way = f"zero{plan.zero}" if plan.zero and p > 1 else "dp"
    h = ground.spread(plan)
    if h == 1:
        exchange, moved = ground.exchanging(way, p, n)
        wire = 0.0
    else:
        exchange, wire, moved = _between_hosts(plan, ground, n, mean)
    part = n / p if plan.zero or h == 1 else n  # workers of one host hold the state once
    update = max(ground.updating(plan, part, host) for host in set(ground.places(plan)[0]))
    rounds = plan.local_steps
    terms = {
        COMPUTE: mean,
        UPDATE: update,
        EXCHANGE: exchange / rounds,
        WIRE: wire / rounds,
        IDLE: max(0.0, busy - mean),
        DATA: ground.loading(max(shares), busy),
    }
    return Prediction(
        plan=plan,
        terms=terms,
        scatter=combined((busy, scatter), (exchange / rounds, moved), (update, 0.1)),
        penalty=LOCAL_PENALTY if rounds > 1 else 1.0,
        memory={"worker": _memory(plan, ground, max(shares))},
        sent=_sent(plan, n) / rounds,
        links={ground.host(0).name: _over_link(plan, n, h) / rounds} if h > 1 else {},
        notes=ground.notes(way, p, n),
    )


def _shares(plan: Plan, ground: Ground) -> list[float]:
    """Samples of each worker: alike, or as its host's speed when balanced."""
    hosts = ground.places(plan)[0]
    speeds = [ground.host(host).speed * min(1.0, ground.host(host).cores) for host in hosts]
    if not plan.balance:
        speeds = [1.0] * plan.workers
    return [ground.profile.batch_size * speed / sum(speeds) for speed in speeds]


def _between_hosts(plan: Plan, ground: Ground, n: float, computing: float) -> tuple[float, float, float]:
    """Seconds that processors exchange for, seconds on the wire that nothing hides, and the scatter of the first."""
    hosts, p = ground.places(plan)[0], plan.workers
    h = len(set(hosts))
    part = n * ENCODED[plan.compress]
    alone, scatter = ground.exchanging("dp", 1, n)
    software = ground.links.seconds("tcp/all_reduce", 2, part) * (1.5 if plan.zero == 3 else 1.0)
    if p > h:
        software += ground.links.seconds("shared/all_reduce", -(-p // h), n)
    coding = ENCODING[plan.compress] * ground.links.seconds("copy", 1, n)
    wire = ground.wire(_over_link(plan, n, h), sorted(set(hosts)), 2 * (h - 1))
    buckets = max(1, int(part // BUCKET))
    hidden = 0.0 if plan.local_steps > 1 else min(wire, BACKWARD * computing) * (1 - 1 / buckets)
    return alone + software + coding, wire - hidden, scatter


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
    """Peak bytes of a worker: weights, gradients, slots, activations, and a copy of the state to be written.

    Workers of one host see each other's gradients.
    """
    profile, p = ground.profile, plan.workers
    n = profile.weight_bytes
    spread = p if plan.zero else 1
    weights = n / p + n / 4 if plan.zero == 3 else n
    gradients = n / p if plan.zero >= 2 else n
    seen = (p - 1) * n / p if plan.zero == 0 and ground.spread(plan) == 1 else 0
    slots = profile.slots * n / spread
    saved = (1 + profile.slots) * n / spread
    activations = (profile.kept_bytes + profile.input_bytes) * share / (plan.microbatches or 1)
    held = weights + gradients + seen + slots + saved + profile.buffer_bytes + activations
    return int(ground.base("dp") + held)
