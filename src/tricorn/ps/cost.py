"""What parameter server training costs.

Legend: n bytes of the dense part, m workers, s servers.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple, get_args

from tricorn.plan import RowCompression
from tricorn.planner.ground import ENCODED, combined
from tricorn.planner.parts import LOCAL_PENALTY, Parts, Served, stalls_of, stretched, waiting
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction
from tricorn.planner.traffic import Traffic
from tricorn.ps.footprint import server_bytes, worker_bytes
from tricorn.ps.placement import place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.profile import Profile

# How many more updates, as a share, asynchronous workers need to the same loss for each worker beyond the first, whose
# gradients are one update old for each other one (docs/planning.md has the measurements).
STALE = {"SGD": 0.02, "momentum": 0.5, "Adagrad": 0.2, "RowwiseAdagrad": 0.2, "FTRL": 0.2, "Adam": 0.25, "AdamW": 0.25}
STALE_ROWS = 0.05  # of a model that is mostly tables, whose workers seldom update the same rows
SLOT_BYTES = 16  # of a row in a table's index
ROW_ID = 8
SERVERS_SIDE = 0.5  # of an exchange on one machine: of 1.1 and 7.2 ms a worker's processor works 0.5 and 3.2
KEPT = 8  # lists of ids that a connection remembers, so that they are told once in a step (ps/blocks.py)


class Amounts(NamedTuple):
    """Of each worker's update."""

    samples: float
    dense: float  # bytes
    rows: float  # bytes of the different rows that the samples need
    gradients: tuple[tuple[str, float], ...]  # encoding, and bytes before it: of the dense part, then of each table
    passing: float  # bytes of weights, rows and gradients as they travel, on average of both ways


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one update. Raises KeyError where nothing like it was measured."""
    profile, m = ground.profile, plan.workers
    found, moved = _parts(plan, ground)
    terms = _agreed(plan, ground, found) if plan.synchronous else _clocked(plan, ground, found)
    amounts, sending = _amounts(plan, ground), traffic(plan, ground)
    return Prediction(
        plan=plan,
        terms=terms,
        scatter=combined((max(found.computing), found.scatter), (found.after[EXCHANGE], moved)),
        penalty=penalty(plan, profile),
        memory=_memory(plan, ground, amounts),
        sent=sending.sent,
        links=sending.links(ground),
        notes=ground.notes("ps" if plan.synchronous else "asp", m, amounts.dense),
    )


def traffic(plan: Plan, ground: Ground) -> Traffic:
    """What workers and servers send each other in a step; of asynchronous workers, for the update of one of them."""
    profile, (workers, servers), amounts = ground.profile, ground.places(plan), _amounts(plan, ground)
    held: dict[int, float] = {}
    for host, share in zip(servers, _shares(profile.dense_shapes, plan.servers), strict=True):
        held[host] = held.get(host, 0.0) + share
    dense, found, up = Traffic(), Traffic(), amounts.dense * ENCODED[plan.compress]
    dense.ask(workers, held, up=up, down=amounts.dense, here=up)
    found.add(dense.part(profile.meetings(plan.local_steps)))
    found.add(rows_traffic(plan, ground, workers, workers, amounts.samples))
    return found if plan.synchronous else found.part(1 / plan.workers)


def rows_traffic(
    plan: Plan, ground: Ground, readers: Sequence[int], pushers: Sequence[int], samples: float
) -> Traffic:  # fmt: skip
    """Rows of so many samples to each of the workers that read, and gradients from those that push, given by host.

    Servers have even parts of every table. Those of the same host are read in place, and told the ids when pushed to.
    """
    profile, found = ground.profile, Traffic()
    held = {host: count / plan.servers for host, count in Counter(ground.places(plan)[1]).items()}
    for number, table in enumerate(profile.tables):
        ids = table.ids(samples)
        told, rows = ids * ROW_ID, ids * table.dim * profile.element_bytes
        again = told if number < len(profile.tables) - KEPT else 0.0
        pushed = rows * ENCODED[row_encoding(plan, table.name)]
        found.ask(readers, held, up=told, down=rows, here=0.0)
        found.ask(pushers, held, up=pushed + again, down=0.0, here=pushed + told)
    return found


def row_encoding(plan: Plan, table: str) -> str:
    """How gradients of a table's rows travel: to servers as they have it, and else as they are."""
    whole = plan.compress if plan.served and plan.compress in get_args(RowCompression) else "none"
    return plan.compress_tables.get(table, whole)


def parts(plan: Plan, ground: Ground) -> Parts:
    """What a step consists of, or a worker's update. Raises KeyError where nothing like it was measured."""
    return _parts(plan, ground)[0]


def _parts(plan: Plan, ground: Ground) -> tuple[Parts, float]:
    """And the scatter of the exchange."""
    amounts = _amounts(plan, ground)
    m, way = plan.workers, "ps" if plan.synchronous else "asp"
    taken, scatter = ground.computing(plan, amounts.samples, served=True)
    workers, servers = ground.places(plan)
    apart = ground.apart(plan)
    alone, _ = _exchange(way, plan, ground, 1, amounts)
    together, moved = _exchange(way, plan, ground, m, amounts)
    updating = ground.profile.updating(1, 1, amounts.dense / plan.servers)  # each its part, with one thread
    answering, update = together * ground.slowest(workers), updating * ground.slowest(servers)
    if apart:  # workers do their side of it elsewhere
        answering = together * SERVERS_SIDE / plan.servers * ground.slowest(servers)
    busy = answering + update
    crowded = not apart and m + plan.servers > ground.cluster.cores
    if not plan.synchronous and crowded:  # servers take from workers what they need
        cores = min(m, ground.cluster.cores)
        busy = answering + (update + sum(taken) / m) / cores
    served = _served(plan, ground, amounts.passing, busy)
    loading, wire = ground.loading(amounts.samples, max(taken)), _wire(served, m if plan.synchronous else 1)
    if plan.synchronous:  # what others add is that the servers have more to do
        awake, update = ground.awake(servers if apart else workers, workers), updating * ground.awake(servers, workers)
        exchange = min(alone, together) * ground.slowest(workers) + max(0.0, together - alone) * awake
        exchange += max(0.0, busy - (loading + max(taken) + update + exchange + wire))
    elif plan.consistency == "ssp":
        exchange = alone * ground.slowest(workers)
    else:  # the fast ones make most updates
        exchange = alone * m / sum(count / ground.slowness(host, count) for host, count in Counter(workers).items())
    after = {UPDATE: update, EXCHANGE: exchange, WIRE: wire}
    return Parts(computing=tuple(taken), scatter=scatter, loading=loading, after=after, served=served), moved


def _amounts(plan: Plan, ground: Ground) -> Amounts:
    profile = ground.profile
    samples = profile.batch_size / (plan.workers if plan.synchronous else 1)
    n = float(profile.weight_bytes - profile.table_bytes)
    by_table = [
        (row_encoding(plan, table.name), table.ids(samples) * table.dim * profile.element_bytes)
        for table in profile.tables
    ]
    rows = sum(size for _, size in by_table)
    pushed = sum(ENCODED[how] * size for how, size in by_table)
    passing = (n * (1 + ENCODED[plan.compress]) / plan.local_steps + rows + pushed) / 2
    gradients = (plan.compress, n), *by_table
    return Amounts(samples=samples, dense=n, rows=rows, gradients=gradients, passing=passing)


def _agreed(plan: Plan, ground: Ground, found: Parts) -> dict[str, float]:
    """A step waits for the slowest; then all exchange at once."""
    idle = waiting(found.computing, ground.jitter(found.scatter), stalls_of(plan, ground))
    mean = sum(found.computing) / plan.workers
    return {COMPUTE: mean, IDLE: idle, DATA: found.loading, **found.after}


def _clocked(plan: Plan, ground: Ground, found: Parts) -> dict[str, float]:
    """Updates come at the workers' own pace, but no faster than the cores, or the fullest server, make them.

    With a bound on staleness the fast ones wait for the slowest in the end, however large it is.
    """
    m, served = plan.workers, found.served
    assert served is not None
    computing = stretched(found.computing, stalls_of(plan, ground))
    beside = found.loading + sum(found.after.values())
    cycles = [seconds + beside for seconds in computing]
    own = max(cycles) / m if plan.consistency == "ssp" else 1 / sum(1 / cycle for cycle in cycles)
    link = served.link * served.remote / m
    pace = max(own, served.busy, link)
    mean = sum(computing) / m
    terms = {COMPUTE: mean, DATA: found.loading, **found.after}
    terms = {term: seconds / m for term, seconds in terms.items()}
    share = min(1.0, pace / sum(terms.values()))  # of unlike workers the fast ones make most updates
    terms = {term: seconds * share for term, seconds in terms.items()}
    slack = pace - sum(terms.values())
    held_by = WIRE if pace == link else EXCHANGE if pace == served.busy else IDLE
    return {IDLE: 0.0, **terms, held_by: terms.get(held_by, 0.0) + max(0.0, slack)}


def penalty(plan: Plan, profile: Profile) -> float:
    """How many times the updates of one process a run needs to come to the same loss, for gradients come late."""
    if plan.synchronous:
        late = 0.0 if plan.sparse_consistency in (None, "bsp") else STALE_ROWS
        return (LOCAL_PENALTY if plan.local_steps > 1 else 1.0) + late
    each = STALE["momentum" if profile.optimizer == "SGD" and profile.slots else profile.optimizer]
    if profile.table_bytes > profile.weight_bytes / 2:
        each = min(each, STALE_ROWS)
    return 1 + each * (plan.workers - 1)


def _exchange(way: str, plan: Plan, ground: Ground, m: int, amounts: Amounts) -> tuple[float, float]:
    """Seconds that m workers and servers exchange for in one update: the dense part, and rows; and the scatter."""
    links, n, size = ground.links, amounts.dense, max(amounts.dense, 4.0)
    row_bytes = amounts.rows * (m if plan.synchronous else 1)
    dense, scatter = ground.exchanging(way, m, size)
    if plan.servers > 1:  # each of them has a part of every other worker's
        own, (many, _) = ground.exchanging(way, 1, size)[0], ground.exchanging(way, m, size / plan.servers)
        dense = min(dense, own + max(0.0, many - ground.exchanging(way, 1, size / plan.servers)[0]))
    dense /= plan.local_steps
    if row_bytes:
        least = links.curve(f"exchange/{way}", m).points[0].seconds
        seconds, scattered = ground.reading(way, m, row_bytes)
        if plan.servers > 1:
            own, mine = ground.reading(way, 1, amounts.rows)[0], amounts.rows / plan.servers
            many = ground.reading(way, m, row_bytes / plan.servers)[0] - ground.reading(way, 1, mine)[0]
            seconds = min(seconds, own + max(0.0, many))
        rows = max(0.0, seconds - least)
        rows += least if plan.local_steps > 1 else 0.0  # which are alone in most steps
        # Those that may be older are read while the step before is computed.
        dense += rows / 2 if plan.sparse_consistency in ("ssp", "asp") else rows
        scatter = max(scatter, scattered)
    if ground.apart(plan):  # over connections, and not through shared memory
        dense += links.seconds("tcp/send", 2, n + row_bytes) - links.seconds("shared/send", 2, n + row_bytes)
    coding = sum(ground.coding(how, each) for how, each in amounts.gradients) / 2  # weights come as they are
    return max(dense, 1e-6) + coding, scatter


def _served(plan: Plan, ground: Ground, size: float, busy: float) -> Served:
    """The host whose link the servers on it keep busiest, or that of a worker that it keeps busier.

    ``size``: bytes of a message.
    """
    workers, servers = ground.places(plan)
    working, serving = Counter(workers), Counter(servers)
    fullest = Served(link=0.0, own=0.0, latency=0.0, remote=0, busy=busy)
    if not ground.apart(plan):
        return fullest
    for host, count in serving.items():
        link = size * count / plan.servers / ground.host(host).bytes_per_second
        remote = plan.workers - working[host]
        if link * remote >= fullest.link * fullest.remote:
            fullest = Served(link=link, own=0.0, latency=ground.host(host).latency, remote=remote, busy=busy)
    own, latency = 0.0, fullest.latency
    for host, count in working.items():
        away = size * count * (plan.servers - serving[host]) / plan.servers
        if away:
            its = ground.host(host)
            own, latency = max(own, away / its.bytes_per_second), max(latency, its.latency)
    return Served(link=fullest.link, own=own, latency=latency, remote=fullest.remote, busy=busy)


def _wire(served: Served, together: int) -> float:
    """Seconds on links in a worker's step, weights down and gradients up, with so many workers at once."""
    if not served.remote and not served.own:
        return 0.0
    return 2 * (max(served.link * min(together, served.remote), served.own) + served.latency)


class _Laid(NamedTuple):
    name: str
    start: int
    stop: int


@cache
def _shares(shapes: tuple[tuple[int, ...], ...], servers: int) -> tuple[float, ...]:
    """The part of the dense parameters that each server has: whole buckets, not quite the same; even if unknown."""
    edges = [0, *accumulate(map(prod, shapes))]
    found = place([_Laid("", start, stop) for start, stop in pairwise(edges)], servers)
    return tuple((stop - start) / edges[-1] if edges[-1] else 1 / servers for start, stop in found)


def _memory(plan: Plan, ground: Ground, amounts: Amounts) -> dict[str, int]:
    """Peak resident bytes of a worker and of a server."""
    profile, n, (workers, servers) = ground.profile, amounts.dense, ground.places(plan)
    worker = worker_bytes(
        plan, n, profile.buffer_bytes, profile.slots, largest=min(profile.largest_bytes, n),
        passing=(profile.kept_bytes + profile.input_bytes) * amounts.samples + 4 * amounts.rows,
        encoded=ENCODED[plan.compress],
    )  # fmt: skip
    rows = sum(table.rows * (table.dim * (1 + profile.slots) * profile.element_bytes + SLOT_BYTES)
               for table in profile.tables)  # fmt: skip
    server = server_bytes(plan, n, profile.slots, rows, beside=workers.count(servers[0]))
    return {"worker": int(ground.base("ps") + worker), "server": int(ground.base("ps", "server") + server)}
