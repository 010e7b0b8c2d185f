"""What parameter server training costs.

Legend: n bytes of the dense part, m workers, s servers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.planner.ground import combined
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.profile import Profile

# How many more updates, as a share, asynchronous workers need to the same loss for each worker beyond the first, whose
# gradients are one update old for each other one (docs/planning.md has the measurements).
STALE = {"SGD": 0.02, "momentum": 0.5, "Adagrad": 0.2, "RowwiseAdagrad": 0.2, "FTRL": 0.2, "Adam": 0.25, "AdamW": 0.25}
STALE_ROWS = 0.05  # of a model that is mostly tables, whose workers seldom update the same rows
SLOT_BYTES = 16  # of a row in a table's index
ROW_ID = 8


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one update. Raises KeyError where nothing like it was measured."""
    return _synchronous(plan, ground) if plan.synchronous else _asynchronous(plan, ground)


def _synchronous(plan: Plan, ground: Ground) -> Prediction:
    profile, m = ground.profile, plan.workers
    n = float(profile.weight_bytes - profile.table_bytes)
    share = profile.batch_size / m
    taken, scatter = ground.computing(plan, share, served=True)
    busy, mean = max(taken), sum(taken) / m
    row_bytes = m * _row_bytes(ground, share)
    exchange, moved = _exchange("ps", plan, ground, n, row_bytes)
    return Prediction(
        plan=plan,
        terms={
            COMPUTE: mean,
            UPDATE: _update(plan, ground, n + row_bytes),
            EXCHANGE: exchange,
            WIRE: _wire(plan, ground, n, row_bytes / m, together=True),
            IDLE: max(0.0, busy - mean),
            DATA: ground.loading(share, busy),
        },
        scatter=combined((busy, scatter), (exchange, moved)),
        memory=_memory(plan, ground, n, share),
        sent=2 * (m * n + row_bytes * (1 + ROW_ID / _row_width(ground))),
        links=_links(plan, ground, n, row_bytes / m),
        notes=ground.notes("ps", m, n),
    )


def _asynchronous(plan: Plan, ground: Ground) -> Prediction:
    """Updates come at the workers' own pace, but no faster than the fullest server's processor and link take them."""
    profile, m = ground.profile, plan.workers
    n = float(profile.weight_bytes - profile.table_bytes)
    samples = profile.batch_size
    row_bytes = _row_bytes(ground, samples)
    exchange, moved = _exchange("asp", plan, ground, n, row_bytes)
    taken, scatter = ground.computing(plan, samples, served=True)
    wire = _wire(plan, ground, n, row_bytes, together=False)
    loading = ground.loading(samples, max(taken))
    update = _update(plan, ground, n + row_bytes)
    rate = sum(1 / (seconds + loading + wire) for seconds in taken)
    mean = sum(taken) / m
    pace = 1 / rate
    server_link = _server_link(plan, ground, n, row_bytes)
    terms = {
        COMPUTE: mean * pace / (mean + loading + wire),
        UPDATE: update,
        EXCHANGE: exchange,
        WIRE: max(wire * pace / (mean + loading + wire), server_link),
        IDLE: 0.0,
        DATA: loading * pace / (mean + loading + wire),
    }
    return Prediction(
        plan=plan,
        terms=terms,
        scatter=combined((terms[COMPUTE], scatter), (exchange, moved)),
        penalty=penalty(plan, profile),
        memory=_memory(plan, ground, n, samples),
        sent=2 * (n + row_bytes * (1 + ROW_ID / _row_width(ground))),
        links=_links(plan, ground, n, row_bytes),
        notes=ground.notes("asp", m, n),
    )


def penalty(plan: Plan, profile: Profile) -> float:
    """How many times the updates of one process an asynchronous run needs to come to the same loss."""
    each = STALE["momentum" if profile.optimizer == "SGD" and profile.slots else profile.optimizer]
    if profile.table_bytes > profile.weight_bytes / 2:
        each = min(each, STALE_ROWS)
    return 1 + each * (plan.workers - 1)


def _exchange(way: str, plan: Plan, ground: Ground, n: float, row_bytes: float) -> tuple[float, float]:
    """Seconds that processors exchange for in one update: the dense part, and rows beside it; and the scatter."""
    m, links = plan.workers, ground.links
    dense, scatter = ground.exchanging(way, m, max(n, 4.0))
    if row_bytes:
        rows = links.curve(f"rows/{way}", m)
        dense += max(
            0.0, links.seconds(f"rows/{way}", m, row_bytes) - links.curve(f"exchange/{way}", m).points[0].seconds
        )
        scatter = max(scatter, rows.scatter)
    if len(ground.cluster.hosts) > 1:  # over connections, and not through shared memory
        dense += links.seconds("tcp/send", 2, n + row_bytes) - links.seconds("shared/send", 2, n + row_bytes)
    return max(dense, 1e-6), scatter


def _update(plan: Plan, ground: Ground, n: float) -> float:
    """Seconds in which the servers update their parts, one thread each."""
    each = ground.profile.updating(1, 1, n / plan.servers)
    return max(each * ground.slowness(host, 1) for host in ground.places(plan)[1])


def _wire(plan: Plan, ground: Ground, n: float, row_bytes: float, *, together: bool) -> float:
    """Seconds on links in one worker's step: weights down, gradients up; ``together`` with all other workers."""
    workers, servers = ground.places(plan)
    if len(ground.cluster.hosts) == 1:
        return 0.0
    each = (n + row_bytes) / plan.servers
    found = 0.0
    for server in servers:
        remote = [host for host in workers if host != server]
        if not remote:
            continue
        at_server = each * (len(remote) if together else 1)
        slowest = max(
            at_server / ground.host(server).bytes_per_second,
            max(_to_worker(ground, host, each, servers) for host in remote),
        )
        latency = max(ground.host(host).latency for host in {server, *remote})
        found = max(found, 2 * (slowest + latency))
    return found


def _to_worker(ground: Ground, host: int, each: float, servers: list[int]) -> float:
    return each * sum(server != host for server in servers) / ground.host(host).bytes_per_second


def _server_link(plan: Plan, ground: Ground, n: float, row_bytes: float) -> float:
    """Seconds of the busiest server's link for each update, each direction by itself."""
    workers, servers = ground.places(plan)
    each = (n + row_bytes) / plan.servers
    return max(
        each * sum(host != server for host in workers) / plan.workers / ground.host(server).bytes_per_second
        for server in servers
    )


def _links(plan: Plan, ground: Ground, n: float, row_bytes: float) -> dict[str, float]:
    """Bytes of one step over each server's host's link, in one direction."""
    workers, servers = ground.places(plan)
    if len(ground.cluster.hosts) == 1:
        return {}
    found: dict[str, float] = {}
    for server in servers:
        remote = sum(host != server for host in workers) / (1 if plan.synchronous else plan.workers)
        name = ground.host(server).name
        found[name] = found.get(name, 0.0) + (n + row_bytes) / plan.servers * remote
    return found


def _row_bytes(ground: Ground, samples: float) -> float:
    """Bytes of the different rows that some samples need."""
    width = ground.profile.element_bytes
    return sum(table.ids(samples) * table.dim * width for table in ground.profile.tables)


def _row_width(ground: Ground) -> float:
    """Bytes of a row, of the first table's."""
    tables = ground.profile.tables
    return tables[0].dim * ground.profile.element_bytes if tables else 1.0


def _memory(plan: Plan, ground: Ground, n: float, samples: float) -> dict[str, int]:
    """Peak bytes of a worker (weights, gradients, messages, activations) and of a server (state, sums, versions)."""
    profile, s = ground.profile, plan.servers
    activations = (profile.kept_bytes + profile.input_bytes) * samples + 4 * _row_bytes(ground, samples)
    worker = ground.base("ps") + 3 * n + profile.buffer_bytes + activations
    rows = sum(table.rows * (table.dim * (1 + profile.slots) * profile.element_bytes + SLOT_BYTES)
               for table in profile.tables)  # fmt: skip
    sums = plan.workers if plan.synchronous else 1
    server = ground.base("ps", "server") + (n * (2 + profile.slots + sums) + rows) / s
    return {"worker": int(worker), "server": int(server)}
