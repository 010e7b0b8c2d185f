"""What data parallel training costs.

Legend: n bytes of all parameters, p workers, h hosts that they are on.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from tricorn.dp.memory import resident_bytes
from tricorn.planner.ground import ENCODED, combined
from tricorn.planner.parts import LOCAL_PENALTY, Parts, stalls_of, waiting
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction
from tricorn.planner.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.profile import Profile

BUCKET = 1 << 20  # bytes of a gradient that travel at once (dp/buckets.py)
FIRST = BUCKET // 4  # of the bucket that travels first (dp/buckets.py)
RANK = 4  # of PowerSGD (dp/powersgd.py)


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured."""
    found, moved = _parts(plan, ground)
    sending = traffic(plan, ground)
    mean, busy = sum(found.computing) / plan.workers, max(found.computing)
    idle = waiting(found.computing, ground.jitter(found.scatter), stalls_of(plan, ground), found.meeting)
    exchange, update = found.after[EXCHANGE], found.after[UPDATE]
    way = f"zero{plan.zero}" if plan.zero else "dp"
    return Prediction(
        plan=plan,
        terms={COMPUTE: mean, IDLE: idle, DATA: found.loading, **found.after},
        scatter=combined((busy, found.scatter), (exchange, moved), (update, 0.1)),
        penalty=LOCAL_PENALTY if plan.local_steps > 1 else 1.0,
        memory={"worker": _memory(plan, ground, max(_shares(plan, ground)))},
        sent=sending.sent,
        links=sending.links(ground),
        notes=ground.notes(way, plan.workers, float(ground.profile.weight_bytes)),
    )


def parts(plan: Plan, ground: Ground) -> Parts:
    """What a step consists of. Raises KeyError where nothing like it was measured."""
    return _parts(plan, ground)[0]


def _parts(plan: Plan, ground: Ground) -> tuple[Parts, float]:
    """And the scatter of the exchange."""
    profile, p, rounds = ground.profile, plan.workers, plan.local_steps
    n = float(profile.weight_bytes)
    hosts, shares, times = ground.places(plan)[0], _shares(plan, ground), plan.microbatches or 1
    h = ground.spread(plan)
    direct = h == 1 and not plan.zero and rounds == 1 and plan.compress == "none"
    taken = [ground.on(host, plan, share / times, direct=direct) for host, share in zip(hosts, shares, strict=True)]
    computing = tuple(seconds * times for seconds, _ in taken)
    if h == 1:
        exchange, moved = ground.exchanging(f"zero{plan.zero}" if plan.zero and p > 1 else "dp", p, n)
        exchange, wire = exchange * ground.slowest(hosts), 0.0
    else:
        exchange, wire, moved = _between_hosts(plan, ground, n, max(computing))
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
    """Seconds that processors exchange for, seconds on the wire that nothing hides, and the scatter of the first.

    ``computing``: of the slowest worker, beside whose backward buckets travel.
    """
    hosts, p = ground.places(plan)[0], plan.workers
    h = ground.spread(plan)
    part = n * ENCODED[plan.compress]
    alone, scatter = _alone(plan, ground, n)
    software = ground.links.seconds("tcp/all_reduce", 2, part) * (1.5 if plan.zero == 3 else 1.0)
    if p > h:
        software += ground.links.seconds("shared/all_reduce", -(-p // h), n)
    coding = ground.coding(plan.compress, n)
    wire = ground.wire(_meeting(plan, ground).fullest[1], sorted(set(hosts)), 2 * (h - 1))
    buckets = max(1, int(part // FIRST))
    beside = ground.profile.backward * computing * ground.together(set(hosts))
    hidden = 0.0 if plan.local_steps > 1 else min(wire, beside) * (1 - 1 / buckets)
    return (alone + software + coding) * ground.slowest(hosts), wire - hidden, scatter


def _alone(plan: Plan, ground: Ground, n: float) -> tuple[float, float]:
    """Seconds of a step that a worker spends beside computing, updating and what it sends, and their scatter: with
    ``zero`` as a step of two here has them, less what those two exchange through shared memory.
    """
    alone, scatter = ground.exchanging("dp", 1, n)
    way = f"zero{plan.zero}"
    if not plan.zero or not ground.links.counts(f"exchange/{way}"):
        return alone, scatter
    hooked, scatter = ground.exchanging(way, 2, n)
    gathered = ground.profile.gathered_bytes if plan.zero == 3 else n
    moved = ground.links.seconds("shared/reduce_scatter", 2, n) + ground.links.seconds("shared/all_gather", 2, gathered)
    return max(alone, hooked - moved), scatter


def traffic(plan: Plan, ground: Ground) -> Traffic:
    """What workers send each other in a step."""
    return _meeting(plan, ground).part(ground.profile.meetings(plan.local_steps))


def _meeting(plan: Plan, ground: Ground) -> Traffic:
    """The same of one step in which workers meet."""
    profile, hosts, found = ground.profile, ground.places(plan)[0], Traffic()
    n = float(profile.weight_bytes)
    if plan.zero:
        times = (plan.microbatches or 1) if plan.zero > 1 else 1
        found.reduce_scatter(hosts, n * times)
        found.all_gather(hosts, profile.gathered_bytes * times if plan.zero == 3 else n)
    elif plan.compress == "powersgd" and profile.shapes:
        for size in _factors(profile):
            found.all_reduce(hosts, size)
    elif plan.compress != "none":
        found.all_to_all(hosts, n * ENCODED[plan.compress])
        found.all_gather(hosts, n * ENCODED[plan.compress])
    elif len(set(hosts)) == 1 and plan.local_steps == 1:  # read where they lie, as much as with a sum in parts
        found.reduce_scatter(hosts, n)
        found.all_gather(hosts, n)
    else:
        found.all_reduce(hosts, n)
    return found


def _factors(profile: Profile) -> Iterator[float]:
    """Bytes of each sum that PowerSGD takes: in each bucket, of left factors and what has none, then of right ones."""
    left = right = size = 0
    begun = False
    for number, shape in reversed([*enumerate(profile.shapes)]):
        elements = prod(shape)
        rows = shape[0] if len(shape) > 1 else 1
        columns = elements // max(1, rows)
        thin = len(shape) > 1 and 2 * RANK * (rows + columns) < elements
        left += RANK * rows if thin else elements
        right += RANK * columns if thin else 0
        size += elements * profile.element_bytes
        if size >= (BUCKET if begun else FIRST) or number == 0:
            yield left * profile.element_bytes
            yield right * profile.element_bytes
            left = right = size = 0
            begun = True


def _memory(plan: Plan, ground: Ground, share: float) -> int:
    """Peak resident bytes of the fullest worker."""
    profile = ground.profile
    kept = (profile.kept_bytes + profile.input_bytes) * share / (plan.microbatches or 1)
    held = resident_bytes(
        plan, profile.weight_bytes, profile.buffer_bytes, profile.slots, largest=profile.largest_bytes, kept=kept,
        hosts=ground.spread(plan), encoded=ENCODED[plan.compress],
    )  # fmt: skip
    return int(ground.base("dp") + held)
